"""The health endpoints as a router of FastAPI, whose dependencies can guard them."""

from __future__ import annotations

import inspect
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from fastapi import APIRouter, Depends, Security, params
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response  # noqa: TC002 - as above

from peewee_frameworks.errors import ConfigurationError

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
    if (
        guard in (Depends, Security)
        or not _may_be_request(parameters[0].annotation)
        or any(_is_injected(parameter) for parameter in parameters)
    ):
        name = getattr(guard, "__qualname__", None) or repr(guard)
        raise ConfigurationError(
            f"guard={name} is a dependency, and a function of the request is called with that alone: write "
            f"guard=Depends({name})."
        )


def _signature(function: Any) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, AttributeError, SyntaxError, TypeError):  # annotated with what only type checkers import
        return inspect.signature(function)


def _may_be_request(annotation: Any) -> bool:
    """Return whether what is annotated so may be given the request; where nobody knows, it may."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _may_be_request(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return any(_may_be_request(each) for each in get_args(annotation))
    if annotation in (inspect.Parameter.empty, Any) or not isinstance(annotation, type):
        return origin is None
    try:
        return issubclass(Request, annotation) or issubclass(annotation, HTTPConnection)
    except TypeError:  # a protocol
        return True


def _is_injected(parameter: inspect.Parameter) -> bool:
    """Return whether FastAPI would give this parameter its value."""
    annotation = parameter.annotation
    if isinstance(annotation, str):  # that could not be evaluated
        return "Depends(" in annotation or "Security(" in annotation
    parts = (parameter.default, *getattr(annotation, "__metadata__", ()))
    return any(isinstance(part, (params.Depends, params.Param, params.Body)) for part in parts)


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
