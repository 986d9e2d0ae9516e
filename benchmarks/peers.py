"""The pools under one interface, over a stub database or a real one."""

from __future__ import annotations

import threading
import time
import warnings
from typing import Any

import peewee
import playhouse.pool

from peewee_frameworks.pool import Pool, PoolOptions
from peewee_frameworks.pool.drivers import Driver

OURS = "peewee_frameworks"


class Stub:
    """A database: connects take ``delay`` seconds; counts, and can hang the next connect."""

    def __init__(self, delay: float = 0.0, ping: float = 0.0) -> None:
        self.delay, self.ping_delay = delay, ping
        self.lock = threading.Lock()
        self.connects = self.open = self.peak = 0
        self.hang: threading.Event | None = None
        self.connections: list[Any] = []

    def connect(self, **_: Any) -> StubConnection:
        with self.lock:
            self.connects += 1
            self.open += 1
            self.peak = max(self.peak, self.open)
            hang, self.hang = self.hang, None
        if hang is not None:
            hang.wait(10)
        elif self.delay:
            time.sleep(self.delay)
        conn = StubConnection(self)
        self.connections.append(conn)
        return conn


class _PG:
    transaction_status = 0
    status = 0
    error_message = b""


class StubConnection:
    """DB-API enough for all of them."""

    in_transaction = False
    autocommit = True

    def __init__(self, server: Stub) -> None:
        self.server = server
        self.closed = self.dead = False
        self.pgconn = _PG()
        self._pool = None

    def rollback(self) -> None:
        pass

    commit = rollback

    def cursor(self) -> Any:
        return self

    def execute(self, *_: Any) -> None:
        if self.server.ping_delay:
            time.sleep(self.server.ping_delay)
        if self.dead:
            raise ConnectionError("dead")

    def fetchall(self) -> list[Any]:
        return []

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            with self.server.lock:
                self.server.open -= 1


class OurStubDriver(Driver):
    name = "stub"

    def probe(self, conn: Any) -> Any:
        return None

    def condition(self, conn: Any) -> Any:
        return "clean" if conn.in_transaction else None


class MortalStubDriver(OurStubDriver):
    """With a socket that tells when it is dead."""

    def probe(self, conn: Any) -> Any:
        return lambda _timeout: conn.dead

    def verdict(self, conn: Any) -> str:
        return "close"


class SocketStubDriver(OurStubDriver):
    """With a real socket to look at."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock

    def socket_of(self, conn: Any) -> Any:
        return self.sock

    probe = Driver.probe


class Ours:
    def __init__(
        self, stub: Stub, size: int, timeout: float = 30, lifetime: float | None = None, **options: Any
    ) -> None:
        options.pop("workers", None)
        driver = MortalStubDriver() if options.pop("mortal", False) else OurStubDriver()
        chosen = PoolOptions(max_connections=size, timeout=timeout, stale_timeout=lifetime, **options)
        self.pool = Pool(stub.connect, chosen, driver=lambda _conn: driver)
        self.acquire, self.release = self.pool.acquire, self.pool.release

    def close(self) -> None:
        self.pool.close(0)


class Playhouse:
    """Through ``connect()`` and ``close()``, as its users do; the connection lives in the thread."""

    def __init__(self, stub: Stub, size: int, timeout: float = 30, lifetime: float | None = None, **_: Any) -> None:
        class StubDatabase(peewee.Database):
            def _connect(self) -> Any:
                return stub.connect()

        class Pooled(playhouse.pool.PooledDatabase, StubDatabase):
            def _is_closed(self, conn: Any) -> bool:
                try:
                    conn.execute("ping")
                except ConnectionError:
                    return True
                return False

        self.db = Pooled("stub", max_connections=size, timeout=timeout, stale_timeout=lifetime)

    def acquire(self) -> Any:
        self.db.connect()
        return self.db._state.conn

    def release(self, conn: Any) -> None:
        self.db.close()

    def close(self) -> None:
        self.db.close_idle()


class OurDatabase(Playhouse):
    """Ours through ``connect()`` and ``close()``."""

    def __init__(self, stub: Stub, size: int, timeout: float = 30, lifetime: float | None = None, **_: Any) -> None:
        from peewee_frameworks.pool import PooledDatabase

        class StubDatabase(peewee.Database):
            def _connect(self) -> Any:
                return stub.connect()

        class Pooled(PooledDatabase, StubDatabase):
            pass

        self.db = Pooled("stub", max_connections=size, timeout=timeout, stale_timeout=lifetime)
        driver = OurStubDriver()
        self.db.pool._driver_of = lambda _conn: driver

    def close(self) -> None:
        self.db.pool.close(0)


class SQLAlchemy:
    def __init__(self, stub: Stub, size: int, timeout: float = 30, lifetime: float | None = None, **_: Any) -> None:
        from sqlalchemy.pool import QueuePool

        self.pool = QueuePool(
            stub.connect,
            pool_size=size,
            max_overflow=0,
            timeout=timeout,
            recycle=-1 if lifetime is None else max(1, int(lifetime)),
        )
        self.acquire = self.pool.connect

    def release(self, conn: Any) -> None:
        conn.close()

    def close(self) -> None:
        self.pool.dispose()


class PsycopgPool:
    def __init__(
        self, stub: Stub, size: int, timeout: float = 30, lifetime: float | None = None, **options: Any
    ) -> None:
        from psycopg_pool import ConnectionPool

        class Connection(StubConnection):
            @classmethod
            def connect(cls, *_: Any, **__: Any) -> Any:
                conn = stub.connect()
                conn.__class__ = cls
                return conn

        self.pool = ConnectionPool(
            "",
            connection_class=Connection,  # type: ignore[type-var]
            min_size=options.get("min_connections", 1),
            max_size=size,
            timeout=timeout,
            max_lifetime=lifetime or 3600,
            num_workers=options.get("workers", 3),
            open=False,
        )
        self.pool.open()
        self.acquire, self.release = self.pool.getconn, self.pool.putconn

    def close(self) -> None:
        self.pool.close(1)


class DBUtils:
    def __init__(self, stub: Stub, size: int, timeout: float = 30, lifetime: float | None = None, **_: Any) -> None:
        from dbutils.pooled_db import PooledDB

        class Creator:
            threadsafety = 2
            OperationalError = InterfaceError = InternalError = ConnectionError

            @staticmethod
            def connect() -> Any:
                return stub.connect()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.pool = PooledDB(Creator, maxconnections=size, maxcached=size, blocking=True, ping=0)
        self.acquire = self.pool.connection

    def release(self, conn: Any) -> None:
        conn.close()

    def close(self) -> None:
        self.pool.close()


PEERS = {
    OURS: Ours,
    "playhouse.pool": Playhouse,
    "SQLAlchemy QueuePool": SQLAlchemy,
    "psycopg_pool": PsycopgPool,
    "DBUtils": DBUtils,
}
