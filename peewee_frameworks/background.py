"""Short database work that must not wait for anybody: returning, rolling back, committing.

An event loop must not block on a `ROLLBACK`, and a framework's own thread limiter may be full of callers who wait for the
very connection that is to be returned. So this work has threads of its own. What is submitted here never waits for a
connection, hence every job ends by itself and the jobs cannot starve each other.
"""

from __future__ import annotations

import collections
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from .forks import watch_forks

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_THREADS = 32
IDLE_SECONDS = 5.0


class Background:
    """A few daemon threads, started on demand, that end when idle.

    Not a `ThreadPoolExecutor`: its threads are joined at exit, and a `ROLLBACK` to a server that went deaf would keep the
    process from ending.
    """

    def __init__(self, max_threads: int = MAX_THREADS, idle_seconds: float = IDLE_SECONDS) -> None:
        self._max_threads = max_threads
        self._idle_seconds = idle_seconds
        # Nothing of `threading` before the first job: gevent may patch it between import and use.
        self._made: dict[str, threading.Condition] = {}
        self._jobs: collections.deque[tuple[Callable[[], Any], Future[Any]]] = collections.deque()
        self._threads = 0
        self._idle = 0

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """Run `job` soon on another thread; the future carries its result or exception.

        The future cannot be cancelled: a connection must come back even if whoever waited for that has gone.
        """
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        ready = self._ready()
        with ready:
            self._jobs.append((job, future))
            if self._idle >= len(self._jobs) or self._threads >= self._max_threads:
                ready.notify()
                return future
            self._threads += 1
        try:
            threading.Thread(target=self._work, args=(ready,), name="peewee-background", daemon=True).start()
        except RuntimeError:  # no more threads, or the interpreter is shutting down
            with ready:
                self._threads -= 1
                alone = not self._threads
            if alone:
                self._work_off(ready)
        return future

    def _ready(self) -> threading.Condition:
        try:
            return self._made["ready"]
        except KeyError:
            return self._made.setdefault("ready", threading.Condition(threading.Lock()))

    def _work(self, ready: threading.Condition) -> None:
        while True:
            self._work_off(ready)
            with ready:
                if self._jobs:
                    continue
                self._idle += 1
                try:
                    signalled = ready.wait(self._idle_seconds)
                finally:
                    self._idle -= 1
                if not signalled and not self._jobs:
                    self._threads -= 1
                    return

    def _work_off(self, ready: threading.Condition) -> None:
        # A function of its own: when it returns, the idle thread keeps no job, and so no connection, alive.
        while True:
            with ready:
                if not self._jobs:
                    return
                job, future = self._jobs.popleft()
            try:
                result = job()
            except BaseException as error:  # noqa: BLE001 - it travels to whoever holds the future
                future.set_exception(error)
            else:
                future.set_result(result)

    def after_fork(self) -> None:
        """Start anew in a forked child, where none of the threads exist."""
        self.__init__(self._max_threads, self._idle_seconds)  # type: ignore[misc]


background = Background()
watch_forks(background)
