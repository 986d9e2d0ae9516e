"""The health endpoints as a blueprint of Flask."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response, current_app, request
from werkzeug.wrappers import Response as WSGIResponse

from . import EVENTS_HEADERS, NAMES, Answer, Health, check_guard, let_go, wants_guard
from .serving import threads_of_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask import Request

    from peewee_frameworks.extension import Extension

Guard = Callable[["Request"], Any]

MARK = "_peewee_frameworks_health"

MOST_STREAMS = 4
"""Streams of events that one process serves at a time: each keeps a thread. Pages beyond that ask once a second instead.

Under gunicorn, which says how many threads there are, no more than half of them: probes and requests need some, too.
"""


def make_blueprint(
    orm: Extension, name: str, guard: Guard | None, timeout: float | None, options: dict[str, Any]
) -> Blueprint:
    """Make the blueprint."""
    check_guard(guard)
    health = Health(orm, timeout)
    orm.runtime.has_health = True
    blueprint = Blueprint(name, __name__, **options)
    streams = _Streams()
    for each in NAMES:
        blueprint.add_url_rule(f"/{each}", each or "page", _make_view(health, each, guard, streams))
    return blueprint


def _make_view(health: Health, name: str, guard: Guard | None, streams: _Streams) -> Callable[[], Response]:
    def view() -> Response:
        if wants_guard(name, request.args) and (refusal := _refusal(health, guard)) is not None:
            return refusal
        if name != "events":
            return _respond(health.answer(name, request.args))
        # A worker with one thread would serve nothing else meanwhile.
        if not request.environ.get("wsgi.multithread") or not streams.enter():
            return Response(status=204)  # which tells the page to ask by itself
        let_go()
        return Response(_Events(health.events(request.headers.get("Last-Event-ID")), streams), headers=EVENTS_HEADERS)

    setattr(view, MARK, True)
    return view


def _refusal(health: Health, guard: Guard | None) -> Response | None:
    """Return what those get whom the guard does not let in; None for the others."""
    if guard is None:
        return _respond(health.refused(guarded=False))
    allowed = current_app.ensure_sync(guard)(request)
    if inspect.isawaitable(allowed):  # of what does not look like a coroutine function: a lambda, an object
        allowed = current_app.async_to_sync(_wait)(allowed)
    if isinstance(allowed, (WSGIResponse, tuple)):  # as in `before_request`, a response is a refusal: 401, to the login
        return current_app.make_response(allowed)
    return None if allowed else _respond(health.refused(guarded=True))


async def _wait(allowed: Awaitable[Any]) -> Any:
    return await allowed


def _respond(answer: Answer) -> Response:
    return Response(answer.body, answer.status, answer.headers, content_type=answer.content_type)


class _Streams:
    """The places for streams in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for a moment only, so a patch that comes later does not matter
        self._open = 0

    def enter(self) -> bool:
        """Take a place if there is one; return whether there was."""
        threads = threads_of_server()
        most = MOST_STREAMS if threads is None else min(MOST_STREAMS, threads // 2)
        with self._lock:
            if self._open >= most:
                return False
            self._open += 1
            return True

    def leave(self) -> None:
        """Give a place back."""
        with self._lock:
            self._open -= 1


class _Events:
    """A stream that gives its place back when it ends, though it was never begun."""

    def __init__(self, events: Iterator[bytes], streams: _Streams) -> None:
        self._events = events
        self._streams: _Streams | None = streams

    def __iter__(self) -> Iterator[bytes]:
        return self._events

    def close(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None:
            streams.leave()

    def __del__(self) -> None:
        self.close()  # nobody else does where the application fails after the view, in ``after_request`` for example
