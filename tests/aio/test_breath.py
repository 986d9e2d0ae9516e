"""A turn of the loop ends before it gets long, however many units of work want to go on in it."""

from __future__ import annotations

import asyncio
import types

import pytest

from peewee_frameworks import connection_scope
from peewee_frameworks.aio import breath
from peewee_frameworks.aio.breath import Breath
from tests.aio.conftest import run


@pytest.fixture
def clock(monkeypatch):
    """Processor time goes on by what the tasks say they take, and by nothing else."""
    clock = types.SimpleNamespace(now=1.0)
    monkeypatch.setattr(breath, "time", types.SimpleNamespace(thread_time=lambda: clock.now))
    return clock


def test_a_turn_lets_so_many_go_on_as_have_time_and_the_others_in_order(clock):
    """100 of 1 ms each, in turns of 2 ms."""
    breath, order, turns = Breath(), [], []

    async def task(number):
        if breath.is_due():
            await breath.draw()
        order.append(number)
        turns[-1] += 1
        clock.now += 0.001

    async def count_turns():
        while len(order) < 100:
            turns.append(0)
            await asyncio.sleep(0)

    async def main():
        counting = asyncio.create_task(count_turns())
        await asyncio.gather(*(asyncio.create_task(task(number)) for number in range(100)))
        await counting

    run(main())
    assert order == list(range(100))
    assert max(turns) <= 4
    assert not breath._waiting


def test_who_is_cancelled_while_it_waits_holds_up_nobody(clock):
    breath, done = Breath(), []

    async def task(number):
        if breath.is_due():
            await breath.draw()
        done.append(number)
        clock.now += 0.01

    async def main():
        tasks = [asyncio.create_task(task(number)) for number in range(20)]
        await asyncio.sleep(0)
        for each in tasks[1::2]:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(main())
    assert done == list(range(0, 20, 2))
    assert not breath._waiting


def test_units_of_work_that_all_draw_breath_get_their_own_answers(backend, monkeypatch):
    """At every statement, and one that is cancelled just then loses neither its connection nor its transaction's end."""
    monkeypatch.setattr(breath, "TURN_SECONDS", 0.0)
    db = backend.make(size=3)

    async def unit(number):
        async with connection_scope(db), db.atomic():
            return await db.run(lambda: [db.execute_sql(f"SELECT {number}").fetchone()[0] for _ in range(3)])

    async def main():
        tasks = [asyncio.create_task(unit(number)) for number in range(40)]
        for _ in range(5):
            await asyncio.sleep(0)
        for each in tasks[::4]:
            each.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for number, answer in enumerate(answers):
            assert answer == [number] * 3 or (number % 4 == 0 and isinstance(answer, asyncio.CancelledError))
        await db.close_pool()

    run(main())
