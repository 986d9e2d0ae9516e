"""The pool as its users see it: the engine, plus threads, tasks, drivers, deadlines, statistics and events."""

from __future__ import annotations

import functools
import logging
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from peewee_frameworks.errors import (
    ForeignConnection,
    PoolClosed,
    PoolConnectTimeout,
    PoolError,
    WouldBlock,
)
from peewee_frameworks.forks import keep, watch_forks
from peewee_frameworks.frame import running_loop
from peewee_frameworks.stacks import take

from .core import Engine
from .drivers import Driver, driver_of
from .entries import CLEAN, CLOSE, CONNECT, Entry, Job, Turn, snapshot
from .events import Events
from .jobs import followed, run_job
from .leaks import Suspect, log_returned
from .line import wait, wait_async
from .options import PoolOptions
from .stats import PoolStats, Recorder, read_stats
from .upkeep import Upkeep, close_what_was_let_go
from .waiters import ThreadWaiter
from .workers import threads_here

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping

__all__ = ["Pool"]

logger = logging.getLogger("peewee_frameworks.pool")

_DEFAULT: Any = object()  # "the pool's own timeout", where None means "do not wait"


class Pool:
    """One queue for threads, greenlets and tasks over one set of connections.

    Times are in seconds. A ``timeout`` of 0 waits for ever and ``None`` does not wait, as in ``playhouse.pool``; left
    out, it is the pool's own.

    Args:
        connect: opens a connection; runs in a background thread, and what it raises reaches a caller.
        options: see `PoolOptions`.
        prepare: runs once for each new connection, after ``connect`` and in the same thread.
        on_fork: runs in a forked child, where no connection of the parent is to be used.
        driver: chooses the adapter for a connection.
        clock: a monotonic clock; for tests.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        options: PoolOptions | None = None,
        *,
        prepare: Callable[[Any], Any] | None = None,
        on_fork: Callable[[], Any] | None = None,
        driver: Callable[[Any], Driver] = driver_of,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options or PoolOptions()
        self.events = Events()
        self._connect = connect
        self._prepare = prepare
        self._on_fork = on_fork
        self._driver_of = driver
        self._driver = Driver()
        self._clock = clock
        self._recorder = Recorder()
        self._upkeep = Upkeep()
        self._engine: Engine | None = None
        self._watch = False  # somebody wants to know about each checkout and checkin
        self._armed = False  # a leak was suspected
        self.describe: Callable[[list[Any]], Mapping[int, Suspect]] = lambda _conns: {}
        self.label_of: Callable[[Any], str | None] = lambda _conn: None
        self._labelled: tuple[Any, str | None] = (None, None)
        self._suspended_error = False
        self._emptied: ThreadWaiter | None = None
        self.cut: dict[int, Entry] = {}  # taken from their users, by drivers that must not close under these; by id()
        self._looked = 0.0  # when a caller last looked for connections without owner

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}: {self._numbers()}>"

    @property
    def name(self) -> str:
        """The name in messages and statistics."""
        return self.options.pool_name or "pool"

    # -- life ---------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine; made with the first use, so that its lock is of the kind ``threading`` has then."""
        engine = self._engine
        if engine is None:
            engine = self.__dict__.setdefault("_made", self._make_engine())
            self._engine = engine
            self._watch = self._watching()
            watch_forks(self)
            _opened.add(self)
            threads_here().maintainer.schedule(self)
        return engine

    def _make_engine(self) -> Engine:
        engine = Engine(
            self.options,
            dispatch=lambda jobs: self._dispatch(engine, jobs),  # an engine that was disposed of ends its own business
            revisit=self._revisit,
            make_lock=threading.Lock,
            clock=self._clock,
        )
        engine.on_samples = self._recorder.used
        return engine

    def open(self, *, wait: float | None = None) -> None:
        """Open the pool, or open it again after `close`; connects ``min_connections`` in the background.

        Args:
            wait: seconds to wait until ``min_connections`` are there; ``None``: do not wait, errors show later.

        Raises:
            PoolConnectTimeout: they were not there in time; the last connect error is the ``__cause__``.
            WouldBlock: ``wait`` was given on the thread of a running event loop.
        """
        if wait is not None and running_loop() is not None:
            raise WouldBlock(
                f"Pool {self.name!r}: open(wait=…) would block the event loop. Call open() without waiting."
            )
        engine = self.engine

        def change(_turn: Turn) -> None:
            if engine.closed:  # what is suspended stays so until `resume`
                engine.closed = engine.shut = False
            engine.retry_at = 0.0

        engine.locked(change)
        threads_here().maintainer.schedule(self)
        if wait is None:
            return
        # Waiting for one's own warm-up is waiting for nothing else: look at short intervals instead of queueing.
        deadline = self._clock() + wait
        gate = ThreadWaiter(self._clock())  # nobody wakes it
        while len(engine.entries) - len(engine.connecting) < self.options.min_connections:
            if self._clock() >= deadline:
                raise PoolConnectTimeout(
                    f"Pool {self.name!r}: fewer than min_connections after {wait:g} s ({self._numbers()})."
                ) from engine.last_error
            gate.wait(0.005)

    def close(self, timeout: float | None = None) -> None:
        """Close for good: refuse who waits, close what is idle, then what comes back, and cut what does not.

        On an event loop, await `aclose` instead.

        Args:
            timeout: seconds to wait for borrowed connections; ``None``: ``close_timeout``. Then they are cut.
        """
        engine = self.engine
        budget = self.options.close_timeout if timeout is None else timeout
        deadline = self._clock() + budget
        emptied = self._emptied = ThreadWaiter(self._clock())
        self._shut_down(engine)
        if running_loop() is None:
            while engine.entries and (left := deadline - self._clock()) > 0:
                if not engine.held and not engine.closing and not engine.checking:
                    break  # only connects are left: they close by themselves when they are done
                emptied.wait(min(left, 0.05))
        for entry in self._take_held(lambda _entry: True):
            self._driver.abort(entry.conn)
            engine.post(CLOSE, entry, "still in use when the pool was closed")
        close_what_was_let_go(self)
        self._emptied = None

    def _shut_down(self, engine: Engine) -> None:
        def change(_turn: Turn) -> None:
            engine.closed = engine.shut = True

        engine.locked(change)
        engine.fail_waiters(lambda: PoolClosed(f"Pool {self.name!r} was closed while this caller waited."))

    async def aclose(self, timeout: float | None = None) -> None:
        """Close as `close` does, without blocking the event loop."""
        import asyncio  # noqa: PLC0415 - running, or this could not be awaited

        self._shut_down(self.engine)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def finish() -> None:
            if not done.done():
                done.set_result(None)

        def work() -> None:
            try:
                self.close(timeout)
            finally:
                loop.call_soon_threadsafe(finish)

        threads_here().workers.submit(work)
        await done

    def after_fork(self) -> None:
        """Start over in a forked child: what was open belongs to the parent and must not be touched, nor closed."""
        engine = self._engine
        if engine is None:
            return
        for entry in engine.entries.values():
            if entry.conn is not None:
                self._driver.forsake(entry.conn)
                keep(entry.conn)
        for keeper in self.cut.values():
            self._driver.forsake(keeper.conn)
            keep(keeper.conn)
        self.cut.clear()
        self._detach()  # the lock of the old engine may be held for ever, by a thread that stayed with the parent
        if self._on_fork is not None:
            self._on_fork()

    def forget(self) -> None:
        """Drop all connections without touching them; whoever waits starts over with a new set."""
        engine = self._engine
        if engine is None:
            return
        self._detach()
        engine.abandon(lambda: PoolClosed(f"Pool {self.name!r} was disposed of while this caller waited."))

    def _detach(self) -> None:
        # In this order: who makes an engine meanwhile finds neither the old one nor a recorder that is dropped.
        self._recorder = Recorder(self._recorder.sinks)
        self.__dict__.pop("_made", None)
        self._engine = None

    # -- checkout -----------------------------------------------------------------------------------------------

    def try_acquire(self) -> Any:
        """Check a connection out if one is there; never waits, connects or pings.

        Returns:
            The connection, or ``None``.
        """
        conn = (self._engine or self.engine).checkout()
        if conn is not None and self._watch:
            self._note_checkout(conn)
        return conn

    def acquire(self, timeout: float | None = _DEFAULT) -> Any:
        """Check a connection out; called without ``await`` in a thread or greenlet.

        Raises:
            PoolExhausted: all are in use and ``timeout`` says not to wait.
            PoolTimeout: all were in use for the whole of ``timeout``.
            PoolConnectTimeout: there was room for another connection, but it did not come in time.
            TooManyWaiters: ``max_waiting`` others are in the queue.
            WouldBlock: waiting here would block a running event loop; use ``await pool.acquire_async()``. A connect is
                given `line.LOOP_PATIENCE`, another user nothing.
            PoolClosed: the pool is closed.
            Exception: what the driver raised when connecting failed.
        """
        conn = (self._engine or self.engine).checkout()
        if conn is None:
            conn = wait(self, self.options.timeout if timeout is _DEFAULT else timeout)
        if self._watch:
            self._note_checkout(conn)
        return conn

    async def acquire_async(self, timeout: float | None = _DEFAULT) -> Any:
        """Check a connection out without ever blocking the event loop; raises what `acquire` does, bar `WouldBlock`."""
        conn = (self._engine or self.engine).checkout()
        if conn is None:
            conn = await wait_async(self, self.options.timeout if timeout is _DEFAULT else timeout)
        if self._watch:
            self._note_checkout(conn)
        return conn

    def note_timeout(self, error: PoolError) -> None:
        """Count a caller who has waited in vain, here or to be admitted by `orm.run`, and tell who listens."""
        self._recorder.count("timeouts")
        self.events.emit("timeout", error=error)

    def _numbers(self) -> str:
        engine = self._engine
        if engine is None:
            return "not open yet"
        return (
            f"max {self.options.max_connections or 'unlimited'}, idle {len(engine.idle)}, in use {len(engine.held)}, "
            f"connecting {len(engine.connecting)}, checking {len(engine.checking)}, closing {len(engine.closing)}, "
            f"waiting {len(engine.waiters)}"
        )

    # -- checkin ------------------------------------------------------------------------------------------------

    def release(self, conn: Any) -> None:
        """Check a connection in, from any thread; never blocks and never does I/O. A second return does nothing.

        An open transaction is rolled back in the background, with a warning in the log.

        Raises:
            ForeignConnection: the connection is another pool's.
        """
        try:
            if self._watch:
                self._note_checkin(conn)
        finally:  # a timeout of gevent, a Ctrl-C in a listener: it comes back all the same
            if self._engine is None or self._engine.checkin(conn) is None:
                self._check_known(conn)

    def discard(self, conn: Any, reason: str = "discarded") -> None:
        """Check a connection in that must not be used again; it is closed in the background."""
        try:
            if self._watch:
                self._note_checkin(conn)
        finally:
            if self._engine is None or not self._engine.discard(conn, reason):
                self._check_known(conn)

    def doom(self, conn: Any, reason: str) -> None:
        """Have a connection closed when it comes back."""
        entry = self.engine.held.get(id(conn))
        if entry is not None:
            entry.generation, entry.expires, entry.reason = -1, float("-inf"), reason

    def owns(self, conn: Any) -> bool:
        """Say whether a connection belongs to this pool."""
        engine = self._engine
        return engine is not None and any(entry.conn is conn for entry in snapshot(engine.entries.values()))

    def _check_known(self, conn: Any) -> None:
        """Tell a double return, or that of a connection which was closed meanwhile, from a foreign connection."""
        if self.owns(conn):
            return
        for other in list(_opened):
            if other is not self and other.owns(conn):
                raise ForeignConnection(
                    f"Pool {self.name!r}: this connection belongs to pool {other.name!r}; return it there."
                )
        logger.debug(
            "Pool %r: a connection was returned that is not in use here; ignored.", self.name, extra={"pool": self.name}
        )

    # -- looking after all --------------------------------------------------------------------------------------

    def suspend(self, *, fail: bool = False) -> None:
        """Hand nothing out until `resume`; callers queue, or with ``fail`` get `PoolExhausted` at once."""
        self._suspended_error = fail
        self._set_shut(shut=True)

    def resume(self) -> None:
        """End `suspend`, and connect up to ``min_connections`` again."""
        self._set_shut(shut=False)

    def _set_shut(self, *, shut: bool) -> None:
        engine = self.engine

        def change(_turn: Turn) -> None:
            engine.shut = shut or engine.closed

        engine.locked(change)

    def resize(self, max_connections: int | None, min_connections: int | None = None) -> None:
        """Change the bounds; what is too much closes when it comes back.

        Raises:
            ConfigurationError: the bounds contradict.
        """
        changes: dict[str, Any] = {"max_connections": max_connections}
        if min_connections is not None:
            changes["min_connections"] = min_connections
        self.configure(self.options.replace(**changes))

    def configure(self, options: PoolOptions) -> None:
        """Take over other options."""
        self.options = options
        engine = self._engine
        if engine is None:
            return

        def change(turn: Turn) -> None:
            engine.configure(options)
            surplus = len(engine.entries) - len(engine.closing) - engine.max
            while surplus > 0 and engine.idle:
                engine.retire(engine.idle.popleft(), "the pool was made smaller", turn)
                surplus -= 1

        engine.locked(change)
        self._watch = self._watching()
        threads_here().maintainer.schedule(self)

    def invalidate_all(self, reason: str) -> None:
        """Let every connection opened so far die: the idle ones now, the others when they come back."""
        engine = self.engine
        self._dispatch(engine, engine.invalidate(reason))
        self.events.emit("invalidate", reason=reason)

    def drain(self) -> None:
        """Replace every connection, progressively for those in use; for a changed password or session setup."""
        engine = self.engine
        count = len(engine.idle)
        self.invalidate_all("drained")

        def change(_turn: Turn) -> None:
            engine.refill = max(engine.refill, count)

        engine.locked(change)

    def close_idle(self, reason: str = "close_idle()") -> None:
        """Close what is idle; done on return, except on the thread of an event loop."""
        engine = self._engine
        if engine is not None:
            self._run_now(engine, engine.retire_idle(reason))

    def close_held(self, age: float = 0.0, reason: str = "close_all()") -> int:
        """Close what has been in use for longer than ``age`` seconds, under the hands of its users; say how many."""
        limit = self._clock() - age
        entries = self._take_held(lambda entry: entry.since < limit or age <= 0)
        engine = self.engine
        self._run_now(engine, [job for entry in entries for job in engine.retire_one(entry, reason)])
        return len(entries)

    def _take_held(self, wanted: Callable[[Entry], bool]) -> list[Entry]:
        engine = self._engine
        if engine is None:
            return []
        entries = [entry for entry in snapshot(engine.held.values()) if wanted(entry)]
        entries = [entry for entry in entries if engine.held.pop(entry.key, None) is entry]
        for entry in entries:
            entry.shared = True
            if not self._driver.closes_under_use:
                self._note_cut(entry)  # now, or a commit could slip in before the job comes to it
        return entries

    def _note_cut(self, entry: Entry) -> None:
        """Keep a connection that is taken from its user: it is closed when the user has let go of it."""
        keeper = Entry(entry.id, entry.generation, entry.created)
        keeper.conn = entry.conn
        self.cut.setdefault(entry.key, keeper)

    def note_error(self, conn: Any, error: BaseException) -> None:
        """Look at an error of a query: when the server is gone, every connection opened so far is invalid."""
        entry = self.engine.held.get(id(conn))
        if entry is None or entry.generation != self.engine.generation:
            return
        if self._driver.is_disconnect(error, conn):
            self.invalidate_all(f"a query lost its connection ({type(error).__name__})")

    def taken_back(self, conn: Any) -> PoolError | None:
        """Explain why a connection fails its user: it was closed under its hands. ``None`` if it was not."""
        engine = self._engine
        if engine is None or id(conn) in engine.held:
            return None
        try:
            if id(conn) not in self.cut and self._driver_of(conn).condition(conn) in (None, CLEAN):
                return None  # disposed of, and it works
        except Exception:  # so does a closed one answer, in some drivers
            logger.debug("Pool %r: the state of a connection cannot be read.", self.name, exc_info=True)
        if engine.closed:
            return PoolClosed(
                f"Pool {self.name!r} was closed while this connection was in use. Open it again with pool.open()."
            )
        return PoolError(
            f"Pool {self.name!r}: this connection was closed while it was in use, by close_stale(), close_all() or "
            "pool.close_held(). Close it here too, and connect again."
        )

    def maintain(self) -> float | None:
        """Do the upkeep that is due; called by the maintainer.

        Returns:
            The seconds until the next upkeep, or ``None`` when there is nothing to look after.
        """
        engine = self._engine
        if engine is None:
            return None
        self._watch = self._watching()  # somebody may have set the level of a logger
        return self._upkeep.run(self, engine, self._clock())

    def on(self, event: str, listener: Callable[..., Any]) -> Callable[..., Any]:
        """Call ``listener(**details)`` at every ``event``, see `EVENTS`; returns the listener."""
        self.events.on(event, listener)
        self._watch = self._watching()
        return listener

    def stats(self) -> PoolStats:
        """Return one consistent moment of the pool."""
        return read_stats(self.engine, self._recorder, self.options, self.name)

    # -- watching -----------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Record the stack of each checkout from now on."""
        if not self._armed:
            self._armed = True
            self._watch = self._watching()

    def _watching(self) -> bool:
        return (
            self._armed
            or self.options.leak_stacks
            or self.events.wants("checkout", "checkin")
            or followed.isEnabledFor(logging.DEBUG)
        )

    def _note_checkout(self, conn: Any) -> None:
        entry = self.engine.held.get(id(conn))
        if entry is not None:
            entry.thread = threading.get_ident()
            entry.suspect = None
            entry.stack = take(sys._getframe(2)) if self._armed or self.options.leak_stacks else None
        try:
            self.events.emit("checkout", connection=conn)
        except BaseException:  # a timeout of gevent, a Ctrl-C: the caller will not see this connection
            self.engine.checkin(conn)
            raise

    def _note_checkin(self, conn: Any) -> None:
        entry = self.engine.held.get(id(conn))
        if entry is None:
            return
        if entry.leaked:
            log_returned(self.name, entry.id, self._clock() - entry.since, entry.suspect)
        entry.stack = entry.suspect = None
        followed.debug("Returning %s to pool.", entry.id, extra={"pool": self.name, "connection": entry.id})
        self.events.emit("checkin", connection=conn)

    def _reaped(self, entry: Entry, seconds: float) -> None:
        self._recorder.count("reaped")
        logger.warning(
            "Pool %r: whoever held connection %d for %.1f s is gone without returning it; it is closed.",
            self.name,
            entry.id,
            seconds,
            extra={"pool": self.name, "connection": entry.id, "seconds": seconds},
        )

    # -- work in the background ---------------------------------------------------------------------------------

    def _revisit(self, at: float) -> None:
        threads_here().maintainer.schedule(self, max(0.0, at - self._clock()))

    def _dispatch(self, engine: Engine, jobs: list[Job]) -> None:
        """Hand jobs to the workers; what cannot be handed over, because the interpreter ends, is done here."""
        for job in jobs:
            work = functools.partial(run_job, self, engine, job)
            workers = threads_here().workers
            try:
                # Who waits for a connect has the time to start a thread, who gives something back has not.
                (workers.submit if job.kind == CONNECT else workers.submit_later)(work)
            except RuntimeError:
                work()

    def _run_now(self, engine: Engine, jobs: list[Job]) -> None:
        if running_loop() is not None:
            self._dispatch(engine, jobs)
        else:
            for job in jobs:
                run_job(self, engine, job)


# Those that were used in this process.
_opened: weakref.WeakSet[Pool] = weakref.WeakSet()
