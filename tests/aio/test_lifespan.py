"""Adapters with asynchronous databases: start and end in the serving loop, atomic requests, mixed applications."""

from __future__ import annotations

import asyncio
import contextlib

import httpx
import peewee
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from peewee_frameworks import ConfigurationError, DatabaseUnavailable, connection_scope
from peewee_frameworks.asgi import PeeweeMiddleware
from peewee_frameworks.runtime import Runtime
from peewee_frameworks.starlette import Peewee
from tests.aio.conftest import run, until
from tests.support.databases import scratch


@pytest.fixture
def db(backend):
    return backend.make()


@pytest.fixture
def Item(db):
    class Item(db.Model):
        number = peewee.IntegerField(unique=True)

    return Item


@contextlib.asynccontextmanager
async def serving(app):
    """Run an application's lifespan, and give a client of it."""
    messages: asyncio.Queue = asyncio.Queue()
    answers: asyncio.Queue = asyncio.Queue()
    task = asyncio.create_task(app({"type": "lifespan", "asgi": {}, "state": {}}, messages.get, answers.put))
    await messages.put({"type": "lifespan.startup"})
    answer = await answers.get()
    if answer["type"] != "lifespan.startup.complete":
        with contextlib.suppress(Exception):
            await task
        raise RuntimeError(answer["message"])
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        yield client
    await messages.put({"type": "lifespan.shutdown"})
    assert (await answers.get())["type"] == "lifespan.shutdown.complete"
    await task


def starlette(db, *routes, **options):
    orm = Peewee(db, **options)
    app = Starlette(routes=[Route(path, endpoint, methods=["GET", "POST"]) for path, endpoint in routes])
    orm.init_app(app)
    return orm, app


def test_the_pool_opens_at_start_and_closes_at_the_end_in_the_serving_loop(db, Item, backend):
    """Tables are created; a query in an endpoint works; nothing is left on the server."""

    async def endpoint(request):
        await Item.acreate(number=1)
        return PlainTextResponse(str(await db.count(Item.select())))

    _, app = starlette(db, ("/", endpoint), create_tables=[Item])

    async def main():
        assert db._pool is None
        async with serving(app) as client:
            assert db._pool is not None
            assert (await client.get("/")).text == "1"
        assert db._pool is None
        await until(lambda: not backend.place.sessions())  # the server notices a moment later

    run(main())


def test_a_database_that_is_down_fails_the_start_and_closes_what_had_opened(backends, tmp_path, free_port):
    """The message names the alias and the remedy."""
    with scratch("sqlite", tmp_path) as place:
        first = backends("aiosqlite").make()
        second = backends("psycopg")
        second.place = second.place.via("127.0.0.1", free_port)
        runtime = Runtime({"default": first, "other": second.make(timeout=0.5)})

        async def main():
            with pytest.raises(DatabaseUnavailable, match=r"Database 'other'.*check='warn'"):
                await runtime.start_async()
            assert first._pool is None
            assert [state.users for state in runtime.states] == [0, 0]

        run(main())
        assert place.sessions() == []


def test_a_database_that_is_down_is_only_a_warning_by_option(backends, free_port, caplog):
    """The application starts and stops."""
    backend = backends("asyncpg")
    backend.place = backend.place.via("127.0.0.1", free_port)
    runtime = Runtime(backend.make(timeout=0.5), check="warn")

    async def main():
        await runtime.start_async()
        await runtime.stop_async()

    run(main())
    assert "cannot be reached at start" in caplog.text


def test_an_asynchronous_database_in_a_sync_application_is_refused(backends):
    """At start, with the alias."""
    runtime = Runtime(backends("aiosqlite").make())
    with pytest.raises(ConfigurationError, match=r"'default'.*is asynchronous"):
        runtime.start()


def test_atomic_requests_commit_before_the_first_byte_or_roll_back(db, Item):
    """By status and by exception; the transaction is shared with the request's children."""

    async def add(request):
        await Item.acreate(number=int(request.query_params["number"]))
        await asyncio.gather(db.count(Item.select()), db.count(Item.select()))
        if "raise" in request.query_params:
            raise ZeroDivisionError
        return PlainTextResponse("added", int(request.query_params.get("status", 200)))

    async def numbers(request):
        return PlainTextResponse(" ".join([str(row.number) for row in await db.list(Item.select())]))

    _, app = starlette(db, ("/add", add), ("/numbers", numbers), create_tables=[Item], transaction=True)

    async def main():
        async with serving(app) as client:
            statuses = [
                (await client.post(path)).status_code
                for path in ("/add?number=1", "/add?number=2&status=422", "/add?number=3&raise=1", "/add?number=4")
            ]
            assert statuses == [200, 422, 500, 200]
            assert (await client.get("/numbers")).text == "1 4"

    run(main())


