"""The end of a scope always succeeds, rolls back, and never reuses a connection that somebody may still use."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading

import peewee
import pytest

from peewee_frameworks import (
    ConcurrentUse,
    ConfigurationError,
    ScopeEnded,
    ScopeError,
    TransactionLost,
    connection_scope,
)
from peewee_frameworks.runtime import Runtime
from peewee_frameworks.scope import Scope, complete
from peewee_frameworks.state import install
from tests.core.conftest import in_use, make_note
from tests.core.helpers import DEADLINE, Gate, SlowStatement, in_thread, start
from tests.support.concurrency import Halves, eventually, run_threads
from tests.support.databases import Place


def open_scope(*databases, label="work"):
    scope = Scope([install(database) for database in databases], label)
    scope.enter()
    return scope


def idle(database):
    return [id(conn) for _, _, conn in database._connections]


def test_what_is_open_is_rolled_back_with_a_warning_that_says_what(db, note, caplog):
    """A transaction left open is undone, and the log names the scope and the block."""
    scope = open_scope(db, label="request GET /x")
    db.atomic().__enter__()
    db.atomic().__enter__()
    note.create(text="lost")
    scope.finish()
    scope.exit()
    assert "request GET /x ended with a transaction block" in caplog.text
    assert in_use(db) == 0
    with connection_scope(db):
        assert note.select().count() == 0


def test_a_transaction_begun_by_hand_is_rolled_back(db, note):
    """A BEGIN without a block does not reach the next user of the connection."""
    with connection_scope(db):
        db.begin()
        note.create(text="lost")
    with connection_scope(db):
        assert note.select().count() == 0
        note.create(text="kept")
    with connection_scope(db):
        assert note.select().count() == 1


def test_finishing_twice_does_nothing(lite):
    """The connection is given back once."""
    scope = open_scope(lite)
    lite.connection()
    assert scope.connected
    assert scope.finish() == []
    assert scope.finish() == []
    scope.exit()
    assert scope.ended
    assert len(lite._connections) == 1


def test_the_last_user_drops_the_connection(lite, lite_note, caplog):
    """If a statement still runs at the end, its connection is closed when it returns, and never reused."""
    slow = SlowStatement(lite)
    scope = open_scope(lite)
    conn = lite.connection()
    late = start(slow.run, context=contextvars.copy_context())
    slow.gate.wait()
    scope.finish()
    scope.exit()
    assert in_use(lite) == 1
    with connection_scope(lite):
        assert lite.connection() is not conn
    slow.gate.open()
    late.exception(DEADLINE)
    eventually(lambda: in_use(lite) == 0)
    assert id(conn) not in idle(lite)
    file = Place("sqlite", "", lite.database)
    eventually(lambda: len(file.sessions()) == len(idle(lite)), message="it is not closed")
    assert "was still running when it ended" in caplog.text


@pytest.mark.parametrize("kind", ["mysql", "postgres"])
def test_the_last_user_drops_the_connection_on_a_server(kind, make_place):
    """The same on real wires: the late result is right, the next user has a clean connection."""
    place = make_place(kind)
    database = place.make_database(max_connections=1)
    install(database)
    sleep = "SELECT SLEEP(0.3), 41" if kind == "mysql" else "SELECT pg_sleep(0.3), 41"
    scope = open_scope(database)
    conn = database.connection()
    frame = next(iter(scope.own_frames))

    late = start(lambda: database.execute_sql(sleep).fetchone(), context=contextvars.copy_context())
    eventually(lambda: frame._depth == 1)
    scope.finish()
    scope.exit()
    assert late.result(DEADLINE)[1] == 41
    eventually(lambda: in_use(database) == 0)
    with connection_scope(database):
        assert database.connection() is not conn
        assert database.execute_sql("SELECT 7").fetchone()[0] == 7
    database.close_all()


def test_a_late_user_inside_a_transaction_cannot_commit(lite, lite_note):
    """A block whose scope ended in the middle raises ScopeEnded; what it wrote is gone."""
    slow = SlowStatement(lite)
    scope = open_scope(lite)

    def work():
        with lite.atomic():
            lite_note.create(text="never")
            slow.run()

    late = start(work, context=contextvars.copy_context())
    slow.gate.wait()
    scope.finish()
    scope.exit()
    slow.gate.open()
    assert isinstance(late.exception(DEADLINE), ScopeEnded)
    eventually(lambda: in_use(lite) == 0)
    with connection_scope(lite):
        assert lite_note.select().count() == 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_users_own_exception_survives_the_end_of_the_scope(lite, lite_note, depth, caplog):
    """What unwinds a block, nested or not, is not replaced by an error about the rollback."""
    scope = open_scope(lite)

    def nest(n):
        if n == 0:
            scope.finish()
            raise KeyError("mine")
        with lite.atomic():
            lite_note.create(text=str(n))
            nest(n - 1)

    with pytest.raises(KeyError, match="mine") as caught:
        nest(depth)
    assert caught.value.__context__ is None
    scope.exit()
    with connection_scope(lite):
        assert lite_note.select().count() == 0


@pytest.mark.parametrize(
    "block", ["atomic", "transaction", "savepoint", "manual_commit", "connection_context", "with db"]
)
def test_no_block_claims_a_commit_after_the_end(lite, lite_note, block, caplog):
    """A block left without an exception after the end raises ScopeEnded where it would have committed."""
    scope = open_scope(lite)
    lite.connect()
    entered = lite if block == "with db" else getattr(lite, block)()
    entered.__enter__()
    lite_note.create(text="a")
    scope.finish()
    if block in ("manual_commit", "connection_context"):
        entered.__exit__(None, None, None)
    else:
        with pytest.raises(ScopeEnded):
            entered.__exit__(None, None, None)
    scope.exit()
    assert in_use(lite) == 0


def test_a_query_that_comes_too_late_gives_the_connection_back(lite, monkeypatch):
    """If `finish` meets a latecomer at the lock, the latecomer gives the connection back and is refused."""
    scope = open_scope(lite)
    lite.connection()
    (frame,) = scope.own_frames
    frame._acquire(False)  # the latecomer has the lock, and has not looked yet
    finished = start(scope.finish)
    finished.result(DEADLINE)
    frame._release()
    with pytest.raises(ScopeEnded):
        frame.enter()
    scope.exit()
    assert in_use(lite) == 0


def test_an_early_release_that_meets_the_end_leaves_nothing_behind(lite, lite_note):
    """If `finish` comes while an early release looks at the frame, the connection still goes back."""
    scope = open_scope(lite)
    cursor = lite.execute_sql("select 1 union select 2")
    (frame,) = scope.own_frames
    gate = Gate()
    live = frame.live_cursors

    class Slow(type(frame)):
        __slots__ = ()

        def live_cursors(self, conn):
            gate()
            return live(conn)

    frame.__class__ = Slow
    release = start(frame.release_early)
    gate.wait()
    assert scope.finish() == []
    gate.open()
    assert release.result(DEADLINE) is False
    scope.exit()
    del cursor
    eventually(lambda: in_use(lite) == 0)


def test_a_scope_that_ends_inside_its_own_statement_waits_for_it(lite, lite_note):
    """`finish` on the very thread that runs a statement, from a signal handler or a finaliser, takes nothing away."""
    scope = open_scope(lite)
    lite_note.select().count()
    held = []

    def hook(event):
        scope.finish()
        held.append(in_use(lite))

    lite.query_hooks.append(hook)
    assert lite.execute_sql("select 5").fetchall() == [(5,)]
    assert held == [1]
    lite.query_hooks.clear()
    scope.exit()
    eventually(lambda: in_use(lite) == 0)


def test_every_order_of_end_and_use_gives_the_connection_back(lite, lite_note):
    """Threads that query while the scope ends: no error but ScopeEnded and ConcurrentUse, no connection left."""
    for _ in range(60):
        scope = open_scope(lite)
        lite.connection()
        contexts = [contextvars.copy_context() for _ in range(4)]

        def work(index, scope=scope, contexts=contexts):
            if index == 0:
                scope.finish()
                return
            if index == 1:
                scope.release_early()
                return
            with contextlib.suppress(ConcurrentUse, ScopeEnded):
                contexts[index].run(lite_note.select().count)

        run_threads(4, work)
        scope.exit()
        eventually(lambda: in_use(lite) == 0)


def test_a_result_that_another_thread_reads_is_not_closed_under_its_hands(lite, lite_note, caplog):
    """The end leaves an SQLite result to its reader, and closes the connection when the reader lets go."""
    with connection_scope(lite):
        for number in range(5):
            lite_note.create(text=str(number))
    scope = open_scope(lite)
    first_row, go_on = threading.Event(), threading.Event()

    def read():
        rows = lite_note.select().iterator()
        next(rows)
        first_row.set()
        assert go_on.wait(DEADLINE)
        return 1 + len(list(rows))

    reader = start(read, context=contextvars.copy_context())
    assert first_row.wait(DEADLINE)
    scope.finish()
    scope.exit()
    assert in_use(lite) == 1
    go_on.set()
    assert reader.result(DEADLINE) == 5
    eventually(lambda: in_use(lite) == 0)
    assert not lite._connections


def test_a_result_that_was_read_is_not_waited_for(lite, lite_note):
    """A traceback keeps the cursor of a DoesNotExist alive, until garbage is collected."""
    scope = open_scope(lite)
    scope.enter()
    try:
        with pytest.raises(lite_note.DoesNotExist) as caught:
            in_thread(contextvars.copy_context().run, lite_note.get, lite_note.id == -1)
        cursor = lite.execute_sql("SELECT 1")
        assert cursor.fetchall() == [(1,)]
        (frame,) = scope.own_frames
        assert frame.live_cursors(frame.conn) == []
        scope.finish()
    finally:
        scope.exit()
    assert caught.value.__traceback__ is not None
    assert (in_use(lite), len(idle(lite))) == (0, 1)


def test_a_result_read_on_the_same_thread_is_closed_and_the_connection_reused(lite, lite_note):
    """What one thread left half read costs no connection."""
    with connection_scope(lite):
        conn = lite.connection()
        cursor = lite.execute_sql("select 1 union select 2")
        assert cursor.fetchone() == (1,)
    with connection_scope(lite):
        assert lite.connection() is conn
    with pytest.raises(peewee.sqlite3.ProgrammingError):
        cursor.fetchone()


@pytest.mark.parametrize(("kind", "options"), [("mysql", {"ss": True}), ("postgres", {"named": True})])
def test_a_server_side_result_goes_through_the_guard(kind, options, make_place):
    """Fetching from the server is use of the connection: after the end it raises, and the connection is clean."""
    place = make_place(kind)
    if kind == "mysql":
        import pymysql

        database = place.make_database(cursorclass=pymysql.cursors.SSCursor)
    else:
        from playhouse.postgres_ext import PooledPsycopg3Database

        database = PooledPsycopg3Database(place.database, max_connections=2, **place.kwargs)
    install(database)
    numbers = "SELECT 1 AS n UNION ALL SELECT 2 UNION ALL SELECT 3"
    scope = open_scope(database)
    cursor = (
        database.execute_sql(numbers, None, named_cursor=True) if kind == "postgres" else database.execute_sql(numbers)
    )
    assert cursor.fetchone() == (1,)
    assert len(cursor.description) == 1
    (frame,) = scope.own_frames
    assert frame.live_cursors(frame.conn)
    scope.release_early()
    assert scope.connected
    assert next(iter(cursor)) == (2,)
    scope.finish()
    scope.exit()
    with pytest.raises(ScopeEnded):
        cursor.fetchone()
    cursor.close()
    with connection_scope(database):
        assert database.execute_sql("SELECT 7").fetchall() == [(7,)]
    assert in_use(database) == 0
    database.close_all()


def test_server_side_queries_of_peewee_work_in_a_scope(make_place):
    """`ServerSide` streams through the guard."""
    from playhouse.postgres_ext import PooledPsycopg3Database, ServerSide

    place = make_place("postgres")
    database = PooledPsycopg3Database(place.database, max_connections=2, **place.kwargs)
    install(database)
    note = make_note(database)
    with connection_scope(database):
        note.insert_many([{"text": str(n)} for n in range(20)]).execute()
        assert len([row.text for row in ServerSide(note.select(), array_size=5)]) == 20
        with database.atomic():
            assert len(list(ServerSide(note.select(), array_size=5))) == 20
    assert in_use(database) == 0
    database.close_all()


# -- early release ------------------------------------------------------------------------------------------------------


def test_an_early_release_gives_back_and_a_later_query_takes_again(db, note):
    """At the first byte nothing is held; the stream's query connects again; the end gives that back too."""
    with connection_scope(db) as scope:
        note.create(text="a")
        scope.release_early()
        assert in_use(db) == 0
        assert not scope.connected
        assert note.select().count() == 1
        assert in_use(db) == 1


