"""Age, size and suspension: scenarios 43 to 50. The clock is moved; the upkeep is called, not awaited."""

from __future__ import annotations

import threading
import time

import pytest

from peewee_frameworks.errors import PoolExhausted, PoolTimeout
from tests.support.concurrency import eventually, run_threads

from .stub import Clock, StubError, numbers, settled


@pytest.fixture
def clock():
    return Clock()


def fill(pool, count):
    conns = [pool.acquire() for _ in range(count)]
    for conn in conns:
        pool.release(conn)
    return conns


def test_43_an_expired_connection_is_not_handed_out(server, pool_of, clock):
    pool = pool_of(max_connections=1, stale_timeout=60, clock=clock)
    (old,) = fill(pool, 1)
    clock.advance(61)
    conn = pool.acquire()
    assert conn is not old
    pool.release(conn)


def test_43_a_borrowed_connection_is_never_closed_for_its_age(server, pool_of, clock):
    pool = pool_of(max_connections=2, stale_timeout=60, clock=clock)
    conn = pool.acquire()
    clock.advance(120)
    pool.maintain()
    assert not conn.closed
    pool.release(conn)
    eventually(lambda: conn.closed)


def test_43_renewal_begins_at_different_times(server, pool_of, clock):
    pool = pool_of(max_connections=50, stale_timeout=100, clock=clock)
    fill(pool, 50)
    ages = [entry.renew_at - entry.created for entry in pool.engine.entries.values()]
    assert 70 <= min(ages) < max(ages) <= 90
    assert len({round(age) for age in ages}) > 5


def test_43_the_replacement_is_opened_before_the_old_one_goes(server, pool_of, clock):
    pool = pool_of(max_connections=4, min_connections=1, stale_timeout=100, clock=clock)
    conn = pool.acquire()
    clock.advance(45)
    pool.release(conn)
    clock.advance(46)
    gate = server.hang()
    pool.maintain()
    eventually(lambda: pool.stats().connecting == 1)
    assert pool.acquire() is conn  # still serving
    pool.release(conn)
    gate.set()
    eventually(lambda: conn.closed and settled(pool))
    assert numbers(pool) == (1, 0, 0)


def test_43_never_below_the_minimum_for_long(server, pool_of, clock):
    pool = pool_of(max_connections=4, min_connections=3, stale_timeout=100, clock=clock)
    pool.open(wait=5)
    clock.advance(150)
    pool.maintain()
    eventually(lambda: settled(pool) and numbers(pool)[0] >= 3)


def test_44_idle_connections_are_closed_down_to_the_minimum(server, pool_of, clock):
    pool = pool_of(max_connections=10, min_connections=2, idle_timeout=30, clock=clock)
    fill(pool, 8)
    pool.maintain()
    assert numbers(pool)[0] == 8
    clock.advance(31)
    pool.maintain()
    eventually(lambda: settled(pool) and numbers(pool) == (2, 0, 0))
    clock.advance(31)
    pool.maintain()
    assert numbers(pool) == (2, 0, 0)
    assert pool.stats().closes == {"idle": 6}


def test_44_the_last_used_are_handed_out_first_so_the_rest_can_go(server, pool_of):
    pool = pool_of(max_connections=4)
    conns = fill(pool, 4)
    assert pool.acquire() is conns[3]
    pool = pool_of(max_connections=4, lifo=False)
    conns = fill(pool, 4)
    assert pool.acquire() is conns[0]


def test_45_the_keepalive_evicts_the_dead(server, pool_of, clock):
    pool = pool_of(max_connections=3, keepalive=10, clock=clock)
    fill(pool, 3)
    clock.advance(11)
    pool.maintain()
    eventually(lambda: settled(pool) and server.pings == 3)
    assert numbers(pool) == (3, 0, 0)
    server.ping_error = StubError("dead")
    clock.advance(11)
    pool.maintain()
    eventually(lambda: settled(pool) and numbers(pool) == (0, 0, 0))


def test_46_a_jump_of_the_wall_clock_harms_nothing(server, pool_of, monkeypatch):
    pool = pool_of(max_connections=1, stale_timeout=60)
    (conn,) = fill(pool, 1)
    for jump in (-86_400, 86_400):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1e9 + jump)
        assert pool.acquire() is conn
        pool.release(conn)


def test_47_a_resize_with_borrowed_connections(server, pool_of):
    pool = pool_of(max_connections=6)
    conns = [pool.acquire() for _ in range(6)]
    pool.release(conns.pop())
    pool.resize(2)
    for conn in conns[:3]:
        pool.release(conn)
    eventually(lambda: settled(pool) and server.open == 2)
    for conn in conns[3:]:
        pool.release(conn)
    eventually(lambda: numbers(pool) == (2, 0, 0))
    pool.resize(3)
    conns = [pool.acquire() for _ in range(3)]
    for conn in conns:
        pool.release(conn)
    assert numbers(pool) == (3, 0, 0)


