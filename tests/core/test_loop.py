"""Nothing blocks an event loop: connecting is refused instead of waiting, giving back goes on elsewhere."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading

import peewee
import pytest
from playhouse.pool import MaxConnectionsExceeded

from peewee_frameworks import ConcurrentUse, ScopeEnded, WouldBlock, connection_scope
from peewee_frameworks.extension import Extension
from peewee_frameworks.pool import PooledSqliteDatabase
from peewee_frameworks.scope import Scope
from peewee_frameworks.state import install
from tests.core.conftest import in_use, make_note
from tests.core.helpers import DEADLINE, Gate, SlowStatement
from tests.support.concurrency import eventually
from tests.support.loops import responsive_loop


def test_waiting_for_a_connection_on_the_loop_is_refused_at_once(make_sqlite):
    """An exhausted pool raises WouldBlock, which names the remedy, instead of stalling the loop for its timeout."""
    database = make_sqlite(max_connections=1, timeout=30)

    async def main():
        async with connection_scope(database):
            database.connection()

            async def other():
                async with connection_scope(database):
                    with pytest.raises(WouldBlock, match=r"orm\.run"):
                        database.connection()
                    with pytest.raises(MaxConnectionsExceeded):
                        database.connection()
                    assert database.is_closed()

            async with asyncio.timeout(10):
                await asyncio.create_task(other(), context=contextvars.Context())

    asyncio.run(main())


def test_a_clean_connection_is_given_back_without_leaving_the_loop(db, note):
    """What needs no I/O is done at once: after a sync scope on the loop the connection is in the pool."""

    async def main():
        for _ in range(3):
            with connection_scope(db):
                assert note.select().count() == 0
            assert in_use(db) == 0

    asyncio.run(main())


class Watched:
    """Notes which threads a connection's methods run on, and lets one of them take its time."""

    def __init__(self, database, monkeypatch, method, gate=None):
        self.threads = []
        original = getattr(type(database), method)
        watched = self

        def call(this, *args, **kwargs):
            if this is database:
                watched.threads.append(threading.current_thread())
                if gate is not None:
                    gate()
            return original(this, *args, **kwargs)

        monkeypatch.setattr(type(database), method, call)


@pytest.mark.parametrize("way", ["finish", "close"])
def test_a_return_that_needs_io_goes_on_elsewhere(make_sqlite, monkeypatch, way):
    """A rollback, or closing an unpooled connection, never runs on the loop's thread."""
    database = make_sqlite()
    note = make_note(database)
    gate = Gate()
    watched = Watched(database, monkeypatch, "_close", gate)

    async def main():
        with responsive_loop():
            scope = Scope([install(database)], "test")
            scope.enter()
            note.create(text="a")
            database.begin()
            if way == "close":
                assert database.close()
            pending = scope.finish()
            scope.exit()
            assert len(pending) == (way == "finish")
            assert in_use(database) == 1
            await asyncio.sleep(0)
            gate.open()
            if pending:
                await asyncio.wrap_future(pending[0])

    asyncio.run(main())
    eventually(lambda: in_use(database) == 0)
    assert threading.current_thread() not in watched.threads


def test_a_result_left_half_read_on_the_loop_is_closed(lite):
    """The connection goes back without a statement that still reads."""

    async def main():
        async with connection_scope(lite):
            conn = lite.connection()
            cursor = lite.execute_sql("select 1 union select 2")
        with pytest.raises(peewee.sqlite3.ProgrammingError):
            cursor.fetchone()
        async with connection_scope(lite):
            assert lite.connection() is conn

    asyncio.run(main())


def test_playhouses_lock_is_not_waited_for(make_sqlite):
    """While another thread holds the pool's lock, as playhouse does when it connects, the return goes on elsewhere."""
    database = make_sqlite()
    held, let_go = threading.Event(), threading.Event()

    def hold():
        with database._pool_lock:
            held.set()
            assert let_go.wait(DEADLINE)

    holder = threading.Thread(target=hold)

    async def main():
        with responsive_loop():
            async with asyncio.timeout(DEADLINE):
                scope = Scope([install(database)], "test")
                scope.enter()
                database.connection()
                holder.start()
                assert await asyncio.to_thread(held.wait, DEADLINE)
                (pending,) = scope.finish()
                scope.exit()
                await asyncio.sleep(0)
                let_go.set()
                await asyncio.wrap_future(pending)

    asyncio.run(main())
    holder.join()
    assert in_use(database) == 0


def test_an_unpooled_connection_is_closed_elsewhere(tmp_path, monkeypatch):
    """Closing is I/O."""
    database = peewee.SqliteDatabase(str(tmp_path / "a.db"))
    install(database)
    watched = Watched(database, monkeypatch, "_close")

    async def main():
        async with connection_scope(database):
            database.execute_sql("select 1")

    asyncio.run(main())
    assert len(watched.threads) == 1
    assert watched.threads[0] is not threading.current_thread()


