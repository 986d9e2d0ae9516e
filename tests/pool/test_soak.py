"""The engine under random use: a state machine, and a soak with threads, tasks, cancellation and death."""

from __future__ import annotations

import asyncio
import random
import threading
import time

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from peewee_frameworks.errors import PoolError, PoolTimeout
from peewee_frameworks.pool import PoolOptions
from peewee_frameworks.pool.core import Engine
from peewee_frameworks.pool.entries import CHECK, CLEAN, CLOSE, CONNECT
from peewee_frameworks.pool.waiters import Waiter
from tests.support.concurrency import eventually, run_threads

from .stub import StubError, numbers, settled


class Silent(Waiter):
    """A waiter that only notes that it was woken."""

    __slots__ = ("woken",)

    def __init__(self):
        super().__init__(0.0)
        self.woken = False

    def wake(self):
        self.woken = True


class Conn:
    in_transaction = dead = False


class EngineMachine(RuleBasedStateMachine):
    """Acquire, release, cancel, time out, fail, kill, close, in any order; jobs run late and in any order."""

    def __init__(self):
        super().__init__()
        self.jobs = []
        self.now = 0.0
        options = PoolOptions(max_connections=3, max_connecting=2, ping_after=10, stale_timeout=100)
        self.engine = Engine(
            options,
            dispatch=self.jobs.extend,
            revisit=lambda at: None,
            make_lock=threading.Lock,
            condition=lambda conn: CLEAN if conn.in_transaction else None,
            clock=lambda: self.now,
        )
        self.mine = []
        self.waiting = []

    @rule()
    def acquire(self):
        conn = self.engine.checkout()
        if conn is not None:
            self.mine.append(conn)
        else:
            waiter = Silent()
            if self.engine.enqueue(waiter) is None:
                self.waiting.append(waiter)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def look(self, data):
        waiter = data.draw(st.sampled_from(self.waiting))
        conn = self.engine.accept(waiter)
        if conn is not None:
            self.mine.append(conn)
            self.waiting.remove(waiter)
        elif waiter.error is not None or (
            not self.engine.waiting(waiter) and self.engine.enqueue(waiter, front=True) is not None
        ):
            self.waiting.remove(waiter)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data):
        waiter = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(waiter)
        self.engine.withdraw(waiter)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def time_out(self, data):
        waiter = data.draw(st.sampled_from(self.waiting))
        if self.engine.leave(waiter):
            self.waiting.remove(waiter)

    @precondition(lambda self: self.mine)
    @rule(data=st.data(), dirty=st.booleans(), twice=st.booleans())
    def release(self, data, dirty, twice):
        conn = data.draw(st.sampled_from(self.mine))
        self.mine.remove(conn)
        conn.in_transaction = dirty
        assert self.engine.checkin(conn) is not None
        if twice:
            assert self.engine.checkin(conn) is None

    @precondition(lambda self: self.mine)
    @rule(data=st.data())
    def discard(self, data):
        conn = data.draw(st.sampled_from(self.mine))
        self.mine.remove(conn)
        assert self.engine.discard(conn, "test")

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), fail=st.booleans())
    def work(self, data, fail):
        job = self.jobs.pop(data.draw(st.integers(0, len(self.jobs) - 1)))
        self.run(job, fail)

    def run(self, job, fail):
        if job.kind == CONNECT:
            if fail:
                self.engine.connect_failed(job.entry, StubError("refused"))
            else:
                conn = Conn()
                self.engine.connected(job.entry, conn, lambda _timeout: conn.dead)
        elif job.kind == CLOSE:
            assert job.entry.conn not in self.mine
            self.engine.closed_entry(job.entry)
        else:
            assert job.kind in (CHECK, CLEAN)
            job.entry.conn.in_transaction = False
            self.engine.checked(job.entry, "failed" if fail else None)

    @rule(data=st.data())
    def kill(self, data):
        for entry in list(self.engine.idle):
            entry.conn.dead = data.draw(st.booleans())

    @rule()
    def invalidate(self):
        self.jobs.extend(self.engine.invalidate("test"))

    @rule(seconds=st.sampled_from([0.01, 1, 11, 60]))
    def pass_time(self, seconds):
        self.now += seconds
        self.engine.locked(lambda _turn: None)

    @rule(shut=st.booleans())
    def suspend(self, shut):
        def change(_turn):
            self.engine.shut = shut

        self.engine.locked(change)

    @invariant()
    def nothing_is_lost_or_held_twice(self):
        engine = self.engine
        assert len(engine.entries) <= 3
        assert len({id(conn) for conn in self.mine}) == len(self.mine)
        assert {id(conn) for conn in self.mine} == set(engine.held)
        places = (
            [entry.id for entry in engine.idle]
            + [entry.id for entry in engine.rested]
            + [entry.id for entry in engine.held.values()]
            + [entry.id for entry in engine.granted.values()]
            + [*engine.connecting, *engine.checking, *engine.closing]
        )
        assert sorted(places) == sorted(engine.entries), "each entry is in exactly one place"
        assert not (engine.idle and engine.waiters and not engine.shut), "nobody waits beside an idle connection"
        assert not engine.inbox

    def teardown(self):
        """Whatever happened before, everybody who still waits is served in the end."""

        def change(_turn):
            self.engine.shut = False

        self.engine.locked(change)
        for _ in range(200):
            for conn in self.mine:
                self.engine.checkin(conn)
            self.mine = []
            while self.jobs:
                self.run(self.jobs.pop(), fail=False)
            for waiter in list(self.waiting):
                if waiter.woken or not self.engine.waiting(waiter):
                    self.look_at(waiter)
            if not self.waiting:
                break
            self.now += 0.5
            self.engine.locked(lambda _turn: None)
        assert not self.waiting

    def look_at(self, waiter):
        conn = self.engine.accept(waiter)
        if conn is not None:
            self.mine.append(conn)
            self.waiting.remove(waiter)
        elif waiter.error is not None:
            self.waiting.remove(waiter)
        elif not self.engine.waiting(waiter):
            self.engine.enqueue(waiter, front=True)


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_soak_threads_and_tasks_that_cancel_die_and_close_their_loops(server, pool_of):
    """Ends with nothing lost and nothing held twice; `Connection.use` fails on two users at once."""
    pool = pool_of(max_connections=6, timeout=1, ping_after=0.02, stale_timeout=0.5, max_connecting=4)
    server.delay = 0.001
    end = time.monotonic() + 5.0
    done = [0] * 12

    def use(chance, conn):
        with conn.use():
            pass
        roll = chance.random()
        if roll < 0.02:
            conn.dead = True
        if roll < 0.1:
            conn.in_transaction = True
        if roll > 0.98:
            pool.discard(conn, "soak")
        else:
            pool.release(conn)

    def threads(index):
        chance = random.Random(index)
        while time.monotonic() < end:
            try:
                conn = pool.acquire(timeout=chance.choice([0.001, 0.05, 1, None]))
            except (PoolError, StubError):
                continue
            if chance.random() < 0.3:
                time.sleep(0.001)
            use(chance, conn)
            done[index] += 1

    async def job(chance, index):
        conn = await pool.acquire_async(timeout=chance.choice([0.001, 0.05, 1]))
        try:
            if chance.random() < 0.5:
                await asyncio.sleep(0.001)
        finally:
            use(chance, conn)
        done[index] += 1

    async def tasks(chance, index):
        running = [asyncio.create_task(job(chance, index)) for _ in range(20)]
        await asyncio.sleep(chance.random() * 0.01)
        for task in running:
            if chance.random() < 0.4:
                task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def loops(index):
        chance = random.Random(index)
        while time.monotonic() < end:
            asyncio.run(tasks(chance, index))

    def trouble(index):
        chance = random.Random(index)
        while time.monotonic() < end:
            time.sleep(0.05)
            roll = chance.random()
            if roll < 0.2:
                server.kill_all()
            elif roll < 0.4:
                pool.invalidate_all("soak")
            elif roll < 0.5:
                server.connect_error = StubError("soak")
                time.sleep(0.02)
                server.connect_error = None
            elif roll < 0.6:
                pool.suspend()
                time.sleep(0.01)
                pool.resume()
            elif roll < 0.7:
                pool.resize(chance.choice([3, 6]))
            done[index] += 1

    run_threads(12, lambda index: trouble(index) if index == 11 else loops(index) if index >= 8 else threads(index))
    pool.resize(6)
    assert min(done) > 0, done
    eventually(lambda: settled(pool) and numbers(pool)[1] == 0, message=repr(pool))
    conns = [pool.acquire() for _ in range(6)]
    assert len(set(map(id, conns))) == 6
    try:
        pool.acquire(timeout=0.01)
    except PoolTimeout:
        pass
    else:
        raise AssertionError("a seventh connection")
    for conn in conns:
        pool.release(conn)
    assert server.peak <= 6 + 3  # a connect counts before the pool has heard of a close
