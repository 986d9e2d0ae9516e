"""Ends: scenarios 51 to 56 and 58; forks are in test_fork.py."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

import pytest

from peewee_frameworks.errors import PoolClosed
from peewee_frameworks.pool import Pool, PooledSqliteDatabase, PoolOptions
from tests.support.concurrency import eventually, run_threads

from .stub import Clock, numbers, settled


class Plain:
    """A connection that nobody but its user and its pool refers to."""

    in_transaction = False

    def close(self):
        pass


def test_51_a_close_wakes_all_waiters_at_once(server, pool_of):
    pool = pool_of(max_connections=1, timeout=30)
    conn = pool.acquire()
    ended = []

    def work():
        with pytest.raises(PoolClosed):
            pool.acquire()
        ended.append(time.monotonic())

    threads = [threading.Thread(target=work) for _ in range(20)]
    for thread in threads:
        thread.start()
    eventually(lambda: pool.stats().waiting == 20)
    start = time.monotonic()
    pool.close(timeout=0.3)
    for thread in threads:
        thread.join(5)
    assert len(ended) == 20
    assert max(ended) - start < 0.2
    assert conn.dead  # it did not come back in time: cut
    with pytest.raises(PoolClosed, match="closed"):
        pool.acquire()


def test_51_a_close_waits_for_what_comes_back_in_time(server, pool_of):
    pool = pool_of()
    conn = pool.acquire()
    threading.Timer(0.1, pool.release, [conn]).start()
    start = time.monotonic()
    pool.close(timeout=5)
    assert 0.05 < time.monotonic() - start < 2
    assert conn.closed
    assert not conn.dead


def test_51_tasks_are_woken_too_and_aclose_does_not_block(server, pool_of):
    pool = pool_of(max_connections=1)

    async def main():
        conn = await pool.acquire_async()
        task = asyncio.create_task(pool.acquire_async())
        await asyncio.sleep(0)
        closing = asyncio.create_task(pool.aclose(timeout=5))
        with pytest.raises(PoolClosed):
            await task
        pool.release(conn)
        await closing
        with pytest.raises(PoolClosed):
            await pool.acquire_async()

    asyncio.run(main())
    assert server.open == 0


def test_52_a_close_during_the_start(server, pool_of):
    gate = server.hang()
    pool = pool_of(min_connections=3)
    pool.open()
    eventually(lambda: server.connects == 3)
    pool.close(timeout=0.1)
    gate.set()
    eventually(lambda: server.open == 0 and server.closes == 3)
    assert pool.stats().total == 0


def test_53_a_storm_of_threads_closing(server, pool_of):
    pool = pool_of()
    for _ in range(3):
        pool.release(pool.acquire())
    run_threads(16, lambda _: pool.close(timeout=1))
    assert server.open == 0
    pool.open()
    pool.release(pool.acquire())  # open again


def test_54_an_unclosed_pool_that_is_collected_stops_its_upkeep():
    pool = Pool(Plain, PoolOptions(min_connections=1, pool_name="forgotten"))
    pool.open(wait=5)
    ref = weakref.ref(pool)
    del pool
    eventually(lambda: (gc.collect(), ref())[1] is None)
    eventually(lambda: not any(thread.name == "peewee-pool-maintainer" for thread in threading.enumerate()))


def test_55_the_connection_of_a_dead_thread_is_taken_back_before_anyone_starves(caplog):
    pool = Pool(Plain, PoolOptions(max_connections=1, timeout=2, pool_name="orphans"))
    keep = threading.local()

    def die():
        keep.conn = pool.acquire()

    thread = threading.Thread(target=die)
    thread.start()
    thread.join()
    start = time.monotonic()
    pool.release(pool.acquire())
    assert time.monotonic() - start < 1.8  # else it has waited for the timeout
    assert pool.stats().reaped == 1
    assert "is gone without returning it" in caplog.text
    pool.close(0)


def test_55_the_connection_of_a_dead_task_is_taken_back():
    pool = Pool(Plain, PoolOptions(max_connections=1, timeout=2))

    async def forget():
        await pool.acquire_async()

    async def main():
        await asyncio.create_task(forget())
        pool.release(await pool.acquire_async())

    asyncio.run(main())
    assert pool.stats().reaped == 1
    pool.close(0)


def test_55_a_live_owner_is_never_robbed():
    clock = Clock()
    pool = Pool(Plain, PoolOptions(max_connections=1), clock=clock)
    conn = pool.acquire()
    clock.advance(1e6)
    pool.maintain()
    assert numbers(pool) == (0, 1, 0)
    pool.release(conn)
    assert numbers(pool) == (1, 0, 0)
    pool.close(0)


def test_56_a_leak_is_logged_with_its_stack_and_then_cleared(server, pool_of, caplog):
    clock = Clock()
    pool = pool_of(leak_threshold=5, leak_stacks=True, clock=clock)
    leaks = []
    pool.on("leak", lambda connection, seconds: leaks.append((connection, seconds)))

    def borrower_of_long_standing():
        return pool.acquire()

    conn = borrower_of_long_standing()
    clock.advance(6)
    pool.maintain()
    pool.maintain()
    assert caplog.text.count("longer than leak_threshold") == 1
    assert "borrower_of_long_standing" in caplog.text
    assert leaks[0][0] is conn
    pool.release(conn)
    assert "came back after" in caplog.text
    assert pool.stats().leaks == 1


def test_58_memory_is_one_connection_shared_by_all_threads():
    db = PooledSqliteDatabase(":memory:", timeout=5)
    assert db._max_connections == 1
    db.connect()
    db.execute_sql("create table t (x)")
    db.close()

    def work(index):
        db.connect()
        db.execute_sql("insert into t values (?)", (index,))
        db.close()

    run_threads(8, work)
    db.connect()
    assert db.execute_sql("select count(*) from t").fetchone() == (8,)
    db.close()
    db.pool.close(1)


def test_the_statistics_are_one_moment_and_have_the_conventional_names(server, pool_of):
    pool = pool_of(max_connections=3)
    conns = [pool.acquire(), pool.acquire()]
    pool.release(conns.pop())
    stats = pool.stats()
    assert (stats.idle, stats.used, stats.total, stats.max_connections) == (1, 1, 2, 3)
    assert (stats.checkouts, stats.connects, stats.use_time.count) == (2, 2, 1)
    assert stats.wait_time.count == 2
    assert sum(stats.use_time.buckets) == 1
    assert stats.as_otel()["db.client.connection.count"] == {"idle": 1, "used": 1}
    with pytest.raises(AttributeError):
        stats.idle = 5
    pool.release(conns.pop())
    assert settled(pool)


def test_the_workers_and_the_maintainer_are_shared_and_end(server, pool_of):
    pools = [pool_of(pool_name=f"pool-{number}") for number in range(5)]
    for pool in pools:
        pool.release(pool.acquire())
    assert sum(thread.name == "peewee-pool-maintainer" for thread in threading.enumerate()) <= 1
