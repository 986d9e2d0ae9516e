"""Sanic: what only Sanic does. What it has in common with the others is in contract/."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import pickle
import signal
import threading
import warnings

import httpx
import peewee
import pytest
from playhouse.pool import PooledSqliteDatabase
from sanic import Blueprint, Sanic, text
from sanic.handlers import ErrorHandler

from peewee_frameworks import ConfigurationError, ScopeEnded, current_scope
from peewee_frameworks.asgi import PeeweeMiddleware
from peewee_frameworks.runtime import Runtime
from peewee_frameworks.sanic import Peewee
from tests.support import webservers
from tests.support.client import Request
from tests.support.concurrency import eventually
from tests.support.databases import scratch
from tests.support.load import hammer, statuses
from tests.support.ports import reserved_port
from tests.support.process import ServerError
from tests.support.servers import KINDS, require_server
from tests.support.websocket import WebSocket

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports websockets.legacy
    from sanic_testing.reusable import ReusableClient

APP = "tests.adapters.sanic_app:make_app"
numbers = itertools.count()


@pytest.fixture(autouse=True)
def policy():
    """Sanic's test clients leave uvloop's policy behind, and tests of asyncio's own loops would see nothing."""
    before = asyncio.get_event_loop_policy()
    yield
    asyncio.set_event_loop_policy(before)


@pytest.fixture
def rid():
    return f"r{next(numbers)}"


def serve(place, **options):
    environment = {"DATABASE_URL": place.pool_url(), "SANIC_RESPONSE_TIMEOUT": "30", **options.pop("env", {})}
    return webservers.sanic(APP, factory=True, env=environment, **options)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    require_server(request.param)
    return request.param


@pytest.fixture(scope="module")
def shared_server(kind, tmp_path_factory):
    with (
        scratch(kind, tmp_path_factory.mktemp("sanic")) as place,
        serve(place, single_process=True) as server,
    ):
        yield server


@pytest.fixture
def server(shared_server):
    """A Sanic server in one process; afterwards no connection is in use and none was shared."""
    yield shared_server
    settled(shared_server)


def stats(server):
    with server.client() as client:
        return client.get("/_stats").json()


def settled(server, processes=1):
    """Wait until every process holds nothing, and check that no two requests met on a connection."""
    seen = {}

    def quiet():
        found = stats(server)
        seen[found["pid"]] = found
        return len(seen) == processes and not any(each["in_use"] or each["live"] for each in seen.values())

    eventually(quiet, message=f"something is held: {seen}")
    assert [each["shared"] for each in seen.values()] == [[]] * processes


def count(server, rid):
    with server.client() as client:
        return int(client.get(f"/count/{rid}").text)


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["query", "def", "run", "injected", "old-stream", "stream/end", "stream/early"])
def test_a_handler_queries_on_the_connection_of_its_request(server, path, rid):
    with server.client() as client:
        answers = [client.get(f"/{path}/{rid}{n}") for n in range(3)]
    times = 2 if path in ("old-stream", "stream/end") else 1
    assert [answer.text for answer in answers] == [f"{rid}{n}" * times for n in range(3)]


@pytest.mark.parametrize("paths", [["query"], ["def", "injected"], ["run", "atomic/state", "group/reports/state"]])
def test_many_requests_at_once_share_five_connections(server, rid, paths):
    results = hammer(server.url, [f"/{path}/{rid}-{n}" for n in range(80) for path in paths], concurrency=80)
    assert statuses(results) == {200: 80 * len(paths)}
    texts = [(result.request.path.rpartition("/")[2], result.text) for result in results if result.text[0] == "r"]
    assert all(wanted == found for wanted, found in texts)


def test_requests_on_one_connection_each_have_their_own_scope(server, rid):
    with server.client() as client:
        requests = [Request(f"/query/{rid}{n}") for n in range(10)]
        requests.insert(3, Request(f"/length/{rid}", "POST", b"x" * 400_000))
        requests.insert(5, Request(f"/fail/{rid}"))
        answers = client.pipeline(requests)
        assert [answer.status for answer in answers] == [200] * 5 + [500] + [200] * 6
        assert answers[3].text == "400000"
        assert answers[11].text == f"{rid}9"
        assert client.post(f"/length/{rid}", b"x" * 400_000).text == "400000"
        assert client.post(f"/upload/{rid}", b"x" * 400_000).text == f"400000 {rid}"
        assert client.get(f"/query/{rid}").text == rid
        assert client.request(Request(f"/query/{rid}", "HEAD")).status == 200


