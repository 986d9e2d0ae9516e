"""Starlette's adapter: where it puts itself, what it starts and stops, what it answers.

What all frameworks have in common is in contract/; here is what only Starlette has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flask
import httpx2
import peewee
import pytest
from playhouse.pool import PooledSqliteDatabase
from playhouse.pwasyncio import AsyncSqliteDatabase
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route, Router, WebSocketRoute
from starlette.testclient import TestClient

from peewee_frameworks import (
    ConfigurationError,
    DatabaseUnavailable,
    PoolTimeout,
    ScopeEnded,
    connection_scope,
    current_scope,
)
from peewee_frameworks.aio.psycopg import AsyncPsycopgDatabase
from peewee_frameworks.pool import PooledPostgresqlDatabase
from peewee_frameworks.pool import PooledSqliteDatabase as MemoryPool
from peewee_frameworks.starlette import Peewee
from tests.adapters.contract.apps.work import make_models
from tests.support.concurrency import eventually


@pytest.fixture
def sqlite(make_place):
    database = make_place("sqlite").make_database(timeout=2)
    yield database
    database.close_all()


@pytest.fixture
def item(database):
    return make_item(database)


def make_item(database, *, create=True):
    class Item(peewee.Model):
        name = peewee.CharField(64, unique=True)

        class Meta:
            pass

    Item.bind(database)
    if create:
        with connection_scope(database):
            database.create_tables([Item])
    return Item


def value(database, text="1"):
    return str(peewee.Select([], [peewee.Value(text).alias("v")]).bind(database).scalar())


def count(item):
    with connection_scope(item._meta.database):
        return item.select().count()


def in_use(database):
    return len(database._in_use)


def everything_is_back(orm, database):
    """Nothing is in use; what a loop hands to another thread may take a moment."""
    eventually(lambda: in_use(database) == 0, message="a connection is still in use")
    assert not orm.runtime.in_flight()
    return True


# -- the ways of installing it ------------------------------------------------------------------------------------------


def install_both(database, routes, **kwargs):
    orm = Peewee(database, transaction=True)
    return orm, Starlette(routes=routes, lifespan=orm.lifespan(), middleware=[orm.middleware()], **kwargs)


def install_lifespan_only(database, routes, **kwargs):
    orm = Peewee(database, transaction=True)
    return orm, Starlette(routes=routes, lifespan=orm.lifespan(), **kwargs)


def install_init_app(database, routes, **kwargs):
    orm = Peewee(database, transaction=True)
    app = Starlette(routes=routes, **kwargs)
    orm.init_app(app)
    return orm, app


def install_twice_over(database, routes, **kwargs):
    orm = Peewee(database, transaction=True)
    app = Starlette(routes=routes, lifespan=orm.lifespan(), middleware=[orm.middleware()], **kwargs)
    orm.init_app(app)
    return orm, app


EVERY_WAY = pytest.mark.parametrize(
    "install", [install_both, install_lifespan_only, install_init_app, install_twice_over]
)


@EVERY_WAY
def test_a_500_handler_queries_in_the_scope_of_the_request(install, database):
    """Handlers for 500 live outside all of Starlette's middleware, and still share the request's scope."""
    scopes = []

    def fail(request):
        scopes.append(current_scope())
        value(database)
        raise RuntimeError("asked for")

    def handler(request, error):
        scopes.append(current_scope())
        return PlainTextResponse(value(database, "handled"), 500)

    orm, app = install(database, [Route("/", fail)], exception_handlers={500: handler})
    with TestClient(app, raise_server_exceptions=False) as client:
        response = client.get("/")
        assert (response.status_code, response.text) == (500, "handled")
        assert everything_is_back(orm, database)
    assert scopes[0] is scopes[1] is not None


@EVERY_WAY
def test_an_atomic_request_commits_or_rolls_back_whichever_way_it_was_installed(install, database, item):
    """An error status rolls back, and nothing is done twice where two ways are combined."""

    def create(request):
        item.create(name=request.path_params["name"])
        return PlainTextResponse("", int(request.query_params["status"]))

    orm, app = install(database, [Route("/{name}", create)])
    with TestClient(app) as client:
        assert client.get("/good?status=200").status_code == 200
        assert client.get("/bad?status=409").status_code == 409
        assert everything_is_back(orm, database)
    with connection_scope(database):
        assert [row.name for row in item] == ["good"]


def make_part(item):
    class Part(peewee.Model):
        of = peewee.ForeignKeyField(item, deferrable="INITIALLY DEFERRED")

    Part.bind(item._meta.database)
    return Part


@EVERY_WAY
@pytest.mark.parametrize("make_error", [False, True], ids=["answered by default", "answered by a 500 handler"])
def test_a_commit_that_fails_is_an_error_response(install, make_error, make_place):
    """A deferred constraint fails at COMMIT: before the first byte, so the client sees 500 and the handler is asked."""
    database = make_place("postgres").make_database()
    item = make_item(database)
    part = make_part(item)
    with connection_scope(database):
        database.create_tables([part])

    def create(request):
        part.create(of=-1)
        return PlainTextResponse("created", 201)

    def handler(request, error):
        assert isinstance(error, peewee.IntegrityError)
        return PlainTextResponse(value(database, "sorry"), 500)

    handlers: Any = {Exception: handler} if make_error else {}
    orm, app = install(database, [Route("/", create)], exception_handlers=handlers)
    try:
        with TestClient(app, raise_server_exceptions=False) as client:
            response = client.get("/")
            assert response.status_code == 500
            assert response.text == ("sorry" if make_error else "Internal Server Error")
            assert everything_is_back(orm, database)
        assert count(part) == 0
    finally:
        database.close_all()


def test_init_app_twice_is_refused(sqlite):
    """… but one instance on two applications is not."""
    orm = Peewee(sqlite)
    app, other = Starlette(), Starlette()
    orm.init_app(app)
    orm.init_app(other)
    with pytest.raises(ConfigurationError, match="init_app\\(\\) was called twice on the Starlette application"):
        orm.init_app(app)


def test_init_app_on_an_application_that_runs_is_refused(sqlite):
    """It could not install anything any more."""
    app = Starlette()
    with TestClient(app), pytest.raises(ConfigurationError, match="has started already"):
        Peewee(sqlite).init_app(app)


def test_without_a_database_init_app_says_where_to_name_one(monkeypatch):
    """Neither keyword nor environment names a database."""
    for key in ("DATABASE_URL", "PEEWEE_DATABASE"):
        monkeypatch.delenv(key, raising=False)
    orm = Peewee()
    with pytest.raises(ConfigurationError, match="No database"):
        orm.init_app(Starlette())
    with pytest.raises(ConfigurationError, match="init_app"):
        orm.database.execute_sql("select 1")
    with pytest.raises(ConfigurationError, match="not known yet"):
        orm["default"]


def test_the_environment_names_the_database(monkeypatch, make_place):
    """A model may be bound before: to the stand-in that becomes the database."""
    monkeypatch.setenv("DATABASE_URL", make_place("sqlite").pool_url(max_connections=5))
    orm = Peewee()

    class Note(orm.Model):
        text = peewee.TextField()

    def create(request):
        Note.create(text="hello")
        return PlainTextResponse(Note.get().text)

    app = Starlette(routes=[Route("/", create)], lifespan=orm.lifespan(), middleware=[orm.middleware()])

    def create_tables():
        with orm.scope():
            orm.database.create_tables([Note])

    with TestClient(app) as client:
        create_tables()
        assert client.get("/").text == "hello"
        assert everything_is_back(orm, orm.database)
    orm.database.close_all()


# -- lifespan -----------------------------------------------------------------------------------------------------------


def test_what_the_application_does_at_start_and_end_holds_no_connection_meanwhile(database, item):
    """Startup and shutdown code run in a scope each; the state it yields reaches the requests."""
    orm = Peewee(database)
    told = []

    @contextlib.asynccontextmanager
    async def mine(app):
        item.create(name="start")
        told.append(current_scope().label)
        yield {"greeting": "hello"}
        item.create(name="end")
        told.append(current_scope().label)

    def greet(request):
        return PlainTextResponse(request.state.greeting)

    app = Starlette(routes=[Route("/", greet)], lifespan=orm.lifespan(mine))
    with TestClient(app) as client:
        assert everything_is_back(orm, database)
        assert client.get("/").text == "hello"
    assert told == ["the application's start", "the application's end"]
    assert everything_is_back(orm, database)
    assert count(item) == 2


def test_init_app_goes_in_front_of_the_lifespan_the_application_has(sqlite):
    """Tables exist when the application's own startup runs, and a router that comes later is no exception."""
    item = make_item(sqlite, create=False)
    orm = Peewee(sqlite, create_tables=[item])

    @contextlib.asynccontextmanager
    async def mine(app):
        item.create(name="mine")
        yield

    app = Starlette(lifespan=mine)
    orm.init_app(app)
    with TestClient(app):
        assert everything_is_back(orm, sqlite)
    assert count(item) == 1


