"""Four asynchronous backends, each on an empty place, and a way to run a coroutine with a deadline in a loop of its own."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from playhouse import pwasyncio

from peewee_frameworks.aio import AsyncPsycopgDatabase
from peewee_frameworks.state import install
from tests.support.blocking import unblocked
from tests.support.databases import Place, scratch
from tests.support.servers import admin_connection, require_server

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
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

    @property
    def brief(self) -> str:
        """A statement of a fraction of a second."""
        return self.slow.replace("30000000", "1000000").replace("(10)", "(0.3)")

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
def backend(request: pytest.FixtureRequest, tmp_path: Path, mysql_places: list[Place]) -> Iterator[Backend]:
    """Each driver in turn."""
    kind: Any = DRIVERS[request.param]
    require_server(kind)
    with _place(kind, tmp_path, mysql_places) as place:
        yield Backend(request.param, place)


@contextmanager
def _place(kind: Any, directory: Path, mysql_places: list[Place]) -> Iterator[Place]:
    """Give a place of its own; on MariaDB, where a database is slow to drop, one that another test has left empty."""
    if kind != "mysql":
        with scratch(kind, directory) as place:
            yield place
        return
    place = mysql_places.pop()
    yield place
    place.kill_sessions()
    with closing(admin_connection("mysql")) as connection, closing(connection.cursor()) as cursor:
        cursor.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = %s", [place.database])
        for (table,) in cursor.fetchall():
            cursor.execute(f"DROP TABLE `{place.database}`.`{table}`")
    mysql_places.append(place)


@pytest.fixture(scope="session")
def mysql_places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Place]]:
    """The databases on MariaDB that no test uses at the moment."""
    with ExitStack() as stack:
        yield _Places(lambda: stack.enter_context(scratch("mysql", tmp_path_factory.mktemp("mysql"))))


class _Places(list[Place]):
    def __init__(self, make: Callable[[], Place]) -> None:
        super().__init__()
        self.make = make

    def pop(self) -> Place:  # type: ignore[override]
        return super().pop() if self else self.make()


@pytest.fixture
def backends(tmp_path: Path, mysql_places: list[Place]) -> Iterator[Callable[[str], Backend]]:
    """A function that makes the backend of a given driver."""
    with ExitStack() as stack:

        def make(driver: str) -> Backend:
            kind: Any = DRIVERS[driver]
            require_server(kind)
            return Backend(driver, stack.enter_context(_place(kind, tmp_path, mysql_places)))

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


@pytest.fixture(autouse=True)
def no_records_of_psycopgs_pool() -> Iterator[None]:
    """A warning that is kept keeps the error, that its traceback, and that the half-open connection of a cancelled worker."""
    logger = logging.getLogger("psycopg.pool")
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def never_blocked() -> Iterator[None]:
    """Nothing of ours keeps a loop from its work for 50 ms, in any of these tests."""
    with unblocked():
        yield
