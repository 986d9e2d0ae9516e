# ruff: noqa: ARG002 - an adapter takes what it needs of the common signature
"""What the pool must know about each driver, and nothing else does.

A driver is recognised by the module of its connection class; an unknown one is treated as plain DB-API.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import select
import socket
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from .entries import CHECK, CLEAN, CLOSE

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Driver", "driver_of"]


class Driver:
    """Plain DB-API: everything needs a round trip, and what a transaction is can only be guessed."""

    name = "dbapi"
    needs_ping = True
    """Whether a long idle connection can have died."""
    tells_dirty = True
    """Whether CLEAN means an open transaction, rather than that nobody knows."""
    closes_under_use = True
    """Whether `close` is safe while another thread is inside a call; where not, such a connection is cut, and closed later."""
    lost_codes: frozenset[Any] = frozenset()
    """First arguments (MySQL) or SQLSTATEs (PostgreSQL) of errors after which the connection is gone."""

    def own_references(self) -> int:
        """Say how many references to itself a connection has, at the least; see `upkeep.reap`."""
        return 0

    def socket_of(self, conn: Any) -> Any:
        """Return the connection's socket or file descriptor, or ``None``."""
        return None

    def probe(self, conn: Any) -> Callable[[int], Any] | None:
        """Return a function that, called with 0, tells without a round trip whether the socket has something to say.

        It has where the result is above 0. Below, a signal came in between, which says nothing of the connection.
        """
        source = self.socket_of(conn)
        poll = _poll()
        if source is None or poll is None:
            return None
        descriptor = _Descriptor(source if isinstance(source, int) else source.fileno(), select.POLLIN)
        return functools.partial(poll, ctypes.byref(descriptor), _ONE)

    def verdict(self, conn: Any) -> str:
        """Judge an idle connection whose socket has something to say: CLOSE, or CHECK it by a ping."""
        return CHECK

    def condition(self, conn: Any) -> str | None:
        """Judge a returned connection without a round trip: ``None``, CLEAN, or the reason to close it."""
        dirty = getattr(conn, "in_transaction", False)
        return CLEAN if dirty else None

    def ping(self, conn: Any, timeout: float) -> None:
        """Make a round trip; raises whatever the driver raises."""
        cursor = conn.cursor()
        try:
            cursor.execute("SELECT 1")
            cursor.fetchall()
        finally:
            cursor.close()

    def rollback(self, conn: Any, timeout: float) -> None:
        """Leave any transaction."""
        conn.rollback()

    def close(self, conn: Any, timeout: float) -> None:
        """Say goodbye to the server and close."""
        conn.close()

    def abort(self, conn: Any) -> None:
        """Cut the connection without a word, from any thread; wakes whoever is blocked in it."""
        with contextlib.suppress(Exception):  # nothing to cut
            source = self.socket_of(conn)
            if source is None:
                return
            number = source if isinstance(source, int) else source.fileno()
            with socket.socket(fileno=os.dup(number)) as twin:
                twin.shutdown(socket.SHUT_RDWR)

    def forsake(self, conn: Any) -> None:
        """In a forked child: point the inherited descriptor at nothing, so that no byte reaches the parent's socket."""
        with contextlib.suppress(Exception):  # no descriptor any more: it had been closed
            source = self.socket_of(conn)
            if source is None:
                # The interpreter's end would finalise it, and that may say goodbye on the parent's socket: never.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(conn))
                return
            number = source if isinstance(source, int) else source.fileno()
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            os.close(null)

    def is_disconnect(self, error: BaseException, conn: Any) -> bool:
        """Say whether an error of a query means that the server, or the way to it, is gone."""
        return any(_codes(cause) & self.lost_codes for cause in _causes(error))


@functools.cache
def _sqlite_own_references() -> int:
    import sqlite3  # noqa: PLC0415 - no driver is imported before its database is used

    conn, plain = sqlite3.connect(":memory:"), object()
    try:
        return max(sys.getrefcount(conn) - sys.getrefcount(plain), 0)
    finally:
        conn.close()


