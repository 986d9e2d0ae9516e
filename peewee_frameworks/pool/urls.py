"""Databases from URLs: ``mysql+pool://…``, ``postgresql+pool://…``, ``sqlite+pool:///…`` and the like.

``playhouse.db_url`` keeps its own table; importing this package does not change what others get from it. Use our
`connect`, or say once that all shall have our classes: `register_urls`.
"""

from __future__ import annotations

from typing import Any

from peewee_frameworks.aio import urls as asynchronous
from peewee_frameworks.config import split_url
from peewee_frameworks.errors import ConfigurationError
from peewee_frameworks.spelling import DISTANTLY, nearly

from . import database as databases

__all__ = ["SCHEMES", "connect", "register_urls"]

_CLASSES = {
    "mysql": "PooledMySQLDatabase",
    "postgres": "PooledPostgresqlDatabase",
    "postgresql": "PooledPostgresqlDatabase",
    "sqlite": "PooledSqliteDatabase",
    "psycopg3": "PooledPsycopg3Database",
    "cockroachdb": "PooledCockroachDatabase",
    "crdb": "PooledCockroachDatabase",
    "mariadbconnector": "PooledMariaDBConnectorDatabase",
    "mysqlconnector": "PooledMySQLConnectorDatabase",
    "postgresext": "PooledPostgresqlExtDatabase",
    "postgresqlext": "PooledPostgresqlExtDatabase",
}

SCHEMES = frozenset(f"{scheme}+pool" for scheme in _CLASSES)
"""The schemes of our pooled databases."""


# What other libraries' URLs begin with, or others call a server.
_ELSEWHERE = {
    "mariadb": "mysql+pool",
    "maria": "mysql+pool",
    "sqlite3": "sqlite+pool",
    "psycopg": "psycopg3+pool",
    "pgsql": "postgresql+pool",
    "mysql+aiomysql": "mysql+async",
    "mysql+asyncmy": "mysql+async",
    "sqlite+aiosqlite": "sqlite+async",
    "postgres+asyncpg": "postgresql+asyncpg",
    "postgresql+psycopg_async": "postgresql+async",
}


def suggest(scheme: str) -> str:
    """Return what to write in place of an unknown scheme, as a sentence; nothing if nobody knows."""
    base = scheme.partition("+")[0]
    meant = _ELSEWHERE.get(scheme) or _ELSEWHERE.get(base)
    if meant is None:
        close = nearly(base, _CLASSES, DISTANTLY)
        meant = close and f"{close}+pool"
    return "" if meant is None else f" Did you mean {meant}?"


def connect(url: str, **options: Any) -> Any:
    """Make a pooled database from a URL, with or without ``+pool`` in its scheme; ``+async`` makes an asynchronous one.

    User and password are percent-decoded. The query may hold pool options and driver arguments. With ``postgresql+async``
    (psycopg), ``postgresql+asyncpg``, ``mysql+async`` (aiomysql) and ``sqlite+async`` (aiosqlite), ``max_connections`` and
    ``timeout`` mean what they mean to a pool of ours; the other options are those of the asynchronous database.

    Args:
        url: for example ``mysql+pool://user:secret@host/shop?max_connections=32&timeout=5``.
        options: more of the same, which win.

    Raises:
        ConfigurationError: the URL is malformed, its scheme unknown, or the name of the database is missing.
    """
    from playhouse import db_url  # noqa: PLC0415 - imports every driver there is

    given: Any = url
    if not isinstance(given, str) or not given:
        raise ConfigurationError(
            f"A database URL must be a string such as mysql+pool://user@host/name, not {given!r}. Is its environment "
            "variable set?"
        )
    scheme = split_url(url).scheme
    name = _CLASSES.get(scheme.removesuffix("+pool"))
    if name is None and scheme not in asynchronous.SCHEMES:
        known = ", ".join([*(f"{each}[+pool]" for each in _CLASSES), *sorted(asynchronous.SCHEMES)])
        raise ConfigurationError(
            f"There is no pooled database for the URL scheme {scheme!r}.{suggest(scheme)} There are {known}."
        )
    kwargs = db_url.parse(url, unquote_password=True, unquote_user=True)
    if "passwd" in kwargs:
        kwargs["password"] = kwargs.pop("passwd")
    kwargs.update(options)
    if not kwargs.get("database"):
        raise ConfigurationError(f"The {scheme} URL names no database: {scheme}://host/name, or {scheme}:///name.")
    return asynchronous.make(scheme, kwargs) if name is None else _class(name)(**kwargs)


def register_urls() -> None:
    """Make ``playhouse.db_url.connect`` return our classes for the ``…+pool`` schemes, for the whole process."""
    from playhouse import db_url  # noqa: PLC0415 - imports every driver there is

    for scheme, name in _CLASSES.items():
        if f"{scheme}+pool" in db_url.schemes:
            db_url.register_database(_class(name), f"{scheme}+pool")


def _class(name: str) -> Any:
    if hasattr(databases, name):
        return getattr(databases, name)
    from . import extensions  # noqa: PLC0415 - imports every driver there is

    return getattr(extensions, name)
