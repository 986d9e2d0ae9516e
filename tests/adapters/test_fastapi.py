"""FastAPI's adapter: dependencies, OpenAPI, and real servers under the loads that break the usual recipes.

What all frameworks have in common is in contract/, what FastAPI has from Starlette in test_starlette.py.
"""

import asyncio
import contextlib
import json
import threading
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import httpx2
import peewee
import pytest
from anyio.to_thread import current_default_thread_limiter
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Response, WebSocket
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException as StarletteHTTPException

from peewee_frameworks import ConcurrentUse, ConfigurationError, connection_scope, current_scope
from peewee_frameworks.fastapi import Peewee
from peewee_frameworks.pool import PooledSqliteDatabase
from tests.support.client import Request
from tests.support.concurrency import Halves, eventually
from tests.support.databases import scratch
from tests.support.load import hammer, statuses
from tests.support.servers import require_server
from tests.support.webservers import uvicorn


class Shop:
    """An application's database, its one table, and its Peewee."""

    def __init__(self, database: Any, **options: Any) -> None:
        self.database = database
        self.orm = Peewee(database, **options)

        class Item(peewee.Model):
            name = peewee.CharField(64, unique=True)

        class Part(peewee.Model):
            item = peewee.ForeignKeyField(Item, deferrable="INITIALLY DEFERRED")

        database.bind([Item, Part])
        self.Item, self.Part = Item, Part
        with connection_scope(database):
            database.create_tables([Item])
            if not isinstance(database, peewee.MySQLDatabase):
                database.create_tables([Part])

    def names(self) -> list[str]:
        with connection_scope(self.database):
            return sorted(item.name for item in self.Item)

    def app(self, **options: Any) -> FastAPI:
        app = FastAPI(lifespan=self.orm.lifespan(), **options)
        self.orm.init_app(app)
        return app

    def everything_is_back(self) -> bool:
        eventually(lambda: not self.database._in_use, message="a connection is still in use")
        assert not self.orm.runtime.in_flight()
        return True


@pytest.fixture
def shop(database):
    return Shop(database)


@pytest.fixture
def sqlite_shop(make_place):
    shops = []

    def make(**options: Any) -> Shop:
        shops.append(Shop(make_place("sqlite").make_database(timeout=2), **options))
        return shops[-1]

    yield make
    for shop in shops:
        shop.database.close_all()


# -- dependencies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["function", "request"])
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_the_transaction_dependency_commits_on_success_and_rolls_back_on_an_exception(scope, kind, shop):
    """In sync and async endpoints, in both of FastAPI's scopes; committed when the response is there."""
    Atomic = Annotated[Any, Depends(shop.orm.transaction, scope=scope)]
    app = shop.app()

    def create(name, fail):
        shop.Item.create(name=name)
        if fail == "http":
            raise HTTPException(418)
        if fail == "error":
            raise LookupError("asked for")
        return shop.database.in_transaction()

    if kind == "def":

        @app.post("/{name}")
        def endpoint(name: str, db: Atomic, fail: str = ""):
            return create(name, fail)
    else:

        @app.post("/{name}")
        async def endpoint(name: str, db: Atomic, fail: str = ""):
            return await shop.orm.run(create, name, fail)

    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.post("/good").json() is True
        assert client.post("/bad?fail=http").status_code == 418
        assert client.post("/worse?fail=error").status_code == 500
        assert shop.everything_is_back()
        assert shop.names() == ["good"]


@pytest.mark.parametrize("scope", ["function", "request"])
def test_a_commit_that_fails_gives_the_client_an_error(scope, make_place):
    """With the usual yield dependency the client gets 200; here a deferred constraint is a 409 or the handler's answer."""
    shop = Shop(make_place("postgres").make_database(), errors=True)
    app = shop.app()

    @app.post("/")
    def spoil(db: Annotated[Any, Depends(shop.orm.transaction, scope=scope)]):
        shop.Item.create(name="lost")
        shop.Part.create(item=-1)

    with TestClient(app) as client:
        assert client.post("/").status_code == 409
        assert shop.everything_is_back()
        assert shop.names() == []
    shop.database.close_all()


