"""A transaction belongs to the code that comes from inside its block."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading

import peewee
import pytest

from peewee_frameworks import ConcurrentUse, TransactionLost, connection_scope
from peewee_frameworks.frame import current_lineage
from peewee_frameworks.state import install
from tests.core.conftest import make_note
from tests.core.helpers import in_thread
from tests.support.concurrency import run_threads


def frame_of(scope):
    (frame,) = scope.own_frames
    return frame


def test_a_sibling_task_is_kept_out_of_an_open_transaction(db, note):
    """A task that was not started inside the block gets ConcurrentUse, and its row is in nobody's transaction."""

    async def main():
        inside, tried = asyncio.Event(), asyncio.Event()

        async def holder():
            with db.atomic() as transaction:
                note.create(text="mine")
                inside.set()
                await tried.wait()
                transaction.rollback(begin=False)
                db.begin()

        async def sibling():
            await inside.wait()
            try:
                for call in (lambda: note.create(text="theirs"), db.begin, db.close, lambda: db.after_commit(print)):
                    with pytest.raises(ConcurrentUse, match="not started from inside"):
                        call()
            finally:
                tried.set()

        async with connection_scope(db):
            await asyncio.gather(holder(), sibling())
            note.create(text="after")
            assert [note.text for note in note.select()] == ["after"]

    asyncio.run(main())


def test_a_sibling_thread_is_kept_out_too(lite, lite_note):
    """The same holds for a thread whose context was copied before the block."""
    with connection_scope(lite):
        before = contextvars.copy_context()
        with lite.atomic(), pytest.raises(ConcurrentUse):
            in_thread(lite_note.select().count, context=before)
        assert in_thread(lite_note.select().count, context=before) == 0


def test_children_of_the_block_take_part_in_it(db, note):
    """Tasks and threads started inside the block work in its transaction."""

    async def main():
        async with connection_scope(db):
            with pytest.raises(KeyError), db.atomic():
                await asyncio.gather(*[asyncio.to_thread(note.create, text="a")])

                async def child():
                    note.create(text="b")
                    await asyncio.to_thread(note.create, text="c")

                await asyncio.create_task(child())
                assert note.select().count() == 3
                raise KeyError
            assert note.select().count() == 0

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["task", "thread"])
def test_a_child_that_outlives_a_block_that_was_rolled_back_is_kept_out(db, note, kind):
    """Its statement was meant to be undone with the block; now it would be committed by itself."""
    go = threading.Event()

    def write() -> None:
        assert go.wait(10)
        note.create(text="child")

    async def main() -> None:
        async with connection_scope(db):
            with pytest.raises(ZeroDivisionError), db.atomic():
                note.create(text="block")
                child = asyncio.create_task(asyncio.to_thread(write) if kind == "thread" else later())
                await asyncio.sleep(0)
                1 / 0  # noqa: B018
            note.create(text="after")
            go.set()
            with pytest.raises(TransactionLost, match="was rolled back meanwhile"):
                await child
            note.create(text="and after")
            assert [row.text for row in note.select().order_by(note.id)] == ["after", "and after"]

    async def later() -> None:
        await asyncio.to_thread(go.wait, 10)
        write()

    asyncio.run(main())


def test_an_inner_block_keeps_out_those_of_the_outer(db, note):
    """A savepoint belongs to its own children: another child of the outer block waits for its end."""
    with connection_scope(db), db.atomic():
        outer = contextvars.copy_context()
        with db.atomic():
            inner = contextvars.copy_context()
            assert in_thread(note.select().count, context=inner) == 0
            with pytest.raises(ConcurrentUse):
                in_thread(note.select().count, context=outer)
        assert in_thread(note.select().count, context=outer) == 0
        # Its children belong to the outer block as well.
        assert in_thread(note.select().count, context=inner) == 0


def test_blocks_that_end_in_the_wrong_order_leave_nothing_closed(lite, lite_note):
    """When an outer block ends before an inner one, the connection is free for all after both."""
    with connection_scope(lite) as scope:
        bystander = contextvars.copy_context()
        outer, inner = lite.atomic(), lite.atomic()
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)
        with pytest.raises(peewee.OperationalError):
            inner.__exit__(None, None, None)  # no such savepoint
        assert frame_of(scope).lineage is None
        assert in_thread(lite_note.select().count, context=bystander) == 0


def test_after_the_commit_callbacks_are_outside_the_transaction(db, note):
    """What runs after the commit may start work that is no child of the block."""
    with connection_scope(db):
        bystander = contextvars.copy_context()
        seen = []

        def committed():
            seen.append(in_thread(note.select().count, context=bystander))

        with db.atomic():
            db.after_commit(committed)
            note.create(text="a")
            assert seen == []
        assert seen == [1]