@pytest.mark.parametrize("what", ["atomic", "manual_commit", "connection_context", "begin", "session", "savepoint"])
def test_an_early_release_waits_for_what_is_open(db, note, what):
    """Whatever is open on the connection keeps it."""
    with connection_scope(db) as scope:
        db.connect()
        entered = None
        if what == "begin":
            db.begin()
        elif what == "session":
            db.session_start()
        else:
            if what == "savepoint":
                db.begin()
            entered = getattr(db, what)()
            entered.__enter__()
        note.create(text="a")
        scope.release_early()
        assert scope.connected
        if entered is not None:
            entered.__exit__(None, None, None)
        if what in ("begin", "savepoint"):
            db.commit()
        elif what == "session":
            db.session_commit()
        scope.release_early()
        assert not scope.connected
        assert note.select().count() == 1


def test_an_early_release_needs_no_help_from_the_driver_for_blocks(lite, lite_note, monkeypatch):
    """Where a driver cannot tell whether a transaction is open, blocks and savepoints still keep the connection."""
    monkeypatch.setattr("peewee_frameworks.frame.transaction_is_open", lambda conn: None)
    with connection_scope(lite) as scope:
        for block in (lite.savepoint(), lite.atomic(), lite.connection_context()):
            with block:
                lite_note.select().count()
                scope.release_early()
                assert scope.connected
        lite_note.select().count()
        scope.release_early()
        assert not scope.connected


