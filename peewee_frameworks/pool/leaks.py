"""Connections that are in use for longer than a threshold: reported once, and once more when they are back.

At a checkout nothing is recorded until a pool has its first suspect. For that one the report shows where its holder is by
then, if it can be told; from then on each checkout of the pool records its stack.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from .entries import Entry, snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .core import Engine
    from .pool import Pool

__all__ = ["Suspect", "log_returned", "log_suspect", "look_for_leaks"]

logger = logging.getLogger("peewee_frameworks.pool")


class Suspect(NamedTuple):
    """What is known of who holds a connection."""

    label: str | None = None
    owner: str | None = None
    stack: str | None = None


def look_for_leaks(pool: Pool, engine: Engine, now: float, threshold: float) -> float:
    """Report who has passed the threshold; return in how many seconds the next one may."""
    wait = float("inf")
    passed: dict[int, tuple[Entry, float]] = {}
    for key, entry in snapshot(engine.held.items()):
        since = entry.since
        if not entry.leaked and now - since < threshold:
            wait = min(wait, threshold - (now - since))
        elif not entry.leaked:
            passed[key] = entry, since
    if not passed:
        return wait
    pool._arm()  # before the mark: who comes back from now on sees it
    suspects: Mapping[int, Suspect] = pool.describe([entry.conn for entry, _ in passed.values()])
    for key, (entry, since) in passed.items():
        suspect = entry.suspect = suspects.get(key, Suspect())
        if engine.held.get(key) is not entry or entry.since != since:
            entry.suspect = None  # it came back meanwhile, and may be out again
            continue
        if entry.stack is None:
            entry.stack = suspect.stack
        else:
            suspect = suspect._replace(stack=taken_at(entry.stack))
        entry.suspect = suspect
        pool._recorder.count("leaks")
        log_suspect(pool.name, entry.id, now - since, suspect)
        pool.events.emit("leak", connection=entry.conn, seconds=now - since)
    return wait


def taken_at(stack: Any) -> str | None:
    """Say of a stack that was recorded at a checkout what it is; what is in words already says so itself."""
    return stack if stack is None or isinstance(stack, str) else f"Checked out at:\n{stack}"


def log_suspect(pool: str, connection: int | None, seconds: float, suspect: Suspect) -> None:
    """Log that a connection has been in use for too long."""
    logger.warning(
        "Pool %r: connection %s has been in use for %.1f s, longer than leak_threshold%s%s. %s",
        pool,
        connection,
        seconds,
        f", by {suspect.label}" if suspect.label else "",
        f" in {suspect.owner}" if suspect.owner else "",
        suspect.stack or "Where it was taken is not known; from now on each checkout records it.",
        extra=_extra(pool, connection, seconds, suspect),
    )


def log_returned(pool: str, connection: int | None, seconds: float, suspect: Suspect) -> None:
    """Log that a connection which was reported is back."""
    logger.warning(
        "Pool %r: connection %s, reported as leaked%s, came back after %.1f s.",
        pool,
        connection,
        f" by {suspect.label}" if suspect.label else "",
        seconds,
        extra=_extra(pool, connection, seconds, suspect),
    )


def _extra(pool: str, connection: int | None, seconds: float, suspect: Suspect) -> dict[str, Any]:
    return {
        "pool": pool,
        "connection": connection,
        "seconds": seconds,
        "request": suspect.label,
        "owner": suspect.owner,
        "stack": suspect.stack,
    }
