"""Middleware of other people, for the applications in Starlette and FastAPI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocketDisconnect

from .asynchronous import deadline
from .work import Spoiled, Vetoed, World, rid_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.websockets import WebSocket


class Hooks(BaseHTTPMiddleware):
    """Short-circuit or raise before the endpoint, raise after it; on demand of the request's headers."""

    def __init__(self, app: Any, world: World, when: str) -> None:
        super().__init__(app)
        self.world = world
        self.when = when

    async def dispatch(self, request: Any, call_next: Any) -> Any:
        what, _, moment = request.headers.get("X-Before", "").partition("-")
        if moment == self.when:
            rid = await self.world.work.inline(self.world.work.value, rid_of(request.url.path))
            if what == "raise":
                raise Vetoed
            return PlainTextResponse(rid, 202)
        response = await call_next(request)
        if request.headers.get("X-After") == f"response-{self.when}":
            await self.world.work.inline(self.world.work.value, rid_of(request.url.path))
            raise Spoiled
        return response


class Deadlines:
    """A server-side deadline around whatever serves /deadline/<kind>: asyncio's, wait_for's or anyio's."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if not path.startswith("/deadline/"):
            await self.app(scope, receive, send)
            return
        try:
            kind = path.split("/")[2].partition("-")[0]
            if kind == "wait_for":
                import asyncio

                await asyncio.wait_for(self.app(scope, receive, send), 0.1)
            else:
                with_deadline = deadline(kind)
                if kind == "anyio":
                    with with_deadline:
                        await self.app(scope, receive, send)
                else:
                    async with with_deadline:
                        await self.app(scope, receive, send)
        except TimeoutError:
            await PlainTextResponse(rid_of(path), 504)(scope, receive, send)


async def messages(socket: WebSocket) -> AsyncIterator[str]:
    """Give a websocket's messages until it is closed."""
    try:
        while True:
            yield await socket.receive_text()
    except WebSocketDisconnect:
        return
