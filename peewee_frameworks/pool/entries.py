"""What the engine is made of: slots, work to do, and what one turn under the lock leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .waiters import Waiter

T = TypeVar("T")

__all__ = ["CHECK", "CLEAN", "CLOSE", "CONNECT", "OPEN", "Entry", "Job", "Turn", "snapshot"]

CONNECT, CHECK, CLEAN, CLOSE = "connect", "check", "clean", "close"
OPEN, CONNECTING, CHECKING, CLOSING, GONE = "open", "connecting", "checking", "closing", "gone"


class Entry:
    """One slot of the pool, from before its connection exists until after it is closed."""

    __slots__ = (
        "conn",
        "created",
        "expires",
        "generation",
        "id",
        "key",
        "probe",
        "reason",
        "renew_at",
        "shared",
        "since",
        "stack",
        "state",
        "suspect",
        "thread",
    )

    def __init__(self, number: int, generation: int, now: float) -> None:
        self.id = number
        self.generation = generation
        self.created = self.since = now  # ``since``: start of whatever it is doing now
        self.expires = self.renew_at = float("inf")
        self.state = CONNECTING
        self.conn: Any = None
        self.key = 0  # id() of the connection, which cannot be reused while the entry refers to it
        self.probe: Callable[[int], Any] | None = None
        self.thread = 0
        self.reason: str | None = None
        self.stack: Any = (
            None  # of its checkout, if that is recorded; or in words, where its holder was when it was suspected
        )
        self.suspect: Any = None  # who holds it, as was reported when it passed the leak threshold
        self.shared = False  # sent away although somebody may be inside a call

    @property
    def leaked(self) -> bool:
        """Whether it was reported for being in use for too long."""
        return self.suspect is not None


class Job(NamedTuple):
    """Work with I/O for somebody outside: ``kind`` is CONNECT, CHECK (ping), CLEAN (roll back) or CLOSE."""

    kind: str
    entry: Entry


def snapshot(collection: Iterable[T]) -> tuple[T, ...]:
    """Copy a container that others change without a lock; a finaliser that runs amid the copy makes it start over."""
    while True:
        try:
            return tuple(collection)
        except RuntimeError:
            continue


class Turn(NamedTuple):
    """What one turn under the lock leaves to be done after it: whom to wake, and which jobs to dispatch."""

    wake: list[Waiter]
    jobs: list[Job]
