"""The framework-free ASGI middleware: bare applications, odd ones, and Quart on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import json
import threading
from dataclasses import asdict
from typing import Any

import httpx2
import peewee
import pytest
from playhouse.pwasyncio import AsyncSqliteDatabase

from peewee_frameworks import ConfigurationError, ScopeEnded, connection_scope, current_scope
from peewee_frameworks.asgi import SCOPE_KEY, PeeweeMiddleware, RequestMiddleware, ScopeMiddleware
from peewee_frameworks.runtime import Runtime
from tests.support.client import Request
from tests.support.concurrency import Halves, eventually
from tests.support.databases import scratch
from tests.support.load import hammer, statuses
from tests.support.servers import require_server
from tests.support.webservers import hypercorn, uvicorn
from tests.support.websocket import WebSocket

pytestmark = pytest.mark.anyio


def value(database, text="1"):
    return str(peewee.Select([], [peewee.Value(text).alias("v")]).bind(database).scalar())


def client_of(app):
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test")


def answering(work, status=200):
    """Make an application that does some work on a thread and answers with its result."""

    async def app(scope, receive, send):
        result = await asyncio.to_thread(work)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": str(result).encode()})

    return app


@pytest.fixture
def sqlite(make_place):
    database = make_place("sqlite").make_database(timeout=2)
    yield database
    database.close_all()


@pytest.fixture
def item(database):
    class Item(peewee.Model):
        name = peewee.CharField(64, unique=True)

    Item.bind(database)
    with connection_scope(database):
        database.create_tables([Item])
    return Item


async def test_a_request_has_a_scope_and_gives_its_connection_back(database):
    """… with the label that messages call it by, found in the ASGI scope by adapters further in."""
    seen = []

    async def app(scope, receive, send):
        seen.append((current_scope(), scope[SCOPE_KEY]))
        await answering(lambda: value(database))(scope, receive, send)

    async with client_of(PeeweeMiddleware(app, database)) as client:
        response = await client.get("/there")
    assert response.text == "1"
    current, found = seen[0]
    assert current is found
    assert current.label == "request GET /there"
    assert current.ended
    assert current_scope() is None
    eventually(lambda: not database._in_use)


@pytest.mark.parametrize(("status", "left"), [(200, 1), (302, 1), (404, 0), (500, 0)])
async def test_an_atomic_request_is_kept_or_not_by_its_status(status, left, database, item):
    """Before the first byte."""
    app = PeeweeMiddleware(answering(lambda: item.create(name="x"), status), database, transaction=True)
    async with client_of(app) as client:
        assert (await client.get("/")).status_code == status
    eventually(lambda: not database._in_use)
    with connection_scope(database):
        assert item.select().count() == left
    app.runtime.stop()


async def test_an_exception_rolls_back_and_comes_through(database, item):
    """It is the server's to answer."""

    def work():
        item.create(name="x")
        raise LookupError("asked for")

    async with client_of(PeeweeMiddleware(answering(work), database, transaction=True)) as client:
        with pytest.raises(LookupError):
            await client.get("/")
    eventually(lambda: not database._in_use)
    with connection_scope(database):
        assert item.select().count() == 0


async def test_with_errors_what_the_application_did_not_answer_is_answered(sqlite, item):
    """404, 409, 503; anything else stays an exception."""

    async def ask(work, **options):
        async with client_of(PeeweeMiddleware(answering(work), item._meta.database, errors=True, **options)) as client:
            return await client.get("/")

    def twice():
        item.create(name="x")
        item.create(name="x")

    missing = await ask(lambda: item.get(item.name == "nobody"))
    assert (missing.status_code, missing.json()) == (404, {"detail": "Not found."})
    assert missing.headers["content-type"] == "application/json"
    assert (await ask(twice)).status_code == 409
    with pytest.raises(peewee.DatabaseError):
        await ask(lambda: item._meta.database.execute_sql("selekt"))


async def test_eager_connects_before_the_application_and_off_the_loop(sqlite):
    """… and an exhausted pool is a 503 before it is called."""
    sqlite._max_connections = 1
    called = []

    def work():
        called.append(len(sqlite._in_use))
        return value(sqlite)

    app = PeeweeMiddleware(answering(work), sqlite, connect="eager", errors=True, run_timeout=0.1)
    sqlite._wait_timeout = 0.1
    async with client_of(app) as client:
        assert (await client.get("/")).text == "1"
        with connection_scope(sqlite) as holder:
            eventually(lambda: not sqlite._in_use)
            holder.connect()
            response = await client.get("/")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert called == [1]
    app.runtime.stop()


