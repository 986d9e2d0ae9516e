"""Each metric, provoked on a real pool and read from a real scrape, in each framework."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peewee_frameworks.metrics.families import METRICS
from peewee_frameworks.metrics.prometheus import prometheus_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Served

CONNECTION = "db_client_connection"
SHOP = {"pool_name": "shop"}
DASHBOARD = Path(__file__).parents[2] / "docs/grafana/peewee.json"
OURS = re.compile(r"\b(?:db_client_connection|peewee_pool|peewee_run)_\w+")


@pytest.fixture(autouse=True)
def at_rest(served: Served) -> Iterator[None]:
    """Between two tests nothing is in use and one connection, the minimum, is open at least."""
    served.provoke("release")
    served.eventually(f"{CONNECTION}_count", 0, state="used")
    yield
    served.provoke("release")
    served.provoke("as usual")


def test_connections_by_state(served: Served):
    """What is taken is used, what is given back is idle."""
    served.provoke("hold")
    assert served.scrape().value(f"{CONNECTION}_count", state="used", **SHOP) == 1
    served.provoke("release")
    scrape = served.scrape()
    assert scrape.value(f"{CONNECTION}_count", state="used", **SHOP) == 0
    assert scrape.value(f"{CONNECTION}_count", state="idle", **SHOP) >= 1


def test_a_connect_that_hangs_is_connecting(served: Served):
    served.proxy.hang()
    try:
        served.provoke("close idle")
        served.provoke("queue")
        served.at_least(f"{CONNECTION}_count", 1, state="connecting")
    finally:
        served.proxy.restore()
        served.proxy.cut()
    served.eventually(f"{CONNECTION}_pending_requests", 0)


def test_a_ping_that_hangs_is_checking(served: Served):
    served.provoke("fill")
    served.provoke("release")
    served.proxy.deafen()
    try:
        served.provoke("ping later")
        served.at_least(f"{CONNECTION}_count", 1, state="checking")
    finally:
        served.proxy.restore()
    served.eventually(f"{CONNECTION}_count", 0, state="checking")


def test_the_bounds(served: Served):
    """The bounds are those of now, not of the start."""
    before = served.scrape()
    served.provoke("grow")
    after = served.scrape()
    served.provoke("shrink")
    for name, old, new in (("max", 2, 3), ("idle_min", 1, 2), ("idle_max", 2, 3)):
        assert (before.value(f"{CONNECTION}_{name}", **SHOP), after.value(f"{CONNECTION}_{name}", **SHOP)) == (old, new)


def test_who_waits_is_pending_and_then_in_the_waits(served: Served):
    served.provoke("fill")
    before = served.scrape()
    served.provoke("queue")
    served.eventually(f"{CONNECTION}_pending_requests", 1)
    served.provoke("release")
    waits = before.value(f"{CONNECTION}_wait_time_seconds_count", **SHOP)
    after = served.eventually(f"{CONNECTION}_wait_time_seconds_count", waits + 1)
    assert after.value(f"{CONNECTION}_pending_requests", **SHOP) == 0
    assert after.value(f"{CONNECTION}_wait_time_seconds_sum", **SHOP) > before.value(
        f"{CONNECTION}_wait_time_seconds_sum", **SHOP
    )


def test_who_waits_for_a_turn_in_run_is_queued(served: Served):
    """There are as many places as connections; Flask runs such calls on the request's own thread, so there is no queue."""
    if served.framework == "flask":
        assert served.scrape().get("peewee_run_queued", **SHOP) is None
        return
    served.provoke("block again")
    with ThreadPoolExecutor(3) as threads:
        requests = [threads.submit(served.get, "/block") for _ in range(3)]
        try:
            served.eventually("peewee_run_queued", 1)
        finally:
            served.provoke("unblock")
        assert all("done" in request.result(20) for request in requests)
    served.eventually("peewee_run_queued", 0)


def test_a_request_that_queries_uses_a_connection_once(served: Served):
    before = served.scrape()
    for _ in range(3):
        assert "1" in served.get("/query")
    uses = before.value(f"{CONNECTION}_use_time_seconds_count", **SHOP)
    after = served.eventually(f"{CONNECTION}_use_time_seconds_count", uses + 3)
    buckets = [
        (float(dict(labels)["le"]), value)
        for (name, labels), value in after.samples.items()
        if name == f"{CONNECTION}_use_time_seconds_bucket"
    ]
    counts = [value for _, value in sorted(buckets)]
    assert counts == sorted(counts)
    assert counts[-1] == uses + 3


def test_who_waits_in_vain_is_a_timeout(served: Served):
    served.provoke("fill")
    before = served.scrape().value(f"{CONNECTION}_timeouts_total", **SHOP)
    served.provoke("wait in vain")
    assert served.scrape().value(f"{CONNECTION}_timeouts_total", **SHOP) == before + 1


def test_who_does_not_wait_is_refused(served: Served):
    served.provoke("fill")
    before = served.scrape().value("peewee_pool_refused_total", **SHOP)
    served.provoke("do not wait")
    assert served.scrape().value("peewee_pool_refused_total", **SHOP) == before + 1


