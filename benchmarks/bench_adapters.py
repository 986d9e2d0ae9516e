"""What each adapter costs a handler without a query, on a real server: the bare framework's requests/s by ours.

Two servers run at once, one bare and one with the adapter, and take turns in short rounds, so that a slow moment of the
machine hits both. On a busy machine the processor time of the server per request is the steadier figure.

``python -m benchmarks --only adapter-`` runs these rows alone.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import statistics
import time
from typing import TYPE_CHECKING, Any

from tests.support import webservers

from .harness import Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.process import ServerProcess

OURS = "peewee_frameworks"
TARGET = 1.05
ROUNDS = 40
CONNECTIONS = 4
REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"

SERVERS: dict[str, Callable[..., ServerProcess]] = {
    # Two threads, for they share one interpreter; and no pipelining, which gthread does not know.
    "flask": functools.partial(webservers.gunicorn, threads=2, options=("--keep-alive", "60")),
    "sanic": functools.partial(webservers.sanic, single_process=True),
    "starlette": webservers.uvicorn,
    "fastapi": webservers.uvicorn,
}


class Load:
    """Some keep-alive connections to one server; each sends ``depth`` requests at once and awaits all responses."""

    def __init__(self, server: ServerProcess, depth: int) -> None:
        self.depth = depth
        self.worker = max(server.workers(), default=server.pid)  # gunicorn's only one
        with server.client() as client:
            client.get("/")  # what happens once
        self.socks = [socket.create_connection(("127.0.0.1", server.port), 30) for _ in range(CONNECTIONS)]
        self.socks[0].sendall(REQUEST)
        response = b""
        while b"}" not in response:  # the body comes whole
            data = self.socks[0].recv(65536)
            assert data, response
            response += data
        assert response.startswith(b"HTTP/1.1 200"), response
        self.length = len(response) * depth  # all are of one length

    def cpu(self) -> float:
        """Give the seconds of processor time that the server's process has used: Linux's clock of another process."""
        return time.clock_gettime(~self.worker << 3 | 2)

    def round(self, bursts: int) -> tuple[float, float]:
        """Give the seconds per request: of time, and of the server's processor time."""
        burst, count = REQUEST * self.depth, bursts * self.depth * len(self.socks)
        cpu, start = self.cpu(), time.perf_counter()
        for sock in self.socks:
            sock.sendall(burst)
        for index in range(bursts):
            for sock in self.socks:
                left = self.length
                while left:
                    data = sock.recv(left)
                    assert data, "the server closed a connection"
                    left -= len(data)
                if index < bursts - 1:
                    sock.sendall(burst)
        return (time.perf_counter() - start) / count, (self.cpu() - cpu) / count

    def close(self) -> None:
        for sock in self.socks:
            sock.close()


def ratio(name: str, other: str) -> dict[str, float]:
    depth = 1 if name == "flask" else 8
    with contextlib.ExitStack() as stack:
        loads = []
        for contender in ("bare", other):
            server = SERVERS[name](f"benchmarks.adapter_apps:{name}", factory=True, env={"CONTENDER": contender})
            loads.append(Load(stack.enter_context(server), depth))
            stack.callback(loads[-1].close)
        bursts = 400 // depth // CONNECTIONS
        for load in loads:
            load.round(bursts)
        pairs = []
        for index in range(ROUNDS):
            first = index % 2
            results = {which: loads[which].round(bursts) for which in (first, 1 - first)}
            pairs.append((results[0], results[1]))
    return {
        "value": statistics.median(ours[0] / bare[0] for bare, ours in pairs),
        "cpu ratio": statistics.median(ours[1] / bare[1] for bare, ours in pairs),
        "cpu µs bare": statistics.median(bare[1] for bare, _ in pairs) * 1e6,
        "cpu µs": statistics.median(ours[1] for _, ours in pairs) * 1e6,
        "requests/s bare": 1 / statistics.median(bare[0] for bare, _ in pairs),
        "requests/s": 1 / statistics.median(ours[0] for _, ours in pairs),
    }


def row(name: str, server: str) -> Row:
    contenders: dict[str, Callable[[], Any]] = {
        OURS: functools.partial(ratio, name, "ours"),
        "the least: set and reset a variable": functools.partial(ratio, name, "least"),
        "bare against bare": functools.partial(ratio, name, "bare"),
    }
    question = f"{name} on {server}, a handler without a query: bare requests/s by those with the adapter"
    return Row(
        f"adapter-{name}",
        question,
        "",
        "the least: a context variable set and reset around the application",
        contenders,
        f"<= {TARGET}",
        _passes,
    )


def _passes(ours: float, _: Any) -> bool:
    return ours <= TARGET


ROWS = [
    row("flask", "gunicorn gthread"),
    row("sanic", "its own server, one process"),
    row("fastapi", "uvicorn"),
    row("starlette", "uvicorn"),
]
