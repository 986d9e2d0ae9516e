"""The routes. No line here opens, closes or commits anything: each request has its connection.

The import is a transaction (see ``transaction=`` in ``__init__.py``): committed before the response leaves, rolled back if it
is an error.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response, abort, request, url_for

from .models import Comment, Post

if TYPE_CHECKING:
    from collections.abc import Iterator

blog = Blueprint("blog", __name__)

PAGE = 100


@blog.get("/")
@blog.get("/posts")
def list_posts() -> Any:
    """List the newest posts."""
    return [post.as_dict() for post in Post.select().order_by(Post.id.desc()).limit(20)]


@blog.post("/posts")
def create_post() -> Any:
    """Create a post. A slug that is taken is an IntegrityError, which is answered with 409."""
    post = store(request.get_json())
    return post.as_dict(), 201, {"Location": url_for(".show_post", slug=post.slug)}


@blog.get("/posts/<slug>")
def show_post(slug: str) -> Any:
    """Show a post with its comments. A slug that is not there is a DoesNotExist, which is answered with 404."""
    return Post.get(Post.slug == slug).as_dict(comments=True)


@blog.post("/posts/<slug>/comments")
def create_comment(slug: str) -> Any:
    """Comment on a post."""
    entry = required(request.get_json(), "author", "text")
    return Comment.create(post=Post.get(Post.slug == slug), **entry).as_dict(), 201


@blog.post("/import")
def import_posts() -> Any:
    """Store all posts of a list, or none: an entry that is wrong aborts, and what came before it is rolled back."""
    return {"stored": len([store(entry) for entry in request.get_json()])}, 201


@blog.get("/export")
def export_posts() -> Any:
    """Stream all posts, a JSON line each. Between two pages no connection is held, however slow the client."""

    def lines() -> Iterator[str]:
        last = 0
        while page := list(Post.select().where(Post.id > last).order_by(Post.id).limit(PAGE)):
            yield "".join(json.dumps(post.as_dict(), default=str) + "\n" for post in page)
            last = page[-1].id

    return Response(lines(), mimetype="application/x-ndjson")


@blog.get("/health")
def health() -> Any:
    """Answer whether the process lives; it is in ``exclude=``, so it does so without the database."""
    return {"status": "ok"}


def store(entry: Any) -> Post:
    """Store a post as a client has sent it."""
    return Post.create(**required(entry, "slug", "title", "body"))


def required(entry: Any, *names: str) -> dict[str, str]:
    """Return these fields of what a client has sent, or answer 422."""
    try:
        return {name: str(entry[name]) for name in names}
    except (KeyError, TypeError):
        abort(422, f"Each entry needs {', '.join(names)}.")
