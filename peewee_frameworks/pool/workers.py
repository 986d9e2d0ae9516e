"""The threads behind all pools: workers that connect, ping, roll back and close, and one maintainer.

Everything starts with the first need and in the kind of thread that ``threading`` offers then, so that under gevent's
patch these are greenlets; in a hub whose process is not patched they are made greenlets, see `gevent.unpatched_hub`.
Nothing here takes a lock: `Workers.submit` and `Maintainer.schedule` may be called by a finaliser that interrupted either
of them. All threads are daemons, nobody joins them.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from peewee_frameworks.forks import watch_forks
from peewee_frameworks.gevent import make_queue, start_thread, unpatched_hub

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Maintained", "Maintainer", "Threads", "Workers", "threads_here"]

logger = logging.getLogger("peewee_frameworks.pool")

IDLE_SECONDS = 5.0  # a worker without work ends after this


class Maintained(Protocol):
    """What the maintainer looks after."""

    def maintain(self) -> float | None:
        """Do what is due; return the seconds until the next call, or ``None`` for never."""


class Workers:
    """Threads that are started when work comes and none is free, and that end when idle.

    The number is bounded by the pools: one piece of work per connection at most.
    """

    def __init__(self, idle_seconds: float = IDLE_SECONDS) -> None:
        self._idle_seconds = idle_seconds
        self._work: queue.SimpleQueue[Callable[[], None]] = make_queue()
        self._free: deque[None] = deque()  # one token per idle worker; taking one obliges the taker to put work
        self._later: deque[Callable[[], None]] = deque()
        self._distributor: deque[None] = deque([None])  # who pops this sees to it that `_later` is worked off

    def submit(self, work: Callable[[], None]) -> None:
        """Run ``work`` in a thread, at once.

        Raises:
            RuntimeError: no thread can be started any more, because the interpreter is shutting down.
        """
        try:
            self._free.pop()
        except IndexError:
            # Not through ``args``: a thread keeps those, and with them the pool, for as long as it lives.
            start_thread(self._run, "peewee-pool-worker")
        self._work.put(work)

    def submit_later(self, work: Callable[[], None]) -> None:
        """Run ``work`` in a thread, soon, at no cost to the caller.

        Starting a thread takes up to a switch interval of the interpreter per thread; for fifty connections that
        come back dirty at once, a worker does it. Raises as `submit` does.
        """
        self._later.append(work)
        token: list[None] = []
        try:
            _take(self._distributor, token)
            self.submit(self._distribute)
            token.clear()  # it is the distributor's now
        except IndexError:
            return
        except RuntimeError:
            self._later.remove(work)
            raise
        finally:
            self._distributor.extend(token)

    def _distribute(self) -> None:
        while True:
            try:
                work = self._later.popleft()
            except IndexError:
                self._distributor.append(None)
                if not self._later:
                    return
                try:  # more came in between: carry on, unless its sender has found a successor
                    self._distributor.pop()
                except IndexError:
                    return
            else:
                try:
                    self.submit(work)
                except RuntimeError:  # the process has no thread left: late is better than never
                    self._do(work)

    @staticmethod
    def _do(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            logger.exception("A background job of a connection pool failed.")

    def _run(self) -> None:
        while True:
            try:
                work = self._work.get(timeout=self._idle_seconds)
            except queue.Empty:
                # A new thread has no token, but another worker may have taken its work, and then has one too many.
                try:
                    self._free.pop()
                except IndexError:  # the token is taken: work is on its way
                    work = self._work.get()
                else:
                    return
            self._do(work)
            del work  # it holds its pool, which may be collected while this thread idles
            self._free.append(None)


class Maintainer:
    """One thread that calls `Maintained.maintain` when it is due. It holds weak references and ends without pools."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[tuple[weakref.ref[Any], float]] = make_queue()
        self._startable: deque[None] = deque([None])  # who pops this runs the thread

    def schedule(self, subject: Maintained, delay: float = 0.0) -> None:
        """Have ``subject`` maintained in ``delay`` seconds, if not earlier anyway."""
        self._messages.put((weakref.ref(subject), time.monotonic() + delay))
        token: list[None] = []
        try:
            _take(self._startable, token)
            start_thread(self._run, "peewee-pool-maintainer")
            token.clear()  # it is the thread's now
        except IndexError:
            return
        except RuntimeError:
            # No thread to be had; the next who has something to schedule tries again. Or the interpreter is shutting
            # down, and nothing is worth maintaining any more.
            logger.debug("The upkeep of the connection pools could not be started.", exc_info=True)
        finally:
            self._startable.extend(token)

    def _run(self) -> None:
        due: dict[int, tuple[weakref.ref[Any], float]] = {}  # by id(): a weak reference to the dead has no hash
        while True:
            self._receive(due)
            now = time.monotonic()
            for key, (ref, _) in [item for item in due.items() if item[1][1] <= now]:
                at = self._maintain(ref)
                if at is None:
                    del due[key]
                else:
                    due[key] = ref, at
            if not due and self._messages.empty():
                self._startable.append(None)
                if self._messages.empty():
                    return
                try:  # a message came in between: carry on, unless its sender has started a successor
                    self._startable.pop()
                except IndexError:
                    return

    def _receive(self, due: dict[int, tuple[weakref.ref[Any], float]]) -> None:
        wait = max(0.0, min(at for _, at in due.values()) - time.monotonic()) if due else 0.0
        try:
            ref, at = self._messages.get(timeout=min(wait, 3600.0))
            while True:
                due[id(ref)] = ref, min(at, due.get(id(ref), (ref, at))[1])
                ref, at = self._messages.get_nowait()
        except queue.Empty:
            return

    @staticmethod
    def _maintain(ref: weakref.ref[Any]) -> float | None:
        subject = ref()
        if subject is None:
            return None
        try:
            delay = subject.maintain()
            return None if delay is None else time.monotonic() + delay
        except (Exception, SystemExit):  # a listener may raise anything
            logger.exception("The upkeep of a connection pool failed; it goes on.")
            return time.monotonic() + 1.0


def _take(tokens: deque[None], taken: list[None]) -> None:
    """Move a token into ``taken`` in one call, so that no Ctrl-C can come between taking and noting it.

    Raises:
        IndexError: there is none.
    """
    taken.extend(map(deque.pop, (tokens,)))


class Threads:
    """The workers and the maintainer that fit the process as it is."""

    def __init__(self) -> None:
        self.workers = Workers()
        self.maintainer = Maintainer()


class _Worlds:
    """The threads, by what ``threading`` was when they were made, or by an unpatched hub."""

    def __init__(self) -> None:
        self.threads: dict[Any, Threads] = {}

    def after_fork(self) -> None:
        """Forget them: they stayed with the parent."""
        self.threads.clear()


_worlds = _Worlds()
watch_forks(_worlds)


def threads_here() -> Threads:
    """Return the threads that fit the caller; others once ``threading`` has been patched, or in an unpatched hub."""
    world = unpatched_hub() or threading.Lock
    found = _worlds.threads.get(world)
    return _worlds.threads.setdefault(world, Threads()) if found is None else found