def test_47_a_resize_that_makes_room_serves_who_waits(server, pool_of):
    pool = pool_of(max_connections=1)
    conn = pool.acquire()
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.acquire()))
    thread.start()
    eventually(lambda: pool.stats().waiting == 1)
    pool.resize(2)
    thread.join(5)
    assert got
    assert got[0] is not conn


def test_47_a_resize_reaches_the_connects_under_way(server, pool_of):
    gate = server.hang()
    pool = pool_of(max_connections=8, min_connections=8)
    pool.open()
    for _ in range(8):
        assert server.arrived.acquire(timeout=10)
    pool.resize(2, 0)
    gate.set()
    eventually(lambda: server.connects == 8 and settled(pool))
    assert numbers(pool) == (2, 0, 0)
    assert server.open == 2


def test_48_a_drain_replaces_every_connection(server, pool_of):
    pool = pool_of(max_connections=4)
    conns = [pool.acquire() for _ in range(4)]
    for conn in conns[:3]:
        pool.release(conn)
    pool.drain()
    eventually(lambda: settled(pool) and numbers(pool) == (3, 1, 0))
    assert all(conn.closed for conn in conns[:3])
    assert not conns[3].closed
    pool.release(conns[3])
    eventually(lambda: conns[3].closed)


def test_49_suspend_holds_and_resume_serves(server, pool_of):
    pool = pool_of(max_connections=2)
    fill(pool, 2)
    held = pool.acquire()
    pool.suspend()
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.acquire()))
    thread.start()
    eventually(lambda: pool.stats().waiting == 1)
    pool.release(held)
    thread.join(0.1)
    assert not got
    assert pool.stats().suspended
    pool.resume()
    thread.join(5)
    assert got
    pool.release(got[0])


def test_49_who_waits_in_vain_is_told_of_the_suspension(pool_of):
    pool = pool_of()
    pool.release(pool.acquire())
    pool.suspend()
    with pytest.raises(PoolTimeout, match=r"suspended.*resume\(\)"):
        pool.acquire(timeout=0.01)
    pool.resume()


def test_49_suspend_may_throw_instead(server, pool_of):
    pool = pool_of()
    fill(pool, 1)
    pool.suspend(fail=True)
    with pytest.raises(PoolExhausted, match="suspended"):
        pool.acquire()
    pool.resume()
    pool.release(pool.acquire())


def test_49_resume_refills_to_the_minimum(server, pool_of):
    pool = pool_of(max_connections=4, min_connections=2)
    pool.open(wait=5)
    pool.suspend()
    server.connect_error = StubError("maintenance")
    pool.invalidate_all("maintenance")
    eventually(lambda: server.open == 0)
    server.connect_error = None
    pool.resume()
    eventually(lambda: numbers(pool) == (2, 0, 0) and settled(pool))


def test_50_a_hundred_that_were_opened_together_stall_nobody_when_they_expire(server, pool_of):
    """100 threads work across two lifetimes of 2 s; a connect takes 20 ms and there are never more than 100 open."""
    server.delay = 0.02
    pool = pool_of(max_connections=100, min_connections=100, stale_timeout=2.0)
    pool.open(wait=10)
    end = time.monotonic() + 4.5

    def work(_):
        waits = []
        while time.monotonic() < end:
            start = time.perf_counter()
            conn = pool.acquire()
            waits.append(time.perf_counter() - start)
            with conn.use():
                time.sleep(0.01)
            pool.release(conn)
            time.sleep(0.05)
        return waits

    waits = sorted(wait for some in run_threads(100, work) for wait in some)
    assert server.connects > 150  # they did expire
    assert server.peak <= 100
    assert waits[int(len(waits) * 0.99)] < 0.02, waits[int(len(waits) * 0.99)]


def test_47_a_resize_amid_a_check_closes_no_more_than_it_must(server, pool_of):
    pool = pool_of(max_connections=4, ping_after=0)
    for conn in [pool.acquire() for _ in range(4)]:
        pool.release(conn)
    gate = server.hang("ping")
    user = threading.Thread(target=lambda: pool.release(pool.acquire()))
    user.start()
    eventually(lambda: pool.stats().checking == 1)
    closing = server.hang("close")
    pool.resize(2)
    gate.set()
    user.join(10)
    assert pool.stats().closing == 2
    closing.set()
    eventually(lambda: settled(pool))
    assert numbers(pool) == (2, 0, 0)
