"""Sync Peewee code from async code: the whole unit of work in one bounded set of threads.

Three rules keep it from stalling. Calls are admitted before a thread is used, so nobody waits for a connection
while holding a thread that a holder of a connection needs. The place belongs to the *scope*, from its first call until its
connections are given back, so a holder always has a thread for its next call. And the calls of one scope take turns.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import functools
import inspect
import os
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import peewee

from .crew import Call, Crew, Dock, Place, Stage
from .errors import ConfigurationError, PoolTimeout
from .frame import Lineage, comes_from, current_lineage

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from .scope import Scope

_Result = TypeVar("_Result")


class Queue:
    """A first-come first-served semaphore of one event loop.

    Not `asyncio.Semaphore`: a timeout around it is `wait_for`, which up to Python 3.11 can lose a cancellation.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiters: collections.deque[asyncio.Future[bool]] = collections.deque()

    async def enter(self, timeout: float | None = None) -> bool:
        """Wait for a place; return False if none came within `timeout` seconds."""
        if self.enter_now():
            return True
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        self._waiters.append(waiter)
        timer = None if timeout is None else loop.call_later(timeout, _expire, waiter)
        try:
            granted = await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.result():
                self.leave()  # granted in the very tick of the cancellation: the next one has it
            raise
        finally:
            if timer is not None:
                timer.cancel()
            with contextlib.suppress(ValueError):  # granted: `leave` took it out
                self._waiters.remove(waiter)
        return granted

    def enter_now(self) -> bool:
        """Take a place if there is one; return whether there was."""
        if self._free > 0 and not self._waiters:
            self._free -= 1
            return True
        return False

    def when_free(self, callback: Callable[[], None]) -> None:
        """Call `callback`, now or later on the loop, when it has a place."""
        if self.enter_now():
            callback()
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        waiter.add_done_callback(lambda _: callback())

    def leave(self) -> None:
        """Give the place to the next in line."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(True)
                return
        self._free += 1


def _expire(waiter: asyncio.Future[bool]) -> None:
    if not waiter.done():
        waiter.set_result(False)


class _Running:
    """One call while it runs; its context and what is started from there know it."""

    __slots__ = ("ended", "mark", "outlives", "slot")

    def __init__(self, slot: _Slot) -> None:
        self.slot = slot
        self.mark = current_lineage.get()
        self.outlives = False
        """Whether it goes on though its caller was cancelled: nobody can wait for it any more."""
        self.ended = False


_inside: contextvars.ContextVar[_Running | None] = contextvars.ContextVar("peewee_frameworks_call", default=None)


class _Slot:
    """What one scope holds of the runner: the turn of its calls, and its place among the scopes."""

    __slots__ = ("call", "place", "turn")

    place: Place
    call: _Running | None
    """The one whose turn it is, or the last."""

    def __init__(self, scope: Scope, dock: Dock, before: _Slot | None) -> None:
        self.place = Place(scope, dock, before.place if before is not None else None)
        self.turn = Queue(1)
        self.call = None

    def is_here(self) -> bool:
        """Whether it is of the running loop; a scope around several, one after the other, has one in each."""
        return self.place.dock.is_here()

    @property
    def busy(self) -> bool:
        """Whether a thread is not done with a call of the scope, though its caller may be gone; if that is not who asks."""
        around = _inside.get()
        return self.place.is_running and (around is None or around.slot is not self or around.ended)

    def is_left_in(self, block: Lineage) -> bool:
        """Return whether a call that was made inside a block goes on without its caller."""
        call = self.call
        return call is not None and call.outlives and self.busy and comes_from(call.mark, block)


class Runner:
    """The threads of one adapter. Made cheaply; the threads start with the first call, in the process that makes it."""

    def __init__(self, threads: int, timeout: float | None) -> None:
        """Describe the runner.

        Args:
            threads: how many scopes may be in a call, or hold a connection from one, at a time.
            timeout: seconds a scope waits to be admitted; None waits for ever.
        """
        self.threads = threads
        self.timeout = timeout
        self._crews: dict[int, Crew] = {}

    def run(
        self, scope: Scope, function: Callable[..., _Result], /, *args: Any, **kwargs: Any
    ) -> Coroutine[Any, Any, _Result]:
        """Call `function` on a thread, in `scope`, with a copy of the caller's context; to be awaited.

        A cancelled caller returns at once; the call itself goes on, and the next call of the scope waits for its end.

        Raises: what the function raises; `PoolTimeout` if the scope was not admitted in time.
        """
        return self.call(scope, function, args, kwargs)

    async def call(
        self,
        scope: Scope,
        function: Callable[..., _Result],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
        undo: Callable[[], None] | None = None,
    ) -> _Result:
        """Do what `run` does; if the caller is cancelled, with `undo` after it.

        `undo` is called after the function, before what the caller goes on with; here and now if the function never is.
        """
        try:
            slot = await self._turn(scope)
        except asyncio.CancelledError:
            if undo is not None:
                undo()
            raise
        turn, dock = slot.turn, slot.place.dock
        try:
            running = slot.call = _Running(slot)
            work = functools.partial(_call, running, function, args, kwargs)
            call = Call(slot.place, contextvars.copy_context(), work, turn.leave)
        except BaseException:
            turn.leave()
            raise
        timer = None
        try:
            dock.start(call)
            if call.stage is Stage.PENDING and self.timeout is not None:
                timer = dock.loop.call_later(self.timeout, self._expire, dock, call, scope)
            result: _Result = await call.waiter
        except GeneratorExit:  # perhaps from the garbage collector, which may come while this thread has the lock
            dock.withdraw_later(call)
            raise
        except BaseException as error:
            withdrawn = dock.withdraw(call)  # if it has not begun
            running.outlives = not withdrawn
            if undo is not None and isinstance(error, asyncio.CancelledError):
                self._undo(slot, undo, withdrawn)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        return result

    async def _turn(self, scope: Scope) -> _Slot:
        """Wait until the scope's calls before this one have ended."""
        slot: _Slot | None = scope.slot
        around = _inside.get()
        # Whoever waits inside a call for another call of its scope would wait for ever: the turn is his own.
        inside = slot is not None and around is not None and around.slot is slot and not around.ended
        if slot is None or not slot.is_here():
            if inside:
                raise self._no_turn(scope, "in an event loop of its own")
            slot = scope.slot = _Slot(scope, self._crew.dock(asyncio.get_running_loop()), slot)
        if not slot.turn.enter_now() and not await slot.turn.enter(self.timeout if inside else None):
            raise self._no_turn(scope, f"which had not ended after {self.timeout:g} s")
        return slot

    @staticmethod
    def _undo(slot: _Slot, undo: Callable[[], None], withdrawn: bool) -> None:
        """Call it in place of what was withdrawn, or have it called after what goes on."""
        if withdrawn:
            undo()
            return
        after = Call(slot.place, contextvars.copy_context(), undo, slot.turn.leave)
        slot.turn.when_free(functools.partial(slot.place.dock.start, after))

    def _expire(self, dock: Dock, call: Call, scope: Scope) -> None:
        if call.stage is Stage.PENDING and dock.withdraw(call) and not call.waiter.done():
            hint = "Raise the pool's max_connections, or shorten the work."
            names = ", ".join(state.name for state in scope.states)
            around = scope.parent
            if around is not None and around.slot is not None and around.slot.place.admitted:
                hint = (
                    f"The scope around this one, {around.label}, is one of them, and keeps its connection while it waits: a "
                    "scope inside another needs a second one. Share its scope, or give its connection back first."
                )
            error = PoolTimeout(
                f"{scope.label}: waited {self.timeout:g} s to be admitted to {names}; its places ({self.threads}) were "
                f"taken by units of work that ran or held a connection. {hint}"
            )
            call.waiter.set_exception(error)
            for state in scope.states:
                state.note_timeout(error)

    @property
    def waiting(self) -> int:
        """How many scopes wait to be admitted; from any thread."""
        return self._crew.waiting

    def _no_turn(self, scope: Scope, how: str) -> PoolTimeout:
        return PoolTimeout(
            f"{scope.label}: orm.run was called from inside a call of orm.run, {how}. "
            "Calls of one scope take turns, so one that waits for another never ends: query directly in the function that "
            "orm.run was given."
        )

    def close(self) -> None:
        """Let the threads end when their calls do."""
        self._crew.dismiss()

    @property
    def _crew(self) -> Crew:
        """This process's threads: a lock that a thread of its parent held would never be free here."""
        crew = self._crews.get(os.getpid())
        if crew is None:  # set in one step: several loops may come at once
            crew = self._crews.setdefault(os.getpid(), Crew(self.threads, "peewee-run"))
        return crew


