"""One database's connection in one unit of work, and the guard around it.

A frame has one user at a time, and a transaction belongs to the code that inherits it: anyone else gets `ConcurrentUse`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import peewee

from .drivers import is_broken_off, transaction_has_failed, transaction_is_open, unread_cursors
from .errors import ConcurrentUse, ScopeEnded, ScopeError, TransactionLost
from .forks import watch_forks

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from .scope import Scope
    from .state import State

logger = logging.getLogger("peewee_frameworks.scope")


class _GreenletLock:
    """A reentrant lock whose owner is a greenlet, for processes in which several share one thread."""

    __slots__ = ("_count", "_current", "_lock", "_owner")

    def __init__(self, current: Callable[[], object]) -> None:
        self._current = current
        self._lock = threading.Lock()
        self._owner: object = None
        self._count = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = self._current()
        if self._owner is me:
            self._count += 1
            return True
        if not self._lock.acquire(blocking, timeout):
            return False
        self._owner, self._count = me, 1
        return True

    def release(self) -> None:
        self._count -= 1
        if not self._count:
            self._owner = None
            self._lock.release()


def _make_lock() -> Any:
    # Chosen for each frame: greenlet may be imported, and threading patched, after this module.
    greenlet = sys.modules.get("greenlet")
    return threading.RLock() if greenlet is None else _GreenletLock(greenlet.getcurrent)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs on this thread now, or None: what blocks here would stall it.

    It does not import asyncio for the answer: that costs more than all the rest of the core, and many need it not.
    """
    # The default is for the moment in which another thread is importing it.
    find = getattr(sys.modules.get("asyncio.events"), "_get_running_loop", None)
    return None if find is None else find()


def in_greenlet() -> bool:
    """Return whether the caller shares its thread with others: what the thread does later need not be its doing."""
    greenlet = sys.modules.get("greenlet")
    return greenlet is not None and greenlet.getcurrent().parent is not None


class Lineage:
    """Marks the contexts that come from inside one transaction block.

    `outer` is the mark this context carried before; `below` is the mark of the block around, on the same frame. `undone` is
    that frame if the block was rolled back: what was started inside and goes on must not write there by itself.
    """

    __slots__ = ("below", "closed", "outer", "undone")

    def __init__(self, outer: Lineage | None, below: Lineage | None) -> None:
        self.outer = _first_that_counts(outer)  # or a long-lived context would chain every block it ever saw
        self.below = below
        self.closed = False
        self.undone: Frame | None = None


current_lineage: contextvars.ContextVar[Lineage | None] = contextvars.ContextVar(
    "peewee_frameworks_lineage", default=None
)


def _first_that_counts(mark: Lineage | None) -> Lineage | None:
    while mark is not None and mark.closed and mark.undone is None:
        mark = mark.outer
    return mark


def inherits(lineage: Lineage) -> bool:
    """Return whether the running code comes from inside the block that `lineage` marks."""
    return comes_from(current_lineage.get(), lineage)


def comes_from(mine: Lineage | None, lineage: Lineage) -> bool:
    """Return whether code that carries the mark `mine` comes from inside the block that `lineage` marks."""
    while mine is not None:
        if mine is lineage:
            return True
        mine = mine.outer
    return False


class Frames:
    """What the context variable holds: `frames`, a mapping of database states to the frames that the running code is to use.

    A `Scope` is one of these; an `Overlay` lies over it for a while.
    """

    frames: dict[State, Frame]
    parent: Frames | None

    @property
    def scope(self) -> Scope | None:
        """The scope that the code runs in."""
        raise NotImplementedError

    def has(self, state: State) -> bool:
        """Return whether the scope, or one around it, has this database."""
        raise NotImplementedError

    def find(self, state: State) -> Frame | None:
        """Return the frame of a database, made now if need be; None if no scope around has it."""
        raise NotImplementedError


class Overlay(Frames):
    """A frame that is not the scope's, laid over it for a while; see `State.bound`."""

    def __init__(self, parent: Frames | None, frame: Frame) -> None:
        self.parent = parent
        self.frames = {frame.state: frame}

    @property
    def scope(self) -> Scope | None:
        """The scope it lies over."""
        return None if self.parent is None else self.parent.scope

    def has(self, state: State) -> bool:
        """Return whether it, or what it lies over, has this database."""
        return state in self.frames or (self.parent is not None and self.parent.has(state))

    def find(self, state: State) -> Frame | None:
        """Return the frame of a database: this one, or of what it lies over."""
        frame = self.frames.get(state)
        return self.parent.find(state) if frame is None and self.parent is not None else frame


