"""Watches one database inside a served application: who holds which connection, and whether two ever held the same."""

from __future__ import annotations

import json
import threading
from typing import Any

from peewee_frameworks import current_scope

PATH = "/__demo__"


class Recorder:
    """Counts what the pool of a database does."""

    def __init__(self, database: Any) -> None:
        self._lock = threading.Lock()
        self._holders: dict[int, str] = {}
        self.opened = 0
        self.peak = 0
        self.shared: list[str] = []
        pool = database.pool
        pool.events.on("connect", self._connected)
        pool.events.on("checkout", self._taken)
        pool.events.on("checkin", self._returned)
        pool.events.on("close", self._closed)

    def _connected(self, connection: Any) -> None:
        with self._lock:
            self.opened += 1

    def _taken(self, connection: Any) -> None:
        scope = current_scope()
        label = scope.label if scope is not None else threading.current_thread().name
        with self._lock:
            before = self._holders.setdefault(id(connection), label)
            if before is not label:
                self.shared.append(f"{before} and {label}")
            self.peak = max(self.peak, len(self._holders))

    def _returned(self, connection: Any) -> None:
        with self._lock:
            self._holders.pop(id(connection), None)

    def _closed(self, connection: Any, reason: str) -> None:
        self._returned(connection)

    def report(self) -> bytes:
        """Return the counts as JSON."""
        with self._lock:
            report = {
                "opened": self.opened,
                "peak": self.peak,
                "in_use": len(self._holders),
                "holders": list(self._holders.values()),
                "shared": self.shared,
            }
        return json.dumps(report).encode()


def wsgi(app: Any, recorder: Recorder) -> Any:
    """Answer `PATH` in front of a WSGI application."""

    def serve(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"] != PATH:
            return app(environ, start_response)
        start_response("200 OK", [("Content-Type", "application/json")])
        return [recorder.report()]

    return serve


def asgi(app: Any, recorder: Recorder) -> Any:
    """Answer `PATH` in front of an ASGI application."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            await app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": recorder.report()})

    return serve
