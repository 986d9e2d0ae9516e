"""Cancellation where a block ends: what it rolled back never comes back with a later COMMIT, and nothing after it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import threading
import weakref

import peewee
import pytest

from peewee_frameworks import TransactionLost, connection_scope
from peewee_frameworks.pool import PooledSqliteDatabase, connect
from peewee_frameworks.runtime import Runtime
from peewee_frameworks.scope import Scope, complete, current_scope
from peewee_frameworks.state import install
from tests.aio.conftest import run, until


def items_of(db):
    class Item(db.Model):
        number = peewee.IntegerField()

    return Item


def run_on_table(Item, work):
    """Run `work` on a new table, and close the pool."""
    db = Item._meta.database

    async def whole():
        async with connection_scope(db):
            await db.acreate_tables([Item])
        await work()
        await db.close_pool()

    run(whole())


def test_a_rollback_that_is_cancelled_while_it_waits_for_its_turn(backend):
    """A sibling of a failed `gather` still runs a statement: the block's ROLLBACK waits for it, and is cancelled there."""
    db = backend.make()

    Item = items_of(db)

    async def work():
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

    run_on_table(Item, work)


def test_a_savepoints_rollback_that_is_cancelled_while_it_waits_for_its_turn(backend):
    """Nor may the transaction around it commit what the savepoint was to take back."""
    db = backend.make()

    Item = items_of(db)

    async def work():
        async with connection_scope(db):
            siblings = []
            with pytest.raises(TransactionLost):
                async with db.atomic():
                    await Item.acreate(number=1)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.05), db.atomic():
                            await Item.acreate(number=2)
                            siblings.append(asyncio.create_task(db.aexecute_sql(backend.brief)))
                            await asyncio.sleep(0)
                            raise ZeroDivisionError
                    await Item.acreate(number=3)
            await asyncio.gather(*siblings, return_exceptions=True)
            await Item.acreate(number=4)
        async with connection_scope(db):
            assert [item.number for item in await db.list(Item.select())] == [4]

    run_on_table(Item, work)


def test_the_end_of_a_block_on_a_sync_pool_comes_though_it_is_cancelled(tmp_path):
    """It waits for a statement whose caller is gone, and is cancelled there: what comes after the block is outside it."""
    db = PooledSqliteDatabase(str(tmp_path / "end.db"), max_connections=2)

    Item = items_of(db)

    begun, end = threading.Event(), threading.Event()

    def long():
        begun.set()
        assert end.wait(10)
        Item.create(number=2)

    async def block():
        async with db.atomic():
            await Item.acreate(number=1)
            await db.run(long)

    async def work():
        async with connection_scope(db):
            task = asyncio.create_task(block())
            await asyncio.to_thread(begun.wait, 10)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()  # while the block's end waits for the thread
            with contextlib.suppress(asyncio.CancelledError):
                await task
            end.set()
            await Item.acreate(number=3)
            assert not db._state.frame().transactions
        assert [item.number for item in await db.list(Item.select())] == [3]

    run_on_table(Item, work)


def test_a_block_on_a_sync_pool_whose_begin_is_cancelled_is_over_for_what_follows(tmp_path):
    """BEGIN goes on in its thread and is taken back there: the next statement is neither refused nor rolled back."""
    db = PooledSqliteDatabase(str(tmp_path / "begin.db"), max_connections=2)

    Item = items_of(db)

    begun, end = threading.Event(), threading.Event()

    install(db)

    class Slow(type(db.atomic())):
        def __enter__(self):
            result = super().__enter__()
            begun.set()
            assert end.wait(10)
            return result

    async def block():
        async with Slow(db):
            pytest.fail("it was cancelled")

    async def work():
        async with connection_scope(db):
            task = asyncio.create_task(block())
            await asyncio.to_thread(begun.wait, 10)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            asyncio.get_running_loop().call_soon(end.set)
            await Item.acreate(number=1)
        assert [item.number for item in await db.list(Item.select())] == [1]

    run_on_table(Item, work)


def test_a_sync_and_an_asynchronous_database_of_two_adapters_in_one_request(tmp_path):
    """Each by `orm.run` and `db.run`, in any order: what one keeps with the scope is not the other's."""
    sync = PooledSqliteDatabase(str(tmp_path / "sync.db"), max_connections=2)
    native = connect(f"sqlite+async:///{tmp_path}/native.db")
    first, second = Runtime(sync), Runtime(native)

    async def work(order):
        async with connection_scope(sync, native):
            for runner, db in order:
                assert await runner.run(lambda db=db: db.execute_sql("SELECT 1").fetchone()) == (1,)

    async def main():
        calls = [(first, sync), (second, native), (sync, sync), (native, native)]
        for order in itertools.permutations(calls):
            await work(order)
        await sync.close_pool()
        await native.close_pool()
        first.runner.close()

    run(main())


