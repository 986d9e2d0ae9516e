"""The routes that stay open: hundreds of clients may listen, and none of them holds a connection while nothing happens.

Each worker has one task that looks for new posts, whichever worker stored them, and hands them to its clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any

import peewee
from sanic import Blueprint, Request, Sanic, Websocket

from .models import Post, orm, read, write

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

live = Blueprint("live", url_prefix="/live")

LOOK_EVERY = 0.5  # seconds, for posts that other workers have stored
HEARTBEAT = 15.0  # seconds; RESPONSE_TIMEOUT ends a stream that sends nothing for longer than itself
BACKLOG = 100


class Feed:
    """The clients of one worker."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self._listeners: set[asyncio.Queue[dict]] = set()

    @contextlib.contextmanager
    def listen(self) -> Iterator[asyncio.Queue[dict]]:
        """Give a queue of the posts to come. A client that is too slow for it loses the oldest."""
        queue: asyncio.Queue[dict] = asyncio.Queue(BACKLOG)
        self._listeners.add(queue)
        try:
            yield queue
        finally:
            self._listeners.discard(queue)

    async def watch(self, last: int) -> None:
        """Hand out each post after the one with id `last`, for ever."""
        while True:
            try:
                # A task of its own, in no request: `orm.run` gives each look a scope, so it holds nothing in between.
                for post in await orm.run(read, last, BACKLOG):
                    last = post["id"]
                    self._publish(post)
            except peewee.DatabaseError as error:
                logger.warning("Looking for new posts failed, will try again: %s", error)
            self.wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY):
                    await self.wake.wait()

    def _publish(self, post: dict) -> None:
        for queue in self._listeners:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(post)


async def start_feed(app: Sanic) -> None:
    """Start the worker's feed, at the newest post."""
    app.ctx.feed = Feed()
    last = await orm.run(lambda: Post.select(peewee.fn.MAX(Post.id)).scalar() or 0)
    app.ctx.watcher = asyncio.create_task(app.ctx.feed.watch(last))


async def stop_feed(app: Sanic) -> None:
    """Stop looking for posts."""
    app.ctx.watcher.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await app.ctx.watcher


@live.get("/events")
async def events(request: Request) -> None:
    """Send each new post as a server-sent event."""
    response = await request.respond(content_type="text/event-stream", headers={"Cache-Control": "no-store"})
    with request.app.ctx.feed.listen() as queue:
        await response.send(": welcome\n\n")
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT):
                    post = await queue.get()
            except TimeoutError:
                await response.send(": still here\n\n")
            else:
                await response.send(f"id: {post['id']}\ndata: {json.dumps(post)}\n\n")


@live.websocket("/socket")
async def socket(request: Request, ws: Websocket) -> None:
    """Take posts, as ``{"name": …, "text": …}``, and send each new one, whoever wrote it."""
    feed: Feed = request.app.ctx.feed
    with feed.listen() as queue:
        sender = asyncio.create_task(forward(queue, ws))
        try:
            async for message in ws:
                error = await store(message)
                if error:
                    await ws.send(json.dumps({"error": error}))
                feed.wake.set()
        finally:
            sender.cancel()


async def forward(queue: asyncio.Queue[dict], ws: Any) -> None:
    """Send what comes through the queue."""
    while True:
        await ws.send(json.dumps(await queue.get()))


async def store(message: str | bytes | None) -> str | None:
    """Store one message, in a transaction and with a connection of its own; return what is wrong with it."""
    try:
        entry = json.loads(message or "")
        name, text = str(entry["name"]), str(entry["text"])
    except (ValueError, KeyError, TypeError):
        return 'Send {"name": …, "text": …}.'
    async with orm.scope("a message"):
        await orm.run(write_atomic, name, text)
    return None


@orm.database.atomic()
def write_atomic(name: str, text: str) -> None:
    """Store author and post, or neither."""
    write(name, text)
