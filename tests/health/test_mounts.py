"""How the endpoints are mounted: each framework's idiom, and the guards it knows."""

import gc
import warnings
from typing import Annotated, Any, Protocol

import pytest
from fastapi import Depends, FastAPI, Header, Request
from fastapi.security import HTTPBasic
from fastapi.testclient import TestClient as FastAPIClient
from flask import Flask, Response, abort
from playhouse.pwasyncio import AsyncSqliteDatabase
from sanic import Sanic, text
from sanic.exceptions import Unauthorized
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse
from starlette.routing import Mount
from starlette.testclient import TestClient

from peewee_frameworks import fastapi, flask, sanic, starlette
from peewee_frameworks.errors import ConfigurationError
from peewee_frameworks.health.flask import MOST_STREAMS
from peewee_frameworks.pool import PooledMySQLDatabase, PooledSqliteDatabase
from tests.support.ports import HOST, reserved_port

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports websockets.legacy
    from sanic_testing.reusable import ReusableClient


@pytest.fixture
def database(tmp_path):
    database = PooledSqliteDatabase(str(tmp_path / "shop.db"), max_connections=2, timeout=5)
    yield database
    database.close_all()


@pytest.fixture
def absent(free_port):
    """A database that nobody serves."""
    return PooledMySQLDatabase("shop", host=HOST, port=free_port, user="nobody")


class TestFlask:
    def client(self, database, **options):
        app = Flask(__name__)
        orm = flask.Peewee(database)
        orm.init_app(app)
        app.register_blueprint(orm.blueprint(url_prefix="/db", **options))
        return app.test_client()

    def test_it_is_alive_though_the_application_cannot_start(self, absent):
        """The first request starts the databases, and fails while that fails; these do not even try."""
        client = self.client(absent)
        assert client.get("/db/live").status_code == 200
        assert client.get("/db/ready").status_code == 503
        assert client.get("/elsewhere").status_code == 500

    @pytest.mark.leaves_threads("asgiref keeps one thread, in which it runs async code for a thread that has no loop")
    def test_a_guard_may_be_async_and_may_abort(self, database):
        async def guard(request):
            if "Authorization" not in request.headers:
                abort(401)
            return request.authorization.username == "ada"

        client = self.client(database, guard=guard)
        assert client.get("/db/status").status_code == 401
        assert client.get("/db/status", auth=("bob", "")).status_code == 403
        assert client.get("/db/status", auth=("ada", "")).json["pools"]["default"]["used"] == 0
        assert client.get("/db/ready").json == {"status": "ok"}

    @pytest.mark.leaves_threads("asgiref keeps one thread, in which it runs async code for a thread that has no loop")
    def test_an_async_guard_that_does_not_look_like_one_is_awaited(self, database):
        async def refuses(request):
            return False

        class Refuses:
            async def __call__(self, request):
                return False

        for guard in (lambda request: refuses(request), Refuses()):  # noqa: PLW0108 - it hides the coroutine function
            assert self.client(database, guard=guard).get("/db/status").status_code == 403

    @pytest.mark.parametrize("refusal", [("Who are you?", 401), Response("Who are you?", 401)])
    def test_a_guard_that_returns_a_response_has_refused(self, database, refusal):
        answer = self.client(database, guard=lambda request: refusal).get("/db/status")
        assert (answer.status_code, answer.text) == (401, "Who are you?")

    def test_blueprints_of_several_databases_have_names(self, database, tmp_path):
        app = Flask(__name__)
        other = PooledSqliteDatabase(str(tmp_path / "other.db"))
        for name, each in (("one", database), ("two", other)):
            orm = flask.Peewee(each)
            orm.init_app(app)
            app.register_blueprint(orm.blueprint(name, url_prefix=f"/{name}"))
        for name in ("one", "two"):
            assert app.test_client().get(f"/{name}/ready").json == {"status": "ok"}
        other.close_all()

    def test_a_stream_that_is_never_sent_gives_its_place_back(self, database):
        client = self.client(database, guard=lambda request: True)
        client.application.logger.disabled = True  # what it logs is kept by pytest, and the response with it
        fails = [True] * MOST_STREAMS

        @client.application.after_request
        def fail(response):
            if fails and response.status_code == 200:
                fails.pop()
                raise LookupError
            return response

        threaded = {"wsgi.multithread": True}
        answers = [client.get("/db/events", environ_overrides=threaded).status_code for _ in list(fails)]
        gc.collect()
        assert answers == [500] * MOST_STREAMS
        with client.get("/db/events", environ_overrides=threaded) as answer:
            assert answer.status_code == 200

    def test_they_answer_head(self, database):
        assert self.client(database).head("/db/ready").status_code == 200


