"""Atomic requests: the COMMIT comes before the first byte."""

from __future__ import annotations

import pytest

from tests.adapters.contract.served import Served, rid

# kind: (status, rows that stay)
OUTCOMES = {
    "commit": (200, 1),
    "unhandled": (500, 0),
    "handled": (418, 0),
    "status": (409, 0),
    "chosen": (299, 0),
    "nested": (200, 2),
}


@pytest.mark.core
@pytest.mark.parametrize("kind", OUTCOMES)
def test_an_atomic_request(served: Served, kind):
    status, rows = OUTCOMES[kind]
    one = rid()
    assert served.get(f"/atomic/{kind}/{one}").status == status
    assert served.count(one) == rows


@pytest.mark.core
def test_a_commit_that_fails_is_an_error(served: Served):
    """A deferred constraint (SQLite, PostgreSQL), a session that is gone (MariaDB)."""
    one = rid()
    response = served.get(f"/atomic/spoil/{one}")
    assert response.status in {409, 500, 503}
    assert one not in response.text or response.text == f"unhandled {one}"
    assert served.count(one) == 0
    served.expect_right("/ok", 20)


def test_one_transaction_from_several_threads(served: Served):
    """A thread of the framework, one of orm.run, and the loop itself."""
    one = rid()
    assert served.get(f"/atomic/threads/{one}").status == 200
    assert served.count(one) == 3


@pytest.mark.core
@pytest.mark.parametrize("style", ["sync", "async"])
@pytest.mark.parametrize("kind", OUTCOMES)
def test_the_transaction_dependency(served: Served, style, kind):
    """The dependency is on the loop, the endpoint in a thread. It commits whatever status the endpoint returned."""
    status, rows = OUTCOMES[kind]
    one = rid()
    assert served.get(f"/transaction/{style}/{kind}/{one}").status == status
    assert served.count(one) == {"status": 1, "chosen": 1}.get(kind, rows)


@pytest.mark.core
@pytest.mark.parametrize("style", ["sync", "async", "own"])
def test_a_dependency_whose_commit_fails_is_an_error(served: Served, style):
    one = rid()
    response = served.get(f"/transaction/{style}/spoil/{one}")
    assert response.status in {409, 500, 503}
    assert served.count(one) == 0
    served.expect_right("/ok", 20)


@pytest.mark.parametrize("kind", ["commit", "nested", "handled", "unhandled"])
def test_a_sync_dependency_that_yields_inside_atomic(served: Served, kind):
    """Set up in one thread, the endpoint in another, torn down in a third."""
    status, rows = OUTCOMES[kind]
    one = rid()
    assert served.get(f"/transaction/own/{kind}/{one}").status == status
    assert served.count(one) == (rows + 1 if rows else 0)
