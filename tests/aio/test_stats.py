"""What `orm.stats()` tells of asynchronous databases."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from peewee_frameworks import PoolTimeout
from peewee_frameworks.extension import Extension

from .conftest import run, until

if TYPE_CHECKING:
    from .conftest import Backend


def test_held_idle_and_waiting(backend: Backend):
    """One holds the only connection, one waits for it; then it is idle, and the times are known."""
    db = backend.stock(size=1, timeout=10)
    orm = Extension(db)

    async def main() -> Any:
        release = asyncio.Event()
        holds = asyncio.Event()

        async def hold() -> None:
            async with orm.scope():
                await db.aexecute_sql("SELECT 1")
                holds.set()
                await release.wait()

        async def queue() -> None:
            async with orm.scope():
                await db.aexecute_sql("SELECT 1")

        async with asyncio.TaskGroup() as group:
            group.create_task(hold())
            await holds.wait()
            group.create_task(queue())
            await until(lambda: orm.stats()["default"].waiting == 1)
            during = orm.stats()["default"]
            release.set()
        await until(lambda: orm.stats()["default"].idle == 1)
        after = orm.stats()["default"]
        await db.close_pool()
        return during, after, orm.stats()["default"]

    during, after, closed = run(main())
    assert (during.max_connections, during.used, during.idle, during.total) == (1, 1, 0, 1)
    assert (after.used, after.waiting, after.checkouts) == (0, 0, 2)
    assert (after.wait_time.count, after.use_time.count) == (2, 2)
    assert (closed.idle, closed.used, closed.checkouts) == (0, 0, 2)
    assert json.loads(json.dumps(after.as_dict()))["closes"] is None  # nobody counts that there


def test_who_waited_in_vain(backend: Backend):
    db = backend.stock(size=1, timeout=0.2)
    orm = Extension(db)

    async def main() -> Any:
        async with orm.scope():
            await db.aexecute_sql("SELECT 1")
            async with orm.scope():
                with pytest.raises(PoolTimeout):
                    await db.aexecute_sql("SELECT 1")
        await db.close_pool()

    run(main())
    after = orm.stats()["default"]
    assert (after.timeouts, after.waiting, after.refused) == (1, 0, 0)