@pytest.mark.parametrize("by_init_app", [False, True])
def test_a_startup_that_fails_stops_the_databases_again(by_init_app, sqlite):
    """Its own error comes through."""
    orm = Peewee(sqlite)

    @contextlib.asynccontextmanager
    async def mine(app):
        value(sqlite)
        raise LookupError("asked for")
        yield

    app = Starlette(lifespan=mine if by_init_app else orm.lifespan(mine))
    if by_init_app:
        orm.init_app(app)
    with pytest.raises(LookupError), TestClient(app):
        pass
    assert everything_is_back(orm, sqlite)
    assert orm.runtime._lifecycle.applications == 0


def test_a_database_that_is_down_stops_the_start(tmp_path):
    """The message names the alias, the database and the remedy."""
    orm = Peewee(peewee.SqliteDatabase(tmp_path / "nowhere" / "file.db"))
    app = Starlette(lifespan=orm.lifespan())
    with (
        pytest.raises(peewee.OperationalError, match=r"Database 'default'.*cannot be reached at start"),
        TestClient(app),
    ):
        pass


@pytest.mark.parametrize("kind", [PooledPostgresqlDatabase, AsyncPsycopgDatabase])
def test_an_option_that_libpq_does_not_know_is_no_database_that_is_down(kind):
    """Nothing has been asked of a server, and to start one would not help."""
    app = Starlette(lifespan=Peewee({"archive": kind("d", host="127.0.0.1", hots="h")}, check="warn").lifespan())
    expected = r"Database 'archive'.*its driver does not take the arguments .*invalid connection option \"hots\""
    with pytest.raises(ConfigurationError, match=expected), TestClient(app):
        pass


def test_a_start_that_finds_the_only_connection_in_use_says_who_has_it(tmp_path):
    """As in a test whose fixture has queried; the database is there."""
    database = MemoryPool(":memory:")
    orm = Peewee(database)
    database.execute_sql("SELECT 1")
    told = r"no connection to spare at start.*In a script or a test: db\.close\(\)"
    with pytest.raises(DatabaseUnavailable, match=told) as caught, TestClient(Starlette(lifespan=orm.lifespan())):
        pass
    assert "Start it" not in str(caught.value)
    database.close_all()


@pytest.mark.parametrize("kind", [peewee.SqliteDatabase, AsyncSqliteDatabase])
def test_an_argument_that_the_driver_does_not_take_is_told_with_its_database(tmp_path, kind):
    """The driver's own message names the argument, and no more."""
    app = Starlette(lifespan=Peewee({"archive": kind(str(tmp_path / "file.db"), timeuot=3)}).lifespan())
    expected = r"Database 'archive', .*file\.db'\): its driver does not take the arguments .*'timeuot'"
    with pytest.raises(ConfigurationError, match=expected), TestClient(app):
        pass


@pytest.mark.parametrize("served", [False, True], ids=["before the first start", "between two starts"])
def test_a_proxy_that_is_initialised_anew_is_followed(tmp_path, served):
    """A test's database takes the place of the real one, in an application that was made with that."""
    real, mine = (PooledSqliteDatabase(str(tmp_path / f"{name}.db")) for name in ("real", "mine"))
    proxy = peewee.DatabaseProxy()
    proxy.initialize(real)

    class Note(peewee.Model):
        text = peewee.TextField()

        class Meta:
            database = proxy

    orm = Peewee(proxy, create_tables=[Note], transaction=True)

    def write(request):
        Note.create(text="x")
        return PlainTextResponse(f"{proxy.in_transaction()} {Note.select().count()}")

    app = Starlette(routes=[Route("/", write)], lifespan=orm.lifespan(), middleware=[orm.middleware()])
    if served:
        with TestClient(app) as client:
            assert client.get("/").text == "True 1"
    proxy.initialize(mine)
    with TestClient(app) as client:
        assert client.get("/").text == "True 1"
    assert not mine._in_use
    assert not real._in_use
    real.close_all()
    mine.close_all()


