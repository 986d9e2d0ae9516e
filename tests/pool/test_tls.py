"""Over TLS an idle socket may have something to say that is no goodbye: the server's session tickets."""

from __future__ import annotations

import ssl
import threading
from typing import TYPE_CHECKING, Any

import pytest

from peewee_frameworks import connection_scope
from peewee_frameworks.pool import PooledMySQLDatabase, PooledPsycopg3Database
from tests.support.concurrency import eventually, run_threads
from tests.support.private import mariadb_with_tls, postgres_with_tls

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 3
POOL: dict[str, Any] = {"min_connections": SIZE, "max_connections": SIZE, "timeout": 10}
OWN_ID = {"mysql": "SELECT CONNECTION_ID()", "postgres": "SELECT pg_backend_pid()"}
ALIVE = {"mysql": "SELECT id FROM information_schema.processlist", "postgres": "SELECT pid FROM pg_stat_activity"}
END = {"mysql": "KILL %s", "postgres": "SELECT pg_terminate_backend(%s)"}
ENCRYPTED = {
    "mysql": "SELECT VARIABLE_VALUE <> '' FROM information_schema.SESSION_STATUS WHERE VARIABLE_NAME = 'SSL_CIPHER'",
    "postgres": "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
}


@pytest.fixture(scope="module", params=["mysql", "postgres"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str, int]]:
    with {"mysql": mariadb_with_tls, "postgres": postgres_with_tls}[request.param]() as (host, port):
        yield request.param, host, port


@pytest.fixture
def db(server: tuple[str, str, int]) -> Iterator[Any]:
    """A pool all of whose connections were opened at its start, over TLS, and have not been used yet."""
    kind, host, port = server
    if kind == "mysql":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nobody has signed the certificate
        database: Any = PooledMySQLDatabase("mysql", host=host, port=port, user="root", ssl=context, **POOL)
    else:
        login = {"host": host, "port": port, "user": "postgres"}
        database = PooledPsycopg3Database("postgres", sslmode="require", **login, **POOL)
    database.pool.open()
    eventually(lambda: database.pool.stats().idle == SIZE, 30, "all connections are open")
    yield database
    database.pool.close(0)


def ids_of_all(db: Any, kind: str) -> set[int]:
    """Use all connections at once."""
    all_in = threading.Barrier(SIZE)

    def use(_: int) -> int:
        with connection_scope(db):
            assert db.execute_sql(ENCRYPTED[kind]).fetchone()[0], "it must be over TLS to show anything"
            own = int(db.execute_sql(OWN_ID[kind]).fetchone()[0])
            all_in.wait(10)
            return own

    return set(run_threads(SIZE, use))


def test_connections_at_rest_stay(server: tuple[str, str, int], db: Any) -> None:
    """What TLS has left in their sockets is no reason to close them."""
    first = ids_of_all(db, server[0])
    assert [ids_of_all(db, server[0]) for _ in range(3)] == [first] * 3
    stats = db.pool.stats()
    assert (stats.connects, sum(stats.closes.values())) == (SIZE, 0)


def test_those_that_the_server_ended_at_rest_are_replaced_without_an_error(
    server: tuple[str, str, int], db: Any
) -> None:
    """A goodbye inside TLS cannot be told from a ticket by the socket alone."""
    kind = server[0]
    before = ids_of_all(db, kind)
    with connection_scope(db):
        survivor = db.execute_sql(OWN_ID[kind]).fetchone()[0]
        for other in before - {survivor}:
            db.execute_sql(END[kind], (other,))
        # A server is told to end a session, and does so in its own time.
        eventually(lambda: before & {row[0] for row in db.execute_sql(ALIVE[kind])} == {survivor})
    assert ids_of_all(db, kind) & before == {survivor}
