"""The pool over the drivers that are no dependency of ours. `test_other_drivers.py` runs this, once per driver.

By hand: ``PYTHONPATH=.venv/drivers .venv/bin/python -m pytest tests/pool/other_drivers.py -k mariadb``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import threading
import time

import peewee
import pytest

import peewee_frameworks.pool as ours
from peewee_frameworks.http import UNAVAILABLE, problem_for
from peewee_frameworks.pool.drivers import driver_of
from tests.support.concurrency import eventually, run_threads
from tests.support.proxy import Proxy

from .any_driver import (
    fill,
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
from .stub import settled

# name: module, kind of server, class of the pool, its options, round trips that the pool adds to a request
DRIVERS = {
    "mysqlclient": ("MySQLdb", "mysql", "PooledMySQLDatabase", {}, 1),
    "mysql-connector": (
        "mysql.connector.connection_cext",
        "mysql",
        "PooledMySQLConnectorDatabase",
        {"use_pure": False},
        0,
    ),
    "mysql-connector-pure": ("mysql.connector", "mysql", "PooledMySQLConnectorDatabase", {"use_pure": True}, 0),
    "mariadb": ("mariadb", "mysql", "PooledMariaDBConnectorDatabase", {}, 0),
    "psycopg2": ("psycopg2", "postgres", "PooledPostgresqlDatabase", {"prefer_psycopg3": False}, 0),
}


@pytest.fixture(params=DRIVERS)
def driver(request):
    return request.param


@pytest.fixture
def place(driver, make_place):
    return make_place(DRIVERS[driver][1])


@pytest.fixture
def open_pool(driver, monkeypatch):
    opened = []
    if driver == "mysqlclient":
        monkeypatch.setattr(peewee, "mysql", importlib.import_module("MySQLdb"))

    def make(place, **options):
        options = {"max_connections": 5, "timeout": 5, **DRIVERS[driver][3], **place.connect_kwargs(), **options}
        db = getattr(ours, DRIVERS[driver][2])(place.database, **options)
        opened.append(db)
        return db

    yield make
    for db in opened:
        db.pool.close(0)
        eventually(lambda db=db: db.pool.stats().total == 0, deadline=10)


def test_the_driver_is_recognised(place, open_pool, driver):
    db = open_pool(place)
    (conn,) = fill(db, 1)
    assert driver_of(conn).name == driver.removesuffix("-pure")
    assert db.pool.stats().closes == {}


def test_30_a_healthy_request_costs_as_few_round_trips_as_the_driver_allows(place, open_pool, driver):
    with Proxy(place.address) as proxy:
        db = open_pool(place.via(*proxy.address), max_connections=1)
        one(db)
        eventually(lambda: settled(db.pool))
        with db.connection_context():  # some drivers ping before each query, and no pool can stop them
            before = proxy.counters.round_trips
            for _ in range(5):
                db.execute_sql("select 1").fetchone()
            least = proxy.counters.round_trips - before
        eventually(lambda: settled(db.pool))
        before = proxy.counters.round_trips
        for _ in range(5):
            one(db)
            eventually(lambda: settled(db.pool))
        assert proxy.counters.round_trips - before == least + 5 * DRIVERS[driver][4]


def test_a_connection_lost_in_a_transaction_is_no_fault_of_the_application(place, open_pool):
    """Told by the next statement; by the COMMIT, though what that said was handled; by the COMMIT alone."""
    db = open_pool(place)
    for after in "statement", "handled", "commit":
        with db.connection_context():
            with pytest.raises(peewee.PeeweeException) as lost, db.atomic():
                db.execute_sql("select 1").fetchone()
                place.kill_sessions()
                if after != "commit":
                    with contextlib.suppress(peewee.PeeweeException if after == "handled" else ()):
                        db.execute_sql("select 1").fetchone()
            assert problem_for(lost.value) is UNAVAILABLE, (after, lost.value)


def test_37_an_open_transaction_is_rolled_back(place, open_pool):
    db = open_pool(place)
    with db.connection_context():
        db.execute_sql("create table t (x int)")
        db.execute_sql("begin")
        db.execute_sql("insert into t values (1)")
    with db.connection_context():
        assert db.execute_sql("select count(*) from t").fetchone() == (0,)
    assert db.pool.stats().rollbacks >= 1
    assert "still unusable" not in str(db.pool.stats().closes)
    eventually(lambda: settled(db.pool))
    assert not any(session.in_transaction for session in place.sessions())


def test_38_a_result_that_was_not_read_to_its_end_harms_nobody(place, open_pool):
    db = open_pool(place, max_connections=1)
    conn = db.pool.acquire()
    cursor = conn.cursor()
    cursor.execute("select 1 union select 2")
    db.pool.release(conn)
    del cursor, conn
    assert [one(db) for _ in range(3)] == [(1,)] * 3


def test_many_threads_share_few_connections(place, open_pool):
    db = open_pool(place, max_connections=3)
    results = run_threads(9, lambda _: [one(db) for _ in range(20)])
    assert all(row == (1,) for rows in results for row in rows)
    assert len(place.sessions()) <= 3
    assert db.pool.stats().closes == {}


def test_an_abort_ends_a_query_that_hangs(place, open_pool, driver):
    """What `Pool.close` does to connections that do not come back."""
    db = open_pool(place)
    conn = db.pool.acquire()
    if driver_of(conn).socket_of(conn) is None:
        pytest.skip(f"{driver} has no descriptor to cut")
    sleep = "select pg_sleep(20)" if place.kind == "postgres" else "select sleep(20)"
    ended = []

    def work():
        try:
            conn.cursor().execute(sleep)
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    eventually(lambda: any("sleep" in str(session.query) for session in place.sessions()))
    db.pool.close(0.1)
    thread.join(10)
    assert ended


@pytest.mark.filterwarnings(
    "ignore:unclosed <socket:ResourceWarning"
)  # MySQL Connector in Python, where it was cut off
def test_connections_closed_amid_queries_of_other_threads_do_not_crash_the_process(driver, place, open_pool):
    """MySQL Connector in C did; an executor of cases that dies fails them all."""
    db = open_pool(place, timeout=30)
    slow = "select pg_sleep(0.0005)" if place.kind == "postgres" else "select sleep(0.0005)"
    ended, refused = threading.Event(), []

    def use():
        while not ended.is_set():
            try:
                with db.connection_context():
                    for _ in range(20):
                        db.execute_sql(slow).fetchone()
            except Exception as error:
                refused.append(str(error))

    users = [threading.Thread(target=use, daemon=True) for _ in range(4)]
    for user in users:
        user.start()
    taken, end = 0, time.monotonic() + 40
    while taken < 60 and time.monotonic() < end:
        taken += db.pool.close_held()
        time.sleep(0.001)
    ended.set()
    for user in users:
        user.join(10)
    assert taken >= 60
    assert refused
    assert one(db) == (1,)
    if driver != "mariadb":  # whose cursors leak when a statement fails, and with them the connection
        eventually(lambda: not db.pool.cut)
    gc.collect()