def refuse_coroutines(function: Callable[..., Any]) -> None:
    """Refuse what would only make a coroutine or a generator on the thread, and run none of it.

    Raises: `ConfigurationError` for the function of one, and for what is no function at all.
    """
    if not callable(function):
        given = type(function).__name__
        remedy = (
            "for a query's rows `run(list, query)`, for one value `run(query.scalar)`"
            if isinstance(function, peewee.BaseQuery)
            else "not its result: `run(fn, arg)` calls `fn(arg)` on a thread"
        )
        raise ConfigurationError(
            f"run() was given a {given} object, which is no function. Give the function, {remedy}."
        )
    called = function.func if isinstance(function, functools.partial) else function
    if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
        name = getattr(called, "__qualname__", called)
        raise ConfigurationError(
            f"run({name}): {name} is asynchronous, and `run` is for sync code that queries. Await it yourself, "
            f"`await {getattr(called, '__name__', 'it')}(...)`, and give `run` the sync parts of it."
        )
    if inspect.isgeneratorfunction(called):
        name = getattr(called, "__qualname__", called)
        raise ConfigurationError(
            f"run({name}): {name} is a generator function, and nothing of it would run on the thread. Give a function that "
            f"reads it to its end: `run(lambda: list({getattr(called, '__name__', 'it')}(...)))`."
        )


def _call(
    call: _Running, function: Callable[..., _Result], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> _Result:
    _inside.set(call)
    try:
        return function(*args, **kwargs)
    except StopIteration as error:
        # A future refuses StopIteration, and whoever awaits it would wait for ever.
        raise RuntimeError(f"{getattr(function, '__qualname__', function)} raised StopIteration") from error
    finally:
        call.ended = True
