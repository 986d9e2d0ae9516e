"""How many connects to start, and when to try again: the pool's judgement of demand."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from .entries import snapshot

if TYPE_CHECKING:
    from .core import Engine

__all__ = ["BACKOFF_MIN", "backoff", "connects_wanted"]

BACKOFF_MIN, BACKOFF_MAX = 0.05, 5.0  # seconds


def backoff(failures: int) -> float:
    """Return the pause after so many failures in a row: full jitter under a ceiling that doubles.

    See https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
    """
    ceiling = min(BACKOFF_MAX, BACKOFF_MIN * 2 ** min(failures, 10))
    return random.uniform(BACKOFF_MIN, ceiling)  # noqa: S311 - no cryptography


def connects_wanted(engine: Engine, now: float) -> float:
    """Say how many connects to start now. The caller holds the lock."""
    options = engine.options
    missing: float = 0
    if now >= engine.retry_at:
        missing = max(engine.refill, options.min_connections - (len(engine.entries) - len(engine.closing)))
    queue = 0 if engine.shut else len(engine.waiters)
    if not queue:
        return max(missing, 0)
    # A connect that takes far longer than usual hangs; it must not stand in the way of a fresh one.
    patience = max(1.0, 4 * engine.connect_estimate)
    fresh = sum(now - entry.created < patience for entry in engine.connecting.values())
    short = queue - fresh - len(engine.checking)
    if short <= 0:
        if engine.connecting:
            engine.revisit_wanted = now + patience
        return max(missing, 0)
    # Counted by what it is not: a connection on its way from hand to hand is in neither `held` nor `idle`.
    live = len(engine.entries) - len(engine.connecting) - len(engine.checking) - len(engine.closing)
    if live > 0:
        if now < engine.retry_at:  # connecting fails, but there is something to wait for
            engine.revisit_wanted = engine.retry_at
            return 0
        # What is in use comes back: count how often within one connect time, going by how long a use takes on
        # average, or how long this one has already taken. Where nothing has come back for a whole connect time,
        # nothing is expected. One connect is started in any case, so that a lasting queue makes the pool grow.
        engine.look_at_returns(now)
        cost = engine.connect_estimate
        ages = [now - entry.since for entry in snapshot(engine.held.values())]
        ages += [0.0] * (live - len(ages))
        supply = sum(cost / max(engine.use_estimate, age, 1e-6) for age in ages)
        if now - max(engine.returned_at, next(iter(engine.waiters)).since) >= cost:
            supply = 0.0
        engine.revisit_wanted = now + min(max(cost / 4, 0.002), 0.25)
        return max(short - supply, 0 if fresh else 1, missing)
    if options.on_connect_error == "retry" and now < engine.retry_at:
        engine.revisit_wanted = engine.retry_at
        return 0
    return max(short, missing)
