"""Fixtures for the tests of the doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from peewee_frameworks import pool
from tests.doctor.helpers import SOUND, TIMEOUTS, Project
from tests.support.databases import scratch
from tests.support.servers import require_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.databases import Place

CLASSES = {
    "sqlite": pool.PooledSqliteDatabase,
    "mysql": pool.PooledMySQLDatabase,
    "postgres": pool.PooledPostgresqlDatabase,
}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """An empty directory for a user's modules."""
    directory = tmp_path / "project"
    directory.mkdir()
    return Project(directory)


def make_sound(place: Place, **options: Any) -> Any:
    """A database of our pool on `place` in which nothing is wrong, but for what `options` say."""
    kwargs: dict[str, Any] = {**place.connect_kwargs(), **SOUND, **TIMEOUTS[place.kind]}
    if place.kind == "sqlite":
        kwargs["pragmas"] = {"journal_mode": "wal"}
    elif place.kind == "postgres":
        kwargs["prefer_psycopg3"] = True
    given = {key: value for key, value in {**kwargs, **options}.items() if value is not ...}
    cls = given.pop("cls", CLASSES[place.kind])
    database = cls(place.database, **given)
    if place.kind == "sqlite":
        with database.connection_context():  # the file exists
            database.execute_sql("PRAGMA user_version = 1")
    return database


@pytest.fixture
def sound() -> Iterator[Callable[..., Any]]:
    """Make databases as `make_sound` does; they are closed at the end."""
    made: list[Any] = []

    def make(place: Place, **options: Any) -> Any:
        database = make_sound(place, **options)
        made.append(database)
        return database

    yield make
    for database in made:
        if hasattr(database, "close_all"):
            database.close_all()
        if hasattr(database, "pool"):
            database.pool.close()


@pytest.fixture
def mysql(tmp_path: Path) -> Iterator[Place]:
    """A place on MariaDB."""
    require_server("mysql")
    with scratch("mysql", tmp_path) as place:
        yield place


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Place]:
    """A place on PostgreSQL."""
    require_server("postgres")
    with scratch("postgres", tmp_path) as place:
        yield place


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Place]:
    """A place for an SQLite file."""
    with scratch("sqlite", tmp_path) as place:
        yield place
