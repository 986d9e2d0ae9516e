"""What a unit of work queries: how often and for how long. For the options ``server_timing`` and ``query_budget``.

Peewee's `query_hooks` tell of each query. They are installed only in the databases of an application that asks; and a query
counts for the outermost unit of work that it is part of, the request, whichever thread or task sends it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from .frame import get_frames

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .frame import Frame
    from .scope import Scope
    from .state import State

logger = logging.getLogger("peewee_frameworks.query")

SHOWN = 5
"""Statements that a message names, the most frequent first."""
_LONGEST_SQL = 500
_MOST_STATEMENTS = 1000  # different ones that one unit of work remembers

# Statements that Peewee sends for a block, by some drivers only: nobody has written them.
_CONTROL = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE")


class Tally:
    """The queries of one unit of work."""

    __slots__ = ("_connect", "budget", "count", "seconds", "statements", "told", "told_times", "waited")

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.count = 0
        self.seconds = 0.0
        """Of the queries; a wait for a connection that a query brought about is not in it."""
        self.waited = 0.0
        """Seconds for connections."""
        self.statements: Counter[str] = Counter()
        self.told = self.told_times = False
        self._connect = (0.0, 0.0)

    def query(self, event: Any, now: float) -> None:
        """Add a query that has just ended."""
        started, waited = self._connect
        within = waited and started >= now - event.duration
        self.seconds += max(event.duration - (waited if within else 0.0), 0.0)
        self._connect = (0.0, 0.0)
        if is_control(event.sql):
            return
        self.count += 1
        if self.budget is not None and (len(self.statements) < _MOST_STATEMENTS or event.sql in self.statements):
            self.statements[event.sql] += 1

    def connected(self, start: float, seconds: float) -> None:
        """Add a connect."""
        self.waited += seconds
        self._connect = (start, seconds)

    def server_timing(self) -> str:
        """Return the value of a ``Server-Timing`` header, in milliseconds."""
        noun = "query" if self.count == 1 else "queries"
        return f'db;dur={self.seconds * 1000:.2f};desc="{self.count} {noun}", pool;dur={self.waited * 1000:.2f}'

    def close(self, scope: Scope) -> None:
        """Warn, at the end, if there were more queries than the budget allows."""
        if self.budget is None or self.count <= self.budget or self.told:
            return
        self.told = True
        most = self.statements.most_common(1)
        logger.warning(
            "%s sent %d queries, more than query_budget (%d):\n%s",
            scope.label,
            self.count,
            self.budget,
            listed(self.statements),
            extra={
                "request": scope.label,
                "queries": self.count,
                "budget": self.budget,
                "sql": most[0][0] if most else None,
                "repeated": most[0][1] if most else 0,
            },
        )


def is_control(sql: str) -> bool:
    """Return whether a statement only begins or ends a transaction or savepoint."""
    return sql.upper().startswith(_CONTROL)


def listed(statements: Mapping[str, int], shown: int = SHOWN) -> str:
    """Return a line for each of the most frequent statements; never their parameters."""
    ranked = Counter(statements).most_common()
    lines = [f"  {count} x {_shortened(sql)}" for sql, count in ranked[:shown]]
    if len(ranked) > shown:
        rest = sum(count for _, count in ranked[shown:])
        lines.append(f"  and {rest} of {len(ranked) - shown} other statements")
    return "\n".join(lines)


def _shortened(sql: str) -> str:
    line = " ".join(sql.split())
    return line if len(line) <= _LONGEST_SQL else f"{line[:_LONGEST_SQL]}…"


def count_queries(state: State) -> None:
    """Count the queries of a database from now on, each for the unit of work that it is part of."""
    hooks = state.database.query_hooks
    if _queried not in hooks:
        hooks.append(_queried)
        state.listen(_connected)


def tally_of(scope: Scope) -> Tally:
    """Return the tally of the unit of work that a scope is part of: the outermost scope has it."""
    inner = scope
    while scope.parent is not None and not scope.parent.ended:
        scope = scope.parent
    tally: Tally | None = scope.tally
    if tally is None:
        if not scope.touched:
            scope.touch()
        tally = scope.tally = Tally(_budget_of(inner))
    return tally


def times_of(scope: Scope | None) -> str | None:
    """Return the ``Server-Timing`` of the unit of work that a scope is part of; None if its response has it already."""
    if scope is None:
        return None
    tally = tally_of(scope)
    if tally.told_times:
        return None
    tally.told_times = True
    return tally.server_timing()


def _budget_of(scope: Scope | None) -> int | None:
    budget: int | None = None
    while scope is not None and budget is None:
        budget = getattr(getattr(scope.owner, "options", None), "query_budget", None)
        scope = scope.parent
    return budget


def _queried(event: Any) -> None:
    frames = get_frames()
    if frames is not None and frames.scope is not None:
        tally_of(frames.scope).query(event, time.perf_counter())


def _connected(_frame: Frame, start: float, seconds: float) -> None:
    frames = get_frames()
    if frames is not None and frames.scope is not None:
        tally_of(frames.scope).connected(start, seconds)
