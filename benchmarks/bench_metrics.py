"""What statistics, metrics and leak detection cost whoever takes a connection, on a stub database."""

from __future__ import annotations

import functools
import time
import timeit
from typing import Any

from .harness import Row
from .peers import OURS, OurDatabase, Stub

CYCLES, REPEATS = 20000, 15


def cycle(through: str, *, by: str = "") -> dict[str, float]:
    """Measure a cycle: the caller's CPU time, and that of all threads with the folding, the scrapes and the exports.

    Args:
        through: "database" for ``db.connect()`` and ``db.close()``, "pool" for ``pool.acquire()`` and ``pool.release()``.
        by: "prometheus" with leak detection and a scrape after each round, "both" with OpenTelemetry's instruments too.
    """
    from peewee_frameworks.extension import Extension

    ours = OurDatabase(Stub(), 4)
    pool, orm = ours.db.pool, Extension(ours.db)
    # Without, the samples are folded all the same: the upkeep does that once a second.
    export = watch(orm, pool, by) if by else pool.engine.fold
    statement = "release(acquire())" if through == "pool" else "acquire(); release()"
    calls = (pool.acquire, pool.release) if through == "pool" else (ours.db.connect, ours.db.close)
    timer = timeit.Timer(
        statement, timer=time.thread_time, globals=dict(zip(("acquire", "release"), calls, strict=True))
    )
    timer.timeit(1)
    start, took = time.process_time(), []
    for _ in range(REPEATS):
        took.append(timer.timeit(CYCLES))
        export()
    everybody = time.process_time() - start
    ours.close()
    return {"value": min(took) / CYCLES * 1e6, "us of all threads": everybody / CYCLES / REPEATS * 1e6}


def watch(orm: Any, pool: Any, by: str) -> Any:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from prometheus_client import CollectorRegistry, generate_latest

    from peewee_frameworks import metrics

    registry, reader = CollectorRegistry(), InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    pool.configure(pool.options.replace(leak_threshold=60))
    metrics.register(orm, registry=registry)
    if by == "both":
        metrics.instrument(orm, meter_provider=provider)

    def export() -> None:
        generate_latest(registry)
        reader.get_metrics_data()

    return export


ROWS = [
    Row(
        f"observed-{through}",
        f"{calls} with leak detection, Prometheus and OpenTelemetry, against without; CPU of the caller",
        "us",
        "the same without",
        {
            OURS: functools.partial(cycle, through, by="both"),
            "without OpenTelemetry": functools.partial(cycle, through, by="prometheus"),
            "without": functools.partial(cycle, through),
        },
        "<= 1.03 x without",
        lambda ours, all_: ours <= 1.03 * all_["without"],
        repeats=9,
    )
    for through, calls in (("database", "db.connect() and db.close()"), ("pool", "acquire and release"))
]
