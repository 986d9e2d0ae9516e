"""Generators and coroutines that are dropped in the middle of a block end it on the connection it began on."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc

import pytest

from peewee_frameworks import connection_scope
from peewee_frameworks.frame import current_frames, current_lineage
from tests.core.conftest import in_use
from tests.core.helpers import in_thread

BLOCKS = ["atomic", "transaction", "with db", "connection_context", "manual_commit", "session"]


def enter(database, block):
    if block == "with db":
        return database
    if block == "session":
        return contextlib.nullcontext(database.session_start())
    return getattr(database, block)()


def stream(database, note, block):
    """What a streaming response does: a block, a write, and a pause in it."""
    if block == "with db":
        with database:
            note.create(text="stream")
            yield
    else:
        with enter(database, block):
            if block not in ("connection_context", "manual_commit"):
                note.create(text="stream")
            yield


@pytest.mark.parametrize("block", BLOCKS)
def test_a_generator_dropped_in_another_scope_does_not_touch_its_connection(db, note, block):
    """A block that the garbage collector closes leaves the transaction of the request that runs then alone."""
    with connection_scope(db) as outer:
        generator = stream(db, note, block)
        next(generator)
        (frame,) = outer.own_frames

        def other_request():
            nonlocal generator
            with connection_scope(db) as scope, db.atomic():
                assert note.select().where(note.text == "nobody").count() == 0
                mine = db.connection()
                lineage = current_lineage.get()
                generator = None
                gc.collect()
                assert db.connection() is mine
                assert db.transaction_depth() == 1
                assert current_frames.get().scope is scope
                assert current_lineage.get() is lineage
                assert note.select().where(note.text == "nobody").count() == 0

        contextvars.Context().run(other_request)
        assert frame.lineage is None
        if block == "session":
            db.session_rollback()
        assert not db.in_transaction()
        assert not db._state.blocks
        assert note.select().count() == 0


@pytest.mark.parametrize("block", BLOCKS)
def test_a_generator_dropped_after_its_scope_ended_touches_nothing(lite, lite_note, block, caplog):
    """After the end there is nothing left to close, and nothing is raised into the garbage collector."""
    with connection_scope(lite):
        generator = stream(lite, lite_note, block)
        next(generator)
    assert in_use(lite) == 0
    with connection_scope(lite), lite.atomic():
        lite_note.create(text="other")
        del generator
        gc.collect()
        assert lite.transaction_depth() == 1
    with connection_scope(lite):
        assert [row.text for row in lite_note.select()] == ["other"]


def test_nested_blocks_of_one_generator_end_where_they_began(lite, lite_note):
    """`with db` twice in one generator: each end belongs to its beginning."""

    def nested():
        with lite:
            with lite:
                lite_note.create(text="a")
                yield
            yield
        yield

    with connection_scope(lite):
        generator = nested()
        next(generator)
        for _ in range(2):
            contextvars.Context().run(next, generator)
        assert lite.is_closed()
        assert lite_note.select().count() == 1
        assert not lite._state.blocks


def test_a_context_manager_around_with_db_works(lite, lite_note):
    """The usual helper, a generator with `with db` in it, works in threads and tasks."""

    @contextlib.contextmanager
    def session():
        with lite:
            yield lite

    with connection_scope(lite), session() as database:
        assert database.in_transaction()
        lite_note.create(text="a")

    async def main():
        async def work(n):
            async with connection_scope(lite):
                with session():
                    lite_note.create(text=str(n))
                    if n == 1:
                        return

        for n in range(3):
            await work(n)

    asyncio.run(main())
    with connection_scope(lite):
        assert lite_note.select().count() == 4
    assert not lite._state.blocks


def test_a_dependency_set_up_and_torn_down_on_other_threads(db, note):
    """A sync dependency with `with db`: set-up, endpoint and teardown on three threads with copies of one context."""

    def dependency():
        with db:
            yield

    for fails in (False, True):
        with connection_scope(db):
            generator = dependency()
            in_thread(next, generator, context=contextvars.copy_context())
            in_thread(lambda text: note.create(text=text), str(fails), context=contextvars.copy_context())
            assert in_use(db) == 1
            if fails:
                with pytest.raises(KeyError):
                    in_thread(generator.throw, KeyError(), context=contextvars.copy_context())
            else:
                in_thread(next, generator, None, context=contextvars.copy_context())
            assert in_use(db) == 0
            assert [row.text for row in note.select()] == ["False"]


def test_an_async_generator_that_is_not_closed_ends_its_own_block(lite, lite_note):
    """The loop closes a dropped async generator in some other context; the block ends where it began."""

    async def rows():
        with lite.atomic():
            lite_note.create(text="stream")
            yield

    async def main():
        async with connection_scope(lite) as scope:
            generator = rows()
            await anext(generator)
            (frame,) = scope.own_frames
            assert frame.transactions

            async def other():
                nonlocal generator
                async with connection_scope(lite):
                    lite_note.select().count()
                    generator = None
                    gc.collect()
                    for _ in range(5):
                        await asyncio.sleep(0)
                    assert not lite.in_transaction()

            await asyncio.create_task(other(), context=contextvars.Context())
            assert not frame.transactions
            assert lite_note.select().count() == 0

    asyncio.run(main())


def test_a_scope_in_a_dropped_generator_gives_its_connection_back(lite):
    """`connection_scope` in a generator that is dropped ends, and leaves the context it is closed in alone."""

    def generate():
        with connection_scope(lite):
            lite.connection()
            yield

    def other():
        generator = generate()
        next(generator)
        return generator

    generator = contextvars.Context().run(other)
    with connection_scope(lite) as scope:
        lite.connection()
        assert in_use(lite) == 2
        del generator
        gc.collect()
        assert in_use(lite) == 1
        assert current_frames.get().scope is scope


def test_a_scope_that_a_generator_takes_into_another_context_says_so(db, note, caplog):
    """As a sync dependency or stream is run by a framework: a copy of the context for each step."""

    def stream():
        with connection_scope(db, transaction=True, label="a stream"):
            note.create(text="in the scope")
            yield
            note.select().count()  # in none

    steps = stream()
    contextvars.copy_context().run(next, steps)
    with connection_scope(db), pytest.raises(StopIteration):
        contextvars.copy_context().run(next, steps)
    assert "a stream ended in another context than it began in" in caplog.text
    caplog.clear()
    with connection_scope(db, label="at home"):
        note.select().count()
    assert not caplog.records
