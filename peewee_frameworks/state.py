"""The only file that touches Peewee's private connection state.

Peewee keeps a connection, and the transactions open on it, in ``db._state``, a thread-local. `install` puts a `State` in
its place, which finds the *frame* of the current scope instead: the same record in whichever thread, task or greenlet the
request continues. Outside any scope it behaves as Peewee's own, one record per thread, greenlet or task.

Two rules, each behind a failing experiment:

* reading never creates a record: `Database.__init__` reads, and what it made would be inherited by every task;
* a finaliser only enqueues; whoever connects next cleans up.
"""

from __future__ import annotations

import _thread
import collections
import contextlib
import functools
import logging
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import peewee
from playhouse.pool import PooledDatabase as PlayhousePooledDatabase

from .background import background
from .drivers import is_broken_off, is_clean, sqlite_tells_cursors, transaction_is_open
from .errors import ConfigurationError
from .forks import keep, watch_forks
from .frame import (
    NO_RECORD,
    Frame,
    Lineage,
    Overlay,
    PrivateFrame,
    current_lineage,
    get_frames,
    inherits,
    reset_frames,
    running_loop,
    set_frames,
)
from .guarded import Guarded, GuardedPool, GuardedProxy, GuardedUnpooled, statement_methods
from .names import display_name, no_database
from .sqlite import is_in_memory, is_other_sqlite, prepare_sqlite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from types import FrameType

    from .errors import PoolTimeout

logger = logging.getLogger("peewee_frameworks.scope")


class _ThreadOwner:
    """Stands for a thread and dies with it; the `threading.Thread` object of a foreign thread outlives it."""

    __slots__ = ("__weakref__", "ident", "name")

    def __init__(self) -> None:
        self.ident = threading.get_ident()
        self.name = threading.current_thread().name


# Native, if gevent patches later: then it still tells threads apart, and greenlets own their state themselves.
_thread_local = threading.local()


def implicit_owner() -> Any:
    """Return whom state belongs to outside a scope: the task, else the greenlet, else the thread."""
    if running_loop() is not None:
        task = sys.modules["asyncio"].current_task()
        if task is not None:
            return task
    greenlet = sys.modules.get("greenlet")
    if greenlet is not None:
        current = greenlet.getcurrent()
        if current.parent is not None:
            return current
    try:
        return _thread_local.owner
    except AttributeError:
        owner = _thread_local.owner = _ThreadOwner()
        return owner


def _is_dead(owner: Any) -> bool:
    if owner is None:
        return True
    if isinstance(owner, _ThreadOwner):
        return False  # or it would be None
    return bool(owner.done() if _is_task(owner) else owner.dead)


def _is_task(owner: Any) -> bool:
    # Whoever has a task has imported it. The default is for the moment in which another thread is importing it.
    return isinstance(owner, getattr(sys.modules.get("asyncio"), "Future", ()))


