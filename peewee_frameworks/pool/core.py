"""The engine of the pool: who holds what, who waits, and what has to be done next.

It knows no driver and no Peewee, and does no I/O: work such as "connect" or "close" leaves it as a `Job`, for
others to run, and comes back as `connected`, `connect_failed`, `checked` or `closed`.

Three rules carry everything:

* **The fast path takes no lock.** A checkout pops from ``idle``; a checkin appends to ``idle`` and then looks at
  ``waiters``. Whoever wants to wait appends itself to ``waiters`` and then looks at ``idle``. Whichever of the two
  comes second sees the other, and pairs them under the one lock.
* **Nobody blocks on the lock while giving something back.** A checkin may run in a finaliser or a signal handler,
  which may have interrupted the very code that holds the lock. It puts its message into ``inbox`` and tries the lock;
  if that is taken, the holder looks again after letting go (`settle`).
* **A hand-off has two phases.** The engine writes ``granted[waiter] = entry``; the waiter takes it by popping. The
  pop is the only arbiter: a grant nobody takes (cancelled, timed out, loop closed) is popped by someone else and goes
  to the next in the queue. ``held`` works likewise, so a double return finds nothing to pop.
"""

from __future__ import annotations

import math
import random
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any

from .entries import CHECK, CHECKING, CLEAN, CLOSE, CLOSING, CONNECT, GONE, OPEN, Entry, Job, Turn
from .planning import BACKOFF_MIN, backoff, connects_wanted

if TYPE_CHECKING:
    from collections.abc import Callable

    from .options import PoolOptions
    from .waiters import Waiter

__all__ = ["Engine"]

SAMPLES = 1_000_000  # use times that may pile up in the second between two rounds of upkeep

EXPIRED = float("-inf")
_AT_ONCE = (False,)  # the arguments of the one attempt to take the lock without waiting
UNSEEN = 0.5
"""Seconds of rest after which a connection is pinged that has no socket to look at: HikariCP's aliveBypassWindowMs."""
JUST_NOW = 0.1  # seconds for which a connection that was used, opened or pinged is handed to a waiter without a ping


