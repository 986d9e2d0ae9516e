"""Peewee's asyncio layer, guarded: what an installed pwasyncio database's methods become."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import time
from typing import TYPE_CHECKING, Any

import peewee
from playhouse import pwasyncio
from playhouse.pwasyncio import await_

from peewee_frameworks.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    PeeweeFrameworksError,
    PoolConnectTimeout,
    PoolTimeout,
    WrongEventLoop,
)
from peewee_frameworks.frame import Frame, current_frames, running_loop
from peewee_frameworks.guarded import Atomic, Guarded, Savepoint, Transaction, _Marked
from peewee_frameworks.state import display_name, guarded_class

from . import drivers
from .bridge import not_in_bridge, under_bridge
from .frame import AsyncFrame
from .loops import Home, name_of
from .state import AsyncState
from .stream import Rows

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("peewee_frameworks")

# Seconds for closing a pool whose loop is shutting down: whoever waits for the loop's end waits for this.
_SHUTDOWN_SECONDS = 2.0

# Pools of a parent process. Collecting them would close the parent's sessions with a farewell over its sockets.
_inherited: list[Any] = []


class _HeldOpen:
    """An entry in Peewee's stack of contexts: one ``async with db``."""


_HELD = _HeldOpen()


class AsyncTransaction(pwasyncio._async_transaction_helper, Transaction):  # type: ignore[misc]
    """Peewee's transaction block; ``async with`` too."""


class AsyncAtomic(pwasyncio._async_transaction_helper, Atomic):  # type: ignore[misc]
    """Peewee's ``atomic``; ``async with`` too."""


class AsyncSavepoint(pwasyncio._async_transaction_helper, Savepoint):  # type: ignore[misc]
    """Peewee's savepoint block; ``async with`` too."""

    def rollback(self, begin: bool = True) -> None:
        # A lost transaction is rolled back already, and an error here would hide the one that is unwinding the block.
        frame = self.db._state.frame()
        if begin:
            super().rollback(begin)
        elif not getattr(frame, "broken", None):
            try:
                super().rollback(begin)
            except Exception:
                if not frame.broken:
                    raise


class PgAtomic(_Marked, pwasyncio.AsyncPgAtomic):  # type: ignore[misc]
    """What `atomic`, `transaction` and `savepoint` are on asyncpg, which insists on transactions of its own."""

    def _build_ctx(self) -> PgAtomic:
        args, kwargs = self._begin_args
        return type(self)(self.db, *args, **kwargs)

    def begin_unmarked(self) -> Any:
        """Begin without a mark: whoever shares the scope may go on in the transaction."""
        return super(_Marked, self).__enter__()

    async def _abegin(self) -> Any:
        return await self._alone(super()._abegin)

    async def acommit(self, begin: bool = True) -> None:
        await self._alone(super().acommit, begin, whole=True)

    async def arollback(self, begin: bool = True) -> None:
        frame = self.db._state.frame()
        if not begin and (frame.final or getattr(frame, "broken", None)):
            return
        try:
            await self._alone(super().arollback, begin)
        except Exception:
            if begin or frame.conn is not None:
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
        return await_(self._database._statement(sql, params))


