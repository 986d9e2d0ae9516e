"""A judge of event loops that says whose fault it is: nothing of this package keeps a loop from its work for 50 ms.

asyncio's debug mode reports a callback that took long, whoever was to blame: a query that the application itself runs on the
loop, a machine that gave the process no processor, threads that had the interpreter. This one times the same callbacks, and
while one takes long it looks every few milliseconds at what the loop's thread is doing. Time counts against us if the thread is
in our code, and either computes there (processor time counts, not the clock's), or stands still in one call while no thread of
the process computes or wants a processor.

It times what runs in asyncio's own loops; uvloop's callbacks are not Python's.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peewee_frameworks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

LIMIT = 0.05
TICK = 0.004

_OURS = str(Path(peewee_frameworks.__file__).parent)
_GUARD = str(Path(_OURS, "guarded.py"))  # what Peewee's own methods become: Peewee's, as far as blame goes
_PACKAGES = sysconfig.get_path("purelib")
_STDLIB = sysconfig.get_path("stdlib")
_DRIVERS = ("pymysql", "psycopg", "psycopg_pool", "aiosqlite", "asyncpg", "aiomysql", "greenlet")


def blame(frame: FrameType | None) -> str | None:
    """Say where in our code a thread is; None if it is not there on our account.

    What the application does on the loop by itself (a query with a sync driver, a ``with db.atomic()``) is its own affair,
    though it goes through our guard.
    """
    place: str | None = None
    query = False
    while frame is not None:
        path = frame.f_code.co_filename
        package = path[len(_PACKAGES) + 1 :].partition("/")[0].removesuffix(".py") if path.startswith(_PACKAGES) else ""
        if path.startswith(_OURS):
            place = place or f"{Path(path).name}:{frame.f_lineno} ({frame.f_code.co_qualname})"
            query = path == _GUARD
        elif package in ("peewee", "playhouse"):
            query = True
        elif package in _DRIVERS or (not package and path.startswith((_STDLIB, "<frozen"))):
            pass
        else:  # a framework, or the application
            return None if query and not package else place
        frame = frame.f_back
    return place


@dataclass
class _Callback:
    """One callback that is running."""

    handle: Any
    start: float
    before: _Clocks | None = None
    step: tuple[Any, int] | None = None
    place: str | None = None
    waited: float = 0.0
    computed: float = 0.0
    places: list[str] = field(default_factory=list)


@dataclass
class _Clocks:
    """What time and processors the process has had."""

    now: float
    process: float  # seconds its threads computed
    thread: float  # of these the loop's thread
    busy: bool  # a thread, the judge's apart, computes or waits for a processor


class Judge:
    """Times all callbacks between `start` and `stop`, of all loops of the process; `guilty` says which were our fault."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.limit = limit
        self.guilty: list[str] = []
        self._running: dict[int, _Callback] = {}
        self._stopped = threading.Event()
        self._witness: threading.Thread | None = None
        self._original: Any = None

    def start(self) -> None:
        """Begin."""
        original = self._original = asyncio.Handle._run
        running = self._running

        def run(handle: Any) -> None:
            thread = threading.get_ident()
            outer = running.get(thread)
            running[thread] = _Callback(handle, time.monotonic())
            try:
                original(handle)
            finally:
                handle = None  # as asyncio's own: the frames of an error keep this one, and the error is the task's
                if outer is None:
                    running.pop(thread, None)
                else:
                    running[thread] = outer

        asyncio.Handle._run = run  # type: ignore[method-assign]
        self._witness = threading.Thread(target=self._watch, name="loop-judge", daemon=True)
        self._witness.start()

    def stop(self) -> None:
        """End."""
        asyncio.Handle._run = self._original  # type: ignore[method-assign]
        self._stopped.set()
        assert self._witness is not None
        self._witness.join(5)

    def _watch(self) -> None:
        while not self._stopped.wait(TICK):
            self._look_around()  # which keeps no frame until the next time, and with it what a test expects to be gone

    def _look_around(self) -> None:
        for thread, callback in list(self._running.items()):
            if time.monotonic() - callback.start > TICK:
                with contextlib.suppress(OSError):  # the thread has ended
                    self._look(thread, callback)

    def _look(self, thread: int, callback: _Callback) -> None:
        frame = sys._current_frames().get(thread)
        if frame is None:
            return
        place, step = blame(frame), (frame, frame.f_lasti)
        if self._running.get(thread) is not callback:
            return  # it had ended when we looked
        clocks = _read_clocks(thread)
        before, callback.before = callback.before, clocks
        was, callback.place = callback.place, place
        still, callback.step = callback.step == step, step
        if before is None or was is None or place is None:
            return
        seconds, computed = clocks.now - before.now, clocks.thread - before.thread
        if computed > seconds / 10:
            callback.computed += computed
        elif still and not clocks.busy and clocks.process - before.process < seconds / 2:
            callback.waited += seconds
        else:
            return
        callback.places.append(place)
        seconds = callback.waited + callback.computed
        if seconds > self.limit - 2 * TICK and len(callback.places) > 2:
            how = "waited" if callback.waited > callback.computed else "computed"
            self.guilty.append(f"{how} for {seconds:.3f} s at {place} in {callback.handle!r}")
            callback.waited = callback.computed = 0.0


def _read_clocks(thread: int) -> _Clocks:
    return _Clocks(
        time.monotonic(), time.process_time(), time.clock_gettime(time.pthread_getcpuclockid(thread)), _is_busy()
    )


def _is_busy() -> bool:
    me = str(threading.get_native_id())
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            if task.name != me and (task / "stat").read_text().rpartition(")")[2].split()[0] == "R":
                return True
    return False


@contextlib.contextmanager
def unblocked(limit: float = LIMIT) -> Iterator[Judge]:
    """Fail (AssertionError) if code of this package keeps a loop for more than `limit` seconds in this block."""
    judge = Judge(limit)
    judge.start()
    try:
        yield judge
    finally:
        judge.stop()
    assert not judge.guilty, "the event loop was blocked:\n" + "\n".join(judge.guilty)