class _NoLock:
    """Stands for ``db._lock``, which Peewee holds across a connect: frames have guards of their own."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        pass


class State:
    """Stands where Peewee keeps ``db._state`` and finds the record of the current scope, or of the current owner."""

    # Whether the database is one of Peewee's asyncio layer, whose calls are coroutines.
    is_async = False
    # What asks the database whether it answers; made by the first who wants to know, see health/probe.py.
    probe: Any = None

    def __init__(self, database: peewee.Database) -> None:
        self._database = weakref.ref(database)
        if not self.is_async:
            watch_forks(self)
        # The threads of `db.run`; see aio/sync.py.
        self.runner: Any = None
        # How many connections were reported as leaked, where the pool is not ours; None: nobody watches.
        self.leaks: int | None = None
        # How many running applications use the database: the last one to stop closes its pool.
        self.users = 0
        # What gevent had patched when the database was last checked; see `gevent.watch`.
        self.world: Any = None
        # The other SQLite drivers watch over the threads themselves.
        self.is_sqlite = isinstance(database, peewee.SqliteDatabase) and not is_other_sqlite(database)
        self.tracks_cursors = self.is_sqlite and not sqlite_tells_cursors()
        # id(owner) -> (the owner, its record). An id can be used again, so the reference decides.
        self._implicit: dict[int, tuple[weakref.ref[Any], Frame]] = {}
        # Records whose owner was collected. Appended by weakref callbacks, so without a lock; drained by `reap`.
        self.orphans: collections.deque[Frame] = collections.deque()
        # Who wants to know of each connect; see `listen`.
        self.listeners: list[Callable[[Frame, float, float], object]] = []
        # A generator's or coroutine's Python frame -> the records its ``with db`` blocks began on.
        self.blocks: dict[FrameType, list[Any]] = {}

    @property
    def database(self) -> Any:
        """The database this is the state of."""
        return self._database()

    @property
    def name(self) -> str:
        """What messages call the database; without user or password where it was given as a URL."""
        return display_name(self.database)

    @property
    def _told(self) -> dict[str, Any]:
        """What messages about it carry."""
        return {"database": self.name}

    # -- Peewee's protocol --------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether there is no connection here."""
        frames = get_frames()
        if frames is not None and (frame := frames.frames.get(self) or frames.find(self)) is not None:
            return frame.closed
        return bool(self._implicit_frame().closed)

    @property
    def conn(self) -> Any:
        """The driver's connection, or None."""
        frames = get_frames()
        if frames is not None and (frame := frames.frames.get(self) or frames.find(self)) is not None:
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
        frames = get_frames()
        frame = None if frames is None else frames.frames.get(self)
        entries: list[Any] = (self.frame() if frame is None else frame).transactions
        return entries

    @property
    def commit_callbacks(self) -> list[Any]:
        """What runs after the commit; only code inside the transaction may add to it."""
        frame = self.frame()
        frame.check_lineage()
        callbacks: list[Any] = frame.commit_callbacks
        return callbacks

    def reconfigure(self) -> None:
        """Look again at a database whose `init` was called.

        Raises: `ConfigurationError` as `install` does.
        """
        if isinstance(self.database, peewee.SqliteDatabase):
            prepare_sqlite(self.database, in_block=bool(self.ctx))

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

    def new_frame(self, label: str) -> Frame:
        """Make the record for a scope."""
        return Frame(self, label)

    # -- finding the record ---------------------------------------------------------------------------------------------

    def frame(self) -> Any:
        """Return the `Frame` of the current scope or owner, or the empty record."""
        frames = get_frames()
        if frames is not None and (frame := frames.frames.get(self) or frames.find(self)) is not None:
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
        frame = PrivateFrame(self, f"{_owner_name(owner)}, outside any scope")
        key, implicit, orphans = id(owner), self._implicit, self.orphans

        def collected(ref: weakref.ref[Any]) -> None:
            entry = implicit.get(key)
            if entry is not None and entry[0] is ref:  # else it was forgotten
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
        for key, entry in list(self._implicit.items()):
            if _is_dead(entry[0]()) and self._implicit.get(key) is entry:  # the id may have a new owner
                del self._implicit[key]
                self.orphans.append(entry[1])
        count = 0
        while True:
            try:
                frame = self.orphans.popleft()
            except IndexError:
                break
            if frame.conn is not None:
                count += 1
                logger.warning(
                    "%s: %s ended without closing its connection; taken back.",
                    self.name,
                    frame.label,
                    extra=frame._told,
                )
                frame.finish()
        return count

    def forget(self) -> None:
        """Drop every record without touching the connections (`dispose`)."""
        self._implicit.clear()
        self.orphans.clear()

    def after_fork(self) -> None:
        """In a forked child, drop the parent's records: none of its connections is used, rolled back or closed there."""
        frames = [*self.implicit_frames(), *self.orphans]
        around = get_frames()
        while around is not None:
            if (frame := around.frames.get(self)) is not None:
                frames.append(frame)
            if atomic := getattr(around, "atomic", None):  # the parent ends what its requests begin, and nobody here
                around.atomic = {state: who for state, who in atomic.items() if state is not self}  # type: ignore[attr-defined]
            around = around.parent
        for frame in frames:
            frame.atomic = False
            if frame.conn is not None:
                keep(frame.conn)
                frame.reset()
        self.forget()
        database = self.database  # None if it is about to be collected
        if isinstance(database, PlayhousePooledDatabase) and not hasattr(database, "pool"):  # ours sees to it by itself
            keep((database._connections, database._in_use))
            database._connections, database._in_use = [], {}

    def listen(self, listener: Callable[[Frame, float, float], object]) -> None:
        """Call ``listener(frame, start, seconds)`` after each connect: by `time.perf_counter`, the wait for the pool included.

        It stands in the way of the connects of this database object, and only once somebody listens.
        """
        self.listeners.append(listener)
        database = self.database
        name = "_acquire_conn_async" if self.is_async else "_connect_here"
        vars(database).setdefault(name, functools.partial(type(database)._connect_and_tell, database))

    def connected(self, start: float) -> None:
        """Tell the listeners that the current record was connected just now."""
        frame, seconds = self.frame(), time.perf_counter() - start
        for listener in self.listeners:
            listener(frame, start, seconds)

    def note_timeout(self, error: PoolTimeout) -> None:
        """Count a unit of work that was not admitted in time by `orm.run`, where the pool counts."""
        pool = getattr(self.database, "pool", None)
        if pool is not None and hasattr(pool, "note_timeout"):  # not one that somebody has called so
            pool.note_timeout(error)

    def implicit_frames(self) -> list[Frame]:
        """Return the records outside scopes, for statistics and tests."""
        return [frame for _, frame in list(self._implicit.values())]

    def implicit_owners(self) -> list[tuple[Any, Frame]]:
        """Return the records outside scopes with their thread, task or greenlet, as far as that lives."""
        return [(owner(), frame) for owner, frame in list(self._implicit.values())]

    @contextlib.contextmanager
    def bound(self, frame: Frame, mark: Lineage | None = None) -> Iterator[None]:
        """Make `frame` the current record for a while, and `mark` what the code inherits.

        A generator that is dropped is closed by the garbage collector in whatever context runs then, perhaps another
        request's: a block it left open must end on the connection it began on, in its own transaction.
        """
        undo: list[Callable[[], None]] = []
        if self.frame() is not frame:
            token = set_frames(Overlay(get_frames(), frame))
            undo.append(lambda: reset_frames(token))
        if mark is not None and not inherits(mark):
            lineage = current_lineage.set(mark)
            undo.append(lambda: current_lineage.reset(lineage))
        try:
            yield
        finally:
            for reset in undo:
                reset()

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

    def drop(self, conn: Any, done: Callable[[], None] | None = None) -> None:
        """Close a connection for good and free its place in the pool. Never raises, never blocks an event loop."""
        if running_loop() is None:
            self._drop(conn, done)
        else:
            background.submit(lambda: self._drop(conn, done))

    def linger(self, conn: Any, cursors: list[Any], done: Callable[[], None]) -> None:
        """Drop an SQLite connection when the last of `cursors` is gone; until then somebody may be reading from it."""
        if is_in_memory(self.database):  # closing it would destroy the data, and nobody else can be harmed by a reader
            self.drop(conn, done)
            return
        readers = {id(cursor) for cursor in cursors}

        def gone(key: int) -> None:
            readers.discard(key)
            if not readers:
                # A finaliser must not take locks; a thread of its own may.
                _thread.start_new_thread(self._drop, (conn, done))

        for cursor in cursors:
            weakref.finalize(cursor, gone, id(cursor)).atexit = False

    def _check_in(self, conn: Any, *, rollback: bool, cursors: list[Any] | None) -> None:
        if is_broken_off(conn):
            self._drop(conn)
            return
        try:
            for cursor in cursors or ():
                cursor.close()
            if rollback:
                conn.cursor().execute("ROLLBACK")
            self.database._close(conn)
        except Exception:
            logger.warning(
                "%s: returning a connection failed; it is closed instead.", self.name, exc_info=True, extra=self._told
            )
            self._drop(conn)
        except BaseException:  # gevent's Timeout, an interrupt: nobody knows how far it came
            self._drop(conn)
            raise

    def _check_in_without_io(self, conn: Any) -> bool:
        """Return a clean connection to a pool here and now if that needs neither I/O nor a wait."""
        database = self.database
        if not isinstance(database, PlayhousePooledDatabase):
            return False
        pool = getattr(database, "pool", None)
        if pool is not None:  # ours: it returns without I/O and cleans in the background
            self._check_in(conn, rollback=False, cursors=None)
            return True
        if not is_clean(conn) or not database._pool_lock.acquire(blocking=False):
            return False  # playhouse holds the lock while it connects and pings
        try:
            self._check_in(conn, rollback=False, cursors=None)
        finally:
            database._pool_lock.release()
        return True

    def _drop(self, conn: Any, done: Callable[[], None] | None = None) -> None:
        database = self.database
        try:
            if not isinstance(database, PlayhousePooledDatabase):
                if not is_broken_off(conn):
                    database._close(conn)
            elif is_in_memory(database) and transaction_is_open(conn) is not None:
                if transaction_is_open(conn):
                    conn.rollback()
                database._close(conn)  # to close it would destroy the data; nobody is inside any more
            else:
                database._close(conn, close_conn=True)
        except Exception:
            logger.warning(
                "%s: closing a connection failed; it is abandoned.", self.name, exc_info=True, extra=self._told
            )
        if done is not None:
            done()


