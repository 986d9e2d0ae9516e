"""What an application shows of itself when it is served: times in its responses, N+1 pages, and who holds connections."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.observe.conftest import SERVERS
from tests.support.client import Request
from tests.support.concurrency import eventually

if TYPE_CHECKING:
    from tests.support.client import Response
    from tests.support.process import ServerProcess

TIMES = re.compile(r'db;dur=(\d+\.\d\d);desc="(\d+ quer(?:y|ies))", pool;dur=(\d+\.\d\d)')


def get(server: ServerProcess, path: str) -> Response:
    with server.client() as client:  # Werkzeug closes after each response
        return client.get(path)


@pytest.mark.parametrize("framework", SERVERS)
def test_an_observed_application(serve, framework):
    """One run of each server: Server-Timing, the query budget, holders and the report of one that holds too long."""
    with serve(framework, server_timing=True, query_budget=4, leak_threshold=0.2) as server:
        # Server-Timing
        response = get(server, "/notes")
        assert response.text == "secret 0, secret 1, secret 2, secret 3"
        times = TIMES.fullmatch(response.headers["server-timing"])
        assert times is not None
        assert times[2] == "5 queries"
        assert float(times[1]) > 0
        assert float(times[3]) > 0  # the first of all waited for its connect
        nothing = TIMES.fullmatch(get(server, "/none").headers["server-timing"])
        assert nothing is not None
        assert nothing.groups() == ("0.00", "0 queries", "0.00")
        # The query budget
        (report,) = eventually(lambda: re.findall(r"peewee_frameworks.query WARNING (.*)", server.output))
        assert report == "request GET /notes sent 5 queries, more than query_budget (4):"
        assert re.search(r'^  4 x SELECT .* FROM "note" AS "t1" WHERE \("t1"."id" = \?\)', server.output, re.MULTILINE)
        assert "secret" not in server.output
        # Who holds a connection, and for too long
        with server.client() as other:
            other.send(Request("/hold"))
            (held,) = eventually(lambda: [one for one in json.loads(get(server, "/holders").text) if one["leaked"]])
            eventually(lambda: "longer than leak_threshold, by request GET /hold in " in server.output)
            (held,) = json.loads(get(server, "/holders").text)
            assert held["label"] == "request GET /hold"
            assert held["owner"].startswith(("thread ", "task "))
            assert re.search(r"in wait_in_the_(view|coroutine)\b", held["stack"])
            get(server, "/open")
            assert other.read_response().text == "held"
        eventually(lambda: "reported as leaked by request GET /hold, came back after" in server.output)
        assert json.loads(get(server, "/holders").text) == []


@pytest.mark.parametrize("framework", ["flask", "sanic", "starlette"])
def test_without_the_options_nothing_is_shown(serve, framework):
    """No header, no report; holders can be asked for all the same."""
    with serve(framework, kind="stock") as server:
        assert "server-timing" not in get(server, "/notes").headers
        with server.client() as other:
            other.send(Request("/hold"))
            (held,) = eventually(lambda: json.loads(get(server, "/holders").text))
            assert (held["label"], held["leaked"], held["stack"]) == ("request GET /hold", False, None)
            get(server, "/open")
            assert other.read_response().text == "held"
        assert "peewee_frameworks" not in server.output


def test_a_stream_of_sanic_tells_what_is_known_at_its_first_byte(serve):
    """Once, in the head of a chunked response."""
    with serve("sanic", server_timing=True) as server:
        response = get(server, "/stream")
        assert response.headers["transfer-encoding"] == "chunked"
        assert '"5 queries"' in response.headers["server-timing"]
