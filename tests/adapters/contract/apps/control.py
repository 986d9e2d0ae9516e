"""A way into the served process that does not go through the server under test.

A Unix socket per process in CONTRACT_DIR: the test asks for counts, opens gates at which handlers wait, and reads the
notes of work that outlived its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
import threading
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

GATE_SECONDS = 15.0


class Gates:
    """Points where handlers stop until the test lets them go on; each is named, and used once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: defaultdict[str, threading.Event] = defaultdict(threading.Event)
        self._waiters: defaultdict[str, list[Callable[[], None]]] = defaultdict(list)
        self.reached: set[str] = set()

    def open(self, name: str) -> None:
        with self._lock:
            self._open[name].set()
            waiters = self._waiters.pop(name, [])
        for wake in waiters:
            wake()

    def wait(self, name: str) -> None:
        """Stop this thread."""
        with self._lock:
            event = self._open[name]
            self.reached.add(name)
        if not event.wait(GATE_SECONDS):
            raise TimeoutError(f"nobody opened the gate {name}")

    async def pass_through(self, name: str) -> None:
        """Stop this task."""
        loop = asyncio.get_running_loop()
        opened = loop.create_future()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has gone, and the task with it
                loop.call_soon_threadsafe(lambda: opened.done() or opened.set_result(None))

        with self._lock:
            self.reached.add(name)
            if self._open[name].is_set():
                return
            self._waiters[name].append(wake)
        async with asyncio.timeout(GATE_SECONDS):
            await opened


class Control:
    """Answer the test's questions: one JSON line in, one out."""

    def __init__(self, stats: Callable[[], dict[str, Any]], forget: Callable[[], None]) -> None:
        self.gates = Gates()
        self.notes: defaultdict[str, list[Any]] = defaultdict(list)
        self._stats = stats
        self._forget = forget
        if (directory := os.environ.get("CONTRACT_DIR")) is not None:
            self._start(Path(directory))
            os.register_at_fork(after_in_child=lambda: self._start(Path(directory)))

    def note(self, rid: str, what: Any) -> None:
        """Write down what the response cannot tell any more."""
        self.notes[rid].append(what)

    def _start(self, directory: Path) -> None:
        listener = socket.socket(socket.AF_UNIX)
        path = directory / f"{os.getpid()}.sock"
        listener.bind(str(path))
        listener.listen(16)
        threading.Thread(target=self._serve, args=(listener,), name="control", daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as stream:
                if line := stream.readline():
                    json.dump(self._answer(**json.loads(line)), stream)

    def _answer(self, ask: str, name: str = "") -> Any:
        if ask == "open":
            self.gates.open(name)
            return True
        if ask == "reached":
            return name in self.gates.reached
        if ask == "notes":
            return list(self.notes[name])
        if ask == "forget":
            return self._forget()
        if ask == "collect":
            return gc.collect()
        return self._stats()
