"""A pool belongs to the event loop and the process that opened it: anywhere else an error at once, never a hang."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time

import peewee
import pytest

from peewee_frameworks import DatabaseUnavailable, WrongEventLoop, connection_scope
from peewee_frameworks.asgi import PeeweeMiddleware
from tests.aio.conftest import run
from tests.support.concurrency import eventually
from tests.support.proxy import Proxy


async def answer(db):
    async with connection_scope(db):
        return list(await db.aexecute_sql("SELECT 42"))[0][0]  # noqa: RUF015 - a cursor has no index


async def answers(db, count):
    return await asyncio.gather(*(asyncio.create_task(answer(db)) for _ in range(count)))


def sessions(backend):
    """Count what the server still sees, once those that were closed have had the time to go."""
    with contextlib.suppress(AssertionError):
        eventually(lambda: not backend.place.sessions(), 2)
    return len(backend.place.sessions())


class OtherLoop:
    """A loop that lives in a thread of its own."""

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="other-loop", daemon=True)
        self.thread.start()
        return self

    def __call__(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def __exit__(self, *exc_info):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


def test_one_loop_after_another(backend):
    """`asyncio.run` again and again, growing the pool each time; each leaves nothing on the server."""
    db = backend.make(size=3)
    for _ in range(3):
        assert run(answers(db, 3)) == [42] * 3
        assert sessions(backend) == 0


def test_a_script_that_never_closes_anything_ends_cleanly(backend):
    """Without a scope and without `close_pool`: the connection of the main task is returned, and the pool closed."""

    async def main():
        return len(list(await db.aexecute_sql("SELECT 1")))

    db = backend.make()
    assert run(main()) == 1
    assert sessions(backend) == 0
    assert run(main()) == 1


def test_a_pool_of_a_living_loop_is_refused_elsewhere_at_once(backend):
    """The error names both loops and the remedy, and the pool goes on where it lives."""
    db = backend.make(timeout=20)
    with OtherLoop() as home:
        assert home(answer(db)) == 42
        start = time.monotonic()
        for work in (answer(db), db.close_pool(), db.open_pool()):
            with pytest.raises(WrongEventLoop) as refused:
                run(work)
        assert time.monotonic() - start < 1
        message = str(refused.value)
        assert "'other-loop'" in message
        assert "'MainThread'" in message
        assert "run_coroutine_threadsafe" in message
        assert home(answer(db)) == 42
        home(db.close_pool())
        assert run(answer(db)) == 42
        assert home(answer(db)) == 42
        home(db.close_pool())


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_that_was_closed_without_a_farewell_costs_nothing_but_a_warning(backend, caplog):
    """A hand-made loop, closed without cancelling its tasks: the next loop gets a new pool."""
    db = backend.make()
    loop = asyncio.new_event_loop()

    async def leave_returning():
        assert await asyncio.create_task(db.aexecute_sql("SELECT 42"))

    assert loop.run_until_complete(answer(db)) == 42
    loop.run_until_complete(leave_returning())  # that task's connection is on its way back
    loop.close()
    assert run(answer(db)) == 42
    assert "was closed without closing the pool" in caplog.text

    async def close():
        assert await answer(db) == 42
        start = time.monotonic()
        await db.close_pool()
        return time.monotonic() - start

    assert run(close()) < 2
    assert "still in use when the pool was closed" not in caplog.text
    del loop
    gc.collect()


def test_after_a_fork_the_child_is_refused_and_the_parent_goes_on(backend):
    """The child may call `dispose()` and then has a pool of its own; it never touches the parent's sessions."""

    async def child():
        try:
            await answer(db)
        except WrongEventLoop as error:
            assert "fork" in str(error)
            assert "dispose" in str(error)
        else:
            return 1
        db.dispose()
        gc.collect()
        return 0 if await answer(db) == 42 else 2

    async def main():
        async with connection_scope(db):
            await db.aexecute_sql("SELECT 1")
            pid = os.fork()
            if pid == 0:
                os._exit(in_child())
            status = await asyncio.to_thread(os.waitpid, pid, 0)
            assert os.waitstatus_to_exitcode(status[1]) == 0
            return list(await db.aexecute_sql("SELECT 42"))[0][0]  # noqa: RUF015 - a cursor has no index

    def in_child():
        asyncio._set_running_loop(None)
        try:
            loop = asyncio.new_event_loop()
            return loop.run_until_complete(asyncio.wait_for(child(), 10))
        except BaseException:
            import traceback

            traceback.print_exc()
            return 3

    if backend.driver == "aiosqlite":
        pytest.skip("SQLite itself forbids a connection across a fork")
    db = backend.make()
    assert run(main()) == 42


def test_an_unreachable_server_does_not_hold_up_the_end_of_the_loop(backends):
    """A worker of psycopg's pool that is connecting swallows the cancellation; the sentinel ends it."""
    backend = backends("psycopg")
    with Proxy(backend.place.address) as proxy:
        backend.place = backend.place.via(*proxy.address)
        db = backend.make(size=2, timeout=0.5)
        proxy.hang()
        start = time.monotonic()
        with pytest.raises(peewee.OperationalError):
            run(answer(db))
        assert time.monotonic() - start < 6


def test_a_server_that_is_down_is_an_error_that_says_so_and_not_for_ever(backends, free_port):
    """Refused at once, as `DatabaseUnavailable`; when the server is there the same database works."""
    for driver in ("aiomysql", "asyncpg", "psycopg"):
        backend = backends(driver)
        place = backend.place
        backend.place = place.via("127.0.0.1", free_port)
        db = backend.make(timeout=60)
        with pytest.raises(DatabaseUnavailable, match="connecting failed"):
            run(answer(db))
        db.connect_params["port"] = place.kwargs["port"]
        assert run(answer(db)) == 42


def test_test_clients_with_and_without_lifespan(backend):
    """A test client without `with` runs each request in a loop of its own; with it, all in one."""
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    async def endpoint(request):
        return PlainTextResponse(str(list(await db.aexecute_sql("SELECT 42"))[0][0]))  # noqa: RUF015

    db = backend.make()
    app = PeeweeMiddleware(Starlette(routes=[Route("/", endpoint)]), db)
    client = TestClient(app)
    assert [client.get("/").text for _ in range(3)] == ["42"] * 3
    assert sessions(backend) == 0
    for _ in range(2):
        with TestClient(app) as client:
            assert [client.get("/").text for _ in range(3)] == ["42"] * 3
        assert sessions(backend) == 0


def test_closing_waits_for_what_is_in_use(backend):
    """A job beside the requests finishes its statement."""
    db = backend.make()

    async def main():
        async def job():
            async with connection_scope(db):
                await db.aexecute_sql("SELECT 1")
                begun.set()
                await db.aexecute_sql(backend.brief)

        begun = asyncio.Event()
        task = asyncio.create_task(job())
        await begun.wait()
        await asyncio.sleep(0)
        await db.close_pool(5)
        await task
        assert sessions(backend) == 0

    run(main())


def test_closing_cuts_off_what_is_still_in_use_and_the_pool_opens_again(backend, caplog):
    """A connection that nobody returns does not hold up the end for longer than told."""

    async def hold(holding, done):
        async with connection_scope(db):
            await db.aexecute_sql("SELECT 1")
            holding.set()
            await done.wait()

    async def main():
        holding, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(hold(holding, done))
        await holding.wait()
        start = time.monotonic()
        await db.close_pool(0.3)
        assert time.monotonic() - start < 2
        assert await answer(db) == 42
        done.set()
        await task
        return await answer(db)

    db = backend.make()
    assert run(main()) == 42
    assert sessions(backend) == 0
