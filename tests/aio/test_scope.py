"""One connection per unit of work on asynchronous databases: turns, lineage, ends, and what sync code is told."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import sqlite3
import threading

import asyncpg
import peewee
import pytest
from playhouse.pwasyncio import MissingGreenletBridge

from peewee_frameworks import (
    ConcurrentUse,
    PoolConnectTimeout,
    PoolTimeout,
    ScopeEnded,
    TransactionLost,
    connection_scope,
    current_scope,
)
from peewee_frameworks.http import UNAVAILABLE, problem_for
from tests.aio.conftest import run, until
from tests.support.concurrency import eventually
from tests.support.servers import admin_connection


@pytest.fixture
def db(backend):
    return backend.make()


@pytest.fixture
def Item(db):
    class Item(db.Model):
        number = peewee.IntegerField(unique=True)

    async def create():
        async with connection_scope(db):
            await db.acreate_tables([Item])

    run(create())
    return Item


@pytest.fixture
def play(db):
    """Run a coroutine function in a scope; afterwards every connection is back."""

    def play(work):
        async def main():
            async with connection_scope(db, label="request GET /"):
                result = await work()
            await db._state.settle()
            assert in_use(db) == 0
            await db.close_pool()
            return result

        return run(main())

    return play


def in_use(db):
    pool = db._pool
    if pool is None:
        return 0
    if hasattr(pool, "_used"):  # aiomysql
        return len(pool._used)
    if hasattr(pool, "_holders"):  # asyncpg
        return sum(holder._in_use is not None for holder in pool._holders)
    if hasattr(pool, "_queue"):  # aiosqlite
        return pool._pool_size - pool._queue.qsize()
    return len(db._lent)


async def numbers(db, Item):
    return [row.number for row in await db.list(Item.select().order_by(Item.number))]


def test_gathered_queries_of_one_scope_take_turns_on_one_connection(db, Item, play):
    """Natural asynchronous code, and each gets its own answer."""

    async def work():
        await Item.abulk_create([Item(number=number) for number in range(20)])
        rows = await asyncio.gather(*(Item.aget(Item.number == number) for number in range(20)))
        assert [row.number for row in rows] == list(range(20))
        assert in_use(db) == 1

    play(work)


def test_a_transaction_belongs_to_who_comes_from_inside_it(db, Item, play):
    """A sibling is refused while it is open; a child joins it; afterwards the sibling may go on."""
    begun, done = asyncio.Event(), asyncio.Event()

    async def sibling():
        await begun.wait()
        with pytest.raises(ConcurrentUse, match=r"not started from inside it.*connection_scope\(db\)"):
            await Item.acreate(number=3)
        with pytest.raises(ConcurrentUse):
            async with db.atomic():
                raise AssertionError
        async with connection_scope(db):
            assert await db.count(Item.select()) == 0
        done.set()

    async def work():
        other = asyncio.create_task(sibling())
        with contextlib.suppress(ZeroDivisionError):
            async with db.atomic():
                await Item.acreate(number=1)
                await asyncio.create_task(Item.acreate(number=2))
                begun.set()
                await done.wait()
                assert await numbers(db, Item) == [1, 2]
                raise ZeroDivisionError
        await other
        assert await asyncio.create_task(numbers(db, Item)) == []

    play(work)


def test_a_savepoint_belongs_to_who_comes_from_inside_it(db, Item, play):
    """Two children of one transaction: the second must not slip into the savepoint of the first."""
    begun, done = asyncio.Event(), asyncio.Event()

    async def first():
        async with db.atomic():
            await Item.acreate(number=1)
            begun.set()
            await done.wait()

    async def second():
        await begun.wait()
        with pytest.raises(ConcurrentUse):
            await Item.acreate(number=2)
        done.set()

    async def work():
        async with db.atomic():
            await asyncio.gather(first(), second())
            await Item.acreate(number=3)
        assert await numbers(db, Item) == [1, 3]

    play(work)


def test_savepoints_roll_back_alone(db, Item, play):
    """An inner block that fails takes only its own with it; so does an `IntegrityError` that is caught."""

    async def work():
        async with db.atomic():
            await Item.acreate(number=1)
            with pytest.raises(peewee.IntegrityError):
                async with db.atomic():
                    await Item.acreate(number=2)
                    await Item.acreate(number=1)
            await Item.acreate(number=3)
        assert await numbers(db, Item) == [1, 3]

    play(work)


def test_commit_and_rollback_in_the_middle(db, Item, play):
    """`acommit` and `arollback` begin anew."""

    async def work():
        async with db.atomic() as transaction:
            await Item.acreate(number=1)
            await transaction.acommit()
            await Item.acreate(number=2)
            await transaction.arollback()
            await Item.acreate(number=3)
        assert await numbers(db, Item) == [1, 3]

    play(work)


def test_callbacks_run_after_the_commit_and_not_after_a_rollback(db, Item, play):
    """`after_commit`."""
    seen = []

    async def work():
        async with db.atomic():
            await Item.acreate(number=1)
            await db.run(db.after_commit, lambda: seen.append("committed"))
            assert seen == []
        with contextlib.suppress(ZeroDivisionError):
            async with db.atomic():
                await db.run(db.after_commit, lambda: seen.append("rolled back"))
                raise ZeroDivisionError
        assert seen == ["committed"]

    play(work)


def test_a_cancelled_statement_outside_a_transaction_costs_only_its_connection(db, Item, play, backend):
    """The next statement has another one."""

    async def work():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await db.aexecute_sql(backend.slow)
        assert await db.count(Item.select()) == 0

    play(work)


def asleep(backend):
    """Count the sessions on PostgreSQL that are in the slow statement; one that is preparing it shows its text, too."""
    with contextlib.closing(admin_connection("postgres")) as admin:
        asked = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND wait_event = 'PgSleep'"
        return admin.execute(asked, [backend.place.tag]).fetchone()[0]


@pytest.mark.parametrize("backend", ["asyncpg", "psycopg"], indirect=True)
def test_a_cancelled_statement_ends_in_the_server_too(db, play, backend):
    """Or it would go on there for nobody, with its locks and one of the server's connections."""

    async def work():
        sleeping = asyncio.create_task(db.aexecute_sql(backend.slow))
        await asyncio.to_thread(eventually, lambda: asleep(backend))
        while not sleeping.done():  # again and again, as AnyIO does it for whoever is inside a cancel scope
            sleeping.cancel()
            await asyncio.sleep(0)
        await asyncio.to_thread(eventually, lambda: not asleep(backend), 5)
        assert await db.aexecute_sql("SELECT 1")

    play(work)


