"""Findings about SQLite: each is shown by two connections that get in each other's way."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import peewee
import playhouse.pool
import pytest
from fastapi import APIRouter, Depends, FastAPI
from sanic import Blueprint, Sanic
from starlette.applications import Starlette

from peewee_frameworks import connection_scope, fastapi, sanic
from peewee_frameworks.pool import PooledSqliteDatabase
from peewee_frameworks.starlette import Peewee
from tests.doctor.helpers import found, look, severities

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.databases import Place


@pytest.fixture
def raw(sqlite: Place) -> Iterator[Any]:
    """A connection of somebody else's to the same file."""
    import sqlite3

    conn = sqlite3.connect(sqlite.database, isolation_level=None, timeout=0)
    yield conn
    conn.close()


def test_without_wal_a_reader_keeps_the_writer_out(sqlite: Place, sound: Callable[..., Any], raw: Any) -> None:
    for pragmas, codes in (
        ({"journal_mode": "delete", "busy_timeout": 50}, {"sqlite-journal": "warning"}),
        ({"journal_mode": "wal", "busy_timeout": 50}, {}),
    ):
        database = sound(sqlite, pragmas=pragmas)
        assert severities(database) == codes
        with connection_scope(database):
            database.execute_sql("CREATE TABLE IF NOT EXISTS note (id)")
            raw.execute("BEGIN")
            raw.execute("SELECT * FROM note").fetchall()
            if codes:
                with pytest.raises(peewee.OperationalError, match="locked"):
                    database.execute_sql("INSERT INTO note VALUES (1)")
            else:
                database.execute_sql("INSERT INTO note VALUES (1)")
            raw.execute("ROLLBACK")


def test_without_a_busy_timeout_the_second_writer_fails_at_once(
    sqlite: Place, sound: Callable[..., Any], raw: Any
) -> None:
    database = sound(sqlite, pragmas={"journal_mode": "wal", "busy_timeout": 0})
    assert severities(database) == {"sqlite-busy-timeout": "warning"}
    patient = sound(sqlite)
    assert severities(patient) == {}
    with connection_scope(patient):
        patient.execute_sql("CREATE TABLE note (id)")
    raw.execute("BEGIN IMMEDIATE")
    with connection_scope(database), pytest.raises(peewee.OperationalError, match="locked"):
        database.execute_sql("INSERT INTO note VALUES (1)")

    def write() -> None:
        with connection_scope(patient):
            patient.execute_sql("INSERT INTO note VALUES (1)")

    waiting = threading.Thread(target=write, daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    raw.execute("COMMIT")
    waiting.join(10)
    assert not waiting.is_alive()


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("framework", ["fastapi", "sanic"])
def test_transactions_of_parts_of_an_application_are_found_too(
    sqlite: Place, sound: Callable[..., Any], framework: str, atomic: bool
) -> None:
    """FastAPI's dependency, in a router that is included; a Sanic blueprint's policy."""
    database = sound(sqlite)
    app: Any
    if framework == "fastapi":
        orm = fastapi.Peewee(database)
        router = APIRouter()
        router.add_api_route("/", lambda: None, dependencies=[Depends(orm.transaction if atomic else orm.connection)])
        app = FastAPI()
        app.include_router(router, prefix="/in")
        orm.init_app(app)
    else:
        blueprint = Blueprint("part")
        app = Sanic(f"doctored{atomic}")
        app.blueprint(blueprint)
        served = sanic.Peewee(database)
        served.init_app(app)
        served.policy(blueprint, **{"transaction": True} if atomic else {"connect": "lazy"})
    assert ("sqlite-deferred" in severities(app)) is atomic


def test_a_transaction_that_reads_and_then_writes(sqlite: Place, sound: Callable[..., Any], raw: Any) -> None:
    """It fails at once if another one wrote meanwhile, whatever the busy timeout; begun as a writer it does not."""

    def serve(**options: Any) -> tuple[Any, dict[str, str]]:
        database = sound(sqlite, **options)
        app = Starlette()
        Peewee(database, transaction=True).init_app(app)
        return database, severities(app)

    deferred, codes = serve()
    assert codes == {"sqlite-deferred": "warning"}
    immediate, codes = serve(lock_type="IMMEDIATE")
    assert codes == {}
    assert severities(sound(sqlite)) == {}  # nothing says that requests are transactions

    with connection_scope(deferred):
        deferred.execute_sql("CREATE TABLE note (id)")
    with pytest.raises(peewee.OperationalError, match="locked"), connection_scope(deferred), deferred.atomic():
        deferred.execute_sql("SELECT * FROM note").fetchall()
        raw.execute("INSERT INTO note VALUES (1)")
        deferred.execute_sql("INSERT INTO note VALUES (2)")
    with connection_scope(immediate), immediate.atomic():
        immediate.execute_sql("SELECT * FROM note").fetchall()
        with pytest.raises(Exception, match="locked"):  # the other one has to wait instead
            raw.execute("INSERT INTO note VALUES (3)")
        immediate.execute_sql("INSERT INTO note VALUES (4)")


def test_a_pooled_connection_in_another_thread(sqlite: Place, sound: Callable[..., Any]) -> None:
    """playhouse.pool hands the connection of one thread to another, and sqlite3 refuses."""
    stock = sound(sqlite, cls=playhouse.pool.PooledSqliteDatabase)
    with stock.connection_context():
        pass
    errors: list[BaseException] = []

    def query() -> None:
        try:
            with stock.connection_context():
                stock.execute_sql("SELECT 1")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=query)
    thread.start()
    thread.join(10)
    assert isinstance(errors[0], peewee.ProgrammingError)

    fresh = sound(sqlite, cls=playhouse.pool.PooledSqliteDatabase)
    assert found(look(fresh))["sqlite-same-thread"].severity == "error"
    right = sound(sqlite, cls=playhouse.pool.PooledSqliteDatabase, check_same_thread=False)
    assert severities(right) == {}


def test_an_adapter_sets_it_by_itself(sqlite: Place, sound: Callable[..., Any]) -> None:
    app = Starlette()
    Peewee(sound(sqlite, cls=playhouse.pool.PooledSqliteDatabase)).init_app(app)
    assert severities(app) == {}


def test_check_same_thread_is_refused(sqlite: Place) -> None:
    database = peewee.SqliteDatabase(sqlite.database, check_same_thread=True, pragmas={"journal_mode": "wal"})
    with database.connection_context():
        database.execute_sql("CREATE TABLE note (id)")
    finding = found(look(database))["configuration"]
    assert finding.severity == "error"
    assert "check_same_thread=True binds a connection to one thread" in finding.what


def test_a_database_in_memory() -> None:
    """Ours is one connection: right in one process. Each further process has an empty one; so has each connection of others."""
    assert severities(PooledSqliteDatabase(":memory:", timeout=5)) == {}
    assert severities(PooledSqliteDatabase(":memory:", timeout=5), workers=2) == {"sqlite-memory": "error"}
    unpooled = look(peewee.SqliteDatabase(":memory:"))
    assert (
        "each connection to an in-memory SQLite database is a database of its own"
        in found(unpooled)["configuration"].what
    )


def test_looking_makes_no_file(tmp_path: Any) -> None:
    name = tmp_path / "shop.db"
    finding = found(look(PooledSqliteDatabase(str(name), timeout=5)))["unreachable"]
    assert finding.what == f"The database cannot be used: there is no file {name}, and looking makes none."
    assert not name.exists()
