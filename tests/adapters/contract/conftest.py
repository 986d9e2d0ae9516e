"""Which case runs where, and what holds after each."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.adapters.contract.applicability import ASYNC_PLACES, NOT_APPLICABLE, NOT_ASYNCHRONOUS, PLACES
from tests.adapters.contract.served import Served, serve
from tests.support.databases import ASYNC_DRIVERS, scratch
from tests.support.servers import KINDS, require_server

if TYPE_CHECKING:
    from collections.abc import Iterator


# Every case with every server on every database: see applicability.py.
FULL = os.environ.get("PEEWEE_FRAMEWORKS_CONTRACT") == "full"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "core: a case that runs on every database with every framework")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "served" not in metafunc.fixturenames:
        return
    name = metafunc.function.__name__
    excepted = NOT_APPLICABLE.get(name, {})
    core = metafunc.definition.get_closest_marker("core") is not None
    combinations = [
        (server, kind)
        for table, every in ((PLACES, KINDS), (ASYNC_PLACES, tuple(ASYNC_DRIVERS)))
        if table is PLACES or name not in NOT_ASYNCHRONOUS
        for server, kinds in table.items()
        for kind in (every if FULL else kinds if core else kinds[:1])
        if server not in excepted and server.partition("-")[0] not in excepted
    ]
    ids = [f"{server}-{kind}" for server, kind in combinations]
    metafunc.parametrize("served", combinations, ids=ids, indirect=True, scope="session")


@pytest.fixture(scope="session")
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """An application on a server; started once for all cases."""
    with serving(*request.param) as served:
        yield served


@contextmanager
def serving(name: str, backend: str, **options: Any) -> Iterator[Served]:
    """Serve one application on a place of its own; at the end no session is left that nobody knows of.

    Args:
        name: the server.
        backend: a kind of database, or an asynchronous driver.
        options: for `serve`.
    """
    driver = backend if backend in ASYNC_DRIVERS else None
    kind: Any = backend if driver is None else ASYNC_DRIVERS[driver][1]
    require_server(kind)
    # Not tmp_path: a Unix socket's path has at most 107 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="contract-") as directory,
        scratch(kind, Path(directory)) as place,
        serve(name, place, Path(directory), driver=driver, **options) as served,
    ):
        yield served
        if served.process.running:
            served.no_strays()


@pytest.fixture(autouse=True)
def settled(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every case: 0 in use, no violation."""
    served: Served | None = request.getfixturevalue("served") if "served" in request.fixturenames else None
    yield
    if served is not None:
        served.settle()
