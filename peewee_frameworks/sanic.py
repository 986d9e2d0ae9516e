"""Peewee in Sanic: an extension, or a blueprint.

::

    orm = Peewee(db)
    app = Sanic("shop")
    orm.init_app(app)  # or: app.blueprint(orm.blueprint("db", url_prefix="/db"))

`init_app` puts a mixin before the class of the application, which handles each request inside a scope. Signals would be the
other way; dispatching the two that begin and end a request costs a fifth of a bare request, and they need three more to miss
no stream, websocket, timeout or disconnect. A block around the whole misses none of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import peewee
from sanic import Blueprint, Request, Sanic
from sanic.blueprints import BlueprintGroup
from sanic.exceptions import NotFound, SanicException, ServiceUnavailable
from sanic.handlers import ErrorHandler
from sanic.http import Stage

from .asgi import SCOPE_KEY
from .config import Options, PolicyKeywords
from .errors import ConfigurationError
from .extension import Extension
from .frame import reset_frames, running_loop, set_frames
from .http import answer_to
from .queries import times_of
from .runtime import HEALTH
from .scope import Scope, current_scope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
    from typing import Unpack

    from sanic.response import BaseHTTPResponse
    from sanic_routing import Route

    from .config import Databases, OptionKeywords
    from .health.sanic import Guard
    from .runtime import Runtime


# Before anybody else's handlers of these events; what sanic-ext injects is made after it (it has -1000).
_FIRST = 1_000_000

_TIMES = "Server-Timing"

_POLICY = ", ".join(PolicyKeywords.__annotations__)


class Peewee(Extension):
    """One Peewee connection per request of a Sanic application, given back exactly once.

    Of the options, predicates are functions of the `Request`, `exclude` matches the path, the endpoint (``"blog.show"``) or the
    blueprint, and `connect` is eager by default for atomic requests: all handlers share one thread. ``PEEWEE_…`` keys of
    ``app.config`` come from the environment as ``SANIC_PEEWEE_…``.
    """

    def __init__(self, database: Databases | None = None, **options: Unpack[OptionKeywords]) -> None:
        """See `Extension`."""
        super().__init__(database, **options)
        self._policies: list[tuple[Blueprint | BlueprintGroup, dict[str, Any]]] = []
        # By the name of the route, which begins with that of its application.
        self._of_route: dict[str, tuple[list[str], Options]] = {}

    async def connection(self, request: Request) -> peewee.Database:
        """Give the default database; what sanic-ext injects where a handler asks for a `peewee.Database`.

        It takes no connection: that is taken at the first query, and given back with the response.

        Raises: `ConfigurationError` if `init_app` was forgotten.
        """
        if self not in _installed(request.app):
            raise ConfigurationError(f"{request.app!r}: orm.connection needs `orm.init_app(app)`.")
        database: peewee.Database = self.database
        return database

    # -- installing ---------------------------------------------------------------------------------------------------

    def init_app(self, app: Sanic[Any, Any]) -> None:
        """Install everything: scope, options, error responses, and the start and end of the databases in each worker.

        Raises: `ConfigurationError` if this was done before, if the application has started, if no database is known, for a
            wrong ``PEEWEE_…`` key, or if these keys differ from those of another application that this instance serves.
        """
        self._check_kind(app, Sanic)
        installed = _installed(app)
        if self in installed:
            if installed.by_blueprint.pop(self, False):  # which has endpoints, and is of use beside this
                return
            raise ConfigurationError(
                f"{app!r}: this Peewee is installed already, by init_app() or its blueprint. Do it once for each application. "
                "For the health endpoints beside it, give the blueprint health=True or guard=."
            )
        if app.state.is_started:
            raise ConfigurationError(f"{app!r} has started already. Call init_app() where the application is made.")
        self._read_config(app, app.config)
        if not installed:
            app.__class__ = _scoped_class(type(app), installed)
            app.signal("websocket.handler.before", priority=_FIRST)(_watch_websocket)
        installed.add(self)
        # In each worker, never in a main_process hook: connections do not survive a fork.
        app.register_listener(self._start, "before_server_start", priority=_FIRST)
        app.register_listener(self._stop, "after_server_stop", priority=_FIRST)
        if self._decides_by_route():
            _watch_routing(app)

    def blueprint(
        self,
        name: str = "peewee",
        *,
        health: bool | None = None,
        guard: Guard | None = None,
        probe_timeout: float | None = None,
        **options: Any,
    ) -> Blueprint:
        """Return a blueprint that installs everything in each application it is registered on.

        Routes may be added to it; the scope is not theirs alone, it serves the whole application. With ``health=True`` or a
        `guard` it has the health endpoints, and may be registered where `init_app` was called already. ``/live`` and ``/ready``
        are for everybody, and each says one word. ``/`` (the status page), ``/status``, ``/events``, ``/metrics`` and
        ``/ready?verbose`` are for those whom `guard` lets in. None of them takes a connection from a pool.

        Args:
            name: of the blueprint.
            health: whether to add the health endpoints; by default if there is a `guard`.
            guard: a function of the `Request` that says who may see more, ``async`` or not; it may raise. None: nobody.
            probe_timeout: seconds within which a database must answer for ``/ready``; 0.5 by default.
            options: as Sanic's `Blueprint` takes them: ``url_prefix``, ``host``, ``version``…

        Raises: `ConfigurationError` for a timeout that is not above 0, a guard without the endpoints, or one that cannot be
            called with the request.
        """
        healthy = guard is not None if health is None else health
        if guard is not None and not healthy:
            raise ConfigurationError(
                "blueprint(health=False, guard=...) contradict each other: there is nothing to guard."
            )
        blueprint = _ExtensionBlueprint(self, name, installs_again=not healthy, **options)
        if healthy:
            from .health.sanic import add_routes  # noqa: PLC0415 - for those who mount it

            add_routes(blueprint, self, guard, probe_timeout)
        return blueprint

    def policy(self, blueprint: Blueprint | BlueprintGroup, **options: Unpack[PolicyKeywords]) -> None:
        """Set options that hold for the routes of one blueprint or group, in place of the application's.

        A blueprint's own go before those of its group, later calls before earlier ones. What is not given stays as it is.
        ``connect="lazy", transaction=False`` takes a blueprint out. Call it before the application starts.

        Raises: `ConfigurationError` for options that cannot work.
        """
        if not isinstance(blueprint, (Blueprint, BlueprintGroup)):
            raise ConfigurationError(
                f"policy({blueprint!r}): give a blueprint or a group; init_app has the application's."
            )
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if unknown := given.keys() - PolicyKeywords.__annotations__.keys():
            raise ConfigurationError(f"policy() has no option {', '.join(sorted(unknown))}; it has {_POLICY}.")
        dataclasses.replace(Options(), **given)  # refuse here, not at the first request
        self._policies.append((blueprint, given))
        self.runtime.parts_are_atomic |= given.get("transaction", False) is not False
        self._of_route.clear()
        for app in _applications():
            if self in _installed(app):
                _watch_routing(app)

    def _decides_by_route(self) -> bool:
        options = self.runtime.options
        lazy = all(getattr(database, "autoconnect", False) for database in self.databases.values())
        return bool(self._policies) or options.transaction is not False or options.connect == "eager" or not lazy

    def _options_of(self, app: Sanic[Any, Any], route: Route) -> tuple[list[str], Options]:
        """Return what `exclude` may call a route, and the options that hold for it."""
        known = self._of_route.get(route.name)
        if known is None:
            blueprints = [own for own in app.blueprints.values() if any(each is route for each in own.routes)]
            names = [route.name, route.name.partition(".")[2], route.path, *(own.name for own in blueprints)]
            if self.runtime.has_health:
                from .health.sanic import MARK  # noqa: PLC0415 - it is mounted

                names += [HEALTH] * hasattr(route.handler, MARK)
            given: dict[str, Any] = {}
            # A group's first, so that those of the groups in it replace them, and a blueprint's own these.
            for target, options in sorted(self._policies, key=lambda policy: _height(policy[0]), reverse=True):
                if any(each in blueprints for each in _members(target)):
                    given |= options
            known = self._of_route[route.name] = (names, dataclasses.replace(self.runtime.options, **given))
        return known

    async def _start(self, app: Sanic[Any, Any]) -> None:
        if self.runtime.options.errors:
            _answer_errors(app.error_handler)
        ext = getattr(app, "_ext", None)  # not `app.ext`, which would set sanic-ext up
        if ext is not None and ext._injection_registry is not None and peewee.Database not in ext._injection_registry:
            ext.add_dependency(peewee.Database, self.connection)
        await self.runtime.start_async()

    async def _stop(self, _: Sanic[Any, Any]) -> None:
        await self.runtime.stop_async()


class _ExtensionBlueprint(Blueprint):
    __slots__ = ("_installs_again", "_orm")

    def __init__(self, orm: Peewee, name: str, *, installs_again: bool, **options: Any) -> None:
        super().__init__(name, **options)
        self._orm = orm
        self._installs_again = installs_again  # which is an error, and without endpoints there is no other purpose

    def register(self, app: Sanic[Any, Any], options: dict[str, Any]) -> None:
        super().register(app, options)  # type: ignore[no-untyped-call]
        installed = _installed(app)
        if self._installs_again or self._orm not in installed:
            self._orm.init_app(app)
            installed.by_blueprint[self._orm] = not self._installs_again


# -- requests -----------------------------------------------------------------------------------------------------------


class _Scoped:
    """Mixed into the class of an application that has a `Peewee`."""

    __slots__ = ()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # An ASGI server's: there may be a scope around.
        _installed(self).alone = None  # type: ignore[arg-type]
        await super().__call__(scope, receive, send)  # type: ignore[misc]

    async def handle_exception(self, request: Request, exception: BaseException, run_middleware: bool = True) -> None:
        # Sanic answers a malformed head, a timeout and a disconnect from outside `handle_request`.
        around = _part(request)
        part = _begin(request) if around is None else None
        if isinstance(around, _Part) and _is_unhandled(self, request, exception):
            for each in around.parts:
                each.failed = exception
        try:
            await super().handle_exception(request, exception, run_middleware)  # type: ignore[misc]
        finally:
            _end(part)


def _is_unhandled(app: Any, request: Request, exception: BaseException) -> bool:
    """Return whether it will be answered with Sanic's own 500, and not as somebody meant it to be."""
    if isinstance(exception, SanicException) or type(app.error_handler).default is not ErrorHandler.default:
        return False
    name = request.name if request.route is not None else None
    return app.error_handler.lookup(exception, name) is None


