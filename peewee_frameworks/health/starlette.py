"""The health endpoints in Starlette and FastAPI."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Match, Route, Router

from . import EVENTS_HEADERS, NAMES, Answer, Health, check_guard, let_go, wants_guard

if TYPE_CHECKING:
    from starlette.types import Scope

    from peewee_frameworks.extension import Extension

Guard = Callable[[Request], Any]
Endpoint = Callable[[Request], Awaitable[Response]]

_MARK = "_peewee_frameworks_health"


def make_app(orm: Extension, guard: Guard | None, timeout: float | None) -> Router:
    """Make the application to mount."""
    check_guard(guard)
    health = make_health(orm, timeout)
    return Router([Route(f"/{name}", make_endpoint(health, name, guard)) for name in NAMES])


def make_health(orm: Extension, timeout: float | None) -> Health:
    """Make what answers, and have the middleware look out for its requests."""
    health = Health(orm, timeout)
    orm.runtime.has_health = True
    return health


def make_endpoint(health: Health, name: str, guard: Guard | None) -> Endpoint:
    """Make the endpoint of that name."""

    async def endpoint(request: Request) -> Response:
        if wants_guard(name, request.query_params):
            if guard is None:
                return as_response(health.refused(guarded=False))
            allowed = guard(request)
            refusal = refusal_of(health, await allowed if inspect.isawaitable(allowed) else allowed)
            if refusal is not None:
                return refusal
        return await respond(health, name, request)

    return mark(endpoint)


def mark(endpoint: Endpoint) -> Endpoint:
    """Have requests for this endpoint take no connection in advance, and no transaction."""
    setattr(endpoint, _MARK, True)
    return endpoint


async def respond(health: Health, name: str, request: Request) -> Response:
    """Answer somebody who may ask."""
    if name == "events":
        if request.method == "HEAD":  # else the stream would go on unheard
            return Response(headers=EVENTS_HEADERS)
        let_go()
        return StreamingResponse(health.events_async(request.headers.get("last-event-id")), headers=EVENTS_HEADERS)
    return as_response(await health.answer_async(name, request.query_params))


def as_response(answer: Answer) -> Response:
    """Return the answer as Starlette's."""
    return Response(answer.body, answer.status, {**answer.headers, "Content-Type": answer.content_type})


def refusal_of(health: Health, allowed: Any) -> Response | None:
    """Return what those get whom the guard does not let in; None for the others."""
    if isinstance(allowed, Response):  # a response is a refusal: 401, to the login
        return allowed
    return None if allowed else as_response(health.refused(guarded=True))


def is_for_it(scope: Scope, flatten: Callable[[Iterable[Any]], Iterator[Any]]) -> bool:
    """Return whether a request will be served by one of these endpoints; routing comes later, so this routes ahead.

    Args:
        scope: the ASGI scope of the request.
        flatten: gives the routes that matter of a list of routes.
    """
    routes: Any = getattr(scope.get("app"), "routes", ())
    while routes:
        found = next(((route, child) for route in flatten(routes) for child in _match(route, scope)), None)
        if found is None:
            return False
        route, child = found
        if hasattr(getattr(route, "endpoint", None), _MARK):
            return True
        routes, scope = getattr(route, "routes", None), {**scope, **child}
    return False


def _match(route: Any, scope: Scope) -> Iterator[Scope]:
    match, child = route.matches(scope)
    if match is Match.FULL:
        yield child
