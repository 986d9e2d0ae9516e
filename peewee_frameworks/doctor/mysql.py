"""MySQL and MariaDB: what the server is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .server import Limit, Timeout

if TYPE_CHECKING:
    from .case import Case
    from .server import Server

_VARIABLES = (
    "hostname",
    "idle_transaction_timeout",  # MariaDB only
    "max_connections",
    "max_user_connections",
    "port",
    "version",
    "wait_timeout",
)


def read(case: Case, server: Server) -> None:
    """Read the variables of this session: its own timeouts, and the limit of its account (``max_user_connections``)."""
    execute = case.database.execute_sql
    names = ", ".join(f"'{name}'" for name in _VARIABLES)
    found = dict(execute(f"SHOW SESSION VARIABLES WHERE Variable_name IN ({names})").fetchall())
    status = dict(execute("SHOW SESSION STATUS WHERE Variable_name IN ('Ssl_version', 'Ssl_cipher')").fetchall())
    user = execute("SELECT CURRENT_USER()").fetchone()[0]

    version = found.get("version", "")
    server.version = f"{'MariaDB' if 'mariadb' in version.lower() else 'MySQL'} {version.partition('-')[0]}"
    server.tls = f"{status['Ssl_version']} {status['Ssl_cipher']}" if status.get("Ssl_cipher") else ""
    # A proxy such as ProxySQL may know less than a server.
    server.rest = _timeout(found, "wait_timeout")
    server.transaction_rest = _timeout(found, "idle_transaction_timeout")
    place = ("mysql", found.get("hostname"), found.get("port"))
    if limit := int(found.get("max_connections", 0)):
        server.limits.append(Limit(place, limit, "max_connections"))
    if own := int(found.get("max_user_connections", 0)):
        server.limits.append(Limit((*place, user), own, f"max_user_connections of {user}"))


def _timeout(found: dict[str, str], name: str) -> Timeout | None:
    return Timeout(name, int(found[name])) if name in found else None
