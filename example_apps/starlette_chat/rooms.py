"""Rooms and their messages. Queries are awaited: on a thread with a sync driver, on the loop with an asynchronous one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Route

from .models import Room, orm, said, say

if TYPE_CHECKING:
    from starlette.requests import Request


async def fields(request: Request, *names: str) -> dict[str, str]:
    """Return these fields of the request's JSON, or answer 400."""
    try:
        entry: Any = await request.json()
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) and entry[name] for name in names):
        raise HTTPException(400, f"Send a JSON object with: {', '.join(names)}.")
    return {name: entry[name] for name in names}


async def list_rooms(_: Request) -> JSONResponse:
    """List the rooms."""
    return JSONResponse([room.name for room in await orm.database.list(Room.select().order_by(Room.name))])


async def open_room(request: Request) -> JSONResponse:
    """Open a room; a name that is taken is a 409: see ``errors=True``."""
    room = await Room.acreate(**await fields(request, "name"))
    return JSONResponse({"name": room.name}, 201)


async def list_messages(request: Request) -> JSONResponse:
    """List what was said; a room that is not there is a 404."""
    after = int(request.query_params.get("after", 0))
    return JSONResponse(await orm.run(said, request.path_params["room"], after))


async def add_message(request: Request) -> JSONResponse:
    """Say something."""
    message = await orm.run(say, request.path_params["room"], **await fields(request, "author", "text"))
    request.state.bell.ring()
    return JSONResponse(message, 201)


rooms = [
    Route("/rooms", list_rooms, methods=["GET"]),
    Route("/rooms", open_room, methods=["POST"]),
    Route("/rooms/{room}/messages", list_messages, methods=["GET"]),
    Route("/rooms/{room}/messages", add_message, methods=["POST"]),
]
