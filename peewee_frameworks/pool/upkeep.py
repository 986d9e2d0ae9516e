"""What a pool does from time to time: give up what hangs, renew what ages, close what is not needed, find what leaked.

All decisions are made here, under the engine's lock and without I/O; the work itself leaves as jobs.
"""

from __future__ import annotations

import math
import random
import sys
from typing import TYPE_CHECKING

from peewee_frameworks.errors import PoolConnectTimeout

from .entries import CHECK, CLOSE, OPEN, Entry, Turn, snapshot
from .jobs import close_what_was_cut, connect_failed
from .leaks import look_for_leaks

if TYPE_CHECKING:
    from .core import Engine
    from .pool import Pool

__all__ = ["Upkeep", "reap"]

INTERVAL = 1.0  # seconds between two rounds when nothing is due earlier
RENEWALS = 4  # connections renewed at a time, unless that is too slow for the number and their lifetime


class Upkeep:
    """The upkeep of one pool."""

    def __init__(self) -> None:
        self._reported_failing = 0.0

    def run(self, pool: Pool, engine: Engine, now: float) -> float | None:
        """Do what is due, and return in how many seconds to come again; ``None`` when there is nothing left to look after."""
        engine.fold()
        self._give_up_hanging(pool, engine, now)
        reap(pool, engine, now)
        self._serve_stranded(engine)
        nap: list[float] = [INTERVAL]
        if pool.options.leak_threshold is not None:
            nap.append(look_for_leaks(pool, engine, now, pool.options.leak_threshold))
            nap.append(pool.options.leak_threshold)

        def change(turn: Turn) -> None:
            self._sweep(engine, turn)
            self._shrink(engine, now, turn)
            nap.append(self._renew(engine, now, turn))
            self._keep_alive(engine, now)

        engine.locked(change)  # plans connects too, min_connections among them
        close_what_was_let_go(pool)
        if engine.closed and not engine.entries and not pool.cut:
            return None
        return max(min(nap), 0.005)

    def reconnect_is_overdue(self, lasting: float, patience: float) -> bool:
        """Say whether a chain of failures has lasted for another ``patience`` seconds since it was last reported."""
        if lasting < self._reported_failing:
            self._reported_failing = 0.0  # another chain
        if lasting - self._reported_failing < patience:
            return False
        self._reported_failing = lasting
        return True

    # -- what hangs ---------------------------------------------------------------------------------------------

    def _give_up_hanging(self, pool: Pool, engine: Engine, now: float) -> None:
        options = pool.options
        for entry in snapshot(engine.connecting.values()):
            if now - entry.since >= options.connect_timeout:
                text = f"Pool {pool.name!r}: the server did not answer within connect_timeout ({options.connect_timeout:g} s)."
                connect_failed(pool, engine, entry, PoolConnectTimeout(text))
        for entry in snapshot(engine.checking.values()):
            if now - entry.since >= options.ping_timeout:
                entry.shared = True
                pool._driver.abort(entry.conn)
                if entry.generation == engine.generation:
                    pool.invalidate_all("no answer within ping_timeout")
                engine.post(CLOSE, entry, "no answer within ping_timeout")
        for entry in snapshot(engine.closing.values()):
            if now - entry.since >= options.close_timeout:
                pool._driver.abort(entry.conn)
                engine.closed_entry(entry)

    @staticmethod
    def _serve_stranded(engine: Engine) -> None:
        """Take back grants whose owner can never look, and repeat wake-ups that an interrupt may have swallowed."""
        for waiter in snapshot(engine.granted):
            if waiter.stranded():
                engine.withdraw(waiter)
            else:
                engine.wake(waiter)
        for waiter in snapshot(engine.waiters):
            if waiter.stranded():
                engine.withdraw(waiter)

    # -- what is not needed, and what ages ----------------------------------------------------------------------

    @staticmethod
    def _take(engine: Engine, entry: Entry) -> bool:
        """Remove one entry from the idle ones; a checkout may be faster."""
        try:
            engine.idle.remove(entry)
        except (ValueError, IndexError):
            return False
        return True

    @staticmethod
    def _sweep(engine: Engine, turn: Turn) -> None:
        """Close what is idle and no longer valid: an invalidation may have overtaken it on its way back."""
        for entry in snapshot(engine.idle):
            if entry.generation != engine.generation and Upkeep._take(engine, entry):
                engine.retire(entry, engine.generation_reason, turn)

    def _shrink(self, engine: Engine, now: float, turn: Turn) -> None:
        limit = engine.options.idle_timeout
        if limit is None:
            return
        spare = len(engine.entries) - len(engine.closing) - engine.options.min_connections
        for entry in sorted(snapshot(engine.idle), key=lambda entry: entry.since):
            if spare <= 0 or now - entry.since < limit:
                return
            if self._take(engine, entry):
                engine.retire(entry, "idle", turn)
                spare -= 1

    def _renew(self, engine: Engine, now: float, turn: Turn) -> float:
        """Replace a few of the oldest connections; return how long until the next few.

        While there is room, the replacement is opened first; otherwise an idle one makes way for it. In a pool
        whose connections are all in use, some are marked to be replaced when they come back.
        """
        lifetime = engine.options.stale_timeout
        if not lifetime or engine.closed:
            return INTERVAL
        entries = [entry for entry in snapshot(engine.entries.values()) if entry.state is OPEN]
        due = sorted((entry for entry in entries if entry.renew_at <= now), key=lambda entry: entry.expires)
        pause = min(INTERVAL, lifetime / 20)
        if not due:
            return min([pause, *(max(entry.renew_at - now, 0.0) for entry in entries)])
        cost = engine.connect_estimate
        left = max(due[-1].expires - now, cost, 1e-3)
        at_once = min(max(RENEWALS, math.ceil(2 * len(due) * cost / left)), engine.options.max_connecting)
        at_once -= len(engine.connecting) + engine.refill + len(engine.closing)
        idle = set(snapshot(engine.idle))
        # One that nobody has wanted for half its life is let go, not replaced, as far as the minimum allows.
        spare = len(entries) - engine.options.min_connections
        for entry in due:
            if entry in idle and spare > 0 and now - entry.since > lifetime / 2 and self._take(engine, entry):
                engine.retire(entry, "expired", turn)
                spare -= 1
            elif at_once <= 0:
                break
            elif len(engine.entries) + engine.refill < engine.max:
                entry.renew_at = float("inf")
                engine.replacing.append(entry)
                engine.refill += 1
                at_once -= 1
            elif entry in idle and self._take(engine, entry):
                engine.retire(entry, "renewed", turn)
                engine.refill += 1
                at_once -= 1
            elif entry not in idle and entry.reason is None:
                entry.expires, entry.reason = now, "renewed"
                engine.refill += 1
                at_once -= 1
        return max(min(pause, cost / 2), 0.005)

    @staticmethod
    def _keep_alive(engine: Engine, now: float) -> None:
        interval = engine.options.keepalive
        if interval is None:
            return
        for entry in snapshot(engine.idle):
            # Spread a little, so that what went idle together is not pinged together.
            if now - entry.since >= interval * random.uniform(0.8, 1.0) and Upkeep._take(engine, entry):  # noqa: S311
                engine.inbox.append((CHECK, entry, "keepalive"))