def test_an_early_release_waits_for_a_result_that_is_being_read(lite, lite_note):
    """A result that is read row by row keeps its connection until it is dropped."""
    with connection_scope(lite) as scope:
        lite_note.create(text="a")
        lite_note.create(text="b")
        rows = lite_note.select().iterator()
        assert next(rows).text == "a"
        scope.release_early()
        assert scope.connected
        assert next(rows).text == "b"
        del rows
        scope.release_early()
        assert not scope.connected


def test_an_eager_connection_is_kept_by_nested_blocks_until_the_early_release(lite):
    """What `connect` opened survives a nested `with db`; after the early release such a block closes what it opened."""
    with connection_scope(lite) as scope:
        scope.connect()
        conn = lite.connection()
        with lite:
            pass
        with lite.connection_context():
            pass
        assert lite.connection() is conn
        scope.release_early()
        assert in_use(lite) == 0
        with lite:
            assert in_use(lite) == 1
        assert in_use(lite) == 0


def test_where_autoconnect_is_off_an_early_release_keeps_the_connection(make_sqlite):
    """A later query could not take it again."""
    database = make_sqlite(autoconnect=False)
    with connection_scope(database) as scope:
        with pytest.raises(peewee.InterfaceError):
            database.execute_sql("select 1")
        scope.connect()
        scope.release_early()
        assert database.execute_sql("select 1").fetchone() == (1,)


