"""Pure WSGI: a scope per request, for Flask and any other WSGI framework.

The scope outlives the call: a response body is iterated after the application has returned, and ends when the server calls
the iterable's ``close`` (PEP 3333), which every server must do, whatever happened. It is the current one only while the
application's code runs; between two parts of a body the thread is the server's.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

from .http import problem_for
from .runtime import Runtime
from .scope import current_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .scope import Scope

    WSGIApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

# Where nested adapters find the scope around them. Never the context variable: servers leak contexts between requests.
SCOPE_KEY = "peewee_frameworks.scope"


def work_key(runtime: Runtime) -> str:
    """Return where the scope that serves this runtime's databases is kept: another `Peewee` may sit in between."""
    return f"{SCOPE_KEY}.{id(runtime)}"


class ScopeMiddleware:
    """Open a scope for each request, commit before the first byte, release early, answer errors by option."""

    def __init__(self, app: WSGIApp, runtime: Runtime, *, prepare: bool = True) -> None:
        """Wrap `app`.

        Args:
            app: the application.
            runtime: the databases and options.
            prepare: connect eagerly, begin atomic requests and answer errors here; False where the framework's adapter does
                it, when the route is known and with the framework's own error handlers.
        """
        self.app = app
        self.runtime = runtime
        self.prepare = prepare
        self.key = work_key(runtime)
        # Scopes whose body nobody closed, from its finaliser, which must not do I/O; the next request ends them.
        self._abandoned: collections.deque[Scope] = collections.deque()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Run the application in a scope of its own; inside another's, only if that lacks one of our databases."""
        while self._abandoned:
            self.runtime.end(self._abandoned.popleft())
        outer: Scope | None = environ.get(SCOPE_KEY)
        if outer is not None and outer.ended:  # a dispatcher tries one application after the other
            outer = None
        if outer is not None and all(state in outer.frames for state in self.runtime.states):
            return self._join(self.runtime.opener(outer), environ, start_response)
        around = current_scope()
        if around is not None:  # a test's fixture, say: its idle connection may be the pool's only one
            around.release_early()
        work = self.runtime.begin(f"request {environ.get('REQUEST_METHOD', '')} {_path(environ)}", outer)
        environ[SCOPE_KEY] = environ[self.key] = work
        response = _Response(self.runtime, work, start_response)
        try:
            body = self._call(response, environ)
        except BaseException:
            self.runtime.end(work)
            raise
        if _is_complete(body, environ):
            self.runtime.end(work)
            return body
        response.serve(body, self._abandoned)
        return response

    def _join(self, work: Scope, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Run the application in the scope of an adapter around it, by its own options."""
        taken = self.key in environ  # by the same middleware further out
        environ[self.key] = work
        if taken:
            return self.app(environ, start_response)
        return self._call(_Response(self.runtime, work, start_response), environ)

    def _call(self, response: _Response, environ: dict[str, Any]) -> Iterable[bytes]:
        if not self.prepare:
            return self.app(environ, response.start)
        try:
            if self.runtime.has_policy:
                eager, atomic = self.runtime.policy(environ, (_path(environ),))
                if atomic:
                    response.work.set_atomic()
                if eager:
                    response.work.connect()
            return self.app(environ, response.start)
        except Exception as error:
            problem = None if response.started or not self.runtime.options.errors else problem_for(error)
            if problem is None:
                raise
            headers = {**problem.headers, "Content-Type": "application/json", "Content-Length": str(len(problem.body))}
            response.start(f"{problem.status} {problem.reason}", list(headers.items()))
            return [problem.body]


class _Response:
    """What one request answers: its start, before which the transaction ends, and its body, each part made in the scope."""

    def __init__(self, runtime: Runtime, work: Scope, start_response: Callable[..., Any]) -> None:
        self.work = work
        self.started = False
        self._runtime = runtime
        self._start_response = start_response
        self._body: Iterable[bytes] = ()
        self._parts: Iterator[bytes] = iter(())
        self._abandoned: collections.deque[Scope] | None = None

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """Be the application's ``start_response``.

        Raises: what a COMMIT raised; nothing has been sent then.
        """
        if not self.work.untouched:
            self._runtime.complete(self.work, int(status[:3]))
        self.started = True
        return self._start_response(status, headers, *([exc_info] if exc_info else ()))

    def serve(self, body: Iterable[bytes], abandoned: collections.deque[Scope]) -> None:
        """Take the application's body; from now on the request ends with `close`."""
        self._body, self._parts, self._abandoned = body, iter(body), abandoned
        self._pause()

    def _pause(self) -> None:
        """Leave the scope: the server may take long to send a part."""
        work = self.work
        if self.started and not work.untouched:
            self._runtime.release_early(work)
        work.exit()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        work = self.work
        work.enter()
        try:
            return next(self._parts)
        finally:
            if work.untouched:
                work.exit()
            else:
                self._pause()

    def close(self) -> None:
        """Close the application's body in the scope, then end the scope, whatever that raised."""
        self._abandoned = None
        if self.work.ended:
            return
        self.work.enter()
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._runtime.end(self.work)

    def __del__(self) -> None:
        # Servers close the body; test clients often do not.
        if self._abandoned is not None:
            if self.work.connected:
                self._abandoned.append(self.work)
            else:
                self._runtime.end(self.work)


class PeeweeMiddleware:
    """Give each request of any WSGI application its own Peewee connection.

    ::

        application = PeeweeMiddleware(application, db)
    """

    def __init__(self, app: WSGIApp, database: Any = None, **options: Any) -> None:
        """Wrap an application.

        Args:
            app: the WSGI application.
            database: a Peewee database, a proxy, a URL, a mapping of aliases to those; None reads the environment.
            options: see `peewee_frameworks.config.Options`. Nothing checks the databases or creates tables here, since WSGI
                knows no start: call ``runtime.start()`` in each worker process for that.

        Raises: `ConfigurationError` for options that cannot work.
        """
        self.runtime = Runtime(database, **options)
        if not self.runtime.configured:
            self.runtime.configure()
        self.app = ScopeMiddleware(app, self.runtime)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Serve a request."""
        return self.app(environ, start_response)


def _path(environ: dict[str, Any]) -> str:
    return str(environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", ""))


def _is_complete(body: Iterable[bytes], environ: dict[str, Any]) -> bool:
    """Return whether no code of the application runs any more.

    Such a body is handed on as it is: servers look at a list's length and send a file by the kernel.
    """
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(body, (list, tuple)) or (isinstance(wrapper, type) and isinstance(body, wrapper))
