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


_APPLICATIONS = ("flask", "quart", "sanic", "fastapi", "starlette", "falcon")


def no_database(given: Any) -> str:
    """Say of what was given in place of a database what it is, and what to give."""
    kind = given.__name__ if isinstance(given, type) else type(given).__name__
    what = f"{kind} is not a Peewee database. Pass a peewee.Database or a DatabaseProxy."
    if isinstance(given, type) and issubclass(given, peewee.Model):
        what = f"{kind} is a model, not a database. Pass its database."
    elif isinstance(given, type):
        what = f"{kind} is a class, not a database. Pass an object of it: {kind}(...)."
    elif isinstance(given, str):
        what = f"{kind} is not a Peewee database. Open a URL with peewee_frameworks.pool.connect(url)."
    elif hasattr(given, "runtime"):
        what = f"{kind} is an application's extension, not a database. Write orm.scope(), or pass orm.database."
    elif any(cls.__module__.partition(".")[0] in _APPLICATIONS for cls in type(given).__mro__):
        what = f"{kind} is an application, not a database. Give it to init_app, and the database to Peewee(...)."
    elif isinstance(getattr(given, "database", None), peewee.Database):  # FlaskDB, an older extension's
        what = f"{kind} is not a Peewee database. Pass its .database."
    return what
