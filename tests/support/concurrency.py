"""Things that happen at the same time, and waiting for things that cannot tell; all of it ends in time."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def run_threads(
    count: int, function: Callable[[int], T], deadline: float = 30.0, *, return_exceptions: bool = False
) -> list[T | Any]:
    """Call `function(0) … function(count - 1)` at once, a thread for each, and give the results in order.

    All threads pass one barrier before the first of them calls. A single exception is raised as it is,
    several as an ExceptionGroup, unless `return_exceptions` puts them among the results. A thread that has
    not ended `deadline` seconds after the start is a TimeoutError; it is a daemon, so that it cannot hold
    the process.
    """
    results: list[Any] = [None] * count
    failures: dict[int, BaseException] = {}
    barrier = threading.Barrier(count)
    end = time.monotonic() + deadline

    def work(index: int) -> None:
        try:
            barrier.wait(max(0.0, end - time.monotonic()))
            results[index] = function(index)
        except BaseException as error:
            failures[index] = results[index] = error

    threads = [threading.Thread(target=work, args=(i,), name=f"run_threads-{i}", daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    stuck = [thread.name for thread in threads if thread.is_alive()]
    if stuck:
        raise TimeoutError(f"{len(stuck)} of {count} threads still run after {deadline} s: {', '.join(stuck)}")
    if failures and not return_exceptions:
        errors = [failures[index] for index in sorted(failures)]
        if len(errors) == 1:
            raise errors[0]
        raise BaseExceptionGroup(f"{len(errors)} of {count} threads failed", errors)
    return results


def eventually(predicate: Callable[[], T], deadline: float = 10.0, message: str = "") -> T:
    """Poll until `predicate` gives something true, and give that; AssertionError after `deadline` seconds.

    Only for what has no event to wait on: another process, a server's list of sessions, the kernel. Inside
    one process wait on an Event, a Condition or a Future.
    """
    end = time.monotonic() + deadline
    pause = 0.002
    while not (value := predicate()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline} s: {message or predicate}; last value {value!r}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
    return value


class Halves:
    """A unit of work that stops between its two statements, so that its caller may be gone when the second comes."""

    def __init__(self, create: Callable[..., object]) -> None:
        """Take what makes a row of the name that it is given."""
        self._create = create
        self.halfway = threading.Event()
        self._go_on, self._done = threading.Event(), threading.Event()

    def __call__(self) -> None:
        """Do it, on a thread."""
        self._create(name="first half")
        self.halfway.set()
        assert self._go_on.wait(10), "nobody let it go on"
        try:
            self._create(name="second half")
        finally:
            self._done.set()

    def go_on(self) -> None:
        """Let the second half come."""
        self._go_on.set()

    async def finish(self) -> None:
        """Let the second half come, and wait for its end."""
        self._go_on.set()
        assert await asyncio.to_thread(self._done.wait, 10), "it did not end"
