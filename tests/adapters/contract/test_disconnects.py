"""The client goes away: before, in the middle of and after the handler, and in mid-stream."""

from __future__ import annotations

import pytest

from tests.adapters.contract.served import Served, rid
from tests.support.client import Request


@pytest.fixture(params=["rst", "fin"])
def how(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.core
def test_disconnect_before_the_handler(served: Served, how):
    """In the middle of the request's head, and in the middle of its body."""
    for head_only in (True, False):
        client = served.client()
        client.send_part(Request(f"/length/{rid()}", "POST", b"x" * 100_000), -10 if head_only else 1000)
        client.drop(how)
    served.settle()
    served.expect_right("/ok", 20)


@pytest.mark.core
def test_disconnect_in_the_middle_of_the_handler(served: Served, how):
    """Between two queries of the handler."""
    one = rid()
    client = served.start(f"/slow/{one}")
    served.reached(one)
    client.drop(how)
    served.expect_right("/ok", 10)
    served.open(one)
    served.settle()
    served.expect_right("/ok", 20)


@pytest.mark.parametrize("route", ["/sleep", "/sleep-tx"])
def test_disconnect_inside_a_query(served: Served, how, route):
    """While a statement runs on the server, alone or in a transaction."""
    clients = [served.start(f"{route}/{rid()}") for _ in range(5)]
    for client in clients:
        client.drop(how)
    served.expect_right("/ok", 20)
    served.settle()
    served.expect_right("/ok", 20)


def test_disconnect_after_the_handler(served: Served, how):
    """While the response is under way: 8 MB that nobody reads."""
    clients = [served.start(f"/big/{rid()}") for _ in range(6)]
    for client in clients:
        client.read_head()
    served.expect_right("/ok", 20)
    for client in clients:
        client.drop(how)
    served.settle()
    served.expect_right("/ok", 20)


def test_disconnect_of_an_async_handler(served: Served, how):
    one = rid()
    client = served.start(f"/slow-async/{one}")
    served.reached(one)
    client.drop(how)
    served.open(one)
    served.settle()
    served.expect_right("/ok", 20)


def test_disconnect_in_an_atomic_request(served: Served, how):
    """What is cut off is not left half done: the transaction is committed or rolled back as a whole."""
    ids = [rid() for _ in range(5)]
    for one in ids:
        served.start(f"/atomic/nested/{one}").drop(how)
    served.settle()
    assert set(served.counts(ids)) <= {0, 2}
