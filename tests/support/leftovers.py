"""What a test left behind in this process."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from pathlib import Path

GRACE_SECONDS = 3.0


def wait_for_threads(before: set[threading.Thread]) -> list[str]:
    """Give the names of non-daemon threads that are not in `before`, after time to end has passed."""
    end = time.monotonic() + GRACE_SECONDS
    new = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
    for thread in new:
        thread.join(max(0.0, end - time.monotonic()))
    return [thread.name for thread in new if thread.is_alive()]


def open_sockets() -> frozenset[str]:
    """Name the sockets that this process has open; empty where there is no /proc."""
    found = set()
    for descriptor in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            target = str(descriptor.readlink())
            if target.startswith("socket:"):
                found.add(target)
    return frozenset(found)


def wait_for_sockets(before: frozenset[str]) -> frozenset[str]:
    """Name the open sockets that are not in `before`, after garbage is collected and time to close has passed."""
    end = time.monotonic() + GRACE_SECONDS
    while left := open_sockets() - before:
        if time.monotonic() > end:
            break
        gc.collect()
        time.sleep(0.02)
    return left
