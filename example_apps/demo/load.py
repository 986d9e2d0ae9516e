"""Drives a served application: many clients at once, some of whom go away in the middle of an answer."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.client import Client, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DROPPED = "dropped"


@dataclass(frozen=True)
class Step:
    """One request of the mix: what to ask, the statuses that are right, and whether the client drops it half way."""

    request: Request
    expected: tuple[int, ...] = (200,)
    drops: bool = False


@dataclass
class Outcome:
    """What came of all requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def note(self, step: Step, said: str, seconds: float) -> None:
        """Count an answer."""
        self.statuses[said] += 1
        if said == DROPPED:
            return
        if said in map(str, step.expected):
            self.seconds.append(seconds)
        else:
            self.wrong.append(f"{step.request.method} {step.request.path}: {said}")

    def percentile(self, share: float) -> float:
        """Return the time in seconds within which this share of the answers came."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def drive(
    url: str, mix: Sequence[Callable[[int], Step]], requests: int, clients: int, tick: Callable[[int], None]
) -> Outcome:
    """Send `requests` requests from `clients` threads, each on a connection it keeps while the server does.

    Args:
        url: of the server.
        mix: makes the step for a number; taken in turn.
        requests: how many in all.
        clients: how many at the same time.
        tick: told after each how many are done.
    """
    steps: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
    for number, make in zip(range(requests), itertools.cycle(mix), strict=False):
        steps.put(make(number))
    for _ in range(clients):
        steps.put(None)
    outcome, lock, together = Outcome(), threading.Lock(), threading.Barrier(clients)

    def client() -> None:
        connection: Client | None = None
        together.wait(30)
        while (step := steps.get()) is not None:
            began = time.perf_counter()
            try:
                connection = connection or Client(url)
                connection, said = _ask(connection, step)
            except (OSError, ValueError) as error:
                if connection is not None:
                    connection.drop("fin")
                connection, said = None, f"{type(error).__name__}: {error}"
            with lock:
                outcome.note(step, said, time.perf_counter() - began)
                tick(outcome.statuses.total())
        if connection is not None:
            connection.drop("fin")

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return outcome


def _ask(connection: Client, step: Step) -> tuple[Client | None, str]:
    connection.send(step.request)
    if step.drops:
        connection.read_head()
        connection.drop("rst")
        return None, DROPPED
    response = connection.read_response()
    if response.keep_alive:
        return connection, str(response.status)
    connection.drop("fin")
    return None, str(response.status)
