"""`AsyncPsycopgDatabase`: PostgreSQL's types, isolation levels, server-side cursors, and the options of its pool."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import peewee
import psycopg_pool
import pytest
from playhouse.postgres_ext import ArrayField, BinaryJSONField, JSONField
from psycopg.pq import TransactionStatus

from peewee_frameworks import (
    ConfigurationError,
    DatabaseUnavailable,
    PoolConnectTimeout,
    PoolTimeout,
    TooManyWaiters,
    connection_scope,
)
from peewee_frameworks.aio import AsyncPsycopgDatabase
from tests.aio.conftest import run, until
from tests.support.proxy import Proxy


@pytest.fixture
def make(backends):
    backend = backends("psycopg")

    def make(**options):
        place = backend.place
        return AsyncPsycopgDatabase(place.database, **{"min_size": 1, **place.connect_kwargs(), **options})

    make.place = backend.place
    return make


@pytest.fixture
def proxy(make):
    with Proxy(make.place.address) as proxy:
        yield proxy


async def ask(db):
    async with connection_scope(db):
        await db.aexecute_sql("SELECT 1")


def play(db, work):
    async def main():
        async with connection_scope(db):
            result = await work()
        await db.close_pool()
        return result

    return run(main())


def test_types_come_back_as_they_went(make):
    """JSON, JSONB, arrays, UUID, blobs; in bulk too."""
    db = make()

    class Thing(db.Model):
        key = peewee.UUIDField(primary_key=True)
        plain = JSONField()
        binary = BinaryJSONField()
        tags = ArrayField(peewee.TextField)
        blob = peewee.BlobField()
        number = peewee.IntegerField(null=True)

    async def work():
        await db.acreate_tables([Thing])
        things = [
            Thing(
                key=uuid.uuid4(),
                plain={"a": [1, None]},
                binary={"b": {"c": True}},
                tags=["x", "y"],
                blob=bytes(range(256)),
                number=str(number),
            )
            for number in range(3)
        ]
        await Thing.abulk_create(things)
        for thing in things:
            thing.number = int(thing.number) + 10
        assert await Thing.abulk_update(things, [Thing.number]) == 3
        rows = await db.list(Thing.select().order_by(Thing.number))
        assert [row.number for row in rows] == [10, 11, 12]
        row = rows[0]
        assert (row.key, row.plain, row.binary, row.tags) == (
            things[0].key, {"a": [1, None]}, {"b": {"c": True}}, ["x", "y"],
        )  # fmt: skip
        assert bytes(row.blob) == bytes(range(256))
        assert await db.count(Thing.select().where(Thing.binary.contains({"b": {"c": True}}))) == 3
        assert await db.count(Thing.select().where(Thing.tags.contains("x"))) == 3

    play(db, work)


def test_isolation_levels(make):
    """For a block, and for all of the database's."""

    async def level(db):
        return list(await db.aexecute_sql("SHOW transaction_isolation"))[0][0]  # noqa: RUF015

    db = make()

    async def work():
        async with db.atomic("SERIALIZABLE"):
            assert await level(db) == "serializable"
        async with db.atomic():
            assert await level(db) == "read committed"

    play(db, work)
    strict = make(isolation_level="REPEATABLE READ")

    async def strictly():
        async with strict.atomic():
            assert await level(strict) == "repeatable read"

    play(strict, strictly)


def test_server_side_cursors_inside_and_outside_transactions(make):
    """The server keeps the rows; a cursor outside a transaction is closed with its iteration."""
    db = make()

    async def work():
        for block in (db.atomic(), db):
            async with block:
                async with db.iterate(
                    peewee.Select(columns=[peewee.SQL("generate_series(1, 1000) AS n")]), 100
                ) as rows:
                    assert (await anext(rows))["n"] == 1
                    assert len(db._state.conn.conn.info.parameter_status("server_version")) > 0
                cursors = await db.aexecute_sql("SELECT count(*) FROM pg_cursors WHERE statement LIKE 'DECLARE%'")
                assert list(cursors) == [(0,)]

    play(db, work)


