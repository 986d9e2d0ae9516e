"""Serve "module:name" with Werkzeug's threaded server: run_werkzeug TARGET PORT [--factory]."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Any

from werkzeug.serving import run_simple


def load(target: str, *, factory: bool) -> Any:
    """Import the WSGI application, or call what makes it."""
    module, _, name = target.partition(":")
    found = getattr(importlib.import_module(module), name)
    return found() if factory else found


def stop(*_: object) -> None:
    """End the server's loop the way it knows."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    application = load(sys.argv[1], factory="--factory" in sys.argv)
    run_simple("127.0.0.1", int(sys.argv[2]), application, threaded=True)
