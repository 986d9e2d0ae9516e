"""Asynchronous databases from URLs: ``postgresql+async://…``, ``postgresql+asyncpg://…``, ``mysql+async://…``, ``sqlite+async://…``.

What the application says of its pool goes by the sync pools' names, so that a URL is all that changes between drivers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peewee_frameworks.errors import ConfigurationError
from peewee_frameworks.spelling import nearly
from peewee_frameworks.state import install

if TYPE_CHECKING:
    from collections.abc import Callable

_ASYNCPG_OPTIONS = frozenset(
    {
        "command_timeout",
        "database",
        "direct_tls",
        "host",
        "isolation_level",
        "max_cacheable_statement_size",
        "max_cached_statement_lifetime",
        "passfile",
        "password",
        "port",
        "server_settings",
        "ssl",
        "statement_cache_size",
        "target_session_attrs",
        "user",
        # pwasyncio's
        "acquire_timeout",
        "autoconnect",
        "pool_min_size",
        "pool_size",
    }
)


def _psycopg(options: dict[str, Any]) -> Any:
    from .psycopg import AsyncPsycopgDatabase  # noqa: PLC0415 - needs psycopg and its pool

    return AsyncPsycopgDatabase(**options)


def _asyncpg(options: dict[str, Any]) -> Any:
    from playhouse.pwasyncio import AsyncPostgresqlDatabase  # noqa: PLC0415 - needs greenlet

    # As in a URL of asyncpg's own: what it does not know is a setting of the session, application_name for example.
    settings = {name: str(options.pop(name)) for name in options.keys() - _ASYNCPG_OPTIONS}
    if settings:
        options["server_settings"] = {**options.get("server_settings", {}), **settings}
    return AsyncPostgresqlDatabase(**options)


def _aiomysql(options: dict[str, Any]) -> Any:
    from playhouse.pwasyncio import AsyncMySQLDatabase  # noqa: PLC0415 - needs greenlet

    return AsyncMySQLDatabase(**options)


def _aiosqlite(options: dict[str, Any]) -> Any:
    from playhouse.pwasyncio import AsyncSqliteDatabase  # noqa: PLC0415 - needs greenlet

    return AsyncSqliteDatabase(**options)


# Scheme: what makes its database, and what that calls the largest number of connections.
_MAKERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "postgresql+async": (_psycopg, "max_size"),
    "postgres+async": (_psycopg, "max_size"),
    "postgresql+asyncpg": (_asyncpg, "pool_size"),
    "postgres+asyncpg": (_asyncpg, "pool_size"),
    "mysql+async": (_aiomysql, "pool_size"),
    "sqlite+async": (_aiosqlite, "pool_size"),
}

SCHEMES = frozenset(_MAKERS)
"""The schemes of asynchronous databases."""


def make(scheme: str, options: dict[str, Any]) -> Any:
    """Make the database of a scheme, ready for use.

    Args:
        scheme: one of `SCHEMES`.
        options: what the URL says and the caller adds. ``max_connections`` and ``timeout`` (seconds to wait for a connection)
            mean here what they mean to `peewee_frameworks.pool`; the rest are the database's own.

    Raises: `ConfigurationError` if an option is given under both of its names, one of these two is misspelled or no number, or
        what the driver needs is not installed.
    """
    maker, size = _MAKERS[scheme]
    options = dict(options)
    for ours, theirs in (("max_connections", size), ("timeout", "acquire_timeout")):
        if ours in options:
            if theirs in options:
                raise ConfigurationError(f"{ours} and {theirs} mean the same: give one of them.")
            if not isinstance(options[ours], int | float):
                raise ConfigurationError(f"{ours} must be a number, not {options[ours]!r}.")
            options[theirs] = options.pop(ours)
        elif given := nearly(ours, options):
            raise ConfigurationError(f"Unknown option {given}. Did you mean {ours}?")
    try:
        database = maker(options)
    except ImportError as error:
        raise ConfigurationError(
            f"The URL scheme {scheme} needs a package that is not installed: {error}. It comes with "
            "pip install 'peewee-frameworks[async]', for psycopg alone with [async-postgres]."
        ) from error
    install(database)
    return database
