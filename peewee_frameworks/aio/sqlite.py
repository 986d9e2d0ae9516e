"""Peewee's asyncio layer on aiosqlite, without statements that stay open.

SQLite counts a statement as running until its cursor is closed or gone, and refuses COMMIT ("SQL statements in progress") while
one that writes is. pwasyncio leaves that to the garbage: the traceback of an error, or a profiler that looks at the loop, keeps
the cursor, and the connection commits nothing for as long, in later requests too.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from playhouse import pwasyncio

if TYPE_CHECKING:
    from collections.abc import Sequence


class AsyncSqliteConnection(pwasyncio.AsyncSqliteConnection):
    """A connection whose thread executes, fetches and closes in one go, whatever comes of it."""

    conn: Any

    async def _execute(self, sql: str, params: Sequence[Any] | None = None) -> Any:
        return await self.conn._execute(_fetch, self.conn._conn, sql, params or ())


def _fetch(raw: Any, sql: str, params: Sequence[Any]) -> Any:
    with contextlib.closing(raw.execute(sql, params)) as cursor:
        rows = cursor.fetchall()
        return pwasyncio.CursorAdapter(
            rows, lastrowid=cursor.lastrowid, rowcount=cursor.rowcount, description=cursor.description
        )
