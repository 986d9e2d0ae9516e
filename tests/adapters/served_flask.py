"""A Flask application on a stock pool, watched; for the tests on real servers."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from flask import Flask, Response, stream_with_context
from werkzeug.exceptions import NotFound

from peewee_frameworks.flask import Peewee
from tests.adapters.contract.apps.work import Work


def make_app() -> Flask:
    work = Work(os.environ["DATABASE_URL"])
    orm = Peewee(
        work.db,
        errors=True,
        create_tables=[work.Item, work.Part],
        transaction=lambda request: request.endpoint in ("atomic", "spoil"),
        exclude=["ready"],
    )
    app = Flask("served")
    orm.init_app(app)

    @app.get("/_stats")
    def stats() -> Any:
        rows = work.Item.select().count()
        work.db.close()
        return work.stats() | {"live": len(orm.runtime.in_flight()), "rows": rows}

    @app.get("/_ready")
    def ready() -> str:
        return "ok"

    @app.get("/pid/<rid>")
    def pid(rid: str) -> str:
        work.value(rid)
        return str(os.getpid())

    @app.get("/ok/<rid>")
    def ok(rid: str) -> str:
        return work.value(rid)

    @app.get("/async/<rid>")
    async def in_async(rid: str) -> str:
        await asyncio.sleep(0)
        return await orm.run(work.value, rid)

    @app.get("/stream/<rid>")
    def stream(rid: str) -> Response:
        return Response(work.value(rid) for _ in range(3))

    @app.get("/context-stream/<rid>")
    def context_stream(rid: str) -> Response:
        return Response(stream_with_context(work.value(rid) for _ in range(3)))

    @app.get("/error/<rid>")
    def error(rid: str) -> str:
        work.value(rid)
        raise RuntimeError("asked for")

    @app.get("/missing/<rid>")
    def missing(rid: str) -> str:
        work.value(rid)
        raise NotFound

    @app.get("/atomic/<rid>")
    def atomic(rid: str) -> Any:
        return work.write(rid), 409

    @app.get("/spoil/<rid>")
    def spoil(rid: str) -> str:
        return work.spoil_commit(rid)

    return app


def __getattr__(name: str) -> Any:
    if name == "app":  # for servers that want no factory
        globals()["app"] = make_app()
        return globals()["app"]
    raise AttributeError(name)
