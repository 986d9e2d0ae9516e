"""Peewee's own connection API, guarded: what an installed database's methods become.

A database keeps its class; `install` puts these mixins before it, so each method calls the original. Blocks end on the frame
they began on, and each call that uses the connection passes through the frame's guard.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
import time
from typing import TYPE_CHECKING, Any, TypeVar

import peewee
from playhouse.pool import MaxConnectionsExceeded
from playhouse.pool import PooledDatabase as PlayhousePooledDatabase

from . import gevent
from .drivers import close_failed_cursor, is_broken_off, is_clean, reads_later, transaction_is_open
from .errors import ConcurrentUse, ConfigurationError, DatabaseUnavailable, PeeweeFrameworksError, WouldBlock
from .frame import Frame, GuardedCursor, Lineage, current_lineage, get_frames, inherits, native_thread, running_loop
from .redact import redact
from .waiting import lending

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from .state import State

_Result = TypeVar("_Result")


_SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE


def refuse_generators(function: Any, block: str) -> None:
    """Refuse to decorate a function with a block that would end before its body runs.

    Raises: `ConfigurationError` for a generator function, asynchronous or not.
    """
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(
            f"{block} cannot decorate the generator {getattr(function, '__qualname__', function)}: its body runs after the "
            "call has returned. Open it inside."
        )


class _Entry:
    """One entry into a block: the frame it began on, its mark there, and the block that does the work, if another."""

    __slots__ = ("block", "frame", "mark")

    def __init__(self, frame: Frame, mark: Lineage | None = None, block: Any = None) -> None:
        self.frame = frame
        self.mark = mark
        self.block = block


class _Block:
    """A block that ends on the frame it began on, whatever thread, task or context it is closed in.

    One object may be entered several times, nested or by several threads: Peewee allows it.
    """

    db: Any
    _entries: list[_Entry] | None = None
    _name = ""
    number = 0
    """Of savepoints, in the order in which they began; a transaction is outside of them."""
    _anew: Callable[[], Any] | None = None
    """What makes a block for each call of the function that it decorates, where not Peewee does."""

    def _build_ctx(self) -> Any:
        return super()._build_ctx() if self._anew is None else self._anew()  # type: ignore[misc]

    def __call__(self, function: Any) -> Any:
        """Decorate a function, a coroutine function too, each call of which runs in the block.

        Raises: `ConfigurationError` for a generator function, whose body runs after the call has returned.
        """
        refuse_generators(function, self._name or type(self).__name__.lower())
        if not inspect.iscoroutinefunction(function):
            return super().__call__(function)  # type: ignore[misc]

        @functools.wraps(function)
        async def call(*args: Any, **kwargs: Any) -> Any:
            async with self._build_ctx():
                return await function(*args, **kwargs)

        return call

    async def __aenter__(self) -> Any:
        from .aio import sync  # noqa: PLC0415 - most applications have no use for it

        return await sync.enter_block(self)

    async def __aexit__(self, *exc_info: object) -> Any:
        from .aio import sync  # noqa: PLC0415

        return await sync.exit_block(self, *exc_info)

    async def _call(self, name: str) -> Any:
        from .aio import sync  # noqa: PLC0415

        return await sync.call_block(self, name)

    def __enter__(self) -> Any:
        result = super().__enter__()  # type: ignore[misc]
        self._note(_Entry(self.db._state.frame()))
        return result

    def _note(self, entry: _Entry) -> None:
        if self._entries is None:
            self._entries = []
        self._entries.append(entry)

    def _pick(self) -> _Entry | None:
        """Take the entry that is left now: the last one on the current frame, else the last."""
        entries = self._entries
        if not entries:
            return None
        if len(entries) > 1:
            current = self.db._state.frame()
            for index in reversed(range(len(entries))):
                if entries[index].frame is current:
                    return entries.pop(index)
        return entries.pop()

    def __exit__(self, *exc_info: object) -> Any:
        entry = self._pick()
        if entry is None or not isinstance(entry.frame, Frame):
            return super().__exit__(*exc_info)  # type: ignore[misc]
        frame, mark = entry.frame, entry.mark
        # Not elsewhere, where the collector ends a generator's block: whoever read from the generator still carries the mark.
        failed = bool(exc_info) and exc_info[0] is not None
        refusal = None if failed or mark is None else _refusal_to_halve(self, frame, mark)
        if refusal is not None:
            exc_info = (ConcurrentUse, refusal, None)
        undone = refusal is not None or (failed and current_lineage.get() is mark)
        try:
            if self.db._state.frame() is frame and (mark is None or inherits(mark)):
                result = super().__exit__(*exc_info)  # type: ignore[misc]
            else:
                with frame.state.bound(frame, mark):
                    result = super().__exit__(*exc_info)  # type: ignore[misc]
        except ConcurrentUse:
            undone = current_lineage.get() is mark
            # Not without a mark: whoever goes on in it, as in an atomic request, could not be told from who comes next.
            if (
                self._is_open_still(frame) and mark is not None and not frame.state.is_async
            ):  # where they wait for their turn
                frame.put_off(self)
            raise
        finally:
            if mark is not None:
                frame.unmark(mark, undone=undone)
        if refusal is not None:
            raise refusal
        return result

    def _is_open_still(self, frame: Frame) -> bool:  # noqa: ARG002 - for those that have to look
        """Return whether there is something to roll back when somebody else was using the connection at the end."""
        return False


def _refusal_to_halve(block: Any, frame: Frame, mark: Lineage) -> ConcurrentUse | None:
    """Return the error for a COMMIT that would keep half of a call of `orm.run` which was given up in the block; else None."""
    around = get_frames()
    scope = None if around is None else around.scope
    if scope is None or len(frame.transactions) + len(frame.savepoints) > 1 or isinstance(block, peewee._savepoint):
        return None
    if not any(each.slot is not None and each.slot.is_left_in(mark) for each in scope.chain):
        return None
    return ConcurrentUse(
        f"A block of {frame.label} cannot commit: a call of orm.run that was cancelled or timed out in it goes on, and what "
        "that has done so far would be committed without the rest. Let the cancellation leave the block, or write "
        "`async with`, which waits for the call; the block is rolled back."
    )


class _Marked(_Block):
    """A transaction block or savepoint: while it is open, code that does not come from inside it is refused."""

    def __enter__(self) -> Any:
        state: State = self.db._state
        guard = state.frame()
        guard.enter()  # until the mark is set: nobody may slip in between BEGIN and the mark
        try:
            result = super(_Block, self).__enter__()  # type: ignore[misc]
            frame = state.frame()
            self._note(_Entry(frame, frame.mark() if frame.shared and not _handed_over() else None))
        finally:
            guard.leave()
        return result


class Transaction(_Marked, peewee._transaction):
    """Peewee's transaction block."""

    def __enter__(self) -> Any:
        _join_request(self.db)
        return super().__enter__()

    async def acommit(self) -> None:
        """Commit and begin anew, from asynchronous code."""
        await self._call("commit")

    async def arollback(self) -> None:
        """Roll back and begin anew, from asynchronous code."""
        await self._call("rollback")

    def begin_unmarked(self) -> Any:
        """Begin without a mark: whoever shares the scope may go on in the transaction."""
        _join_request(self.db)
        return _Block.__enter__(self)

    def _is_open_still(self, frame: Frame) -> bool:
        # It must not look as if it were not: MySQL's next BEGIN would commit it. On the stack nothing
        # commits it any more, and what comes next or the end of the scope rolls it back.
        open_still = frame.conn is not None and transaction_is_open(frame.conn) is not False
        if not open_still or self in frame.transactions:
            return False
        frame.transactions.insert(0, self)
        return True

    def __exit__(self, *exc_info: object) -> Any:
        try:
            return super().__exit__(*exc_info)
        finally:
            if exc_info and exc_info[0] is not None:
                self.db._replace_broken()


