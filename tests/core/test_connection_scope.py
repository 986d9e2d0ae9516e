"""`connection_scope`: connections for one unit of work, taken at the first query and given back at the end."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars

import peewee
import pytest

from peewee_frameworks import ConfigurationError, ScopeEnded, connection_scope, current_scope
from peewee_frameworks.frame import current_frames
from tests.core.conftest import in_use, make_note
from tests.core.helpers import in_thread


def test_the_connection_is_taken_at_the_first_query_and_given_back_at_the_end(db, note):
    """A scope connects with its first query, uses one connection, and gives it back."""
    with connection_scope(db):
        assert in_use(db) == 0
        note.create(text="a")
        conn = db.connection()
        assert note.select().count() == 1
        assert db.connection() is conn
        assert in_use(db) == 1
    assert in_use(db) == 0
    assert db.is_closed()


def test_an_async_scope_gives_back_before_it_ends(db, note):
    """After `async with`, the only connection of a pool is there for the next block, even if it was dirty."""

    async def main():
        for number in range(3):
            async with connection_scope(db):
                db.begin()
                note.create(text=str(number))
            assert in_use(db) == 0

    asyncio.run(main())
    with connection_scope(db):
        assert note.select().count() == 0


def test_a_decorated_function_has_a_scope_for_each_call(lite, lite_note):
    """Calls of a decorated function do not share a scope, and keep the function's name and result."""
    seen = []

    @connection_scope(lite)
    def work(n):
        seen.append(current_scope())
        return lite_note.select().count() + n

    assert work(1) == 1
    assert work(2) == 2
    assert work.__name__ == "work"
    assert seen[0] is not seen[1]
    assert all(scope.ended for scope in seen)
    assert in_use(lite) == 0


def test_a_decorated_coroutine_function_has_a_scope_for_each_call(lite, lite_note):
    """The decorator serves coroutine functions, and concurrent calls have connections of their own."""

    @connection_scope(lite)
    async def work():
        conn = lite.connection()
        await asyncio.sleep(0)
        assert lite.connection() is conn
        return id(conn)

    async def main():
        return await asyncio.gather(*[work() for _ in range(3)])

    assert len(set(asyncio.run(main()))) == 3


def test_a_generator_function_cannot_be_decorated(lite):
    """A generator's body runs after the call has returned, so decorating one is refused."""

    def generator():
        yield

    async def async_generator():
        yield

    for function in (generator, async_generator):
        with pytest.raises(ConfigurationError, match="Open it inside"):
            connection_scope(lite)(function)


@pytest.mark.parametrize("wrong", [(), (len,), (lambda: None,)])
def test_the_database_must_be_named(wrong):
    """A bare `@connection_scope` or an empty call is refused with the remedy."""
    with pytest.raises(ConfigurationError, match=r"connection_scope\(db\)"):
        connection_scope(*wrong)


def test_an_object_is_entered_once_at_a_time(lite):
    """One object serves one block at a time, and can be used again after it."""
    scope = connection_scope(lite)
    for _ in range(2):
        with scope, pytest.raises(ConfigurationError, match="entered already"):
            scope.__enter__()


def test_a_transaction_scope_commits_at_the_end(db, note):
    """With transaction=True everything in the scope is one transaction."""
    with connection_scope(db, transaction=True):
        note.create(text="a")
        assert db.in_transaction()
        with connection_scope(db):
            assert note.select().count() == 0
    with connection_scope(db):
        assert note.select().count() == 1


def test_a_transaction_scope_rolls_back_on_an_exception(db, note):
    """An exception rolls everything back and travels on."""
    with pytest.raises(KeyError), connection_scope(db, transaction=True):
        note.create(text="a")
        raise KeyError
    with connection_scope(db):
        assert note.select().count() == 0


