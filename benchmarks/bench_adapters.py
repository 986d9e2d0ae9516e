"""What each adapter costs a handler without a query, on a real server: the bare framework's requests/s by ours.

All contenders are served by one process, and take turns in short rounds, so that a slow moment of the machine and the way
the process happens to lie in memory hit them alike. Several processes, one after the other, each with another hash seed.

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
from tests.support.ports import HOST, reserved_port
from tests.support.process import ServerProcess, python

from .adapter_apps import CONTENDERS
from .harness import Row

if TYPE_CHECKING:
    from collections.abc import Callable

OURS = "peewee_frameworks"
NAMES = {OURS: "ours", "the least: set and reset a variable": "less", "bare against bare": "also"}
TARGET = 1.05
PROCESSES = 3
ROUNDS = 60
CONNECTIONS = 4


def uvicorn(app: str) -> ServerProcess:
    return webservers.uvicorn(f"benchmarks.adapter_apps:{app}", factory=True, options=("--interface", "asgi3"))


def gunicorn(app: str) -> ServerProcess:
    # Two threads, for they share one interpreter.
    options = ("--keep-alive", "60")
    return webservers.gunicorn(
        f"benchmarks.adapter_apps:{app}", factory=True, threads=2, options=options, ready=f"/{CONTENDERS[0]}"
    )


class Load:
    """Some keep-alive connections for one contender; each sends ``depth`` requests at once and awaits all responses."""

    def __init__(self, server: ServerProcess, port: int, contender: str, depth: int) -> None:
        self.worker = max(server.workers(), default=server.pid)  # gunicorn's only one
        self.depth = depth
        self.request = f"GET /{contender} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
        self.socks = [socket.create_connection((HOST, port), 30) for _ in range(CONNECTIONS)]
        self.socks[0].sendall(self.request)
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
        burst, count = self.request * self.depth, bursts * self.depth * len(self.socks)
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


@contextlib.contextmanager
def loads_of(framework: str) -> Any:
    with contextlib.ExitStack() as stack:
        if framework == "sanic":  # each application wants a server of its own; they share the process and its loop
            ports = [stack.enter_context(reserved_port()) for _ in CONTENDERS[1:]]
            server = ServerProcess(
                lambda port: python("benchmarks.adapter_apps", str(port), *map(str, ports)), announce={"Serving": 1}
            )
            stack.enter_context(server)
            ports = [server.port, *ports]
        else:
            server = stack.enter_context((gunicorn if framework == "flask" else uvicorn)(framework))
            ports = [server.port] * len(CONTENDERS)
        depth = 1 if framework == "flask" else 8  # gthread knows no pipelining
        loads = {}
        for contender, port in zip(CONTENDERS, ports, strict=True):
            loads[contender] = Load(server, port, contender, depth)
            stack.callback(loads[contender].close)
        yield loads


@functools.cache
def measured(framework: str) -> dict[str, dict[str, float]]:
    """Measure all contenders of a framework, for they only mean something side by side."""
    pairs: dict[str, list[tuple[float, float]]] = {contender: [] for contender in CONTENDERS}
    costs: dict[str, list[tuple[float, float]]] = {contender: [] for contender in CONTENDERS}
    for _ in range(PROCESSES):
        with loads_of(framework) as loads:
            bursts = 400 // next(iter(loads.values())).depth // CONNECTIONS
            for load in loads.values():
                load.round(bursts)
            for index in range(ROUNDS):
                turn = index % len(CONTENDERS)
                results = {name: loads[name].round(bursts) for name in CONTENDERS[turn:] + CONTENDERS[:turn]}
                bare = results["bare"]
                for name, result in results.items():
                    pairs[name].append((result[0] / bare[0], result[1] / bare[1]))
                    costs[name].append(result)
    return {
        name: {
            "value": statistics.median(pair[0] for pair in pairs[name]),
            "cpu ratio": statistics.median(pair[1] for pair in pairs[name]),
            "cpu µs bare": statistics.median(cost[1] for cost in costs["bare"]) * 1e6,
            "cpu µs": statistics.median(cost[1] for cost in costs[name]) * 1e6,
            "requests/s bare": 1 / statistics.median(cost[0] for cost in costs["bare"]),
            "requests/s": 1 / statistics.median(cost[0] for cost in costs[name]),
        }
        for name in CONTENDERS
    }


def row(framework: str, server: str) -> Row:
    contenders: dict[str, Callable[[], Any]] = {
        name: functools.partial(lambda contender: measured(framework)[contender], contender)
        for name, contender in NAMES.items()
    }
    question = f"{framework} on {server}, a handler without a query: bare requests/s by those with the adapter"
    return Row(
        f"adapter-{framework}",
        question,
        "",
        "the least: a context variable set and reset around the application",
        contenders,
        f"<= {TARGET}",
        _passes,
        repeats=1,
    )


def _passes(ours: float, _: Any) -> bool:
    return ours <= TARGET


ROWS = [
    row("flask", "gunicorn gthread"),
    row("sanic", "its own server"),
    row("fastapi", "uvicorn"),
    row("starlette", "uvicorn"),
]
