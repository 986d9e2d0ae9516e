"""Waiting for a connection: a place in the pool's line, for a thread, a greenlet or a task, until its deadline."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from peewee_frameworks.errors import (
    PoolClosed,
    PoolConnectTimeout,
    PoolError,
    PoolExhausted,
    PoolTimeout,
    TooManyWaiters,
    WouldBlock,
)
from peewee_frameworks.frame import running_loop
from peewee_frameworks.waiting import lending

from .entries import Entry, snapshot
from .options import seconds_to_wait
from .upkeep import reap
from .waiters import TaskWaiter, ThreadWaiter, Waiter

if TYPE_CHECKING:
    import asyncio

    from .core import Engine
    from .pool import Pool

LOOP_PATIENCE = 0.05
"""Seconds for which a query written inline in a coroutine may block its event loop while a connection is being opened. Such a
query blocks the loop for its round trips anyway; this is half of what asyncio's debug mode calls a slow callback."""

REAP_INTERVAL = 0.05  # seconds between two looks for connections without owner, by callers who queue behind others


def wait(pool: Pool, timeout: float | None) -> Any:
    """Return a connection for which a thread or greenlet has to wait; see `Pool.acquire`."""
    if running_loop() is None:
        return _stand_in_line(pool, timeout)
    engine = pool.engine
    # Only the first in line, with room for one more and a server that answers, waits for nothing but a connect.
    if len(engine.entries) < engine.max and not engine.waiters and not engine.failures:
        with contextlib.suppress(PoolTimeout, PoolConnectTimeout):
            return _stand_in_line(pool, LOOP_PATIENCE)
    raise WouldBlock(
        f"Pool {pool.name!r}: no connection is free at once, and waiting would block the event loop that runs on this "
        "thread. Use `await orm.run(...)`, connect eagerly (connect='eager'), or `await pool.acquire_async()`. "
        f"({pool._numbers()})"
    ) from engine.last_error


def _stand_in_line(pool: Pool, timeout: float | None) -> Any:
    start = pool._clock()
    while True:
        engine = pool.engine
        try:
            conn = _wait_in_line(pool, engine, ThreadWaiter(start, nowait=timeout is None), timeout)
        except PoolClosed:
            if engine is pool._engine:
                raise
            continue  # disposed of meanwhile: start over with the new set
        pool._recorder.waited(pool._clock() - start)
        return conn


def _wait_in_line(pool: Pool, engine: Engine, waiter: ThreadWaiter, timeout: float | None) -> Any:
    try:  # from here on: what is struck while it queues must not leave its place behind
        deadline = _enqueue(pool, engine, waiter, timeout)
        while True:
            left = None if deadline is None else deadline - pool._clock()
            with lending():
                waiter.wait(left)
            conn = _collect(pool, engine, waiter, deadline)
            if conn is not None:
                return conn
    except BaseException:
        engine.withdraw(waiter)
        raise


async def wait_async(pool: Pool, timeout: float | None) -> Any:
    """Return a connection for which a task has to wait; see `Pool.acquire_async`."""
    loop: Any = running_loop()  # there is one: this is a coroutine
    start = pool._clock()
    while True:
        engine = pool.engine
        try:
            conn = await _await_in_line(pool, engine, TaskWaiter(start, loop, nowait=timeout is None), timeout)
        except PoolClosed:
            if engine is pool._engine:
                raise
            continue  # disposed of meanwhile: start over with the new set
        pool._recorder.waited(pool._clock() - start)
        return conn


async def _await_in_line(pool: Pool, engine: Engine, waiter: TaskWaiter, timeout: float | None) -> Any:
    timer: asyncio.TimerHandle | None = None
    try:
        deadline = _enqueue(pool, engine, waiter, timeout)
        while True:
            if deadline is not None:
                # Set anew each time: a loop may call too early, uvloop by up to half a millisecond.
                timer = waiter.loop.call_later(max(0.0, deadline - pool._clock()), waiter.look)
            await waiter.future  # a cancellation is raised here even if the future has its result already
            if timer is not None:
                timer.cancel()
            waiter.again()  # before looking, or a wake-up that comes meanwhile would be lost on the old future
            conn = _collect(pool, engine, waiter, deadline)
            if conn is not None:
                return conn
    except GeneratorExit:  # perhaps the garbage collector, perhaps amid this very pool's lock
        engine.post("withdraw", waiter)
        raise
    except BaseException:
        engine.withdraw(waiter)
        raise
    finally:
        if timer is not None:
            timer.cancel()


