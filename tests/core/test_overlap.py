"""One connection has one user at a time."""

from __future__ import annotations

import contextvars
import threading

import peewee
import pytest

from peewee_frameworks import ConcurrentUse, connection_scope
from peewee_frameworks.frame import Frame
from tests.core.helpers import SlowStatement, in_thread, start
from tests.support.concurrency import run_threads


def test_a_second_thread_is_refused_while_a_statement_runs(lite, lite_note):
    """A statement that overlaps another on the same connection raises, names the remedy, and harms nothing."""
    slow = SlowStatement(lite)
    with connection_scope(lite):
        first = start(slow.run, context=contextvars.copy_context())
        slow.gate.wait()
        with pytest.raises(ConcurrentUse, match=r"orm\.run.*connection_scope"):
            lite_note.select().count()
        for call in (lite.close, lite.begin, lite.commit, lite.rollback, lite.is_connection_usable):
            with pytest.raises(ConcurrentUse):
                call()
        slow.gate.open()
        assert first.result(10) == (1,)
        assert lite_note.select().count() == 0


def test_threads_that_take_turns_share_the_connection(db, note):
    """Statements one after the other, from whatever thread, are all served."""
    with connection_scope(db):
        conn = db.connection()
        for number in range(5):
            in_thread(lambda n: note.create(text=str(n)), number, context=contextvars.copy_context())
        assert note.select().count() == 5
        assert db.connection() is conn


def test_a_query_hook_may_query(lite, lite_note):
    """A statement inside a statement of the same thread is no second user."""
    seen = []

    def hook(event):
        if not seen:
            seen.append(event.sql)
            seen.append(lite_note.select().count())

    with connection_scope(lite):
        lite_note.create(text="a")
        lite.query_hooks.append(hook)
        lite_note.create(text="b")
        lite.query_hooks.clear()
        assert seen[1] == 2
        # The guard is free again.
        assert in_thread(lite_note.select().count, context=contextvars.copy_context()) == 2


def test_after_an_error_the_connection_is_free_again(db, note):
    """A statement that fails leaves the guard as it found it."""
    with connection_scope(db):
        note.create(text="a")
        with pytest.raises(peewee.IntegrityError):
            note.create(text="a")
        assert in_thread(note.select().count, context=contextvars.copy_context()) == 1


def test_many_threads_get_right_results_or_an_error(db, note):
    """Whatever threads do to one connection at once, a result that comes is the right one."""
    with connection_scope(db):
        for number in range(8):
            note.create(text=str(number))
        ids = {note.text: note.id for note in note.select()}
        contexts = [contextvars.copy_context() for _ in range(8)]

        def work(index):
            right = refused = 0
            for _ in range(20):
                try:
                    assert contexts[index].run(note.get_by_id, ids[str(index)]).text == str(index)
                    right += 1
                except ConcurrentUse:
                    refused += 1
            return right, refused

        results = run_threads(8, work)
        assert sum(right for right, _ in results) > 0
        assert note.select().count() == 8


def test_an_early_release_is_not_a_second_user(lite, lite_note):
    """A query that meets the housekeeping of another thread waits for that moment instead of failing."""
    with connection_scope(lite) as scope:
        lite_note.select().count()
        (frame,) = scope.own_frames
        held, done = threading.Event(), threading.Event()

        def housekeeping():
            frame._acquire(True)
            held.set()
            done.wait(10)
            frame._release()

        keeper = start(housekeeping)
        assert held.wait(10)
        query = start(lite_note.select().count, context=contextvars.copy_context())
        done.set()
        assert query.result(10) == 0
        keeper.result(10)


def test_the_guard_never_waits_for_ever(lite, monkeypatch):
    """Even a guard whose holder never says who it is ends in an error."""
    monkeypatch.setattr("peewee_frameworks.frame._HOUSEKEEPING_TRIES", 3)
    frame = Frame(lite._state, "test")
    release = threading.Event()
    held = threading.Event()

    def hold():
        frame._acquire(True)
        held.set()
        release.wait(10)
        frame._release()

    holder = start(hold)
    assert held.wait(10)
    with pytest.raises(ConcurrentUse):
        frame.enter()
    release.set()
    holder.result(10)


def test_greenlets_of_one_thread_are_told_apart(lite):
    """Where greenlet is loaded, two greenlets on one thread are two users."""
    greenlet = pytest.importorskip("greenlet")
    frame = Frame(lite._state, "test")

    def enter_and_pause():
        frame.enter()
        greenlet.getcurrent().parent.switch("inside")
        frame.leave()
        return "left"

    other = greenlet.greenlet(enter_and_pause)
    assert other.switch() == "inside"
    with pytest.raises(ConcurrentUse):
        frame.enter()
    assert other.switch() == "left"
    frame.enter()
    frame.enter()
    frame.leave()
    frame.leave()