@pytest.mark.parametrize("inside", ["query", "transaction"])
@pytest.mark.parametrize("how", ["timeout", "wait_for", "cancel"])
def test_a_cancelled_request_whose_thread_runs_on(lite, lite_note, inside, how, caplog):
    """The scope ends while the thread is inside a query: the loop goes on, the thread's connection is dropped, nothing
    is committed, and whoever comes next is served right.
    """
    slow = SlowStatement(lite)
    ended = threading.Event()
    outcome = []

    def endpoint():
        try:
            if inside == "query":
                outcome.append(slow.run())
                lite_note.create(text="late")
            else:
                with lite.atomic():
                    lite_note.create(text="late")
                    slow.run()
                    lite_note.create(text="later")
        except BaseException as error:
            outcome.append(type(error))
            del error
            raise
        finally:
            ended.set()

    async def request():
        scope = Scope([install(lite)], "request GET /slow")
        scope.enter()
        try:
            if how == "timeout":
                async with asyncio.timeout(0.05):
                    await asyncio.to_thread(endpoint)
            elif how == "wait_for":
                await asyncio.wait_for(asyncio.to_thread(endpoint), 0.05)
            else:
                await asyncio.to_thread(endpoint)
        finally:
            scope.finish()
            scope.exit()

    async def main():
        with responsive_loop():
            task = asyncio.create_task(request(), context=contextvars.Context())
            assert await asyncio.to_thread(slow.gate.reached.wait, DEADLINE)
            if how == "cancel":
                task.cancel()
            with pytest.raises((TimeoutError, asyncio.CancelledError)):
                await task
            del task
            assert in_use(lite) == 1

            async def next_request():
                async with connection_scope(lite):
                    return lite_note.select().count()

            assert await next_request() == 0
            slow.gate.open()
            assert await asyncio.to_thread(ended.wait, DEADLINE)

    asyncio.run(main())
    assert outcome[-1] is ScopeEnded
    if inside == "query":
        assert outcome[0] == (1,)
    eventually(lambda: in_use(lite) == 0)
    with connection_scope(lite):
        assert lite_note.select().count() == 0


@pytest.mark.parametrize("kind", ["mysql", "postgres"])
def test_the_same_on_a_real_wire(kind, shared_place):
    """A native cancel around a thread inside PyMySQL or psycopg corrupts nothing: not its result, not the next one's."""
    database = shared_place(kind).make_database(max_connections=2)
    install(database)
    sleep = {"mysql": "SELECT SLEEP(0.2), 41", "postgres": "SELECT pg_sleep(0.2), 41"}[kind]
    late = []
    ended = threading.Event()
    frames = []

    def endpoint():
        try:
            with database.atomic():
                frames.append(database._state.frame())
                late.append(database.execute_sql(sleep).fetchone()[1])
        except ScopeEnded:
            late.append("ended")
        finally:
            ended.set()

    async def request():
        async with connection_scope(database):
            await asyncio.to_thread(endpoint)

    async def main():
        with responsive_loop():
            task = asyncio.create_task(request())
            await asyncio.to_thread(eventually, lambda: frames and frames[0]._depth)  # the thread is in the statement
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

            def after():
                with connection_scope(database):
                    return [database.execute_sql(f"SELECT {n}").fetchone()[0] for n in range(20)]

            assert await asyncio.to_thread(after) == list(range(20))
            assert await asyncio.to_thread(ended.wait, DEADLINE)

    asyncio.run(main())
    assert late == [41, "ended"]
    eventually(lambda: in_use(database) == 0)
    database.close_all()


def test_gather_over_threads_gives_right_results_or_concurrent_use(lite, lite_note):
    """Many threads on one scope at once: each result is right, or the call was refused."""

    async def main():
        async with connection_scope(lite):
            for n in range(6):
                lite_note.create(text=str(n))

            def read(n):
                return lite_note.get(lite_note.text == str(n)).text

            results = await asyncio.gather(
                *[asyncio.to_thread(read, n) for n in range(6) for _ in range(10)], return_exceptions=True
            )
        for index, result in enumerate(results):
            assert result == str(index // 10) or isinstance(result, ConcurrentUse), result

    asyncio.run(main())


def test_an_orphan_task_is_told_that_its_request_is_over(lite, lite_note):
    """A task that outlives its scope gets ScopeEnded, and does not reconnect silently."""

    async def main():
        over = asyncio.Event()

        async def orphan():
            await over.wait()
            with pytest.raises(ScopeEnded):
                lite_note.select().count()
            with pytest.raises(ScopeEnded):
                lite.connect()
            assert lite.close() is False
            async with connection_scope(lite):
                return lite_note.select().count()

        async with connection_scope(lite):
            lite_note.select().count()
            task = asyncio.create_task(orphan())
        over.set()
        assert await task == 0

    asyncio.run(main())
    assert in_use(lite) == 0


def test_cancelling_the_end_of_an_async_scope_loses_nothing(lite, lite_note):
    """A cancel while the connection is being returned, or the COMMIT is under way, leaves none behind."""

    async def work():
        async with connection_scope(lite, transaction=True):
            lite_note.create(text="a")

    async def main():
        for steps in range(6):
            task = asyncio.create_task(work())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.to_thread(eventually, lambda: in_use(lite) == 0)
            async with connection_scope(lite):
                lite_note.delete().execute()

    logging.getLogger("peewee_frameworks").setLevel(logging.CRITICAL)
    try:
        asyncio.run(main())
    finally:
        logging.getLogger("peewee_frameworks").setLevel(logging.NOTSET)


def test_orm_run_passes_keywords_of_any_name(tmp_path):
    orm = Extension(PooledSqliteDatabase(str(tmp_path / "x.db")))

    def function(**keywords):
        return keywords

    given = dict.fromkeys(("self", "function", "scope", "state", "undo", "call"), 1)
    assert asyncio.run(orm.run(function, **given)) == given
    assert asyncio.run(orm.database.run(function, **given)) == given
    orm.runtime.stop()
    install(orm.database).runner.close()
