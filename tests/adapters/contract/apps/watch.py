"""Who has which connection: what the contract's databases note of every statement."""

from __future__ import annotations

import contextlib
import contextvars
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

actor: contextvars.ContextVar[str | None] = contextvars.ContextVar("contract_actor", default=None)


@contextlib.contextmanager
def acting(rid: str) -> Iterator[None]:
    """Say who runs the statements in this block."""
    token = actor.set(rid)
    try:
        yield
    finally:
        actor.reset(token)


def in_transaction(conn: Any) -> bool:
    """Ask the driver."""
    if hasattr(conn, "is_in_transaction"):  # asyncpg
        return bool(conn.is_in_transaction())
    if hasattr(conn, "in_transaction"):
        return bool(conn.in_transaction)
    if hasattr(conn, "pgconn"):
        return bool(conn.pgconn.transaction_status != 0)
    if hasattr(conn, "get_transaction_status"):  # aiomysql
        return bool(conn.get_transaction_status())
    return bool(conn.server_status & 1)


@dataclass
class _Out:
    """A connection that is out of its pool."""

    conn: Any
    user: str | None = None
    running: str | None = None
    busy: bool = False


class Watch:
    """Beside an asynchronous database: watches who has which connection. How many are out, its pool says itself."""

    def __init__(self, database: Any) -> None:
        self._database = database
        self._out: dict[int, _Out] = {}
        self._acquire, self._release = database._pool_acquire, database._pool_release
        self.violations: list[str] = []
        self.peak = 0
        database._pool_acquire, database._pool_release = self._watched_acquire, self._watched_release

    async def _watched_acquire(self, pool: Any) -> Any:
        conn = await self._acquire(pool)
        raw = conn.conn
        key = id(getattr(raw, "_con", raw))  # asyncpg has a new proxy each time
        before = self._out.get(key)
        if before is not None and before.conn is not conn and not before.conn.stale():
            self.violations.append(f"handed out while {before.user} holds it")
        if in_transaction(raw):
            self.violations.append("handed out with a transaction open")
        out = self._out[key] = _Out(conn)
        self._forget_the_dead()
        self.peak = max(self.peak, self.in_use)
        execute = type(conn).execute

        async def watched(sql: str, params: Any = None) -> Any:
            rid = actor.get()
            if out.busy:
                self.violations.append(f"{rid} runs a statement under one of {out.running}")
            if rid is not None and out.user is None:
                out.user = rid
            elif rid is not None and rid != out.user:
                self.violations.append(f"{rid} uses the connection of {out.user}")
            out.busy, out.running = True, rid
            try:
                return await execute(conn, sql, params)
            finally:
                out.busy = False

        conn.execute = watched
        return conn

    async def _watched_release(self, conn: Any) -> None:
        for key, out in list(self._out.items()):
            if out.conn is conn:
                if out.busy:
                    self.violations.append(f"given back while {out.running} runs a statement on it")
                del self._out[key]
        await self._release(conn)

    def _forget_the_dead(self) -> None:
        for key, out in list(self._out.items()):
            if out.conn.stale():  # dropped, and so never given back
                del self._out[key]

    @property
    def in_use(self) -> int:
        """How many connections are out of the pool."""
        pool = self._database._pool
        if pool is None:
            return 0
        if hasattr(self._database, "_lent"):  # psycopg
            return len(self._database._lent)
        if hasattr(pool, "get_idle_size"):  # asyncpg
            return int(pool.get_size() - pool.get_idle_size())
        if hasattr(pool, "_used"):  # aiomysql
            return len(pool._used)
        return int(pool._pool_size - pool._queue.qsize())

    @property
    def idle(self) -> int:
        """How many connections are in the pool."""
        pool = self._database._pool
        if pool is None:
            return 0
        if hasattr(self._database, "_lent"):
            return len(pool._pool)
        if hasattr(pool, "get_idle_size"):
            return int(pool.get_idle_size())
        return int(pool.freesize if hasattr(pool, "freesize") else pool._queue.qsize())

    @property
    def users(self) -> list[str]:
        """Who has them."""
        return [str(out.user) for out in list(self._out.values()) if not out.conn.stale()]
