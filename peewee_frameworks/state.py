"""The only file that touches Peewee's private connection state.

Peewee keeps a connection, and the transactions open on it, in ``db._state``, a thread-local. `install` puts a `State` in
its place, which finds the *frame* of the current scope instead: the same record in whichever thread, task or greenlet the
request continues. Outside any scope it behaves as Peewee's own, one record per thread, greenlet or task.

Two rules, each behind a failing experiment:

* reading never creates a record: `Database.__init__` reads, and what it made would be inherited by every task;
* a finaliser only enqueues; whoever connects next cleans up.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import functools
import logging
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import peewee
from playhouse.pool import PooledDatabase as PlayhousePooledDatabase

from .background import background
from .drivers import is_clean
from .errors import ConfigurationError
from .frame import NO_RECORD, Frame, running_loop
from .guarded import Guarded, GuardedPool, GuardedProxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from .scope import Scope

logger = logging.getLogger("peewee_frameworks")


class Frames(dict["State", "Frame"]):
    """What the context variable holds: the frame of each database in the current scope."""

    __slots__ = ("scope",)

    def __init__(self, scope: Scope | None, frames: dict[State, Frame]) -> None:
        super().__init__(frames)
        self.scope = scope


current_frames: contextvars.ContextVar[Frames | None] = contextvars.ContextVar("peewee_frameworks_frames", default=None)


def implicit_owner() -> Any:
    """Return whom state belongs to outside a scope: the task, else the greenlet, else the thread."""
    if running_loop() is not None:
        task = asyncio.current_task()
        if task is not None:
            return task
    greenlet = sys.modules.get("greenlet")
    if greenlet is not None:
        current = greenlet.getcurrent()
        if current.parent is not None:
            return current
    return threading.current_thread()


def _is_dead(owner: Any) -> bool:
    if owner is None:
        return True
    if isinstance(owner, threading.Thread):
        return not owner.is_alive()
    if isinstance(owner, asyncio.Future):
        return owner.done()
    return bool(owner.dead)


class _NoLock:
    """Stands for ``db._lock``, which Peewee holds across a connect: frames have guards of their own."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        pass


