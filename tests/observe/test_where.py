"""Where the thread of a request is found by one of our own calls on its stack: neither task nor context tells of it."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import pytest
import sanic
import uvloop

from peewee_frameworks.asgi import RequestMiddleware, ScopeMiddleware
from peewee_frameworks.extension import Extension
from peewee_frameworks.pool import PooledSqliteDatabase
from peewee_frameworks.sanic import Peewee as SanicPeewee
from peewee_frameworks.wsgi import ScopeMiddleware as WSGIScope
from tests.core.helpers import Gate, start
from tests.support.client import Client
from tests.support.concurrency import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ASGI = {"type": "http", "method": "GET", "path": "/"}
WSGI = {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}


@pytest.fixture
def db(tmp_path: Path) -> Iterator[PooledSqliteDatabase]:
    database = PooledSqliteDatabase(str(tmp_path / "where.db"))
    yield database
    database.pool.close(0)


def wsgi(step: str, orm: Extension, query: Callable[[], None]) -> None:
    class Body:
        def __iter__(self) -> Iterator[bytes]:
            if step == "a part":
                query()
            yield b""

        def close(self) -> None:
            if step == "the end":
                query()

    def app(_: Any, start_response: Callable[..., Any]) -> Any:
        if step == "the head":
            query()
        start_response("200 OK", [])
        return Body()

    body: Any = WSGIScope(app, orm.runtime)(dict(WSGI), lambda *_: None)
    list(body)
    body.close()


def asgi(layer: Any, orm: Extension, query: Callable[[], None]) -> None:
    async def app(*_: Any) -> None:
        query()

    uvloop.run(layer(app, orm.runtime)(dict(ASGI), None, None))


def on_sanic(orm: SanicPeewee, query: Callable[[], None]) -> None:
    app: Any = sanic.Sanic("where")
    app.config.TOUCHUP = False  # it rewrites Sanic's classes for good, from what the first application is

    @app.get("/")
    async def index(_: Any) -> Any:
        query()
        return sanic.text("")

    orm.init_app(app)

    async def main() -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        server: Any = await app.create_server(sock=sock)
        await server.startup()
        await server.before_start()
        await server.start_serving()

        def get() -> None:
            with Client(f"http://127.0.0.1:{sock.getsockname()[1]}", 15) as client:
                assert client.get("/").status == 200

        await asyncio.to_thread(get)
        await server.close()
        await server.after_stop()

    uvloop.run(main())


CASES: dict[str, Callable[[Any, Callable[[], None]], None]] = {
    "wsgi, the head": lambda orm, query: wsgi("the head", orm, query),
    "wsgi, a part": lambda orm, query: wsgi("a part", orm, query),
    "wsgi, the end": lambda orm, query: wsgi("the end", orm, query),
    "asgi": lambda orm, query: asgi(RequestMiddleware, orm, query),
    "asgi, around": lambda orm, query: asgi(ScopeMiddleware, orm, query),
    "sanic": on_sanic,
}


@pytest.mark.filterwarnings(
    "ignore:websockets.legacy is deprecated"
)  # Sanic imports its testing package to name its version
@pytest.mark.parametrize("case", CASES)
def test_the_thread_that_serves_a_request_is_found(db, case, monkeypatch):
    monkeypatch.setattr(sanic.Sanic, "_app_registry", {})
    orm, gate = (SanicPeewee if case == "sanic" else Extension)(db), Gate()

    def query() -> None:
        db.execute_sql("SELECT 1")
        gate()

    serving = start(CASES[case], orm, query)
    eventually(lambda: gate.reached.is_set() or (serving.done() and serving.result()))
    (holder,) = orm.holders()
    gate.open()
    serving.result(15)
    assert holder.label == "request GET /"
    assert holder.owner is not None
    assert holder.owner.startswith("thread 'test-thread")
