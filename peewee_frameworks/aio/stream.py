"""Rows read from a server-side cursor, a batch at a time."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

from playhouse.pwasyncio import greenlet_spawn

from peewee_frameworks.errors import TransactionLost

from .keeper import wrapping_errors

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from .frame import AsyncFrame


class Rows:
    """What `iterate` returns: an asynchronous iterator over the rows of a query.

    While it is open the connection serves nothing else in its scope. A loop that is left early and drops it frees the
    connection for the next query; to be sure, write ``async with aclosing(db.iterate(query)) as rows:``.
    """

    def __init__(self, database: Any, query: Any, buffer_size: int | None) -> None:
        self._database = database
        self._query = query
        self._size = buffer_size
        self._frame: AsyncFrame | None = None
        self._conn: Any = None
        self._cursor: Any = None
        self._source: Any = None
        self._batch: list[Any] = []
        self._finished = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if not self._batch:
            if not self._finished:
                await self._fetch()
            if not self._batch:
                await self.aclose()
                raise StopAsyncIteration
        return self._batch.pop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _fetch(self) -> None:
        database = self._database
        frame = self._frame = self._frame or database._state.record()
        await frame.take(self)
        try:
            if self._cursor is None:
                await self._open(frame)
            self._check(frame)
            size = self._cursor._buffer_size
            batch = await frame.attempt(self._conn, greenlet_spawn(list, itertools.islice(self._source, size)))
            self._batch = batch[::-1]
        except BaseException:
            self._finished = True
            raise
        finally:
            frame.leave()

    def _check(self, frame: AsyncFrame) -> None:
        if frame.conn is not self._conn:
            raise frame.lost()
        if frame.stream is None or frame.stream[0]() is not self:
            raise TransactionLost(
                f"{frame.state.name}: rows of `iterate()` end with the transaction in which it was called, and that was rolled "
                "back. Leave the loop over them, or run the query again."
            )

    async def _open(self, frame: AsyncFrame) -> None:
        sql, params = self._query.sql()
        conn = self._conn = await self._database._connected(frame)
        with wrapping_errors:
            cursor = await frame.attempt(conn, conn.execute_iter(sql, params or ()))
        if self._size is not None:
            cursor._buffer_size = self._size
        self._cursor = cursor
        self._source = self._query._get_cursor_wrapper(cursor).iterator()
        frame.stream = (weakref.ref(self), cursor)

    async def aclose(self) -> None:
        """Close the cursor; the connection is free for other queries again."""
        self._finished = True
        self._batch = []
        frame, cursor = self._frame, self._cursor
        if frame is None or cursor is None or frame.stream is None or frame.stream[0]() is not self:
            return
        await frame.take(self)
        try:
            frame.stream = None
            with wrapping_errors:
                await frame.attempt(self._conn, cursor.aclose())
        finally:
            frame.leave()