class AsyncGuarded(Guarded):
    """Mixed into the class of an installed pwasyncio database."""

    __slots__ = ()

    _state: AsyncState
    _pool: Any
    _closing: bool
    _acquire_timeout: float
    query_hooks: list[Any]
    _home: Home | None = None
    _opening: asyncio.Task[Any] | None = None
    _sentinel: asyncio.Future[None] | None = None

    # -- statements ---------------------------------------------------------------------------------------------------

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        if not under_bridge():
            raise not_in_bridge(self._state.name, sql)
        return await_(self.aexecute_sql(sql, params or ()))

    async def aexecute_sql(self, sql: str, params: Any = None) -> Any:
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
            with peewee.__exception_wrapper__:
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
                frame.broken = frame.broken or "the connection was lost"
            raise
        finally:
            frame.leave()

    def rollback(self) -> None:
        frame = self._state.frame()
        if frame.final or getattr(frame, "broken", None):
            self._unmark_all()
            return
        was = frame.conn
        try:
            super().rollback()
        except Exception:
            if was is None or frame.conn is not None:
                raise
            logger.debug("%s: the connection was lost at a rollback.", self._state.name, exc_info=True)

    def atomic(self, *args: Any, **kwargs: Any) -> Any:
        return AsyncAtomic(self, *args, **kwargs)

    aatomic = atomic

    def transaction(self, *args: Any, **kwargs: Any) -> Any:
        return AsyncTransaction(self, *args, **kwargs)

    def savepoint(self) -> Any:
        return AsyncSavepoint(self)

    # -- the connection -----------------------------------------------------------------------------------------------

    def connect(self, reuse_if_open: bool = False) -> Any:  # type: ignore[override] # noqa: ARG002 - it always does
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
            home = self._home
            if home is None or not home.is_here():
                self._come_home()
            if not self._state.is_lost(conn):
                return conn
            frame.lose(conn, "the connection was lost")
            if frame.broken is not None:
                raise frame.lost()
        if self._closing:
            raise peewee.InterfaceError("Database pool is shutting down.")
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
        seconds = self._acquire_timeout
        home, pool = self._home, self._pool
        if pool is None or home is None or not home.is_here():
            try:
                async with asyncio.timeout(seconds):
                    pool = await self.open_pool()
            except TimeoutError:
                raise PoolConnectTimeout(
                    f"{self._state.name}: no connection within {seconds:g} s (acquire_timeout). The server does not answer."
                ) from None
        try:
            with peewee.__exception_wrapper__:
                conn = await self._pool_acquire(pool)  # type: ignore[attr-defined]
        except TimeoutError:
            raise self._exhausted() from None
        except Exception as error:
            raise self._unavailable(error) from error
        conn._pool = pool  # a late return can tell that the pool was replaced
        return conn

    def _exhausted(self) -> PoolTimeout:
        hint = "Raise pool_size, or give connections back sooner."
        frames = current_frames.get()
        around = frames.scope.parent if frames is not None and frames.scope is not None else None
        if around is not None and (frame := around.frames.get(self._state)) is not None and frame.conn is not None:
            hint = (
                f"The scope around this one, {around.label}, holds a connection while it waits: that deadlocks as soon as all "
                "connections are held so. Share its scope, or give its connection back first."
            )
        size = getattr(self, "_pool_size", None)
        return PoolTimeout(
            f"{self._state.name}: waited {self._acquire_timeout:g} s (acquire_timeout) for one of {size} connections. {hint}"
        )

    def _unavailable(self, error: Exception) -> Exception:
        foreign = type(error).__module__.partition(".")[0] in ("asyncpg", "psycopg", "psycopg_pool")
        if isinstance(error, PeeweeFrameworksError) or not (
            foreign or isinstance(error, peewee.DatabaseError | peewee.InterfaceError | OSError)
        ):
            return error
        return DatabaseUnavailable(f"{self._state.name}: connecting failed: {error}")

    async def open_pool(self) -> Any:
        """Open the pool in the running loop, if it is not open.

        Raises: `DatabaseUnavailable`; `WrongEventLoop` if it is open in another loop, or was before a fork.
        """
        self._come_home()
        if self._pool is not None:
            return self._pool
        opening = self._opening
        if opening is None:
            if self.deferred:
                raise ConfigurationError(f"{display_name(self)}: the database is deferred. Call `db.init(...)` first.")
            # A task of its own, in an empty context: what lives in the pool must not inherit the first request's scope, nor
            # end with it.
            loop = asyncio.get_running_loop()
            opening = self._opening = loop.create_task(
                self._open_pool(), name="peewee-open", context=contextvars.Context()
            )
        return await asyncio.shield(opening)

    async def _open_pool(self) -> Any:
        try:
            with peewee.__exception_wrapper__:
                pool = await self._create_pool_async()  # type: ignore[attr-defined]
        except Exception as error:
            raise self._unavailable(error) from error
        finally:
            self._opening = None
        self._pool = pool
        self._settle_in(pool)
        return pool

    def _settle_in(self, pool: Any) -> None:
        loop = asyncio.get_running_loop()
        self._home, self._sentinel = Home(), loop.create_future()
        self._state.watch = loop.create_task(
            self._close_with_loop(pool, self._sentinel), name="peewee-pool", context=contextvars.Context()
        )

    async def _close_with_loop(self, pool: Any, stop: asyncio.Future[None]) -> None:
        """Close the pool when the loop's shutdown cancels this task.

        It makes `asyncio.run` twice and a loop per test work, and cures a hang: a worker of psycopg's pool that is connecting
        swallows the cancellation, and the loop would wait for it for ever.
        """
        try:
            await stop
        except asyncio.CancelledError:
            if self._pool is pool:
                await self.close_pool(_SHUTDOWN_SECONDS)
            raise

    def _come_home(self) -> None:
        """Forget a pool whose loop is gone.

        Raises: `WrongEventLoop` if its loop lives, or if it was opened before a fork.
        """
        opening = self._opening
        if opening is not None and opening.get_loop() is not asyncio.get_running_loop():
            if opening.get_loop().is_closed():
                self._opening = None
            else:
                raise WrongEventLoop(
                    f"{self._state.name}: its pool is being opened in another event loop. Give each loop a database of its own."
                )
        home = self._home
        if home is None or self._pool is None or home.is_here():
            return
        here = name_of(asyncio.get_running_loop())
        if home.pid != os.getpid():
            raise WrongEventLoop(
                f"{self._state.name}: its pool was opened in process {home.pid}, in loop {home.name}, and this is a fork of "
                f"it, process {os.getpid()}, loop {here}. Open pools after the fork; or call `db.dispose()` first thing in the "
                "child, which forgets the parent's connections without closing them."
            )
        if home.loop is not None:
            raise WrongEventLoop(
                f"{self._state.name}: its pool belongs to the loop {home.name}, which is alive, and this is the loop {here}. "
                "A pool serves one loop: run the code there (asyncio.run_coroutine_threadsafe), close the pool there first "
                "(`await db.close_pool()`), or give each loop a database of its own."
            )
        logger.warning(
            "%s: the loop %s was closed without closing the pool; a new one is opened.", self._state.name, home.name
        )
        pool, self._pool, self._home, self._sentinel = self._pool, None, None, None
        drivers.forsake(pool)

    async def close_pool(self, timeout: float | None = None) -> None:
        """Close the pool, in the loop that opened it. It opens again with the next use, there or in another loop.

        Args:
            timeout: seconds to wait for connections in use; they are cut off then. By default ``acquire_timeout``.

        Raises: `WrongEventLoop`.
        """
        if self._opening is not None and self._opening.get_loop() is asyncio.get_running_loop():
            await asyncio.wait([self._opening])
        self._come_home()
        pool = self._pool
        if pool is None or self._closing:
            return
        self._closing = True
        try:
            async with asyncio.timeout(self._acquire_timeout if timeout is None else timeout):
                frame = self._state.frame()
                if isinstance(frame, Frame) and frame.conn is not None:
                    frame.release_early()  # the caller's own is idle by definition
                await self._state.settle()
                await self._pool_close()  # type: ignore[attr-defined]
        except TimeoutError:
            logger.warning(
                "%s: connections were still in use when the pool was closed; they are cut off.", self._state.name
            )
            drivers.forsake(pool)
        except BaseException:
            drivers.forsake(pool)
            raise
        finally:
            if self._pool is pool:
                self._pool = self._home = None
            stop, self._sentinel = self._sentinel, None
            if stop is not None and not stop.done():
                stop.set_result(None)
            self._closing = False

    def dispose(self) -> None:
        """Forget the pool without closing it: for a child process, whose parent goes on using it."""
        if self._pool is not None:
            _inherited.append((self._pool, self._sentinel, self._opening))
        self._pool = self._home = self._sentinel = self._opening = None
        self._state.reset()
        self._state.forget()


class AsyncPgGuarded(AsyncGuarded):
    """Mixed into databases on asyncpg."""

    __slots__ = ()

    def atomic(self, *args: Any, **kwargs: Any) -> Any:
        return PgAtomic(self, *args, **kwargs)

    aatomic = transaction = savepoint = atomic


def install(database: Any) -> AsyncState:
    """Put our state and guards into a pwasyncio database; see `peewee_frameworks.state.install`."""
    cls: Any = type(database)
    guard = AsyncPgGuarded if isinstance(database, pwasyncio.AsyncPostgresqlDatabase) else AsyncGuarded
    if database._pool is not None and running_loop() is None:
        raise ConfigurationError(
            f"{display_name(database)}: its pool is open already, in a loop that nobody knows. Give the database to Peewee(...) "
            "or connection_scope(...) before it is first used."
        )
    state = AsyncState(database)
    database._state = state
    database.__class__ = guarded_class(cls, guard)
    if database._pool is not None:
        database._settle_in(database._pool)
    return state
