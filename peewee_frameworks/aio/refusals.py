"""What the server answers to connects, for those who wait for a connection.

psycopg's pool connects in tasks of its own, again and again, and tells nobody: whoever waits learns after the whole timeout
that no connection came, and not that the password is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable


class Refused(Exception):
    """No connection can come: nobody holds one, and connecting has just failed."""


class Refusals:
    """Ends the waits for a connection as soon as it is known that none comes."""

    def __init__(self) -> None:
        self.last: str | None = None  # not the error, whose traceback would keep a connection; None after a success
        self._connecting = 0
        self._waits: set[asyncio.Timeout] = set()

    async def watch(self, connecting: Awaitable[Any]) -> Any:
        """Await a connect and note what comes of it."""
        self._connecting += 1
        try:
            conn = await connecting
        except Exception as error:
            self.last = " ".join(str(error).split())  # libpq writes several lines
            raise
        finally:
            self._connecting -= 1
        self.last = None
        return conn

    @contextlib.asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """Wait inside for a connection.

        Raises: `Refused`.
        """
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._waits.add(limit)
                try:
                    yield
                finally:
                    self._waits.discard(limit)
        except TimeoutError:
            if limit.expired():
                raise Refused(self.last) from None
            raise

    def tell(self) -> None:
        """End the waits, if connecting has failed and nobody else connects."""
        if self._connecting or self.last is None:
            return
        now = asyncio.get_running_loop().time()
        while self._waits:
            self._waits.pop().reschedule(now)
