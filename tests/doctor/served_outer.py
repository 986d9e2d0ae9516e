"""Two applications with a middleware that queries: `inside` has our scope inside of it, `outside` around it."""

from __future__ import annotations

import os
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from peewee_frameworks.pool import connect
from peewee_frameworks.starlette import Peewee

db = connect(os.environ.get("DATABASE_URL", "postgresql://nobody@127.0.0.1/none"), max_connections=5, timeout=5)


class Outer:
    """Queries before the application does, and answers with the error if that fails."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not scope["path"].startswith("/0"):
            try:
                db.execute_sql("SELECT 1").fetchone()
            except Exception as error:
                await PlainTextResponse(type(error).__name__)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def index(request: Any) -> PlainTextResponse:
    db.execute_sql("SELECT 1").fetchone()
    return PlainTextResponse("ok")


routes = [Route("/{number}", index)]
orm, orm_around = Peewee(db), Peewee(db)
inside = Starlette(routes=routes, middleware=[Middleware(Outer), orm.middleware()])
outside = Starlette(routes=routes, middleware=[Middleware(Outer)])
orm_around.init_app(outside)
