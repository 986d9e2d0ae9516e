"""The application that the health tests run on real servers, in each framework, on the database that SERVED_URL names.

``/hold`` keeps a connection until ``/let_go``; ``/query`` takes one. SERVED_OPTIONS are options of the `Peewee`. The guard of
``/db`` lets in who has the token, in a header or in the query; ``/open`` has none.
"""

import json
import os
import threading
import time
from typing import Any

import peewee

from peewee_frameworks.config import connect_url
from tests.health.helpers import QUERYING, TOKEN

db = connect_url(os.environ["SERVED_URL"])
options: dict[str, Any] = {"check": "off", **json.loads(os.environ.get("SERVED_OPTIONS", "{}"))}
gates: dict[str, threading.Event] = {}
HOLD_SECONDS = 30


def query() -> Any:
    return peewee.Select([], [peewee.Value(1).alias("v")]).bind(db).scalar()


def hold(name: str) -> str:
    """Keep a connection until somebody lets go of it."""
    gate = gates.setdefault(name, threading.Event())
    with db.connection_context():
        query()
        gate.wait(HOLD_SECONDS)
    return name


def let_go(name: str) -> str:
    gates.setdefault(name, threading.Event()).set()
    return name


def allows(token: str | None) -> bool:
    if token == QUERYING:
        query()  # as a login does that looks a user up
    return token in (TOKEN, QUERYING)


def flask_app() -> Any:
    from flask import Flask

    from peewee_frameworks.flask import Peewee

    orm = Peewee(db, **options)
    app = Flask(__name__)
    orm.init_app(app)
    app.add_url_rule("/hold/<name>", view_func=hold)
    app.add_url_rule("/let_go/<name>", view_func=let_go)
    app.add_url_rule("/query", "query", lambda: str(query()))

    def guard(request: Any) -> bool:
        return allows(request.headers.get("X-Token") or request.args.get("token"))

    app.register_blueprint(orm.blueprint(url_prefix="/db", guard=guard))
    app.register_blueprint(orm.blueprint("open", url_prefix="/open"))
    return app


def sanic_app() -> Any:
    from sanic import Sanic, text

    from peewee_frameworks.sanic import Peewee

    orm = Peewee(db, **options)
    app = Sanic("health")

    @app.get("/hold/<name>")
    async def holding(request: Any, name: str) -> Any:
        return text(await orm.run(hold, name))

    @app.get("/let_go/<name>")
    async def letting_go(request: Any, name: str) -> Any:
        return text(let_go(name))

    @app.get("/query")
    async def querying(request: Any) -> Any:
        return text(str(await orm.run(query)))

    def guard(request: Any) -> bool:
        return allows(request.headers.get("x-token") or request.args.get("token"))

    app.blueprint(orm.blueprint("db", url_prefix="/db", guard=guard))
    app.blueprint(orm.blueprint("open", url_prefix="/open", health=True))
    return app


def starlette_app() -> Any:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Mount, Route

    from peewee_frameworks.starlette import Peewee

    orm = Peewee(db, **options)

    def letting_go(request: Any) -> Any:
        return PlainTextResponse(let_go(request.path_params["name"]))

    async def querying(request: Any) -> Any:
        return PlainTextResponse(str(await orm.run(query)))

    async def holding(request: Any) -> Any:
        return PlainTextResponse(await orm.run(hold, request.path_params["name"]))

    def order(request: Any) -> Any:  # on a thread, where it waits in the pool's own queue
        query()
        time.sleep(float(request.query_params.get("for", 0)))
        return PlainTextResponse("")

    async def guard(request: Any) -> bool:
        return allows(request.headers.get("x-token") or request.query_params.get("token"))

    routes = [
        Route("/hold/{name}", holding),
        Route("/let_go/{name}", letting_go),
        Route("/query", querying),
        Route("/orders/{number}", db.atomic()(order)),
        Route("/reports/{name:path}", holding),
        # Two mounts deep, as in an application that has an area for its operators.
        Mount("/", routes=[Mount("/db", orm.app(guard=guard)), Mount("/open", orm.app())]),
    ]
    app = Starlette(routes=routes, lifespan=orm.lifespan())
    orm.init_app(app)
    return app


def fastapi_app() -> Any:
    from fastapi import Depends, FastAPI, HTTPException, Request

    from peewee_frameworks.fastapi import Peewee

    orm = Peewee(db, **options)
    app = FastAPI()
    orm.init_app(app)

    @app.get("/hold/{name}")
    async def holding(name: str) -> str:
        return await orm.run(hold, name)

    app.get("/let_go/{name}")(let_go)

    @app.get("/query")
    async def querying() -> Any:
        return await orm.run(query)

    def guard(request: Request, token: str = "") -> None:
        if not allows(request.headers.get("x-token") or token):
            raise HTTPException(403, "No token.")

    app.include_router(orm.router(prefix="/db", guard=Depends(guard)))
    app.include_router(orm.router(prefix="/open"))
    return app
