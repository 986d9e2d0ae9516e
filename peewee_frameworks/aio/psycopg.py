"""Peewee's asyncio layer on psycopg 3 and its own connection pool.

::

    db = AsyncPsycopgDatabase("shop", user="shop", host="db", min_size=2, max_size=20, timeout=5)

Against asyncpg: parameters are adapted as psycopg does it for sync code (a string for an integer column, `BlobField`,
`bulk_update`), isolation levels work, and `COPY`-free server-side cursors stream inside and outside transactions.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import os
import select
import socket
import uuid
from typing import TYPE_CHECKING, Any

import peewee
import psycopg
import psycopg_pool
from playhouse import postgres_ext, pwasyncio
from psycopg.pq import TransactionStatus

from peewee_frameworks.errors import ConfigurationError, PoolClosed, TooManyWaiters
from peewee_frameworks.spelling import nearly
from peewee_frameworks.state import install

from .drivers import CANCEL_SECONDS
from .refusals import Refusals, Refused

if TYPE_CHECKING:
    from collections.abc import Sequence

# What psycopg_pool.AsyncConnectionPool takes, beside `open`, `kwargs`, `conninfo`, `name` and `close_returns`, which are ours.
_POOL_OPTIONS = frozenset(
    {
        "check",
        "configure",
        "connection_class",
        "max_idle",
        "max_lifetime",
        "max_size",
        "max_waiting",
        "min_size",
        "num_workers",
        "reconnect_failed",
        "reconnect_timeout",
        "reset",
    }
)

# What the sync pools call those.
_SYNC_NAMES = {
    "idle_timeout": "max_idle",
    "max_connections": "max_size",
    "min_connections": "min_size",
    "stale_timeout": "max_lifetime",
}
_ALL_OPTIONS = _POOL_OPTIONS | {"timeout", "wait_for_minimum", "pool_size", "pool_min_size", "acquire_timeout"}


# Seconds in which a server that has said something unasked answers, or is taken for dead.
ASK_SECONDS = 2.0

# Connections kept open, unless the options say otherwise: psycopg's own default.
MIN_SIZE = 4

# Seconds for one connect, unless the connection parameters or PGCONNECT_TIMEOUT say otherwise; psycopg's own are 130.
CONNECT_SECONDS = 10


class _CutOff:
    """Mixed into psycopg's connection: what the server does not end when it is cancelled is cut off.

    By itself psycopg gives the server 5 s to take the cancellation and 5 s to end the statement, and who was cancelled waits.
    """

    pgconn: Any
    telling: asyncio.Task[None] | None = None
    """What tells the server that a statement was cancelled. It has a connection of its own, and outlives this one's end."""
    _cutting: asyncio.TimerHandle | None = None

    async def wait(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().wait(*args, **kwargs)  # type: ignore[misc]
        except psycopg.Error as error:
            if self._cutting is None:
                raise
            # Older versions raise what the cut has made of the statement, in place of what has interrupted it.
            interruption: BaseException | None = error
            while isinstance(interruption, Exception):
                interruption = interruption.__context__
            raise interruption or error from error
        finally:
            if self._cutting is not None:
                self._cutting.cancel()
                self._cutting = None

    async def _try_cancel(self, *, timeout: float = CANCEL_SECONDS) -> None:
        loop = asyncio.get_running_loop()
        self._cutting = loop.call_later(CANCEL_SECONDS, self._cut)
        # A task, for whoever was cancelled may be so again, under anyio at once. It has begun when that comes.
        telling = super()._try_cancel(timeout=min(timeout, CANCEL_SECONDS))  # type: ignore[misc]
        self.telling = loop.create_task(telling, name="peewee-cancel", context=contextvars.Context())
        await asyncio.shield(self.telling)

    def _cut(self) -> None:
        # Not closed: who waits for the socket would go on waiting, for the next file that gets its number.
        with (
            contextlib.suppress(OSError),
            socket.fromfd(self.pgconn.socket, socket.AF_INET, socket.SOCK_STREAM) as connection,
        ):
            connection.shutdown(socket.SHUT_RDWR)


class _Lent(set[Any]):
    """The connections that are out of the pool, which does not know them."""

    _empty: asyncio.Future[None] | None = None

    def discard(self, raw: Any) -> None:
        super().discard(raw)
        if not self and self._empty is not None and not self._empty.done():
            self._empty.set_result(None)

    async def all_back(self) -> None:
        """Wait until none is out."""
        while self:
            self._empty = asyncio.get_running_loop().create_future()
            await self._empty


class AsyncPsycopgConnection(pwasyncio.AsyncConnectionWrapper):
    """A psycopg connection as pwasyncio wraps them; in autocommit, so that Peewee's BEGIN and SAVEPOINT are the only ones."""

    conn: Any
    _lock: Any

    def __init__(self, conn: Any, lent: _Lent) -> None:
        super().__init__(conn)
        self._lent = lent
        lent.add(conn)

    def stale(self) -> bool:
        """Return whether this side knows that the connection is gone."""
        return self.conn is None or self.conn.closed

    async def _execute(self, sql: str, params: Sequence[Any] | None = None) -> Any:
        cursor = self.conn.cursor()
        await cursor.execute(sql, params or None)
        rows = await cursor.fetchall() if cursor.description is not None else None
        return pwasyncio.CursorAdapter(rows, rowcount=cursor.rowcount, description=_columns(cursor))

    async def execute_iter(self, sql: str, params: Sequence[Any] | None = None) -> Any:
        """Open a server-side cursor; outside a transaction the server keeps its result until it is closed."""
        await self._acquire_lock()
        self._streaming = True
        cursor = None
        try:
            in_transaction = self.conn.info.transaction_status == TransactionStatus.INTRANS
            cursor = self.conn.cursor(name=uuid.uuid4().hex, withhold=not in_transaction)
            await cursor.execute(sql, params or None)
        except BaseException:
            self._done()
            raise

        async def cleanup() -> None:
            try:
                if not self.stale():
                    await cursor.close()
            finally:
                self._done()

        return pwasyncio.CursorAdapter(description=_columns(cursor), fetch_many=cursor.fetchmany, cleanup=cleanup)

    def _done(self) -> None:
        self._streaming = False
        self._lock.release()

    async def close(self) -> None:
        """Close the connection."""
        if self.conn is not None:
            conn, self.conn = self.conn, None
            self._lent.discard(conn)
            await conn.close()

    def abandon(self) -> None:
        """Close the connection at once; see `drivers.abandon`."""
        self._lent.discard(self.conn)
        self.conn.pgconn.finish()

    async def free(self, pool: Any) -> None:
        """Give its place in the pool to a new connection; see `drivers.free`."""
        if self.conn.telling is not None:  # until then the server may have a connection more than the pool is to have
            await asyncio.wait({self.conn.telling}, timeout=CANCEL_SECONDS)
        await pool.putconn(self.conn)


async def _has_died(raw: Any) -> bool:
    """Return whether the server has closed an idle connection, as far as can be told without a round trip."""
    if not _poll(raw.pgconn.socket, 0):
        return False  # a living server is silent
    # Its last words, or a notification. The end of the connection may come a moment after the words, so ask.
    try:
        async with asyncio.timeout(ASK_SECONDS):
            await raw.execute("")
    except (psycopg.Error, TimeoutError):
        return True
    return False


def _poll(descriptor: int, seconds: float) -> bool:
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([descriptor], [], [], seconds)[0])
    poll = select.poll()  # takes any descriptor; select() none above 1023
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _refuse(name: str) -> None:
    """Refuse what is (all but) the name of an option of the pool; libpq would, at the first connect, among all it knows."""
    if name in _ALL_OPTIONS:
        raise ConfigurationError(f"Give {name} to AsyncPsycopgDatabase(...), also if its `init` comes later.")
    if name in _SYNC_NAMES:
        raise ConfigurationError(f"Unknown option {name}: AsyncPsycopgDatabase calls it {_SYNC_NAMES[name]}.")
    if name == "connect_timeout":  # libpq's
        return
    if meant := nearly(name, _ALL_OPTIONS | _SYNC_NAMES.keys()):
        raise ConfigurationError(f"Unknown option {name}. Did you mean {_SYNC_NAMES.get(meant, meant)}?")


