"""What holds with every driver, ours and others': tests for the modules that give them `place` and `open_pool`."""

from __future__ import annotations

import os
import time
import warnings

import peewee
import pytest

from peewee_frameworks.errors import PoolError
from peewee_frameworks.pool.core import UNSEEN
from peewee_frameworks.pool.drivers import driver_of
from tests.support.concurrency import eventually, run_threads
from tests.support.proxy import Proxy

from .stub import numbers, settled

NOT_FOR_EVER = 5.0  # seconds; how soon it is, the benchmark measures


def one(db):
    with db.connection_context():
        cursor = db.execute_sql("select 1")
        row = cursor.fetchone()
        cursor.close()
        return row


def fill(db, count):
    conns = [db.pool.acquire() for _ in range(count)]
    for conn in conns:
        db.pool.release(conn)
    eventually(lambda: settled(db.pool))
    return conns


def rest(db):
    """Half a second, for a driver whose connections have no socket to look at; what died a moment ago it hands out."""
    for entry in db.pool.engine.idle:
        if driver_of(entry.conn).socket_of(entry.conn) is None:
            entry.since -= UNSEEN


def test_26_after_a_killed_backend_the_next_checkout_works(place, open_pool):
    db = open_pool(place)
    fill(db, 3)
    rest(db)
    place.kill_sessions()
    assert [one(db) for _ in range(5)] == [(1,)] * 5


def test_26_a_connection_killed_in_use_is_not_used_again_and_the_others_are_suspected(place, open_pool):
    db = open_pool(place)
    fill(db, 3)
    with db.connection_context():
        place.kill_sessions()
        with pytest.raises((peewee.DatabaseError, peewee.InterfaceError)):
            db.execute_sql("select 1")
    assert db.pool.stats().generation == 1
    assert one(db) == (1,)
    eventually(lambda: settled(db.pool) and numbers(db.pool) == (1, 0, 0))


def test_27_a_deaf_server_costs_no_more_than_the_timeout(place, open_pool):
    with Proxy(place.address) as proxy:
        db = open_pool(place.via(*proxy.address), ping_after=0, max_connections=1, ping_timeout=1, close_timeout=1)
        fill(db, 1)
        proxy.deafen()
        proxy.hang()
        start = time.monotonic()
        with pytest.raises(PoolError):
            db.pool.acquire(timeout=0.5)
        assert time.monotonic() - start < NOT_FOR_EVER
        proxy.cut()  # before it hears again, or a ping that is answered late vouches for what is cut then
        proxy.restore()
        proxy.cut()
        assert one(db) == (1,)


def test_27_a_server_that_accepts_and_stays_silent_costs_no_more_than_the_timeout(place, open_pool):
    with Proxy(place.address) as proxy:
        proxy.hang()
        db = open_pool(place.via(*proxy.address), connect_timeout=10)
        start = time.monotonic()
        with pytest.raises(PoolError):
            db.pool.acquire(timeout=0.4)
        assert time.monotonic() - start < NOT_FOR_EVER
        proxy.restore()
        proxy.cut()
        assert one(db) == (1,)


def test_29_after_a_restart_everybody_is_served(place, open_pool):
    with Proxy(place.address) as proxy:
        db = open_pool(place.via(*proxy.address), max_connections=10)
        fill(db, 10)
        rest(db)
        proxy.cut()
        assert run_threads(10, lambda _: one(db)) == [(1,)] * 10


def test_31_a_ping_leaves_no_transaction(place, open_pool):
    db = open_pool(place, ping_after=0)
    one(db)
    eventually(lambda: settled(db.pool))
    one(db)
    assert db.pool.stats().pings >= 1
    assert not any(session.in_transaction for session in place.sessions())


def test_37_a_failed_transaction_is_rolled_back(place, open_pool):
    db = open_pool(place)
    with db.connection_context():
        db.execute_sql("begin")
        with pytest.raises(peewee.ProgrammingError):
            db.execute_sql("select * from no_such_table")
    assert one(db) == (1,)


def test_every_session_is_gone_after_the_close(place, open_pool):
    db = open_pool(place)
    fill(db, 4)
    assert len(place.sessions()) == 4
    db.pool.close(5)
    eventually(lambda: not place.sessions())


def test_57_after_a_fork_parent_and_child_work_on_sessions_of_their_own(place, open_pool):
    db = open_pool(place)
    fill(db, 2)
    db.connect()
    session_sql = "select connection_id()" if place.kind == "mysql" else "select pg_backend_pid()"
    mine = db.execute_sql(session_sql).fetchone()[0]
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads
        pid = os.fork()
    if pid == 0:
        answer = b"failed"
        try:
            assert db.is_closed(), "the parent's connection is still in the child's state"
            with db.connection_context():
                answer = str(db.execute_sql(session_sql).fetchone()[0]).encode()
            db.pool.close(1)
        except BaseException as error:
            answer = repr(error).encode()
        finally:
            os.write(write, answer)
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(pid, 0)
    assert answer.isdigit(), answer
    assert int(answer) != mine
    assert db.execute_sql(session_sql).fetchone()[0] == mine
    db.close()
    assert [one(db) for _ in range(3)] == [(1,)] * 3
    assert db.pool.stats().generation == 0
