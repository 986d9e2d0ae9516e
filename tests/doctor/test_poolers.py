"""A pooler before PostgreSQL: it is recognised, and what it breaks is tried and said."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import peewee
import psycopg
import pytest
from playhouse.pwasyncio import AsyncPostgresqlDatabase

from peewee_frameworks import connection_scope
from peewee_frameworks.aio import AsyncPsycopgDatabase
from peewee_frameworks.pool import PooledPostgresqlDatabase
from tests.doctor.helpers import SOUND, found, look, severities
from tests.doctor.pooler import TransactionPooler
from tests.support.private import pgbouncer
from tests.support.servers import require_server, server_kwargs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stand_in(mode: str) -> Iterator[tuple[str, int]]:
    assert mode == "transaction"
    server = server_kwargs("postgres")
    with TransactionPooler((server["host"], server["port"])) as pooler:
        yield pooler.address


@pytest.fixture(params=[stand_in, pgbouncer], ids=["stand-in", "pgbouncer"])
def transaction_mode(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Connection keywords that lead through a pooler in transaction mode."""
    require_server("postgres")
    with request.param("transaction") as (host, port):
        yield {**server_kwargs("postgres"), "host": host, "port": port, "keepalives_idle": 30}


def ours(login: dict[str, Any], **options: Any) -> Any:
    return PooledPostgresqlDatabase(prefer_psycopg3=True, **{**SOUND, **login, **options})


def test_prepared_statements_are_lost(transaction_mode: dict[str, Any]) -> None:
    """Found by trying; and an application fails as the finding says, until it prepares no more."""
    database = ours(transaction_mode)
    report = look(database)
    finding = found(report)["prepared-statements"]
    assert finding.severity == "error"
    assert finding.change.startswith("prepare_threshold=None")
    assert report.databases["default"]["pooler"] == "transaction"
    assert "through a pooler in transaction mode" in report.as_text()
    with pytest.raises(psycopg.errors.InvalidSqlStatementName):
        use(database)
    database.pool.close()

    right = ours(transaction_mode, prepare_threshold=None)
    assert severities(right) == {}
    use(right)
    right.pool.close()


def use(database: Any) -> None:
    """Repeat a query until psycopg has prepared it, and once more while another request has the server's connection."""
    with connection_scope(database):
        for _ in range(7):
            database.execute_sql("SELECT %s::int", (1,)).fetchone()
        conn = database.connection()
        with connection_scope(database), database.atomic():
            database.execute_sql("SELECT 1")
            conn.execute("SELECT %s::int", (1,))


def test_looking_leaves_nothing_behind(transaction_mode: dict[str, Any]) -> None:
    """Not a prepared statement, not a transaction."""
    database = ours(transaction_mode)
    look(database)
    with connection_scope(database):
        rows = database.execute_sql("SELECT name FROM pg_prepared_statements WHERE left(name, 6) = 'peewee'").fetchall()
    assert rows == []
    database.pool.close()


def test_asynchronous_drivers(transaction_mode: dict[str, Any]) -> None:
    login = dict(transaction_mode)
    assert severities(AsyncPsycopgDatabase(**login)) == {"prepared-statements": "error"}
    assert severities(AsyncPsycopgDatabase(prepare_threshold=None, **login)) == {}
    del login["keepalives_idle"]
    login["command_timeout"] = 30
    finding = found(look(AsyncPostgresqlDatabase(**login)))["prepared-statements"]
    assert finding.change.startswith("statement_cache_size=0")
    assert severities(AsyncPostgresqlDatabase(statement_cache_size=0, **login)) == {}


def test_behind_a_pooler_its_limits_count_and_not_the_servers(transaction_mode: dict[str, Any]) -> None:
    database = ours(transaction_mode, prepare_threshold=None)
    assert severities(database, workers=1000) == {}
    unpooled = peewee.PostgresqlDatabase(
        prefer_psycopg3=True, prepare_threshold=None, connect_timeout=5, **transaction_mode
    )
    assert severities(unpooled) == {}  # the pooler is the pool
    database.pool.close()


def test_session_mode_loses_nothing() -> None:
    require_server("postgres")
    with pgbouncer("session") as (host, port):
        database = ours({**server_kwargs("postgres"), "host": host, "port": port, "keepalives_idle": 30})
        report = look(database)
        assert report.findings == ()
        assert report.databases["default"]["pooler"] == "other"
        database.pool.close()


def test_the_server_itself_is_no_pooler(postgres: Any, sound: Callable[..., Any]) -> None:
    assert look(sound(postgres)).databases["default"]["pooler"] is None