@pytest.mark.parametrize(
    ("query", "status", "body"),
    [("before=raise", 418, "handled"), ("before=stop", 200, "stopped"), ("after=raise", 200, None)],
)
def test_middleware_that_raises_or_answers_itself(server, rid, query, status, body):
    with server.client() as client:
        for path in ("query", "run"):
            answer = client.get(f"/{path}/{rid}?{query}")
            assert (answer.status, answer.text) == (status, body or rid)
            assert stats(server)["in_use"] == 0


def test_what_sanic_answers_itself(server, rid):
    with server.client() as client:
        assert client.get("/none").status == 404
        assert client.post("/nothing").status == 405
        assert client.get(f"/fail/{rid}").status == 500
        assert client.get("/none?before=raise").status == 418
        client.send_bytes(b"NONSENSE\r\n\r\n")
        assert client.read_response().status == 400
    with server.client() as client:
        client.send_part(Request(f"/length/{rid}", "POST", headers={"Content-Length": "999999999"}), 0)
        assert client.read_response().status == 413


def test_a_query_by_an_orphan_task_is_refused_unless_it_opens_a_scope(server, rid):
    with server.client() as client:
        assert client.get(f"/orphan/{rid}").text == rid
        assert client.get(f"/outcome/{rid}").text == f"ScopeEnded {rid}"


@pytest.mark.parametrize("kind_of_call", ["inline", "run"])
def test_children_of_a_request_take_turns(server, rid, kind_of_call):
    with server.client() as client:
        assert client.get(f"/gather/{kind_of_call}/{rid}").json() == [f"{rid}-{n}" for n in range(20)]


# -- errors ------------------------------------------------------------------------------------------------------------


def test_database_errors_become_responses_in_sanics_own_form(server, rid):
    with server.client() as client:
        missing, twice, busy = client.get("/missing"), client.get(f"/twice/{rid}"), client.get("/busy")
        assert (missing.status, twice.status, busy.status) == (404, 409, 503)
        assert busy.headers["retry-after"] == "1"
        assert "Not found." in missing.text
        assert "insert" not in twice.text.lower()


# -- disconnects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize("path", ["hang", "atomic/hang", "stream/idle", "stream/endless"])
def test_a_client_that_leaves_gives_the_connection_back(server, path, how, rid):
    with server.client() as client:
        client.send(Request(f"/{path}/{rid}"))
        if path.startswith("stream"):
            assert client.read_head().status == 200
            assert client.read_body(1)
        else:
            eventually(lambda: stats(server)["in_use"] == 1, message="the handler has begun")
        client.drop(how)
    settled(server)
    assert count(server, rid) == 0


def test_a_client_that_leaves_during_its_upload(server, rid):
    for path in ("length", "upload"):
        with server.client() as client:
            client.send_part(Request(f"/{path}/{rid}", "POST", b"y" * 100_000), 1000)
            eventually(lambda: stats(server)["live"], message="the request has begun")
            client.drop("rst")
        settled(server)


def test_a_cancelled_request_whose_thread_is_inside_a_query_drops_the_connection(server, rid):
    with server.client() as client:
        client.send(Request(f"/thread/{rid}?seconds=0.5"))
        eventually(lambda: stats(server)["in_use"] == 1, message="the thread is in its query")
        client.drop("rst")
        with server.client() as other:
            assert [other.get(f"/query/{rid}{n}").text for n in range(20)] == [f"{rid}{n}" for n in range(20)]
    settled(server)


def test_an_idle_stream_holds_no_connection(server, rid):
    clients = [server.client() for _ in range(20)]
    for client in clients:
        client.send(Request(f"/stream/idle/{rid}"))
        assert client.read_head().status == 200
        assert client.read_body(1)
    found = stats(server)
    assert found["in_use"] == 0
    assert len(found["live"]) == 20
    for client in clients:
        client.drop()


