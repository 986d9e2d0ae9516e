"""The threads behind `Runner`, which go from one call to the next by themselves.

A thread that has finished a call takes the next one that may run, and the results of several wake the loop once. To ask the
loop for each next call would cost a wake-up of the loop and one of a thread for every unit of work, with the processor idle
between.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import TYPE_CHECKING, Any

from .frame import running_loop

if TYPE_CHECKING:
    import asyncio
    import contextvars
    from collections.abc import Callable

    from .scope import Scope


_NO_BOUND = 1 << 16

# As many threads with a call each do not keep the loop from the interpreter for long, and need not line up for it.
_FEW = 2


class Stage(Enum):
    """Where a call is."""

    PENDING = "waits for a place"
    READY = "has a place and waits for a thread"
    RUNNING = "is on a thread"
    GONE = "nobody is to run it"


class Call:
    """A function to be called on a thread, and the future of its result."""

    __slots__ = ("_call", "_context", "_ended", "error", "place", "result", "stage", "waiter")

    place: Place

    def __init__(
        self, place: Place, context: contextvars.Context, call: Callable[[], Any], ended: Callable[[], None]
    ) -> None:
        """Describe the call.

        Args:
            place: whose call it is.
            context: what it runs in.
            call: the function.
            ended: called on the loop's thread when it has ended, or never will begin.
        """
        self._ended = ended
        self._context = context
        self._call: Callable[[], Any] | None = call
        self.place = place
        self.stage = Stage.PENDING
        self.waiter: asyncio.Future[Any] = place.dock.loop.create_future()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Call it, on this thread."""
        call, self._call = self._call, None
        assert call is not None  # noqa: S101 - it runs once
        try:
            self.result = self._context.run(call)
        except BaseException as error:  # noqa: BLE001 - whoever awaits the result gets it
            self.error = error

    def withdrawn(self) -> None:
        """It will not begin; on the loop's thread."""
        self._call = None
        self._ended()

    def deliver(self) -> None:
        """Let the caller have the result; on the loop's thread."""
        self._ended()
        result, error = self.result, self.error
        self.result = self.error = None  # its traceback refers to this call
        if self.waiter.cancelled():
            return
        if error is None:
            self.waiter.set_result(result)
        else:
            self.waiter.set_exception(error)


class Place:
    """A scope's place among those that may run or hold a connection: its own from its first call until it holds none."""

    __slots__ = ("_before", "_scope", "admitted", "dock", "running")

    dock: Dock
    admitted: bool
    running: bool

    def __init__(self, scope: Scope, dock: Dock, before: Place | None = None) -> None:
        self._scope = scope
        # The scope's place in the loop it was in before, where others may wait for it.
        self._before = before if before is not None and before.admitted and before.dock.is_open() else None
        self.dock = dock
        self.admitted = False
        self.running = False
        scope.on_release(self._connection_released)

    @property
    def is_running(self) -> bool:
        """Whether a call of the scope is on a thread or about to be, from whichever loop."""
        return self.running or (self._before is not None and self._before.is_running)

    @property
    def is_idle(self) -> bool:
        """Whether another scope may have it."""
        return self.admitted and not self.running and not self._scope.holding

    def _connection_released(self) -> None:
        """Runs on whichever thread gave the connection back."""
        if self._before is not None:
            self._before._connection_released()
        if not self.admitted or self.running:
            return  # the end of a call looks by itself
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits for a place
            loop = self.dock.loop
            (loop.call_soon if running_loop() is loop else loop.call_soon_threadsafe)(self.dock.leave, self)


