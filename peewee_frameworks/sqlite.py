"""SQLite, whose connections a driver may bind to one thread, and whose in-memory databases are one connection's each."""

from __future__ import annotations

import sys
from typing import Any

import peewee
from playhouse.pool import PooledDatabase as PlayhousePooledDatabase

from .errors import ConfigurationError
from .names import display_name


def is_in_memory(database: Any) -> bool:
    """Return whether each connection to the SQLite database would be a database of its own."""
    if not isinstance(database, peewee.SqliteDatabase) or database.deferred:
        return False
    name = str(database.database)
    private = name == ":memory:" or name.startswith("file::memory:") or "mode=memory" in name
    return private and "cache=shared" not in name


def is_other_sqlite(database: Any) -> bool:
    """Return whether it has a driver of its own, which binds no connection to a thread."""
    return any(cls.__module__ in ("playhouse.apsw_ext", "playhouse.cysqlite_ext") for cls in type(database).__mro__)


def prepare_sqlite(database: Any, *, in_block: bool) -> None:
    """Make the connections usable from any thread: a request's connection follows it, one user at a time.

    Args:
        database: the database.
        in_block: whether the calling thread is in a ``with database`` block.

    Raises: `ConfigurationError` where that cannot be.
    """
    name = display_name(database)
    if is_in_memory(database) and getattr(database, "_max_connections", None) != 1:
        raise ConfigurationError(
            f"{name}: each connection to an in-memory SQLite database is a database of its own, so each request would see "
            "an empty one. Use a file, or a pooled database with max_connections=1."
        )
    if is_other_sqlite(database):
        return  # these drivers do not bind a connection to a thread
    # Not pysqlite3's, which Peewee prefers where there is one.
    if sys.version_info >= (3, 12) and vars(peewee)["sqlite3"].__name__ == "sqlite3":
        from .shared_sqlite import share_connections  # noqa: PLC0415 - there are Pythons without sqlite3

        share_connections(database)
    if database.connect_params.get("check_same_thread"):
        raise ConfigurationError(
            f"{name}: check_same_thread=True binds a connection to one thread, but a request may go on in another. "
            "Remove it; the scope itself refuses two users at once."
        )
    if "check_same_thread" in database.connect_params:
        return
    pooled = isinstance(database, PlayhousePooledDatabase)
    in_use = not database.is_closed()
    if in_use and (in_block or database.in_transaction()):
        raise ConfigurationError(
            f"{name}: a block is open on a connection that is bound to this thread. Set the database up before it is first "
            "used, or create it with check_same_thread=False."
        )
    if is_in_memory(database) and (in_use or database._connections):
        raise ConfigurationError(
            f"{name}: its one connection was opened bound to this thread, and to open another would lose the data. Set the "
            "database up before it is first used, or create it with check_same_thread=False."
        )
    if in_use:
        database.close()
    if pooled:
        database.close_idle()  # opened before, so bound to the thread that opened them
    database.connect_params["check_same_thread"] = False