class TestStarlette:
    def test_a_guard_may_raise(self, database):
        def guard(request):
            raise HTTPException(401, "Who are you?", {"WWW-Authenticate": "Basic"})

        orm = starlette.Peewee(database)
        app = Starlette(routes=[Mount("/db", orm.app(guard=guard))], lifespan=orm.lifespan())
        with TestClient(app) as client:
            assert client.get("/db/status").status_code == 401
            assert client.get("/db/ready?verbose").headers["WWW-Authenticate"] == "Basic"
            assert client.get("/db/ready").json() == {"status": "ok"}
            assert client.head("/db/ready").status_code == 200

    def test_a_guard_that_says_nothing_lets_nobody_in(self, database):
        orm = starlette.Peewee(database)
        app = Starlette(routes=[Mount("/db", orm.app(guard=lambda request: None))], lifespan=orm.lifespan())
        with TestClient(app) as client:
            assert client.get("/db/").status_code == 403

    def test_a_guard_that_returns_a_response_has_refused(self, database):
        orm = starlette.Peewee(database)
        guard = lambda request: RedirectResponse("/login")  # noqa: E731
        app = Starlette(routes=[Mount("/db", orm.app(guard=guard))], lifespan=orm.lifespan())
        with TestClient(app, follow_redirects=False) as client:
            assert client.get("/db/status").headers["location"] == "/login"

    def test_it_is_not_ready_where_a_database_is_missing_at_start(self, absent):
        orm = starlette.Peewee(absent, check="warn")
        app = Starlette(routes=[Mount("/db", orm.app())], lifespan=orm.lifespan())
        with TestClient(app) as client:
            assert client.get("/db/live").status_code == 200
            assert client.get("/db/ready").status_code == 503

    @pytest.mark.parametrize("transaction", [False, True])
    def test_an_asynchronous_database_has_its_health_too(self, tmp_path, transaction):
        database = AsyncSqliteDatabase(str(tmp_path / "shop.db"), pool_size=2)
        orm = starlette.Peewee(database, transaction=transaction, connect="eager")
        app = Starlette(routes=[Mount("/db", orm.app(guard=lambda _: True))], lifespan=orm.lifespan())
        orm.init_app(app)
        with TestClient(app) as client:
            assert client.get("/db/ready?verbose").json()["databases"]["default"]["status"] == "ok"
            pool = client.get("/db/status").json()["pools"]["default"]
            assert (pool["used"], pool["max_connections"]) == (0, 2)
        with TestClient(app) as client:  # in another loop
            assert client.get("/db/ready").json() == {"status": "ok"}


class TestFastAPI:
    @pytest.mark.parametrize("dependency", [True, False])
    def test_a_guard_is_a_dependency_or_a_function(self, database, dependency):
        basic = HTTPBasic()

        def user(credentials: Annotated[Any, Depends(basic)]) -> bool:
            return credentials.username == "ada"

        def function(request):
            return request.headers.get("authorization") == "Basic YWRhOmFkYQ=="

        orm = fastapi.Peewee(database)
        app = FastAPI(lifespan=orm.lifespan())
        orm.init_app(app)
        app.include_router(orm.router(prefix="/db", guard=Depends(user) if dependency else function))
        with FastAPIClient(app) as client:
            assert client.get("/db/status").status_code == (401 if dependency else 403)
            assert client.get("/db/status", auth=("bob", "bob")).status_code == 403
            assert client.get("/db/status", auth=("ada", "ada")).json()["pools"]["default"]["used"] == 0
            assert client.get("/db/ready").json() == {"status": "ok"}
            assert "/db/status" not in client.get("/openapi.json").json()["paths"]

    @pytest.mark.parametrize(
        ("told", "status"), [(None, 200), ("ada", 200), (0, 403), (RedirectResponse("/login"), 307)]
    )
    def test_a_dependency_lets_in_whom_it_does_not_refuse(self, database, told, status):
        orm = fastapi.Peewee(database)
        app = FastAPI(lifespan=orm.lifespan())
        app.include_router(orm.router(prefix="/db", guard=Depends(lambda: told)))
        with FastAPIClient(app, follow_redirects=False) as client:
            assert client.get("/db/status").status_code == status

    def test_a_routers_own_dependencies_hold_for_all_of_it(self, database):
        def refuse():
            raise HTTPException(418)

        orm = fastapi.Peewee(database)
        app = FastAPI(lifespan=orm.lifespan())
        app.include_router(orm.router(prefix="/db", dependencies=[Depends(refuse)]))
        with FastAPIClient(app) as client:
            assert client.get("/db/live").status_code == 418


