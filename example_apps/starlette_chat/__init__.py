"""A chat in Starlette: rooms, messages, a websocket to talk, server-sent events to listen.

Run it with ``uvicorn --factory example_apps.starlette_chat:create_app``; with
``DATABASE_URL=postgresql+async://postgres@127.0.0.1/test`` on an asynchronous driver.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.routing import Mount

from .bell import ringing
from .live import live
from .models import orm
from .rooms import rooms

if TYPE_CHECKING:
    from starlette.requests import Request


def is_operator(request: Request) -> bool:
    """Let in who knows OPS_TOKEN: ``/db/?token=…`` shows what the pool does. Without such a variable, nobody."""
    token = os.environ.get("OPS_TOKEN", "")
    return token != "" and secrets.compare_digest(request.query_params.get("token", "").encode(), token.encode())


def create_app() -> Starlette:
    """Make the application."""
    operators = Mount("/db", orm.app(guard=is_operator))
    return Starlette(routes=[*rooms, *live, operators], lifespan=orm.lifespan(ringing), middleware=[orm.middleware()])
