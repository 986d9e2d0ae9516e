"""Greenlets that are killed at every switch they make."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.gevent.children import FROZEN, run_child
from tests.support.databases import scratch
from tests.support.drivers import require_modules
from tests.support.proxy import Proxy
from tests.support.servers import require_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROUND_TRIP = 0.001  # seconds; so that each statement has to wait, and can be struck there


DEADLINE = 90.0
TRANSACTION = {"begin", "INSERT", "SAVEPOINT", "RELEASE", "commit", "SELECT"}
CASES = [(driver, pool) for driver in ("pymysql", "psycopg", "psycopg2") for pool in ("ours", "stock")]


def strike_everywhere(driver: str, pool: str, directory: Path) -> dict[str, Any]:
    with scratch("mysql" if driver == "pymysql" else "postgres", directory) as place, Proxy(place.address) as proxy:
        proxy.delay(ROUND_TRIP)
        url = place.via(*proxy.address).url
        return run_child("kill_case.py", driver, pool, deadline=DEADLINE, PLACE_URL=url)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Future[dict[str, Any]]]]:
    """The outcome of each case; they mostly wait, so several at a time."""
    directory = tmp_path_factory.mktemp("kills")
    with ThreadPoolExecutor(3) as executor:
        yield {case: executor.submit(strike_everywhere, *case, directory) for case in CASES}


@pytest.mark.parametrize(("driver", "pool"), CASES)
def test_a_greenlet_may_be_killed_anywhere(
    driver: str, pool: str, outcomes: dict[tuple[str, str], Future[dict[str, Any]]]
) -> None:
    """Waiting, connecting, in a query, in a transaction, giving back: nothing lost, nothing shared, no half-read answer."""
    require_server("mysql" if driver == "pymysql" else "postgres")
    if driver == "psycopg2":
        require_modules("psycopg2", "psycogreen")
    outcome = outcomes[driver, pool].result(2 * DEADLINE)

    assert outcome != FROZEN
    assert outcome["problems"] == []
    # Each was struck there; a connection of ours is opened in the background, so whoever wants it waits.
    places = {what: set(found) for what, found in outcome["places"].items()}
    assert places["transaction"] >= TRANSACTION
    assert places["transaction cold"] >= TRANSACTION | {"waiting" if pool == "ours" else "_connect"}
    assert places["private cold"] >= {"begin", "INSERT", "commit", "SELECT"}
    assert places["go_on"] >= {"SELECT"}
    assert places["swallow"] >= {"begin", "INSERT", "SELECT"}
    assert places["waiting"] >= {"waiting"}