class TestSanic:
    @pytest.fixture
    def make_app(self):
        before = set(Sanic._app_registry)
        yield Sanic
        for name in set(Sanic._app_registry) - before:
            del Sanic._app_registry[name]

    def ask(self, app, *paths):
        with reserved_port() as port:
            client = ReusableClient(app, port=port)
            with client:
                return [client.get(path)[1] for path in paths]

    def test_a_blueprint_installs_as_ever_and_has_endpoints_if_it_is_told_so(self, database, make_app):
        app = make_app("plain")
        app.blueprint(sanic.Peewee(database).blueprint("db", url_prefix="/db"))
        app.get("/")(lambda _: text("here"))
        assert [answer.status for answer in self.ask(app, "/", "/db/live")] == [200, 404]
        app = make_app("healthy")
        app.blueprint(sanic.Peewee(database).blueprint("db", url_prefix="/db", health=True))
        assert [answer.json for answer in self.ask(app, "/db/ready")] == [{"status": "ok"}]

    def test_with_endpoints_it_may_come_beside_init_app_and_without_them_not(self, database, make_app):
        orm = sanic.Peewee(database)
        app = make_app("both")
        orm.init_app(app)
        app.blueprint(orm.blueprint("db", url_prefix="/db", guard=lambda request: request.args.get("who") == "ada"))
        shown, verbose, refused = self.ask(app, "/db/status?who=ada", "/db/ready?verbose&who=ada", "/db/status")
        assert shown.json["pools"]["default"]["used"] == 0
        assert verbose.json["databases"]["default"]["status"] == "ok"
        assert refused.status == 403
        app = make_app("twice")
        orm.init_app(app)
        with pytest.raises(ConfigurationError, match="twice"):
            app.blueprint(orm.blueprint("db"))

    def test_a_guard_may_be_async_and_may_raise(self, database, make_app):
        async def guard(request):
            raise Unauthorized("Who are you?", scheme="Basic", realm="ops")

        app = make_app("guarded")
        app.blueprint(sanic.Peewee(database).blueprint("db", url_prefix="/db", guard=guard))
        assert [answer.status for answer in self.ask(app, "/db/", "/db/live")] == [401, 200]

    def test_a_guard_that_returns_a_response_has_refused(self, database, make_app):
        app = make_app("redirecting")
        guard = lambda request: text("Who are you?", 401)  # noqa: E731
        app.blueprint(sanic.Peewee(database).blueprint("db", url_prefix="/db", guard=guard))
        assert [(answer.status, answer.text) for answer in self.ask(app, "/db/status")] == [(401, "Who are you?")]

    def test_a_guard_of_nothing_is_refused(self, database):
        with pytest.raises(ConfigurationError, match="contradict"):
            sanic.Peewee(database).blueprint("db", health=False, guard=lambda _: True)

    def test_what_holds_for_the_application_does_not_hold_for_them(self, absent, make_app):
        orm = sanic.Peewee(absent, connect="eager", transaction=True, check="warn")
        app = make_app("eager")
        app.blueprint(orm.blueprint("db", url_prefix="/db", health=True))
        app.get("/")(lambda _: text("here"))
        assert [answer.status for answer in self.ask(app, "/db/live", "/db/ready", "/")] == [200, 503, 500]