@pytest.mark.parametrize("how", ["before", "inline", "thread", "run", "eof", "between"])
def test_an_idle_stream_holds_no_connection_wherever_it_has_queried_first(server, rid, how):
    """Nothing stands in the way of its response before that."""
    clients = [server.client() for _ in range(10)]
    for client in clients:
        client.send(Request(f"/first/{how}/{rid}"))
        assert client.read_head().status == 200
        assert client.read_body(len(rid)) == rid.encode()
    eventually(lambda: stats(server)["idling"].count(rid) == 10, message="they have queried")
    eventually(lambda: not stats(server)["in_use"], message="an idle stream holds a connection")
    for client in clients:
        client.drop()


def test_a_stream_that_fails_after_its_first_byte(server, rid):
    with server.client() as client:
        client.send(Request(f"/stream/raise/{rid}"))
        assert client.read_head().status == 200
        assert client.read_body() == rid.encode()


# -- atomic requests and policies --------------------------------------------------------------------------------------


def test_a_policy_holds_for_the_routes_of_its_blueprint_or_group(server, rid):
    plain, in_transaction = {"connected": False, "atomic": False}, {"connected": True, "atomic": True}
    expected = {
        "state": plain,
        "atomic/state": in_transaction,
        "atomic/excluded": plain,
        "atomic/left-out": plain,
        "group/other/state": in_transaction,
        "group/reports/state": {"connected": True, "atomic": False},
    }
    with server.client() as client:
        assert {path: client.get(f"/{path}/{rid}").json() for path in expected} == expected


@pytest.mark.parametrize(("status", "rows"), [(200, 1), (204, 1), (302, 1), (299, 0), (404, 0), (418, 0), (500, 0)])
def test_the_status_decides_whether_an_atomic_request_is_committed(server, rid, status, rows):
    with server.client() as client:
        assert client.get(f"/atomic/write/{rid}/{status}").status == status
    assert count(server, rid) == rows


def test_what_a_stream_writes_after_the_first_byte_is_committed_by_itself(server, rid):
    with server.client() as client:
        assert client.get(f"/atomic/stream/{rid}").text == rid
        assert client.get(f"/atomic/late-stream/{rid}").text == rid
    assert count(server, rid) == 3


@pytest.mark.parametrize("form", ["plain", "empty", "stream", "old"])
def test_a_commit_that_fails_is_an_error_response(server, rid, form):
    with server.client() as client:
        answer = client.get(f"/atomic/spoil/{form}/{rid}")
        assert answer.status in (409, 500, 503)
        assert rid not in answer.text
        assert client.get(f"/query/{rid}").text == rid
    assert count(server, rid) == 0


# -- websockets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind_of_handler", ["echo", "run", "parts"])
def test_a_websocket_holds_a_connection_only_while_it_answers(server, kind_of_handler):
    sockets = [WebSocket(f"{server.url}/ws/{kind_of_handler}") for _ in range(40)]
    try:
        for number, socket in enumerate(sockets):
            assert [socket.echo(f"{number}-{word}") for word in "ab"] == [f"{number}-a", f"{number}-b"]
        eventually(lambda: stats(server)["in_use"] == 0, message="idle websockets hold connections")
        assert len(stats(server)["live"]) == 40
    finally:
        for number, socket in enumerate(sockets):
            if number % 2:
                socket.abort("rst" if number % 4 == 1 else "fin")
            else:
                assert socket.close() == 1000


def test_two_hundred_idle_websockets_hold_nothing(server):
    sockets = [WebSocket(f"{server.url}/ws/echo") for _ in range(200)]
    assert stats(server)["in_use"] == 0
    for socket in sockets:
        socket.abort()


@pytest.mark.parametrize("kind_of_handler", ["raise", "open"])
def test_a_websocket_that_fails_or_leaves_inside_a_transaction(server, kind_of_handler):
    socket = WebSocket(f"{server.url}/ws/{kind_of_handler}")
    assert socket.echo("one") == "one"
    socket.abort()


