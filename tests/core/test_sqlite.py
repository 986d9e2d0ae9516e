"""One SQLite connection and several threads: what sqlite3 itself does around SQLite's calls."""

from __future__ import annotations

import sqlite3
import sys

import peewee
import pytest
from playhouse.pool import PooledSqliteDatabase

import peewee_frameworks.pool as ours
from peewee_frameworks import connection_scope
from peewee_frameworks.state import install
from tests.support.concurrency import run_threads

ROUNDS = 400


@pytest.mark.parametrize("cls", [PooledSqliteDatabase, ours.PooledSqliteDatabase])
def test_threads_that_read_on_one_connection_get_their_own_rows(tmp_path, cls):
    """Each its own, though all send the same SQL and fetch at the same time; Python 3.12's own connections mix them up."""
    database = cls(str(tmp_path / "a.db"), max_connections=1)
    install(database)

    def read(index):
        for number in range(ROUNDS):
            wanted = index + 4 * (number % 50)
            cursor = connection.cursor()
            cursor.execute("SELECT x FROM t WHERE x >= ? ORDER BY y LIMIT 1", (wanted,))
            assert cursor.fetchone() == (wanted,)

    with connection_scope(database):
        database.execute_sql("CREATE TABLE t (x INTEGER PRIMARY KEY, y INTEGER)")
        connection = database.connection()
        connection.executemany("INSERT INTO t VALUES (?, ?)", [(number, number) for number in range(200)])
        run_threads(4, read)
    database.close_idle()


@pytest.mark.skipif(
    sys.version_info < (3, 12), reason="connections of Python 3.11 lose no rows and are left as they are, for speed"
)
def test_threads_that_fail_and_read_on_one_connection_see_their_own_errors(tmp_path):
    """sqlite3 asks the connection for its latest error, which must not be what another thread's fetch came to."""
    database = PooledSqliteDatabase(str(tmp_path / "a.db"), max_connections=1)
    install(database)

    def work(index):
        for _ in range(ROUNDS):
            cursor = connection.cursor()
            if index % 2:
                with pytest.raises(sqlite3.IntegrityError):
                    cursor.execute("INSERT INTO t VALUES (1)")
            else:
                assert len(cursor.execute("SELECT 1 UNION ALL SELECT 2").fetchall()) == 2

    with connection_scope(database):
        database.execute_sql("CREATE TABLE t (x INTEGER PRIMARY KEY)")
        database.execute_sql("INSERT INTO t VALUES (1)")
        connection = database.connection()
        run_threads(4, work)
    database.close_idle()


class Mine(sqlite3.Connection):
    """A user's own."""


class OtherDriver(peewee.SqliteDatabase):
    def _connect(self):
        return sqlite3.connect(self.database, isolation_level=None)


class Derived(PooledSqliteDatabase):
    def _connect(self):
        return super()._connect()


@pytest.mark.parametrize(
    ("cls", "params", "factory"),
    [
        (PooledSqliteDatabase, {"factory": Mine}, Mine),
        (OtherDriver, {}, None),
        (Derived, {}, "SharedConnection" if sys.version_info >= (3, 12) else None),
        (ours.PooledSqliteDatabase, {}, "SharedConnection" if sys.version_info >= (3, 12) else None),
    ],
)
def test_connections_of_another_class_are_left_alone(tmp_path, cls, params, factory):
    """A factory that was given stays; a class that connects otherwise may know no factories."""
    database = cls(str(tmp_path / "a.db"), **params)
    install(database)
    chosen = database.connect_params.get("factory")
    assert chosen is factory or chosen.__name__ == factory
    with connection_scope(database):
        assert database.execute_sql("SELECT 1").fetchone() == (1,)
    if hasattr(database, "close_idle"):
        database.close_idle()
