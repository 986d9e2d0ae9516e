"""The tables, and the database they are in: SQLite in the current directory, or what DATABASE_URL names.

``postgresql://…`` and ``mysql://…`` are sync drivers, ``postgresql+async://…`` an asynchronous one; nothing else changes.
"""

from __future__ import annotations

import os

from peewee import CharField, Check, ForeignKeyField, IntegerField

from peewee_frameworks.fastapi import Peewee
from peewee_frameworks.pool import connect

url = os.environ.get("DATABASE_URL", "sqlite:///shop.db")
# One writer at a time: the others wait for it (milliseconds), and need not wait for the disk as well.
pragmas = {"journal_mode": "wal", "synchronous": "normal", "foreign_keys": 1, "busy_timeout": 20_000}
options = {"pragmas": pragmas} if url.startswith("sqlite") else {}
db = connect(url, max_connections=10, timeout=5, **options)


class Product(db.Model):
    """What is for sale; prices are in cents."""

    name = CharField(80, unique=True)
    price = IntegerField()
    stock = IntegerField(constraints=[Check("stock >= 0")])


class Order(db.Model):
    """What somebody bought."""

    customer = CharField(80)
    total = IntegerField(default=0)

    class Meta:
        table_name = "orders"  # ORDER is a word of SQL


class Line(db.Model):
    """One product of an order, at the price of that day."""

    order = ForeignKeyField(Order, backref="lines", on_delete="CASCADE")
    product = ForeignKeyField(Product)
    quantity = IntegerField()
    price = IntegerField()


# 404 for what is not there, 409 for what is there already, 503 while the database is busy or away; in /docs too.
orm = Peewee(db, create_tables=[Product, Order, Line], errors=True)
