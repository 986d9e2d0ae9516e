"""A judge of event loops: a callback that keeps the loop from its work fails the test."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ASYNCIO = pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio")
UVLOOP = pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop")

both_loops = pytest.mark.parametrize("anyio_backend", [ASYNCIO, UVLOOP])
"""Run an anyio test on asyncio's own loop and on uvloop."""

WITNESS_SECONDS = 0.005


class Witness(threading.Thread):
    """A thread that only wakes up every few milliseconds and notes how late it was.

    What made the witness late (a busy machine, a process that is not scheduled) made the callback late too,
    and is no fault of the callback. A callback that waits in a call or computes in Python does not delay the
    witness.
    """

    def __init__(self) -> None:
        super().__init__(name="loop-witness", daemon=True)
        self._stop_event = threading.Event()
        self._late: deque[tuple[float, float]] = deque(maxlen=20_000)

    def run(self) -> None:
        before = time.monotonic()
        while not self._stop_event.wait(WITNESS_SECONDS):
            now = time.monotonic()
            self._late.append((now, now - before - WITNESS_SECONDS))
            before = now

    def excuse(self, start: float, end: float) -> float:
        """Give the seconds for which the process itself stood still in this window."""
        # Scheduling noise of a millisecond or two is always there; it explains nothing.
        return sum(late for moment, late in list(self._late) if start <= moment <= end + 0.1 and late > 0.002)

    def stop(self) -> None:
        self._stop_event.set()
        self.join(5)


class SlowCallbacks(logging.Handler):
    """Collect what the loop's debug mode says about slow callbacks, less what the witness excuses."""

    def __init__(self, limit: float, witness: Witness) -> None:
        super().__init__(logging.WARNING)
        self.limit = limit
        self.witness = witness
        self.slow: list[tuple[float, float, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("Executing") and isinstance(record.args, tuple):
            now = time.monotonic()
            seconds = float(str(record.args[1]))
            self.slow.append((now - seconds, now, record.getMessage()))

    def guilty(self) -> list[str]:
        return [
            message for start, end, message in self.slow if end - start - self.witness.excuse(start, end) > self.limit
        ]


@contextmanager
def responsive_loop(limit: float = 0.05) -> Iterator[None]:
    """Fail (AssertionError) if a callback of the running loop takes more than `limit` seconds in this block.

    For use in a coroutine. The step of the coroutine that leaves the block is judged only up to the loop's
    report, so await once (`asyncio.sleep(0)`) between suspicious code and the end of the block.
    """
    loop = asyncio.get_running_loop()
    witness = Witness()
    handler = SlowCallbacks(limit, witness)
    logger = logging.getLogger("asyncio")
    before = loop.get_debug(), loop.slow_callback_duration, logger.level
    loop.set_debug(True)
    loop.slow_callback_duration = limit
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    witness.start()
    try:
        yield
    finally:
        logger.removeHandler(handler)
        debug, loop.slow_callback_duration, level = before
        loop.set_debug(debug)
        logger.setLevel(level)
        witness.stop()
    guilty = handler.guilty()
    assert not guilty, "the event loop was blocked:\n" + "\n".join(guilty)