async def test_a_cancelled_request_gives_its_connection_back(database):
    """Whatever it was awaiting."""
    reached = asyncio.Event()

    async def app(scope, receive, send):
        await asyncio.to_thread(value, database)
        reached.set()
        await asyncio.Event().wait()

    wrapped = PeeweeMiddleware(app, database)
    scope = {"type": "http", "method": "GET", "path": "/"}
    task = asyncio.create_task(wrapped(scope, asyncio.Queue().get, asyncio.Queue().put))
    await reached.wait()
    assert len(database._in_use) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    eventually(lambda: not database._in_use)
    assert not wrapped.runtime.in_flight()


class Watched(Runtime):
    """Calls what a test wants just when a request has been found to have nothing to give back."""

    meanwhile: Any = None

    @property
    def drained(self):
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()

    @drained.setter
    def drained(self, callback):
        pass


async def test_a_thread_that_first_queries_at_its_requests_very_end_leaves_nothing(sqlite):
    """The request looks whether it has anything to give back, and finds nothing yet."""
    raised = []

    def meanwhile():
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(late,))
        thread.start()
        thread.join()

    def late():
        try:
            value(sqlite)
        except ScopeEnded as error:
            raised.append(error)

    runtime = Watched(sqlite)
    runtime.meanwhile = meanwhile
    async with client_of(RequestMiddleware(answering(lambda: "ok"), runtime)) as client:
        assert (await client.get("/")).text == "ok"
    assert len(raised) == 1
    assert not sqlite._in_use


async def test_the_layers_may_be_nested_and_do_their_work_once(sqlite):
    """Two of one instance, and one of another on the same database: one scope, one decision each."""
    asked = []
    scopes = []

    def decide(scope):
        asked.append(scope["path"])
        return True

    async def app(scope, receive, send):
        scopes.append(current_scope())
        await answering(lambda: (sqlite.connect(), sqlite.in_transaction())[1])(scope, receive, send)

    mine, other = Runtime(sqlite, transaction=decide), Runtime(sqlite)
    layered: Any = app
    for runtime in (other, mine, mine):
        layered = ScopeMiddleware(RequestMiddleware(layered, runtime), runtime)
    async with client_of(layered) as client:
        assert (await client.get("/")).text == "True"
    assert asked == ["/"]
    assert len(set(scopes)) == 1
    eventually(lambda: not sqlite._in_use)


# -- lifespan -----------------------------------------------------------------------------------------------------------


class Server:
    """What a server does with an application's lifespan."""

    def __init__(self, app):
        self.app = app
        self.sent: list[Any] = []
        self.incoming: asyncio.Queue[Any] = asyncio.Queue()
        self.outgoing: asyncio.Queue[Any] = asyncio.Queue()

    async def __aenter__(self):
        self.task = asyncio.create_task(self.app({"type": "lifespan"}, self.incoming.get, self.outgoing.put))
        await self.incoming.put({"type": "lifespan.startup"})
        self.started = await asyncio.wait_for(self.outgoing.get(), 10)
        return self

    async def __aexit__(self, *exc_info):
        await self.incoming.put({"type": "lifespan.shutdown"})
        self.ended = await asyncio.wait_for(self.outgoing.get(), 10)
        await asyncio.wait_for(self.task, 10)


async def knows_no_lifespan(scope, receive, send):
    assert scope["type"] == "http", "only HTTP here"


async def ignores_lifespan(scope, receive, send):
    return


@pytest.mark.parametrize("app", [knows_no_lifespan, ignores_lifespan])
async def test_an_application_without_lifespan_is_spared_it(app, sqlite):
    """Django raises, others return: the databases start and stop all the same."""
    wrapped = PeeweeMiddleware(app, sqlite)
    async with Server(wrapped) as server:
        assert server.started == {"type": "lifespan.startup.complete"}
        assert len(sqlite._connections) == 1  # the check at start left it
    assert server.ended == {"type": "lifespan.shutdown.complete"}
    assert not sqlite._connections


async def test_an_application_that_fails_at_its_start_is_told_of(sqlite, caplog):
    """It knows lifespans, so its start has failed, and not quietly."""

    async def app(scope, receive, send):
        await receive()
        raise LookupError("no such setting")

    async with Server(PeeweeMiddleware(app, sqlite)) as server:
        assert server.started == {"type": "lifespan.startup.complete"}
    record = next(record for record in caplog.records if record.exc_info)
    assert "failed at its start" in record.message
    assert isinstance(record.exc_info[1], LookupError)