@pytest.mark.parametrize("scoped", [True, False])
def test_what_goes_on_after_the_rollback_of_the_block_it_was_started_in_commits_nothing(backend, scoped):
    """`gather` lets the others go on when one fails: their next statement would be all that is left of the transaction."""
    db = backend.make()

    Item = items_of(db)

    async def work():
        over = asyncio.Event()

        async def part():
            await Item.acreate(number=1)
            await over.wait()
            with pytest.raises(TransactionLost, match="was rolled back meanwhile"):
                await Item.acreate(number=2)
            with pytest.raises(TransactionLost, match="was rolled back meanwhile"):
                async with db.atomic():
                    await Item.acreate(number=3)
            async with connection_scope(db):
                await Item.acreate(number=4)

        async def fails():
            await db.count(Item.select())
            raise ZeroDivisionError

        parts = []
        async with connection_scope(db) if scoped else contextlib.nullcontext():
            with pytest.raises(ZeroDivisionError):
                async with db.atomic():
                    parts.append(asyncio.ensure_future(part()))
                    await asyncio.gather(*parts, fails())
            over.set()
            await asyncio.gather(*parts)
            # Who opened the block is not concerned, nor is what it starts now.
            await Item.acreate(number=5)
            await asyncio.create_task(Item.acreate(number=6))
            async with db.atomic():
                await asyncio.gather(Item.acreate(number=7))
        async with connection_scope(db):
            assert [item.number for item in await db.list(Item.select().order_by(Item.number))] == [4, 5, 6, 7]

    run_on_table(Item, work)


def test_an_error_of_what_runs_after_the_commit_is_the_error_of_the_block(backend):
    """The rows are stored, and no ROLLBACK that finds nothing to take back hides what was raised."""
    db = backend.make()

    Item = items_of(db)

    def fails():
        raise ZeroDivisionError

    async def work():
        async with connection_scope(db):
            for number in range(2):
                with pytest.raises(ZeroDivisionError):
                    async with db.atomic():
                        await Item.acreate(number=number)
                        db.after_commit(fails)
            assert await db.count(Item.select()) == 2
        with pytest.raises(ZeroDivisionError):
            async with connection_scope(db, transaction=True):
                await Item.acreate(number=2)
                db.after_commit(fails)
        async with connection_scope(db):
            assert await db.count(Item.select()) == 3

    run_on_table(Item, work)


def test_rows_that_somebody_keeps_hold_no_lock_after_their_transaction(backend):
    """On SQLite a connection that is closed with an open cursor goes on holding its locks, until the cursor is gone."""
    db = backend.make()

    Item = items_of(db)

    async def work():
        async with connection_scope(db):
            await Item.insert_many([{"number": number} for number in range(100)]).aexecute()
        kept = []

        async def read():
            async with connection_scope(db), db.atomic():
                await Item.acreate(number=-1)
                rows = db.iterate(Item.select(), 5)
                async for _ in rows:
                    kept.append((rows, rows._cursor, rows._cursor._fetch_many))
                    raise ZeroDivisionError

        async def read_and_be_cancelled():
            async with connection_scope(db), db.atomic():
                await Item.acreate(number=-1)
                rows = db.iterate(Item.select(), 5)
                async for _ in rows:
                    kept.append((rows, rows._cursor, rows._cursor._fetch_many))
                    asyncio.current_task().cancel()
                    await asyncio.sleep(0)

        with pytest.raises(ZeroDivisionError):
            await read()
        await asyncio.wait([asyncio.create_task(read_and_be_cancelled())])
        async with connection_scope(db), asyncio.timeout(3):
            await Item.acreate(number=-2)
            assert await db.count(Item.select().where(Item.number < 0)) == 1

    run_on_table(Item, work)


def test_a_call_that_is_cancelled_before_its_first_query_writes_nothing_in_a_unit_that_is_rolled_back(tmp_path):
    """It goes on in its thread and connects late: without a transaction it would commit each statement by itself."""
    db = PooledSqliteDatabase(str(tmp_path / "late.db"), max_connections=2)

    Item = items_of(db)

    begun, end = threading.Event(), threading.Event()

    def late():
        begun.set()
        assert end.wait(10)
        Item.create(number=1)

    async def work():
        scope = Scope([install(db)], "unit")
        scope.set_atomic()
        scope.enter()
        call = asyncio.create_task(db.run(late))
        await asyncio.to_thread(begun.wait, 10)
        call.cancel()
        await asyncio.wait([call])
        await complete(scope, TimeoutError())
        end.set()
        with contextlib.suppress(peewee.DatabaseError):
            await db.run(lambda: None)  # its turn comes after the other call
        scope.finish()
        scope.exit()
        async with connection_scope(db):
            assert await db.count(Item.select()) == 0

    run_on_table(Item, work)


