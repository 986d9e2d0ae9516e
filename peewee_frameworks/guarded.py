"""Peewee's own connection API, guarded: what an installed database's methods become.

A database keeps its class; `install` puts these mixins before it, so each method calls the original. Blocks end on the frame
they began on, and each call that uses the connection passes through the frame's guard.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import peewee
from playhouse.pool import MaxConnectionsExceeded
from playhouse.pool import PooledDatabase as PlayhousePooledDatabase

from . import gevent
from .drivers import is_clean
from .errors import DatabaseUnavailable, PeeweeFrameworksError, WouldBlock
from .frame import Frame, Lineage, current_lineage, running_loop

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from .state import State

_Result = TypeVar("_Result")


class _Bound:
    """A block that ends on the frame it began on; see `State.bound`."""

    db: Any
    _frame: Frame | None = None

    def __enter__(self) -> Any:
        result = super().__enter__()  # type: ignore[misc]
        self._frame = self.db._state.frame()
        return result

    def __exit__(self, *exc_info: object) -> Any:
        frame, self._frame = self._frame, None
        if frame is None:
            return super().__exit__(*exc_info)  # type: ignore[misc]
        with frame.state.bound(frame):
            return super().__exit__(*exc_info)  # type: ignore[misc]


class _Marked(_Bound):
    """A transaction block or savepoint: while it is open, code that does not come from inside it is refused."""

    _mark: Lineage | None = None

    def __enter__(self) -> Any:
        state: State = self.db._state
        guard = state.frame()
        guard.enter()  # until the mark is set: nobody may slip in between BEGIN and the mark
        try:
            result = super().__enter__()
            frame = self._frame
            if frame is not None and frame.shared and not _handed_over():
                self._mark = frame.lineage = Lineage(current_lineage.get(), frame.lineage)
                current_lineage.set(self._mark)
        finally:
            guard.leave()
        return result

    def __exit__(self, *exc_info: object) -> Any:
        frame = self._frame
        try:
            return super().__exit__(*exc_info)
        finally:
            mark, self._mark = self._mark, None
            if mark is not None:
                mark.closed = True
                if frame is not None and frame.lineage is mark:
                    frame.lineage = mark.below
                if current_lineage.get() is mark:
                    current_lineage.set(mark.outer)


class Transaction(_Marked, peewee._transaction):
    """Peewee's transaction block."""

    def begin_unmarked(self) -> Any:
        """Begin without a mark: whoever shares the scope may go on in the transaction."""
        return _Bound.__enter__(self)


class Savepoint(_Marked, peewee._savepoint):
    """Peewee's savepoint block."""


class Manual(_Bound, peewee._manual):
    """Peewee's manual-commit block; connects first, since a connect would forget that the block is open."""

    def __enter__(self) -> Any:
        if self.db.is_closed() and self.db.autoconnect:
            self.db.connect()
        return super().__enter__()


