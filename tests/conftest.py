"""Fixtures for all tests; what they give is documented in tests/support/."""

from __future__ import annotations

import ast
import functools
import sys
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.databases import scratch
from tests.support.leftovers import open_sockets, wait_for_sockets, wait_for_threads
from tests.support.loops import responsive_loop as _responsive_loop
from tests.support.ports import reserved_port
from tests.support.proxy import Proxy
from tests.support.servers import KINDS, require_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from tests.support.databases import Place
    from tests.support.servers import Kind


def pytest_configure(config: pytest.Config) -> None:
    if sys.version_info < (3, 13):
        _serialise_parsing()
    config.addinivalue_line("markers", "leaves_threads(reason): the test may leave non-daemon threads behind; say why")


def _serialise_parsing() -> None:
    """Let one thread at a time parse: two at once can fail with SystemError (recursion depth mismatch), and pytest with it.

    pytest parses to show a failure; so does the formatting of a traceback, in whatever thread of ours logs one.
    """
    parse, lock = ast.parse, threading.RLock()

    @functools.wraps(parse)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return parse(*args, **kwargs)

    ast.parse = alone


@pytest.fixture
def anyio_backend() -> Any:
    """asyncio's own loop only; `@both_loops` (tests.support.loops) adds uvloop."""
    return ("asyncio", {"use_uvloop": False})


@pytest.fixture(params=KINDS)
def database_kind(request: pytest.FixtureRequest) -> Kind:
    """Each kind in turn: sqlite, mysql, postgres; skips (or fails, if required) where there is no server."""
    kind: Kind = request.param
    require_server(kind)
    return kind


@pytest.fixture
def place(database_kind: Kind, tmp_path: Path) -> Iterator[Place]:
    """An empty place for tables on each kind of database: see tests.support.databases."""
    with scratch(database_kind, tmp_path) as place:
        yield place


@pytest.fixture
def make_place(tmp_path: Path) -> Iterator[Callable[[Kind], Place]]:
    """A function that makes a place of a given kind; for several, or one kind only."""
    with ExitStack() as stack:

        def make(kind: Kind) -> Place:
            require_server(kind)
            return stack.enter_context(scratch(kind, tmp_path))

        yield make


@pytest.fixture
def database(place: Place) -> Iterator[Any]:
    """A stock playhouse.pool database of 5 connections on `place`; closed at the end."""
    database = place.make_database()
    yield database
    database.close_all()


@pytest.fixture
def proxy(place: Place) -> Iterator[Proxy]:
    """A proxy in front of the server of `place`; `place.via(*proxy.address)` goes through it. Not for SQLite."""
    if place.kind == "sqlite":
        pytest.skip("SQLite has no server")
    with Proxy(place.address) as proxy:
        yield proxy


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port of 127.0.0.1 that stays ours for the test; listeners need SO_REUSEADDR (servers and asyncio set it)."""
    with reserved_port() as port:
        yield port


@pytest.fixture
async def responsive_loop(anyio_backend: Any) -> AsyncIterator[None]:
    """Fail the (anyio) test if a callback keeps its loop busy for more than 50 ms."""
    with _responsive_loop():
        yield


@pytest.fixture(autouse=True)
def no_threads_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves threads behind which would hold the process: non-daemon ones that it started."""
    before = set(threading.enumerate())
    yield
    if request.node.get_closest_marker("leaves_threads") is None:
        left = wait_for_threads(before)
        assert not left, f"the test left threads behind: {left}"


@pytest.fixture
def no_sockets_left() -> Iterator[None]:
    """Fail a test that leaves sockets open in this process; ask for it before the fixtures that open some."""
    before = open_sockets()
    yield
    left = wait_for_sockets(before)
    assert not left, f"the test left sockets open: {left}"