def reap(pool: Pool, engine: Engine, now: float) -> None:
    """Take back connections that nobody can return any more.

    Whoever uses a connection refers to it: a frame, a thread's or greenlet's locals, a task, a cursor. One that only
    this pool refers to has no owner left, whatever kind of owner that was and however it ended; no identity of a
    thread, which may be reused, is involved. A live owner is never robbed, however old the checkout.
    """
    unused = _UNUSED + pool._driver.own_references()
    for key, entry in snapshot(engine.held.items()):
        if sys.getrefcount(entry.conn) <= unused and engine.held.pop(key, None) is entry:
            pool._reaped(entry, now - entry.since)
            engine.post(CLOSE, entry, "its owner is gone")
    for entry in snapshot(engine.entries.values()):
        # In neither hand: an interrupt hit the two instructions between them. Nobody will ever name it again.
        if entry.state is OPEN and sys.getrefcount(entry) <= _LOST:
            pool._reaped(entry, now - entry.since)
            engine.post(CLOSE, entry, "lost in an interrupt")


def close_what_was_let_go(pool: Pool) -> None:
    """Close the connections that were taken from their users and that these have let go of since."""
    unused = _UNUSED + pool._driver.own_references()
    for key, keeper in snapshot(pool.cut.items()):
        if sys.getrefcount(keeper.conn) <= unused and pool.cut.pop(key, None) is keeper:
            close_what_was_cut(pool, keeper)


def _references() -> tuple[int, int]:
    """Count, as `reap` does, the references to a connection without owner and to an entry in neither hand.

    Counted and not written down: interpreters differ in which variables and arguments they count.
    """
    entries = {0: Entry(0, 0, 0.0)}
    entries[0].conn = object()
    unused = lost = 0
    for entry in snapshot(entries.values()):
        unused, lost = sys.getrefcount(entry.conn), sys.getrefcount(entry)
    return unused, lost


_UNUSED, _LOST = _references()