def test_with_scope_function_the_applications_handler_sees_the_error_of_the_commit(make_place):
    """It comes out of the dependency, inside the route, before the response."""
    shop = Shop(make_place("postgres").make_database())
    app = shop.app()

    @app.exception_handler(peewee.IntegrityError)
    def handler(request, error):
        return Response("mine", 422)

    @app.post("/")
    def spoil(db: Annotated[Any, Depends(shop.orm.transaction, scope="function")]):
        shop.Part.create(item=-1)

    with TestClient(app) as client:
        response = client.post("/")
        assert (response.status_code, response.text) == (422, "mine")
        assert shop.everything_is_back()
    shop.database.close_all()


@pytest.mark.parametrize("cls", [HTTPException, StarletteHTTPException])
def test_errors_are_answered_by_the_applications_handler_for_http_exceptions(sqlite_shop, cls):
    """Whichever of the two classes it was registered for."""
    shop = sqlite_shop(errors=True)
    app = shop.app()

    @app.exception_handler(cls)
    def handler(request, error):
        return Response(f"mine: {error.detail}", error.status_code)

    @app.get("/")
    def endpoint():
        shop.Item.get_by_id(99)

    with TestClient(app) as client:
        response = client.get("/")
        assert (response.status_code, response.text) == (404, "mine: Not found.")


def test_the_transaction_dependency_takes_part_in_a_transaction_that_is_open(shop):
    """Twice in one request, on the router and the endpoint, inside an atomic request: one transaction, one COMMIT."""
    router = APIRouter(dependencies=[Depends(shop.orm.transaction)])

    @router.post("/{name}")
    def create(name: str, db: Annotated[Any, Depends(shop.orm.transaction, scope="function")], fail: bool = False):
        shop.Item.create(name=name)
        if fail:
            raise HTTPException(400)

    app = shop.app()
    app.include_router(router)
    with TestClient(app) as client:
        client.post("/good")
        client.post("/bad?fail=1")
        assert shop.everything_is_back()
        assert shop.names() == ["good"]


def test_an_atomic_request_is_not_committed_by_the_dependency_within_it(sqlite_shop):
    """With transaction=True the response's status decides, as everywhere else."""
    shop = sqlite_shop(transaction=True)
    app = shop.app()

    @app.post("/")
    def create(db: Annotated[Any, Depends(shop.orm.transaction, scope="function")]):
        shop.Item.create(name="x")
        return Response(status_code=409)

    with TestClient(app) as client:
        assert client.post("/").status_code == 409
        assert shop.everything_is_back()
        assert shop.names() == []


def test_a_dependency_that_has_queried_does_not_keep_the_transaction_from_beginning(shop):
    """The connection is open already: BEGIN comes at once, off the event loop's thread."""

    def user():
        return shop.Item.select().count()

    app = shop.app()

    @app.post("/{name}")
    def create(name: str, before: Annotated[int, Depends(user)], db: Annotated[Any, Depends(shop.orm.transaction)]):
        shop.Item.create(name=name)
        raise HTTPException(400)

    with TestClient(app) as client:
        client.post("/lost")
        assert shop.everything_is_back()
        assert shop.names() == []


def test_a_sync_yield_dependency_of_the_application_shares_the_transaction_across_its_threads(shop):
    """Its setup, the endpoint and its teardown run on three threads, in one scope."""

    def atomic():
        with shop.database.atomic():
            yield shop.database

    app = shop.app()

    @app.post("/{name}")
    def create(name: str, db: Annotated[Any, Depends(atomic, scope="function")], fail: bool = False):
        shop.Item.create(name=name)
        if fail:
            raise HTTPException(400)
        return db.in_transaction()

    with TestClient(app) as client:
        assert client.post("/good").json() is True
        assert client.post("/bad?fail=1").status_code == 400
        assert shop.everything_is_back()
        assert shop.names() == ["good"]


def test_the_connection_dependency_gives_the_database_everywhere(shop):
    """On the application, a router, an endpoint, a websocket; for a background task too."""
    Connection = Annotated[Any, Depends(shop.orm.connection)]
    app = FastAPI(lifespan=shop.orm.lifespan(), dependencies=[Depends(shop.orm.connection)])
    shop.orm.init_app(app)
    router = APIRouter(prefix="/r", dependencies=[Depends(shop.orm.connection)])
    seen = []

    def note(name):
        seen.append(current_scope())
        shop.Item.create(name=name)

    @router.get("/{name}")
    def create(name: str, db: Connection, tasks: BackgroundTasks):
        seen.append(current_scope())
        tasks.add_task(note, name)
        return db is shop.database

    @app.websocket("/ws")
    async def echo(socket: WebSocket, db: Connection):
        await socket.accept()
        assert db is shop.database
        async for name in socket.iter_text():
            item = await shop.orm.run(shop.Item.create, name=name)
            await socket.send_text(item.name)

    app.include_router(router)
    with TestClient(app) as client:
        assert client.get("/r/task").json() is True
        with client.websocket_connect("/ws") as socket:
            for name in ("one", "two"):
                socket.send_text(name)
                assert socket.receive_text() == name
                eventually(lambda: not shop.database._in_use)
        assert shop.everything_is_back()
        assert shop.names() == ["one", "task", "two"]
    assert seen[0] is seen[1]


