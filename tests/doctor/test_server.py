"""Findings about a pool and its server: what the server closes, and how many connections it gives."""

from __future__ import annotations

import secrets
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import peewee
import playhouse.pool
import pytest
from playhouse.pwasyncio import AsyncMySQLDatabase, AsyncPostgresqlDatabase
from starlette.applications import Starlette

from peewee_frameworks import connection_scope
from peewee_frameworks.aio import AsyncPsycopgDatabase
from peewee_frameworks.starlette import Peewee
from tests.doctor.helpers import found, look, severities
from tests.support.concurrency import eventually
from tests.support.servers import admin_connection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.databases import Place


def rest(kind: str, seconds: int) -> dict[str, Any]:
    """Options that have the server close this session, and no other, after so many seconds of rest."""
    if kind == "mysql":
        return {"init_command": f"SET SESSION wait_timeout = {seconds}"}
    return {"options": f"-c idle_session_timeout={seconds}s"}


@pytest.fixture(params=["mysql", "postgres"])
def served(request: pytest.FixtureRequest) -> Place:
    place: Place = request.getfixturevalue(request.param)
    return place


def test_the_server_closes_what_rests(served: Place, sound: Callable[..., Any]) -> None:
    """The request after the rest pays for a new connection; with a shorter stale_timeout the pool renews before."""
    database = sound(served, stale_timeout=None, **rest(served.kind, 3))
    assert severities(database) == {"stale-timeout": "warning"}
    with connection_scope(database):
        database.execute_sql("SELECT 1")
    before = database.pool.stats().connects
    eventually(lambda: not served.sessions(), message="the server has closed the connection")
    with connection_scope(database):
        database.execute_sql("SELECT 1")
    assert database.pool.stats().connects > before


@pytest.mark.parametrize(
    ("stale_timeout", "seconds", "severity"),
    [
        (None, 20, "warning"),  # all day long
        (None, 4000, "note"),  # in quiet hours
        (5000, 4000, "warning"),  # set, and of no effect
        (4000, 4000, "warning"),
        (3000, 4000, None),
    ],
)
def test_stale_timeout_and_the_servers(
    stale_timeout: int | None, seconds: int, severity: str | None, served: Place, sound: Callable[..., Any]
) -> None:
    database = sound(served, stale_timeout=stale_timeout, **rest(served.kind, seconds))
    assert severities(database) == ({"stale-timeout": severity} if severity else {})


def test_the_change_is_below_the_servers_timeout(mysql: Place, sound: Callable[..., Any]) -> None:
    short = found(look(sound(mysql, stale_timeout=None, **rest("mysql", 20))))["stale-timeout"]
    assert (
        short.what == "The server closes a connection that rests for 20 s (wait_timeout), and stale_timeout is not set."
    )
    assert short.change == "stale_timeout=16"
    long = found(look(sound(mysql, stale_timeout=None, **rest("mysql", 4000))))["stale-timeout"]
    assert long.change == "stale_timeout=300"


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        ({"keepalive": 10}, {}),
        ({"idle_timeout": 10}, {}),
        ({"idle_timeout": 10, "min_connections": 1}, {"stale-timeout": "warning"}),  # it spares one
    ],
)
def test_what_else_keeps_a_connection_from_resting(
    options: dict[str, Any], codes: dict[str, str], mysql: Place, sound: Callable[..., Any]
) -> None:
    assert severities(sound(mysql, stale_timeout=None, **options, **rest("mysql", 20))) == codes


def test_stock_pools_are_compared_too(postgres: Place, sound: Callable[..., Any]) -> None:
    stock = playhouse.pool.PooledPostgresqlDatabase
    database = sound(postgres, cls=stock, stale_timeout=30, connect_timeout=5, **rest("postgres", 20))
    assert severities(database) == {"stale-timeout": "warning", "stock-pool": "note"}


def test_the_pools_of_asynchronous_drivers_name_their_own_option(mysql: Place, postgres: Place) -> None:
    login = postgres.connect_kwargs()
    del login["options"], login["application_name"]
    psycopg = AsyncPsycopgDatabase(
        postgres.database, keepalives_idle=30, max_lifetime=40.0, **login, **rest("postgres", 20)
    )
    assert found(look(psycopg))["stale-timeout"].change == "max_lifetime=16"
    asyncpg = AsyncPostgresqlDatabase(
        postgres.database, command_timeout=30, server_settings={"idle_session_timeout": "20s"}, **login
    )
    assert found(look(asyncpg))["stale-timeout"].change == "max_inactive_connection_lifetime=16"
    aiomysql = AsyncMySQLDatabase(mysql.database, **mysql.connect_kwargs(), **rest("mysql", 20))
    assert found(look(aiomysql))["stale-timeout"].change == "pool_recycle=16"


@pytest.mark.parametrize("transaction", [False, True])
def test_transactions_that_rest_for_ever(transaction: bool, served: Place, sound: Callable[..., Any]) -> None:
    """Where requests are transactions, and the server ends none."""
    app = Starlette()
    Peewee(sound(served), transaction=transaction).init_app(app)
    report = look(app)
    assert {each.code: each.severity for each in report.findings} == (
        {"idle-in-transaction": "note"} if transaction else {}
    )