current_frames: contextvars.ContextVar[Frames | None] = contextvars.ContextVar("peewee_frameworks_frames", default=None)
# Bound here: CPython 3.11 and 3.12 compile a call of a method of an imported name, which `current_frames` would be, to the
# look-up of an attribute, and that costs as much again.
get_frames = current_frames.get
set_frames = current_frames.set
reset_frames = current_frames.reset


class Pin:
    """An entry in Peewee's stack of contexts that keeps a nested ``with db`` from closing the request's connection."""


_PIN = Pin()

native_thread = threading.get_ident  # under gevent too: what matters is the native thread that may be inside SQLite
_SEVERAL = -1

_PRUNE_CURSORS_AT = 16


class _Handover:
    """Held where a request's transaction begins and where it ends, for moments: each may come amid the other, on a thread."""

    def __init__(self) -> None:
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """A thread that is not there in the child may hold it."""
        self.lock = threading.Lock()


_handover = _Handover()

# Only `finish`, `release_early`, `_drop_late` and the guard's `_replace_broken` hold the lock without being a user, and for no
# longer than it takes to change a few attributes.
_HOUSEKEEPING_SECONDS = 0.001
_HOUSEKEEPING_TRIES = 1000
# For a COMMIT, and for a statement beside it in the body of the response: longer than either takes where nothing is wrong.
_ENDING_SECONDS = 10.0