def test_a_transaction_with_a_failed_statement_is_not_taken_for_committed(make_place):
    """PostgreSQL rolls back and answers COMMIT without an error; a savepoint around the statement saves the rest."""
    database = make_place("postgres").make_database()
    note = make_note(database)
    with (
        pytest.raises(peewee.InternalError, match=r"a statement in it failed"),
        connection_scope(database, transaction=True),
    ):
        note.create(text="lost", id=1)
        with contextlib.suppress(peewee.IntegrityError):
            note.create(text="again", id=1)
    with connection_scope(database, transaction=True):
        assert note.select().count() == 0
        note.create(text="kept", id=1)
        with contextlib.suppress(peewee.IntegrityError), database.atomic():
            note.create(text="again", id=1)
    with connection_scope(database):
        assert note.select().count() == 1
    assert in_use(database) == 0
    database.close_all()


def test_a_transaction_scope_without_a_query_takes_no_connection(lite):
    """The transaction begins with the first query."""
    with connection_scope(lite, transaction=True):
        pass
    assert not lite._connections


def test_blocks_of_peewee_may_end_inside_a_transaction_scope(db, note):
    """`with db` and `connection_context` inside a transaction scope close nothing and commit nothing."""
    with pytest.raises(KeyError), connection_scope(db, transaction=True):
        with db:
            note.create(text="a")
        with db.connection_context():
            note.create(text="b")
        with db.atomic():
            note.create(text="c")
        assert in_use(db) == 1
        raise KeyError
    with connection_scope(db):
        assert note.select().count() == 0


def test_a_scope_inside_another_has_its_own_connection(db, note):
    """Nested scopes of one database do not share a connection, and the outer one is back after the inner."""
    with connection_scope(db):
        outer = db.connection()
        with connection_scope(db):
            assert db.connection() is not outer
            assert in_use(db) == 2
        assert db.connection() is outer


def test_databases_that_an_inner_scope_does_not_name_stay_those_of_the_outer(make_sqlite):
    """A scope of one database leaves the others as they are around it."""
    one, two = make_sqlite("one"), make_sqlite("two")
    with connection_scope(one, two):
        first, second = one.connection(), two.connection()
        with connection_scope(two):
            assert one.connection() is first
            assert two.connection() is not second


def test_two_databases_are_committed_together_or_the_first_error_is_raised(make_sqlite):
    """An exception rolls back all databases of a transaction scope."""
    one, two = make_sqlite("one"), make_sqlite("two")
    notes = make_note(one), make_note(two)
    with pytest.raises(KeyError), connection_scope(one, two, transaction=True):
        for note in notes:
            note.create(text="a")
        raise KeyError
    with connection_scope(one, two):
        assert [note.select().count() for note in notes] == [0, 0]


def test_what_inherits_the_context_shares_the_connection(db, note):
    """A thread with a copy of the context uses the scope's connection; a bare one does not."""
    with connection_scope(db):
        conn = db.connection()
        assert in_thread(db.connection, context=contextvars.copy_context()) is conn
        assert in_thread(db.is_closed)


def test_a_query_after_the_end_names_the_unit_of_work_and_the_remedy(lite, lite_note):
    """What kept the scope's context and queries after its end is told which scope it was and what to do."""
    with connection_scope(lite, label="job 7"):
        lite_note.select().count()
        context = contextvars.copy_context()
    with pytest.raises(ScopeEnded, match=r"job 7 has ended.*connection_scope\(db\)"):
        context.run(lite_note.select().count)
    assert in_use(lite) == 0


def test_the_label_says_where_the_scope_was_opened(lite):
    """Without a label, messages name the function and line that opened the scope."""
    with connection_scope(lite) as scope:
        assert "test_the_label_says_where" in scope.label
    assert repr(scope).endswith("ended>")


def test_nothing_is_left_in_the_context(lite):
    """The scope before is current again after each block, after an exception too."""
    assert current_frames.get() is None
    with pytest.raises(KeyError), connection_scope(lite):
        raise KeyError
    assert current_frames.get() is None
    assert current_scope() is None
