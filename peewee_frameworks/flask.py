"""Peewee in Flask: an extension with `init_app`.

::

    orm = Peewee(db)

    def create_app():
        app = Flask(__name__)
        orm.init_app(app)
        return app

The scope belongs to a wrapper of ``app.wsgi_app``, since Flask's own hooks end before a streamed body begins, and may run twice
or not at all. The hooks decide what depends on the route, and send the COMMIT while Flask can still make an error of it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import peewee
from flask import Flask, Response, current_app, g, got_request_exception, request
from flask.signals import appcontext_pushed
from playhouse.pool import MaxConnectionsExceeded

from .errors import ConfigurationError, DatabaseUnavailable, PoolClosed, PoolConnectTimeout
from .http import Problem, problem_for
from .runtime import Runtime
from .scope import connection_scope
from .wsgi import ScopeMiddleware, work_key

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from .config import Databases, Predicate
    from .scope import Scope

EXTENSION = "peewee"

# What always has an answer. Errors of a lost connection share their class with ordinary ones: see `_lost_connection`.
_ANSWERED: tuple[type[Exception], ...] = (
    MaxConnectionsExceeded,
    DatabaseUnavailable,
    PoolClosed,
    PoolConnectTimeout,
    peewee.DoesNotExist,
    peewee.IntegrityError,
)


class Peewee:
    """One Peewee connection per request of a Flask application, given back exactly once.

    One instance may serve several applications; one application may have several instances, one per database or group of
    databases.
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
    ) -> None:
        """Take the databases and options; nothing connects yet. None means what the application's config says, or the default.

        Args:
            database: a Peewee database, a `DatabaseProxy`, a URL, or a mapping of aliases to those. None reads
                ``PEEWEE_DATABASE`` from ``app.config``, then ``PEEWEE_DATABASE`` and ``DATABASE_URL`` from the environment,
                in `init_app`.
            connect: ``"lazy"`` (default) connects at the first query, ``"eager"`` before the view runs.
            transaction: True runs each request in a transaction; a function of the `Request` decides. Committed before the
                first byte of the response.
            rollback_on: response statuses on which such a transaction is rolled back; 400 to 599 by default.
            exclude: requests that are neither connected eagerly nor atomic: patterns for the path, the endpoint
                (``"blog.show"``) or the blueprint, or functions of the `Request`.
            release: ``"response_start"`` (default) or ``"request_end"``.
            errors: answer a database that is busy or down with 503, `DoesNotExist` with 404, `IntegrityError` with 409;
                error handlers of the application go before.
            check: at the first request of a process, ``"fail"`` (default), ``"warn"`` or ``"off"``; see `start`.
            create_tables: models whose tables are created then, if missing.

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
        )
        self._key = work_key(self.runtime)
        self._started = False
        self._starting: threading.Lock | None = None

    # -- databases ----------------------------------------------------------------------------------------------------

    @property
    def database(self) -> Any:
        """The default database; a proxy for it until `init_app` has read the configuration."""
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

    # -- installing ---------------------------------------------------------------------------------------------------

    def init_app(self, app: Flask) -> None:
        """Serve an application. Nothing connects: a server may fork after this.

        Raises: `ConfigurationError` if this instance serves the application already, or the configuration cannot work.
        """
        instances: list[Peewee] = app.extensions.setdefault(EXTENSION, [])
        if self in instances:
            raise ConfigurationError(
                f"init_app was called twice with the same Peewee for the application {app.name!r}."
            )
        self.runtime.configure(app.config)
        instances.append(self)
        app.wsgi_app = ScopeMiddleware(app.wsgi_app, self.runtime, prepare=False)  # type: ignore[method-assign]
        # First in line before the view, so that other hooks may query; last in line after it, so that they are committed too.
        app.before_request_funcs.setdefault(None, []).insert(0, self._before_request)
        app.after_request_funcs.setdefault(None, []).insert(0, self._after_request)
        app.teardown_appcontext(self._teardown_appcontext)
        appcontext_pushed.connect(self._appcontext_pushed, app)
        if self.runtime.options.errors:
            self._answer_errors(app)

    def start(self) -> None:
        """Check the databases and create tables, by option. The first request does it; call it earlier to fail earlier.

        Not at import time where the server forks afterwards (gunicorn ``--preload``): call it in ``post_fork``.

        Raises: `DatabaseUnavailable` with ``check="fail"``.
        """
        if self._starting is None:
            self._starting = self.__dict__.setdefault("_lock", threading.Lock())
        with self._starting:
            if not self._started:
                self.runtime.start()
                self._started = True

    def stop(self) -> None:
        """Wait for requests in flight and close the pools; for a server's exit hook. A process that ends needs no call."""
        if self._started:
            self._started = False
            self.runtime.stop()

    # -- hooks ----------------------------------------------------------------------------------------------------------

    def _before_request(self) -> None:
        if not self._started:
            self.start()
        work: Scope | None = request.environ.get(self._key)
        if work is None:  # a request context without a request: `test_request_context`
            return
        names = [request.path, *request.blueprints]
        if request.endpoint is not None:
            names.append(request.endpoint)
        eager, atomic = self.runtime.policy(request, names)
        if atomic:
            work.set_atomic()
        if eager:
            work.connect()

    def _after_request(self, response: Response) -> Response:
        """Commit while an error is still Flask's to handle: its 500 handlers see a COMMIT that failed."""
        work: Scope | None = request.environ.get(self._key)
        if work is None:
            return response
        try:
            self.runtime.complete(work, response.status_code)
        except Exception as error:
            problem = problem_for(error) if self.runtime.options.errors else None
            if problem is None:
                raise
            got_request_exception.send(current_app._get_current_object(), exception=error)  # type: ignore[attr-defined]
            return _response(problem)
        return response

    def _appcontext_pushed(self, _app: Flask, **_: Any) -> None:
        """Note what was connected before, outside any scope: that is not this context's to close."""
        open_before = {state for state in self.runtime.states if not state.closed}
        g.setdefault("_peewee_frameworks", {})[id(self)] = open_before

    def _teardown_appcontext(self, _error: BaseException | None) -> None:
        """Give back what this context took where no request does it: a CLI command, a shell, a copied context's thread."""
        open_before = g.get("_peewee_frameworks", {}).get(id(self), set())
        for state in self.runtime.states:
            frame = state.frame()
            if not frame.shared and frame.conn is not None and state not in open_before:
                frame.finish()

    # -- errors -----------------------------------------------------------------------------------------------------------

    def _answer_errors(self, app: Flask) -> None:
        handlers = app.error_handler_spec[None][None]
        for error_class in _ANSWERED:
            if error_class not in handlers:
                app.register_error_handler(error_class, _answer)
        for error_class in (peewee.OperationalError, peewee.InterfaceError):
            if error_class not in handlers:
                app.register_error_handler(error_class, _lost_connection)


def _answer(error: Exception) -> Response:
    problem = problem_for(error)
    if problem is None:  # a subclass of the application's that means something else
        raise error
    return _response(problem)


def _lost_connection(error: Exception) -> Any:
    problem = problem_for(error)
    if problem is not None:
        return _response(problem)
    general = current_app.error_handler_spec[None][None].get(Exception)
    if general is not None:
        return current_app.ensure_sync(general)(error)
    raise error


def _response(problem: Problem) -> Response:
    return Response(problem.body, problem.status, problem.headers, content_type="application/json")
