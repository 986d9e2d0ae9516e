"""Peewee's own connection and transaction API gives the same results as on a stock database, inside and outside a scope."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import peewee
import pytest
from peewee import InterfaceError, OperationalError

from peewee_frameworks import connection_scope
from peewee_frameworks.state import install
from tests.core.conftest import make_note
from tests.support.concurrency import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

SCENARIOS: list[Callable[..., Any]] = []


def scenario(function: Callable[..., Any]) -> Callable[..., Any]:
    SCENARIOS.append(function)
    return function


def texts(note):
    return sorted(row.text for row in note.select())


def outcome(call, *args):
    try:
        return call(*args)
    except Exception as error:
        return type(error).__mro__[1 if type(error).__module__.startswith("peewee_frameworks") else 0].__name__


@scenario
def connect_and_close(db, note):
    """`connect`, a second one, `reuse_if_open`, `close`, a second one."""
    return [
        db.is_closed(), db.connect(), outcome(db.connect), db.connect(reuse_if_open=True), db.is_closed(),
        db.is_connection_usable(), db.close(), db.close(), db.is_closed(), db.is_connection_usable(),
    ]  # fmt: skip


@scenario
def autoconnect(db, note):
    """A query connects by itself."""
    first = db.is_closed()
    count = note.select().count()
    return [first, count, db.is_closed(), db.close()]


@scenario
def connection_is_the_same(db, note):
    """`connection`, `cursor` and `execute_sql` use one connection."""
    conn = db.connection()
    cursor = db.cursor()
    cursor.execute("SELECT 7")
    return [conn is db.connection(), tuple(cursor.fetchone()), tuple(db.execute_sql("SELECT 8").fetchone()), db.close()]


@scenario
def with_db(db, note):
    """`with db` is a connection and a transaction; nested ones are savepoints."""
    seen = []
    with db:
        note.create(text="a")
        seen += [db.is_closed(), db.in_transaction(), db.transaction_depth()]
        with db:
            note.create(text="b")
            seen += [db.transaction_depth(), db.is_closed()]
        seen += [db.is_closed()]
        with contextlib.suppress(KeyError), db:
            note.create(text="c")
            raise KeyError
        seen += [texts(note)]
    seen += [db.is_closed(), texts(note), db.close()]
    with contextlib.suppress(KeyError), db:
        note.create(text="d")
        raise KeyError
    return [*seen, db.is_closed(), texts(note), db.close()]


@scenario
def connection_context(db, note):
    """`connection_context`, nested, and as a decorator."""
    seen = []
    with db.connection_context():
        conn = db.connection()
        with db.connection_context():
            seen += [db.connection() is conn, db.in_transaction()]
        seen += [db.is_closed()]
        note.create(text="a")
    seen += [db.is_closed()]

    @db.connection_context()
    def work():
        return [db.is_closed(), texts(note)]

    return [*seen, work(), work(), db.is_closed()]


@scenario
def atomic(db, note):
    """`atomic`, nested, with errors at each level."""
    with db.atomic():
        note.create(text="a")
        with contextlib.suppress(KeyError), db.atomic():
            note.create(text="b")
            raise KeyError
        with db.atomic():
            note.create(text="c")
        with contextlib.suppress(peewee.IntegrityError), db.atomic():
            note.create(text="a")
    inner = texts(note)
    with contextlib.suppress(KeyError), db.atomic():
        note.create(text="d")
        with db.atomic():
            note.create(text="e")
        raise KeyError
    return [inner, texts(note), db.in_transaction(), db.close()]


@scenario
def atomic_as_decorator(db, note):
    """`@db.atomic()` begins a block for each call, recursion included."""

    @db.atomic()
    def work(n, fail=False):
        note.create(text=str(n))
        if n:
            work(n - 1)
        if fail:
            raise KeyError

    work(2)
    result = [texts(note)]
    note.delete().execute()
    with contextlib.suppress(KeyError):
        work(1, fail=True)
    return [*result, texts(note), db.close()]


@scenario
def commit_and_rollback_in_the_middle(db, note):
    """`txn.commit()` and `txn.rollback()` inside a block."""
    with db.atomic() as transaction:
        note.create(text="a")
        transaction.commit()
        note.create(text="b")
        transaction.rollback()
        note.create(text="c")
    with db.atomic(), db.atomic() as savepoint:
        note.create(text="d")
        savepoint.rollback()
        note.create(text="e")
        savepoint.commit()
        note.create(text="f")
    return [texts(note), db.close()]


@scenario
def transaction_and_savepoint(db, note):
    """The explicit blocks, and the depth they make."""
    seen = []
    with db.transaction() as outer:
        seen += [db.transaction_depth(), db.top_transaction() is outer]
        with db.transaction() as inner:
            seen += [db.transaction_depth(), db.top_transaction() is inner]
            note.create(text="a")
        with contextlib.suppress(KeyError), db.savepoint():
            note.create(text="b")
            raise KeyError
        seen += [texts(note)]
    return [*seen, db.transaction_depth(), texts(note), db.close()]


@scenario
def manual_commit(db, note):
    """`manual_commit` leaves BEGIN, COMMIT and ROLLBACK to the caller."""
    db.connect()
    with db.manual_commit():
        db.begin()
        note.create(text="a")
        db.rollback()
        db.begin()
        note.create(text="b")
        db.commit()
        seen = [outcome(db.atomic().__enter__), outcome(db.after_commit, print)]
        with db.manual_commit():
            pass
    with db.atomic():
        seen += [outcome(db.manual_commit().__enter__)]
    return [*seen, texts(note), db.in_transaction(), db.close()]


@scenario
def sessions(db, note):
    """`session_start`, `session_commit`, `session_rollback`."""
    seen = [db.session_commit(), db.session_rollback()]
    db.session_start()
    note.create(text="a")
    seen += [db.session_commit(), texts(note)]
    db.session_start()
    note.create(text="b")
    db.session_start()
    note.create(text="c")
    seen += [db.session_rollback(), db.in_transaction(), db.session_rollback(), db.in_transaction()]
    return [*seen, texts(note), db.close()]


@scenario
def after_commit(db, note):
    """`after_commit` runs at once outside a transaction, after the outermost commit inside, never after a rollback."""
    seen = []
    db.after_commit(lambda: seen.append("now"))
    with db.atomic():
        db.after_commit(lambda: seen.append("outer"))
        with db.atomic():
            db.after_commit(lambda: seen.append("inner"))
        seen.append("before")
    with contextlib.suppress(KeyError), db.atomic():
        db.after_commit(lambda: seen.append("never"))
        raise KeyError
    with db.atomic():
        pass
    return [*seen, db.close()]


@scenario
def errors(db, note):
    """What Peewee refuses is refused."""
    seen = [outcome(db.commit), outcome(db.rollback)]
    with db.atomic():
        note.create(text="a")
        seen += [outcome(db.close), outcome(db.execute_sql, "SELECT nonsense FROM nowhere")]
        if db.__class__.__name__.endswith("PostgresqlDatabase"):
            db.rollback()
            db.begin()
    return [*seen, db.close()]


@scenario
def queries(db, note):
    """Bulk inserts, updates, iterators, `get_or_create`, `batch_commit`, RETURNING and prefetching of rows."""
    note.insert_many([{"text": str(n)} for n in range(10)]).execute()
    seen = [note.update(text="x").where(note.text == "3").execute(), note.delete().where(note.text == "4").execute()]
    seen += [[row.text for row in note.select().order_by(note.text).iterator()]]
    made = [note.get_or_create(text="y")[1], note.get_or_create(text="y")[1]]
    for _ in db.batch_commit(range(3), 2):
        note.create(text=f"batch{_}")
    return [*seen, made, len(texts(note)), note.get_or_none(note.text == "nobody"), db.close()]


@scenario
def bind_ctx(db, note):
    """`bind_ctx` lends a model to the database for a block."""

    class Other(peewee.Model):
        text = peewee.CharField()

        class Meta:
            table_name = note._meta.table_name

    with db.bind_ctx([Other]):
        Other.create(text="a")
        seen = [Other.select().count()]
    return [*seen, Other._meta.database is None, db.close()]


@scenario
def manual_close(db, note):
    """`manual_close` closes the connection behind the pool's back; `close_idle` the resting ones."""
    conn = db.connection()
    db.manual_close()
    other = db.connection()
    seen = [db.manual_close.__name__, conn is other, len(db._in_use), db.close(), len(db._connections)]
    db.close_idle()
    return [*seen, len(db._connections)]


