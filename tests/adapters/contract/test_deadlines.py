"""A deadline passes while a thread is inside a query."""

from __future__ import annotations

import pytest

from tests.adapters.contract.conftest import serving
from tests.adapters.contract.served import Served, rid

# anyio waits for the thread, which then has committed; the others leave it behind, and its transaction is rolled back.
ROWS = {"asyncio": 0, "wait_for": 0, "run": 0, "anyio": 1}


def after_deadline(served: Served, route: str, kind: str, transaction: str) -> None:
    ids = [rid() for _ in range(4)]
    results = served.hammer([f"{route}/{kind}{transaction}/{one}" for one in ids], 4)
    # anyio asks whether the deadline has passed at the next await; a handler that has none after its thread succeeds.
    expected = {200, 504} if (kind, route) == ("anyio", "/handler-deadline") else {504}
    assert {result.status for result in results} <= expected
    assert [result.text for result in results] == ids
    # Meanwhile the threads run on, inside their statements.
    served.expect_right("/ok", 40)
    served.settle()
    if transaction:
        # The loop of a Flask view does not end before its threads; with an asynchronous driver there are none.
        rows = 1 if served.is_flask else 0 if served.is_async else ROWS[kind]
        # Nothing where the deadline passed before there was a thread for it; never a part of it.
        assert set(served.counts(ids)) <= {0, rows}
    served.expect_right("/ok", 20)


@pytest.mark.parametrize("transaction", ["", "-tx"])
@pytest.mark.parametrize("kind", ["asyncio", "wait_for", "anyio"])
def test_a_deadline_around_a_sync_endpoint(served: Served, kind, transaction):
    """Set by middleware."""
    after_deadline(served, "/deadline", kind, transaction)


@pytest.mark.parametrize("transaction", ["", "-tx"])
@pytest.mark.parametrize("kind", ["asyncio", "wait_for", "anyio"])
def test_a_deadline_around_a_thread(served: Served, kind, transaction):
    """Set in the handler, around asyncio.to_thread or anyio.to_thread."""
    after_deadline(served, "/handler-deadline", kind, transaction)


@pytest.mark.parametrize("transaction", ["", "-tx"])
def test_a_deadline_around_orm_run(served: Served, transaction):
    after_deadline(served, "/handler-deadline", "run", transaction)


def test_the_servers_own_deadline():
    """Sanic cancels the handler and answers 503 while the thread is inside its query."""
    with serving("sanic-single", "postgres", env={"SANIC_RESPONSE_TIMEOUT": "0.2"}) as served:
        for route in ("/sleep-tx", "/sleep"):
            one = rid()
            assert served.get(f"{route}/{one}").status == 503
            served.expect_right("/ok", 20)
            served.settle()
            assert served.count(one) == 0


def test_gunicorns_deadline_ends_the_worker_and_its_session():
    """It kills a sync worker that does not answer in time. (The threads of gthread have no deadline, nor has uvicorn.)"""
    with serving("flask-sync", "postgres") as served, served.start(f"/sleep/{rid()}") as quick:
        assert quick.read_response().status == 200
        one = rid()
        with served.start(f"/slow/{one}") as client:
            served.reached(one)
            assert client.read_response().status == 500
        served.expect_right("/ok", 10, concurrency=2)
        served.settle()
