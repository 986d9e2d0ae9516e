"""Numbers about a pool, named after OpenTelemetry's ``db.client.connection.*`` conventions.

See https://opentelemetry.io/docs/specs/semconv/database/database-metrics/#connection-pools.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .core import Engine
    from .entries import Turn
    from .options import PoolOptions

__all__ = ["BOUNDS", "Histogram", "PoolStats", "Recorder", "read_stats"]

BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Upper bounds of the histograms' buckets, in seconds; the last bucket has none (the convention's own advice)."""


@dataclass(frozen=True)
class Histogram:
    """Durations in seconds: how many, their sum, and how many fell into each bucket of ``BOUNDS``."""

    count: int = 0
    sum: float = 0.0
    buckets: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)


@dataclass(frozen=True)
class PoolStats:
    """One consistent moment of a pool: ``total`` is the sum of the five states before it."""

    name: str
    max_connections: int | None
    min_connections: int
    idle: int
    used: int
    connecting: int
    checking: int
    closing: int
    total: int
    waiting: int
    suspended: bool
    closed: bool
    generation: int
    timeouts: int
    refused: int
    connects: int
    connect_errors: int
    checkouts: int
    pings: int
    rollbacks: int
    leaks: int
    reaped: int
    closes: Mapping[str, int]
    wait_time: Histogram = field(default_factory=Histogram)
    use_time: Histogram = field(default_factory=Histogram)
    create_time: Histogram = field(default_factory=Histogram)

    def as_otel(self) -> dict[str, Any]:
        """Return the same under OpenTelemetry's names; times in seconds."""
        return {
            "db.client.connection.pool.name": self.name,
            "db.client.connection.count": {"idle": self.idle, "used": self.used},
            "db.client.connection.idle.min": self.min_connections,
            "db.client.connection.idle.max": self.max_connections,
            "db.client.connection.max": self.max_connections,
            "db.client.connection.pending_requests": self.waiting,
            "db.client.connection.timeouts": self.timeouts,
            "db.client.connection.create_time": self.create_time,
            "db.client.connection.wait_time": self.wait_time,
            "db.client.connection.use_time": self.use_time,
        }


class _Sums:
    """A histogram that is still growing."""

    __slots__ = ("buckets", "count", "sum")

    def __init__(self) -> None:
        self.count, self.sum, self.buckets = 0, 0.0, [0] * (len(BOUNDS) + 1)

    def add(self, seconds: Iterable[float]) -> None:
        for value in seconds:
            self.count += 1
            self.sum += value
            self.buckets[bisect_left(BOUNDS, value)] += 1

    def freeze(self) -> Histogram:
        return Histogram(self.count, self.sum, tuple(self.buckets))


class Recorder:
    """Counters and histograms of one pool. Off the fast path, so a lock of its own is affordable.

    It is reentrant: a finaliser that gives a connection back may run amid a count of the same thread.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.counters: dict[str, int] = {}
        self.closes: dict[str, int] = {}
        self.wait, self.use, self.create = _Sums(), _Sums(), _Sums()

    def count(self, name: str) -> None:
        """Add one to a counter."""
        with self._lock:
            self.counters[name] = self.counters.get(name, 0) + 1

    def closed(self, reason: str) -> None:
        """Count a close under its reason."""
        with self._lock:
            self.closes[reason] = self.closes.get(reason, 0) + 1

    def waited(self, seconds: float) -> None:
        """Record the wait of a caller who had to queue."""
        with self._lock:
            self.wait.add((seconds,))

    def used(self, batch: Iterable[float]) -> None:
        """Record how long connections were out."""
        with self._lock:
            self.use.add(batch)

    def created(self, seconds: float) -> None:
        """Record a connect that succeeded."""
        with self._lock:
            self.create.add((seconds,))


_COUNTERS = ("timeouts", "refused", "connects", "connect_errors", "pings", "rollbacks", "leaks", "reaped")


def read_stats(engine: Engine, recorder: Recorder, options: PoolOptions, name: str) -> PoolStats:
    """Read one consistent moment: everything that changes under the engine's lock is read under it."""
    engine.fold()

    def read(_turn: Turn) -> PoolStats:
        connecting, checking, closing = len(engine.connecting), len(engine.checking), len(engine.closing)
        idle = len(engine.idle) + len(engine.rested)
        # Counted by what it is not: a connection on its way between idle and used counts as used.
        used = max(len(engine.entries) - idle - connecting - checking - closing, 0)
        counters, use = dict(recorder.counters), recorder.use.freeze()
        return PoolStats(
            name=name,
            max_connections=options.max_connections or None,
            min_connections=options.min_connections,
            idle=idle,
            used=used,
            connecting=connecting,
            checking=checking,
            closing=closing,
            total=used + idle + connecting + checking + closing,
            waiting=len(engine.waiters),
            suspended=engine.shut and not engine.closed,
            closed=engine.closed,
            generation=engine.generation,
            checkouts=use.count + len(engine.held),
            closes=dict(recorder.closes),
            wait_time=recorder.wait.freeze(),
            use_time=use,
            create_time=recorder.create.freeze(),
            **{counter: counters.get(counter, 0) for counter in _COUNTERS},
        )

    moment: PoolStats = engine.locked(read)
    return moment