class Dock:
    """Where the calls of one event loop wait for a place, and their results for the loop."""

    def __init__(self, crew: Crew, loop: weakref.ref[asyncio.AbstractEventLoop]) -> None:
        self._loop = loop  # weakly: it is what a loop's entry in a weak dictionary refers to
        self._crew = crew
        self._free = crew.size
        self._pending: collections.deque[Call] = collections.deque()
        self._done: list[Call] = []

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, which lives as long as somebody runs in it.

        Raises: RuntimeError if it is gone, as a closed loop does when it is called.
        """
        loop = self._loop()
        if loop is None:
            raise RuntimeError("the event loop is gone")
        return loop

    def is_here(self) -> bool:
        """Return whether the caller runs in the loop."""
        return running_loop() is self._loop()

    def is_open(self) -> bool:
        """Return whether anybody may still run in the loop."""
        loop = self._loop()
        return loop is not None and not loop.is_closed()

    @property
    def waiting(self) -> int:
        """How many scopes wait for a place; from any thread."""
        return len(self._pending)

    def start(self, call: Call) -> None:
        """Have a call run, as soon as its scope has a place."""
        place = call.place
        with self._crew.lock:
            if not place.admitted:
                if self._free <= 0 or self._pending:
                    self._pending.append(call)
                    return
                self._free -= 1
            self._admit(call)
            self._crew.ready.append(call)
        self._crew.call_up()

    def withdraw(self, call: Call) -> bool:
        """Take back a call that no thread has begun; return whether that was so."""
        with self._crew.lock:
            if call.stage is Stage.PENDING:
                self._pending.remove(call)
            elif call.stage is not Stage.READY:
                return False
            else:
                with contextlib.suppress(ValueError):  # a thread that has ended a call of the place has it in hand
                    self._crew.ready.remove(call)
            call.stage = Stage.GONE
            call.place.running = False
        call.withdrawn()
        self.leave(call.place)
        return True

    def withdraw_later(self, call: Call) -> None:
        """Take it back in a turn of the loop; takes no lock."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits in it any more
            self.loop.call_soon_threadsafe(self.withdraw, call)

    def leave(self, place: Place) -> None:
        """Give a place that is not needed any more to the next in line."""
        with self._crew.lock:
            call = self._next(place)
            if call is None:
                return
            self._crew.ready.append(call)
        self._crew.call_up()

    def finished(self, call: Call) -> tuple[Call | None, bool]:
        """Note the end of a call, on its thread.

        Returns: the call that has its place now, if it is free; whether nobody else sees to it that the loop is woken.
        """
        with self._crew.lock:
            call.place.running = False
            following = self._next(call.place)
            if following is None:
                self._crew.running -= 1
            self._done.append(call)
            first = len(self._done) == 1
        return following, first

    def wake(self) -> None:
        """Have the results delivered; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for a result
            self.loop.call_soon_threadsafe(self._deliver)

    def _next(self, place: Place) -> Call | None:
        """Take the place of who needs it no more; return the call that gets it. The caller has the lock."""
        if not place.is_idle:
            return None
        place.admitted = False
        if not self._pending:
            self._free += 1
            return None
        call = self._pending.popleft()
        self._admit(call)
        return call

    def _admit(self, call: Call) -> None:
        call.place.admitted = call.place.running = True
        call.stage = Stage.READY

    def _deliver(self) -> None:
        with self._crew.lock:
            done, self._done = self._done, []
        for call in done:
            call.deliver()


class Crew:
    """The threads; they start when there is work, in the process that has it.

    There is one for every call that has a place, so `size` in all for each event loop. Fewer would not do: the callers of one
    loop would wait on all of them for connections that scopes of another hold, whose next call waits for a thread.

    So many threads that find their answers at once would all want the interpreter, and the loop comes by it in their midst:
    with ten of them a timer was 15 to 25 ms late, and up to half of the processor's time went into handing it over. Hence the
    turnstile: between two calls a thread stands in line for the interpreter with nothing else to do, twice, and only one of
    them does so at a time. The longer the line is, the fewer threads come through, and those that stand before it do not stand
    in line; where threads wait for their server, there is no line. Its holder waits for nothing else, so nobody waits for long.
    """

    def __init__(self, size: int, name: str) -> None:
        self.size = size
        self._name = name
        self._executor: ThreadPoolExecutor | None = None
        self._docks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Dock] = weakref.WeakKeyDictionary()
        # Held for a few instructions, never while something runs or waits.
        self.lock = threading.Lock()
        self._turnstile = threading.Lock()  # held for a turn of the interpreter or two, and for nothing else
        self.ready: collections.deque[Call] = collections.deque()
        self.running = 0  # calls that a thread has in hand
        self._working = 0

    def dock(self, loop: asyncio.AbstractEventLoop) -> Dock:
        """Return the dock of an event loop, on its thread; made now if there is none."""
        dock = self._docks.get(loop)
        if dock is None:
            dock = self._docks[loop] = Dock(self, weakref.ref(loop))
        return dock

    @property
    def waiting(self) -> int:
        """How many scopes wait for a place, in all loops; from any thread."""
        # Not `values`: another loop may come meanwhile.
        docks = [self._docks.get(loop) for ref in self._docks.keyrefs() if (loop := ref()) is not None]
        return sum(dock.waiting for dock in docks if dock is not None)

    def call_up(self) -> None:
        """See to it that what is ready is run."""
        with self.lock:
            if self.ready and self._working < self.running + len(self.ready):
                if self._executor is None:  # it makes a thread only if none is idle; the places bound their number
                    self._executor = ThreadPoolExecutor(_NO_BOUND, thread_name_prefix=self._name)
                self._executor.submit(self._work)
                self._working += 1

    def dismiss(self) -> None:
        """Let the threads end when their calls do."""
        with self.lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)

    def _work(self) -> None:
        call: Call | None = None
        asleep: Dock | None = None  # whose loop has yet to hear of the call before
        while True:
            try:
                if self.running > _FEW:
                    self._stand_in_line(asleep)
                elif asleep is not None:
                    asleep.wake()
            except BaseException:  # noqa: BLE001 - another thread raised it in this one, too late for the call that it meant
                if asleep is not None:  # nobody else would ever wake the loop again
                    asleep.wake()
            with self.lock:
                if call is not None and call.stage is not Stage.READY:  # it was taken back meanwhile
                    call = None
                    self.running -= 1
                if call is None:
                    if not self.ready:
                        self._working -= 1
                        return
                    call = self.ready.popleft()
                    self.running += 1
                call.stage = Stage.RUNNING
            call.run()
            dock = call.place.dock
            call, first = dock.finished(call)
            asleep = dock if first else None

    def _stand_in_line(self, asleep: Dock | None) -> None:
        """Give the interpreter away and take it again, twice, behind whoever stands at the turnstile.

        To wake a loop gives it away as well. The loop hears of several calls at once where there is a line, and of each where
        there is none.
        """
        with self._turnstile:
            if asleep is None:
                time.sleep(0)
            else:
                asleep.wake()
            time.sleep(0)
