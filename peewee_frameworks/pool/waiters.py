"""Who waits for a connection, and how each kind is woken.

A waiter stands in the engine's queue. Threads and greenlets sleep on a lock of their own, tasks on a future of
their loop; the engine knows neither, it only calls ``wake``. Nothing here is created before somebody has to wait,
so a monkey patch that comes after the import is still honoured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peewee_frameworks.frame import running_loop
from peewee_frameworks.gevent import make_lock

if TYPE_CHECKING:
    import asyncio


FOREVER = 3600.0
"""Seconds after which whoever waits for ever looks again. Never without a limit: under gevent its timer is what keeps the hub
running until the pool has something to give, for that of the upkeep does not."""


class Waiter:
    """One place in the queue.

    ``nowait`` marks a caller who may wait for a connect of its own but for nobody's release. ``error`` is set by
    the engine, before the wake-up, when the place was lost.
    """

    __slots__ = ("__weakref__", "error", "nowait", "since")

    def __init__(self, since: float, *, nowait: bool = False) -> None:
        self.since = since
        self.nowait = nowait
        self.error: BaseException | None = None

    def wake(self) -> None:
        """Let the owner look again; safe from any thread, and more than once."""
        raise NotImplementedError

    def stranded(self) -> bool:
        """Say whether the owner can never look again, because its event loop is closed."""
        return False


class ThreadWaiter(Waiter):
    """A thread or greenlet, asleep on its own lock."""

    __slots__ = ("_lock",)

    def __init__(self, since: float, *, nowait: bool = False) -> None:
        super().__init__(since, nowait=nowait)
        self._lock = make_lock()
        self._lock.acquire()

    def wake(self) -> None:
        """Release the lock; a second wake-up before the first was noticed changes nothing."""
        try:
            self._lock.release()
        except (RuntimeError, ValueError):  # not locked: it has been woken already
            return

    def wait(self, seconds: float | None) -> None:
        """Sleep until woken, at most ``seconds`` (``None``: for ever), or until it is time to look again."""
        if seconds is None:
            seconds = FOREVER
        if seconds > 0:
            self._lock.acquire(timeout=min(seconds, FOREVER))


class TaskWaiter(Waiter):
    """A task, asleep on a future. ``asyncio.wait_for`` is avoided: up to 3.11 it can swallow a cancellation."""

    __slots__ = ("future", "loop")

    def __init__(self, since: float, loop: asyncio.AbstractEventLoop, *, nowait: bool = False) -> None:
        super().__init__(since, nowait=nowait)
        self.loop = loop
        self.future: asyncio.Future[None] = loop.create_future()

    def wake(self) -> None:
        """Resolve the future on its own loop.

        Raises:
            RuntimeError: the loop is closed, the owner will never look.
        """
        if running_loop() is self.loop:
            self.look()
        else:
            self.loop.call_soon_threadsafe(self.look)

    def look(self) -> None:
        """Resolve the future; also the callback of a deadline."""
        if not self.future.done():
            self.future.set_result(None)

    def again(self) -> None:
        """Prepare for another wait after a wake-up that brought nothing."""
        self.future = self.loop.create_future()

    def stranded(self) -> bool:
        """Say whether the loop is closed."""
        return self.loop.is_closed()
