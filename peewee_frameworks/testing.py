"""For the tests of your application: how many queries a piece of it sends, and whether it gives its connections back.

::

    def test_index(client):
        with query_budget(orm, 5):
            client.get("/")

They work with any test framework, as ``with`` and as ``async with``. Queries are counted on the database, whichever thread or
task sends them, so the code under test may run in a server or a test client of this process; in another process it may not.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from .extension import Extension
from .holders import Holder, connections_out, places_of
from .queries import is_control, listed
from .state import install

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType
    from typing import Self

    from .state import State

__all__ = ["QueryCount", "assert_queries", "no_leaks", "query_budget"]

_LISTED = 20


class QueryCount:
    """Counts the queries in its block, and fails if there were too many; made by `query_budget` and `assert_queries`."""

    def __init__(self, database: Any, most: int, *, exactly: bool) -> None:
        self._states = _states_of(database)
        self._most = most
        self._exactly = exactly
        self.statements: Counter[str] = Counter()
        """SQL text → how often it was sent in the block; without parameters."""

    @property
    def count(self) -> int:
        """How many queries were sent in the block so far, those that begin and end transactions aside."""
        return self.statements.total()

    def _queried(self, event: Any) -> None:
        if not is_control(event.sql):
            self.statements[event.sql] += 1

    def __enter__(self) -> Self:
        self.statements.clear()
        for state in self._states:
            state.database.query_hooks.append(self._queried)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for state in self._states:
            state.database.query_hooks.remove(self._queried)
        if exc_type is None and (self.count > self._most or (self._exactly and self.count < self._most)):
            allowed = f"{'exactly' if self._exactly else 'at most'} {self._most}"
            sent = listed(self.statements, _LISTED)
            raise AssertionError(f"{self.count} queries were sent, {allowed} expected:\n{sent or '  (none)'}")

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(exc_type, exc, traceback)


def query_budget(database: Any, most: int) -> QueryCount:
    """Fail with `AssertionError` if the block sends more than `most` queries; the error lists the SQL and how often.

    Args:
        database: a Peewee database, a `Peewee` instance (all its databases), or several of these in a list.
        most: how many are allowed.
    """
    return QueryCount(database, most, exactly=False)


def assert_queries(database: Any, number: int) -> QueryCount:
    """Fail with `AssertionError` unless the block sends exactly `number` queries; see `query_budget`."""
    return QueryCount(database, number, exactly=True)


class no_leaks:  # noqa: N801 - reads as the function it is used as
    """Fail with `AssertionError` if connections that were taken in the block are still in use after it."""

    def __init__(self, database: Any, *, timeout: float = 2.0) -> None:
        """Take what to watch.

        Args:
            database: as for `query_budget`.
            timeout: seconds to wait for connections that are being given back in the background.
        """
        self._states = _states_of(database)
        self._timeout = timeout
        self._before: set[tuple[State, int, float]] = set()

    def _held(self) -> dict[tuple[State, int, float], Any]:
        return {(state, out.number, out.since): out for state in self._states for out in connections_out(state)}

    def _left(self) -> list[Holder]:
        left = {key: out for key, out in self._held().items() if key not in self._before}
        places = places_of([out.use for out in left.values() if out.use is not None])
        found = []
        for (state, number, _), out in left.items():
            place = None if out.use is None else places.get(id(out.use.conn))
            label = None if out.use is None else out.use.frame.label
            owner = None if place is None else place.owner
            found.append(Holder(state.name, number, out.seconds, label, owner, leaked=True, stack=out.stack))
        return found

    def __enter__(self) -> Self:
        self._before = set(self._held())
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        deadline = time.monotonic() + self._timeout
        while exc_type is None and (left := self._left()):
            if time.monotonic() >= deadline:
                raise _leaked(left)
            time.sleep(0.01)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        deadline = time.monotonic() + self._timeout
        while exc_type is None and (left := self._left()):
            if time.monotonic() >= deadline:
                raise _leaked(left)
            await asyncio.sleep(0.01)  # not `time.sleep`: this loop may be what gives them back


def _leaked(left: Iterable[Holder]) -> AssertionError:
    lines = []
    for holder in left:
        who = holder.label or "someone who took it from the pool by hand"
        line = f"{holder.alias}: connection {holder.connection}, for {holder.seconds:.1f} s, by {who}"
        lines += [line + (f" in {holder.owner}" if holder.owner else ""), *([holder.stack] if holder.stack else [])]
    return AssertionError("Connections are still in use:\n" + "\n".join(lines))


def _states_of(database: Any) -> list[State]:
    if isinstance(database, Extension):
        return list(database.runtime.states)
    if isinstance(database, (list, tuple, set)):
        return [state for each in database for state in _states_of(each)]
    return [install(database)]
