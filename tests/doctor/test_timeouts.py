"""Findings about servers that do not answer; each is shown with a network that goes silent."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING, Any

import peewee
import playhouse.pool
import pytest
from playhouse.pwasyncio import AsyncMySQLDatabase, AsyncPostgresqlDatabase

from peewee_frameworks import connection_scope
from peewee_frameworks.doctor import timeouts
from peewee_frameworks.doctor.case import Case
from peewee_frameworks.doctor.serving import Serving
from peewee_frameworks.doctor.target import Target
from tests.doctor.helpers import found, look, severities
from tests.support.proxy import Proxy
from tests.support.servers import server_kwargs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.databases import Place

A_WHILE = 1.0


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[BaseException]]:
    """Start a thread that may never end; what it raises is put into the list."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, errors


@pytest.fixture
def deaf(mysql: Place) -> Iterator[Proxy]:
    with Proxy(mysql.address) as proxy:
        yield proxy


def test_no_read_timeout(mysql: Place, deaf: Proxy, sound: Callable[..., Any]) -> None:
    """A query whose server has fallen silent waits; with a read_timeout it fails."""
    place = mysql.via(*deaf.address)
    for read_timeout, codes in ((..., {"read-timeout": "warning"}), (3, {})):
        database = sound(place, read_timeout=read_timeout)
        assert severities(database) == codes

        def query(database: Any = database) -> None:
            with connection_scope(database):
                database.execute_sql("SELECT 1")
                deaf.deafen()
                database.execute_sql("SELECT 2")

        thread, errors = in_thread(query)
        thread.join(20 if not codes else A_WHILE)
        assert thread.is_alive() is bool(codes)
        if codes:
            deaf.cut()
            thread.join(10)
        assert isinstance(errors[0], peewee.OperationalError)


def test_the_login_of_a_stock_pool_waits_too(mysql: Place, sound: Callable[..., Any]) -> None:
    text = found(look(sound(mysql, read_timeout=..., cls=playhouse.pool.PooledMySQLDatabase)))["read-timeout"].why
    assert "and so does a login" in text
    assert "and so does a login" not in found(look(sound(mysql, read_timeout=...)))["read-timeout"].why


def test_no_connect_timeout(postgres: Place, sound: Callable[..., Any]) -> None:
    """playhouse.pool connects under its lock, so while one connect waits for a silent server all others do too."""
    with Proxy(postgres.address) as proxy:
        place = postgres.via(*proxy.address)
        stock = sound(place, cls=playhouse.pool.PooledPostgresqlDatabase)
        assert severities(stock) == {"connect-timeout": "warning", "stock-pool": "note"}
        assert "waits 130 s" in found(look(stock))["connect-timeout"].why
        with stock.connection_context():
            proxy.hang()
            first, errors = in_thread(stock.connection_context().__enter__)
            first.join(A_WHILE)
            assert first.is_alive()
            second, _ = in_thread(stock.close_idle)  # any use of the pool
            second.join(A_WHILE)
            assert second.is_alive()
            proxy.cut()
            first.join(10)
            second.join(10)
            assert isinstance(errors[0], peewee.OperationalError)
        proxy.restore()
        bounded = sound(place, cls=playhouse.pool.PooledPostgresqlDatabase, connect_timeout=2)
        assert severities(bounded) == {"stock-pool": "note"}
        proxy.hang()
        thread, errors = in_thread(bounded.connection_context().__enter__)
        thread.join(10)
        assert not thread.is_alive()
        assert isinstance(errors[0], peewee.OperationalError)


def test_our_pool_bounds_its_connects(postgres: Place, sound: Callable[..., Any]) -> None:
    assert severities(sound(postgres)) == {}


def test_the_connect_timeout_may_stand_elsewhere(postgres: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a connection string, and in the environment."""
    login = server_kwargs("postgres")
    address = f"{login['user']}@{login['host']}:{login['port']}/{login['database']}"

    def unpooled(url: str) -> dict[str, str]:
        return severities(peewee.PostgresqlDatabase(url, prefer_psycopg3=True))

    plain = f"postgresql://{address}?keepalives_idle=30"
    assert unpooled(plain) == {"connect-timeout": "warning", "no-pool": "warning"}
    assert unpooled(f"{plain}&connect_timeout=5") == {"no-pool": "warning"}
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "5")
    assert unpooled(plain) == {"no-pool": "warning"}


def test_tcp_has_to_ask(postgres: Place, sound: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """libpq has no read timeout: what ends the wait for a server that is gone is TCP's keepalive, of the system or its own."""
    monkeypatch.setattr(timeouts, "_keepalive_time", lambda: 7200.0)
    database = sound(postgres, keepalives_idle=...)
    finding = found(look(database))["read-timeout"]
    assert finding.severity == "warning"
    assert finding.what == "keepalives_idle is not set, and this system's is 7200 s."
    monkeypatch.setattr(timeouts, "_keepalive_time", lambda: 300.0)
    assert severities(database) == {}


def test_the_options_that_are_proposed_reach_the_socket(postgres: Place, sound: Callable[..., Any]) -> None:
    database = sound(postgres, keepalives_idle=31)
    with database.connection_context(), socket.socket(fileno=os.dup(database.connection().fileno())) as twin:
        assert twin.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 31


def test_over_a_unix_socket_nothing_gets_lost(mysql: Place) -> None:
    """Those who share a machine's kernel with the server hear of its end."""
    for database in (
        peewee.MySQLDatabase("shop", unix_socket="/run/mysqld/mysqld.sock"),
        peewee.PostgresqlDatabase("shop", prefer_psycopg3=True),
        peewee.PostgresqlDatabase("shop", host="/run/postgresql", prefer_psycopg3=True),
    ):
        assert list(timeouts.findings(Case("default", database, Target("it", {}), Serving()))) == []


def test_asynchronous_drivers(mysql: Place, postgres: Place) -> None:
    """asyncpg has command_timeout; aiomysql has nothing that could be set."""
    login = server_kwargs("postgres")
    assert severities(AsyncPostgresqlDatabase(**login)) == {"read-timeout": "warning"}
    assert severities(AsyncPostgresqlDatabase(command_timeout=30, **login)) == {}
    aiomysql = AsyncMySQLDatabase(mysql.database, pool_recycle=300, **mysql.connect_kwargs())
    assert severities(aiomysql) == {}
