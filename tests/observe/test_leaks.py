"""Holders and leaks, on every kind of database: who, since when, where; reported once, and once more when they are back."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import subprocess
import sys
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import peewee
import pytest
from playhouse.pool import PooledSqliteDatabase as Stock
from playhouse.pwasyncio import AsyncSqliteDatabase

from peewee_frameworks import ConfigurationError, connection_scope
from peewee_frameworks.aio.psycopg import AsyncPsycopgDatabase
from peewee_frameworks.asgi import ScopeMiddleware
from peewee_frameworks.extension import Extension
from peewee_frameworks.holders import places_of, uses_of
from peewee_frameworks.pool import PooledSqliteDatabase
from peewee_frameworks.scope import current_scope
from peewee_frameworks.wsgi import ScopeMiddleware as WSGIScope
from tests.core.helpers import Gate, start
from tests.support.concurrency import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.databases import Place
    from tests.support.servers import Kind

THRESHOLD = 0.05
SYNC: dict[str, Any] = {"ours": PooledSqliteDatabase, "stock": Stock, "unpooled": peewee.SqliteDatabase}


@pytest.fixture(params=SYNC)
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    database = SYNC[request.param](str(tmp_path / "leaks.db"))
    yield database
    getattr(database, "close_all", database.close)()
    if hasattr(database, "pool"):
        database.pool.close(0)


@pytest.fixture
def async_db(make_place: Callable[[Kind], Place], tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    if request.param == "aiosqlite":
        return AsyncSqliteDatabase(str(tmp_path / "leaks.db"))
    place = make_place("postgres")
    return AsyncPsycopgDatabase(place.database, min_size=1, max_size=3, **place.connect_kwargs())


both_async = pytest.mark.parametrize("async_db", ["aiosqlite", "psycopg"], indirect=True)


def reports(caplog: pytest.LogCaptureFixture, text: str) -> list[Any]:
    return [
        record for record in caplog.records if record.name == "peewee_frameworks.pool" and text in record.getMessage()
    ]


def suspected(caplog: pytest.LogCaptureFixture, count: int = 1) -> list[Any]:
    return eventually(lambda: len(found := reports(caplog, "longer than leak_threshold")) >= count and found)


def returned(caplog: pytest.LogCaptureFixture, count: int = 1) -> list[Any]:
    return eventually(lambda: len(found := reports(caplog, "came back after")) >= count and found)


def hold(db: Any, gate: Gate, label: str) -> None:
    with connection_scope(db, label=label):
        db.execute_sql("SELECT 1")
        gate()


# -- holders --------------------------------------------------------------------------------------------------------------


def test_holders_are_told_by_their_scope_and_thread_the_longest_first(db):
    orm, gates = Extension(db), [Gate(), Gate()]
    assert orm.holders() == []
    futures = []
    for number, gate in enumerate(gates):
        futures.append(start(hold, db, gate, f"job {number}"))
        gate.wait()
    first, second = orm.holders()
    assert [first.label, second.label] == ["job 0", "job 1"]
    assert first.seconds >= second.seconds >= 0
    assert first.connection != second.connection
    assert {first.owner, second.owner} == {"thread 'test-thread'"}
    assert {first.alias, first.leaked, first.stack} == {"default", False, None}
    assert first.as_dict() == {name: getattr(first, name) for name in first.__slots__}
    for gate, future in zip(gates, futures, strict=True):
        gate.open()
        future.result(10)
    assert orm.holders() == []


def test_what_is_outside_any_scope_is_its_threads(db):
    orm = Extension(db)
    db.connect()
    (holder,) = orm.holders()
    name = threading.current_thread().name
    assert holder.label == f"thread {name!r}, outside any scope"
    assert holder.owner == f"thread {name!r}"
    db.close()
    assert orm.holders() == []


def test_the_connection_of_a_scope_inside_another_is_its_own(db):
    orm = Extension(db)
    with orm.scope("outer"):
        db.execute_sql("SELECT 1")
        with orm.scope("inner"):
            db.execute_sql("SELECT 1")
            assert [holder.label for holder in orm.holders()] == ["outer", "inner"]
            assert {holder.owner for holder in orm.holders()} == {f"thread {threading.current_thread().name!r}"}


def test_a_connection_taken_from_the_pool_by_hand_has_no_label(tmp_path):
    db = PooledSqliteDatabase(str(tmp_path / "leaks.db"))
    orm = Extension(db)
    with closing(db.pool):
        conn = db.pool.acquire()
        (holder,) = orm.holders()
        assert (holder.label, holder.owner) == (None, None)
        db.pool.release(conn)


@both_async
def test_tasks_are_told_apart(async_db):
    """Suspended tasks, each in its scope: by their names, whatever they wait for."""

    async def work(number: int, ready: asyncio.Event, done: asyncio.Event) -> None:
        async with connection_scope(async_db, label=f"job {number}"):
            await async_db.aexecute_sql("SELECT 1")
            ready.set()
            await done.wait()

    async def main() -> None:
        orm = Extension(async_db)
        done, readies = asyncio.Event(), [asyncio.Event(), asyncio.Event()]
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            for number, ready in enumerate(readies):
                group.create_task(work(number, ready, done), name=f"worker-{number}")
                await ready.wait()
            found = await asyncio.to_thread(orm.holders)
            assert [(holder.label, holder.owner) for holder in found] == [
                ("job 0", "task 'worker-0'"),
                ("job 1", "task 'worker-1'"),
            ]
            assert all(holder.seconds > 0 for holder in found)
            done.set()
        await async_db.close_pool()
        assert orm.holders() == []

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["block", "request"])
def test_a_task_that_is_about_to_run_is_found(db, kind):
    """What it waited for has happened, and it has not had its turn yet."""
    orm = Extension(db)
    reached, going = asyncio.Event(), asyncio.Event()

    async def wait_in_scope(*_: Any) -> None:
        db.execute_sql("SELECT 1")
        reached.set()
        await going.wait()

    async def work() -> None:
        if kind == "request":
            app = ScopeMiddleware(wait_in_scope, orm.runtime)
            await app({"type": "http", "method": "GET", "path": "/"}, None, None)
        else:
            async with connection_scope(db):
                await wait_in_scope()

    async def main() -> None:
        task = asyncio.create_task(work(), name="worker")
        await reached.wait()
        going.set()
        (use,) = uses_of(orm.runtime.states[0]).values()
        place = places_of([use])[id(use.conn)]
        assert place.owner == "task 'worker'"
        assert "in wait_in_scope\n" in str(place.stack)
        del use
        await task

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["to_thread", "context.run"])
def test_a_thread_that_runs_in_a_scope_of_another_is_found_by_its_context(db, kind):
    """The connection follows the request into a thread: that is where it is."""
    orm, gate = Extension(db), Gate()

    def query() -> None:
        db.execute_sql("SELECT 1")
        gate()

    async def main() -> None:
        async with connection_scope(db, label="job"):
            if kind == "to_thread":
                task = asyncio.create_task(asyncio.to_thread(query))
            else:
                thread = threading.Thread(target=contextvars.copy_context().run, args=(query,))
                thread.start()
                task = asyncio.create_task(asyncio.to_thread(thread.join))
            await asyncio.to_thread(gate.wait)
            (holder,) = orm.holders()
            assert holder.label == "job"
            assert holder.owner is not None
            assert holder.owner.startswith("thread ")
            gate.open()
            await task

    asyncio.run(main())


def test_a_thread_of_orm_run_is_found(db):
    """The task only waits for it."""
    orm, gate = Extension(db), Gate()

    def query() -> None:
        db.execute_sql("SELECT 1")
        gate()

    async def main() -> None:
        async with orm.scope("job"):
            task = asyncio.create_task(orm.run(query))
            await asyncio.to_thread(gate.wait)
            (holder,) = orm.holders()
            (use,) = uses_of(orm.runtime.states[0]).values()
            place = places_of([use])[id(use.conn)]
            gate.open()
            await task
        assert holder.owner is not None
        assert holder.owner.startswith("thread 'peewee-run")
        assert "in query\n" in str(place.stack)

    asyncio.run(main())
    orm.runtime.stop()


@pytest.mark.parametrize("kind", ["wsgi", "asgi"])
def test_a_path_writes_no_lines_of_its_own_into_a_log(db, kind):
    orm = Extension(db)
    path = "/käse\nCRITICAL forged \x1b[31m"
    told = []

    def wsgi(environ: Any, start_response: Any) -> list[bytes]:
        told.append(current_scope().label)
        start_response("200 OK", [])
        return []

    async def asgi(*_: Any) -> None:
        told.append(current_scope().label)

    if kind == "wsgi":
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path.encode().decode("latin-1")}
        for _ in WSGIScope(wsgi, orm.runtime)(environ, lambda *_: None):
            pass
    else:
        asyncio.run(ScopeMiddleware(asgi, orm.runtime)({"type": "http", "method": "GET", "path": path}, None, None))
    assert told == ["request GET /käse%0ACRITICAL forged %1B[31m"]


# -- leaks ----------------------------------------------------------------------------------------------------------------


def test_the_first_suspect_is_reported_with_where_it_is_and_the_next_with_where_it_was_taken(db, caplog):
    orm, gate = Extension(db, leak_threshold=THRESHOLD), Gate()
    future = start(hold, db, gate, "job 1")
    (record,) = suspected(caplog)
    message = record.getMessage()
    assert record.levelno == logging.WARNING
    assert ", by job 1 in thread 'test-thread'. Its holder is now at:\n" in message
    assert "in __call__\n" in message  # the gate, where it waits
    assert (record.request, record.owner) == ("job 1", "thread 'test-thread'")
    assert record.seconds >= THRESHOLD
    (holder,) = orm.holders()
    assert holder.leaked
    assert (holder.connection, holder.stack) == (record.connection, record.stack)
    gate.open()
    future.result(10)
    (back,) = returned(caplog)
    assert (back.request, back.connection) == ("job 1", record.connection)
    assert back.seconds >= record.seconds - 0.01

    gate = Gate()
    future = start(hold, db, gate, "job 2")
    record = suspected(caplog, 2)[1]
    assert "Checked out at:\n" in record.getMessage()
    assert "in hold\n" in record.stack
    assert record.stack.rstrip().endswith('db.execute_sql("SELECT 1")')
    gate.open()
    future.result(10)
    returned(caplog, 2)
    assert (len(suspected(caplog)), len(returned(caplog))) == (2, 2)


@both_async
def test_the_first_suspect_of_an_asynchronous_database(async_db, caplog):
    """The whole chain of awaits is shown, of the task that holds it."""

    async def handler(done: asyncio.Event) -> None:
        async with connection_scope(async_db, label="job"):
            await async_db.aexecute_sql("SELECT 1")
            await deep(done)

    async def deep(done: asyncio.Event) -> None:
        await done.wait()

    async def main() -> None:
        Extension(async_db, leak_threshold=THRESHOLD)
        for number, shown in ((1, "in deep\n"), (2, "in handler\n")):
            done = asyncio.Event()
            task = asyncio.create_task(handler(done), name=f"worker-{number}")
            record = (await asyncio.to_thread(suspected, caplog, number))[number - 1]
            assert f", by job in task 'worker-{number}'." in record.getMessage()
            assert shown in record.stack
            assert ("Checked out at" in record.stack) == (number == 2)
            done.set()
            await task
            await asyncio.to_thread(returned, caplog, number)
        await async_db.close_pool()

    asyncio.run(main())


def test_two_applications_with_one_database_report_once(db, caplog):
    Extension(db, leak_threshold=THRESHOLD)
    Extension(db, leak_threshold=THRESHOLD)
    gate = Gate()
    future = start(hold, db, gate, "job")
    suspected(caplog)
    gate.open()
    future.result(10)
    returned(caplog)
    assert (len(suspected(caplog)), len(returned(caplog))) == (1, 1)


def test_stacks_can_be_recorded_from_the_start(db, caplog):
    Extension(db, leak_threshold=THRESHOLD, leak_stacks=True)
    gate = Gate()
    future = start(hold, db, gate, "job")
    (record,) = suspected(caplog)
    assert "Checked out at:\n" in record.getMessage()
    gate.open()
    future.result(10)
    returned(caplog)


def test_no_stack_is_taken_before_there_is_a_suspect(db, monkeypatch):
    """What a checkout costs: nothing, as long as nobody is suspected."""
    taken = []
    monkeypatch.setattr("peewee_frameworks.stacks.take", lambda *_: taken.append(1))
    for module in ("pool.pool", "leaks"):
        monkeypatch.setattr(f"peewee_frameworks.{module}.take", lambda *_: taken.append(1))
    Extension(db, leak_threshold=60)
    for _ in range(20):
        with connection_scope(db):
            db.execute_sql("SELECT 1")
    assert not taken
    if hasattr(db, "pool"):
        assert not db.pool._watch


def test_a_recorded_stack_keeps_no_locals_alive(tmp_path):
    """Frames would: whatever the views of a leaking application had in their hands."""

    class Treasure:
        pass

    db = PooledSqliteDatabase(str(tmp_path / "leaks.db"), leak_stacks=True)
    alive = []

    def view() -> Any:
        import weakref

        treasure = Treasure()
        alive.append(weakref.ref(treasure))
        return db.pool.acquire()

    with closing(db.pool):
        conn = view()
        assert alive[0]() is None
        (entry,) = db.pool.engine.held.values()
        assert "in view\n" in f"{entry.stack}\n"
        db.pool.release(conn)


def test_the_pools_own_threshold_goes_first(tmp_path):
    db = PooledSqliteDatabase(str(tmp_path / "leaks.db"), leak_threshold=30)
    orm = Extension({"own": db, "other": PooledSqliteDatabase(str(tmp_path / "other.db"))}, leak_threshold=60)
    assert [database.pool.options.leak_threshold for database in orm.databases.values()] == [30, 60]


def test_a_leak_counts_in_the_pools_statistics_and_its_event(tmp_path, caplog):
    db = PooledSqliteDatabase(str(tmp_path / "leaks.db"))
    orm, gate, events = Extension(db, leak_threshold=THRESHOLD), Gate(), []
    db.pool.on("leak", lambda connection, seconds: events.append(seconds))
    with closing(db.pool):
        future = start(hold, db, gate, "job")
        suspected(caplog)
        eventually(lambda: events)
        assert db.pool.stats().leaks == 1
        gate.open()
        future.result(10)
    assert orm.holders() == []


def test_somebody_who_took_a_connection_by_hand_is_reported_and_recorded_the_next_time(tmp_path, caplog):
    db = PooledSqliteDatabase(str(tmp_path / "leaks.db"), leak_threshold=THRESHOLD)
    with closing(db.pool):
        conn = db.pool.acquire()
        (record,) = suspected(caplog)
        assert record.getMessage().endswith("is not known; from now on each checkout records it.")
        db.pool.release(conn)
        conn = db.pool.acquire()
        record = suspected(caplog, 2)[1]
        assert "in test_somebody_who_took_a_connection_by_hand" in record.getMessage()
        db.pool.release(conn)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # on Python 3.13 sqlite3 complains of what is meant here
def test_a_suspect_that_is_collected_is_no_leak_of_ours(tmp_path, caplog):
    """The watch refers to no frame: an abandoned scope is collected, and its connection with it."""
    import gc
    import weakref

    db = peewee.SqliteDatabase(str(tmp_path / "leaks.db"))
    Extension(db, leak_threshold=THRESHOLD)

    def abandon() -> Any:
        scope = connection_scope(db, label="abandoned").__enter__()
        db.execute_sql("SELECT 1")
        ref = weakref.ref(scope)
        scope.exit()  # it is current no more, and was not ended
        return ref

    ref = abandon()
    gc.collect()
    assert ref() is None
    assert Extension(db).holders() == []


FORKED = """
import logging, os, sys, threading
import peewee
from peewee_frameworks import connection_scope
from peewee_frameworks.extension import Extension
logging.basicConfig(stream=sys.stdout, format="%(process)d %(message)s")
told = threading.Event()
class Told(logging.Handler):
    def emit(self, record):
        told.set()
