"""Peewee in Flask: an extension with `init_app`.

::

    orm = Peewee(db)

    def create_app():
        app = Flask(__name__)
        orm.init_app(app)
        return app

A wrapper around ``app.wsgi_app`` owns the scope of a request, since it alone sees the end of every response. Where there is an
application context but no request (CLI commands, ``flask shell``, a thread that runs with a copied request context), the
scope belongs to the application context.
"""

from __future__ import annotations

import functools
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click
from flask import Flask, Response, current_app, has_app_context, request
from flask.ctx import AppContext
from flask.globals import app_ctx
from werkzeug.exceptions import default_exceptions
from werkzeug.wrappers import Response as WerkzeugResponse
from werkzeug.wsgi import ClosingIterator

from . import gevent
from .errors import ConfigurationError, DatabaseUnavailable
from .extension import Extension
from .forks import watch_forks
from .http import HANDLED, answer_to
from .scope import Scope, current_scope
from .wsgi import SCOPE_KEY, ScopeMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Unpack

    from flask import Blueprint

    from .config import Databases, OptionKeywords
    from .health.flask import Guard
    from .runtime import Runtime

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

EXTENSION = "peewee"

# From Flask 3.2 on a request's context is the application's.
_is_single = hasattr(AppContext, "from_environ")

_PRESERVES = "werkzeug.debug.preserve_context"  # to a test client, which pushes a request's context a second time


