"""Sanic's command line, with one line more in the output: when its manager is ready for signals.

The manager looks every 0.1 s whether all workers are up. A SIGTERM in that time makes it wait for ever (25.12), and it
does not say when it has passed.

Later it compares notes with a process of its own, every 0.1 s too, and on SIGTERM its handler talks to that one in the middle
of the other exchange: then the answers are mixed up and Sanic fails. So the signal waits for the end of each exchange here.
"""

from __future__ import annotations

import functools
import signal
from multiprocessing.managers import BaseProxy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MANAGER_READY = "Manager ready"


def _undisturbed(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            return method(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    return call


def main() -> None:
    """Run Sanic's command line."""
    from sanic.__main__ import main as sanic_main
    from sanic.worker.manager import WorkerManager

    wait_for_ack = WorkerManager.wait_for_ack

    def wait_and_tell(self: Any) -> None:
        wait_for_ack(self)
        print(MANAGER_READY, flush=True)  # noqa: T201

    WorkerManager.wait_for_ack = wait_and_tell  # type: ignore[method-assign]
    exchange: Any = BaseProxy
    exchange._callmethod = _undisturbed(exchange._callmethod)
    sanic_main()


if __name__ == "__main__":
    main()
