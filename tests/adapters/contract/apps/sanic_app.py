"""The contract's application in Sanic."""

from __future__ import annotations

from typing import Any

from sanic import Sanic, json, text
from sanic.exceptions import MethodNotAllowed, NotFound

from peewee_frameworks.sanic import Peewee

from .asynchronous import Asynchronous
from .work import Handled, Spoiled, Vetoed, World, rid_of


def make_app() -> Sanic:
    world = World()
    work = world.work
    app = Sanic("contract")
    app.config.FALLBACK_ERROR_FORMAT = "text"

    # Another extension, first in line

    @app.on_request
    async def early(request: Any) -> Any:
        return await before(request, "early")

    @app.on_response
    async def first_response(request: Any, response: Any) -> None:
        await after(request, "early")

    orm = Peewee(work.db, **world.options)
    world.orms.append(orm)
    many = Asynchronous(world, orm)
    if world.other is None:
        orm.init_app(app)
    else:
        app.blueprint(orm.blueprint("db"))
        other = Peewee(world.other.db, **world.options)
        world.orms.append(other)
        other.init_app(app)

    @app.on_request
    async def late(request: Any) -> Any:
        return await before(request, "late")

    @app.on_response
    async def last_response(request: Any, response: Any) -> None:
        await after(request, "late")

    async def before(request: Any, when: str) -> Any:
        what, _, moment = request.headers.get("X-Before", "").partition("-")
        if moment == when:
            rid = await work.inline(work.value, rid_of(request.path))
            if what == "raise":
                raise Vetoed
            return text(rid, 202)
        return None

    async def after(request: Any, when: str) -> None:
        if request.headers.get("X-After") == f"response-{when}":
            await work.inline(work.value, rid_of(request.path))
            raise Spoiled

    # Errors

    @app.exception(Handled)
    async def handled(request: Any, error: Any) -> Any:
        return text(f"handled {await orm.run(work.value, rid_of(request.path))}", 418)

    @app.exception(NotFound)
    async def not_found(request: Any, error: Any) -> Any:
        return text(f"not found {await orm.run(work.value, rid_of(request.path))}", 404)

    @app.exception(MethodNotAllowed)
    async def not_allowed(request: Any, error: Any) -> Any:
        return text(f"not allowed {await orm.run(work.value, rid_of(request.path))}", 405)

    @app.exception(RuntimeError, Vetoed, Spoiled)
    async def unhandled(request: Any, error: Any) -> Any:
        return text(f"unhandled {await orm.run(work.value, rid_of(request.path))}", 500)

    # Plain requests

    @app.get("/plain/<rid>")
    async def plain(request: Any, rid: str) -> Any:
        return text(rid)

    @app.get("/ok/<rid>")
    async def ok(request: Any, rid: str) -> Any:
        return text(await orm.run(work.value, rid))

    @app.get("/inline/<rid>")
    def inline(request: Any, rid: str) -> Any:
        return text(work.value(rid))

    @app.get("/async/<rid>")
    async def in_async(request: Any, rid: str) -> Any:
        return text(await orm.run(work.value, rid))

    @app.get("/write/<rid>")
    async def write(request: Any, rid: str) -> Any:
        return text(await orm.run(work.write, rid))

    @app.post("/length/<rid>")
    async def length(request: Any, rid: str) -> Any:
        return text(f"{len(request.body)} {await orm.run(work.value, rid)}")

    @app.get("/big/<rid>")
    async def big(request: Any, rid: str) -> Any:
        return text(await orm.run(work.value, rid) + "x" * 8_000_000)

    @app.get("/slow/<rid>")
    async def slow(request: Any, rid: str) -> Any:
        await orm.run(work.value, rid)
        await world.gates.pass_through(rid)
        return text(await orm.run(work.value, rid))

    @app.get("/sleep/<rid>")
    async def sleep(request: Any, rid: str) -> Any:
        return text(await orm.run(work.sleep, rid, 0.3))

    @app.get("/sleep-tx/<rid>")
    async def sleep_tx(request: Any, rid: str) -> Any:
        return text(await orm.run(work.sleep_in_transaction, rid, 0.3))

    @app.get("/handled/<rid>")
    async def raise_handled(request: Any, rid: str) -> Any:
        await orm.run(work.value, rid)
        raise Handled

    @app.get("/unhandled/<rid>")
    async def raise_unhandled(request: Any, rid: str) -> Any:
        await orm.run(work.value, rid)
        raise RuntimeError("asked for")

    @app.get("/missing/<rid>")
    async def missing(request: Any, rid: str) -> Any:
        return text(str(await orm.run(work.missing, rid)))

    @app.get("/duplicate/<rid>")
    async def duplicate(request: Any, rid: str) -> Any:
        return text(str(await orm.run(work.duplicate, rid)))

    @app.get("/both/<rid>")
    async def both(request: Any, rid: str) -> Any:
        assert world.other is not None
        return text(f"{await work.inline(work.value, rid)} {await world.other.inline(world.other.value, rid)}")

    # Atomic requests

    @app.get("/atomic/threads/<rid>", name="atomic_threads")
    async def atomic_threads(request: Any, rid: str) -> Any:
        await orm.run(work.write, rid)
        await orm.run(work.write, rid)
        return text(await work.inline(work.write, rid))

    @app.get("/atomic/<kind>/<rid>")
    async def atomic(request: Any, kind: str, rid: str) -> Any:
        if kind == "spoil":
            return text(await orm.run(work.spoil_commit, rid))
        if kind == "nested":
            return text(await orm.run(work.nested, rid))
        await orm.run(work.write, rid)
        if kind == "handled":
            raise Handled
        if kind == "unhandled":
            raise RuntimeError("asked for")
        return text(rid, {"commit": 200, "status": 409, "chosen": 299}[kind])

    # Children, deadlines, and what outlives the request

    @app.get("/gather/<kind>/<rid>")
    async def gather(request: Any, kind: str, rid: str) -> Any:
        return json(await many.gather(kind, rid))

    @app.get("/handler-deadline/<kind>/<rid>")
    async def handler_deadline(request: Any, kind: str, rid: str) -> Any:
        kind, _, transaction = kind.partition("-")
        try:
            return text(await many.under_deadline(kind, rid, transaction=bool(transaction)))
        except TimeoutError:
            return text(rid, 504)

    @app.get("/orphan/<kind>/<rid>")
    async def orphan(request: Any, kind: str, rid: str) -> Any:
        many.start_orphan(kind, rid)
        return text(await orm.run(work.value, rid))

    @app.get("/thread/<kind>/<rid>")
    async def thread(request: Any, kind: str, rid: str) -> Any:
        world.start_thread(kind, rid)
        return text(await orm.run(work.value, rid))

    @app.get("/background/<kind>/<rid>")
    async def background(request: Any, kind: str, rid: str) -> Any:
        request.app.add_task(many.orphan(kind, rid))
        return text(await orm.run(work.value, rid))

    # Streams and websockets

    @app.get("/astream/<kind>/<rid>")
    async def astream(request: Any, kind: str, rid: str) -> Any:
        response = await request.respond(content_type="text/plain")
        async for part in many.stream(kind, rid):
            await response.send(part)

    @app.get("/events/<rid>")
    async def events(request: Any, rid: str) -> Any:
        response = await request.respond(content_type="text/event-stream")
        async for part in many.events(rid):
            await response.send(part)

    @app.websocket("/ws/<kind>/<rid>")
    async def converse(request: Any, ws: Any, kind: str, rid: str) -> None:
        await many.converse(kind, rid, ws, ws.send)

    return app