def _enqueue(pool: Pool, engine: Engine, waiter: Waiter, timeout: float | None) -> float | None:
    """Queue a waiter and return its deadline."""
    if pool._suspended_error and engine.shut and not engine.closed:
        raise _error(pool, PoolExhausted, "the pool is suspended; pool.resume() ends that")
    # Whoever died holding one should not make others wait; in a long queue, a look now and then is enough.
    if len(engine.entries) >= engine.max and (not engine.waiters or waiter.since - pool._looked >= REAP_INTERVAL):
        pool._looked = waiter.since
        reap(pool, engine, waiter.since)
    wait, seconds = seconds_to_wait(timeout)
    refusal = engine.enqueue(waiter)
    if refusal == "closed":
        raise PoolClosed(
            f"Pool {pool.name!r} is closed, by pool.close() or with the application that it served. Open it again with "
            "pool.open()."
        )
    if refusal == "full":
        pool._recorder.count("refused")
        raise _error(pool, TooManyWaiters, f"max_waiting ({pool.options.max_waiting}) callers are queued already")
    if refusal is not None:
        pool._recorder.count("refused")
        raise _error(
            pool,
            PoolExhausted,
            "all connections are in use, and without a timeout nobody waits",
            " Give timeout=5 to wait for one, or a larger max_connections.",
        )
    if not wait:
        seconds = pool.options.connect_timeout
    return None if seconds is None else waiter.since + seconds


def _collect(pool: Pool, engine: Engine, waiter: Waiter, deadline: float | None) -> Any:
    """See what a wake-up has brought: a connection, an error, or nothing yet."""
    conn = engine.accept(waiter)
    if conn is not None:
        return conn
    if waiter.error is not None:
        raise waiter.error
    if not engine.waiting(waiter):  # what was granted had died: the place at the head is still this one's
        refusal = engine.enqueue(waiter, front=True)
        if refusal is not None:
            raise PoolClosed(f"Pool {pool.name!r} was closed while this caller waited.")
    if deadline is not None and pool._clock() >= deadline and engine.leave(waiter):
        raise _timed_out(pool, engine, waiter)
    return None


def _timed_out(pool: Pool, engine: Engine, waiter: Waiter) -> PoolError:
    waited = pool._clock() - waiter.since
    # With room for one more, it was the server that was late and not the other users.
    late = len(engine.held) + len(engine.granted) < engine.max and (engine.connecting or engine.last_error)
    kind = PoolConnectTimeout if late else PoolTimeout
    what = "no connection could be opened" if late else "no connection came back"
    if engine.shut:
        kind, what = PoolTimeout, "the pool is suspended, and resume() was not called"
    error = _error(pool, kind, f"{what} within {waited:.3f} s")
    error.__cause__ = engine.last_error
    pool.note_timeout(error)
    return error


def _error(pool: Pool, kind: type[PoolError], what: str, remedy: str = "") -> PoolError:
    engine = pool.engine
    message = f"Pool {pool.name!r}: {what} ({pool._numbers()}"
    held = snapshot(engine.held.values())
    if held:
        longest = min(held, key=lambda entry: entry.since)
        message += f"; longest in use: connection {longest.id} for {pool._clock() - longest.since:.3f} s"
        label = _label_of(pool, longest)
        if label is not None:
            message += f" by {label}"
        message += _thread_name(longest.thread)
    return kind(f"{message}).{remedy}")


def _label_of(pool: Pool, entry: Entry) -> str | None:
    use = entry.id, entry.since
    if pool._labelled[0] != use:  # of an exhausted pool hundreds of callers ask for the same one
        pool._labelled = use, pool.label_of(entry.conn)
    return pool._labelled[1]


def _thread_name(ident: int) -> str:
    for thread in threading.enumerate():
        if thread.ident == ident:
            return f", checked out by thread {thread.name!r}"
    return ""
