"""The moment of each database's pool, whoever's pool it is: ours, `playhouse.pool`'s, an asynchronous driver's, or none.

Nothing here waits or does I/O; any thread may ask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from playhouse.pool import PooledDatabase as PlayhousePooledDatabase

from .holders import uses_of
from .pool.database import short_name
from .pool.stats import Histogram, PoolStats

if TYPE_CHECKING:
    from .aio.state import AsyncState
    from .pool.stats import Recorder
    from .runtime import Runtime
    from .state import State

__all__ = ["Histogram", "PoolStats", "pool_name", "read", "recorder_of", "stats_of"]


# What we count ourselves of asynchronous databases, whose pools count little.
_KEPT = ("timeouts", "refused", "connect_errors", "wait_time", "use_time")


def stats_of(runtime: Runtime) -> dict[str, PoolStats]:
    """Return alias → statistics for the databases of an application.

    Raises: `ConfigurationError` while the databases are not known.
    """
    return {alias: read(state) for alias, state in zip(runtime.databases, runtime.states, strict=True)}


def pool_name(state: State) -> str:
    """Return the name of a database's pool: ``pool_name``, or the database's name without user and password."""
    pool = getattr(state.database, "pool", None)
    return short_name(state.database.database) if pool is None else str(pool.name)


def recorder_of(state: State) -> Recorder | None:
    """Return what counts for a database's pool, if that is ours."""
    if state.is_async:
        counts: Recorder = state.keeper.recorder  # type: ignore[attr-defined]
        return counts
    pool = getattr(state.database, "pool", None)
    return None if pool is None else pool._recorder


def read(state: State) -> PoolStats:
    """Return the moment of one database's pool."""
    database = state.database
    if state.is_async:
        return _asynchronous(state)  # type: ignore[arg-type]
    pool = getattr(database, "pool", None)
    if pool is not None:
        moment: PoolStats = pool.stats()
        return moment
    if isinstance(database, PlayhousePooledDatabase):
        return _playhouse(database, state.leaks)
    used = len(uses_of(state))  # without a pool only our own records tell
    return PoolStats(
        name=short_name(database.database), min_connections=0, idle=0, used=used, total=used, leaks=state.leaks
    )


def _playhouse(database: Any, leaks: int | None) -> PoolStats:
    idle, used = len(database._connections), len(database._in_use)
    return PoolStats(
        name=short_name(database.database),
        max_connections=database._max_connections or None,
        min_connections=0,
        idle=idle,
        used=used,
        total=idle + used,
        leaks=leaks,
    )


def _asynchronous(state: AsyncState) -> PoolStats:
    database, keeper = state.database, state.keeper
    recorded = keeper.recorder.read()
    known: dict[str, Any] = {name: recorded[name] for name in _KEPT} | {"idle": 0, "used": 0, "connecting": 0}
    if database._pool is not None:
        known |= _driver_pool(database, database._pool)
    return PoolStats(
        name=short_name(database.database),
        max_connections=database._pool_size,
        min_connections=database._pool_min_size,
        total=sum(known[state] or 0 for state in ("idle", "used", "connecting")),
        waiting=keeper.pending,
        closed=database._closing,
        checkouts=known["wait_time"].count,
        leaks=state.leaks,
        **known,
    )


def _driver_pool(database: Any, pool: Any) -> dict[str, Any]:
    if hasattr(pool, "get_stats"):  # psycopg_pool
        told = pool.get_stats()
        idle, used = told["pool_available"], len(database._lent)
        errors = told.get("connections_errors", 0)
        return {
            "idle": idle,
            "used": used,
            "connecting": max(told["pool_size"] - idle - used, 0),
            "connects": told.get("connections_num", 0) - errors,
            "connect_errors": errors,
        }
    if hasattr(pool, "get_idle_size"):  # asyncpg
        idle = pool.get_idle_size()
        return {"idle": idle, "used": max(pool.get_size() - idle, 0), "connecting": None}
    if hasattr(pool, "freesize"):  # aiomysql
        idle, connecting = pool.freesize, pool._acquiring
        return {"idle": idle, "used": max(pool.size - idle - connecting, 0), "connecting": connecting}
    idle = pool._queue.qsize()  # pwasyncio's own, for aiosqlite: full from the start
    return {"idle": idle, "used": pool._pool_size - idle, "connecting": 0}