logging.getLogger().addHandler(Told())  # after the one that writes
db = peewee.SqliteDatabase(sys.argv[1])
orm = Extension(db, leak_threshold=0.05)
def hold(label):
    with connection_scope(db, label=label):
        db.execute_sql("SELECT 1")
        assert told.wait(20)
        told.clear()
hold("parent")
assert told.wait(20)  # it is back
told.clear()
child = os.fork()
if not child:
    hold("child")
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
print(os.getpid(), child)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_watch_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path / "leaks.db")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    parent, child = done.stdout.split("\n")[-2].split()
    for pid, label in ((parent, "parent"), (child, "child")):
        assert f"longer than leak_threshold, by {label} in thread" in done.stdout, done.stdout
        assert any(line.startswith(f"{pid} Pool") and f"by {label}" in line for line in done.stdout.splitlines())


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import logging, sys
import gevent, gevent.event
from peewee_frameworks import connection_scope
from peewee_frameworks.extension import Extension
from peewee_frameworks.pool import PooledSqliteDatabase
from peewee_frameworks.scope import current_scope
from peewee_frameworks.wsgi import ScopeMiddleware as WSGIScope
told, done = gevent.event.Event(), gevent.event.Event()
class Told(logging.Handler):
    def emit(self, record):
        print(record.getMessage(), flush=True)
        told.set()
