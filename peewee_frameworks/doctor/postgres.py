"""PostgreSQL: what the server is asked, and whether a pooler in transaction mode stands between."""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Any

import peewee

from peewee_frameworks.scope import connection_scope

from .report import Finding
from .server import Limit, Timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .case import Case
    from .server import Server

_SETTINGS = (
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "max_connections",
    "port",
    "reserved_connections",
    "superuser_reserved_connections",
)
_MILLISECONDS = 1000
_TRIES = 5
_NO_SUCH_STATEMENT = "26000"  # invalid_sql_statement_name
_STATEMENT_STATES = (_NO_SUCH_STATEMENT, "42P05")  # and duplicate_prepared_statement
_SQLSTATE = ord("C")  # libpq's PG_DIAG_SQLSTATE


def read(case: Case, server: Server) -> None:
    """Read the settings of this session, the limits of its server, role and database, and what stands between."""
    execute = case.database.execute_sql
    version = execute("SELECT version()").fetchone()[0]
    server.version = " ".join(version.split()[:2])
    names = ", ".join(f"'{name}'" for name in _SETTINGS)
    found = dict(execute(f"SELECT name, setting FROM pg_settings WHERE name IN ({names})").fetchall())  # noqa: S608
    server.rest = _timeout(found, "idle_session_timeout")  # since PostgreSQL 14
    server.transaction_rest = _timeout(found, "idle_in_transaction_session_timeout")
    if "max_connections" in found:  # CockroachDB has none
        server.limits = list(_limits(execute, found))
    server.pooler = _pooler(case)
    server.tls = _tls(case, server)
    if server.pooler == "transaction" and prepares(case):
        server.loses_statements = _loses_statements(case)


def _timeout(found: dict[str, str], name: str) -> Timeout | None:
    value = found.get(name, "")
    return Timeout(name, int(value) / _MILLISECONDS) if value.isdigit() else None


def _limits(execute: Any, found: dict[str, str]) -> Iterator[Limit]:
    user, superuser, of_user = execute(
        "SELECT rolname, rolsuper, rolconnlimit FROM pg_roles WHERE rolname = current_user"
    ).fetchone()
    name, of_database, address = execute(
        "SELECT datname, datconnlimit, coalesce(host(inet_server_addr()), '') FROM pg_database WHERE datname = "
        "current_database()"
    ).fetchone()
    place = ("postgres", address, found["port"])
    kept = 0 if superuser else int(found["superuser_reserved_connections"]) + int(found.get("reserved_connections", 0))
    reserved = f" less {kept} reserved" if kept else ""
    yield Limit(place, int(found["max_connections"]) - kept, f"max_connections{reserved}")
    if of_user >= 0 and not superuser:
        yield Limit((*place, "user", user), of_user, f"CONNECTION LIMIT of the role {user}")
    if of_database >= 0 and not superuser:
        yield Limit((*place, "database", name), of_database, f"CONNECTION LIMIT of the database {name}")


def _raw(database: Any) -> Any:
    """Return the driver's connection of the current scope."""
    conn = database.connection()
    return getattr(conn, "conn", conn)  # pwasyncio wraps them


def _told_pid(raw: Any) -> int | None:
    """Return the process number that the server, or who spoke for it, gave when the connection was opened."""
    for path in (("info", "backend_pid"), ("get_server_pid",), ("get_backend_pid",)):
        found = raw
        for name in path:
            found = getattr(found, name, None)
        if found is not None:
            return int(found() if callable(found) else found)
    return None


def _tls(case: Case, server: Server) -> str:
    raw = _raw(case.database)
    in_use = getattr(getattr(raw, "pgconn", None), "ssl_in_use", None)
    if in_use is None:
        in_use = getattr(getattr(raw, "info", None), "ssl_in_use", None)  # psycopg2
    # Behind a pooler the server speaks of the pooler's connection, not of this one.
    row = None if server.pooler else _encryption(case.database)
    if row is not None and row[0]:
        return f"{row[1]} {row[2]}"
    return "yes" if in_use else ""