def test_each_connect_is_counted_and_timed(served: Served):
    before = served.scrape()
    served.provoke("close idle")
    served.provoke("fill")
    after = served.scrape()
    new = after.value("peewee_pool_connects_total", **SHOP) - before.value("peewee_pool_connects_total", **SHOP)
    name = f"{CONNECTION}_create_time_seconds_count"
    assert new >= 2
    assert after.value(name, **SHOP) - before.value(name, **SHOP) == new
    sums = [moment.value(f"{CONNECTION}_create_time_seconds_sum", **SHOP) for moment in (before, after)]
    assert sums[1] > sums[0]


def test_a_server_that_refuses_is_a_connect_error(served: Served):
    before = served.scrape().value("peewee_pool_connect_errors_total", **SHOP)
    served.proxy.refuse()
    try:
        served.provoke("close idle")
        served.provoke("ask for one")
        assert served.scrape().value("peewee_pool_connect_errors_total", **SHOP) > before
    finally:
        served.proxy.restore()


def test_closes_have_their_reason(served: Served):
    served.provoke("fill")
    served.provoke("release")
    before = served.scrape().get("peewee_pool_closes_total", reason="close_idle()", **SHOP) or 0
    served.provoke("close idle")
    served.eventually("peewee_pool_closes_total", before + 2, reason="close_idle()")


def test_invalidations(served: Served):
    before = served.scrape().value("peewee_pool_invalidations_total", **SHOP)
    served.provoke("invalidate")
    assert served.scrape().value("peewee_pool_invalidations_total", **SHOP) == before + 1


def test_pings(served: Served):
    served.provoke("hold")
    served.provoke("release")
    before = served.scrape().value("peewee_pool_pings_total", **SHOP)
    served.provoke("ping")
    assert served.scrape().value("peewee_pool_pings_total", **SHOP) > before


def test_rollbacks(served: Served):
    before = served.scrape().value("peewee_pool_rollbacks_total", **SHOP)
    served.provoke("leave open")
    served.eventually("peewee_pool_rollbacks_total", before + 1)


def test_leaks(served: Served):
    before = served.scrape().value("peewee_pool_leaks_total", **SHOP)
    served.provoke("leak")
    served.eventually("peewee_pool_leaks_total", before + 1)


def test_connections_without_owner_are_reaped(served: Served):
    before = served.scrape().value("peewee_pool_reaped_total", **SHOP)
    served.provoke("lose")
    served.eventually("peewee_pool_reaped_total", before + 1)


def test_a_pool_that_hands_nothing_out_is_suspended(served: Served):
    served.provoke("suspend")
    during = served.scrape().value("peewee_pool_suspended", **SHOP)
    served.provoke("resume")
    assert (during, served.scrape().value("peewee_pool_suspended", **SHOP)) == (1, 0)


def test_all_metrics_are_there_each_of_its_kind(served: Served):
    """A scrape names every metric, so that a dashboard finds it; the kinds are those that are documented."""
    assert served.scrape().kinds == {prometheus_name(metric): metric.kind for metric in METRICS}


def dashboard() -> tuple[dict[str, Any], list[str]]:
    """The dashboard, and its queries."""
    document = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in document["panels"] for target in panel.get("targets", [])]
    return document, queries + [variable["definition"] for variable in document["templating"]["list"][1:]]


def test_what_the_dashboard_asks_for_is_in_a_scrape(served: Served):
    """Each name in a query of the dashboard is that of a sample, and has the labels that the query goes by."""
    served.provoke("close idle")
    served.at_least("peewee_pool_closes_total", 1, reason="close_idle()")
    if served.framework != "flask":
        served.provoke("unblock")
        served.get("/block")
    labels: dict[str, set[str]] = {}
    for name, pairs in served.scrape().samples:
        labels.setdefault(name, set()).update(label for label, _ in pairs)
    _, queries = dashboard()
    for query in queries:
        names = set(OURS.findall(query))
        assert names, query
        if served.framework == "flask":
            names.discard("peewee_run_queued")
        assert names <= set(labels), query
        for name, selector in re.findall(r"(\w+){([^}]*)}", query):
            selected = set(re.findall(r"(\w+)=", selector)) - {"job", "instance"}  # which Prometheus adds
            assert name not in names or selected <= labels[name], query
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
        assert not names or grouped <= set().union(*(labels[name] for name in names)), query


def test_the_dashboard_shows_every_metric():
    """But those that say the same as another: the bounds of what may be idle."""
    _, queries = dashboard()
    asked = {re.sub("_(total|bucket|count)$", "", name) for query in queries for name in OURS.findall(query)}
    left = {prometheus_name(metric) for metric in METRICS} - asked
    assert left <= {f"{CONNECTION}_count", f"{CONNECTION}_idle_min", f"{CONNECTION}_idle_max"}


def test_the_dashboard_is_one_that_grafana_can_load():
    """Panels have numbers of their own and do not overlap; queries are whole; nothing names a data source of somebody's."""
    document, queries = dashboard()
    panels = document["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (column, line)
        for panel in panels
        for column in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for line in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(column for column, _ in cells) < 24
    assert all(query.count("(") == query.count(")") and query.count("{") == query.count("}") for query in queries)
    assert set(re.findall(r'"uid": "([^"]*)"', DASHBOARD.read_text(encoding="utf-8"))) == {
        "${datasource}",
        "peewee-pools",
    }