def test_transactions_that_rest_are_ended(served: Place, sound: Callable[..., Any]) -> None:
    """The change that is proposed works: the session is gone, and its locks with it."""
    options = (
        {"init_command": "SET SESSION idle_transaction_timeout = 1"}
        if served.kind == "mysql"
        else {"options": "-c idle_in_transaction_session_timeout=1s"}
    )
    database = sound(served, **options)
    app = Starlette()
    Peewee(database, transaction=True).init_app(app)
    assert look(app).findings == ()
    with pytest.raises(peewee.DatabaseError), connection_scope(database), database.atomic():
        database.execute_sql("SELECT 1")
        eventually(lambda: not served.sessions(), message="the server has ended the session")
        database.execute_sql("SELECT 1")


# -- how many -----------------------------------------------------------------------------------------------------------


@contextmanager
def bounded_user(place: Place, limit: int) -> Iterator[dict[str, str]]:
    """A user of the server for one test, who may have so many connections."""
    name, password = f"pf_{secrets.token_hex(5)}", secrets.token_hex(8)
    if place.kind == "mysql":
        make = [
            f"CREATE USER '{name}'@'%' IDENTIFIED BY '{password}' WITH MAX_USER_CONNECTIONS {limit}",
            f"GRANT ALL ON {place.tag}.* TO '{name}'@'%'",
        ]
        drop = [f"DROP USER '{name}'@'%'"]
    else:
        make = [
            f"CREATE ROLE {name} LOGIN PASSWORD '{password}' CONNECTION LIMIT {limit}",
            f"GRANT ALL ON SCHEMA {place.tag} TO {name}",
        ]
        drop = [f"DROP OWNED BY {name}", f"DROP ROLE {name}"]
    with closing(admin_connection(place.kind)) as connection, closing(connection.cursor()) as cursor:
        for statement in make:
            cursor.execute(statement)
        try:
            yield {"user": name, "password": password}
        finally:
            place.kill_sessions()
            for statement in drop:
                cursor.execute(statement)


def test_a_user_who_may_not_have_what_the_pool_promises(served: Place, sound: Callable[..., Any]) -> None:
    """The server refuses the connection beyond its limit, although the pool has room for it."""
    with bounded_user(served, 3) as login:
        database = sound(served, max_connections=5, **login)
        report = look(database)
        finding = found(report)["server-limit"]
        assert finding.severity == "error"
        assert finding.subject == "default"
        assert finding.what.startswith("1 worker with 5 connections each may open 5, and the server allows 3 (")
        assert login["user"] in finding.what
        assert login["password"] not in report.as_text()
        assert finding.change == "max_connections=3"
        with connection_scope(database), connection_scope(database), connection_scope(database):
            pass
        scopes = [connection_scope(database) for _ in range(4)]
        opened = 0
        with pytest.raises(peewee.OperationalError):
            for scope in scopes:
                scope.__enter__()
                database.execute_sql("SELECT 1")
                opened += 1
        for scope in reversed(scopes[: opened + 1]):
            scope.__exit__(None, None, None)
        assert opened == 3
        database.pool.close()
        assert severities(sound(served, max_connections=3, **login)) == {}


def test_workers_multiply(served: Place, sound: Callable[..., Any]) -> None:
    with bounded_user(served, 10) as login:
        database = sound(served, max_connections=5, **login)
        assert severities(database, workers=2) == {}
        finding = found(look(database, workers=3))["server-limit"]
        assert finding.what.startswith("3 workers with 5 connections each may open 15, and the server allows 10 (")
        assert finding.change == "max_connections=3"
        assert found(look(database, workers=11))["server-limit"].change.startswith("fewer workers")


def test_databases_on_one_server_count_together(served: Place, sound: Callable[..., Any]) -> None:
    with bounded_user(served, 8) as login:
        first, second = sound(served, **login), sound(served, **login)
        assert severities(first) == {}
        finding = found(look({"first": first, "second": second}))["server-limit"]
        assert finding.what.startswith("1 worker with 5 + 5 connections each may open 10, and the server allows 8 (")
        assert finding.change == "max_connections=4 in each of first, second"
        assert finding.subject is None


def test_health_checks_have_a_connection_beside_the_pool(served: Place, sound: Callable[..., Any]) -> None:
    with bounded_user(served, 10) as login:
        orm = Peewee(sound(served, max_connections=5, **login))
        assert "server-limit" not in severities(orm, workers=2)
        orm.app()
        finding = found(look(orm, workers=2))["server-limit"]
        assert finding.what.startswith("2 workers with 5 connections each, and 1 for health checks, may open 12, and ")
        assert finding.change == "max_connections=4"


def test_the_servers_own_limit(served: Place, sound: Callable[..., Any]) -> None:
    """Where no other is set: max_connections."""
    with closing(admin_connection(served.kind)) as connection, closing(connection.cursor()) as cursor:
        cursor.execute("SHOW VARIABLES LIKE 'max_connections'" if served.kind == "mysql" else "SHOW max_connections")
        limit = int(cursor.fetchone()[-1])
    database = sound(served, max_connections=limit)
    assert severities(database) == {}
    finding = found(look(database, workers=2))["server-limit"]
    assert f"the server allows {limit} (max_connections)" in finding.what


def test_what_is_reserved_for_superusers_is_not_for_others(postgres: Place, sound: Callable[..., Any]) -> None:
    with bounded_user(postgres, -1) as login, closing(admin_connection("postgres")) as connection:
        limit, reserved = (
            int(connection.execute(f"SHOW {name}").fetchone()[0])
            for name in ("max_connections", "superuser_reserved_connections")
        )
        finding = found(look(sound(postgres, max_connections=limit, **login)))["server-limit"]
        assert f"the server allows {limit - reserved} (max_connections less {reserved} reserved)" in finding.what
