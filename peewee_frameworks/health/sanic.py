"""The health endpoints as routes of a blueprint of Sanic."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sanic import HTTPResponse, Request
from sanic.response import BaseHTTPResponse

from . import EVENTS_HEADERS, NAMES, Answer, Health, check_guard, let_go, wants_guard

if TYPE_CHECKING:
    from sanic import Blueprint, Sanic

    from peewee_frameworks.extension import Extension

Guard = Callable[[Request], Any]

MARK = "_peewee_frameworks_health"


def add_routes(blueprint: Blueprint, orm: Extension, guard: Guard | None, timeout: float | None) -> None:
    """Add the endpoints."""
    check_guard(guard)
    health = Health(orm, timeout)
    orm.runtime.has_health = True
    for name in NAMES:
        handler = _make_handler(health, name, guard)
        methods = ["GET"] if name == "events" else ["GET", "HEAD"]
        blueprint.add_route(
            handler,
            f"/{name}",
            methods=methods,
            name=f"health_{name or 'page'}",
        )

    async def begin(_: Sanic[Any, Any]) -> None:
        health.ended = False

    async def end(_: Sanic[Any, Any]) -> None:
        health.ended = True  # Sanic waits for open responses before it says that it has stopped

    blueprint.listener("before_server_start")(begin)
    blueprint.listener("before_server_stop")(end)


def _make_handler(health: Health, name: str, guard: Guard | None) -> Callable[[Request], Any]:
    async def handler(request: Request) -> BaseHTTPResponse | None:
        query = dict(request.get_query_args(keep_blank_values=True))  # "?verbose" has no value
        if wants_guard(name, query) and (refusal := await _refusal(health, guard, request)) is not None:
            return refusal
        if name != "events":
            return _respond(await health.answer_async(name, query))
        let_go()
        stream: Any = request.stream
        # At its stop Sanic waits for each connection that was in use then, until its client closes it.
        stream.keep_alive = False
        response = await request.respond(headers=EVENTS_HEADERS, content_type=EVENTS_HEADERS["Content-Type"])
        async for event in health.events_async(request.headers.get("last-event-id")):
            await response.send(event)
        await response.eof()
        return None

    setattr(handler, MARK, True)
    return handler


def _respond(answer: Answer) -> HTTPResponse:
    return HTTPResponse(answer.body, answer.status, answer.headers, answer.content_type)


async def _refusal(health: Health, guard: Guard | None, request: Request) -> BaseHTTPResponse | None:
    """Return what those get whom the guard does not let in; None for the others."""
    if guard is None:
        return _respond(health.refused(guarded=False))
    allowed = guard(request)
    if inspect.isawaitable(allowed):
        allowed = await allowed
    if isinstance(allowed, BaseHTTPResponse):  # as in middleware, a response is a refusal: 401, to the login
        return allowed
    return None if allowed else _respond(health.refused(guarded=True))
