"""Four asynchronous backends, each on an empty place, and a way to run a coroutine with a deadline in a loop of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from playhouse import pwasyncio

from peewee_frameworks.aio import AsyncPsycopgDatabase
from peewee_frameworks.state import install
from tests.support.databases import Place, scratch
from tests.support.servers import require_server

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path

DRIVERS = {"aiosqlite": "sqlite", "aiomysql": "mysql", "asyncpg": "postgres", "psycopg": "postgres"}
STOCK = ("aiosqlite", "aiomysql", "asyncpg")
SLOW = {
    "sqlite": "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 30000000) SELECT COUNT(*) FROM n",
    "mysql": "SELECT SLEEP(10)",
    "postgres": "SELECT pg_sleep(10)",
}


@dataclass
class Backend:
    """One driver on one place."""

    driver: str
    place: Place

    @property
    def slow(self) -> str:
        """A statement of several seconds."""
        return SLOW[self.place.kind]

    def stock(self, size: int = 5, timeout: float = 5, **options: Any) -> Any:
        """Make Peewee's own database, untouched."""
        place = self.place
        options = {"pool_size": size, "acquire_timeout": timeout, **options}
        if self.driver == "aiosqlite":
            return pwasyncio.AsyncSqliteDatabase(place.database, pragmas={"journal_mode": "wal"}, **options)
        if self.driver == "aiomysql":
            return pwasyncio.AsyncMySQLDatabase(place.database, **place.connect_kwargs(), **options)
        settings = place.connect_kwargs()
        if self.driver == "asyncpg":
            search_path = settings.pop("options").rpartition("=")[2]
            names = {"application_name": settings.pop("application_name"), "search_path": search_path}
            return pwasyncio.AsyncPostgresqlDatabase(place.database, server_settings=names, **settings, **options)
        return AsyncPsycopgDatabase(place.database, min_size=1, **settings, **options)

    def make(self, size: int = 5, timeout: float = 5, **options: Any) -> Any:
        """Make a database with our state in it."""
        database = self.stock(size, timeout, **options)
        install(database)
        return database


@pytest.fixture(params=DRIVERS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    """Each driver in turn."""
    kind: Any = DRIVERS[request.param]
    require_server(kind)
    with scratch(kind, tmp_path) as place:
        yield Backend(request.param, place)


@pytest.fixture
def backends(tmp_path: Path) -> Iterator[Callable[[str], Backend]]:
    """A function that makes the backend of a given driver."""
    with ExitStack() as stack:

        def make(driver: str) -> Backend:
            kind: Any = DRIVERS[driver]
            require_server(kind)
            return Backend(driver, stack.enter_context(scratch(kind, tmp_path)))

        yield make


def run(work: Coroutine[Any, Any, Any], seconds: float = 20) -> Any:
    """Run a coroutine in a fresh loop, to its end within the deadline."""

    async def bounded() -> Any:
        async with asyncio.timeout(seconds):
            return await work

    return asyncio.run(bounded())


async def until(predicate: Callable[[], Any], seconds: float = 5) -> None:
    """Wait, turn by turn of the loop, until something is the case that cannot tell by itself."""
    async with asyncio.timeout(seconds):
        while not predicate():
            await asyncio.sleep(0.005)