def test_with_check_warn_it_starts_anyway(tmp_path, caplog):
    """… and says so in the log."""
    orm = Peewee(peewee.SqliteDatabase(tmp_path / "nowhere" / "file.db"), check="warn", errors=True)

    def query(request):
        return PlainTextResponse(value(orm.database))

    app = Starlette(routes=[Route("/", query)])
    orm.init_app(app)
    with caplog.at_level(logging.WARNING, "peewee_frameworks"), TestClient(app) as client:
        response = client.get("/")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
    assert "cannot be reached at start" in caplog.text
    assert "check='warn'" not in caplog.text  # that it has


def test_two_applications_share_an_instance_and_the_last_to_stop_closes_the_pool(sqlite):
    """One that stops does not take the connections from the other."""
    orm = Peewee(sqlite)

    def query(request):
        return PlainTextResponse(value(sqlite))

    first, second = Starlette(routes=[Route("/", query)]), Starlette(routes=[Route("/", query)])
    orm.init_app(first)
    orm.init_app(second)
    with TestClient(second) as client:
        with TestClient(first) as other:
            other.get("/")
        assert client.get("/").text == "1"
        eventually(lambda: in_use(sqlite) == 0)
        assert len(sqlite._connections) == 1
    assert len(sqlite._connections) == 0


def test_an_application_starts_again_after_it_has_stopped(database):
    """As with a TestClient for each test."""
    orm, app = install_both(database, [Route("/", lambda request: PlainTextResponse(value(database)))])
    for _ in range(3):
        with TestClient(app) as client:
            assert [client.get("/").text for _ in range(3)] == ["1"] * 3
            assert everything_is_back(orm, database)


# -- other middleware ---------------------------------------------------------------------------------------------------


class Passing(BaseHTTPMiddleware):
    """Does nothing but what such middleware does: it runs the application in a task of its own."""

    async def dispatch(self, request, call_next):
        return await call_next(request)


class Touching(BaseHTTPMiddleware):
    """Queries on the way in and out, as somebody's authentication or audit does, in a task of its own."""

    def __init__(self, app, orm, seen):
        super().__init__(app)
        self.orm = orm
        self.seen = seen

    async def dispatch(self, request, call_next):
        self.seen.append(current_scope())
        await self.orm.run(value, self.orm.database)
        response = await call_next(request)
        self.seen.append(current_scope())
        await self.orm.run(value, self.orm.database)
        return response


@pytest.mark.parametrize("position", ["above", "below"])
def test_base_http_middleware_shares_the_scope_of_the_request(database, position):
    """It runs the application in another task, and its own second half before body and background tasks."""
    orm = Peewee(database)
    seen: list[Any] = []
    done = threading.Event()

    async def body():
        for number in "123":
            seen.append(current_scope())
            yield await orm.run(value, database, number)

    async def background():
        seen.append(current_scope())
        await orm.run(value, database)
        done.set()

    def endpoint(request):
        seen.append(current_scope())
        return StreamingResponse(body(), background=BackgroundTask(background))

    touching = Middleware(Touching, orm, seen)
    order = [touching, orm.middleware()] if position == "above" else [orm.middleware(), touching]
    app = Starlette(routes=[Route("/", endpoint)], middleware=order, lifespan=orm.lifespan())
    with TestClient(app) as client:
        assert client.get("/").text == "123"
        assert done.wait(5)
        assert everything_is_back(orm, database)
    assert len(seen) == 7
    assert len(set(seen)) == 1
    assert None not in seen


def test_a_body_that_idles_holds_no_connection(database):
    """Between two parts the connection is back in the pool; the next part takes one again."""
    orm = Peewee(database)
    held = []

    async def body():
        for number in "123":
            yield await orm.run(value, database, number)
            held.append(in_use(database))

    app = Starlette(routes=[Route("/", lambda request: StreamingResponse(body()))])
    orm.init_app(app)
    with TestClient(app) as client:
        assert client.get("/").text == "123"
        assert everything_is_back(orm, database)
    assert held == [0, 0, 0]


@pytest.mark.parametrize("kind", ["stream", "websocket"])
def test_who_asks_in_vain_and_waits_holds_no_connection(kind, database):
    """A stream, or a child of a websocket, that polls: nothing is sent after the query, so nothing else would release."""
    orm = Peewee(database)
    asked, go_on = threading.Event(), threading.Event()

    async def poll():
        assert await orm.run(value, database) == "1"
        asked.set()
        await asyncio.to_thread(go_on.wait, 30)

    async def body():
        yield "first"
        await poll()

    async def talk(socket):
        await socket.accept()
        child = asyncio.create_task(poll())
        await socket.receive_text()
        await child

    async def stream(request):
        return StreamingResponse(body())

    app = Starlette(
        routes=[Route("/stream", stream), WebSocketRoute("/websocket", talk)],
        middleware=[orm.middleware()],
        lifespan=orm.lifespan(),
    )
    with TestClient(app) as client, ThreadPoolExecutor(1) as threads:
        if kind == "stream":
            answer = threads.submit(client.get, "/stream")
            assert asked.wait(10)
            eventually(lambda: in_use(database) == 0, 5)
            go_on.set()
            assert answer.result(10).text == "first"
        else:
            with client.websocket_connect("/websocket") as socket:
                assert asked.wait(10)
                eventually(lambda: in_use(database) == 0, 5)
                go_on.set()
                socket.send_text("bye")
        assert everything_is_back(orm, database)


# -- policy -------------------------------------------------------------------------------------------------------------


def test_exclude_takes_paths_route_names_and_predicates_of_the_request(sqlite):
    """An excluded request is neither connected eagerly nor atomic; its queries work all the same."""
    orm = Peewee(
        sqlite,
        connect="eager",
        transaction=True,
        exclude=["/static/*", "health", "admin", lambda request: request.headers.get("x-plain") == "1"],
    )

    def tell(request):
        connected, atomic = in_use(sqlite) > 0, sqlite.in_transaction()
        return JSONResponse([connected, atomic, value(sqlite)])

    app = Starlette(
        routes=[
            Route("/", tell),
            Route("/healthz/{probe}", tell, name="health"),
            Route("/static/{name}", tell),
            Mount("/internal", routes=[Route("/users", tell)], name="admin"),
        ],
    )
    orm.init_app(app)
    with TestClient(app) as client:
        assert client.get("/").json() == [True, True, "1"]
        assert client.post("/healthz/live").status_code == 405
        for path, headers in [
            ("/healthz/live", {}),
            ("/static/x", {}),
            ("/internal/users", {}),
            ("/", {"x-plain": "1"}),
        ]:
            assert client.get(path, headers=headers).json() == [False, False, "1"], path
        assert everything_is_back(orm, sqlite)


