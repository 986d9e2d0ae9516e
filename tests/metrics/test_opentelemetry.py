"""OpenTelemetry's instruments, read as the SDK's exporters read them."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.semconv._incubating.metrics import db_metrics

from peewee_frameworks import ConfigurationError, PoolError, metrics
from peewee_frameworks.extension import Extension
from peewee_frameworks.metrics.families import METRICS
from peewee_frameworks.pool import PooledMySQLDatabase, PooledPostgresqlDatabase, PooledSqliteDatabase
from tests.support.concurrency import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.databases import Place

OURS: Any = {"sqlite": PooledSqliteDatabase, "mysql": PooledMySQLDatabase, "postgres": PooledPostgresqlDatabase}
POOL = "db.client.connection.pool.name"


class Reader:
    """What an exporter would send now."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader], shutdown_on_exit=False)

    def metrics(self) -> dict[str, Any]:
        data = self._reader.get_metrics_data()
        parts = [] if data is None else data.resource_metrics
        found = [metric for part in parts for scope in part.scope_metrics for metric in scope.metrics]
        assert len({metric.name for metric in found}) == len(found)
        return {metric.name: metric for metric in found}

    def points(self, name: str) -> dict[tuple[Any, ...], Any]:
        metric = self.metrics().get(name)
        return {} if metric is None else {tuple(point.attributes.values()): point for point in metric.data.data_points}


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.provider.shutdown()


@pytest.fixture
def db(place: Place) -> Iterator[Any]:
    """Two connections, in a pool called shop."""
    db = OURS[place.kind](place.database, max_connections=2, timeout=10, pool_name="shop", **place.connect_kwargs())
    with closing(db.pool):
        yield db


def test_counts_are_those_of_the_moment(db: Any, reader: Reader):
    orm = Extension(db)
    metrics.instrument(orm, meter_provider=reader.provider)
    held = db.pool.acquire()
    counts = {key: point.value for key, point in reader.points("db.client.connection.count").items()}
    db.pool.release(held)
    later = {key: point.value for key, point in reader.points("db.client.connection.count").items()}
    assert counts == {
        ("shop", "idle"): 0,
        ("shop", "used"): 1,
        ("shop", "connecting"): 0,
        ("shop", "checking"): 0,
        ("shop", "closing"): 0,
    }
    assert (later["shop", "used"], later["shop", "idle"]) == (0, 1)
    assert reader.points("db.client.connection.max")[("shop",)].value == 2


def test_timeouts_and_closes_are_sums_that_only_grow(db: Any, reader: Reader):
    orm = Extension(db)
    metrics.instrument(orm, meter_provider=reader.provider)
    held = [db.pool.acquire(), db.pool.acquire()]
    with pytest.raises(PoolError):
        db.pool.acquire(0.01)
    for conn in held:
        db.pool.release(conn)
    db.close_idle()
    found = reader.metrics()
    timeouts = found["db.client.connection.timeouts"].data
    assert timeouts.is_monotonic
    assert timeouts.data_points[0].value == 1
    assert not found["db.client.connection.count"].data.is_monotonic
    assert reader.points("peewee.pool.closes")["shop", "close_idle()"].value == 2


def test_durations_are_histograms_with_the_pools_buckets(db: Any, reader: Reader):
    """Each use, each wait and each connect is in one bucket, those of just before the export included."""
    orm = Extension(db)
    metrics.instrument(orm, meter_provider=reader.provider)
    for _ in range(3):
        with orm.scope():
            db.execute_sql("SELECT 1")
    held = [db.pool.acquire(), db.pool.acquire()]
    with ThreadPoolExecutor(1) as threads:
        waiter = threads.submit(lambda: db.pool.release(db.pool.acquire()))
        eventually(lambda: db.pool.stats().waiting == 1)
        for conn in held:
            db.pool.release(conn)
        waiter.result(10)
    stats = db.pool.stats()
    for part in ("use_time", "wait_time", "create_time"):
        point = reader.points(f"db.client.connection.{part}")[("shop",)]
        expected = getattr(stats, part)
        assert (point.count, tuple(point.bucket_counts)) == (expected.count, expected.buckets)
        assert point.sum == pytest.approx(expected.sum)
    assert stats.use_time.count == 6


