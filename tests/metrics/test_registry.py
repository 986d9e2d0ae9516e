"""`metrics.register`, and what a scrape tells of pools that are not ours."""

from __future__ import annotations

import asyncio
from contextlib import closing

import peewee
import pytest
from playhouse.pool import PooledSqliteDatabase as StockDatabase
from playhouse.pwasyncio import AsyncSqliteDatabase
from prometheus_client import CollectorRegistry, Counter, generate_latest

from peewee_frameworks import ConfigurationError, metrics
from peewee_frameworks.extension import Extension
from peewee_frameworks.pool import PooledSqliteDatabase
from tests.support.concurrency import eventually

from .scrape import parse

COUNT = "db_client_connection_count"


def test_pools_beside_what_the_application_counts_itself(tmp_path):
    """Registered before the databases are known: there is nothing to tell until then."""
    registry = CollectorRegistry()
    Counter("orders", "Orders taken.", registry=registry).inc()
    orm = Extension()
    collector = metrics.register(orm, registry=registry)
    before = parse(generate_latest(registry).decode())
    orm.runtime.configure({"PEEWEE_DATABASE": f"sqlite+pool:///{tmp_path}/a.db?pool_name=shop"})
    with closing(orm.database.pool), orm.scope():
        orm.database.execute_sql("SELECT 1")
        after = parse(generate_latest(registry).decode())
    registry.unregister(collector)
    assert before.names == {"orders_total", "orders_created"}
    assert after.value("orders_total") == 1
    assert after.value(COUNT, pool_name="shop", state="used") == 1
    assert parse(generate_latest(registry).decode()).names == before.names


def test_the_same_registry_twice_is_refused(tmp_path):
    registry = CollectorRegistry()
    orm = Extension(peewee.SqliteDatabase(tmp_path / "a.db"))
    metrics.register(orm, registry=registry)
    with pytest.raises(ValueError, match="db_client_connection_count"):
        metrics.register(orm, registry=registry)


def test_without_a_database_it_says_what_is_missing():
    with pytest.raises(ConfigurationError, match=r"render\(orm\)"):
        metrics.render()


def test_what_a_pool_cannot_tell_is_not_there(tmp_path):
    """No sample, rather than a 0 that looks like good news."""
    orm = Extension(
        {"stock": StockDatabase(tmp_path / "a.db", max_connections=7), "none": peewee.SqliteDatabase(tmp_path / "b.db")}
    )
    with orm.scope():
        orm["stock"].execute_sql("SELECT 1")
        scrape = parse(metrics.render(orm)[0].decode())
    orm["stock"].close_idle()
    assert scrape.value(COUNT, pool_name=f"{tmp_path}/a.db", state="used") == 1
    assert scrape.value("db_client_connection_max", pool_name=f"{tmp_path}/a.db") == 7
    assert scrape.names == {
        COUNT,
        "db_client_connection_max",
        "db_client_connection_idle_min",
        "db_client_connection_idle_max",
    }


def test_asynchronous_pools(tmp_path):
    """Their waits and uses are measured as well."""
    db = AsyncSqliteDatabase(tmp_path / "a.db", pool_size=2)
    orm = Extension(db)

    async def main() -> str:
        async with orm.scope():
            await db.aexecute_sql("SELECT 1")
            during = metrics.render(orm)[0].decode()
        await db.close_pool()
        return during

    during, after = parse(asyncio.run(main())), parse(metrics.render(orm)[0].decode())
    name = {"pool_name": f"{tmp_path}/a.db"}
    assert during.value(COUNT, state="used", **name) == 1
    assert during.value("db_client_connection_wait_time_seconds_count", **name) == 1
    assert after.value(COUNT, state="used", **name) == 0
    assert after.value("db_client_connection_use_time_seconds_count", **name) == 1


def test_one_database_of_two_applications_is_there_once(tmp_path):
    db = PooledSqliteDatabase(tmp_path / "a.db", pool_name="shop")
    other = PooledSqliteDatabase(tmp_path / "b.db", pool_name="shop")
    with closing(db.pool), closing(other.pool):
        body, _ = metrics.render(Extension(db), Extension({"default": db, "other": other}), Extension(other))
    names = {dict(labels)["pool_name"] for name, labels in parse(body.decode()).samples if name == COUNT}
    assert names == {"shop", "shop/other"}


def test_reasons_that_callers_invent_do_not_grow_without_bound(tmp_path):
    db = PooledSqliteDatabase(tmp_path / "a.db", pool_name="shop", max_connections=1)
    orm = Extension(db)
    with closing(db.pool):
        for number in range(70):
            db.pool.discard(db.pool.acquire(5), f"order {number} went wrong")
        eventually(lambda: sum(db.pool.stats().closes.values()) == 70)
        scrape = parse(metrics.render(orm)[0].decode())
    closes = {
        dict(labels)["reason"]: value
        for (name, labels), value in scrape.samples.items()
        if name == "peewee_pool_closes_total"
    }
    assert len(closes) == 51
    assert closes["other"] == 20


def test_who_watches_over_pools_is_not_taken_for_one(tmp_path):
    """Returning what is closed meanwhile does nothing, with metrics and a watch for leaks in the process."""
    db = PooledSqliteDatabase(tmp_path / "a.db")
    orm = Extension({"ours": db, "stock": StockDatabase(tmp_path / "b.db")}, leak_threshold=60)
    with closing(db.pool):
        metrics.render(orm)
        conn = db.pool.acquire()
        db.pool.release(conn)
        db.close_idle()
        db.pool.release(conn)
