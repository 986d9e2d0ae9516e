"""Many requests on one TCP connection: context variables of one reach the next in most servers."""

from __future__ import annotations

from tests.adapters.contract.served import Served, rid
from tests.support.client import Request


def test_keep_alive(served: Served):
    routes = ["/ok", "/atomic/commit", "/handled", "/write", "/nowhere", "/plain", "/atomic/status", "/ok"]
    statuses = [200, 200, 418, 200, 404, 200, 409, 200]
    ids = [rid() for _ in routes]
    with served.client() as client:
        for route, status, one in zip(routes, statuses, ids, strict=True):
            response = client.get(f"{route}/{one}")
            assert (response.status, response.text.split()[-1]) == (status, one)
            if not response.keep_alive:
                return  # Werkzeug's development server closes after each response
    assert served.counts(ids) == [0, 1, 0, 1, 0, 0, 0, 0]


def test_pipelined_requests(served: Served):
    """The second is in the server's hands while the first is served."""
    routes = ["/ok", "/atomic/commit", "/ok", "/write", "/atomic/status", "/handled", "/async", "/ok"]
    statuses = [200, 200, 200, 200, 409, 418, 200, 200]
    ids = [rid() for _ in routes]
    with served.client() as client:
        requests = [Request(f"{route}/{one}") for route, one in zip(routes, ids, strict=True)]
        responses = client.pipeline(requests)
    assert [(response.status, response.text.split()[-1]) for response in responses] == list(
        zip(statuses, ids, strict=True)
    )
    assert served.counts(ids) == [0, 1, 0, 1, 0, 0, 0, 0]


def test_a_large_post_and_then_more_on_the_same_connection(served: Served):
    with served.client() as client:
        for size in (400_000, 10, 400_000):
            one = rid()
            response = client.post(f"/length/{one}", b"x" * size)
            assert (response.status, response.text) == (200, f"{size} {one}")
            if not response.keep_alive:
                return  # Werkzeug's development server
            one = rid()
            assert client.get(f"/ok/{one}").text == one
            one = rid()
            assert client.get(f"/atomic/status/{one}").status == 409
            assert served.count(one) == 0
