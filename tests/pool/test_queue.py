"""The queue: scenarios 7 to 14."""

from __future__ import annotations

import asyncio
import threading
import time

import peewee
import pytest
from playhouse.pool import MaxConnectionsExceeded

from peewee_frameworks.errors import ConfigurationError, PoolConnectTimeout, PoolExhausted, PoolTimeout, TooManyWaiters
from tests.support.concurrency import eventually, run_threads

from .stub import StubError, numbers, settled


def test_07_six_jobs_on_two_connections_end_in_three_pairs(pool_of):
    pool = pool_of(max_connections=2)
    for conn in [pool.acquire(), pool.acquire()]:
        pool.release(conn)
    start = time.monotonic()

    def job(_):
        conn = pool.acquire()
        with conn.use():
            time.sleep(0.2)
        pool.release(conn)
        return time.monotonic() - start

    ends = sorted(run_threads(6, job))
    assert ends == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.6, 0.6], abs=0.12)


def test_08_a_bounded_queue_refuses_exactly_the_one_too_many(pool_of):
    pool = pool_of(max_connections=1, max_waiting=2)
    conn = pool.acquire()
    got = []
    threads = [threading.Thread(target=lambda: got.append(pool.acquire())) for _ in range(2)]
    for thread in threads:
        thread.start()
    eventually(lambda: pool.stats().waiting == 2)
    with pytest.raises(TooManyWaiters, match="max_waiting"):
        pool.acquire()
    pool.release(conn)
    threads_done = eventually(lambda: got)
    pool.release(threads_done[0])
    for thread in threads:
        thread.join(5)
    assert len(got) == 2


def test_08_a_waiter_that_timed_out_does_not_count(pool_of):
    pool = pool_of(max_connections=1, max_waiting=1)
    conn = pool.acquire()
    for _ in range(3):
        with pytest.raises(PoolTimeout):
            pool.acquire(timeout=0.01)
    pool.release(conn)


@pytest.mark.parametrize("seconds", [0.05, 0.3])
def test_09_a_call_may_have_a_timeout_of_its_own(pool_of, seconds):
    pool = pool_of(max_connections=1)
    conn = pool.acquire()
    start = time.monotonic()
    with pytest.raises(PoolTimeout) as caught:
        pool.acquire(timeout=seconds)
    assert seconds <= time.monotonic() - start < 4.5  # the pool's own is longer
    assert isinstance(caught.value, peewee.OperationalError)
    assert isinstance(caught.value, MaxConnectionsExceeded)
    for part in ("'stub'", "max 1", "in use 1", "waiting", "longest in use"):
        assert part in str(caught.value)
    pool.release(conn)


@pytest.mark.parametrize("seconds", [-1, float("-inf")])
def test_09_what_is_left_of_a_budget_may_be_negative(pool_of, seconds):
    pool = pool_of(max_connections=1)
    conn = pool.acquire()
    with pytest.raises(PoolTimeout):
        pool.acquire(timeout=seconds)
    pool.release(conn)


@pytest.mark.parametrize("seconds", [float("nan"), "5", []])
def test_09_what_is_no_number_of_seconds_is_refused(pool_of, seconds):
    """Not a number would never be over: the wait had no end, and did not sleep either."""
    pool = pool_of(max_connections=1)
    conn = pool.acquire()
    with pytest.raises(ConfigurationError, match="timeout"):
        pool.acquire(timeout=seconds)
    with pytest.raises(ConfigurationError, match="timeout"):
        asyncio.run(pool.acquire_async(timeout=seconds))
    pool.release(conn)
    assert numbers(pool) == (1, 0, 0)


def test_09_no_timeout_does_not_wait(pool_of):
    pool = pool_of(max_connections=1, timeout=None)
    conn = pool.acquire()
    start = time.monotonic()
    with pytest.raises(PoolExhausted) as caught:
        pool.acquire()
    assert time.monotonic() - start < 5  # it would wait for ever
    assert not isinstance(caught.value, PoolTimeout)
    pool.release(conn)
    pool.release(pool.acquire())


def test_09_timeout_zero_waits_for_ever(pool_of):
    pool = pool_of(max_connections=1, timeout=0)
    conn = pool.acquire()
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.acquire()))
    thread.start()
    eventually(lambda: pool.stats().waiting == 1)
    thread.join(0.2)
    assert thread.is_alive()
    pool.release(conn)
    thread.join(5)
    assert got == [conn]