class Engine:
    """Slots, queue and hand-off. ``dispatch`` receives jobs, outside the lock, in any thread.

    Args:
        options: sizes, times and policies.
        dispatch: called with the jobs to run.
        revisit: called with a monotonic time at which `Pool.maintain` is to run although nothing happens.
        make_lock: creates the one lock; looked up by the caller on ``threading`` when the pool opens.
        condition: given a connection, falsy when it can be reused as it is.
        clock: a monotonic clock, in seconds.
    """

    __slots__ = (
        "_blind",
        "_clock",
        "_dispatch",
        "_lock",
        "_needs_ping",
        "_ping_after",
        "_pop",
        "_revisit",
        "_serial",
        "checking",
        "closed",
        "closing",
        "condition",
        "connect_estimate",
        "connecting",
        "crowded",
        "entries",
        "failed_at",
        "failing_since",
        "failures",
        "folded",
        "generation",
        "generation_reason",
        "granted",
        "held",
        "idle",
        "inbox",
        "last_error",
        "max",
        "on_samples",
        "options",
        "refill",
        "replacing",
        "rested",
        "retry_at",
        "returned",
        "returned_at",
        "revisit_wanted",
        "samples",
        "shut",
        "use_estimate",
        "verdict",
        "waiters",
    )

    def __init__(
        self,
        options: PoolOptions,
        *,
        dispatch: Callable[[list[Job]], None],
        revisit: Callable[[float], None],
        make_lock: Callable[[], Any],
        condition: Callable[[Any], Any] = lambda _conn: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lock = make_lock()
        self._dispatch = dispatch
        self._revisit = revisit
        self.condition = condition
        self.verdict: Callable[[Any], str] = lambda _conn: CLOSE  # see `adapt`
        self._clock = clock
        self.generation = 0
        self.generation_reason = ""
        self.idle: deque[Entry] = deque()
        self.rested: deque[Entry] = deque()  # idle for long, set aside until a ping has told about one of them
        self.held: dict[int, Entry] = {}  # by id(); safe, because the entry keeps the object alive
        self.waiters: OrderedDict[Waiter, None] = OrderedDict()
        self.granted: dict[Waiter, Entry] = {}
        self.inbox: deque[tuple[str, Any, str]] = deque()
        self.entries: dict[int, Entry] = {}
        self.connecting: dict[int, Entry] = {}
        self.checking: dict[int, Entry] = {}
        self.closing: dict[int, Entry] = {}
        self.samples: deque[float] = deque(maxlen=SAMPLES)
        self.crowded = False  # more connections than the maximum, after a resize
        self.shut = False  # suspended or closed: nothing is handed out
        self.closed = False
        self.refill = 0  # connects that are wanted although nobody waits: replacements
        self.replacing: deque[Entry] = deque()  # who goes when such a connect has succeeded
        self.failures = 0
        self.failing_since = self.failed_at = 0.0
        self.retry_at = 0.0
        self.last_error: BaseException | None = None
        self.connect_estimate = 0.0
        self.use_estimate = 0.0
        self.folded = self.returned = 0
        self.returned_at = 0.0  # when the planning last saw that something had come back
        self.on_samples: Callable[[list[float]], None] | None = None
        self.revisit_wanted = 0.0
        self._serial = 0
        self._needs_ping, self._blind = True, False
        self.configure(options)

    def configure(self, options: PoolOptions) -> None:
        """Take over new sizes and times."""
        self.options = options
        self.max = options.max_connections or float("inf")
        after = options.ping_after
        if after is None or not self._needs_ping:
            after = float("inf")
        elif self._blind:
            after = min(after, UNSEEN)
        self._ping_after = after
        self._pop = self.idle.pop if options.lifo else self.idle.popleft

    def adapt(
        self, condition: Callable[[Any], Any], verdict: Callable[[Any], str], *, needs_ping: bool, blind: bool
    ) -> None:
        """Take over a driver's judgements; known with its first connection, as is whether there is a probe for it."""
        self.condition, self.verdict = condition, verdict
        self._needs_ping, self._blind = needs_ping, blind
        self.configure(self.options)

    # -- the fast path ------------------------------------------------------------------------------------------

    def checkout(self) -> Any:
        """Take an idle connection. Never waits, never locks.

        Returns:
            The connection, or ``None`` when the caller would have to queue.
        """
        if self.waiters or self.shut:  # a newcomer never overtakes
            return None
        while True:
            try:
                entry = self._pop()
            except IndexError:
                return None
            now = self._clock()
            probe = entry.probe
            if now < entry.expires and now - entry.since < self._ping_after and (probe is None or probe(0) <= 0):
                conn = entry.conn  # before it is held: the reaper closes what nobody but the entry refers to
                entry.since = now
                self.held[entry.key] = entry
                return conn
            if self._refuse(entry, now) != CLOSE:
                return None  # one is being pinged for this caller; do not send all the others after it

    def checkin(self, conn: Any) -> Entry | None:
        """Give a connection back. Never waits, never does I/O; safe in a finaliser.

        Returns:
            The entry, or ``None`` when this connection is not in use here (a double return, or not ours).
        """
        entry = self.held.pop(id(conn), None)
        if entry is None:
            return None
        now = self._clock()
        self.samples.append(now - entry.since)
        try:
            state = self.condition(conn)
        except Exception as error:  # noqa: BLE001 - whatever a driver does here, the slot must not be lost
            state = f"unusable: {type(error).__name__}"
        if state or now >= entry.expires or self.crowded:
            self._checkin_slow(entry, state, now)
        else:
            entry.since = now
            self.idle.append(entry)
            if self.waiters or self.shut:
                self.settle()
        return entry

    # -- the slow path ------------------------------------------------------------------------------------------

    def _refuse(self, entry: Entry, now: float) -> str:
        """Send an idle entry that cannot be handed out as it is to be closed or pinged."""
        if entry.generation != self.generation:
            kind, reason = CLOSE, self.generation_reason
        elif now >= entry.expires:
            kind, reason = CLOSE, "expired"
        elif now - entry.since >= self._ping_after:
            kind, reason = CHECK, "idle for long"
        else:
            kind, reason = self.verdict(entry.conn), "closed by the server"
        self.post(kind, entry, reason)
        return kind

    def _checkin_slow(self, entry: Entry, state: Any, now: float) -> None:
        if entry.generation != self.generation:
            self.post(CLOSE, entry, entry.reason or self.generation_reason)
        elif now >= entry.expires:
            self.post(CLOSE, entry, entry.reason or "expired")
        elif state == CLEAN:
            self.post(CLEAN, entry, "a transaction was left open")
        elif state:
            self.post(CLOSE, entry, str(state))
        elif self.crowded:
            self.post(CLOSE, entry, "the pool was made smaller")
        else:
            entry.since = now
            self.idle.append(entry)
            self.settle()

    def post(self, kind: str, subject: Any, reason: str = "") -> None:
        """Leave a message for whoever holds the lock next, and try to be that one."""
        self.inbox.append((kind, subject, reason))
        self.settle()

    def settle(self) -> None:
        """Pair and process what there is. Never blocks: a holder of the lock looks again after letting go."""
        while self.inbox or (self.idle and (self.closed if self.shut else self.waiters)):
            turn = Turn([], [])
            taken: list[bool] = []
            try:
                try:
                    # One call both takes the lock and notes it: no Ctrl-C can come between the two.
                    taken.extend(map(self._lock.acquire, _AT_ONCE))
                    if not taken[0]:
                        return
                    self._advance(turn)
                finally:
                    if taken and taken[0]:
                        self._lock.release()
            finally:
                self._after(turn)

    def locked(self, change: Callable[[Turn], Any]) -> Any:
        """Run ``change(turn)`` under the lock, then everything that follows from it."""
        turn = Turn([], [])
        try:
            with self._lock:
                try:
                    return_value = change(turn)
                finally:
                    self._advance(turn)
        finally:
            self._after(turn)
        self.settle()
        return return_value

    def _advance(self, turn: Turn) -> None:
        """Process messages, pair idle connections with waiters, plan connects. The caller holds the lock."""
        while self.inbox:
            kind, subject, reason = self.inbox.popleft()
            self._message(kind, subject, reason, turn)
        if self.rested and not self.checking:
            self.idle.extend(self.rested)
            self.rested.clear()
        while self.idle and (self.closed if self.shut else self.waiters):
            try:
                entry = self._pop()
            except IndexError:  # a newcomer who had looked before the queue formed
                break
            if self.closed:
                self.retire(entry, "the pool is closed", turn)
                continue
            if self._clock() - entry.since >= max(self._ping_after, JUST_NOW):
                # One ping per waiter: its outcome says what the others are worth.
                if len(self.checking) < len(self.waiters):
                    self._message(CHECK, entry, "idle for long", turn)
                else:
                    self.rested.append(entry)
                continue
            waiter = next(iter(self.waiters))
            self.granted[waiter] = entry
            del self.waiters[waiter]
            turn.wake.append(waiter)
        self._plan(turn)
        self.crowded = self._has_too_many()

    def _has_too_many(self) -> bool:
        return len(self.entries) - len(self.closing) > self.max

    def _message(self, kind: str, subject: Any, reason: str, turn: Turn) -> None:
        if kind == CLOSE:
            self.retire(subject, reason, turn)
        elif kind in (CHECK, CLEAN):
            subject.state, subject.since, subject.reason = CHECKING, self._clock(), reason
            self.checking[subject.id] = subject
            turn.jobs.append(Job(kind, subject))
        else:  # a coroutine was collected while it queued
            self._withdraw(subject)

    def retire(self, entry: Entry, reason: str, turn: Turn) -> None:
        """Send an entry to be closed. The caller holds the lock."""
        if entry.state in (CLOSING, GONE):
            return
        self.checking.pop(entry.id, None)
        entry.state, entry.since, entry.reason = CLOSING, self._clock(), reason
        self.closing[entry.id] = entry
        turn.jobs.append(Job(CLOSE, entry))

    def _after(self, turn: Turn) -> None:
        """Wake and dispatch, outside the lock."""
        try:
            while turn.wake:
                waiter = turn.wake.pop(0)
                try:
                    waiter.wake()
                except RuntimeError:  # its loop is closed: the grant goes to the next one
                    self.post("withdraw", waiter)
            while turn.jobs:
                self._dispatch([turn.jobs.pop(0)])
        finally:
            if turn.wake or turn.jobs:  # an interrupt; the others are woken and the rest is done all the same
                self._after(turn)
        if self.revisit_wanted:
            at, self.revisit_wanted = self.revisit_wanted, 0.0
            self._revisit(at)

    def wake(self, waiter: Waiter) -> None:
        """Wake a waiter once more, in case an interrupt swallowed its wake-up."""
        self._after(Turn([waiter], []))

    # -- waiting ------------------------------------------------------------------------------------------------

    def enqueue(self, waiter: Waiter, *, front: bool = False) -> str | None:
        """Put a waiter into the queue; ``front`` for one that was granted a connection which turned out dead.

        Returns:
            ``None`` when it is queued, else why not: "closed", "full" (the queue is bounded) or "nowait" (it may not
            wait and nothing is on its way).
        """

        def change(_turn: Turn) -> str | None:
            if self.closed:
                return "closed"
            if not front:
                # Whoever may be served at once is no burden on the queue.
                crowd = len(self.waiters) - (0 if self.shut else self._hope())
                if self.options.max_waiting is not None and crowd >= self.options.max_waiting:
                    return "full"
                if waiter.nowait and crowd >= 0:
                    return "nowait"
            self.waiters[waiter] = None
            if front:
                self.waiters.move_to_end(waiter, last=False)
            if self._clock() - self.failed_at > BACKOFF_MIN:
                self.retry_at = 0.0  # a newcomer is reason enough to try at once
            return None

        refusal: str | None = self.locked(change)
        return refusal

    def _hope(self) -> float:
        """How many connections may come without anyone giving one back."""
        coming = len(self.connecting) + len(self.checking) + len(self.closing) + len(self.idle)
        return coming + self.max - len(self.entries)

    def accept(self, waiter: Waiter) -> Any:
        """Take what was granted to a woken waiter.

        Returns:
            The connection; ``None`` when nothing was granted, or what was granted died meanwhile.
        """
        entry = self.granted.pop(waiter, None)
        if entry is None:
            return None
        now = self._clock()
        probe = entry.probe
        if now < entry.expires and (probe is None or probe(0) <= 0):
            conn = entry.conn
            entry.since = now
            self.held[entry.key] = entry
            return conn
        self._refuse(entry, now)
        return None

    def withdraw(self, waiter: Waiter) -> None:
        """Leave the queue; a grant that was not taken goes to the next."""
        self.locked(lambda _turn: self._withdraw(waiter))

    def _withdraw(self, waiter: Waiter) -> None:
        self.waiters.pop(waiter, None)
        entry = self.granted.pop(waiter, None)
        if entry is not None:
            self.idle.append(entry)

    def leave(self, waiter: Waiter) -> bool:
        """Leave the queue because time is up.

        Returns:
            False when it was served at the last moment after all: look again.
        """

        def change(_turn: Turn) -> bool:
            if waiter in self.waiters:
                del self.waiters[waiter]
                return True
            return False

        return bool(self.locked(change))

    def waiting(self, waiter: Waiter) -> bool:
        """Say whether this waiter is still queued or has a grant to take."""
        return waiter in self.waiters or waiter in self.granted

    def fail_waiters(self, make_error: Callable[[], BaseException]) -> None:
        """Turn away everybody who waits."""

        def change(turn: Turn) -> None:
            while self.waiters:
                waiter, _ = self.waiters.popitem(last=False)
                waiter.error = make_error()
                turn.wake.append(waiter)

        self.locked(change)

    def abandon(self, make_error: Callable[[], BaseException]) -> None:
        """Forget what is open without closing it, and turn away everybody: those who were granted something, too."""

        def change(turn: Turn) -> None:
            self.idle.clear()
            self.rested.clear()
            self.held.clear()
            self.closed = self.shut = True
            for waiter in [*self.granted, *self.waiters]:
                waiter.error = make_error()
                turn.wake.append(waiter)
            self.granted.clear()
            self.waiters.clear()

        self.locked(change)

    # -- planning connects --------------------------------------------------------------------------------------

    def _plan(self, turn: Turn) -> None:
        """Start as many connects as are needed now. The caller holds the lock."""
        if self.closed:
            return
        room = min(self.max - len(self.entries), self.options.max_connecting - len(self.connecting))
        if room <= 0:
            return
        now = self._clock()
        wanted = connects_wanted(self, now)
        for _ in range(math.ceil(min(wanted, room))):
            turn.jobs.append(Job(CONNECT, self._new_entry(now)))
            self.refill -= self.refill > 0

    def _new_entry(self, now: float) -> Entry:
        self._serial += 1
        entry = Entry(self._serial, self.generation, now)
        self.entries[entry.id] = self.connecting[entry.id] = entry
        return entry

    # -- what the workers report --------------------------------------------------------------------------------

    def connected(self, entry: Entry, conn: Any, probe: Callable[[int], Any] | None) -> bool:
        """Take a new connection into the pool.

        Returns:
            False when nobody wants it any more (the connect was given up or the pool reset): the caller closes it.
        """

        def change(turn: Turn) -> bool:
            if self.entries.get(entry.id) is not entry:
                return False
            del self.connecting[entry.id]
            now = self._clock()
            took = now - entry.since
            self.connect_estimate += (took - self.connect_estimate) * (0.3 if self.connect_estimate else 1.0)
            self.failures, self.failing_since, self.retry_at, self.last_error = 0, 0.0, 0.0, None
            entry.conn, entry.key, entry.probe, entry.state = conn, id(conn), probe, OPEN
            entry.created = entry.since = now
            lifetime = self.options.stale_timeout
            if lifetime:
                # Renewed somewhere between 70 and 90 % of its life, so that what was opened together never expires
                # together.
                entry.expires = now + lifetime
                entry.renew_at = now + lifetime * random.uniform(0.7, 0.9)  # noqa: S311
            if entry.generation != self.generation or self.closed:
                self.retire(entry, "opened before: " + (self.generation_reason or "the pool is closed"), turn)
            elif len(self.entries) - len(self.connecting) - len(self.closing) > self.max:
                self.retire(entry, "the pool was made smaller", turn)
            else:
                self.idle.append(entry)
                self._replace(now, turn)
            return True

        return bool(self.locked(change))

    def _replace(self, now: float, turn: Turn) -> None:
        """Let the one go for which a replacement has come."""
        if not self.replacing:
            return
        old = self.replacing.popleft()
        if old.state is not OPEN:
            return
        try:
            self.idle.remove(old)
        except ValueError:  # in use: when it comes back
            old.expires, old.reason = now, "renewed"
        else:
            self.retire(old, "renewed", turn)

    def connect_failed(self, entry: Entry, error: BaseException) -> float:
        """Free the slot of a failed connect and decide who hears of it.

        Returns:
            The seconds for which this chain of failures has lasted.
        """

        def change(turn: Turn) -> float:
            if self.entries.get(entry.id) is not entry:
                return 0.0
            self._drop(entry)
            now = self._clock()
            self.last_error = error
            self.failures += 1
            self.failed_at = now
            self.failing_since = self.failing_since or now
            self.retry_at = now + backoff(self.failures)
            self.revisit_wanted = self.retry_at
            waiter = next(iter(self.waiters), None)
            # The head of the queue hears of it if this was its own attempt, not one that began before it came. With
            # connections in use it is better off waiting for one of them, unless it never meant to wait.
            live = len(self.entries) - len(self.connecting) - len(self.closing)
            if (
                waiter is not None
                and entry.created >= waiter.since
                and (waiter.nowait or (self.options.on_connect_error == "raise" and not live))
            ):
                del self.waiters[waiter]
                waiter.error = error
                turn.wake.append(waiter)
            return now - self.failing_since

        return float(self.locked(change))

    def checked(self, entry: Entry, failure: str | None) -> None:
        """Put a pinged or cleaned entry back into use, or close it because of ``failure``."""

        def change(turn: Turn) -> None:
            if self.checking.pop(entry.id, None) is not entry:
                return  # given up meanwhile
            now = self._clock()
            if failure is not None:
                self.retire(entry, failure, turn)
            elif entry.generation != self.generation:
                self.retire(entry, self.generation_reason, turn)
            elif self.closed:
                self.retire(entry, "the pool is closed", turn)
            elif now >= entry.expires:
                self.retire(entry, "expired", turn)
            elif self._has_too_many():
                self.retire(entry, "the pool was made smaller", turn)
            else:
                entry.state, entry.since, entry.reason = OPEN, now, None
                self.idle.append(entry)

        self.locked(change)

    def closed_entry(self, entry: Entry) -> None:
        """Free the slot of a closed connection."""
        self.locked(lambda _turn: self._drop(entry))

    def _drop(self, entry: Entry) -> None:
        entry.state = GONE
        entry.probe = None
        if self.entries.get(entry.id) is entry:
            del self.entries[entry.id]
        for group in (self.connecting, self.checking, self.closing):
            if group.get(entry.id) is entry:
                del group[entry.id]

    # -- sending away -------------------------------------------------------------------------------------------

    def discard(self, conn: Any, reason: str) -> bool:
        """Take a connection back only to close it; as safe as `checkin`. Says whether it was in use."""
        entry = self.held.pop(id(conn), None)
        if entry is None:
            return False
        self.samples.append(self._clock() - entry.since)
        self.post(CLOSE, entry, reason)
        return True

    def retire_one(self, entry: Entry, reason: str) -> list[Job]:
        """Send one entry, which the caller has taken out of ``held``, to be closed; return the jobs for that."""
        mine = Turn([], [])
        self.locked(lambda _turn: self.retire(entry, reason, mine))
        return mine.jobs

    def retire_idle(self, reason: str) -> list[Job]:
        """Send all idle entries to be closed; return the jobs for that."""
        mine = Turn([], [])

        def change(_turn: Turn) -> None:
            self.idle.extend(self.rested)
            self.rested.clear()
            while self.idle:
                try:
                    self.retire(self._pop(), reason, mine)
                except IndexError:  # a checkout was faster
                    break

        self.locked(change)
        return mine.jobs

    def invalidate(self, reason: str) -> list[Job]:
        """Make everything opened so far invalid; return the jobs that close what is idle."""

        def change(_turn: Turn) -> None:
            self.generation += 1
            self.generation_reason = reason
            for entry in self.entries.values():
                entry.expires = EXPIRED  # one comparison on the fast path answers for age and generation

        self.locked(change)
        return self.retire_idle(reason)

    # -- samples ------------------------------------------------------------------------------------------------

    def fold(self) -> None:
        """Sort the use times that have piled up into the histogram.

        Lock-free: every sample is popped by exactly one caller. Not done at a checkin, which should not pay for others.
        """
        batch: list[float] = []
        try:
            for _ in range(len(self.samples)):
                batch.append(self.samples.popleft())  # noqa: PERF401 - what was popped must be kept if one fails
        except IndexError:  # somebody else folds too
            pass
        if batch and self.on_samples is not None:
            self.folded += len(batch)
            self.on_samples(batch)

    def look_at_returns(self, now: float) -> None:
        """Note, for the planning, whether anything has come back lately and how long the latest uses took."""
        returned = self.folded + len(self.samples)
        if returned == self.returned:
            return
        self.returned, self.returned_at = returned, now
        recent = [sample for sample in (self._latest(number) for number in range(1, 9)) if sample is not None]
        if recent:
            mean = sum(recent) / len(recent)
            self.use_estimate += (mean - self.use_estimate) * (0.3 if self.use_estimate else 1.0)

    def _latest(self, number: int) -> float | None:
        try:
            return self.samples[-number]
        except IndexError:
            return None
