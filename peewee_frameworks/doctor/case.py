"""One database of a target, and what is known of it before the server is asked."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import peewee
from playhouse.pool import PooledDatabase as PlayhousePooledDatabase

from peewee_frameworks import gevent
from peewee_frameworks.names import display_name

if TYPE_CHECKING:
    from peewee_frameworks.runtime import Runtime

    from .serving import Serving
    from .target import Target

Kind = Literal["sqlite", "mysql", "postgres", "other"]


@dataclass(frozen=True)
class PoolSettings:
    """What a database's pool is set to, whichever pool that is; times in seconds.

    Attributes:
        kind: ``ours``, ``playhouse`` (playhouse.pool), ``asyncio`` (an asynchronous driver's own), ``none``.
        size: most connections at once; None: no limit.
        timeout: how long a caller waits for one; None: not at all, infinite: for ever.
        lifetime: age after which a connection is not used again; None: no limit.
        rests: for how long a connection can rest unused without being closed or used by the pool; None: for ever.
    """

    kind: Literal["ours", "playhouse", "asyncio", "none"]
    size: int | None = None
    timeout: float | None = None
    lifetime: float | None = None
    rests: float | None = None

    @classmethod
    def of(cls, database: Any) -> PoolSettings:
        """Read the settings of a database."""
        if is_async(database):
            return cls("asyncio", database._pool_size, database._acquire_timeout, *_asyncio_ages(database))
        if (pool := getattr(database, "pool", None)) is not None:
            options = pool.options
            timeout = math.inf if options.timeout == 0 else options.timeout
            rests = [options.stale_timeout, options.keepalive]
            if not options.min_connections:  # else idle_timeout spares so many
                rests.append(options.idle_timeout)
            lifetime = options.stale_timeout or None
            return cls(
                "ours", options.max_connections or None, timeout, lifetime, min(filter(None, rests), default=None)
            )
        if isinstance(database, PlayhousePooledDatabase):
            lifetime = database._stale_timeout or None
            return cls("playhouse", database._max_connections or None, database._wait_timeout, lifetime, lifetime)
        return cls("none")

    def __str__(self) -> str:
        if self.kind == "none":
            return "no pool"
        name = {"ours": "peewee_frameworks.pool", "playhouse": "playhouse.pool", "asyncio": "asyncio pool"}[self.kind]
        return f"{name} of {self.size or 'any number of'} connections"


@dataclass(frozen=True)
class Case:
    """One database of a target."""

    alias: str
    database: Any
    target: Target
    serving: Serving

    @property
    def name(self) -> str:
        """Its class and name, without secrets."""
        return display_name(self.database)

    @property
    def runtime(self) -> Runtime | None:
        """What serves it in the application, if the target is one."""
        return self.target.runtimes.get(self.alias)

    @property
    def pool(self) -> PoolSettings:
        """The settings of its pool."""
        return PoolSettings.of(self.database)

    @property
    def size_option(self) -> str:
        """What the user sets the size of this pool with."""
        if not is_async(self.database):
            return "max_connections"
        return getattr(self.database, "size_option", "pool_size")

    @property
    def lifetime_option(self) -> str:
        """What the user sets to have this pool close a connection before the server does."""
        options = {"psycopg": "max_lifetime", "asyncpg": "max_inactive_connection_lifetime", "aiomysql": "pool_recycle"}
        return options[self.driver] if is_async(self.database) else "stale_timeout"

    @property
    def kind(self) -> Kind:
        """What sort of server it has."""
        if isinstance(self.database, peewee.SqliteDatabase):
            return "sqlite"
        if isinstance(self.database, peewee.MySQLDatabase):
            return "mysql"
        return "postgres" if isinstance(self.database, peewee.PostgresqlDatabase) else "other"

    @property
    def driver(self) -> str:
        """The module of its driver."""
        if is_async(self.database):
            if self.kind == "postgres":
                return "psycopg" if hasattr(self.database, "pool_options") else "asyncpg"
            return {"mysql": "aiomysql", "sqlite": "aiosqlite"}.get(self.kind, "")
        return gevent.driver_of(self.database)

    @property
    def params(self) -> dict[str, Any]:
        """The keywords that go to the driver."""
        return dict(dict.items(self.database.connect_params))


def _asyncio_ages(database: Any) -> tuple[float | None, float | None]:
    """Return the lifetime of an asyncio driver's connections and how long they can rest; defaults are the driver's."""
    options = getattr(database, "pool_options", None)  # AsyncPsycopgDatabase, on psycopg's own pool
    if options is not None:
        lifetime = options.get("max_lifetime", 3600.0)
        return lifetime, lifetime
    params = database.connect_params
    if isinstance(database, peewee.PostgresqlDatabase):  # asyncpg
        return None, params.get("max_inactive_connection_lifetime", 300.0) or None
    recycle = params.get("pool_recycle", -1)  # aiomysql
    return None, recycle if recycle >= 0 else None


def is_async(database: Any) -> bool:
    """Return whether a database is one of Peewee's asyncio layer."""
    pwasyncio = sys.modules.get("playhouse.pwasyncio")
    return pwasyncio is not None and isinstance(database, pwasyncio.AsyncDatabaseMixin)