def test_the_release_callback_is_called_after_each_return(lite, lite_note):
    """Whoever waits for the connection's return is told when it is back in the pool, on every way out."""
    free = []

    def released():
        free.append(in_use(lite))

    with connection_scope(lite) as scope:
        scope.on_release(released)
        lite_note.select().count()
        scope.release_early()
        lite_note.select().count()
        lite.close()
        lite_note.select().count()
    assert free == [0, 0, 0]
    slow = SlowStatement(lite)
    scope = open_scope(lite)
    scope.on_release(released)
    late = start(slow.run, context=contextvars.copy_context())
    slow.gate.wait()
    scope.finish()
    assert free == [0, 0, 0]
    slow.gate.open()
    late.exception(DEADLINE)
    scope.exit()
    eventually(lambda: free == [0, 0, 0, 0])


def test_a_release_callback_that_fails_harms_nobody(lite, caplog):
    """`finish` never raises, whatever the callback does."""
    scope = open_scope(lite)
    scope.on_release(lambda: 1 / 0)
    lite.connection()
    scope.finish()
    scope.exit()
    assert "ZeroDivisionError" in caplog.text
    assert in_use(lite) == 0


# -- the transaction of an atomic request -----------------------------------------------------------------------------------


def test_an_open_block_keeps_an_atomic_request_from_committing(db, note, caplog):
    """COMMIT with a savepoint open would commit half of the inner block: it is refused, and all rolled back."""
    for block in ("atomic", "savepoint", "transaction"):
        scope = open_scope(db)
        scope.set_atomic()
        note.create(text=f"a{block}")
        inner = getattr(db, block)()
        inner.__enter__()
        note.create(text=f"b{block}")
        with pytest.raises(ScopeError, match="still open inside"):
            scope.complete()
        inner.__exit__(None, None, None)
        scope.finish()
        scope.exit()
    with connection_scope(db):
        assert note.select().count() == 0


