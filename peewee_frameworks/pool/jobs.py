"""The I/O of a pool, run by the workers: connecting, pinging, rolling back, closing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from peewee_frameworks.errors import PoolError

from .entries import CHECK, CLEAN, CLOSE, CONNECT, Entry, Job

if TYPE_CHECKING:
    from .core import Engine
    from .drivers import Driver
    from .pool import Pool

__all__ = ["close_what_was_cut", "connect_failed", "run_job"]

logger = logging.getLogger("peewee_frameworks.pool")
followed = logging.getLogger("peewee.pool")
"""playhouse's: who followed it there is told the same here, in the same words as far as they fit."""


def run_job(pool: Pool, engine: Engine, job: Job) -> None:
    """Do one piece of work and tell the engine what came of it."""
    entry = job.entry
    if job.kind == CONNECT:
        _run_connect(pool, engine, entry)
    elif job.kind == CLOSE:
        _run_close(pool, engine, entry)
    else:
        _run_check(pool, engine, entry, job.kind)


def _run_connect(pool: Pool, engine: Engine, entry: Entry) -> None:
    conn = None
    started = pool._clock()
    try:
        conn = pool._connect()
        driver = pool._driver_of(conn)
        _prepare(pool, driver, conn)
        probe = driver.probe(conn)
    except BaseException as error:  # noqa: BLE001 - whatever ends a hook must end as an answer to who waits
        if conn is not None:
            _close_quietly(pool, conn)
        connect_failed(pool, engine, entry, error)
        return
    if driver is not pool._driver:
        pool._driver = driver
        engine.adapt(driver.condition, driver.verdict, needs_ping=driver.needs_ping, blind=probe is None)
    pool._recorder.created(pool._clock() - started)
    pool._recorder.count("connects")
    if not engine.connected(entry, conn, probe):
        _close_quietly(pool, conn)
        return
    followed.debug("Created new connection %s.", entry.id, extra={"pool": pool.name, "connection": entry.id})
    pool.events.emit("connect", connection=conn)


def connect_failed(pool: Pool, engine: Engine, entry: Entry, error: BaseException) -> None:
    """Count and report a failed connect, once it is known who hears of it."""
    pool._recorder.count("connect_errors")
    lasting = engine.connect_failed(entry, error)
    pool.events.emit("connect_error", error=error)
    if pool._upkeep.reconnect_is_overdue(lasting, pool.options.reconnect_timeout):
        logger.error(
            "Pool %r: connecting has failed for %.0f s: %s",
            pool.name,
            lasting,
            type(error).__name__,
            extra={"pool": pool.name, "seconds": lasting},
        )
        pool.events.emit("reconnect_failed", error=error)


def _run_check(pool: Pool, engine: Engine, entry: Entry, kind: str) -> None:
    conn, failure, timeout = entry.conn, None, pool.options.ping_timeout
    try:
        if kind == CLEAN:
            pool._recorder.count("rollbacks")
            if pool._driver.tells_dirty:
                logger.warning(
                    "Pool %r: connection %d: %s; rolled back.",
                    pool.name,
                    entry.id,
                    entry.reason,
                    extra={"pool": pool.name, "connection": entry.id},
                )
            pool._driver.rollback(conn, timeout)
            if pool._driver.tells_dirty and (state := pool._driver.condition(conn)):
                failure = f"still unusable after a rollback: {state}"
        else:
            pool._recorder.count("pings")
            pool._driver.ping(conn, timeout)
    except Exception as error:  # noqa: BLE001 - any failure has one consequence
        failure = f"{'rollback' if kind == CLEAN else 'ping'} failed: {type(error).__name__}"
    if failure is not None and kind == CHECK and engine is pool._engine and entry.generation == engine.generation:
        pool.invalidate_all(failure)  # where one died of old age or a restart, so did the others
    engine.checked(entry, failure)


def _run_close(pool: Pool, engine: Engine, entry: Entry) -> None:
    reason = entry.reason or "closed"
    driver = pool._driver_of(entry.conn)
    if entry.shared and not driver.closes_under_use:
        driver.abort(entry.conn)
        pool._note_cut(entry)
    else:
        _close_quietly(pool, entry.conn)
    engine.closed_entry(entry)
    pool._recorder.closed(reason)
    followed.debug(
        "Connection %s was closed: %s.",
        entry.id,
        reason,
        extra={"pool": pool.name, "connection": entry.id, "reason": reason},
    )
    pool.events.emit("close", connection=entry.conn, reason=reason)
    entry.conn = None
    emptied = pool._emptied
    if emptied is not None:
        emptied.wake()


def close_what_was_cut(pool: Pool, keeper: Entry) -> None:
    """Close a connection that was taken from its user, who has let go of it."""
    _close_quietly(pool, keeper.conn)


def _close_quietly(pool: Pool, conn: Any) -> None:
    try:
        pool._driver_of(conn).close(conn, pool.options.close_timeout)
    except Exception as error:  # noqa: BLE001 - it is gone either way
        logger.debug("Pool %r: closing a connection failed: %r", pool.name, error, extra={"pool": pool.name})


def _prepare(pool: Pool, driver: Driver, conn: Any) -> None:
    if pool._prepare is None:
        return
    pool._prepare(conn)
    state = driver.condition(conn)
    if state and (state != CLEAN or driver.tells_dirty):
        raise PoolError(f"Pool {pool.name!r}: the hooks for a new connection left it unusable: {state}.")