def test_transaction_may_be_a_function_of_the_request(database, item):
    """Writes are atomic here, reads are not."""
    orm = Peewee(database, transaction=lambda request: request.method == "POST")

    def create(request):
        item.create(name=request.method)
        return PlainTextResponse("", 500)

    app = Starlette(routes=[Route("/", create, methods=["GET", "POST"])])
    orm.init_app(app)
    with TestClient(app) as client:
        client.get("/")
        client.post("/")
        assert everything_is_back(orm, database)
    with connection_scope(database):
        assert [row.name for row in item] == ["GET"]


# -- errors -------------------------------------------------------------------------------------------------------------


def error_routes(database, item):
    def missing(request):
        item.get(item.name == "nobody")

    def duplicate(request):
        item.create(name="one")
        item.create(name="one")

    def wrong(request):
        database.execute_sql("selekt 1")

    def exhausted(request):
        with contextlib.ExitStack() as stack:
            for _ in range(6):
                stack.enter_context(connection_scope(database)).connect()

    return [
        Route("/missing", missing),
        Route("/duplicate", duplicate),
        Route("/wrong", wrong),
        Route("/exhausted", exhausted),
    ]


@pytest.mark.parametrize("way", ["init_app", "lifespan", "both in a list"])
def test_errors_answers_as_the_application_answers_http_exceptions(make_place, way):
    """503 with Retry-After, 404, 409, through CORS and the application's own HTTPException handler."""
    database = make_place("sqlite").make_database(timeout=0.05)
    item = make_item(database)

    async def teapot(request, error):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    orm = Peewee(database, errors=True)
    app = Starlette(
        routes=error_routes(database, item),
        exception_handlers={HTTPException: teapot},
        middleware=[
            *([orm.middleware()] if way == "both in a list" else []),
            Middleware(CORSMiddleware, allow_origins=["*"]),
        ],
        lifespan=None if way == "init_app" else orm.lifespan(),
    )
    if way == "init_app":
        orm.init_app(app)
    with TestClient(app, raise_server_exceptions=False, headers={"origin": "http://elsewhere"}) as client:
        for path, status in [("/missing", 404), ("/duplicate", 409), ("/wrong", 500), ("/exhausted", 503)]:
            response = client.get(path)
            assert response.status_code == status, path
            if status != 500:
                assert set(response.json()) == {"error"}
                assert response.headers["access-control-allow-origin"] == "*"
            assert ("retry-after" in response.headers) == (status == 503)
        assert everything_is_back(orm, database)
    database.close_all()


def test_errors_asks_a_handler_that_is_an_object(sqlite):
    """Starlette takes one, too."""

    class Handler:
        async def __call__(self, request, error):
            return PlainTextResponse(f"mine: {error.status_code}", error.status_code)

    item = make_item(sqlite)
    orm = Peewee(sqlite, errors=True)
    app = Starlette(routes=error_routes(sqlite, item), exception_handlers={HTTPException: Handler()})
    orm.init_app(app)
    with TestClient(app) as client:
        assert client.get("/missing").text == "mine: 404"


def test_errors_does_not_override_the_applications_own_handlers(sqlite):
    """Neither one for the class nor one for a class above it, registered after init_app."""
    item = make_item(sqlite)
    orm = Peewee(sqlite, errors=True)
    app = Starlette(routes=error_routes(sqlite, item))
    orm.init_app(app)
    app.add_exception_handler(item.DoesNotExist, lambda request, error: PlainTextResponse("mine", 410))
    app.add_exception_handler(peewee.DatabaseError, lambda request, error: PlainTextResponse("mine", 422))
    with TestClient(app, raise_server_exceptions=False) as client:
        assert [client.get(path).status_code for path in ("/missing", "/duplicate", "/wrong")] == [410, 422, 422]


def test_without_the_option_errors_are_the_applications_own(sqlite):
    """The default: nothing is answered in its stead."""
    item = make_item(sqlite)
    orm = Peewee(sqlite)
    app = Starlette(routes=error_routes(sqlite, item))
    orm.init_app(app)
    with TestClient(app, raise_server_exceptions=False) as client:
        assert [client.get(path).status_code for path in ("/missing", "/duplicate")] == [500, 500]


# -- several ------------------------------------------------------------------------------------------------------------


def test_two_instances_on_one_application_each_keep_their_options(make_place):
    """One database is atomic, the other is not, and a failure rolls back the first only."""
    one, two = make_place("sqlite").make_database(), make_place("sqlite").make_database()
    first, second = make_item(one), make_item(two)
    atomic, plain = Peewee(one, transaction=True), Peewee(two)

    def create(request):
        first.create(name="x")
        second.create(name="x")
        return PlainTextResponse(f"{one.in_transaction()} {two.in_transaction()}", 500)

    for order in ([atomic, plain], [plain, atomic]):
        for install in ("init_app", "middleware"):
            if install == "init_app":
                app = Starlette(routes=[Route("/", create)])
                for orm in order:
                    orm.init_app(app)
            else:
                app = Starlette(routes=[Route("/", create)], middleware=[orm.middleware() for orm in order])
            with TestClient(app) as client:
                assert client.get("/").text == "True False"
                assert everything_is_back(atomic, one)
                assert everything_is_back(plain, two)
            assert (count(first), count(second)) == (0, 1)
            with connection_scope(two):
                second.delete().execute()
    one.close_all()
    two.close_all()


def failing(how, debug, handler, calls):
    """An application that fails before or amid its response, or after it."""

    async def endpoint(request):
        if how == "before":
            raise ZeroDivisionError("mine")
        if how == "background":
            return PlainTextResponse("whole", background=BackgroundTask(fail))
        return StreamingResponse(parts())

    async def parts():
        yield b"half"
        raise ZeroDivisionError("mine")

    def fail():
        raise ZeroDivisionError("mine")

    def answer(request, error):
        calls.append(str(error))
        return PlainTextResponse("sorry", 500)

    async def answer_async(request, error):
        return answer(request, error)

    handlers = {None: {}, "sync": {500: answer}, "async": {Exception: answer_async}}[handler]
    return Starlette(debug=debug, routes=[Route("/", endpoint)], exception_handlers=handlers)