class SqliteDriver(Driver):
    """A library, not a server."""

    name = "sqlite"
    needs_ping = False
    closes_under_use = False  # the process crashes

    def condition(self, conn: Any) -> str | None:
        """See `Driver.condition`; a connection closed by hand raises, which is reason enough."""
        return CLEAN if conn.in_transaction else None

    def own_references(self) -> int:
        """See `Driver.own_references`: those of its cache of statements."""
        return _sqlite_own_references()

    def abort(self, conn: Any) -> None:
        """See `Driver.abort`; the statement that runs now ends with an error."""
        with contextlib.suppress(Exception):  # closed already
            conn.interrupt()


_MYSQL_LOST = frozenset({1053, 1927, 2006, 2013, 2055, 4031})


class PyMySQLDriver(Driver):
    """PyMySQL: each answer of the server carries a status with a flag for an open transaction."""

    name = "pymysql"
    lost_codes = _MYSQL_LOST
    in_transaction = 0x0001 | 0x2000  # SERVER_STATUS_IN_TRANS, SERVER_STATUS_IN_TRANS_READONLY

    def socket_of(self, conn: Any) -> Any:
        """See `Driver.socket_of`."""
        return conn._sock

    def verdict(self, conn: Any) -> str:
        """Between two commands a MySQL server only speaks to say goodbye; inside TLS it may be housekeeping."""
        return CHECK if hasattr(conn._sock, "cipher") else CLOSE

    def condition(self, conn: Any) -> str | None:
        """See `Driver.condition`."""
        if conn._sock is None:
            return "closed while in use"
        result = conn._result
        if result is not None and (result.unbuffered_active or result.has_next):
            return "returned in the middle of a result"
        return CLEAN if conn.server_status & self.in_transaction else None

    def ping(self, conn: Any, timeout: float) -> None:
        """See `Driver.ping`."""
        self._bounded(conn, timeout, lambda: conn.ping(reconnect=False))  # which is not every version's default

    def rollback(self, conn: Any, timeout: float) -> None:
        """See `Driver.rollback`."""
        self._bounded(conn, timeout, conn.rollback)

    @staticmethod
    def _bounded(conn: Any, timeout: float, call: Callable[[], Any]) -> None:
        before = conn._read_timeout
        conn._read_timeout = timeout if before is None else min(before, timeout)
        try:
            call()
        finally:
            conn._read_timeout = before

    def close(self, conn: Any, timeout: float) -> None:
        """See `Driver.close`; an already closed connection is closed."""
        result = conn._result
        if result is not None and result.unbuffered_active:
            result.unbuffered_active = False  # or a cursor that is collected later reads from the closed socket
        if conn._sock is not None:
            conn._sock.settimeout(timeout)
            conn.close()


class PsycopgDriver(Driver):
    """psycopg 3: libpq knows the state of the transaction."""

    name = "psycopg"
    closes_under_use = False  # libpq's memory is freed while psycopg's C waits for an answer: the process crashes
    lost_codes = frozenset({"57P01", "57P02", "57P03", "08000", "08003", "08006"})

    def socket_of(self, conn: Any) -> Any:
        """See `Driver.socket_of`."""
        return conn.pgconn.socket

    def verdict(self, conn: Any) -> str:
        """Read what there is: at the end of the stream libpq notices; a notice or TLS housekeeping is harmless."""
        pgconn = conn.pgconn
        try:
            pgconn.consume_input()
            pgconn.is_busy()  # parses what was read, an error that announces the end among it
            pgconn.consume_input()
        except Exception as error:  # psycopg is not imported here
            if type(error).__module__.partition(".")[0] != "psycopg":
                raise
            return CLOSE
        return CHECK if pgconn.status == 0 else CLOSE

    def condition(self, conn: Any) -> str | None:
        """See `Driver.condition`. The numbers are libpq's: 0 idle, 1 active, 2 and 3 in a transaction, 4 unknown."""
        status = conn.pgconn.transaction_status
        if status == 0:
            return None
        if status == 4:  # noqa: PLR2004
            return "closed while in use"
        return "returned in the middle of a query" if status == 1 else CLEAN

    def ping(self, conn: Any, timeout: float) -> None:
        """See `Driver.ping`. An empty query needs no transaction; `Pool.maintain` sees to the timeout."""
        conn.execute("")
        if conn.pgconn.transaction_status != 0:  # not in autocommit mode
            conn.rollback()

    def is_disconnect(self, error: BaseException, conn: Any) -> bool:
        """See `Driver.is_disconnect`."""
        return conn.pgconn.status != 0 or super().is_disconnect(error, conn)


