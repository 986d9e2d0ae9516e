"""Cancellation, and the traps around it: scenarios 20 to 25."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import weakref

import pytest

from peewee_frameworks.errors import PoolTimeout, WouldBlock
from peewee_frameworks.pool import line
from peewee_frameworks.pool.waiters import TaskWaiter
from tests.support.concurrency import eventually

from .stub import numbers, settled


def test_20_cancelling_all_queued_tasks_leaves_a_full_pool(pool_of):
    pool = pool_of(max_connections=2)

    async def main():
        conns = [await pool.acquire_async(), await pool.acquire_async()]
        tasks = [asyncio.create_task(pool.acquire_async()) for _ in range(200)]
        await asyncio.sleep(0)
        assert pool.stats().waiting == 200
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        for conn in conns:
            pool.release(conn)

    asyncio.run(main())
    assert numbers(pool) == (2, 0, 0)


def test_21_a_cancel_in_the_tick_of_the_hand_off_loses_nothing(pool_of):
    """`Task.cancel()` on a finished future still raises at the await: thousands of times a run."""
    pool = pool_of(max_connections=1)

    async def main():
        for round_ in range(1000):
            conn = await pool.acquire_async()
            task = asyncio.create_task(pool.acquire_async())
            await asyncio.sleep(0)
            if round_ % 2:
                pool.release(conn)
                task.cancel()
            else:
                task.cancel()
                pool.release(conn)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (len(pool.engine.idle), len(pool.engine.held), len(pool.engine.waiters)) == (1, 0, 0)

    asyncio.run(main())
    assert numbers(pool) == (1, 0, 0)


def test_21_the_grant_of_a_cancelled_task_goes_to_the_next(pool_of):
    pool = pool_of(max_connections=1)

    async def main():
        conn = await pool.acquire_async()
        first = asyncio.create_task(pool.acquire_async())
        second = asyncio.create_task(pool.acquire_async())
        await asyncio.sleep(0)
        pool.release(conn)
        first.cancel()
        assert await second is conn
        with pytest.raises(asyncio.CancelledError):
            await first
        pool.release(conn)

    asyncio.run(main())


def test_22_a_cancel_during_the_ping_keeps_the_connection(server, pool_of):
    pool = pool_of(max_connections=1, ping_after=0)
    pool.release(pool.acquire())
    gate = server.hang("ping")

    async def main():
        task = asyncio.create_task(pool.acquire_async())
        await asyncio.sleep(0.01)
        assert pool.stats().checking == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    gate.set()
    eventually(lambda: numbers(pool) == (1, 0, 0))
    assert server.connects == 1


def test_22_a_cancel_during_the_rollback_keeps_the_connection(server, pool_of):
    pool = pool_of(max_connections=1)
    gate = server.hang("rollback")

    async def main():
        conn = await pool.acquire_async()
        conn.in_transaction = True
        pool.release(conn)  # returns at once, the rollback hangs elsewhere
        task = asyncio.create_task(pool.acquire_async())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    gate.set()
    eventually(lambda: numbers(pool) == (1, 0, 0))


def test_24_a_loop_that_closes_with_queued_and_granted_waiters_strands_nothing(pool_of):
    pool = pool_of(max_connections=2)
    conns = [pool.acquire(), pool.acquire()]
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(pool.acquire_async(timeout=0)) for _ in range(4)]

    async def turn():
        await asyncio.sleep(0)

    loop.run_until_complete(turn())
    assert pool.stats().waiting == 4
    pool.release(conns[0])  # granted, but the loop never runs again
    loop.close()
    pool.release(conns[1])
    got = [pool.acquire(timeout=5), pool.acquire(timeout=5)]
    assert len(set(map(id, got))) == 2
    for conn in got:
        pool.release(conn)
    for task in tasks:
        task._log_destroy_pending = False
    del tasks, task
    gc.collect()
    eventually(lambda: numbers(pool) == (2, 0, 0))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_25_a_coroutine_collected_while_its_thread_holds_the_lock_does_not_deadlock(pool_of):
    pool = pool_of(max_connections=1)
    conn = pool.acquire()
    loop = asyncio.new_event_loop()
    asyncio.events._set_running_loop(loop)
    try:
        coroutine = pool.acquire_async()
        coroutine.send(None)  # queued
    finally:
        asyncio.events._set_running_loop(None)
    assert pool.stats().waiting == 1
    with pool.engine._lock:
        coroutine.close()  # as a collection inside the lock would
    pool.release(conn)
    eventually(lambda: numbers(pool) == (1, 0, 0))
    loop.close()


def test_trap_a_checkin_amid_the_lock_does_not_deadlock(pool_of):
    """A finaliser or signal handler gives back while its own thread holds the lock."""
    pool = pool_of(max_connections=1)
    conn = pool.acquire()
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.acquire()))
    thread.start()
    eventually(lambda: pool.stats().waiting == 1)
    pool.engine.locked(lambda _turn: pool.release(conn))
    thread.join(2)
    assert got == [conn]


def test_trap_an_interrupt_between_grant_and_return_loses_nothing(pool_of, server):
    """The waiter dies with a grant in its hands, as by KeyboardInterrupt; the next one gets it."""
    pool = pool_of(max_connections=1)
    conn = pool.acquire()
    engine = pool.engine

    class Interrupted(BaseException):
        pass

    caught = []

    def work():
        original = line._collect

        def collect(*args):
            line._collect = original
            raise Interrupted

        line._collect = collect
        try:
            pool.acquire()
        except Interrupted:
            caught.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    eventually(lambda: pool.stats().waiting == 1)
    pool.release(conn)
    thread.join(2)
    assert caught
    assert not engine.granted
    assert numbers(pool) == (1, 0, 0)


def test_trap_an_entry_lost_between_two_instructions_is_found(pool_of, server, caplog):
    """An interrupt between the pop and the append of a checkin leaves the entry in nobody's hands."""
    pool = pool_of(max_connections=1)
    conn = pool.acquire()
    pool.engine.held.pop(id(conn))
    pool.maintain()
    eventually(lambda: settled(pool) and pool.stats().total == 0)
    assert pool.stats().closes == {"lost in an interrupt": 1}
    pool.release(pool.acquire())


