"""The last minutes of some pools, as points that a plot is made of.

Points are taken by those who look: once a second while somebody watches the status page, and with each readiness probe
otherwise. So a process that nobody looks at has no thread and no timer for it.
"""

from __future__ import annotations

import collections
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from peewee_frameworks.pool.stats import BOUNDS, Histogram

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["INTERVAL", "KEPT", "Point", "Series", "percentile"]

INTERVAL = 1.0
"""Seconds between two points, at least."""

KEPT = 600
"""Points that are kept of each pool: ten minutes, if somebody watches all the time."""

_EARLY = 0.1  # seconds; a timer that rings early does not lose a point


class Point(NamedTuple):
    """A pool at one moment, and what has happened since the point before.

    Times are in seconds; None is what the pool cannot tell, or what did not happen.
    """

    at: float
    used: int | None
    idle: int | None
    waiting: int | None
    queued: int | None
    connecting: int | None
    wait_mean: float | None
    wait_p95: float | None
    use_mean: float | None
    use_p95: float | None
    checkouts: float | None
    timeouts: int | None


class Series:
    """The points of each pool."""

    def __init__(
        self,
        read: Callable[[], Mapping[str, Any]],
        queued: Callable[[], int | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take what reads the pools.

        Args:
            read: gives alias → `PoolStats`.
            queued: gives how many wait before they may wait for a connection, see `Runtime.queued`.
            clock: a monotonic clock; for tests.
        """
        self._read = read
        self._queued = queued
        self._clock = clock
        # Points carry the time of day, by a clock that nobody sets: they must not go backwards.
        self._epoch = time.time() - clock()
        self._points: dict[str, collections.deque[Point]] = {}
        self._latest: Mapping[str, Any] = {}
        self._at = float("-inf")

    def take(self) -> None:
        """Take a point of each pool, unless the last one is younger than `INTERVAL`."""
        now = self._clock()
        before, elapsed = self._latest, now - self._at
        if elapsed < INTERVAL - _EARLY:
            return
        self._at = now  # at once: two threads may look at the same time
        self._latest = latest = self._read()
        queued = self._queued()
        for alias, stats in latest.items():
            points = self._points.get(alias)
            if points is None:
                points = self._points.setdefault(alias, collections.deque(maxlen=KEPT))
            points.append(_point(round(self._epoch + now, 3), stats, queued, before.get(alias), elapsed))

    def since(self, at: float) -> dict[str, list[Point]]:
        """Return the points after a moment, as `Point.at` gives it."""
        return {alias: [point for point in list(points) if point.at > at] for alias, points in self._points.items()}

    @property
    def latest(self) -> float:
        """The time of the last point."""
        return round(self._epoch + self._at, 3) if self._points else 0.0


def _point(at: float, stats: Any, queued: int | None, before: Any, elapsed: float) -> Point:
    wait_mean, wait_p95 = _spread(stats.wait_time, before and before.wait_time)
    use_mean, use_p95 = _spread(stats.use_time, before and before.use_time)
    checkouts = _grown(stats.checkouts, before and before.checkouts)
    return Point(
        at,
        stats.used,
        stats.idle,
        stats.waiting,
        queued,
        stats.connecting,
        wait_mean,
        wait_p95,
        use_mean,
        use_p95,
        None if checkouts is None else round(checkouts / elapsed, 2),
        _grown(stats.timeouts, before and before.timeouts),
    )


def _grown(now: int | None, before: int | None) -> int | None:
    """Return how much a counter has grown; one that has shrunk began anew, in a pool that was disposed of."""
    if now is None or before is None:
        return None
    return now - before if now >= before else now


def _spread(now: Histogram | None, before: Histogram | None) -> tuple[float | None, float | None]:
    """Return the mean and the 95th percentile of what a histogram has gained."""
    if now is None or before is None:
        return None, None
    if now.count < before.count:
        before = Histogram()
    count = now.count - before.count
    if not count:
        return None, None
    buckets = [new - old for new, old in zip(now.buckets, before.buckets, strict=True)]
    return round((now.sum - before.sum) / count, 6), round(percentile(buckets, 0.95), 6)


def percentile(buckets: list[int], share: float) -> float:
    """Estimate a percentile from the counts of a histogram's buckets, as Prometheus' ``histogram_quantile`` does.

    Within a bucket the values are taken to lie evenly; of the last one, which has no end, only its beginning is known.
    """
    wanted, below, low = share * sum(buckets), 0, 0.0
    for count, high in zip(buckets, BOUNDS, strict=False):
        if count and below + count >= wanted:
            return low + (high - low) * (wanted - below) / count
        below, low = below + count, high
    return BOUNDS[-1]
