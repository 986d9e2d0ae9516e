"""The tables, and the database they are in: SQLite in the current directory, or what DATABASE_URL names."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from peewee import CharField, DateTimeField, ForeignKeyField, TextField
from playhouse.shortcuts import model_to_dict

from peewee_frameworks.pool import connect

url = os.environ.get("DATABASE_URL", "sqlite:///blog.db")
# One writer at a time: the others wait for it (milliseconds), and need not wait for the disk as well.
pragmas = {"journal_mode": "wal", "synchronous": "normal", "foreign_keys": 1, "busy_timeout": 20_000}
options = {"pragmas": pragmas} if url.startswith("sqlite") else {}
db = connect(url, max_connections=10, timeout=5, **options)


def now() -> datetime:
    """Return the time in UTC, without a zone, since MariaDB and SQLite keep none."""
    return datetime.now(UTC).replace(tzinfo=None, microsecond=0)


class Post(db.Model):
    """An article."""

    slug = CharField(80, unique=True)
    title = CharField(200)
    body = TextField()
    published = DateTimeField(default=now)

    def as_dict(self, *, comments: bool = False) -> dict:
        """Return what the API shows of a post."""
        return model_to_dict(self, recurse=False) | (
            {"comments": [comment.as_dict() for comment in self.comments.order_by(Comment.id)]} if comments else {}
        )


class Comment(db.Model):
    """What a reader has to say about a post."""

    post = ForeignKeyField(Post, backref="comments", on_delete="CASCADE")
    author = CharField(80)
    text = TextField()

    def as_dict(self) -> dict:
        """Return what the API shows of a comment."""
        return {"author": self.author, "text": self.text}
