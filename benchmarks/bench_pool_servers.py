"""The pool's questions on MariaDB and PostgreSQL, directly or through a proxy that delays.

The servers are those of the tests: PEEWEE_FRAMEWORKS_MYSQL_URL and PEEWEE_FRAMEWORKS_POSTGRES_URL.
"""

from __future__ import annotations

import functools
import selectors
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any

import playhouse.pool

from peewee_frameworks.pool import PooledMySQLDatabase, PooledPostgresqlDatabase
from peewee_frameworks.pool.drivers import _tls_contexts
from tests.support.proxy import Proxy
from tests.support.servers import server_kwargs

from .bench_pool import in_threads
from .harness import Row, percentile
from .peers import OURS

if TYPE_CHECKING:
    from collections.abc import Callable

PLAYHOUSE = "playhouse.pool"


def address(kind: Any) -> tuple[str, int]:
    kwargs = server_kwargs(kind)
    return kwargs["host"], kwargs["port"]


def database(cls: Any, kind: Any, where: tuple[str, int], **options: Any) -> Any:
    kwargs = server_kwargs(kind) | {"host": where[0], "port": where[1]} | options
    if kind == "postgres":
        kwargs["prefer_psycopg3"] = True
    return cls(kwargs.pop("database"), **kwargs)


CLASSES = {
    (OURS, "mysql"): PooledMySQLDatabase,
    (OURS, "postgres"): PooledPostgresqlDatabase,
    (PLAYHOUSE, "mysql"): playhouse.pool.PooledMySQLDatabase,
    (PLAYHOUSE, "postgres"): playhouse.pool.PooledPostgresqlDatabase,
}


def finish(db: Any) -> None:
    if isinstance(db, (PooledMySQLDatabase, PooledPostgresqlDatabase)):
        db.pool.close(0)
    else:
        db.close_all()


