"""What Peewee's documentation of its asyncio layer shows, the same on four asynchronous databases and three sync ones."""

from __future__ import annotations

import asyncio
import contextlib

import peewee
import pytest

from peewee_frameworks import ConcurrentUse, PoolTimeout, connection_scope, current_scope
from peewee_frameworks.pool import PooledMySQLDatabase, PooledPostgresqlDatabase, PooledSqliteDatabase
from peewee_frameworks.state import install
from tests.aio.conftest import DRIVERS, Backend, run

SYNC = {"sqlite": PooledSqliteDatabase, "mysql": PooledMySQLDatabase, "postgres": PooledPostgresqlDatabase}


class SyncBackend(Backend):
    """A sync pooled database on the place of a backend."""

    def make(self, size=5, timeout=5):
        options = {"pragmas": {"journal_mode": "wal"}} if self.place.kind == "sqlite" else {}
        if self.place.kind == "postgres":
            options = {"prefer_psycopg3": True}
        return SYNC[self.place.kind](
            self.place.database, max_connections=size, timeout=timeout, **options, **self.place.connect_kwargs()
        )


@pytest.fixture(params=[*DRIVERS, "sync-sqlite", "sync-mysql", "sync-postgres"])
def backend(request, backends):
    name = request.param
    if not name.startswith("sync-"):
        return backends(name)
    driver = {"sync-sqlite": "aiosqlite", "sync-mysql": "aiomysql", "sync-postgres": "psycopg"}[name]
    return SyncBackend(name, backends(driver).place)


@pytest.fixture(params=["scope", "bare"])
def scope(request, db, backend):
    """Inside a unit of work, as in a request, and outside any, as in a script."""
    if request.param == "bare" and backend.driver not in ("aiosqlite", "psycopg", "sync-sqlite", "sync-postgres"):
        pytest.skip("covered by the other drivers: outside a unit of work nothing depends on the driver")
    return (lambda: connection_scope(db)) if request.param == "scope" else contextlib.nullcontext


@pytest.fixture
def db(backend):
    return backend.make()


@pytest.fixture
def models(db):
    class User(db.Model):
        name = peewee.CharField(unique=True)
        score = peewee.IntegerField(default=0)

        class Meta:
            table_name = "app_user"

    class Tweet(db.Model):
        user = peewee.ForeignKeyField(User, backref="tweets")
        text = peewee.TextField()

    return User, Tweet


@pytest.fixture
def play(db, models, scope):
    def play(work):
        async def main():
            async with connection_scope(db):
                await db.acreate_tables(models)
            try:
                async with scope():
                    await work()
            finally:
                await db.close_pool()

        run(main())

    return play


async def names(db, User):
    return [user.name for user in await db.list(User.select().order_by(User.name))]


def test_create_read_update_delete(db, models, play):
    """The methods of models."""
    User, Tweet = models

    async def work():
        huey = await User.acreate(name="huey")
        assert huey.id
        assert (await User.aget(User.name == "huey")).id == huey.id
        assert (await User.aget_by_id(huey.id)).name == "huey"
        assert await User.aget_or_none(User.name == "nobody") is None
        with pytest.raises(User.DoesNotExist):
            await User.aget(User.name == "nobody")
        again, created = await User.aget_or_create(name="huey")
        assert (again.id, created) == (huey.id, False)
        huey.score = 7
        assert await huey.asave() == 1
        await User.aset_by_id(huey.id, {"score": 8})
        tweet = await Tweet.acreate(user=huey, text="meow")
        fetched = await Tweet.aget_by_id(tweet.id)
        assert (await fetched.afetch(Tweet.user)).score == 8
        assert (await fetched.afetch("user")).name == "huey"
        with pytest.raises(ValueError, match="foreign-key"):
            await fetched.afetch(Tweet.text)
        assert await huey.adelete_instance(recursive=True) == 1
        assert await db.count(User.select()) == 0
        await User.adelete_by_id(1)

    play(work)


def test_queries(db, models, play, backend):
    """The methods of databases, and `aexecute` of queries."""
    User, Tweet = models

    async def work():
        await User.abulk_create([User(name=f"u{number}", score=number) for number in range(5)], batch_size=2)
        query = User.select().order_by(User.score)  # cloned for each use: a query keeps its result
        assert await db.count(query) == 5
        assert await db.exists(query)
        assert (await db.get(query)).name == "u0"
        assert (await db.first(query.clone())).name == "u0"  # Peewee's `first` limits the query it is called on
        assert [user.name for user in await db.first(query.clone(), n=2)] == ["u0", "u1"]
        assert await db.scalar(User.select(peewee.fn.MAX(User.score))) == 4
        assert [user.score for user in await db.list(query.clone())] == [0, 1, 2, 3, 4]
        assert [user.score for user in await query.clone().aexecute()] == [0, 1, 2, 3, 4]
        assert [row for row in await db.aexecute(query.tuples().columns(User.score).limit(2))] == [(0,), (1,)]  # noqa: C416
        assert await User.update(score=User.score + 1).where(User.score > 2).aexecute() == 2
        users = await db.list(query.clone())
        for user in users:
            user.score = user.score * 10 + 1
        if backend.driver == "asyncpg":  # its prepared statements do not guess the types of CASE
            await User.update(score=User.score * 10 + 1).aexecute()
        else:
            assert await User.abulk_update(users, [User.score]) == 5
        assert [user.score for user in await db.list(query.clone())] == [1, 11, 21, 41, 51]
        assert await User.delete().where(User.score == 51).aexecute() == 1
        assert list(await db.aexecute_sql("SELECT 1")) == [(1,)]
        for user in await db.list(query.clone()):
            await Tweet.acreate(user=user, text=f"by {user.name}")
        found = await db.aprefetch(query.clone(), Tweet.select())
        assert [tweet.text for user in found for tweet in user.tweets] == ["by u0", "by u1", "by u2", "by u3"]

    play(work)