def test_a_test_may_override_the_connection(shop, sqlite_shop):
    """FastAPI's own `dependency_overrides`, which works by identity."""
    other = sqlite_shop()
    app = shop.app()

    @app.get("/")
    def tell(
        db: Annotated[Any, Depends(shop.orm.connection)],
        named: Annotated[Any, Depends(shop.orm.connection_to("default"))],
    ):
        return [db is shop.database, named is shop.database]

    client = TestClient(app)
    assert client.get("/").json() == [True, True]
    app.dependency_overrides[shop.orm.connection] = lambda: other.database
    app.dependency_overrides[shop.orm.connection_to("default")] = lambda: other.database
    assert client.get("/").json() == [False, False]


def test_several_databases_have_a_dependency_each(make_place):
    """An alias that does not exist is refused where the dependency is made."""
    shop, reports = make_place("sqlite").make_database(), make_place("sqlite").make_database()
    orm = Peewee({"default": shop, "reports": reports})
    app = FastAPI()
    orm.init_app(app)

    @app.get("/")
    def tell(
        db: Annotated[Any, Depends(orm.connection)],
        other: Annotated[Any, Depends(orm.connection_to("reports"))],
        both: Annotated[Any, Depends(orm.transaction)],
    ):
        for each in (shop, reports):
            each.connect()
        return [db is shop, other is reports, shop.in_transaction(), reports.in_transaction()]

    assert TestClient(app).get("/").json() == [True] * 4
    with pytest.raises(ConfigurationError, match="No database 'report'; there are: default, reports"):
        orm.connection_to("report")
    eventually(lambda: not shop._in_use and not reports._in_use)


@pytest.mark.parametrize("name", ["connection", "transaction"])
def test_a_dependency_without_init_app_says_what_was_forgotten(name, sqlite_shop):
    """At the first request, by name."""
    dependency = getattr(sqlite_shop().orm, name)
    app = FastAPI()

    @app.get("/")
    def tell(db: Annotated[Any, Depends(dependency)]):
        raise AssertionError

    with pytest.raises(ConfigurationError, match=r"Did you forget to call orm\.init_app\(app\)\?"):
        TestClient(app).get("/")


def test_the_lifespan_alone_installs_everything(sqlite_shop):
    """Forgetting init_app costs nothing where the lifespan runs."""
    shop = sqlite_shop(transaction=True)
    app = FastAPI(lifespan=shop.orm.lifespan())

    @app.post("/{status}")
    def create(status: int, db: Annotated[Any, Depends(shop.orm.connection)]):
        shop.Item.create(name=str(status))
        return Response(status_code=status)

    with TestClient(app) as client:
        assert [client.post(f"/{status}").status_code for status in (200, 500)] == [200, 500]
        assert shop.everything_is_back()
        assert shop.names() == ["200"]


def test_init_app_keeps_on_event_and_the_lifespans_of_routers(sqlite_shop):
    """FastAPI ignores `on_event` as soon as `lifespan=` is given; `init_app` alone does not touch either."""
    shop = sqlite_shop()
    told = []

    @contextlib.asynccontextmanager
    async def of_router(app):
        shop.Item.create(name="router")
        told.append("router")
        yield
        told.append("router ends")

    router = APIRouter(lifespan=of_router)
    app = FastAPI()
    shop.orm.init_app(app)
    app.include_router(router)

    def startup():
        shop.Item.create(name="event")
        told.append("event")

    app.router.on_startup.append(startup)
    with TestClient(app):
        assert shop.everything_is_back()
        assert shop.names() == ["event", "router"]
    assert told == ["event", "router", "router ends"]


# -- errors and OpenAPI -------------------------------------------------------------------------------------------------


