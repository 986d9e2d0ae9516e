"""Every error this package raises.

::

    PeeweeFrameworksError
    ├── ConfigurationError          (ValueError)                      wrong option, URL, order of calls
    ├── ScopeError                  (peewee.InterfaceError)
    │   ├── ConcurrentUse                                             two users of one connection at once
    │   ├── ScopeEnded                                                a query after the request was over
    │   └── TransactionLost     (peewee.OperationalError)             its connection is gone, it cannot go on
    ├── DatabaseUnavailable         (peewee.OperationalError)         connecting failed
    ├── PoolError                   (peewee.OperationalError)
    │   ├── PoolExhausted           (playhouse's MaxConnectionsExceeded)
    │   │   ├── PoolTimeout                                           waited, and the deadline passed
    │   │   ├── TooManyWaiters                                        the queue is bounded and full
    │   │   └── WouldBlock                                            waiting here would stall an event loop
    │   ├── PoolConnectTimeout                                        the server did not answer in time
    │   ├── PoolClosed
    │   └── ForeignConnection                                         a connection of another pool
    ├── WrongEventLoop              (peewee.InterfaceError)           a pool used outside its event loop
    └── GeventNotPatched            (RuntimeError)                    gevent patched late or not at all

Each subclasses what its callers already catch.
"""

from __future__ import annotations

import peewee
from playhouse.pool import MaxConnectionsExceeded

__all__ = [
    "ConcurrentUse",
    "ConfigurationError",
    "DatabaseUnavailable",
    "ForeignConnection",
    "GeventNotPatched",
    "PeeweeFrameworksError",
    "PoolClosed",
    "PoolConnectTimeout",
    "PoolError",
    "PoolExhausted",
    "PoolTimeout",
    "ScopeEnded",
    "ScopeError",
    "TooManyWaiters",
    "TransactionLost",
    "WouldBlock",
    "WrongEventLoop",
]


class PeeweeFrameworksError(Exception):
    """The root of the tree: catch it to catch all of ours."""


class ConfigurationError(PeeweeFrameworksError, ValueError):
    """An option, URL or order of calls cannot work; the message names it and the remedy."""


class ScopeError(PeeweeFrameworksError, peewee.InterfaceError):
    """A connection was used against the rules of its scope."""


class ConcurrentUse(ScopeError):
    """A second thread or task used a connection, or a transaction, that another one is using."""


class ScopeEnded(ScopeError):
    """A query came after the request, message or job it belonged to had ended."""


class TransactionLost(ScopeError, peewee.OperationalError):
    """The connection of an open transaction was lost, or a statement of it cancelled; all of it is rolled back.

    Also for what was started inside a block and goes on after it was rolled back.
    """

    disconnected: bool = False
    """Whether the server or the network ended the connection: the same may succeed shortly, and a response is 503."""


class DatabaseUnavailable(PeeweeFrameworksError, peewee.OperationalError):
    """Connecting to the database failed; the driver's error is the ``__cause__``."""


class PoolError(PeeweeFrameworksError, peewee.OperationalError):
    """The connection pool could not do what was asked."""


class PoolExhausted(PoolError, MaxConnectionsExceeded):
    """Every connection is in use and none may be opened or waited for."""


class PoolTimeout(PoolExhausted):
    """No connection came free within the timeout."""


class TooManyWaiters(PoolExhausted):
    """As many callers as ``max_waiting`` allows are waiting already."""


class WouldBlock(PoolExhausted):
    """Getting a connection here would have to wait on an event loop's thread, which would stall the loop."""


class PoolConnectTimeout(PoolError):
    """The server did not complete a connect within the deadline."""


class PoolClosed(PoolError):
    """The pool is closed."""


class ForeignConnection(PoolError):
    """A connection was returned to a pool that does not own it."""


class WrongEventLoop(PeeweeFrameworksError, peewee.InterfaceError):
    """An asynchronous pool was used from another event loop, or process, than the one that opened it."""


class GeventNotPatched(PeeweeFrameworksError, RuntimeError):
    """Gevent runs here, but its monkey patch came too late or is missing a part."""
