"""Where the database servers are, and what to do when one is not there.

PEEWEE_FRAMEWORKS_MYSQL_URL and PEEWEE_FRAMEWORKS_POSTGRES_URL name them; the user needs the right to create
databases (MariaDB) and schemas (PostgreSQL). PEEWEE_FRAMEWORKS_REQUIRE_SERVERS=1 turns the skip of a missing
server into a failure.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, Literal, get_args

import pytest
from playhouse import db_url

Kind = Literal["sqlite", "mysql", "postgres"]
KINDS: tuple[Kind, ...] = get_args(Kind)

VARIABLES = {"mysql": "PEEWEE_FRAMEWORKS_MYSQL_URL", "postgres": "PEEWEE_FRAMEWORKS_POSTGRES_URL"}
DEFAULTS = {
    "mysql": "mysql://root@127.0.0.1:3306/test",
    "postgres": "postgresql://postgres@127.0.0.1:5432/test",
}
REQUIRE = "PEEWEE_FRAMEWORKS_REQUIRE_SERVERS"
PROBE_SECONDS = 3


def server_url(kind: Kind) -> str:
    """Give the URL of the server of this kind (not sqlite)."""
    return os.environ.get(VARIABLES[kind]) or DEFAULTS[kind]


def server_kwargs(kind: Kind) -> dict[str, Any]:
    """Give the server as connection keywords: database, user, host, port and, if there is one, password."""
    kwargs: dict[str, Any] = db_url.parse(server_url(kind), unquote_password=True, unquote_user=True)
    if "passwd" in kwargs:
        kwargs["password"] = kwargs.pop("passwd")
    return kwargs


def admin_connection(kind: Kind) -> Any:
    """Open a driver connection of the test suite's own, in autocommit; the caller closes it."""
    kwargs = server_kwargs(kind)
    if kind == "mysql":
        import pymysql

        return pymysql.connect(
            autocommit=True,
            connect_timeout=PROBE_SECONDS,
            read_timeout=30,
            program_name="tests-admin",
            init_command="SET lock_wait_timeout=10",
            **kwargs,
        )
    import psycopg

    return psycopg.connect(
        dbname=kwargs.pop("database"),
        autocommit=True,
        connect_timeout=PROBE_SECONDS,
        application_name="tests-admin",
        options="-c statement_timeout=30s -c lock_timeout=10s -c client_min_messages=warning",
        **kwargs,
    )


@cache
def unreachable(kind: Kind) -> str | None:
    """Give the reason why no server of this kind can be used, or None if one can; asked once per process."""
    if kind == "sqlite":
        return None
    try:
        admin_connection(kind).close()
    except Exception as error:
        return f"no {kind} server for the tests ({VARIABLES[kind]} names one): {type(error).__name__}: {error}"
    return None


def require_server(kind: Kind) -> None:
    """Skip the running test if there is no such server; fail it if servers are required."""
    reason = unreachable(kind)
    if reason is None:
        return
    if os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{reason} ({REQUIRE}=1)", pytrace=False)
    pytest.skip(reason)
