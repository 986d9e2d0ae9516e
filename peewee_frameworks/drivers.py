"""What the drivers can tell about a connection without a round trip."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import TYPE_CHECKING, Any

import peewee

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

# PyMySQL and mysqlclient keep the status flags of the server's last reply: MySQL's protocol, "Server Status Flags".
_SERVER_STATUS_IN_TRANS = 0x0001
_PG_IDLE, _PG_FAILED, _PG_UNKNOWN = 0, 3, 4  # unknown: the connection is bad


def transaction_is_open(conn: Any) -> bool | None:
    """Return whether a transaction is open on `conn`, or None if the driver cannot tell without a round trip."""
    in_transaction = getattr(conn, "in_transaction", None)  # sqlite3
    if isinstance(in_transaction, bool):
        return in_transaction
    status = getattr(conn, "server_status", None)  # PyMySQL
    if isinstance(status, int):
        return bool(status & _SERVER_STATUS_IN_TRANS)
    pgconn = getattr(conn, "pgconn", None)  # psycopg, libpq's PQtransactionStatus
    if pgconn is not None and pgconn.transaction_status != _PG_UNKNOWN:
        return bool(pgconn.transaction_status != _PG_IDLE)
    return None


def is_clean(conn: Any) -> bool:
    """Return True if the driver can tell, without a round trip, that no transaction is open on `conn`."""
    return transaction_is_open(conn) is False


def transaction_has_failed(conn: Any) -> bool:
    """Return whether a statement of the open transaction failed on PostgreSQL, which answers COMMIT with a rollback then."""
    info = getattr(
        getattr(conn, "conn", conn), "info", None
    )  # psycopg and psycopg2; the asynchronous one is in a wrapper
    return getattr(info, "transaction_status", None) == _PG_FAILED


def is_broken_off(conn: Any) -> bool:
    """Return whether the driver knows that its exchange with the server has ended, or stands in the middle of an answer."""
    pgconn = getattr(conn, "pgconn", None)  # psycopg: 0 is OK; 1 is ACTIVE, 4 is UNKNOWN
    if pgconn is not None:
        return pgconn.status != 0 or pgconn.transaction_status in (1, 4)
    if hasattr(conn, "_sock"):  # PyMySQL
        return conn._sock is None
    return bool(getattr(conn, "closed", False))  # psycopg2


def unread_cursors(conn: Any) -> list[Any]:
    """Return the cursors of a sqlite3 connection that have a statement: results that are not read to their end.

    sqlite3 keeps weak references to the cursors of a connection, and a cursor has a statement until its last row is read. No
    attribute tells either, but what the garbage collector sees does; and so it costs nothing per statement.
    """
    return [
        cursor
        for part in gc.get_referents(conn)
        if type(part) is list
        for ref in list(part)
        if isinstance(ref, weakref.ref) and (cursor := ref()) is not None and _has_statement(cursor)
    ]


def _has_statement(cursor: Any) -> bool:
    return any(type(part).__name__ == "Statement" for part in gc.get_referents(cursor))


@functools.cache
def sqlite_tells_cursors() -> bool:
    """Return whether `unread_cursors` works with this build of sqlite3; it does with CPython 3.11 to 3.13."""
    try:
        conn = peewee.sqlite3.connect(":memory:")  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 - no sqlite3 at all
        return False
    try:
        cursor = conn.execute("SELECT 1 UNION SELECT 2")
        cursor.fetchone()
        before = unread_cursors(conn)
        cursor.fetchall()
        return before == [cursor] and not unread_cursors(conn)
    finally:
        conn.close()


@functools.cache
def reads_later(cursor_class: Any) -> bool:
    """Return whether cursors of this class fetch from the server: PyMySQL's and mysqlclient's ``SSCursor``."""
    return any(base.__name__ == "SSCursor" for base in cursor_class.__mro__)


# MySQL: server shutdown (1053), connection killed (1927), gone away (2006), lost during query (2013), and the codes
# libmysqlclient and PyMySQL give to a connect that failed (2002, 2003) or timed out on the server (4031).
_MYSQL_GONE = frozenset({1053, 1927, 2002, 2003, 2006, 2013, 2055, 4031})
# PostgreSQL: class 08 is "connection exception"; 57P01 to 57P03 are shutdown, crash and "starting up".
_SQLSTATE_GONE = ("08", "57P01", "57P02", "57P03")
# What some drivers tell by the text alone. asyncpg: the farewell is being read, which only the protocol's state tells; or it
# was, and the connection is closed. PyMySQL and MySQL's connector: asked for anything on a connection that was lost before.
_GONE_BY_TEXT = {
    ("asyncpg", "InternalClientError"): "cannot switch to state",
    ("asyncpg", "InterfaceError"): "connection is closed",
    ("pymysql", "InterfaceError"): "(0, '')",
    ("mysql", "OperationalError"): "MySQL Connection not available",
}


def is_disconnect(error: BaseException) -> bool:
    """Return whether an error means that the connection, not the statement, failed.

    Looks at the driver's error behind Peewee's: MySQL's error number, PostgreSQL's SQLSTATE, and psycopg's bare
    OperationalError without one, which it raises for a broken socket. Others say no more than a text.
    """
    for seen in _causes(error):
        if _has_code(seen, _MYSQL_GONE, _SQLSTATE_GONE):
            return True
        module, name = type(seen).__module__.partition(".")[0], type(seen).__name__
        text = _GONE_BY_TEXT.get((module, name))
        if text is not None and text in str(seen):
            return True
        broken_socket = module in ("psycopg", "psycopg2") and _sqlstate(seen) is None
        if broken_socket and name in ("OperationalError", "InterfaceError"):
            return True
    return False


# MySQL and MariaDB: lock wait timeout (1205), deadlock (1213), a row that changed under a snapshot (1020), NOWAIT (3572).
_MYSQL_CONTENTION = frozenset({1020, 1205, 1213, 3572})
# PostgreSQL: class 40 is "transaction rollback" (serialization failure, deadlock); 55P03 is NOWAIT and lock_timeout.
_SQLSTATE_CONTENTION = ("40", "55P03")
# SQLite's BUSY and LOCKED, the low byte of its extended codes.
_SQLITE_CONTENTION = frozenset({5, 6})


def is_contention(error: BaseException) -> bool:
    """Return whether a statement or COMMIT failed only because of what others did at the time, so that trying again may do.

    That is a lock that did not come in time, a deadlock, a serialization failure, and SQLite's "database is locked".
    """
    for seen in _causes(error):
        if _has_code(seen, _MYSQL_CONTENTION, _SQLSTATE_CONTENTION):
            return True
        sqlite_code = getattr(seen, "sqlite_errorcode", None)
        if isinstance(sqlite_code, int) and sqlite_code & 0xFF in _SQLITE_CONTENTION:
            return True
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what is behind it: Peewee's wraps the driver's."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _has_code(error: BaseException, numbers: Container[int], states: tuple[str, ...]) -> bool:
    code = error.args[0] if error.args else None
    if isinstance(code, str):  # MariaDB's connector
        code = getattr(error, "errno", None)
    if isinstance(code, int) and code in numbers:
        return True
    sqlstate = _sqlstate(error)
    return sqlstate is not None and sqlstate.startswith(states)


def _sqlstate(error: BaseException) -> str | None:
    found = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return None if found is None else str(found)


_peewee_database: Any = peewee.Database
_executing = _peewee_database._execute_cursor.__code__


def close_failed_cursor(error: BaseException) -> None:
    """Close the SQLite cursor whose statement has just failed, on the thread that has the connection.

    The error's traceback keeps the cursor, and sqlite3 (Python 3.11) does not reset the statement of every failure. Whoever
    frees the traceback later, an event loop's thread for example, would wait in ``sqlite3_reset`` for the mutex of a connection
    that another request is using by then: for seconds, if that one waits for a lock.
    """
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code is _executing and (cursor := frame.f_locals.get("cursor")) is not None:
            cursor.close()
        traceback = traceback.tb_next
