"""Leaks and slow holders of an application's databases, by its option ``leak_threshold``.

Our pools look after themselves: they are told the threshold. For all others, playhouse's pools, asynchronous and unpooled
databases, a watch looks from time to time at what is in use, in the thread that also looks after our pools.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from .forks import watch_forks
from .holders import connections_out, describe
from .pool.leaks import Suspect, log_returned, log_suspect
from .pool.workers import threads_here
from .stacks import take

if TYPE_CHECKING:
    from .frame import Frame
    from .holders import Out
    from .state import State

INTERVAL = 1.0  # seconds between two looks when nobody is due earlier
_RETURN_INTERVAL = 0.25  # while somebody who was reported is still out


class _Reported(NamedTuple):
    name: str
    taken: float  # monotonic, whatever clock the pool goes by
    suspect: Suspect


class LeakWatch:
    """The watch over the databases of one `Peewee`."""

    def __init__(self, threshold: float, *, stacks: bool) -> None:
        """Take the options; nothing runs before the first connect.

        Args:
            threshold: seconds in use after which a connection is suspected.
            stacks: record where each connection is taken, before there is a suspect.
        """
        self._threshold = threshold
        self._stacks = stacks
        self._states: list[State] = []
        self._reported: dict[tuple[State, int, float], _Reported] = {}
        self._running = False
        watch_forks(self)

    def add(self, state: State) -> None:
        """Watch over a database, unless somebody does so already or its pool has a threshold of its own."""
        if any(isinstance(getattr(listener, "__self__", None), LeakWatch) for listener in state.listeners):
            return
        pool = getattr(state.database, "pool", None)
        if pool is None:
            self._states.append(state)
            state.listen(self._connected)
            state.leaks = state.leaks or 0
        elif pool.options.leak_threshold is None:
            stacks = self._stacks or pool.options.leak_stacks
            pool.configure(pool.options.replace(leak_threshold=self._threshold, leak_stacks=stacks))

    def _connected(self, frame: Frame, _start: float, _seconds: float) -> None:
        if self._stacks:
            frame.stack = take(sys._getframe(2))
        if not self._running:
            self._running = True
            threads_here().maintainer.schedule(self)

    def maintain(self) -> float:
        """Report who has passed the threshold and who is back; return in how many seconds to look again."""
        wait, out = INTERVAL, set()
        for state in self._states:
            if state.database is None:
                continue
            passed: list[Out] = []
            for item in connections_out(state):
                key = (state, item.number, item.since)
                out.add(key)
                if item.seconds < self._threshold:
                    wait = min(wait, self._threshold - item.seconds)
                elif key not in self._reported:
                    passed.append(item)
            self._report(state, passed)
        now = time.monotonic()
        for key in self._reported.keys() - out:
            name, taken, suspect = self._reported.pop(key)
            log_returned(name, key[1], now - taken, suspect)
        return min(wait, self._threshold, _RETURN_INTERVAL if self._reported else INTERVAL)

    def _report(self, state: State, passed: list[Out]) -> None:
        if not passed:
            return
        self._stacks = True
        suspects = describe(state, [item.use.conn for item in passed if item.use is not None])
        for item in passed:
            suspect = suspects.get(item.number, Suspect())
            if item.stack is not None:
                suspect = suspect._replace(stack=item.stack)
            elif item.use is not None:
                item.use.frame.stack = suspect.stack
            self._reported[state, item.number, item.since] = _Reported(
                state.name, time.monotonic() - item.seconds, suspect
            )
            state.leaks = (state.leaks or 0) + 1
            log_suspect(state.name, item.number, item.seconds, suspect)

    def after_fork(self) -> None:
        """Start over in a forked child, where nothing is in use and nobody watches."""
        self._running = False
        self._reported.clear()