@pytest.mark.parametrize("backend", ["asyncpg"], indirect=True)
@pytest.mark.parametrize("gone", ["refuses", "ends the session"])
def test_a_server_that_goes_away_amid_a_cancellation_says_no_more_than_that(db, play, backend, gone, monkeypatch):
    """Nobody waits for what tells it of the cancellation, so nothing of that may end as an error that nobody retrieves."""
    said = []

    async def work():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        sleeping = asyncio.create_task(db.aexecute_sql(backend.slow))
        await asyncio.to_thread(eventually, lambda: asleep(backend))
        told = asyncio.Event()

        async def fail(**_kwargs):
            try:
                if gone == "ends the session":
                    await asyncio.to_thread(backend.place.kill_sessions)
                raise ConnectionRefusedError
            finally:
                told.set()

        with monkeypatch.context() as patch:
            patch.setattr(asyncpg.connect_utils, "_cancel", fail)
            sleeping.cancel()
            await asyncio.wait([sleeping])
            await asyncio.wait_for(told.wait(), 5)
            await until(lambda: not db._state._ending)
        assert await db.aexecute_sql("SELECT 1")

    play(work)
    gc.collect()
    # Up to 0.31 asyncpg leaves a future of its own behind where the request is refused.
    assert [context for context in said if "peewee" in repr(context)] == []


@pytest.mark.parametrize("backend", ["aiomysql", "asyncpg", "psycopg"], indirect=True)
@pytest.mark.parametrize("left", ["closed", "dropped"])
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # psycopg's cursor
def test_rows_of_a_session_that_was_lost_are_peewees_errors_and_the_next_statement_connects(
    db, Item, play, backend, left
):
    """Not the driver's, whichever statement it is that notices."""

    async def work():
        for number in range(300):
            await Item.acreate(number=number)
        rows = db.iterate(Item.select(), buffer_size=10)
        await anext(rows)
        await asyncio.to_thread(backend.place.kill_sessions)
        with contextlib.suppress(peewee.OperationalError, peewee.InterfaceError):
            if left == "closed":
                await rows.aclose()
            del rows
            await db.count(Item.select())
        assert await db.count(Item.select()) == 300

    play(work)


