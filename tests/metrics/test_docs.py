"""The documentation names every metric as it is, and its snippets run."""

from __future__ import annotations

import asyncio
import re
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import CollectorRegistry
from sanic import Sanic
from starlette.testclient import TestClient

from peewee_frameworks import metrics
from peewee_frameworks.metrics.families import METRICS
from peewee_frameworks.metrics.prometheus import label_names, prometheus_name
from peewee_frameworks.pool import PooledSqliteDatabase

from .scrape import parse

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parents[2] / "docs"
HOW_TO = (DOCS / "how-to/metrics.md").read_text(encoding="utf-8")
REFERENCE = (DOCS / "reference/metrics.md").read_text(encoding="utf-8")
SUFFIX = {"counter": "_total", "gauge": "", "histogram": ""}


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Any]:
    db = PooledSqliteDatabase(tmp_path / "shop.db", pool_name="shop")
    with closing(db.pool):
        yield db


def snippet(framework: str) -> str:
    """The endpoint as it is shown for a framework."""
    (found,) = (
        text for text in re.findall(r"```python\n(.*?)```", HOW_TO, re.DOTALL) if f"_frameworks.{framework} " in text
    )
    return found


def test_the_reference_lists_every_metric_as_it_is():
    rows = [[cell.strip() for cell in line.split(" | ")] for line in REFERENCE.splitlines() if line.startswith("| `")]
    written = {row[0].strip("| `"): row[1:5] for row in rows if len(row) == 6}
    assert written == {
        prometheus_name(metric) + SUFFIX[metric.kind]: [
            metric.kind,
            ", ".join(f"`{label}`" for label in label_names(metric)[1:]),
            f"`{metric.name}`",
            f"`{metric.unit}`",
        ]
        for metric in METRICS
    }


def test_the_alerts_go_by_metrics_that_there_are():
    named = set(re.findall(r"\b(?:db_client_connection|peewee_pool)_\w+", HOW_TO))
    assert named <= {prometheus_name(metric) + SUFFIX[metric.kind] for metric in METRICS}
    assert len(named) >= 6


def test_flask(db: Any):
    names: dict[str, Any] = {"db": db, "__name__": "shop"}
    exec(snippet("flask"), names)
    response = names["app"].test_client().get("/metrics")
    assert response.content_type.startswith("text/plain; version=")
    assert parse(response.text).value("db_client_connection_max", pool_name="shop") == 20


@pytest.mark.parametrize("framework", ["fastapi", "starlette"])
def test_fastapi_and_starlette(framework: str, db: Any):
    names: dict[str, Any] = {"db": db}
    exec(snippet(framework), names)
    with TestClient(names["app"]) as client:
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert parse(response.text).value("db_client_connection_max", pool_name="shop") == 20


@pytest.mark.filterwarnings("ignore:websockets.legacy is deprecated:DeprecationWarning")
def test_sanic(db: Any):
    names: dict[str, Any] = {"db": db}
    exec(snippet("sanic"), names)
    try:
        _, response = asyncio.run(names["app"].asgi_client.get("/metrics"))
        assert parse(response.text).value("db_client_connection_max", pool_name="shop") == 20
    finally:
        Sanic._app_registry.clear()


def test_the_other_calls(db: Any):
    """`register` and `instrument` as they are written."""
    from peewee_frameworks.extension import Extension

    calls = re.findall(r"^(metrics\.(?:register|instrument)\(.*?\))", HOW_TO, re.MULTILINE)
    assert len(calls) == 3
    names = {"metrics": metrics, "orm": Extension(db), "registry": CollectorRegistry()}
    from prometheus_client import REGISTRY

    for call in calls:
        collector = eval(call, names)
        if call == "metrics.register(orm)":
            REGISTRY.unregister(collector)
