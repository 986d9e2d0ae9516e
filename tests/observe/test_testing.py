"""The helpers for the tests of applications: they fail when they should, say what to look at, and leave nothing behind."""

from __future__ import annotations

import asyncio
import re
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import peewee
import pytest
from flask import Flask
from playhouse.pwasyncio import AsyncSqliteDatabase

from peewee_frameworks import connection_scope
from peewee_frameworks.extension import Extension
from peewee_frameworks.flask import Peewee
from peewee_frameworks.pool import PooledSqliteDatabase
from peewee_frameworks.testing import assert_queries, no_leaks, query_budget
from tests.core.helpers import Gate, in_thread, start

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Any]:
    database = PooledSqliteDatabase(str(tmp_path / "testing.db"))
    with closing(database.pool):
        yield database


def repeat(db: Any, count: int) -> None:
    with connection_scope(db):
        for number in range(count):
            db.execute_sql("SELECT ?", (f"secret {number}",))


def test_a_budget_that_is_kept_passes_and_counts(db):
    with query_budget(db, 3) as queries:
        repeat(db, 3)
        assert queries.count == 3
    assert queries.statements == {"SELECT ?": 3}
    repeat(db, 1)
    assert queries.count == 3
    assert db.query_hooks == []


def test_a_budget_that_is_not_kept_fails_with_the_statements(db):
    with pytest.raises(AssertionError) as failed, query_budget(db, 3):
        repeat(db, 4)
        with connection_scope(db), db.atomic():
            db.execute_sql("SELECT 42")
    assert str(failed.value) == "5 queries were sent, at most 3 expected:\n  4 x SELECT ?\n  1 x SELECT 42"
    assert db.query_hooks == []


@pytest.mark.parametrize("sent", [1, 3])
def test_an_exact_number_fails_both_ways(db, sent):
    with assert_queries(db, 2):
        repeat(db, 2)
    with pytest.raises(AssertionError, match=f"{sent} queries were sent, exactly 2 expected"), assert_queries(db, 2):
        repeat(db, sent)


def test_no_query_where_some_were_expected_is_said(db):
    with (
        pytest.raises(AssertionError, match=r"0 queries were sent, exactly 1 expected:\n  \(none\)"),
        assert_queries(db, 1),
    ):
        pass


def test_what_the_block_raises_is_not_hidden(db):
    with pytest.raises(KeyError), query_budget(db, 1):
        repeat(db, 5)
        raise KeyError
    with pytest.raises(KeyError), no_leaks(db):
        db.pool.acquire()
        raise KeyError
    assert db.query_hooks == []


def test_queries_of_other_threads_and_of_a_client_count(db):
    """A budget goes around a test client's request, wherever that runs."""
    app = Flask("testing")
    orm = Peewee(db)
    orm.init_app(app)
    app.add_url_rule("/", "view", lambda: repeat(db, 2) or "x")
    with assert_queries(orm, 3):
        in_thread(repeat, db, 1)
        app.test_client().get("/").close()


def test_all_databases_of_an_application_or_a_list_count(tmp_path):
    databases = {name: peewee.SqliteDatabase(str(tmp_path / f"{name}.db")) for name in ("one", "two")}
    for given in (Extension(databases), list(databases.values())):
        with assert_queries(given, 2):
            for database in databases.values():
                repeat(database, 1)


def test_asynchronous_blocks(tmp_path):
    db = AsyncSqliteDatabase(str(tmp_path / "testing.db"))

    async def main() -> None:
        async with query_budget(db, 2) as queries, no_leaks(db), connection_scope(db):
            await db.aexecute_sql("SELECT 1")
        assert queries.count == 1
        with pytest.raises(AssertionError, match="2 x SELECT 1"):
            async with connection_scope(db), assert_queries(db, 1):
                await db.aexecute_sql("SELECT 1")
                await db.aexecute_sql("SELECT 1")
        async with connection_scope(db, label="job"):
            with pytest.raises(AssertionError, match=r"by job in (task|thread) '"):
                async with no_leaks(db, timeout=0.05):
                    await db.aexecute_sql("SELECT 1")
        await db.close_pool()

    asyncio.run(main())


def test_a_leak_fails_with_its_holder(db):
    gate = Gate()

    def leak() -> None:
        with connection_scope(db, label="the leaking job"):
            db.execute_sql("SELECT 1")
            gate()

    with pytest.raises(AssertionError) as failed, no_leaks(db, timeout=0.05):
        future = start(leak)
        gate.wait()
    assert re.fullmatch(
        r"Connections are still in use:\n.+: connection 1, for \d\.\d s, by the leaking job in thread 'test-thread'",
        str(failed.value),
    )
    gate.open()
    future.result(10)


def test_what_was_in_use_before_is_not_the_blocks(db):
    conn = db.pool.acquire()
    with no_leaks(db):
        repeat(db, 1)
    db.pool.release(conn)


def test_what_comes_back_in_the_background_is_waited_for(db):
    with no_leaks(db, timeout=10):
        conn = db.pool.acquire()
        timer = threading.Timer(0.05, db.pool.release, (conn,))
        timer.start()
    timer.join()