class State:
    """Stands where Peewee keeps ``db._state`` and finds the record of the current scope, or of the current owner."""

    def __init__(self, database: peewee.Database) -> None:
        self._database = weakref.ref(database)
        # How many running applications use the database: the last one to stop closes its pool.
        self.users = 0
        # What gevent had patched when the database was last checked; see `gevent.watch`.
        self.world: Any = None
        self.tracks_cursors = isinstance(database, peewee.SqliteDatabase)
        # id(owner) -> (the owner, its record). An id can be used again, so the reference decides.
        self._implicit: dict[int, tuple[weakref.ref[Any], Frame]] = {}
        # Records whose owner was collected. Appended by weakref callbacks, so without a lock; drained by `reap`.
        self.orphans: collections.deque[Frame] = collections.deque()
        # id(Python frame of a generator) -> the record its ``with db`` block began on.
        self.generators: dict[int, Frame] = {}

    @property
    def database(self) -> Any:
        """The database this is the state of."""
        return self._database()

    @property
    def name(self) -> str:
        """What messages call the database; without user or password where it was given as a URL."""
        return display_name(self.database)

    # -- Peewee's protocol --------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether there is no connection here."""
        frames = current_frames.get()
        if frames is not None and (frame := frames.get(self)) is not None:
            return frame.closed
        return bool(self._implicit_frame().closed)

    @property
    def conn(self) -> Any:
        """The driver's connection, or None."""
        frames = current_frames.get()
        if frames is not None and (frame := frames.get(self)) is not None:
            return frame.conn
        return self._implicit_frame().conn

    @property
    def ctx(self) -> list[Any]:
        """Peewee's stack of ``with db`` and ``connection_context`` blocks."""
        entries: list[Any] = self.frame().ctx
        return entries

    @property
    def transactions(self) -> list[Any]:
        """Peewee's stack of open transactions."""
        entries: list[Any] = self.frame().transactions
        return entries

    @property
    def commit_callbacks(self) -> list[Any]:
        """What runs after the commit; only code inside the transaction may add to it."""
        frame = self.frame()
        frame.check_lineage()
        callbacks: list[Any] = frame.commit_callbacks
        return callbacks

    def reset(self) -> None:
        """Forget the connection; creates no record."""
        frame = self.frame()
        if isinstance(frame, Frame):
            frame.reset()

    def set_connection(self, conn: Any) -> None:
        """Take a fresh connection; the one call that creates a record outside a scope."""
        frame = self.frame()
        if not isinstance(frame, Frame):
            frame = self._create_implicit()
        frame.set_connection(conn)

    # -- finding the record ---------------------------------------------------------------------------------------------

    def frame(self) -> Any:
        """Return the `Frame` of the current scope or owner, or the empty record."""
        frames = current_frames.get()
        if frames is not None and (frame := frames.get(self)) is not None:
            return frame
        return self._implicit_frame()

    def _implicit_frame(self) -> Any:
        if not self._implicit:
            return NO_RECORD
        owner = implicit_owner()
        entry = self._implicit.get(id(owner))
        if entry is None or entry[0]() is not owner:
            return NO_RECORD
        return entry[1]

    def _create_implicit(self) -> Frame:
        owner = implicit_owner()
        frame = Frame(self, f"{_owner_name(owner)}, outside any scope", shared=False)
        key, implicit, orphans = id(owner), self._implicit, self.orphans

        def collected(ref: weakref.ref[Any]) -> None:
            entry = implicit.get(key)
            if entry is not None and entry[0] is ref:
                del implicit[key]
            if frame.conn is not None:
                orphans.append(frame)

        implicit[key] = (weakref.ref(owner, collected), frame)
        return frame

    def adopt(self, previous: Any) -> None:
        """Carry over what this thread had open on the state that is being replaced."""
        if not previous.closed:
            frame = self._create_implicit()
            frame.set_connection(previous.conn)
            frame.ctx = list(previous.ctx)
            frame.transactions = list(previous.transactions)
            frame.commit_callbacks = list(previous.commit_callbacks)

    def reap(self) -> int:
        """Take back the connections whose thread, greenlet or task has ended without closing; return how many."""
        for key, (ref, frame) in list(self._implicit.items()):
            if _is_dead(ref()) and self._implicit.pop(key, None) is not None:
                self.orphans.append(frame)
        count = 0
        while self.orphans:
            frame = self.orphans.popleft()
            if frame.conn is not None:
                count += 1
                logger.warning("%s: %s ended without closing its connection; taken back.", self.name, frame.label)
                frame.finish()
        return count

    def forget(self) -> None:
        """Drop every record without touching the connections (`dispose`, after a fork)."""
        self._implicit.clear()
        self.orphans.clear()

    def implicit_frames(self) -> list[Frame]:
        """Return the records outside scopes, for statistics and tests."""
        return [frame for _, frame in list(self._implicit.values())]

    @contextlib.contextmanager
    def bound(self, frame: Frame) -> Iterator[None]:
        """Make `frame` the current record for a while.

        A generator that is dropped is closed by the garbage collector in whatever context runs then, perhaps another
        request's: a block it left open must end on the connection it began on.
        """
        if self.frame() is frame:
            yield
            return
        outer = current_frames.get()
        token = current_frames.set(Frames(None, {**(outer or {}), self: frame}))
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):  # closed in another context than it was entered in
                current_frames.reset(token)

    # -- returning connections --------------------------------------------------------------------------------------------

    def give_back(self, conn: Any, *, rollback: bool = False, cursors: list[Any] | None = None) -> Future[None] | None:
        """Return a connection to its pool, or close it; on an event loop's thread without any I/O there. Never raises.

        Returns: a future if that goes on in another thread, else None.
        """
        if running_loop() is None:
            self._check_in(conn, rollback=rollback, cursors=cursors)
        elif rollback or cursors or not self._check_in_without_io(conn):
            return background.submit(lambda: self._check_in(conn, rollback=rollback, cursors=cursors))
        return None

    def drop(self, conn: Any) -> None:
        """Close a connection for good and free its place in the pool. Never raises, never blocks an event loop."""
        if running_loop() is None:
            self._drop(conn)
        else:
            background.submit(lambda: self._drop(conn))

    def _check_in(self, conn: Any, *, rollback: bool, cursors: list[Any] | None) -> None:
        try:
            for cursor in cursors or ():
                cursor.close()
            if rollback:
                conn.cursor().execute("ROLLBACK")
            self.database._close(conn)
        except Exception:
            logger.warning("%s: returning a connection failed; it is closed instead.", self.name, exc_info=True)
            self._drop(conn)

    def _check_in_without_io(self, conn: Any) -> bool:
        """Return a clean connection to a pool here and now if that needs neither I/O nor a wait."""
        database = self.database
        if not isinstance(database, PlayhousePooledDatabase):
            return False
        pool = getattr(database, "pool", None)
        if pool is not None:  # ours: it returns without I/O and cleans in the background
            pool.release(conn)
            return True
        if not is_clean(conn) or not database._pool_lock.acquire(blocking=False):
            return False  # playhouse holds the lock while it connects and pings
        try:
            self._check_in(conn, rollback=False, cursors=None)
        finally:
            database._pool_lock.release()
        return True

    def _drop(self, conn: Any) -> None:
        database = self.database
        try:
            if isinstance(database, PlayhousePooledDatabase):
                database._close(conn, close_conn=True)
            else:
                database._close(conn)
        except Exception:
            logger.warning("%s: closing a connection failed; it is abandoned.", self.name, exc_info=True)


