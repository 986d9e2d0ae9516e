"""`Scope`, as adapters use it: enter, work, finish, exit."""

from __future__ import annotations

import contextvars
import threading

import peewee
import pytest

from peewee_frameworks import ScopeEnded, connection_scope, current_scope
from peewee_frameworks.frame import current_frames
from peewee_frameworks.scope import Scope
from peewee_frameworks.state import install
from tests.core.conftest import in_use, make_note
from tests.core.helpers import in_thread
from tests.support.concurrency import run_threads


@pytest.fixture
def enter():
    """Make a scope and enter it; finished and left at the end."""
    entered = []

    def enter(*databases, parent=None, label="request GET /"):
        scope = Scope([install(database) for database in databases], label, parent)
        scope.enter()
        entered.append(scope)
        return scope

    yield enter
    for scope in reversed(entered):
        scope.finish()
        scope.exit()


def test_a_scope_is_current_between_enter_and_exit(lite):
    """`current_scope` tells it, and exit restores what was before."""
    scope = Scope([install(lite)], "test")
    assert current_scope() is None
    scope.enter()
    assert current_scope() is scope
    scope.exit()
    scope.exit()
    assert current_scope() is None


def test_a_scope_is_fresh_even_where_the_context_leaks(lite, enter):
    """A server that runs the next request in the last one's context gets a new scope all the same."""
    first = enter(lite)
    conn = lite.connection()
    first.finish()  # and the server never resets its context
    second = Scope([install(lite)], "next")
    second.enter()
    assert current_scope() is second
    assert lite.connection() is conn  # by way of the pool
    second.finish()
    second.exit()
    with pytest.raises(ScopeEnded):
        lite.connection()


def test_exit_in_another_context_leaves_that_one_alone(lite):
    """Whoever leaves elsewhere, a generator closed by the garbage collector, changes nothing there."""
    scope = Scope([install(lite)], "test")
    contextvars.copy_context().run(scope.enter)
    with connection_scope(lite) as mine:
        scope.exit()
        assert current_scope() is mine
    scope.finish()


def test_frames_are_made_for_the_databases_that_are_used(make_sqlite, enter):
    """A request that uses one of two databases has one frame, and none before it asks."""
    one, two = make_sqlite("one"), make_sqlite("two")
    scope = enter(one, two)
    assert not scope.touched
    assert list(scope.own_frames) == []
    one.connection()
    assert scope.touched
    assert [frame.state.database for frame in scope.own_frames] == [one]
    assert scope.connected
    assert two.is_closed()


def test_threads_that_look_first_at_once_find_one_frame(lite, monkeypatch):
    """The frame of a scope is one, whoever asks first."""
    both = threading.Barrier(2, timeout=10)
    make = type(lite._state).new_frame

    def new_frame(state, label):
        frame = make(state, label)
        both.wait()
        return frame

    monkeypatch.setattr(type(lite._state), "new_frame", new_frame)
    scope = Scope([install(lite)], "test")
    scope.enter()
    contexts = [contextvars.copy_context() for _ in range(2)]
    frames = run_threads(2, lambda index: contexts[index].run(lite._state.frame))
    assert frames[0] is frames[1]
    assert lite._state.frame() is frames[0]
    scope.finish()
    scope.exit()


def test_who_looks_first_after_the_end_finds_it_ended(lite):
    """A thread that uses a database for the first time after its scope's end gets no connection."""
    scope = Scope([install(lite)], "test")
    scope.enter()
    context = contextvars.copy_context()
    scope.finish()
    scope.exit()
    with pytest.raises(ScopeEnded):
        in_thread(lite.connection, context=context)
    assert in_use(lite) == 0


def test_a_nested_scope_sees_the_databases_of_its_parent(make_sqlite, enter):
    """Only what it names is its own; the rest, used or not yet, is the parent's."""
    one, two, three = make_sqlite("one"), make_sqlite("two"), make_sqlite("three")
    outer = enter(one, two)
    first = one.connection()
    inner = enter(three, parent=outer)
    assert one.connection() is first
    second = two.connection()
    assert three.connection()
    assert [frame.state.database for frame in inner.own_frames] == [three]
    inner.finish()
    inner.exit()
    assert two.connection() is second
    assert in_use(three) == 0
    assert in_use(two) == 1


def test_a_database_outside_the_scope_has_implicit_state(make_sqlite, enter):
    """A scope of one database does not touch another, which connects per thread as ever."""
    one, two = make_sqlite("one"), make_sqlite("two")
    enter(one)
    conn = two.connection()
    assert in_thread(two.is_closed, context=contextvars.copy_context())
    assert two.connection() is conn
    two.close()


def test_eager_connecting_and_an_error_in_it(make_sqlite, enter):
    """`connect` connects every database; what was connected before one failed is given back at the end."""
    one = make_sqlite("one")
    broken = peewee.SqliteDatabase("/nowhere/at/all.db")
    scope = enter(one, broken)
    with pytest.raises(peewee.OperationalError):
        scope.connect()
    assert in_use(one) == 1
    scope.finish()
    assert in_use(one) == 0
    fine = enter(one)
    fine.connect()
    fine.connect()
    assert in_use(one) == 1


def test_has_transaction_tells_whether_completing_does_io(lite, lite_note, enter):
    """Only a transaction that has begun needs a COMMIT."""
    scope = enter(lite)
    scope.set_atomic()
    assert not scope.has_transaction()
    lite_note.select().count()
    assert scope.has_transaction()
    scope.complete()
    assert not scope.has_transaction()
    lite_note.create(text="after")
    assert not lite.in_transaction()


def test_several_databases_are_rolled_back_from_the_first_failure_on(make_sqlite, enter):
    """When one COMMIT fails the rest is rolled back, and the first error is raised."""
    one, two = make_sqlite("one"), make_sqlite("two")
    first, second = make_note(one), make_note(two)
    scope = enter(one, two)
    scope.set_atomic()
    first.create(text="a")
    second.create(text="b")
    one.after_commit(lambda: 1 / 0)
    with pytest.raises((ZeroDivisionError, peewee.OperationalError)):
        scope.complete()
    scope.finish()
    scope.exit()
    with connection_scope(two):
        assert second.select().count() == 0


def test_after_commit_in_an_atomic_request_waits_for_its_commit(lite, lite_note, enter):
    """Blocks inside the request are savepoints; the callback comes with the request's own COMMIT."""
    scope = enter(lite)
    scope.set_atomic()
    seen = []
    with lite.atomic():
        lite_note.create(text="a")
        lite.after_commit(lambda: seen.append("committed"))
    assert seen == []
    scope.complete()
    assert seen == ["committed"]


def test_a_scope_without_databases_works(enter):
    """Nothing to do is done at once."""
    scope = enter()
    scope.connect()
    scope.set_atomic()
    scope.complete()
    scope.release_early()
    assert scope.finish() == []
    assert scope.ended
    assert not scope.connected


def test_scopes_of_many_threads_do_not_meet(db, note):
    """More units of work than connections: each has one of its own, and all are served."""
    holders: dict[int, int] = {}
    lock = threading.Lock()

    def work(index):
        for _ in range(5):
            with connection_scope(db):
                key = id(db.connection())
                with lock:
                    assert key not in holders
                    holders[key] = index
                assert db.execute_sql(f"SELECT {index}").fetchone()[0] == index
                with lock:
                    del holders[key]

    run_threads(12, work)
    assert in_use(db) == 0
    assert current_frames.get() is None