def test_a_cancelled_statement_ends_its_transaction_and_the_scope_goes_on_after_it(db, Item, play, backend):
    """Statements, savepoints and the commit are refused; a new transaction works."""

    async def work():
        with pytest.raises(TransactionLost, match="a statement was cancelled") as lost:
            async with db.atomic():
                await Item.acreate(number=1)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1), db.atomic():
                        await db.aexecute_sql(backend.slow)
                with pytest.raises(TransactionLost):
                    await Item.acreate(number=2)
                with pytest.raises(TransactionLost):
                    async with db.atomic():
                        raise AssertionError
        assert problem_for(lost.value) is None  # the server is well, the application went on
        async with db.atomic():
            await Item.acreate(number=3)
        assert await numbers(db, Item) == [3]

    play(work)


def test_a_cancelled_block_raises_the_cancellation_and_rolls_back(db, Item, play, backend):
    """The timeout around the whole block is what the caller sees."""

    async def work():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), db.atomic():
                await Item.acreate(number=1)
                await db.aexecute_sql(backend.slow)
        assert await numbers(db, Item) == []

    play(work)


def test_a_unit_of_work_that_is_cancelled_at_its_begin_raises_the_cancellation(db, Item, backend):
    """Not an error of ours, which a framework would take for the application's. The next one has a whole connection."""
    acquire, begun = db._pool_acquire, asyncio.Event()
    start = "start" if backend.driver == "asyncpg" else "execute"

    async def stuck(*_args, **_kwargs):
        begun.set()
        await asyncio.Event().wait()

    async def acquire_stuck(pool):
        conn = await acquire(pool)
        if start == "execute":
            conn.execute = stuck
        return conn

    async def unit():
        async with connection_scope(db, transaction=True):
            await Item.acreate(number=1)

    async def main(monkeypatch):
        await db.open_pool()
        db._pool_acquire = acquire_stuck
        if start == "start":
            monkeypatch.setattr("asyncpg.transaction.Transaction.start", stuck)
        task = asyncio.create_task(unit())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        monkeypatch.undo()
        db._pool_acquire = acquire
        await db._state.settle()
        assert in_use(db) == 0
        async with connection_scope(db, transaction=True):
            await Item.acreate(number=2)
        async with connection_scope(db):
            assert await numbers(db, Item) == [2]
        await db.close_pool()

    with pytest.MonkeyPatch.context() as monkeypatch:
        run(main(monkeypatch))


def test_a_connection_that_is_lost_outside_a_transaction_is_replaced(db, Item, play, backend):
    """One statement may fail, if the driver has not heard of it; then all is well."""
    if backend.place.kind == "sqlite":
        pytest.skip("SQLite has no server")

    async def work():
        assert await numbers(db, Item) == []
        await asyncio.to_thread(backend.place.kill_sessions)
        with contextlib.suppress(peewee.PeeweeException):
            await numbers(db, Item)
        async with db.atomic():
            await Item.acreate(number=1)
        assert await numbers(db, Item) == [1]

    play(work)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 20])
def test_a_connection_lost_between_two_messages_of_a_statement_is_known_as_lost(backends, monkeypatch, turns):
    """asyncpg prepares, the server is killed, the loop takes some turns, and only then asyncpg binds: always an answer 503."""
    backend = backends("asyncpg")
    db = backend.make()
    prepare = asyncpg.Connection.prepare

    async def prepare_and_die(self, *args, **kwargs):
        statement = await prepare(self, *args, **kwargs)
        backend.place.kill_sessions()  # the loop hears nothing of it before its next turn
        for _ in range(turns):
            await asyncio.sleep(0)
        return statement

    async def main():
        async with connection_scope(db):
            with monkeypatch.context() as patch:
                patch.setattr(asyncpg.Connection, "prepare", prepare_and_die)
                with pytest.raises(peewee.PeeweeException) as lost:
                    await db.aexecute_sql("SELECT 1")
            assert problem_for(lost.value) is UNAVAILABLE, repr(lost.value)
            assert (await db.aexecute_sql("SELECT 1")).fetchall() == [(1,)]
        await db.close_pool()

    run(main())


def test_a_commit_on_a_lost_connection_is_an_error_and_nothing_was_committed(db, Item, play, backend):
    """Even if nothing was asked of the connection since it was lost."""
    if backend.place.kind == "sqlite":
        pytest.skip("SQLite has no server")

    async def work():
        # asyncpg says InternalError while it reads the server's farewell.
        with pytest.raises(peewee.PeeweeException) as lost:
            async with db.atomic():
                await Item.acreate(number=1)
                await asyncio.to_thread(backend.place.kill_sessions)
        assert problem_for(lost.value) is UNAVAILABLE, lost.value
        assert await numbers(db, Item) == []

    play(work)


