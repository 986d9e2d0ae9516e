"""Peewee's greenlet bridge: sync code of Peewee's that waits for coroutines."""

from __future__ import annotations

import threading

from greenlet import getcurrent
from playhouse.pwasyncio import MissingGreenletBridge

from peewee_frameworks.errors import PeeweeFrameworksError
from peewee_frameworks.frame import running_loop

_SHOWN = 80  # characters of a statement


class AsyncDatabaseInSyncCode(PeeweeFrameworksError, MissingGreenletBridge):
    """Sync code queried an asynchronous database outside `db.run`."""


def under_bridge() -> bool:
    """Return whether the caller is sync code that may wait for a coroutine."""
    return getcurrent().parent is not None and running_loop() is not None


def not_in_bridge(name: str, sql: str | None = None) -> AsyncDatabaseInSyncCode:
    """Make the error that says what to write instead."""
    what = f" ({sql[:_SHOWN]}{'…' * (len(sql) > _SHOWN)})" if sql else ""
    if running_loop() is not None:
        remedy = (
            "Write `await query.aexecute()`, `await Model.aget(...)`, `await db.list(query)`, or `await db.run(function)` for "
            "sync code that queries; `await row.afetch(Model.field)` for a foreign key that is loaded lazily."
        )
    elif threading.current_thread() is threading.main_thread():
        remedy = (
            "No event loop runs here. In a script write `async with connection_scope(db): await db.run(function)` in a "
            "coroutine and start that with `asyncio.run`; or give the models a sync database."
        )
    else:
        remedy = (
            "This is a thread: a sync endpoint, `to_thread`, or `orm.run` of an application that has a sync database too. Make "
            "the endpoint `async def` and write `await db.run(function)` or `await Model.aget(...)` in it; or give the models "
            "of sync endpoints a sync database."
        )
    return AsyncDatabaseInSyncCode(f"{name} is an asynchronous database, and sync code queried it{what}. {remedy}")