def test_errors_are_answered_in_fastapis_shape_and_documented(sqlite_shop):
    """404, 409 and 503 for each operation, and a description of the application's own stays."""
    shop = sqlite_shop(errors=True)
    app = shop.app()

    @app.get("/items/{name}", responses={404: {"description": "No such item"}})
    def get(name: str):
        return shop.Item.get(shop.Item.name == name).name

    @app.post("/items/{name}")
    def post(name: str):
        shop.Item.create(name=name)

    router = APIRouter()

    @router.get("/late")
    def late():
        raise peewee.OperationalError("a mistake in the SQL, not in the connection")

    app.include_router(router)
    with TestClient(app, raise_server_exceptions=False) as client:
        missing = client.get("/items/x")
        assert (missing.status_code, missing.json()) == (404, {"detail": "Not found."})
        assert client.post("/items/x").status_code == 200
        duplicate = client.post("/items/x")
        assert duplicate.status_code == 409
        assert "x" not in duplicate.json()["detail"].split()
        assert client.get("/late").status_code == 500
        for _ in range(2):
            paths = client.get("/openapi.json").json()["paths"]
    documented = {
        f"{method} {path}": set(operation["responses"])
        for path, operations in paths.items()
        for method, operation in operations.items()
    }
    assert documented == {
        "get /items/{name}": {"200", "404", "422", "503"},
        "post /items/{name}": {"200", "404", "409", "422", "503"},
        "get /late": {"200", "404", "503"},
    }
    assert paths["/items/{name}"]["get"]["responses"]["404"]["description"] == "No such item"
    assert "Retry-After" in paths["/late"]["get"]["responses"]["503"]["headers"]


def test_responses_documents_them_where_one_wants(sqlite_shop):
    """… without the option: `responses=orm.responses` on an application, router or endpoint."""
    shop = sqlite_shop()
    app = shop.app()

    @app.get("/with", responses=shop.orm.responses)
    def documented(): ...

    @app.get("/without")
    def plain(): ...

    paths = app.openapi()["paths"]
    assert set(paths["/with"]["get"]["responses"]) == {"200", "404", "409", "503"}
    assert set(paths["/without"]["get"]["responses"]) == {"200"}


def test_an_exhausted_pool_is_503_whether_lazy_or_eager(make_place):
    """Eager connects before any route, so there it is the middleware that answers; by dependency, the handler."""
    for connect in ("lazy", "eager"):
        shop = Shop(make_place("sqlite").make_database(max_connections=1, timeout=0.1), errors=True, connect=connect)
        app = shop.app()
        app.get("/")(shop.names)
        with TestClient(app) as client, connection_scope(shop.database) as holder:
            holder.connect()
            response = client.get("/")
            assert (response.status_code, response.headers["retry-after"]) == (503, "1"), connect
        assert shop.everything_is_back()
        shop.database.close_all()


def test_exclude_knows_the_routes_of_included_routers(sqlite_shop):
    """FastAPI includes routers lazily; their names are found all the same."""
    shop = sqlite_shop(transaction=True, exclude=["probe"])
    router, nested = APIRouter(prefix="/a"), APIRouter(prefix="/b")

    @nested.get("/{number}")
    def probe(number: int):
        shop.database.connect()
        return shop.database.in_transaction()

    @nested.get("/other/{number}")
    def other(number: int):
        shop.database.connect()
        return shop.database.in_transaction()

    router.include_router(nested)
    app = shop.app()
    app.include_router(router)
    with TestClient(app) as client:
        assert client.get("/a/b/1").json() is False
        assert client.get("/a/b/other/1").json() is True
        assert shop.everything_is_back()


@pytest.mark.anyio
@pytest.mark.parametrize("pool", ["playhouse", "ours"])
async def test_who_waits_for_a_connection_lends_its_thread_to_who_has_one(pool, make_place):
    """Holders need a thread for each further step (endpoint, response model), and waiting requests have them all."""
    place = make_place("sqlite")
    if pool == "ours":
        database = PooledSqliteDatabase(place.database, max_connections=2, timeout=20, pragmas={"journal_mode": "wal"})
    else:
        database = place.make_database(max_connections=2, timeout=20)
    shop = await asyncio.to_thread(Shop, database)  # a connect that takes its time is refused on a loop
    app = shop.app()
    limiter = current_default_thread_limiter()
    limiter.total_tokens = 4

    def first():
        return shop.Item.select().count()

    @app.get("/")
    def second(first: Annotated[int, Depends(first)]) -> int:
        return first + shop.Item.select().count()

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        async with asyncio.timeout(15):
            responses = await asyncio.gather(*(client.get("/") for _ in range(40)))
        assert [response.json() for response in responses] == [0] * 40
    assert limiter.total_tokens == 4
    assert limiter.borrowed_tokens == 0
    with connection_scope(database):
        assert first() == 0
    database.close_all()
    if pool == "ours":  # FastAPI caches what it learns of a dependency, and so keeps the database
        await database.pool.aclose(1)