def test_the_options_of_the_pool_pass_through(make):
    """Nothing opens in the constructor; what is no option of the pool goes to psycopg."""
    checked = []

    async def check(connection):
        checked.append(connection)

    db = make(
        min_size=2, max_size=3, max_waiting=1, max_lifetime=60, max_idle=30, check=check, reconnect_timeout=5, num_workers=1
    )  # fmt: skip
    assert db._pool is None
    assert make.place.sessions() == []

    async def work():
        await db.open(wait=True)
        pool = db._pool
        assert isinstance(pool, psycopg_pool.AsyncConnectionPool)
        options = (pool.min_size, pool.max_size, pool.max_waiting, pool.max_lifetime, pool.max_idle, pool.num_workers)
        assert options == (2, 3, 1, 60, 30, 1)
        await db.aexecute_sql("SELECT 1")
        assert len(checked) == 1
        assert db.pool_stats()["pool_max"] == 3
        assert len(make.place.sessions()) >= 2

    play(db, work)
    assert db.pool_stats() == {}


def test_waiting_is_bounded_in_time_and_in_number(make):
    """`timeout` and `max_waiting`."""
    db = make(max_size=1, max_waiting=1, timeout=0.5)

    async def ask():
        async with connection_scope(db):
            await db.aexecute_sql("SELECT 1")

    async def work():
        await db.aexecute_sql("SELECT 1")
        first = asyncio.create_task(ask())
        await asyncio.sleep(0)
        errors = await asyncio.gather(first, ask(), return_exceptions=True)
        assert {type(error) for error in errors} == {PoolTimeout, TooManyWaiters}

    play(db, work)


@pytest.mark.parametrize("options", [{}, {"reconnect_timeout": 300}])
def test_a_server_that_goes_away_is_told_at_once_and_found_again(make, proxy, options):
    """Not after the time to wait for a connection, and not as a pool that is too small."""
    db = make(**dict(zip(("host", "port"), proxy.address, strict=True)), max_size=3, timeout=60, **options)

    async def work():
        await ask(db)
        await asyncio.to_thread(proxy.refuse)
        await asyncio.to_thread(proxy.cut)
        for _ in range(2):
            errors = await asyncio.gather(*(ask(db) for _ in range(10)), return_exceptions=True)
            assert {type(error) for error in errors} == {DatabaseUnavailable}
            assert "refused" in str(errors[0])
        await asyncio.to_thread(proxy.restore)
        await ask(db)

    run(work())


def test_who_waits_beside_holders_goes_on_waiting_though_connecting_fails(make, proxy):
    """The connection of another may still come back."""
    db = make(**dict(zip(("host", "port"), proxy.address, strict=True)), max_size=2, timeout=60)

    async def work():
        await db.open(wait=True)  # or the first to wait would have the pool grow
        async with connection_scope(db):
            await db.aexecute_sql("SELECT 1")
            await asyncio.to_thread(proxy.refuse)
            waiting = asyncio.create_task(ask(db))
            await until(lambda: db._refusals.last is not None)
            assert not waiting.done()
        await waiting
        await db.close_pool()

    run(work())


def test_a_server_that_is_silent_is_not_called_a_pool_that_is_too_small(make, proxy):
    """Nobody has a connection that could come back."""
    db = make(**dict(zip(("host", "port"), proxy.address, strict=True)), timeout=0.5)

    async def work():
        proxy.hang()
        with pytest.raises(PoolConnectTimeout, match="does not answer"):
            await ask(db)

    run(work())


@pytest.mark.parametrize("wait_for_minimum", [True, False])
def test_waiting_for_the_minimum_ends_when_the_server_refuses_and_the_pool_can_be_opened_later(
    make, proxy, wait_for_minimum
):
    """A pool that failed to fill is closed, and the database makes another."""
    address = dict(zip(("host", "port"), proxy.address, strict=True))
    db = make(**address, min_size=2, timeout=60, wait_for_minimum=wait_for_minimum)

    async def work():
        await asyncio.to_thread(proxy.refuse)
        with pytest.raises(DatabaseUnavailable, match="refused"):
            await db.open(wait=True)
        assert db._pool is None
        await asyncio.to_thread(proxy.restore)
        await db.open(wait=True)
        await ask(db)
        await db.close_pool()

    run(work())


