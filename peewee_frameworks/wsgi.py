"""Pure WSGI: a scope per request, for Flask and any other WSGI framework.

The scope outlives the call: a response body is iterated after the application has returned, and ends when the server calls
the iterable's ``close`` (PEP 3333), which every server must do, whatever happened. It is the current one only while the
application's code runs; between two parts of a body the thread is the server's.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

from .frame import get_frames, reset_frames, set_frames
from .http import answer_to
from .queries import times_of
from .runtime import Runtime
from .scope import Scope, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Unpack

    from .config import Databases, OptionKeywords
    from .frame import Frames
    from .state import State

    WSGIApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

# Where nested adapters find the scope around them. Never the context variable: servers leak contexts between requests.
SCOPE_KEY = "peewee_frameworks.scope"


class ScopeMiddleware:
    """Open a scope for each request, commit before the first byte, release early, answer errors by option."""

    def __init__(
        self,
        app: WSGIApp,
        runtime: Runtime,
        *,
        prepare: bool = True,
        is_complete: Callable[[Any], bool] | None = None,
    ) -> None:
        """Wrap `app`.

        Args:
            app: the application.
            runtime: the databases and options.
            prepare: connect eagerly, begin atomic requests and answer errors here; False where the framework's adapter does
                it, when the route is known and with the framework's own error handlers.
            is_complete: says of a body of the framework's own kind whether all of it is there and nobody is called at its
                close, so that the request is over; of lists and the server's file wrapper that is known.
        """
        self.app = app
        self.runtime = runtime
        self.prepare = prepare
        self.is_complete = is_complete
        self._served = (runtime,)
        # Scopes whose body nobody closed, from its finaliser, which must not do I/O; the next request ends them.
        self._abandoned: collections.deque[Scope] = collections.deque()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Run the application in a scope of its own; inside another's, only if that lacks one of our databases."""
        runtime = self.runtime
        while self._abandoned:
            try:
                abandoned = self._abandoned.popleft()
            except IndexError:  # another request was faster
                break
            runtime.end(abandoned)
        outer: Scope | None = environ.get(SCOPE_KEY)
        while outer is not None and outer.ended:  # a dispatcher tries one application after the other
            outer = outer.parent
        if outer is not None and outer.has_all(runtime.states):
            return self._join(outer, environ, start_response)
        around = get_frames()
        if around is not None:
            _release_idle(around)
        work = environ[SCOPE_KEY] = _Work(environ, runtime.states_beside(outer), outer, runtime)
        runtime.enter(work)
        try:
            body = self._call(work, environ, start_response)
            if not self._is_complete(body, environ):
                return _Body(runtime, work, body, self._abandoned)
        except BaseException as error:
            try:
                runtime.roll_back(work, error)
            finally:
                runtime.end(work)
            raise
        runtime.end(work)
        return body

    def _join(self, outer: Scope, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Run the application in the scope of an adapter around it, by its own options."""
        work = self.runtime.find(outer)
        if work is None or self.runtime in work.served:
            return self.app(environ, start_response)
        try:
            return self._call(work, environ, start_response)
        except BaseException as error:
            self.runtime.roll_back(work, error)
            raise

    def _call(self, work: Scope, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        runtime = self.runtime
        work.served += self._served
        if runtime.options.server_timing:
            start_response = _telling_times(work, start_response)

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            # What a COMMIT raises goes to the application: nothing has been sent yet.
            if work.touched:
                runtime.complete(work, int(status[:3]))
            work.started = True
            return start_response(status, headers, exc_info) if exc_info else start_response(status, headers)

        return self._prepared(work, environ, start) if self.prepare else self.app(environ, start)

    def _prepared(self, work: Scope, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        try:
            if self.runtime.has_policy:
                eager, atomic = self.runtime.policy(environ, (_path(environ),))
                if atomic:
                    work.set_atomic(self.runtime.states, self.runtime)
                if eager:
                    work.connect(self.runtime.states)
            return self.app(environ, start)
        except Exception as error:
            problem = None if work.started or not self.runtime.options.errors else answer_to(error)
            if problem is None:
                raise
            work.complete(error, self.runtime)  # whatever the status
            headers = {**problem.headers, "Content-Type": "application/json", "Content-Length": str(len(problem.body))}
            start(f"{problem.status} {problem.reason}", list(headers.items()))
            return [problem.body]

    def _is_complete(self, body: Iterable[bytes], environ: dict[str, Any]) -> bool:
        """Return whether no code of the application runs any more.

        Such a body is handed on as it is: servers look at a list's length and send a file by the kernel.
        """
        if type(body) in (list, tuple) or (self.is_complete is not None and self.is_complete(body)):
            return True
        wrapper = environ.get("wsgi.file_wrapper")
        return isinstance(wrapper, type) and isinstance(body, wrapper)


def _release_idle(around: Frames) -> None:
    """Give back what the scope around a request does not need now: a test's fixture may hold the pool's only connection."""
    if around.scope is not None:
        around.scope.release_early()


class _Work(Scope):
    """The scope of one WSGI request."""

    # Not `Scope.__init__`: most requests query nothing, and pay for each call and each name.
    def __init__(
        self, environ: dict[str, Any], states: Sequence[State], parent: Scope | None, runtime: Runtime
    ) -> None:
        self.environ = environ
        self.states = states
        self.parent = parent
        self.owner = runtime
        self.served = ()
        self.frames = {}
        self.touched = self.started = self.idles = self.ended = False

    @property
    def label(self) -> str:  # type: ignore[override]
        """What messages call it."""
        return f"request {self.environ.get('REQUEST_METHOD', '')} {printable(_path(self.environ))}"


class _Body:
    """The body of one response, each part made in the scope; the request ends with `close`."""

    _abandoned: collections.deque[Scope] | None = None

    def __init__(
        self, runtime: Runtime, work: Scope, body: Iterable[bytes], abandoned: collections.deque[Scope]
    ) -> None:
        """Take the application's body, and leave its scope.

        Raises: what the iteration of the body raises at its start; the scope is not left then, and the body is closed.
        """
        self._runtime = runtime
        self.work = work
        self._body = body
        try:
            self._next = iter(body).__next__
        except BaseException:
            self._close_body()
            raise
        self._abandoned = abandoned
        self._pause()
        work.exit()

    def _pause(self) -> None:
        """Hold nothing that nobody needs: the server may take long to send a part."""
        if self.work.frames and self.work.started:
            self._runtime.release_early(self.work)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        token = set_frames(self.work)
        try:
            return self._next()
        finally:
            if self.work.frames:
                self._pause()
            reset_frames(token)

    def close(self) -> None:
        """Close the application's body in the scope, then end the scope, whatever that raised."""
        self._abandoned = None
        work = self.work
        if work.ended:
            return
        work.enter()
        try:
            self._close_body()
        finally:
            self._runtime.end(work)

    def _close_body(self) -> None:
        close = getattr(self._body, "close", None)
        if close is not None:
            close()

    def __del__(self) -> None:
        # Servers close the body; test clients often do not.
        if self._abandoned is not None:
            if self.work.connected:
                self._abandoned.append(self.work)
            else:
                self._runtime.end(self.work)


def _telling_times(work: Scope, start_response: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``start_response`` that adds a ``Server-Timing`` header."""

    def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
        times = times_of(work)
        if times is not None:
            headers = [*headers, ("Server-Timing", times)]
        return start_response(status, headers, *exc_info)

    return start


class PeeweeMiddleware:
    """Give each request of any WSGI application its own Peewee connection.

    ::

        application = PeeweeMiddleware(application, db)
    """

    def __init__(self, app: WSGIApp, database: Databases | None = None, **options: Unpack[OptionKeywords]) -> None:
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
    path: str = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    return path.encode("latin-1", "replace").decode("utf-8", "replace")  # as PEP 3333 has it
