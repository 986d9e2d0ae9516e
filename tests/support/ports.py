"""A TCP port of 127.0.0.1 that nobody else gets while it is held."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "127.0.0.1"


@contextmanager
def reserved_port() -> Iterator[int]:
    """Give a port that only a listener with SO_REUSEADDR (every web server sets it) can take until the end.

    The socket that holds the port is bound but never listens: the kernel hands the port to nobody who asks
    for "any port", a connect to it is refused as long as nobody listens, and a server may be stopped and
    started on it again.
    """
    with socket.socket() as holder:
        holder.bind((HOST, 0))
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield holder.getsockname()[1]


def accepts(port: int, timeout: float = 1.0) -> bool:
    """Tell whether somebody listens on the port."""
    try:
        socket.create_connection((HOST, port), timeout).close()
    except OSError:
        return False
    return True
