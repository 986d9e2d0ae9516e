"""Outside any scope: one connection per thread, task or greenlet, never inherited, reclaimed when its owner is gone."""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import gc
import subprocess
import sys
import textwrap
import threading
from types import ModuleType

import pytest

from peewee_frameworks import connection_scope
from peewee_frameworks.frame import NO_RECORD
from tests.core.conftest import in_use
from tests.core.helpers import in_thread, start
from tests.support.concurrency import eventually, run_threads


def test_each_thread_has_its_own_connection(db, note):
    """Threads outside scopes do not share, whatever context they inherit."""
    barrier = threading.Barrier(3, timeout=10)

    def work(_):
        conn = db.connection()
        barrier.wait()
        assert note.select().count() == 0
        db.close()
        return id(conn)

    assert len(set(run_threads(3, work))) == 3


def test_a_greenlet_queries_while_another_thread_imports_asyncio(lite, note, monkeypatch):
    """The module is there then, and empty."""
    import greenlet  # frames look whether it was imported

    monkeypatch.setitem(sys.modules, "asyncio", ModuleType("asyncio"))
    monkeypatch.setitem(sys.modules, "asyncio.events", ModuleType("asyncio.events"))

    def work():
        lite.connection()
        lite._state.reap()
        lite.close()

    greenlet.greenlet(work).switch()


def test_a_copied_context_carries_no_implicit_connection(lite):
    """`copy_context` outside a scope takes nothing along."""
    conn = lite.connection()
    context = contextvars.copy_context()
    assert in_thread(lite.is_closed, context=context)
    assert lite.connection() is conn
    lite.close()


def test_a_task_has_its_own_connection_and_its_children_do_not_inherit_it(lite):
    """Outside scopes each task connects for itself; its thread has another connection still."""

    async def main():
        conn = lite.connection()

        async def child():
            assert lite.is_closed()
            other = lite.connection()
            await asyncio.sleep(0)
            assert lite.connection() is other
            lite.close()
            return other is not conn

        assert await asyncio.gather(child(), child()) == [True, True]
        assert await asyncio.to_thread(lite.is_closed)
        assert lite.connection() is conn
        lite.close()

    asyncio.run(main())


def test_reading_creates_no_record(lite):
    """Asking whether it is closed, or for an empty list of transactions, leaves nothing behind."""
    assert lite.is_closed()
    assert not lite.in_transaction()
    assert lite.top_transaction() is None
    assert lite._state.frame() is NO_RECORD
    assert lite._state.implicit_frames() == []


def test_what_a_dead_thread_left_open_is_taken_back(make_sqlite, caplog):
    """A thread that ends without close() loses its connection to the next one who connects, and the log says so."""
    database = make_sqlite(max_connections=1)

    def forgetful():
        database.connection()
        database.begin()

    thread = threading.Thread(target=forgetful, name="forgetful")
    thread.start()
    thread.join()
    del thread
    gc.collect()
    assert in_use(database) == 1
    database.connect()
    assert "thread 'forgetful', outside any scope ended without closing its connection" in caplog.text
    assert not database.connection().in_transaction
    database.close()


def test_a_thread_that_never_started_through_threading_is_noticed_too(make_sqlite, caplog):
    """A foreign thread's connection is neither lost nor inherited by the next thread with its number."""
    database = make_sqlite(max_connections=1)
    done = threading.Semaphore(0)
    seen = []

    def forgetful():
        seen.append(database.is_closed())
        database.connect()
        done.release()

    for _ in range(3):
        _thread.start_new_thread(forgetful, ())
        assert done.acquire(timeout=10)
    assert seen == [True, True, True]
    eventually(lambda: (gc.collect(), database._state.orphans)[1])
    database.connect()
    database.close()


def test_what_a_finished_task_left_open_is_taken_back_when_the_pool_is_exhausted(make_sqlite, caplog):
    """A task that is done but still referenced does not keep its connection from others."""
    database = make_sqlite(max_connections=1, timeout=None)

    async def main():
        async def forgetful():
            database.connect()

        task = asyncio.create_task(forgetful(), name="forgetful")
        await task
        database.connect()
        database.close()
        assert task.done()

    asyncio.run(main())
    assert "task 'forgetful', outside any scope ended" in caplog.text


def test_waiting_for_a_connection_finds_what_becomes_orphaned_meanwhile(make_sqlite, caplog):
    """A thread that waits in playhouse's pool gets the connection of one that dies while it waits."""
    database = make_sqlite(max_connections=1, timeout=8)
    connected, die = threading.Event(), threading.Event()

    def forgetful():
        database.connect()
        connected.set()
        die.wait(10)

    thread = threading.Thread(target=forgetful)
    thread.start()
    assert connected.wait(10)

    def patient():
        database.connect()
        database.close()
        return True

    waiting = start(patient)
    die.set()
    thread.join()
    del thread
    gc.collect()
    assert waiting.result(10)


def test_dispose_forgets_all(lite):
    """After `dispose`, as in a forked child, nobody has a connection and nobody closed one."""
    conn = lite.connection()
    lite.dispose()
    assert lite.is_closed()
    assert lite._state.implicit_frames() == []
    assert conn.execute("select 1").fetchone() == (1,)
    conn.close()