@pytest.mark.parametrize("silence", ["deafen", "hang"])
def test_a_cancelled_statement_on_a_silent_server_is_given_up_soon(make, proxy, silence):
    """Whether the server takes the cancellation or not: psycopg by itself needs 5 s for either, or 10."""
    db = make(**dict(zip(("host", "port"), proxy.address, strict=True)))

    async def work():
        async with connection_scope(db):
            await db.aexecute_sql("SELECT 1")
            statement = asyncio.create_task(db.aexecute_sql("SELECT pg_sleep(30)"))
            while not db._lent or next(iter(db._lent)).pgconn.transaction_status == TransactionStatus.IDLE:
                await asyncio.sleep(0)
            await asyncio.to_thread(proxy.deafen)
            if silence == "hang":
                proxy.hang()
            statement.cancel()
            done, _ = await asyncio.wait([statement], timeout=4)
            assert done
            assert statement.cancelled()
            await asyncio.to_thread(
                proxy.restore
            )  # first: who connects between the two must not be met with silence again
            await asyncio.to_thread(proxy.cut)
            with contextlib.suppress(DatabaseUnavailable):  # a connect that was cut
                await db.aexecute_sql("SELECT 1")
            await db.aexecute_sql("SELECT 1")
        await db.close_pool()

    run(work(), 30)


def test_urls_and_wrong_options(make):
    """A URL or conninfo as the database; sizes that contradict each other are refused at once."""
    kwargs = make.place.connect_kwargs()
    url = f"postgresql://{kwargs['user']}@{kwargs['host']}:{kwargs['port']}/{make.place.database}"
    db = AsyncPsycopgDatabase(url, min_size=1)

    async def work():
        return list(await db.aexecute_sql("SELECT current_database()"))

    assert play(db, work) == [(make.place.database,)]
    for options in (
        {"min_size": 5, "max_size": 2},
        {"min_size": 0, "max_size": 0},
        {"timeout": 1, "acquire_timeout": 2},
    ):
        with pytest.raises(ConfigurationError):
            AsyncPsycopgDatabase("shop", **options)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, (4, 4)),
        ({"max_size": 20}, (4, 20)),
        ({"max_size": 2}, (2, 2)),
        ({"pool_size": 3}, (3, 3)),
        ({"min_size": 6}, (6,) * 2),
    ],
)
def test_one_size_alone_is_enough(options, sizes):
    """A small pool needs no second option to say that it keeps fewer connections open."""
    db = AsyncPsycopgDatabase("shop", **options)
    assert (db.pool_options["min_size"], db.pool_options["max_size"]) == sizes


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"max_sise": 3}, "Did you mean max_size"),
        ({"max_connections": 3}, "calls it max_size"),
        ({"max_conections": 3}, "Did you mean max_size"),
        ({"stale_timeout": 3}, "calls it max_lifetime"),
        ({"max_size": "3"}, "max_size must be a whole number, not '3'"),
        ({"timeout": "3"}, "timeout must be a number of seconds, not '3'"),
    ],
)
def test_an_option_that_it_does_not_have_is_refused_with_the_right_name(options, remedy):
    """libpq would refuse it too, at the first connect, and say neither."""
    with pytest.raises(ConfigurationError, match=remedy):
        AsyncPsycopgDatabase("shop", **options)


def test_init_takes_what_is_the_drivers():
    db = AsyncPsycopgDatabase(None, max_size=7)
    with pytest.raises(ConfigurationError, match=r"Give max_size to AsyncPsycopgDatabase\(\.\.\.\)"):
        db.init("shop", max_size=3)
    db.init("shop", host="h", connect_timeout=3, keepalives=1)
    assert db.connect_params == {"host": "h", "connect_timeout": 3, "keepalives": 1}


def test_the_pool_has_the_name_of_the_database(make):
    """Else its log says "pool-1"."""
    db = make()

    async def main():
        await db.open()
        name = db._pool.name
        await db.close_pool()
        return name

    assert run(main()) == f"AsyncPsycopgDatabase({make.place.database!r})"


def test_a_password_is_never_shown():
    """Not in the names that messages use."""
    db = AsyncPsycopgDatabase("postgresql://shop:secret@127.0.0.1:1/shop", min_size=1, timeout=0.3)
    with pytest.raises(peewee.OperationalError) as failed:
        run(db.aconnect())
    assert "secret" not in str(failed.value)