# -- timeouts, workers, restart ----------------------------------------------------------------------------------------


def test_timeouts_of_the_server_end_the_scope(tmp_path, rid):
    timeouts = {"SANIC_RESPONSE_TIMEOUT": "0.4", "SANIC_REQUEST_TIMEOUT": "0.4", "SANIC_KEEP_ALIVE_TIMEOUT": "0.4"}
    with scratch("sqlite", tmp_path) as place, serve(place, single_process=True, env=timeouts) as server:
        with server.client() as client:
            assert client.get(f"/hang/{rid}").status == 503
        with server.client() as client:
            assert client.get(f"/atomic/hang/{rid}").status == 503
        with server.client() as client:
            assert client.get(f"/thread/{rid}?seconds=1").status == 503
        with server.client() as client:
            client.send_bytes(b"GET /query/x HTTP/1.1\r\nHo")
            assert client.read_response().status == 408
        with server.client() as client:
            client.send(Request(f"/stream/idle/{rid}"))
            client.read_head()
            client.read_eof()
        settled(server)
        assert count(server, rid) == 0


def test_an_error_after_the_client_has_left_is_no_other_error(server, rid):
    """Sanic hands a second exception to `handle_exception` when the response to the first could not be sent."""
    with server.client() as client:
        client.send(Request(f"/leaves/{rid}"))
        eventually(lambda: count(server, rid) == 1, message="the handler waits")
        client.drop("rst")
    eventually(lambda: count(server, rid) == 2, message="the handler has ended")
    settled(server)
    assert "NoneType" not in server.output


@pytest.mark.parametrize("options", [{}, {"server_timing": True}])
def test_app_run_can_send_its_workers_the_way_to_the_application(options):
    """It pickles `get_app`, bound to the application's class, where worker processes are spawned."""

    class Shop(Sanic):
        pass

    for kind in (Sanic, Shop):
        app = kind(f"pickled{next(numbers)}")
        Peewee(peewee.SqliteDatabase("unused.db"), **options).init_app(app)
        assert type(app).get_app == kind.get_app
    app = Sanic(f"pickled{next(numbers)}")
    Peewee(peewee.SqliteDatabase("unused.db"), **options).init_app(app)
    assert pickle.loads(pickle.dumps(functools.partial(type(app).get_app, app.name)))() is app


@pytest.mark.parametrize("name", KINDS)
def test_two_workers_each_with_a_pool_of_their_own(name, tmp_path, rid):
    require_server(name)
    with scratch(name, tmp_path) as place:
        with serve(place, workers=2) as server:
            paths = [
                f"/{path}/{rid}-{n}"
                for n in range(100)
                for path in ("run", "atomic/state", "group/reports/state", "fail")
            ]
            results = hammer(server.url, paths, concurrency=40)
            assert statuses(results) == {200: 300, 500: 100}
            settled(server, processes=2)
            assert len(place.sessions()) <= (10 if name != "sqlite" else 40)
        assert place.sessions() == []


def test_a_stop_lets_requests_in_flight_finish(tmp_path, rid):
    with scratch("sqlite", tmp_path) as place, serve(place, single_process=True) as server:
        with server.client() as client:
            client.send(Request(f"/thread/{rid}?seconds=1", headers={"Connection": "close"}))
            eventually(lambda: stats(server)["in_use"] == 1, message="the thread is in its query")
            server.signal(signal.SIGTERM)
            assert client.read_response().text == rid
        assert server.wait() == 0
        assert "still running" not in server.output


def test_a_worker_whose_database_is_down_says_so_at_start(tmp_path):
    url = f"sqlite+pool:///{tmp_path}/missing/dir.db?check_same_thread=false"
    server = webservers.sanic(APP, factory=True, single_process=True, env={"DATABASE_URL": url})
    with pytest.raises(ServerError, match="cannot be reached at start"):
        server.__enter__()


# -- ASGI --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asgi_server(tmp_path_factory):
    with scratch("sqlite", tmp_path_factory.mktemp("asgi")) as place:
        environment = {"DATABASE_URL": place.pool_url()}
        # Sanic does not tell a handler under ASGI that its client has left: what idles for ever must be cancelled.
        options = ("--timeout-graceful-shutdown", "1")
        with webservers.uvicorn(APP, factory=True, env=environment, options=options) as server:
            yield server


