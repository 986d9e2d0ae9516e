"""What a request queries: counted for it wherever it is sent from, timed without the wait, and never by its parameters."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import peewee
import pytest
from flask import Flask
from playhouse.pwasyncio import AsyncSqliteDatabase

from peewee_frameworks import ConfigurationError, connection_scope
from peewee_frameworks.asgi import ScopeMiddleware
from peewee_frameworks.flask import Peewee
from peewee_frameworks.pool import PooledSqliteDatabase
from peewee_frameworks.queries import Tally, listed
from peewee_frameworks.runtime import Runtime
from tests.support.concurrency import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Any]:
    database = PooledSqliteDatabase(str(tmp_path / "queries.db"), max_connections=2, timeout=10)
    with closing(database.pool):
        yield database


def reports(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record for record in caplog.records if record.name == "peewee_frameworks.query"]


def times_of(response: Any) -> tuple[float, str, float]:
    told = re.fullmatch(r'db;dur=(.+);desc="(.+)", pool;dur=(.+)', response.headers["Server-Timing"])
    assert told is not None
    return float(told[1]), told[2], float(told[3])


def make_app(database: Any, view: Any, **options: Any) -> Any:
    app = Flask("queries")
    Peewee(database, **options).init_app(app)
    app.add_url_rule("/", "view", view)
    return app.test_client()


# -- times ----------------------------------------------------------------------------------------------------------------


def event(sql: str, duration: float) -> Any:
    return SimpleNamespace(sql=sql, duration=duration)


def test_the_wait_that_a_query_brought_about_is_the_pools_time_and_not_the_databases():
    tally = Tally(None)
    tally.connected(start=101.0, seconds=3.0)
    tally.query(event("SELECT 1", 5.0), now=105.0)  # it began at 100
    assert (tally.seconds, tally.waited, tally.count) == (2.0, 3.0, 1)
    tally.query(event("SELECT 1", 5.0), now=111.0)
    assert (tally.seconds, tally.waited, tally.count) == (7.0, 3.0, 2)


def test_the_wait_of_a_connect_before_the_query_is_not_taken_from_the_query():
    tally = Tally(None)
    tally.connected(start=90.0, seconds=3.0)
    tally.query(event("SELECT 1", 5.0), now=105.0)
    assert (tally.seconds, tally.waited) == (5.0, 3.0)


def test_what_only_begins_and_ends_transactions_takes_time_and_is_no_query():
    tally = Tally(1)
    for sql in ("BEGIN", "begin immediate", "SAVEPOINT x;", "RELEASE SAVEPOINT x", "ROLLBACK TO SAVEPOINT x"):
        tally.query(event(sql, 1.0), now=10.0)
    assert (tally.seconds, tally.count, tally.statements) == (5.0, 0, {})


def test_the_wait_for_a_connection_is_told(db):
    """The request waits until the test gives back what it holds."""
    client = make_app(db, lambda: str(db.execute_sql("SELECT 1").fetchone()[0]), server_timing=True)
    held = [db.pool.acquire(), db.pool.acquire()]
    with ThreadPoolExecutor(1) as threads:
        response = threads.submit(client.get, "/")
        eventually(lambda: db.pool.stats().waiting == 1)
        time.sleep(0.05)
        for conn in held:
            db.pool.release(conn)
        duration, queries, waited = times_of(response.result(10))
    assert queries == "1 query"
    assert waited >= 50
    assert duration > 0


def test_a_queried_stream_tells_what_is_known_at_its_first_byte(db):
    def view() -> Any:
        db.execute_sql("SELECT 1")

        def parts() -> Iterator[str]:
            yield "a"
            db.execute_sql("SELECT 2")
            yield "b"

        return parts()

    response = make_app(db, view, server_timing=True).get("/")
    assert response.text == "ab"
    assert times_of(response)[1] == "1 query"


def test_the_header_of_the_application_stays(db):
    client = make_app(db, lambda: ("x", {"Server-Timing": "render;dur=3"}), server_timing=True)
    assert [told.partition(";")[0] for told in client.get("/").headers.getlist("Server-Timing")] == ["render", "db"]


def test_an_application_inside_another_tells_it_once(db):
    inner = make_app(db, lambda: str(db.execute_sql("SELECT 1").fetchone()), server_timing=True).application
    outer = Flask("outer")
    Peewee(db, server_timing=True).init_app(outer)
    around = outer.wsgi_app.app
    outer.wsgi_app.app = lambda environ, start: (inner if environ["PATH_INFO"] == "/" else around)(environ, start)
    assert len(outer.test_client().get("/").headers.getlist("Server-Timing")) == 1


def test_off_nothing_is_installed(db):
    """No hook in the database, nothing in the way of its connects."""
    Runtime(db)
    assert db.query_hooks == []
    assert "_connect_here" not in vars(db)
    Runtime(db, server_timing=True)
    Runtime(db, query_budget=3)
    assert len(db.query_hooks) == len(db._state.listeners) == 1


# -- the budget -------------------------------------------------------------------------------------------------------------


def repeat(db: Any, count: int) -> None:
    for number in range(count):
        db.execute_sql("SELECT ?", (f"secret {number}",))


def test_a_request_over_its_budget_is_reported_once_with_what_it_repeats(db, caplog):
    def view() -> str:
        with db.atomic():
            db.execute_sql("SELECT 42")
            repeat(db, 5)
        return "x"

    client = make_app(db, view, query_budget=3)
    client.get("/").close()
    (record,) = reports(caplog)
    assert record.levelno == logging.WARNING
    assert record.getMessage().splitlines() == [
        "request GET / sent 6 queries, more than query_budget (3):",
        "  5 x SELECT ?",
        "  1 x SELECT 42",
    ]
    expected = ("request GET /", 6, 3, "SELECT ?", 5)
    assert (record.request, record.queries, record.budget, record.sql, record.repeated) == expected
    client.get("/").close()
    assert len(reports(caplog)) == 2


def test_a_request_within_its_budget_is_not(db, caplog):
    make_app(db, lambda: repeat(db, 3) or "x", query_budget=3).get("/").close()
    assert not reports(caplog)


def test_queries_of_a_scope_inside_the_request_are_the_requests(db, caplog):
    """Even if the request itself has none."""

    def view() -> str:
        for _ in range(2):
            with connection_scope(db):
                repeat(db, 2)
        return "x"

    make_app(db, view, query_budget=3).get("/").close()
    (record,) = reports(caplog)
    assert (record.request, record.queries) == ("request GET /", 4)


def test_a_job_outside_requests_has_no_budget(db, caplog):
    Runtime(db, query_budget=1)
    with connection_scope(db):
        repeat(db, 3)
    assert not reports(caplog)


def test_a_query_that_fails_counts_and_a_response_to_an_error_is_reported(db, caplog):
    def view() -> str:
        repeat(db, 2)
        raise RuntimeError

    make_app(db, view, query_budget=1).get("/").close()
    (record,) = reports(caplog)
    assert record.queries == 2


def test_queries_of_an_asynchronous_database_count_too(tmp_path, caplog):
    db = AsyncSqliteDatabase(str(tmp_path / "queries.db"))
    runtime = Runtime(db, query_budget=3, server_timing=True)
    sent = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.gather(*(db.aexecute_sql("SELECT ?", (number,)) for number in range(5)))
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    async def main() -> None:
        await ScopeMiddleware(app, runtime)({"type": "http", "method": "GET", "path": "/"}, None, send)
        await db.close_pool()

    asyncio.run(main())
    (record,) = reports(caplog)
    assert (record.queries, record.sql, record.repeated) == (5, "SELECT ?", 5)
    ((name, value),) = sent[0]["headers"]
    assert name == b"server-timing"
    assert b'"5 queries"' in value


def test_of_two_instances_in_one_application_each_database_counts(tmp_path, caplog):
    one, two = (PooledSqliteDatabase(str(tmp_path / f"{name}.db")) for name in ("one", "two"))
    app = Flask("two")
    Peewee(one).init_app(app)
    Peewee(two, query_budget=2).init_app(app)
    app.add_url_rule("/", "view", lambda: repeat(one, 1) or repeat(two, 4) or "x")
    with closing(one.pool), closing(two.pool):
        app.test_client().get("/").close()
    (record,) = reports(caplog)
    assert (record.request, record.queries) == ("request GET /", 4)  # of the one that asks


def test_long_and_many_statements_are_cut():
    statements = {f"SELECT {number}, '{'x' * 1000}'": 10 - number for number in range(8)}
    lines = listed(statements).splitlines()
    assert len(lines) == 6
    assert all(len(line) < 520 for line in lines)
    assert lines[0].startswith("  10 x SELECT 0, ")
    assert lines[-1] == "  and 12 of 3 other statements"


@pytest.mark.parametrize(("name", "value"), [("query_budget", 0), ("query_budget", "x"), ("server_timing", 3)])
def test_options_that_cannot_be_are_named(tmp_path, name, value):
    with pytest.raises(ConfigurationError, match=name):
        Runtime(peewee.SqliteDatabase(str(tmp_path / "a.db")), **{name: value})
