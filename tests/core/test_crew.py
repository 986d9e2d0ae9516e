"""The threads of `orm.run`: they go on by themselves, and a place belongs to a scope until it holds no connection."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import gc
import multiprocessing
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import peewee
import pytest

from peewee_frameworks import ConfigurationError, PoolTimeout
from peewee_frameworks.aio import sync
from peewee_frameworks.pool import PooledSqliteDatabase
from peewee_frameworks.run import Runner
from peewee_frameworks.runtime import Runtime
from peewee_frameworks.scope import Scope
from peewee_frameworks.state import install
from tests.support.concurrency import eventually, run_threads

SECONDS = 10


@pytest.fixture
def db(tmp_path):
    db = PooledSqliteDatabase(str(tmp_path / "crew.db"), max_connections=4)
    yield db
    db.pool.close()


@pytest.fixture
def make_runner():
    runners = []

    def make(threads=1, timeout=None):
        runners.append(Runner(threads, timeout))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


@pytest.fixture
def scopes(db):
    """Give scopes of a unit of work each; what they hold is given back at the end."""
    made = []

    def make(count):
        made.extend(Scope([install(db)], f"unit {number}") for number in range(count))
        return made[-count:]

    yield make
    for scope in made:
        scope.finish()


def play(work):
    async def bounded():
        async with asyncio.timeout(SECONDS):
            return await work()

    return asyncio.run(bounded())


def test_a_thread_takes_the_next_call_while_the_loop_is_busy(make_runner, scopes, monkeypatch):
    """And the loop is woken once for the results of all."""
    runner = make_runner()
    ran = threading.Semaphore(0)

    async def work():
        loop = asyncio.get_running_loop()
        wakes = []
        wake = loop.call_soon_threadsafe
        tasks = [asyncio.create_task(runner.run(scope, ran.release)) for scope in scopes(5)]
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (wakes.append(args), wake(*args)))
        await asyncio.sleep(0)  # each task asks for its call
        # The loop stands still here, and yet all five run, one after the other, on the only thread.
        assert all(ran.acquire(timeout=SECONDS) for _ in range(5))
        await asyncio.gather(*tasks)
        # The first thread may have to wait for the last to be noted before the loop looks.
        assert 1 <= len(wakes) <= 2

    play(work)


def test_a_scope_keeps_its_place_while_it_holds_a_connection(make_runner, scopes, db):
    """So a holder always has a thread for its next call; who has none waits, without a thread."""
    runner = make_runner()
    holder, other = scopes(2)

    def query():
        with install(db).bound(holder.find(install(db))):
            db.execute_sql("SELECT 1").fetchall()

    async def work():
        await runner.run(holder, query)
        waiting = asyncio.create_task(runner.run(other, threading.get_ident))
        for _ in range(3):
            await runner.run(holder, query)
        assert not waiting.done()
        holder.release_early()
        await waiting

    play(work)


def test_a_place_that_does_not_come_is_an_error_after_the_timeout(make_runner, scopes, db):
    """… which counts as one of the pool: alerts ask for that."""
    runner = make_runner(timeout=0.05)
    told = []
    db.pool.on("timeout", lambda error: told.append(str(error)))
    first, second = scopes(2)
    end = threading.Event()

    async def work():
        running = asyncio.create_task(runner.run(first, end.wait, SECONDS))
        await asyncio.sleep(0)
        ran = []
        with pytest.raises(
            PoolTimeout, match=r"unit 1: waited 0\.05 s to be admitted to .*Database.*; its places \(1\) were taken"
        ):
            await runner.run(second, ran.append, 1)
        assert db.pool.stats().timeouts == 1
        assert "to be admitted" in told[0]
        end.set()
        assert await running
        await runner.run(second, ran.append, 2)  # its turn and the place are free again
        assert ran == [2]

    play(work)


def test_a_scope_inside_another_that_keeps_the_last_place_is_told_why(make_runner, scopes, db):
    """It waits for the place of the scope that waits for it."""
    runner = make_runner(timeout=0.05)
    (outer,) = scopes(1)
    inner = Scope([install(db)], "inner", outer)

    def query():
        with install(db).bound(outer.find(install(db))):
            db.execute_sql("SELECT 1").fetchall()

    async def work():
        await runner.run(outer, query)
        with pytest.raises(PoolTimeout, match=r"inner: waited .* The scope around this one, unit 0, is one of them"):
            await runner.run(inner, query)

    play(work)


def test_a_call_that_is_cancelled_before_it_begins_never_runs(make_runner, scopes):
    """Waiting for a place, or for a thread; nobody behind it waits for it."""
    runner = make_runner()
    first, second, third = scopes(3)
    end, ran = threading.Event(), []

    async def work():
        running = asyncio.create_task(runner.run(first, end.wait, SECONDS))
        await asyncio.sleep(0)
        cancelled = asyncio.create_task(runner.run(second, ran.append, "cancelled"))
        behind = asyncio.create_task(runner.run(third, ran.append, "behind"))
        again = asyncio.create_task(runner.run(second, ran.append, "again"))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        end.set()
        await asyncio.gather(running, behind, again)
        assert sorted(ran) == ["again", "behind"]

    play(work)


def test_many_busy_threads_line_up_for_the_interpreter_one_at_a_time(make_runner, scopes):
    """A few do not; and what is cancelled before its thread got through never runs."""
    runner = make_runner(threads=6)
    begun, end, ran = threading.Semaphore(0), threading.Event(), []

    def long(name):
        begun.release()
        end.wait(SECONDS)
        ran.append(name)

    async def work():
        units = scopes(6)
        few, many = units[:3], units[3:]
        with runner._crew._turnstile:  # as if a thread stood in it that does not get the interpreter
            tasks = [asyncio.create_task(runner.run(scope, long, "few")) for scope in few]
            await asyncio.sleep(0)  # each asks for its call
            assert await asyncio.to_thread(lambda: all(begun.acquire(timeout=SECONDS) for _ in few))
            behind = [asyncio.create_task(runner.run(scope, long, scope.label)) for scope in many]
            await asyncio.sleep(0)
            assert not await asyncio.to_thread(begun.acquire, timeout=0.05)
            behind[1].cancel()
            with pytest.raises(asyncio.CancelledError):
                await behind[1]
        assert await asyncio.to_thread(lambda: begun.acquire(timeout=SECONDS) and begun.acquire(timeout=SECONDS))
        end.set()
        await asyncio.gather(*tasks, behind[0], behind[2])
        assert sorted(ran) == ["few", "few", "few", many[0].label, many[2].label]

    play(work)


def test_what_is_raised_in_a_thread_that_stands_in_line_costs_nobody_his_result(make_runner, scopes):
    """As by a watchdog that is too late for the call it meant: nobody else would wake the loop."""
    runner = make_runner(threads=4)
    begun, end, over = threading.Semaphore(0), threading.Event(), threading.Event()

    def long(event):
        begun.release()
        event.wait(SECONDS)
        return threading.get_ident()

    async def work():
        one, *few = scopes(4)
        task = asyncio.create_task(runner.run(one, long, end))
        others = [asyncio.create_task(runner.run(scope, long, over)) for scope in few]
        await asyncio.sleep(0)  # each asks for its call
        assert await asyncio.to_thread(lambda: all(begun.acquire(timeout=SECONDS) for _ in range(4)))
        done = runner._crew.dock(asyncio.get_running_loop())._done
        with runner._crew._turnstile:
            end.set()
            await asyncio.to_thread(eventually, lambda: done)
            thread, error = ctypes.c_ulong(done[0].result), ctypes.py_object(SystemExit)
            assert ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error) == 1
        await task
        over.set()
        await asyncio.gather(*others)
        assert await runner.run(one, lambda: 1) == 1

    play(work)


def test_a_cancelled_caller_leaves_its_call_to_its_end(make_runner, scopes):
    """The next call of the scope waits for it; those of others do not."""
    runner = make_runner(threads=2)
    one, other = scopes(2)
    begun, end = threading.Event(), threading.Event()
    order = []

    def long():
        begun.set()
        end.wait(SECONDS)
        order.append("long")

    async def work():
        caller = asyncio.create_task(runner.run(one, long))
        await asyncio.to_thread(begun.wait, SECONDS)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        following = asyncio.create_task(runner.run(one, order.append, "following"))
        await runner.run(other, order.append, "other")
        end.set()
        await following
        assert order == ["other", "long", "following"]

    play(work)


def test_errors_come_to_the_caller_and_keep_nothing_alive(make_runner, scopes):
    runner = make_runner()

    class Thing:
        pass

    def fail(thing, error):
        raise error

    async def work():
        thing = Thing()
        gone = weakref.ref(thing)
        with pytest.raises(ZeroDivisionError):
            await runner.run(scopes(1)[0], fail, thing, ZeroDivisionError())
        with pytest.raises(RuntimeError, match="raised StopIteration"):
            await runner.run(scopes(1)[0], fail, thing, StopIteration())
        assert await runner.run(scopes(1)[0], lambda: 7) == 7
        del thing
        gc.collect()
        assert gone() is None

    play(work)


def test_one_loop_after_another_and_a_closed_runner(make_runner, scopes):
    """Threads outlive a loop; after `close` they start anew with the next call."""
    runner = make_runner()
    for _ in range(3):
        assert play(lambda: runner.run(scopes(1)[0], lambda: 1)) == 1
    runner.close()
    assert play(lambda: runner.run(scopes(1)[0], lambda: 2)) == 2


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(make_runner, scopes):
    """Though a thread of the parent was in the middle of something."""
    runner = make_runner(threads=2)
    end, begun = threading.Event(), threading.Event()

    def long():
        begun.set()
        end.wait(SECONDS)

    def child(answers):
        answers.put(play(lambda: runner.run(Scope([], "in the child"), lambda: 3)))

    async def work():
        running = asyncio.create_task(runner.run(scopes(1)[0], long))
        await asyncio.to_thread(begun.wait, SECONDS)
        with runner._crew.lock:  # as it may be when somebody forks
            context = multiprocessing.get_context("fork")
            answers = context.SimpleQueue()
            process = context.Process(target=lambda: asyncio._set_running_loop(None) or child(answers))
            process.start()
        await asyncio.to_thread(process.join, SECONDS)
        assert answers.get() == 3
        end.set()
        await running

    play(work)


def test_many_units_on_few_threads_all_end(make_runner, scopes, db):
    """400 units of three calls each, a quarter of them cut short: no place is lost."""
    runner = make_runner(threads=4)
    state = install(db)

    async def unit(number, scope):
        def query():
            with state.bound(scope.find(state)):
                db.execute_sql("SELECT 1").fetchall()

        try:
            async with asyncio.timeout(0.002 if number % 4 == 0 else SECONDS):
                for _ in range(3):
                    await runner.run(scope, query)
        except TimeoutError:
            assert number % 4 == 0
        finally:
            scope.finish()

    async def work():
        await asyncio.gather(*(unit(number, scope) for number, scope in enumerate(scopes(400))))
        # All four places are there: four scopes that stand still at once.
        together = threading.Barrier(4)
        await asyncio.gather(*(runner.run(scope, together.wait, SECONDS) for scope in scopes(4)))

    play(work)


def test_a_scope_around_several_loops(make_runner, scopes, db):
    """One after the other; and a loop that goes on gets the place back which the scope had there."""
    runner = make_runner()
    state = install(db)
    scope, other = scopes(2)

    def query():
        with state.bound(scope.find(state)):
            return db.execute_sql("SELECT 1").fetchone()

    for _ in range(2):
        assert play(lambda: runner.run(scope, query)) == (1,)
    with contextlib.closing(asyncio.new_event_loop()) as lasting:
        lasting.run_until_complete(runner.run(scope, query))
        assert play(lambda: runner.run(scope, query)) == (1,)
        waiting = lasting.create_task(runner.run(other, lambda: 2))
        lasting.call_soon(scope.release_early)
        assert lasting.run_until_complete(asyncio.wait_for(waiting, SECONDS)) == 2


def test_a_call_from_inside_a_call_in_a_loop_of_its_own_is_refused_at_once(make_runner, scopes):
    """The only thread waits for that loop, and nobody would ever run it."""
    runner = make_runner()
    (scope,) = scopes(1)

    def inside():
        return play(lambda: runner.run(scope, lambda: 1))

    with pytest.raises(PoolTimeout, match="in an event loop of its own"):
        play(lambda: runner.run(scope, inside))


def test_a_call_that_the_collector_closes_takes_no_lock(make_runner, scopes):
    """It may come in the middle of anything: on a thread that has the lock."""
    runner = make_runner()
    first, second = scopes(2)
    end = threading.Event()
    loop = asyncio.new_event_loop()
    running = loop.create_task(runner.run(first, end.wait, SECONDS))
    waiting = runner.run(second, lambda: 1)
    loop.call_soon(lambda: waiting.send(None))
    loop.run_until_complete(asyncio.sleep(0))
    closed = threading.Event()

    def close():
        with runner._crew.lock:
            waiting.close()
        closed.set()

    threading.Thread(target=close, daemon=True).start()
    assert closed.wait(SECONDS)
    end.set()
    loop.run_until_complete(running)
    # Nobody runs it, and its place is free.
    assert loop.run_until_complete(runner.run(second, lambda: 2)) == 2
    loop.close()


def test_loops_in_several_threads_do_not_stop_each_other(make_runner, scopes, db):
    """The scopes of one hold all connections, and the calls of the other wait for one on as many threads."""
    runner = make_runner(threads=1)
    holder, other = scopes(2)
    waiting, free = threading.Event(), threading.Event()

    def wait():
        waiting.set()
        assert free.wait(SECONDS)

    async def hold():
        await asyncio.to_thread(waiting.wait, SECONDS)
        await runner.run(holder, free.set)

    thread = threading.Thread(target=lambda: play(lambda: runner.run(other, wait)))
    thread.start()
    play(hold)
    thread.join(SECONDS)
    assert free.is_set()
    assert not thread.is_alive()


@pytest.fixture
def hasty():
    """Have threads take turns at almost every step."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty")
