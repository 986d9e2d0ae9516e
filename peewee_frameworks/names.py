"""What databases are called in messages."""

from __future__ import annotations

from typing import Any

import peewee


def display_name(database: Any) -> str:
    """Name a database in a message: its class and database name, never user or password."""
    if database is None:
        return "a database that is gone"
    name = str(database.database)
    if isinstance(database, peewee.SqliteDatabase):
        name = name.partition("?")[0]
    elif "://" in name:  # a URL; what follows the login is no secret, and without one nobody knows what is
        name = name.rpartition("@")[2].partition("?")[0] if "@" in name else name.partition("://")[0] + "://…"
    elif "=" in name:  # libpq's keywords and values, the password perhaps among them
        name = "…"
    return f"{type(database).__name__}({name!r})"