async def test_the_application_starts_after_and_stops_before_the_databases(database, item):
    """In a scope each, which holds nothing between them."""
    told = []

    async def app(scope, receive, send):
        for step in ("startup", "shutdown"):
            assert await receive() == {"type": f"lifespan.{step}"}
            await asyncio.to_thread(item.create, name=step)
            told.append(current_scope().label)
            await send({"type": f"lifespan.{step}.complete"})
            assert current_scope() is None

    async with Server(PeeweeMiddleware(app, database)) as server:
        assert server.started["type"] == "lifespan.startup.complete"
        eventually(lambda: not database._in_use)
    assert server.ended["type"] == "lifespan.shutdown.complete"
    assert told == ["the application's start", "the application's end"]
    assert not database._in_use
    with connection_scope(database):
        assert item.select().count() == 2


async def test_a_database_that_is_down_fails_the_startup_with_a_message(tmp_path):
    """The server shows it and does not serve."""
    app = PeeweeMiddleware(ignores_lifespan, peewee.SqliteDatabase(tmp_path / "nowhere" / "file.db"))
    outgoing: asyncio.Queue[Any] = asyncio.Queue()
    incoming: asyncio.Queue[Any] = asyncio.Queue()
    await incoming.put({"type": "lifespan.startup"})
    with pytest.raises(peewee.OperationalError):
        await app({"type": "lifespan"}, incoming.get, outgoing.put)
    message = outgoing.get_nowait()
    assert message["type"] == "lifespan.startup.failed"
    assert "cannot be reached at start" in message["message"]


async def test_an_application_that_fails_to_start_stops_the_databases(sqlite):
    """Its own message goes out."""

    async def app(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "asked for"})

    wrapped = PeeweeMiddleware(app, sqlite)
    incoming: asyncio.Queue[Any] = asyncio.Queue()
    outgoing: asyncio.Queue[Any] = asyncio.Queue()
    await incoming.put({"type": "lifespan.startup"})
    await wrapped({"type": "lifespan"}, incoming.get, outgoing.put)
    assert outgoing.get_nowait() == {"type": "lifespan.startup.failed", "message": "asked for"}
    assert not sqlite._connections
    assert not wrapped.runtime.in_flight()