def test_a_scope_ends_with_what_is_open_rolled_back_and_says_so(db, Item, caplog):
    """The connection goes back to the pool, clean."""

    async def main():
        async with connection_scope(db, label="request POST /items"):
            await db.atomic().__aenter__()
            await Item.acreate(number=1)
        async with connection_scope(db):
            assert await numbers(db, Item) == []
        assert in_use(db) == 0

    run(main())
    assert "request POST /items ended with a" in caplog.text


def test_an_orphan_gets_an_error_after_the_end(db, Item):
    """It names the request and the remedy, and does not reconnect."""

    async def orphan(ended):
        await ended.wait()
        with pytest.raises(ScopeEnded, match=r"request GET /orphan has ended.*connection_scope\(db\)"):
            await numbers(db, Item)
        async with connection_scope(db):
            return await numbers(db, Item)

    async def main():
        ended = asyncio.Event()
        async with connection_scope(db, label="request GET /orphan"):
            await numbers(db, Item)
            task = asyncio.create_task(orphan(ended))
        ended.set()
        assert await task == []
        assert in_use(db) == 0

    run(main())


def test_a_scope_that_ends_under_a_running_statement_drops_the_connection(db, Item, backend, caplog):
    """Nobody waits for it, and it is not reused."""

    async def main():
        async with connection_scope(db, label="request GET /slow"):
            await numbers(db, Item)
            child = asyncio.create_task(db.aexecute_sql(backend.brief))
            await until(lambda: db._state.frame()._user is child)
        await child
        await db._state.settle()
        async with connection_scope(db):
            assert await numbers(db, Item) == []
        await db._state.settle()
        assert in_use(db) == 0

    run(main())
    assert "closed, not reused" in caplog.text


def test_a_nested_scope_on_an_exhausted_pool_is_told_why(backend):
    """Instead of a deadlock that nobody understands."""
    db = backend.make(size=1, timeout=0.2)

    async def main():
        async with connection_scope(db, label="request GET /outer"):
            await db.aexecute_sql("SELECT 1")
            async with connection_scope(db):
                with pytest.raises(PoolTimeout, match="request GET /outer, holds a connection while it waits"):
                    await db.aexecute_sql("SELECT 1")

    run(main())


def test_an_exhausted_pool_names_the_options_of_its_database(backend):
    """psycopg's pool has names of its own for them."""
    db = backend.make(size=1, timeout=0.2)
    size, timeout = ("max_size", "timeout") if backend.driver == "psycopg" else ("pool_size", "acquire_timeout")

    async def main():
        async with connection_scope(db):
            await db.aexecute_sql("SELECT 1")
            with pytest.raises(
                PoolTimeout, match=rf"waited 0\.2 s \({timeout}\) for one of 1 connections\. Raise {size}, "
            ):
                await asyncio.create_task(query(connection_scope(db)), context=contextvars.Context())

    async def query(scope):
        async with scope:
            await db.aexecute_sql("SELECT 1")

    run(main())


def test_a_locked_file_is_not_called_a_server_that_does_not_answer(backends):
    """A pragma on the first connection waits for the lock."""
    backend = backends("aiosqlite")
    db = backend.make(timeout=0.2)

    async def main():
        with contextlib.closing(sqlite3.connect(backend.place.database, isolation_level=None)) as locker:
            locker.execute("BEGIN EXCLUSIVE")
            async with connection_scope(db):
                with pytest.raises(PoolConnectTimeout, match=r"no connection within 0\.2 s .* has the file locked"):
                    await db.aexecute_sql("SELECT 1")
        db._acquire_timeout = 30  # a busy machine takes longer than that to connect
        async with connection_scope(db):
            await db.aexecute_sql("SELECT 1")
        await db.close_pool()

    run(main())


def test_early_release_keeps_what_is_in_use(db, Item, play):
    """Not in a transaction, not while rows are read, not inside `async with db`."""

    async def work():
        scope = current_scope()
        await Item.abulk_create([Item(number=number) for number in range(3)])
        scope.release_early()
        assert db.is_closed()
        async with db.atomic():
            await Item.acreate(number=7)
            scope.release_early()
            assert not db.is_closed()
        async with contextlib.aclosing(db.iterate(Item.select(), buffer_size=1)) as rows:
            await anext(rows)
            scope.release_early()
            assert not db.is_closed()
        async with db:
            scope.release_early()
            assert not db.is_closed()
        assert db.is_closed()

    play(work)


