"""Graceful shutdown and worker restart with requests in flight. Each case has a server of its own."""

from __future__ import annotations

import itertools
import os
import signal
from contextlib import ExitStack

import pytest

from tests.adapters.contract.applicability import PLACES
from tests.adapters.contract.conftest import serving
from tests.adapters.contract.served import Served, rid
from tests.support.concurrency import eventually

# The databases in turn.
KINDS = dict(zip(PLACES, itertools.cycle(["mysql", "postgres", "sqlite"]), strict=False))
# Werkzeug's development server has no graceful shutdown: its threads die with it.
GRACEFUL = [name for name in PLACES if name != "flask-werkzeug"]
ASYNC = {"sanic-workers": "psycopg", "fastapi-asyncio": "aiomysql", "starlette-uvloop": "asyncpg"}


@pytest.mark.parametrize(("name", "backend"), [*((name, KINDS[name]) for name in GRACEFUL), *ASYNC.items()])
def test_graceful_shutdown_lets_requests_end(name, backend):
    """SIGTERM while a request is between two queries: it gets its answer, and no session stays on the server."""
    with serving(name, backend) as served, ExitStack() as stack:
        one = rid()
        client = stack.enter_context(served.start(f"/slow/{one}"))
        served.reached(one)
        served.process.signal(signal.SIGTERM)
        eventually(lambda: stopping(served), message="the server goes on as if nothing had been")
        served.open(one)
        response = client.read_response()
        assert (response.status, response.text) == (200, one)
        client.drop("fin")  # Sanic waits for connections too
        assert served.process.wait() in {0, -signal.SIGTERM}
        eventually(lambda: not served.place.sessions(), message=f"left: {served.place.sessions()}")


def stopping(served: Served) -> bool:
    """Tell whether the server takes no new connections any more, or says that it is about to end."""
    words = ("Shutting down", "Handling signal: term", "Stopping worker", "Received signal", "shutdown")
    return any(word in served.process.output for word in words)


def test_a_killed_server_leaves_no_session():
    """Werkzeug: the process ends at once, and the request with it."""
    with serving("flask-werkzeug", "postgres") as served, ExitStack() as stack:
        one = rid()
        client = stack.enter_context(served.start(f"/slow/{one}"))
        served.reached(one)
        served.process.kill()
        client.read_eof()
        eventually(lambda: not served.place.sessions(), message=f"left: {served.place.sessions()}")
        served.process.start()
        served.expect_right("/ok", 20)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("flask-gthread", "postgres"),
        ("sanic-workers", "postgres"),
        ("fastapi-workers", "postgres"),
        ("fastapi-workers", "psycopg"),
    ],
)
def test_a_killed_worker_is_replaced(name, backend):
    """With a request in flight; its session goes with it, and the new worker has a pool of its own."""
    with serving(name, backend) as served, ExitStack() as stack:
        served.expect_right("/ok", 20)
        one = rid()
        client = stack.enter_context(served.start(f"/slow/{one}"))
        served.reached(one)
        (victim,) = (stats["pid"] for stats in served.ask("stats") if f"request GET /slow/{one}" in stats["live"])
        os.kill(victim, signal.SIGKILL)
        assert client.read_eof() == b""
        eventually(lambda: all(stats["pid"] != victim for stats in served.ask("stats")))
        eventually(lambda: answers(served), message="no new worker")
        served.expect_right("/ok", 40)
        served.settle()


def answers(served: Served) -> bool:
    try:
        return served.get(f"/plain/{rid()}").status == 200
    except OSError:
        return False


def test_gunicorn_reloads_its_workers():
    """SIGHUP: new workers, the old one ends after its request."""
    with serving("flask-gthread", "mysql") as served, ExitStack() as stack:
        one = rid()
        client = stack.enter_context(served.start(f"/slow/{one}"))
        served.reached(one)
        (old,) = served.process.workers()
        served.process.signal(signal.SIGHUP)
        eventually(lambda: set(served.process.workers()) - {old}, message="no new worker")
        served.open(one)
        assert client.read_response().text == one
        eventually(lambda: old not in served.process.workers(), message="the old worker stays")
        eventually(lambda: answers(served))
        served.expect_right("/ok", 20)
        served.settle()
