"""The contract's application in FastAPI: dependencies, sync and async endpoints, a router."""

import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from peewee import Database
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware

from peewee_frameworks.fastapi import Peewee

from .asgi_parts import Deadlines, Hooks, messages
from .asynchronous import Asynchronous
from .flask_app import make_sub as make_flask
from .work import Handled, World, rid_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from starlette.middleware.wsgi import WSGIMiddleware

text = PlainTextResponse


def make_app() -> FastAPI:
    world = World()
    work = world.work
    orm = Peewee(work.db, **world.options)
    world.orms.append(orm)
    many = Asynchronous(world, orm)
    native = world.native(orm)

    hooks = [Middleware(Hooks, world, "early"), Middleware(Hooks, world, "late"), Middleware(Deadlines)]
    # As the README has it, or init_app alone.
    lifespan = orm.lifespan() if world.other is None else None
    app = FastAPI(lifespan=lifespan, middleware=hooks, default_response_class=text)
    orm.init_app(app)
    if world.other is not None:
        other = Peewee(world.other.db, **world.options)
        world.orms.append(other)
        other.init_app(app)

    Connection = Annotated[Database, Depends(orm.connection)]
    Atomic = Annotated[Database, Depends(orm.transaction, scope="function")]

    def greeted(rid: str, db: Connection) -> Iterator[str]:
        """A dependency of the user's: sync, yields, and queries after the response; on two threads, as it comes."""
        yield rid
        work.value(rid)

    def known(rid: str, db: Connection) -> Iterator[str]:
        """Another, which queries before the endpoint too: so the request holds a connection, and needs a thread again."""
        yield work.value(rid)
        work.value(rid)

    def opened(rid: str) -> Iterator[str]:
        """Another: what the endpoint does is inside its transaction."""
        with work.db.atomic():
            yield work.write(rid)

    async def greeted_async(rid: str, db: Connection) -> AsyncIterator[str]:
        yield rid
        await orm.run(work.value, rid)

    async def known_async(rid: str, db: Connection) -> AsyncIterator[str]:
        yield await orm.run(work.value, rid)
        await orm.run(work.value, rid)

    async def opened_async(rid: str) -> AsyncIterator[str]:
        async with work.db.atomic():
            yield await orm.run(work.write, rid)

    if work.is_async:
        greeted, known, opened = greeted_async, known_async, opened_async

    Greeted = Annotated[str, Depends(greeted)]
    Known = Annotated[str, Depends(known)]
    Opened = Annotated[str, Depends(opened, scope="function")]

    # Errors

    @app.exception_handler(Handled)
    @native
    def handled(request: Request, error: Exception) -> Any:
        return text(f"handled {work.value(rid_of(request.url.path))}", 418)

    @app.exception_handler(500)
    async def unhandled(request: Request, error: Exception) -> Any:
        return text(f"unhandled {await orm.run(work.value, rid_of(request.url.path))}", 500)

    @app.exception_handler(404)
    @native
    def not_found(request: Request, error: Exception) -> Any:
        return text(f"not found {work.value(rid_of(request.url.path))}", 404)

    @app.exception_handler(405)
    async def not_allowed(request: Request, error: Exception) -> Any:
        return text(f"not allowed {await orm.run(work.value, rid_of(request.url.path))}", 405)

    # Plain requests

    @app.get("/plain/{rid}")
    async def plain(rid: str) -> str:
        return rid

    @app.get("/ok/{rid}")
    @native
    def ok(rid: str, greeted: Greeted) -> str:
        assert greeted == rid
        return work.value(rid)

    @app.get("/known/{rid}")
    @native
    def with_known(rid: str, known: Known) -> str:
        assert known == rid
        return work.value(rid)

    @app.get("/async/{rid}")
    async def in_async(rid: str, db: Connection) -> str:
        return await orm.run(work.value, rid)

    @app.get("/write/{rid}")
    @native
    def write(rid: str) -> str:
        return work.write(rid)

    @app.post("/length/{rid}")
    async def length(rid: str, request: Request) -> str:
        value = await orm.run(work.value, rid)
        return f"{len(await request.body())} {value}"

    @app.get("/big/{rid}")
    @native
    def big(rid: str) -> str:
        return work.value(rid) + "x" * 8_000_000

    @app.get("/slow/{rid}")
    @native
    def slow(rid: str, known: Known) -> str:
        world.wait(rid)
        return work.value(rid)

    @app.get("/slow-async/{rid}")
    async def slow_async(rid: str, known: Known) -> str:
        await world.gates.pass_through(rid)
        return await orm.run(work.value, rid)

    @app.get("/sleep/{rid}")
    @native
    def sleep(rid: str) -> str:
        return work.sleep(rid, 0.3)

    @app.get("/sleep-tx/{rid}")
    @native
    def sleep_tx(rid: str) -> str:
        return work.sleep_in_transaction(rid, 0.3)

    @app.get("/handled/{rid}")
    @native
    def raise_handled(rid: str, known: Known) -> str:
        raise Handled

    @app.get("/unhandled/{rid}")
    @native
    def raise_unhandled(rid: str, known: Known) -> str:
        raise RuntimeError("asked for")

    @app.get("/missing/{rid}")
    @native
    def missing(rid: str) -> str:
        return str(work.missing(rid))

    @app.get("/duplicate/{rid}")
    @native
    def duplicate(rid: str) -> str:
        return str(work.duplicate(rid))

    @app.get("/both/{rid}")
    @native
    def both(rid: str) -> str:
        assert world.other is not None
        return f"{work.value(rid)} {world.other.value(rid)}"

    # Atomic requests, by option

    @app.get("/atomic/threads/{rid}")
    async def atomic_threads(rid: str) -> str:
        await (orm.run if work.is_async else run_in_threadpool)(work.write, rid)
        await orm.run(work.write, rid)
        return await work.inline(work.write, rid)

    @app.get("/atomic/{kind}/{rid}")
    @native
    def atomic(kind: str, rid: str) -> Any:
        return transact(kind, rid)

    def transact(kind: str, rid: str) -> Any:
        if kind == "spoil":
            return work.spoil_commit(rid)
        if kind == "nested":
            return work.nested(rid)
        work.write(rid)
        if kind == "handled":
            raise Handled
        if kind == "unhandled":
            raise RuntimeError("asked for")
        return text(rid, {"commit": 200, "status": 409, "chosen": 299}[kind])

    # The same by dependency

    router = APIRouter()

    @router.get("/transaction/sync/{kind}/{rid}")
    @native
    def transaction_sync(kind: str, rid: str, db: Atomic) -> Any:
        return transact(kind, rid)

    @router.get("/transaction/async/{kind}/{rid}")
    async def transaction_async(kind: str, rid: str, db: Atomic) -> Any:
        return await orm.run(transact, kind, rid)

    @router.get("/transaction/own/{kind}/{rid}")
    @native
    def transaction_own(kind: str, rid: str, opened: Opened) -> Any:
        return transact(kind, rid)

    # Children, deadlines, and what outlives the request

    @app.get("/gather/{kind}/{rid}")
    async def gather(kind: str, rid: str) -> Any:
        return JSONResponse(await many.gather(kind, rid))

    @app.get("/deadline/{kind}/{rid}")
    @native
    def deadline(kind: str, rid: str, greeted: Greeted) -> str:
        return (work.sleep_in_transaction if kind.endswith("-tx") else work.sleep)(rid, 0.3)

    @app.get("/handler-deadline/{kind}/{rid}")
    async def handler_deadline(kind: str, rid: str) -> Any:
        kind, _, transaction = kind.partition("-")
        try:
            return await many.under_deadline(kind, rid, transaction=bool(transaction))
        except TimeoutError:
            return text(rid, 504)

    @app.get("/orphan/{kind}/{rid}")
    async def orphan(kind: str, rid: str) -> str:
        many.start_orphan(kind, rid)
        return await orm.run(work.value, rid)

    @app.get("/thread/{kind}/{rid}")
    @native
    def thread(kind: str, rid: str) -> str:
        world.start_thread(kind, rid)
        return work.value(rid)

    @app.get("/background/{kind}/{rid}")
    @native
    def background(kind: str, rid: str, tasks: BackgroundTasks) -> str:
        @native
        def in_thread() -> None:
            world.wait(rid)
            world.attempt(rid)

        async def in_loop() -> None:
            await many.orphan(kind, rid)

        tasks.add_task(in_thread if kind == "sync" else in_loop)
        return work.value(rid)

    # Streams and websockets

    @app.get("/stream/{kind}/{rid}")
    @native
    def stream(kind: str, rid: str, greeted: Greeted) -> Any:
        return StreamingResponse((many if work.is_async else world).stream(kind, rid))

    @app.get("/astream/{kind}/{rid}")
    async def astream(kind: str, rid: str, greeted: Greeted) -> Any:
        return StreamingResponse(many.stream(kind, rid))

    @app.get("/events/{rid}")
    async def events(rid: str) -> Any:
        return StreamingResponse(many.events(rid), media_type="text/event-stream")

    @router.websocket("/ws/{kind}/{rid}")
    async def converse(socket: WebSocket, kind: str, rid: str, db: Connection) -> None:
        await socket.accept()
        await many.converse(kind, rid, messages(socket), socket.send_text)

    app.include_router(router)
    app.mount("/sub", make_sub(world))
    if not work.is_async:
        app.mount("/wsgi", WSGIMiddleware(make_flask(world)))
    return app


def make_sub(world: World) -> FastAPI:
    """Make an application of its own with its own Peewee on the same database, mounted in the other."""
    app = FastAPI(default_response_class=text)
    orm = Peewee(world.work.db, **world.options)
    world.orms.append(orm)
    orm.init_app(app)
    native = world.native(orm)

    @app.get("/ok/{rid}")
    @native
    def ok(rid: str) -> str:
        return f"{world.work.value(rid)} {world.work.watch.in_use}"

    @app.get("/unhandled/{rid}")
    @native
    def unhandled(rid: str) -> str:
        world.work.value(rid)
        raise RuntimeError("asked for")

    return app
