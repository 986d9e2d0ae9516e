"""Sync Peewee code from async code: the whole unit of work in one bounded set of threads.

Three rules keep it from stalling. Calls are admitted on the loop, before a thread is used, so nobody waits for a connection
while holding a thread that a holder of a connection needs. The place belongs to the *scope*, from its first call until its
connections are given back, so a holder always has a thread for its next call. And the calls of one scope take turns.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import PoolTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

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
        if self._free > 0 and not self._waiters:
            self._free -= 1
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

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiters)

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


class _Call:
    """One call while it runs; its context and what is started from there know it."""

    __slots__ = ("ended", "slot")

    def __init__(self, slot: _Slot) -> None:
        self.slot = slot
        self.ended = False


_inside: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("peewee_frameworks_call", default=None)


class _Slot:
    """What one scope holds of the runner: the turn of its calls, and its place among the scopes."""

    def __init__(self, scope: Scope, gate: Queue) -> None:
        self._scope = scope
        self._gate = gate
        self._loop = asyncio.get_running_loop()
        self._admitted = False
        self._running = False
        self.turn = Queue(1)
        scope.on_release(self._connection_released)

    async def admit(self, timeout: float | None) -> bool:
        """Get a place for this scope, unless it has one."""
        if not self._admitted:
            self._admitted = await self._gate.enter(timeout)
        self._running = self._admitted
        return self._admitted

    def call_ended(self) -> None:
        """Let the scope's next call have its turn; on the loop's thread."""
        self._running = False
        self._give_up_place()
        self.turn.leave()

    def _connection_released(self) -> None:
        """Runs on whichever thread gave the connection back."""
        if self._admitted:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and its queue with it
                self._loop.call_soon_threadsafe(self._give_up_place)

    def _give_up_place(self) -> None:
        if self._admitted and not self._running and not self._scope.connected:
            self._admitted = False
            self._gate.leave()


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
        self._executor: ThreadPoolExecutor | None = None
        self._pid = 0
        self._gates: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Queue] = weakref.WeakKeyDictionary()

    async def run(self, scope: Scope, function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Call `function` on a thread, in `scope`, with a copy of the caller's context.

        A cancelled caller returns at once; the call itself goes on, and the next call of the scope waits for its end.

        Raises: what the function raises; `PoolTimeout` if the scope was not admitted in time.
        """
        slot: _Slot = scope.slot
        if slot is None:
            slot = scope.slot = _Slot(scope, self._gate())
        around = _inside.get()
        # Whoever waits inside a call for another call of its scope would wait for ever: the turn is his own.
        inside = around is not None and around.slot is slot and not around.ended
        if not await slot.turn.enter(self.timeout if inside else None):
            raise self._no_turn(scope)
        try:
            if not await slot.admit(self.timeout):
                raise self._not_admitted(scope)  # noqa: TRY301 - one way out of the turn for every failure
            context = contextvars.copy_context()
            future = self._threads().submit(context.run, _call, _Call(slot), function, args, kwargs)
        except BaseException:
            slot.call_ended()
            raise
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[_Result] = loop.create_future()

        def ended() -> None:
            slot.call_ended()
            if waiter.cancelled() or future.cancelled():
                return
            error = future.exception()
            if error is None:
                waiter.set_result(future.result())
            else:
                waiter.set_exception(error)

        def wake(_: object) -> None:  # once for both: to wake a loop is a system call
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for a turn any more
                loop.call_soon_threadsafe(ended)

        future.add_done_callback(wake)
        try:
            return await waiter
        except asyncio.CancelledError:
            future.cancel()  # if it has not begun
            raise

    def _not_admitted(self, scope: Scope) -> PoolTimeout:
        return PoolTimeout(
            f"{scope.label}: waited {self.timeout:g} s to be admitted; {self.threads} other units of work were running or "
            "holding a connection. Raise the pool's max_connections, or shorten the work."
        )

    @property
    def waiting(self) -> int:
        """How many scopes wait to be admitted; from any thread."""
        return sum(gate.waiting for gate in self._gates.copy().values())

    def _no_turn(self, scope: Scope) -> PoolTimeout:
        return PoolTimeout(
            f"{scope.label}: orm.run was called from inside a call of orm.run, which had not ended after {self.timeout:g} s. "
            "Calls of one scope take turns, so one that waits for another never ends: query directly in the function that "
            "orm.run was given."
        )

    def close(self) -> None:
        """Let the threads end when their calls do."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)

    def _gate(self) -> Queue:
        loop = asyncio.get_running_loop()
        gate = self._gates.get(loop)
        if gate is None:
            gate = self._gates[loop] = Queue(self.threads)
        return gate

    def _threads(self) -> ThreadPoolExecutor:
        if self._executor is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._executor = ThreadPoolExecutor(self.threads, thread_name_prefix="peewee-run")
        return self._executor


def _call(call: _Call, function: Callable[..., _Result], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Result:
    _inside.set(call)
    try:
        return function(*args, **kwargs)
    except StopIteration as error:
        # A future refuses StopIteration, and whoever awaits it would wait for ever.
        raise RuntimeError(f"{getattr(function, '__qualname__', function)} raised StopIteration") from error
    finally:
        call.ended = True
