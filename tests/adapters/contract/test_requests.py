"""Requests that end well, and those that do not; the connection is back after each."""

from __future__ import annotations

import pytest

from tests.adapters.contract.served import Served, rid
from tests.support.client import Request
from tests.support.load import hammer


@pytest.mark.core
@pytest.mark.parametrize("route", ["/ok", "/async", "/plain", "/write"])
def test_a_request_succeeds(served: Served, route: str):
    one = rid()
    response = served.get(f"{route}/{one}")
    assert (response.status, response.text) == (200, one)
    assert served.count(one) == (route == "/write")


@pytest.mark.core
def test_errors_are_answered_by_handlers_that_query(served: Served):
    with_handler = {"/handled": (418, "handled"), "/unhandled": (500, "unhandled"), "/nowhere": (404, "not found")}
    for route, (status, text) in with_handler.items():
        one = rid()
        response = served.get(f"{route}/{one}")
        assert (response.status, response.text) == (status, f"{text} {one}")
    one = rid()
    with served.client() as client:
        response = client.request(Request(f"/ok/{one}", "POST"))
    assert (response.status, response.text) == (405, f"not allowed {one}")


@pytest.mark.core
def test_database_errors_become_responses(served: Served):
    one = rid()
    assert served.get(f"/missing/{one}").status == 404
    assert served.get(f"/duplicate/{one}").status == 409
    assert served.count(one) == 1


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_before_hook_short_circuits(served: Served, when: str):
    """One that runs before ours, and one that runs after it; both query."""
    one = rid()
    response = served.get(f"/ok/{one}", X_Before=f"short-{when}")
    assert (response.status, response.text) == (202, one)


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_before_hook_raises(served: Served, when: str):
    one = rid()
    response = served.get(f"/ok/{one}", X_Before=f"raise-{when}")
    assert (response.status, response.text) == (500, f"unhandled {one}")


@pytest.mark.parametrize("when", ["response-early", "response-late"])
def test_response_middleware_of_others_raises(served: Served, when: str):
    """The client of Sanic gets its response all the same, as Sanic has it."""
    one = rid()
    response = served.get(f"/ok/{one}", X_After=when)
    if served.is_sanic:
        assert (response.status, response.text) == (200, one)
    else:
        assert response.status == 500
    served.settle()
    assert served.get(f"/unhandled/{rid()}", X_After=when).status == 500


@pytest.mark.parametrize("when", ["teardown-first", "teardown-last"])
def test_a_teardown_of_others_raises(served: Served, when: str):
    assert served.get(f"/ok/{rid()}", X_After=when).status == 500
    served.settle()
    assert served.get(f"/unhandled/{rid()}", X_After=when).status == 500


def test_errors_under_load_leave_the_pool_whole(served: Served):
    routes = ["/ok", "/handled", "/unhandled", "/nowhere", "/missing", "/write", "/plain", "/duplicate"]
    paths = [f"{routes[number % len(routes)]}/{rid()}" for number in range(160)]
    expected = {"/ok": 200, "/handled": 418, "/unhandled": 500, "/nowhere": 404, "/missing": 404, "/write": 200}
    expected |= {"/plain": 200, "/duplicate": 409}
    # A connection each: uvicorn closes one after an error. And no more at once than there are threads: a request whose
    # handler for errors is sync needs a second one while it holds a connection.
    requests = [Request(path, headers={"Connection": "close"}) for path in paths]
    for path, result in zip(paths, hammer(served.process.url, requests, concurrency=40), strict=True):
        route, _, one = path.rpartition("/")
        assert result.status == expected[route], f"{path}: {result.text} {result.error}"
        assert one in result.text or route in {"/missing", "/duplicate"}