def test_names_units_and_kinds_are_the_conventions(db: Any, reader: Reader):
    """They are those of the package that OpenTelemetry generates from its conventions."""
    orm = Extension(db)
    metrics.instrument(orm, meter_provider=reader.provider)
    with db.connection_context():
        db.execute_sql("SELECT 1")
    found = reader.metrics()
    prefix = "DB_CLIENT_CONNECTION_"
    names = {name for key, name in vars(db_metrics).items() if key.startswith(prefix)}
    assert names == {metric.name for metric in METRICS if metric.name.startswith("db.")}
    for name in names - {"db.client.connection.wait_time"}:  # nobody has waited, unless for a connect
        made = getattr(db_metrics, f"create_{name.replace('.', '_')}")(reader.provider.get_meter("conventions"))
        assert found[name].unit == made.unit, name
        kind = {"Sum": {True: "Counter", False: "UpDownCounter"}, "Histogram": {None: "Histogram"}}
        data = found[name].data
        assert type(made).__name__.lstrip("_") == kind[type(data).__name__][getattr(data, "is_monotonic", None)]


def test_a_pool_that_was_disposed_of_goes_on_telling(db: Any, reader: Reader):
    """It makes a new set of connections, as after a fork, and counts from nothing; the instruments follow."""
    orm = Extension(db)
    metrics.instrument(orm, meter_provider=reader.provider)
    db.pool.release(db.pool.acquire())
    db.close_idle()
    db.pool.stats()
    db.dispose()
    db.pool.release(db.pool.acquire())
    assert reader.points("db.client.connection.use_time")[("shop",)].count == 2
    assert db.pool.stats().use_time.count == 1
    db.close_idle()


def test_two_pools_of_one_name_are_told_apart(tmp_path, reader: Reader):
    first, second = (PooledSqliteDatabase(tmp_path / name, pool_name="shop") for name in ("a.db", "b.db"))
    with closing(first.pool), closing(second.pool):
        orm = Extension({"default": first, "replica": second})
        metrics.instrument(orm, meter_provider=reader.provider)
        assert set(reader.points("db.client.connection.max")) == {("shop",), ("shop/replica",)}


def test_an_application_that_is_gone_is_not_kept(tmp_path, reader: Reader):
    """A provider lives as long as the process; what it observes need not."""
    orm = Extension(PooledSqliteDatabase(tmp_path / "a.db"))
    metrics.instrument(orm, meter_provider=reader.provider)
    assert reader.points("db.client.connection.max")
    del orm
    eventually(lambda: not reader.points("db.client.connection.max"))


def test_without_a_database_it_says_what_is_missing():
    with pytest.raises(ConfigurationError, match="init_app"):
        metrics.instrument(Extension())
    with pytest.raises(ConfigurationError, match=r"instrument\(orm\)"):
        metrics.instrument()


WITHOUT = """
import sys
sys.modules["opentelemetry"] = sys.modules["prometheus_client"] = None
from peewee_frameworks import ConfigurationError, metrics
for function in (metrics.instrument, metrics.render, metrics.register):
    try:
        function()
    except ConfigurationError as error:
        print(error)
"""


def test_without_the_libraries_it_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=60, check=True)
    assert [line.partition("'")[2] for line in done.stdout.splitlines()] == [
        "peewee-frameworks[opentelemetry]'",
        "peewee-frameworks[prometheus]'",
        "peewee-frameworks[prometheus]'",
    ]


def test_a_provider_may_be_set_later_and_until_then_nothing_happens():
    """Instruments made before the SDK is configured work once it is."""
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["0", "1"]


LATER = """
from opentelemetry import metrics as api
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from peewee_frameworks import metrics
from peewee_frameworks.extension import Extension
from peewee_frameworks.pool import PooledSqliteDatabase

db = PooledSqliteDatabase(":memory:")
orm = Extension(db)
metrics.instrument(orm)
db.pool.release(db.pool.acquire())
db.pool.stats()  # what was used before is passed on to nobody
reader = InMemoryMetricReader()
print(0 if reader.get_metrics_data() is None else 1)
api.set_meter_provider(MeterProvider([reader]))
db.pool.release(db.pool.acquire())
found = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
print(*[point.count for metric in found if metric.name.endswith("use_time") for point in metric.data.data_points])
"""
