"""What the three async applications have in common."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import peewee

from peewee_frameworks import connection_scope, current_scope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from .work import World

CHILDREN = 5
DEADLINE = 0.1


def deadline(kind: str, seconds: float = DEADLINE) -> Any:
    """Give the context manager of that kind; TimeoutError at its end."""
    return anyio.fail_after(seconds) if kind == "anyio" else asyncio.timeout(seconds)


async def outcome(query: Awaitable[str]) -> str:
    """Give the answer, or the error's name."""
    try:
        return await query
    except peewee.PeeweeException as error:
        return type(error).__name__


class Asynchronous:
    """Units of work for async handlers."""

    def __init__(self, world: World, orm: Any) -> None:
        self.world = world
        self.work = world.work
        self.orm = orm
        self._orphans: set[asyncio.Task[None]] = set()

    # Children

    async def gather(self, kind: str, rid: str) -> list[str]:
        """Query in several tasks at once; their answers or errors in order."""
        if kind == "sibling":
            return await self._sibling(rid)
        database = self.work.db

        async def inline(text: str) -> str:
            await asyncio.sleep(0)
            return await self.work.inline(self.work.value, rid, text)

        async def scoped(text: str) -> str:
            async with connection_scope(database):
                return await self.work.inline(self.work.value, text)

        async def run(text: str) -> str:
            return await self.orm.run(self.work.value, rid, text)

        async def to_thread(text: str) -> str:
            return await asyncio.to_thread(self.work.value, rid, text)

        children = {"inline": inline, "scoped": scoped, "run": run, "to_thread": to_thread}
        name, _, transaction = kind.partition("-")
        calls = [outcome(children[name](f"{rid}-{number}")) for number in range(CHILDREN)]
        if not transaction:
            return await asyncio.gather(*calls)
        async with self.work.atomic():
            await self.work.inline(self.work.write, rid)
            return await asyncio.gather(*calls)

    async def _sibling(self, rid: str) -> list[str]:
        """One task has a transaction open over an await; its sibling queries then, and after it."""
        inside, tried = asyncio.Event(), asyncio.Event()

        async def first() -> str:
            async with self.work.atomic():
                await self.work.inline(self.work.write, rid)
                inside.set()
                await tried.wait()
                return await self.work.inline(self.work.value, rid)

        async def second() -> str:
            await inside.wait()
            try:
                return await self.work.inline(self.work.value, rid)
            finally:
                tried.set()

        answers = await asyncio.gather(outcome(first()), outcome(second()))
        return [*answers, await self.work.inline(self.work.value, rid)]

    # Deadlines

    async def under_deadline(self, kind: str, rid: str, *, transaction: bool) -> str:
        """Call sync code that is slower than the deadline around it; TimeoutError."""
        work = self.work.sleep_in_transaction if transaction else self.work.sleep
        if kind == "run":
            async with asyncio.timeout(DEADLINE):
                return await self.orm.run(work, rid, 0.3)
        if kind == "wait_for":
            return await asyncio.wait_for(asyncio.to_thread(work, rid, 0.3), DEADLINE)
        if kind == "anyio":
            with anyio.fail_after(DEADLINE):
                return await anyio.to_thread.run_sync(work, rid, 0.3)
        async with asyncio.timeout(DEADLINE):
            return await asyncio.to_thread(work, rid, 0.3)

    # Work that outlives the request

    def start_orphan(self, kind: str, rid: str) -> None:
        """Start a task that queries when the gate opens."""
        task = asyncio.create_task(self.orphan(kind, rid))
        self._orphans.add(task)
        task.add_done_callback(self._orphans.discard)

    async def orphan(self, kind: str, rid: str) -> None:
        """Be that task."""
        await self.world.gates.pass_through(rid)
        if kind == "scoped":
            async with connection_scope(self.work.db):
                await self.orm.run(self.world.attempt, rid)
        elif kind == "run":
            await self.orm.run(self.world.attempt, rid)
        else:
            await self.work.inline(self.world.attempt, rid)

    # Streams and websockets

    async def stream(self, kind: str, rid: str) -> AsyncIterator[str]:
        """Do what `World.stream` does, in async code."""
        database = self.work.db
        blocks = {"atomic": database.atomic, "with": lambda: database, "context": lambda: connection_scope(database)}
        async with blocks.get(kind, contextlib.nullcontext)():
            if kind == "atomic":
                await self.orm.run(self.work.write, rid)
            yield await self.orm.run(self.work.value, rid) + "\n"
            await self.world.gates.pass_through(rid)
            yield await self.orm.run(self.work.value, rid) + "\n"
            while kind != "plain":
                yield "x" * 65536

    async def events(self, rid: str) -> AsyncIterator[str]:
        """Give the same as server-sent events, the queries inline."""
        yield f"data: {await self.work.inline(self.work.value, rid)}\n\n"
        await self.world.gates.pass_through(rid)
        yield f"data: {await self.work.inline(self.work.value, rid)}\n\n"

    async def converse(
        self, kind: str, rid: str, messages: AsyncIterator[str], send: Callable[[str], Awaitable[Any]]
    ) -> None:
        """Answer each websocket message from the database; "error" is an error, "atomic" one in a transaction."""
        number = 0
        async for message in messages:
            number += 1
            if kind == "scoped":
                async with self.orm.scope(label=f"message {number}"):
                    answer = await self.orm.run(self._answer, rid, message)
            else:
                answer = await self.orm.run(self._answer, rid, message)
            await send(answer)

    def _answer(self, rid: str, message: str) -> str:
        if message == "error":
            self.work.value(rid)
            raise RuntimeError("asked for")
        if message == "atomic":
            with self.work.db.atomic():
                self.work.write(rid)
                raise RuntimeError("asked for, in a transaction")
        scope = current_scope()
        assert scope is not None
        return f"{self.work.value(rid, message)} in {scope.label}"