def _owner_name(owner: Any) -> str:
    if isinstance(owner, _ThreadOwner):
        return f"thread {owner.name!r}"
    if _is_task(owner):
        return f"task {owner.get_name()!r}"
    return f"greenlet {id(owner):#x}"


# -- installing ---------------------------------------------------------------------------------------------------------


def _not_initialised() -> ConfigurationError:
    return ConfigurationError(
        "The DatabaseProxy is not initialised. Call `proxy.initialize(database)` before the application starts."
    )


def unwrap(database: Any) -> Any:
    """Return the database behind a `DatabaseProxy`, or the database itself.

    Raises: `ConfigurationError` for a proxy that is not initialised, and for what is no database at all.
    """
    while isinstance(database, peewee.Proxy):
        if database.obj is None:
            error: ConfigurationError = getattr(type(database), "not_ready", _not_initialised)()
            raise error
        database = database.obj
    if not isinstance(database, peewee.Database):
        raise ConfigurationError(no_database(database))
    return database


# Native even under gevent, and nothing switches while it is held.
_install_lock = threading.Lock()


def install(database: Any) -> State:
    """Put our state into a database, once; a second call returns what is there.

    Raises: `ConfigurationError` where the database cannot give each unit of work a connection of its own.
    """
    guard_proxy(database)
    database = unwrap(database)
    if isinstance(database._state, State):
        return database._state
    with _install_lock:
        return database._state if isinstance(database._state, State) else _install(database)


