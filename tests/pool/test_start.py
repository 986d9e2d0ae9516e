"""Start and size: scenarios 1 to 6."""

from __future__ import annotations

import threading
import time

import pytest

from peewee_frameworks.errors import ConfigurationError, PoolConnectTimeout, PoolError, PoolTimeout
from peewee_frameworks.pool import PoolOptions
from tests.support.concurrency import eventually, run_threads

from .stub import StubError, numbers, settled


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"max_connections": -1}, ["max_connections"]),
        ({"max_connections": 2.5}, ["max_connections"]),
        ({"max_connecting": 0}, ["max_connecting"]),
        ({"min_connections": 5, "max_connections": 4}, ["min_connections", "max_connections"]),
        ({"timeout": -1}, ["timeout"]),
        ({"timeout": "soon"}, ["timeout"]),
        ({"connect_timeout": 0}, ["connect_timeout"]),
        ({"keepalive": 60, "idle_timeout": 30}, ["keepalive", "idle_timeout"]),
        ({"idle_timeout": 600, "stale_timeout": 300}, ["idle_timeout", "stale_timeout"]),
        ({"on_connect_error": "hope"}, ["on_connect_error"]),
        ({"lifo": "no"}, ["lifo"]),
        ({"leak_threshold": float("nan")}, ["leak_threshold"]),
    ],
)
def test_01_bad_sizes_and_contradicting_times_are_refused_by_name(options, names):
    with pytest.raises(ConfigurationError) as caught:
        PoolOptions(**options)
    assert all(name in str(caught.value) for name in names)


def test_02_a_warm_up_takes_the_time_of_one_connect(server, pool_of):
    server.delay = 0.2
    pool = pool_of(max_connections=10, min_connections=10)
    start = time.monotonic()
    pool.open(wait=5)
    assert time.monotonic() - start < 1.8  # one after the other would take 2 s
    assert numbers(pool) == (10, 0, 0)


def test_03_a_server_that_is_down_at_the_start_fails_fast_if_asked_to(server, pool_of):
    server.connect_error = StubError("down")
    pool = pool_of(min_connections=1)
    with pytest.raises(PoolConnectTimeout) as caught:
        pool.open(wait=0.2)
    assert isinstance(caught.value.__cause__, StubError)


def test_03_a_server_that_is_down_at_the_start_is_no_matter_in_the_background(server, pool_of):
    server.connect_error = StubError("down")
    pool = pool_of(min_connections=1)
    failed = threading.Event()
    pool.on("connect_error", lambda error: failed.set())
    pool.open()
    assert failed.wait(5)
    with pytest.raises(StubError):
        pool.acquire()


def test_04_the_first_client_is_served_when_the_server_comes_up_late(server, pool_of):
    server.connect_error = StubError("down")
    pool = pool_of(on_connect_error="retry", timeout=10)
    failed = threading.Event()

    def up(error):
        server.connect_error = None
        failed.set()

    pool.on("connect_error", up)
    assert pool.acquire() is not None
    assert failed.is_set()


def test_04_with_retry_a_caller_gets_the_last_error_as_the_cause_of_its_timeout(server, pool_of):
    server.connect_error = StubError("down")
    pool = pool_of(on_connect_error="retry")
    with pytest.raises(PoolConnectTimeout) as caught:
        pool.acquire(timeout=0.2)
    assert isinstance(caught.value.__cause__, StubError)
    assert not isinstance(caught.value, PoolTimeout)


def test_05_opening_many_times_and_from_many_threads_opens_once(server, pool_of):
    pool = pool_of(max_connections=3, min_connections=3)
    run_threads(16, lambda _: pool.open())
    eventually(lambda: numbers(pool) == (3, 0, 0))
    assert server.connects == 3


def test_05_the_first_checkouts_of_many_threads_share_one_engine(server, pool_of):
    pool = pool_of(max_connections=16)
    conns = run_threads(16, lambda _: pool.acquire())
    assert len({id(conn) for conn in conns}) == 16
    for conn in conns:
        pool.release(conn)
    assert numbers(pool)[1] == 0


def test_06_a_hook_that_leaves_a_transaction_open_is_refused(server, pool_of):
    def prepare(conn):
        conn.in_transaction = True

    pool = pool_of(prepare=prepare)
    with pytest.raises(PoolError, match="hooks"):
        pool.acquire()
    eventually(lambda: server.open == 0 and settled(pool))


@pytest.mark.parametrize("error", [StubError("hook"), KeyboardInterrupt(), SystemExit()])
def test_06_and_23_a_hook_that_raises_anything_closes_the_connection(server, pool_of, error):
    def prepare(conn):
        raise error

    pool = pool_of(prepare=prepare)
    with pytest.raises(type(error)):
        pool.acquire()
    assert server.open == 0
    assert pool.stats().total == 0


def test_05_opening_an_open_pool_does_not_end_its_suspension(pool_of):
    pool = pool_of()
    pool.suspend()
    pool.open()
    assert pool.stats().suspended
    pool.resume()
    pool.release(pool.acquire())
