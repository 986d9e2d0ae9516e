"""What stays open: a websocket to talk and listen, server-sent events to listen. While they idle they hold no connection."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from starlette.responses import StreamingResponse
from starlette.routing import Route, WebSocketRoute

from .bell import follow
from .models import orm, said, say

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.websockets import WebSocket


async def events(request: Request) -> StreamingResponse:
    """Stream a room's messages; a browser that reconnects says what it had last."""
    room = request.path_params["room"]
    last = int(request.headers.get("last-event-id", 0))
    await orm.run(said, room, last, 1)  # a room that is not there is a 404 now, not a broken stream later

    async def stream() -> AsyncIterator[str]:
        async for message in follow(request.state.bell, room, last):
            yield f"id: {message['id']}\ndata: {json.dumps(message)}\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream")


async def talk(socket: WebSocket) -> None:
    """Send what is said in the room, say what is sent.

    Both directions are in one scope, where the calls of `orm.run` take turns on one connection.
    """
    room, author = socket.path_params["room"], socket.query_params.get("author", "somebody")
    await socket.accept()

    async def listen() -> None:
        async for message in follow(socket.state.bell, room, int(socket.query_params.get("after", 0))):
            await socket.send_json(message)

    listening = asyncio.create_task(listen())
    try:
        async for text in socket.iter_text():
            await orm.run(say, room, author, text)
            socket.state.bell.ring()
    finally:
        listening.cancel()


live = [Route("/rooms/{room}/events", events), WebSocketRoute("/rooms/{room}/talk", talk)]
