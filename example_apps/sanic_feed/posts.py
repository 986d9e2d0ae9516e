"""The routes that answer and are done. No line here opens, closes or commits anything: each request has its connection.

What queries is called with ``await orm.run(...)``, so that the event loop goes on meanwhile.
"""

from __future__ import annotations

from sanic import Blueprint, HTTPResponse, Request, json
from sanic.exceptions import BadRequest

from .models import like, orm, read, write

posts = Blueprint("posts", url_prefix="/posts")
# Of this blueprint, requests with POST are transactions: committed before the response leaves, rolled back if it is an error.
orm.policy(posts, transaction=lambda request: request.method == "POST")


@posts.get("/")
async def list_posts(request: Request) -> HTTPResponse:
    """List the newest posts."""
    return json(await orm.run(read, newest=True))


@posts.post("/")
async def create_post(request: Request) -> HTTPResponse:
    """Write a post."""
    return json(await orm.run(write, **required(request, "name", "text")), 201)


@posts.post("/import")
async def import_posts(request: Request) -> HTTPResponse:
    """Store all posts of a list, or none: an entry that is wrong aborts, and what came before it is rolled back."""
    stored = 0
    for entry in request.json or []:
        if not entry.get("name") or not entry.get("text"):
            raise BadRequest(f"Entry {stored + 1} needs a name and a text.")
        await orm.run(write, entry["name"], entry["text"])
        stored += 1
    return json({"stored": stored}, 201)


@posts.post("/<post_id:int>/like")
async def like_post(request: Request, post_id: int) -> HTTPResponse:
    """Like a post. Twice is answered with 409, a post that is not there with 404: see ``errors=True``."""
    return json(await orm.run(like, post_id, **required(request, "name")))


@posts.get("/export")
async def export_posts(request: Request) -> None:
    """Stream all posts, a JSON line each. Between two pages no connection is held, however slow the client."""
    response = await request.respond(content_type="application/x-ndjson")
    last = 0
    while page := await orm.run(read, last, 100):
        await response.send("".join(json(post).body.decode() + "\n" for post in page))
        last = page[-1]["id"]
    await response.eof()


def required(request: Request, *names: str) -> dict[str, str]:
    """Return these fields of the request's JSON, or answer 400."""
    entry = request.json
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) and entry[name] for name in names):
        raise BadRequest(f"Send a JSON object with: {', '.join(names)}.")
    return {name: entry[name] for name in names}
