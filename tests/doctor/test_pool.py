"""Findings about pools: each configuration does what its finding says, and the change that it names ends both."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import anyio
import peewee
import playhouse.pool
import pymysql
import pytest
from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI
from playhouse.pool import MaxConnectionsExceeded

from peewee_frameworks import connection_scope
from peewee_frameworks.doctor.frameworks import ANYIO_THREADS
from peewee_frameworks.fastapi import Peewee
from tests.doctor.helpers import found, look, severities

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.databases import Place


def test_a_pool_that_does_not_wait(place: Place, sound: Callable[..., Any]) -> None:
    """Without a timeout the request beyond the last connection fails; with one it waits."""
    database = sound(place, timeout=None, max_connections=1)
    assert severities(database) == {"pool-does-not-wait": "warning"}
    with connection_scope(database), connection_scope(database):
        database.execute_sql("SELECT 1")
        with connection_scope(database), pytest.raises(MaxConnectionsExceeded):
            database.execute_sql("SELECT 1")
    assert severities(sound(place, timeout=5, max_connections=1)) == {}


def test_a_pool_that_does_not_wait_is_right_where_nobody_can_queue(postgres: Place, sound: Callable[..., Any]) -> None:
    """A worker that works on no more requests than there are connections; one that does is named with its number."""
    database = sound(postgres, timeout=None, max_connections=5)
    assert severities(database, server="gunicorn", requests=5) == {}
    finding = found(look(database, server="gunicorn", requests=6))["pool-does-not-wait"]
    assert "gunicorn has up to 6 requests under way in each worker" in finding.what


def test_a_pool_that_waits_for_ever(place: Place, sound: Callable[..., Any]) -> None:
    database = sound(place, timeout=0, max_connections=1)
    assert severities(database) == {"pool-waits-for-ever": "warning"}
    assert database._wait_timeout == math.inf
    waiting = threading.Thread(target=database.connection_context().__enter__, daemon=True)
    with connection_scope(database):
        database.execute_sql("SELECT 1")
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()  # and nothing but the connection's return ends that
    waiting.join(10)
    assert not waiting.is_alive()


@pytest.mark.parametrize("size", [None, 0])
def test_a_pool_without_a_limit(size: int | None, postgres: Place, sound: Callable[..., Any]) -> None:
    assert severities(sound(postgres, max_connections=size)) == {"pool-unbounded": "warning"}


def test_a_stock_pool_without_a_limit(mysql: Place, sound: Callable[..., Any]) -> None:
    database = sound(mysql, cls=playhouse.pool.PooledMySQLDatabase, max_connections=0, ssl_disabled=True)
    assert severities(database) == {"pool-unbounded": "warning", "stock-pool": "note"}


def test_a_stock_pool_is_slower(mysql: Place, sound: Callable[..., Any]) -> None:
    """It asks the server at each checkout; ours does not."""
    stock = sound(mysql, cls=playhouse.pool.PooledMySQLDatabase, ssl_disabled=True)
    assert severities(stock) == {"stock-pool": "note"}
    assert _pings(stock) == 3
    ours = sound(mysql)
    assert severities(ours) == {}
    assert _pings(ours) == 0


def _pings(database: Any) -> int:
    """How often the server was pinged for three requests of one query, on a connection that is there already."""

    def commands() -> int:
        with connection_scope(database):
            return int(database.execute_sql("SHOW SESSION STATUS LIKE 'Com_admin_commands'").fetchone()[1])

    before = commands()
    for _ in range(2):
        with connection_scope(database):
            database.execute_sql("SELECT 1")
    return commands() - before


def test_no_pool(mysql: Place) -> None:
    """Each request is a session of its own."""
    database = peewee.MySQLDatabase(mysql.database, read_timeout=30, ssl_disabled=True, **mysql.connect_kwargs())
    assert severities(database) == {"no-pool": "warning"}
    ids = set()
    for _ in range(3):
        with connection_scope(database):
            ids.add(database.execute_sql("SELECT CONNECTION_ID()").fetchone()[0])
    assert len(ids) == 3


def test_sqlite_needs_no_pool(sqlite: Place) -> None:
    database = peewee.SqliteDatabase(sqlite.database, pragmas={"journal_mode": "wal"})
    with database:
        database.execute_sql("CREATE TABLE note (id)")
    assert severities(database) == {}


def test_a_tls_context_for_each_connection(mysql: Place, sound: Callable[..., Any], monkeypatch: Any) -> None:
    """PyMySQL makes one per connect, unless it is given one, or TLS is off, or the pool is ours."""
    made = []
    make = pymysql.connections.Connection._create_ssl_ctx
    monkeypatch.setattr(
        pymysql.connections.Connection, "_create_ssl_ctx", lambda self, sslp: made.append(sslp) or make(self, sslp)
    )
    kwargs = {"read_timeout": 30, **mysql.connect_kwargs()}
    unpooled = peewee.MySQLDatabase(mysql.database, **kwargs)
    assert severities(unpooled) == {"no-pool": "warning", "tls-context": "warning"}
    made.clear()
    for _ in range(3):
        with connection_scope(unpooled):
            unpooled.execute_sql("SELECT 1")
    assert len(made) == 3
    stock = sound(mysql, cls=playhouse.pool.PooledMySQLDatabase)
    assert severities(stock) == {"stock-pool": "note", "tls-context": "note"}
    without = peewee.MySQLDatabase(mysql.database, ssl_disabled=True, **kwargs)
    made.clear()
    assert severities(without) == {"no-pool": "warning"}
    assert made == []


def make_app(database: Any, *, is_async: bool) -> FastAPI:
    app = FastAPI()
    Peewee(database).init_app(app)

    async def on_loop() -> None:
        pass

    def in_thread() -> None:
        pass

    app.get("/")(on_loop if is_async else in_thread)
    return app


def test_more_connections_than_threads(postgres: Place, sound: Callable[..., Any]) -> None:
    """Where all endpoints are sync, those beyond AnyIO's threads are of no use."""
    database = sound(postgres, max_connections=60)
    assert severities(make_app(database, is_async=False)) == {"pool-larger-than-threads": "note"}
    assert severities(make_app(database, is_async=True)) == {}
    assert severities(make_app(sound(postgres, max_connections=40), is_async=False)) == {}


def test_fewer_connections_than_threads_without_a_timeout(postgres: Place, sound: Callable[..., Any]) -> None:
    """The finding names the crowd: 40 threads."""
    database = sound(postgres, timeout=None)
    finding = found(look(make_app(database, is_async=False)))["pool-does-not-wait"]
    assert finding.what == (
        "timeout is not set, so a request that finds none of the 5 connections free fails at once. Sync endpoints run on 40 "
        "threads in each worker."
    )


def test_the_number_of_anyios_threads_is_right() -> None:
    async def ask() -> float:
        return current_default_thread_limiter().total_tokens

    assert anyio.run(ask) == ANYIO_THREADS
