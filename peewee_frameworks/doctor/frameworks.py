"""Applications: where their code runs, and what of it runs outside a request's scope."""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from peewee_frameworks.extension import Extension

from .case import is_async
from .report import Finding
from .target import lifespan_instances, middleware_instance

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from peewee_frameworks.runtime import Runtime

    from .case import Case
    from .serving import Serving
    from .target import Target

ANYIO_THREADS = 40
"""Threads in which Starlette and FastAPI run sync code: the default of AnyIO's `current_default_thread_limiter`."""

_HARMLESS = ("starlette.", "fastapi.")  # their own middleware queries nothing


class Endpoint(NamedTuple):
    """A function that the application calls for a request, and whether on the event loop's thread."""

    function: Any
    on_loop: bool


def runs_on_anyio(target: Target) -> bool:
    """Return whether sync endpoints run on AnyIO's threads."""
    return target.app is not None and target.framework in ("FastAPI", "Starlette")


def endpoints(target: Target) -> Iterator[Endpoint]:
    """Give the endpoints of an application of an asynchronous framework, FastAPI's dependencies included."""
    if runs_on_anyio(target):
        for function in _of_starlette(target.app.routes):
            yield Endpoint(function, inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function))
    elif target.framework == "Sanic" and target.app is not None:
        for route in target.app.router.routes:
            for function in _methods(getattr(route.handler, "view_class", None) or route.handler):
                yield Endpoint(function, on_loop=True)


def _of_starlette(routes: Iterable[Any]) -> Iterator[Any]:
    for endpoint, dependant in _leaves(routes):
        yield from _methods(endpoint)
        for call in _dependencies(dependant):
            yield from _methods(call)


def _leaves(routes: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Give each endpoint with what FastAPI knows of its dependencies, those in mounts and included routers too."""
    for route in routes:
        included = getattr(route, "effective_route_contexts", None)  # FastAPI includes routers lazily
        for each in included() if included is not None else (route,):
            original = getattr(each, "original_route", None)
            endpoint = getattr(each, "endpoint", None) or getattr(original, "endpoint", None)
            if endpoint is None:
                yield from _leaves(getattr(each, "routes", None) or ())  # a Mount
            else:
                yield endpoint, getattr(each, "dependant", None) or getattr(original, "dependant", None)


def _dependencies(dependant: Any) -> Iterator[Any]:
    for each in getattr(dependant, "dependencies", ()):
        yield each.call
        yield from _dependencies(each)


def has_transactions(target: Target, runtime: Runtime) -> bool:
    """Return whether requests may be transactions: by option, by a Sanic blueprint's policy, by FastAPI's dependency."""
    if runtime.options.transaction is not False or runtime.parts_are_atomic:
        return True
    return any(
        _is_transaction_of(call, runtime)
        for _, dependant in _leaves(getattr(target.app, "routes", ()))
        for call in _dependencies(dependant)
    )


def _is_transaction_of(call: Any, runtime: Runtime) -> bool:
    own = getattr(call, "__self__", None)
    return isinstance(own, Extension) and own.runtime is runtime and call.__name__ == "transaction"


def _methods(endpoint: Any) -> Iterator[Any]:
    """Give the functions of an endpoint: itself, or the methods of a class of views; none of the framework's own."""
    if isinstance(endpoint, functools.partial):
        wrapped = [each for each in endpoint.args if inspect.isfunction(each)]  # Sanic's websocket handler
        found: list[Any] = wrapped or [endpoint.func]
    elif inspect.isclass(endpoint):
        found = [function for _, function in inspect.getmembers(endpoint, inspect.isfunction)]
    else:
        found = [endpoint]
    for function in found:
        module = getattr(function, "__module__", None) or ""
        if not module.startswith((*_HARMLESS, "sanic.", "peewee_frameworks.")):
            yield inspect.unwrap(function)


def findings_of_app(target: Target, serving: Serving) -> Iterator[Finding]:
    """Find what concerns the application as a whole."""
    if not runs_on_anyio(target):
        return
    whole = [*getattr(target.app.state, "peewee_instances", ()), *lifespan_instances(target.app)]
    before: list[str] = []
    for middleware in target.app.user_middleware:
        orm = middleware_instance(middleware)
        if orm is None:
            if not str(getattr(middleware.cls, "__module__", "")).startswith(_HARMLESS):
                before.append(getattr(middleware.cls, "__name__", str(middleware.cls)))
        elif before and orm not in whole:
            leaked = (
                ""
                if serving.reset_contextvars
                else " On uvicorn a pipelined request begins in the context of the one before: "
                "there such a query gets ScopeEnded (--reset-contextvars gives each request a fresh one)."
            )
            yield Finding(
                "middleware-order",
                "warning",
                f"orm.middleware() comes after {', '.join(before)}.",
                f"What those query is outside the request's scope: it has a connection of its own.{leaked}",
                "orm.middleware() first in the list, or orm.init_app(app) or lifespan=orm.lifespan(), which put the "
                "scope around it all",
            )


def findings(case: Case) -> Iterator[Finding]:
    """Find what concerns one database."""
    runtime = case.runtime
    if _keeps_state_in_context(case.database):
        yield Finding(
            "context-recipe",
            "error",
            "The database's connection state is kept in a context variable of the application's own.",
            "All code that runs where nobody has reset the variable shares one connection: threads that got no "
            "context of their own, endpoints without the dependency that resets it, and on uvicorn without "
            "--reset-contextvars a pipelined request, which begins in the context of the one before.",
            "a Peewee(...) of this package, which opens a fresh scope for each request, and no replacement of "
            "db._state",
        )
    if runtime is not None and case.target.framework in ("Flask", "WSGI") and is_async(case.database):
        yield Finding(
            "async-database",
            "error",
            f"The database is asynchronous, and the application is {case.target.framework}.",
            "There is no event loop in a request, so the application refuses it at its first request.",
            "a database of peewee_frameworks.pool",
        )
    if runtime is not None and not case.database.autoconnect:
        excluded = "requests that exclude= names, " if runtime.options.exclude else ""
        yield Finding(
            "autoconnect",
            "warning" if excluded else "note",
            "The database has autoconnect=False.",
            "Each request takes a connection, whether it queries or not, and keeps it to its end, through streams and "
            f"slow clients. And where nothing connects first, queries fail: in {excluded}websockets, commands, and "
            "jobs in a connection_scope.",
            "autoconnect=False removed: a query outside any scope, which it was meant to prevent, is taken back and logged",
        )


def _keeps_state_in_context(database: Any) -> bool:
    state = database._state
    if type(state).__module__.partition(".")[0] in ("peewee", "playhouse", "peewee_frameworks"):
        return False
    kept = [*vars(type(state)).values(), *getattr(state, "__dict__", {}).values()]
    return any(isinstance(value, ContextVar) for value in kept)
