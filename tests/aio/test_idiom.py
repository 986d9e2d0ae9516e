"""What Peewee's documentation of its asyncio layer shows, the same on four asynchronous databases and three sync ones."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc

import peewee
import pytest
from playhouse.pwasyncio import MissingGreenletBridge
from playhouse.shortcuts import model_to_dict

from peewee_frameworks import ConcurrentUse, ConfigurationError, PoolTimeout, connection_scope, current_scope
from peewee_frameworks.aio import AsyncModel
from peewee_frameworks.pool import PooledMySQLDatabase, PooledPostgresqlDatabase, PooledSqliteDatabase
from peewee_frameworks.runtime import Runtime
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


def test_run_refuses_what_is_asynchronous(db, models, play):
    """It would make a coroutine, and run none of it; `orm.run` too."""
    User, _ = models

    async def asynchronous():
        raise AssertionError("never")

    async def generator():
        yield

    async def work():
        for function in (asynchronous, functools.partial(asynchronous), generator, User.acreate):
            for run_it in (db.run, Runtime(db).run):
                with pytest.raises(ConfigurationError, match=r"is asynchronous.*`await \w+\(\.\.\.\)`"):
                    await run_it(function)

    play(work)


@pytest.mark.parametrize("scope", ["scope"], indirect=True)
def test_a_generator_that_is_dropped_inside_a_block_is_no_error(db, models, play):
    """The loop closes it, in a task of its own; as for a stream whose client has left."""
    User, _ = models
    told = []

    async def rows(closed):
        try:
            async with db.atomic():
                await User.acreate(name="half")
                yield
        finally:
            closed.set()

    async def work():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        async with connection_scope(db):
            closed = asyncio.Event()
            streams = [rows(closed)]
            await asyncio.create_task(anext(streams[0]))
            streams.clear()
            gc.collect()
            await asyncio.wait_for(closed.wait(), 10)
        gc.collect()
        assert told == []
        assert await db.run(User.select().where(User.name == "half").count) == 0

    play(work)


def test_run_refuses_a_generator_function(db, models, play):
    """It would run in the hands of the caller: on the event loop."""

    def generator():
        yield from ()

    async def work():
        for run_it in (db.run, Runtime(db).run):
            with pytest.raises(ConfigurationError, match=r"run\(lambda: list\(generator\(\.\.\.\)\)\)"):
                await run_it(generator)
        assert await db.run(lambda: list(generator())) == []

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


# -- the rest of what Peewee's page on asyncio shows, in its order --------------------------------------------------------


def test_the_example_at_the_top_of_peewees_page(db, models, play):
    """One block around everything, rows as a result, as a list and one by one."""
    User, _ = models

    async def work():
        async with db:
            async with db.atomic():
                user = await User.acreate(name="Charlie")
            charlie = await User.aget(User.name == "Charlie")
            assert charlie.id == user.id
            charlie.name = "Charles"
            await charlie.asave()
            query = User.select().order_by(User.name)
            assert [user.name for user in await query.clone().aexecute()] == ["Charles"]
            assert [user.name for user in await db.list(query.clone())] == ["Charles"]
            assert [user.name async for user in db.iterate(query.clone())] == ["Charles"]

    play(work)


def test_what_writes_return(db, models, play, backend):
    """The key of an insert, the count of an update, the rows of RETURNING."""
    User, _ = models

    async def work():
        key = await User.insert(name="huey").aexecute()
        assert (await User.aget_by_id(key)).name == "huey"
        assert await User.update(score=1).where(User.name == "huey").aexecute() == 1
        if backend.place.kind != "mysql":  # Peewee has none there
            deleted = User.delete().where(User.name == "huey").returning(User.name)
            assert [user.name for user in await deleted.aexecute()] == ["huey"]
            inserted = User.insert_many([{"name": "a"}, {"name": "b"}]).returning(User.name)
            assert [user.name for user in await db.list(inserted)] == ["a", "b"]

    play(work)


def test_relations(db, models, play, backend):
    """Back-references, joins, prefetch, a lazy foreign key."""
    User, Tweet = models

    async def work():
        huey = await User.acreate(name="huey")
        await Tweet.abulk_create([Tweet(user=huey, text=f"t{number}") for number in range(3)])
        texts = ["t0", "t1", "t2"]
        assert [tweet.text for tweet in await huey.tweets.order_by(Tweet.id).aexecute()] == texts
        assert [tweet.text for tweet in await db.list(huey.tweets.order_by(Tweet.id))] == texts
        assert [tweet.text for tweet in await db.run(list, huey.tweets.order_by(Tweet.id))] == texts
        (found,) = await db.run(peewee.prefetch, User.select(), Tweet.select().order_by(Tweet.id))
        assert [tweet.text for tweet in found.tweets] == texts
        joined = await db.get(Tweet.select(Tweet, User).join(User).order_by(Tweet.id))
        assert joined.user.name == "huey"
        lazy = await db.get(Tweet.select().order_by(Tweet.id))
        if not isinstance(backend, SyncBackend):  # a sync driver queries here, on the loop: the table of differences
            with pytest.raises(MissingGreenletBridge, match="afetch"):
                lazy.user  # noqa: B018 - it queries
        assert await db.run(lambda: lazy.user.name) == "huey"
        again = await db.get(Tweet.select().order_by(Tweet.id))
        await again.afetch(Tweet.user)
        assert again.user.name == "huey"
        shown = await db.run(model_to_dict, huey, backrefs=True)
        assert sorted(tweet["text"] for tweet in shown["tweets"]) == texts

    play(work)


def test_a_foreign_key_that_is_not_to_be_loaded_lazily(db, models, play):
    User, _ = models

    class Note(db.Model):
        user = peewee.ForeignKeyField(User, lazy_load=False)

    async def work():
        huey = await User.acreate(name="huey")
        with pytest.raises(ValueError, match="lazy_load=False"):
            await Note(user=huey.id).afetch(Note.user)

    play(work)


def test_sync_code_with_transactions_in_run(db, models, play):
    """A function as it stands in a sync application, `with db` and blocks of its own included."""
    User, Tweet = models

    def register(name, text):
        with db, db.atomic():
            user = User.create(name=name)
            Tweet.create(user=user, text=text)
            with db.atomic() as nested:
                User.delete().where(User.name == "Bob").execute()
                nested.rollback()
            return user

    async def work():
        await User.acreate(name="Bob")
        assert (await db.run(register, "zoe", "Python")).name == "zoe"
        with pytest.raises(peewee.IntegrityError):
            await db.run(register, "zoe", "twice")
        assert await names(db, User) == ["Bob", "zoe"]
        assert await db.count(Tweet.select()) == 1

    play(work)


def test_nested_blocks_that_take_back_what_they_did(db, models, play):
    User, _ = models

    async def work():
        async with db.atomic():
            await db.run(User.create, name="Alice")
            await db.run(User.create, name="Bob")
            async with db.atomic() as nested:
                await db.aexecute(User.delete().where(User.name == "Bob"))
                await nested.arollback()
        assert await names(db, User) == ["Alice", "Bob"]

    play(work)


def test_transaction_and_savepoint_blocks(db, models, play):
    """The two that `atomic` chooses from."""
    User, _ = models

    async def work():
        async with db.transaction():
            await User.acreate(name="a")
            with contextlib.suppress(ZeroDivisionError):
                async with db.savepoint():
                    await User.acreate(name="b")
                    raise ZeroDivisionError
        assert await names(db, User) == ["a"]

    play(work)


def test_what_is_to_happen_after_the_commit(db, models, play):
    """A plain callable; a coroutine function would never be awaited."""
    User, _ = models
    told = []

    async def later():
        raise AssertionError("never")

    def with_callback():
        db.after_commit(lambda: told.append("committed"))

    async def work():
        async with db.atomic():
            await User.acreate(name="a")
            await db.run(with_callback)
            assert told == []
        assert told == ["committed"]
        with pytest.raises(ValueError, match="coroutine"):
            await db.run(db.after_commit, later)

    play(work)


def test_connecting_and_closing_by_hand(db, models, play, scope, backend):
    """Not in the middle of a transaction. Outside a unit of work a sync pool has nothing to keep the connection in."""
    User, _ = models

    async def work():
        await db.aconnect()
        assert db.is_closed() == (scope is contextlib.nullcontext and isinstance(backend, SyncBackend))
        assert await names(db, User) == []
        await db.aclose()
        assert db.is_closed()
        async with db.atomic():
            await User.acreate(name="a")
            with pytest.raises(peewee.OperationalError, match="transaction"):
                await db.aclose()
            await User.acreate(name="b")
        assert await names(db, User) == ["a", "b"]

    play(work)


def test_one_query_object_in_several_tasks(db, models, play):
    """Each has the right rows, if it has a clone."""
    User, _ = models

    async def work():
        await User.abulk_create([User(name=name) for name in "abc"])
        query = User.select().order_by(User.name)
        for rows in await asyncio.gather(*(db.list(query.clone()) for _ in range(5))):
            assert [user.name for user in rows] == ["a", "b", "c"]

    play(work)


def test_models_bound_to_a_proxy(db, play):
    """`AsyncModel` as the base class, initialised later."""
    proxy = peewee.DatabaseProxy()

    class Thing(AsyncModel):
        name = peewee.CharField()

        class Meta:
            database = proxy

    proxy.initialize(db)

    async def work():
        await db.acreate_tables([Thing])
        await Thing.acreate(name="a")
        assert (await Thing.aget(Thing.name == "a")).name == "a"
        assert [thing.name for thing in await Thing.select().aexecute()] == ["a"]
        await db.adrop_tables([Thing])

    play(work)
