"""Peewee's asyncio layer, guarded: what an installed pwasyncio database's methods become."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import peewee
from playhouse import pwasyncio
from playhouse.pwasyncio import await_

from peewee_frameworks.errors import ConfigurationError
from peewee_frameworks.frame import get_frames, running_loop
from peewee_frameworks.guarded import Atomic, Guarded, Savepoint, Transaction, _Marked
from peewee_frameworks.names import display_name
from peewee_frameworks.run import refuse_coroutines
from peewee_frameworks.state import change_class, guarded_class

from .bridge import not_in_bridge, under_bridge
from .frame import LOST, AsyncFrame
from .keeper import wrapping_errors
from .sqlite import AsyncSqliteConnection
from .state import AsyncState
from .stream import Rows

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("peewee_frameworks.scope")


class _HeldOpen:
    """An entry in Peewee's stack of contexts: one ``async with db``."""


_HELD = _HeldOpen()


class AsyncTransaction(pwasyncio._async_transaction_helper, Transaction):
    """Peewee's transaction block; ``async with`` too."""


class AsyncAtomic(pwasyncio._async_transaction_helper, Atomic):
    """Peewee's ``atomic``; ``async with`` too."""


class AsyncSavepoint(pwasyncio._async_transaction_helper, Savepoint):
    """Peewee's savepoint block; ``async with`` too."""

    def rollback(self, begin: bool = True) -> None:
        # A lost transaction is rolled back already, and an error here would hide the one that is unwinding the block.
        frame = self.db._state.frame()
        if isinstance(frame, AsyncFrame):
            frame.end_rows()
        if begin:
            super().rollback(begin)
        elif not getattr(frame, "broken", None):
            try:
                super().rollback(begin)
            except Exception:
                if not frame.broken:
                    raise
            except BaseException:
                _spoil(frame)
                raise


def _spoil(frame: Any) -> None:
    """Give up the connection of a block whose rollback was cancelled, be it while it waited for its turn."""
    if isinstance(frame, AsyncFrame):
        frame.spoil("a rollback was cancelled")


class PgAtomic(_Marked, pwasyncio.AsyncPgAtomic):
    """What `atomic`, `transaction` and `savepoint` are on asyncpg, which insists on transactions of its own."""

    def _build_ctx(self) -> PgAtomic:
        args, kwargs = self._begin_args
        return type(self)(self.db, *args, **kwargs)

    def __enter__(self) -> Any:
        if not under_bridge():
            raise not_in_bridge(self.db._state.name)
        return super().__enter__()

    def begin_unmarked(self) -> Any:
        """Begin without a mark: whoever shares the scope may go on in the transaction."""
        return super(_Marked, self).__enter__()

    __aenter__ = pwasyncio.AsyncPgAtomic.__aenter__
    __aexit__ = pwasyncio.AsyncPgAtomic.__aexit__

    async def _abegin(self) -> Any:
        return await self._alone(super()._abegin)

    async def acommit(self, begin: bool = True) -> None:
        await self._alone(super().acommit, begin, whole=True)

    async def arollback(self, begin: bool = True) -> None:
        frame = self.db._state.frame()
        if not begin and (frame.final or getattr(frame, "broken", None)):
            return
        frame.end_rows()
        try:
            await self._alone(super().arollback, begin)
        except Exception:
            if begin or frame.conn is not None:
                raise
        except BaseException:
            _spoil(frame)
            raise

    async def _alone(self, work: Callable[..., Any], *args: Any, whole: bool = False) -> Any:
        frame = self.db._state.record()
        await frame.take()
        try:
            if whole:
                frame.assert_whole()
            conn = frame.conn if whole else await self.db._connected(frame)
            return await frame.attempt(conn, work(*args))
        finally:
            frame.leave()


class _BridgeCursor:
    """What `db.cursor()` gives to Peewee's BEGIN, COMMIT and ROLLBACK."""

    def __init__(self, database: Any) -> None:
        self._database = database

    def execute(self, sql: str, params: Any = None) -> Any:
        if not under_bridge():
            raise not_in_bridge(self._database._state.name, sql)
        return await_(self._database._statement(sql, params))


