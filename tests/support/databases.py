"""A place of its own for each test's data, and the sessions that the server sees there.

A place is an SQLite file, a MariaDB database or a PostgreSQL schema with an application_name of the same
name. So tests that run at the same time do not meet, and a session on the server tells which test opened it:
the proof of a leak does not rest on what a pool says about itself.
"""

from __future__ import annotations

import re
import secrets
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from playhouse.pool import PooledMySQLDatabase, PooledPostgresqlDatabase, PooledSqliteDatabase

from tests.support.concurrency import eventually
from tests.support.servers import Kind, admin_connection, server_kwargs

if TYPE_CHECKING:
    from collections.abc import Iterator

POOLED = {"sqlite": PooledSqliteDatabase, "mysql": PooledMySQLDatabase, "postgres": PooledPostgresqlDatabase}
SCHEMES = {"sqlite": "sqlite", "mysql": "mysql", "postgres": "postgresql"}
# What our URLs call the asynchronous drivers, and the kind of database that each is for.
ASYNC_DRIVERS: dict[str, tuple[str, Kind]] = {
    "psycopg": ("postgresql+async", "postgres"),
    "asyncpg": ("postgresql+asyncpg", "postgres"),
    "aiomysql": ("mysql+async", "mysql"),
    "aiosqlite": ("sqlite+async", "sqlite"),
}

