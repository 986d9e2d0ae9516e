"""sqlite3 connections that several threads may use.

SQLite serialises its own calls, but Python's module does more around them, with the GIL let go in between. A fetch that comes
to the end of a result resets the statement afterwards; since Python 3.12 another thread may have taken that statement from the
connection's cache meanwhile, and loses its rows. And an error is named by asking the connection for its latest error, which may
be another thread's by then. A frame's guard keeps two statements apart, but rows are fetched outside it.

`sqlite.py` asks for this on Python 3.12 and later. On 3.11 no rows are lost, and only the name of an error can be wrong; each
fetch would pay for that.
"""

from __future__ import annotations

import sqlite3
from _thread import RLock
from typing import Any

import peewee
from playhouse.pool import PooledDatabase

__all__ = ["share_connections"]

_Cursor: Any = sqlite3.Cursor
_Connection: Any = sqlite3.Connection


class SharedCursor(_Cursor):
    """A cursor whose calls into SQLite, and what sqlite3 does around them, are one step for all threads."""

    __slots__ = ("_lock",)

    def __init__(self, connection: SharedConnection) -> None:
        super().__init__(connection)
        self._lock = connection._lock

    def execute(self, *args: Any) -> Any:
        """See `sqlite3.Cursor.execute`."""
        with self._lock:
            return super().execute(*args)

    def executemany(self, *args: Any) -> Any:
        """See `sqlite3.Cursor.executemany`."""
        with self._lock:
            return super().executemany(*args)

    def executescript(self, *args: Any) -> Any:
        """See `sqlite3.Cursor.executescript`."""
        with self._lock:
            return super().executescript(*args)

    def fetchone(self) -> Any:
        """See `sqlite3.Cursor.fetchone`."""
        with self._lock:
            return super().fetchone()

    def fetchmany(self, *args: Any, **kwargs: Any) -> Any:
        """See `sqlite3.Cursor.fetchmany`."""
        with self._lock:
            return super().fetchmany(*args, **kwargs)

    def fetchall(self) -> Any:
        """See `sqlite3.Cursor.fetchall`."""
        with self._lock:
            return super().fetchall()

    def __next__(self) -> Any:
        with self._lock:
            return super().__next__()


class SharedConnection(_Connection):
    """A connection that makes such cursors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock = RLock()  # native under gevent too: greenlets of one thread never wait for each other here

    def cursor(self, factory: Any = SharedCursor) -> Any:
        """See `sqlite3.Connection.cursor`."""
        return super().cursor(factory)


def share_connections(database: Any) -> None:
    """Have a Peewee database open such connections, where it connects by sqlite3 and has no connection class of its own."""
    if _connects_by_sqlite3(type(database)):
        database.connect_params.setdefault("factory", SharedConnection)


def _connects_by_sqlite3(cls: Any) -> bool:
    """Return whether a database class ends up in Peewee's own connect: a class with another driver calls no ``_connect``."""
    for base in cls.__mro__:
        if base is peewee.SqliteDatabase:
            return True
        own = base.__dict__.get("_connect")
        pool = issubclass(base, PooledDatabase) and not issubclass(base, peewee.Database)  # our pool's asks its pool
        if own is not None and not pool and "_connect" not in own.__code__.co_names:
            return False
    return False
