"""What all adapters share: the databases, a scope per unit of work, start and end. No framework in here.

Adapters have one each and only translate their framework's hooks; `asgi.py` and `wsgi.py` build on it too.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import peewee

from . import scope as scopes
from .background import background
from .config import DEFAULT_ALIAS, Options, open_databases, resolve
from .errors import ConfigurationError
from .frame import reset_frames, set_frames
from .late import LateDatabase, is_late, not_ready
from .lifecycle import Lifecycle
from .names import display_name
from .queries import count_queries
from .run import Queue, Runner, refuse_coroutines
from .scope import Scope, current_scope
from .state import guard_proxy, install, unwrap

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from .leaks import LeakWatch
    from .state import State

logger = logging.getLogger("peewee_frameworks.app")

_Result = TypeVar("_Result")

DEFAULT_RUN_THREADS = 32
DEFAULT_RUN_TIMEOUT = 30.0

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"  # where the worker processes of an application share their metrics


# Among the names of a request: it is for the health endpoints, which want no connection and no transaction.
HEALTH = "peewee_frameworks.health"


# What `sys.getrefcount` says of an object that one attribute refers to: that, and its own argument.
_UNSHARED = 2


_making_runner = threading.Lock()


class ErrorStatus(Exception):  # never shown: it tells the transaction why
    """The response has a status on which an atomic request is rolled back."""


# Of this process: a database may be used by several.
runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()


class Runtime:
    """The databases of one `Peewee` instance and the scopes it has open."""

    def __init__(self, database: Any = None, **options: Any) -> None:
        """Take the databases now if they are given; else `configure` reads them from the application.

        Raises: `ConfigurationError` for options that cannot work.
        """
        self._keywords: dict[str, Any] = {"database": database, **options}
        self.databases: dict[str, Any] = {}
        self.options = Options()
        # The units of work in flight, but for plain requests that have asked for nothing yet; see `_has_plain`.
        self.live: set[Scope] = set()
        self._states: list[State] = []
        # What `states` gives, without its call; None as long as a proxy among the databases is not initialised. A list of its
        # own: see `_has_plain`.
        self.installed: list[State] | None = None
        self._followed: list[Any] = []
        self._proxy: LateDatabase | None = None
        self._runner: Runner | None = None
        # What to call, while the last application stops, when the last unit of work has ended.
        self.drained: Callable[[], object] | None = None
        self._leaks: LeakWatch | None = None
        # `installed`, if a plain request needs nothing but a scope with these; None while others have to be looked at closer.
        self.plain: list[State] | None = None
        # Whether `policy` may say anything but lazy and not atomic; most applications need not ask for each request.
        self.has_policy = False
        # Whether a part of the application has a policy by which its requests are transactions; for the doctor.
        self.parts_are_atomic = False
        # Whether health endpoints are mounted somewhere: `policy` must be told which requests are theirs.
        self.has_health = False
        # Whether the last application has been told to stop: streams of events end, and no traffic should come.
        self.ending = False
        # Whether connections go back at the first byte of a response.
        self.releases_early = True
        self._lifecycle = Lifecycle()
        runtimes.add(self)
        if database is not None:
            self.configure()

    # -- databases ----------------------------------------------------------------------------------------------------

    def configure(self, mapping: Mapping[str, Any] | None = None) -> None:
        """Read the configuration and install our state in the databases.

        Args:
            mapping: the framework's config; its ``PEEWEE_…`` keys are ours.

        Raises: `ConfigurationError`; nothing is left half-configured.
        """
        given, options = resolve(self._keywords, mapping)
        databases = self.databases or open_databases(given)
        ready = {alias: database for alias, database in databases.items() if not is_late(database)}
        states = [install(database) for database in ready.values()]
        for database in ready.values():
            _check_autoconnect(database, options)
        self.options, self.databases = options, databases
        self.releases_early = options.release == "response_start"
        self._install(states)
        for database in databases.values():
            guard_proxy(database)
            if isinstance(database, peewee.Proxy) and database not in self._followed:
                self._followed.append(database)
                self._follow(database)
        if self._proxy is not None and self._proxy.obj is None:
            self._proxy.initialize(self.database)
        if len(ready) == len(databases):
            self._check_models()

    @property
    def configured(self) -> bool:
        """Whether the databases are known."""
        return bool(self.databases)

    @property
    def database(self) -> Any:
        """The default database: the only one, or the one with the alias ``default``, or the first.

        Before the configuration is read it is a proxy, so that models can be bound to it.
        """
        if self.databases:
            return self.databases.get(DEFAULT_ALIAS) or next(iter(self.databases.values()))
        if self._proxy is None:
            self._proxy = LateDatabase()
        return self._proxy

    def get(self, alias: str) -> Any:
        """Return the database with this alias.

        Raises: `ConfigurationError` naming the aliases there are.
        """
        if not self.databases:
            raise not_ready()
        try:
            return self.databases[alias]
        except KeyError:
            raise ConfigurationError(f"No database {alias!r}; there are: {', '.join(self.databases)}.") from None

    @property
    def states(self) -> list[State]:
        """The state of each database; a proxy that was initialised since is installed now.

        Raises: `ConfigurationError` before `configure`, or for a proxy that is not initialised yet.
        """
        if self.installed is None:
            if not self.databases:
                raise not_ready()
            self._install([install(database) for database in self.databases.values()])
        return self._states

    def _install(self, states: list[State]) -> None:
        self._states = states
        self._observe(states)
        self.installed = [*states] if len(states) == len(self.databases) else None
        self.has_policy = self._find_policy()
        self._set_plain()

    def _follow(self, proxy: Any) -> None:
        """Have `states` look again when a proxy is initialised anew: a test's database takes the place of the real one."""
        mine = weakref.ref(self)  # a proxy lives as long as its models

        def changed(_: object) -> None:
            runtime = mine()
            if runtime is not None:
                runtime.installed = None
                runtime._set_plain()

        proxy.attach_callback(changed)

    def _set_plain(self) -> None:
        self.plain = None if self.has_policy else self.installed

    def _observe(self, states: list[State]) -> None:
        """Put into the databases what the options ask to be known; where they ask nothing, nothing is in the way."""
        options = self.options
        if options.leak_threshold is not None:
            if self._leaks is None:
                from .leaks import LeakWatch  # noqa: PLC0415 - it imports our pool, which not every application uses

                self._leaks = LeakWatch(options.leak_threshold, stacks=options.leak_stacks)
            for state in states:
                self._leaks.add(state)
        if options.server_timing or options.query_budget is not None:
            for state in states:
                count_queries(state)

    def _find_policy(self) -> bool:
        options = self.options
        return (
            options.connect == "eager"
            or options.transaction is not False
            or not all(state.database.autoconnect for state in self._states)
        )

    def _check_models(self) -> None:
        ours = [unwrap(database) for database in self.databases.values()]
        for model in self.options.create_tables:
            bound = model._meta.database
            if bound is None or (isinstance(bound, peewee.Proxy) and bound.obj is None) or unwrap(bound) not in ours:
                if bound is None:
                    raise ConfigurationError(
                        f"create_tables: the model {model.__name__} is bound to no database. Derive it from `orm.Model` or "
                        "`db.Model`, or set `Meta.database`."
                    )
                name = display_name(getattr(bound, "obj", bound))
                if name in map(display_name, ours):
                    name += ", made a second time,"
                raise ConfigurationError(
                    f"create_tables: the model {model.__name__} is bound to {name}, which this Peewee does not serve. It "
                    f"serves {', '.join(display_name(database) for database in ours)}."
                )

    # -- scopes -------------------------------------------------------------------------------------------------------

    def begin(self, label: str, parent: Scope | None = None) -> Scope:
        """Open a scope for a unit of work and make it current. Every `begin` needs its `end`.

        Args:
            label: what messages call it, for example ``"request GET /orders"``.
            parent: the scope of an adapter around this one, as found by its key in the request; never the context's.
        """
        scope = Scope(self.states_beside(parent), label, parent, self)
        self.enter(scope)
        return scope

    def states_beside(self, parent: Scope | None) -> list[State]:
        """Return the states of the databases that the scope around does not have."""
        states = self._states if self.installed is not None else self.states
        return states if parent is None else [state for state in states if not parent.has(state)]

    def enter(self, scope: Scope) -> None:
        """Begin with a scope that an adapter has made. Every `enter` needs its `end`.

        Where a call would be felt, adapters do what this does, and `end`, themselves: a request that queries nothing shall
        cost next to nothing.
        """
        self.live.add(scope)
        scope._token = set_frames(scope)

    def end(self, scope: Scope) -> None:
        """Finish a scope and leave it. Idempotent; never raises, never blocks an event loop."""
        scope.ended = True
        if scope.touched:  # else there is nothing to finish
            scope.finish()
        self._leave(scope)
        token = scope._token
        if token is not None:  # what `exit` does, without its call
            scope._token = None
            try:
                reset_frames(token)
            except ValueError:
                return

    def touched(self, scope: Scope) -> None:
        """Note that a unit of work has asked for something; on any thread, and maybe after its end."""
        self.live.add(scope)
        if scope.ended:  # nobody will end it
            self._leave(scope)

    def _leave(self, scope: Scope) -> None:
        self.live.discard(scope)
        if self.drained is not None and not self.live:
            self.drained()

    def in_flight(self) -> list[Scope]:
        """Return the units of work that have not ended."""
        if not self._has_plain():
            return [*self.live]
        gc.unfreeze()  # `gc.freeze` hides from it what was there
        scopes = [each for each in gc.get_objects() if issubclass(type(each), Scope)]
        # Without an attribute: another thread is making it.
        return [
            scope for scope in scopes if getattr(scope, "owner", None) is self and not getattr(scope, "ended", True)
        ]

    def _has_plain(self) -> bool:
        """Return whether there may be plain requests that have asked for nothing yet.

        They are in no list, for to keep one costs each of them a tenth of what it pays. But they hold `installed`, which else
        only this object does; and then the garbage collector knows them.
        """
        own = _UNSHARED + (self.plain is not None)
        return self.installed is not None and sys.getrefcount(self.installed) > own

    def find(self, scope: Scope | None) -> Scope | None:
        """Return the scope that serves our databases, among this one and those around it: ours, or another adapter's.

        Args:
            scope: the innermost scope of a request, as adapters keep it there; another adapter's may lie over ours.
        """
        while scope is not None and scope.owner is not self:
            if scope.has_all(self.states):
                return self._opener(scope)
            scope = scope.parent
        return scope

    def _opener(self, scope: Scope) -> Scope:
        """Return the innermost scope, among this one and those around it, with a database of ours; others only pass them on."""
        return next(each for each in scope.chain if any(state in each.states for state in self.states))

    def policy(self, request: Any, names: Collection[str], options: Options | None = None) -> tuple[bool, bool]:
        """Decide for a request: (connect eagerly?, atomic?).

        Args:
            request: the framework's request, for predicates.
            names: what `exclude` patterns are matched against: path, endpoint, route and blueprint names; `HEALTH` among them
                if the request is for the health endpoints.
            options: those of a part of the application (a blueprint), here and below; None is the application's own.
        """
        if self.has_health and HEALTH in names:
            return False, False
        options = options or self.options
        eager = options.connect == "eager" or (
            options.connect is None and not all(state.database.autoconnect for state in self._states)
        )
        if not eager and options.transaction is False:
            return False, False
        if options.exclude and options.excludes(request, names):
            return False, False
        return eager, options.is_atomic(request)

    def complete(self, scope: Scope, status: int, options: Options | None = None) -> None:
        """Commit or roll back an atomic request, and release early: to be called before the first byte of the response.

        Raises: what a COMMIT raised; no byte may have been sent then.
        """
        if scope.is_atomic(self):
            reason = self._reason_to_roll_back(scope, status, options)
            scope.complete(reason, self)  # without an open transaction too: what follows is not atomic
            _raise_unless_status(reason)
        self.release_early(scope, options)

    async def complete_async(self, scope: Scope, status: int, options: Options | None = None) -> None:
        """Do what `complete` does without blocking the event loop."""
        if scope.is_atomic(self):
            reason = self._reason_to_roll_back(scope, status, options)
            await scopes.complete(scope, reason, self)
            _raise_unless_status(reason)
        self.release_early(scope, options)

    def roll_back(self, scope: Scope, error: BaseException) -> None:
        """End the transactions that we have begun, because of an exception that leaves our part of a request.

        What the application around does then is no part of them and must not be lost with them. Where there is none, `end`
        rolls back, and what an error handler queries until then is within the transaction. A ROLLBACK that fails does not hide
        the error.
        """
        if scope.parent is not None or scope.owner is not self:
            scope.complete(error, self)

    async def roll_back_async(self, scope: Scope, error: BaseException) -> None:
        """Do what `roll_back` does without blocking the event loop."""
        if scope.parent is not None or scope.owner is not self:
            await scopes.complete(scope, error, self)

    def release_early(self, scope: Scope, options: Options | None = None) -> None:
        """Give back what is idle, by option; at the first byte and between the parts of a stream."""
        if (options or self.options).release == "response_start":
            scope.idles = True
            scope.release_early()

    def _reason_to_roll_back(self, scope: Scope, status: int, options: Options | None) -> Exception | None:
        if not scope.has_transaction(self):
            return None
        if scope.failed is not None:  # which nobody has handled, so what it was answered with does not count
            return ErrorStatus(str(status))
        try:
            return ErrorStatus(str(status)) if (options or self.options).rolls_back(status) else None
        except Exception as error:  # noqa: BLE001 - raised after the ROLLBACK
            return error

    # -- async code -----------------------------------------------------------------------------------------------------

    async def run(self, function: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> _Result:
        """Call sync code on a thread, in the current scope; outside any scope, in one of its own.

        Calls of one scope take turns. The call sees a copy of the caller's context variables.

        Raises: what the function raises; `PoolTimeout` if no place came free in time; `ConfigurationError` for a coroutine
            function.
        """
        refuse_coroutines(function)
        scope = current_scope()
        if scope is not None and scope.has_all(self.states):
            return await self._run_in(scope, function, *args, **kwargs)
        scope = self.begin(f"orm.run({getattr(function, '__qualname__', function)})")
        try:
            return await self._run_in(scope, function, *args, **kwargs)
        finally:
            self.end(scope)

    async def _run_in(self, scope: Scope, function: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> _Result:
        if not all(state.is_async for state in self.states):
            if not (scope.touched or scope.ended):
                scope.touch()  # on the loop, while that can be done here
            if scope.idles:
                return await self.runner.run(scope, _call_and_release, scope, function, *args, **kwargs)
            return await self.runner.run(scope, function, *args, **kwargs)
        # No thread is needed: Peewee's bridge lets sync code wait for the asynchronous driver. Calls take turns all the same.
        turn = scope.turn = scope.turn or Queue(1)
        await turn.enter()
        try:
            result: _Result = await self.states[0].database.run(function, *args, **kwargs)
        finally:
            turn.leave()
        return result

    async def set_atomic(self, scope: Scope) -> None:
        """Wrap what follows in a transaction per database of ours, without blocking the event loop.

        Raises: what BEGIN raises, on a connection that is open already; else it begins with the first query.
        """
        if any(each.connected for each in scope.chain):
            await self._each(scope, lambda scope, states: scope.set_atomic(states, self))
        else:
            scope.set_atomic(self.states, self)

    async def connect(self, scope: Scope) -> None:
        """Connect our databases eagerly, without blocking the event loop.

        Raises: `PoolTimeout`, `DatabaseUnavailable` and what connecting raises.
        """
        await self._each(scope, Scope.connect)

    async def _each(self, scope: Scope, step: Callable[[Scope, Sequence[State]], None]) -> None:
        """Take a step for each of our databases in a scope: on a thread, or in the bridge of an asynchronous one."""
        if offloaded := [state for state in self.states if not state.is_async]:
            await self.runner.run(scope, step, scope, offloaded)
        for state in self.states:
            if state.is_async:
                await state.database.run(step, scope, [state])

    @property
    def runner(self) -> Runner:
        """The threads of `run`."""
        return self._runner or self._make_runner()

    def _make_runner(self) -> Runner:
        with _making_runner:  # loops of several threads may come to it at once
            if self._runner is not None:
                return self._runner
            sizes = [getattr(state.database, "_max_connections", None) for state in self.states]
            waits = [getattr(state.database, "_wait_timeout", None) for state in self.states]
            threads = self.options.run_threads or max((size for size in sizes if size), default=DEFAULT_RUN_THREADS)
            timeout = self.options.run_timeout or max((wait for wait in waits if wait), default=DEFAULT_RUN_TIMEOUT)
            self._runner = Runner(threads, None if timeout == float("inf") else timeout)
        return self._runner

    @property
    def queued(self) -> int | None:
        """How many units of work wait to be admitted to `run`, before they may wait for a connection; None: never used."""
        return None if self._runner is None else self._runner.waiting

    # -- start and end --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Check that the databases answer and create tables, by option. Blocks; `start_async` does not.

        Each call wants its `stop`; only the first start and the last stop do anything.

        Raises: `DatabaseUnavailable` with ``check="fail"``; `ConfigurationError`.
        """
        self._lifecycle.start(self._to_start(), self.options)
        self._has_started()

    async def start_async(self) -> None:
        """Do what `start` does from an event loop, without blocking it; the pools of asynchronous databases open in this loop.

        Raises: as `start`; what had opened is closed then.
        """
        await self._lifecycle.start_async(self._to_start(), self.options)
        self._has_started()

    def _to_start(self) -> dict[str, State]:
        states = self.states
        self._check_models()
        self.ending = False
        return dict(zip(self.databases, states, strict=True))

    def stop(self) -> None:
        """Wait for the units of work in flight, then close the pools. Blocks for `close_timeout` seconds at most."""
        self.ending = self._lifecycle.is_last_stop()
        if not self.ending:
            return
        drained = threading.Event()
        self.plain = None
        try:
            self._watch_work(self.in_flight(), drained.set)
            if self.live:
                drained.wait(self.options.close_timeout)
        finally:
            self.drained = None
            self._set_plain()
        self._end_work()
        self._lifecycle.close()
        self._has_stopped()

    async def stop_async(self) -> None:
        """Do what `stop` does from an event loop, without blocking it."""
        self.ending = self._lifecycle.is_last_stop()
        if not self.ending:
            return
        drained = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.plain = None
        try:
            # On a thread: to go through a million objects takes a tenth of a second.
            found = await asyncio.wrap_future(background.submit(self.in_flight)) if self._has_plain() else [*self.live]
            self._watch_work(found, functools.partial(loop.call_soon_threadsafe, drained.set))
            if self.live:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.options.close_timeout):
                        await drained.wait()
        finally:
            self.drained = None
            self._set_plain()
        self._end_work()
        await self._lifecycle.close_async(self.options.close_timeout)
        self._has_stopped()

    def _watch_work(self, found: list[Scope], drained: Callable[[], object]) -> None:
        """Have `drained` called when the last unit of work in flight has ended, if there is any in `live`.

        Args:
            found: those in flight, asked for after `plain` was taken away: who comes from then on is in `live` at once, and
                who has asked for nothing yet may do so while he ends.
            drained: what to call.
        """
        self.live.update(found)
        self.drained = drained
        for scope in found:
            if scope.ended:  # before it could see that somebody wants to know
                self.live.discard(scope)

    def _end_work(self) -> None:
        """Tell of what has not ended in time, and let no thread begin anything more."""
        if self.live:
            logger.warning(
                "%d units of work were still running when the application stopped: %s",
                len(self.live),
                ", ".join(sorted(scope.label for scope in list(self.live))[:10]),
                extra={"requests": len(self.live)},
            )
            # They do not leave by themselves. Others may leave meanwhile.
            self.live.difference_update([scope for scope in list(self.live) if not scope.touched])
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _has_started(self) -> None:
        if MULTIPROCESS in os.environ:
            from .metrics import multiprocess  # noqa: PLC0415 - for those who have asked for it

            multiprocess.begin(self)

    def _has_stopped(self) -> None:
        if MULTIPROCESS in os.environ:
            from .metrics import multiprocess  # noqa: PLC0415 - for those who have asked for it

            multiprocess.end(self)


def _raise_unless_status(reason: Exception | None) -> None:
    if reason is not None and not isinstance(reason, ErrorStatus):
        raise reason


def _call_and_release(scope: Scope, function: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> _Result:
    try:
        return function(*args, **kwargs)
    finally:
        scope.release_early()


def _check_autoconnect(database: Any, options: Options) -> None:
    database = unwrap(database)
    if options.connect == "lazy" and not database.autoconnect:
        raise ConfigurationError(
            f"connect='lazy' and autoconnect=False of {display_name(database)} contradict each other: nothing would ever "
            "connect. Use connect='eager', or remove autoconnect=False."
        )
