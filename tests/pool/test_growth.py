"""Growth: scenarios 15 to 19."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from peewee_frameworks.errors import PoolConnectTimeout, PoolTimeout
from tests.support.concurrency import eventually, run_threads

from .stub import StubError, numbers, settled


def test_15_a_spike_is_served_by_the_warm_ones(server, pool_of):
    pool = pool_of(max_connections=50, min_connections=5)
    pool.open(wait=5)
    pool.engine.connect_estimate = 0.15
    gate = server.hang()  # whoever is served is served by a connection that was there
    before = server.connects

    def work(_):
        conn = pool.acquire()
        time.sleep(0.002)
        pool.release(conn)

    run_threads(50, work)
    gate.set()
    assert server.connects - before <= 2


def test_15_a_pool_whose_connections_do_not_come_back_grows_for_all_who_wait(server, pool_of):
    pool = pool_of(max_connections=50, min_connections=5)
    pool.open(wait=5)
    server.delay = pool.engine.connect_estimate = 0.15
    barrier = threading.Barrier(40)

    def work(_):
        conn = pool.acquire()
        barrier.wait(10)
        pool.release(conn)

    start = time.monotonic()
    run_threads(40, work)
    assert time.monotonic() - start < 1.0


def test_16_no_connect_starts_after_the_demand_has_gone(server, pool_of):
    pool = pool_of(max_connections=10, max_connecting=1)
    gate = server.hang()

    def give_up():
        with pytest.raises(PoolConnectTimeout):
            pool.acquire(0.1)

    with_demand = [threading.Thread(target=give_up) for _ in range(5)]
    for thread in with_demand:
        thread.start()
    for thread in with_demand:
        thread.join(5)
    gate.set()
    eventually(lambda: settled(pool))
    assert server.connects == 1
    assert numbers(pool) == (1, 0, 0)


def test_17_a_connect_that_hangs_blocks_nobody(server, pool_of):
    pool = pool_of(max_connections=3)
    conns = [pool.acquire(), pool.acquire()]
    server.hang()
    asker = []
    thread = threading.Thread(target=lambda: asker.append(pool.acquire()))
    thread.start()
    assert server.arrived.acquire(timeout=5)
    eventually(lambda: pool.stats().connecting == 1)
    start = time.monotonic()
    pool.release(conns.pop())
    assert time.monotonic() - start < 5  # the connect hangs for ever
    thread.join(2)
    assert asker  # it took what came first
    pool.release(asker[0])
    for _ in range(100):
        pool.release(pool.acquire())


def test_17_a_connect_that_hangs_does_not_keep_others_from_connecting(server, pool_of):
    pool = pool_of(max_connections=3)
    gate = server.hang()
    results = []
    first = threading.Thread(target=lambda: results.append(pool.acquire()))
    first.start()
    assert server.arrived.acquire(timeout=5)
    server.connect_gate = None
    second = threading.Thread(target=lambda: results.append(pool.acquire()))
    second.start()
    eventually(lambda: results)
    pool.release(results[0])
    first.join(3)
    second.join(3)
    assert len(results) == 2
    gate.set()


def test_18_a_failed_connect_gives_its_slot_back(server, pool_of):
    pool = pool_of(max_connections=2)
    server.connect_error = StubError("refused")
    for _ in range(5):
        with pytest.raises(StubError):
            pool.acquire()
    assert pool.stats().total == 0
    server.connect_error = None
    pool.release(pool.acquire())
    assert pool.stats().connect_errors == 5


def test_18_an_error_of_a_connect_hurts_nobody_who_can_wait_for_a_connection_in_use(server, pool_of):
    """A server at its own limit refuses the pool's attempt to grow; who waits is served by the next return."""
    pool = pool_of(max_connections=3)
    conn = pool.acquire()
    server.connect_error = StubError("too many connections")
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.acquire()))
    thread.start()
    eventually(lambda: pool.stats().connect_errors >= 1)
    assert thread.is_alive()
    pool.release(conn)
    thread.join(2)
    assert got == [conn]


def test_19_a_connect_whose_caller_was_cancelled_is_pooled(server, pool_of):
    pool = pool_of(max_connections=2)
    gate = server.hang()

    async def main():
        task = asyncio.create_task(pool.acquire_async())
        await asyncio.sleep(0)
        assert await asyncio.to_thread(server.arrived.acquire, timeout=5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    gate.set()
    eventually(lambda: numbers(pool) == (1, 0, 0))
    assert server.connects == 1


def test_07_bound_a_connect_that_never_ends_is_given_up(server, pool_of):
    """Rule 7: every kind of I/O has a bound of its own."""
    pool = pool_of(max_connections=1, connect_timeout=0.2, timeout=0)
    gate = server.hang()
    start = time.monotonic()
    with pytest.raises(PoolConnectTimeout, match="connect_timeout"):
        pool.acquire()
    assert time.monotonic() - start < 1.5
    server.connect_gate = None
    conn = pool.acquire()  # the slot is free again
    gate.set()
    eventually(lambda: server.open == 1)  # what came too late was closed
    pool.release(conn)


def test_the_error_of_a_wait_says_whether_connecting_or_users_were_late(server, pool_of):
    pool = pool_of(max_connections=1)
    server.hang()
    with pytest.raises(PoolConnectTimeout) as caught:
        pool.acquire(timeout=0.05)
    assert not isinstance(caught.value, PoolTimeout)