def test_an_error_with_a_block_still_open_rolls_everything_back(db, note, caplog):
    """The inner block may end afterwards, in whatever way, without committing anything."""
    for block in ("atomic", "savepoint", "transaction"):
        scope = open_scope(db)
        scope.set_atomic()
        inner = getattr(db, block)()
        inner.__enter__()
        note.create(text=block)
        scope.complete(KeyError())
        inner.__exit__(None, None, None)
        scope.finish()
        scope.exit()
    with connection_scope(db):
        assert note.select().count() == 0


def test_a_begin_that_fails_leaves_no_connection_without_a_transaction(make_sqlite):
    """If BEGIN fails, the next statement of an atomic scope tries again; it never commits by itself."""
    database = make_sqlite(lock_type="EXCLUSIVE", timeout=0)
    note = make_note(database)
    database._timeout = 0.01
    database.close_idle()
    with connection_scope(database):
        database.begin()
        with connection_scope(database, transaction=True):
            for _ in range(2):
                with pytest.raises(peewee.OperationalError, match="locked"):
                    note.create(text="a")
                assert database.is_closed()
        database.rollback()
    with connection_scope(database):
        assert note.select().count() == 0


def test_a_commit_that_fails_is_raised_and_rolled_back(make_place):
    """A deferred constraint that fails at COMMIT reaches the caller of `complete`."""
    place = make_place("postgres")
    database = place.make_database()
    install(database)
    database.execute_sql("CREATE TABLE a (id int primary key, b int)")
    database.execute_sql(
        "ALTER TABLE a ADD CONSTRAINT f FOREIGN KEY (b) REFERENCES a (id) DEFERRABLE INITIALLY DEFERRED"
    )
    database.close()
    with pytest.raises(peewee.IntegrityError), connection_scope(database, transaction=True):
        database.execute_sql("INSERT INTO a VALUES (1, 99)")
    with connection_scope(database):
        assert database.execute_sql("SELECT count(*) FROM a").fetchone() == (0,)
    assert in_use(database) == 0
    database.close_all()


def test_completing_from_a_loop_does_not_block_it(lite, lite_note):
    """`complete` commits on another thread, and the callbacks see the scope."""
    seen = []

    async def main():
        async with connection_scope(lite) as scope:
            scope.set_atomic()
            lite_note.create(text="a")
            lite.after_commit(
                lambda: seen.append((threading.current_thread() is main_thread, lite_note.select().count()))
            )
            await complete(scope)
            await complete(scope)
            assert not scope.has_transaction()

    main_thread = threading.current_thread()
    asyncio.run(main())
    assert seen == [(False, 1)]


def test_set_atomic_on_an_open_connection_begins_at_once(db, note):
    """Earlier statements are committed already; what follows is one transaction."""
    with connection_scope(db) as scope:
        note.create(text="before")
        scope.set_atomic()
        assert db.in_transaction()
        note.create(text="after")
        scope.complete(KeyError())
        assert [note.text for note in note.select()] == ["before"]


def test_the_dead_connection_of_a_killed_server_session_is_not_reused(make_place, caplog):
    """`finish` drops what cannot be rolled back."""
    for kind in ("mysql", "postgres"):
        place = make_place(kind)
        database = place.make_database()
        install(database)
        scope = open_scope(database)
        database.atomic().__enter__()
        database.execute_sql("SELECT 1")
        place.kill_sessions()
        scope.finish()
        scope.exit()
        assert in_use(database) == 0
        with connection_scope(database):
            assert database.execute_sql("SELECT 1").fetchone() == (1,)
        database.close_all()


def test_in_thread_helper_has_an_empty_context(lite):
    """The helper that these tests rely on starts threads outside any scope."""
    with connection_scope(lite):
        assert in_thread(lambda: len(contextvars.copy_context())) == 0