@pytest.mark.parametrize("framework", ["flask", "sanic", "fastapi", "starlette"])
@pytest.mark.parametrize(
    ("guard", "message"),
    [
        (
            lambda: True,
            r"guard=.*<lambda>\(\) cannot be called with the request alone\. Give a function of the request",
        ),
        (lambda request, user: True, r"guard=.*<lambda>\(request, user\) cannot be called with the request alone"),
        ("admins", "guard='admins' is not a function"),
    ],
)
def test_a_guard_that_cannot_be_called_is_refused_where_it_is_given(database, framework, guard, message):
    """Else nobody would see more, and each request that asks would be an error."""
    mount = {
        "flask": lambda: flask.Peewee(database).blueprint(guard=guard),
        "sanic": lambda: sanic.Peewee(database).blueprint(guard=guard),
        "fastapi": lambda: fastapi.Peewee(database).router(guard=guard),
        "starlette": lambda: starlette.Peewee(database).app(guard=guard),
    }[framework]
    with pytest.raises(ConfigurationError, match=message):
        mount()


def by_token(token: Annotated[Any, Depends(HTTPBasic())]) -> bool:
    return bool(token)


def by_default(token: Any = Depends(HTTPBasic())) -> bool:  # noqa: B008 - as it may be written
    return bool(token)


def by_header(token: Annotated[str, Header()]) -> str:
    return token


def by_query(token: str) -> str:
    return token


def by_optional(token: str | None = None) -> str | None:
    return token


def by_list(token: list[str]) -> bool:
    return bool(token)


def by_unknown(user: "Annotated[Absent, Depends(by_token)]") -> bool:  # noqa: F821 - as if for type checkers only
    return bool(user)


@pytest.mark.parametrize(
    "guard", [by_token, by_default, by_header, by_query, by_optional, by_list, by_unknown, Depends]
)
def test_a_dependency_without_depends_is_no_guard_that_lets_everybody_in(database, guard):
    """Called with the request in the place of its token, it would find one."""
    with pytest.raises(ConfigurationError, match=rf"write guard=Depends\({guard.__name__}\)"):
        fastapi.Peewee(database).router(guard=guard)


def test_a_guard_may_be_annotated_with_the_request(database):
    def of_request(request: Request, strict: bool = True) -> bool:
        return not strict

    def of_connection(request: HTTPConnection) -> bool:
        return bool(request)

    def of_some_request(request: "Absent") -> bool:  # noqa: F821 - as if for type checkers only
        return bool(request)

    def of_anything(request: Any) -> bool:
        return bool(request)

    def of_all(*args: Any, **kwargs: Any) -> bool:
        return bool(args or kwargs)

    class HasHeaders(Protocol):
        headers: Any

    def of_protocol(request: HasHeaders) -> bool:
        return bool(request.headers)

    def of_maybe(request: Request | None) -> bool:
        return bool(request)

    def of_annotated(request: Annotated[Request, "the request"]) -> bool:
        return bool(request)

    def of_nonsense(request: "no expression") -> bool:  # noqa: F722 - as an old annotation may be
        return bool(request)

    for guard in (
        of_request,
        of_connection,
        of_some_request,
        of_anything,
        of_all,
        of_protocol,
        of_maybe,
        of_annotated,
        of_nonsense,
        lambda request: True,
    ):
        fastapi.Peewee(database).router(guard=guard)


@pytest.mark.parametrize("framework", ["flask", "sanic", "fastapi", "starlette"])
def test_a_generator_is_no_guard_that_lets_everybody_in(database, framework):
    def guard(request):
        if request is None:
            raise LookupError
        yield

    module = {"flask": flask, "sanic": sanic, "fastapi": fastapi, "starlette": starlette}[framework]
    orm = module.Peewee(database)
    mount = {"fastapi": "router", "starlette": "app"}.get(framework, "blueprint")
    with pytest.raises(ConfigurationError, match=r"guard=.*guard is a generator function"):
        getattr(orm, mount)(guard=guard)


def test_a_guard_may_be_any_callable_of_the_request(database):
    class Guard:
        def __call__(self, request, strict=True):
            return not strict

    starlette.Peewee(database).app(guard=Guard())
    starlette.Peewee(database).app(guard=bool)
