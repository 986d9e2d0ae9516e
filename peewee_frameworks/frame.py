"""One database's connection in one unit of work, and the guard around it.

A frame has one user at a time, and a transaction belongs to the code that inherits it: anyone else gets `ConcurrentUse`.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from .errors import ConcurrentUse, ScopeEnded, ScopeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from .state import State

logger = logging.getLogger("peewee_frameworks")


def executing() -> object:
    """Return what tells this flow of execution from others: the greenlet, or the thread's number."""
    greenlet = sys.modules.get("greenlet")
    return threading.get_ident() if greenlet is None else greenlet.getcurrent()


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs on this thread now, or None: what blocks here would stall it."""
    return asyncio._get_running_loop()


class Lineage:
    """Marks the contexts that come from inside one transaction block.

    `outer` is the mark this context carried before; `below` is the mark of the block around, on the same frame.
    """

    __slots__ = ("below", "closed", "outer")

    def __init__(self, outer: Lineage | None, below: Lineage | None) -> None:
        self.outer = _first_open(outer)  # or a long-lived context would chain every block it ever saw
        self.below = below
        self.closed = False


current_lineage: contextvars.ContextVar[Lineage | None] = contextvars.ContextVar(
    "peewee_frameworks_lineage", default=None
)


def _first_open(mark: Lineage | None) -> Lineage | None:
    while mark is not None and mark.closed:
        mark = mark.outer
    return mark


def _inherits(lineage: Lineage) -> bool:
    mine = current_lineage.get()
    while mine is not None:
        if mine is lineage:
            return True
        mine = mine.outer
    return False


class Pin:
    """An entry in Peewee's stack of contexts that keeps a nested ``with db`` from closing the request's connection."""


_PIN = Pin()

_PRUNE_CURSORS_AT = 16


class Frame:
    """One database's connection in one scope: the record that Peewee's ``_state`` is, with a guard.

    `closed`, `conn`, `ctx`, `transactions`, `commit_callbacks`, `reset` and `set_connection` are Peewee's protocol. A frame
    goes one way, open to final; what a scope lends, several threads and tasks may see, so each statement passes through
    `enter` and `leave`.
    """

    __slots__ = (
        "_depth",
        "_holder",
        "_lock",
        "atomic",
        "closed",
        "commit_callbacks",
        "conn",
        "ctx",
        "cursors",
        "final",
        "label",
        "lineage",
        "on_release",
        "pinned",
        "request_transaction",
        "shared",
        "state",
        "transactions",
    )

    def __init__(self, state: State, label: str, *, shared: bool) -> None:
        self.state = state
        self.label = label
        self.shared = shared
        self.final = False
        self.pinned = False
        self.atomic = False
        self.request_transaction: Any = None
        self.on_release: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._holder: object = None
        self._depth = 0
        self.reset()

    def reset(self) -> None:
        """Forget the connection (Peewee's protocol): whoever calls this has returned or closed it."""
        self.closed = True
        self.conn: Any = None
        self.ctx: list[Any] = [_PIN] if self.pinned else []
        self.transactions: list[Any] = []
        self.commit_callbacks: list[Any] = []
        self.lineage: Lineage | None = None
        self.cursors: list[weakref.ref[Any]] = []

    def set_connection(self, conn: Any) -> None:
        """Take a fresh connection (Peewee's protocol)."""
        self.reset()
        self.conn = conn
        self.closed = False

    # -- the guard ----------------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Become the one user of the connection, or raise `ConcurrentUse` or `ScopeEnded`."""
        if not self.shared:
            return
        if not self._lock.acquire(blocking=False):
            # A query hook or an SQLite function that queries is the same user, not a second one.
            if self._holder != executing():
                raise self._overlap()
            self._depth += 1
            return
        self._holder = executing()
        if self.final or (self.lineage is not None and not _inherits(self.lineage)):
            self._holder = None
            self._lock.release()
            raise self.ended() if self.final else self._intrusion()

    def leave(self) -> None:
        """End what `enter` began; the last user after the scope's end drops the connection."""
        if not self.shared:
            return
        if self._depth:
            self._depth -= 1
            return
        self._holder = None
        self._lock.release()
        if self.final and self.conn is not None:
            self._drop_late()

    def check_lineage(self) -> None:
        """Raise `ConcurrentUse` if a transaction is open that the caller's code does not come from."""
        if self.lineage is not None and not _inherits(self.lineage):
            raise self._intrusion()

    def _overlap(self) -> ConcurrentUse:
        return ConcurrentUse(
            f"{self.state.name}: a second thread or task used the connection of {self.label} while a statement was "
            "running on it. One connection serves one user at a time: run the calls through `await orm.run(...)`, where "
            "they take turns, or open `connection_scope(db)` in each child that wants a connection of its own."
        )

    def _intrusion(self) -> ConcurrentUse:
        return ConcurrentUse(
            f"{self.state.name}: another task or thread of {self.label} has a transaction open on this connection, and "
            "this code was not started from inside it; the statement would become part of somebody else's transaction. "
            "Start the child inside the `atomic()` block, wait for the block to end, or open `connection_scope(db)` here."
        )

    def ended(self) -> ScopeEnded:
        """Make the error for a query that comes after the end."""
        return ScopeEnded(
            f"{self.state.name}: {self.label} has ended and its connection was given back. Query before it ends, or open "
            "`connection_scope(db)` around work that outlives it (a thread, an orphan task)."
        )

    # -- the request's own transaction --------------------------------------------------------------------------------

    def begin_request_transaction(self) -> None:
        """Begin the transaction of an atomic request on the connection that was just made."""
        transaction = self.state.database.transaction()
        transaction.begin_unmarked()
        self.request_transaction = transaction

    def end_request_transaction(self, error: BaseException | None = None) -> None:
        """Commit the atomic request, or roll it back because of `error`; nothing if it never connected.

        Raises: what the COMMIT raises, after rolling back; `ScopeError` if a block inside it is still open.
        """
        transaction, self.request_transaction = self.request_transaction, None
        self.atomic = False
        if transaction is None or self.conn is None:
            return
        with self.state.bound(self):
            if len(self.transactions) > 1 and error is None:
                error = ScopeError(
                    f"{self.state.name}: {self.label} cannot commit: {_describe(self.transactions[1:])} is still open "
                    "inside its transaction. End the block before the response starts (in FastAPI: a dependency with "
                    "scope='function')."
                )
                transaction.__exit__(type(error), error, None)
                raise error
            transaction.__exit__(type(error) if error else None, error, None)

    # -- cursors --------------------------------------------------------------------------------------------------------

    def track(self, cursor: Any) -> None:
        """Remember a cursor that may still hold rows on the server or in SQLite's statement."""
        cursors = self.cursors
        if len(cursors) >= _PRUNE_CURSORS_AT:
            cursors[:] = [ref for ref in cursors if ref() is not None]
        cursors.append(weakref.ref(cursor))

    def has_live_cursor(self) -> bool:
        """Return whether a result is still being read from the connection."""
        return any(ref() is not None for ref in self.cursors)

    # -- giving the connection back ---------------------------------------------------------------------------------------

    def release_early(self) -> bool:
        """Give the connection back if nothing is going on with it; a later query takes one again.

        Returns: whether a connection was given back.
        """
        if self.conn is None or not self.state.database.autoconnect or not self._lock.acquire(blocking=False):
            return False
        try:
            in_use = self.transactions or any(entry is not _PIN for entry in self.ctx) or self.has_live_cursor()
            if self.conn is None or in_use:
                return False
            conn = self._detach()
        finally:
            self._lock.release()
        self.state.give_back(conn)
        self._released()
        return True

    def finish(self) -> Future[None] | None:
        """End for good: roll back what is open, give the connection back. Never raises, never blocks an event loop.

        If somebody is inside a call at this moment, that last user drops the connection when the call returns.

        Returns: a future if the connection is being returned on another thread.
        """
        self.final = True
        pending = None
        if self._lock.acquire(blocking=False):
            try:
                conn, cursors, dirty = self.conn, self.cursors, list(self.transactions)
                self.conn, self.closed, self.cursors = None, True, []
            finally:
                self._lock.release()
            if conn is not None:
                if dirty and dirty != [self.request_transaction]:  # an atomic request that failed needs no warning
                    logger.warning(
                        "%s: %s ended with %s open; rolled back.", self.state.name, self.label, _describe(dirty)
                    )
                live = [cursor for ref in cursors if (cursor := ref()) is not None]
                pending = self.state.give_back(conn, rollback=bool(dirty), cursors=live)
        self._released()
        return pending

    def _detach(self) -> Any:
        conn = self.conn
        self.reset()
        return conn

    def _drop_late(self) -> None:
        if not self._lock.acquire(blocking=False):
            return  # another late user; that one drops it
        try:
            conn, self.conn, self.closed = self.conn, None, True
        finally:
            self._lock.release()
        if conn is not None:
            logger.warning(
                "%s: a statement of %s was still running when it ended; its connection is closed, not reused.",
                self.state.name,
                self.label,
            )
            self.state.drop(conn)

    def _released(self) -> None:
        if self.on_release is not None:
            self.on_release()


def _describe(transactions: list[Any]) -> str:
    outer = type(transactions[0]).__name__.lstrip("_").lower()
    return f"a {outer} block" if len(transactions) == 1 else f"a {outer} block and {len(transactions) - 1} inside it"


class NoRecord:
    """What a reader finds where nobody has connected: closed, and empty lists that nobody shares."""

    __slots__ = ()
    closed = True
    conn: Any = None
    shared = False
    final = False
    lineage: Lineage | None = None
    atomic = False

    @property
    def ctx(self) -> list[Any]:
        """A fresh list each time: what is put into it is nobody else's."""
        return []

    transactions = commit_callbacks = ctx

    def enter(self) -> None:
        """Private to its owner: nothing to guard."""

    leave = check_lineage = enter


NO_RECORD = NoRecord()