def test_under_an_asgi_server(asgi_server, rid):
    with asgi_server.client() as client:
        for path in ("query", "def", "run", "injected", "stream/early"):
            assert client.get(f"/{path}/{rid}").text == rid
        assert client.get(f"/stream/end/{rid}").text == client.get(f"/old-stream/{rid}").text == rid * 2
        assert client.post(f"/length/{rid}", b"x" * 400_000).text == "400000"
        assert client.get(f"/fail/{rid}").status == 500
        for status, rows in ((200, 1), (500, 1), (299, 1)):
            assert client.get(f"/atomic/write/{rid}/{status}").status == status
            assert count(asgi_server, rid) == rows
        for form in ("plain", "stream", "old"):
            assert client.get(f"/atomic/spoil/{form}/{rid}").status == 409
        assert client.get(f"/atomic/stream/{rid}").text == rid
        assert count(asgi_server, rid) == 3
    settled(asgi_server)


def test_websockets_under_an_asgi_server(asgi_server):
    sockets = [WebSocket(f"{asgi_server.url}/ws/open") for _ in range(5)]
    assert [socket.echo(str(number)) for number, socket in enumerate(sockets)] == ["0", "1", "2", "3", "4"]
    assert stats(asgi_server)["in_use"] == 5  # each has a transaction open
    for socket in sockets:
        socket.close()
    settled(asgi_server)


def test_an_idle_stream_under_an_asgi_server_holds_nothing(asgi_server, rid):
    with asgi_server.client() as client:
        client.send(Request(f"/stream/idle/{rid}"))
        client.read_head()
        assert client.read_body(1)
        assert stats(asgi_server)["in_use"] == 0


# -- set-up, without a server ------------------------------------------------------------------------------------------


@pytest.fixture
def make_database(tmp_path):
    databases = []

    def make(name="test"):
        database = PooledSqliteDatabase(
            str(tmp_path / f"{name}.db"), max_connections=5, timeout=5, check_same_thread=False
        )
        databases.append(database)
        return database

    yield make
    for database in databases:
        assert not database._in_use
        database.close_all()


@pytest.fixture
def make_sanic():
    names = []

    def make(name=None, **options):
        names.append(name or f"app{next(numbers)}")
        app = Sanic(names[-1], **options)
        app.config.TOUCHUP = False  # it rewrites the class, once for a process
        return app

    yield make
    for name in names:
        Sanic._app_registry.pop(name, None)
    Sanic.test_mode = False


def one(database):
    return str(database.execute_sql("SELECT 1").fetchone()[0])


