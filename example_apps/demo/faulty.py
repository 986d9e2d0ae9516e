"""Applications with one fault each, which the demo must find, and the same without: what `test_demo` has it serve."""

from __future__ import annotations

import contextvars
import os
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from peewee_frameworks import connection_scope
from peewee_frameworks.pool import connect
from peewee_frameworks.starlette import Peewee

from . import recorder
from .mixes import get

if TYPE_CHECKING:
    from collections.abc import Callable

    from .load import Step

FAULT_AT = 7  # one request of all


def step(number: int) -> Step:
    """Ask for the fault once, and for what works before and after."""
    return get("/fault" if number == FAULT_AT else "/")


MIX = [step]


def sound() -> Any:
    """Make one without a fault."""
    return _make(lambda db: None)


def leaking() -> Any:
    """Make one that takes a connection which nobody gives back."""
    # In a context of its own it is not the request's, and belongs to a thread that goes on.
    return _make(lambda db: contextvars.Context().run(db.connect))


def sharing() -> Any:
    """Make one whose pool hands a connection out that another still holds."""

    def fault(db: Any) -> None:
        db.pool.engine.checkin(db.connection())  # so it believes that this one came back
        with connection_scope(db):
            db.connect()

    return _make(fault)


def answering_wrong() -> Any:
    """Make one that fails."""

    def fault(db: Any) -> None:
        raise HTTPException(500)

    return _make(fault)


def _make(fault: Callable[[Any], object]) -> Any:
    db = connect(os.environ["DATABASE_URL"])

    def work(request: Any) -> PlainTextResponse:
        if request.url.path == "/fault":
            fault(db)
        return PlainTextResponse(str(db.execute_sql("SELECT 1").fetchone()[0]))

    app = Starlette(routes=[Route("/", work), Route("/fault", work)])
    Peewee(db).init_app(app)
    return recorder.asgi(app, recorder.Recorder(db))
