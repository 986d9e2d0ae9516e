"""What outlives its request: background tasks, orphan tasks, threads."""

from __future__ import annotations

import pytest

from tests.adapters.contract.served import Served, rid


def outlive(served: Served, path: str, one: str, *, ended: bool = True) -> list[str]:
    """Get the response, see that it holds nothing (and, if it is to end, that it has), then let go on what it left."""
    with served.client() as client:
        client.send_bytes(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        response = client.read_response()
        assert (response.status, response.text) == (200, one)
        served.settle() if ended else served.holds_nothing()
        served.open(one)
        return served.notes(one)


@pytest.mark.parametrize("kind", ["sync", "run", "inline"])
def test_a_background_task_queries_in_the_request_that_started_it(served: Served, kind):
    """It runs before the request ends, after the response was sent."""
    one = rid()
    assert outlive(served, f"/background/{kind}/{one}", one, ended=False) == [one]


@pytest.mark.parametrize(("kind", "expected"), [("inline", "ScopeEnded"), ("run", "ScopeEnded"), ("scoped", None)])
def test_an_orphan_task(served: Served, kind, expected):
    """It is told that its request has ended, unless it has a scope of its own."""
    one = rid()
    assert outlive(served, f"/orphan/{kind}/{one}", one) == [expected or one]


def test_a_task_of_the_application(served: Served):
    """Sanic's app.add_task."""
    one, other = rid(), rid()
    assert outlive(served, f"/background/inline/{one}", one) == ["ScopeEnded"]
    served.settle()
    assert outlive(served, f"/background/scoped/{other}", other) == [other]


@pytest.mark.parametrize(("kind", "expected"), [("inherited", "ScopeEnded"), ("scoped", None), ("bare", None)])
def test_a_thread_that_outlives_its_request(served: Served, kind, expected):
    one = rid()
    assert outlive(served, f"/thread/{kind}/{one}", one) == [expected or one]


def test_flasks_copied_request_context(served: Served):
    one = rid()
    assert outlive(served, f"/thread/copied/{one}", one, ended=False) == [one]


def test_a_thread_that_never_closes_gives_back_when_it_has_ended(served: Served):
    """With the next connect, which takes back what the dead have left; so the pool does not run dry."""
    for _ in range(7):
        one = rid()
        assert outlive(served, f"/thread/careless/{one}", one) == [one]
        served.reap()