MYSQL_SESSIONS = """
    SELECT id, command, info FROM information_schema.processlist
    WHERE db = %s AND command <> 'Killed' ORDER BY id
"""
POSTGRES_SESSIONS = """
    SELECT pid, state, query, state <> 'idle' AND xact_start IS NOT NULL FROM pg_stat_activity
    WHERE application_name = %s ORDER BY pid
"""
# information_schema.innodb_trx is a snapshot that may be old; the status text is not.
MYSQL_TRANSACTION = re.compile(
    r"^---TRANSACTION [^\n]*, ACTIVE (?:(?!^---).)*?thread id (\d+),", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Session:
    """One connection as the server sees it; for SQLite one open descriptor of the file, id = (pid, fd)."""

    id: Any
    state: str = ""
    in_transaction: bool = False
    query: str | None = None


@dataclass(frozen=True)
class Place:
    """Where one test's tables live; `tag` names the file, database or schema."""

    kind: Kind
    tag: str
    database: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        """Where the server listens (not for SQLite)."""
        return self.kwargs["host"], self.kwargs["port"]

    @property
    def url(self) -> str:
        """The URL of the unpooled database, as playhouse.db_url and DATABASE_URL take it."""
        return self._url(SCHEMES[self.kind], {})

    def pool_url(self, **options: Any) -> str:
        """Give the URL of the stock pooled database, pool options in its query string."""
        return self._url(f"{SCHEMES[self.kind]}+pool", options)

    def async_url(self, driver: str, **options: Any) -> str:
        """Give the URL for an asynchronous driver, one of `ASYNC_DRIVERS`, as our `connect` takes it."""
        return self._url(ASYNC_DRIVERS[driver][0], options)

    def _url(self, scheme: str, options: dict[str, Any]) -> str:
        login = {"user", "password", "host", "port"}
        query = {key: value for key, value in self.kwargs.items() if key not in login} | options
        if scheme == "postgresql+asyncpg":  # which does not read libpq's `options`
            query["search_path"] = query.pop("options").rpartition("=")[2]
        if self.kind == "sqlite":
            if "async" not in scheme:
                query.setdefault("check_same_thread", "false")
            netloc = ""
        else:
            user, password = self.kwargs.get("user", ""), self.kwargs.get("password")
            secret = f":{quote(password, safe='')}" if password else ""
            netloc = f"{quote(user, safe='')}{secret}@{self.kwargs['host']}:{self.kwargs['port']}"
        text = urlencode(query, quote_via=quote)
        return f"{scheme}://{netloc}/{self.database}" + (f"?{text}" if text else "")

    def via(self, host: str, port: int) -> Place:
        """Give the same place reached through another address: a proxy."""
        return replace(self, kwargs=self.kwargs | {"host": host, "port": port})

    def connect_kwargs(self) -> dict[str, Any]:
        """Give the keywords that any Peewee database of this kind takes beside the database's name."""
        return dict(self.kwargs)

    def make_database(self, **options: Any) -> Any:
        """Make a stock playhouse.pool database: 5 connections, 10 seconds to wait, unless told otherwise."""
        options = {"max_connections": 5, "timeout": 10, **self.kwargs, **options}
        if self.kind == "sqlite":
            options = {"check_same_thread": False, "pragmas": {"journal_mode": "wal"}, **options}
        elif self.kind == "postgres":
            options = {"prefer_psycopg3": True, **options}
        return POOLED[self.kind](self.database, **options)

    def sessions(self) -> list[Session]:
        """List who is connected to this place, whatever process or pool opened it."""
        if self.kind == "sqlite":
            return self.descriptors()
        with closing(admin_connection(self.kind)) as connection, closing(connection.cursor()) as cursor:
            if self.kind == "postgres":
                cursor.execute(POSTGRES_SESSIONS, [self.tag])
                return [Session(pid, state or "", bool(busy), query) for pid, state, query, busy in cursor]
            cursor.execute("SHOW ENGINE INNODB STATUS")
            busy_ids = {int(number) for number in MYSQL_TRANSACTION.findall(cursor.fetchone()[2])}
            cursor.execute(MYSQL_SESSIONS, [self.tag])
            return [Session(key, command, key in busy_ids, query) for key, command, query in cursor]

    def descriptors(self, suffix: str = "") -> list[Session]:
        """List the open descriptors of an SQLite file, or of one beside it, in all processes."""
        return list(_descriptors(Path(self.database + suffix)))

    def kill_sessions(self, *ids: Any) -> int:
        """End these sessions on the server, or all; give how many there were. Returns when they are gone."""
        if self.kind == "sqlite":
            raise NotImplementedError("nobody can end an SQLite session from outside")
        victims = [session.id for session in self.sessions() if not ids or session.id in ids]
        with closing(admin_connection(self.kind)) as connection, closing(connection.cursor()) as cursor:
            for victim in victims:
                if self.kind == "postgres":
                    cursor.execute("SELECT pg_terminate_backend(%s)", [victim])
                    continue
                try:
                    cursor.execute("KILL CONNECTION %s", [victim])
                except Exception as error:
                    if error.args[0] != 1094:  # "Unknown thread id": it left by itself
                        raise
        eventually(
            lambda: not {session.id for session in self.sessions()} & set(victims),
            message="killed sessions still live",
        )
        return len(victims)


def _descriptors(path: Path) -> Iterator[Session]:
    """Find the open descriptors of a file in all our processes; needs Linux's /proc."""
    wanted = str(path.resolve())
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            for descriptor in (process / "fd").iterdir():
                if str(descriptor.readlink()) == wanted:
                    yield Session((int(process.name), int(descriptor.name)))
        except OSError:  # the process or the descriptor has gone, or belongs to somebody else
            continue


@contextmanager
def scratch(kind: Kind, directory: Path) -> Iterator[Place]:
    """Make a place for one test and take it away at the end, with every session that is still there."""
    tag = f"pf_test_{secrets.token_hex(6)}"
    if kind == "sqlite":
        yield Place(kind, tag, str(directory / f"{tag}.db"))
        return
    kwargs = server_kwargs(kind)
    if kind == "mysql":
        kwargs.pop("database")
        place = Place(kind, tag, tag, kwargs)
        create, drop = f"CREATE DATABASE {tag}", f"DROP DATABASE {tag}"
    else:
        database = kwargs.pop("database")
        place = Place(kind, tag, database, kwargs | {"application_name": tag, "options": f"-c search_path={tag}"})
        create, drop = f"CREATE SCHEMA {tag}", f"DROP SCHEMA {tag} CASCADE"
    _administer(kind, create)
    try:
        yield place
    finally:
        place.kill_sessions()
        _administer(kind, drop)


def _administer(kind: Kind, statement: str) -> None:
    with closing(admin_connection(kind)) as connection, closing(connection.cursor()) as cursor:
        cursor.execute(statement)
