"""Pure ASGI: a scope per request or websocket, for Starlette, FastAPI and any other ASGI framework.

Pure, because `BaseHTTPMiddleware` runs the application in another task, ends before streaming bodies and background tasks,
and does not see websockets. `PeeweeMiddleware` is what users of another framework wrap their application in; the parts are
for adapters that place them in different layers.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from typing import TYPE_CHECKING, Any

from .frame import reset_frames, set_frames
from .http import Problem, answer_to
from .queries import times_of
from .runtime import Runtime
from .scope import Scope, complete, printable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, MutableMapping
    from typing import Unpack

    from .config import Databases, OptionKeywords

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    ASGIApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

logger = logging.getLogger("peewee_frameworks.app")

# Where nested adapters find the scope around them. Never the context variable: servers leak contexts between requests.
# One key and no more: each may be the one with which the server's dictionary has to grow.
SCOPE_KEY = "peewee_frameworks.scope"
_SCOPED = ("http", "websocket")


class _Work(Scope):
    """The scope of one ASGI request or websocket."""

    asgi: MutableMapping[str, Any]
    owner: Runtime
    out: Send

    __init__ = object.__init__  # each attribute is set: see `RequestMiddleware.__call__`

    def send(self, message: Message) -> Awaitable[None]:
        """Send a part of the response to `out`; what has been queried is committed before the first."""
        if self.touched:
            return _send(self, self.owner, message, self.out)
        # Most requests that query nothing come this way: there is nothing to commit, and nothing to give back yet.
        if message["type"] == "http.response.start":
            self.started = True
            self.idles = self.owner.releases_early  # what a stream or a task takes later must not linger
        out = self.out  # read first: called as `self.out(message)`, it is looked for in the class each time
        return out(message)

    @property
    def label(self) -> str:  # type: ignore[override]
        """What messages call it."""
        kind = f"request {self.asgi['method']}" if self.asgi["type"] == "http" else "websocket"
        return f"{kind} {printable(self.asgi['path'])}"


class ScopeMiddleware:
    """Open a scope for each request and websocket, around handlers that run outside of `RequestMiddleware`."""

    def __init__(self, app: ASGIApp, runtime: Runtime) -> None:
        """Wrap `app`, with the databases and options of `runtime`, which is configured."""
        self.app = app
        self.runtime = runtime

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Run the application in a scope of its own."""
        runtime = self.runtime
        outer: Scope | None = scope.get(SCOPE_KEY)
        if scope["type"] not in _SCOPED or (outer is not None and outer.has_all(runtime.states)):
            await self.app(scope, receive, send)
            return
        work = _open(scope, runtime, outer)
        if runtime.options.server_timing:
            send = _with_times(work, send)

        try:
            await self.app(scope, receive, functools.partial(send_after_rollback, work, runtime, send))
        finally:
            # Nothing here awaits, so a cancelled request gives its connection back too.
            runtime.end(work)
            scope[SCOPE_KEY] = outer


def _open(scope: MutableMapping[str, Any], runtime: Runtime, outer: Scope | None) -> _Work:
    """Open a scope inside of `outer`, for the databases that this does not have, and make it current."""
    work: _Work = _Work()
    work.asgi, work.owner, work.parent, work.frames = scope, runtime, outer, {}
    work.states, work.served = runtime.states_beside(outer), ()
    work.touched = work.started = work.idles = work.ended = False
    scope[SCOPE_KEY] = work
    runtime.enter(work)
    return work


async def send_after_rollback(work: Scope, runtime: Runtime, send: Send, message: Message) -> None:
    """Send a part of the response to an error that has left the application, if one has.

    Until its first byte a handler has queried in the transaction that failed. What follows, a background task, does not.
    """
    if work.failed is not None and message["type"] == "http.response.start":
        await complete(work, work.failed, runtime)
        runtime.release_early(work)
    await send(message)


async def _send(work: Scope, runtime: Runtime, message: Message, out: Send) -> None:
    """Send a part of the response of a request that has used a database."""
    if message["type"] == "http.response.start":
        try:
            await runtime.complete_async(work, message["status"])
        except Exception as error:
            raise CommitFailed(runtime) from error
        work.started = True
        try:
            await out(message)
        except CommitFailed:  # of an application around, which shares the scope: nothing has been sent
            work.started = False
            raise
        return
    await out(message)
    if message["type"] == "http.response.body":
        runtime.release_early(work)  # a stream that idles holds nothing, nor a background task yet to come


def _with_times(work: Scope, send: Send) -> Send:
    """Return a `send` that adds a ``Server-Timing`` header."""

    async def send_with_times(message: Message) -> None:
        if message["type"] == "http.response.start" and (times := times_of(work)) is not None:
            message = {**message, "headers": [*message.get("headers", ()), (b"server-timing", times.encode())]}
        await send(message)

    return send_with_times


