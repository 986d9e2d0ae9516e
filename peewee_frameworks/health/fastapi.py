"""The health endpoints as a router of FastAPI, whose dependencies can guard them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, params
from starlette.requests import Request  # noqa: TC002 - FastAPI reads the endpoints' annotations
from starlette.responses import Response  # noqa: TC002 - as above

from . import NAMES, Answer, Health, check_guard, wants_guard
from .starlette import as_response, make_endpoint, make_health, mark, refusal_of, respond

if TYPE_CHECKING:
    from peewee_frameworks.extension import Extension

    from .starlette import Endpoint, Guard

_NOT_VERBOSE = (
    b'{"detail": "With Depends(...) as the guard, ?verbose tells nobody anything: ask /status, which tells the same."}'
)


def make_router(
    orm: Extension, guard: Guard | params.Depends | None, timeout: float | None, options: dict[str, Any]
) -> APIRouter:
    """Make the router."""
    if not isinstance(guard, params.Depends):
        check_guard(guard, ", or a dependency: Depends(...)")
    health = make_health(orm, timeout)
    router = APIRouter(**options)
    for name in NAMES:
        depends = isinstance(guard, params.Depends)
        endpoint = _guarded(health, name, guard) if depends else make_endpoint(health, name, guard)  # type: ignore[arg-type]
        router.add_api_route(
            f"/{name}", endpoint, methods=["GET", "HEAD"], include_in_schema=False, response_model=None
        )
    return router


def _guarded(health: Health, name: str, guard: params.Depends) -> Endpoint:
    """Make the endpoint of that name, with a dependency where there is more than one word to see."""

    async def endpoint(request: Request) -> Response:
        if wants_guard(
            name, request.query_params
        ):  # "verbose": dependencies are resolved for all requests, or for none
            return as_response(Answer(403, _NOT_VERBOSE))
        return await respond(health, name, request)

    async def guarded_endpoint(request: Request, allowed: Any = guard) -> Response:
        refusal = refusal_of(health, allowed is None or allowed)  # a dependency that lets in need not say so
        return refusal or await respond(health, name, request)

    return mark(guarded_endpoint if wants_guard(name, ()) else endpoint)