class AsyncGuarded(Guarded):
    """Mixed into the class of an installed pwasyncio database."""

    __slots__ = ()

    _state: AsyncState
    _closing: bool
    query_hooks: list[Any]

    def _break_off(self, error: BaseException) -> None:
        """Nothing: `AsyncFrame.attempt` gives up a connection that was in the middle of something; one that waited is whole."""

    # -- statements ---------------------------------------------------------------------------------------------------

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        if not under_bridge():
            raise not_in_bridge(self._state.name, sql)
        return await_(self._execute_logged(sql, params or ()))

    async def aexecute_sql(self, sql: str, params: Any = None) -> Any:
        try:
            return await self._execute_logged(sql, params)
        finally:
            self._release_idle()

    async def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        refuse_coroutines(function)
        try:
            return await pwasyncio.greenlet_spawn(function, *args, **kwargs)
        finally:
            self._release_idle()

    def _release_idle(self) -> None:
        """Give back what a stream, websocket or background task would keep until it queries again."""
        frames = get_frames()
        if frames is not None and frames.scope is not None and frames.scope.idles:
            frame = frames.find(self._state)
            if frame is not None:
                frame.release_early()

    async def _execute_logged(self, sql: str, params: Any) -> Any:
        self._log_query(sql, params)  # type: ignore[attr-defined]
        hooks = self.query_hooks
        start = time.perf_counter() if hooks else 0.0
        try:
            result = await self._statement(sql, params)
        except Exception as error:
            if hooks:
                self._notify_hooks(sql, params, start, error)  # type: ignore[attr-defined]
            raise
        if hooks:
            self._notify_hooks(sql, params, start, None)  # type: ignore[attr-defined]
        return result

    async def _statement(self, sql: str, params: Any) -> Any:
        frame = self._state.record()
        await frame.take()
        try:
            conn = await self._connected(frame)
            breath = self._state.keeper.breath
            # Not inside a transaction: others may be waiting for its locks.
            if not frame.transactions and frame.lineage is None and breath.is_due():
                await breath.draw()
                if frame.final:  # the scope has ended meanwhile
                    raise frame.ended()
                conn = await self._connected(frame)  # it may have been lost meanwhile
            with wrapping_errors:
                return await frame.attempt(conn, conn.execute(sql, params))
        finally:
            frame.leave()

    def iterate(self, query: Any, buffer_size: int | None = None) -> Rows:
        query.bind(self)
        return Rows(self, query, buffer_size)

    def cursor(self, named_cursor: Any = None) -> Any:  # noqa: ARG002
        return _BridgeCursor(self)

    def commit(self) -> None:
        frame = self._state.record()
        frame.enter()
        try:
            frame.assert_whole()
            super().commit()
        except BaseException:
            if frame.conn is None:
                frame.broken = frame.broken or LOST
            raise
        finally:
            frame.leave()

    def rollback(self) -> None:
        frame = self._state.frame()
        if frame.final or getattr(frame, "broken", None):
            self._unmark_all()
            return
        if isinstance(frame, AsyncFrame):
            frame.end_rows()
        was = frame.conn
        try:
            super().rollback()
        except Exception:
            if was is None or frame.conn is not None:
                raise
            logger.debug(
                "%s: the connection was lost at a rollback.", self._state.name, exc_info=True, extra=self._state._told
            )
        except BaseException:
            _spoil(frame)
            raise

    def atomic(self, *args: Any, **kwargs: Any) -> Any:
        return AsyncAtomic(self, *args, **kwargs)

    aatomic = atomic

    def transaction(self, *args: Any, **kwargs: Any) -> Any:
        return AsyncTransaction(self, *args, **kwargs)

    def savepoint(self) -> Any:
        return AsyncSavepoint(self)

    # -- the connection -----------------------------------------------------------------------------------------------

    def connect(self, reuse_if_open: bool = False) -> Any:  # noqa: ARG002 - it always does
        if not under_bridge():
            raise not_in_bridge(self._state.name)
        return await_(self.aconnect())

    async def aconnect(self) -> Any:
        frame = self._state.record()
        await frame.take()
        try:
            return await self._connected(frame)
        finally:
            frame.leave()

    async def _connected(self, frame: AsyncFrame) -> Any:
        """Return the frame's connection, or acquire one; the caller has the turn."""
        conn = frame.conn
        if conn is not None:
            self._state.keeper.check()
            if not self._state.is_lost(conn):
                return conn
            frame.lose(conn, LOST)
            if frame.broken is not None:
                raise frame.lost()
        if self._closing:
            raise self._state.keeper.closing()
        if self._state.orphans:
            self._state.reap()
        conn = await self._acquire_conn_async()
        if frame.final:  # the request was over before its connection came
            self._state.give_back(conn)
            raise frame.ended()
        frame.set_connection(conn)
        if frame.atomic and frame.request_transaction is None:
            await pwasyncio.greenlet_spawn(self._begin_request, frame)
        return conn

    def close(self) -> Any:
        if self._state.frame().final:
            return False
        if not under_bridge():
            raise not_in_bridge(self._state.name)
        return await_(self.aclose())

    async def aclose(self) -> bool:
        frame = self._state.frame()
        if not isinstance(frame, AsyncFrame) or frame.final:
            return False
        if frame.transactions:
            raise peewee.OperationalError("Attempting to close database while transaction is open.")
        await frame.take()
        try:
            conn = frame.conn
            if conn is None:
                return False
            frame._detach()
        finally:
            frame.leave()
        pending = frame._give_back(conn)
        if pending is not None:
            await pending  # type: ignore[misc]
        return True

    async def __aenter__(self) -> Any:
        frame = self._state.record()
        await self.aconnect()
        frame.ctx.append(_HELD)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        frame = self._state.frame()
        if _HELD not in frame.ctx:
            return  # its scope has ended
        frame.ctx.remove(_HELD)
        if not frame.ctx and not frame.transactions:
            await self.aclose()

    def is_connection_usable(self) -> bool:
        return not self._state.closed

    # -- the pool -----------------------------------------------------------------------------------------------------

    async def _acquire_conn_async(self) -> Any:
        return await self._state.keeper.acquire()

    async def _connect_and_tell(self) -> Any:  # type: ignore[override]
        start = time.perf_counter()
        conn = await type(self)._acquire_conn_async(self)
        self._state.connected(start)
        return conn

    async def open_pool(self) -> Any:
        """Open the pool in the running loop, if it is not open.

        Raises: `DatabaseUnavailable`; `WrongEventLoop` if it is open in another loop, or was before a fork.
        """
        return await self._state.keeper.open()

    async def close_pool(self, timeout: float | None = None) -> None:
        """Close the pool, in the loop that opened it. It opens again with the next use, there or in another loop.

        Args:
            timeout: seconds to wait for connections in use; they are cut off then. By default ``acquire_timeout``.

        Raises: `WrongEventLoop`.
        """
        await self._state.keeper.close(timeout)

    def dispose(self) -> None:
        """Forget the pool without closing it: for a child process, whose parent goes on using it."""
        self._state.keeper.forget()
        self._state.reset()
        self._state.forget()


