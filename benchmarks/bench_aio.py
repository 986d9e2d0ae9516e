"""A unit of work under asyncio: 100 tasks at once, each takes a connection, reads three rows, gives it back; a pool of 10.

On sync drivers the whole unit goes to a thread; on asynchronous ones it runs under one bridge. With and without 5 ms that the
server takes for each statement. The loop's lag is how late a timer of 1 ms was, at the 99th percentile of a burst of 100.

All contenders live in one loop and take turns, burst by burst: from one second to the next a machine may be a fifth slower.
Several times over, with new connections: on which processor the server's end of each comes to lie makes as much of a
difference.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peewee
import playhouse.pool
from playhouse import pwasyncio

from peewee_frameworks import connection_scope
from peewee_frameworks.aio import AsyncPsycopgDatabase
from peewee_frameworks.pool import PooledMySQLDatabase, PooledPostgresqlDatabase
from tests.support.servers import server_kwargs

from .harness import Row, percentile
from .peers import OURS

TASKS, SIZE = 100, 10
LOTS, TURNS, TURNS_INLINE = 5, 6, 3
INLINE = "playhouse.pool inline"
PAUSE = {"mysql": "SLEEP({}) = 0", "postgres": "pg_sleep({}) IS NOT NULL"}
OPTIONS = {
    "ours": {"max_connections": SIZE, "timeout": 30},
    "stock": {"max_connections": SIZE, "timeout": 30},
    "aio": {"pool_size": SIZE, "pool_min_size": SIZE, "acquire_timeout": 30},
    "psycopg": {"min_size": SIZE, "timeout": 30, "wait_for_minimum": True},
}


def make(cls: Any, kind: Any, options: str) -> tuple[Any, Any]:
    kwargs = server_kwargs(kind) | OPTIONS[options]
    if kind == "postgres" and options in ("ours", "stock"):
        kwargs["prefer_psycopg3"] = True
    db = cls(kwargs.pop("database"), **kwargs)

    class BenchUser(peewee.Model):
        name = peewee.CharField()

        class Meta:
            database = db
            table_name = "bench_aio_user"

    return db, BenchUser


def prepare(kind: Any) -> None:
    db, user = make(PooledMySQLDatabase if kind == "mysql" else PooledPostgresqlDatabase, kind, "ours")
    db.drop_tables([user])
    db.create_tables([user])
    user.insert_many([{"name": f"u{number}"} for number in range(10)]).execute()
    db.pool.close(0)


def unit(user: Any, kind: str, pause: float) -> Any:
    condition = peewee.SQL(PAUSE[kind].format(pause)) if pause else None

    def three_reads() -> None:
        for key in (1, 2, 3):
            if condition is None:
                user.get_by_id(key)
            else:
                user.get((user.id == key) & condition)

    return three_reads


async def lag_of(work: Any) -> float:
    lags: list[float] = []

    async def watch() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - start - 0.001)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0.005)
    await work
    await asyncio.sleep(0.005)  # what blocked the loop to the end is seen only now
    watcher.cancel()
    return percentile(lags, 0.99)


class Contender:
    """What was measured of a way in which units of work run."""

    def __init__(self, kind: str, pause: float, how: tuple[Any, str, Any, Any]) -> None:
        self.cls, self.options, self.one, self.close = how
        self.kind, self.pause = kind, pause
        self.rates: list[float] = []
        self.costs: list[float] = []
        self.lags: list[float] = []

    def start(self) -> None:
        self.db, user = make(self.cls, self.kind, self.options)
        self.work = unit(user, self.kind, self.pause)

    async def burst(self, threads: ThreadPoolExecutor) -> None:
        await asyncio.gather(*(asyncio.create_task(self.one(self.db, self.work, threads)) for _ in range(TASKS)))

    async def turn(self, threads: ThreadPoolExecutor) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        await self.burst(threads)
        self.rates.append(TASKS / (time.perf_counter() - start))
        self.costs.append((time.process_time() - cpu) / TASKS * 1e6)
        self.lags.append(await lag_of(self.burst(threads)) * 1000)


@functools.cache
def measured(family: str, kind: str, pause: float) -> dict[str, Contender]:
    """Measure all contenders, for they only mean something side by side."""
    prepare(kind)
    found = {name: Contender(kind, pause, how) for name, how in FAMILIES[family](kind).items()}
    names = list(found)

    async def lot(number: int) -> None:
        with ThreadPoolExecutor(SIZE) as threads:
            for contender in found.values():
                contender.start()
                await contender.burst(threads)  # warm
            for turn in range(TURNS):
                first = turn % len(names)
                for name in names[first:] + names[:first]:
                    if name != INLINE or (number == 0 and turn < TURNS_INLINE):
                        await found[name].turn(threads)
            for contender in found.values():
                await contender.close(contender.db)

    for number in range(LOTS):
        asyncio.run(lot(number))
    return found


def rate(family: str, kind: str, pause: float, name: str) -> dict[str, float]:
    found = measured(family, kind, pause)
    mine, peer = found[name], found[list(found)[1]]
    return {
        "value": statistics.median(one / other for one, other in zip(mine.rates, peer.rates, strict=False)),
        "units/s": statistics.median(mine.rates),
        "cpu µs of a unit": statistics.median(mine.costs),
    }


def lag(family: str, kind: str, pause: float, name: str) -> dict[str, float]:
    lags = measured(family, kind, pause)[name].lags
    return {"value": statistics.median(lags), "worst": max(lags)}


async def ours(db: Any, work: Any, _: Any) -> None:
    await db.run(work)


async def in_thread(db: Any, work: Any, threads: Any) -> None:
    await asyncio.get_running_loop().run_in_executor(threads, db.connection_context()(work))


async def inline(db: Any, work: Any, _: Any) -> None:
    with db.connection_context():
        work()


async def stock_bridge(db: Any, work: Any, _: Any) -> None:
    async with db:
        await db.run(work)


async def our_bridge(db: Any, work: Any, _: Any) -> None:
    async with connection_scope(db, label="bench"), db:  # connected first, as the stock layer's block is
        await db.run(work)


async def close_pool(db: Any) -> None:
    with contextlib.suppress(Exception):
        await db.close_pool()


async def close_all(db: Any) -> None:
    db.close_all()


PLAYHOUSE = {"mysql": playhouse.pool.PooledMySQLDatabase, "postgres": playhouse.pool.PooledPostgresqlDatabase}
POOLED = {"mysql": PooledMySQLDatabase, "postgres": PooledPostgresqlDatabase}


def offload(kind: str) -> dict[str, Any]:
    return {
        OURS: (POOLED[kind], "ours", ours, close_pool),
        "playhouse.pool in threads": (PLAYHOUSE[kind], "stock", in_thread, close_all),
        INLINE: (PLAYHOUSE[kind], "stock", inline, close_all),
    }


def native(kind: str) -> dict[str, Any]:
    if kind == "mysql":
        cls: Any = pwasyncio.AsyncMySQLDatabase
        return {
            OURS: (cls, "aio", our_bridge, close_pool),
            "stock aiomysql": (cls, "aio", stock_bridge, close_pool),
        }
    cls = pwasyncio.AsyncPostgresqlDatabase
    return {
        OURS: (AsyncPsycopgDatabase, "psycopg", our_bridge, close_pool),
        "stock asyncpg": (cls, "aio", stock_bridge, close_pool),
        "ours on asyncpg": (cls, "aio", our_bridge, close_pool),
    }


FAMILIES = {"offload": offload, "native": native}
WHAT = {"offload": "sync driver in threads", "native": "asynchronous driver"}


def rows() -> list[Row]:
    found = []
    for kind in ("mysql", "postgres"):
        for pause in (0, 0.005):
            for family, contenders in FAMILIES.items():
                label = f"{family}-{kind}-{round(pause * 1000)}ms"
                names = list(contenders(kind))
                peer = names[1]
                judged = (family, kind) != ("native", "mysql")  # there both are the same driver
                found.append(
                    Row(
                        f"aio-{label}",
                        f"{WHAT[family]}, {kind}, {pause * 1000:g} ms of server time: units of work a second, "
                        f"by those of {peer}",
                        "",
                        "three round trips each",
                        {name: functools.partial(rate, family, kind, pause, name) for name in names},
                        target=f">= 1.0 x {peer}" if judged else "",
                        passes=(lambda mine, _: mine >= 1) if judged else None,
                        lower_is_better=False,
                        repeats=1,
                    )
                )
                found.append(
                    Row(
                        f"aio-lag-{label}",
                        f"{WHAT[family]}, {kind}, {pause * 1000:g} ms of server time: lag of the loop at the 99th percentile",
                        "ms",
                        "0",
                        {name: functools.partial(lag, family, kind, pause, name) for name in names},
                        target="< 10 ms",
                        passes=lambda mine, _: mine < 10,
                        repeats=1,
                    )
                )
    return found


ROWS = rows()