class Peewee(Extension):
    """One Peewee connection per request of a Flask application, given back exactly once.

    ``app.extensions["peewee"]`` lists an application's instances. Of the options, predicates are functions of `flask.request`,
    `exclude` matches the path, the endpoint or a blueprint's name, `check` and `create_tables` are for the first request of a
    process (see `start`), and `run` needs no threads.
    """

    def __init__(self, database: Databases | None = None, **options: Unpack[OptionKeywords]) -> None:
        """See `Extension`."""
        super().__init__(database, **options)
        self._atomic_key = f"peewee_frameworks.atomic.{id(self)}"
        self._start = _Start(self.runtime)

    async def run(self, function: Callable[_Args, _Result], /, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        """Call sync code that queries from an async view, on the request's own thread, in its scope.

        There a wait for a connection holds up nobody, so it is possible; such calls take turns.

        Raises: what the function raises.
        """
        from asgiref.sync import sync_to_async  # noqa: PLC0415 - installed with flask[async], like all that async views need

        scope = current_scope()
        if scope is not None and scope.has_all(self.runtime.states):
            return await sync_to_async(function)(*args, **kwargs)
        async with self.scope(f"orm.run({getattr(function, '__qualname__', function)})"):
            return await sync_to_async(function)(*args, **kwargs)

    # -- start and end --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Check that the databases answer and create tables, by option, once in this process.

        The first request does it, unless it is excluded; until it succeeds, each request tries and fails. Call it in a
        worker's own start (gunicorn's ``post_worker_init``) to fail before any request. Not at import: a connection that is
        made before a fork must not be.

        Raises: `DatabaseUnavailable` with ``check="fail"``; `ConfigurationError`.
        """
        self._start()

    def stop(self) -> None:
        """Wait for the requests in flight, `close_timeout` seconds at most, then close the pools; `start` may follow."""
        self._start.undo()

    # -- installing ---------------------------------------------------------------------------------------------------

    def init_app(self, app: Flask) -> None:
        """Read ``app.config`` and install everything; nothing connects.

        Raises: `ConfigurationError` if this was done before, if no database is known, for an option that cannot work, or if
        the ``PEEWEE_…`` keys differ from those of another application that this instance serves; `GeventNotPatched` where
        gevent's patch is missing a part and the process could freeze.
        """
        self._check_kind(app, Flask)
        installed = app.extensions.setdefault(EXTENSION, [])
        if self in installed:
            raise ConfigurationError(
                f"init_app() was called twice on the Flask application {app.name!r}. Call it once for each application."
            )
        if app._got_first_request:
            raise ConfigurationError(
                f"The Flask application {app.name!r} has served a request already. Call init_app() where it is made."
            )
        self._read_config(app, app.config)
        for database in self.databases.values():
            gevent.check(database)
        installed.append(self)
        around = ScopeMiddleware(app.wsgi_app, self.runtime, prepare=False, is_complete=_is_complete)
        app.wsgi_app = around  # type: ignore[method-assign]
        if self.runtime.options.transaction is not False:
            # First in the list runs last: what another function raises must find the transaction open.
            app.after_request_funcs.setdefault(None, []).insert(0, self._end_transaction)
        if len(installed) == 1:
            _watch(app)
            _add_commands(app)
        if self.runtime.options.errors:
            handlers = app.error_handler_spec[None][None]
            for error in HANDLED:
                if error not in handlers:
                    app.register_error_handler(error, _answer)

    def blueprint(
        self,
        name: str = "peewee_health",
        *,
        guard: Guard | None = None,
        probe_timeout: float | None = None,
        **options: Any,
    ) -> Blueprint:
        """Return the health endpoints, for ``app.register_blueprint(orm.blueprint(url_prefix="/db", guard=...))``.

        ``/live`` and ``/ready`` are for everybody, and each says one word. ``/`` (the status page), ``/status``, ``/events``,
        ``/metrics`` and ``/ready?verbose`` are for those whom `guard` lets in. None of them takes a connection from a pool.

        Args:
            name: of the blueprint.
            guard: a function of `flask.request` that says who may see more, ``async`` or not; it may `abort`. None: nobody.
            probe_timeout: seconds within which a database must answer for ``/ready``; 0.5 by default.
            options: as Flask's `Blueprint` takes them: ``url_prefix``, ``subdomain``…

        Raises: `ConfigurationError` for a timeout that is not above 0, or a guard that cannot be called with the request.
        """
        from .health import flask as health  # noqa: PLC0415 - for those who mount it

        return health.make_blueprint(self, name, guard, probe_timeout, options)

    # -- requests -------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Before all other before-request functions; what this raises goes to the error handlers."""
        work = self._work()
        if work is None:
            return
        if self.runtime.has_health and self._is_for_health():
            return
        names = (request.path, request.endpoint or "", *request.blueprints)
        if not self._start.done and not self.runtime.options.excludes(request, names):
            self._start()
        eager, atomic = self.runtime.policy(request, names)
        # An application around this one, with the same Peewee, may have begun already; then it will commit.
        if atomic and not work.is_atomic(self.runtime):
            work.set_atomic(self.runtime.states, self.runtime)
            request.environ[self._atomic_key] = _current_request()
        if eager:
            work.connect(self.runtime.states)

    @staticmethod
    def _is_for_health() -> bool:
        from .health.flask import MARK  # noqa: PLC0415 - it is mounted

        return hasattr(current_app.view_functions.get(request.endpoint or ""), MARK)

    def _end_transaction(self, response: Response) -> Response:
        """Commit, after all after-request functions; a COMMIT that fails is an exception like one from the view."""
        began = request.environ.get(self._atomic_key) is _current_request()  # both share the environ
        work = self._work() if began else None
        if work is None:
            return response
        del request.environ[self._atomic_key]
        is_ours = work.is_atomic(self.runtime)  # and not begun by another instance, which is asked after this one
        try:
            self.runtime.complete(work, response.status_code)
        except Exception as error:  # noqa: BLE001 - raised again unless the application has a handler for it
            return current_app.make_response(current_app.handle_user_exception(error))
        finally:
            if is_ours:
                work.failed = None
        return response

    def _fail(self, exception: BaseException) -> None:
        """Note an exception for which the application has no handler; its page for 500 is yet to be made."""
        began = request.environ.get(self._atomic_key) is _current_request()
        if began and (work := self._work()) is not None:
            work.failed = exception

    def _work(self) -> Scope | None:
        """Return the scope that serves the current request: the WSGI wrapper's, or in its absence the context's own."""
        work = self.runtime.find(request.environ.get(SCOPE_KEY))
        return getattr(app_ctx, "_scopes", {}).get(self) if work is None or work.ended else work

    # -- application contexts ---------------------------------------------------------------------------------------------

    def _open_in_context(self, context: _ScopedContext) -> None:
        """Open a scope where there is none: not in a request, nor in a context pushed inside another."""
        try:
            states = self.runtime.states
        except ConfigurationError:
            return  # a DatabaseProxy, which the application may be about to initialise in this very context
        around = current_scope()
        if around is not None and around.ended:
            around = None
        if around is None or not around.has_all(states):
            scope = self.runtime.begin(f"the application context of {context.app.name!r}", around)
            context._scopes = {**context._scopes, self: scope}