class Counter:
    """A forwarder that counts turns of the conversation: a round trip is client, then server."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target, self.trips = target, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.target)
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        speaker = None
        with selectors.DefaultSelector() as selector, client, server:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while True:
                for key, _ in selector.select():
                    data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                    if not data:
                        return
                    if key.fileobj is client and speaker is not client:
                        self.trips += 1
                    speaker = key.fileobj
                    key.data.sendall(data)


def round_trips(name: str, kind: Any) -> float:
    counter = Counter(address(kind))
    db = database(CLASSES[name, kind], kind, counter.address, max_connections=2)

    def request() -> None:
        with db.connection_context():
            db.execute_sql("select 1").fetchone()

    for _ in range(10):  # psycopg prepares a statement at its sixth execution, which is a trip of its own
        request()
    time.sleep(0.05)
    before = counter.trips
    for _ in range(20):
        request()
    time.sleep(0.05)
    trips = (counter.trips - before) / 20
    finish(db)
    counter.listener.close()
    return trips


def sqlalchemy_round_trips(kind: Any, *, ping: bool) -> float:
    counter = Counter(address(kind))
    engine = sqlalchemy_engine(kind, counter.address, 2, ping=ping)

    def request() -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("select 1").fetchone()

    for _ in range(10):
        request()
    before = counter.trips
    for _ in range(20):
        request()
    time.sleep(0.05)
    trips = (counter.trips - before) / 20
    engine.dispose()
    counter.listener.close()
    return trips


def sqlalchemy_engine(kind: Any, where: tuple[str, int], size: int, *, ping: bool) -> Any:
    from sqlalchemy import create_engine

    kwargs = server_kwargs(kind) | {"host": where[0], "port": where[1]}
    if kind == "postgres":
        kwargs["dbname"] = kwargs.pop("database")
    driver = {"mysql": "mysql+pymysql", "postgres": "postgresql+psycopg"}[kind]
    return create_engine(
        f"{driver}://",
        connect_args=kwargs,
        pool_size=size,
        max_overflow=0,
        pool_pre_ping=ping,
        isolation_level="AUTOCOMMIT",
    )


def far_away(make: Callable[[tuple[str, int]], tuple[Callable[[], None], Callable[[], None]]]) -> dict[str, Any]:
    """32 threads on 8 connections, 0.5 ms away: operations a second."""
    with Proxy(address("mysql")) as proxy:
        request, end = make(proxy.address)
        request()
        proxy.delay(0.00025)
        counts = [0] * 32
        stop = time.perf_counter() + 2.0

        def work(index: int) -> None:
            while time.perf_counter() < stop:
                request()
                counts[index] += 1

        in_threads(32, work)
        end()
    return {"value": sum(counts) / 2.0, "fairness": min(counts) / (max(counts) or 1)}


def peewee_request(cls: Any, where: tuple[str, int]) -> Any:
    db = database(cls, "mysql", where, max_connections=8, timeout=30)

    def request() -> None:
        with db.connection_context():
            db.execute_sql("select 1").fetchone()

    return request, lambda: finish(db)


def sqlalchemy_request(where: tuple[str, int], *, ping: bool) -> Any:
    engine = sqlalchemy_engine("mysql", where, 8, ping=ping)

    def request() -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("select 1").fetchone()

    return request, engine.dispose


def burst_pool() -> float:
    """From nothing: the TLS context is built, too."""
    _tls_contexts.clear()
    db = database(PooledMySQLDatabase, "mysql", address("mysql"), max_connections=100, timeout=30)
    start = time.perf_counter()

    def work(_: int) -> float:
        conn = db.pool.acquire()
        took = time.perf_counter() - start
        db.pool.release(conn)
        return took

    took = max(in_threads(100, work))
    finish(db)
    return took * 1e3


def burst_bare(*, shared: bool) -> float:
    import pymysql

    kwargs = server_kwargs("mysql")
    start = time.perf_counter()
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    class Shared(pymysql.connections.Connection):
        def _create_ssl_ctx(self, sslp: Any) -> Any:
            return context

    connect: Any = Shared if shared else pymysql.connect

    def work(_: int) -> tuple[Any, float]:
        conn = connect(**kwargs)
        return conn, time.perf_counter() - start

    results = in_threads(100, work)
    for conn, _ in results:
        conn.close()
    return max(took for _, took in results) * 1e3


def dirty(name: str) -> float:
    """The worst of 50 returns with an open transaction, 1 ms away."""
    with Proxy(address("mysql")) as proxy:
        db = database(CLASSES[name, "mysql"], "mysql", proxy.address, max_connections=50, timeout=30)
        barrier = threading.Barrier(50)

        def work(_: int) -> float:
            db.connect()
            db.execute_sql("begin")
            barrier.wait()
            proxy.delay(0.0005)
            start = time.perf_counter()
            db.close()
            return time.perf_counter() - start

        worst = max(in_threads(50, work))
        proxy.delay(0)
        time.sleep(0.2)
        finish(db)
    return worst * 1e3


def away() -> dict[str, Any]:
    """Refuse for 2 s, then hang for 2 s: how late any caller heard, and how soon all was well."""
    with Proxy(address("mysql")) as proxy:
        db = database(PooledMySQLDatabase, "mysql", proxy.address, max_connections=8, timeout=0.5)
        late: list[float] = []
        stop = threading.Event()

        def request() -> None:
            conn = db.pool.acquire()
            try:
                cursor = conn.cursor()
                cursor.execute("select 1")
                cursor.fetchone()
            except Exception as error:
                db.pool.note_error(conn, error)
                raise
            finally:
                db.pool.release(conn)

        request()

        def work(_: int) -> None:
            while not stop.is_set():
                start = time.perf_counter()
                try:
                    conn = db.pool.acquire()
                except Exception:
                    late.append(time.perf_counter() - start - 0.5)
                    stop.wait(0.005)
                else:
                    db.pool.release(conn)
                    stop.wait(0.001)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        proxy.refuse()
        proxy.cut()
        time.sleep(2)
        proxy.restore()
        time.sleep(0.2)
        proxy.hang()
        proxy.cut()
        time.sleep(2)
        proxy.restore()
        proxy.cut()
        start = time.perf_counter()
        while True:
            try:
                request()
            except Exception:
                continue
            break
        back = time.perf_counter() - start
        stop.set()
        for thread in threads:
            thread.join()
        finish(db)
    return {
        "value": max(late, default=0.0) * 1e3,
        "back after ms": back * 1e3,
        "p99 late ms": percentile(late or [0.0], 0.99) * 1e3,
    }


ROWS = [
    *(
        Row(
            f"round-trips-{kind}",
            "round trips of a healthy request with one query",
            "",
            "1: the query",
            {
                OURS: functools.partial(round_trips, OURS, kind),
                PLAYHOUSE: functools.partial(round_trips, PLAYHOUSE, kind),
                "SQLAlchemy": functools.partial(sqlalchemy_round_trips, kind, ping=False),
                "SQLAlchemy pre-ping": functools.partial(sqlalchemy_round_trips, kind, ping=True),
            },
            "1",
            lambda ours, _: ours == 1,
            repeats=1,
        )
        for kind in ("mysql", "postgres")
    ),
    Row(
        "mariadb-far-away",
        "32 threads on 8 connections, MariaDB 0.5 ms away, SELECT 1",
        "op/s",
        "one round trip an operation, and the proxy's own limit",
        {
            OURS: lambda: far_away(functools.partial(peewee_request, PooledMySQLDatabase)),
            PLAYHOUSE: lambda: far_away(functools.partial(peewee_request, playhouse.pool.PooledMySQLDatabase)),
            "SQLAlchemy": lambda: far_away(functools.partial(sqlalchemy_request, ping=False)),
            "SQLAlchemy pre-ping": lambda: far_away(functools.partial(sqlalchemy_request, ping=True)),
        },
        ">= 13 x playhouse.pool, >= 1.7 x SQLAlchemy",
        lambda ours, all_: ours >= 13 * all_[PLAYHOUSE] and ours >= 1.7 * all_["SQLAlchemy"],
        lower_is_better=False,
    ),
    Row(
        "cold-burst",
        "100 threads on an empty pool of 100, PyMySQL",
        "ms",
        "100 parallel connects with one TLS context",
        {
            OURS: burst_pool,
            "100 connects, shared context": lambda: burst_bare(shared=True),
            "100 connects, as PyMySQL does": lambda: burst_bare(shared=False),
        },
        "<= 1.2 x shared; that is >= 30 x faster than PyMySQL's way where the server's own share allows it",
        lambda ours, all_: ours <= 1.2 * all_["100 connects, shared context"],
    ),
    Row(
        "dirty-returns",
        "50 returns with an open transaction, 1 ms away: the worst",
        "ms",
        "0: rolled back in the background",
        {OURS: functools.partial(dirty, OURS), PLAYHOUSE: functools.partial(dirty, PLAYHOUSE)},
        "<= 7 ms",
        lambda ours, _: ours <= 7,
    ),
    Row(
        "away-and-deaf",
        "the server refuses for 2 s, then is silent for 2 s: the latest answer after the deadline of 0.5 s",
        "ms",
        "0",
        {OURS: away},
        "<= 5 ms, back within one connect time",
        lambda ours, _: ours <= 5,
        repeats=1,
    ),
]