@pytest.mark.anyio
async def test_gather_in_a_transaction_takes_turns_or_is_refused(shop):
    """`orm.run` takes turns in the transaction; a thread beside it never joins it unasked."""
    app = shop.app()

    @app.get("/run")
    async def run(db: Annotated[Any, Depends(shop.orm.transaction)]):
        await asyncio.gather(*(shop.orm.run(shop.Item.create, name=f"run {n}") for n in range(8)))
        raise HTTPException(400)

    @app.get("/block")
    async def block():
        def inside():
            with shop.database.atomic():
                shop.Item.create(name="inside")
                entered.set_result(None) if loop.is_closed() else loop.call_soon_threadsafe(entered.set_result, None)
                asyncio.run_coroutine_threadsafe(left.wait(), loop).result(10)

        loop = asyncio.get_running_loop()
        entered, left = loop.create_future(), asyncio.Event()
        thread = asyncio.create_task(asyncio.to_thread(inside))
        await entered
        try:
            await asyncio.to_thread(shop.Item.create, name="outside")
        except peewee.InterfaceError as error:
            return type(error).__name__
        finally:
            left.set()
            await thread

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        assert (await client.get("/run")).status_code == 400
        assert (await client.get("/block")).json() == "ConcurrentUse"
    assert shop.everything_is_back()
    assert shop.names() == ["inside"]
    shop.orm.runtime.stop()


# -- on real servers ----------------------------------------------------------------------------------------------------

SERVED = [("uvloop", "sqlite"), ("asyncio", "mysql"), ("uvloop", "postgres")]


@pytest.fixture(scope="module", params=SERVED, ids="-".join)
def server(request, tmp_path_factory):
    """The application of served_fastapi.py on uvicorn, with a stock pool of 5."""
    loop, kind = request.param
    require_server(kind)
    with scratch(kind, tmp_path_factory.mktemp("served")) as place:
        env = {"SERVED_PLACE": json.dumps(asdict(place))}
        with uvicorn("tests.adapters.served_fastapi:make_app", factory=True, loop=loop, env=env) as server:
            server.kind = kind
            yield server


@pytest.fixture
def served(server):
    """The server, which must hold nothing and have shared nothing after each test."""
    yield server
    with server.client() as client:
        stats = eventually(
            lambda: (now := client.get("/_stats").json())["in_use"] == 0 and not now["live"] and now,
            message="a connection is still in use",
        )
    assert stats["violations"] == []
    assert stats["peak"] <= 5


@contextmanager
def no_trace(server, name):
    """Afterwards no row of this name may be there."""
    yield
    with server.client() as client:
        assert client.get(f"/count/{name}").json() == 0


def test_300_sync_endpoints_with_a_dependency_on_a_pool_of_5(served):
    """The usual recipe answers most of them with 500, because the holders of a connection find no thread."""
    paths = ["/sync", "/yield", "/atomic"]
    results = hammer(served.url, [f"{paths[n % 3]}/{n}" for n in range(300)], concurrency=300, deadline=50)
    assert statuses(results) == {200: 300}
    assert [result.json() for result in results] == [str(n) for n in range(300)]


def test_80_sync_endpoints_against_40_threads(served):
    """As many as wait for a thread hold no connection meanwhile."""
    results = hammer(served.url, [f"/two/{n}" for n in range(80)], concurrency=80, deadline=50)
    assert statuses(results) == {200: 80}


