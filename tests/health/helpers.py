"""What the health tests share: our pools on a place, and the status of one application."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peewee_frameworks.extension import Extension
from peewee_frameworks.health import Health
from peewee_frameworks.pool import PooledMySQLDatabase, PooledPostgresqlDatabase, PooledSqliteDatabase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.databases import Place

POOLED = {"sqlite": PooledSqliteDatabase, "mysql": PooledMySQLDatabase, "postgres": PooledPostgresqlDatabase}
TOKEN = "open-sesame"
QUERYING = "open-sesame-and-query"
"""Lets in, too, and the guard of the served applications queries for it."""
PATIENCE = 15.0
"""Seconds for what takes none on a machine that has time."""


def make_database(place: Place, ours: bool = True, **options: Any) -> Any:
    """Make a pooled database on a place: ours, or playhouse's."""
    if not ours:
        return place.make_database(**options)
    return POOLED[place.kind](place.database, **{"max_connections": 2, "timeout": 10, **place.kwargs, **options})


@contextmanager
def health_of(database: Any, timeout: float = 10.0) -> Iterator[Health]:
    """Give the health of an application that has one database; patient, unless a test wants a timeout."""
    orm = Extension(database, check="off")
    orm.runtime.start()
    try:
        yield Health(orm, timeout)
    finally:
        orm.runtime.stop()
        database.close_all()


@contextmanager
def all_held(database: Any, count: int) -> Iterator[None]:
    """Keep so many connections in use meanwhile, each in a thread."""
    gate, held = threading.Event(), threading.Semaphore(0)

    def hold() -> None:
        with database.connection_context():
            held.release()
            gate.wait(PATIENCE * 4)

    threads = [threading.Thread(target=hold, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert held.acquire(timeout=PATIENCE)
    try:
        yield
    finally:
        gate.set()
        for thread in threads:
            thread.join(PATIENCE)
