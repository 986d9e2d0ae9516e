"""A unit of work under asyncio: 100 tasks at once, each takes a connection, reads three rows, gives it back; a pool of 10.

On sync drivers the whole unit goes to a thread; on asynchronous ones it runs under one bridge. With and without 5 ms that the
server takes for each statement. The loop's lag is how late a timer of 1 ms was, at the 99th percentile.
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

TASKS, SIZE, ROUNDS = 100, 10, 3
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


def measure(
    kind: str, pause: float, cls: Any, options: str, one: Any, close: Any, what: str = "rate"
) -> dict[str, float]:
    prepare(kind)
    db, user = make(cls, kind, options)
    work = unit(user, kind, pause)

    async def main() -> dict[str, float]:
        with ThreadPoolExecutor(SIZE) as threads:
            call = functools.partial(one, db, work, threads)

            async def all_tasks() -> None:
                await asyncio.gather(*(asyncio.create_task(call()) for _ in range(TASKS)))

            await all_tasks()  # warm
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(ROUNDS):
                await all_tasks()
            rate = ROUNDS * TASKS / (time.perf_counter() - start)
            cpu = (time.process_time() - cpu) / ROUNDS / TASKS * 1e6
            lag = statistics.median([await lag_of(all_tasks()) for _ in range(ROUNDS)]) * 1000
            await close(db)
        if what == "rate":
            return {"value": rate, "cpu_us_per_unit": cpu}
        return {"value": lag}

    return asyncio.run(main())


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


def offload(kind: str, pause: float, what: str) -> dict[str, Any]:
    bound = functools.partial(measure, kind, pause, what=what)
    return {
        OURS: lambda: bound(POOLED[kind], "ours", ours, close_pool),
        "playhouse.pool in threads": lambda: bound(PLAYHOUSE[kind], "stock", in_thread, close_all),
        "playhouse.pool inline": lambda: bound(PLAYHOUSE[kind], "stock", inline, close_all),
    }


def native(kind: str, pause: float, what: str) -> dict[str, Any]:
    bound = functools.partial(measure, kind, pause, what=what)
    if kind == "mysql":
        cls: Any = pwasyncio.AsyncMySQLDatabase
        return {
            OURS: lambda: bound(cls, "aio", our_bridge, close_pool),
            "stock aiomysql": lambda: bound(cls, "aio", stock_bridge, close_pool),
        }
    cls = pwasyncio.AsyncPostgresqlDatabase
    return {
        OURS: lambda: bound(AsyncPsycopgDatabase, "psycopg", our_bridge, close_pool),
        "stock asyncpg": lambda: bound(cls, "aio", stock_bridge, close_pool),
        "ours on asyncpg": lambda: bound(cls, "aio", our_bridge, close_pool),
    }


def rows() -> list[Row]:
    found = []
    for kind in ("mysql", "postgres"):
        for pause in (0, 0.005):
            label = f"{kind}-{round(pause * 1000)}ms"
            found.append(
                Row(
                    f"aio-offload-{label}",
                    f"units of work a second, sync driver in threads, {kind}, {pause * 1000:g} ms of server time",
                    "1/s",
                    "three round trips each",
                    offload(kind, pause, "rate"),
                    target=">= 1.0 x playhouse.pool in threads",
                    passes=lambda mine, all_: mine >= all_["playhouse.pool in threads"],
                    lower_is_better=False,
                    repeats=5,
                )
            )
            peer = "stock aiomysql" if kind == "mysql" else "stock asyncpg"
            found.append(
                Row(
                    f"aio-native-{label}",
                    f"units of work a second, asynchronous driver, {kind}, {pause * 1000:g} ms of server time",
                    "1/s",
                    "three round trips each",
                    native(kind, pause, "rate"),
                    target=">= 1.0 x stock asyncpg" if kind == "postgres" else "",
                    passes=(lambda mine, all_, peer=peer: mine >= all_[peer]) if kind == "postgres" else None,
                    lower_is_better=False,
                    repeats=5,
                )
            )
            for name, contenders in (("offload", offload), ("native", native)):
                found.append(
                    Row(
                        f"aio-lag-{name}-{label}",
                        f"lag of the loop at the 99th percentile, {name}, {kind}, {pause * 1000:g} ms of server time",
                        "ms",
                        "0",
                        contenders(kind, pause, "lag"),
                        target="< 10 ms",
                        passes=lambda mine, _: mine < 10,
                    )
                )
    return found


ROWS = rows()
