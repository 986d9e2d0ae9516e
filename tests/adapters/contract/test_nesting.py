"""Applications in applications, and two databases."""

from __future__ import annotations

import pytest

from tests.adapters.contract.conftest import serving
from tests.adapters.contract.served import POOL, SERVERS, Served, rid
from tests.support.concurrency import eventually


def test_a_mounted_application_shares_the_scope(served: Served):
    """It has a Peewee of its own on the same database; there is one connection, not two."""
    for _ in range(3):
        one = rid()
        response = served.get(f"/sub/ok/{one}")
        assert (response.status, response.text) == (200, f"{one} 1")
    assert served.get(f"/sub/unhandled/{rid()}").status == 500
    served.settle()
    assert {result.status for result in served.hammer([f"/sub/ok/{rid()}" for _ in range(60)], 60)} == {200}


def test_a_wsgi_application_in_an_asgi_application(served: Served):
    """It runs in a thread, in a scope of its own."""
    one = rid()
    response = served.get(f"/wsgi/ok/{one}")
    assert (response.status, response.text) == (200, f"{one} 1")
    assert served.get(f"/wsgi/unhandled/{rid()}").status == 500
    # Starlette closes no WSGI body: the scope ends when the body is freed, of which the error's traceback is a part.
    served.ask("collect")
    served.settle()
    assert {result.status for result in served.hammer([f"/wsgi/ok/{rid()}" for _ in range(60)], 60)} == {200}


# With two databases, both connected eagerly; on a database that the server does not meet elsewhere first.
TWO = {
    "flask-gthread": "mysql",
    "sanic-workers": "postgres",
    "fastapi-uvloop": "mysql",
    "starlette-asyncio": "postgres",
}


TWO_ASYNC = {"sanic-single": "aiosqlite", "fastapi-uvloop": "asyncpg", "starlette-asyncio": "psycopg"}


@pytest.mark.parametrize(("name", "backend"), [*TWO.items(), *TWO_ASYNC.items()])
def test_two_databases_connected_eagerly(name, backend):
    """Two Peewee instances on one application: each request has one connection of each pool."""
    assert name in SERVERS
    with serving(name, backend, other=True) as served:
        one = rid()
        assert served.get(f"/both/{one}").text == f"{one} {one}"
        for route, status in {"/ok": 200, "/handled": 418, "/unhandled": 500, "/nowhere": 404, "/missing": 404}.items():
            assert served.get(f"{route}/{rid()}").status == status, route
        ids = [rid() for _ in range(100)]
        results = served.hammer([f"/both/{one}" for one in ids], 100)
        assert [(result.status, result.text) for result in results] == [(200, f"{one} {one}") for one in ids]
        for kind, (status, rows) in {"commit": (200, 1), "status": (409, 0), "unhandled": (500, 0)}.items():
            one = rid()
            assert served.get(f"/atomic/{kind}/{one}").status == status
            assert served.count(one) == rows
        for how in ("rst", "fin"):
            one = rid()
            client = served.start(f"/slow/{one}")
            served.reached(one)
            try:
                eventually(lambda: served.in_use == 2)  # the request before may still be giving back
            finally:
                client.drop(how)
                served.open(one)
        served.settle()
        eventually(lambda: len(served.place.sessions()) <= 2 * 2 * POOL)