_numbers = itertools.count(1)


class Savepoint(_Marked, peewee._savepoint):
    """Peewee's savepoint block."""

    acommit = Transaction.acommit
    arollback = Transaction.arollback

    def _note(self, entry: _Entry) -> None:
        super()._note(entry)
        self.number = next(_numbers)
        entry.frame.savepoints.append(self)

    def _pick(self) -> _Entry | None:
        entry = super()._pick()
        if entry is not None and self in entry.frame.savepoints:
            entry.frame.savepoints.remove(self)
        return entry

    def _is_open_still(self, frame: Frame) -> bool:  # noqa: ARG002 - as above
        return True

    def rollback(self, begin: bool = True) -> None:
        # As in `Guarded.rollback`: an error here would hide the one that is unwinding the block.
        frame = self.db._state.frame()
        if frame.final and not begin:
            return
        frame.enter()
        try:
            if begin or not is_broken_off(frame.conn):
                super().rollback(begin)
        finally:
            frame.leave()


class Atomic(_Block, peewee._atomic):
    """Peewee's ``atomic``, a transaction or a savepoint."""

    _transaction_args: Any

    def __enter__(self) -> Any:
        guard = self.db._state.frame()
        guard.enter()  # now: which of the two it is depends on what ends the request's transaction, or rolls back a block
        try:
            _join_request(self.db)
            args, kwargs = self._transaction_args
            block = peewee._atomic(self.db, *args, **kwargs)  # which of the two it is belongs to this entry alone
            result = block.__enter__()
            self._note(_Entry(self.db._state.frame(), block=block))
        finally:
            guard.leave()
        return result

    def __exit__(self, *exc_info: object) -> Any:
        entry = self._pick()
        return entry.block.__exit__(*exc_info) if entry is not None else None


