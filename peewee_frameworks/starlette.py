"""Peewee in Starlette: pure ASGI middleware and a lifespan.

::

    orm = Peewee(db)
    app = Starlette(routes=[...], lifespan=orm.lifespan(), middleware=[orm.middleware()])

or, for an application that exists already, ``orm.init_app(app)``, which installs both.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
from typing import TYPE_CHECKING, Any

from anyio import from_thread
from anyio.to_thread import current_default_thread_limiter
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse

from . import waiting
from .asgi import SCOPE_KEY, CommitFailed, LifespanMiddleware, RequestMiddleware, ScopeMiddleware, send_after_rollback
from .errors import ConfigurationError
from .extension import Extension
from .http import HANDLED, answer_to
from .runtime import HEALTH
from .waiting import Lender

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from starlette.responses import Response
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

    from .health.starlette import Guard
    from .runtime import Runtime
    from .scope import Scope as Work


class Peewee(Extension):
    """One Peewee connection per request of a Starlette application, given back exactly once.

    Of the options, predicates are functions of the `Request`, and `exclude` matches the path or the route's name.
    """

    # -- installing ---------------------------------------------------------------------------------------------------

    def init_app(self, app: Starlette) -> None:
        """Install everything: scope, options and error responses, and the lifespan in front of the application's own.

        Raises: `ConfigurationError` if this was done before, if the application has started, if no database is known.
        """
        self._check_kind(app, Starlette)
        if self in _installed(app):
            raise ConfigurationError(
                f"init_app() was called twice on {_title(app)}. Call it once for each application."
            )
        if app.middleware_stack is not None:
            raise ConfigurationError(
                f"{_title(app)} has started already. Call init_app() where the application is made."
            )
        self._configure()
        _installed(app).append(self)
        build = app.build_middleware_stack

        def build_middleware_stack() -> ASGIApp:
            # Now, not above: handlers that the application has registered since go first.
            self._handle_errors(app)
            return self._around(build(), self._serve_all)

        app.build_middleware_stack = build_middleware_stack  # type: ignore[method-assign]

    def middleware(self) -> Middleware:
        """Return the middleware, for ``Starlette(middleware=[orm.middleware()])``; put it first.

        Handlers for 500 run outside all of Starlette's middleware, so without `lifespan` or `init_app` they query outside
        the request's scope.
        """
        return Middleware(self._serve)

    def lifespan(self, mine: Callable[[Any], Any] | None = None) -> Lifespan[Any]:
        """Return a lifespan that starts the databases, runs yours, and closes the databases after it.

        Your code before and after ``yield`` runs in a scope each, so what it queries holds no connection meanwhile.

        Args:
            mine: an async context manager function of the application, as Starlette takes it.
        """
        if isinstance(mine, Starlette):
            raise ConfigurationError("lifespan was given the application. Call it: `lifespan=orm.lifespan()`.")
        wrong = inspect.isgeneratorfunction(mine) or inspect.iscoroutinefunction(mine)
        if mine is not None and (wrong or not callable(mine)):
            raise ConfigurationError(
                f"lifespan({getattr(mine, '__qualname__', repr(mine))}): give an async function of the application that "
                "yields once."
            )
        own = contextlib.asynccontextmanager(mine) if inspect.isasyncgenfunction(mine) else mine

        @contextlib.asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[Any]:
            self._configure()
            self._install_late(app)
            await self.runtime.start_async()
            try:
                async with _Phases(own(app) if own is not None else contextlib.nullcontext(), self.runtime) as state:
                    yield state
            finally:
                await self.runtime.stop_async()

        return lifespan

    def app(self, *, guard: Guard | None = None, probe_timeout: float | None = None) -> ASGIApp:
        """Return the health endpoints, for ``Mount("/db", orm.app(guard=...))``.

        ``/live`` and ``/ready`` are for everybody, and each says one word. ``/`` (the status page), ``/status``, ``/events``,
        ``/metrics`` and ``/ready?verbose`` are for those whom `guard` lets in. None of them takes a connection from a pool.

        Args:
            guard: a function of the `Request` that says who may see more, ``async`` or not; it may raise `HTTPException`. None:
                nobody.
            probe_timeout: seconds within which a database must answer for ``/ready``; 0.5 by default.

        Raises: `ConfigurationError` for a timeout that is not above 0, or a guard that cannot be called with the request.
        """
        from .health import starlette as health  # noqa: PLC0415 - for those who mount it

        return health.make_app(self, guard, probe_timeout)

    def _configure(self) -> None:
        if not self.runtime.configured:
            self.runtime.configure()

    def _serve(self, app: ASGIApp, other: ASGIApp | None = None) -> RequestMiddleware:
        self._configure()
        if other is None and isinstance(app, RequestMiddleware) and app.runtime is self.runtime:
            return app  # `middleware()` stands first already: one is enough
        _watch_answers(app)
        return RequestMiddleware(app, self.runtime, Request, self._names, other)

    def _serve_all(self, app: ASGIApp) -> RequestMiddleware:
        return self._serve(app, LifespanMiddleware(app, self.runtime))

    def _names(self, scope: Scope) -> list[str]:
        names = _names(scope) if self.runtime.options.exclude else [scope["path"]]
        if self.runtime.has_health:
            from .health import starlette as health  # noqa: PLC0415 - it is mounted

            if health.is_for_it(scope, _routes):
                names.append(HEALTH)
        return names

    def _around(self, stack: ASGIApp, serve: Callable[[ASGIApp], RequestMiddleware]) -> ASGIApp:
        """Put our layer into a middleware stack, inside of what answers errors that nobody handles.

        Inside, because a COMMIT that fails must reach the application's handler for 500. If it has one, it runs in the scope
        too: both are one layer then, or, where that cannot be, the scope is opened around it.
        """
        layer: Any = stack
        while layer is not None and not isinstance(layer, ServerErrorMiddleware):
            layer = getattr(layer, "app", None)
        if layer is None:
            return serve(stack)
        inner = serve(layer.app)
        if type(layer) is ServerErrorMiddleware and layer is stack:
            return _Outermost(layer, inner)
        layer.app = inner
        return stack if layer.handler is None else ScopeMiddleware(stack, self.runtime)

    def _install_late(self, app: Any) -> None:
        """Do at start what `init_app` would have done; by then the stack is built."""
        stack = getattr(app, "middleware_stack", None)
        if stack is not None and self not in _installed(app):
            _installed(app).append(self)
            self._handle_errors(app, stack)
            app.middleware_stack = self._around(stack, self._serve)

    # -- errors ---------------------------------------------------------------------------------------------------------

    def _handle_errors(self, app: Starlette, stack: Any = None) -> None:
        """Have errors answered by what is innermost of the stack, so that the application's middleware sees the answers.

        Args:
            app: the application.
            stack: its middleware, if that is built already.
        """
        if not self.runtime.options.errors:
            return
        while stack is not None and not isinstance(stack, ExceptionMiddleware):
            stack = getattr(stack, "app", None)
        for error in HANDLED:
            ancestors = (cls for cls in error.__mro__ if cls.__module__ != "builtins")
            if not any(cls in app.exception_handlers for cls in ancestors):
                app.exception_handlers[error] = _respond
                if stack is not None:
                    stack.add_exception_handler(error, _respond)


class _Outermost(RequestMiddleware, ServerErrorMiddleware):
    """Our layer and Starlette's outermost one around it, in one, as long as nobody puts another between them.

    Starlette's wraps each request's `send` to learn whether the response has started, which ours knows. And each layer is a
    tenth of what a request pays that queries nothing.
    """

    def __init__(self, errors: ServerErrorMiddleware, inner: RequestMiddleware) -> None:
        """Take the place of both."""
        super().__init__(inner.app, inner.runtime, inner.request_class, inner.names, inner.other)
        self.handler, self.debug = errors.handler, errors.debug
        self._inner: ASGIApp = inner
        self._apart: ASGIApp | None = None
        inner.stand_in = self

    @property
    def app(self) -> ASGIApp:
        """What is right inside of Starlette's layer: ours, which instrumentation and other instances wrap, or take along."""
        return self._inner

    @app.setter
    def app(self, app: ASGIApp) -> None:
        self._inner = app
        errors = ServerErrorMiddleware(app, self.handler, self.debug)
        self._apart = errors if self.handler is None else ScopeMiddleware(errors, self.runtime)  # it may query
        self._plain = None

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._apart is not None:
            await self._apart(scope, receive, send)
            return
        if scope["type"] == "http":
            try:
                _ = self.runtime.states
            except ConfigurationError as error:
                await self._answer_unhandled(error, scope, receive, send)
                raise
        await super()._serve(scope, receive, send)

    async def _answers(self, error: BaseException, work: Work, scope: Scope, receive: Receive, send: Send) -> bool:
        try:
            if await super()._answers(error, work, scope, receive, send):
                return True
        except Exception as failed:  # a COMMIT's
            await self._answer_after_rollback(failed, work, scope, receive, send)
            raise
        if isinstance(error, Exception):
            await self._answer_after_rollback(error, work, scope, receive, send)
        return False

    async def _answer_after_rollback(
        self, error: Exception, work: Work, scope: Scope, receive: Receive, send: Send
    ) -> None:
        sending = functools.partial(send_after_rollback, work, self.runtime, send)
        await self._answer_unhandled(error, scope, receive, sending, started=work.started)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            await self._answer_unhandled(error, scope, receive, send, started=started)
            raise

    async def _answer_unhandled(
        self, error: Exception, scope: Scope, receive: Receive, send: Send, *, started: bool = False
    ) -> None:
        """Do what Starlette does with an error that nobody has handled, but raise it."""
        if scope["type"] != "http" or isinstance(error, CommitFailed):  # the latter is for an application around
            return
        answering = ServerErrorMiddleware(_failing(error, started), self.handler, self.debug)
        try:
            await answering(scope, receive, _drop if started else send)
        except Exception as raised:
            if raised is not error:
                raise


