"""The drop-in: what ``playhouse.pool`` promises, kept; on SQLite, for which no server is needed."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading

import peewee
import playhouse.pool
import psycopg
import pymysql.connections
import pytest
from playhouse import db_url
from playhouse.pool import MaxConnectionsExceeded

import peewee_frameworks.pool as ours
from peewee_frameworks import connection_scope
from peewee_frameworks.errors import ConfigurationError, PoolClosed, PoolError, PoolExhausted
from peewee_frameworks.pool import PooledDatabase, PooledMySQLDatabase, PooledPostgresqlDatabase, PooledSqliteDatabase
from peewee_frameworks.state import install
from tests.support.concurrency import eventually, run_threads

from .stub import settled


@pytest.fixture
def db(tmp_path):
    db = PooledSqliteDatabase(str(tmp_path / "x.db"), max_connections=3, timeout=5)
    yield db
    db.pool.close(1)


def test_all_classes_are_playhouses_pooled_databases():
    names = [name for name in ours.__all__ if name.startswith("Pooled") and name.endswith("Database")]
    assert len(names) == 9
    for name in names:
        cls = getattr(ours, name)
        assert issubclass(cls, playhouse.pool.PooledDatabase)
        assert issubclass(cls, PooledDatabase)
    with pytest.raises(AttributeError):
        ours.PooledNothing  # noqa: B018


def test_the_import_is_cheap():
    """No driver beyond those that Peewee itself imports, no extension of Peewee, no asyncio."""
    code = (
        "import sys, peewee, playhouse.pool; before = set(sys.modules); import peewee_frameworks.pool;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new & {'asyncio', 'pymysql', 'psycopg', 'sqlite3', 'gevent', 'flask'}),"
        "sorted(name for name in set(sys.modules) - before if name.startswith('playhouse')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[0] == "[] []"


def test_no_lock_is_made_and_no_thread_started_before_the_first_use(tmp_path):
    before = threading.active_count()
    db = PooledSqliteDatabase(str(tmp_path / "x.db"))
    assert db.pool._engine is None
    assert threading.active_count() == before
    assert repr(db.pool).endswith("not open yet>")


def test_connect_and_close_mean_what_they_meant(db):
    assert db.is_closed()
    assert db.connect() is True
    with pytest.raises(peewee.OperationalError, match="already opened"):
        db.connect()
    assert db.connect(reuse_if_open=True) is False
    with db.atomic(), pytest.raises(peewee.OperationalError, match="transaction is open"):
        db.close()
    conn = db.connection()
    assert db.close() is True
    assert db.close() is False
    db.connect()
    assert db.connection() is conn
    db.close()
    with db:
        assert db.execute_sql("select 1").fetchone() == (1,)
    with db.connection_context():
        pass
    assert db.pool.stats().used == 0


def test_a_deferred_database_says_so_and_can_be_initialised(tmp_path):
    db = PooledSqliteDatabase(None)
    with pytest.raises(peewee.InterfaceError, match="must be initialized"):
        db.connect()
    with pytest.raises(peewee.InterfaceError):
        db.close()
    db.init(str(tmp_path / "x.db"), max_connections=2, stale_timeout=60, timeout=0)
    assert (db._max_connections, db._stale_timeout, db._wait_timeout) == (2, 60, float("inf"))
    with db:
        pass
    db.pool.close(1)


def test_all_in_use_is_the_error_it_was(tmp_path):
    db = PooledSqliteDatabase(str(tmp_path / "x.db"), max_connections=1)
    db.connect()

    def work(_):
        with pytest.raises(MaxConnectionsExceeded) as caught:
            db.connect()
        assert isinstance(caught.value, PoolExhausted)
        assert isinstance(caught.value, peewee.OperationalError)
        assert isinstance(caught.value, ValueError)
        assert db.is_closed()

    run_threads(2, work)
    db.close()
    db.pool.close(1)


def test_a_driver_error_at_connect_is_peewees(tmp_path):
    db = PooledSqliteDatabase(str(tmp_path / "no" / "such" / "folder.db"))
    with pytest.raises(peewee.OperationalError, match="unable to open"):
        db.connect()
    assert db.is_closed()
    db.pool.close(0)


def test_manual_close_closes_instead_of_returning(db):
    assert db.manual_close() is False
    db.connect()
    conn = db.connection()
    db.manual_close()
    assert db.is_closed()
    db.connect()
    assert db.connection() is not conn
    db.close()
    eventually(lambda: db.pool.stats().closes == {"manual_close()": 1})


def test_close_idle_close_stale_and_close_all(db):
    def work(_):
        db.connect()
        barrier.wait(5)
        db.close()

    barrier = threading.Barrier(3)
    run_threads(3, work)
    assert len(db._connections) == 3
    db.close_idle()
    assert db.pool.stats().total == 0
    db.connect()
    assert len(db._in_use) == 1
    assert db.close_stale(age=600) == 0
    assert db.close_stale(age=0) == 1
    db.close()  # the connection is gone already: no error
    db.connect()
    db.close_all()
    assert db.is_closed()
    assert db.pool.stats().total == 0
    with db:
        pass


def test_dispose_forgets(db):
    db.connect()
    conn = db.connection()
    db.dispose()
    assert db.is_closed()
    assert db.pool.stats().total == 0
    with db:
        pass
    conn.close()  # forgotten, not closed


def test_init_with_another_database_does_not_hand_out_connections_to_the_first(db, tmp_path):
    with db:
        db.execute_sql("create table first (x)")
    db.init(str(tmp_path / "second.db"))
    with db:
        assert db.get_tables() == []


def test_options_are_validated_by_name(tmp_path):
    with pytest.raises(ConfigurationError, match=r"min_connections.*max_connections"):
        PooledSqliteDatabase(str(tmp_path / "x.db"), max_connections=2, min_connections=3)
    with pytest.raises(ConfigurationError, match="max_connections"):
        PooledSqliteDatabase(str(tmp_path / "x.db"), max_connections="many")
    assert PooledSqliteDatabase(str(tmp_path / "x.db"), max_connections="7", timeout="2.5")._max_connections == 7
    with pytest.raises(ConfigurationError, match="check_same_thread"):
        PooledSqliteDatabase(str(tmp_path / "x.db"), check_same_thread=True)


@pytest.mark.parametrize(("typo", "option"), [("max_connection", "max_connections"), ("stale_timout", "stale_timeout")])
def test_what_is_all_but_the_name_of_an_option_is_refused(typo, option):
    """The driver would get it, and complain at the first connect, in its own words."""
    with pytest.raises(ConfigurationError, match=rf"{typo}\b.*{option}\?"):
        PooledSqliteDatabase("x.db", **{typo: 3})
    db = PooledSqliteDatabase(None)
    with pytest.raises(ConfigurationError, match=option):
        db.init("x.db", **{typo: 3})


@pytest.mark.parametrize(
    ("theirs", "option"),
    [
        ("pool_size", "max_connections"),  # pwasyncio, SQLAlchemy
        ("max_size", "max_connections"),  # psycopg's pool
        ("min_size", "min_connections"),
        ("max_lifetime", "stale_timeout"),
        ("pool_recycle", "stale_timeout"),
        ("acquire_timeout", "timeout"),
    ],
)
def test_the_name_of_another_pools_option_is_refused_with_ours(theirs, option):
    with pytest.raises(ConfigurationError, match=rf"Unknown option {theirs}: it is called {option} here"):
        PooledPostgresqlDatabase("shop", **{theirs: 3})


def test_arguments_of_drivers_are_not_taken_for_typos():
    names = {*inspect.signature(pymysql.connections.Connection).parameters}
    names |= {default.keyword.decode() for default in psycopg.pq.Conninfo.get_defaults()}
    names |= {"connection_timeout", "read_timeout", "cached_statements", "isolation_level"}
    db = PooledPostgresqlDatabase("x", **dict.fromkeys(names - {"connect_timeout", "database", "self"}))
    assert "keepalives" in db.connect_params


def test_connect_timeout_is_an_option_on_every_database(tmp_path):
    """SQLite's driver has none; the text of an environment variable is no number to PyMySQL; libpq has no infinity."""
    db = PooledSqliteDatabase(str(tmp_path / "x.db"), connect_timeout="3")
    assert db.pool.options.connect_timeout == 3
    assert "connect_timeout" not in db.connect_params
    db.connect()
    db.close()
    db.pool.close()
    assert PooledMySQLDatabase("x", connect_timeout="3").connect_params["connect_timeout"] == 3
    assert "connect_timeout" not in PooledMySQLDatabase("x", connect_timeout=None).connect_params
    assert PooledPostgresqlDatabase("x", connect_timeout=None).connect_params["connect_timeout"] == 10
    PooledPostgresqlDatabase("x", connect_timeout=float("inf"))
    with pytest.raises(ConfigurationError, match="connect_timeout"):
        PooledMySQLDatabase("x", connect_timeout="soon")