def test_09_many_callers_that_do_not_wait_each_get_a_connect_of_their_own_or_an_error(server, pool_of):
    server.delay = 0.05
    pool = pool_of(max_connections=8, timeout=None)
    results = run_threads(12, lambda _: pool.acquire(), return_exceptions=True)
    refused = [result for result in results if isinstance(result, PoolExhausted)]
    assert len(refused) == 4
    assert server.connects == 8


def test_10_and_11_a_dead_waiter_swallows_nothing_and_nobody_times_out_early(pool_of):
    """Waiters that time out race with a release, many times over."""
    pool = pool_of(max_connections=1)
    for round_ in range(60):
        conn = pool.acquire()

        def impatient(_):
            start = time.monotonic()
            try:
                return pool.acquire(timeout=0.01)
            except PoolTimeout:
                assert time.monotonic() - start >= 0.01
                return None

        timer = threading.Timer(0.008 + (round_ % 5) * 0.001, pool.release, [conn])
        timer.start()
        winners = [result for result in run_threads(3, impatient) if result is not None]
        timer.join()
        assert len(winners) <= 1
        for winner in winners:
            pool.release(winner)
        assert numbers(pool) == (1, 0, 0)


def test_12_a_failed_connect_wakes_the_head_of_the_queue(server, pool_of):
    gate = server.hang()
    server.connect_error = StubError("refused")
    pool = pool_of(max_connections=2)
    errors = []

    def work():
        try:
            pool.acquire()
        except StubError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: pool.stats().waiting == 4)
    gate.set()
    for thread in threads:
        thread.join(2)
    assert len(errors) == 4  # none slept its full timeout


def test_12_a_destroyed_connection_makes_room_for_the_next(server, pool_of):
    pool = pool_of(max_connections=1)
    conn = pool.acquire()
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.acquire()))
    thread.start()
    eventually(lambda: pool.stats().waiting == 1)
    pool.discard(conn, "broken")
    thread.join(2)
    assert got
    assert got[0] is not conn
    assert pool.stats().closes == {"broken": 1}


def test_12_an_invalidation_makes_room_for_the_next(server, pool_of):
    pool = pool_of(max_connections=1)
    conn = pool.acquire()
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.acquire()))
    thread.start()
    eventually(lambda: pool.stats().waiting == 1)
    pool.invalidate_all("test")
    pool.release(conn)
    thread.join(2)
    assert got
    assert got[0] is not conn


def test_13_threads_and_tasks_share_fairly(pool_of):
    pool = pool_of(max_connections=2)
    counts = dict.fromkeys(range(8), 0)
    end = time.monotonic() + 1.0

    def work(index):
        while time.monotonic() < end:
            conn = pool.acquire()
            with conn.use():
                time.sleep(0.002)
            counts[index] += 1
            pool.release(conn)

    async def task(index):
        while time.monotonic() < end:
            conn = await pool.acquire_async()
            with conn.use():
                await asyncio.sleep(0.002)
            counts[index] += 1
            pool.release(conn)

    async def tasks():
        await asyncio.gather(*(task(index) for index in range(4, 8)))

    run_threads(5, lambda index: asyncio.run(tasks()) if index == 4 else work(index))
    assert max(counts.values()) <= 2 * min(counts.values()), counts


def test_13_a_newcomer_never_overtakes_a_waiter(pool_of):
    pool = pool_of(max_connections=1)
    first = pool.acquire()
    order = []

    def work(name):
        conn = pool.acquire()
        order.append(name)
        pool.release(conn)

    threads = []
    for name in range(6):
        thread = threading.Thread(target=work, args=(name,))
        thread.start()
        threads.append(thread)
        eventually(lambda name=name: pool.stats().waiting == name + 1)
    assert pool.try_acquire() is None
    pool.release(first)
    for thread in threads:
        thread.join(5)
    assert order == list(range(6))


def test_14_a_saturated_pool_recovers(pool_of):
    pool = pool_of(max_connections=2, timeout=0.05)

    def work(_):
        try:
            conn = pool.acquire()
        except (PoolTimeout, PoolConnectTimeout):  # the latter on a busy machine: before there was any
            return 1
        time.sleep(0.04)
        pool.release(conn)
        return 0

    assert sum(run_threads(20, work)) > 0
    before = pool.stats().timeouts
    for _ in range(20):
        pool.release(pool.acquire(timeout=10))
    assert pool.stats().timeouts == before
    eventually(lambda: settled(pool))
    assert pool.stats().used == 0
