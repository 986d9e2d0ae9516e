"""Work that must not wait for anybody, on threads of its own."""

from __future__ import annotations

import asyncio
import threading
import weakref

import pytest

from peewee_frameworks.background import Background
from tests.core.helpers import DEADLINE, Gate
from tests.support.concurrency import eventually, run_threads


def test_a_job_gives_its_result_or_its_exception():
    """The future carries what the job returned or raised."""
    background = Background()
    assert background.submit(lambda: 7).result(DEADLINE) == 7
    with pytest.raises(KeyError):
        background.submit(lambda: {}["x"]).result(DEADLINE)
    assert background.submit(lambda: 8).result(DEADLINE) == 8


def test_even_a_base_exception_costs_no_thread():
    """SystemExit in a job reaches the future, and the thread goes on."""
    background = Background(max_threads=1)

    def leave():
        raise SystemExit

    with pytest.raises(SystemExit):
        background.submit(leave).result(DEADLINE)
    assert background.submit(threading.get_ident).result(DEADLINE)
    assert background._threads == 1


def test_a_cancelled_waiter_does_not_cancel_the_job():
    """Whoever awaits a return may be cancelled, even before the job began; the job is done and the thread lives."""
    background = Background(max_threads=1)
    gate, done = Gate(), threading.Event()
    background.submit(gate)
    gate.wait()

    async def main():
        waiting = asyncio.ensure_future(asyncio.wrap_future(background.submit(done.set)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())
    gate.open()
    assert done.wait(DEADLINE)
    assert background.submit(lambda: 1).result(DEADLINE) == 1


def test_jobs_run_side_by_side_up_to_the_limit():
    """As many threads as there are jobs, but no more than the limit; the rest waits its turn."""
    background = Background(max_threads=3)
    gates = [Gate() for _ in range(3)]
    futures = [background.submit(gate) for gate in gates]
    for gate in gates:
        gate.wait()
    last = background.submit(lambda: "last")
    assert not last.done()
    gates[0].open()
    assert last.result(DEADLINE) == "last"
    for gate in gates:
        gate.open()
    assert [future.result(DEADLINE) for future in futures] == [1, 1, 1]
    assert background._threads == 3


def test_idle_threads_end():
    """Nothing stays behind, and the next job finds a thread."""
    background = Background(idle_seconds=0.01)
    for _ in range(5):
        assert background.submit(lambda: 1).result(DEADLINE) == 1
        eventually(lambda: background._threads == 0)


def test_first_jobs_from_many_threads_are_all_done():
    """Threads that submit at the same first moment share one queue."""
    for _ in range(30):
        background = Background(idle_seconds=0.01)
        futures = run_threads(6, lambda index, background=background: background.submit(lambda: index))
        assert [future.result(DEADLINE) for future in futures] == list(range(6))
        eventually(lambda background=background: background._threads == 0)


def test_where_no_thread_can_be_started_the_job_is_done_at_once(monkeypatch):
    """At the interpreter's end, or out of threads, the work is done by whoever asks for it."""
    background = Background()

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert background.submit(threading.get_ident).result(0) == threading.get_ident()
    assert background._threads == 0


def test_an_idle_thread_keeps_nothing_alive():
    """What a job worked on can be collected as soon as it is done."""
    background = Background(idle_seconds=60)

    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing)
    future = background.submit(lambda thing=thing: thing)
    assert future.result(DEADLINE) is thing
    del thing, future
    eventually(lambda: reference() is None)


def test_a_forked_child_starts_anew():
    """The threads and the lock of the parent are not there in the child."""
    background = Background()
    background.submit(lambda: 1).result(DEADLINE)
    background.after_fork()
    assert background._threads == 0
    assert background.submit(lambda: 2).result(DEADLINE) == 2
