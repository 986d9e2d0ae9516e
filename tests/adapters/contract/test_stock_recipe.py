"""What the hand-written recipe does where the adapters do right: kept, so that the difference stays measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.adapters.contract.conftest import serving
from tests.adapters.contract.served import APPS, rid
from tests.support import webservers
from tests.support.load import hammer, statuses

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("count", [300, 80])
def test_the_stock_recipe_fails_most_of_the_requests(make_place: Callable[..., Any], count: int):
    """A connection is waited for in one thread and needed in another: who has one does not get a thread."""
    place = make_place("postgres")
    url = place.pool_url(max_connections=5, timeout=2)
    with webservers.uvicorn(f"{APPS}.stock_fastapi:app", env={"DATABASE_URL": url}) as server:
        results = hammer(server.url, [f"/ok/{rid()}" for _ in range(count)], concurrency=count)
        counts = statuses(results)
        assert counts.get(500, 0) >= count // 4, counts


@pytest.mark.parametrize("count", [300, 80])
def test_ours_serves_them_all(count: int):
    """With the same dependency, and one that queries before and after the endpoint: admitted before a thread is used."""
    with serving("fastapi-uvloop", "postgres", env={"CONTRACT_CONNECT": "eager"}) as served:
        served.expect_right("/ok", count, concurrency=count)
        served.expect_right("/known", count, concurrency=count)
        served.settle()