class Frame:
    """One database's connection in one scope: the record that Peewee's ``_state`` is, with a guard.

    `closed`, `conn`, `ctx`, `transactions`, `commit_callbacks`, `reset` and `set_connection` are Peewee's protocol. A frame
    goes one way, open to final; what a scope lends, several threads and tasks may see, so each statement passes through
    `enter` and `leave`.

    The connection leaves the frame exactly once, under the lock. Nobody waits for the lock: whoever finds it taken relies on
    the holder, and every holder, when it lets go, looks whether the scope has ended meanwhile.
    """

    __slots__ = (
        "_acquire",
        "_cursors",
        "_depth",
        "_prune_at",
        "_reader",
        "_release",
        "atomic",
        "closed",
        "commit_callbacks",
        "conn",
        "ctx",
        "early_callbacks",
        "ending",
        "final",
        "label",
        "left_open",
        "lineage",
        "on_release",
        "patient",
        "pinned",
        "put_off_block",
        "request_transaction",
        "returning",
        "savepoints",
        "shared",
        "since",
        "stack",
        "state",
        "transactions",
        "undone",
        "wary",
    )

    def __init__(self, state: State, label: str) -> None:
        self.state = state
        self.label = label
        self.shared = True  # several may see it, and each statement passes through `enter` and `leave`
        self.final = False
        self.pinned = False
        self.atomic = False
        self.early_callbacks: tuple[Callable[[], Any], ...] = ()
        self.request_transaction: Any = None
        self.left_open = False
        self.patient = False  # whether the end of its transaction waits for a statement, which is no half of anything
        self.ending = False  # whether its transaction is being ended: a statement that comes meanwhile waits
        self.on_release: Callable[[], None] | None = None
        self.undone = False  # whether a block was rolled back that something may have been started in
        self.wary = False  # whether `enter` must look closer: final, undone or put off, each set before this
        self.returning = False  # its connection is on its way back, and still counts where it goes
        # Since when it is connected, monotonic, and where that was: set where no pool notes it, left unset elsewhere.
        self.since: float
        self.stack: Any
        lock = _make_lock()
        self._acquire = lock.acquire
        self._release = lock.release
        self._depth = 0
        self.reset()

    def reset(self) -> None:
        """Forget the connection (Peewee's protocol): whoever calls this has returned or closed it."""
        self.closed = True
        self.conn: Any = None
        self.ctx: list[Any] = [_PIN] if self.pinned else []
        self.transactions: list[Any] = []
        self.savepoints: list[Any] = []
        self.put_off_block: Any = None  # what is to be rolled back as soon as nobody uses the connection
        self.commit_callbacks: list[Any] = []
        self.lineage: Lineage | None = None
        self._cursors: list[weakref.ref[Any]] = []
        self._reader: int | None = None
        self._prune_at = _PRUNE_CURSORS_AT

    def set_connection(self, conn: Any) -> None:
        """Take a fresh connection (Peewee's protocol)."""
        self.reset()
        self.conn = conn
        self.closed = False

    def pin(self) -> None:
        """Keep a nested ``with db`` or ``connection_context`` from closing the connection at its end."""
        if not self.pinned:
            self.pinned = True
            self.ctx.insert(0, _PIN)

    def make_atomic(self) -> None:
        """Begin a transaction when it connects; a nested ``with db`` must not try to close it in the middle of that."""
        self.atomic = True
        self.pin()

    # -- the guard ----------------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Become the one user of the connection, or raise `ConcurrentUse` or `ScopeEnded`."""
        # A query hook or an SQLite function that queries is the same user, not a second one: the lock is reentrant.
        if not self._acquire(False):
            self._wait_for_housekeeping()
        if not self._depth and (self.wary or (self.lineage is not None and not inherits(self.lineage))):
            if self.put_off_block is not None and not self.final:
                try:
                    self._roll_back_put_off()
                except BaseException:  # of a hook on statements, or a killed greenlet
                    self._release()
                    raise
            refusal = None if self.final else self._refusal()
            if refusal is None and not self.final:
                self._depth += 1
                return
            self._release()
            if refusal is not None:
                raise refusal
            self._end()  # `finish` may have found the lock taken by us
            raise self.ended()
        self._depth += 1

    def put_off(self, block: Any) -> None:
        """Have a block rolled back before the next use of the connection: somebody is using it now.

        Of several the outermost counts, in whatever order they end: what is rolled back takes what is inside with it.
        """
        if self.put_off_block is None or block.number < self.put_off_block.number:
            self.put_off_block = block
            self.wary = True

    def settle(self) -> None:
        """Roll back a block that was put off, before something that is no statement depends on it."""
        if self.put_off_block is not None:
            self.enter()
            self.leave()

    def _roll_back_put_off(self) -> None:
        block, self.put_off_block = self.put_off_block, None
        lineage = current_lineage.set(None)  # whoever comes next may come from that very block
        self._depth += 1
        try:
            with self.state.bound(self):  # and may run in a scope inside this one
                if block in self.transactions:
                    self.transactions.remove(block)
                    self.commit_callbacks.clear()
                    self.state.database.rollback()
                else:
                    block.rollback(False)
            broken = is_broken_off(self.conn)
        except Exception:
            logger.debug("%s: a ROLLBACK has failed; its connection is closed.", self.state.name, exc_info=True)
            broken = True
        finally:
            self._depth -= 1
            current_lineage.reset(lineage)
        if broken and self.conn is not None:  # what is open on it ends with it
            if self.is_counted_on:
                with contextlib.suppress(Exception):  # the driver may have closed it already
                    self.conn.close()
            else:
                self.state.drop(self._detach())

    def leave(self) -> None:
        """End what `enter` began; the last user after the scope's end drops the connection."""
        self._depth = depth = self._depth - 1
        self._release()
        if self.final and not depth:
            self._drop_late()

    @property
    def in_use(self) -> bool:
        """Whether somebody is inside a statement."""
        return self._depth > 0

    def _wait_for_housekeeping(self) -> None:
        for _ in range(_HOUSEKEEPING_TRIES):
            if self.final:
                raise self.ended()
            if self.ending:
                if self._acquire(True, _ENDING_SECONDS):
                    return
                break
            if self._depth:
                break
            if self._acquire(True, _HOUSEKEEPING_SECONDS):
                return
        raise self._overlap()

    def check_lineage(self) -> None:
        """Raise `ConcurrentUse` if a transaction is open that the caller's code does not come from.

        And `TransactionLost` if it comes from one that was rolled back.
        """
        refusal = self._refusal()
        if refusal is not None:
            raise refusal

    def _refusal(self) -> ConcurrentUse | TransactionLost | None:
        if self.lineage is not None and not inherits(self.lineage):
            return self._intrusion()
        if self.undone:
            mark = current_lineage.get()
            while mark is not None:
                if mark.undone is self:
                    return self._outlived()
                mark = mark.outer
        return None

    def mark(self) -> Lineage:
        """Refuse, until `unmark`, all code that is not started from here."""
        mark = self.lineage = Lineage(current_lineage.get(), self.lineage)
        current_lineage.set(mark)
        return mark

    def unmark(self, mark: Lineage, *, undone: bool = False) -> None:
        """End what `mark` began; blocks may end in another order than they began in.

        Args:
            mark: what `mark` returned.
            undone: whether the block was rolled back.
        """
        mark.closed = True
        if undone:
            mark.undone = self
            self.undone = self.wary = True
        lineage = self.lineage
        while lineage is not None and lineage.closed:
            lineage = lineage.below
        self.lineage = lineage
        if current_lineage.get() is mark:
            current_lineage.set(_first_that_counts(mark.outer))

    def _overlap(self) -> ConcurrentUse:
        return ConcurrentUse(
            f"{self.state.name}: a second thread or task used the connection of {self.label} while a statement was "
            "running on it. One connection serves one user at a time: run the calls through `await orm.run(...)`, where "
            "they take turns, or open `connection_scope(db)` in each child that wants a connection of its own."
        )

    def _intrusion(self) -> ConcurrentUse:
        return ConcurrentUse(
            f"{self.state.name}: another task or thread of {self.label} has a transaction open on this connection, and "
            "this code was not started from inside it; the statement would become part of somebody else's transaction. "
            "Start the child inside the `atomic()` block, wait for the block to end, or open `connection_scope(db)` here."
        )

    def _outlived(self) -> TransactionLost:
        return TransactionLost(
            f"{self.state.name}: this code was started inside a transaction of {self.label} that was rolled back meanwhile; "
            "the statement would be committed by itself. Let the block wait for what it starts (asyncio.TaskGroup does, "
            "gather does not when one of its parts fails), or open `connection_scope(db)` in a task that is to outlive it."
        )

    def ended(self) -> ScopeEnded:
        """Make the error for a query that comes after the end."""
        return ScopeEnded(
            f"{self.state.name}: {self.label} has ended and its connection was given back. Query before it ends, or open "
            "`connection_scope(db)` around work that outlives it (a thread, an orphan task)."
        )

    # -- the request's own transaction --------------------------------------------------------------------------------

    def begin_request_transaction(self) -> None:
        """Begin the transaction of an atomic request on the connection that was just made."""
        transaction = self.state.database.transaction()
        transaction.begin_unmarked()
        with _handover.lock:
            ended = not self.atomic
            if not ended and not self.left_open:
                self.request_transaction = transaction
                self.commit_callbacks += self.early_callbacks
            if not ended:
                self.early_callbacks = ()
        if ended and not self.left_open:
            # The response has begun meanwhile: what comes is no part of the request's transaction, and nobody would commit it.
            transaction.__exit__(None, None, None)

    @property
    def has_request_transaction(self) -> bool:
        """Whether there is anything to commit or roll back at the end of an atomic request, and be it a callback."""
        begins = self.atomic and self.in_use
        return self.request_transaction is not None or begins or bool(self.early_callbacks)

    def end_request_transaction(self, error: BaseException | None = None) -> None:
        """Commit the atomic request, or roll it back because of `error`; nothing if it never connected.

        Raises: what the COMMIT raises, after rolling back; `peewee.InternalError` if an earlier failure makes PostgreSQL roll
            back instead; `ScopeError` if a block inside it is still open.
        """
        with _handover.lock:
            transaction, self.request_transaction = self.request_transaction, None
            if transaction is None and error is not None and self.atomic and self.in_use:
                # It begins now. What goes on in it is half of what has failed: `finish` rolls back all of it.
                self.left_open = True
                return
            self.atomic = False
        if transaction is None or self.conn is None:
            early, self.early_callbacks = self.early_callbacks, ()
            if error is None and transaction is None:  # nothing was written, and so all of it is committed
                with self.state.bound(self):
                    for callback in early:
                        callback()
            return
        inner = self.transactions[1:] + self.savepoints
        if inner:
            # The transaction stays on the stack: nothing can commit it any more, the inner block can end as it began, and
            # `finish` rolls back. A rollback now would let the rest of the inner block commit by itself.
            if error is None:
                raise ScopeError(
                    f"{self.state.name}: {self.label} cannot commit: {_describe(inner)} is still open inside its "
                    "transaction. End the block before the response starts (in FastAPI: a dependency with "
                    "scope='function')."
                )
            return
        failed = self._failed() if error is None and transaction_has_failed(self.conn) else None
        reason = failed or error
        with self.state.bound(self), self._kept_for_its_end():
            try:
                transaction.__exit__(type(reason) if reason else None, reason, None)
            except ConcurrentUse:
                # Somebody is inside a statement, the thread of a cancelled call for example. It stays on the stack, as above.
                if error is None:
                    raise
        if failed is not None:
            raise failed

    @contextlib.contextmanager
    def _kept_for_its_end(self) -> Iterator[None]:
        """Have statements that come now wait until the transaction has ended; wait for one that is under way if that may be."""
        # An asynchronous frame has turns. Where it is not to be had, the end is refused, or there is nothing but housekeeping.
        if self.state.is_async or not (self._acquire(True, _ENDING_SECONDS) if self.patient else self._acquire(False)):
            yield
            return
        self.ending = True
        try:
            yield
        finally:
            self.ending = False
            self._release()
            if self.final:
                self._end()  # `finish` may have found the lock taken by us

    def _failed(self) -> peewee.InternalError:
        return peewee.InternalError(
            f"{self.state.name}: the transaction of {self.label} cannot be committed: a statement in it failed, and PostgreSQL "
            "keeps nothing of such a transaction, though it answers COMMIT without an error. Let the error end the request, or "
            "put a statement that may fail into a block of its own, `with db.atomic():`."
        )

    def leave_open(self) -> None:
        """Leave the atomic request's transaction open to the end, which rolls it back; nothing can commit it any more.

        Nor one that is about to begin: whoever connects from now on still begins one.
        """
        self.left_open = True
        self.request_transaction = None

    # -- cursors --------------------------------------------------------------------------------------------------------

    def track(self, cursor: Any) -> None:
        """Remember a cursor that may still hold rows, on a connection whose driver cannot tell."""
        cursors = self._cursors
        if len(cursors) >= self._prune_at:
            cursors[:] = [ref for ref in cursors if ref() is not None]
            self._prune_at = max(_PRUNE_CURSORS_AT, 2 * len(cursors))
        cursors.append(weakref.ref(cursor))

    def note_reader(self, thread: int) -> None:
        """Note the native thread that reads from SQLite."""
        self._reader = thread if self._reader is None else _SEVERAL

    def live_cursors(self, conn: Any) -> list[Any]:
        """Return the cursors of its connection that a result may still be read from."""
        tracked = [cursor for ref in self._cursors if (cursor := ref()) is not None]
        return [*tracked, *unread_cursors(conn)] if self.state.is_sqlite else tracked

    # -- giving the connection back ---------------------------------------------------------------------------------------

    def release_early(self) -> bool:
        """Give the connection back if nothing is going on with it; a later query takes one again.

        Returns: whether a connection was given back.
        """
        if self.conn is None or not self.state.database.autoconnect or not self._acquire(False):
            return False
        conn = None
        try:
            if self.conn is not None and not self._is_in_use():
                self.pinned = False  # eager connecting was for the time up to here
                conn = self._detach()
        finally:
            self._release()
        if self.final:
            self._end()  # `finish` may have found the lock taken by us
        if conn is None:
            return False
        self._give_back(conn)
        return True

    def _is_in_use(self) -> bool:
        return bool(
            self._depth
            or self.is_counted_on
            or self.live_cursors(self.conn)
            or transaction_is_open(self.conn)  # a BEGIN that was written as SQL
        )

    @property
    def is_counted_on(self) -> bool:
        """Whether something is open that goes on with this connection or none."""
        return bool(self.transactions or self.savepoints or self.has_blocks)

    @property
    def has_blocks(self) -> bool:
        """Whether a ``with db`` or ``connection_context`` is open, which expects its place in `ctx`."""
        return any(entry is not _PIN for entry in self.ctx)

    def finish(self) -> Future[None] | None:
        """End for good: roll back what is open, give the connection back. Never raises, never blocks an event loop.

        If somebody is inside a call at this moment, that last user drops the connection when the call returns.

        Returns: a future if the connection is being returned on another thread.
        """
        self.final = self.wary = True
        return self._end()

    def _end(self) -> Future[None] | None:
        if self.conn is None or not self._acquire(False):
            return None
        try:
            if self._depth:  # by this very thread: a signal handler, or the garbage collector, inside a statement
                return None
            conn, dirty = self.conn, list(self.transactions)
            self.returning = conn is not None
            self.conn, self.closed = None, True
        finally:
            self._release()
        if conn is None:
            return None
        self._warn_open(dirty)
        live = self.live_cursors(conn)
        if live and self.state.is_sqlite and self._reader != native_thread():
            # Another thread may be inside SQLite with one of them, and to close it there crashes the process.
            logger.info(
                "%s: a result of %s was not read to its end; its connection is closed, not reused.",
                self.state.name,
                self.label,
                extra=self._told,
            )
            self.state.linger(conn, live, self._released)
            return None
        return self._give_back(conn, rollback=bool(dirty), cursors=live)

    def _give_back(self, conn: Any, **options: Any) -> Future[None] | None:
        self.returning = True
        pending = self.state.give_back(conn, **options)
        if pending is None:
            self._released()
        else:
            pending.add_done_callback(lambda _: self._released())
        return pending

    def _detach(self) -> Any:
        conn = self.conn
        self.reset()
        return conn

    def _drop_late(self) -> None:
        if self.conn is None or not self._acquire(False):
            return  # another late user; that one drops it
        try:
            if self._depth:
                return
            self.returning = self.conn is not None
            conn, self.conn, self.closed = self.conn, None, True
        finally:
            self._release()
        if conn is None:
            return
        self._warn_late()
        live = self.live_cursors(conn) if self.state.is_sqlite else None
        if live:
            self.state.linger(conn, live, self._released)
        else:
            self.state.drop(conn, self._released)

    def _warn_late(self) -> None:
        logger.warning(
            "%s: a statement of %s was still running when it ended; its connection is closed, not reused.",
            self.state.name,
            self.label,
            extra=self._told,
        )

    def _warn_open(self, open_: list[Any]) -> None:
        if open_ and open_ != [self.request_transaction]:  # an atomic request that failed needs no warning
            logger.warning(
                "%s: %s ended with %s open; rolled back.",
                self.state.name,
                self.label,
                _describe(open_),
                extra=self._told,
            )

    @property
    def _told(self) -> dict[str, Any]:
        """What messages about it carry."""
        return {"database": self.state.name, "request": self.label}

    def _released(self) -> None:
        self.returning = False
        if self.on_release is not None:
            try:
                self.on_release()
            except Exception:
                logger.exception(
                    "%s: a callback on the release of %s failed.", self.state.name, self.label, extra=self._told
                )