class Busy:
    """A thread of the scope that is inside a statement, on a connection with a transaction, until told to go on."""

    def __init__(self, place, database) -> None:
        self.holder = place.make_database(max_connections=1)
        lock, unlock = (
            ("SELECT GET_LOCK(%s, 20)", "SELECT RELEASE_LOCK(%s)")
            if place.kind == "mysql"
            else ("SELECT 1 FROM pg_advisory_lock(hashtext(%s))", "SELECT pg_advisory_unlock(hashtext(%s))")
        )
        name = f"busy_{place.database}"
        self.holder.execute_sql(lock, (name,)).fetchall()
        self.open = lambda: (self.holder.execute_sql(unlock, (name,)).fetchall(), self.holder.close_all())
        self.late = start(lambda: database.execute_sql(lock, (name,)).fetchone()[0], context=contextvars.copy_context())
        frame = database._state.frame()
        eventually(lambda: frame._depth == 1 and busy_session(place), message="it does not get inside")


def busy_session(place):
    monitor = place.make_database(max_connections=1)
    try:
        running = (
            "SELECT COUNT(*) FROM information_schema.processlist WHERE state = 'User lock'"
            if place.kind == "mysql"
            else "SELECT COUNT(*) FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()"
        )
        return monitor.execute_sql(running).fetchone()[0] >= 1
    finally:
        monitor.close_all()


class Refused:
    """A block that is refused its end, for a thread is inside a statement; the thread goes on after that.

    No generator, in which blocks have no mark.
    """

    def __init__(self, place, database) -> None:
        self.place, self.database, self.block = place, database, database.atomic()

    def __enter__(self) -> None:
        self.block.__enter__()

    def __exit__(self, *exc_info: object) -> None:
        busy = Busy(self.place, self.database)
        with pytest.raises(ConcurrentUse):
            self.block.__exit__(*exc_info)
        busy.open()
        assert busy.late.result(DEADLINE) == 1  # the statement has its answer


SERVERS = pytest.mark.parametrize("database_kind", ["mysql", "postgres"])


@SERVERS
@pytest.mark.parametrize("error", [None, ValueError("a deadline")])
def test_a_request_that_ends_while_its_thread_is_inside_a_statement_leaves_it_the_connection(place, db, note, error):
    """Neither COMMIT nor ROLLBACK can go out; the connection is not taken from under the statement, and nothing is kept."""
    scope = open_scope(db)
    scope.set_atomic()
    note.create(text="lost")
    conn, busy = db.connection(), Busy(place, db)
    if error is None:
        with pytest.raises(ConcurrentUse):
            scope.complete()
    else:
        scope.complete(error)
    assert db.connection() is conn
    busy.open()
    assert busy.late.result(DEADLINE) == 1  # the statement has its answer
    note.create(text="lost too")  # what else belongs to the half-done work is not committed either
    with db.atomic():  # on MySQL a BEGIN would commit
        note.create(text="lost as well")
    scope.finish()
    scope.exit()
    with connection_scope(db):
        assert note.select().count() == 0


@pytest.mark.parametrize("error", [None, ValueError("a deadline")])
def test_a_request_that_ends_while_its_transaction_begins_stores_all_or_nothing(db, note, monkeypatch, error):
    """What its thread does from then on is stored statement by statement, as whatever comes after the response's begin."""
    gate, begin = Gate(), db.begin
    called = []

    def slow(*args, **kwargs):
        begin(*args, **kwargs)
        gate()

    def work():
        note.create(text="one")
        note.create(text="two")
        return db.in_transaction()

    scope = open_scope(db)
    scope.set_atomic()
    db.after_commit(lambda: called.append("early"))
    monkeypatch.setattr(db, "begin", slow)
    late = start(work, context=contextvars.copy_context())
    gate.wait()
    scope.complete(error)
    gate.open()
    assert late.result(DEADLINE) is (error is not None)  # then all of it is rolled back at the end
    scope.finish()
    scope.exit()
    with connection_scope(db):
        assert [each.text for each in note.select().order_by(note.id)] == ([] if error else ["one", "two"])
    assert called == ([] if error else ["early"])


@SERVERS
@pytest.mark.parametrize("follows", ["block", "statement", "commit", "nothing"])
def test_a_block_that_ends_while_a_child_is_inside_a_statement_is_rolled_back_after_it(place, db, note, follows):
    """The block raises; what comes next does not commit what it did, and is not lost with it."""
    called = []
    with connection_scope(db):
        with Refused(place, db):
            note.create(text="lost")
            db.after_commit(lambda: called.append("lost"))
        if follows == "block":
            with db.atomic():
                note.create(text="kept")
                db.after_commit(lambda: called.append("kept"))
        elif follows == "statement":
            note.create(text="kept")
        elif follows == "commit":
            db.commit()
        if follows != "nothing":
            assert not db.in_transaction()
    with connection_scope(db):
        assert [each.text for each in note.select()] == (["kept"] if follows in ("block", "statement") else [])
    assert called == (["kept"] if follows == "block" else [])


