"""A worker thread that waits for a connection lends its place to another thread.

Frameworks run sync code on a bounded set of threads (AnyIO: 40). When more threads than connections wait in there, the few
requests that *have* a connection find no thread for their next step: a sync dependency's endpoint, a response model's
validation, a teardown. They cannot give their connection back, and everything stands until the waits time out. So whoever
waits says so, and the set grows by one for that long.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class Limiter(Protocol):
    """What bounds the threads; AnyIO's `CapacityLimiter` is one."""

    total_tokens: float


class Lender:
    """Enlarges the set of threads of one event loop while one of them waits; a context manager, used by many at once."""

    __slots__ = ("_limiter", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, limiter: Limiter) -> None:
        self._loop = weakref.ref(loop)  # or what a thread keeps would keep the loop
        self._limiter = limiter

    def __enter__(self) -> None:
        self._change(1)

    def __exit__(self, *exc_info: object) -> None:
        self._change(-1)

    def _change(self, places: int) -> None:
        loop = self._loop()
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and its threads have nothing left to do
                loop.call_soon_threadsafe(self._add, places)

    def _add(self, places: int) -> None:
        self._limiter.total_tokens += places


# Asked for what lends the running thread's place; adapters of frameworks that bound their threads add theirs.
finders: list[Callable[[], Lender | None]] = []


def lending() -> contextlib.AbstractContextManager[Any]:
    """Return a block in which this thread's place is lent to another; around a wait, never around work."""
    for find in finders:
        lender = find()
        if lender is not None:
            return lender
    return contextlib.nullcontext()
