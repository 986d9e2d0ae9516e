"""Which event loop a pool belongs to.

Sockets, locks and maintenance tasks belong to the loop that made them; used from another they hang without a word. The id of
a loop is no guard, since a new loop often gets the id of the last one: twenty `asyncio.run` calls gave one id.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref


class Home:
    """The event loop and the process in which a pool was opened."""

    __slots__ = ("_loop", "name", "pid")

    def __init__(self) -> None:
        """Take the running loop.

        Raises: RuntimeError if none runs.
        """
        loop = asyncio.get_running_loop()
        self._loop = weakref.ref(loop)
        self.pid = os.getpid()
        self.name = name_of(loop)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop, or None once it is closed or gone."""
        loop = self._loop()
        return None if loop is None or loop.is_closed() else loop

    def is_here(self) -> bool:
        """Return whether the caller runs in this loop, in this process."""
        loop = asyncio._get_running_loop()
        return loop is not None and loop is self._loop() and self.pid == os.getpid()


def name_of(loop: asyncio.AbstractEventLoop) -> str:
    """Name a running loop in a message."""
    return f"{type(loop).__name__} {id(loop):#x} of thread {threading.current_thread().name!r}"