@SERVERS
def test_a_child_of_a_block_that_could_not_end_is_told_that_it_was_rolled_back(place, db, note):
    """What it does next would be stored by itself."""
    with connection_scope(db):
        with Refused(place, db):
            context = contextvars.copy_context()
        with pytest.raises(TransactionLost, match="was rolled back meanwhile"):
            context.run(note.create, text="half")
        assert db.transaction_depth() == 0
        with pytest.raises(LookupError), db.atomic():
            note.create(text="undone")
            raise LookupError
        note.create(text="kept")
    with connection_scope(db):
        assert [each.text for each in note.select()] == ["kept"]


@pytest.mark.parametrize("database_kind", ["postgres"])
def test_a_scope_inside_does_not_lose_its_transaction_for_a_block_of_the_one_around(place, db, note):
    """A cursor belongs to the scope that made it, wherever it is read."""
    with connection_scope(db):
        note.create(text="first")
        with Refused(place, db):
            note.create(text="lost")
        frame = db._state.frame()
        with connection_scope(db), db.atomic():
            note.create(text="kept")
            frame.enter()
            frame.leave()
        assert not db.in_transaction()
    with connection_scope(db):
        assert [each.text for each in note.select().order_by(note.id)] == ["first", "kept"]


@SERVERS
def test_a_block_that_could_not_end_and_whose_rollback_fails_costs_its_connection(place, db, note):
    """Nobody knows what is open on it; what follows has another one, and is kept."""
    with connection_scope(db):
        with Refused(place, db):
            note.create(text="lost")
        place.kill_sessions()
        note.create(text="kept")
        with db.atomic():
            note.create(text="kept, too")
    with connection_scope(db):
        assert [each.text for each in note.select().order_by(note.id)] == ["kept", "kept, too"]
    eventually(lambda: in_use(db) == 0)


@SERVERS
def test_a_block_that_could_not_end_and_whose_rollback_fails_ends_the_connection_of_a_block_around(place, db, note):
    """What follows in the `connection_context` is an error, as after any connection that is lost there."""
    with connection_scope(db):
        with db.connection_context():
            with Refused(place, db):
                note.create(text="lost")
            place.kill_sessions()
            with pytest.raises((peewee.OperationalError, peewee.InterfaceError)):
                note.create(text="?")
            with pytest.raises((peewee.OperationalError, peewee.InterfaceError)):
                note.create(text="?")
        note.create(text="kept")
    with connection_scope(db):
        assert [each.text for each in note.select()] == ["kept"]
    eventually(lambda: in_use(db) == 0)


@SERVERS
def test_a_savepoint_that_could_not_end_and_whose_rollback_fails_ends_the_transaction_around_it(place, db, note):
    """It is gone with its connection: the rest of the block must not be stored by itself."""
    with connection_scope(db):
        with pytest.raises((peewee.OperationalError, peewee.InterfaceError)), db.atomic():
            note.create(text="lost")
            with Refused(place, db):
                note.create(text="lost, too")
            place.kill_sessions()
            with pytest.raises((peewee.OperationalError, peewee.InterfaceError)):
                note.create(text="?")
            note.create(text="??")
        note.create(text="kept")
    with connection_scope(db):
        assert [each.text for each in note.select()] == ["kept"]
    eventually(lambda: in_use(db) == 0)


@SERVERS
def test_savepoints_that_could_not_end_in_any_order_are_rolled_back_from_the_outermost(place, db, note):
    """The inner one, which ends last, is no reason to keep half of the outer one."""
    with connection_scope(db), db.atomic():
        note.create(text="kept")
        outer, inner = db.savepoint(), db.savepoint()
        outer.__enter__()
        note.create(text="half")
        inner.__enter__()
        busy = Busy(place, db)
        for block in (outer, inner):
            with pytest.raises(ConcurrentUse):
                block.__exit__(None, None, None)
        busy.open()
        assert busy.late.result(DEADLINE) == 1
    with connection_scope(db):
        assert [each.text for each in note.select()] == ["kept"]


