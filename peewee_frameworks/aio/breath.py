"""Many units of work on one loop: a turn of the loop ends before it gets long.

Answers come in together, and each lets a task go on: read its rows, make a model, send the next statement, 0.3 ms of Python.
A hundred of them in one turn are 30 ms in which the loop reads no socket and fires no timer. So whoever wants to send a
statement asks first; when the turn has gone on for long enough, he goes on in one of the next.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time

# Of the thread's processor time, or a machine that is busy with other things would make each turn one statement long.
TURN_SECONDS = 0.002


class Breath:
    """Spreads what wants to go on over the turns of one event loop, first come, first served."""

    __slots__ = ("_began", "_passed", "_waiting")

    def __init__(self) -> None:
        self._began = 0.0  # when this turn's first came by; 0 if nobody has
        self._passed = 0  # how many have gone on in this turn
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()

    def is_due(self) -> bool:
        """Return whether to await `draw` before going on."""
        if not self._began:
            self._begin()
        elif self._waiting or time.thread_time() - self._began > TURN_SECONDS:
            return True
        self._passed += 1
        return False

    async def draw(self) -> None:
        """Go on in one of the next turns."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        finally:
            with contextlib.suppress(ValueError):  # its turn came
                self._waiting.remove(waiter)

    def _begin(self) -> None:
        self._began = time.thread_time()
        self._passed = 0
        asyncio.get_running_loop().call_soon(self._turn_over)

    def _turn_over(self) -> None:
        """Let so many go on as would have had time in the last turn."""
        seconds, passed = time.thread_time() - self._began, max(self._passed, 1)
        self._began = 0.0
        if not self._waiting:
            return
        self._begin()
        places = max(1, min(2 * passed, int(passed * TURN_SECONDS / seconds)))
        while self._waiting and self._passed < places:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self._passed += 1