async def sent_by(app):
    """What the application sends, and what it raises."""
    messages = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        messages.append({**message, "headers": [*message.get("headers", ())]})

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b"", "server": ("t", 80)}
    scope["asgi"] = {"spec_version": "2.4"}  # with an older one a stream waits for the end of the connection too
    with pytest.raises(ZeroDivisionError, match="mine") as raised:
        await app(scope, receive, send)
    return messages, raised.traceback[-1].name, {key for key in scope if "peewee" in key and scope[key] is not None}


@pytest.mark.parametrize("how", ["before", "amid", "background"])
@pytest.mark.parametrize("handler", [None, "sync", "async"])
@pytest.mark.parametrize("debug", [False, True])
def test_an_unhandled_error_is_answered_as_without_us(sqlite, how, handler, debug):
    """Starlette's outermost layer is called only when there is an error; it answers, logs and raises what it always does."""
    called, called_bare = [], []
    app = failing(how, debug, handler, called)
    Peewee(sqlite).init_app(app)
    messages, where, left = asyncio.run(sent_by(app))
    bare, where_bare, _ = asyncio.run(sent_by(failing(how, debug, handler, called_bare)))
    assert (where, left) == (where_bare, set())
    assert called == called_bare
    assert len(called) == (0 if debug or handler is None else 1)
    if debug and how == "before":  # a page with a traceback, ours being another
        assert [message["type"] for message in messages] == [message["type"] for message in bare]
        assert messages[0]["status"] == 500
        assert b"mine" in messages[1]["body"]
    else:
        assert messages == bare


@pytest.mark.parametrize("instrumented", [False, True])
@pytest.mark.parametrize("handled", ["by its class", "as 500"])
def test_an_error_handler_is_in_the_transaction_that_failed_its_background_task_not(
    database, item, handled, instrumented
):
    """So that a row about the error can be kept, on SQLite too, where a second writer would wait in vain."""

    def fail(request):
        item.create(name="half")
        raise LookupError("mine")

    def handler(request, error):
        assert item.select().count() == 1
        item.create(name="of the handler")
        return PlainTextResponse("sorry", 500, background=BackgroundTask(item.create, name="kept"))

    handlers = {LookupError if handled == "by its class" else 500: handler}
    app = Starlette(routes=[Route("/", fail)], exception_handlers=handlers)
    orm = Peewee(database, transaction=True)
    orm.init_app(app)
    if instrumented:
        app.middleware_stack = outermost = app.build_middleware_stack()
        outermost.app = Layer(outermost.app)
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/").text == "sorry"
        everything_is_back(orm, database)
        with connection_scope(database):
            assert [row.name for row in item.select()] == ["kept"]


@pytest.mark.parametrize("how", ["before", "amid", "background"])
@pytest.mark.parametrize("instances", ["the same", "two", "outer", "inner"])
def test_an_unhandled_error_of_a_mounted_application_is_answered_once(make_place, how, instances):
    """Each application has such a layer of its own; whichever of them has a `Peewee`."""

    def mount(inner):
        return Starlette(routes=[Mount("/", inner)])

    databases = [make_place("sqlite").make_database(timeout=2) for _ in range(2)]
    called, called_bare = [], []
    inner = failing(how, False, "sync", called)
    outer = mount(inner)
    orm = Peewee(databases[0])
    if instances != "inner":
        orm.init_app(outer)
    if instances != "outer":
        (orm if instances == "the same" else Peewee(databases[1])).init_app(inner)
    assert asyncio.run(sent_by(outer)) == asyncio.run(sent_by(mount(failing(how, False, "sync", called_bare))))
    assert called == called_bare
    for database in databases:
        database.close_all()


def test_who_looks_for_starlettes_outermost_layer_finds_it(sqlite):
    """As instrumentation does; what it then does to it, see "other layers about ours"."""
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok"))])
    Peewee(sqlite).init_app(app)
    assert isinstance(app.build_middleware_stack(), ServerErrorMiddleware)


@pytest.fixture
def spoiled(make_place):
    """A database, and an endpoint whose COMMIT will fail."""
    database = make_place("sqlite").make_database(timeout=2, pragmas={"foreign_keys": 1})
    item, part = make_models(database)
    with connection_scope(database):
        database.create_tables([item, part])

    def spoil(request):
        part.create(item=-1)
        return PlainTextResponse("ok")

    yield database, spoil
    assert not in_use(database)
    database.close_all()


@pytest.mark.parametrize("mounted", [False, True])
def test_a_commit_that_fails_is_answered_by_the_instance_that_made_it(mounted, spoiled):
    """… though it comes out through another one's layer, whose handlers believe that the response has started."""
    database, spoil = spoiled
    inner = Starlette(routes=[Route("/spoil", spoil)])
    Peewee(database).init_app(inner)
    app = Starlette(routes=[Mount("/in", inner)]) if mounted else inner
    Peewee(database, transaction=True, errors=True).init_app(app)
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/in/spoil" if mounted else "/spoil").status_code == 409


def test_one_instance_may_serve_several_databases_by_alias(make_place):
    """`orm["alias"]` finds them; the first is the default."""
    shop, reports = make_place("sqlite").make_database(), make_place("sqlite").make_database()
    orm = Peewee({"shop": shop, "reports": reports})
    assert orm.database is shop
    assert orm["reports"] is reports
    assert orm.databases == {"shop": shop, "reports": reports}
    with pytest.raises(ConfigurationError, match="No database 'report'; there are: shop, reports"):
        orm["report"]

    def query(request):
        return PlainTextResponse(value(shop) + value(reports) + f" {in_use(shop)} {in_use(reports)}")

    app = Starlette(routes=[Route("/", query)], middleware=[orm.middleware()], lifespan=orm.lifespan())
    with TestClient(app) as client:
        assert client.get("/").text == "11 1 1"
        assert everything_is_back(orm, shop)
        assert everything_is_back(orm, reports)
    shop.close_all()
    reports.close_all()


