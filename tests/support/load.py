"""Many requests at once."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support.client import Client, Request, Response

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Result:
    """The outcome of one request: a response, or the error that was there instead."""

    request: Request
    seconds: float
    response: Response | None = None
    error: Exception | None = None

    @property
    def status(self) -> int:
        """The response's status, 0 if there was none."""
        return self.response.status if self.response else 0

    @property
    def body(self) -> bytes:
        return self.response.body if self.response else b""

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        assert self.response is not None, f"{self.request.path}: {self.error!r}"
        return self.response.json()


def statuses(results: Iterable[Result]) -> dict[int, int]:
    """Count the results by status; 0 stands for errors of the connection."""
    return dict(Counter(result.status for result in results))


def hammer(url: str, requests: Iterable[str | Request], *, concurrency: int, deadline: float = 60.0) -> list[Result]:
    """Send the requests over `concurrency` keep-alive connections that start together; results in order.

    With as many connections as requests all of them are under way at once. Nothing is tried again: a broken
    connection is a result with `error`, and the connection's next request takes a new one. After `deadline`
    seconds what has no answer is a TimeoutError result.
    """
    todo = [request if isinstance(request, Request) else Request(request) for request in requests]
    results: list[Result | None] = [None] * len(todo)
    work: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(todo)):
        work.put(index)
    concurrency = min(concurrency, len(todo))
    barrier = threading.Barrier(concurrency)
    end = time.monotonic() + deadline

    def drive() -> None:
        client: Client | None = None
        # Connect before the start, so that requests arrive together; a failure shows in the first request.
        with contextlib.suppress(OSError):
            client = Client(url, deadline)
        # Broken: somebody could not even connect in time. Go on without him.
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(max(0.001, end - time.monotonic()))
        try:
            while (left := end - time.monotonic()) > 0:
                try:
                    index = work.get_nowait()
                except queue.Empty:
                    return
                start = time.monotonic()
                try:
                    client = client or Client(url, left)
                    client.deadline = left
                    response = client.request(todo[index])
                except (OSError, ValueError) as error:
                    results[index] = Result(todo[index], time.monotonic() - start, error=error)
                    client = _closed(client)
                else:
                    results[index] = Result(todo[index], time.monotonic() - start, response)
                    if not response.keep_alive:
                        client = _closed(client)
        finally:
            _closed(client)

    threads = [threading.Thread(target=drive, name=f"hammer-{i}", daemon=True) for i in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()) + 5)
    late = TimeoutError(f"not done within {deadline} s")
    return [result or Result(todo[i], deadline, error=late) for i, result in enumerate(results)]


def _closed(client: Client | None) -> None:
    if client is not None:
        client.sock.close()
