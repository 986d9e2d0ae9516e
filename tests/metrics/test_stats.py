"""`orm.stats()`: what can be known of each kind of pool, and None for the rest."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import peewee
import pytest
from playhouse.pool import PooledSqliteDatabase as StockDatabase

from peewee_frameworks import ConfigurationError
from peewee_frameworks.extension import Extension
from peewee_frameworks.pool import PooledMySQLDatabase, PooledPostgresqlDatabase, PooledSqliteDatabase, PoolStats
from tests.support.concurrency import eventually

if TYPE_CHECKING:
    from tests.support.databases import Place

OURS: Any = {"sqlite": PooledSqliteDatabase, "mysql": PooledMySQLDatabase, "postgres": PooledPostgresqlDatabase}


def test_ours_tells_everything(place: Place):
    """Held, idle and waiting connections are counted where they are, and no field is None but a bound that there is not."""
    db = OURS[place.kind](place.database, max_connections=2, timeout=10, pool_name="shop", **place.connect_kwargs())
    orm = Extension(db)
    with closing(db.pool):
        with orm.scope(), orm.scope():
            db.execute_sql("SELECT 1")
            first = orm.stats()["default"]
        with orm.scope():
            db.execute_sql("SELECT 1")
        after = orm.stats()["default"]
    assert (first.name, first.max_connections, first.used, first.idle, first.total) == ("shop", 2, 1, 0, 1)
    assert (after.used, after.idle, after.connects, after.checkouts) == (0, 1, 1, 2)
    assert after.use_time is not None
    assert after.use_time.count == 2
    assert not [name for name, value in vars(after).items() if value is None]


def test_who_waits_is_counted(place: Place):
    """A caller that queues for the only connection shows as waiting, and then in the histogram of waits."""
    db = OURS[place.kind](place.database, max_connections=1, timeout=10, **place.connect_kwargs())
    orm = Extension(db)
    with closing(db.pool):
        held = db.pool.acquire()

        def query() -> None:
            with orm.scope():
                db.execute_sql("SELECT 1")

        with ThreadPoolExecutor(1) as threads:
            waiter = threads.submit(query)
            eventually(lambda: orm.stats()["default"].waiting == 1)
            db.pool.release(held)
            waiter.result(10)
        after = orm.stats()["default"]
    assert after.wait_time is not None
    assert (after.waiting, after.wait_time.count) == (0, 2)  # the first waited for its connect


def test_playhouse_pools_tell_their_sizes(place: Place):
    """Of a stock pool one can know the bound, what is out and what is in; the rest is None, not 0."""
    db = place.make_database(max_connections=3)
    orm = Extension(db)
    with orm.scope():
        db.execute_sql("SELECT 1")
        during = orm.stats()["default"]
    after = orm.stats()["default"]
    db.close_idle()
    assert during == PoolStats(name=place.database, max_connections=3, min_connections=0, idle=0, used=1, total=1)
    assert (after.used, after.idle, after.total) == (0, 1, 1)


@pytest.mark.parametrize("kind", ["playhouse", "none"])
def test_leaks_are_counted_where_somebody_watches(tmp_path, kind: str):
    """The application's option makes the difference between None and a number."""
    make: Any = {"playhouse": StockDatabase, "none": peewee.SqliteDatabase}[kind]
    db = make(tmp_path / "one.db")
    assert Extension(db).stats()["default"].leaks is None
    orm = Extension(db, leak_threshold=0.01)
    assert orm.stats()["default"].leaks == 0
    with orm.scope():
        db.execute_sql("SELECT 1")
        eventually(lambda: orm.stats()["default"].leaks == 1)


def test_without_a_pool_our_records_tell_who_has_a_connection(tmp_path):
    db = peewee.SqliteDatabase(tmp_path / "one.db")
    orm = Extension(db)
    with orm.scope():
        db.execute_sql("SELECT 1")
        during = orm.stats()["default"]
    db.connect()
    outside = orm.stats()["default"]
    db.close()
    assert (during.used, during.total, during.idle, during.max_connections) == (1, 1, 0, None)
    assert outside.used == 1
    assert orm.stats()["default"].used == 0


def test_each_alias_has_its_own(tmp_path):
    first, second = (PooledSqliteDatabase(tmp_path / name) for name in ("a.db", "b.db"))
    with closing(first.pool), closing(second.pool):
        orm = Extension({"default": first, "logs": second})
        with orm.scope():
            second.execute_sql("SELECT 1")
            stats = orm.stats()
    assert [(alias, moment.used) for alias, moment in stats.items()] == [("default", 0), ("logs", 1)]


def test_as_dict_is_json(tmp_path):
    """What `as_dict` gives survives JSON as it is, histograms as count, sum and buckets."""
    db = PooledSqliteDatabase(tmp_path / "a.db")
    orm = Extension(db)
    with closing(db.pool):
        with orm.scope():
            db.execute_sql("SELECT 1")
        document = orm.stats()["default"].as_dict()
    assert json.loads(json.dumps(document)) == document
    assert set(document) == set(PoolStats.__dataclass_fields__)
    assert set(document["use_time"]) == {"count", "sum", "buckets"}
    assert sum(document["use_time"]["buckets"]) == document["use_time"]["count"] == 1


def test_before_the_configuration_is_read_there_is_an_error_that_says_so():
    with pytest.raises(ConfigurationError, match="init_app"):
        Extension().stats()
