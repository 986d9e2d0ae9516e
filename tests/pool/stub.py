"""A database that exists only in memory: slow, failing, hanging or dying at the flip of a switch, and counting."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from peewee_frameworks.pool import Pool, PoolOptions
from peewee_frameworks.pool.drivers import Driver

DEADLINE = 10.0


class StubError(Exception):
    """What the stub raises."""


class Server:
    """Counts what happens to it; all switches may be flipped at any time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.connects = self.closes = self.pings = self.rollbacks = 0
        self.open = self.peak = self.connecting = self.peak_connecting = 0
        self.delay = self.ping_delay = self.rollback_delay = self.close_delay = 0.0
        self.connect_error: BaseException | None = None
        self.ping_error: BaseException | None = None
        self.rollback_error: BaseException | None = None
        self.connect_gate = self.ping_gate = self.rollback_gate = self.close_gate = None
        self.arrived = threading.Semaphore(0)  # a connect has begun
        self.connections: list[Connection] = []

    def hang(self, what: str = "connect") -> threading.Event:
        """Make everything of this kind wait for the returned event."""
        gate = threading.Event()
        setattr(self, f"{what}_gate", gate)
        return gate

    def connect(self) -> Connection:
        with self.lock:
            self.connects += 1
            self.connecting += 1
            self.peak_connecting = max(self.peak_connecting, self.connecting)
            self.peak = max(self.peak, self.open + self.connecting)
        self.arrived.release()
        error = self.connect_error
        try:
            pause(self.delay, self.connect_gate)
            if error is not None:
                raise error
            conn = Connection(self)
        finally:
            with self.lock:
                self.connecting -= 1
        with self.lock:
            self.open += 1
            self.connections.append(conn)
        return conn

    def kill_all(self) -> None:
        for conn in list(self.connections):
            conn.dead = True


class Connection:
    """One connection; ``user`` and `use` catch two users at once."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.dead = self.closed = self.in_transaction = self.active = False
        self.using = threading.Lock()

    @contextlib.contextmanager
    def use(self) -> Any:
        assert self.using.acquire(blocking=False), "two users of one connection"
        try:
            assert not self.closed, "used after close"
            yield self
        finally:
            self.using.release()


class StubDriver(Driver):
    name = "stub"

    def probe(self, conn: Connection) -> Any:
        return conn.look if hasattr(conn, "look") else (lambda _timeout: conn.dead)

    def verdict(self, conn: Connection) -> str:
        return "close"

    def condition(self, conn: Connection) -> str | None:
        if conn.active:
            return "returned in the middle of a query"
        if conn.closed:
            return "closed while in use"
        return "clean" if conn.in_transaction else None

    def ping(self, conn: Connection, timeout: float) -> None:
        server = conn.server
        with server.lock:
            server.pings += 1
        pause(server.ping_delay, server.ping_gate)
        if server.ping_error is not None:
            raise server.ping_error
        if conn.dead:
            raise StubError("dead")

    def rollback(self, conn: Connection, timeout: float) -> None:
        server = conn.server
        with server.lock:
            server.rollbacks += 1
        pause(server.rollback_delay, server.rollback_gate)
        if server.rollback_error is not None:
            raise server.rollback_error
        conn.in_transaction = False

    def close(self, conn: Connection, timeout: float) -> None:
        server = conn.server
        pause(server.close_delay, server.close_gate)
        with server.lock:
            if not conn.closed:
                server.closes += 1
                server.open -= 1
        conn.closed = True

    def abort(self, conn: Connection) -> None:
        conn.dead = True

    def is_disconnect(self, error: BaseException, conn: Connection) -> bool:
        return isinstance(error, StubError)


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.offset

    def advance(self, seconds: float) -> None:
        self.offset += seconds


def pause(delay: float, gate: threading.Event | None) -> None:
    if gate is not None:
        gate.wait(DEADLINE)
    elif delay:
        time.sleep(delay)


DRIVER = StubDriver()


def make_pool(server: Server, *, prepare: Any = None, clock: Any = time.monotonic, **options: Any) -> Pool:
    """Make a pool on the stub: 4 connections, 5 seconds to wait, unless told otherwise."""
    chosen = PoolOptions(**{"max_connections": 4, "timeout": 5.0, "pool_name": "stub", **options})
    return Pool(server.connect, chosen, prepare=prepare, driver=lambda _conn: DRIVER, clock=clock)


def numbers(pool: Pool) -> tuple[int, int, int]:
    """Return idle, used and waiting."""
    stats = pool.stats()
    return stats.idle, stats.used, stats.waiting


def settled(pool: Pool) -> bool:
    """Say whether nothing is under way in the background."""
    stats = pool.stats()
    return not (stats.connecting or stats.checking or stats.closing or stats.waiting)
