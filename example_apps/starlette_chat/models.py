"""The tables, and the database they are in: SQLite in the current directory, or what DATABASE_URL names.

``postgresql://…`` and ``mysql://…`` are sync drivers, ``postgresql+async://…`` an asynchronous one; nothing else changes.
"""

from __future__ import annotations

import os

from peewee import CharField, ForeignKeyField, TextField

from peewee_frameworks.pool import connect
from peewee_frameworks.starlette import Peewee

url = os.environ.get("DATABASE_URL", "sqlite:///chat.db")
# One writer at a time: the others wait for it (milliseconds), and need not wait for the disk as well.
pragmas = {"journal_mode": "wal", "synchronous": "normal", "foreign_keys": 1, "busy_timeout": 20_000}
options = {"pragmas": pragmas} if url.startswith("sqlite") else {}
db = connect(url, max_connections=10, timeout=5, **options)


class Room(db.Model):
    """Where people talk."""

    name = CharField(80, unique=True)


class Message(db.Model):
    """What somebody said."""

    room = ForeignKeyField(Room, backref="messages", on_delete="CASCADE")
    author = CharField(80)
    text = TextField()

    def as_dict(self) -> dict:
        """Return what the API shows of a message."""
        return {"id": self.id, "author": self.author, "text": self.text}


orm = Peewee(db, create_tables=[Room, Message], errors=True)


def said(room: str, after: int = 0, limit: int = 100) -> list[dict]:
    """Return what was said in a room after a message, the oldest first."""
    messages = Room.get(Room.name == room).messages.where(Message.id > after)
    return [message.as_dict() for message in messages.order_by(Message.id).limit(limit)]


def say(room: str, author: str, text: str) -> dict:
    """Store a message; DoesNotExist if there is no such room."""
    return Message.create(room=Room.get(Room.name == room), author=author, text=text).as_dict()
