"""The health endpoints as a router of FastAPI, whose dependencies can guard them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, Security, params
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response  # noqa: TC002 - as above

from peewee_frameworks.errors import ConfigurationError

from . import NAMES, Answer, Health, check_guard, wants_guard
from .starlette import as_response, make_endpoint, make_health, mark, refusal_of, respond

if TYPE_CHECKING:
    from peewee_frameworks.extension import Extension

    from .starlette import Endpoint, Guard

_OF_DEPENDENCIES = (params.Depends, params.Param, params.Body)
_NOT_VERBOSE = (
    b'{"detail": "With Depends(...) as the guard, ?verbose tells nobody anything: ask /status, which tells the same."}'
)


def make_router(
    orm: Extension, guard: Guard | params.Depends | None, timeout: float | None, options: dict[str, Any]
) -> APIRouter:
    """Make the router."""
    if not isinstance(guard, params.Depends):
        check_guard(guard, ", or a dependency: Depends(...)")
        _refuse_dependency(guard)
    health = make_health(orm, timeout)
    router = APIRouter(**options)
    for name in NAMES:
        depends = isinstance(guard, params.Depends)
        endpoint = _guarded(health, name, guard) if depends else make_endpoint(health, name, guard)  # type: ignore[arg-type]
        router.add_api_route(
            f"/{name}", endpoint, methods=["GET", "HEAD"], include_in_schema=False, response_model=None
        )
    return router


def _refuse_dependency(guard: Any) -> None:
    """Refuse a dependency that was given without `Depends`: called with the request alone, it would let everybody in.

    Raises: `ConfigurationError`.
    """
    if guard is None:
        return
    try:
        parameters = [*_signature(guard).parameters.values()]
    except (TypeError, ValueError):  # not written in Python: nobody knows
        return
    first = parameters[0].annotation
    given = isinstance(first, type) and first is not inspect.Parameter.empty
    is_request = not given or issubclass(Request, first) or issubclass(first, HTTPConnection)
    parts = [
        part
        for parameter in parameters
        for part in (parameter.default, *getattr(parameter.annotation, "__metadata__", ()))
    ]
    if guard in (Depends, Security) or not is_request or any(isinstance(part, _OF_DEPENDENCIES) for part in parts):
        name = getattr(guard, "__qualname__", None) or repr(guard)
        raise ConfigurationError(
            f"guard={name} is a dependency, and a function of the request is called with that alone: write "
            f"guard=Depends({name})."
        )


def _signature(function: Any) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except NameError:  # annotated with what only type checkers import
        return inspect.signature(function)


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