class Psycopg2Driver(Driver):
    """psycopg2: as psycopg 3, under other names."""

    name = "psycopg2"
    lost_codes = PsycopgDriver.lost_codes

    def socket_of(self, conn: Any) -> Any:
        """See `Driver.socket_of`."""
        return conn.fileno()

    def condition(self, conn: Any) -> str | None:
        """See `PsycopgDriver.condition`."""
        status = 4 if conn.closed else conn.get_transaction_status()
        if status == 0:
            return None
        if status == 4:  # noqa: PLR2004
            return "closed while in use"
        return "returned in the middle of a query" if status == 1 else CLEAN

    def rollback(self, conn: Any, timeout: float) -> None:
        """See `Driver.rollback`; in autocommit mode ``conn.rollback()`` does nothing."""
        cursor = conn.cursor()
        cursor.execute("ROLLBACK")
        cursor.close()

    def is_disconnect(self, error: BaseException, conn: Any) -> bool:
        """See `Driver.is_disconnect`."""
        return bool(conn.closed) or super().is_disconnect(error, conn)


class MySQLClientDriver(Driver):
    """mysqlclient hides the server's status, so every return costs a ``ROLLBACK``."""

    name = "mysqlclient"
    lost_codes = _MYSQL_LOST
    tells_dirty = False
    closes_under_use = False  # it refuses

    def __init__(self) -> None:
        self._descriptors: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def socket_of(self, conn: Any) -> Any:
        """See `Driver.socket_of`; only later versions tell, and not while another thread is in a query."""
        number = self._descriptors.get(conn)
        if number is None and hasattr(conn, "fileno"):
            number = self._descriptors[conn] = conn.fileno()
        return number

    def condition(self, conn: Any) -> str | None:
        """See `Driver.condition`."""
        return CLEAN

    def ping(self, conn: Any, timeout: float) -> None:
        """See `Driver.ping`; without the deprecated ``reconnect`` argument."""
        conn.ping()


class MySQLConnectorDriver(Driver):
    """mysql-connector-python, in Python or in C; the latter has no descriptor to poll."""

    name = "mysql-connector"
    closes_under_use = False  # in C, the process crashes
    lost_codes = _MYSQL_LOST

    def socket_of(self, conn: Any) -> Any:
        """See `Driver.socket_of`."""
        return getattr(getattr(conn, "_socket", None), "sock", None)

    def condition(self, conn: Any) -> str | None:
        """See `Driver.condition`."""
        if conn.unread_result:
            return "returned in the middle of a result"
        return CLEAN if conn.in_transaction else None

    def ping(self, conn: Any, timeout: float) -> None:
        """See `Driver.ping`; it does not reconnect unless asked to."""
        conn.ping()

    def close(self, conn: Any, timeout: float) -> None:
        """See `Driver.close`; in Python it leaves the socket open where the server does not take its goodbye."""
        sock = self.socket_of(conn)
        try:
            conn.close()
        finally:
            if sock is not None:
                sock.close()

    def is_disconnect(self, error: BaseException, conn: Any) -> bool:
        """See `Driver.is_disconnect`; on a lost connection it often says no more than "not available", with the number -1."""
        if super().is_disconnect(error, conn):
            return True
        sock = self.socket_of(conn)
        if sock is not None and sock.fileno() < 0:  # it has closed it
            return True
        probe = self.probe(conn)
        if probe is None:
            return any(-1 in _codes(cause) for cause in _causes(error)) and not conn.is_connected()
        return bool(probe(0) > 0)


class MariaDBDriver(Driver):
    """MariaDB's connector, which passes the server's status on."""

    name = "mariadb"
    lost_codes = _MYSQL_LOST
    closes_under_use = False  # the process crashes

    def socket_of(self, conn: Any) -> Any:
        """See `Driver.socket_of`. Not ``conn.socket``, which would own the descriptor, and close it a second time."""
        return conn._get_socket() if hasattr(conn, "_get_socket") else None

    def condition(self, conn: Any) -> str | None:
        """See `Driver.condition`; on a closed connection asking for the status raises, which is reason enough."""
        return CLEAN if conn.server_status & PyMySQLDriver.in_transaction else None

    def ping(self, conn: Any, timeout: float) -> None:
        """See `Driver.ping`; it does not reconnect unless asked to."""
        conn.ping()


