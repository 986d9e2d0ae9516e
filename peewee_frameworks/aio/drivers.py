"""What the asyncio drivers do with a connection that must not be used again, and with a pool that must not be waited for.

Each function takes pwasyncio's wrapper of a connection, or the driver's own pool, and tells the drivers apart by that.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
from typing import TYPE_CHECKING, Any

from playhouse import pwasyncio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# Seconds in which a server ends a statement that was cancelled, or is taken for dead.
CANCEL_SECONDS = 2.0


def abandon(conn: Any) -> asyncio.Future[Any] | None:
    """Close a connection here and now: no farewell, no matter what runs on it. Never raises.

    Returns: a future if something of the connection is still to end; the loop must not be closed before.
    """
    raw = conn.conn
    if raw is None:
        return None
    # A loop that is closed already refuses to close sockets; the collector does it then.
    with contextlib.suppress(Exception):
        ending: asyncio.Future[Any] | None = None
        if hasattr(conn, "abandon"):  # ours: psycopg, and aiosqlite once it has been out of its pool
            ending = conn.abandon()
        elif isinstance(conn, pwasyncio.AsyncSqliteConnection):
            conn.conn = None
            raw._conn.interrupt()
            ending = raw.stop()
        elif isinstance(conn, pwasyncio.AsyncMySQLConnection):
            raw.close()
            getattr(conn._pool, "_used", set()).discard(raw)
        else:
            conn.conn = None
            ending = _terminate(raw)
        return ending
    return None


def _terminate(raw: Any) -> asyncio.Task[None] | None:
    """Close asyncpg's connection, but not before the server knows that what runs on it was cancelled.

    asyncpg says so on a connection of its own, in a task that `terminate` cancels; then the statement would run on, with its
    locks and a place among the server's connections.
    """
    telling = {task for task in getattr(raw, "_cancellations", ()) if not task.done()}
    if not telling:
        raw.terminate()
        return None

    async def end() -> None:
        try:
            await asyncio.wait(telling, timeout=CANCEL_SECONDS)
        finally:
            with contextlib.suppress(Exception):  # the server, or the pool's end, was faster
                raw.terminate()

    return asyncio.get_running_loop().create_task(end(), name="peewee-cancel", context=contextvars.Context())


async def free(conn: Any) -> None:
    """Give the place of an abandoned connection in its pool to the next one."""
    pool = conn._pool
    if isinstance(conn, pwasyncio.AsyncSqliteConnection):
        await pool.release(conn)  # which opens another in its stead
    elif isinstance(conn, pwasyncio.AsyncMySQLConnection):
        await pool._wakeup()  # aiomysql wakes nobody when a closed connection comes back
    elif hasattr(conn, "free"):
        await conn.free(pool)


def forsake(pool: Any) -> None:
    """Close what can be closed of a pool whose loop is gone, or that did not close in time. Never raises."""
    with contextlib.suppress(Exception):
        if hasattr(pool, "terminate"):  # asyncpg, aiomysql
            pool.terminate()
            for raw in list(getattr(pool, "_free", ())):
                raw.close()
        elif isinstance(pool, pwasyncio.AsyncSqlitePool):
            pool._closed = True
            while not pool._queue.empty():
                abandon(pool._queue.get_nowait())
        else:
            for raw in list(pool._pool):
                raw.pgconn.finish()


@contextlib.asynccontextmanager
async def beside(database: Any, timeout: float) -> AsyncIterator[Any]:
    """Give a connection beside a database's pool: the only one of a pool that opens and closes with it.

    Raises: what connecting raises; one that was cut short leaves nothing behind.
    """
    twin = copy.copy(database)
    twin._pool_size = twin._pool_min_size = 1
    twin._acquire_timeout = timeout
    if hasattr(twin, "pool_options"):  # psycopg's own pool connects in tasks of its own, and retries
        conn = await twin.connect_beside()
        pool = None
    else:
        pool = twin._pool = await twin._create_pool_async()
        conn = await twin._pool_acquire(pool)
    try:
        yield conn
        if isinstance(conn, pwasyncio.AsyncMySQLConnection):
            await conn.conn.ensure_closed()
        else:
            await conn.close()
    except BaseException:
        abandon(conn)
        raise
    finally:
        if pool is not None:
            forsake(pool)
