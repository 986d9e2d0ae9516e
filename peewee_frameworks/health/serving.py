"""Is the web server about to stop? A stream of events must end then, or the server waits for it.

Servers do not tell applications: uvicorn ends the lifespan only after the last response, gunicorn says nothing at all. But both
keep their word in the object whose method handles SIGTERM.
"""

from __future__ import annotations

import signal
from typing import Any

__all__ = ["is_stopping"]


def is_stopping() -> bool | None:
    """Return whether the server was told to stop; None where that cannot be known."""
    server: Any = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if hasattr(server, "should_exit"):  # uvicorn's Server
        return bool(server.should_exit)
    if hasattr(server, "alive") and hasattr(server, "notify"):  # gunicorn's Worker
        return not server.alive
    return None
