"""Flask on gunicorn's gevent worker and on pywsgi, on real databases, with a stock pool and with ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.client import Request
from tests.support.concurrency import eventually
from tests.support.drivers import environment
from tests.support.load import hammer, statuses
from tests.support.process import ServerProcess, python
from tests.support.webservers import gunicorn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.databases import Place

TARGET = "tests.gevent.served:app"


def serve(way: str, place: Place, pool: str) -> ServerProcess:
    env = {**environment(), "PLACE_URL": place.url, "POOL": pool}
    if way == "pywsgi":
        return ServerProcess(lambda port: python("tests.gevent.serve_pywsgi", str(port)), env=env, ready="/")
    return gunicorn(TARGET, worker="gevent", preload=way == "preload", env=env)


@pytest.fixture(params=["mysql", "postgres"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["gunicorn", "preload", "pywsgi"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["ours", "stock"])
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(way: str, kind: Any, pool: str, make_place: Callable[[Any], Place]) -> Iterator[tuple[ServerProcess, Place]]:
    place = make_place(kind)
    with serve(way, place, pool) as process:
        yield process, place


def test_the_first_requests_of_a_preloaded_application_may_come_together(make_place: Callable[[Any], Place]) -> None:
    """The application was made before gevent's patch; whoever starts it yields, and the others wait without a freeze."""
    place = make_place("mysql")
    env = {**environment(), "PLACE_URL": place.url, "POOL": "stock"}
    with gunicorn(TARGET, worker="gevent", preload=True, env=env, ready=None) as process:
        results = hammer(process.url, [f"/value/{number}" for number in range(10)], concurrency=10, deadline=15)
    assert [result.json()["value"] for result in results] == list(range(10))


def test_flask_serves_its_requests_at_the_same_time(
    server: tuple[ServerProcess, Place], way: str, kind: str, pool: str
) -> None:
    """Concurrent requests, children, time limits, failures: right answers, nothing in use at the end, nothing shared."""
    process, place = server
    with process.client() as client:
        about = client.get("/").json()
        assert about["patched"]
        late = way == "preload"  # the application was imported before gunicorn's worker patched
        assert ("peewee-before-patch" in about["findings"]) is late
        assert ("database-before-patch" in about["findings"]) is False, "its locks were renewed"

        # Keep-alive: one greenlet serves these; the second must not inherit the first one's connection.
        for number in range(3):
            assert client.get(f"/value/{number}").json() == {"value": number, "same": True, "fresh": True}

        assert client.get("/timeout").json() == {"value": 42}
        children = client.get("/children").json()
        assert children == {"results": [0, 1, 2, 3, 4, 5], "fresh": True, "own": True, "still": True}

    results = hammer(process.url, [f"/value/{number}" for number in range(60)], concurrency=20)
    assert [result.json()["value"] for result in results] == list(range(60))
    assert all(result.json()["same"] for result in results)

    requests = [Request(f"/row/{job}{'?fail' if job % 3 == 0 else '?nap=0.01'}", "POST") for job in range(30)]
    results = hammer(process.url, requests, concurrency=15)
    assert statuses(results) == {500: 10, 200: 20}
    assert all(result.json() == {"rows": 2} for result in results if result.status == 200)

    with process.client() as client:
        eventually(lambda: client.get("/").json()["in_use"] == 0, message="connections in use")
    # One whose query was struck lives on the server until its nap is over.
    eventually(lambda: len(place.sessions()) <= 5, message="sessions")
    assert not any(session.in_transaction for session in place.sessions())
