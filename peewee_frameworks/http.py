"""What a database error means to an HTTP client: one table for all frameworks.

Off by default (``errors=False``). The details say nothing of the query, its values or the server: the log has the reason.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from http import HTTPStatus

import peewee
from playhouse.pool import MaxConnectionsExceeded

from .drivers import is_contention, is_disconnect
from .errors import DatabaseUnavailable, PoolClosed, PoolConnectTimeout, TransactionLost
from .redact import redact
from .scope import current_scope

logger = logging.getLogger("peewee_frameworks.app")

RETRY_AFTER_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """An HTTP error response: its status, a sentence for the client, extra headers."""

    status: int
    detail: str
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """The status's standard phrase."""
        return HTTPStatus(self.status).phrase

    @property
    def body(self) -> bytes:
        """The response's body, in the shape FastAPI gives its errors."""
        return json.dumps({"detail": self.detail}).encode()


_RETRY = {"Retry-After": str(RETRY_AFTER_SECONDS)}
BUSY = Problem(503, "The service is busy. Try again shortly.", _RETRY)
UNAVAILABLE = Problem(503, "The database is not available. Try again shortly.", _RETRY)
NOT_FOUND = Problem(404, "Not found.")
CONFLICT = Problem(409, "The request conflicts with the stored data.")
SERVER_ERROR = Problem(500, "Internal Server Error")

# The exception classes an adapter registers handlers for; `problem_for` decides what each instance means.
HANDLED: tuple[type[Exception], ...] = (
    MaxConnectionsExceeded,
    peewee.OperationalError,
    peewee.InterfaceError,
    peewee.InternalError,
    peewee.DoesNotExist,
    peewee.IntegrityError,
)


def problem_for(error: BaseException) -> Problem | None:
    """Return the response an exception deserves, or None if it is an ordinary server error."""
    if isinstance(error, MaxConnectionsExceeded):
        return BUSY
    if isinstance(error, peewee.DoesNotExist):
        return NOT_FOUND
    if isinstance(error, peewee.IntegrityError):
        return CONFLICT
    if isinstance(error, (DatabaseUnavailable, PoolClosed, PoolConnectTimeout)) or _is_disconnect(error):
        return UNAVAILABLE
    return BUSY if is_contention(error) else None


def answer_to(error: BaseException) -> Problem | None:
    """Return `problem_for` an exception that is answered now, and log what the client is not told.

    It is one line: a traceback for each request would exhaust what an exhausted pool has left. What a row that is not there or
    twice says is not logged: it has values of the query, and is no fault of the service.
    """
    problem = problem_for(error)
    if problem is not None and problem.status >= SERVER_ERROR.status:
        scope = current_scope()
        label = scope.label if scope is not None else "a request"
        databases = [] if scope is None else [state.database for state in scope.states]
        logger.warning(
            "%s: %s: %s",
            label,
            type(error).__name__,
            redact(" ".join(str(error).split()), databases),
            extra={"request": label, "status": problem.status},
        )
    return problem


def _is_disconnect(error: BaseException) -> bool:
    if isinstance(error, TransactionLost):
        return error.disconnected
    lost = (peewee.OperationalError, peewee.InterfaceError, peewee.InternalError)
    return isinstance(error, lost) and is_disconnect(error)
