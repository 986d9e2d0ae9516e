"""The pool on real servers, some behind a proxy that cuts, hangs and goes deaf."""

from __future__ import annotations

import asyncio
import threading
import time

import peewee
import pytest

from peewee_frameworks.pool import PooledMySQLDatabase, PooledPostgresqlDatabase, PooledSqliteDatabase
from peewee_frameworks.pool.drivers import pymysql_connection_class
from tests.support.concurrency import eventually, run_threads
from tests.support.proxy import Proxy

from .any_driver import (
    one,
    test_26_a_connection_killed_in_use_is_not_used_again_and_the_others_are_suspected,  # noqa: F401
    test_26_after_a_killed_backend_the_next_checkout_works,  # noqa: F401
    test_27_a_deaf_server_costs_no_more_than_the_timeout,  # noqa: F401
    test_27_a_server_that_accepts_and_stays_silent_costs_no_more_than_the_timeout,  # noqa: F401
    test_29_after_a_restart_everybody_is_served,  # noqa: F401
    test_31_a_ping_leaves_no_transaction,  # noqa: F401
    test_37_a_failed_transaction_is_rolled_back,  # noqa: F401
    test_57_after_a_fork_parent_and_child_work_on_sessions_of_their_own,  # noqa: F401
    test_every_session_is_gone_after_the_close,  # noqa: F401
)

CLASSES = {"mysql": PooledMySQLDatabase, "postgres": PooledPostgresqlDatabase, "sqlite": PooledSqliteDatabase}
pytestmark = pytest.mark.parametrize("database_kind", ["mysql", "postgres"], indirect=True)


@pytest.fixture
def open_pool():
    opened = []

    def make(place, **options):
        extra = {"prefer_psycopg3": True} if place.kind == "postgres" else {}
        options = {"max_connections": 5, "timeout": 5, **extra, **place.connect_kwargs(), **options}
        db = CLASSES[place.kind](place.database, **options)
        opened.append(db)
        return db

    yield make
    for db in opened:
        db.pool.close(0)
        eventually(lambda db=db: db.pool.stats().total == 0, deadline=5)


def test_26_a_connection_killed_in_a_transaction_is_what_the_error_tells_of(place, open_pool):
    """Not the ROLLBACK that cannot be sent any more: with PyMySQL, that is "(0, '')"."""
    db = open_pool(place)
    with (
        pytest.raises((peewee.OperationalError, peewee.InterfaceError)) as caught,
        db.connection_context(),
        db.atomic(),
    ):
        db.execute_sql("select 1").fetchone()
        place.kill_sessions()
        db.execute_sql("select 2")
    assert "rollback" not in {entry.name for entry in caught.traceback}
    assert one(db) == (1,)


def test_30_a_healthy_request_costs_one_round_trip(place, open_pool):
    with Proxy(place.address) as proxy:
        db = open_pool(place.via(*proxy.address), ping_after=60)  # the machine may be slow
        one(db)
        before = proxy.counters.round_trips
        for _ in range(3):
            one(db)
        assert proxy.counters.round_trips - before == 3


def test_37_an_open_transaction_is_seen_without_a_round_trip_and_rolled_back(place, open_pool, caplog):
    db = open_pool(place)
    with db.connection_context():
        db.execute_sql("create table t (x int)")
        db.execute_sql("begin")
        db.execute_sql("insert into t values (1)")
    with db.connection_context():
        assert db.execute_sql("select count(*) from t").fetchone() == (0,)
    assert "a transaction was left open" in caplog.text
    assert db.pool.stats().rollbacks == 1
    assert not any(session.in_transaction for session in place.sessions())


def test_38_a_result_that_was_not_read_to_its_end_closes(place, open_pool):
    if place.kind != "mysql":
        pytest.skip("psycopg reads results at once")
    import pymysql.cursors

    db = open_pool(place)
    conn = db.pool.acquire()
    cursor = conn.cursor(pymysql.cursors.SSCursor)
    cursor.execute("select 1 union select 2")
    cursor.fetchone()
    db.pool.release(conn)
    assert one(db) == (1,)
    eventually(lambda: "returned in the middle of a result" in db.pool.stats().closes)  # in the background


def test_threads_and_tasks_use_one_queue_on_a_real_server(place, open_pool):
    db = open_pool(place, max_connections=3)

    def query(conn):
        cursor = conn.cursor()
        cursor.execute("select 1")
        row = cursor.fetchone()
        cursor.close()
        return row

    async def task():
        conn = await db.pool.acquire_async()
        try:
            return await asyncio.to_thread(query, conn)
        finally:
            db.pool.release(conn)

    async def main():
        return await asyncio.gather(*(task() for _ in range(30)))

    results = run_threads(9, lambda index: asyncio.run(main()) if index == 8 else [one(db) for _ in range(30)])
    assert all(row == (1,) for rows in results for row in rows)
    assert len(place.sessions()) <= 3


def test_pymysql_shares_one_tls_context(place, open_pool):
    if place.kind != "mysql":
        pytest.skip("PyMySQL only")
    db = open_pool(place)
    conns = run_threads(5, lambda _: db.pool.acquire())
    assert (
        len({id(getattr(conn, "ctx", None)) for conn in conns}) <= 2
    )  # two may build the first at once; 1.1 builds none
    assert all(isinstance(conn, pymysql_connection_class()) for conn in conns)
    assert all(conn._read_timeout is None for conn in conns)
    for conn in conns:
        db.pool.release(conn)


def test_a_password_is_in_no_message(place, open_pool):
    db = open_pool(place, user="nobody", password="hunter2secret", timeout=1)
    errors = []
    for attempt in (db.connect, lambda: db.pool.acquire(timeout=0.01)):
        try:
            attempt()
        except Exception as error:
            errors.append(f"{error} {error!r} {error.__cause__!r}")
        else:  # PostgreSQL may trust everybody
            db.close()
    assert "hunter2secret" not in " ".join(errors) + repr(db.pool)


def test_a_server_that_is_away_for_a_while(place, open_pool):
    """Every caller gets a connection or an error by its deadline, and all is well at once when it is back."""
    with Proxy(place.address) as proxy:
        db = open_pool(place.via(*proxy.address), timeout=1)
        one(db)
        proxy.refuse()
        proxy.cut()
        late, stop = [], threading.Event()

        def work(_):
            while not stop.is_set():
                start = time.monotonic()
                try:
                    one(db)
                except Exception:
                    stop.wait(0.01)
                if (took := time.monotonic() - start) > 4:  # without a deadline, the driver's own 10 s
                    late.append(took)

        threading.Timer(0.5, proxy.restore).start()
        threading.Timer(1.0, stop.set).start()
        run_threads(6, work)
        assert not late
        assert one(db) == (1,)
