"""Cancellation where a block ends: what it rolled back never comes back with a later COMMIT, and nothing after it is lost."""

from __future__ import annotations

import asyncio
import contextlib

import peewee
import pytest

from peewee_frameworks import connection_scope
from tests.aio.conftest import run


def test_a_rollback_that_is_cancelled_while_it_waits_for_its_turn(backend):
    """A sibling of a failed `gather` still runs a statement: the block's ROLLBACK waits for it, and is cancelled there."""
    db = backend.make()

    class Item(db.Model):
        number = peewee.IntegerField()

    async def work():
        async with connection_scope(db):
            await db.acreate_tables([Item])
        async with connection_scope(db):
            siblings = []
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05), db.atomic():
                    await Item.acreate(number=1)
                    siblings.append(asyncio.create_task(db.aexecute_sql(backend.brief)))
                    await asyncio.sleep(0)
                    raise ZeroDivisionError
            await asyncio.gather(*siblings, return_exceptions=True)
            async with db.atomic():
                await Item.acreate(number=2)
        async with connection_scope(db):
            assert [item.number for item in await db.list(Item.select())] == [2]
        await db.close_pool()

    run(work())
