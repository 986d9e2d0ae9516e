"""Threads, tasks and cancellations at random: nothing is left, nobody meets, nothing that was rolled back is there."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import random
import threading
import time
from typing import TYPE_CHECKING

import peewee
import pytest

from peewee_frameworks import ScopeError, WouldBlock, connection_scope
from peewee_frameworks.scope import Scope, complete
from peewee_frameworks.state import install
from tests.core.conftest import make_note
from tests.support.concurrency import eventually, run_threads

if TYPE_CHECKING:
    from peewee_frameworks.frame import Frame

SECONDS = float(os.environ.get("PEEWEE_FRAMEWORKS_SOAK_SECONDS", "4"))
EXPECTED = (ScopeError, WouldBlock)


class Ledger:
    """What must and what must not be in the table, and who holds which connection."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = iter(range(1, 10**9))
        self.kept: set[str] = set()
        self.open: set[str] = set()
        self.scopes: set[Scope] = set()
        self.met: list[str] = []
        self.counts: dict[str, int] = {}

    def text(self) -> str:
        with self._lock:
            text = str(next(self._numbers))
            self.open.add(text)  # may be there or not, until it is settled
            return text

    def settle(self, text: str, *, kept: bool) -> None:
        with self._lock:
            self.open.discard(text)
            if kept:
                self.kept.add(text)

    def enter(self, scope: Scope) -> None:
        with self._lock:
            self.scopes.add(scope)

    def leave(self, scope: Scope) -> None:
        with self._lock:
            self.scopes.discard(scope)

    def check_holders(self, frame: Frame) -> None:
        """While we are the user of a connection, no other unit of work has it."""
        frame.enter()
        try:
            with self._lock:
                scopes = list(self.scopes)
            for other in [other for scope in scopes for other in list(scope.own_frames)]:
                if other is not frame and other.conn is frame.conn and frame.conn is not None:
                    self.met.append(f"{frame.label} and {other.label} have one connection")
        finally:
            frame.leave()

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] = self.counts.get(what, 0) + 1


class Actor:
    """One unit of work of random steps."""

    def __init__(self, database, note, ledger, seed):
        self.database, self.note, self.ledger = database, note, ledger
        self.random = random.Random(seed)

    def steps(self, scope):
        for _ in range(self.random.randint(1, 4)):
            self.random.choice([self.read, self.write, self.write, self.fail, self.nested, self.begin, self.early])(
                scope
            )

    def check(self):
        self.ledger.check_holders(self.database._state.frame())

    def read(self, scope):
        number = self.random.randrange(10**6)
        assert self.database.execute_sql(f"SELECT {number}").fetchone()[0] == number
        self.check()

    def write(self, scope):
        text = self.ledger.text()
        with self.database.atomic() as block:
            self.note.create(text=text)
            self.check()
        if isinstance(block, peewee._transaction):  # else the block around decides
            self.ledger.settle(text, kept=True)

    def fail(self, scope):
        text = self.ledger.text()
        try:
            with self.database.atomic():
                self.note.create(text=text)
                raise KeyError
        except KeyError:
            self.ledger.settle(text, kept=False)

    def nested(self, scope):
        with self.database.atomic():
            self.read(scope)
            self.fail(scope)

    def begin(self, scope):
        """Leave a transaction open; the end of the scope rolls it back."""
        if self.random.random() < 0.3 and not self.database.in_transaction():
            text = self.ledger.text()
            self.database.session_start()
            self.note.create(text=text)
            self.ledger.settle(text, kept=False)
            raise StopWorkError

    def early(self, scope):
        scope.release_early()


class StopWorkError(Exception):
    pass


