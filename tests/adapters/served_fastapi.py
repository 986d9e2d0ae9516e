"""The application that test_fastapi.py runs on real servers."""

import asyncio
import gc
import itertools
import json
import os
import threading
import time
from contextlib import contextmanager
from typing import Annotated, Any

import anyio
import peewee
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from peewee_frameworks import current_scope
from peewee_frameworks.fastapi import Peewee
from tests.support.databases import Place

SLOW_SECONDS = 0.4
DEADLINE_SECONDS = 0.1


class Held:
    """Who is using which connection, by the requests' own account; two at once is a violation."""

    def __init__(self, database: Any) -> None:
        self.database = database
        self.holders: dict[int, object] = {}
        self.violations: list[str] = []
        self.peak = 0
        self._lock = threading.Lock()

    @contextmanager
    def by(self, label: str):
        connection, me = id(self.database.connection()), object()
        with self._lock:
            if self.holders.setdefault(connection, me) is not me:
                self.violations.append(f"{label} got a connection that another request holds")
            self.peak = max(self.peak, len(self.database._in_use))
        try:
            yield
        finally:
            with self._lock:
                if self.holders.get(connection) is me:
                    del self.holders[connection]


class Deadlines:
    """A time limit around the routes below /deadline, as a middleware of the application's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/deadline/"):
            await self.app(scope, receive, send)
            return
        kind = scope["path"].split("/")[2]
        try:
            if kind == "timeout":
                async with asyncio.timeout(DEADLINE_SECONDS):
                    await self.app(scope, receive, send)
            elif kind == "wait_for":
                await asyncio.wait_for(self.app(scope, receive, send), DEADLINE_SECONDS)
            else:
                with anyio.fail_after(DEADLINE_SECONDS):
                    await self.app(scope, receive, send)
        except TimeoutError:
            await JSONResponse("late", 504)(scope, receive, send)


def make_app() -> FastAPI:
    place = Place(**json.loads(os.environ["SERVED_PLACE"]))
    database = place.make_database(timeout=40)
    if place.kind == "sqlite":
        database.func("sleep")(time.sleep)

    class Item(peewee.Model):
        name = peewee.CharField(64)

    class Part(peewee.Model):
        item = peewee.ForeignKeyField(Item, deferrable="INITIALLY DEFERRED")

    database.bind([Item, Part])
    tables = [Item] if place.kind == "mysql" else [Item, Part]
    orm = Peewee(database, errors=True, create_tables=tables)
    app = FastAPI(lifespan=orm.lifespan())
    app.add_middleware(Deadlines)
    orm.init_app(app)
    held = Held(database)
    if place.kind == "sqlite":
        database.pragma("foreign_keys", 1, permanent=True)
        database.close()

    def ask(text: str) -> str:
        with held.by(text):
            return str(peewee.Select([], [peewee.Value(text).alias("v")]).bind(database).scalar())

    def slow() -> None:
        name = "pg_sleep" if place.kind == "postgres" else "sleep"
        with held.by("slow"):
            peewee.Select([], [getattr(peewee.fn, name)(SLOW_SECONDS)]).bind(database).scalar()

    def own():
        with database.atomic():
            yield database

    Connection = Annotated[Any, Depends(orm.connection)]
    Atomic = Annotated[Any, Depends(orm.transaction, scope="function")]

    @app.get("/_stats")
    async def stats() -> Any:
        return {
            "in_use": len(database._in_use),
            "peak": held.peak,
            "violations": held.violations,
            "live": [scope.label for scope in orm.runtime.in_flight() if "_stats" not in scope.label],
        }

    @app.get("/sync/{text}")
    def sync(text: str, db: Connection) -> str:
        return ask(text)

    @app.get("/yield/{text}")
    def with_yield(text: str, db: Annotated[Any, Depends(own)]) -> str:
        return ask(text)

    @app.get("/atomic/{text}")
    def atomic(text: str, db: Atomic) -> str:
        return ask(text)

    @app.get("/run/{text}")
    async def run(text: str, db: Connection) -> str:
        return await orm.run(ask, text)

    @app.get("/two/{text}")
    def two(text: str, first: Annotated[str, Depends(ask)]) -> str:
        assert first == text
        return ask(text)

    @app.get("/slow/{text}")
    def slowly(text: str) -> str:
        slow()
        return ask(text)

    @app.get("/deadline/{kind}/query/{name}")
    def late(kind: str, name: str) -> str:
        slow()
        return ask(name)

    @app.get("/deadline/{kind}/transaction/{name}")
    def late_in_transaction(kind: str, name: str) -> str:
        with database.atomic():
            Item.create(name=name)
            slow()
            Item.create(name=name)
            if kind == "fail_after":  # which waits for the thread, so this is reached
                raise TimeoutError
        return name

    @app.get("/stream/{kind}/{name}")
    def stream(kind: str, name: str) -> StreamingResponse:
        def endless():
            for number in itertools.count():
                yield ask(str(number)) + "x" * 65536

        def endless_in_transaction():
            with database.atomic():
                Item.create(name=name)
                yield from endless()

        async def endless_async():
            for number in itertools.count():
                yield await orm.run(ask, str(number)) + "x" * 65536

        return StreamingResponse({"sync": endless, "async": endless_async, "atomic": endless_in_transaction}[kind]())

    @app.get("/collect/{text}")
    def collect(text: str) -> str:
        with database.atomic():
            gc.collect()  # what a client left behind is closed now, in this request's context
            return ask(text)

    @app.get("/idle")
    async def idle() -> StreamingResponse:
        async def events():
            yield await orm.run(ask, "first")
            await asyncio.Event().wait()  # for ever; the client leaves

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/length")
    async def length(request: Request) -> int:
        await orm.run(ask, "length")
        return len(await request.body())

    @app.get("/scope")
    def scope() -> Any:
        now = current_scope()
        assert now is not None
        return {"id": id(now), "label": now.label, "ended": now.ended}

    @app.get("/count/{name}")
    def count(name: str) -> int:
        return int(Item.select().where(Item.name == name).count())

    def spoil() -> None:
        Item.create(name="spoiled")
        if place.kind != "mysql":
            Part.create(item=-1)
            return
        try:
            database.execute_sql("KILL CONNECTION_ID()")
        except (peewee.OperationalError, peewee.InterfaceError):
            return

    @app.get("/spoil/function")
    def spoil_function(db: Atomic) -> None:
        spoil()

    @app.get("/spoil/request")
    def spoil_request(db: Annotated[Any, Depends(orm.transaction)]) -> None:
        spoil()

    return app