@pytest.mark.parametrize("how", ["dependency", "option"])
def test_a_unit_of_work_whose_deadline_passes_is_not_committed_by_halves(database, how):
    """Its caller is gone and the request answers, while its thread goes on to the next statement."""
    shop = Shop(database, transaction=how == "option")
    app, unit = shop.app(), Halves(shop.Item.create)

    @app.exception_handler(TimeoutError)
    async def late(request, error):
        await unit.finish()
        return Response("late", 504)

    @app.get("/", dependencies=[Depends(shop.orm.transaction)] if how == "dependency" else [])
    async def endpoint():
        async with asyncio.timeout(0.5):
            await shop.orm.run(unit)

    with TestClient(app) as client:
        assert client.get("/").status_code == 504
        eventually(lambda: not shop.database._in_use)
        assert shop.names() == []
    assert shop.everything_is_back()


@pytest.mark.parametrize("how", ["dependency", "option"])
def test_an_endpoint_that_passes_over_a_deadline_does_not_commit_half_of_what_goes_on(sqlite_shop, how):
    """Its thread is between two statements: a COMMIT now would keep the first and not the second."""
    shop = sqlite_shop(transaction=how == "option")
    app, unit = shop.app(), Halves(shop.Item.create)

    @app.get("/", dependencies=[Depends(shop.orm.transaction)] if how == "dependency" else [])
    async def endpoint():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await shop.orm.run(unit)
        return "fine"

    with TestClient(app, raise_server_exceptions=True) as client:
        with pytest.raises(ConcurrentUse, match=r"a call of orm\.run goes on"):
            client.get("/")
        unit.go_on()
        eventually(lambda: not shop.database._in_use)
        assert shop.names() == []
    assert shop.everything_is_back()


def test_a_block_inside_commits_while_a_call_of_the_request_goes_on(sqlite_shop):
    """The call has the request's connection, and the block one of its own: nothing is halved."""
    shop = sqlite_shop()
    app, unit = shop.app(), Halves(shop.Item.create)

    @app.get("/")
    async def endpoint():
        call = asyncio.create_task(shop.orm.run(unit))
        await asyncio.to_thread(unit.halfway.wait, 10)
        async with connection_scope(shop.database, transaction=True):
            await asyncio.to_thread(shop.Item.create, name="block")
        unit.go_on()
        await call

    with TestClient(app) as client:
        assert client.get("/").status_code == 200
        assert sorted(shop.names()) == ["block", "first half", "second half"]
    assert shop.everything_is_back()


