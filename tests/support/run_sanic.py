"""Sanic's command line, with one line more in the output: when its manager is ready for signals.

The manager looks every 0.1 s whether all workers are up. A SIGTERM in that time makes it wait for ever (25.12), and it
does not say when it has passed.
"""

from __future__ import annotations

from typing import Any

MANAGER_READY = "Manager ready"


def main() -> None:
    """Run Sanic's command line."""
    from sanic.__main__ import main as sanic_main
    from sanic.worker.manager import WorkerManager

    wait_for_ack = WorkerManager.wait_for_ack

    def wait_and_tell(self: Any) -> None:
        wait_for_ack(self)
        print(MANAGER_READY, flush=True)  # noqa: T201

    WorkerManager.wait_for_ack = wait_and_tell  # type: ignore[method-assign]
    sanic_main()


if __name__ == "__main__":
    main()