class AsyncPgGuarded(AsyncGuarded):
    """Mixed into databases on asyncpg."""

    __slots__ = ()

    def atomic(self, *args: Any, **kwargs: Any) -> Any:
        return PgAtomic(self, *args, **kwargs)

    aatomic = transaction = savepoint = atomic


class AsyncSqliteGuarded(AsyncGuarded):
    """Mixed into databases on aiosqlite."""

    __slots__ = ()

    _pragmas: list[tuple[str, Any]]

    async def _set_pragmas(self, conn: Any) -> None:
        for name, value in self._pragmas:
            async with conn.execute(f"PRAGMA {name} = {value};"):
                pass  # the answer of `journal_mode`, left unread, is a statement that writes

    async def _pool_acquire(self, pool: Any) -> Any:
        conn = await super()._pool_acquire(pool)  # type: ignore[misc]
        conn.__class__ = AsyncSqliteConnection
        return conn

    def _rollback_unless_broken(self, rollback: Callable[[], None]) -> None:
        # SQLite refuses to roll back what is not open, and its error would hide what a function called after the COMMIT raised.
        raw = getattr(self._state.conn, "conn", None)
        if raw is None or raw.in_transaction:
            super()._rollback_unless_broken(rollback)


def install(database: Any) -> AsyncState:
    """Put our state and guards into a pwasyncio database; see `peewee_frameworks.state.install`."""
    cls: Any = type(database)
    guard: type = AsyncGuarded
    if isinstance(database, pwasyncio.AsyncPostgresqlDatabase):
        guard = AsyncPgGuarded
    elif isinstance(database, pwasyncio.AsyncSqliteDatabase):
        guard = AsyncSqliteGuarded
    if database._pool is not None and running_loop() is None:
        raise ConfigurationError(
            f"{display_name(database)}: its pool is open already, in a loop that nobody knows. Give the database to "
            "Peewee(...) or connection_scope(...) before it is first used."
        )
    state = AsyncState(database)
    database._state = state
    change_class(database, guarded_class(cls, guard))
    if database._pool is not None:
        state.keeper.settle_in(database._pool)
    return state
