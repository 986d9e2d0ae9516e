"""The record of one asynchronous database in one unit of work.

Where a sync frame refuses a second user, this one lets statements take turns: ``gather(User.aget(1), User.aget(2))`` is
natural asynchronous code. An open transaction still belongs to the code that comes from inside it. And a transaction whose
connection was lost, or whose statement was cancelled, is over: nothing may commit after it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import peewee
from playhouse.pwasyncio import await_

from peewee_frameworks.drivers import is_disconnect
from peewee_frameworks.errors import ConcurrentUse, TransactionLost
from peewee_frameworks.frame import Frame, Lineage, current_lineage
from peewee_frameworks.run import Queue

from .bridge import not_in_bridge, under_bridge
from .keeper import wrapping_errors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Future

    from .state import AsyncState

logger = logging.getLogger("peewee_frameworks.scope")

LOST = "the connection was lost"


class AsyncLineage(Lineage):
    """A mark that knows its frame: children of a task outside any scope find the transaction they come from by it."""

    __slots__ = ("frame",)

    def __init__(self, frame: AsyncFrame, outer: Lineage | None, below: Lineage | None) -> None:
        super().__init__(outer, below)
        self.frame = frame


def _nobody() -> None:
    """Stand for rows that nobody reads any more."""


class AsyncFrame(Frame):
    """One asynchronous database's connection in one scope, or in one task outside any scope."""

    __slots__ = ("_spoilt", "_turn", "_user", "_uses", "broken", "stream")

    state: AsyncState

    def __init__(self, state: AsyncState, label: str) -> None:
        self._turn = Queue(1)
        self._user: object = None
        self._uses = 0
        self._spoilt: str | None = None  # why the connection is to be given up when its user is done
        # Why the open transaction cannot go on; a statement after its outermost block finds none open and forgets this.
        self.broken: str | None = None
        # The rows being read with `iterate`, and the cursor they come from.
        self.stream: tuple[Callable[[], Any], Any] | None = None
        super().__init__(state, label)

    def set_connection(self, conn: Any) -> None:
        """Take a fresh connection; the blocks around it (``async with db``) stay."""
        ctx = self.ctx
        self.reset()
        self.ctx, self.conn, self.closed = ctx, conn, False
        self.since = time.monotonic()

    # -- turns --------------------------------------------------------------------------------------------------------

    async def take(self, rows: object = None) -> None:
        """Wait for the connection's next turn; a task that has it may take it again. Each `take` needs its `leave`.

        Args:
            rows: the `iterate` result that asks, which its own open cursor does not keep out.

        Raises: `ScopeEnded`, `ConcurrentUse` (somebody else's transaction, or rows being read), `TransactionLost`.
        """
        me = asyncio.current_task()
        if self._user is not None and self._user is me:
            self._uses += 1
            return
        self._refuse()
        await self._turn.enter()
        self._user, self._uses = me, 1
        try:
            self._refuse()
            self._mend()
            if self.stream is not None and (rows is None or self.stream[0]() is not rows):
                await self._end_stream()
        except BaseException:
            self.leave()
            raise

    def _refuse(self) -> None:
        if self.final:
            raise self.ended()
        self.check_lineage()

    def _mend(self) -> None:
        if self.broken is not None:
            if self.transactions or self.lineage is not None:  # the second while the outermost block commits
                raise self.lost()
            self.broken = None

    def enter(self) -> None:
        """Take the turn from sync code in the bridge."""
        if not under_bridge():
            raise not_in_bridge(self.state.name)
        if self._user is not None and self._user is asyncio.current_task():
            self._uses += 1
            return
        await_(self.take())

    def leave(self) -> None:
        """End what `take` or `enter` began; the last user after the scope's end drops the connection."""
        self._uses -= 1
        if self._uses:
            return
        self._user = None
        self._turn.leave()
        if self._spoilt is not None:
            self.lose(self.conn, self._spoilt)
        if self.final and self.conn is not None:
            conn, self.conn, self.closed = self.conn, None, True
            self._warn_late()
            self.state.drop(conn, done=self._released)

    async def _end_stream(self) -> None:
        assert self.stream is not None  # noqa: S101 - asked by the caller
        rows, cursor = self.stream
        if rows() is not None:
            raise ConcurrentUse(
                f"{self.state.name}: rows of `iterate()` are still being read on the connection of {self.label}. Read them to "
                "the end or close them first (`async with aclosing(db.iterate(query)) as rows:`), or open "
                "`connection_scope(db)` for the other query."
            )
        self.stream = None  # the loop over them was left, and they were dropped
        try:
            with wrapping_errors:
                await self.attempt(self.conn, cursor.aclose())
        except (peewee.DatabaseError, peewee.InterfaceError):
            if self.conn is not None:
                raise  # else it was lost, which is not the fault of what comes next

    def end_rows(self) -> None:
        """Have the next statement, which is a ROLLBACK, end the rows that are being read: they are of what it takes back."""
        if self.stream is not None:
            self.stream = (_nobody, self.stream[1])

    def mark(self) -> Lineage:
        """Refuse, until `unmark`, all code that is not started from here."""
        mark = self.lineage = AsyncLineage(self, current_lineage.get(), self.lineage)
        current_lineage.set(mark)
        return mark

    # -- transactions that cannot go on -------------------------------------------------------------------------------

    async def attempt(self, conn: Any, work: Awaitable[Any]) -> Any:
        """Await what uses the connection; if it breaks the connection or is cancelled, the connection is given up."""
        try:
            return await work
        except BaseException as error:
            if not isinstance(error, Exception):
                self.lose(conn, "a statement was cancelled")
            elif conn.stale() or is_disconnect(error):
                self.lose(conn, LOST)
            raise

    def lose(self, conn: Any, reason: str) -> None:
        """Give the connection up: its state is unknown. An open transaction cannot go on."""
        if conn is None or self.conn is not conn:
            return
        self.conn, self.closed, self.stream, self._spoilt = None, True, None, None
        if self.transactions or self.lineage is not None:
            self.broken = reason
        self.state.drop(conn, done=self._released)

    def spoil(self, reason: str) -> None:
        """Give the connection up, as soon as nobody uses it: nobody ends what is open on it any more."""
        if self._user is None:
            self.lose(self.conn, reason)
        elif self.conn is not None:
            self._spoilt = reason

    def lost(self) -> TransactionLost:
        """Make the error for what comes after the transaction's end."""
        reason = self.broken or LOST
        error = TransactionLost(
            f"{self.state.name}: {reason} inside a transaction of {self.label}. All of the transaction is rolled back and it "
            "cannot go on: leave its block, and run the whole of it again."
        )
        error.disconnected = reason == LOST
        return error

    def assert_whole(self) -> None:
        """Raise `TransactionLost` unless the connection that began the transaction is still there to commit it."""
        if self.broken is None and (self.conn is None or self.state.is_lost(self.conn)):
            if self.conn is not None:
                self.lose(self.conn, LOST)
            self.broken = LOST
        if self.broken is not None:
            raise self.lost()

    def end_request_transaction(self, error: BaseException | None = None) -> None:
        """Commit or roll back as `Frame` does; a lost transaction is an error where it was to be committed."""
        if self.broken is not None and self.request_transaction is not None:
            self.request_transaction, self.atomic = None, False
            self.transactions.clear()
            if error is None:
                raise self.lost()
            return
        super().end_request_transaction(error)

    # -- giving the connection back -----------------------------------------------------------------------------------

    @property
    def in_use(self) -> bool:
        """Whether somebody has the turn."""
        return self._user is not None

    def _is_in_use(self) -> bool:
        return bool(self._user is not None or self.stream is not None or self.is_counted_on)

    def release_early(self) -> bool:
        """Give the connection back if nothing is going on with it; a later query takes one again."""
        if self.conn is None or not self.state.database.autoconnect or self._is_in_use():
            return False
        self.pinned = False
        self._give_back(self._detach())
        return True

    def finish(self) -> Future[None] | None:
        """End for good: give the connection back, which rolls back what is open. Never raises, never waits.

        If a task is inside a statement at this moment, the connection is dropped when that ends.

        Returns: a future of the running loop if the connection is being returned.
        """
        self.final = self.wary = True
        if self._user is not None:
            return None
        conn, stream, dirty = self.conn, self.stream, list(self.transactions)
        self.conn, self.closed, self.stream = None, True, None
        if conn is None:
            self._released()
            return None
        self._warn_open(dirty)
        return self._give_back(conn, rollback=bool(dirty), cursors=[stream] if stream is not None else None)
