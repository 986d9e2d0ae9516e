"""The Sanic application that test_sanic.py serves. Every answer carries the id that the request gave itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import peewee
from playhouse import db_url
from sanic import Blueprint, Request, Sanic, json, text
from sanic.exceptions import NotFound
from sanic.response import ResponseStream

from peewee_frameworks import connection_scope
from peewee_frameworks.sanic import Peewee


class Handled(Exception):
    pass


def open_database(url: str) -> Any:
    """A stock pooled database of five that notices when two live requests see one connection."""
    kind = db_url.schemes[urlsplit(url).scheme]
    options = db_url.parse(url, unquote_user=True, unquote_password=True)
    options |= {"max_connections": 5, "timeout": 10}
    if issubclass(kind, peewee.PostgresqlDatabase):
        options["prefer_psycopg3"] = True
    if issubclass(kind, peewee.SqliteDatabase):
        options["pragmas"] = {"journal_mode": "wal", "busy_timeout": 5000, "foreign_keys": 1}

    class Watched(kind):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.owners: dict[int, Any] = {}
            self.shared: list[str] = []
            super().__init__(*args, **kwargs)

        def _close(self, conn: Any, close_conn: bool = False) -> None:
            self.owners.pop(id(conn), None)
            super()._close(conn, close_conn)

        def _execute_cursor(self, sql: str, params: Any, **options: Any) -> Any:
            with contextlib.suppress(Exception):
                request = Request.get_current()
                if self._state.conn is not None:
                    owner = self.owners.setdefault(id(self._state.conn), request)
                    if owner is not request:
                        self.shared.append(f"{request.path} used the connection of {owner.path}")
            return super()._execute_cursor(sql, params, **options)

    return Watched(**options)


def make_app(name: str = "sanic_test") -> Sanic:
    database = open_database(os.environ["DATABASE_URL"])
    app = Sanic(name)
    app.config.FALLBACK_ERROR_FORMAT = "json"
    released: dict[str, asyncio.Event] = {}
    idling: list[str] = []
    outcomes: dict[str, asyncio.Future[str]] = {}

    class Row(peewee.Model):
        rid = peewee.CharField(64, index=True)

    class Only(peewee.Model):
        rid = peewee.CharField(64, unique=True)

    class Child(peewee.Model):
        row = peewee.ForeignKeyField(Row, deferrable="INITIALLY DEFERRED")

    if isinstance(database, peewee.SqliteDatabase):
        database.func("sleep")(time.sleep)
    on_mysql = isinstance(database, peewee.MySQLDatabase)
    tables = [Row, Only] if on_mysql else [Row, Only, Child]
    database.bind(tables)
    orm = Peewee(
        database, errors=True, create_tables=tables, exclude=["atomic.excluded", "*/left-out/*"], close_timeout=5
    )

    def value(rid: str) -> str:
        return str(peewee.Select([], [peewee.Value(rid).alias("v")]).bind(database).scalar())

    def two_queries(loop: asyncio.AbstractEventLoop) -> None:
        value("one")
        turn = threading.Event()
        loop.call_soon_threadsafe(loop.call_soon, turn.set)
        assert turn.wait(10)
        assert database._in_use, "the connection is gone between two queries"

    # -- the application's own hooks: some of them fail ----------------------------------------------------------------

    @app.on_request
    async def before(request):
        if request.args.get("before") == "raise":
            raise Handled
        if request.args.get("before") == "stop":
            return text(value("stopped"))
        return None

    @app.on_response
    async def after(request, response):
        if request.args.get("after") == "raise":
            value("after")
            raise Handled

    @app.exception(Handled)
    async def handled(request, exception):
        return text(value("handled"), 418)

    # -- plain ---------------------------------------------------------------------------------------------------------

    @app.get("/query/<rid>")
    async def query(request, rid):
        return text(value(rid))

    @app.get("/def/<rid>")
    def inline(request, rid):
        return text(value(rid))

    @app.get("/run/<rid>")
    async def run(request, rid):
        return text(await orm.run(value, rid))

    @app.get("/nothing")
    async def nothing(request):
        return text("nothing")

    @app.post("/length/<rid>")
    async def length(request, rid):
        value(rid)
        return text(str(len(request.body)))

    @app.post("/upload/<rid>", stream=True)
    async def upload(request, rid):
        value(rid)
        size = 0
        async for part in request.stream:
            size += len(part)
        return text(f"{size} {value(rid)}")

    @app.get("/fail/<rid>")
    async def fail(request, rid):
        await orm.run(value, rid)
        raise ZeroDivisionError

    @app.get("/injected/<rid>")
    async def injected(request, rid: str, db: peewee.Database):
        assert db is database
        return text(value(rid))

    @app.get("/hang/<rid>")
    async def hang(request, rid):
        with database.atomic():
            Row.create(rid=rid)
            await asyncio.Event().wait()

    @app.get("/leaves/<rid>")
    async def leaves(request, rid):
        """Answer the client's leaving with an error of its own."""
        Row.create(rid=rid)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            Row.create(rid=rid)
            raise NotFound(rid) from None

    @app.get("/thread/<rid>")
    async def thread(request, rid):
        seconds = float(request.args.get("seconds", 0.5))
        name = "pg_sleep" if isinstance(database, peewee.PostgresqlDatabase) else "sleep"
        await asyncio.to_thread(database.execute_sql, f"SELECT {name}({seconds})")
        return text(value(rid))

    @app.get("/orphan/<rid>")
    async def orphan(request, rid):
        value(rid)
        released[rid] = asyncio.Event()
        outcomes[rid] = asyncio.get_running_loop().create_future()

        async def work():
            await released[rid].wait()
            try:
                outcome = value(rid)
            except peewee.PeeweeException as error:
                outcome = type(error).__name__
            async with connection_scope(database):
                outcomes[rid].set_result(f"{outcome} {value(rid)}")

        request.app.add_task(work())
        return text(rid)

    @app.get("/outcome/<rid>")
    async def outcome(request, rid):
        released[rid].set()
        return text(await outcomes[rid])

    @app.get("/gather/<kind>/<rid>")
    async def gather(request, kind, rid):
        async def inline(text: str) -> str:
            await asyncio.sleep(0)
            return value(text)

        calls = {"inline": inline, "run": lambda text: orm.run(value, text)}
        return json(await asyncio.gather(*(calls[kind](f"{rid}-{n}") for n in range(20))))

    @app.get("/missing")
    async def missing(request):
        return text(str(Row.get(Row.rid == "no such row")))

    @app.get("/twice/<rid>")
    async def twice(request, rid):
        Only.create(rid=rid)
        Only.create(rid=rid)

    @app.get("/busy")
    async def busy(request):
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(6):
                await stack.enter_async_context(connection_scope(database))
                value("busy")

    # -- streams -------------------------------------------------------------------------------------------------------

    @app.get("/stream/<kind>/<rid>")
    async def stream(request, kind, rid):
        value(rid)
        if kind == "early":
            response = await request.respond(text(rid))
            await response.eof()
            value(rid)  # the response has gone, the request has not
            return None
        response = await request.respond(content_type="text/plain")
        await response.send(rid)
        while True:
            if kind == "raise":
                value(rid)
                raise ZeroDivisionError
            if kind == "end":
                await response.send(value(rid))
                return await response.eof()
            if kind == "endless":
                await response.send(value(rid) * 1000)
            else:
                await asyncio.Event().wait()

    @app.get("/first/<how>/<rid>")
    async def first(request, how, rid):
        """Query for the first time on a thread before the response begins, or anywhere when it has begun; then idle."""
        if how == "before":
            await asyncio.to_thread(value, rid)
        response = await request.respond(content_type="text/plain")
        await response.send(rid)
        if how == "between":  # two queries of a thread: what the loop does meanwhile is not the thread's business
            await asyncio.to_thread(two_queries, asyncio.get_running_loop())
            await response.send(rid)
        elif how in ("run", "eof"):
            if how == "eof":
                await response.eof()
            await orm.run(value, rid)
        elif how != "before":
            await response.send(await asyncio.to_thread(value, rid) if how == "thread" else value(rid))
        idling.append(rid)
        await asyncio.Event().wait()

    @app.get("/old-stream/<rid>")
    async def old_stream(request, rid):
        async def parts(response):
            await response.write(value(rid))
            await response.write(value(rid))

        return ResponseStream(parts, content_type="text/plain")

    # -- websockets ----------------------------------------------------------------------------------------------------

    @app.websocket("/ws/<kind>")
    async def ws(request, ws, kind):
        if kind == "raise":
            await ws.send(value(await ws.recv()))
            value("last")
            raise ZeroDivisionError
        if kind == "open":
            with database.atomic():
                await ws.send(value(await ws.recv()))
                await ws.recv()
        if kind == "parts":
            while True:
                await ws.send("".join([value(part) async for part in ws.recv_streaming()]))
        async for message in ws:
            await ws.send(await orm.run(value, message) if kind == "run" else value(message))
            value("after the answer")

    # -- policies ------------------------------------------------------------------------------------------------------

    atomic = Blueprint("atomic", url_prefix="/atomic")
    reports = Blueprint("reports", url_prefix="/reports")
    other = Blueprint("other", url_prefix="/other")
    group = Blueprint.group(reports, other, url_prefix="/group")
    orm.policy(group, transaction=True, connect="eager")
    orm.policy(reports, transaction=False)
    orm.policy(atomic, transaction=True, rollback_on=lambda status: status >= 400 or status == 299)

    async def state(request, rid):
        connected = not database.is_closed()
        value(rid)
        return json({"connected": connected, "atomic": database.in_transaction()})

    for blueprint in (atomic, reports, other):
        blueprint.add_route(state, "/state/<rid>", name="state")
    atomic.add_route(state, "/excluded/<rid>", name="excluded")
    atomic.add_route(state, "/left-out/<rid>", name="left_out")
    app.add_route(state, "/state/<rid>", name="state")

    @atomic.get("/write/<rid>/<status:int>")
    async def write(request, rid, status):
        Row.create(rid=rid)
        if status == 404:
            raise NotFound
        if status == 500:
            raise ZeroDivisionError
        if status == 418:
            raise Handled
        return text(rid, status)

    @atomic.get("/stream/<rid>")
    async def atomic_stream(request, rid):
        Row.create(rid=rid)
        response = await request.respond(content_type="text/plain")
        await response.send(rid)
        Row.create(rid=rid)  # by itself: the transaction ended before the first byte
        assert not database.in_transaction()
        await response.eof()

    @atomic.get("/late-stream/<rid>")
    async def late_stream(request, rid):
        response = await request.respond(content_type="text/plain")
        await response.send(rid)
        Row.create(rid=rid)
        await response.eof()

    @atomic.get("/hang/<rid>")
    async def atomic_hang(request, rid):
        Row.create(rid=rid)
        await asyncio.Event().wait()

    def spoil(rid):
        Row.create(rid=rid)
        if on_mysql:
            with contextlib.suppress(peewee.DatabaseError, peewee.InterfaceError):
                database.execute_sql("KILL CONNECTION_ID()")
        else:
            Child.create(row=-1)

    @atomic.get("/spoil/<kind>/<rid>")
    async def spoiled(request, kind, rid):
        spoil(rid)
        if kind == "plain":
            return text(rid)
        if kind == "empty":
            return text("", 204)
        if kind == "stream":
            response = await request.respond(content_type="text/plain")
            await response.send(rid)
            return await response.eof()

        async def parts(response):
            await response.write(rid)

        return ResponseStream(parts)

    app.blueprint([atomic, group])

    @app.get("/count/<rid>")
    async def count(request, rid):
        return text(str(Row.select().where(Row.rid == rid).count()))

    @app.get("/_stats")
    async def stats(request):
        live = [scope.label for scope in orm.runtime.in_flight() if not scope.label.endswith("/_stats")]
        found = {"in_use": len(database._in_use), "live": live, "shared": database.shared, "idling": idling}
        return json({"pid": os.getpid(), **found})

    app.blueprint(orm.blueprint("db", url_prefix="/db")) if name.endswith("_bp") else orm.init_app(app)
    return app