def test_the_first_calls_of_loops_in_several_threads_all_end(make_runner):
    """They come at once, and no loop's call is lost because another's makes the crew."""

    async def first(runner, together):
        together.wait(SECONDS)
        return await runner.run(Scope([], "unit"), lambda: 1)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(400):
            work = functools.partial(first, make_runner(threads=2), threading.Barrier(4))
            assert [done.result() for done in [pool.submit(play, work) for _ in range(4)]] == [1] * 4


@pytest.mark.usefixtures("hasty")
def test_how_many_wait_can_be_asked_while_loops_come_and_go(make_runner):
    runner, over = make_runner(), threading.Event()

    def ask():
        while not over.is_set():
            assert runner.waiting == 0

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        for _ in range(400):
            play(lambda: runner.run(Scope([], "unit"), lambda: 1))
        over.set()
        asked.result()


@pytest.mark.parametrize("whose", ["runtime", "database"])
def test_loops_of_several_threads_that_come_first_at_once_have_one_runner(whose, tmp_path, monkeypatch):
    """Two would let in twice as many."""
    both = threading.Barrier(2)

    def make(threads, timeout):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)  # breaks: the second one waits outside, and finds the runner there
        return Runner(threads, timeout)

    database = PooledSqliteDatabase(str(tmp_path / "a.db"))
    if whose == "runtime":
        monkeypatch.setattr("peewee_frameworks.runtime.Runner", make)
        runtime = Runtime(database)
        found = run_threads(2, lambda _: runtime.runner)
    else:
        monkeypatch.setattr("peewee_frameworks.aio.sync.Runner", make)
        state = install(database)
        found = run_threads(2, lambda _: sync._runner(state))
    assert found[0] is found[1]


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (
            peewee.Table("item").select(),
            r"a Select object, which is no function\. .* for a query's rows `run\(list, query\)`",
        ),
        (3, r"a int object, which is no function\. Give the function, not its result"),
    ],
)
def test_what_is_no_function_is_told_what_to_give(db, given, remedy):
    runtime = Runtime(db)
    with pytest.raises(ConfigurationError, match=remedy):
        play(lambda: runtime.run(given))