def client_of(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")


async def asgi_get(app, *paths):
    """Start the application, GET the paths, stop it: as an ASGI server does."""
    sent = asyncio.Queue()
    received = asyncio.Queue()
    lifespan = asyncio.create_task(app({"type": "lifespan"}, received.get, sent.put))
    await received.put({"type": "lifespan.startup"})
    assert (await sent.get())["type"] == "lifespan.startup.complete"
    async with client_of(app) as client:
        answers = [await client.get(path) for path in paths]
    await received.put({"type": "lifespan.shutdown"})
    assert (await sent.get())["type"] == "lifespan.shutdown.complete"
    await lifespan
    return answers


def test_init_app_twice_is_an_error(make_database, make_sanic):
    app, orm = make_sanic("shop"), Peewee(make_database())
    orm.init_app(app)
    with pytest.raises(ConfigurationError, match=r"Sanic\(name=\"shop\"\): this Peewee is installed already"):
        orm.init_app(app)


def test_use_before_init_app_says_what_to_do(make_sanic):
    orm = Peewee()
    with pytest.raises(ConfigurationError, match="init_app"):
        orm.database.execute_sql("SELECT 1")
    with pytest.raises(ConfigurationError, match="init_app"):
        orm["default"]


@pytest.mark.anyio
async def test_one_instance_serves_two_applications(make_database, make_sanic):
    database = make_database()
    orm = Peewee(database)
    blueprint = orm.blueprint("db", url_prefix="/db")

    @blueprint.get("/one")
    async def handler(request):
        return text(one(database) + current_scope().label)

    apps = [make_sanic("first"), make_sanic("second")]
    for app in apps:
        app.blueprint(blueprint)
    for app in apps:
        (answer,) = await asgi_get(app, "/db/one")
        assert answer.text == "1request GET /db/one"
    assert not orm.runtime.in_flight()


@pytest.mark.anyio
async def test_two_instances_on_one_application_nest(make_database, make_sanic):
    first, second = make_database("a"), make_database("b")
    app = make_sanic()
    orms = [Peewee(first, transaction=True), Peewee({"audit": second}, connect="eager")]
    for orm in orms:
        orm.init_app(app)

    @app.get("/")
    async def handler(request):
        assert (first.is_closed(), second.is_closed()) == (False, False)  # atomic, eager
        answer = one(first) + one(second) + await orms[0].run(one, first) + await orms[1].run(one, orms[1]["audit"])
        assert (first.in_transaction(), second.in_transaction()) == (True, False)
        return text(answer)

    answers = await asgi_get(app, "/", "/", "/none")
    assert [answer.status_code for answer in answers] == [200, 200, 404]
    assert answers[0].text == "1111"
    assert app.ctx.peewee == orms
    assert not any(orm.runtime.in_flight() for orm in orms)


@pytest.mark.anyio
async def test_an_asgi_middleware_around_shares_its_scope(make_database, make_sanic):
    database = make_database()
    app, orm = make_sanic(), Peewee(database)
    orm.init_app(app)
    seen = []

    @app.get("/")
    async def handler(request):
        seen.append((len(orm.runtime.in_flight()), current_scope()))
        return text(one(database))

    wrapped = PeeweeMiddleware(app, database)
    (answer,) = await asgi_get(wrapped, "/")
    assert answer.text == "1"
    assert seen[0][0] == 0
    assert seen[0][1].ended


def test_options_come_from_the_applications_config(make_sanic, tmp_path, monkeypatch):
    url = f"sqlite+pool:///{tmp_path}/config.db?max_connections=3"
    monkeypatch.setenv("SANIC_PEEWEE_DATABASE", url)
    monkeypatch.setenv("SANIC_PEEWEE_TRANSACTION", "true")
    app, orm = make_sanic(), Peewee(check="off")
    app.config.PEEWEE_RUN_THREADS = 7

    class Thing(orm.Model):
        pass

    orm.init_app(app)
    options = orm.runtime.options
    assert (options.transaction, options.run_threads, options.check) == (True, 7, "off")
    assert orm.database._max_connections == 3
    with orm.scope():
        Thing.create_table()
        assert Thing.select().count() == 0
    orm.database.close_idle()


def test_an_unknown_key_is_refused_by_name(make_database, make_sanic):
    app = make_sanic()
    app.config.PEEWEE_TRANSACTIONS = True
    with pytest.raises(ConfigurationError, match=r"PEEWEE_TRANSACTIONS.*PEEWEE_TRANSACTION"):
        Peewee(make_database()).init_app(app)


def test_a_policy_that_cannot_work_is_refused_at_once(make_database):
    orm = Peewee(make_database())
    with pytest.raises(ConfigurationError, match="connect"):
        orm.policy(Blueprint("b"), connect="quickly")
    with pytest.raises(ConfigurationError, match="no option errors; it has connect"):
        orm.policy(Blueprint("b"), errors=True)
    with pytest.raises(ConfigurationError, match="give a blueprint or a group"):
        orm.policy("b", connect="eager")


def test_applications_of_one_peewee_have_the_same_settings(make_database, make_sanic):
    orm, first, second = Peewee(make_database()), make_sanic("first"), make_sanic("second")
    orm.init_app(first)
    second.config["PEEWEE_TRANSACTION"] = True
    with pytest.raises(ConfigurationError, match=r"second.* has other PEEWEE_"):
        orm.init_app(second)


@pytest.mark.anyio
async def test_a_policy_may_come_after_init_app_and_a_later_one_wins(make_database, make_sanic):
    database = make_database()
    app, orm, blueprint = make_sanic(), Peewee(database), Blueprint("b")

    @blueprint.get("/")
    async def handler(request):
        return text(f"{not database.is_closed()}")

    app.blueprint(blueprint)
    orm.init_app(app)
    orm.policy(blueprint, connect="lazy")
    orm.policy(Blueprint.group(blueprint), connect="lazy")
    orm.policy(blueprint, connect="eager")
    (answer,) = await asgi_get(app, "/")
    assert answer.text == "True"


@pytest.mark.anyio
async def test_a_policy_of_a_group_holds_in_the_groups_in_it_and_theirs_goes_first(make_database, make_sanic):
    database = make_database()
    app, orm = make_sanic(), Peewee(database)
    blueprints = [Blueprint(name, url_prefix=name) for name in "abc"]
    for blueprint in blueprints:

        @blueprint.get("/")
        async def handler(request):
            return text(f"{not database.is_closed()}")

    a, b, c = blueprints
    inner = Blueprint.group(b)
    outer = Blueprint.group(Blueprint.group(a), inner, c)
    orm.policy(inner, connect="lazy")
    orm.policy(outer, connect="eager")
    app.blueprint(outer)
    orm.init_app(app)
    answers = await asgi_get(app, "/a/", "/b/", "/c/")
    assert [answer.text for answer in answers] == ["True", "False", "True"]


@pytest.mark.anyio
@pytest.mark.parametrize("own", [False, True], ids=["Sanic's handler", "one of the application's"])
async def test_an_exception_that_nobody_handles_rolls_back_whatever_its_status(make_database, make_sanic, own):
    """`rollback_on` is for responses that somebody meant, as an exception handler does; one for all may mean any."""
    database = make_database()

    class Note(database.Model):
        text = peewee.TextField()

    class Own(ErrorHandler):
        def default(self, request, exception):
            return text("", 500) if isinstance(exception, KeyError) else super().default(request, exception)

    app = make_sanic(error_handler=Own()) if own else make_sanic()
    Peewee(database, transaction=True, rollback_on=[409], create_tables=[Note], connect="lazy").init_app(app)

    @app.get("/<kind:str>")
    async def handler(request, kind):
        Note.create(text=kind)
        if kind == "handled":
            raise LookupError
        if kind == "unhandled":
            raise RuntimeError
        return text("", 404)

    @app.exception(LookupError)
    async def handled(request, error):
        return text("", 500)

    with database:
        database.create_tables([Note])
    answers = await asgi_get(app, "/unhandled", "/handled", "/fine")
    assert [answer.status_code for answer in answers] == [500, 500, 404]
    with database:
        assert [each.text for each in Note.select()] == ["unhandled"] * own + ["handled", "fine"]


@pytest.mark.parametrize("first", ["init_app", "blueprint"])
def test_health_endpoints_and_init_app_come_in_either_order(make_database, make_sanic, first):
    app, orm = make_sanic(), Peewee(make_database())
    steps = [lambda: orm.init_app(app), lambda: app.blueprint(orm.blueprint(url_prefix="/db", health=True))]
    for step in steps if first == "init_app" else reversed(steps):
        step()
    with pytest.raises(ConfigurationError, match="installed already"):
        orm.init_app(app)


@pytest.mark.anyio
async def test_the_reason_of_a_503_is_one_line_in_the_log_and_no_value_of_a_query_is(tmp_path, make_sanic, caplog):
    file = peewee.SqliteDatabase(tmp_path / "file.db")
    nowhere = peewee.SqliteDatabase(tmp_path / "nowhere" / "file.db")
    app = make_sanic()
    Peewee({"default": file, "nowhere": nowhere}, errors=True, check="off").init_app(app)

    class Thing(file.Model):
        pass

    @app.get("/missing")
    async def missing(request):
        file.create_tables([Thing])
        Thing.get_by_id(99)

    @app.get("/away")
    async def away(request):
        nowhere.execute_sql("SELECT 1")

    with caplog.at_level("INFO", "peewee_frameworks"):
        answers = await asgi_get(app, "/missing", "/away")
    assert [answer.status_code for answer in answers] == [404, 503]
    (record,) = [record for record in caplog.records if record.name == "peewee_frameworks.app"]
    assert record.message.startswith("request GET /away: DatabaseUnavailable: ")
    assert (record.request, record.status) == ("request GET /away", 503)


@pytest.mark.anyio
async def test_the_applications_own_exception_handlers_win(make_database, make_sanic):
    database = make_database()
    app = make_sanic()

    class Thing(peewee.Model):
        class Meta:
            pass

    database.bind([Thing])

    @app.exception(peewee.IntegrityError)
    async def mine(request, exception):
        return text("mine", 422)

    Peewee(database, errors=True, create_tables=[Thing]).init_app(app)

    @app.get("/conflict")
    async def conflict(request):
        Thing.create(id=1)
        Thing.create(id=1)

    @app.get("/missing")
    async def missing(request):
        Thing.get_by_id(99)

    @app.get("/wrong")
    async def wrong(request):
        database.execute_sql("SELECT nonsense")

    answers = await asgi_get(app, "/conflict", "/missing", "/wrong")
    assert [answer.status_code for answer in answers] == [422, 404, 500]
    assert "nonsense" not in answers[1].text


def test_sanics_test_clients(make_database, make_sanic):
    database = make_database()
    app, orm = make_sanic(), Peewee(database)
    orm.init_app(app)

    @app.get("/")
    async def handler(request):
        return text(await orm.run(one, database) + one(database))

    for _ in range(2):  # a server and a loop for each
        _, answer = app.test_client.get("/")
        assert answer.text == "11"
    _, answer = asyncio.run(app.asgi_client.get("/"))
    assert answer.text == "11"
    app.asgi = False


def test_the_reusable_test_client(make_database, make_sanic):
    database = make_database()
    app, orm = make_sanic(), Peewee(database)
    orm.init_app(app)

    @app.get("/")
    async def handler(request):
        return text(await orm.run(one, database) + one(database))

    with reserved_port() as port, ReusableClient(app, port=port) as client:
        assert [client.get("/")[1].text for _ in range(3)] == ["11"] * 3
    assert not orm.runtime.in_flight()


def test_init_app_on_an_application_that_runs_is_refused(make_database, make_sanic):
    """Nothing would open its pool."""
    app, orm, told = make_sanic(), Peewee(make_database()), []

    @app.before_server_start
    async def install(app):
        with pytest.raises(ConfigurationError, match=r"has started already\. Call init_app") as caught:
            orm.init_app(app)
        told.append(caught.value)

    app.get("/")(lambda request: text("ok"))
    with reserved_port() as port, ReusableClient(app, port=port) as client:
        assert client.get("/")[1].text == "ok"
    assert len(told) == 1


def test_a_thread_that_first_queries_at_its_requests_very_end_leaves_nothing(make_database, make_sanic):
    """The request looks whether it has anything to give back, and finds nothing yet."""
    database, told = make_database(), []

    def late():
        try:
            database.execute_sql("SELECT 1")
        except ScopeEnded as error:
            told.append(str(error))

    class Watched(Runtime):
        @property
        def drained(self):
            if isinstance(getattr(current_scope(), "owner", None), Watched):
                thread = threading.Thread(target=contextvars.copy_context().run, args=(late,))
                thread.start()
                thread.join()

        @drained.setter
        def drained(self, callback):
            pass

    app, orm = make_sanic(), Peewee(database)
    app.get("/")(lambda request: text("ok"))
    orm.init_app(app)
    orm.runtime.__class__ = Watched
    with reserved_port() as port, ReusableClient(app, port=port) as client:
        assert client.get("/")[1].text == "ok"
        eventually(lambda: told)
    eventually(lambda: not database._in_use)


def test_an_application_keeps_its_class_name_and_its_own_subclass(make_database, make_sanic):
    class Shop(Sanic):
        pass

    app = Shop("shop_subclass")
    Peewee(make_database()).init_app(app)
    Sanic._app_registry.pop("shop_subclass")
    assert isinstance(app, Shop)
    assert type(app).__name__ == "Shop"
