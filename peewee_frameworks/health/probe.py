"""Ask a database whether it answers, within a time limit and beside its pool.

A probe has a connection of its own: one from the pool would be taken from requests, and would wait behind them just when the
answer matters. (Only where the server refuses to open it, and nobody waits, it borrows an idle one.) A database is asked
once at a time, and whoever asks meanwhile shares the answer. A server that accepts and stays silent costs one thread, whose
connection is cut when the time is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import math
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import peewee
from playhouse.pool import PooledDatabase as PlayhousePooledDatabase

from peewee_frameworks.forks import keep, watch_forks
from peewee_frameworks.gevent import make_lock
from peewee_frameworks.pool.drivers import driver_of
from peewee_frameworks.pool.workers import threads_here
from peewee_frameworks.sqlite import is_in_memory

if TYPE_CHECKING:
    from peewee_frameworks.state import State

__all__ = ["Outcome", "Probe", "probe_of"]

CLOSE_SECONDS = 1.0

_SQLITE_QUESTION = "SELECT 1 FROM sqlite_master LIMIT 1"  # a constant alone would not make it look into the file


@dataclass(frozen=True)
class Outcome:
    """How a probe ended.

    `error` is None if the database answered, `seconds` what that took. `refused` is why it could not be asked on a connection
    of its own, although it answers on those that are open.
    """

    seconds: float
    error: BaseException | None = None
    refused: BaseException | None = None


class NoAnswer(Exception):
    """The database did not answer in time."""


class _Run:
    """One probe under way."""

    def __init__(self) -> None:
        self.future: Future[Outcome] = Future()
        self.started = time.monotonic()
        self.conn: Any = None
        self.struck = False
        self.refused: BaseException | None = None

    def finish(self, error: BaseException | None) -> None:
        self.future.set_result(Outcome(time.monotonic() - self.started, error, self.refused))


class Probe:
    """What asks one database."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._lock = make_lock()  # held for moments only, never while a server is waited for
        self._run: _Run | None = None
        self._conn: Any = None
        self._task: asyncio.Task[Outcome] | None = None
        watch_forks(self)

    def start(self, timeout: float) -> Future[Outcome]:
        """Begin to ask a sync database, or join who is asking; never blocks."""
        with self._lock:
            run = self._run
            if run is not None and not run.future.done():
                return run.future
            run = self._run = _Run()
        try:
            threads_here().workers.submit(lambda: self._work(run, timeout))
        except RuntimeError as error:  # no thread to be had
            run.finish(error)
        return run.future

    def give_up(self, future: Future[Outcome]) -> Outcome:
        """Cut the connection on which the probe hangs, which wakes its thread: the answer has not come in time."""
        with self._lock:
            run = self._run
            if run is not None and run.future is future:
                self._strike(run)
        return Outcome(0.0, _late())

    def _strike(self, run: _Run) -> None:
        """Caller must hold the lock: a connection that is closed meanwhile could leave its descriptor to somebody else."""
        run.struck = True
        if run.conn is not None:
            driver_of(run.conn).abort(run.conn)

    async def ask(self, timeout: float) -> Outcome:
        """Ask from an event loop, without blocking it; for sync databases too."""
        if not self._state.is_async:
            future = self.start(timeout)
            await asyncio.wait([asyncio.wrap_future(future)], timeout=timeout)
            return future.result() if future.done() else self.give_up(future)
        loop, task = asyncio.get_running_loop(), self._task
        if task is None or task.done() or task.get_loop() is not loop:
            # Not in the context of the request that happens to be first: others share the answer.
            asking = _ask_async(self._state.database, timeout)
            task = self._task = loop.create_task(asking, name="peewee-probe", context=contextvars.Context())
        await asyncio.wait([task], timeout=timeout)
        return task.result() if task.done() else Outcome(timeout, _late())

    def close(self) -> None:
        """Close the connection; the next question opens another."""
        with self._lock:
            run, self._run = self._run, None
            conn, self._conn = self._conn, None
            if run is not None:
                self._strike(run)
        if conn is not None:
            _close(conn)

    def after_fork(self) -> None:
        """Leave the parent's connection alone."""
        self._lock, self._run, self._task = make_lock(), None, None
        conn, self._conn = self._conn, None
        if conn is not None:
            driver_of(conn).forsake(conn)
            keep(conn)

    # -- in a thread of its own -------------------------------------------------------------------------------------------

    def _work(self, run: _Run, timeout: float) -> None:
        error: BaseException | None = None
        try:
            self._ask(run, timeout)
        except Exception as raised:  # noqa: BLE001 - whatever a driver raises is the answer
            error = raised
        run.finish(error)

    def _ask(self, run: _Run, timeout: float) -> None:
        database = self._state.database
        if is_in_memory(database):
            return  # another connection would be another database
        with self._lock:
            conn, self._conn = self._conn, None
        if conn is not None:
            try:
                self._ping(run, conn, timeout)
            except Exception:
                # The server may have closed what rested too long, or restarted: that is no answer to the question.
                if run.struck:
                    raise
            else:
                return
        try:
            conn = open_beside(database, timeout)
        except Exception as error:
            if run.struck or not self._answers_in_pool(run, database, timeout):
                raise
            run.refused = error
            return
        if run.struck:  # the connect has taken all the time there was; the next probe begins with what it brought
            self._keep(run, conn)
            raise _late()
        self._ping(run, conn, timeout)

    def _ping(self, run: _Run, conn: Any, timeout: float) -> None:
        run.conn = conn
        try:
            _question(conn, timeout)
        except BaseException:
            self._detach(run)
            _close(conn)
            raise
        self._detach(run)
        self._keep(run, conn)

    def _answers_in_pool(self, run: _Run, database: Any, timeout: float) -> bool:
        """Ask on an idle connection of our pool, if nobody waits for one: a server that is full up still serves those."""
        pool = getattr(database, "pool", None)
        if pool is None or pool.stats().waiting:
            return False
        conn = pool.try_acquire()
        if conn is None:
            return False
        run.conn = conn
        try:
            _question(conn, timeout)
        except BaseException as error:
            self._detach(run)
            pool.discard(conn, "it did not answer a health check")
            if not isinstance(error, Exception):
                raise
            return False
        self._detach(run)
        pool.release(conn)
        return True

    def _detach(self, run: _Run) -> None:
        with self._lock:
            run.conn = None

    def _keep(self, run: _Run, conn: Any) -> None:
        with self._lock:
            # An open file tells nothing of whether the file is still there, and costs little to open.
            kept = self._run is run and not _is_sqlite(self._state.database)
            if kept:
                self._conn = conn
        if not kept:
            _close(conn)


