"""One application in each framework and in none: an N+1 page, one that queries nothing, one that holds its connection.

DATABASE names the SQLite file and KIND the pool, "ours" or "stock"; OPTIONS are those of `Peewee`, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from typing import Any

import peewee
from playhouse.pool import PooledSqliteDatabase as Stock

from peewee_frameworks.asgi import PeeweeMiddleware as ASGIMiddleware
from peewee_frameworks.extension import Extension
from peewee_frameworks.pool import PooledSqliteDatabase
from peewee_frameworks.wsgi import PeeweeMiddleware as WSGIMiddleware

KINDS: dict[str, Any] = {"ours": PooledSqliteDatabase, "stock": Stock}
NOTES = 4
SECRET = "".join(("sec", "ret"))  # noqa: FLY002 - in two, because reports show lines of the source
DEADLINE = 20.0


def make_database() -> Any:
    logging.basicConfig(level=logging.WARNING, format="%(name)s %(levelname)s %(message)s")
    return KINDS[os.environ.get("KIND", "ours")](os.environ["DATABASE"], max_connections=5, timeout=5)


def options() -> Any:
    return json.loads(os.environ.get("OPTIONS", "{}"))


class Work:
    """What the pages do."""

    def __init__(self, database: Any) -> None:
        class Note(peewee.Model):
            text = peewee.CharField()

            class Meta:
                pass

        Note.bind(database)
        self.database = database
        self.Note = Note
        self.opened = threading.Event()

    def fill(self) -> None:
        with self.database.connection_context():
            self.database.create_tables([self.Note])
            if not self.Note.select().count():
                for number in range(NOTES):
                    self.Note.create(text=f"{SECRET} {number}")
        self.database.close_idle()  # the first request is to wait for a connect

    def notes(self) -> str:
        """Query once for all ids, then once for each row."""
        ids = [row[0] for row in self.Note.select(self.Note.id).tuples()]
        return ", ".join(self.Note.get_by_id(number).text for number in ids)

    def wait_in_the_view(self) -> str:
        self.notes()
        assert self.opened.wait(DEADLINE)
        return "held"

    async def wait_in_the_coroutine(self, orm: Any) -> str:
        await orm.run(self.notes)
        async with asyncio.timeout(DEADLINE):
            while not self.opened.is_set():
                await asyncio.sleep(0.01)
        return "held"

    def open(self) -> str:
        self.opened.set()
        return "opened"


def holders(orm: Any) -> str:
    return json.dumps([holder.as_dict() for holder in orm.holders()])


def make_flask() -> Any:
    from flask import Flask

    from peewee_frameworks.flask import Peewee

    orm = Peewee(make_database(), **options())
    work = Work(orm.database)
    work.fill()
    app = Flask("observed")
    orm.init_app(app)
    for path, view in (
        ("/notes", work.notes),
        ("/none", lambda: "none"),
        ("/hold", work.wait_in_the_view),
        ("/open", work.open),
        ("/holders", lambda: holders(orm)),
    ):
        app.add_url_rule(path, path[1:], view)
    return app


def make_sanic() -> Any:
    from sanic import Sanic, text

    from peewee_frameworks.sanic import Peewee

    orm = Peewee(make_database(), **options())
    work = Work(orm.database)
    work.fill()
    app = Sanic("observed")
    orm.init_app(app)

    @app.get("/notes")
    async def notes(request):
        return text(await orm.run(work.notes))

    @app.get("/stream")
    async def stream(request):
        found = await orm.run(work.notes)
        response = await request.respond()
        for part in found.split(", "):
            await response.send(part)

    @app.get("/none")
    async def none(request):
        return text("none")

    @app.get("/hold")
    async def hold(request):
        return text(await work.wait_in_the_coroutine(orm))

    @app.get("/open")
    async def open_(request):
        return text(work.open())

    @app.get("/holders")
    async def held(request):
        return text(holders(orm))

    return app


def make_starlette() -> Any:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    from peewee_frameworks.starlette import Peewee

    orm = Peewee(make_database(), **options())
    work = Work(orm.database)
    work.fill()

    async def hold(request):
        return PlainTextResponse(await work.wait_in_the_coroutine(orm))

    app = Starlette(
        routes=[
            Route("/notes", lambda request: PlainTextResponse(work.notes())),
            Route("/none", lambda request: PlainTextResponse("none")),
            Route("/hold", hold),
            Route("/open", lambda request: PlainTextResponse(work.open())),
            Route("/holders", lambda request: PlainTextResponse(holders(orm))),
        ]
    )
    orm.init_app(app)
    return app


def make_fastapi() -> Any:
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse

    from peewee_frameworks.fastapi import Peewee

    orm = Peewee(make_database(), **options())
    work = Work(orm.database)
    work.fill()
    app = FastAPI(default_response_class=PlainTextResponse)
    orm.init_app(app)
    app.get("/notes")(work.notes)
    app.get("/none")(lambda: "none")
    app.get("/hold")(work.wait_in_the_view)  # in one of AnyIO's threads
    app.get("/open")(work.open)
    app.get("/holders")(lambda: holders(orm))
    return app


def make_wsgi() -> Any:
    work = Work(make_database())
    work.fill()

    def application(environ: Any, start_response: Any) -> Any:
        pages = {"/notes": work.notes, "/hold": work.wait_in_the_view, "/open": work.open, "/holders": held}
        body = pages.get(environ["PATH_INFO"], lambda: "none")().encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    wrapped = WSGIMiddleware(application, work.database, **options())

    def held() -> str:
        return holders(_extension_of(wrapped))

    return wrapped


def make_asgi() -> Any:
    work = Work(make_database())
    work.fill()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        orm = _extension_of(wrapped)
        if scope["path"] == "/hold":
            text = await work.wait_in_the_coroutine(orm)
        else:
            pages = {"/notes": work.notes, "/open": work.open, "/holders": lambda: holders(orm)}
            text = await orm.run(pages.get(scope["path"], lambda: "none"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": text.encode()})

    wrapped = ASGIMiddleware(application, work.database, **options())
    return wrapped


def _extension_of(middleware: Any) -> Any:
    orm = Extension.__new__(Extension)
    orm.runtime = middleware.runtime
    return orm
