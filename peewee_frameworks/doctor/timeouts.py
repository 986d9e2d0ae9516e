"""What bounds a wait for a server that does not answer: each driver has its own words for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .report import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .case import Case

PSYCOPG_DEFAULT = 130
"""Seconds of psycopg 3's connect timeout: `psycopg.conninfo._DEFAULT_CONNECT_TIMEOUT`."""

LONGEST_KEEPALIVE = 600
"""Seconds of rest after which TCP asks at the latest whether the other side is still there, for it to be of use."""

_LIBPQ = ("psycopg", "psycopg2")
_READ_TIMEOUT = ("pymysql", "MySQLdb", "mysql.connector", "mysql.connector (pure)", "mariadb")


def findings(case: Case) -> Iterator[Finding]:
    """Find missing timeouts; over a socket of this machine's file system nothing gets lost."""
    if case.kind in ("mysql", "postgres") and not _is_local(case):
        yield from _connect(case)
        yield from _read(case)


def _connect(case: Case) -> Iterator[Finding]:
    # Our pool bounds the connect itself; PyMySQL, aiomysql and asyncpg have a bound by default.
    if case.driver not in _LIBPQ or case.pool.kind in ("ours", "asyncio") or _has(case, "connect_timeout"):
        return
    if os.environ.get("PGCONNECT_TIMEOUT"):
        return
    patience = f"{PSYCOPG_DEFAULT} s" if case.driver == "psycopg" else "for ever"
    stuck = (
        "; playhouse.pool holds its lock meanwhile, so all other requests of the worker stand still too"
        if case.pool.kind == "playhouse"
        else ""
    )
    yield Finding(
        "connect-timeout",
        "warning",
        "connect_timeout is not set.",
        f"If the server's machine does not answer, a connect waits {patience}{stuck}.",
        "connect_timeout=5 among the database's keywords (seconds)",
    )


def _read(case: Case) -> Iterator[Finding]:
    gone = (
        "If the server's machine or the network in between goes away without a word, as in a failover, a query waits "
    )
    if case.driver in _READ_TIMEOUT and not _has(case, "read_timeout"):
        login = ", and so does a login" if case.driver == "pymysql" and case.pool.kind != "ours" else ""
        what, option = (
            "read_timeout is not set.",
            "read_timeout=30, write_timeout=30 (seconds; more than the slowest query takes)",
        )
        why = f"{gone}until the kernel gives up, {_kernel()}{login}. Each such request keeps its connection and its thread."
    elif case.driver == "asyncpg" and not _has(case, "command_timeout"):
        what, option = "command_timeout is not set.", "command_timeout=30 (seconds; more than the slowest query takes)"
        why = f"{gone}until the kernel gives up, {_kernel()}. Each such request keeps its connection."
    elif case.driver in _LIBPQ and _keepalive_time() > LONGEST_KEEPALIVE and not _has(case, "keepalives_idle"):
        what = f"keepalives_idle is not set, and this system's is {_keepalive_time():g} s."
        option = (
            "keepalives_idle=30, keepalives_interval=10, keepalives_count=3 among the database's keywords; and a "
            "statement_timeout against queries that are merely slow"
        )
        why = f"{gone}until TCP asks for it, {_kernel()}. Each such request keeps its connection and its thread."
    else:
        return
    yield Finding("read-timeout", "warning", what, why, option)


def _has(case: Case, option: str) -> bool:
    if case.params.get(option):
        return True
    # libpq takes a connection string in several places.
    text = " ".join(
        str(each or "") for each in (case.database.database, case.params.get("dsn"), case.params.get("conninfo"))
    )
    return f"{option}=" in text


def _is_local(case: Case) -> bool:
    if case.params.get("unix_socket"):
        return True
    if case.kind != "postgres" or "://" in str(case.database.database) or case.params.get("dsn"):
        return False
    host = str(case.params.get("host") or os.environ.get("PGHOST", ""))
    return case.driver in _LIBPQ and (not host or host.startswith(("/", "@")))


def _keepalive_time() -> float:
    try:
        return float(Path("/proc/sys/net/ipv4/tcp_keepalive_time").read_text(encoding="ascii"))
    except OSError:
        return 7200.0  # what RFC 1122 asks for, and most systems have


def _kernel() -> str:
    return f"which may be {_keepalive_time() / 3600:.0f} hours" if _keepalive_time() >= 3600 else "minutes later"  # noqa: PLR2004