def probe_of(state: State) -> Probe:
    """Return the probe of a database; made now if there is none."""
    if state.probe is None:
        vars(state).setdefault("probe", Probe(state))  # one step: two requests may come at once
    probe: Probe = state.probe
    return probe


def _late() -> NoAnswer:
    return NoAnswer("no answer in time")


def _question(conn: Any, timeout: float) -> None:
    driver = driver_of(conn)
    if driver.name == "sqlite":
        conn.execute(_SQLITE_QUESTION).fetchall()
    else:
        driver.ping(conn, timeout)


def _close(conn: Any) -> None:
    with contextlib.suppress(Exception):  # it is no use any more, whatever closing it says
        driver_of(conn).close(conn, CLOSE_SECONDS)


# -- connections beside the pool --------------------------------------------------------------------------------------------


def open_beside(database: Any, timeout: float) -> Any:
    """Open a connection as the pool of a sync database would, beside it, with at most `timeout` seconds for it.

    Where a driver counts in whole seconds it is the next of those; libpq takes two at least.
    """
    twin = copy.copy(database)
    twin.connect_params = _hurried(database, timeout)
    if _is_sqlite(database):
        twin._timeout = timeout  # for which it waits at a lock
    opener = getattr(twin, "_open_connection", None)
    if opener is None:
        pooled = isinstance(database, PlayhousePooledDatabase)
        opener = super(PlayhousePooledDatabase, twin)._connect if pooled else twin._connect
    return opener()


def _hurried(database: Any, timeout: float) -> Any:
    """Return the connect arguments with time limits that suit a probe."""
    params = copy.copy(database.connect_params)  # which may know functions, to be asked at each connect
    if _is_sqlite(database):
        return params
    seconds = math.ceil(timeout)
    if isinstance(database, peewee.MySQLDatabase):
        driver = _mysql_driver(database)
        if driver == "mysql.connector":
            params["connection_timeout"] = seconds
        elif driver == "pymysql":
            params["connect_timeout"] = params["read_timeout"] = timeout  # its login obeys the latter
        else:
            params["connect_timeout"] = params["read_timeout"] = seconds
    elif isinstance(database, peewee.PostgresqlDatabase):
        params["connect_timeout"] = seconds
    return params


def _mysql_driver(database: Any) -> str:
    names = {cls.__name__ for cls in type(database).__mro__}
    if "MySQLConnectorDatabase" in names:
        return "mysql.connector"
    if "MariaDBConnectorDatabase" in names:
        return "mariadb"
    return str(getattr(vars(peewee)["mysql"], "__name__", ""))


# -- asynchronous drivers -----------------------------------------------------------------------------------------------------


async def _ask_async(database: Any, timeout: float) -> Outcome:
    """Connect and ask. The connection is not kept: it would have to be closed with a loop whose end nobody announces."""
    started = time.monotonic()
    error: BaseException | None = None
    if not is_in_memory(database):
        from peewee_frameworks.aio.drivers import beside  # noqa: PLC0415 - needs greenlet

        try:
            async with asyncio.timeout(timeout), beside(database, timeout) as conn:
                await conn.execute(_SQLITE_QUESTION if _is_sqlite(database) else "SELECT 1", ())
        except TimeoutError:
            error = _late()
        except Exception as raised:  # noqa: BLE001 - whatever a driver raises is the answer
            error = raised
    return Outcome(time.monotonic() - started, error)


def _is_sqlite(database: Any) -> bool:
    return isinstance(database, peewee.SqliteDatabase)