class PrivateFrame(Frame):
    """The record of one thread, greenlet or task outside any scope: nobody else sees it, so there is nothing to guard."""

    __slots__ = ()

    def __init__(self, state: State, label: str) -> None:
        super().__init__(state, label)
        self.shared = False

    def enter(self) -> None:
        """Nobody else can be inside."""

    def leave(self) -> None:
        """Nobody waits."""


def _describe(blocks: list[Any]) -> str:
    outer = type(blocks[0]).__name__.lstrip("_").lower()
    return f"a {outer} block" if len(blocks) == 1 else f"a {outer} block and {len(blocks) - 1} inside it"


class GuardedCursor:
    """A cursor that fetches from the server: each fetch uses the connection, so it passes through the guard."""

    __slots__ = ("__weakref__", "_cursor", "_frame")

    def __init__(self, cursor: Any, frame: Frame) -> None:
        self._cursor = cursor
        self._frame = frame

    def _guarded(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._frame.enter()
        try:
            return call(*args, **kwargs)
        finally:
            self._frame.leave()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._cursor, name)
        if name in ("execute", "executemany", "fetchone", "fetchmany", "fetchall", "scroll", "nextset"):
            return functools.partial(self._guarded, value)
        return value

    def __iter__(self) -> GuardedCursor:
        return self

    def __next__(self) -> Any:
        row = self._guarded(self._cursor.fetchone)
        if row is None:
            raise StopIteration
        return row

    def close(self) -> None:
        """Close it; after the scope's end it is closed already."""
        if not self._frame.final:
            self._guarded(self._cursor.close)


class NoRecord:
    """What a reader finds where nobody has connected: closed, and empty lists that nobody shares."""

    __slots__ = ()
    closed = True
    conn: Any = None
    shared = False
    final = False
    lineage: Lineage | None = None
    atomic = False

    @property
    def ctx(self) -> list[Any]:
        """A fresh list each time: what is put into it is nobody else's."""
        return []

    transactions = commit_callbacks = ctx

    def enter(self) -> None:
        """Private to its owner: nothing to guard."""

    leave = check_lineage = settle = enter


NO_RECORD = NoRecord()
