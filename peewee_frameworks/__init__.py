"""One Peewee connection per web request, given back exactly once.

The adapters are modules of their own: `peewee_frameworks.flask`, `.sanic`, `.fastapi`, `.starlette`; `.asgi` and `.wsgi` serve
any other framework. This module imports no framework and no driver.
"""

from .errors import (
    ConcurrentUse,
    ConfigurationError,
    DatabaseUnavailable,
    ForeignConnection,
    GeventNotPatched,
    PeeweeFrameworksError,
    PoolClosed,
    PoolConnectTimeout,
    PoolError,
    PoolExhausted,
    PoolTimeout,
    ScopeEnded,
    ScopeError,
    TooManyWaiters,
    TransactionLost,
    WouldBlock,
    WrongEventLoop,
)
from .scope import Scope, connection_scope, current_scope

__version__ = "0.1.0"

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
    "Scope",
    "ScopeEnded",
    "ScopeError",
    "TooManyWaiters",
    "TransactionLost",
    "WouldBlock",
    "WrongEventLoop",
    "connection_scope",
    "current_scope",
]
