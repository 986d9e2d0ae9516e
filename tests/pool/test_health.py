"""Health and reconnecting: scenarios 26 to 36, on the stub; the real servers are in test_servers.py."""

from __future__ import annotations

import threading
import time

import pytest

from peewee_frameworks.errors import PoolTimeout
from peewee_frameworks.pool.planning import BACKOFF_MAX, BACKOFF_MIN, backoff
from tests.support.concurrency import eventually, run_threads

from .stub import Clock, StubError, numbers, settled


def fill(pool, count):
    conns = [pool.acquire() for _ in range(count)]
    for conn in conns:
        pool.release(conn)
    return conns


def test_26_dead_idle_connections_are_never_handed_out(server, pool_of):
    pool = pool_of(max_connections=4)
    dead = fill(pool, 4)
    server.kill_all()
    conn = pool.acquire()
    assert conn not in dead
    assert server.pings == 0  # the sockets said it
    pool.release(conn)


def test_26_a_hundred_dead_ones_cost_a_hundred_requests_one_connect_time(server, pool_of):
    pool = pool_of(max_connections=100)
    fill(pool, 100)
    server.kill_all()
    server.delay = 0.1
    server.peak_connecting = 0

    def work(_):
        start = time.monotonic()
        pool.release(pool.acquire())
        return time.monotonic() - start

    assert max(run_threads(100, work)) < 5  # one after the other would take 10 s
    assert server.peak_connecting <= 32


def test_27_a_ping_that_is_never_answered_ends_the_wait_in_time(server, pool_of):
    pool = pool_of(max_connections=1, ping_after=0)
    fill(pool, 1)
    server.hang("ping")
    start = time.monotonic()
    with pytest.raises(PoolTimeout):
        pool.acquire(timeout=0.5)
    assert 0.5 <= time.monotonic() - start < 5


def test_27_a_ping_that_is_never_answered_is_given_up_and_its_slot_used_again(server, pool_of):
    pool = pool_of(max_connections=1, ping_after=0, ping_timeout=0.2)
    (old,) = fill(pool, 1)
    server.hang("ping")
    conn = pool.acquire()
    assert conn is not old
    assert old.dead  # cut
    pool.release(conn)


def test_28_a_check_that_always_fails_does_not_loop(server, pool_of):
    pool = pool_of(max_connections=4, ping_after=0)
    server.ping_error = StubError("check")
    fill(pool, 1)
    before = server.connects
    for _ in range(5):
        pool.release(pool.acquire())
    assert server.pings <= 6
    assert server.connects - before <= 6


def test_29_one_failed_ping_invalidates_the_rest(server, pool_of):
    clock = Clock()
    pool = pool_of(max_connections=10, ping_after=30, clock=clock)
    fill(pool, 10)
    server.ping_error = StubError("restarted")
    server.connects = 0
    clock.advance(60)
    conn = pool.acquire()
    assert (server.pings, server.connects) == (1, 1)
    eventually(lambda: server.open == 1)
    pool.release(conn)
    assert pool.stats().generation == 1


def test_29_an_error_that_tells_of_a_lost_server_invalidates_the_rest(server, pool_of):
    pool = pool_of(max_connections=3)
    conns = [pool.acquire() for _ in range(3)]
    pool.release(conns[2])
    pool.note_error(conns[0], ValueError("a query's own fault"))
    assert pool.stats().generation == 0
    pool.note_error(conns[0], StubError("gone"))
    pool.note_error(conns[1], StubError("gone"))  # the same event seen twice
    assert pool.stats().generation == 1
    pool.release(conns[0])
    pool.release(conns[1])
    eventually(lambda: server.open == 0)


def test_30_a_healthy_connection_costs_no_round_trip(server, pool_of):
    pool = pool_of(max_connections=2)
    for _ in range(50):
        pool.release(pool.acquire())
    assert (server.pings, server.rollbacks, server.connects) == (0, 0, 1)


def test_31_a_ping_comes_after_a_long_idle_only(server, pool_of):
    clock = Clock()
    pool = pool_of(max_connections=2, ping_after=30, clock=clock)
    (conn,) = fill(pool, 1)
    clock.advance(31)
    assert pool.acquire() is conn
    assert server.pings == 1
    pool.release(conn)


def test_32_a_slow_close_delays_nobody(server, pool_of):
    pool = pool_of(max_connections=3)
    fill(pool, 2)
    server.hang("close")
    conns = [pool.acquire(), pool.acquire()]
    start = time.monotonic()
    pool.discard(conns[0])
    pool.release(conns[1])
    pool.release(pool.acquire())
    assert time.monotonic() - start < 5  # the closes hang for ever


def test_32_a_close_that_never_ends_is_given_up(server, pool_of):
    pool = pool_of(max_connections=1, close_timeout=0.2)
    server.hang("close")
    old = pool.acquire()
    pool.discard(old)
    assert pool.acquire() is not old


def test_33_a_checkin_is_quick_while_ten_connects_hang(server, pool_of):
    pool = pool_of(max_connections=20)
    conns = [pool.acquire() for _ in range(10)]
    server.hang()
    threads = [threading.Thread(target=lambda: pool.release(pool.acquire())) for _ in range(10)]
    for thread in threads:
        thread.start()
    eventually(lambda: pool.stats().waiting == 10)
    for conn in conns:
        start = time.monotonic()
        pool.release(conn)
        assert time.monotonic() - start < 5  # the connects hang for ever
    for thread in threads:
        thread.join(5)


def test_34_the_pause_between_attempts_grows_and_has_jitter():
    for failures in range(1, 20):
        pauses = [backoff(failures) for _ in range(50)]
        assert min(pauses) >= BACKOFF_MIN
        assert max(pauses) <= min(BACKOFF_MAX, BACKOFF_MIN * 2**failures)
        assert len(set(pauses)) > 1


def test_34_the_failure_is_reported_once_for_each_stretch_of_it(server, pool_of):
    server.connect_error = StubError("down")
    pool = pool_of(min_connections=1, reconnect_timeout=0.3)
    errors, reports = [], []

    def errors_listener(error):
        errors.append(error)

    def reports_listener(error):
        reports.append(error)

    pool.on("connect_error", errors_listener)
    pool.on("reconnect_failed", reports_listener)
    pool.open()
    eventually(lambda: reports)
    assert len(errors) > 1
    assert len(reports) == 1
    server.connect_error = None
    eventually(lambda: numbers(pool) == (1, 0, 0))  # never terminal


def test_35_recovery_refills_to_the_minimum(server, pool_of):
    pool = pool_of(max_connections=5, min_connections=3)
    pool.open(wait=5)
    server.connect_error = StubError("down")
    pool.invalidate_all("restart")
    eventually(lambda: pool.stats().connect_errors >= 1)
    server.connect_error = None
    eventually(lambda: numbers(pool) == (3, 0, 0) and settled(pool))


def test_36_a_connect_function_that_raises_does_not_loop(server, pool_of):
    server.connect_error = StubError("no password to be had")
    pool = pool_of(min_connections=2)
    pool.open()
    threading.Event().wait(0.5)
    assert server.connects < 30


def test_a_listener_that_raises_harms_nothing(pool_of, caplog):
    pool = pool_of()

    def listener(connection):
        raise StubError("listener")

    pool.on("checkout", listener)
    pool.release(pool.acquire())
    assert "listener of the pool event 'checkout'" in caplog.text