@pytest.mark.parametrize("inner", ["same instance", "own instance", "own database"])
def test_a_mounted_application_shares_the_scope(inner, make_place):
    """One scope, not two, for one database; the mounted application's own options hold below it."""
    database = make_place("sqlite").make_database()
    mounted = make_place("sqlite").make_database() if inner == "own database" else database
    item = make_item(mounted)
    outer_orm = Peewee(database)
    inner_orm = outer_orm if inner == "same instance" else Peewee(mounted, transaction=True)
    scopes = []

    def above(request):
        with inner_orm.scope() if inner == "own database" else contextlib.nullcontext():
            item.create(name="above")
            return PlainTextResponse(str(mounted.in_transaction()), 500)

    def below(request):
        scopes.append(current_scope())
        value(database)
        item.create(name="below")
        return PlainTextResponse(f"{in_use(database)} {mounted.in_transaction()}", 500)

    class Outside:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            if scope["type"] == "http":
                scopes.append(current_scope())
            await self.app(scope, receive, send)

    sub = Starlette(routes=[Route("/", below)], middleware=[inner_orm.middleware()])
    app = Starlette(
        routes=[Mount("/sub", sub), Route("/", above)],
        middleware=[outer_orm.middleware(), Middleware(Outside)],
        lifespan=outer_orm.lifespan(),
    )
    with TestClient(app) as client:
        assert client.get("/sub/").text == ("1 False" if inner == "same instance" else "1 True")
        assert (scopes[0] is scopes[1]) == (inner != "own database")
        assert client.get("/").text == "False"
        assert everything_is_back(outer_orm, database)
        assert everything_is_back(inner_orm, mounted)
    with connection_scope(mounted):
        expected = ["below", "above"] if inner == "same instance" else ["above"]
        assert [row.name for row in item] == expected
    database.close_all()
    mounted.close_all()


def test_a_mounted_application_between_two_other_instances_is_atomic_on_its_own_database(make_place):
    """The scope of its database is found behind the one that lies in between."""
    one, two = make_place("sqlite").make_database(), make_place("sqlite").make_database()

    def tell(request):
        value(one), value(two)
        return PlainTextResponse(f"{one.in_transaction()} {two.in_transaction()}")

    sub = Starlette(routes=[Route("/", tell)], middleware=[Peewee(one, transaction=True).middleware()])
    app = Starlette(routes=[Mount("/sub", sub)], middleware=[Peewee(one).middleware(), Peewee(two).middleware()])
    assert TestClient(app).get("/sub/").text == "True False"
    eventually(lambda: in_use(one) + in_use(two) == 0)
    one.close_all()
    two.close_all()


def test_middleware_works_on_a_router_and_a_mount_too(sqlite):
    """Starlette takes middleware there as well; the rest of the application has no scope."""
    orm = Peewee(sqlite, transaction=True, exclude=["/plain/*"])

    def tell(request):
        scope = current_scope()
        return PlainTextResponse(
            f"{scope is not None} {scope is not None and sqlite.connect() and sqlite.in_transaction()}"
        )

    plain = Route("/outside", lambda request: PlainTextResponse(str(current_scope())))
    mount = Mount("/in", routes=[Route("/side", tell)], middleware=[orm.middleware()])
    with TestClient(Starlette(routes=[mount, plain])) as client:
        assert client.get("/in/side").text == "True True"
        assert client.get("/outside").text == "None"
    with TestClient(Router(routes=[Route("/side", tell)], middleware=[orm.middleware()])) as client:
        assert client.get("/side").text == "True True"
    assert everything_is_back(orm, sqlite)


# -- without the lifespan -----------------------------------------------------------------------------------------------


def test_a_test_client_without_lifespan_runs_each_request_on_a_new_loop(database):
    """Nothing is started and nothing is needed to be; `orm.run` follows from loop to loop."""
    orm = Peewee(database)
    loops = set()

    async def query(request):
        loops.add(asyncio.get_running_loop())
        return PlainTextResponse(await orm.run(value, database, request.path_params["text"]))

    app = Starlette(routes=[Route("/{text}", query)])
    orm.init_app(app)
    client = TestClient(app)
    assert [client.get(f"/{number}").text for number in range(4)] == ["0", "1", "2", "3"]
    assert len(loops) == 4
    assert everything_is_back(orm, database)
    orm.runtime.stop()


@pytest.mark.anyio
async def test_asgi_transport_serves_concurrent_requests_in_the_callers_loop(database):
    """40 requests on a pool of 5, sync endpoints in threads beside `orm.run`, each with its own answer."""
    orm = Peewee(database)

    def sync(request):
        return PlainTextResponse(value(database, request.path_params["text"]))

    async def run(request):
        return PlainTextResponse(await orm.run(value, database, request.path_params["text"]))

    app = Starlette(routes=[Route("/sync/{text}", sync), Route("/run/{text}", run)])
    orm.init_app(app)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        paths = [f"/{('sync', 'run')[n % 2]}/{n}" for n in range(40)]
        async with asyncio.timeout(30):
            responses = await asyncio.gather(*(client.get(path) for path in paths))
    assert [response.text for response in responses] == [str(n) for n in range(40)]
    assert everything_is_back(orm, database)
    orm.runtime.stop()


def test_the_scope_of_a_test_around_the_client_is_not_the_requests(sqlite):
    """The application inherits the test's context variables, and opens its own scope all the same."""
    orm = Peewee(sqlite)
    seen = []

    def query(request):
        seen.append(current_scope())
        return PlainTextResponse(value(sqlite))

    app = Starlette(routes=[Route("/", query)], middleware=[orm.middleware()])
    with connection_scope(sqlite) as mine:
        value(sqlite)
        assert TestClient(app).get("/").text == "1"
        assert current_scope() is mine
        assert value(sqlite) == "1"
    assert seen[0] is not mine
    assert everything_is_back(orm, sqlite)


# -- websockets and children ----------------------------------------------------------------------------------------------


def test_a_websocket_holds_a_connection_for_a_message_only(database):
    """Between two messages it is back in the pool."""
    orm = Peewee(database)

    async def echo(socket):
        await socket.accept()
        async for text in socket.iter_text():
            answer = await orm.run(value, database, text)
            await socket.send_text(answer)

    app = Starlette(routes=[WebSocketRoute("/", echo)], middleware=[orm.middleware()], lifespan=orm.lifespan())
    with TestClient(app) as client, client.websocket_connect("/") as first, client.websocket_connect("/") as second:
        for text in "abc":
            first.send_text(text)
            second.send_text(text * 2)
            assert (first.receive_text(), second.receive_text()) == (text, text * 2)
            eventually(lambda: in_use(database) == 0)
    assert everything_is_back(orm, database)