def test_rows_in_batches(db, models, play):
    """`iterate`, to the end, and left early."""
    User, _ = models

    async def work():
        await User.abulk_create([User(name=f"u{number:03}") for number in range(250)])
        query = User.select().order_by(User.name)
        async with db:
            assert [user.name async for user in db.iterate(query)] == [f"u{number:03}" for number in range(250)]
            async with contextlib.aclosing(db.iterate(query.dicts(), buffer_size=10)) as rows:
                async for row in rows:
                    assert row["name"] == "u000"
                    break
            assert await db.count(query) == 250

    play(work)


def test_transactions(db, models, play):
    """Blocks, nested ones, `aatomic`, `acommit` and `arollback`, sync code in `run`."""
    User, _ = models

    def sync():
        with db.atomic():
            User.create(name="sync")
            with pytest.raises(peewee.IntegrityError), db.atomic():
                User.create(name="sync")

    async def work():
        async with db.atomic():
            await User.acreate(name="a")
            with pytest.raises(peewee.IntegrityError):
                async with db.atomic():
                    await User.acreate(name="b")
                    await User.acreate(name="a")
            await User.acreate(name="c")
        assert await names(db, User) == ["a", "c"]
        with contextlib.suppress(ZeroDivisionError):
            async with db.aatomic():
                await User.delete().aexecute()
                raise ZeroDivisionError
        assert await names(db, User) == ["a", "c"]
        async with db.atomic() as transaction:
            await User.acreate(name="d")
            await transaction.acommit()
            await User.acreate(name="e")
            await transaction.arollback()
        await db.run(sync)
        assert await names(db, User) == ["a", "c", "d", "sync"]

    play(work)


def test_children_of_a_transaction_are_part_of_it(db, models, play):
    """`gather` and `wait_for` inside `atomic()` are rolled back with it."""
    User, _ = models

    async def work():
        with contextlib.suppress(ZeroDivisionError):
            async with db.atomic():
                await asyncio.gather(User.acreate(name="a"), User.acreate(name="b"))
                await asyncio.wait_for(User.acreate(name="c"), 5)
                assert await names(db, User) == ["a", "b", "c"]
                raise ZeroDivisionError
        assert await names(db, User) == []

    play(work)


def test_siblings_of_a_transaction_are_kept_out(db, models, play, scope):
    """In one unit of work; outside any, each task has a connection of its own."""
    User, _ = models
    begun, done = asyncio.Event(), asyncio.Event()
    if scope is contextlib.nullcontext:
        pytest.skip("tasks outside a unit of work share nothing")

    async def sibling():
        await begun.wait()
        with pytest.raises(ConcurrentUse):
            await names(db, User)
        done.set()

    async def work():
        other = asyncio.create_task(sibling())
        async with db.atomic():
            await User.acreate(name="a")
            begun.set()
            await done.wait()
        await other
        assert await names(db, User) == ["a"]

    play(work)


def test_async_with_the_database_keeps_one_connection(db, models, play):
    """Nested ones too."""
    User, _ = models

    async def connection():
        return await db.run(lambda: id(db.connection()))

    async def work():
        async with db:
            first = await connection()
            async with db:
                assert await connection() == first
            assert await connection() == first
            await names(db, User)
        assert db.is_closed()

    play(work)


def test_what_idles_holds_no_connection_between_two_calls(db, models, play, scope):
    """A websocket, or a stream whose response has begun; a block keeps its connection to its end."""
    User, _ = models
    if scope is contextlib.nullcontext:
        pytest.skip("outside a unit of work nothing says that it idles")

    async def work():
        current_scope().idles = True
        await User.acreate(name="a")
        assert db.is_closed()
        assert await names(db, User) == ["a"]
        assert db.is_closed()
        await db.aexecute_sql("SELECT 1")
        assert db.is_closed()
        async with db.atomic():
            assert await names(db, User) == ["a"]
            assert not db.is_closed()
        assert db.is_closed()
        async with db:
            assert await names(db, User) == ["a"]
            assert not db.is_closed()
        assert db.is_closed()

    play(work)


def test_a_hundred_tasks_on_a_small_pool(db, models, play, scope):
    """Each gets its answers; nobody is refused, and nobody waits for himself."""
    User, _ = models

    async def task(number):
        async with connection_scope(db):
            user = await User.acreate(name=f"u{number}")
            assert (await User.aget_by_id(user.id)).name == f"u{number}"
            async with db.atomic():
                await User.update(score=1).where(User.id == user.id).aexecute()

    async def work():
        if scope is contextlib.nullcontext:
            await asyncio.gather(*(task(number) for number in range(100)))
            assert await db.count(User.select().where(User.score == 1)) == 100

    play(work)


def test_a_cancelled_call_leaves_nothing_open(db, models, play, backend):
    """All or nothing, and the next call works."""
    User, _ = models

    async def work():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), db.atomic():
                await User.acreate(name="a")
                await db.aexecute_sql(backend.brief)
        assert await names(db, User) == []

    play(work)


def test_an_exhausted_pool_is_an_error_after_its_timeout(backend):
    """Not before, and without blocking the loop."""
    db = backend.make(size=1, timeout=0.3)

    async def wanting():
        async with connection_scope(db):
            with pytest.raises(PoolTimeout):
                await db.aexecute_sql("SELECT 1")

    async def main():
        async with connection_scope(db):
            await db.aexecute_sql("SELECT 1")
            task = asyncio.create_task(wanting())
            await task
        await db.close_pool()

    install(db)
    run(main())