class CommitFailed(Exception):
    """Carries the error of a COMMIT through the application's own handlers, which believe the response has started."""

    def __init__(self, runtime: Runtime) -> None:
        """Note whose COMMIT it was; that one's middleware answers."""
        super().__init__()
        self.runtime = runtime


class RequestMiddleware:
    """Serve each request and websocket in a scope: connect eagerly, commit before the first byte, release early.

    And answer errors. It opens the scope itself unless there is one; inside another adapter's, only for databases that this
    does not have.
    """

    stand_in: RequestMiddleware | None = None
    """What does this one's work in its place, and so has to know its application."""

    def __init__(
        self,
        app: ASGIApp,
        runtime: Runtime,
        request_class: Callable[[Any], Any] | None = None,
        names: Callable[[Any], Collection[str]] | None = None,
        other: ASGIApp | None = None,
    ) -> None:
        """Wrap `app`.

        Args:
            app: the application.
            runtime: the databases and options; configured.
            request_class: makes of an ASGI scope the request that predicates are given; the scope itself by default.
            names: makes of an ASGI scope what `exclude` patterns are matched against; the path by default.
            other: takes what is neither a request nor a websocket: a lifespan; `app` by default.
        """
        self._set_app(app)
        self.other = other or app
        self.runtime = runtime
        self.request_class = request_class
        self.names = names
        self._served = (runtime,)
        self._tells_times = runtime.options.server_timing
        # The kind of what may be plain; None if nothing may.
        self._plain = None if self._tells_times else "http"

    @property
    def app(self) -> ASGIApp:
        """The application."""
        return self._app

    @app.setter
    def app(self, app: ASGIApp) -> None:
        self._set_app(app)
        if self.stand_in is not None:
            self.stand_in._set_app(app)

    def _set_app(self, app: ASGIApp) -> None:
        self._app = app
        # To call an instance costs CPython more than to call its method.
        method = getattr(app, "__call__", None)  # noqa: B004 - of a class of somebody else it may be anything
        self._call: ASGIApp = method if inspect.ismethod(method) else app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Run the application with the options that hold for this request."""
        runtime = self.runtime
        if (states := runtime.plain) is None or scope["type"] != self._plain or scope.get(SCOPE_KEY) is not None:
            await self._serve(scope, receive, send)
            return
        # What `_serve` does, without the calls of `_open` and `Runtime.end`: most requests query nothing, and pay for each.
        scope[SCOPE_KEY] = work = _Work()
        work.asgi = scope
        work.states = states
        work.owner = runtime
        work.served = self._served
        work.frames = {}
        work.touched = work.started = work.idles = work.ended = False
        work.out = send
        call = self._call  # read first, as in `_Work.send`
        token = set_frames(work)
        try:
            await call(scope, receive, work.send)
        except (Exception, asyncio.CancelledError) as error:
            if not await self._answers(error, work, scope, receive, send):
                raise
        finally:
            # Nothing here awaits, so a cancelled request gives its connection back too.
            scope[SCOPE_KEY] = None
            work.ended = True  # before the look: a thread may be touching it only now
            if work.touched or runtime.drained is not None:
                runtime.end(work)
            try:  # noqa: SIM105 - costs more
                reset_frames(token)
            except ValueError:  # closed by the garbage collector in another context: there is nothing to reset
                pass

    async def _serve(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Do so for anything: a websocket, a request inside another adapter's scope, one whose options have to be found."""
        if scope["type"] not in _SCOPED:
            await self.other(scope, receive, send)
            return
        runtime = self.runtime
        outer: Scope | None = scope.get(SCOPE_KEY)
        found = runtime.find(outer) if outer is not None and outer.has_all(runtime.states) else None
        if found is not None:
            await self._serve_in(found, scope, receive, send)
            return
        work = _open(scope, runtime, outer)
        try:
            await self._serve_in(work, scope, receive, send)
        finally:
            runtime.end(work)  # as above, this awaits nothing
            scope[SCOPE_KEY] = outer

    async def _serve_in(self, work: Scope, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if self.runtime in work.served:  # further out
            await self._pass_on(scope, receive, send)
            return
        work.served += self._served
        if self._tells_times:
            send = _with_times(work, send)
        try:
            if scope["type"] == "websocket":
                await self._websocket(work, scope, receive, send)
            else:
                if self.runtime.has_policy:
                    await self._prepare(work, scope)
                await self._app(scope, receive, functools.partial(_send, work, self.runtime, out=send))
        except (Exception, asyncio.CancelledError) as error:
            if not await self._answers(error, work, scope, receive, send):
                raise

    async def _pass_on(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def _answers(
        self, error: BaseException, work: Scope, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> bool:
        """Answer what the application has raised, if the options say so and it has an answer; return whether that was so.

        Raises: the error of a COMMIT in place of what has carried it.
        """
        del scope, receive
        if work.owner is self.runtime:
            work.failed = error
        if not isinstance(error, CommitFailed):
            await self.runtime.roll_back_async(work, error)
            return not work.started and await self._has_answered(error, send)
        if error.runtime is not self.runtime:  # it is on its way to the application around
            return False
        cause = error.__cause__ or error
        if not await self._has_answered(cause, send):
            raise cause from None
        return True

    async def _has_answered(self, error: BaseException, send: Send) -> bool:
        problem = answer_to(error) if self.runtime.options.errors else None
        if problem is not None:
            await answer(problem, send)
        return problem is not None

    async def _websocket(self, work: Scope, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Between two messages a websocket holds no connection."""
        work.started = True  # and its errors have no response

        async def receive_in_scope() -> Message:
            self.runtime.release_early(work)
            return await receive()

        async def send_in_scope(message: Message) -> None:
            await send(message)
            self.runtime.release_early(work)

        await self._app(scope, receive_in_scope, send_in_scope)

    async def _prepare(self, work: Scope, scope: MutableMapping[str, Any]) -> None:
        request = scope if self.request_class is None else self.request_class(scope)
        # To find the route is work that only some need.
        known = self.names is None or not (self.runtime.options.exclude or self.runtime.has_health)
        names = (scope["path"],) if known else self.names(scope)  # type: ignore[misc]
        eager, atomic = self.runtime.policy(request, names)
        if atomic:
            await self.runtime.set_atomic(work)
        if eager:
            await self.runtime.connect(work)


async def answer(problem: Problem, send: Send) -> None:
    """Send an error response."""
    headers = [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
    body = problem.body
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class LifespanMiddleware:
    """Start the databases before the application starts, close them after it has stopped.

    What the application does at its start and at its end runs in a scope each, so that a query there holds no connection
    for the application's life.
    """

    def __init__(self, app: ASGIApp, runtime: Runtime) -> None:
        self.app = app
        self.runtime = runtime

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle the lifespan; an application that does not support one is spared it."""
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        await receive()  # lifespan.startup
        try:
            await self.runtime.start_async()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise
        await _Lifespan(self.runtime, receive, send).run(self.app, scope)


class _Lifespan:
    """One run of an application's lifespan, the databases being started."""

    def __init__(self, runtime: Runtime, receive: Receive, send: Send) -> None:
        self._runtime = runtime
        self._receive = receive
        self._send = send
        self._phase: Scope | None = None
        self._told_startup = self._answered = self._stopped = False

    async def run(self, app: ASGIApp, scope: MutableMapping[str, Any]) -> None:
        try:
            try:
                await app(scope, self.receive, self.send)
            except Exception:
                if self._answered:
                    raise
                if self._told_startup:  # else it knows no lifespan
                    logger.warning(
                        "The application failed at its start and did not say so; it is served all the same.",
                        exc_info=True,
                        extra={"request": "the application's start"},
                    )
            if not self._answered:
                self._leave_phase()
                await self._send({"type": "lifespan.startup.complete"})
                await self._receive()  # lifespan.shutdown
                await self._stop()
                await self._send({"type": "lifespan.shutdown.complete"})
        finally:
            await self._stop()

    async def receive(self) -> Message:
        message: Message = await self._receive() if self._told_startup else {"type": "lifespan.startup"}
        self._phase = self._runtime.begin("the application's " + ("end" if self._told_startup else "start"))
        self._told_startup = True
        return message

    async def send(self, message: Message) -> None:
        self._answered = True
        self._leave_phase()
        if message["type"] != "lifespan.startup.complete":  # failed, or the shutdown's end
            await self._stop()
        await self._send(message)

    def _leave_phase(self) -> None:
        phase, self._phase = self._phase, None
        if phase is not None:
            self._runtime.end(phase)

    async def _stop(self) -> None:
        self._leave_phase()
        if not self._stopped:
            self._stopped = True
            await self._runtime.stop_async()


class PeeweeMiddleware:
    """Give each request of any ASGI application its own Peewee connection.

    ::

        app = PeeweeMiddleware(app, db)

    Put it outermost, so that error handlers run inside the scope too.
    """

    def __init__(self, app: ASGIApp, database: Databases | None = None, **options: Unpack[OptionKeywords]) -> None:
        """Wrap an application.

        Args:
            app: the ASGI application.
            database: a Peewee database, a proxy, a URL, a mapping of aliases to those; None reads the environment.
            options: see `peewee_frameworks.config.Options`.

        Raises: `ConfigurationError` for options that cannot work.
        """
        self.runtime = Runtime(database, **options)
        if not self.runtime.configured:
            self.runtime.configure()
        self.app = RequestMiddleware(app, self.runtime, other=LifespanMiddleware(app, self.runtime))

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve a request, a websocket, or the lifespan."""
        await self.app(scope, receive, send)