def _is_complete(body: Any) -> bool:
    """Return whether a body is that of a Werkzeug response which has all its parts already and calls nobody at its end.

    Where Werkzeug no longer is as this knows it, the answer is no, which costs some microseconds, and nothing else.
    """
    if type(body) is not ClosingIterator:
        return False
    close = getattr(body, "_callbacks", (None,))[-1]  # Response.get_app_iter puts its own there
    response: Any = getattr(close, "__self__", None)
    if not isinstance(response, WerkzeugResponse):
        return False
    cls: Any = type(response)
    return _is_plain(cls) and type(response.response) in (list, tuple) and getattr(response, "_on_close", None) == []


@functools.cache
def _is_plain(cls: Any) -> bool:
    """Return whether a class of responses makes and closes its bodies as Werkzeug's does."""
    methods = ("__call__", "get_wsgi_response", "get_app_iter", "iter_encoded", "close")
    return all(getattr(cls, name) is getattr(WerkzeugResponse, name) for name in methods)


def _watch(app: Flask) -> None:
    """Stand where contexts are pushed and requests begin, once for all instances.

    Not Flask's signals and before-request functions: Flask asks of each whether it is a coroutine function, at each request.
    """
    installed: list[Peewee] = app.extensions[EXTENSION]
    for name in ("app_context", "request_context") if _is_single else ("app_context",):
        setattr(app, name, _scoping(getattr(app, name), installed))
    preprocess = app.preprocess_request

    def preprocess_request(*context: Any) -> Any:  # from Flask 3.2 on it is given the context
        for orm in reversed(installed):
            if orm.runtime.has_policy or not orm._start.done:
                orm._prepare()
        return preprocess(*context)

    app.preprocess_request = preprocess_request  # type: ignore[method-assign]
    handle = app.handle_exception

    # Not the signal got_request_exception: Flask-RESTful sends it of what it handles, too.
    def handle_exception(*context_and_error: Any) -> Any:
        for orm in installed:
            orm._fail(context_and_error[-1])
        return handle(*context_and_error)

    app.handle_exception = handle_exception  # type: ignore[assignment, method-assign]


def _current_request() -> Any:
    proxy: Any = request
    return proxy._get_current_object()


def _scoping(make: Callable[..., AppContext], installed: list[Peewee]) -> Callable[..., AppContext]:
    def make_scoped(*args: Any) -> AppContext:
        context: Any = make(*args)
        if _is_single or has_app_context() or not _begins_request(installed):
            context.__class__ = _scoped_class(context.__class__)
        return context  # type: ignore[no-any-return]

    return make_scoped


def _begins_request(installed: list[Peewee]) -> bool:
    """Return whether Flask makes a context to push it at once, into a request's scope; others may be pushed anywhere."""
    environ = getattr(current_scope(), "environ", None)
    return environ is not None and _PRESERVES not in environ and _is_in_request(installed)


def _is_in_request(installed: list[Peewee]) -> bool:
    """Return whether the current scope is that of a request, and has all databases of an application's instances."""
    around = current_scope()
    return around is not None and not around.ended and len(installed) == 1 and around.owner is installed[0].runtime


