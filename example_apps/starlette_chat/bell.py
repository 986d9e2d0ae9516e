"""Rings when somebody has said something, so that listeners need not ask the database all the time."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from .models import orm, said

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# Other processes of the chat ring bells of their own: look at least so often.
LOOK_SECONDS = 1.0


class Bell:
    """What all listeners of one process wait for."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Wake whoever listens."""
        self._rung.set()
        self._rung = asyncio.Event()

    async def wait(self) -> None:
        """Wait for the next ring, or until it is time to look."""
        rung = self._rung
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                await rung.wait()


@contextlib.asynccontextmanager
async def ringing(_: Any) -> AsyncIterator[dict[str, Bell]]:
    """Hang up the bell for the application's life: Starlette puts it into `request.state`."""
    yield {"bell": Bell()}


async def follow(bell: Bell, room: str, after: int) -> AsyncIterator[dict]:
    """Give the messages of a room as they come. While it waits it holds no connection."""
    while True:
        for message in await orm.run(said, room, after):
            after = message["id"]
            yield message
        await bell.wait()
