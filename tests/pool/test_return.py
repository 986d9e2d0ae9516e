"""What comes back: scenarios 37 to 42."""

from __future__ import annotations

import asyncio
import time

import pytest

from peewee_frameworks.errors import ConfigurationError, ForeignConnection
from tests.support.concurrency import eventually, run_threads

from .stub import StubError, make_pool, numbers, settled


def test_37_an_open_transaction_is_rolled_back_with_a_warning(server, pool_of, caplog):
    pool = pool_of(max_connections=1)
    conn = pool.acquire()
    conn.in_transaction = True
    pool.release(conn)
    assert pool.acquire() is conn
    assert not conn.in_transaction
    assert "a transaction was left open" in caplog.text
    assert pool.stats().rollbacks == 1
    pool.release(conn)


def test_37_fifty_dirty_returns_take_no_time(server, pool_of):
    server.rollback_delay = 0.001
    pool = pool_of(max_connections=50)
    conns = [pool.acquire() for _ in range(50)]

    def give_back(index):
        conns[index].in_transaction = True
        pool.release(conns[index])

    run_threads(50, give_back)
    eventually(lambda: numbers(pool) == (50, 0, 0) and settled(pool))
    assert server.rollbacks == 50


def test_38_a_connection_amid_a_query_is_closed(server, pool_of):
    pool = pool_of(max_connections=1)
    conn = pool.acquire()
    conn.active = True
    pool.release(conn)
    other = pool.acquire()
    assert other is not conn
    assert conn.closed
    assert pool.stats().closes == {"returned in the middle of a query": 1}
    pool.release(other)


def test_39_a_rollback_that_fails_discards(server, pool_of):
    pool = pool_of(max_connections=1)
    server.rollback_error = StubError("gone")
    conn = pool.acquire()
    conn.in_transaction = True
    pool.release(conn)
    assert pool.acquire() is not conn
    eventually(lambda: conn.closed)


def test_40_a_double_return_does_nothing(server, pool_of):
    pool = pool_of(max_connections=2)
    conn = pool.acquire()
    pool.release(conn)
    pool.release(conn)
    assert numbers(pool) == (1, 0, 0)
    first, second = pool.acquire(), pool.acquire()
    assert first is not second
    run_threads(8, lambda _: pool.release(first))
    assert numbers(pool) == (1, 1, 0)
    pool.release(second)
    pool.discard(second)
    assert numbers(pool) == (2, 0, 0)


def test_41_a_connection_of_another_pool_is_refused_naming_both(server, pool_of):
    mine = pool_of(pool_name="mine")
    other = pool_of(pool_name="other")
    conn = other.acquire()
    with pytest.raises(ForeignConnection) as caught:
        mine.release(conn)
    assert "'mine'" in str(caught.value)
    assert "'other'" in str(caught.value)
    with pytest.raises(ForeignConnection):
        mine.discard(conn)
    other.release(conn)


def test_42_what_comes_back_after_the_close_is_closed(server, pool_of):
    pool = pool_of()
    conn = pool.acquire()
    pool.close(0)
    pool.release(conn)
    eventually(lambda: conn.closed)
    assert server.open == 0


def test_a_return_on_a_loops_thread_never_blocks(server, pool_of):
    server.hang("rollback")
    pool = pool_of()

    async def main():
        conn = await pool.acquire_async()
        conn.in_transaction = True
        start = time.monotonic()
        pool.release(conn)
        assert time.monotonic() - start < 5  # the rollback hangs for ever
        assert pool.stats().checking == 1

    asyncio.run(main())


def test_a_connection_may_come_back_in_another_thread(server, pool_of):
    pool = pool_of()
    conn = pool.acquire()
    run_threads(1, lambda _: pool.release(conn))
    assert numbers(pool) == (1, 0, 0)


def test_a_pool_that_was_collected_left_no_pool_to_name(server):
    pool = make_pool(server)
    conn = pool.acquire()
    pool.close(0)
    pool.release(conn)  # not in use here any more: no error either


def test_40_a_double_return_is_told_to_nobody(pool_of):
    pool = pool_of()
    returns = []
    pool.on("checkin", lambda **details: returns.append(details["connection"]))
    conn = pool.acquire()
    for _ in range(3):
        pool.release(conn)
    pool.release(object())
    assert returns == [conn]


@pytest.mark.parametrize("end", ["release", "discard"])
def test_a_listener_that_raises_what_is_no_exception_does_not_keep_a_connection_from_coming_back(pool_of, end):
    """A greenlet's timeout, say: it goes on to the caller, who has no reason to return the connection once more."""
    pool = pool_of()

    def listener(connection):
        raise KeyboardInterrupt

    pool.on("checkin", listener)
    conn = pool.acquire()
    with pytest.raises(KeyboardInterrupt):
        getattr(pool, end)(conn)
    assert pool.stats().used == 0 or pool.stats().closing == 1
    eventually(lambda: settled(pool))
    assert numbers(pool) == (1 if end == "release" else 0, 0, 0)


def test_a_listener_must_be_callable(pool_of):
    with pytest.raises(ConfigurationError, match="checkin"):
        pool_of().on("checkin", None)
