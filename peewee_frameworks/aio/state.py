"""The state of an asynchronous database: `peewee_frameworks.state.State`, where returning a connection is a coroutine."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import weakref
from typing import TYPE_CHECKING, Any

from peewee_frameworks.frame import NO_RECORD, Frame, current_lineage, running_loop
from peewee_frameworks.state import State

from . import drivers
from .frame import AsyncFrame, AsyncLineage
from .keeper import PoolKeeper

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("peewee_frameworks.scope")

RETURN_SECONDS = 5.0  # for a ROLLBACK and what a pool does at a return; after that the server is taken for dead


class AsyncState(State):
    """Stands where pwasyncio keeps one record per task, and finds the record of the current scope instead."""

    is_async = True

    def __init__(self, database: Any) -> None:
        super().__init__(database)
        self.tracks_cursors = False
        # The loop holds tasks weakly; whoever closes the pool waits for these.
        self.returning: set[asyncio.Task[None]] = set()
        # Connections whose return has not begun; it never does if the loop's shutdown cancels the task first.
        self.unreturned: set[Any] = set()
        # Connections that were closed and have a thread that is to end.
        self._ending: set[asyncio.Future[Any]] = set()
        self.keeper = PoolKeeper(self)

    def new_frame(self, label: str) -> Frame:
        """Make the record for a scope."""
        return AsyncFrame(self, label)

    def record(self) -> AsyncFrame:
        """Return the record of the current scope or task; made now for a task that has none."""
        frame = self.frame()
        if frame is NO_RECORD:
            frame = self._create_implicit()
        record: AsyncFrame = frame
        return record

    def _implicit_frame(self) -> Any:
        # What comes from inside a transaction block goes on in it, though it be another task (`wait_for` makes one).
        mark = current_lineage.get()
        while mark is not None:
            if (not mark.closed or mark.undone) and isinstance(mark, AsyncLineage) and mark.frame.state is self:
                return mark.frame
            mark = mark.outer
        return super()._implicit_frame()

    def _create_implicit(self) -> AsyncFrame:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError(f"{self.name}: an asynchronous database is used in a task; none is running here.")
        frame = AsyncFrame(self, f"task {task.get_name()!r}, outside any scope")
        key, implicit, orphans = id(task), self._implicit, self.orphans

        def collected(ref: weakref.ref[Any]) -> None:
            entry = implicit.get(key)
            if entry is not None and entry[0] is ref:
                del implicit[key]
                orphans.append(frame)

        implicit[key] = (weakref.ref(task, collected), frame)
        task.add_done_callback(functools.partial(self._task_done, key, frame))
        return frame

    def _task_done(self, key: int, frame: AsyncFrame, _: object) -> None:
        entry = self._implicit.get(key)
        if entry is not None and entry[1] is frame:
            del self._implicit[key]
        frame.finish()

    def adopt(self, previous: Any) -> None:
        """Leave pwasyncio's records to their tasks, which return what they hold when they are done."""

    def reconfigure(self) -> None:
        """Nothing depends on the settings."""

    def forget(self) -> None:
        """Drop every record without touching the connections (`dispose`, after a fork)."""
        super().forget()
        self.forget_returns()

    def forget_returns(self) -> None:
        """Wait for nothing that goes on in a loop which is gone."""
        self.returning.clear()
        self.unreturned.clear()
        self._ending.clear()

    # -- returning connections ----------------------------------------------------------------------------------------

    def is_lost(self, conn: Any) -> bool:
        """Return whether a connection cannot be used any more, as far as this side knows."""
        return conn._pool is not self.database._pool or bool(conn.stale())

    def give_back(self, conn: Any, *, rollback: bool = False, cursors: list[Any] | None = None) -> Any:  # noqa: ARG002
        """Return a connection to its pool in a task of its own, which rolls back what is open. Never raises.

        Returns: a future of the running loop; cancelling it does not stop the return. None if it goes on in another loop.
        """
        return self._spawn(conn, reusable=not cursors)

    def drop(self, conn: Any, done: Callable[[], None] | None = None) -> None:
        """Close a connection for good, at once, and free its place in the pool. Never raises, never waits."""
        home = self.keeper.home
        if home is None or home.is_here():
            self._abandon(conn)
        future = self._spawn(conn, reusable=False)
        if done is not None:
            if future is None:
                done()
            else:
                future.add_done_callback(lambda _: done())

    def _spawn(self, conn: Any, *, reusable: bool) -> Any:
        self.keeper.returns(conn)
        home = self.keeper.home
        loop = running_loop()
        if home is not None and home.is_here() and loop is not None:
            return asyncio.shield(self._start(loop, conn, reusable))
        if home is not None and home.loop is not None:
            with contextlib.suppress(RuntimeError):  # closed this very moment
                home.loop.call_soon_threadsafe(self._start, home.loop, conn, reusable)
                return None
        self._abandon(conn)
        return None

    def _start(self, loop: asyncio.AbstractEventLoop, conn: Any, reusable: bool) -> asyncio.Task[None]:
        # An empty context: what outlives the request must not find its scope.
        work = self._return(conn, reusable=reusable)
        task = loop.create_task(work, name="peewee-return", context=contextvars.Context())
        self.unreturned.add(conn)
        self.returning.add(task)
        task.add_done_callback(self.returning.discard)
        return task

    def _abandon(self, conn: Any) -> None:
        ending = drivers.abandon(conn)
        if ending is not None:
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    async def _return(self, conn: Any, *, reusable: bool) -> None:
        database = self.database
        self.unreturned.discard(conn)
        try:
            if reusable and not conn.stale():
                async with asyncio.timeout(RETURN_SECONDS):
                    await database._release_conn(conn)
                return
        except Exception:
            logger.warning(
                "%s: returning a connection failed; it is closed instead.", self.name, exc_info=True, extra=self._told
            )
        except BaseException:  # the loop is shutting down
            self._abandon(conn)
            raise
        self._abandon(conn)
        try:
            if conn._pool is database._pool:
                async with asyncio.timeout(RETURN_SECONDS):
                    await drivers.free(conn)
        except Exception:
            logger.warning("%s: replacing a closed connection failed.", self.name, exc_info=True, extra=self._told)

    def release_own(self) -> None:
        """Give back what the caller holds, unless it is in the middle of something: who closes a pool uses it no more."""
        frame = self.frame()
        if isinstance(frame, AsyncFrame):
            frame.release_early()

    async def settle(self) -> None:
        """Wait for the connections that are being returned, those that come meanwhile included."""
        while self.returning or self.unreturned or self._ending:
            if self._ending:
                await asyncio.wait(set(self._ending))
            if self.returning:
                await asyncio.wait(set(self.returning))
            for conn in list(self.unreturned):
                await self._return(conn, reusable=True)
