"""The tables, and the database they are in: SQLite in the current directory, or what DATABASE_URL names."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from peewee import CharField, DateTimeField, ForeignKeyField, IntegerField, TextField

from peewee_frameworks.pool import connect
from peewee_frameworks.sanic import Peewee

url = os.environ.get("DATABASE_URL", "sqlite:///feed.db")
# One writer at a time: the others wait for it (milliseconds), and need not wait for the disk as well.
pragmas = {"journal_mode": "wal", "synchronous": "normal", "foreign_keys": 1, "busy_timeout": 20_000}
options = {"pragmas": pragmas} if url.startswith("sqlite") else {}
db = connect(url, max_connections=10, timeout=5, **options)


def now() -> datetime:
    """Return the time in UTC, without a zone, since MariaDB and SQLite keep none."""
    return datetime.now(UTC).replace(tzinfo=None, microsecond=0)


class Author(db.Model):
    """Who writes."""

    name = CharField(80, unique=True)


class Post(db.Model):
    """What somebody wrote."""

    author = ForeignKeyField(Author, backref="posts", on_delete="CASCADE")
    text = TextField()
    written = DateTimeField(default=now)
    likes = IntegerField(default=0)

    def as_dict(self) -> dict:
        """Return what the API shows of a post."""
        return {
            "id": self.id,
            "author": self.author.name,
            "text": self.text,
            "written": self.written.isoformat(),
            "likes": self.likes,
        }


class Like(db.Model):
    """That somebody likes a post; once."""

    post = ForeignKeyField(Post, on_delete="CASCADE")
    author = ForeignKeyField(Author, on_delete="CASCADE")

    class Meta:
        indexes = ((("post", "author"), True),)


orm = Peewee(db, create_tables=[Author, Post, Like], errors=True)


def read(after: int = 0, limit: int = 20, *, newest: bool = False) -> list[dict]:
    """Return posts by ascending id from `after` on, or the newest first."""
    order = Post.id.desc() if newest else Post.id
    found = Post.select(Post, Author).join(Author).where(Post.id > after).order_by(order).limit(limit)
    return [post.as_dict() for post in found]


def author_named(name: str) -> Author:
    """Return an author, stored now if new.

    Not ``get_or_create``: of two transactions in SQLite that have read, only one may go on to write.
    """
    Author.insert(name=name).on_conflict_ignore().execute()
    return Author.get(name=name)


def write(name: str, text: str) -> dict:
    """Store a post, and its author if this is the first."""
    return Post.create(author=author_named(name), text=text).as_dict()


def like(post_id: int, name: str) -> dict:
    """Like a post; a second time is an IntegrityError, a post that is not there a DoesNotExist."""
    author = author_named(name)
    post = Post.get_by_id(post_id)
    Post.update(likes=Post.likes + 1).where(Post.id == post).execute()
    Like.create(post=post, author=author)
    return Post.get_by_id(post_id).as_dict()