def test_a_call_that_is_cancelled_while_it_connects_writes_nothing_in_a_unit_that_is_rolled_back(tmp_path):
    """The connection comes after the end of the unit, and with it no statement that commits by itself."""
    db = PooledSqliteDatabase(str(tmp_path / "connect.db"), max_connections=2)

    Item = items_of(db)

    begun, end = threading.Event(), threading.Event()

    async def work():
        acquire = db.pool.acquire

        def slow(*args, **kwargs):
            begun.set()
            assert end.wait(10)
            return acquire(*args, **kwargs)

        async def unit():
            async with connection_scope(db, transaction=True):
                await Item.acreate(number=1)

        db.pool.acquire = slow
        call = asyncio.create_task(unit())
        await asyncio.to_thread(begun.wait, 10)
        call.cancel()
        await asyncio.wait([call])
        del db.pool.acquire
        end.set()
        await until(lambda: db.pool.stats().used == 0)
        async with connection_scope(db):
            assert await db.count(Item.select()) == 0

    run_on_table(Item, work)


def test_an_error_beside_rows_that_are_being_read_is_the_error_of_the_block(backend):
    """The ROLLBACK ends the rows instead of being refused because of them; who reads on is told."""
    db = backend.make()

    Item = items_of(db)

    async def work():
        async with connection_scope(db):
            await Item.insert_many([{"number": number} for number in range(10)]).aexecute()
            for block in (db.atomic, db.transaction):
                with pytest.raises(ZeroDivisionError):
                    async with block():
                        await Item.acreate(number=-1)
                        rows = db.iterate(Item.select(), 3)
                        async for _ in rows:
                            raise ZeroDivisionError
                assert await db.count(Item.select()) == 10
            async with db.atomic():
                await Item.acreate(number=-2)
                with pytest.raises(ZeroDivisionError):
                    async with db.atomic():
                        rows = db.iterate(Item.select(), 3)
                        async for _ in rows:
                            raise ZeroDivisionError
                assert await db.count(Item.select()) == 11
            with pytest.raises(TransactionLost, match="rolled back"):
                async for _ in rows:
                    pass
            assert await db.count(Item.select()) == 11

    run_on_table(Item, work)


def test_whoever_leaves_a_loop_over_rows_of_a_sync_pool_is_where_he_was(tmp_path):
    """Outside any unit of work the rows have a unit of their own, and its end is nobody else's."""
    db = PooledSqliteDatabase(str(tmp_path / "left.db"), max_connections=2, pragmas={"journal_mode": "wal"})

    Item = items_of(db)

    async def work():
        await Item.insert_many([{"number": number} for number in range(10)]).aexecute()
        for _ in range(2):
            async for _ in db.iterate(Item.select(), 3):
                assert current_scope() is None
                break
            assert await db.count(Item.select()) == 10
            await until(lambda: db.pool.stats().used == 0)
            async with db.atomic():
                await Item.update(number=1).aexecute()
        rows = db.iterate(Item.select(), 3)
        async for item in rows:
            await Item.update(number=2).where(Item.id == item.id).aexecute()
            assert len(await db.list(Item.select())) == 10
        assert db.pool.stats().used == 0

    run_on_table(Item, work)


def test_a_kept_error_of_rows_that_were_cancelled_keeps_no_file_locked_on_a_sync_pool(tmp_path):
    """Its traceback keeps what the reader had in hand."""
    db = PooledSqliteDatabase(str(tmp_path / "kept.db"), max_connections=2)

    Item = items_of(db)

    async def work():
        await Item.insert_many([{"number": number} for number in range(10)]).aexecute()
        kept = []

        async def read():
            async with connection_scope(db):
                try:
                    async with db.atomic():
                        await Item.acreate(number=-1)
                        async for _ in db.iterate(Item.select(), 3):
                            asyncio.current_task().cancel()
                except asyncio.CancelledError as error:
                    kept.append(error)
                    raise

        await asyncio.wait([asyncio.create_task(read())])
        await until(lambda: db.pool.stats().used == 0)
        await Item.acreate(number=-2)
        assert await db.count(Item.select()) == 11

    run_on_table(Item, work)


def test_a_block_whose_end_is_cancelled_is_not_kept_by_its_own_error(tmp_path):
    """A cycle would keep all that the block's callers have in hand, until the garbage collector comes."""
    db = PooledSqliteDatabase(str(tmp_path / "cycle.db"), max_connections=2)

    Item = items_of(db)

    class InHand:
        pass

    begun, end = threading.Event(), threading.Event()
    left = []

    def long():
        begun.set()
        assert end.wait(10)

    async def block(leaving):
        in_hand = InHand()
        left.append(weakref.ref(in_hand))
        async with db.atomic():
            sibling = asyncio.create_task(db.run(long))
            await asyncio.to_thread(begun.wait, 10)
            leaving.set()
        await sibling

    async def work():
        async with connection_scope(db):
            leaving = asyncio.Event()
            task = asyncio.create_task(block(leaving))
            await leaving.wait()  # its end waits for the thread
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            del task
            end.set()
            await Item.acreate(number=1)
        await until(lambda: left[0]() is None)

    gc.disable()
    try:
        run_on_table(Item, work)
    finally:
        gc.enable()