def _handle_request(base: Any, installed: _Installed) -> Any:
    """Return the method for a subclass of `base`, which it knows: `super()` has to find it each time."""

    async def handle_request(self: Any, request: Request) -> None:
        runtime = installed.alone
        if runtime is None or (states := runtime.plain) is None:
            innermost: _Part | None = _begin(request)
            try:
                await base.handle_request(self, request)
            finally:
                _end(innermost)
            return
        # The same without the calls, that of `Scope()` among them: most requests query nothing, and pay for each. For one that
        # does, `_Part.touch` does the rest.
        part = _Part()
        part.request = request
        part.states = states
        part.owner = runtime
        part.frames = {}
        part.touched = part.started = part.idles = part.ended = False
        token = set_frames(part)
        try:
            await base.handle_request(self, request)
        finally:
            part.ended = True  # before the look: a thread may be touching it only now
            if part.touched or runtime.drained is not None:
                runtime.end(part)
            try:  # noqa: SIM105 - costs more
                reset_frames(token)
            except ValueError:  # closed by the garbage collector in another context, where there is nothing to reset
                pass

    return handle_request


def _scoped_class(cls: Any, installed: _Installed) -> Any:
    same = {"__slots__": (), "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    same["handle_request"] = _handle_request(cls, installed)
    # `app.run` sends this method, bound to the class, to the workers that it spawns: bound to one that they can import.
    same["get_app"] = cls.get_app
    return type(cls)(cls.__name__, (_Scoped, cls), same)


class _Part(Scope):
    """What one `Peewee` does for a request: its scope, and the options that hold for it.

    An application may have several; the next one further out is the `parent`. The innermost stands where the response's first
    byte must pass, and acts for all of them.
    """

    request: Request
    owner: Runtime
    served = ()  # nobody asks
    options: Options | None = None
    """Those of the route's blueprint; None until it is known: the application's."""
    _send: Any = None  # what the stream would call without us

    __init__ = object.__init__  # each attribute is set: see `_handle_request`

    @property
    def label(self) -> str:  # type: ignore[override]
        """What messages call it."""
        return f"request {self.request.method} {self.request.path}"

    @property
    def parts(self) -> Iterator[_Part]:
        """All of the request, from the innermost, which this is, outwards."""
        part: Scope | None = self
        while isinstance(part, _Part):
            yield part
            part = part.parent

    def touch(self) -> None:
        """Stand where the response's first byte must pass: from now on there may be something to give back before it."""
        super().touch()
        loop = getattr(getattr(self.request.stream, "protocol", None), "loop", None)
        if loop in (None, running_loop()):
            self.stand_in()
        else:  # not from here, amid what the loop does; it comes before what the thread tells the loop at its end
            with contextlib.suppress(RuntimeError):  # the loop has stopped
                loop.call_soon_threadsafe(self.stand_in)

    def stand_in(self) -> None:
        """Take the place of what sends the response, or what is left of it."""
        stream: Any = self.request.stream
        if self.ended or stream is None or self._send is not None:
            return
        begun = stream.stage is not Stage.HANDLER
        if begun:  # no release here: a thread may be between two queries
            self.idles = (self.options or self.owner.options).release == "response_start"
        try:  # HTTP/1.1, whose `send` is what `response_func` is at the time
            send = stream.response_func
        except AttributeError:
            self._send, stream.send = stream.send, self.any
            return
        # None if the response is over: all of it has been sent, or its client has left.
        if send is not None and not (begun and stream.head_only):
            self._send, stream.response_func = send, (self._rest if begun else self.first)

    async def prepare(self, route: Route) -> None:
        """Connect eagerly and begin transactions, now that the route is known. Websockets have no transaction."""
        request = self.request
        for part in reversed([*self.parts]):
            names, part.options = _orm_of(part)._options_of(request.app, route)
            if not route.extra.websocket:
                runtime = part.owner
                eager, atomic = runtime.policy(request, (request.path, *names), part.options)
                if atomic:
                    await runtime.set_atomic(part)
                # It holds its connection while its COMMIT is awaited, so the next one, on the same thread, must await too.
                if eager or (atomic and part.options.connect is None):
                    await runtime.connect(part)

    def release_idle(self) -> None:
        """Give back what is idle."""
        for part in self.parts:
            part.owner.release_early(part, part.options)

    async def _complete(self) -> None:
        status = self.request.stream.response.status  # type: ignore[union-attr]
        for part in self.parts:
            if not part.ended:  # else Sanic has cancelled the request and says so to the client
                await part.owner.complete_async(part, status, part.options)

    def first(self, data: bytes, end_stream: bool) -> Awaitable[None]:
        """Send the head of an HTTP/1.1 response, and of most all the rest."""
        if self.frames or self.atomic or not end_stream or self.parent is not None:
            return self._first_of_more(data, end_stream)
        sent: Awaitable[None] = self._send(data, end_stream)
        return sent

    async def _first_of_more(self, data: bytes, end_stream: bool) -> None:
        await self._complete()  # if a COMMIT fails, nothing has been sent and Sanic's exception handlers answer
        await self._send(data, end_stream)
        stream: Any = self.request.stream
        if not end_stream and stream.response_func is not None and not stream.head_only:
            self._send, stream.response_func = stream.response_func, self._rest

    async def _rest(self, data: bytes, end_stream: bool) -> None:
        # Before, not after: a slow client makes the sending wait.
        self.release_idle()
        await self._send(data, end_stream)

    async def any(self, data: bytes, end_stream: bool) -> None:
        """Send any part of an ASGI or HTTP/3 response."""
        if self.request.stream.stage is Stage.HANDLER:  # type: ignore[union-attr]
            await self._complete()
        else:
            self.release_idle()
        await self._send(data, end_stream)


def _begin(request: Request) -> _Part | None:
    """Open the scopes, and stand where the response's first byte must pass.

    Returns: the innermost; None if a scope around serves all databases, and no options are to hold for some of them.
    """
    app: Any = request.app
    outer: Scope | None = request.transport.scope.get(SCOPE_KEY) if app.asgi else None
    part: _Part | None = None
    try:
        for orm in app.ctx.peewee:
            runtime = orm.runtime
            if outer is None or runtime.has_policy or orm._policies or not outer.has_all(runtime.states):
                inner = _Part()
                inner.request, inner.owner = request, runtime
                inner.touched, inner.started, inner.idles, inner.ended = True, False, False, False
                inner.states, inner.parent, inner.frames = runtime.states_beside(outer), outer, {}
                runtime.enter(inner)
                outer = part = inner
    except BaseException:
        _end(part)
        raise
    if part is not None:
        part.stand_in()
        if app.ctx.peewee.tells_times and part._send is not None:
            part._send = functools.partial(_send_with_times, part, part._send)
    return part


def _end(part: Scope | None) -> None:
    """Close the scopes of a request, from the innermost outwards."""
    while isinstance(part, _Part):
        part.owner.end(part)
        part = part.parent


def _part(request: Request) -> _Part | None:
    """Return the innermost scope of a request that is being handled."""
    scope = current_scope()
    while scope is not None and not (isinstance(scope, _Part) and scope.request is request):
        scope = scope.parent
    return scope


def _send_with_times(part: _Part, send: Any, data: bytes, end_stream: bool) -> Awaitable[None]:
    """Send the head of a response that tells how long the request has queried."""
    stream: Any = part.request.stream
    response = stream.response
    times = times_of(part) if response is not None else None
    if times is not None:
        # A response object may be used for several requests: what it said the last time goes.
        others = [told for told in response.headers.getall(_TIMES, ()) if not told.startswith("db;dur=")]
        response.headers.pop(_TIMES, None)
        for told in (*others, times):
            response.headers.add(_TIMES, told)
    sent: Awaitable[None] = send(data, end_stream)
    return sent


def _watch_routing(app: Sanic[Any, Any]) -> None:
    """Let routes decide. Only where some do: dispatching a signal costs more than all else here."""
    if not getattr(app.ctx, "peewee_watches_routing", False):
        app.ctx.peewee_watches_routing = True
        app.signal("http.routing.after", priority=_FIRST)(_route_found)


async def _route_found(request: Request, route: Route, **_: Any) -> None:
    part = _part(request)
    if part is not None:
        await part.prepare(route)


async def _watch_websocket(request: Request, websocket: Any, **_: Any) -> None:
    """Between two messages a websocket holds no connection."""
    part = _part(request)
    if part is None:
        return
    for name in ("recv", "receive", "recv_burst", "send", "ping", "close"):
        method = getattr(websocket, name, None)
        if method is not None:
            setattr(websocket, name, _releasing(part, method))
    iterate = getattr(websocket, "recv_streaming", None)
    if iterate is not None:
        websocket.recv_streaming = _releasing_iterator(part, iterate)


def _releasing(part: _Part, method: Any) -> Any:
    @functools.wraps(method)
    async def call(*args: Any, **kwargs: Any) -> Any:
        part.release_idle()
        return await method(*args, **kwargs)

    return call


def _releasing_iterator(part: _Part, method: Any) -> Any:
    @functools.wraps(method)
    async def iterate(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        part.release_idle()
        async for data in method(*args, **kwargs):
            yield data
            part.release_idle()

    return iterate


# -- errors ---------------------------------------------------------------------------------------------------------------


_KINDS: dict[int, Any] = {404: NotFound, 503: ServiceUnavailable}


def _answer_errors(handler: ErrorHandler) -> None:
    """Answer what no handler of the application has answered: as it answers Sanic's own exception of that status."""
    default = handler.default
    if getattr(default, "of_peewee", False):
        return

    @functools.wraps(default)
    def answer(request: Request, exception: Exception) -> BaseHTTPResponse:
        problem = answer_to(exception)
        if problem is None:
            return default(request, exception)
        # Quiet: Sanic renders a traceback for 0.1 seconds on the event loop.
        kind = _KINDS.get(problem.status, SanicException)
        told = kind(problem.detail, headers=problem.headers, quiet=True)
        told.status_code = problem.status
        response: BaseHTTPResponse = handler.response(request, told)  # type: ignore[no-untyped-call]
        return response

    answer.of_peewee = True  # type: ignore[attr-defined]
    handler.default = answer  # type: ignore[method-assign,assignment]


# -- applications -----------------------------------------------------------------------------------------------------------


class _Installed(list["Peewee"]):
    """The instances that are installed in an application."""

    def __init__(self) -> None:
        super().__init__()
        self.alone: Runtime | None = None
        """The runtime of the only one, if its scope is all that a request needs."""
        self.tells_times = False
        self.by_blueprint: dict[Peewee, bool] = {}
        """Who was installed by a blueprint, and whether that is of use where `init_app` does it."""

    def add(self, orm: Peewee) -> None:
        self.append(orm)
        self.tells_times |= orm.runtime.options.server_timing
        self.alone = None if self.tells_times or len(self) > 1 else orm.runtime


def _installed(app: Sanic[Any, Any]) -> _Installed:
    if not hasattr(app.ctx, "peewee"):
        app.ctx.peewee = _Installed()
    installed: _Installed = app.ctx.peewee
    return installed


def _orm_of(part: _Part) -> Peewee:
    return next(orm for orm in _installed(part.request.app) if orm.runtime is part.owner)


def _applications() -> Iterable[Sanic[Any, Any]]:
    return Sanic._app_registry.values()


def _height(target: Any) -> int:
    """Return how many levels of groups there are in what a policy is for."""
    return 0 if isinstance(target, Blueprint) else 1 + max(map(_height, target.blueprints), default=0)


def _members(target: Any) -> Iterator[Blueprint]:
    """Give a blueprint, or those of a group and of the groups in it."""
    if isinstance(target, Blueprint):
        yield target
    else:
        for each in target.blueprints:
            yield from _members(each)
