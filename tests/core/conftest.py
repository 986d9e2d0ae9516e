"""Databases with our state in them, and a table; every test ends with no connection in use."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import peewee
import pytest
from playhouse.pool import PooledSqliteDatabase

from peewee_frameworks.frame import current_frames, current_lineage
from peewee_frameworks.state import install
from tests.support.concurrency import eventually
from tests.support.databases import scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.databases import Place
    from tests.support.servers import Kind


def make_note(database: Any) -> Any:
    """A model with one table on `database`, created if need be: DDL takes a server longer than most tests."""

    class Note(peewee.Model):
        text = peewee.CharField(unique=True)

        class Meta:
            pass

    Note.bind(database)
    with database.connection_context():
        database.create_tables([Note])
    return Note


def in_use(database: Any) -> int:
    """How many connections of a pool are out."""
    return len(database._in_use)


@pytest.fixture(autouse=True)
def fresh_context() -> Iterator[None]:
    """Tests that leave a block or scope open on purpose leave no trace in the context that pytest runs all tests in."""
    tokens = [(variable, variable.set(None)) for variable in (current_frames, current_lineage)]
    yield
    for variable, token in tokens:
        variable.reset(token)


@pytest.fixture(scope="session")
def shared_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Kind], Place]]:
    """A place per kind for all tests of a session: to make one takes a server longer than most of these tests."""
    with ExitStack() as stack:
        places: dict[Kind, Place] = {}

        def get(kind: Kind) -> Place:
            if kind not in places:
                places[kind] = stack.enter_context(scratch(kind, tmp_path_factory.mktemp("core")))
            return places[kind]

        yield get


@pytest.fixture
def place(database_kind: Kind, shared_place: Callable[[Kind], Place], tmp_path: Path) -> Place:
    """The shared place of each kind in turn; SQLite has a file for each test."""
    place = shared_place(database_kind)
    return replace(place, database=str(tmp_path / "core.db")) if database_kind == "sqlite" else place


@pytest.fixture
def db(place: Place) -> Iterator[Any]:
    """A stock pooled database of 5 connections, installed; on SQLite, MariaDB and PostgreSQL. Its tables stay, empty."""
    database = place.make_database()
    install(database)
    yield database
    eventually(lambda: not database._in_use, message="connections are still in use")
    with database.connection_context():
        for table in database.get_tables():
            database.execute_sql(f"DELETE FROM {table}")
    database.close_all()


@pytest.fixture
def note(db: Any) -> Any:
    """A model on `db`."""
    return make_note(db)


@pytest.fixture
def make_sqlite(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Make stock pooled SQLite databases on files; the behaviour under test does not depend on the driver."""
    made = []

    def make(name: str = "a", **options: Any) -> Any:
        options = {"max_connections": 5, "timeout": 5, "pragmas": {"journal_mode": "wal"}, **options}
        database = PooledSqliteDatabase(str(tmp_path / f"{name}.db"), **options)
        install(database)
        made.append(database)
        return database

    yield make
    for database in made:
        eventually(lambda database=database: not database._in_use, message="connections are still in use")
        database.close_all()


@pytest.fixture
def lite(make_sqlite: Callable[..., Any]) -> Any:
    """One such SQLite database."""
    return make_sqlite()


@pytest.fixture
def lite_note(lite: Any) -> Any:
    """A model on `lite`."""
    return make_note(lite)
