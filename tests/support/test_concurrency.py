"""The judges convict the guilty and let the others go."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

from tests.support.concurrency import eventually, run_threads
from tests.support.leftovers import open_sockets, wait_for_sockets, wait_for_threads
from tests.support.loops import both_loops, responsive_loop


def test_threads_run_at_once_and_give_their_results_in_order():
    together = threading.Barrier(8)

    def meet(index: int) -> int:
        together.wait(10)
        return index * index

    assert run_threads(8, meet) == [index * index for index in range(8)]


def test_exceptions_of_threads_come_out():
    with pytest.raises(ZeroDivisionError):
        run_threads(3, lambda index: 1 // index)
    with pytest.raises(ExceptionGroup, match="2 of 2 threads failed"):
        run_threads(2, lambda _: 1 // 0)
    results = run_threads(2, lambda index: 1 // index, return_exceptions=True)
    assert isinstance(results[0], ZeroDivisionError)
    assert results[1] == 1


def test_a_thread_that_does_not_end_is_reported():
    release = threading.Event()
    with pytest.raises(TimeoutError, match="1 of 2 threads still run"):
        run_threads(2, lambda index: index or release.wait(60), deadline=0.2)
    release.set()


def test_eventually_gives_what_became_true_or_fails():
    values = iter([0, None, "", "yes"])
    assert eventually(lambda: next(values)) == "yes"
    with pytest.raises(AssertionError, match="never this"):
        eventually(lambda: False, deadline=0.02, message="never this")


@both_loops
@pytest.mark.anyio
async def test_a_blocked_loop_is_found():
    async def block() -> None:
        with responsive_loop():
            asyncio.get_running_loop().call_soon(time.sleep, 0.3)
            await asyncio.sleep(0.01)

    with pytest.raises(AssertionError, match="the event loop was blocked"):
        await block()


@both_loops
@pytest.mark.anyio
async def test_work_in_threads_is_no_offence(responsive_loop):
    await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.1) for _ in range(4)))


def test_leftover_threads_and_sockets_are_seen(monkeypatch):
    monkeypatch.setattr("tests.support.leftovers.GRACE_SECONDS", 0.05)
    threads, sockets = set(threading.enumerate()), open_sockets()
    release = threading.Event()
    thread = threading.Thread(target=release.wait, args=(10,), name="forgotten")
    thread.start()
    with socket.socket():
        assert len(wait_for_sockets(sockets)) == 1
    assert wait_for_threads(threads) == ["forgotten"]
    release.set()
    assert wait_for_threads(threads) == []
    assert wait_for_sockets(sockets) == frozenset()
