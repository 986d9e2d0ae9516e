"""`install` puts our state into any Peewee database, once, or says why it cannot."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import sqlite3
import threading

import peewee
import pytest
from flask import Flask
from playhouse.pool import PooledSqliteDatabase

from peewee_frameworks import ConfigurationError, DatabaseUnavailable, connection_scope
from peewee_frameworks.flask import Peewee
from peewee_frameworks.guarded import Guarded, GuardedPool, GuardedProxy
from peewee_frameworks.names import display_name
from peewee_frameworks.runtime import Runtime
from peewee_frameworks.scope import Scope
from peewee_frameworks.state import State, install, unwrap
from tests.core.conftest import make_note
from tests.core.helpers import Gate, in_thread, start
from tests.support.concurrency import run_threads


def test_installing_twice_is_installing_once(lite):
    """The state that is there is returned, through a proxy too."""
    state = lite._state
    assert isinstance(state, State)
    assert install(lite) is state
    assert run_threads(4, lambda _: install(lite)) == [state] * 4


def test_threads_that_install_at_once_agree(tmp_path, monkeypatch):
    """However many install at the same time, the database has one state."""
    both = threading.Barrier(2)

    def prepare(_, *, in_block):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)  # breaks: the second one waits outside, and finds the state there

    monkeypatch.setattr("peewee_frameworks.state.prepare_sqlite", prepare)
    database = PooledSqliteDatabase(str(tmp_path / "a.db"))
    assert len(set(run_threads(2, lambda _: install(database)))) == 1


def test_the_database_keeps_its_class_and_name(lite):
    """isinstance, the name and the documentation stay what they were."""
    assert isinstance(lite, PooledSqliteDatabase)
    assert isinstance(lite, GuardedPool)
    assert type(lite).__name__ == "PooledSqliteDatabase"
    assert type(lite).__module__ == "playhouse.pool"


def test_a_users_own_subclass_keeps_its_methods(tmp_path):
    """What a subclass overrides goes on working, `super()` included."""
    calls = []

    class Mine(PooledSqliteDatabase):
        def connect(self, reuse_if_open=False):
            calls.append("connect")
            return super().connect(reuse_if_open)

        def execute_sql(self, sql, params=None):
            calls.append("execute")
            return super().execute_sql(sql, params)

        def cursor(self, named_cursor=None):
            calls.append("cursor")
            return super().cursor(named_cursor)

    database = Mine(str(tmp_path / "a.db"))
    install(database)
    with connection_scope(database):
        database.execute_sql("select 1")
    assert calls == ["execute", "cursor", "connect"]
    database.close_all()


def test_what_this_thread_has_open_is_carried_over(tmp_path):
    """A connection, and a transaction on it, that were there before go on."""
    database = PooledSqliteDatabase(str(tmp_path / "a.db"), check_same_thread=False)
    note = make_note(database)
    database.connect()
    with database.atomic():
        note.create(text="a")
        install(database)
        note.create(text="b")
        assert database.transaction_depth() == 1
    assert note.select().count() == 2
    assert database.close()
    assert not database._in_use
    database.close_all()


def test_thread_safe_false_is_refused(tmp_path):
    """One connection for all threads cannot be one for each unit of work."""
    with pytest.raises(ConfigurationError, match="thread_safe=False"):
        install(PooledSqliteDatabase(str(tmp_path / "a.db"), thread_safe=False))


@pytest.mark.parametrize(
    ("name", "options"),
    [(":memory:", {}), ("file::memory:", {"uri": True}), ("file:x?mode=memory", {"uri": True})],
)
def test_an_in_memory_database_needs_a_pool_of_one(name, options):
    """Each connection would be an empty database of its own."""
    for database in (peewee.SqliteDatabase(name, **options), PooledSqliteDatabase(name, max_connections=5, **options)):
        with pytest.raises(ConfigurationError, match="max_connections=1"):
            install(database)
    install(PooledSqliteDatabase(name, max_connections=1, **options))
    install(PooledSqliteDatabase("file:y?mode=memory&cache=shared", uri=True))


def test_an_in_memory_pool_of_one_serves_all_threads():
    """The one connection of an in-memory database goes from scope to scope, on whatever thread, with its data."""
    database = PooledSqliteDatabase(":memory:", max_connections=1, timeout=10)
    install(database)
    note = make_note(database)

    def work(index):
        with connection_scope(database):
            note.create(text=str(index))

    run_threads(8, work)
    with connection_scope(database):
        assert note.select().count() == 8
    database.close_all()


def test_an_in_memory_database_survives_a_late_user(caplog):
    """Closing its one connection would destroy the data, so that is rolled back and kept."""
    database = PooledSqliteDatabase(":memory:", max_connections=1, timeout=10)
    install(database)
    note = make_note(database)
    with connection_scope(database):
        gate = Gate()
        database.connection().create_function("gate", 0, gate)
    scope = Scope([database._state], "test")
    scope.enter()

    def late():
        with database.atomic():
            note.create(text="never")
            database.execute_sql("select gate()")

    late_user = start(late, context=contextvars.copy_context())
    gate.wait()
    scope.finish()
    scope.exit()
    gate.open()
    assert late_user.exception(10) is not None
    del late_user
    with connection_scope(database):
        assert note.select().count() == 0
    database.close_all()


def test_a_connection_bound_to_a_thread_is_refused(tmp_path):
    """check_same_thread=True contradicts a request that goes on in another thread."""
    with pytest.raises(ConfigurationError, match="check_same_thread"):
        install(PooledSqliteDatabase(str(tmp_path / "a.db"), check_same_thread=True))


def test_connections_from_before_are_replaced(tmp_path):
    """SQLite connections that were opened bound to a thread do not stay in the pool."""
    database = PooledSqliteDatabase(str(tmp_path / "a.db"))
    note = make_note(database)
    database.connect()
    install(database)
    assert database.is_closed()
    with connection_scope(database):
        assert note.select().count() == 0
        assert in_thread(note.select().count, context=contextvars.copy_context()) == 0
    database.close_all()


def test_data_in_memory_is_never_thrown_away_silently():
    """An in-memory database that was used before it is set up is refused, with the remedy."""
    database = PooledSqliteDatabase(":memory:", max_connections=1)
    make_note(database)
    with pytest.raises(ConfigurationError, match="check_same_thread=False"):
        install(database)
    database.close_all()
    fine = PooledSqliteDatabase(":memory:", max_connections=1, check_same_thread=False)
    note = make_note(fine)
    install(fine)
    with connection_scope(fine):
        assert note.select().count() == 0
    fine.close_all()


def test_an_open_block_on_a_bound_connection_is_refused(tmp_path):
    """Neither can the block go on in another connection, nor may this one go into the pool."""
    database = PooledSqliteDatabase(str(tmp_path / "a.db"))
    with database.atomic(), pytest.raises(ConfigurationError, match="a block is open"):
        install(database)
    with database.connection_context(), pytest.raises(ConfigurationError, match="a block is open"):
        install(database)
    database.close_all()


def test_a_deferred_database_is_initialised_later(tmp_path):
    """`SqliteDatabase(None)` is installed first and named afterwards; until then it says so."""
    database = PooledSqliteDatabase(None)
    install(database)
    with connection_scope(database):
        with pytest.raises(peewee.InterfaceError, match="must be initialized"):
            database.execute_sql("select 1")
        assert database.is_closed()
    database.init(str(tmp_path / "a.db"), max_connections=2)
    with connection_scope(database):
        assert database.execute_sql("select 1").fetchone() == (1,)
        assert in_thread(lambda: database.execute_sql("select 1").fetchone(), context=contextvars.copy_context()) == (
            1,
        )
    with pytest.raises(ConfigurationError, match="in-memory"):
        database.init(":memory:")
    with pytest.raises(ConfigurationError, match="check_same_thread"):
        database.init(str(tmp_path / "b.db"), check_same_thread=True)
    database.init(str(tmp_path / "b.db"), check_same_thread=False)
    database.close_all()


def test_init_again_uses_the_new_parameters(make_place):
    """Connections made after a second `init` have its parameters; those open before are closed."""
    place = make_place("postgres")
    database = place.make_database()
    install(database)
    with connection_scope(database):
        database.execute_sql("SELECT 1")
        database.init(place.database, **{**place.kwargs, "application_name": place.tag + "_b"})
        assert database.is_closed()
    database.close_all()
    with connection_scope(database):
        assert database.execute_sql("SHOW application_name").fetchone() == (place.tag + "_b",)
    database.close_all()


def test_a_proxy_stands_for_the_database_behind_it(lite, lite_note):
    """Blocks of an installed DatabaseProxy are those of its database."""
    proxy = peewee.DatabaseProxy()
    with pytest.raises(ConfigurationError, match="not initialised"):
        install(proxy)
    decorated = proxy.atomic()(lambda: lite_note.create(text="decorated before"))
    proxy.initialize(lite)
    assert install(proxy) is lite._state
    assert unwrap(proxy) is lite
    assert isinstance(proxy, GuardedProxy)
    with connection_scope(proxy):
        decorated()
        with proxy.atomic():
            lite_note.create(text="a")
        with proxy.transaction(), proxy.savepoint():
            lite_note.create(text="b")
        with proxy.connection_context():
            assert not lite.is_closed()
        with proxy.manual_commit():
            pass
        with proxy:
            lite_note.create(text="c")
        assert lite_note.select().count() == 4


def test_a_proxy_may_be_given_another_database(make_sqlite):
    """`initialize` with another database goes on working after installing; uninitialised, it says so."""
    one, two = make_sqlite("one"), make_sqlite("two")
    proxy = peewee.DatabaseProxy()
    proxy.initialize(one)
    install(proxy)
    proxy.initialize(two)
    assert install(proxy) is two._state
    with connection_scope(proxy), proxy.atomic():
        assert two.in_transaction()
        assert not one.in_transaction()
    proxy.initialize(None)
    for call in (proxy.atomic, proxy.transaction, proxy.savepoint, proxy.manual_commit, proxy.connection_context):
        with pytest.raises(AttributeError, match="uninitialized"), call():
            pass
    for call in (proxy.atomic, proxy.transaction, proxy.manual_commit, proxy.connection_context):
        with pytest.raises(AttributeError, match="uninitialized"):
            call()(lambda: None)()


def test_a_decorator_may_be_made_before_the_proxy_is_initialised(lite, lite_note):
    """`@connection_scope(proxy)` looks for the database when it is called."""
    proxy = peewee.DatabaseProxy()

    @connection_scope(proxy)
    def work():
        return lite_note.select().count()

    with pytest.raises(ConfigurationError, match="not initialised"):
        work()
    proxy.initialize(lite)
    assert work() == 0


@pytest.mark.parametrize("block", ["atomic", "transaction", "manual_commit", "connection_context"])
@pytest.mark.parametrize("first", [True, False], ids=["initialised", "not initialised"])
def test_a_function_that_a_proxys_block_decorates_runs_in_one_of_the_database_of_the_moment(make_sqlite, block, first):
    """Decorators are made when a module is imported, and tests put their own database behind the proxy after that."""
    one, two = make_sqlite("one"), make_sqlite("two")
    proxy = peewee.DatabaseProxy()
    Runtime(proxy)
    if first:
        proxy.initialize(one)
        install(proxy)

    @getattr(proxy, block)()
    def work():
        proxy.execute_sql("SELECT 1")
        return [(database._state.closed, bool(database._state.transactions)) for database in (one, two)]

    for database in (one, two):
        proxy.initialize(database)
        install(proxy)
        expected = [(True, False), (True, False)]
        expected[database is two] = (False, block != "connection_context")
        assert work() == expected
        database.close()


@pytest.mark.parametrize("block", ["atomic", "transaction"])
def test_a_proxy_that_is_not_initialised_knows_what_it_can_decorate(lite, lite_note, block):
    """As the database behind it does: a coroutine function runs in the block to its end, a generator function is refused."""
    proxy = peewee.DatabaseProxy()
    Runtime(proxy)

    @getattr(proxy, block)()
    async def work():
        lite_note.create(text="half")
        raise LookupError

    with pytest.raises(ConfigurationError, match="generator"):

        @getattr(proxy, block)()
        def rows():
            yield

    proxy.initialize(lite)
    install(proxy)

    async def main():
        async with connection_scope(lite):
            await work()

    with pytest.raises(LookupError):
        asyncio.run(main())
    lite._state.runner.close()
    with lite:
        assert lite_note.select().count() == 0


class FlaskDB:
    """What `playhouse.flask_utils` has: an object with a database."""

    database = peewee.SqliteDatabase(None)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("sqlite:///x", r"str is not a Peewee database\. Open a URL with peewee_frameworks\.pool\.connect\(url\)"),
        ({}, r"dict is not a Peewee database\. Pass a peewee\.Database or a DatabaseProxy"),
        (peewee.Model, r"Model is a model, not a database\. Pass its database"),
        (peewee.SqliteDatabase, r"SqliteDatabase is a class, not a database"),
        (Peewee(peewee.SqliteDatabase("x.db")), r"Peewee is an application's extension, .* Write orm\.scope\(\)"),
        (Flask("x"), r"Flask is an application, not a database\. Give it to init_app"),
        (FlaskDB(), r"FlaskDB is not a Peewee database\. Pass its \.database"),
    ],
)
def test_what_is_no_database_is_refused(given, told):
    """The message names what was given and what may be."""
    with pytest.raises(ConfigurationError, match=told):
        install(given)


def test_messages_never_show_a_password():
    """A database that was given as a conninfo string is named without user and password."""
    for name in ("postgresql://me:secret@host/shop?x=1", "host=h password=secret dbname=shop", "mysql://secret"):
        assert "secret" not in display_name(peewee.PostgresqlDatabase(name))
    assert display_name(peewee.SqliteDatabase("a.db")) == "SqliteDatabase('a.db')"
    assert display_name(None) == "a database that is gone"


@pytest.mark.parametrize("kind", ["mysql", "postgres"])
def test_a_server_that_is_not_there_is_unavailable(kind, free_port):
    """A failed connect is a DatabaseUnavailable with the driver's error behind it, and Peewee's own class."""
    cls = peewee.MySQLDatabase if kind == "mysql" else peewee.PostgresqlDatabase
    database = cls("nothing", host="127.0.0.1", port=free_port, user="u", password="hunter2")
    install(database)
    with connection_scope(database):
        with pytest.raises(DatabaseUnavailable) as caught:
            database.connect()
        assert isinstance(caught.value, peewee.OperationalError)
        assert caught.value.__cause__ is not None
        assert "hunter2" not in str(caught.value)
        assert database.is_closed()


def test_guarded_databases_share_one_class_per_class(tmp_path):
    """Installing many databases of one class makes one class."""
    made = [PooledSqliteDatabase(str(tmp_path / f"{n}.db")) for n in range(3)]
    for database in made:
        install(database)
    assert len({type(database) for database in made}) == 1
    plain = peewee.SqliteDatabase(str(tmp_path / "p.db"))
    install(plain)
    assert isinstance(plain, Guarded)
    assert not isinstance(plain, GuardedPool)


def test_the_driver_in_use_is_pythons_own():
    """These tests say something about sqlite3."""
    assert peewee.sqlite3.Connection is sqlite3.Connection
