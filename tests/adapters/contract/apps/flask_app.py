"""The contract's application in Flask."""

from __future__ import annotations

import asyncio
from typing import Any

import click
from flask import Flask, Response, copy_current_request_context, request, stream_with_context
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from peewee_frameworks.flask import Peewee

from .asynchronous import Asynchronous
from .work import Handled, Spoiled, Vetoed, World, rid_of


def make_app() -> Flask:
    world = World()
    app = Flask("contract")
    work = world.work

    # Another extension, first in line: its teardowns run after ours, its before-hook before.

    @app.before_request
    def early() -> Any:
        return before("early")

    @app.teardown_request
    def first_teardown(error: BaseException | None) -> None:
        if request.headers.get("X-After") == "teardown-first":
            raise Spoiled

    orm = Peewee(work.db, **world.options)
    world.orms.append(orm)
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/sub": make_sub(world)})  # type: ignore[method-assign]
    orm.init_app(app)
    if world.other is not None:
        other = Peewee(world.other.db, **world.options)
        world.orms.append(other)
        other.init_app(app)
    many = Asynchronous(world, orm)

    @app.before_request
    def late() -> Any:
        return before("late")

    def before(when: str) -> Any:
        what, _, moment = request.headers.get("X-Before", "").partition("-")
        if moment == when:
            rid = work.value(rid_of(request.path))
            if what == "raise":
                raise Vetoed
            return rid, 202
        return None

    @app.after_request
    def after(response: Response) -> Response:
        if request.headers.get("X-After", "").startswith("response"):
            work.value(rid_of(request.path))
            raise Spoiled
        return response

    @app.teardown_request
    def last_teardown(error: BaseException | None) -> None:
        if request.headers.get("X-After") == "teardown-last":
            raise Spoiled

    # Errors

    @app.errorhandler(Handled)
    def handled(error: Handled) -> Any:
        return f"handled {work.value(rid_of(request.path))}", 418

    @app.errorhandler(500)
    def unhandled(error: Any) -> Any:
        return f"unhandled {work.value(rid_of(request.path))}", 500

    @app.errorhandler(404)
    def not_found(error: Any) -> Any:
        return f"not found {work.value(rid_of(request.path))}", 404

    @app.errorhandler(405)
    def not_allowed(error: Any) -> Any:
        return f"not allowed {work.value(rid_of(request.path))}", 405

    # Plain requests

    @app.get("/plain/<rid>")
    def plain(rid: str) -> str:
        return rid

    @app.get("/ok/<rid>")
    def ok(rid: str) -> str:
        return work.value(rid)

    @app.get("/async/<rid>")
    async def in_async(rid: str) -> str:
        await asyncio.sleep(0)
        return work.value(rid)

    @app.get("/write/<rid>")
    def write(rid: str) -> str:
        return work.write(rid)

    @app.post("/length/<rid>")
    def length(rid: str) -> str:
        return f"{len(request.get_data())} {work.value(rid)}"

    @app.get("/big/<rid>")
    def big(rid: str) -> str:
        return work.value(rid) + "x" * 8_000_000

    @app.get("/slow/<rid>")
    def slow(rid: str) -> str:
        work.value(rid)
        world.gates.wait(rid)
        return work.value(rid)

    @app.get("/sleep/<rid>")
    def sleep(rid: str) -> str:
        return work.sleep(rid, 0.3)

    @app.get("/sleep-tx/<rid>")
    def sleep_tx(rid: str) -> str:
        return work.sleep_in_transaction(rid, 0.3)

    @app.get("/handled/<rid>")
    def raise_handled(rid: str) -> str:
        work.value(rid)
        raise Handled

    @app.get("/unhandled/<rid>")
    def raise_unhandled(rid: str) -> str:
        work.value(rid)
        raise RuntimeError("asked for")

    @app.get("/missing/<rid>")
    def missing(rid: str) -> str:
        return str(work.missing(rid))

    @app.get("/duplicate/<rid>")
    def duplicate(rid: str) -> str:
        return str(work.duplicate(rid))

    @app.get("/both/<rid>")
    def both(rid: str) -> str:
        assert world.other is not None
        return f"{work.value(rid)} {world.other.value(rid)}"

    # Atomic requests

    @app.get("/atomic/<kind>/<rid>")
    def atomic(kind: str, rid: str) -> Any:
        if kind == "spoil":
            return work.spoil_commit(rid)
        if kind == "nested":
            return work.nested(rid)
        work.write(rid)
        if kind == "handled":
            raise Handled
        if kind == "unhandled":
            raise RuntimeError("asked for")
        return rid, {"commit": 200, "status": 409, "chosen": 299}[kind]

    # Children, deadlines, and what outlives the request

    @app.get("/gather/<kind>/<rid>")
    async def gather(kind: str, rid: str) -> Any:
        return await many.gather(kind, rid)

    @app.get("/handler-deadline/<kind>/<rid>")
    async def deadline(kind: str, rid: str) -> Any:
        kind, _, transaction = kind.partition("-")
        try:
            return await many.under_deadline(kind, rid, transaction=bool(transaction))
        except TimeoutError:
            return rid, 504

    @app.get("/thread/<kind>/<rid>")
    def thread(kind: str, rid: str) -> str:
        value = work.value(rid)
        if kind == "copied":

            @copy_current_request_context
            def copied() -> None:
                world.gates.wait(rid)
                world.attempt(rid)

            import threading

            threading.Thread(target=copied, daemon=True).start()
        else:
            world.start_thread(kind, rid)
        return value

    # Streams

    @app.get("/stream/<kind>/<rid>")
    def stream(kind: str, rid: str) -> Response:
        parts = world.stream(kind, rid)
        return Response(stream_with_context(parts) if request.args.get("context") else parts)

    @app.get("/events/<rid>")
    def events(rid: str) -> Response:
        return Response((f"data: {line}\n" for line in world.stream("plain", rid)), mimetype="text/event-stream")

    # Outside requests

    @app.cli.command("value")
    @click.argument("rid")
    def value(rid: str) -> None:
        click.echo(work.value(rid))

    return app


def make_sub(world: World) -> Flask:
    """Make an application of its own with its own Peewee on the same database, mounted in the other."""
    app = Flask("contract-sub")
    orm = Peewee(world.work.db, **world.options)
    world.orms.append(orm)
    orm.init_app(app)

    @app.get("/ok/<rid>")
    def ok(rid: str) -> str:
        return f"{world.work.value(rid)} {len(world.work.db._in_use)}"

    @app.get("/unhandled/<rid>")
    def unhandled(rid: str) -> str:
        world.work.value(rid)
        raise RuntimeError("asked for")

    return app
