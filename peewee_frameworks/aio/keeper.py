"""The pool of an asynchronous database: opened in a loop, used in that loop, closed with it."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import os
import time
from typing import TYPE_CHECKING, Any, NoReturn

import peewee

from peewee_frameworks.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    PeeweeFrameworksError,
    PoolConnectTimeout,
    PoolTimeout,
    TooManyWaiters,
    WrongEventLoop,
)
from peewee_frameworks.forks import keep
from peewee_frameworks.frame import get_frames
from peewee_frameworks.pool.stats import Recorder
from peewee_frameworks.redact import redact

from . import drivers
from .breath import Breath
from .loops import Home, name_of

if TYPE_CHECKING:
    from .state import AsyncState

logger = logging.getLogger("peewee_frameworks.pool")

# Seconds for closing a pool whose loop is shutting down: whoever waits for the loop's end waits for this.
SHUTDOWN_SECONDS = 2.0

wrapping_errors: Any = peewee.__dict__["__exception_wrapper__"]  # maps the drivers' errors to Peewee's


class PoolKeeper:
    """Opens and closes the pool that pwasyncio makes for a database, and guards it against other loops and processes."""

    def __init__(self, state: AsyncState) -> None:
        self._state = state
        self.home: Home | None = None
        self.breath = Breath()
        self.recorder = Recorder()
        self.pending = 0  # callers that wait for a connection
        self._opening: asyncio.Task[Any] | None = None
        self._stop: asyncio.Future[None] | None = None
        self._sentinel: asyncio.Task[None] | None = None

    async def acquire(self) -> Any:
        """Acquire a connection.

        Raises: `PoolTimeout`, `PoolConnectTimeout`, `DatabaseUnavailable`, `WrongEventLoop`.
        """
        started = time.monotonic()
        self.pending += 1
        try:
            conn = await self._acquire()
        except Exception as error:
            if name := _counter(error):
                self.recorder.count(name)
            raise
        finally:
            self.pending -= 1
        conn._taken = time.monotonic()
        self.recorder.waited(conn._taken - started)
        return conn

    def returns(self, conn: Any) -> None:
        """Note that a connection is not in use any more."""
        taken, conn._taken = getattr(conn, "_taken", None), None
        if taken is not None:
            self.recorder.used((time.monotonic() - taken,))

    async def _acquire(self) -> Any:
        database = self._state.database
        seconds = database._acquire_timeout
        pool = database._pool
        if pool is None or self.home is None or not self.home.is_here():
            try:
                async with asyncio.timeout(seconds):
                    pool = await self.open()
            except TimeoutError:
                raise self.too_slow() from None
        if self.breath.is_due():
            await self.breath.draw()
        try:
            with wrapping_errors:
                conn = await self._check_out(pool)
        except TimeoutError:
            raise self._exhausted() from None
        except Exception as error:  # noqa: BLE001 - it is raised there
            self.fail(error)
        conn._pool = pool  # a late return can tell that the pool was replaced
        return conn

    async def _check_out(self, pool: Any) -> Any:
        database = self._state.database
        if getattr(database, "cancels_cleanly", False):
            return await database._pool_acquire(pool)
        # aiomysql and pwasyncio use `wait_for`, which up to Python 3.11 may lose a cancellation, and with it the connection
        # that arrives at that moment. So nobody cancels them: what comes too late is given back.
        loop = asyncio.get_running_loop()
        task = loop.create_task(database._pool_acquire(pool), name="peewee-acquire", context=contextvars.Context())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._state.returning.add(task)
            task.add_done_callback(functools.partial(self._came_too_late, pool))
            raise

    def _came_too_late(self, pool: Any, task: asyncio.Task[Any]) -> None:
        self._state.returning.discard(task)
        if not task.cancelled() and task.exception() is None:
            conn = task.result()
            conn._pool = pool
            self._state.give_back(conn)

    def too_slow(self) -> PoolConnectTimeout:
        """Make the error for a connect that did not end in time."""
        database = self._state.database
        reason = "The server does not answer."
        if isinstance(database, peewee.SqliteDatabase):  # a pragma on a new connection waits for it
            reason = "Another connection has the file locked, or its disk is slow."
        return PoolConnectTimeout(
            f"{self._state.name}: no connection within {database._acquire_timeout:g} s ({_timeout_option(database)}). {reason}"
        )

    def _exhausted(self) -> PoolTimeout:
        database = self._state.database
        hint = f"Raise {_size_option(database)}, or give connections back sooner."
        frames = get_frames()
        around = frames.scope.parent if frames is not None and frames.scope is not None else None
        if around is not None and (frame := around.frames.get(self._state)) is not None and frame.conn is not None:
            hint = (
                f"The scope around this one, {around.label}, holds a connection while it waits: that deadlocks as soon as all "
                "connections are held so. Share its scope, or give its connection back first."
            )
        return PoolTimeout(
            f"{self._state.name}: waited {database._acquire_timeout:g} s ({_timeout_option(database)}) for one of "
            f"{database._pool_size} connections. {hint}"
        )

    def fail(self, error: Exception) -> NoReturn:
        """Raise `DatabaseUnavailable` for what connecting raised, or that, if it is ours already or a mistake in the call."""
        driver = type(error).__module__.partition(".")[0] in ("asyncpg", "psycopg", "psycopg_pool")
        if isinstance(error, PeeweeFrameworksError) or not (
            driver or isinstance(error, peewee.DatabaseError | peewee.InterfaceError | OSError)
        ):
            raise error
        reason = redact(str(error), [self._state.database])
        raise DatabaseUnavailable(f"{self._state.name}: connecting failed: {reason}") from error

    def closing(self) -> peewee.InterfaceError:
        """Make the error for who comes while the pool is being closed."""
        return peewee.InterfaceError(
            f"{self._state.name}: its pool is being closed. Who comes after that opens it again."
        )

    async def open(self) -> Any:
        """Open the pool in the running loop, if it is not open, and return it.

        Raises: `DatabaseUnavailable`; `WrongEventLoop` if it is open in another loop, or was before a fork.
        """
        self.check()
        database = self._state.database
        if database._pool is not None:
            return database._pool
        if database._closing:
            raise self.closing()
        if self._opening is None:
            if database.deferred:
                raise ConfigurationError(f"{self._state.name}: the database is deferred. Call `db.init(...)` first.")
            # A task of its own, in an empty context: what lives in the pool must not inherit the first request's scope, nor
            # end with it.
            loop = asyncio.get_running_loop()
            self._opening = loop.create_task(self._open(), name="peewee-open", context=contextvars.Context())
        return await asyncio.shield(self._opening)

    async def _open(self) -> Any:
        database = self._state.database
        try:
            with wrapping_errors:
                pool = await database._create_pool_async()
        except Exception as error:  # noqa: BLE001 - it is raised there
            self.fail(error)
        finally:
            self._opening = None
        database._pool = pool
        self.settle_in(pool)
        return pool

    def settle_in(self, pool: Any) -> None:
        """Take the running loop as the pool's home, and close the pool when it shuts down."""
        loop = asyncio.get_running_loop()
        self.home, self._stop, self.breath = Home(), loop.create_future(), Breath()
        watch = self._close_with_loop(pool, self._stop)
        self._sentinel = loop.create_task(watch, name="peewee-pool", context=contextvars.Context())

    async def _close_with_loop(self, pool: Any, stop: asyncio.Future[None]) -> None:
        """Close the pool when the loop's shutdown cancels this task.

        It makes `asyncio.run` twice and a loop per test work, and cures a hang: a worker of psycopg's pool that is connecting
        swallows the cancellation, and the loop would wait for it for ever.
        """
        try:
            await stop
        except asyncio.CancelledError:
            if self._state.database._pool is pool:
                await self.close(SHUTDOWN_SECONDS)
            raise

    def check(self) -> None:
        """Forget a pool whose loop is gone.

        Raises: `WrongEventLoop` if its loop lives, or if it was opened before a fork.
        """
        home, opening = self.home, self._opening
        if opening is not None and opening.get_loop() is not asyncio.get_running_loop():
            if not opening.get_loop().is_closed():
                raise WrongEventLoop(
                    f"{self._state.name}: its pool is being opened in another event loop. Give each loop a database of its own."
                )
            self._opening = None
        if home is None or home.is_here():
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
            "%s: the loop %s was closed without closing the pool; a new one is opened.",
            self._state.name,
            home.name,
            extra={"pool": self._state.name},
        )
        database = self._state.database
        pool, database._pool = database._pool, None
        self.home = self._stop = self._sentinel = None
        self._state.forget_returns()
        drivers.forsake(pool)

    async def close(self, timeout: float | None = None) -> None:
        """Close the pool in its loop; see `AsyncGuarded.close_pool`."""
        if self._opening is not None and self._opening.get_loop() is asyncio.get_running_loop():
            await asyncio.wait([self._opening])
        self.check()
        state, database = self._state, self._state.database
        pool = database._pool
        if pool is None or database._closing:
            return
        database._closing = True
        try:
            async with asyncio.timeout(database._acquire_timeout if timeout is None else timeout):
                state.release_own()
                await state.settle()
                await database._pool_close()
        except TimeoutError:
            logger.warning(
                "%s: connections were still in use when the pool was closed; they are cut off.",
                state.name,
                extra={"pool": state.name},
            )
            drivers.forsake(pool)
        except BaseException:
            drivers.forsake(pool)
            raise
        finally:
            if database._pool is pool:
                database._pool = self.home = None
            stop, self._stop = self._stop, None
            if stop is not None and not stop.done():
                stop.set_result(None)
            database._closing = False

    def forget(self) -> None:
        """Forget the pool without closing it."""
        database = self._state.database
        if database._pool is not None:
            keep((database._pool, self._stop, self._sentinel, self._opening))
        database._pool = self.home = self._stop = self._sentinel = self._opening = None


def _size_option(database: Any) -> str:
    """Name what the user sets the largest number of connections with."""
    return getattr(database, "size_option", "pool_size")


def _timeout_option(database: Any) -> str:
    """Name what the user sets the seconds of a wait for a connection with."""
    return getattr(database, "timeout_option", "acquire_timeout")


def _counter(error: Exception) -> str | None:
    """Name the counter of `PoolStats` for an error."""
    if isinstance(error, PoolTimeout | PoolConnectTimeout):
        return "timeouts"
    if isinstance(error, TooManyWaiters):
        return "refused"
    return "connect_errors" if isinstance(error, DatabaseUnavailable) else None
