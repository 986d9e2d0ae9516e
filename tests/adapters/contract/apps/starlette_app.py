"""The contract's application in Starlette."""

from __future__ import annotations

import warnings
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute

from peewee_frameworks.starlette import Peewee

from .asgi_parts import Deadlines, Hooks, messages
from .asynchronous import Asynchronous
from .flask_app import make_sub as make_flask
from .work import Handled, World, rid_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from starlette.middleware.wsgi import WSGIMiddleware

text = PlainTextResponse


def make_app() -> Starlette:
    world = World()
    work = world.work
    orm = Peewee(work.db, **world.options)
    world.orms.append(orm)
    many = Asynchronous(world, orm)
    native = world.native(orm)

    # Errors; sync handlers run on a thread, async ones on the loop

    @native
    def handled(request: Any, error: Exception) -> Any:
        return text(f"handled {work.value(rid_of(request.url.path))}", 418)

    async def unhandled(request: Any, error: Exception) -> Any:
        return text(f"unhandled {await orm.run(work.value, rid_of(request.url.path))}", 500)

    @native
    def not_found(request: Any, error: Exception) -> Any:
        return text(f"not found {work.value(rid_of(request.url.path))}", 404)

    async def not_allowed(request: Any, error: Exception) -> Any:
        return text(f"not allowed {await orm.run(work.value, rid_of(request.url.path))}", 405)

    # Plain requests

    async def plain(request: Any) -> Any:
        return text(request.path_params["rid"])

    @native
    def ok(request: Any) -> Any:
        return text(work.value(request.path_params["rid"]))

    async def in_async(request: Any) -> Any:
        return text(await orm.run(work.value, request.path_params["rid"]))

    @native
    def write(request: Any) -> Any:
        return text(work.write(request.path_params["rid"]))

    async def length(request: Any) -> Any:
        value = await orm.run(work.value, request.path_params["rid"])
        return text(f"{len(await request.body())} {value}")

    @native
    def big(request: Any) -> Any:
        return text(work.value(request.path_params["rid"]) + "x" * 8_000_000)

    @native
    def slow(request: Any) -> Any:
        rid = request.path_params["rid"]
        work.value(rid)
        world.wait(rid)
        return text(work.value(rid))

    async def slow_async(request: Any) -> Any:
        rid = request.path_params["rid"]
        await orm.run(work.value, rid)
        await world.gates.pass_through(rid)
        return text(await orm.run(work.value, rid))

    @native
    def sleep(request: Any) -> Any:
        return text(work.sleep(request.path_params["rid"], 0.3))

    @native
    def sleep_tx(request: Any) -> Any:
        return text(work.sleep_in_transaction(request.path_params["rid"], 0.3))

    @native
    def raise_handled(request: Any) -> Any:
        work.value(request.path_params["rid"])
        raise Handled

    @native
    def raise_unhandled(request: Any) -> Any:
        work.value(request.path_params["rid"])
        raise RuntimeError("asked for")

    @native
    def missing(request: Any) -> Any:
        return text(str(work.missing(request.path_params["rid"])))

    @native
    def duplicate(request: Any) -> Any:
        return text(str(work.duplicate(request.path_params["rid"])))

    @native
    def both(request: Any) -> Any:
        rid = request.path_params["rid"]
        assert world.other is not None
        return text(f"{work.value(rid)} {world.other.value(rid)}")

    # Atomic requests

    @native
    def atomic(request: Any) -> Any:
        rid, kind = request.path_params["rid"], request.path_params["kind"]
        if kind == "spoil":
            return text(work.spoil_commit(rid))
        if kind == "nested":
            return text(work.nested(rid))
        work.write(rid)
        if kind == "handled":
            raise Handled
        if kind == "unhandled":
            raise RuntimeError("asked for")
        return text(rid, {"commit": 200, "status": 409, "chosen": 299}[kind])

    async def atomic_threads(request: Any) -> Any:
        rid = request.path_params["rid"]
        await (orm.run if work.is_async else run_in_threadpool)(work.write, rid)
        await orm.run(work.write, rid)
        return text(await work.inline(work.write, rid))

    # Children, deadlines, and what outlives the request

    async def gather(request: Any) -> Any:
        return JSONResponse(await many.gather(request.path_params["kind"], request.path_params["rid"]))

    @native
    def deadline(request: Any) -> Any:
        rid, kind = request.path_params["rid"], request.path_params["kind"]
        return text((work.sleep_in_transaction if kind.endswith("-tx") else work.sleep)(rid, 0.3))

    async def handler_deadline(request: Any) -> Any:
        kind, _, transaction = request.path_params["kind"].partition("-")
        try:
            rid = request.path_params["rid"]
            return text(await many.under_deadline(kind, rid, transaction=bool(transaction)))
        except TimeoutError:
            return text(rid, 504)

    async def orphan(request: Any) -> Any:
        rid = request.path_params["rid"]
        many.start_orphan(request.path_params["kind"], rid)
        return text(await orm.run(work.value, rid))

    @native
    def thread(request: Any) -> Any:
        rid = request.path_params["rid"]
        world.start_thread(request.path_params["kind"], rid)
        return text(work.value(rid))

    @native
    def background(request: Any) -> Any:
        rid, kind = request.path_params["rid"], request.path_params["kind"]

        @native
        def in_thread() -> None:
            world.wait(rid)
            world.attempt(rid)

        async def in_loop() -> None:
            await many.orphan(kind, rid)

        return text(work.value(rid), background=BackgroundTask(in_thread if kind == "sync" else in_loop))

    # Streams and websockets

    def stream(request: Any) -> Any:
        return StreamingResponse(
            (many if work.is_async else world).stream(request.path_params["kind"], request.path_params["rid"])
        )

    async def astream(request: Any) -> Any:
        return StreamingResponse(many.stream(request.path_params["kind"], request.path_params["rid"]))

    async def events(request: Any) -> Any:
        return StreamingResponse(many.events(request.path_params["rid"]), media_type="text/event-stream")

    async def converse(socket: Any) -> None:
        await socket.accept()
        parameters = socket.path_params
        await many.converse(parameters["kind"], parameters["rid"], messages(socket), socket.send_text)

    routes = [
        Route("/plain/{rid}", plain),
        Route("/ok/{rid}", ok, methods=["GET"]),
        Route("/async/{rid}", in_async),
        Route("/write/{rid}", write),
        Route("/length/{rid}", length, methods=["POST"]),
        Route("/big/{rid}", big),
        Route("/slow/{rid}", slow),
        Route("/slow-async/{rid}", slow_async),
        Route("/sleep/{rid}", sleep),
        Route("/sleep-tx/{rid}", sleep_tx),
        Route("/handled/{rid}", raise_handled),
        Route("/unhandled/{rid}", raise_unhandled),
        Route("/missing/{rid}", missing),
        Route("/duplicate/{rid}", duplicate),
        Route("/both/{rid}", both),
        Route("/atomic/threads/{rid}", atomic_threads),
        Route("/atomic/{kind}/{rid}", atomic),
        Route("/gather/{kind}/{rid}", gather),
        Route("/deadline/{kind}/{rid}", deadline),
        Route("/handler-deadline/{kind}/{rid}", handler_deadline),
        Route("/orphan/{kind}/{rid}", orphan),
        Route("/thread/{kind}/{rid}", thread),
        Route("/background/{kind}/{rid}", background),
        Route("/stream/{kind}/{rid}", stream),
        Route("/astream/{kind}/{rid}", astream),
        Route("/events/{rid}", events),
        WebSocketRoute("/ws/{kind}/{rid}", converse),
        Mount("/sub", make_sub(world)),
    ]
    if not work.is_async:
        routes.append(Mount("/wsgi", WSGIMiddleware(make_flask(world))))
    hooks = [Middleware(Hooks, world, "early"), Middleware(Hooks, world, "late"), Middleware(Deadlines)]
    handlers: Any = {Handled: handled, 500: unhandled, 404: not_found, 405: not_allowed}
    if world.other is None:
        # As the README has it; the hook "early" is above our middleware.
        hooks.insert(1, orm.middleware())
        return Starlette(routes=routes, middleware=hooks, exception_handlers=handlers, lifespan=orm.lifespan())
    app = Starlette(routes=routes, middleware=hooks, exception_handlers=handlers)
    orm.init_app(app)
    other = Peewee(world.other.db, **world.options)
    world.orms.append(other)
    other.init_app(app)
    return app


def make_sub(world: World) -> Starlette:
    """Make an application of its own with its own Peewee on the same database, mounted in the other."""
    orm = Peewee(world.work.db, **world.options)
    world.orms.append(orm)
    native = world.native(orm)

    @native
    def ok(request: Any) -> Any:
        return text(f"{world.work.value(request.path_params['rid'])} {world.work.watch.in_use}")

    @native
    def unhandled(request: Any) -> Any:
        world.work.value(request.path_params["rid"])
        raise RuntimeError("asked for")

    return Starlette(
        routes=[Route("/ok/{rid}", ok), Route("/unhandled/{rid}", unhandled)], middleware=[orm.middleware()]
    )