def _columns(cursor: Any) -> list[tuple[str]]:
    return [(column.name,) for column in cursor.description or ()]


class AsyncPsycopgDatabase(pwasyncio.AsyncDatabaseMixin, peewee.PostgresqlDatabase):
    """PostgreSQL through psycopg 3, natively asynchronous, on `psycopg_pool.AsyncConnectionPool`.

    The pool opens with the first use or the application's lifespan, in that loop, and closes with it.
    """

    psycopg3_adapter = postgres_ext.Psycopg3ExtAdapter
    # psycopg's pool gives back what comes when its waiter was cancelled; see `PoolKeeper`.
    cancels_cleanly = True
    # The names here of pwasyncio's `pool_size` and `acquire_timeout`, for messages.
    size_option, timeout_option = "max_size", "timeout"

    def __init__(
        self,
        database: str | None,
        *,
        min_size: int | None = None,
        max_size: int | None = None,
        timeout: float | None = None,
        wait_for_minimum: bool = False,
        **kwargs: Any,
    ) -> None:
        """Describe the database; nothing connects.

        Args:
            database: its name, a URL or conninfo; None to call `init` later.
            min_size: connections that the pool keeps open; by default 4, or `max_size` if that is less.
            max_size: connections at most; by default `min_size`.
            timeout: seconds to wait for a connection; 10 by default. (``acquire_timeout`` is the same.)
            wait_for_minimum: opening the pool waits for `min_size` connections, and fails if they do not come in time.
            kwargs: the other options of `AsyncConnectionPool` (``max_waiting``, ``max_lifetime``, ``max_idle``, ``check``,
                ``reset``, ``configure``, ``reconnect_timeout``, ``reconnect_failed``, ``num_workers``), Peewee's
                (``isolation_level``, ``encoding``), and psycopg's connection parameters. ``reconnect_timeout`` is 0 by
                default, where whoever wants a connection makes the pool try again at once; otherwise it tries at growing
                intervals for so many seconds.

        Raises: `ConfigurationError` for sizes or timeouts that contradict each other or are no numbers, and for an option that
            is misspelled or has another name here.
        """
        pool_size, pool_min_size = kwargs.pop("pool_size", None), kwargs.pop("pool_min_size", None)  # pwasyncio's names
        acquire_timeout = kwargs.pop("acquire_timeout", None)
        if None not in (timeout, acquire_timeout) and timeout != acquire_timeout:
            raise ConfigurationError("timeout and acquire_timeout mean the same: give one of them.")
        min_size = pool_min_size if min_size is None else min_size
        max_size = pool_size if max_size is None else max_size
        if min_size is None:
            min_size = min(MIN_SIZE, max_size) if isinstance(max_size, int) else MIN_SIZE
        self.pool_options: dict[str, Any] = {name: kwargs.pop(name) for name in _POOL_OPTIONS & kwargs.keys()}
        self.pool_options |= {"min_size": min_size, "max_size": min_size if max_size is None else max_size}
        seconds = timeout if timeout is not None else acquire_timeout if acquire_timeout is not None else 10.0
        self._check_options(seconds)
        self._refusals = Refusals()
        self._lent = _Lent()
        self._wait_for_minimum = wait_for_minimum
        super().__init__(
            database,
            pool_size=self.pool_options["max_size"],
            pool_min_size=min_size,
            acquire_timeout=seconds,
            prefer_psycopg3=True,
            **kwargs,
        )
        install(self)

    def init(self, database: str | None, *args: Any, **kwargs: Any) -> None:
        """Name the database and its connection parameters; see Peewee's.

        Raises: `ConfigurationError` for an option that is misspelled, has another name here or is the constructor's.
        """
        for name in kwargs:
            _refuse(name)
        super().init(database, *args, **kwargs)

    def _check_options(self, seconds: Any) -> None:
        low, high = self.pool_options["min_size"], self.pool_options["max_size"]
        for name, value in (("min_size", low), ("max_size", high)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigurationError(f"{name} must be a whole number, not {value!r}.")
        if not isinstance(seconds, int | float) or isinstance(seconds, bool):
            raise ConfigurationError(f"timeout must be a number of seconds, not {seconds!r}.")
        if low < 0 or high < max(low, 1):
            raise ConfigurationError(
                f"{type(self).__name__}(min_size={low}, max_size={high}): max_size must be at least min_size and 1, and "
                "min_size at least 0."
            )

    def _connection_arguments(self) -> tuple[str, dict[str, Any]]:
        arguments = dict(self.connect_params, autocommit=True)
        if self._encoding:
            arguments.setdefault("client_encoding", self._encoding)
        conninfo = arguments.pop("conninfo", "")
        name = self.database
        if "://" in name or "=" in name:
            conninfo = name
        else:
            arguments.setdefault("dbname", name)
        if "connect_timeout" not in conninfo and "PGCONNECT_TIMEOUT" not in os.environ:
            arguments.setdefault("connect_timeout", CONNECT_SECONDS)
        return conninfo, arguments

    def _connection_class(self) -> Any:
        """Make the class of the connections: psycopg's or the user's, that is not waited for in vain."""
        database = self

        class Connection(_CutOff, self.pool_options.get("connection_class", psycopg.AsyncConnection)):  # type: ignore[misc]
            __qualname__ = "Connection"  # in psycopg's log

            @classmethod
            async def connect(cls, *args: Any, **kwargs: Any) -> Any:
                try:
                    return await database._refusals.watch(super().connect(*args, **kwargs))
                except Exception:
                    database._tell_refusal()
                    raise

        return Connection

    async def _create_pool_async(self) -> Any:
        conninfo, arguments = self._connection_arguments()
        gave_up = self.pool_options.get("reconnect_failed")

        async def reconnect_failed(pool: Any) -> None:
            self._tell_refusal()  # those too who came since the connect failed: the next one is not begun for them
            if gave_up is not None and inspect.isawaitable(pending := gave_up(pool)):
                await pending

        options = {"reconnect_timeout": 0.0, **self.pool_options}
        options |= {"connection_class": self._connection_class(), "reconnect_failed": reconnect_failed}
        pool: Any = psycopg_pool.AsyncConnectionPool(
            conninfo, kwargs=arguments, open=False, name=self._state.name, timeout=self._acquire_timeout, **options
        )
        await pool.open()
        if self._wait_for_minimum:
            try:
                await self._wait_for_pool(pool)
            except BaseException:
                await pool.close(self._acquire_timeout)
                raise
        return pool

    def _tell_refusal(self) -> None:
        if not self._lent and not (self._pool and self._pool._pool):  # nobody brings one back, either
            self._refusals.tell()

    async def _wait_for_pool(self, pool: Any) -> None:
        try:
            async with self._refusals.waiting():
                await pool.wait(self._acquire_timeout)
        except Refused as error:
            raise psycopg.OperationalError(str(error)) from None

    async def connect_beside(self) -> AsyncPsycopgConnection:
        """Open a connection beside the pool; the caller closes it."""
        conninfo, arguments = self._connection_arguments()
        return AsyncPsycopgConnection(await psycopg.AsyncConnection.connect(conninfo, **arguments), _Lent())

    async def _get(self, pool: Any) -> Any:
        if pool._pool:
            return await pool.getconn()
        try:
            async with self._refusals.waiting():
                return await pool.getconn()
        except (Refused, psycopg_pool.PoolTimeout):
            if (reason := self._refusals.last) is not None:
                raise psycopg.OperationalError(reason) from None
            if not self._lent:
                raise self._state.keeper.too_slow() from None
            raise TimeoutError from None

    async def _pool_acquire(self, pool: Any) -> Any:
        try:
            raw = await self._get(pool)
            while True:
                try:
                    if not await _has_died(raw):
                        break
                except BaseException:
                    raw.pgconn.finish()
                    await pool.putconn(raw)
                    raise
                await raw.close()
                await pool.putconn(raw)
                raw = await self._get(pool)
        except psycopg_pool.TooManyRequests as error:
            raise TooManyWaiters(
                f"{self._state.name}: {self.pool_options['max_waiting']} callers are waiting for a connection already "
                "(max_waiting)."
            ) from error
        except psycopg_pool.PoolClosed as error:
            raise PoolClosed(f"{self._state.name}: the pool was closed meanwhile.") from error
        except psycopg_pool.PoolTimeout:
            raise TimeoutError from None
        if self.server_version is None:
            self._set_server_version(raw)
        return AsyncPsycopgConnection(raw, self._lent)

    async def _pool_release(self, conn: Any) -> None:
        raw = conn.conn
        if raw is None:
            return
        self._lent.discard(raw)
        if raw.info.transaction_status not in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN):
            with contextlib.suppress(psycopg.Error):  # broken: the pool will see it and replace the connection
                await raw.rollback()
        await self._pool.putconn(raw)

    async def _pool_close(self) -> None:
        pool = self._pool
        task: Any = asyncio.current_task()
        cancelled = task.cancelling()
        try:
            await self._lent.all_back()
        finally:
            idle = list(pool._pool)
            try:
                await pool.close(self._acquire_timeout)
            except asyncio.CancelledError:
                # The pool waits for its workers, and stops half way if the loop's shutdown has cancelled them, not us.
                if task.cancelling() > cancelled:
                    raise
            finally:
                for raw in (*idle, *self._lent):
                    if raw.pgconn.transaction_status == TransactionStatus.ACTIVE:
                        raw._cut()  # whoever waits for the statement's end closes it then
                    else:
                        await raw.close()
                self._lent.clear()

    async def open(self, wait: bool = False) -> None:
        """Open the pool in the running loop; lifespan does this.

        Args:
            wait: for `min_size` connections.

        Raises: `DatabaseUnavailable` if they do not come within the timeout; `WrongEventLoop`.
        """
        pool = await self.open_pool()
        if wait:
            try:
                await self._wait_for_pool(pool)
            except psycopg.Error as error:
                await self.close_pool()  # the wait for it may have closed it already
                self._state.keeper.fail(error)

    def pool_stats(self) -> dict[str, int]:
        """Return what `AsyncConnectionPool.get_stats` counts; nothing while the pool is closed."""
        return self._pool.get_stats() if self._pool is not None else {}
