"""Peewee's asyncio layer on aiosqlite, without statements that stay open.

SQLite counts a statement as running until its cursor is closed or gone, and refuses COMMIT ("SQL statements in progress") while
one that writes is. pwasyncio leaves that to the garbage: the traceback of an error, or a profiler that looks at the loop, keeps
the cursor, and the connection commits nothing for as long, in later requests too. And a connection that is closed with an open
cursor keeps its transaction, and with it the file locked for all who write.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

from playhouse import pwasyncio

if TYPE_CHECKING:
    import asyncio
    import sqlite3
    from collections.abc import Sequence


class AsyncSqliteConnection(pwasyncio.AsyncSqliteConnection):
    """A connection whose thread executes, fetches and closes in one go, whatever comes of it."""

    conn: Any
    _lock: Any
    _rows: sqlite3.Cursor | None = None  # what `iterate` reads from

    async def _execute(self, sql: str, params: Sequence[Any] | None = None) -> Any:
        return await self.conn._execute(_fetch, self.conn._conn, sql, params or ())

    async def execute_iter(self, sql: str, params: Sequence[Any] | None = None) -> Any:
        """Open a cursor, to be read in batches."""
        await self._acquire_lock()
        self._streaming = True
        try:
            cursor = await self.conn._execute(self._open, self.conn._conn, sql, params or ())
        except BaseException:
            self._done()
            raise

        async def fetch_many(count: int) -> Any:
            return await self.conn._execute(cursor.fetchmany, count)

        async def cleanup() -> None:
            try:
                if not self.stale():
                    await self.conn._execute(cursor.close)
            finally:
                self._done()

        return pwasyncio.CursorAdapter(description=cursor.description, fetch_many=fetch_many, cleanup=cleanup)

    def _open(self, raw: Any, sql: str, params: Sequence[Any]) -> Any:
        self._rows = raw.execute(sql, params)  # here, for whoever waits for it may be cancelled
        return self._rows

    def _done(self) -> None:
        self._streaming, self._rows = False, None
        self._lock.release()

    def abandon(self) -> asyncio.Future[Any] | None:
        """Close the connection at once; see `drivers.abandon`."""
        raw, self.conn = self.conn, None
        raw._conn.interrupt()
        raw._tx.put_nowait((None, functools.partial(self._roll_back, raw._conn)))
        future: asyncio.Future[Any] | None = raw.stop()
        return future

    def _roll_back(self, raw: Any) -> None:
        if self._rows is not None:
            self._rows.close()  # an interruption lasts as long as a statement is open, and would stop the ROLLBACK
        raw.rollback()


def _fetch(raw: Any, sql: str, params: Sequence[Any]) -> Any:
    with contextlib.closing(raw.execute(sql, params)) as cursor:
        rows = cursor.fetchall()
        return pwasyncio.CursorAdapter(
            rows, lastrowid=cursor.lastrowid, rowcount=cursor.rowcount, description=cursor.description
        )
