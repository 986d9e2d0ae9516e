"""What the scope and its guard cost per query, as a ratio to Peewee's own thread-local in the same run.

In-memory SQLite, so that the query is as short as one can be; a server's round trip hides all of it. Blocks of ours and
of stock take turns, each measured in CPU time of the thread, so that a busy machine disturbs neither.

``python -m benchmarks.bench_scope`` runs these rows alone.
"""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import peewee
from playhouse.pool import PooledSqliteDatabase

from peewee_frameworks import connection_scope
from peewee_frameworks.state import install

from .harness import Row, main

if TYPE_CHECKING:
    from collections.abc import Callable

OURS = "peewee_frameworks"
BLOCKS = 120
QUERIES = 60


def model() -> Any:
    """A model with one row, on an in-memory database with one connection."""
    database = PooledSqliteDatabase(":memory:", max_connections=1, check_same_thread=False)

    class User(peewee.Model):
        name = peewee.CharField()
        age = peewee.IntegerField(default=30)

        class Meta:
            pass

    User.bind(database)
    with database.connection_context():
        database.create_tables([User])
        User.create(name="a")
    return User


def get_by_id(user: Any) -> Callable[[], Any]:
    return functools.partial(user.get_by_id, 1)


def select_1(user: Any) -> Callable[[], Any]:
    execute = user._meta.database.execute_sql
    return lambda: execute("SELECT 1").fetchone()


def atomic_get(user: Any) -> Callable[[], Any]:
    database = user._meta.database

    def work() -> None:
        with database.atomic():
            user.get_by_id(1)

    return work


def ratio(make: Callable[[Any], Callable[[], Any]], *, guarded: bool) -> dict[str, float]:
    """Measure one model against a stock one; if not ``guarded``, both are stock: what the measurement itself is worth."""
    stock, other = model(), model()
    database = other._meta.database
    stock._meta.database.connect()
    if guarded:
        install(database)
        with connection_scope(database):
            return compare(make(stock), make(other))
    database.connect()
    return compare(make(stock), make(other))


def compare(stock: Callable[[], Any], ours: Callable[[], Any]) -> dict[str, float]:
    def block(work: Callable[[], Any]) -> float:
        start = time.thread_time_ns()
        for _ in range(QUERIES):
            work()
        return (time.thread_time_ns() - start) / QUERIES

    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            block(stock)
            block(ours)
        pairs = []
        for index in range(BLOCKS):
            if index % 2:
                first = block(stock)
                pairs.append((first, block(ours)))
            else:
                second = block(ours)
                pairs.append((block(stock), second))
    finally:
        gc.enable()
    return {
        "value": statistics.median(second / first for first, second in pairs),
        "stock µs": statistics.median(first for first, _ in pairs) / 1000,
        "ours µs": statistics.median(second for _, second in pairs) / 1000,
    }


def row(name: str, question: str, make: Callable[[Any], Callable[[], Any]], most: float | None) -> Row:
    return Row(
        name,
        question,
        "",
        "1: nothing is free",
        {OURS: lambda: ratio(make, guarded=True), "stock against stock": lambda: ratio(make, guarded=False)},
        "" if most is None else f"<= {most}",
        None if most is None else lambda ours, _: ours <= most,
        repeats=5,
    )


ROWS = [
    row("scope-get", "get_by_id in a scope / with Peewee's thread-local", get_by_id, 1.03),
    row("scope-atomic", "the same inside atomic()", atomic_get, None),
    row("scope-select-1", "the worst case: SELECT 1 without a model", select_1, None),
]


if __name__ == "__main__":
    sys.exit(main(["--only", "scope-", *sys.argv[1:]]))