def test_a_task_that_outlives_its_request_is_told_so(database):
    """It gets `ScopeEnded`, which names the request; in a scope of its own it works."""
    orm = Peewee(database)
    outcome: list[Any] = []
    ended, done = threading.Event(), threading.Event()

    async def orphan():
        await asyncio.to_thread(ended.wait, 10)
        try:
            value(database)
        except ScopeEnded as error:
            outcome.append(str(error))
        async with orm.scope("the orphan"):
            outcome.append(await orm.run(value, database))
        done.set()

    async def endpoint(request):
        request.app.state.task = asyncio.create_task(orphan())
        return PlainTextResponse(await orm.run(value, database))

    app = Starlette(routes=[Route("/start", endpoint)], middleware=[orm.middleware()], lifespan=orm.lifespan())
    with TestClient(app) as client:
        client.get("/start")
        assert everything_is_back(orm, database)
        ended.set()
        assert done.wait(10)
        assert everything_is_back(orm, database)
    assert "request GET /start has ended" in outcome[0]
    assert outcome[1] == "1"


# -- mistakes -----------------------------------------------------------------------------------------------------------


def test_orm_run_inside_orm_run_says_so_instead_of_waiting_for_ever(sqlite):
    """The inner call waits for the outer's turn, and the outer for the inner's result."""
    orm = Peewee(sqlite, run_timeout=0.2)

    async def work(loop):
        def outer():
            return asyncio.run_coroutine_threadsafe(orm.run(value, sqlite), loop).result(10)

        async with orm.scope("twice"):
            with pytest.raises(PoolTimeout, match=r"twice: orm\.run was called from inside"):
                await orm.run(outer)
            return await orm.run(value, sqlite)  # the turn was given back

    async def main():
        return await work(asyncio.get_running_loop())

    assert asyncio.run(main()) == "1"
    assert everything_is_back(orm, sqlite)
    orm.runtime.runner.close()


def test_a_call_that_is_started_inside_another_and_not_waited_for_has_its_turn(sqlite):
    orm = Peewee(sqlite)
    started = []

    async def main():
        loop = asyncio.get_running_loop()

        def outer():
            started.append(asyncio.run_coroutine_threadsafe(orm.run(value, sqlite), loop))

        async with orm.scope():
            await orm.run(outer)
            return await asyncio.wrap_future(started[0])

    assert asyncio.run(main()) == "1"
    assert everything_is_back(orm, sqlite)
    orm.runtime.runner.close()


async def no_context_manager(app):
    pass


def plain_generator(app):
    yield


@pytest.mark.parametrize("mine", ["x", no_context_manager, plain_generator, Starlette()])
def test_a_lifespan_that_cannot_work_is_refused(sqlite, mine):
    """An `orm.lifespan` without its parentheses is given the application."""
    with pytest.raises(ConfigurationError, match=r"lifespan"):
        Peewee(sqlite).lifespan(mine)


def test_an_application_of_another_framework_is_refused(sqlite):
    with pytest.raises(ConfigurationError, match=r"Flask.*peewee_frameworks\.starlette"):
        Peewee(sqlite).init_app(flask.Flask("other"))


# -- other layers about ours ---------------------------------------------------------------------------------------------


class Layer:
    """Somebody's middleware, which sees what passes."""

    def __init__(self, app, seen=None):
        self.app, self.seen = app, [] if seen is None else seen

    async def __call__(self, scope, receive, send):
        self.seen.append(scope["type"])
        await self.app(scope, receive, send)


@pytest.mark.parametrize("handler", [None, "sync"])
@pytest.mark.parametrize("replaces", [True, False])
def test_instrumentation_takes_what_is_inside_of_starlettes_layer_along(database, replaces, handler):
    """OpenTelemetry's puts a layer of its own in the place of the outermost; others go between it and what is inside."""
    scopes = []

    def query(request):
        scopes.append(current_scope())
        return PlainTextResponse(value(database))

    def fail(request):
        raise LookupError

    def handle(request, error):
        scopes.append(current_scope())
        return PlainTextResponse(value(database, "sorry"), 500)

    handlers = {} if handler is None else {500: handle}
    app = Starlette(routes=[Route("/", query), Route("/fail", fail)], exception_handlers=handlers)
    orm = Peewee(database, create_tables=[])
    orm.init_app(app)
    seen = []
    stack = app.build_middleware_stack()
    if replaces:
        found = stack
        while not isinstance(found, ServerErrorMiddleware):
            found = found.app
        app.middleware_stack = ServerErrorMiddleware(Layer(found.app, seen), found.handler)
    else:
        stack.app = Layer(stack.app, seen)
        app.middleware_stack = stack
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/").text == "1"
        assert client.get("/fail").text == ("Internal Server Error" if handler is None else "sorry")
    assert seen == ["lifespan", "http", "http"]
    assert None not in scopes[:1] + ([] if replaces else scopes)  # what replaces our layer has its handlers outside


@pytest.mark.parametrize("handler", [False, True])
def test_each_of_two_instances_on_one_application_starts_and_stops_its_database(make_place, handler):
    databases = [make_place("sqlite").make_database(timeout=2) for _ in range(2)]
    app = Starlette(
        routes=[Route("/", lambda request: PlainTextResponse(value(databases[0]) + value(databases[1])))],
        exception_handlers={500: lambda request, error: PlainTextResponse("sorry")} if handler else {},
    )
    items = [make_item(database, create=False) for database in databases]
    for database, item in zip(databases, items, strict=True):
        Peewee(database, create_tables=[item]).init_app(app)
    with TestClient(app) as client:
        assert client.get("/").text == "11"
        with connection_scope(*databases):
            assert [item.table_exists() for item in items] == [True, True]
    assert not any(database._connections or database._in_use for database in databases)


