"""What the four applications have in common: an instrumented stock database, and the database work of the routes.

Every unit of work says who it is: ``rid``, the id that the test gave its request. The queries return it, so an answer
that belongs to somebody else shows; and the database notes which rid uses which connection, so a connection that two
live requests saw shows too. Neither relies on what the package says of itself.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import peewee
from playhouse import db_url
from playhouse.pwasyncio import await_

from peewee_frameworks import connection_scope
from peewee_frameworks.aio.urls import SCHEMES as ASYNC_SCHEMES
from peewee_frameworks.pool import connect
from tests.support.blocking import Judge

from .control import Control
from .watch import Watch, acting, actor, in_transaction

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


class Handled(Exception):
    """An error that the application has a handler for; it answers 418."""


class Vetoed(Exception):
    """What a before-hook raises; nobody handles it."""


class Spoiled(Exception):
    """What another extension's teardown or response middleware raises."""


class Watched:
    """Mixed in front of a stock pooled database: watches who has which connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._watch = threading.Lock()
        self._users: dict[int, str | None] = {}  # of connections that are out: the first rid that used it
        self._running: dict[int, str | None] = {}
        self.violations: list[str] = []
        self.peak = 0
        super().__init__(*args, **kwargs)

    def _connect(self) -> Any:
        conn = super()._connect()  # type: ignore[misc]
        with self._watch:
            if id(conn) in self._users:
                self.violations.append(f"handed out while {self._users[id(conn)]} holds it")
            if in_transaction(conn):
                self.violations.append("handed out with a transaction open")
            self._users[id(conn)] = None
            self.peak = max(self.peak, len(self._users))
        return conn

    def _close(self, conn: Any, close_conn: bool = False) -> None:
        with self._watch:
            if id(conn) in self._running:
                self.violations.append(f"given back while {self._running[id(conn)]} runs a statement on it")
            self._users.pop(id(conn), None)
        super()._close(conn, close_conn)  # type: ignore[misc]

    def _execute_cursor(self, sql: str, params: Any, **options: Any) -> Any:
        if self.autoconnect and self.is_closed():  # type: ignore[attr-defined]
            self.connect()  # type: ignore[attr-defined] # else Peewee does so below, too late to know the connection
        conn, rid = self._state.conn, actor.get()  # type: ignore[attr-defined]
        with self._watch:
            if id(conn) in self._running:
                self.violations.append(f"{rid} runs a statement under one of {self._running[id(conn)]}")
            if rid is not None and id(conn) in self._users:
                user = self._users[id(conn)]
                if user is None:
                    self._users[id(conn)] = rid
                elif user != rid:
                    self.violations.append(f"{rid} uses the connection of {user}")
            self._running[id(conn)] = rid
        try:
            return super()._execute_cursor(sql, params, **options)  # type: ignore[misc]
        finally:
            with self._watch:
                self._running.pop(id(conn), None)

    @property
    def in_use(self) -> int:
        """How many connections are out of the pool."""
        return len(self._in_use)  # type: ignore[attr-defined]

    @property
    def idle(self) -> int:
        """How many connections are in the pool."""
        return len(self._connections)  # type: ignore[attr-defined]

    @property
    def users(self) -> list[str]:
        """Who has them."""
        return [str(user) for user in list(self._users.values())]


def open_database(url: str) -> Any:
    """Make the stock pooled database of a URL, watched; or the asynchronous one."""
    scheme = urlsplit(url).scheme
    if scheme in ASYNC_SCHEMES:
        pragmas = {"pragmas": {"journal_mode": "wal", "foreign_keys": 1, "synchronous": "off"}}
        return connect(url, **(pragmas if scheme.startswith("sqlite") else {}))
    kind = db_url.schemes[urlsplit(url).scheme]
    options: dict[str, Any] = db_url.parse(url, unquote_user=True, unquote_password=True)
    if issubclass(kind, peewee.SqliteDatabase):
        options["pragmas"] = {"journal_mode": "wal", "foreign_keys": 1, "synchronous": "off"}
    elif issubclass(kind, peewee.PostgresqlDatabase):
        options["prefer_psycopg3"] = True
    return type(f"Watched{kind.__name__}", (Watched, kind), {})(**options)


def make_models(database: Any) -> tuple[type[peewee.Model], type[peewee.Model]]:
    """Make the two tables: items with a unique name, and parts that refer to an item, checked at COMMIT where possible."""

    class Base(peewee.Model):
        class Meta:
            database: Any = None

    class Item(Base):
        owner = peewee.CharField(64, index=True)
        name = peewee.CharField(64, unique=True, null=True)

    deferrable = None if isinstance(database, peewee.MySQLDatabase) else "INITIALLY DEFERRED"

    class Part(Base):
        item = peewee.ForeignKeyField(Item, deferrable=deferrable)

    database.bind([Item, Part])
    return Item, Part


class Work:
    """The routes' database work on one database; all of it sync, for the calling thread or Peewee's bridge."""

    def __init__(self, url: str) -> None:
        self.db = open_database(url)
        self.is_async = not isinstance(self.db, Watched)
        self.watch: Any = Watch(self.db) if self.is_async else self.db
        self.Item, self.Part = make_models(self.db)
        if isinstance(self.db, peewee.SqliteDatabase):
            self.db.func("sleep")(time.sleep)

    async def inline(self, function: Callable[..., Any], *args: Any) -> Any:
        """Do it from async code: right here with a sync driver, awaited with an asynchronous one."""
        return await self.db.run(function, *args) if self.is_async else function(*args)

    @contextlib.asynccontextmanager
    async def atomic(self) -> AsyncIterator[None]:
        """Open a transaction block in async code."""
        if self.is_async:
            async with self.db.atomic():
                yield
        else:
            with self.db.atomic():
                yield

    def value(self, rid: str, text: str | None = None) -> str:
        """Ask the database for a text, the rid itself by default: who reads another's answer sees another text."""
        with acting(rid):
            return str(peewee.Select([], [peewee.Value(text or rid).alias("v")]).bind(self.db).scalar())

    def write(self, rid: str) -> str:
        """Insert a row that belongs to the rid."""
        with acting(rid):
            self.Item.create(owner=rid)
        return rid

    def counts(self, rids: list[str]) -> list[int]:
        """Count the rows of each."""
        with self.db.connection_context():
            owners = [item.owner for item in self.Item.select().where(self.Item.owner.in_(rids))]
        return [owners.count(rid) for rid in rids]

    def missing(self, rid: str) -> Any:
        """Raise DoesNotExist."""
        with acting(rid):
            return self.Item.get(self.Item.owner == f"no {rid}")

    def duplicate(self, rid: str) -> Any:
        """Raise IntegrityError."""
        with acting(rid):
            self.Item.create(owner=rid, name=rid)
            self.Item.create(owner=rid, name=rid)

    def sleep(self, rid: str, seconds: float) -> str:
        """Be inside a statement for so long."""
        name = "pg_sleep" if isinstance(self.db, peewee.PostgresqlDatabase) else "sleep"
        with acting(rid):
            peewee.Select([], [getattr(peewee.fn, name)(seconds)]).bind(self.db).scalar()
        return self.value(rid)

    def sleep_in_transaction(self, rid: str, seconds: float) -> str:
        """Be inside a statement inside a transaction that has written."""
        with acting(rid), self.db.atomic():
            self.write(rid)
            return self.sleep(rid, seconds)

    def nested(self, rid: str) -> str:
        """Write once in an inner block that is rolled back, twice around it."""
        with acting(rid), self.db.atomic():
            self.write(rid)
            with contextlib.suppress(Handled), self.db.atomic():
                self.write(rid)
                raise Handled
            self.write(rid)
        return rid

    def spoil_commit(self, rid: str) -> str:
        """Write something, then see to it that the COMMIT fails: a deferred constraint, or a session that is gone."""
        with acting(rid):
            self.Item.create(owner=rid)
            if not isinstance(self.db, peewee.MySQLDatabase):
                self.Part.create(item=-1)
                return rid
            with contextlib.suppress(peewee.OperationalError, peewee.InterfaceError):
                self.db.execute_sql("KILL CONNECTION_ID()")  # MariaDB defers no constraints
        return rid

    def stats(self) -> dict[str, Any]:
        """Tell who holds what."""
        return {
            "in_use": self.watch.in_use,
            "idle": self.watch.idle,
            "peak": self.watch.peak,
            "users": self.watch.users,
            "violations": list(self.watch.violations),
        }


