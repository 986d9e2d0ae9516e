"""A feed in Sanic: posts and likes, a websocket to write and read it live, server-sent events, an export that streams.

Run it with ``sanic --factory example_apps.sanic_feed:create_app --workers 2``.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

from sanic import Sanic

from .live import live, start_feed, stop_feed
from .models import orm
from .posts import posts

if TYPE_CHECKING:
    from sanic import Request


def is_operator(request: Request) -> bool:
    """Let in who knows OPS_TOKEN: ``/db/?token=…`` shows what the pool does. Without such a variable, nobody."""
    token = os.environ.get("OPS_TOKEN", "")
    return token != "" and secrets.compare_digest((request.args.get("token") or "").encode(), token.encode())


def create_app(name: str = "feed") -> Sanic:
    """Make the application; ``SANIC_…`` variables of the environment are its configuration."""
    app = Sanic(name)
    orm.init_app(app)
    app.blueprint([posts, live, orm.blueprint("db", url_prefix="/db", guard=is_operator)])
    # After init_app, so that it starts when the database has, and stops before it.
    app.after_server_start(start_feed)
    app.before_server_stop(stop_feed)
    return app