def test_outside_any_scope_each_task_has_its_own_connection_until_it_ends(db, Item):
    """As on the stock layer."""
    gate = asyncio.Barrier(2)

    async def task():
        await numbers(db, Item)
        await gate.wait()
        assert in_use(db) == 2
        await gate.wait()

    async def main():
        await asyncio.gather(task(), task())
        await db._state.settle()
        assert in_use(db) == 0

    run(main())


def test_outside_any_scope_a_transaction_includes_its_children(db, Item):
    """`wait_for` and `gather` inside `atomic()` are part of it there too."""

    async def main():
        with contextlib.suppress(ZeroDivisionError):
            async with db.atomic():
                await asyncio.wait_for(Item.acreate(number=1), 5)
                await asyncio.gather(Item.acreate(number=2), Item.acreate(number=3))
                raise ZeroDivisionError
        assert await numbers(db, Item) == []

    run(main())


def test_sync_code_is_told_what_to_write(db, Item, play):
    """On the loop, in a thread, and for a lazy foreign key; each with its remedy."""

    async def work():
        with pytest.raises(MissingGreenletBridge, match=r"await Model\.aget"):
            Item.get_or_none(number=1)
        with pytest.raises(MissingGreenletBridge, match=r"afetch"), db.atomic():
            raise AssertionError
        with pytest.raises(MissingGreenletBridge, match=r"Make the endpoint `async def`"):
            await asyncio.to_thread(Item.get_or_none, number=1)
        with pytest.raises(MissingGreenletBridge, match=r"Make the endpoint `async def`"):
            await asyncio.to_thread(db.connect)
        with pytest.raises(MissingGreenletBridge, match=r"Make the endpoint `async def`"):
            await asyncio.to_thread(db.atomic().__enter__)
        assert await numbers(db, Item) == []

    play(work)
    with pytest.raises(MissingGreenletBridge, match=r"`asyncio.run`"):  # a script
        Item.get_or_none(number=1)
    with pytest.raises(MissingGreenletBridge, match=r"`asyncio.run`"), db.atomic():
        raise AssertionError


def test_a_mistake_in_the_call_is_not_its_own_cause(db):
    """Whoever follows the causes of an error comes to an end."""

    async def main():
        db.connect_params["of_no_driver"] = 1
        with pytest.raises(Exception, match="of_no_driver") as caught:
            await db.aconnect()
        seen, error = [], caught.value
        while error is not None:
            assert error not in seen
            seen.append(error)
            error = error.__cause__
        for thread in threading.enumerate():  # aiosqlite's, which has a last word for the loop
            if thread.name.endswith("(_connection_worker_thread)"):
                thread.join(10)

    run(main())


def test_sync_code_runs_under_the_bridge(db, Item, play):
    """Peewee's own sync API, blocks included, through `db.run`."""

    def sync():
        with db.atomic():
            Item.create(number=1)
            with pytest.raises(peewee.IntegrityError), db.atomic():
                Item.create(number=1)
            Item.insert_many([{"number": 2}, {"number": 3}]).execute()
        with db.connection_context():
            Item.update(number=4).where(Item.number == 3).execute()
        with db.manual_commit():
            db.begin()
            Item.create(number=5)
            db.rollback()
        return [row.number for row in Item.select().order_by(Item.number)]

    async def work():
        assert await db.run(sync) == [1, 2, 4]

    play(work)


def test_query_hooks_see_each_statement_once(db, Item, play):
    """As on the stock layer."""
    events = []
    db.query_hooks.append(lambda event: events.append(event.sql))

    async def work():
        await numbers(db, Item)

    play(work)
    assert len(events) == 1


def test_nothing_is_left_in_the_log(db, Item, caplog):
    """A hundred scopes with queries and transactions, many at a time: no warning from anybody, nothing in use."""

    before = set(threading.enumerate())  # another test's pool may live on

    async def request(number):
        async with connection_scope(db, transaction=number % 2 == 0):
            await Item.acreate(number=number)
            await numbers(db, Item)

    async def main():
        for start in range(0, 40, 8):
            await asyncio.gather(*(request(start + number) for number in range(8)))
        assert in_use(db) == 0
        await db.close_pool()

    with caplog.at_level(logging.WARNING):
        run(main(), 30)
    gc.collect()
    assert caplog.records == []
    assert not [one.name for one in set(threading.enumerate()) - before if one.name.startswith("peewee-")]