def test_a_commit_that_fails_is_an_error_status_and_no_success(backends):
    """A constraint that PostgreSQL checks at the commit."""
    for driver in ("asyncpg", "psycopg"):
        db = backends(driver).make()

        class Parent(db.Model):
            pass

        class Child(db.Model):
            parent = peewee.ForeignKeyField(Parent, deferrable="INITIALLY DEFERRED")

        async def endpoint(request, db=db, Child=Child):
            await db.run(Child.insert(parent=7).execute)
            return PlainTextResponse("created", 201)

        _, app = starlette(db, ("/", endpoint), create_tables=[Parent, Child], transaction=True, errors=True)

        async def main(app=app, db=db, Child=Child):
            async with serving(app) as client:
                status = (await client.post("/")).status_code
                assert status >= 400
                async with connection_scope(db):
                    assert await db.count(Child.select()) == 0

        run(main())


def test_a_transaction_that_was_lost_is_an_error_status(db, Item, backend):
    """A handler that swallows the timeout of a statement does not get a 200 for what was rolled back."""

    async def endpoint(request):
        await Item.acreate(number=1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await db.aexecute_sql(backend.slow)
        return PlainTextResponse("fine")

    _, app = starlette(db, ("/", endpoint), create_tables=[Item], transaction=True)

    async def main():
        async with serving(app) as client:
            assert (await client.post("/")).status_code == 500
            async with connection_scope(db):
                assert await db.count(Item.select()) == 0

    run(main())


def test_an_eager_request_is_connected_before_its_handler(db):
    """And a nested `async with db` does not close it."""

    async def endpoint(request):
        assert not db.is_closed()
        async with db:
            await db.aexecute_sql("SELECT 1")
        assert not db.is_closed()
        return PlainTextResponse("connected")

    _, app = starlette(db, ("/", endpoint), connect="eager")

    async def main():
        async with serving(app) as client:
            assert (await client.get("/")).text == "connected"

    run(main())


def test_run_takes_sync_code_to_an_asynchronous_database(db, Item):
    """`orm.run` needs no thread there; its calls take turns, so each may have a transaction."""

    def transfer(number):
        with db.atomic():
            Item.create(number=number)
            return [row.number for row in Item.select()]

    async def endpoint(request):
        await asyncio.gather(*(orm.run(transfer, number) for number in range(3)))
        return PlainTextResponse(str(await db.count(Item.select())))

    orm, app = starlette(db, ("/", endpoint), create_tables=[Item])

    async def main():
        async with serving(app) as client:
            assert (await client.get("/")).text == "3"
        async with connection_scope(db):
            assert len(await orm.run(transfer, 10)) == 4
        assert len(await orm.run(transfer, 11)) == 5

    run(main())


def test_a_sync_and_an_asynchronous_database_in_one_application(backend, make_place):
    """Sync endpoints on the one, async endpoints on the other; a sync endpoint that takes the wrong one is told."""
    place = make_place("sqlite")
    sync = place.make_database()
    db = backend.make()

    class Note(sync.Model):
        text = peewee.TextField()

    class Item(db.Model):
        number = peewee.IntegerField()

    def write(request):
        Note.create(text="one")
        return PlainTextResponse(str(Note.select().count()))

    async def count(request):
        await Item.acreate(number=1)
        notes = await orm.run(Note.select().count)
        return PlainTextResponse(f"{await db.count(Item.select())} {notes}")

    def wrong(request):
        return PlainTextResponse(str(Item.select().count()))

    async def told(request, error):
        return PlainTextResponse(str(error), 500)

    orm, app = starlette(
        {"default": sync, "other": db}, ("/write", write), ("/count", count), ("/wrong", wrong),
        create_tables=[Note, Item], transaction=True,
    )  # fmt: skip
    app.add_exception_handler(Exception, told)

    async def main():
        async with serving(app) as client:
            assert (await client.post("/write")).text == "1"
            assert (await client.post("/count")).text == "1 1"
            answer = await client.get("/wrong")
            assert answer.status_code == 500
            assert "Make the endpoint `async def`" in answer.text
            assert (await client.post("/count")).text == "2 1"

    run(main())
    sync.close_all()


def test_requests_in_flight_are_waited_for_at_the_end(db):
    """A request that ends within the deadline is not cut off."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def endpoint(request):
        await db.aexecute_sql("SELECT 1")
        begun.set()
        await go_on.wait()
        await db.aexecute_sql("SELECT 1")
        return PlainTextResponse("complete")

    app = PeeweeMiddleware(Starlette(routes=[Route("/", endpoint)]), db)

    async def main():
        async with serving(app) as client:
            request = asyncio.create_task(client.get("/"))
            await begun.wait()
            asyncio.get_running_loop().call_later(0.1, go_on.set)
            answer = asyncio.ensure_future(request)
        assert (await answer).text == "complete"
        assert db._pool is None

    run(main())
