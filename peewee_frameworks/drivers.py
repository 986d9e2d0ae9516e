"""What the drivers can tell about a connection without a round trip."""

from __future__ import annotations

from typing import Any

# PyMySQL and mysqlclient keep the status flags of the server's last reply: MySQL's protocol, "Server Status Flags".
_SERVER_STATUS_IN_TRANS = 0x0001


def is_clean(conn: Any) -> bool:
    """Return True if the driver can tell, without a round trip, that no transaction is open on `conn`."""
    in_transaction = getattr(conn, "in_transaction", None)  # sqlite3
    if isinstance(in_transaction, bool):
        return not in_transaction
    status = getattr(conn, "server_status", None)  # PyMySQL
    if isinstance(status, int):
        return not status & _SERVER_STATUS_IN_TRANS
    pgconn = getattr(conn, "pgconn", None)  # psycopg: 0 is IDLE
    if pgconn is not None:
        return bool(pgconn.transaction_status == 0)
    return False
