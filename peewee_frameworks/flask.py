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
import os
import sys
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click
from flask import Response, appcontext_pushed, current_app, g, request
from werkzeug.exceptions import default_exceptions

from . import gevent
from .errors import ConfigurationError, DatabaseUnavailable
from .http import HANDLED, problem_for
from .runtime import Runtime
from .scope import Scope, connection_scope, current_scope
from .wsgi import ScopeMiddleware, work_key

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    import peewee
    from flask import Flask

    from .config import Databases, Predicate

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

EXTENSION = "peewee"


class Peewee:
    """One Peewee connection per request of a Flask application, given back exactly once.

    One instance may serve several applications; one application may have several instances, one per database or group of
    databases. ``app.extensions["peewee"]`` lists them.
    """

    def __init__(
        self,
        database: Databases | None = None,
        *,
        connect: str | None = None,
        transaction: bool | Predicate | None = None,
        rollback_on: Collection[int] | Callable[[int], bool] | None = None,
        exclude: Iterable[str | Predicate] | None = None,
        release: str | None = None,
        errors: bool | None = None,
        check: str | None = None,
        create_tables: Iterable[type[peewee.Model]] | None = None,
        run_threads: int | None = None,
        run_timeout: float | None = None,
        close_timeout: float | None = None,
    ) -> None:
        """Take the databases and options; nothing connects yet. None means the default, or what ``app.config`` says.

        Args:
            database: a Peewee database, a `DatabaseProxy`, a URL, or a mapping of aliases to those. None reads
                ``app.config["PEEWEE_DATABASE"]``, or ``PEEWEE_DATABASE`` or ``DATABASE_URL`` from the environment.
            connect: ``"lazy"`` (default) connects at the first query, ``"eager"`` before the first before-request function.
            transaction: True runs each request in a transaction; a function of `flask.request` decides.
            rollback_on: response statuses on which such a transaction is rolled back; 400 to 599 by default.
            exclude: requests that are neither connected eagerly nor atomic nor make the check at start: patterns for the
                path, the endpoint or a blueprint's name, or functions of `flask.request`.
            release: ``"response_start"`` (default) or ``"request_end"``.
            errors: answer a database that is busy or down with 503, `DoesNotExist` with 404, `IntegrityError` with 409,
                unless the application handles these exceptions itself.
            check: at the first request of each process, see `start`: ``"fail"`` (default), ``"warn"`` or ``"off"``.
            create_tables: models whose tables are created then, if missing.
            run_threads: as in the other frameworks; `run` needs none here.
            run_timeout: likewise.
            close_timeout: seconds `stop` waits for requests in flight; 10 by default.

        Raises: `ConfigurationError` for options that cannot work.
        """
        self.runtime = Runtime(
            database,
            connect=connect,
            transaction=transaction,
            rollback_on=rollback_on,
            exclude=exclude,
            release=release,
            errors=errors,
            check=check,
            create_tables=create_tables,
            run_threads=run_threads,
            run_timeout=run_timeout,
            close_timeout=close_timeout,
        )
        self._key = work_key(self.runtime)
        self._atomic_key = f"{self._key}.atomic"
        self._settings: dict[str, Any] | None = None
        self._start = _Start(self.runtime)

    # -- databases ----------------------------------------------------------------------------------------------------

    @property
    def database(self) -> Any:
        """The default database; a proxy for it as long as the configuration has not been read."""
        return self.runtime.database

    @property
    def databases(self) -> dict[str, Any]:
        """Alias → database."""
        return self.runtime.databases

    def __getitem__(self, alias: str) -> Any:
        """Return the database with this alias; `ConfigurationError` if there is none."""
        return self.runtime.get(alias)

    @property
    def Model(self) -> Any:  # noqa: N802 - it is a class
        """The base class for models bound to the default database."""
        return self.database.Model

    def scope(self, label: str | None = None) -> connection_scope:
        """Return a `connection_scope` over all databases, for work outside requests or with connections of its own."""
        return connection_scope(*(self.databases.values() or [self.database]), label=label)

    async def run(self, function: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        """Call sync code that queries from an async view, on the request's own thread, in its scope.

        There a wait for a connection holds up nobody, so it is possible; such calls take turns.

        Raises: what the function raises.
        """
        from asgiref.sync import sync_to_async  # noqa: PLC0415 - installed with flask[async], like all that async views need

        scope = current_scope()
        if scope is not None and all(state in scope.frames for state in self.runtime.states):
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
        installed = app.extensions.setdefault(EXTENSION, [])
        if self in installed:
            raise ConfigurationError(
                f"init_app() was called twice on the Flask application {app.name!r}. Call it once for each application."
            )
        settings = app.config.get_namespace("PEEWEE_")
        if self._settings not in (None, settings):
            raise ConfigurationError(
                f"The Flask application {app.name!r} has other PEEWEE_… settings than one this Peewee serves already. Make a "
                "Peewee for each, or give both the same configuration."
            )
        self.runtime.configure(app.config)
        for database in self.databases.values():
            gevent.check(database)
        self._settings = settings
        installed.append(self)
        app.wsgi_app = ScopeMiddleware(app.wsgi_app, self.runtime, prepare=False)  # type: ignore[method-assign]
        app.before_request_funcs.setdefault(None, []).insert(0, self._prepare)
        if self.runtime.options.transaction is not False:
            # First in the list runs last: what another function raises must find the transaction open.
            app.after_request_funcs.setdefault(None, []).insert(0, self._end_transaction)
        if len(installed) == 1:
            _watch_contexts(app)
            _add_commands(app)
        if self.runtime.options.errors:
            handlers = app.error_handler_spec[None][None]
            for error in HANDLED:
                if error not in handlers:
                    app.register_error_handler(error, _answer)

    # -- requests -------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Before all other before-request functions; what this raises goes to the error handlers."""
        if self._start.done and not self.runtime.has_policy:
            return
        work = self._work()
        if work is None:
            return
        names = (request.path, request.endpoint or "", *request.blueprints)
        if not self._start.done and not self.runtime.options.excludes(request, names):
            self._start()
        eager, atomic = self.runtime.policy(request, names)
        # An application around this one may have begun already; then it will commit.
        if atomic and not work.atomic:
            work.set_atomic()
            request.environ[self._atomic_key] = True
        if eager:
            work.connect()

    def _end_transaction(self, response: Response) -> Response:
        """Commit, after all after-request functions; a COMMIT that fails is an exception like one from the view."""
        work = self._work() if request.environ.pop(self._atomic_key, False) else None
        if work is None:
            return response
        try:
            self.runtime.complete(work, response.status_code)
        except Exception as error:  # noqa: BLE001 - raised again unless the application has a handler for it
            return current_app.make_response(current_app.handle_user_exception(error))
        return response

    def _work(self) -> Scope | None:
        """Return the scope that serves the current request: the WSGI wrapper's, or in its absence the context's own."""
        work: Scope | None = request.environ.get(self._key)
        return _scopes().get(self) if work is None or work.ended else work

    # -- application contexts ---------------------------------------------------------------------------------------------

    def _open_in_context(self, app: Flask) -> None:
        """Open a scope where there is none: not in a request, nor in a context pushed inside another."""
        try:
            states = self.runtime.states
        except ConfigurationError:
            return  # a DatabaseProxy, which the application may be about to initialise in this very context
        around = current_scope()
        if around is not None:
            if around.ended:
                around = None
            elif around.states is states:  # a request: the scope of our own wrapper
                return
        if around is None or any(state not in around.frames for state in states):
            _scopes()[self] = self.runtime.begin(f"the application context of {app.name!r}", around)


def _watch_contexts(app: Flask) -> None:
    """Open scopes when a context is pushed and end them when it is popped, once for all instances: in reverse order."""
    appcontext_pushed.connect(_context_pushed, app)
    # Wrapped and not registered: up to Flask 3.1 a teardown function that raises skips the others.
    tear_down = app.do_teardown_appcontext

    def do_teardown_appcontext(*args: Any, **kwargs: Any) -> None:
        try:
            tear_down(*args, **kwargs)
        finally:
            if "_peewee_scopes" in g:
                scopes: dict[Peewee, Scope] = g.pop("_peewee_scopes")
                for orm in reversed(scopes):
                    orm.runtime.end(scopes[orm])

    app.do_teardown_appcontext = do_teardown_appcontext  # type: ignore[method-assign]


def _context_pushed(app: Flask, **_: Any) -> None:
    for orm in app.extensions[EXTENSION]:
        orm._open_in_context(app)


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


def _scopes() -> dict[Peewee, Scope]:
    """Return the scopes that belong to the current application context."""
    scopes: dict[Peewee, Scope] = g.setdefault("_peewee_scopes", {})
    return scopes


class _Start:
    """`Runtime.start` on demand, once per process: Flask has no lifespan, and what is connected before a fork is shared."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._pid = 0
        self._failures = 0
        self._failure: DatabaseUnavailable | None = None

    @functools.cached_property
    def _lock(self) -> Any:
        # With gunicorn's --preload, gevent patches after this object was made: a lock from before would stop all greenlets.
        return self.__dict__.setdefault("_lock", gevent.make_lock())

    @property
    def done(self) -> bool:
        return self._pid == os.getpid()

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
            self._pid, self._failure = os.getpid(), None

    def undo(self) -> None:
        with self._lock:
            if self.done:
                self._pid = 0
                self._runtime.stop()


def _answer(error: Exception) -> Any:
    """Answer as the application answers an HTTP error of that status: by its handler for it, else with JSON."""
    problem = problem_for(error)
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
