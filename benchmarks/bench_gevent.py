"""Flask under gunicorn's gevent worker: our pool and adapter against playhouse.pool, correctly patched, and the usual hooks."""

from __future__ import annotations

import functools
import time
from typing import Any

from tests.support.load import hammer
from tests.support.servers import admin_connection, server_url
from tests.support.webservers import gunicorn

from .harness import Row
from .peers import OURS

PLAYHOUSE = "playhouse.pool"
TABLE = "pf_bench_gevent"
POSTS, REQUESTS = 100, 3000
CLIENTS = (
    32  # more than the pool has connections; the hub is saturated, so its lag is one burst of CPU for each of them
)
FEW_CLIENTS = 2


def prepare() -> None:
    connection = admin_connection("mysql")
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE TABLE IF NOT EXISTS {TABLE} (id INT PRIMARY KEY, title VARCHAR(80), body TEXT)")
        rows = [(number, f"Post {number}", "…" * 200) for number in range(1, POSTS + 1)]
        cursor.executemany(f"REPLACE INTO {TABLE} VALUES (%s, %s, %s)", rows)
    connection.close()


def measure(contender: str, clients: int = CLIENTS, page: str = "posts") -> dict[str, Any]:
    prepare()
    env = {"CONTENDER": contender, "DATABASE_URL": server_url("mysql")}
    paths = [f"/{page}/{number % POSTS + 1}" for number in range(REQUESTS)]
    with gunicorn("benchmarks.gevent_app:app", worker="gevent", env=env) as server:
        hammer(server.url, paths[:300], concurrency=clients)  # warm: connections are open
        with server.client() as client:
            client.get("/lag")
        began = time.perf_counter()
        results = hammer(server.url, paths, concurrency=clients)
        seconds = time.perf_counter() - began
        with server.client() as client:
            lag = float(client.get("/lag").json()["p99"])
    failed = sum(result.status != 200 for result in results)
    if failed:
        raise RuntimeError(f"{failed} of {REQUESTS} requests failed")
    return {"value": REQUESTS / seconds, "hub lag p99 ms": lag}


def measure_lag(contender: str, page: str = "posts") -> dict[str, Any]:
    found = measure(contender, FEW_CLIENTS, page)
    return {"value": found["hub lag p99 ms"], "req/s": found["value"]}


ROWS = [
    Row(
        name="gevent-flask",
        question=f"Flask on gunicorn -k gevent, 1 worker, pool of 10, {CLIENTS} clients, get_by_id on MariaDB",
        unit="req/s",
        floor="the framework and one round trip",
        contenders={OURS: functools.partial(measure, "ours"), PLAYHOUSE: functools.partial(measure, "playhouse")},
        target="at least 1.0 x playhouse.pool",
        passes=lambda ours, medians: ours >= medians[PLAYHOUSE],
        lower_is_better=False,
    ),
    Row(
        name="gevent-lag",
        question=f"how late a greenlet wakes that sleeps 5 ms, p99, with {FEW_CLIENTS} clients that never pause",
        unit="ms",
        floor="the same pages without a query",
        contenders={
            OURS: functools.partial(measure_lag, "ours"),
            PLAYHOUSE: functools.partial(measure_lag, "playhouse"),
            "no query": functools.partial(measure_lag, "ours", "bare"),
        },
        target="under 10 ms",
        passes=lambda ours, medians: ours < 10,
    ),
]