@functools.cache
def _scoped_class(cls: Any) -> Any:
    same = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_ScopedContext, cls), same)


class _ScopedContext:
    """Mixed into an application's context: opens scopes when it is pushed and ends them when it is popped for good."""

    app: Flask
    _scopes: dict[Peewee, Scope] | MappingProxyType[Peewee, Scope] = MappingProxyType({})
    _pushed = 0

    def push(self) -> None:
        super().push()  # type: ignore[misc]
        self._pushed += 1
        installed = self.app.extensions[EXTENSION]
        if not _is_in_request(installed):
            for orm in installed:
                orm._open_in_context(self)

    def pop(self, *args: Any) -> None:
        try:
            super().pop(*args)  # type: ignore[misc]
        finally:
            self._pushed -= 1
            if self._scopes and not self._pushed:
                scopes, self._scopes = dict(self._scopes), {}
                for orm in reversed(scopes):
                    orm.runtime.end(scopes[orm])


def _add_commands(app: Flask) -> None:
    """Add ``flask peewee doctor`` and ``flask peewee check``, unless the application has a ``peewee`` of its own."""
    group = click.Group(EXTENSION, help="Look at the databases of the application.")
    for name, does in (
        ("doctor", "Say what will go wrong, and what to change."),
        ("check", "Connect and ask each server."),
    ):
        arguments = click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)
        run = functools.partial(_run_command, app, name)
        # Options and --help are the command line's own.
        settings = {"ignore_unknown_options": True}
        group.add_command(click.Command(name, settings, run, [arguments], short_help=does, add_help_option=False))
    if EXTENSION not in app.cli.commands:
        app.cli.add_command(group)


def _run_command(app: Flask, name: str, arguments: tuple[str, ...]) -> None:
    from . import cli  # noqa: PLC0415 - no application needs it

    sys.exit(cli.main([name, *arguments], cli.Started(loaded=app, name=f"the Flask application {app.name!r}")))


class _Start:
    """`Runtime.start` on demand, once per process: Flask has no lifespan, and what is connected before a fork is shared."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.done = False
        self._failures = 0
        self._failure: DatabaseUnavailable | None = None
        watch_forks(self)

    @functools.cached_property
    def _lock(self) -> Any:
        # With gunicorn's --preload, gevent patches after this object was made: a lock from before would stop all greenlets.
        return self.__dict__.setdefault("_lock", gevent.make_lock())

    def __call__(self) -> None:
        failures = self._failures
        with self._lock:
            if self.done:
                return
            if self._failure is not None and self._failures != failures:
                raise self._failure  # those who waited share the outcome: each would wait as long again
            try:
                self._runtime.start()
            except DatabaseUnavailable as error:
                self._failures += 1
                self._failure = error
                raise
            self.done, self._failure = True, None

    def undo(self) -> None:
        with self._lock:
            if self.done:
                self.done = False
                self._runtime.stop()

    def after_fork(self) -> None:
        """Begin anew: nothing has been started in this process, and nobody holds the lock."""
        self.done = False
        self.__dict__.pop("_lock", None)


def _answer(error: Exception) -> Any:
    """Answer as the application answers an HTTP error of that status: by its handler for it, else with JSON."""
    problem = answer_to(error)
    if problem is None:
        return _pass_on(error)
    response = current_app.response_class(problem.body, problem.status, problem.headers, mimetype="application/json")
    return current_app.handle_http_exception(default_exceptions[problem.status](problem.detail, response))


def _pass_on(error: Exception) -> Any:
    """Do what Flask would have done without `_answer`: call the application's handler for a more general class."""
    handlers = current_app.error_handler_spec[None][None]
    for cls in type(error).__mro__:
        handler = handlers.get(cls)
        if handler is not None and handler is not _answer:
            return current_app.ensure_sync(handler)(error)
    raise error
