"""The Quart application that test_asgi.py runs on a real server: any ASGI framework, with the framework-free middleware."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import peewee
from quart import Quart, request, websocket

from peewee_frameworks import current_scope
from peewee_frameworks.asgi import PeeweeMiddleware
from tests.support.databases import Place


def make_app() -> PeeweeMiddleware:
    place = Place(**json.loads(os.environ["SERVED_PLACE"]))
    database = place.make_database(timeout=20)

    class Item(peewee.Model):
        name = peewee.CharField(64, unique=True)

    Item.bind(database)
    app = Quart(__name__)
    told: list[str] = []

    def ask(text: str) -> str:
        return str(peewee.Select([], [peewee.Value(text).alias("v")]).bind(database).scalar())

    @app.before_serving
    async def start() -> None:
        told.append(current_scope().label)
        Item.create(name="start")

    @app.get("/_stats")
    async def stats() -> Any:
        live = [scope.label for scope in wrapped.runtime.in_flight() if "_stats" not in scope.label]
        return {"in_use": len(database._in_use), "live": live, "told": told}

    @app.get("/ask/<text>")
    def in_thread(text: str) -> str:
        return ask(text)

    @app.get("/run/<text>")
    async def run(text: str) -> str:
        return await wrapped.runtime.run(ask, text)

    @app.post("/items/<name>")
    async def create(name: str) -> Any:
        await wrapped.runtime.run(lambda: Item.create(name=name))
        return "", int(request.args["status"])

    @app.get("/items/<name>")
    def get(name: str) -> str:
        return Item.get(Item.name == name).name

    @app.get("/fail")
    def fail() -> str:
        ask("fail")
        raise RuntimeError("asked for")

    @app.errorhandler(500)
    async def failed(error: Exception) -> Any:
        return await wrapped.runtime.run(ask, "handled"), 500

    @app.get("/stream")
    async def stream() -> Any:
        async def body():
            yield await wrapped.runtime.run(ask, "first")
            await asyncio.Event().wait()

        return body()

    @app.websocket("/echo")
    async def echo() -> None:
        while True:
            await websocket.send(await wrapped.runtime.run(ask, await websocket.receive()))

    # Quart answers exceptions itself, so what a database error means to a client is its own business; Peewee's 409 and 503
    # come from what happens outside it: the connect before, the COMMIT after.
    wrapped = PeeweeMiddleware(
        app, database, create_tables=[Item], errors=True, transaction=lambda scope: scope["method"] == "POST"
    )
    return wrapped
