"""A connection pool for Peewee that serves threads, greenlets and tasks from one queue.

The drop-in for ``playhouse.pool``: change one import. Importing this imports no driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from playhouse.pool import MaxConnectionsExceeded

from .database import PooledDatabase, PooledMySQLDatabase, PooledPostgresqlDatabase, PooledSqliteDatabase
from .events import EVENTS
from .options import PoolOptions
from .pool import Pool
from .stats import Histogram, PoolStats
from .urls import connect, register_urls

if TYPE_CHECKING:
    from .extensions import (
        PooledCockroachDatabase,
        PooledMariaDBConnectorDatabase,
        PooledMySQLConnectorDatabase,
        PooledPostgresqlExtDatabase,
        PooledPsycopg3Database,
    )

__all__ = [
    "EVENTS",
    "Histogram",
    "MaxConnectionsExceeded",
    "Pool",
    "PoolOptions",
    "PoolStats",
    "PooledCockroachDatabase",
    "PooledDatabase",
    "PooledMariaDBConnectorDatabase",
    "PooledMySQLConnectorDatabase",
    "PooledMySQLDatabase",
    "PooledPostgresqlDatabase",
    "PooledPostgresqlExtDatabase",
    "PooledPsycopg3Database",
    "PooledSqliteDatabase",
    "connect",
    "register_urls",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import extensions  # noqa: PLC0415 - imports every driver there is

    return getattr(extensions, name)