def _owner_name(owner: Any) -> str:
    if isinstance(owner, asyncio.Task):
        return f"task {owner.get_name()!r}"
    if isinstance(owner, threading.Thread):
        return f"thread {owner.name!r}"
    return f"greenlet {id(owner):#x}"


# -- installing ---------------------------------------------------------------------------------------------------------


def unwrap(database: Any) -> Any:
    """Return the database behind a `DatabaseProxy`, or the database itself.

    Raises: `ConfigurationError` for a proxy that is not initialised, and for what is no database at all.
    """
    while isinstance(database, peewee.Proxy):
        if database.obj is None:
            raise ConfigurationError(
                "The DatabaseProxy is not initialised. Call `proxy.initialize(database)` before the application starts."
            )
        database = database.obj
    if not isinstance(database, peewee.Database):
        raise ConfigurationError(
            f"{type(database).__name__} is not a Peewee database. Pass a peewee.Database, a DatabaseProxy, a mapping of "
            "aliases to databases, or a URL."
        )
    return database


def install(database: Any) -> State:
    """Put our state into a database, once; a second call returns what is there.

    Raises: `ConfigurationError` where the database cannot give each unit of work a connection of its own.
    """
    if isinstance(database, peewee.DatabaseProxy) and not isinstance(database, GuardedProxy):
        object.__setattr__(database, "__class__", GuardedProxy)
    database = unwrap(database)
    if isinstance(database._state, State):
        return database._state
    if not database.thread_safe:
        raise ConfigurationError(
            f"{display_name(database)}: created with thread_safe=False, which makes all threads share one connection. "
            "Remove thread_safe=False."
        )
    if isinstance(database, peewee.SqliteDatabase):
        _prepare_sqlite(database)
    state = State(database)
    state.adopt(database._state)
    database._lock = _NoLock()
    database._state = state
    cls: Any = type(database)
    database.__class__ = _guarded_class(cls)
    return state


@functools.cache
def _guarded_class(cls: type) -> type:
    # Our own pool needs no help: it has `pool`, which never waits on a loop and cleans in the background.
    guard = GuardedPool if issubclass(cls, PlayhousePooledDatabase) and not hasattr(cls, "pool") else Guarded
    same = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (guard, cls), same)


def _prepare_sqlite(database: Any) -> None:
    """Make the connections usable from any thread: a request's connection follows it, one user at a time."""
    name = display_name(database)
    pool_size = getattr(database, "_max_connections", None)
    if str(database.database) in ("", ":memory:") and not database.deferred and pool_size != 1:
        raise ConfigurationError(
            f"{name}: each connection to an in-memory SQLite database is a database of its own, so each request would see "
            "an empty one. Use a file, or a pooled database with max_connections=1."
        )
    if any(cls.__module__ in ("playhouse.apsw_ext", "playhouse.cysqlite_ext") for cls in type(database).__mro__):
        return  # these drivers do not bind a connection to a thread
    if database.connect_params.get("check_same_thread"):
        raise ConfigurationError(
            f"{name}: check_same_thread=True binds a connection to one thread, but a request may go on in another. "
            "Remove it; the scope itself refuses two users at once."
        )
    if "check_same_thread" in database.connect_params:
        return
    database.connect_params["check_same_thread"] = False
    if not database.is_closed() and not database.in_transaction():
        database.close()
    if isinstance(database, PlayhousePooledDatabase):
        database.close_idle()  # opened before, so bound to the thread that opened them


def display_name(database: Any) -> str:
    """Name a database in a message: its class and database name, never user or password."""
    if database is None:
        return "a database that is gone"
    name = str(database.database)
    if "://" in name or "=" in name:  # a conninfo string; only its last part is surely no secret
        name = name.rpartition("@")[2] if "@" in name else name.partition("://")[0] + "://…"
    return f"{type(database).__name__}({name.partition('?')[0]!r})"
