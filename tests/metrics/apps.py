"""One application in each framework: /metrics, /query, and /provoke/<what> for what happens to a pool.

METRICS_DATABASE holds, as JSON, the name of a MariaDB database and how to connect to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import threading
from typing import Any

import pymysql

from peewee_frameworks import PoolError, metrics
from peewee_frameworks.pool import PooledMySQLDatabase

settings = json.loads(os.environ["METRICS_DATABASE"])
db = PooledMySQLDatabase(
    settings.pop("database"),
    max_connections=2,
    min_connections=1,
    timeout=10,
    max_waiting=1,
    leak_threshold=60,
    connect_timeout=5,
    pool_name="shop",
    **settings,
)
pool = db.pool
USUAL = pool.options
held: list[Any] = []


def query() -> str:
    """One query on the request's connection."""
    return str(db.execute_sql("SELECT 1").fetchone()[0])


unblocked = threading.Event()


def block() -> str:
    """Keep a place of `orm.run`."""
    unblocked.wait(20)
    return "done"


def provoke(what: str) -> str:
    """Do to the pool what one of the functions here does, some of which keep connections until "release"; tell where."""
    PROVOKE[what]()
    return str(os.getpid())


def hold() -> None:
    held.append(pool.acquire())


def fill() -> None:
    while len(held) < 2:
        hold()


def release() -> None:
    while held:
        pool.release(held.pop())


def queue() -> None:
    threading.Thread(target=lambda: pool.release(pool.acquire()), daemon=True).start()


def wait_in_vain() -> None:
    with contextlib.suppress(PoolError):
        held.append(pool.acquire(0.05))


def do_not_wait() -> None:
    with contextlib.suppress(PoolError):
        held.append(pool.acquire(None))


def ask_for_one() -> None:
    with contextlib.suppress(PoolError, pymysql.err.Error):  # the server may refuse
        held.append(pool.acquire(1))


def ping() -> None:
    pool.configure(pool.options.replace(ping_after=0))
    hold()


def ping_later() -> None:
    pool.configure(pool.options.replace(ping_after=0))
    queue()


def leave_open() -> None:
    conn = pool.acquire()
    conn.begin()
    conn.cursor().execute("SELECT 1")
    pool.release(conn)


def lose() -> None:
    pool.acquire()  # and nobody keeps it
    gc.collect()


def leak() -> None:
    pool.configure(pool.options.replace(leak_threshold=0.01))
    hold()


PROVOKE: dict[str, Any] = {
    "hold": hold,
    "fill": fill,
    "release": release,
    "queue": queue,
    "wait in vain": wait_in_vain,
    "do not wait": do_not_wait,
    "ask for one": ask_for_one,
    "ping": ping,
    "ping later": ping_later,
    "leave open": leave_open,
    "lose": lose,
    "leak": leak,
    "as usual": lambda: pool.configure(USUAL),
    "close idle": pool.close_idle,
    "invalidate": lambda: pool.invalidate_all("a test asked for it"),
    "unblock": unblocked.set,
    "block again": unblocked.clear,
    "suspend": pool.suspend,
    "resume": pool.resume,
    "grow": lambda: pool.resize(3, 2),
    "shrink": lambda: pool.resize(2, 1),
}


def make_flask() -> Any:
    from flask import Flask, Response

    from peewee_frameworks.flask import Peewee

    app = Flask("metrics")
    orm = Peewee(db)
    orm.init_app(app)
    app.get("/query")(query)
    app.get("/provoke/<what>")(provoke)

    @app.get("/metrics")
    def answer() -> Response:
        body, content_type = metrics.render(orm)
        return Response(body, content_type=content_type)

    return app


def make_sanic() -> Any:
    from sanic import Sanic, raw, text

    from peewee_frameworks.sanic import Peewee

    app = Sanic("metrics")
    orm = Peewee(db)
    orm.init_app(app)

    @app.get("/query")
    async def query_(_: Any) -> Any:
        return text(await orm.run(query))

    @app.get("/block")
    async def block_(_: Any) -> Any:
        return text(await orm.run(block))

    @app.get("/provoke/<what:str>")
    async def provoke_(_: Any, what: str) -> Any:
        return text(await asyncio.to_thread(provoke, what.replace("%20", " ")))

    @app.get("/metrics")
    async def answer(_: Any) -> Any:
        body, content_type = metrics.render(orm)
        return raw(body, content_type=content_type)

    return app


def make_fastapi() -> Any:
    from fastapi import FastAPI, Response

    from peewee_frameworks.fastapi import Peewee

    app = FastAPI()
    orm = Peewee(db)
    orm.init_app(app)
    app.get("/query")(query)
    app.get("/provoke/{what}")(provoke)

    @app.get("/block")
    async def block_() -> str:
        return await orm.run(block)

    @app.get("/metrics")
    async def answer() -> Response:
        body, content_type = metrics.render(orm)
        return Response(body, headers={"Content-Type": content_type})

    return app


def make_starlette() -> Any:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    from peewee_frameworks.starlette import Peewee

    orm = Peewee(db)

    def query_(_: Any) -> Response:
        return PlainTextResponse(query())

    async def block_(_: Any) -> Response:
        return PlainTextResponse(await orm.run(block))

    def provoke_(request: Any) -> Response:
        return PlainTextResponse(provoke(request.path_params["what"]))

    async def answer(_: Any) -> Response:
        body, content_type = metrics.render(orm)
        return Response(body, headers={"Content-Type": content_type})

    routes = [
        Route("/query", query_),
        Route("/block", block_),
        Route("/provoke/{what}", provoke_),
        Route("/metrics", answer),
    ]
    return Starlette(routes=routes, lifespan=orm.lifespan(), middleware=[orm.middleware()])