def guard_proxy(proxy: Any) -> None:
    """Have the blocks of a `DatabaseProxy` be those of the database behind it; for whatever else, do nothing."""
    if type(proxy) is peewee.DatabaseProxy:  # one of somebody else's has a layout of its own
        object.__setattr__(proxy, "__class__", GuardedProxy)


def _install(database: Any) -> State:
    if not database.thread_safe:
        raise ConfigurationError(
            f"{display_name(database)}: created with thread_safe=False, which makes all threads share one connection. "
            "Remove thread_safe=False."
        )
    pwasyncio = sys.modules.get("playhouse.pwasyncio")
    if pwasyncio is not None and isinstance(database, pwasyncio.AsyncDatabaseMixin):
        from .aio.guarded import install as install_async  # noqa: PLC0415 - needs greenlet

        return install_async(database)
    previous = database._state
    if isinstance(database, peewee.SqliteDatabase):
        prepare_sqlite(database, in_block=bool(previous.ctx))
    state = State(database)
    state.adopt(previous)
    cls: Any = type(database)
    database._lock = _NoLock()
    database._state = state
    change_class(database, _guarded_class(cls))
    return state


def change_class(database: Any, cls: type) -> None:
    """Make a database one of another class, with the same attributes.

    In a dictionary of their own: of an object whose class has changed CPython (3.11 to 3.13) reads each attribute half as fast,
    and Peewee reads dozens for a query.
    """
    database.__class__ = cls
    database.__dict__ = {**database.__dict__}


def _guarded_class(cls: type) -> type:
    if not issubclass(cls, PlayhousePooledDatabase):
        guard: Any = GuardedUnpooled
    else:
        # Our own pool needs no help: it has `pool`, which never waits on a loop and cleans in the background.
        guard = Guarded if hasattr(cls, "pool") else GuardedPool
    return guarded_class(cls, guard, statement_methods)


@functools.cache
def guarded_class(cls: type, guard: type, methods: Callable[[type], dict[str, Any]] | None = None) -> type:
    """Return `cls` with `guard` before it, under the same name."""
    same = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    # Python changes an object's class only between classes that got their `__dict__` on the same base: where `cls` got its.
    base = cls
    while base.__dictoffset__:
        base = base.__base__  # type: ignore[assignment]
    layout = type("_Layout", (base,), {})
    return type(cls.__name__, (layout, guard, cls), {**same, **(methods(cls) if methods is not None else {})})