class Manual(_Block, peewee._manual):
    """Peewee's manual-commit block; connects first, since a connect would forget that the block is open."""

    def __enter__(self) -> Any:
        self.db._state.frame().settle()
        if self.db.is_closed():
            if not self.db.autoconnect:
                raise peewee.InterfaceError("Error, database connection not opened.")
            self.db.connect()
        return super().__enter__()


class ConnectionContext(_Block, peewee.ConnectionContext):
    """Peewee's ``connection_context``."""


def _join_request(database: Any) -> None:
    """Begin the transaction of an atomic request, if nothing has: a block inside it must not believe itself the outermost."""
    frame = database._state.frame()
    if frame.atomic and frame.conn is None and database.autoconnect:
        database.connect()


def _handed_over() -> bool:
    """Return whether the block being entered is written in a generator that runs on a worker thread.

    A sync dependency that yields inside ``with db.atomic()`` is set up on one thread with a copy of the context; the mark
    set there is lost, and the endpoint that continues inside the block could not show it. Such a block belongs to the whole
    scope; only overlap is refused.
    """
    if running_loop() is not None:
        return False
    caller = _caller()
    return caller is not None and bool(caller.f_code.co_flags & inspect.CO_GENERATOR)


def _caller() -> FrameType | None:
    """Return the Python frame of the user's code: the first that is not Peewee's, ours, or an `ExitStack`'s."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") in (__name__, "peewee", "contextlib"):
        frame = frame.f_back
    return frame


class Guarded:
    """Mixed into the class of an installed database: guards each call that uses the connection."""

    __slots__ = ()  # see `_guarded_class`

    _state: State
    autoconnect: bool
    deferred: bool

    def _guard(self, call: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        frame = self._state.frame()
        frame.enter()
        try:
            return call(*args, **kwargs)
        except BaseException as error:
            self._break_off(error)
            raise
        finally:
            frame.leave()

    def _break_off(self, error: BaseException) -> None:
        """Close a connection whose statement was interrupted, by a killed greenlet, gevent's Timeout or Ctrl-C.

        Half a statement may be on its way out, or half an answer on its way in: nothing may follow on this connection. Inside
        a transaction what comes next fails, so that it cannot commit by itself; outside, it connects anew.
        """
        if isinstance(self, peewee.SqliteDatabase):
            close_failed_cursor(error)
            return
        if isinstance(error, Exception):
            return
        conn = self._state.conn
        if conn is not None:
            with contextlib.suppress(Exception):  # the driver may have closed it already
                conn.close()
            self._replace_broken()

    def _replace_broken(self) -> None:
        frame = self._state.frame()
        # Under the lock: in the middle of somebody else's statement a connection looks the same.
        if frame.conn is None or not frame._acquire(False):
            return
        conn = None
        try:
            if not frame.is_counted_on and not frame.final and is_broken_off(frame.conn):
                conn = frame._detach()
        finally:
            frame._release()
        if conn is not None:
            self._state.drop(conn)
        elif frame.final and not frame._depth and not self._state.is_async:  # there nobody looks for the lock
            frame._end()  # `finish` may have found the lock taken by us

    def begin(self, *args: Any, **kwargs: Any) -> None:
        self._guard(super().begin, *args, **kwargs)  # type: ignore[misc]

    def commit(self) -> None:
        self._guard(super().commit)  # type: ignore[misc]
        self._unmark_all()

    def rollback(self) -> None:
        # After the end, or without a connection, everything is rolled back already; an error here would hide the one that is
        # unwinding the block.
        frame = self._state.frame()
        if not frame.final:
            self._guard(self._rollback_unless_broken, super().rollback)  # type: ignore[misc]
        self._unmark_all()

    def _rollback_unless_broken(self, rollback: Callable[[], None]) -> None:
        # Inside the guard: in the middle of somebody else's statement a connection looks broken off too.
        if not is_broken_off(self._state.conn):
            rollback()

    def _unmark_all(self) -> None:
        frame = self._state.frame()
        if not frame.transactions:
            while frame.lineage is not None:
                frame.unmark(frame.lineage)

    def after_commit(self, fn: Callable[[], Any]) -> Any:
        frame = self._state.frame()
        frame.settle()
        if frame.atomic and frame.conn is None and not inspect.iscoroutinefunction(fn):
            frame.early_callbacks += (fn,)  # the transaction begins with the first query; Peewee would call it now
            return fn
        return super().after_commit(fn)  # type: ignore[misc]

    def connect(self, *args: Any, **kwargs: Any) -> bool:
        state = self._state
        if state.orphans:
            state.reap()
        if "gevent" in sys.modules:
            gevent.watch(state)
        frame = state.frame()
        frame.enter()
        try:
            opened = self._connect_here(*args, **kwargs)
            if opened and frame.atomic:
                self._begin_request(frame)
            return opened  # noqa: TRY300 - the guard is held until here
        except BaseException as error:
            self._break_off(error)
            raise
        finally:
            frame.leave()

    @staticmethod
    def _begin_request(frame: Frame) -> None:
        try:
            frame.begin_request_transaction()
        except BaseException:
            # An open connection without its transaction would let the next statement commit by itself.
            # What was lost or cancelled on the way, an asynchronous driver has dropped by itself.
            if (conn := frame._detach()) is not None:
                frame.state.drop(conn)
            raise

    def _connect_here(self, *args: Any, **kwargs: Any) -> bool:
        return self._attempt(super().connect, *args, **kwargs)  # type: ignore[misc]

    def _connect_and_tell(self, *args: Any, **kwargs: Any) -> bool:
        """Stand for `_connect_here` where somebody listens; see `State.listen`."""
        start = time.perf_counter()
        opened = type(self)._connect_here(self, *args, **kwargs)
        if opened:
            self._state.connected(start)
        return opened

    def _attempt(self, connect: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
        was_closed = self._state.closed
        try:
            return connect(*args, **kwargs)
        except (peewee.OperationalError, peewee.InterfaceError) as error:
            if isinstance(error, PeeweeFrameworksError) or not was_closed or self.deferred:
                raise
            raise DatabaseUnavailable(f"{self._state.name}: connecting failed: {redact(str(error), [self])}") from error

    def close(self) -> bool:
        state = self._state
        frame = state.frame()
        if frame.final:
            return False
        frame.enter()
        try:
            if frame.conn is None or frame.transactions:
                return bool(super().close())  # type: ignore[misc]
            if running_loop() is None:
                super().close()  # type: ignore[misc]
                conn = None
            else:
                conn = frame._detach()
        finally:
            frame.leave()
        if conn is None:
            frame._released()
        else:
            frame._give_back(conn)
        return True

    def init(self, *args: Any, **kwargs: Any) -> None:
        super().init(*args, **kwargs)  # type: ignore[misc]
        self._state.reconfigure()

    def is_connection_usable(self) -> bool:
        return bool(self._guard(super().is_connection_usable))  # type: ignore[misc] # MySQL's is a ping

    def dispose(self) -> None:
        super().dispose()  # type: ignore[misc]
        self._state.forget()

    def push_transaction(self, transaction: Any) -> None:
        super().push_transaction(transaction)  # type: ignore[misc]
        frame = self._state.frame()
        if type(transaction) is peewee._transaction and frame.shared and len(frame.transactions) == 1:
            frame.mark()  # made by a `DatabaseProxy` that was never passed to us; ends with its COMMIT or ROLLBACK

    def session_start(self) -> Any:
        # A session is not a block: whoever shares the scope may go on with it.
        return self.transaction().begin_unmarked()

    def atomic(self, *args: Any, **kwargs: Any) -> Atomic:
        return Atomic(self, *args, **kwargs)

    def transaction(self, *args: Any, **kwargs: Any) -> Transaction:
        return Transaction(self, *args, **kwargs)

    def savepoint(self) -> Savepoint:
        return Savepoint(self)

    def manual_commit(self) -> Manual:
        return Manual(self)

    def connection_context(self) -> ConnectionContext:
        return ConnectionContext(self)

    def __enter__(self) -> Any:
        result = super().__enter__()  # type: ignore[misc]
        caller = _caller()
        if caller is not None and caller.f_code.co_flags & _SUSPENDABLE:
            # ``with db`` keeps nothing of its own, so what may be closed in another context is noted here.
            self._state.blocks.setdefault(caller, []).append(self._state.frame())
        return result

    def __exit__(self, *exc_info: object) -> Any:
        state, caller = self._state, _caller()
        frames = state.blocks.get(caller) if caller is not None else None
        if not frames:
            return super().__exit__(*exc_info)  # type: ignore[misc]
        frame = frames.pop()
        if not frames:
            del state.blocks[caller]  # type: ignore[arg-type]
        with state.bound(frame):
            return super().__exit__(*exc_info)  # type: ignore[misc]


def statement_methods(cls: Any) -> dict[str, Any]:
    """Make the methods that every statement passes through, for a database class that is being guarded.

    They hold what ``super()`` would look up each time, and read the frame once where Peewee reads the state twice.
    """
    methods = {"_execute_cursor": _guarded_execute(cls._execute_cursor)}
    if cls.execute_sql is peewee.Database.execute_sql:  # which only calls the other
        methods["execute_sql"] = methods["_execute_cursor"]
    if cls.cursor is _peewee_cursor:
        methods["cursor"] = _quick_cursor
    return methods


def _guarded_execute(execute: Any) -> Any:  # noqa: C901 - what `enter` and `leave` do, without their calls
    @functools.wraps(execute)
    def _execute_cursor(self: Any, sql: str, params: Any = None, **options: Any) -> Any:  # noqa: C901 - as above
        state = self._state
        frames = get_frames()
        frame = None if frames is None else frames.frames.get(state) or frames.find(state)
        if frame is None or not frame.shared:
            try:
                return execute(self, sql, params, **options)
            except BaseException as error:
                self._break_off(error)
                raise
        # What `enter` and `leave` do, without their calls.
        if not frame._acquire(False):
            frame.enter()
        elif frame._depth or not (frame.wary or frame.lineage):
            frame._depth += 1
        else:
            frame._release()
            frame.enter()
        try:
            cursor = execute(self, sql, params, **options) if options else execute(self, sql, params)
            if state.is_sqlite:
                if frame._reader != (thread := native_thread()):
                    frame.note_reader(thread)
                if state.tracks_cursors and cursor.description is not None:
                    frame.track(cursor)
            elif options or reads_later(cursor.__class__):
                frame.track(cursor)
                return GuardedCursor(cursor, frame)
            return cursor  # noqa: TRY300 - as above
        except BaseException as error:
            self._break_off(error)
            raise
        finally:
            frame._depth = depth = frame._depth - 1
            frame._release()
            if frame.final and not depth:
                frame._drop_late()

    return _execute_cursor


_peewee_cursor: Any = peewee.Database.cursor


@functools.wraps(_peewee_cursor)
def _quick_cursor(self: Any, named_cursor: Any = None) -> Any:
    frames = get_frames()
    frame = None if frames is None else frames.frames.get(self._state)  # `_execute_cursor` has made it
    conn = self._state.conn if frame is None else frame.conn
    return _peewee_cursor(self, named_cursor) if conn is None else conn.cursor()


class GuardedUnpooled(Guarded):
    """Mixed into databases without a pool, where nobody else knows since when a connection is in use."""

    __slots__ = ()

    def _connect_here(self, *args: Any, **kwargs: Any) -> bool:
        opened = super()._connect_here(*args, **kwargs)
        if opened:
            self._state.frame().since = time.monotonic()
        return opened


class GuardedPool(Guarded):
    """Mixed into playhouse's pooled databases."""

    __slots__ = ()

    _max_connections: int | None
    _connections: list[Any]
    _in_use: dict[Any, Any]
    _wait_timeout: float | None

    def _connect_here(self, *args: Any, **kwargs: Any) -> bool:
        # Past playhouse's wait, which would stall an event loop for up to its whole timeout, and a thread's place in its set.
        # A subclass's own `connect` is kept: it may do more.
        connect = super(Guarded, self).connect  # type: ignore[misc]
        if connect.__func__ is PlayhousePooledDatabase.connect:
            connect = functools.partial(peewee.Database.connect, self)  # type: ignore[arg-type]
        try:
            return self._attempt(connect, *args, **kwargs)
        except MaxConnectionsExceeded as error:
            if running_loop() is None:
                if not self._wait_timeout:
                    raise
                with lending():
                    return super()._connect_here(*args, **kwargs)
            raise WouldBlock(
                f"{self._state.name}: all {self._max_connections} connections are in use, and waiting for one here would "
                "stall the event loop. Use `await orm.run(...)`, or connect eagerly (connect='eager'), which waits "
                "without blocking."
            ) from error

    def _connect(self) -> Any:
        # Here and not before the wait, so that what becomes free while playhouse waits is found at its next attempt.
        if self._state.orphans or self._is_exhausted():
            self._state.reap()
            if self._wait_timeout and self._is_exhausted() and gevent.unpatched_hub() is not None:
                raise gevent.would_freeze(self._state.name)
        return super()._connect()  # type: ignore[misc]

    def _is_exhausted(self) -> bool:
        limit = self._max_connections
        return bool(limit and not self._connections and len(self._in_use) >= limit)

    def _can_reuse(self, conn: Any) -> bool:
        # Peewee sends a ROLLBACK at each check-in where the driver has no flag that it knows; most have one.
        if is_broken_off(conn):
            return False
        return is_clean(conn) or bool(super()._can_reuse(conn))  # type: ignore[misc]


