"""Native asyncio: Peewee's asyncio layer (`playhouse.pwasyncio`) under the same scope, and databases for it.

Any pwasyncio database may be given to an adapter or to `connection_scope`. `AsyncPsycopgDatabase` is one more, on
`psycopg_pool.AsyncConnectionPool`. Importing this package imports neither pwasyncio nor a driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .models import AsyncModel, AsyncModelMixin

if TYPE_CHECKING:
    from .psycopg import AsyncPsycopgDatabase

__all__ = ["AsyncModel", "AsyncModelMixin", "AsyncPsycopgDatabase"]


def __getattr__(name: str) -> Any:
    if name == "AsyncPsycopgDatabase":
        from .psycopg import AsyncPsycopgDatabase  # noqa: PLC0415 - needs psycopg and its pool

        return AsyncPsycopgDatabase
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