async def test_a_lifespan_that_is_cancelled_stops_the_databases(sqlite):
    """A test client does that."""

    async def app(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()

    wrapped = PeeweeMiddleware(app, sqlite)
    incoming: asyncio.Queue[Any] = asyncio.Queue()
    outgoing: asyncio.Queue[Any] = asyncio.Queue()
    await incoming.put({"type": "lifespan.startup"})
    task = asyncio.create_task(wrapped({"type": "lifespan"}, incoming.get, outgoing.put))
    await asyncio.wait_for(outgoing.get(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not sqlite._connections
    assert not wrapped.runtime.in_flight()


@pytest.mark.parametrize("frozen", [False, True])
async def test_the_end_of_an_application_waits_for_a_request_that_has_asked_for_nothing_yet(sqlite, frozen):
    """It may do so while it ends: a server that waits no longer cancels it before it ends the lifespan."""
    begun, found = asyncio.Event(), []

    async def app(scope, receive, send):
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            found.append(value(sqlite))

    wrapped = PeeweeMiddleware(app, sqlite, close_timeout=30)
    await wrapped.runtime.start_async()
    request = asyncio.create_task(wrapped({"type": "http", "method": "GET", "path": "/"}, None, None))
    await begun.wait()
    if frozen:
        gc.freeze()
    request.cancel()
    await wrapped.runtime.stop_async()
    gc.unfreeze()
    assert found == ["1"]
    assert not sqlite._connections
    with pytest.raises(asyncio.CancelledError):
        await request


async def test_the_end_of_an_application_waits_for_a_request_that_comes_meanwhile(sqlite):
    begun, go = asyncio.Queue(), asyncio.Event()

    async def app(scope, receive, send):
        begun.put_nowait(scope["path"])
        await go.wait()
        found.append(value(sqlite))

    def request(path):
        return asyncio.create_task(wrapped({"type": "http", "method": "GET", "path": path}, None, None))

    found: list[str] = []
    wrapped = PeeweeMiddleware(app, sqlite, close_timeout=30)
    await wrapped.runtime.start_async()
    requests = [request("/first")]
    await begun.get()
    stop = asyncio.create_task(wrapped.runtime.stop_async())
    await asyncio.sleep(0)  # its first step
    assert wrapped.runtime.plain is None
    assert not stop.done()
    requests.append(request("/second"))
    await begun.get()
    go.set()
    await asyncio.gather(stop, *requests)
    assert found == ["1", "1"]
    assert not sqlite._connections


async def test_the_end_of_an_application_goes_through_no_objects_if_nothing_is_in_flight(sqlite, monkeypatch):
    """It would take a tenth of a second for a million of them, in each test of an application."""

    async def app(scope, receive, send):
        await answering(lambda: value(sqlite) if scope["path"] == "/query" else "")(scope, receive, send)

    wrapped = PeeweeMiddleware(app, sqlite)
    await wrapped.runtime.start_async()
    async with client_of(wrapped) as client:
        for path in ("/nothing", "/query", "/nothing"):
            assert (await client.get(path)).status_code == 200
    monkeypatch.setattr(gc, "get_objects", lambda: pytest.fail("it asks for all objects"))
    await wrapped.runtime.stop_async()


@pytest.mark.parametrize("queries", [True, False])
async def test_what_is_still_running_at_the_end_is_told_of(queries, sqlite, caplog):
    begun = asyncio.Event()

    async def app(scope, receive, send):
        if queries:
            value(sqlite)
        begun.set()
        await asyncio.Event().wait()

    wrapped = PeeweeMiddleware(app, sqlite, close_timeout=0.01)
    await wrapped.runtime.start_async()
    request = asyncio.create_task(wrapped({"type": "http", "method": "GET", "path": "/hangs"}, None, None))
    await begun.wait()
    await wrapped.runtime.stop_async()
    assert "1 units of work were still running when the application stopped: request GET /hangs" in caplog.text
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert not wrapped.runtime.in_flight()
    assert not wrapped.runtime.live


async def test_a_wrong_option_is_refused_where_the_application_is_wrapped(sqlite):
    """Not at the first request."""
    with pytest.raises(ConfigurationError, match=r"Unknown option transactoin\. Did you mean transaction\?"):
        PeeweeMiddleware(ignores_lifespan, sqlite, transactoin=True)


# -- Quart, on real servers -----------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=[("uvloop", "sqlite"), ("asyncio", "postgres"), ("hypercorn", "mysql")], ids="-".join
)
def quart(request, tmp_path_factory):
    """The application of served_quart.py."""
    loop, kind = request.param
    require_server(kind)
    with scratch(kind, tmp_path_factory.mktemp("quart")) as place:
        options = {"factory": True, "env": {"SERVED_PLACE": json.dumps(asdict(place))}}
        target = "tests.adapters.served_quart:make_app"
        serve = hypercorn(target, **options) if loop == "hypercorn" else uvicorn(target, loop=loop, **options)
        with serve as server:
            yield server


def at_rest(server):
    with server.client() as client:
        return eventually(
            lambda: (now := client.get("/_stats").json())["in_use"] == 0 and not now["live"] and now,
            message="a connection is still in use",
        )


def test_quart_starts_in_a_scope_and_holds_nothing(quart):
    """`before_serving` queries; the connection is back when the server is up."""
    assert at_rest(quart)["told"] == ["the application's start"]
    with quart.client() as client:
        assert client.get("/items/start").text == "start"


def test_quart_serves_concurrent_requests_on_a_pool_of_5(quart):
    """Sync views on threads and `run` beside each other, each with its own answer."""
    results = hammer(quart.url, [f"/{('ask', 'run')[n % 2]}/{n}" for n in range(100)], concurrency=50)
    assert statuses(results) == {200: 100}
    assert [result.text for result in results] == [str(n) for n in range(100)]
    at_rest(quart)


def test_quart_commits_and_rolls_back_and_its_error_handler_queries(quart):
    """By the status of the response."""
    with quart.client() as client:
        assert client.post("/items/good?status=201").status == 201
        assert client.post("/items/bad?status=422").status == 422
        assert client.get("/items/good").text == "good"
        assert client.get("/items/bad").text == "handled"
        failed = client.get("/fail")
        assert (failed.status, failed.text) == (500, "handled")
    at_rest(quart)


def test_quart_streams_and_websockets_hold_nothing_while_they_idle(quart):
    """… and give everything back when the client leaves without a word."""
    streams = [quart.client() for _ in range(8)]
    for client in streams:
        client.send(Request("/stream"))
        assert client.read_head().status == 200
        assert client.read_body(at_least=5) == b"first"
    sockets = [WebSocket(f"{quart.url}/echo") for _ in range(8)]
    for number, socket in enumerate(sockets):
        assert socket.echo(str(number)) == str(number)
    with quart.client() as client:
        eventually(lambda: client.get("/_stats").json()["in_use"] == 0)
        assert client.get("/ask/7").text == "7"
    for number, (client, socket) in enumerate(zip(streams, sockets, strict=True)):
        client.drop("rst" if number % 2 else "fin")
        socket.abort("rst" if number % 2 else "fin")
    at_rest(quart)


@pytest.mark.parametrize("more", [False, True], ids=["its scope", "a scope of its own"])
async def test_an_exception_that_the_application_around_answers_rolls_back_what_it_came_from(
    database, item, make_place, more
):
    """… and no more: what the application around writes then is kept."""
    other = make_place("sqlite").make_database()

    def failing():
        item.create(name="inside")
        raise LookupError("asked for")

    served = {"default": database, "other": other} if more else database
    inner = PeeweeMiddleware(answering(failing), served, transaction=True)

    async def around(scope, receive, send):
        try:
            await inner(scope, receive, send)
        except LookupError:
            await answering(lambda: item.create(name="around"))(scope, receive, send)

    async with client_of(PeeweeMiddleware(around, database)) as client:
        assert (await client.get("/")).status_code == 200
    eventually(lambda: not database._in_use)
    with connection_scope(database):
        assert [each.name for each in item.select()] == ["around"]


async def test_a_call_that_outlives_its_deadline_in_an_inner_scope_is_not_committed_by_halves(
    database, item, make_place
):
    """The transaction is the outer instance's, and the call was made through the inner one, which is not atomic."""
    unit = Halves(item.create)

    async def app(scope, receive, send):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await inner.runtime.run(unit)
        await send({"type": "http.response.start", "status": 504, "headers": []})
        await unit.finish()
        await send({"type": "http.response.body", "body": b""})

    inner = PeeweeMiddleware(app, {"default": database, "other": make_place("sqlite").make_database()})
    async with client_of(PeeweeMiddleware(inner, database, transaction=True)) as client:
        assert (await client.get("/")).status_code == 504
    eventually(lambda: not database._in_use)
    with connection_scope(database):
        assert item.select().count() == 0
    inner.runtime.stop()


async def test_a_call_that_outlives_its_deadline_is_not_committed_by_halves_beside_an_asynchronous_database(
    database, item, make_place
):
    """What ends the transactions of both kinds knows of the call too."""
    unit = Halves(item.create)
    other = AsyncSqliteDatabase(make_place("sqlite").database)

    async def app(scope, receive, send):
        await other.run(other.execute_sql, "SELECT 1")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await wrapped.runtime.run(unit)
        await send({"type": "http.response.start", "status": 504, "headers": []})
        await unit.finish()
        await send({"type": "http.response.body", "body": b""})

    wrapped = PeeweeMiddleware(app, {"default": database, "other": other}, transaction=True)
    async with client_of(wrapped) as client:
        assert (await client.get("/")).status_code == 504
    eventually(lambda: not database._in_use)
    with connection_scope(database):
        assert item.select().count() == 0
    await wrapped.runtime.stop_async()


async def test_a_scope_inside_a_call_is_rolled_back_without_a_warning(database, item, caplog):
    """The call that goes on is its own."""

    def unit():
        with contextlib.suppress(LookupError), connection_scope(database, transaction=True):
            item.create(name="inside")
            raise LookupError("asked for")
        return item.select().count()

    async def app(scope, receive, send):
        count = await wrapped.runtime.run(unit)
        await answering(lambda: count)(scope, receive, send)

    wrapped = PeeweeMiddleware(app, database)
    async with client_of(wrapped) as client:
        assert (await client.get("/")).text == "0"
    assert not caplog.records
    eventually(lambda: not database._in_use)
    wrapped.runtime.stop()


async def test_what_follows_a_deadline_around_an_inner_atomic_application_is_not_lost_in_silence(
    database, item, caplog
):
    """A thread of the inner one may go on, so its transaction stays open, and what is done in it is told to be undone."""

    async def app(scope, receive, send):
        await asyncio.to_thread(item.create, name="inside")
        await asyncio.Event().wait()

    inner = PeeweeMiddleware(app, database, transaction=True)

    async def around(scope, receive, send):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await inner(scope, receive, send)
        await answering(lambda: item.create(name="around"), 504)(scope, receive, send)

    async with client_of(PeeweeMiddleware(around, database)) as client:
        assert (await client.get("/")).status_code == 504
    eventually(lambda: not database._in_use)
    with connection_scope(database):
        assert item.select().count() == 0
    assert "ended with a transaction block open; rolled back" in caplog.text
