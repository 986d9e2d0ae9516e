"""The pool's questions on a stub database, where only the pool itself is measured."""

from __future__ import annotations

import asyncio
import functools
import gc
import socket
import threading
import time
import timeit
import tracemalloc
from collections import deque
from typing import TYPE_CHECKING, Any

from .harness import Row, percentile
from .peers import OURS, PEERS, OurDatabase, Ours, Playhouse, SocketStubDriver, Stub

if TYPE_CHECKING:
    from collections.abc import Callable


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def run(index: int) -> None:
        barrier.wait()
        results[index] = work(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def warm(pool: Any, count: int) -> None:
    """Open ``count`` connections; in a thread each, for playhouse keeps one per thread."""
    barrier = threading.Barrier(count)

    def work(_: int) -> None:
        conn = pool.acquire()
        barrier.wait()
        pool.release(conn)

    in_threads(count, work)


# What a machine does in 1 us another does in 2: the targets for a cycle are in units of playhouse.pool's own, which took
# 4.2 us where they were set. CPU time is measured, so that other processes do not count.
PLAYHOUSE_US = 4.2

# -- cycle ------------------------------------------------------------------------------------------------------


def cycle(make: Any) -> float:
    pool = make(Stub(), 4)
    calls = {"acquire": pool.acquire, "release": pool.release}
    calls["release"](calls["acquire"]())
    took = timeit.repeat("release(acquire())", globals=calls, timer=time.thread_time, number=5000, repeat=7)
    pool.close()
    return min(took) / 5000 * 1e6


def engine_cycle() -> float:
    ours = Ours(Stub(), 4)
    ours.release(ours.acquire())
    engine = ours.pool.engine
    checkout, checkin = engine.checkout, engine.checkin
    took = timeit.repeat(
        "checkin(checkout())",
        globals={"checkin": checkin, "checkout": checkout},
        timer=time.thread_time,
        number=5000,
        repeat=7,
    )
    ours.close()
    return min(took) / 5000 * 1e6


def deque_cycle() -> float:
    items = deque([1])
    calls = {"a": items.append, "p": items.pop}
    return min(timeit.repeat("a(p())", globals=calls, timer=time.thread_time, number=5000, repeat=7)) / 5000 * 1e6


def engine_in_threads(count: int) -> float:
    ours = Ours(Stub(), count)
    warm(ours, count)
    engine = ours.pool.engine
    checkout, checkin = engine.checkout, engine.checkin

    def work(_: int) -> None:
        for _ in range(3000):
            checkin(checkout())

    start = time.process_time()
    in_threads(count, work)
    took = time.process_time() - start
    ours.close()
    return took / count / 3000 * 1e6


def async_cycle() -> float:
    ours = Ours(Stub(), 4)

    async def main() -> float:
        pool = ours.pool
        pool.release(await pool.acquire_async())
        best = float("inf")
        for _ in range(7):
            start = time.thread_time()
            for _ in range(3000):
                pool.release(await pool.acquire_async())
            best = min(best, time.thread_time() - start)
        return best / 3000 * 1e6

    try:
        return asyncio.run(main())
    finally:
        ours.close()


# -- expiry, death, bursts --------------------------------------------------------------------------------------


def expiry(make: Any, delay: float, threads: int, lifetime: float) -> dict[str, Any]:
    stub = Stub(delay)
    pool = make(stub, 100, lifetime=lifetime, min_connections=100, workers=10)
    warm(pool, 100)
    start = time.perf_counter()
    end = start + lifetime * 1.6

    def work(_: int) -> list[float]:
        waits = []
        while time.perf_counter() < end:
            before = time.perf_counter()
            conn = pool.acquire()
            waits.append(time.perf_counter() - before)
            time.sleep(0.002)
            pool.release(conn)
            time.sleep(0.05)
        return waits

    waits = [wait for some in in_threads(threads, work) for wait in some]
    result = {
        "value": percentile(waits, 0.99) * 1e3,
        "worst": max(waits) * 1e3,
        "peak": stub.peak,
        "connects": stub.connects,
    }
    pool.close()
    return result


def killed(make: Any, delay: float) -> dict[str, Any]:
    stub = Stub(0.0, ping=0.0)
    pool = make(stub, 100, mortal=True, min_connections=100)
    warm(pool, 100)
    stub.delay = delay
    for conn in stub.connections:
        conn.dead = True
    before = stub.connects

    def work(_: int) -> float:
        start = time.perf_counter()
        pool.release(pool.acquire())
        return time.perf_counter() - start

    waits = in_threads(100, work)
    result = {"value": percentile(waits, 0.99) * 1e3, "connects": stub.connects - before}
    pool.close()
    return result


def bare_connects(delay: float, count: int) -> float:
    stub = Stub(delay)

    def work(_: int) -> float:
        start = time.perf_counter()
        stub.connect()
        return time.perf_counter() - start

    return percentile(in_threads(count, work), 0.99) * 1e3


def spike(make: Any) -> dict[str, Any]:
    stub = Stub()
    pool = make(stub, 50, min_connections=5)
    warm(pool, 5)
    stub.delay = 0.15
    ours = getattr(pool, "pool", None)
    if hasattr(ours, "engine"):
        ours.engine.connect_estimate = 0.15  # its own measurements would have told it, had these connects been slow
    before = stub.connects

    def work(_: int) -> None:
        conn = pool.acquire()
        time.sleep(0.002)
        pool.release(conn)

    start = time.perf_counter()
    in_threads(50, work)
    took = time.perf_counter() - start
    result = {"value": took * 1e3, "new": stub.connects - before}
    time.sleep(0.2)
    pool.close()
    return result


def hanging(make: Any, *, hang: bool) -> dict[str, Any]:
    """Eight threads on eight warm connections, one more asks and its connect hangs; operations a second of the eight."""
    stub = Stub()
    pool = make(stub, 10, min_connections=8)
    warm(pool, 8)
    gate = threading.Event()
    holders = threading.Barrier(9)
    releases: list[float] = []
    counts = [0] * 8
    end = time.perf_counter() + 1.6

    def ask() -> None:
        pool.release(pool.acquire())

    def work(index: int) -> None:
        if index == 8:
            holders.wait()
            if hang:
                stub.hang = gate
                threading.Timer(1.6, gate.set).start()  # or a pool that stalls would never end
                threading.Thread(target=ask, daemon=True).start()
            return
        conn = pool.acquire()
        holders.wait()
        time.sleep(0.1)
        before = time.perf_counter()
        pool.release(conn)
        releases.append(time.perf_counter() - before)
        while time.perf_counter() < end:
            conn = pool.acquire()
            time.sleep(0.002)
            before = time.perf_counter()
            pool.release(conn)
            releases.append(time.perf_counter() - before)
            counts[index] += 1

    in_threads(9, work)
    gate.set()
    result = {
        "value": sum(counts) / 1.5,
        "fairness": min(counts) / (max(counts) or 1),
        "p99 release ms": percentile(releases, 0.99) * 1e3,
        "worst release ms": max(releases) * 1e3,
    }
    time.sleep(0.05)
    pool.close()
    return result


def contention(make: Any, threads: int, size: int, hold: float, ping: float = 0.0) -> dict[str, Any]:
    stub = Stub(ping=ping)
    pool = make(stub, size, min_connections=size)
    warm(pool, size)
    counts = [0] * threads
    waits: list[list[float]] = [[] for _ in range(threads)]
    seconds = 1.5
    end = time.perf_counter() + seconds

    def work(index: int) -> None:
        while (before := time.perf_counter()) < end:
            conn = pool.acquire()
            waits[index].append(time.perf_counter() - before)
            time.sleep(hold)
            pool.release(conn)
            counts[index] += 1

    in_threads(threads, work)
    pool.close()
    flat = [wait for some in waits for wait in some]
    return {
        "value": sum(counts) / seconds,
        "fairness": min(counts) / max(counts),
        "p99 wait ms": percentile(flat, 0.99) * 1e3,
    }


def ideal(threads: int, size: int, hold: float) -> float:
    """The same with a semaphore for a pool."""
    gate = threading.Semaphore(size)
    counts = [0] * threads
    end = time.perf_counter() + 1.5

    def work(index: int) -> None:
        while time.perf_counter() < end:
            with gate:
                time.sleep(hold)
            counts[index] += 1

    in_threads(threads, work)
    return sum(counts) / 1.5


def mixed(hold: float) -> dict[str, Any]:
    ours = Ours(Stub(), 8)
    warm(ours, 8)
    pool = ours.pool
    counts = [0] * 96
    lags: list[float] = []
    end = time.perf_counter() + 2.0

    async def task(index: int) -> None:
        while time.perf_counter() < end:
            conn = await pool.acquire_async()
            await asyncio.sleep(hold)
            pool.release(conn)
            counts[index] += 1

    async def witness() -> None:
        while time.perf_counter() < end:
            before = time.perf_counter()
            await asyncio.sleep(0.005)
            lags.append(time.perf_counter() - before - 0.005)

    async def tasks() -> None:
        await asyncio.gather(witness(), *(task(index) for index in range(32, 96)))

    def work(index: int) -> None:
        if index == 32:
            asyncio.run(tasks())
            return
        while time.perf_counter() < end:
            conn = pool.acquire()
            time.sleep(hold)
            pool.release(conn)
            counts[index] += 1

    in_threads(33, work)
    ours.close()
    return {"value": min(counts) / max(counts), "ops/s": sum(counts) / 2.0, "lag p99 ms": percentile(lags, 0.99) * 1e3}


def memory(*, sockets: bool = False) -> float:
    """With sockets: the same one for all, for what counts is what the pool keeps beside each connection's own."""
    count = 500
    near, far = socket.socketpair()
    bare = Stub()
    gc.collect()
    tracemalloc.start()
    conns = [bare.connect() for _ in range(count)]
    driver_only = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del conns
    ours = Ours(Stub(), count, max_connecting=count)
    if sockets:
        driver = SocketStubDriver(near)
        ours.pool._driver_of = lambda _conn: driver
    gc.collect()
    ours.release(ours.acquire())
    tracemalloc.start()
    held = [ours.acquire() for _ in range(count)]
    for conn in held:
        ours.release(conn)
    del held, conn
    time.sleep(0.2)
    ours.pool.stats()
    gc.collect()
    total = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    ours.close()
    near.close()
    far.close()
    return (total - driver_only) / count


def contenders(measure: Callable[..., Any], names: Any = None, **kwargs: Any) -> dict[str, Callable[[], Any]]:
    return {
        name: functools.partial(measure, make, **kwargs)
        for name, make in PEERS.items()
        if names is None or name in names
    }


WITHOUT_DBUTILS = {OURS, "playhouse.pool", "SQLAlchemy QueuePool", "psycopg_pool"}


def best(medians: Any, *without: str) -> float:
    return max((value for name, value in medians.items() if name not in (OURS, "ideal", *without)), default=0.0)


def fair(details: Any) -> bool:
    """Whoever serves some threads and starves the others saves the switches between them: no comparison."""
    return bool(details.get("fairness", 1.0) >= 0.5)


ROWS = [
    Row(
        "cycle-engine",
        "acquire and release, engine alone, uncontended",
        "us",
        "deque pop and append",
        {
            OURS: engine_cycle,
            "deque": deque_cycle,
            "playhouse.pool, connect and close": functools.partial(cycle, Playhouse),
        },
        "<= 0.6 us where playhouse.pool takes 4.2 us: <= 0.143 x",
        lambda ours, all_: ours <= 0.6 / PLAYHOUSE_US * all_["playhouse.pool, connect and close"],
        repeats=5,
    ),
    Row(
        "cycle-engine-16-threads",
        "the same in 16 threads, a connection each; CPU time by cycles of all",
        "us",
        "the same in one thread: one interpreter lock serves all",
        {OURS: lambda: engine_in_threads(16), "one thread": lambda: engine_in_threads(1)},
        "flat: <= 1.3 x one thread",
        lambda ours, all_: ours <= 1.3 * all_["one thread"],
        repeats=5,
    ),
    Row(
        "cycle",
        "acquire and release through each pool's own calls, uncontended",
        "us",
        "deque pop and append",
        contenders(cycle),
        repeats=5,
    ),
    Row(
        "cycle-database",
        "db.connect() and db.close()",
        "us",
        "two reads and two writes of a thread-local",
        {OURS: functools.partial(cycle, OurDatabase), "playhouse.pool": functools.partial(cycle, Playhouse)},
        "<= 0.5 x playhouse.pool",
        lambda ours, all_: ours <= 0.5 * all_["playhouse.pool"],
        repeats=5,
    ),
    Row(
        "cycle-async",
        "await acquire, release, uncontended",
        "us",
        "one coroutine",
        {OURS: async_cycle, "playhouse.pool, connect and close": functools.partial(cycle, Playhouse)},
        "<= 1.5 us where playhouse.pool takes 4.2 us: <= 0.357 x",
        lambda ours, all_: ours <= 1.5 / PLAYHOUSE_US * all_["playhouse.pool, connect and close"],
        repeats=5,
    ),
    *(
        Row(
            f"expiry-{int(delay * 1000)}ms-{threads}",
            f"100 connections opened together expire; a connect takes {delay * 1000:g} ms, {threads} threads; p99 checkout",
            "ms",
            "0: renewed in the background",
            contenders(expiry, WITHOUT_DBUTILS, delay=delay, threads=threads, lifetime=max(2.0, 25 * delay)),
            "<= 0.1 ms + scheduling, never above 100 open",
            lambda ours, _: ours <= 1.0,
            repeats=1,
        )
        for delay in (0.005, 0.02, 0.05, 0.1)
        for threads in (32, 100)
    ),
    *(
        Row(
            f"expiry-fast-{threads}",
            f"the same where renewal cannot keep up: a connect takes 100 ms of a lifetime of 1 s, {threads} threads; p99",
            "ms",
            f"{threads} connects in parallel",
            {
                **contenders(expiry, WITHOUT_DBUTILS, delay=0.1, threads=threads, lifetime=1.0),
                f"{threads} connects": functools.partial(bare_connects, 0.1, threads),
            },
            "<= 1.2 x the floor",
            lambda ours, all_, threads=threads: ours <= 1.2 * all_[f"{threads} connects"],
            repeats=1,
        )
        for threads in (32, 100)
    ),
    Row(
        "killed",
        "100 dead connections, 100 requests, a connect takes 50 ms; p99 (connects 0: dead ones were handed out)",
        "ms",
        "100 connects in parallel",
        {**contenders(killed, WITHOUT_DBUTILS, delay=0.05), "100 connects": lambda: bare_connects(0.05, 100)},
        "<= max(1.2 D, D + 15 ms), or 1.2 x the floor on a slow machine",
        lambda ours, all_: ours <= max(65, 1.2 * all_["100 connects"]),
    ),
    Row(
        "spike",
        "50 threads on 5 warm connections, connect 150 ms, query 2 ms",
        "ms",
        "50 x 2 ms / 5 = 20 ms",
        contenders(spike, WITHOUT_DBUTILS),
        "<= 1.2 x psycopg_pool, at most 2 new",
        lambda ours, all_: ours <= 1.2 * all_["psycopg_pool"],
        lower_is_better=False,
    ),
    Row(
        "hang",
        "one connect hangs: operations a second of 8 others",
        "op/s",
        "the same without the hang",
        {
            **{name: functools.partial(hanging, PEERS[name], hang=True) for name in WITHOUT_DBUTILS},
            "without the hang": functools.partial(hanging, Ours, hang=False),
        },
        ">= 98 % of the same without the hang, release <= 1 ms",
        lambda ours, all_: ours >= 0.98 * all_["without the hang"],
        lower_is_better=False,
    ),
    Row(
        "64-on-64",
        "64 threads, 64 connections, 2 ms query, 0.5 ms ping",
        "op/s",
        "a semaphore",
        {
            **contenders(contention, WITHOUT_DBUTILS, threads=64, size=64, hold=0.002, ping=0.0005),
            "ideal": lambda: ideal(64, 64, 0.002),
        },
        ">= 0.9 of ideal",
        lambda ours, all_: ours >= 0.9 * all_["ideal"],
        lower_is_better=False,
    ),
    *(
        Row(
            f"{threads}-on-8",
            f"{threads} threads, 8 connections, 2 ms query",
            "op/s",
            "a semaphore",
            {
                **contenders(contention, threads=threads, size=8, hold=0.002),
                "ideal": lambda threads=threads: ideal(threads, 8, 0.002),
            },
            ">= 0.98 x the best peer that is fair (>= 0.5)",
            lambda ours, all_: ours >= 0.98 * best(all_),
            lower_is_better=False,
            comparable=fair,
        )
        for threads in (1, 8, 64)
    ),
    Row(
        "mixed-1ms",
        "32 threads and 64 tasks on 8 connections, 1 ms: slowest / fastest",
        "",
        "1",
        {OURS: lambda: mixed(0.001)},
        ">= 0.95, loop lag p99 < 5 ms",
        lambda ours, _: ours >= 0.95,
        lower_is_better=False,
    ),
    Row(
        "mixed-0.2ms",
        "the same with 0.2 ms",
        "",
        "1",
        {OURS: lambda: mixed(0.0002)},
        ">= 0.8",
        lambda ours, _: ours >= 0.8,
        lower_is_better=False,
    ),
    Row(
        "memory",
        "Python objects per idle connection, above the driver's",
        "bytes",
        "one slotted object and its numbers",
        {OURS: memory},
        "<= 512",
        lambda ours, _: ours <= 512,
        repeats=1,
    ),
    Row(
        "memory-sockets",
        "the same with a socket to watch for the server's end of the connection",
        "bytes",
        "one slotted object and its numbers",
        {OURS: functools.partial(memory, sockets=True)},
        "<= 512",
        lambda ours, _: ours <= 512,
        repeats=1,
    ),
]