def test_trap_wait_for_does_not_swallow_a_cancel(pool_of):
    """No `asyncio.wait_for` anywhere: the deadline is a `call_later`."""
    pool = pool_of(max_connections=1)

    async def main():
        conn = await pool.acquire_async()
        with pytest.raises(PoolTimeout):
            await pool.acquire_async(timeout=0.02)
        task = asyncio.create_task(pool.acquire_async(timeout=0.02))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.02, task.cancel)
        with pytest.raises((asyncio.CancelledError, PoolTimeout)):
            await task
        pool.release(conn)

    asyncio.run(main())
    assert numbers(pool) == (1, 0, 0)


def test_a_checkout_that_would_wait_for_another_user_on_the_loops_thread_is_refused(pool_of):
    pool = pool_of(max_connections=1)

    async def main():
        conn = await pool.acquire_async()
        with pytest.raises(WouldBlock, match="acquire_async"):
            pool.acquire()
        with pytest.raises(WouldBlock):
            pool.acquire(timeout=None)
        pool.release(conn)
        pool.release(pool.acquire())  # one is there: nothing to wait for

    asyncio.run(main())


def test_a_quick_connect_on_the_loops_thread_is_waited_for_and_a_slow_one_is_not(pool_of, server):
    pool = pool_of(max_connections=2)

    async def main():
        first = pool.acquire()  # with a stub driver a connect takes no time
        gate = server.hang()
        began = time.monotonic()
        with pytest.raises(WouldBlock):
            pool.acquire()
        assert line.LOOP_PATIENCE <= time.monotonic() - began < 1
        gate.set()
        second = await pool.acquire_async()  # the connect went on in the background
        pool.release(first)
        pool.release(second)

    asyncio.run(main())
    assert numbers(pool) == (2, 0, 0)


def test_waiters_leave_nothing_behind(pool_of):
    pool = pool_of(max_connections=1)

    async def main():
        conn = await pool.acquire_async()
        task = asyncio.create_task(pool.acquire_async())
        await asyncio.sleep(0)
        (waiter,) = pool.engine.waiters
        assert isinstance(waiter, TaskWaiter)
        ref = weakref.ref(waiter)
        del waiter
        pool.release(conn)
        pool.release(await task)
        return ref

    ref = asyncio.run(main())
    gc.collect()
    assert ref() is None, sys.getrefcount(ref())