class _Answering:
    """Right inside of a `BaseHTTPMiddleware`, which runs the application in a task of its own: tells when that answers.

    By the time in which the middleware has passed the beginning of the response on, the body is being made beside it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work: Work | None = scope.get(SCOPE_KEY)
        if work is None or scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                work.note_answer()
            await send(message)

        await self.app(scope, receive, send_and_note)


def _watch_answers(app: Any) -> None:
    """Put `_Answering` into the innermost `BaseHTTPMiddleware` of a stack, if there is one."""
    innermost = None
    while app is not None:
        if isinstance(app, BaseHTTPMiddleware):
            innermost = app
        app = getattr(app, "app", None)
    if innermost is not None and not isinstance(innermost.app, _Answering):
        innermost.app = _Answering(innermost.app)


def _failing(error: Exception, started: bool) -> ASGIApp:
    """Return an application that ends as the real one has."""

    async def app(_: Scope, __: Receive, send: Send) -> None:
        if started:
            await send({"type": "http.response.start"})
        raise error

    return app


async def _drop(message: Message) -> None:
    """Send nothing: the response has started."""


# Those for which an application may have a handler; FastAPI puts its own before.
HTTP_EXCEPTIONS: list[type[HTTPException]] = [HTTPException]


async def _respond(request: HTTPConnection, error: Exception) -> Response:
    """Answer as the application answers an `HTTPException` of that status."""
    problem = answer_to(error) if isinstance(request, Request) else None
    if problem is None:
        raise error
    handlers = request.app.exception_handlers
    cls = next((cls for cls in HTTP_EXCEPTIONS if cls in handlers), HTTPException)
    exception = cls(problem.status, problem.detail, problem.headers)
    handler = handlers.get(problem.status) or handlers.get(cls)
    if handler is None:
        return PlainTextResponse(problem.detail, problem.status, problem.headers)
    if inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None)):  # noqa: B004
        answer = await handler(request, exception)
    else:
        answer = await run_in_threadpool(handler, request, exception)
    response: Response = answer
    return response


_mine = threading.local()


def _find_lender() -> Lender | None:
    """Return what lends places among the threads in which Starlette runs sync code, if this is one of them."""
    if not hasattr(_mine, "lender"):
        try:
            # Asked on the loop, once for each thread: AnyIO keeps its threads, and each belongs to one loop.
            _mine.lender = from_thread.run_sync(_make_lender)
        except RuntimeError:  # not one of AnyIO's threads
            _mine.lender = None
    lender: Lender | None = _mine.lender
    return lender


def _make_lender() -> Lender:
    return Lender(asyncio.get_running_loop(), current_default_thread_limiter())


waiting.finders.append(_find_lender)


class _Phases:
    """An application's lifespan whose start and end run in a scope each, and what is between them in none."""

    def __init__(self, context: Any, runtime: Runtime) -> None:
        self._context = context
        self._runtime = runtime

    async def __aenter__(self) -> Any:
        with self._phase("start"):
            return await self._context.__aenter__()

    async def __aexit__(self, *exc_info: object) -> Any:
        with self._phase("end"):
            return await self._context.__aexit__(*exc_info)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        scope = self._runtime.begin(f"the application's {name}")
        try:
            yield
        finally:
            self._runtime.end(scope)


def _installed(app: Starlette) -> list[Peewee]:
    """Return the instances that are installed in an application."""
    if not hasattr(app.state, "peewee_instances"):
        app.state.peewee_instances = []
    installed: list[Peewee] = app.state.peewee_instances
    return installed


def _title(app: Starlette) -> str:
    title = getattr(app, "title", None)
    return f"the {type(app).__name__} application" + (f" {title!r}" if title else "")


def _names(scope: Scope) -> list[str]:
    """Return what `exclude` patterns are matched against: the path, and the name of the route that will serve it."""
    path = scope["path"]
    route_path = path.removeprefix(scope.get("root_path", "")) or "/"
    names = [path, route_path]
    for route in _routes(getattr(scope.get("app"), "routes", ())):
        regex, methods = getattr(route, "path_regex", None), getattr(route, "methods", None)
        if regex is not None and regex.match(route_path) and (not methods or scope["method"] in methods):
            names.append(str(getattr(route, "name", "")))
            break
    return names


def _routes(routes: Iterable[BaseRoute]) -> Iterator[Any]:
    for route in routes:
        included = getattr(route, "effective_route_contexts", None)
        if included is None:
            yield route
        else:  # FastAPI includes routers lazily
            yield from (inner.starlette_route or inner for inner in included())