@pytest.mark.parametrize("how", ["dependency", "option"])
def test_a_unit_of_work_whose_deadline_passes_before_it_connects_commits_nothing(sqlite_shop, how):
    """The response's status says so, though there is no transaction yet to roll back."""
    shop = sqlite_shop(transaction=how == "option")
    app, go_on, done = shop.app(), threading.Event(), threading.Event()

    def unit():
        assert go_on.wait(10)
        try:
            shop.Item.create(name="late")
        finally:
            done.set()

    class Late(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def send_and_go_on(message: Any) -> None:
                await send(message)
                if message["type"] == "http.response.start":
                    go_on.set()
                    await asyncio.to_thread(done.wait, 10)

            await super().__call__(scope, receive, send_and_go_on)

    @app.get("/", dependencies=[Depends(shop.orm.transaction)] if how == "dependency" else [])
    async def endpoint():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await shop.orm.run(unit)
        return Late("late", 504)

    with TestClient(app) as client:
        assert client.get("/").status_code == 504
        eventually(lambda: not shop.database._in_use)
        assert shop.names() == []
    assert shop.everything_is_back()


@pytest.mark.parametrize("how", ["dependency", "option"])
@pytest.mark.parametrize("scope", ["function", "request"])
def test_a_sync_endpoint_whose_deadline_passes_is_not_committed_by_halves(database, how, scope):
    """Its thread is the framework's, which no deadline stops, and it is between two statements."""
    shop = Shop(database, transaction=how == "option")
    app, unit = shop.app(), Halves(shop.Item.create)

    @app.get("/", dependencies=[Depends(shop.orm.transaction, scope=scope)] if how == "dependency" else [])
    def endpoint():
        unit()

    class Deadline:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await self.app(scope, receive, send)
                return
            try:
                async with asyncio.timeout(0.5):
                    await self.app(scope, receive, send)
            except TimeoutError:
                await unit.finish()
                await Response("late", 504)(scope, receive, send)

    app.add_middleware(Deadline)
    with TestClient(app) as client:
        assert client.get("/").status_code == 504
        eventually(lambda: not shop.database._in_use)
        assert shop.names() == []
    assert shop.everything_is_back()


def test_a_failed_statement_that_was_caught_is_no_success_on_postgres(make_place):
    """PostgreSQL keeps nothing of the transaction, and answers COMMIT without an error."""
    database = make_place("postgres").make_database()
    shop = Shop(database)
    app = shop.app()

    @app.get("/{scope}", dependencies=[Depends(shop.orm.transaction)])
    def default(scope: str):
        return swallow()

    @app.get("/function/{scope}", dependencies=[Depends(shop.orm.transaction, scope="function")])
    def function(scope: str):
        return swallow()

    def swallow():
        shop.Item.create(name="same")
        with contextlib.suppress(peewee.IntegrityError):
            shop.Item.create(name="same")
        return "stored"

    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/x").status_code == 500
        assert client.get("/function/x").status_code == 500
        assert shop.names() == []
    assert shop.everything_is_back()
    database.close_all()


@pytest.mark.parametrize("where", ["query", "transaction"])
@pytest.mark.parametrize("deadline", ["timeout", "wait_for", "fail_after"])
def test_a_deadline_around_a_sync_endpoint_in_the_database(deadline, where, served):
    """The request ends while its thread is inside a statement: nothing is reused under it, nothing is half written."""
    name = f"{deadline} {where}".replace(" ", "-")
    with no_trace(served, name):
        slow = [f"/deadline/{deadline}/{where}/{name}"] * 5
        results = hammer(served.url, [*slow, *(f"/sync/{n}" for n in range(40))], concurrency=20)
        assert statuses(results) == {504: 5, 200: 40}
        assert [result.json() for result in results[5:]] == [str(n) for n in range(40)]


@pytest.mark.parametrize("kind", ["sync", "async", "atomic"])
def test_a_client_that_leaves_in_the_middle_of_a_stream(kind, served):
    """A sync generator hears of it only from the garbage collector, in somebody else's context."""
    for how in ("rst", "fin"):
        client = served.client()
        client.send(Request(f"/stream/{kind}/{how}"))
        client.read_head()
        client.read_body(at_least=1)
        client.drop(how)
    results = hammer(served.url, [f"/collect/{n}" for n in range(12)], concurrency=6)
    assert statuses(results) == {200: 12}
    with served.client() as client:
        for how in ("rst", "fin"):
            assert client.get(f"/count/{how}").json() == 0


@pytest.mark.parametrize("path", ["/sync/1", "/slow/1", "/atomic/1", "/deadline/timeout/transaction/gone"])
def test_a_client_that_leaves_before_the_answer(path, served):
    """The endpoint goes on to its end and gives its connection back."""
    for how in ("rst", "fin"):
        client = served.client()
        client.send(Request(path))
        client.drop(how)
    with served.client() as client:
        client.send_part(Request("/length", "POST", b"x" * 1000), 500)
        client.drop("rst")


def test_a_stream_that_idles_holds_no_connection(served):
    """20 of them on a pool of 5, and others get through."""
    clients = [served.client() for _ in range(20)]
    for client in clients:
        client.send(Request("/idle"))
        assert client.read_head().status == 200
        assert client.read_body(at_least=1)
    with served.client() as client:
        eventually(lambda: client.get("/_stats").json()["in_use"] == 0)
        assert client.get("/sync/7").json() == "7"
    for client in clients:
        client.drop("rst")


def test_pipelined_requests_and_a_large_post_do_not_leak_into_the_next(served):
    """uvicorn hands the context of one request to the next on the same connection."""
    with served.client() as client:
        responses = client.pipeline([Request(f"/{('sync', 'atomic', 'run')[n % 3]}/{n}") for n in range(30)])
        assert [response.json() for response in responses] == [str(n) for n in range(30)]
        assert client.post("/length", b"x" * 400_000).json() == 400_000
        scopes = [client.get("/scope").json() for _ in range(5)]
        assert len({scope["id"] for scope in scopes}) >= 1
        assert [scope["label"] for scope in scopes] == ["request GET /scope"] * 5
        assert [scope["ended"] for scope in scopes] == [False] * 5


def test_a_failing_commit_is_never_a_2xx_on_the_wire(served):
    """A deferred constraint; MariaDB has none, so there the server ends the session before the COMMIT."""
    results = hammer(served.url, [f"/spoil/{scope}" for scope in ("function", "request")] * 5, concurrency=5)
    wrong = [result.status for result in results if result.status not in (409, 503)]
    assert not wrong
    with served.client() as client:
        assert client.get("/count/spoiled").json() == 0