def _encryption(database: Any) -> Any:
    with contextlib.suppress(peewee.PeeweeException):  # CockroachDB has no such view
        return database.execute_sql(
            "SELECT ssl, version, cipher FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        ).fetchone()
    return None


# -- poolers ------------------------------------------------------------------------------------------------------------


def _pooler(case: Case) -> str | None:
    """Tell a pooler by the process number: it makes one up, since it is to the pooler that a cancel request will go.

    In transaction mode it then lends one connection of the server to two clients that are both connected.
    """
    database = case.database
    if _told_pid(_raw(database)) in (None, _pid(database)):
        return None
    for _ in range(_TRIES if case.pool.size != 1 else 0):
        mine = _pid(database)
        with connection_scope(database):
            if _pid(database) == mine:
                return "transaction"
    return "other"


def _pid(database: Any) -> int:
    return int(database.execute_sql("SELECT pg_backend_pid()").fetchone()[0])


def prepares(case: Case) -> bool:
    """Return whether the driver will prepare statements, by itself."""
    if case.driver == "psycopg":
        return case.params.get("prepare_threshold", 5) is not None
    return case.driver == "asyncpg" and case.params.get("statement_cache_size", 100) > 0


def _loses_statements(case: Case) -> bool:
    """Try whether a prepared statement is still there when the pooler lends another connection of the server.

    The statement has a name of its own and is taken away again, so that no other client of that connection meets it.
    """
    database = case.database
    name = f"peewee_frameworks_{secrets.token_hex(8)}"
    for _ in range(_TRIES):
        here = _pid(database)
        use = _prepare(_raw(database), name)
        lost = False
        with connection_scope(database), database.atomic() as transaction:
            if _pid(database) == here:  # taken by the transaction, so the next use must go elsewhere
                lost = use() == _NO_SUCH_STATEMENT
            with contextlib.suppress(peewee.PeeweeException):
                database.execute_sql(f"DEALLOCATE {name}")
            transaction.rollback()
        if lost:
            return True
    return False


def _prepare(raw: Any, name: str) -> Callable[[], str]:
    """Prepare a statement; return a function that executes it and returns the SQLSTATE of its failure, or ""."""
    if (pgconn := getattr(raw, "pgconn", None)) is not None:
        pgconn.prepare(name.encode(), b"SELECT 1")

        def use() -> str:
            return bytes(pgconn.exec_prepared(name.encode(), []).error_field(_SQLSTATE) or b"").decode()
    else:
        from playhouse.pwasyncio import await_  # noqa: PLC0415 - asyncpg: it is imported

        statement = await_(raw.prepare("SELECT 1", name=name))

        def use() -> str:
            try:
                await_(statement.fetchval())
            except Exception as error:  # noqa: BLE001 - asyncpg's, of many classes
                return str(getattr(error, "sqlstate", ""))
            return ""

    return use


def findings(case: Case, server: Server) -> Iterator[Finding]:
    """Say what a pooler in transaction mode breaks."""
    if server.loses_statements:
        yield _lost(case, "Tried: a prepared statement was gone when the pooler lent another connection of the server.")


def finding_in(case: Case, error: BaseException) -> Finding | None:
    """Return the finding that an error is the proof of: a query of ours lost its prepared statement."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "sqlstate", None) in _STATEMENT_STATES and prepares(case):
            return _lost(case, f"Seen: a query of the doctor's own failed for it ({type(seen).__name__}).")
        seen = seen.__cause__ or seen.__context__
    return None


def _lost(case: Case, proof: str) -> Finding:
    option = "prepare_threshold=None" if case.driver == "psycopg" else "statement_cache_size=0"
    return Finding(
        "prepared-statements",
        "error",
        f"A pooler in transaction mode stands before the server, and {case.driver} prepares statements. {proof}",
        "Each transaction may get another connection of the server, and a statement that was prepared on one does not "
        "exist on the next: queries fail at random, once they have been repeated often enough to be prepared.",
        f"{option} among the database's keywords; or pgbouncer 1.21 or later with max_prepared_statements above 0",
    )