logging.getLogger("peewee_frameworks.pool").addHandler(Told())
db = PooledSqliteDatabase(sys.argv[1])
orm = Extension(db, leak_threshold=0.05)
def view():
    with connection_scope(db, label="job"):
        db.execute_sql("SELECT 1")
        done.wait(20)
greenlet = gevent.spawn(view)
greenlet.name = "the-view"
assert told.wait(20)
print([(holder.label, holder.owner) for holder in orm.holders()])
done.set()
greenlet.join()
"""


def test_a_suspended_greenlet_is_found(tmp_path):
    """For a report; `holders` does not look through all objects for one, and names no owner rather than the hub's thread."""
    arguments = [sys.executable, "-c", GREENLETS, str(tmp_path / "leaks.db")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    assert ", by job in greenlet 'the-view'. Its holder is now at:\n" in done.stdout
    assert "in view\n" in done.stdout
    assert "[('job', None)]\n" in done.stdout


@pytest.mark.parametrize(("name", "value"), [("leak_threshold", 0), ("leak_threshold", "x"), ("leak_stacks", 2)])
def test_options_that_cannot_be_are_named(tmp_path, name, value):
    with pytest.raises(ConfigurationError, match=name):
        Extension(peewee.SqliteDatabase(str(tmp_path / "a.db")), **{name: value})
