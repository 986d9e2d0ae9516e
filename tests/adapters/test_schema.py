"""Tables made at start by several workers at once."""

from __future__ import annotations

import threading

import peewee
import pytest

from peewee_frameworks.schema import create_tables
from tests.support.concurrency import run_threads

WORKERS = 5


def test_workers_that_start_together_all_find_their_tables(database):
    class Author(database.Model):
        name = peewee.CharField(unique=True)

    class Post(database.Model):
        author = peewee.ForeignKeyField(Author)
        number = peewee.IntegerField(index=True)

    together = threading.Barrier(WORKERS)

    def start(_):
        with database.connection_context():
            together.wait(10)
            create_tables(database, [Author, Post])

    for _ in range(5):
        run_threads(WORKERS, start)
        with database.connection_context():
            assert len(database.get_indexes(Post._meta.table_name)) >= 2
            database.drop_tables([Author, Post])


def test_any_other_failure_is_raised(database):
    class Wrong(database.Model):
        name = peewee.CharField(constraints=[peewee.SQL("CHECK (")])

    with database.connection_context(), pytest.raises(peewee.DatabaseError):
        create_tables(database, [Wrong])