FORKED = """
import os, sys, threading
import peewee
from peewee_frameworks import connection_scope
from peewee_frameworks.pool import PooledSqliteDatabase
from peewee_frameworks.state import install

from playhouse.pool import PooledSqliteDatabase as Stock
kinds = {"ours": PooledSqliteDatabase, "playhouse's": Stock, "unpooled": peewee.SqliteDatabase}
options = {} if sys.argv[1] == "unpooled" else {"max_connections": 4}
db = kinds[sys.argv[1]](sys.argv[2], **options)
install(db)
class Note(db.Model):
    text = peewee.CharField()
db.create_tables([Note])
db.close()
begun, forked = threading.Event(), threading.Event()
def write():
    with db.atomic():
        Note.create(text="the parent's")
        begun.set()
        forked.wait(20)
    db.close()
writer = threading.Thread(target=write)
writer.start()
begun.wait(20)
with connection_scope(db):
    inherited = {id(db.connection())}  # connections of the thread that forks, too, in the scope and in the one around
    inner = connection_scope(db)
    with inner:
        assert Note.select().count() == 0
        inherited.add(id(db.connection()))
        child = os.fork()
        if child == 0:
            for _ in range(2):
                assert db.is_closed()
                assert Note.select().count() == 0
                assert id(db.connection()) not in inherited
                if inner is not None:
                    inner = inner.__exit__(None, None, None)
            os._exit(0)
assert os.waitpid(child, 0)[1] == 0
forked.set()
writer.join()
assert Note.select().count() == 1
"""


@pytest.mark.parametrize("kind", ["ours", "playhouse's", "unpooled"])
def test_a_forked_child_leaves_the_transactions_of_its_parent_alone(tmp_path, kind):
    """The thread that began one is gone there; whoever connects next must not roll it back as an orphan's."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, kind, str(tmp_path / "x.db")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


FORKED_ATOMIC = """
import os, sys
import peewee
from peewee_frameworks import connection_scope
from peewee_frameworks.pool import PooledSqliteDatabase
db = PooledSqliteDatabase(sys.argv[1], max_connections=4)
class Note(db.Model):
    text = peewee.CharField()
with connection_scope(db):
    db.create_tables([Note])
with connection_scope(db, transaction=True):
    if sys.argv[2] == "looked at":
        assert db.is_closed()
    child = os.fork()
    if child == 0:
        Note.create(text="the child's")
        assert not db.in_transaction()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    Note.create(text="the parent's")
    assert db.in_transaction()
with connection_scope(db):
    assert [note.text for note in Note.select().order_by(Note.id)] == ["the child's", "the parent's"]
"""


@pytest.mark.parametrize("before", ["looked at", "not looked at"])
def test_a_forked_child_begins_no_transaction_of_its_parents_request(tmp_path, before):
    """Nobody would commit it there."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED_ATOMIC, str(tmp_path / "x.db"), before]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_scope_inside_leaves_the_implicit_connection_alone(lite):
    """The thread's own connection is there again after a scope."""
    conn = lite.connection()
    with connection_scope(lite):
        assert lite.is_closed()
        assert lite.connection() is not conn
    assert lite.connection() is conn
    lite.close()


def test_an_id_that_was_used_before_gives_nobody_elses_record(lite):
    """Records are found by owner, not by a number that may be used again."""
    for _ in range(50):

        async def main():
            assert lite.is_closed()
            lite.connect()
            lite.close()

        asyncio.run(main())
    assert len(lite._state.implicit_frames()) <= 1


GEVENT = """
    from gevent import monkey
    monkey.patch_all()
    import gevent, logging, gc
    from playhouse.pool import PooledSqliteDatabase
    from peewee_frameworks import connection_scope, ConcurrentUse
    from peewee_frameworks.state import install
    import contextvars, sys

    db = PooledSqliteDatabase(sys.argv[1], max_connections=3)
    install(db)

    def work():
        assert db.is_closed()
        conn = db.connection()
        gevent.sleep(0)
        assert db.connection() is conn
        db.close()
        return id(conn)

    greenlets = [gevent.spawn(work) for _ in range(3)]
    gevent.joinall(greenlets, raise_error=True)
    assert len({greenlet.value for greenlet in greenlets}) == 3
    assert not db._in_use

    def forgetful():
        db.connect()

    gevent.spawn(forgetful).join()
    for _ in range(500):
        gc.collect()
        if db._state.orphans:
            break
        gevent.sleep(0.01)
    db.connect()
    db.close()
    assert not db._in_use, db._in_use

    with connection_scope(db):
        mine = db.connection()
        context = contextvars.copy_context()
        assert gevent.spawn(db.is_closed).get()
        assert gevent.spawn(context.run, db.connection).get() is mine
        frame = db._state.frame()
        frame.enter()
        def intrude():
            try:
                context.run(db.execute_sql, "select 1")
            except ConcurrentUse:
                return "refused"
        assert gevent.spawn(intrude).get() == "refused"
        frame.leave()
    assert not db._in_use
    print("ok")
"""


def test_greenlets_are_owners_and_users_of_their_own(tmp_path):
    """Under gevent each greenlet has its own connection outside scopes, and is a second user inside one."""
    pytest.importorskip("gevent")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(GEVENT), str(tmp_path / "a.db")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "ok\n", done.stderr