class World:
    """One process of an application: its database(s), and the control channel."""

    made: ClassVar[weakref.WeakSet[World]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.made.add(self)
        self.work = Work(os.environ["DATABASE_URL"])
        # A second database of its own pool; the applications use it if CONTRACT_OTHER is set.
        self.other = Work(os.environ["CONTRACT_OTHER"]) if "CONTRACT_OTHER" in os.environ else None
        self.orms: list[Any] = []
        self.control = Control(self.stats, self.forget_violations)
        self.judge = Judge()  # of asyncio's own loops
        if "CONTRACT_DIR" in os.environ:
            self.judge.start()
        self.gates = self.control.gates
        self.note = self.control.note

    @property
    def works(self) -> list[Work]:
        return [self.work] + [self.other] * (self.other is not None)

    @property
    def options(self) -> dict[str, Any]:
        """The options of Peewee(...) for this run: every atomic route by a predicate, eager by environment."""
        return {
            "connect": os.environ.get("CONTRACT_CONNECT"),
            "transaction": is_atomic,
            "rollback_on": rolls_back,
            "errors": True,
        }

    def stats(self) -> dict[str, Any]:
        """Tell who holds what, in all databases of this process."""
        each = [work.stats() for work in self.works]
        return {
            "pid": os.getpid(),
            "in_use": sum(one["in_use"] for one in each),
            "idle": sum(one["idle"] for one in each),
            "peak": max(one["peak"] for one in each),
            "users": [user for one in each for user in one["users"]],
            "violations": [*(text for one in each for text in one["violations"]), *self.judge.guilty],
            "live": sorted(scope.label for orm in self.orms for scope in orm.runtime.in_flight()),
        }

    def forget_violations(self) -> None:
        """Start anew after a case that failed, so that the next is judged for itself."""
        for work in self.works:
            work.watch.violations.clear()
        self.judge.guilty.clear()

    def wait(self, gate: str) -> None:
        """Stop a sync handler at a gate: its thread, or, with an asynchronous driver, the task it is in."""
        if self.work.is_async:
            await_(self.gates.pass_through(gate))
        else:
            self.gates.wait(gate)

    def native(self, orm: Any) -> Callable[[Any], Any]:
        """Return a decorator for sync functions that query: with an asynchronous driver, a coroutine function around them.

        It is what the documentation says to write: `await orm.run(function)`.
        """

        def decorate(function: Any) -> Any:
            if not self.work.is_async:
                return function

            async def call(*args: Any, **kwargs: Any) -> Any:
                return await orm.run(function, *args, **kwargs)

            call.__name__ = function.__name__
            call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
            return call

        return decorate

    def attempt(self, rid: str) -> str:
        """Query, and note the answer or the error's name."""
        try:
            outcome = self.work.value(rid)
        except peewee.PeeweeException as error:
            outcome = type(error).__name__
        self.note(rid, outcome)
        return outcome

    def start_thread(self, kind: str, rid: str) -> None:
        """Start a thread that outlives the request: it queries when the gate opens."""

        def bare() -> None:
            with self.work.db.connection_context():
                self.attempt(rid)

        def scoped() -> None:
            with connection_scope(self.work.db):
                self.attempt(rid)

        def inherited() -> None:
            context.run(self.attempt, rid)

        def careless() -> None:
            self.attempt(rid)  # and never closes

        context = contextvars.copy_context()
        query = {"bare": bare, "scoped": scoped, "inherited": inherited, "careless": careless}[kind]

        def run() -> None:
            self.gates.wait(rid)
            query()

        threading.Thread(target=run, daemon=True).start()

    def stream(self, kind: str, rid: str) -> Iterator[str]:
        """Give a line from the database, idle at the gate, give another; in a block by kind, or without end."""
        database = self.work.db
        blocks = {"atomic": database.atomic, "with": lambda: database, "context": database.connection_context}
        with blocks.get(kind, contextlib.nullcontext)():
            if kind == "atomic":
                self.work.write(rid)
            yield self.work.value(rid) + "\n"
            self.gates.wait(rid)
            yield self.work.value(rid) + "\n"
            while kind != "plain":
                yield "x" * 65536


def is_atomic(request: Any) -> bool:
    """Decide for all frameworks' requests: the routes below /atomic run in a transaction."""
    url = getattr(request, "url", None)
    path = getattr(url, "path", None) or getattr(request, "path", "")
    return str(path).startswith("/atomic")


def rolls_back(status: int) -> bool:
    """Roll back as by default, and on a status that the contract chose."""
    return status in range(400, 600) or status == 299


def rid_of(path: str) -> str:
    """Give the last part of a path: each route ends with the rid."""
    return path.rpartition("/")[2]