class ConnectionContext(_Bound, peewee.ConnectionContext):
    """Peewee's ``connection_context``."""


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
    """Return the Python frame of the user's code: the first that is neither Peewee's nor ours."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") in (__name__, "peewee"):
        frame = frame.f_back
    return frame


class Guarded:
    """Mixed into the class of an installed database: guards each call that uses the connection."""

    _state: State
    autoconnect: bool
    deferred: bool

    def _execute_cursor(self, sql: str, params: Any, **options: Any) -> Any:
        state = self._state
        frame = state.frame()
        frame.enter()
        try:
            cursor = super()._execute_cursor(sql, params, **options)  # type: ignore[misc]
            if frame.shared and (options or state.tracks_cursors):
                frame.track(cursor)
            return cursor
        finally:
            frame.leave()

    def _guard(self, call: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        frame = self._state.frame()
        frame.enter()
        try:
            return call(*args, **kwargs)
        finally:
            frame.leave()

    def begin(self, *args: Any, **kwargs: Any) -> None:
        self._guard(super().begin, *args, **kwargs)  # type: ignore[misc]

    def commit(self) -> None:
        self._guard(super().commit)  # type: ignore[misc]

    def rollback(self) -> None:
        # After the end everything is rolled back already; an error here would hide the one that is unwinding the block.
        if not self._state.frame().final:
            self._guard(super().rollback)  # type: ignore[misc]

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
                frame.begin_request_transaction()
            return opened
        finally:
            frame.leave()

    def _connect_here(self, *args: Any, **kwargs: Any) -> bool:
        return self._attempt(super().connect, *args, **kwargs)  # type: ignore[misc]

    def _attempt(self, connect: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
        was_closed = self._state.closed
        try:
            return connect(*args, **kwargs)
        except (peewee.OperationalError, peewee.InterfaceError) as error:
            if isinstance(error, PeeweeFrameworksError) or not was_closed or self.deferred:
                raise
            raise DatabaseUnavailable(f"{self._state.name}: connecting failed: {error}") from error

    def close(self) -> bool:
        state = self._state
        frame = state.frame()
        if frame.final:
            return False
        frame.enter()
        try:
            if running_loop() is None or frame.conn is None or frame.transactions:
                return bool(super().close())  # type: ignore[misc]
            conn = frame._detach()
        finally:
            frame.leave()
            if isinstance(frame, Frame) and frame.conn is None:
                frame._released()
        state.give_back(conn)
        return True

    def dispose(self) -> None:
        super().dispose()  # type: ignore[misc]
        self._state.forget()

    def session_start(self) -> Any:
        # A session is not a block: whoever shares the scope may go on with it.
        return self.transaction().begin_unmarked()

    def _run_commit_callbacks(self) -> None:
        frame = self._state.frame()
        if not frame.transactions and frame.lineage is not None:
            frame.lineage.closed, frame.lineage = True, None  # committed: the callbacks are outside the transaction
        super()._run_commit_callbacks()  # type: ignore[misc]

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
        if caller is not None and caller.f_code.co_flags & inspect.CO_GENERATOR:
            # ``with db`` keeps nothing of its own, so a generator that may be closed elsewhere is noted here.
            self._state.generators[id(caller)] = self._state.frame()
        return result

    def __exit__(self, *exc_info: object) -> Any:
        frame = self._state.generators.pop(id(_caller()), None)
        if frame is None:
            return super().__exit__(*exc_info)  # type: ignore[misc]
        with self._state.bound(frame):
            return super().__exit__(*exc_info)  # type: ignore[misc]


class GuardedPool(Guarded):
    """Mixed into playhouse's pooled databases."""

    _max_connections: int | None
    _connections: list[Any]
    _in_use: dict[Any, Any]

    def _connect_here(self, *args: Any, **kwargs: Any) -> bool:
        state = self._state
        if self._is_exhausted():
            state.reap()
        if running_loop() is None:
            return super()._connect_here(*args, **kwargs)
        # Past playhouse's wait, which would stall the loop for up to its whole timeout.
        # A subclass's own `connect` is kept: it may do more.
        connect = super(Guarded, self).connect  # type: ignore[misc]
        if connect.__func__ is PlayhousePooledDatabase.connect:
            connect = functools.partial(peewee.Database.connect, self)  # type: ignore[arg-type]
        try:
            return self._attempt(connect, *args, **kwargs)
        except MaxConnectionsExceeded as error:
            raise WouldBlock(
                f"{state.name}: all {self._max_connections} connections are in use, and waiting for one here would "
                "stall the event loop. Use `await orm.run(...)`, or connect eagerly (connect='eager'), which waits "
                "without blocking."
            ) from error

    def _is_exhausted(self) -> bool:
        limit = self._max_connections
        return bool(limit and not self._connections and len(self._in_use) >= limit)

    def _can_reuse(self, conn: Any) -> bool:
        # Peewee sends a ROLLBACK at each check-in where the driver has no flag that it knows; most have one.
        return is_clean(conn) or bool(super()._can_reuse(conn))  # type: ignore[misc]


class GuardedProxy(peewee.DatabaseProxy):
    """A `DatabaseProxy` whose blocks are those of the database behind it."""

    __slots__ = ()

    def atomic(self, *args: Any, **kwargs: Any) -> Any:
        return self.obj.atomic(*args, **kwargs)

    def transaction(self, *args: Any, **kwargs: Any) -> Any:
        return self.obj.transaction(*args, **kwargs)

    def savepoint(self) -> Any:
        return self.obj.savepoint()

    def manual_commit(self) -> Any:
        return self.obj.manual_commit()

    def connection_context(self) -> Any:
        return self.obj.connection_context()
