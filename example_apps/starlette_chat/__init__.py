"""A chat in Starlette: rooms, messages, a websocket to talk, server-sent events to listen.

Run it with ``uvicorn --factory example_apps.starlette_chat:create_app``; with
``DATABASE_URL=postgresql+async://postgres@127.0.0.1/test`` on an asynchronous driver.
"""

from __future__ import annotations

from starlette.applications import Starlette

from .bell import ringing
from .live import live
from .models import orm
from .rooms import rooms


def create_app() -> Starlette:
    """Make the application."""
    return Starlette(routes=[*rooms, *live], lifespan=orm.lifespan(ringing), middleware=[orm.middleware()])
