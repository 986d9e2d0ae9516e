"""Flask under gunicorn's gevent worker: our pool and adapter against playhouse.pool, correctly patched, and the usual hooks."""

from __future__ import annotations

import contextlib
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tests.support.load import hammer
from tests.support.servers import admin_connection, server_url
from tests.support.webservers import gunicorn

from .harness import Row, percentile
from .peers import OURS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.support.process import ServerProcess

PLAYHOUSE = "playhouse.pool"
BARE = "PyMySQL in a gevent queue"
CONTENDERS = {OURS: "ours", PLAYHOUSE: "playhouse", BARE: "bare"}
TABLE = "pf_bench_gevent"
POSTS, REQUESTS = 100, 3000
CLIENTS = 32  # more than the pool has connections
STEADY_CLIENTS, PER_SECOND, SECONDS = 8, 200, 5.0


@contextlib.contextmanager
def serve(contender: str) -> Iterator[ServerProcess]:
    """A worker whose connections are open."""
    connection = admin_connection("mysql")
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE TABLE IF NOT EXISTS {TABLE} (id INT PRIMARY KEY, title VARCHAR(80), body TEXT)")
        rows = [(number, f"Post {number}", "…" * 200) for number in range(1, POSTS + 1)]
        cursor.executemany(f"REPLACE INTO {TABLE} VALUES (%s, %s, %s)", rows)
    connection.close()
    env = {"CONTENDER": contender, "DATABASE_URL": server_url("mysql")}
    with gunicorn("benchmarks.gevent_app:app", worker="gevent", env=env) as server:
        hammer(server.url, paths(300), concurrency=CLIENTS)
        read_lag(server)
        yield server


def paths(count: int) -> list[str]:
    return [f"/posts/{number % POSTS + 1}" for number in range(count)]


def read_lag(server: ServerProcess) -> dict[str, float]:
    """How late, in ms, a greenlet woke that slept 5 ms, since the last call."""
    with server.client() as client:
        found: dict[str, float] = client.get("/lag").json()
    return found


def measure(contender: str) -> dict[str, Any]:
    """Clients that never pause. The hub is saturated, and wakes who sleeps when it has done all that is ready."""
    with serve(contender) as server:
        began = time.perf_counter()
        results = hammer(server.url, paths(REQUESTS), concurrency=CLIENTS)
        seconds = time.perf_counter() - began
        lag = read_lag(server)
    failed = sum(result.status != 200 for result in results)
    if failed:
        raise RuntimeError(f"{failed} of {REQUESTS} requests failed")
    return {"value": REQUESTS / seconds, "hub lag p99 ms": lag["p99"]}


def measure_lag(contender: str) -> dict[str, Any]:
    """Requests at a steady rate, which leave the hub idle most of the time.

    Not clients that never pause: where the next request is in the socket already, gevent reads it without asking the hub, and
    what is measured is how many requests come in a row.
    """
    with serve(contender) as server, ThreadPoolExecutor(STEADY_CLIENTS) as executor:
        start = time.monotonic() + 0.1
        due = [(start + index / PER_SECOND, path) for index, path in enumerate(paths(int(PER_SECOND * SECONDS)))]
        shares = [executor.submit(keep_pace, server, due[number::STEADY_CLIENTS]) for number in range(STEADY_CLIENTS)]
        answers = [seconds for share in shares for seconds in share.result()]
        lag = read_lag(server)
    return {"value": lag["p99"], "median": lag["median"], "answer p99 ms": 1000 * percentile(answers, 0.99)}


def keep_pace(server: ServerProcess, due: Sequence[tuple[float, str]]) -> list[float]:
    """Send each request when it is due; return how long after that its answer came, in seconds."""
    answers = []
    with server.client() as client:
        for at, path in due:
            time.sleep(max(0.0, at - time.monotonic()))
            if client.get(path).status != 200:
                raise RuntimeError(f"{path} failed")
            answers.append(time.monotonic() - at)
    return answers


ROWS = [
    Row(
        name="gevent-flask",
        question=f"Flask on gunicorn -k gevent, 1 worker, pool of 10, {CLIENTS} clients, get_by_id on MariaDB",
        unit="req/s",
        floor="the same page without Peewee: ten connections of PyMySQL in a gevent queue",
        contenders={name: functools.partial(measure, contender) for name, contender in CONTENDERS.items()},
        target="at least 1.0 x playhouse.pool",
        passes=lambda ours, medians: ours >= medians[PLAYHOUSE],
        lower_is_better=False,
    ),
    Row(
        name="gevent-lag",
        question=f"how late a greenlet wakes that sleeps 5 ms, p99, at {PER_SECOND} requests/s from {STEADY_CLIENTS} clients",
        unit="ms",
        floor="the same page without Peewee: ten connections of PyMySQL in a gevent queue",
        contenders={name: functools.partial(measure_lag, contender) for name, contender in CONTENDERS.items()},
        target="under 10 ms",
        passes=lambda ours, medians: ours < 10,
    ),
]