@scenario
def close_all(db, note):
    """`close_all` leaves nothing."""
    db.connect()
    db.close_all()
    return [db.is_closed(), len(db._in_use), len(db._connections), texts(note), db.close()]


@pytest.mark.parametrize("run", SCENARIOS, ids=lambda function: function.__name__)
def test_the_same_as_stock(run, place):
    """The scenario gives the same on a stock database, on an installed one, and on that in a scope."""
    results = []
    for mode in ("stock", "installed", "scope"):
        database = place.make_database()
        if mode != "stock":
            install(database)
        note = make_note(database)
        with connection_scope(database) if mode == "scope" else contextlib.nullcontext():
            results.append((mode, run(database, note)))
        eventually(lambda database=database: not database._in_use)
        with database.connection_context():
            note.delete().execute()
        database.close_all()
    assert results[1][1] == results[0][1]
    assert results[2][1] == results[0][1]


@pytest.mark.parametrize("kind", ["sqlite", "mysql", "postgres"])
def test_unpooled_databases_work_in_scopes(kind, make_place, shared_place):
    """An unpooled database connects in each scope that queries, and closes at its end."""
    place = make_place("sqlite") if kind == "sqlite" else shared_place(kind)
    classes = {"sqlite": peewee.SqliteDatabase, "mysql": peewee.MySQLDatabase, "postgres": peewee.PostgresqlDatabase}
    kwargs = {"prefer_psycopg3": True} if kind == "postgres" else {}
    database = classes[kind](place.database, **place.kwargs, **kwargs)
    install(database)
    before = len(place.sessions())
    for _ in range(2):
        with connection_scope(database):
            assert database.execute_sql("SELECT 7").fetchone()[0] == 7
            assert len(place.sessions()) == before + 1
        eventually(lambda: len(place.sessions()) == before)


def test_a_database_that_does_not_connect_by_itself(make_sqlite):
    """With autoconnect=False every call that needs a connection asks for it, as in Peewee."""
    database = make_sqlite(autoconnect=False)
    with connection_scope(database):
        for call in (lambda: database.execute_sql("select 1"), database.atomic().__enter__):
            with pytest.raises(InterfaceError, match="not opened"):
                call()
        with pytest.raises(InterfaceError, match="not opened"):
            database.manual_commit().__enter__()
        with database.connection_context():
            assert database.execute_sql("select 1").fetchone() == (1,)
        with pytest.raises(OperationalError), database:
            database.connect()


def test_tuning_arguments_reach_the_driver(place):
    """Isolation levels and lock types are passed on by the guarded blocks."""
    argument = {"sqlite": "IMMEDIATE", "mysql": "READ COMMITTED", "postgres": "SERIALIZABLE"}[place.kind]
    database = place.make_database()
    install(database)
    note = make_note(database)
    with connection_scope(database):
        for block in (database.atomic, database.transaction):
            with block(argument):
                note.create(text=block.__name__)
                if place.kind == "postgres":
                    assert database.execute_sql("SHOW transaction_isolation").fetchone() == ("serializable",)
        note.delete().execute()
    database.close_all()