@pytest.mark.parametrize("handler", [False, True])
@pytest.mark.parametrize("how", ["mounted", "before", "after"])
def test_a_commit_that_fails_is_answered_though_an_inner_instance_has_passed_the_response_on(spoiled, how, handler):
    """They share the scope of the request, for they share the database."""
    database, spoil = spoiled
    handlers = {500: lambda request, error: PlainTextResponse(type(error).__name__, 500)} if handler else {}
    plain, atomic = Peewee(database), Peewee(database, transaction=True)
    inner = Starlette(routes=[Route("/", spoil)], exception_handlers={} if how == "mounted" else handlers)
    app = Starlette(routes=[Mount("/", inner)], exception_handlers=handlers) if how == "mounted" else inner
    for orm in (plain, atomic) if how != "after" else (atomic, plain):
        orm.init_app(inner if orm is plain else app)
    response = TestClient(app, raise_server_exceptions=False).get("/")
    assert response.text == ("IntegrityError" if handler else "Internal Server Error")


def test_a_request_whose_scope_the_application_has_emptied_gives_its_connection_back(database):
    async def app(scope, receive, send):
        sent = value(database)
        scope.clear()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": sent.encode()})

    orm = Peewee(database)
    served = Starlette(routes=[Mount("/", app)])
    orm.init_app(served)
    for _ in range(3):
        assert TestClient(served).get("/").text == "1"
    assert not in_use(database)
    assert not orm.runtime.in_flight()


def test_a_proxy_that_nobody_initialises_is_an_error_page():
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok"))])
    Peewee(peewee.DatabaseProxy()).init_app(app)
    assert TestClient(app, raise_server_exceptions=False).get("/").text == "Internal Server Error"
    with pytest.raises(ConfigurationError, match="initialize"):
        TestClient(app).get("/")


@pytest.mark.parametrize("bare", [False, True])
def test_a_mounted_application_that_starts_and_fails_below_buffering_middleware_ends_with_its_error(sqlite, bare):
    """`BaseHTTPMiddleware` has not passed the start on by then."""

    async def fail(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise LookupError("mine")

    inner = Starlette(routes=[Mount("/", fail)])
    app = Starlette(routes=[Mount("/", inner)], middleware=[Middleware(Passing)])
    if not bare:
        orm = Peewee(sqlite)
        orm.init_app(inner)
        orm.init_app(app)
    with pytest.raises(LookupError, match="mine"):
        TestClient(app).get("/")


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["sqlite", "mysql", "postgres"])
@pytest.mark.parametrize("way", ["sync", "orm.run"])
@pytest.mark.parametrize("installed", ["init_app", "lists"])
async def test_the_commit_and_a_body_beside_it_wait_for_each_other(make_place, kind, way, installed):
    """`BaseHTTPMiddleware` passes the beginning of the response on while the body is being made in a task of its own."""
    database = make_place(kind).make_database()
    item = make_item(database)
    orm = Peewee(database, transaction=True)

    def sync(request):
        item.create(name=uuid.uuid4().hex)

        def body():
            for _ in range(3):
                yield str(item.select().count())
            item.create(name=uuid.uuid4().hex)

        return StreamingResponse(body())

    async def run(request):
        await orm.run(item.create, name=uuid.uuid4().hex)

        async def body():
            for _ in range(3):
                yield str(await orm.run(item.select().count))
            await orm.run(item.create, name=uuid.uuid4().hex)

        return StreamingResponse(body())

    routes = [Route("/", sync if way == "sync" else run)]
    if installed == "init_app":
        app = Starlette(routes=routes, middleware=[Middleware(Passing), Middleware(Passing)])
        orm.init_app(app)
    else:
        app = Starlette(routes=routes, middleware=[orm.middleware(), Middleware(Passing)], lifespan=orm.lifespan())
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        for number in range(10):
            answer = await client.get("/")
            assert (answer.status_code, answer.text) == (200, str(2 * number + 1) * 3)
    assert everything_is_back(orm, database)
    with database:
        assert item.select().count() == 20
    orm.runtime.stop()
    database.close_all()


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["mysql", "postgres"])
async def test_a_statement_that_was_given_up_is_not_taken_for_one_of_the_body(make_place, kind):
    """The endpoint has answered though its thread was inside a statement: what it does is half of something."""
    database = make_place(kind).make_database()
    item = make_item(database)
    orm = Peewee(database, transaction=True)
    inside, go_on, tasks = threading.Event(), threading.Event(), []

    def slow():
        item.create(name="half")
        frame = database._state.frame()
        frame.enter()  # as a statement does
        try:
            inside.set()
            assert go_on.wait(10)
        finally:
            frame.leave()

    async def answer(request):
        tasks.append(asyncio.ensure_future(asyncio.to_thread(slow)))
        await asyncio.to_thread(inside.wait, 10)
        return PlainTextResponse("done")

    app = Starlette(routes=[Route("/", answer)], middleware=[Middleware(Passing)])
    orm.init_app(app)
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/")).status_code == 500
    go_on.set()
    await asyncio.wait(tasks)
    assert everything_is_back(orm, database)
    with database:
        assert item.select().count() == 0
    orm.runtime.stop()
    database.close_all()


@pytest.mark.anyio
async def test_what_calls_run_after_its_request_leaves_nothing(sqlite):
    tasks = []

    async def late(ended):
        await ended.wait()
        return await orm.run(lambda: 1)

    async def serve(request):
        tasks.append((ended := asyncio.Event(), asyncio.create_task(late(ended))))
        return PlainTextResponse("ok")

    app = Starlette(routes=[Route("/", serve)])
    orm = Peewee(sqlite, close_timeout=30)
    orm.init_app(app)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        for _ in range(3):
            assert (await client.get("/")).text == "ok"
    for ended, task in tasks:
        ended.set()
        await asyncio.wait([task])
    assert not orm.runtime.live
    orm.runtime.stop()


@pytest.mark.anyio
@pytest.mark.parametrize("handler", [False, True])
@pytest.mark.parametrize("queries", [False, True])
async def test_a_response_whose_start_cannot_be_sent_is_not_started_again(sqlite, queries, handler):
    """The server may have noted it."""
    sent = []

    async def send(message):
        sent.append(message["type"])
        raise OSError("gone")

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def serve(request):
        return PlainTextResponse(value(sqlite) if queries else "ok")

    handlers = {500: lambda request, error: PlainTextResponse("sorry", 500)} if handler else {}
    app = Starlette(routes=[Route("/", serve)], exception_handlers=handlers)
    Peewee(sqlite).init_app(app)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b"", "root_path": ""}
    with pytest.raises(OSError, match="gone"):
        await app(scope, receive, send)
    assert sent == ["http.response.start"]
    assert not in_use(sqlite)
