"""What a pool tells those who listen.

Listeners are called outside the pool's lock, in whatever thread the event happened; what they raise is logged.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from peewee_frameworks.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EVENTS", "Events"]

logger = logging.getLogger("peewee_frameworks.pool")

EVENTS = {
    "connect": "a connection was opened (connection)",
    "connect_error": "a connect failed (error)",
    "reconnect_failed": "connecting has failed for reconnect_timeout; repeated at that interval (error)",
    "checkout": "a connection was handed out (connection)",
    "checkin": "a connection came back (connection)",
    "close": "a connection was closed (connection, reason)",
    "invalidate": "all connections opened so far were invalidated (reason)",
    "timeout": "a caller waited in vain (error)",
    "leak": "a connection has been in use for longer than leak_threshold (connection, seconds)",
}


class Events:
    """A registry of listeners."""

    def __init__(self) -> None:
        self._listeners: defaultdict[str, list[Callable[..., Any]]] = defaultdict(list)

    def on(self, event: str, listener: Callable[..., Any]) -> Callable[..., Any]:
        """Call ``listener(**details)`` at every ``event``; for the names and details see ``EVENTS``.

        Raises:
            ConfigurationError: there is no such event, or the listener cannot be called.
        """
        if event not in EVENTS:
            raise ConfigurationError(f"There is no pool event {event!r}; there are {', '.join(EVENTS)}.")
        if not callable(listener):
            raise ConfigurationError(f"The listener of the pool event {event!r} must be a function, not {listener!r}.")
        self._listeners[event].append(listener)
        return listener

    def wants(self, *events: str) -> bool:
        """Say whether anybody listens to one of ``events``."""
        return any(self._listeners.get(event) for event in events)

    def emit(self, event: str, **details: Any) -> None:
        """Tell the listeners."""
        for listener in tuple(self._listeners.get(event, ())):
            try:
                listener(**details)
            except Exception:  # a listener's fault is not the pool's
                logger.exception("A listener of the pool event %r failed.", event, extra={"event": event})
