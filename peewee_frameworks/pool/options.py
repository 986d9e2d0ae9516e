"""What can be set on a pool, validated in one place. Every time is in seconds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from peewee_frameworks.errors import ConfigurationError

__all__ = ["OPTION_NAMES", "PoolOptions", "seconds_to_wait"]


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """The settings of one pool; the first three mean what they mean in ``playhouse.pool``.

    Raises:
        ConfigurationError: a value is out of range, or two contradict; the message names both fields.
    """

    max_connections: int | None = 20
    """Most connections open at once, those being opened and closed included; ``None`` or 0: no limit."""
    stale_timeout: float | None = None
    """Age since connect after which a connection is not used again; renewed in the background before that."""
    timeout: float | None = None
    """How long a checkout waits when all are in use; 0: for ever, ``None``: not at all."""
    min_connections: int = 0
    """Connections to keep open, once the pool is open."""
    max_waiting: int | None = None
    """Callers that may queue; one more is refused with `TooManyWaiters`."""
    max_connecting: int = 32
    """Connects that run at the same time."""
    connect_timeout: float = 10.0
    """After this a connect is given up and its slot freed."""
    ping_after: float | None = 30.0
    """Idle time after which a checkout pings first; ``None``: never."""
    ping_timeout: float = 5.0
    """After this a ping or a rollback is given up and the connection closed."""
    close_timeout: float = 5.0
    """After this a close is given up and the socket cut."""
    idle_timeout: float | None = None
    """Idle time after which connections above ``min_connections`` are closed; ``None``: never."""
    keepalive: float | None = None
    """Idle time after which the upkeep pings a connection; ``None``: never."""
    leak_threshold: float | None = None
    """Time in use after which a connection is reported as leaked, with the unit of work and where that is; ``None``: never."""
    leak_stacks: bool = False
    """Record the stack of each checkout from the start, and not only once there was a suspect; 3 to 4 µs a checkout."""
    reconnect_timeout: float = 300.0
    """How long connecting may fail before ``reconnect_failed`` is emitted, again and again at this interval."""
    on_connect_error: Literal["raise", "retry"] = "raise"
    """Whether a failed connect is reported to the first in the queue, or tried again until its deadline."""
    lifo: bool = True
    """Hand out the connection used last (an unneeded rest can idle out), or the one idle for longest."""
    pool_name: str | None = None
    """Name in messages and statistics; by default the database's."""

    def __post_init__(self) -> None:
        for name in ("max_connections", "min_connections", "max_waiting", "max_connecting"):
            _check_count(name, getattr(self, name), least=1 if name == "max_connecting" else 0)
        for name in _TIMES:
            _check_seconds(name, getattr(self, name), zero=name in _ZERO_ALLOWED)
        if self.on_connect_error not in ("raise", "retry"):
            raise ConfigurationError(f"on_connect_error must be 'raise' or 'retry', not {self.on_connect_error!r}.")
        if self.lifo not in (True, False):
            raise ConfigurationError(f"lifo must be True or False, not {self.lifo!r}.")
        if self.max_connections and self.min_connections > self.max_connections:
            raise ConfigurationError(
                f"min_connections ({self.min_connections}) is larger than max_connections ({self.max_connections})."
            )
        for short, long in _ORDERED:
            low, high = getattr(self, short), getattr(self, long)
            if low and high and low >= high:
                raise ConfigurationError(f"{short} ({low:g} s) must be shorter than {long} ({high:g} s).")

    def replace(self, **changes: Any) -> PoolOptions:
        """Return a copy with ``changes``, validated again."""
        return dataclasses.replace(self, **changes)


OPTION_NAMES = frozenset(field.name for field in dataclasses.fields(PoolOptions))

# What others call the options: pwasyncio, psycopg's pool, SQLAlchemy.
ELSEWHERE = {
    "acquire_timeout": "timeout",
    "max_idle": "idle_timeout",
    "max_lifetime": "stale_timeout",
    "max_overflow": "max_connections",
    "max_size": "max_connections",
    "min_size": "min_connections",
    "pool_min_size": "min_connections",
    "pool_recycle": "stale_timeout",
    "pool_size": "max_connections",
    "pool_timeout": "timeout",
}

_TIMES = (
    "stale_timeout",
    "timeout",
    "connect_timeout",
    "ping_after",
    "ping_timeout",
    "close_timeout",
    "idle_timeout",
    "keepalive",
    "leak_threshold",
    "reconnect_timeout",
)
# Zero has a meaning of its own in playhouse.pool for the first two; zero idle seconds: always ping.
_ZERO_ALLOWED = frozenset({"stale_timeout", "timeout", "ping_after"})
# Pinging a connection that the upkeep is about to close anyway, or leaking before a lifetime begins, is a mistake.
_ORDERED = (("keepalive", "idle_timeout"), ("keepalive", "stale_timeout"), ("idle_timeout", "stale_timeout"))


def _check_count(name: str, value: Any, *, least: int) -> None:
    if value is None and name in ("max_connections", "max_waiting"):
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"{name} must be a whole number of at least {least}, not {value!r}.")


def _check_seconds(name: str, value: Any, *, zero: bool) -> None:
    if value is None and name not in ("connect_timeout", "ping_timeout", "close_timeout", "reconnect_timeout"):
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        raise ConfigurationError(f"{name} must be a number of seconds, not {value!r}.")
    if value < 0 or (value == 0 and not zero):
        raise ConfigurationError(f"{name} must be {'at least' if zero else 'more than'} 0 seconds, not {value!r}.")


def seconds_to_wait(timeout: object) -> tuple[bool, float | None]:
    """Translate playhouse's timeout: ``None`` does not wait, 0 waits for ever. What is left of a budget may be negative.

    Returns:
        Whether to wait at all, and for how many seconds (``None``: for ever).

    Raises:
        ConfigurationError: it is no number of seconds.
    """
    if timeout is None:
        return False, None
    if not isinstance(timeout, int | float) or math.isnan(timeout):
        raise ConfigurationError(f"timeout must be a number of seconds, or None, not {timeout!r}.")
    if timeout in (0, math.inf):
        return True, None
    return True, timeout
