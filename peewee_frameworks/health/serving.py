"""Is the web server about to stop? A stream of events must end then, or the server waits for it.

Servers do not tell applications: uvicorn ends the lifespan only after the last response, gunicorn says nothing at all. But both
keep their word in the object whose method handles SIGTERM.
"""

from __future__ import annotations

import signal
from typing import Any

__all__ = ["is_stopping", "threads_of_server"]


def is_stopping() -> bool | None:
    """Return whether the server was told to stop; None where that cannot be known."""
    server = _server()
    if hasattr(server, "should_exit"):  # uvicorn's Server
        return bool(server.should_exit)
    if hasattr(server, "alive") and hasattr(server, "notify"):  # gunicorn's Worker
        return not server.alive
    return None


def threads_of_server() -> int | None:
    """Return how many threads serve requests in this process; None where that cannot be known."""
    server = _server()
    return (
        int(server.cfg.threads) if hasattr(server, "tpool") and hasattr(server, "cfg") else None
    )  # gunicorn's gthread


def _server() -> Any:
    return getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