@SERVERS
@pytest.mark.parametrize("what", ["manual_commit", "after_commit"])
def test_what_is_no_statement_finds_no_block_that_is_over(place, db, note, what):
    called = []
    with connection_scope(db):
        with Refused(place, db):
            note.create(text="lost")
        if what == "after_commit":
            db.after_commit(lambda: called.append("now"))
            assert called == ["now"]
        else:
            with db.manual_commit():
                db.begin()
                note.create(text="kept")
                db.commit()
    with connection_scope(db):
        assert note.select().count() == (what == "manual_commit")


@SERVERS
def test_a_savepoint_that_could_not_end_is_not_committed_with_the_transaction_around_it(place, db, note):
    """Whoever catches its error goes on with the rest."""
    with connection_scope(db), db.atomic():
        note.create(text="kept")
        with Refused(place, db):
            note.create(text="half")
        note.create(text="kept, too")
    with connection_scope(db):
        assert [each.text for each in note.select().order_by(note.id)] == ["kept", "kept, too"]


@SERVERS
def test_a_savepoint_that_cannot_be_rolled_back_says_so(place, db, note):
    """It is not left out in silence because a connection in the middle of an answer looks broken."""
    with connection_scope(db):
        with pytest.raises(ConcurrentUse), db.atomic(), db.atomic():
            note.create(text="half")
            busy = Busy(place, db)
            raise ValueError
        busy.open()
        assert busy.late.result(DEADLINE) == 1
    with connection_scope(db):
        assert note.select().count() == 0


@pytest.mark.parametrize("kind", ["with", "async with"])
def test_a_scope_with_a_transaction_does_not_commit_half_of_a_call_that_goes_on(db, note, kind):
    """Both forms refuse; a coroutine may write either."""
    unit = Halves(lambda name: note.create(text=name))
    runtime = Runtime(db)

    async def work():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await runtime.run(unit)

    async def main():
        await runtime.start_async()
        with pytest.raises(ConcurrentUse, match=r"a call of orm\.run goes on"):
            if kind == "with":
                with connection_scope(db, transaction=True):
                    await work()
            else:
                async with connection_scope(db, transaction=True):
                    await work()
        await unit.finish()
        await runtime.stop_async()

    asyncio.run(main())
    eventually(lambda: in_use(db) == 0)
    with db:
        assert note.select().count() == 0


@pytest.mark.parametrize("queries", [True, False], ids=["a query follows", "no query follows"])
@pytest.mark.parametrize("fails", [True, False], ids=["rolled back", "committed"])
def test_after_commit_waits_for_a_transaction_that_begins_with_the_first_query(db, note, queries, fails):
    """Peewee calls it at once where no transaction is open, and here one is about to be."""
    called = []

    def callback():
        called.append(note.select().count())

    with contextlib.suppress(LookupError), connection_scope(db, transaction=True):
        db.after_commit(callback)
        assert called == []
        if queries:
            note.create(text="x")
        if fails:
            raise LookupError
    assert called == ([] if fails else [1 if queries else 0])
    db.close()


def test_a_block_does_not_commit_half_of_a_call_that_goes_on(db, note):
    """It was made inside the block, and its caller has caught the timeout there."""
    unit = Halves(lambda name: note.create(text=name))
    runtime = Runtime(db)

    async def main():
        await runtime.start_async()
        async with connection_scope(db):
            refused = pytest.raises(
                ConcurrentUse, match=r"a call of orm\.run that was cancelled or timed out in it goes on"
            )
            with refused, db.atomic(), contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await runtime.run(unit)
            await unit.finish()  # what goes on is refused: the block it was part of is gone
        await runtime.stop_async()

    asyncio.run(main())
    with db:
        assert note.select().count() == 0


@pytest.mark.parametrize("block", ["atomic", "connection_context"])
def test_a_block_may_decorate_a_coroutine_function_and_no_generator_function(db, note, block):
    """The block would end before the body runs."""
    decorate = getattr(db, block)()

    @decorate
    async def write(text, error=None):
        note.create(text=text)
        await asyncio.sleep(0)
        if error is not None:
            raise error

    async def main():
        async with connection_scope(db):
            await write("kept")
            with pytest.raises(LookupError):
                await write("perhaps", LookupError())

    asyncio.run(main())
    db._state.runner.close()
    with db:
        assert {each.text for each in note.select()} == ({"kept"} if block == "atomic" else {"kept", "perhaps"})
    with pytest.raises(ConfigurationError, match=r"cannot decorate the generator .*rows: its body runs after the call"):

        @decorate
        def rows():
            yield from note.select()
