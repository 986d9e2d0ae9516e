"""Numbers about a pool, named after OpenTelemetry's ``db.client.connection.*`` conventions.

See https://opentelemetry.io/docs/specs/semconv/database/database-metrics/#connection-pools.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from .core import Engine
    from .entries import Turn
    from .options import PoolOptions

    Sink = Callable[[str, Sequence[float]], None]

__all__ = ["BOUNDS", "Histogram", "PoolStats", "Recorder", "read_stats"]

logger = logging.getLogger("peewee_frameworks.pool")

BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Upper bounds of the histograms' buckets, in seconds; the last bucket has none (the convention's own advice)."""

REASONS = 50  # kept apart; a caller may invent one for each close


@dataclass(frozen=True)
class Histogram:
    """Durations in seconds: how many, their sum, and how many fell into each bucket of ``BOUNDS``."""

    count: int = 0
    sum: float = 0.0
    buckets: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the same as what JSON knows."""
        return {"count": self.count, "sum": self.sum, "buckets": list(self.buckets)}


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """One moment of a pool. What its kind of pool cannot tell is None; ours tells all of it, and consistently.

    ``total`` is the sum of the five states before it. The numbers from ``timeouts`` on count since the pool was made.
    """

    name: str
    max_connections: int | None = None
    """None: no limit."""
    min_connections: int | None = None
    idle: int | None = None
    used: int | None = None
    connecting: int | None = None
    checking: int | None = None
    closing: int | None = None
    total: int | None = None
    waiting: int | None = None
    """Callers that wait for a connection."""
    suspended: bool | None = None
    closed: bool | None = None
    generation: int | None = None
    """How often all connections were invalidated."""
    timeouts: int | None = None
    """Callers that waited in vain."""
    refused: int | None = None
    """Callers that were not let into the queue."""
    connects: int | None = None
    connect_errors: int | None = None
    checkouts: int | None = None
    pings: int | None = None
    rollbacks: int | None = None
    leaks: int | None = None
    reaped: int | None = None
    """Connections whose holder had gone without returning them."""
    closes: Mapping[str, int] | None = None
    """Reason → how many were closed for it."""
    wait_time: Histogram | None = None
    """How long callers waited that had to; ours does not measure those who found a connection at once."""
    use_time: Histogram | None = None
    create_time: Histogram | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the same as what JSON knows."""
        return {name: _plain(value) for name, value in vars(self).items()}

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


def _plain(value: Any) -> Any:
    if isinstance(value, Histogram):
        return value.as_dict()
    return dict(value) if isinstance(value, dict) else value


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

    Args:
        sinks: called with the name of a histogram and the durations that were added to it; metrics libraries that make
            histograms of their own listen here. The list is shared: one may be added at any time.
    """

    def __init__(self, sinks: list[Sink] | None = None) -> None:
        self._lock = threading.RLock()
        self.sinks: list[Sink] = [] if sinks is None else sinks
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
            if reason not in self.closes and len(self.closes) >= REASONS:
                reason = "other"
            self.closes[reason] = self.closes.get(reason, 0) + 1

    def waited(self, seconds: float) -> None:
        """Record the wait of a caller who had to queue."""
        self._add(self.wait, "wait_time", (seconds,))

    def used(self, batch: Sequence[float]) -> None:
        """Record how long connections were out."""
        self._add(self.use, "use_time", batch)

    def created(self, seconds: float) -> None:
        """Record a connect that succeeded."""
        self._add(self.create, "create_time", (seconds,))

    def _add(self, sums: _Sums, name: str, batch: Sequence[float]) -> None:
        with self._lock:
            sums.add(batch)
        for sink in self.sinks:
            try:
                sink(name, batch)
            except Exception:  # a listener's fault is not the pool's
                logger.exception("A listener of a pool's statistics failed.", extra={"statistic": name})

    def read(self) -> dict[str, Any]:
        """Return what was counted, under the names of `PoolStats`."""
        with self._lock:
            return {
                "closes": dict(self.closes),
                "wait_time": self.wait.freeze(),
                "use_time": self.use.freeze(),
                "create_time": self.create.freeze(),
                **{counter: self.counters.get(counter, 0) for counter in _COUNTERS},
            }


_COUNTERS = ("timeouts", "refused", "connects", "connect_errors", "pings", "rollbacks", "leaks", "reaped")


def read_stats(engine: Engine, recorder: Recorder, options: PoolOptions, name: str) -> PoolStats:
    """Read one consistent moment: everything that changes under the engine's lock is read under it."""
    engine.fold()

    def read(_turn: Turn) -> PoolStats:
        connecting, checking, closing = len(engine.connecting), len(engine.checking), len(engine.closing)
        idle = len(engine.idle) + len(engine.rested)
        # Counted by what it is not: a connection on its way between idle and used counts as used.
        used = max(len(engine.entries) - idle - connecting - checking - closing, 0)
        recorded = recorder.read()
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
            checkouts=recorded["use_time"].count + len(engine.held),
            **recorded,
        )

    moment: PoolStats = engine.locked(read)
    return moment