def test_a_connection_string_in_place_of_a_name_is_refused_without_its_password():
    """PostgreSQL would say that the database "host=… password=…" does not exist."""
    with pytest.raises(ConfigurationError) as caught:
        PooledPostgresqlDatabase("host=h dbname=shop password=secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("cls", [PooledSqliteDatabase, PooledMySQLDatabase])
def test_the_pool_of_a_deferred_database_does_not_connect(cls):
    db = cls(None)
    with pytest.raises(peewee.InterfaceError, match="initialized"):
        db.pool.acquire(timeout=5)
    db.pool.close(0)


@pytest.mark.parametrize("place", [":memory:", "file::memory:", "file:some?mode=memory"])
def test_58_a_private_database_is_one_connection_that_does_not_age(place):
    """Its end would be the end of its tables; tests often run with the options of production."""
    db = PooledSqliteDatabase(
        place, max_connections=8, stale_timeout=300, idle_timeout=60, uri=place.startswith("file")
    )
    options = db.pool.options
    assert (options.max_connections, options.stale_timeout, options.idle_timeout) == (1, None, None)
    db.execute_sql("create table t (x)")
    db.close()
    assert db.get_tables() == ["t"]
    db.close()
    db.pool.close()


def test_a_shared_memory_database_has_as_many_connections_as_asked_for():
    assert PooledSqliteDatabase("file:some?mode=memory&cache=shared", uri=True).pool.options.max_connections == 20


@pytest.mark.parametrize("end", ["close_all", "close_stale", "close"])
def test_a_query_on_a_connection_that_was_taken_back_says_so(db, end):
    """The driver would say "(0, '')", or speak of a bad parameter."""
    db.connect()
    if end == "close":
        db.pool.close(0)
        eventually(lambda: not db.pool.stats().total)  # SQLite's are closed in the background
    else:
        run_threads(1, lambda _: db.close_all() if end == "close_all" else db.close_stale(-1))
    expected = PoolClosed if end == "close" else PoolError
    for _ in range(2):
        with pytest.raises(expected, match=r"while (this connection|it) was in use"):
            db.execute_sql("select 1")
    with pytest.raises(expected, match="in use"), db.atomic():
        pass
    db.close()
    if end != "close":
        assert db.execute_sql("select 1").fetchone() == (1,)


def test_an_error_on_a_connection_that_was_forgotten_keeps_its_name(db):
    db.connect()
    run_threads(1, lambda _: db.dispose())
    with pytest.raises(peewee.OperationalError, match="syntax") as caught:
        db.execute_sql("bogus")
    assert not isinstance(caught.value, PoolError)
    db.close()


def test_raw_sql_that_leaves_a_transaction_open_is_rolled_back(db):
    with db.connection_context():
        db.execute_sql("create table t (x)")
        db.execute_sql("begin")
        db.execute_sql("insert into t values (1)")
    with db.connection_context():
        assert db.execute_sql("select count(*) from t").fetchone() == (0,)
    eventually(lambda: settled(db.pool))


def test_any_database_class_can_be_mixed_in(tmp_path):
    class Thing(peewee.SqliteDatabase):
        opened = 0

        def _connect(self):
            self.opened += 1
            return super()._connect()

    class PooledThing(PooledDatabase, Thing):
        pass

    db = PooledThing(str(tmp_path / "x.db"), check_same_thread=False, max_connections=2)
    for _ in range(3):
        with db:
            pass
    assert db.opened == 1
    db.pool.close(1)


@pytest.mark.parametrize(
    ("url", "cls"),
    [
        ("mysql+pool://u:p%40ss@h:3307/shop?max_connections=7&timeout=2.5&charset=latin1", PooledMySQLDatabase),
        ("postgresql+pool://u:p%40ss@h/shop?max_connections=7&timeout=2.5", PooledPostgresqlDatabase),
        ("postgres+pool://u:p%40ss@h/shop?max_connections=7&timeout=2.5", PooledPostgresqlDatabase),
        ("mysql://u:p%40ss@h/shop?max_connections=7&timeout=2.5", PooledMySQLDatabase),
        ("sqlite+pool:///x.db?max_connections=7&timeout=2.5", PooledSqliteDatabase),
    ],
)
def test_urls_give_our_classes(url, cls):
    db = ours.connect(url, min_connections=1)
    assert type(db) is cls
    assert (db._max_connections, db._wait_timeout, db.pool.options.min_connections) == (7, 2.5, 1)
    if "@" in url:
        assert db.connect_params["password"] == "p@ss"
        assert "p@ss" not in repr(db.pool)


def test_urls_that_cannot_work_are_refused_without_their_password():
    for url in ("oracle://u:secret@h/x", "mysql+pool://u:secret@h"):
        with pytest.raises(ConfigurationError) as caught:
            ours.connect(url)
        assert "secret" not in str(caught.value)
    for unset in (None, "", 5):
        with pytest.raises(ConfigurationError, match="environment variable"):
            ours.connect(unset)


def test_playhouses_own_table_of_urls_changes_only_when_told_to(monkeypatch):
    monkeypatch.setattr(db_url, "schemes", dict(db_url.schemes))
    assert db_url.schemes["sqlite+pool"] is playhouse.pool.PooledSqliteDatabase
    ours.register_urls()
    assert type(db_url.connect("sqlite+pool:///x.db")) is PooledSqliteDatabase


def test_36_functions_among_the_connect_arguments_are_asked_at_each_connect():
    passwords = iter(["first", "second"])
    seen = []

    class Thing(peewee.Database):
        def _connect(self):
            seen.append(dict(**self.connect_params))
            return type("Conn", (), {"close": lambda self: None, "in_transaction": False})()

    class PooledThing(PooledDatabase, Thing):
        pass

    db = PooledThing("x", password=lambda: next(passwords), user="u")
    for _ in range(2):
        db.connect()
        db.manual_close()
    assert seen == [{"password": "first", "user": "u"}, {"password": "second", "user": "u"}]
    with pytest.raises(StopIteration):
        db.connect()
    db.pool.close(0)


def test_it_works_under_the_scope_aware_state(db):
    install(db)
    with db.connection_context():
        assert db.execute_sql("select 1").fetchone() == (1,)
    with db.atomic():
        db.execute_sql("create table t (x)")
    db.close()
    assert db.pool.stats().used == 0
    assert run_threads(4, lambda _: (db.connect(), db.close())) == [(True, True)] * 4


@pytest.mark.parametrize("installed", [False, True])
def test_an_exhausted_pool_says_who_has_held_a_connection_for_longest(db, installed):
    db.pool.resize(1)
    if installed:
        install(db)
    taken, go = threading.Event(), threading.Event()

    def hold():
        db.connect()
        taken.set()
        go.wait(10)
        db.close()

    holder = threading.Thread(target=hold, name="HOLDER")
    holder.start()
    assert taken.wait(10)
    with pytest.raises(PoolError, match="longest in use: connection 1 for") as caught:
        db.pool.acquire(timeout=0.01)
    told = " by thread 'HOLDER', outside any scope (in an application: was init_app forgotten"
    assert (told in str(caught.value)) is installed
    go.set()
    holder.join(10)
    if installed:
        with connection_scope(db, label="the nightly job"):
            db.connect()
            with pytest.raises(PoolError, match=r"for 0\.\d+ s by the nightly job\)"):
                db.pool.acquire(timeout=0.01)


def test_an_unlabelled_hold_is_told_by_its_number_alone(db):
    """A connection that was taken from the pool by hand."""
    install(db)
    db.pool.resize(1)
    conn = db.pool.acquire()
    with pytest.raises(PoolError, match=r"longest in use: connection 1 for 0\.\d+ s\)\.$"):
        db.pool.acquire(timeout=0.01)
    db.pool.release(conn)