def thread_unit(database, note, ledger, seed):
    """A request on a thread, with a child thread now and then, some of them atomic, some left in the middle."""
    actor = Actor(database, note, ledger, seed)
    scope = Scope([install(database)], f"unit {seed}")
    scope.enter()
    ledger.enter(scope)
    child = None
    try:
        if actor.random.random() < 0.3:
            scope.set_atomic()
        if actor.random.random() < 0.4:
            context, second = contextvars.copy_context(), Actor(database, note, ledger, seed + 0.5)
            child = threading.Thread(target=context.run, args=(guarded_steps, second, scope), daemon=True)
            child.start()
        actor.steps(scope)
        scope.complete()
    except (*EXPECTED, StopWorkError, peewee.OperationalError, peewee.InternalError) as error:
        ledger.count(type(error).__name__)
    finally:
        if actor.random.random() < 0.5 and child is not None:
            child.join(20)
        scope.finish()
        scope.exit()
        ledger.leave(scope)
    if child is not None:
        child.join(20)
        assert not child.is_alive()


def guarded_steps(actor, scope):
    try:
        actor.steps(scope)
    except (*EXPECTED, StopWorkError, peewee.OperationalError, peewee.InternalError) as error:
        actor.ledger.count("child " + type(error).__name__)


async def task_unit(database, note, ledger, seed):
    """A request in a task, on the loop or in threads, cancelled at a random moment."""
    actor = Actor(database, note, ledger, seed)
    scope = Scope([install(database)], f"unit {seed}")
    scope.enter()
    ledger.enter(scope)
    try:
        if actor.random.random() < 0.3:
            scope.set_atomic()
        if actor.random.random() < 0.5:
            await asyncio.to_thread(guarded_steps, actor, scope)
        else:
            actor.steps(scope)
            await asyncio.sleep(0)
            actor.steps(scope)
        await complete(scope)
    except (*EXPECTED, StopWorkError, peewee.OperationalError, peewee.InternalError) as error:
        ledger.count("task " + type(error).__name__)
    finally:
        scope.finish()
        scope.exit()
        ledger.leave(scope)


def loop_of_tasks(database, note, ledger, seed, end):
    chance = random.Random(seed)

    async def main():
        number = 0
        while time.monotonic() < end:
            tasks = []
            for _ in range(4):
                number += 1
                context = contextvars.Context()
                unit = task_unit(database, note, ledger, seed * 10**6 + number)
                tasks.append(asyncio.create_task(unit, context=context))
            await asyncio.sleep(chance.random() * 0.01)
            for task in tasks:
                if chance.random() < 0.5:
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for task in tasks:
                if not task.cancelled() and task.exception() is not None:
                    raise task.exception()

    asyncio.run(main())


@pytest.mark.parametrize("seed", [20240117])
def test_nothing_is_left_and_nobody_meets(place, seed):
    """After seconds of random work from threads and cancelled tasks the books balance."""
    options = {"timeout": 20}
    if place.kind == "sqlite":
        # A task may wait for another of its own loop, and an SQLite wait stops the loop: let it be short.
        options["pragmas"] = {
            "journal_mode": "wal",
            "synchronous": "off",
            "busy_timeout": 50,
        }  # a task may wait for one of its own loop
    database = place.make_database(**options)
    state = install(database)
    note = make_note(database)
    ledger = Ledger()
    end = time.monotonic() + SECONDS / 3

    def work(index):
        if index == 0:
            loop_of_tasks(database, note, ledger, seed, end)
            return
        number = 0
        while time.monotonic() < end:
            number += 1
            contextvars.Context().run(thread_unit, database, note, ledger, seed + index * 10**6 + number)

    logger = logging.getLogger("peewee_frameworks")
    logger.setLevel(logging.ERROR)  # what was open at the end is warned of each time
    try:
        run_threads(5, work, deadline=60)
        gc.collect()
        eventually(lambda: not database._in_use, message=f"in use at the end; {ledger.counts}")
    finally:
        logger.setLevel(logging.NOTSET)
    assert not ledger.met
    assert not state.blocks
    assert all(frame.conn is None for frame in state.implicit_frames())
    with connection_scope(database):
        there = {row.text for row in note.select()}
    assert ledger.kept - there == set(), "committed, but not there"
    assert there - ledger.kept - ledger.open == set(), "rolled back, but there"
    assert ledger.kept, f"nothing was done: {ledger.counts}"
    with database.connection_context():
        note.delete().execute()
    database.close_all()
