"""Pure WSGI: a scope per request, for Flask and any other WSGI framework.

The scope outlives the call: a response body is iterated after the application has returned, and ends when the server calls
the iterable's ``close`` (PEP 3333), which every server must do, whatever happened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .http import problem_for
from .runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .scope import Scope

    WSGIApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

# Where nested adapters find the scope around them. Never the context variable: servers leak contexts between requests.
SCOPE_KEY = "peewee_frameworks.scope"


class ScopeMiddleware:
    """Open a scope for each request, commit before the first byte, release early, answer errors by option."""

    def __init__(self, app: WSGIApp, runtime: Runtime, *, prepare: bool = True) -> None:
        """Wrap `app`.

        Args:
            app: the application.
            runtime: the databases and options.
            prepare: connect eagerly and begin atomic requests here; False where the framework's adapter does it later,
                when the route is known.
        """
        self.app = app
        self.runtime = runtime
        self.prepare = prepare

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Run the application in a scope of its own."""
        outer: Scope | None = environ.get(SCOPE_KEY)
        if outer is not None and all(state in outer.frames for state in self.runtime.states):
            return self.app(environ, start_response)
        path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        work = self.runtime.begin(f"request {environ.get('REQUEST_METHOD', '')} {path}", outer)
        environ[SCOPE_KEY] = work
        try:
            body = self._call(work, environ, start_response, path)
        except BaseException:
            self.runtime.end(work)
            raise
        return ScopedBody(body, self.runtime, work)

    def _call(
        self, work: Scope, environ: dict[str, Any], start_response: Callable[..., Any], path: str
    ) -> Iterable[bytes]:
        started = False

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            nonlocal started
            self.runtime.complete(work, int(status.split(" ", 1)[0]))
            started = True
            return start_response(status, headers, exc_info) if exc_info else start_response(status, headers)

        try:
            if self.prepare:
                eager, atomic = self.runtime.policy(environ, (path,))
                if atomic:
                    work.set_atomic()
                if eager:
                    work.connect()
            return self.app(environ, start)
        except Exception as error:
            problem = None if started or not self.runtime.options.errors else problem_for(error)
            if problem is None:
                raise
            headers = {**problem.headers, "Content-Type": "application/json", "Content-Length": str(len(problem.body))}
            start_response(f"{problem.status} {problem.reason}", list(headers.items()))
            return [problem.body]


class ScopedBody:
    """A response body that is iterated in the scope of its request, and ends it."""

    def __init__(self, body: Iterable[bytes], runtime: Runtime, work: Scope) -> None:
        self._body = body
        self._runtime = runtime
        self._work = work
        self._iterator: Iterator[bytes] | None = None
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._iterator is None:
            self._iterator = iter(self._body)
        else:
            self._runtime.release_early(self._work)  # while the last part was being sent, nothing needed to be held
        return next(self._iterator)

    def close(self) -> None:
        """Close the application's body, then end the scope, whatever that raised."""
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._end()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._runtime.end(self._work)

    # For servers that never close what they iterate, as Starlette's WSGIMiddleware (1.10): they drop it.
    __del__ = _end


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
            options: see `peewee_frameworks.config.Options`.

        Raises: `ConfigurationError` for options that cannot work.
        """
        self.runtime = Runtime(database, **options)
        if not self.runtime.configured:
            self.runtime.configure()
        self.app = ScopeMiddleware(app, self.runtime)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Serve a request."""
        return self.app(environ, start_response)
