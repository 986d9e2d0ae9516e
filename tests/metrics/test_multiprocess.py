"""The multi-process mode: a scrape reaches one of two workers, and tells of both."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.multiprocess import MultiProcessCollector

from tests.support.concurrency import eventually

from .conftest import Served, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHOP = {"pool_name": "shop"}
USED = {"name": "db_client_connection_count", "state": "used"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gunicorn": ("flask", {}),
    "gunicorn-preloaded": ("flask", {"preload": True}),
    "sanic": ("sanic", {}),
}


@pytest.fixture(params=list(CASES))
def workers(request: pytest.FixtureRequest, tmp_path: Path, directory: Path) -> Iterator[Served]:
    """Two workers that share a directory."""
    framework, options = CASES[request.param]
    with serving(framework, tmp_path, workers=2, env={"PROMETHEUS_MULTIPROC_DIR": str(directory)}, **options) as served:
        yield served


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "shared"
    directory.mkdir()
    return directory


def both(served: Served, what: str) -> list[int]:
    """Let both workers do something, which may be done twice; return their processes."""
    done: set[int] = set()
    eventually(lambda: done.add(served.provoke(what)) or len(done) == 2, message=f"two workers: {what}")
    return sorted(done)


def used(served: Served) -> float:
    return served.scrape().value("db_client_connection_count", state="used", **SHOP)


def test_a_scrape_tells_of_all_workers(workers: Served):
    """Whoever answers: the connections are those of both, and the counts stay when one of them is killed."""
    pids = both(workers, "fill")
    workers.eventually(value=4, **USED)
    for _ in range(6):
        scrape = workers.scrape()
        assert scrape.value("db_client_connection_count", state="used", **SHOP) == 4
        assert scrape.value("db_client_connection_max", **SHOP) == 4
    for _ in range(10):
        assert workers.provoke("do not wait") in pids
    workers.eventually("peewee_pool_refused_total", 10)
    uses = workers.scrape().value("db_client_connection_use_time_seconds_count", **SHOP)
    both(workers, "release")
    scrape = workers.eventually("db_client_connection_use_time_seconds_count", uses + 4)
    assert scrape.value("db_client_connection_use_time_seconds_bucket", le="+Inf", **SHOP) == uses + 4
    workers.eventually(value=0, **USED)

    # One is killed while it holds connections: they are gone, what it counted is not.
    both(workers, "fill")
    workers.eventually(value=4, **USED)
    os.kill(pids[0], signal.SIGKILL)
    workers.eventually(value=2, **USED)
    assert workers.scrape().value("peewee_pool_refused_total", **SHOP) == 10
    if workers.framework == "flask":  # gunicorn replaces it; in its first moments it would not hear that it is to end
        both(workers, "release")
    eventually(lambda: workers.provoke("release") and used(workers) == 0)


def test_what_is_left_after_the_end(directory: Path, tmp_path: Path):
    """A worker that ends says that it has no connections any more; its counts stay, and the next ones go on from there."""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(directory)}
    with serving("sanic", tmp_path, workers=2, env=env) as served:
        both(served, "fill")
        served.provoke("do not wait")
        served.eventually("peewee_pool_refused_total", 1)
        both(served, "release")
        served.process.stop()
        families = MultiProcessCollector(None, str(directory)).collect()
        left = {
            (sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples
        }
        assert left["db_client_connection_count", "shop", "idle"] == 0
        assert left["peewee_pool_refused_total", "shop"] == 1
        served.process.start()
        both(served, "fill")
        served.provoke("do not wait")
        served.eventually("peewee_pool_refused_total", 2)
        both(served, "release")


def test_a_file_that_is_being_made_is_no_error(directory: Path, tmp_path: Path):
    """The library makes it empty, and fails where it reads such a one; a killed process may leave it so."""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(directory)}
    with serving("flask", tmp_path, env=env) as served:
        for kind in ("counter", "histogram", "gauge_livesum"):
            (directory / f"{kind}_{2**22 + 1}.db").touch()  # of no process: numbers end below
        served.provoke("fill")
        served.eventually(value=2, **USED)


def test_without_the_directory_a_scrape_says_what_is_missing(tmp_path: Path):
    """The application starts and serves all the same."""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "none")}
    with serving("flask", tmp_path, env=env) as served:
        assert "1" in served.get("/query")
        with served.process.client() as client:
            assert client.get("/metrics").status == 500
        assert "is not a directory" in served.process.output
