"""Handlers without a query for `bench_adapters.py`, each contender on a path of its own of one server process.

One process, for two of the same program differ by up to a tenth: by what its memory happens to look like.

- ``/bare`` and ``/also``: the framework's alone, twice, to see what the measurement is worth;
- ``/ours``: with the adapter;
- ``/less``: a context variable set around the application and reset. No per-request state does with less.
"""

from __future__ import annotations

import asyncio
import contextvars
import socket
import sys
from typing import Any

from playhouse.pool import PooledSqliteDatabase

CONTENDERS = ("bare", "also", "ours", "less")

db = PooledSqliteDatabase(":memory:", max_connections=1)
current: contextvars.ContextVar[Any] = contextvars.ContextVar("current", default=None)


def flask() -> Any:
    applications = {f"/{contender}": _flask(contender) for contender in CONTENDERS}

    def dispatch(environ: Any, start_response: Any) -> Any:
        return applications[environ["PATH_INFO"]](environ, start_response)

    return dispatch


def _flask(contender: str) -> Any:
    from flask import Flask

    app = Flask(contender)

    @app.get(f"/{contender}")
    def index() -> Any:
        return {"hello": "world"}

    if contender == "ours":
        from peewee_frameworks.flask import Peewee

        Peewee(db).init_app(app)
    elif contender == "less":
        bare = app.wsgi_app

        def layer(environ: Any, start_response: Any) -> Any:
            token = current.set(environ)
            try:
                return bare(environ, start_response)
            finally:
                current.reset(token)

        app.wsgi_app = layer  # type: ignore[method-assign]
    return app


def _asgi(make: Any) -> Any:
    """Serve each contender on its path; uvicorn wants ``--interface asgi3`` to see what this is."""
    applications = {f"/{contender}": make(contender) for contender in CONTENDERS}

    def dispatch(scope: Any, receive: Any, send: Any) -> Any:
        return applications[scope.get("path", "/ours")](scope, receive, send)  # no path: the lifespan

    return dispatch


def starlette() -> Any:
    return _asgi(_starlette)


def fastapi() -> Any:
    return _asgi(_fastapi)


def _least_asgi(app: Any) -> Any:
    async def layer(scope: Any, receive: Any, send: Any) -> None:
        token = current.set(scope)
        try:
            await app(scope, receive, send)
        finally:
            current.reset(token)

    return layer


def _starlette(contender: str) -> Any:
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def index(request: Any) -> Any:
        return JSONResponse({"hello": "world"})

    app = Starlette(routes=[Route(f"/{contender}", index)])
    if contender == "ours":
        from peewee_frameworks.starlette import Peewee

        Peewee(db).init_app(app)
    return _least_asgi(app) if contender == "less" else app


def _fastapi(contender: str) -> Any:
    from fastapi import FastAPI

    app = FastAPI()

    @app.get(f"/{contender}")
    async def index() -> Any:
        return {"hello": "world"}

    if contender == "ours":
        from peewee_frameworks.fastapi import Peewee

        Peewee(db).init_app(app)
    return _least_asgi(app) if contender == "less" else app


def _sanic(contender: str) -> Any:
    from sanic import Sanic, json

    class Least(Sanic):  # type: ignore[type-arg]
        async def handle_request(self, request: Any) -> None:
            token = current.set(request)
            try:
                await super().handle_request(request)
            finally:
                current.reset(token)

    app: Any = (Least if contender == "less" else Sanic)(contender)

    @app.get(f"/{contender}")
    async def index(request: Any) -> Any:
        return json({"hello": "world"})

    if contender == "ours":
        from peewee_frameworks.sanic import Peewee

        Peewee(db).init_app(app)
    return app


async def serve_sanic(ports: list[int]) -> None:
    """Serve each contender on a port of its own: a Sanic application takes its requests from its own server only."""
    import signal

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    servers = []
    for contender, port in zip(CONTENDERS, ports, strict=True):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        app = _sanic(contender)
        app.config.TOUCHUP = (
            not servers
        )  # Sanic rewrites its classes when the first application starts, for all of them
        server = await app.create_server(sock=sock, access_log=False)
        await server.startup()
        await server.before_start()
        await server.start_serving()
        servers.append(server)
    print("Serving", flush=True)
    await stop.wait()
    for server in servers:
        await server.before_stop()
        await server.close()
        await server.after_stop()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve_sanic([int(port) for port in sys.argv[1:]]))