class _Premade(_Block, peewee._callable_context_manager):
    """A block of a database that is yet to come; it is looked for where it is entered."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self._name = name
        self._anew = make
        self._open: list[Any] = []

    def __enter__(self) -> Any:
        block = self._build_ctx()
        result = block.__enter__()
        self._open.append(block)
        return result

    def __exit__(self, *exc_info: object) -> Any:
        return self._open.pop().__exit__(*exc_info)

    async def __aenter__(self) -> Any:
        block = self._build_ctx()
        result = await block.__aenter__()
        self._open.append(block)
        return result

    async def __aexit__(self, *exc_info: object) -> Any:
        return await self._open.pop().__aexit__(*exc_info)


class GuardedProxy(peewee.DatabaseProxy):
    """A `DatabaseProxy` whose blocks are those of the database behind it.

    A function that they decorate runs in one of the database that is behind it when it is called.
    """

    __slots__ = ()
    # Peewee's looks into `__slots__` of the very class, and a subclass has none of its own.
    __setattr__ = object.__setattr__  # type: ignore[assignment]

    def atomic(self, *args: Any, **kwargs: Any) -> Any:
        return self._block("atomic", *args, **kwargs)

    def transaction(self, *args: Any, **kwargs: Any) -> Any:
        return self._block("transaction", *args, **kwargs)

    def savepoint(self) -> Any:
        return self._real().savepoint()

    def manual_commit(self) -> Any:
        return self._block("manual_commit")

    def connection_context(self) -> Any:
        return self._block("connection_context")

    def _block(self, name: str, *args: Any, **kwargs: Any) -> Any:
        def make() -> Any:
            return getattr(self._real(), name)(*args, **kwargs)

        if self.obj is None:  # decorators are often made before the database is there
            return _Premade(name, make)
        block = make()
        if isinstance(block, _Block):  # not one of a database in which nothing is installed yet
            block._anew = make
        return block

    def _real(self) -> Any:
        if self.obj is None:
            raise AttributeError("Cannot use uninitialized Proxy.")
        return self.obj
