"""Findings about applications: where the scope does not reach, and what has no connection."""

from __future__ import annotations

import contextvars
import threading
from typing import TYPE_CHECKING, Any

import peewee
import pytest
from flask import Flask
from playhouse.pwasyncio import AsyncSqliteDatabase
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from peewee_frameworks import connection_scope, flask, starlette
from tests.doctor import served_outer
from tests.doctor.helpers import found, look, severities
from tests.support import webservers
from tests.support.client import Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.databases import Place


# -- the middleware's place ---------------------------------------------------------------------------------------------


def test_middleware_before_ours_finds_the_scope_of_the_request_before(
    postgres: Place, sound: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On uvicorn, pipelined: as the finding says. With a fresh context, or with the scope around it all, it does not."""
    monkeypatch.setenv("DATABASE_URL", postgres.url)
    requests = [Request(f"/{number}") for number in range(3)]

    def serve(name: str, *options: str) -> list[str]:
        with (
            webservers.uvicorn(f"tests.doctor.served_outer:{name}", options=options) as server,
            server.client() as client,
        ):
            return [response.text for response in client.pipeline(requests)]

    assert "ScopeEnded" in serve("inside")[1]
    assert "ScopeEnded" not in "".join(serve("inside", "--reset-contextvars"))
    assert serve("outside") == ["ok"] * 3
    finding = found(look(served_outer.inside))["middleware-order"]
    assert finding.severity == "warning"
    assert finding.what == "orm.middleware() comes after Outer."
    assert "ScopeEnded" in finding.why
    assert "middleware-order" not in severities(served_outer.outside)
    served = look(served_outer.inside, server="uvicorn", reset_contextvars=True)
    assert "ScopeEnded" not in found(served)["middleware-order"].why


@pytest.mark.parametrize("order", ["first", "init_app", "lifespan", "only Starlette's own"])
def test_middleware_in_its_place(order: str, postgres: Place, sound: Callable[..., Any]) -> None:
    orm = starlette.Peewee(sound(postgres))
    outer = Middleware(GZipMiddleware if order == "only Starlette's own" else served_outer.Outer)
    middleware = [orm.middleware(), outer] if order == "first" else [outer, orm.middleware()]
    app = Starlette(middleware=middleware, lifespan=orm.lifespan() if order == "lifespan" else None)
    if order == "init_app":
        orm.init_app(app)
    assert severities(app) == {}


# -- the recipe ---------------------------------------------------------------------------------------------------------

default = {"closed": None, "conn": None, "ctx": None, "transactions": None}
current = contextvars.ContextVar("current", default=default.copy())  # noqa: B039 - that is what it gets wrong


class ContextState(peewee._ConnectionState):
    """The widely copied recipe, to the letter."""

    def __init__(self, **kwargs: Any) -> None:
        super().__setattr__("_state", current)
        super().__init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        self._state.get()[name] = value

    def __getattr__(self, name: str) -> Any:
        return self._state.get()[name]


def test_the_recipe_with_a_context_variable(mysql: Place) -> None:
    """Two threads, two requests without the dependency that resets it: one connection."""
    kwargs = {"read_timeout": 30, "ssl_disabled": True, **mysql.connect_kwargs()}
    database = peewee.MySQLDatabase(mysql.database, **kwargs)
    database._state = ContextState()
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(database.connection()))
    thread.start()
    thread.join(10)
    assert database.connection() is seen[0]
    database.close()
    assert severities(database)["context-recipe"] == "error"
    assert severities(peewee.MySQLDatabase(mysql.database, **kwargs)) == {"no-pool": "warning"}


def test_an_adapter_replaces_the_recipe(postgres: Place, sound: Callable[..., Any]) -> None:
    database = sound(postgres)
    database._state = ContextState()
    app = Starlette()
    starlette.Peewee(database).init_app(app)
    assert severities(app) == {}


# -- autoconnect --------------------------------------------------------------------------------------------------------


def make_flask(database: Any, **options: Any) -> Flask:
    app = Flask("shop")
    flask.Peewee(database, **options).init_app(app)

    @app.get("/health")
    def health() -> str:
        return str(database.execute_sql("SELECT 1").fetchone()[0])

    return app


def test_without_autoconnect_excluded_requests_fail(postgres: Place, sound: Callable[..., Any]) -> None:
    database = sound(postgres, autoconnect=False)
    app = make_flask(database, exclude=["/health"])
    finding = found(look(app))["autoconnect"]
    assert finding.severity == "warning"
    assert "exclude=" in finding.why
    app.testing = True
    with pytest.raises(peewee.InterfaceError, match="not opened"):
        app.test_client().get("/health")
    with connection_scope(database), pytest.raises(peewee.InterfaceError, match="not opened"):
        database.execute_sql("SELECT 1")
    assert severities(make_flask(database)) == {"autoconnect": "note"}
    assert make_flask(database).test_client().get("/health").text == "1"
    assert severities(make_flask(sound(postgres), exclude=["/health"])) == {}


def test_autoconnect_off_and_lazy_is_refused_when_the_application_is_made(project: Any) -> None:
    """That is a finding of the doctor's, with the line of the user's that is refused."""
    project.write(
        shop="""
            from flask import Flask
            from peewee_frameworks.flask import Peewee
            from peewee_frameworks.pool import PooledSqliteDatabase

            def create_app():
                app = Flask("shop")
                Peewee(PooledSqliteDatabase("shop.db", autoconnect=False), connect="lazy").init_app(app)
                return app
        """
    )
    done = project.run("doctor", "shop:create_app()", "--json")
    assert (done.code, done.err) == (1, "")
    (finding,) = done.json["findings"]
    assert (finding["code"], finding["severity"]) == ("configuration", "error")
    assert "connect='lazy' and autoconnect=False" in finding["what"]
    assert 'shop.py", line 8, in create_app' in finding["detail"]
    assert "config.py" not in finding["detail"]
    text = project.run("doctor", "shop:create_app()").out
    assert text.startswith("shop:create_app(): 1 worker (assumed")
    assert "error: configuration\n" in text
    assert 'shop.py", line 8, in create_app' in text


# -- the wrong sort of database -----------------------------------------------------------------------------------------


def test_an_asynchronous_database_in_flask(sqlite: Place) -> None:
    """Refused at the first request; the doctor says so before."""
    database = AsyncSqliteDatabase(sqlite.database, pragmas={"journal_mode": "wal"})
    peewee.SqliteDatabase(sqlite.database).execute_sql("PRAGMA user_version = 1")
    app = make_flask(database)
    finding = found(look(app))["async-database"]
    assert finding.severity == "error"
    assert finding.what == "The database is asynchronous, and the application is Flask."
    app.testing = True
    with pytest.raises(Exception, match="is asynchronous, and this application is not"):
        app.test_client().get("/health")


def test_a_database_that_makes_threads_share_a_connection(sqlite: Place) -> None:
    database = peewee.SqliteDatabase(sqlite.database, thread_safe=False)
    database.execute_sql("PRAGMA journal_mode = wal")
    database.close()
    assert "thread_safe=False" in found(look(database))["configuration"].what


def test_a_server_that_is_not_there(free_port: int) -> None:
    database = peewee.MySQLDatabase("shop", host="127.0.0.1", port=free_port, user="root", password="opensesame")
    report = look(database)
    finding = found(report)["unreachable"]
    assert finding.severity == "error"
    assert "Connection refused" in finding.what
    assert "opensesame" not in report.as_text()
    assert report.databases["default"]["server"] is None