_DRIVERS: dict[str, Driver] = {
    "sqlite3": SqliteDriver(),
    "pymysql": PyMySQLDriver(),
    "psycopg": PsycopgDriver(),
    "psycopg2": Psycopg2Driver(),
    "MySQLdb": MySQLClientDriver(),
    "mysql": MySQLConnectorDriver(),
    "mariadb": MariaDBDriver(),
}
_GENERIC = Driver()


def driver_of(conn: Any) -> Driver:
    """Return the adapter for a connection, by the module of its class or of one of its bases."""
    for cls in type(conn).__mro__:
        driver = _DRIVERS.get(cls.__module__.partition(".")[0])
        if driver is not None:
            return driver
    return _GENERIC


class _Descriptor(ctypes.Structure):
    """What poll(2) takes."""

    _fields_ = (("number", ctypes.c_int), ("events", ctypes.c_short), ("found", ctypes.c_short))


_ONE = ctypes.c_ulong(1)


@functools.cache
def _poll() -> Any:
    """Return poll(2), or ``None`` where there is none; its result is above 0 if there is something to read or an end to see.

    It keeps the interpreter. ``select.poll`` gives it away, for a look that takes no time, and where threads compete for it
    gets it back only after another's turn; under gevent it switches greenlets.
    """
    return ctypes.PyDLL(None).poll if hasattr(select, "poll") else None


def _causes(error: BaseException | None) -> list[BaseException]:
    """Return an error, what it wraps as its first argument (Peewee does), and its causes."""
    found: list[BaseException] = []
    todo: list[Any] = [error]
    while todo:
        current = todo.pop()
        if isinstance(current, BaseException) and current not in found:
            found.append(current)
            todo += [current.__cause__, current.__context__, *current.args[:1]]
    return found


def _codes(error: BaseException) -> set[Any]:
    first = error.args[0] if error.args else None
    return {
        first if isinstance(first, int) else None,
        getattr(error, "errno", None),
        getattr(error, "sqlstate", None) or getattr(error, "pgcode", None),
    }


_tls_contexts: dict[Any, Any] = {}
_tls_building: dict[Any, threading.Event] = {}
TLS_PATIENCE = 2.0  # seconds for which a connect waits for another one to build their common TLS context


@functools.cache
def pymysql_connection_class() -> Any:
    """Return PyMySQL's connection class with two costs removed.

    Its ``connect`` builds a TLS context each time (20 ms of CPU and 845 kB where no option asks for TLS at all, because
    it then offers TLS to the server); ours shares one per set of options. And its ``connect_timeout`` ends with the TCP
    handshake, so a server that accepts and stays silent holds it for ever; ours covers the login too.
    """
    from pymysql.connections import Connection  # noqa: PLC0415 - no driver is imported before its database is used

    base: Any = Connection

    class PooledConnection(base):
        _read_timeout: float | None

        def _create_ssl_ctx(self, sslp: Any) -> Any:
            if not isinstance(sslp, dict):
                return super()._create_ssl_ctx(sslp)
            key = tuple(sorted((name, str(value)) for name, value in sslp.items()))
            if key not in _tls_contexts:
                mine = threading.Event()
                built = _tls_building.setdefault(key, mine)
                if built is mine:
                    try:
                        _tls_contexts[key] = super()._create_ssl_ctx(sslp)
                    finally:
                        del _tls_building[key]
                        mine.set()
                else:  # not for ever: a fork may have left the builder behind
                    built.wait(TLS_PATIENCE)
            context = _tls_contexts.get(key)
            return super()._create_ssl_ctx(sslp) if context is None else context

        def connect(self, sock: Any = None) -> None:
            before = self._read_timeout
            limits = [limit for limit in (before, self.connect_timeout) if limit is not None]
            self._read_timeout = min(limits, default=None)
            try:
                super().connect(sock)
            finally:
                self._read_timeout = before

    return PooledConnection