@pytest.mark.parametrize("make", ["atomic", "transaction"])
def test_one_block_object_serves_several_threads(lite, lite_note, make):
    """A block object that two threads enter ends, for each, the transaction that it began, whoever leaves first."""
    shared = getattr(lite, make)()
    entered, both_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first():
        with connection_scope(lite):
            with pytest.raises(KeyError), shared:
                lite_note.select().count()
                entered.set()
                assert both_in.wait(10)
                raise KeyError
            first_out.set()

    def second():
        assert entered.wait(10)
        with connection_scope(lite), shared:
            lite_note.create(text="second")
            both_in.set()
            assert first_out.wait(10)
            assert lite.in_transaction()

    run_threads(2, lambda index: (first, second)[index]())
    with connection_scope(lite):
        assert lite_note.select().count() == 1


def test_one_transaction_object_may_be_nested(lite, lite_note):
    """Entering the same object twice ends cleanly, as in Peewee."""
    block = lite.transaction()
    with connection_scope(lite) as scope:
        with block, block:
            lite_note.create(text="a")
        assert frame_of(scope).lineage is None
        assert not lite.in_transaction()
        assert lite_note.select().count() == 1


def test_the_mark_of_a_long_lived_context_does_not_grow(lite):
    """A context that goes through thousands of blocks carries no chain of them."""
    with connection_scope(lite):
        for _ in range(50):
            with lite.atomic():
                pass
        assert current_lineage.get() is None
        for _ in range(5):  # begun here, ended elsewhere
            block = lite.atomic()
            block.__enter__()
            contextvars.copy_context().run(block.__exit__, None, None, None)
        assert current_lineage.get().outer is None


def test_a_coroutine_closed_elsewhere_ends_its_own_transaction(db, note):
    """A block that the garbage collector closes, in another scope's context, rolls back where it began."""

    async def abandoned():
        with db.atomic():
            note.create(text="abandoned")
            await asyncio.sleep(3600)

    async def main():
        async with connection_scope(db) as scope:
            coroutine = abandoned()
            coroutine.send(None)
            frame = frame_of(scope)
            assert frame.transactions

            async def other():
                nonlocal coroutine
                async with connection_scope(db):
                    with db.atomic():
                        note.select().count()
                        coroutine = None
                        gc.collect()

            await asyncio.create_task(other(), context=contextvars.Context())
            assert not frame.transactions
            assert frame.lineage is None
            assert note.select().count() == 0

    asyncio.run(main())


def test_a_sync_dependency_hands_its_block_over(lite, lite_note):
    """A block in a generator that was set up on a worker thread belongs to the whole scope."""

    def dependency():
        with lite.atomic():
            yield

    with connection_scope(lite):
        generator = dependency()
        in_thread(next, generator, context=contextvars.copy_context())
        in_thread(lambda: lite_note.create(text="a"), context=contextvars.copy_context())
        assert lite.in_transaction()
        with pytest.raises(KeyError):
            in_thread(generator.throw, KeyError(), context=contextvars.copy_context())
        assert not lite.in_transaction()
        assert lite_note.select().count() == 0


def test_so_does_one_that_uses_an_exit_stack(lite, lite_note):
    """The block may be entered through contextlib's ExitStack."""

    def dependency():
        with contextlib.ExitStack() as stack:
            stack.enter_context(lite.atomic())
            yield

    with connection_scope(lite):
        generator = dependency()
        in_thread(next, generator, context=contextvars.copy_context())
        assert in_thread(lite_note.select().count, context=contextvars.copy_context()) == 0
        in_thread(next, generator, None, context=contextvars.copy_context())


def test_a_proxy_that_was_never_installed_keeps_siblings_out_too(make_sqlite):
    """A block of a stock DatabaseProxy in front of an installed database is guarded as well."""
    database = make_sqlite()
    proxy = peewee.DatabaseProxy()
    proxy.initialize(database)
    note = make_note(database)
    with connection_scope(database) as scope:
        before = contextvars.copy_context()
        with proxy.atomic():
            note.create(text="a")
            with pytest.raises(ConcurrentUse):
                in_thread(note.select().count, context=before)
        assert frame_of(scope).lineage is None
        with pytest.raises(KeyError), proxy.atomic():
            raise KeyError
        assert in_thread(note.select().count, context=before) == 1


def test_a_session_belongs_to_the_whole_scope(db, note):
    """`session_start` is no block: whoever shares the scope may go on with it."""
    with connection_scope(db):
        before = contextvars.copy_context()
        db.session_start()
        in_thread(lambda: note.create(text="a"), context=before)
        assert in_thread(db.session_rollback, context=before)
        assert note.select().count() == 0
        db.session_start()
        note.create(text="b")
        assert db.session_commit()
        assert not db.session_commit()
        assert note.select().count() == 1


def test_outside_scopes_blocks_have_no_mark(lite, lite_note):
    """A private connection needs no lineage."""
    install(lite)
    with lite.atomic():
        assert current_lineage.get() is None
    lite.close()
