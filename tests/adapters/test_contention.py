"""What others did at the same time is not the client's fault, nor the server's: 503, try again. With all drivers."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import httpx
import peewee
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from peewee_frameworks import flask as flask_adapter
from peewee_frameworks import wsgi
from peewee_frameworks.pool import connect
from peewee_frameworks.starlette import Peewee
from tests.support.concurrency import eventually
from tests.support.databases import ASYNC_DRIVERS
from tests.support.servers import admin_connection

SYNC = ("sqlite", "mysql", "postgres")
MYSQL, POSTGRES, SQLITE = ("mysql", "aiomysql"), ("postgres", "psycopg", "asyncpg"), ("sqlite", "aiosqlite")
SESSION = {"mysql": "SELECT CONNECTION_ID()", "postgres": "SELECT pg_backend_pid()"}
WAITS = {
    "mysql": "SELECT COUNT(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT' AND trx_mysql_thread_id = %s",
    "postgres": "SELECT COUNT(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND pid = %s",
}


def make_models(database):
    class Row(peewee.Model):
        name = peewee.CharField(unique=True)
        value = peewee.IntegerField(default=0)

        class Meta:
            table_name = "contended"

    database.bind([Row])
    return Row


class Bench:
    """A database under test, and another session on the same tables which gets in its way."""

    def __init__(self, name, place):
        self.kind, self.place = place.kind, place
        options = {"pragmas": {"busy_timeout": 50}} if place.kind == "sqlite" else {}
        if name in ASYNC_DRIVERS:
            self.db = connect(place.async_url(name), max_connections=3, timeout=5, **options)
        else:
            options |= {"prefer_psycopg3": True} if place.kind == "postgres" else {}
            self.db = connect(place.pool_url(), max_connections=3, timeout=5, **options)
        self.Row = make_models(self.db)
        self.other = (
            place.make_database(pragmas={"busy_timeout": 50}) if place.kind == "sqlite" else place.make_database()
        )
        self.OtherRow = make_models(self.other)
        self.OtherRow.create_table()
        self.OtherRow.insert_many([{"name": name} for name in "ab"]).execute()

    def update(self, name):
        self.Row.update(value=self.Row.value + 1).where(self.Row.name == name).execute()

    def update_other(self, name):
        self.OtherRow.update(value=self.OtherRow.value + 10).where(self.OtherRow.name == name).execute()

    def request(self, work):
        """Call `work` in an atomic request; give the response."""

        async def endpoint(_):
            await orm.run(work)
            return PlainTextResponse("done")

        orm = Peewee(self.db, transaction=True, errors=True, check="off")
        app = Starlette(routes=[Route("/", endpoint)], middleware=[orm.middleware()], lifespan=orm.lifespan())

        async def main():
            async with asyncio.timeout(30), app.router.lifespan_context(app):
                transport = httpx.ASGITransport(app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                    return await client.get("/")

        return asyncio.run(main())

    def values(self):
        return {row.name: row.value for row in self.OtherRow.select()}


@pytest.fixture
def bench(request, make_place):
    kind = ASYNC_DRIVERS[request.param][1] if request.param in ASYNC_DRIVERS else request.param
    bench = Bench(request.param, make_place(kind))
    yield bench
    bench.other.close_all()
    if hasattr(bench.db, "pool"):
        bench.db.pool.close()


def on(*names):
    return pytest.mark.parametrize("bench", names, indirect=True)


def told_to_try_again(response):
    return (response.status_code, response.headers.get("retry-after")) == (503, "1")


@on(*SYNC, *ASYNC_DRIVERS)
def test_a_lock_that_does_not_come_in_time(bench):
    timeout = {"mysql": "SET SESSION innodb_lock_wait_timeout = 1", "postgres": "SET LOCAL lock_timeout = '50ms'"}

    def work():
        if bench.kind in timeout:
            bench.db.execute_sql(timeout[bench.kind])
        bench.update("a")

    with bench.other.atomic():
        bench.update_other("a")
        assert told_to_try_again(bench.request(work))
    assert bench.request(work).status_code == 200
    assert bench.values() == {"a": 11, "b": 0}


@on(*MYSQL, *POSTGRES)
def test_a_deadlock(bench):
    """The other one waits for a row of ours; we ask for one of his, and are the one that is thrown out."""
    errors, sessions, has_b, ours_has_a = [], [], threading.Event(), threading.Event()

    def wait_for_ours():
        try:
            bench.update_other("a")
        except peewee.PeeweeException as error:
            errors.append(error)

    def other_waits():
        with (
            contextlib.closing(admin_connection(bench.kind)) as connection,
            contextlib.closing(connection.cursor()) as cursor,
        ):
            cursor.execute(WAITS[bench.kind], sessions)
            return cursor.fetchone()[0]

    def other():
        with bench.other.connection_context(), bench.other.atomic():
            # Who has changed less is thrown out (MariaDB), or who looks first (PostgreSQL).
            bench.OtherRow.insert_many([{"name": f"n{row}"} for row in range(50)]).execute()
            bench.update_other("b")
            sessions.append(bench.other.execute_sql(SESSION[bench.kind]).fetchone()[0])
            has_b.set()
            ours_has_a.wait(10)
            wait_for_ours()

    thread = threading.Thread(target=other)

    def work():
        if bench.kind == "postgres":
            bench.db.execute_sql("SET LOCAL deadlock_timeout = '10ms'")
        bench.update("a")
        ours_has_a.set()
        eventually(other_waits, message="the other one does not wait")
        bench.update("b")

    thread.start()
    has_b.wait(10)
    try:
        assert told_to_try_again(bench.request(work))
    finally:
        ours_has_a.set()
        thread.join(20)
    assert not errors
    assert {bench.values()[name] for name in "ab"} == {10}


@on(*POSTGRES)
def test_a_serialization_failure_at_the_commit(bench):
    """Each has read what the other writes; who commits second is refused."""

    def read_and_write(database, model, name):
        database.execute_sql("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        assert model.select(peewee.fn.SUM(model.value)).scalar() == 0
        model.create(name=name)

    def work():
        read_and_write(bench.db, bench.Row, "ours")
        with bench.other.atomic():
            read_and_write(bench.other, bench.OtherRow, "other")

    assert told_to_try_again(bench.request(work))
    assert set(bench.values()) == {"a", "b", "other"}


@on(*SQLITE)
def test_a_database_that_is_locked_at_the_commit(bench):
    """Somebody reads: what is written may not reach the file."""
    bench.other.execute_sql("PRAGMA journal_mode = delete").fetchone()

    def work():
        bench.update("a")

    with bench.other.atomic():
        assert bench.values() == {"a": 0, "b": 0}
        assert told_to_try_again(bench.request(work))
    assert bench.values() == {"a": 0, "b": 0}
    assert bench.request(work).status_code == 200
    assert bench.values() == {"a": 1, "b": 0}


@on("mysql", "aiomysql", "postgres", "psycopg", "asyncpg")
@pytest.mark.parametrize("after", ["statement", "handled", "commit"])
def test_a_connection_lost_between_two_statements(bench, after):
    """Told by the next statement; by the COMMIT, though the application has handled what that said; by the COMMIT alone."""

    def work():
        session = bench.db.execute_sql(SESSION[bench.kind]).fetchone()[0]
        bench.update("a")
        bench.place.kill_sessions(session)
        if after != "commit":
            with contextlib.suppress(peewee.PeeweeException if after == "handled" else ()):
                bench.update("b")

    assert told_to_try_again(bench.request(work))
    assert bench.values() == {"a": 0, "b": 0}


def test_flask_and_wsgi_say_the_same(make_place):
    """The COMMIT of an atomic request, seen by Flask's handlers, and outside a framework that has none."""
    from flask import Flask

    bench = Bench("sqlite", make_place("sqlite"))
    bench.other.execute_sql("PRAGMA journal_mode = delete").fetchone()
    app = Flask("contention")
    flask_adapter.Peewee(bench.db, transaction=True, errors=True, check="off").init_app(app)

    @app.get("/")
    def view():
        bench.update("a")
        return "done"

    def application(_environ, start_response):
        bench.update("a")
        start_response("200 OK", [])
        return [b"done"]

    told = []
    middleware = wsgi.PeeweeMiddleware(application, bench.db, transaction=True, errors=True, check="off")
    with bench.other.atomic():
        bench.values()
        response = app.test_client().get("/")
        body = middleware(
            {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, lambda status, headers, *_: told.append((status, headers))
        )
        list(body)
        getattr(body, "close", list)()
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert told[0][0].startswith("503 ")
    assert ("Retry-After", "1") in told[0][1]
    assert bench.values() == {"a": 0, "b": 0}
    bench.other.close_all()
    bench.db.pool.close()
