"""More requests than threads, more threads than connections."""

from __future__ import annotations

import pytest

from tests.adapters.contract.served import Served, rid
from tests.support.load import statuses


@pytest.mark.core
def test_300_concurrent_requests_share_5_connections(served: Served):
    """FastAPI's endpoint is sync and has a sync yield dependency that queries before and after it."""
    served.expect_right("/ok", 300, concurrency=300)


def test_80_concurrent_requests_meet_40_threads(served: Served):
    """Each holds its connection for two queries and what lies between; playhouse's pool waits 10 s."""
    served.expect_right("/ok", 80, concurrency=80)
    served.expect_right("/write", 80, concurrency=80)


def test_async_handlers_wait_for_a_connection_without_blocking_the_loop(served: Served):
    """All connections are busy inside a statement; requests without a query are answered meanwhile."""
    slow = [served.start(f"/sleep/{rid()}") for _ in range(10)]
    try:
        results = served.hammer([f"/plain/{rid()}" for _ in range(20)], 5)
        assert statuses(results) == {200: 20}
        assert {client.read_response().status for client in slow} == {200}
    finally:
        for client in slow:
            client.drop("fin")


def test_transactions_of_many_requests_do_not_mix(served: Served):
    """A third commits, a third fails, a third answers with a status that rolls back."""
    kinds = {"commit": (200, 1), "unhandled": (500, 0), "status": (409, 0)}
    wanted = {rid(): kind for _ in range(10) for kind in kinds}
    results = served.hammer([f"/atomic/{kind}/{one}" for one, kind in wanted.items()], 30)
    assert [result.status for result in results] == [kinds[kind][0] for kind in wanted.values()]
    assert served.counts(list(wanted)) == [kinds[kind][1] for kind in wanted.values()]
