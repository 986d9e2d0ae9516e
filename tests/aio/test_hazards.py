"""What goes wrong on Peewee's asyncio layer as it is, and does not with our scope: each test runs on both.

On the stock layer each is expected to fail, strictly: a hazard that Peewee cures makes its line here fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import Any

import peewee
import pytest
from playhouse import pwasyncio

from peewee_frameworks import ConcurrentUse, TransactionLost, connection_scope, current_scope
from peewee_frameworks.asgi import PeeweeMiddleware
from tests.aio.conftest import run

# What the stock layer leaves behind when it fails.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore::ResourceWarning"
)

WAIT_FOR_MAKES_A_TASK = sys.version_info < (3, 12)


def layers(
    *stock: str, ours: tuple[str, ...] = ("aiosqlite", "aiomysql", "asyncpg", "psycopg"), when: bool = True
) -> Any:
    """Run on our layer with each driver, and on the stock layer, where it is to fail, with those named."""
    hazard = pytest.mark.xfail(
        condition=when,
        reason="a hazard of the stock layer",
        strict=True,
        raises=(AssertionError, peewee.PeeweeException),
    )
    cases = [pytest.param(driver, "ours", id=f"{driver}-ours") for driver in ours]
    cases += [pytest.param(driver, "stock", id=f"{driver}-stock", marks=hazard) for driver in stock]
    return pytest.mark.parametrize(("driver", "layer"), cases)


class Shop:
    """A database with one table, in the layer under test."""

    def __init__(self, backend: Any, layer: str, **options: Any) -> None:
        self.backend = backend
        self.ours = layer == "ours"
        self.db = backend.make(**options) if self.ours else backend.stock(**options)

        class Item(self.db.Model):
            number = peewee.IntegerField()

        self.Item = Item

    def scope(self) -> Any:
        return connection_scope(self.db) if self.ours else contextlib.nullcontext()

    async def create(self) -> None:
        async def work() -> None:
            async with self.db:
                await self.db.acreate_tables([self.Item])

        await asyncio.create_task(work())

    async def rows(self) -> list[int]:
        async def work() -> list[int]:
            async with self.db:
                return [item.number for item in await self.db.list(self.Item.select().order_by(self.Item.number))]

        return await asyncio.create_task(work())

    def run(self, work: Any) -> Any:
        async def main() -> Any:
            await self.create()
            try:
                async with self.scope():
                    await work()
                return await self.rows()
            finally:
                await self.db.close_pool()

        return run(main())


@layers("aiomysql", "asyncpg", ours=("aiomysql", "asyncpg", "psycopg"))
def test_a_connection_lost_in_a_transaction_never_lets_later_statements_commit(backends, driver, layer):
    """Killed between two statements of `atomic()`: the block fails, and nothing of it stays."""
    shop = Shop(backends(driver), layer)
    outcome = []

    async def work():
        try:
            async with shop.db.atomic():
                await shop.Item.acreate(number=1)
                await asyncio.to_thread(shop.backend.place.kill_sessions)
                with contextlib.suppress(Exception):
                    await shop.Item.acreate(number=2)
                with contextlib.suppress(Exception):
                    await shop.Item.acreate(number=3)
        except Exception as error:
            outcome.append(error)

    rows = shop.run(work)
    assert rows == []
    assert [type(error) for error in outcome] == [TransactionLost]
    assert "run the whole of it again" in str(outcome[0])


@layers("aiomysql")
def test_a_cancelled_statement_never_lets_later_statements_commit(backends, driver, layer):
    """A timeout around one statement of `atomic()`: all or nothing."""
    shop = Shop(backends(driver), layer)
    outcome = []

    async def work():
        try:
            async with shop.db.atomic():
                await shop.Item.acreate(number=1)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await shop.db.aexecute_sql(shop.backend.slow)
                await shop.Item.acreate(number=2)
        except Exception as error:
            outcome.append(type(error))

    rows = shop.run(work)
    assert rows == []
    assert outcome == [TransactionLost]


@layers("aiosqlite", when=WAIT_FOR_MAKES_A_TASK)
def test_wait_for_in_a_transaction_is_part_of_it(backends, driver, layer):
    """Up to Python 3.11 `wait_for` makes a task; its statement is rolled back with the block all the same."""
    shop = Shop(backends(driver), layer)

    async def work():
        with contextlib.suppress(ZeroDivisionError):
            async with shop.db.atomic():
                await asyncio.wait_for(shop.Item.acreate(number=1), 5)
                raise ZeroDivisionError

    assert shop.run(work) == []


@layers("asyncpg")
def test_gather_in_a_transaction_is_part_of_it(backends, driver, layer):
    """Children started inside `atomic()` take turns in it, and are rolled back with it."""
    shop = Shop(backends(driver), layer)

    async def work():
        with contextlib.suppress(ZeroDivisionError):
            async with shop.db.atomic():
                await asyncio.gather(shop.Item.acreate(number=1), shop.Item.acreate(number=2))
                raise ZeroDivisionError

    assert shop.run(work) == []


@layers("aiosqlite")
def test_parents_that_hold_connections_do_not_deadlock_their_children(backends, driver, layer):
    """Four parents with two children each on a pool of four."""
    shop = Shop(backends(driver), layer, size=4, timeout=1)
    all_hold = asyncio.Barrier(4)

    async def parent():
        async with shop.scope(), shop.db:
            await shop.db.aexecute_sql("SELECT 1")
            await all_hold.wait()
            assert await asyncio.gather(*(shop.db.count(shop.Item.select()) for _ in range(2))) == [0, 0]

    async def work():
        await asyncio.gather(*(parent() for _ in range(4)))

    assert shop.run(work) == []


@layers("aiosqlite")
def test_a_task_that_idles_after_its_query_holds_no_connection(backends, driver, layer):
    """What an adapter does at the first byte of a response: the connection goes back, and can be taken again."""
    shop = Shop(backends(driver), layer, size=1, timeout=1)
    all_idle = asyncio.Barrier(3)

    async def stream():
        async with shop.scope():
            await shop.db.count(shop.Item.select())
            if shop.ours:
                current_scope().release_early()
            await all_idle.wait()
            assert await shop.db.count(shop.Item.select()) == 0

    async def work():
        await asyncio.gather(*(asyncio.create_task(stream()) for _ in range(3)))

    assert shop.run(work) == []


@layers("aiosqlite")
def test_base_http_middleware_that_connects_shares_its_connection_with_the_endpoint(backends, driver, layer):
    """`BaseHTTPMiddleware` runs the endpoint in another task; 16 requests on a pool of 4 are all answered."""
    import httpx
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    shop = Shop(backends(driver), layer, size=4, timeout=1)
    arrivals = asyncio.Barrier(4)

    async def connected(request, call_next):
        async with shop.db:
            await shop.db.aexecute_sql("SELECT 1")
            await arrivals.wait()
            return await call_next(request)

    async def endpoint(request):
        return PlainTextResponse(str(await shop.db.count(shop.Item.select())))

    app: Any = Starlette(routes=[Route("/", endpoint)], middleware=[Middleware(BaseHTTPMiddleware, dispatch=connected)])
    if shop.ours:
        app = PeeweeMiddleware(app, shop.db)

    async def work():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            answers = await asyncio.gather(*(client.get("/") for _ in range(16)))
        assert [answer.status_code for answer in answers] == [200] * 16

    assert shop.run(work) == []


@layers("aiosqlite")
def test_a_nested_async_with_does_not_close_the_connection_of_the_outer_one(backends, driver, layer):
    """The inner block ends, and the outer one goes on with the connection it had."""
    shop = Shop(backends(driver), layer)

    async def work():
        async with shop.db:
            before = shop.db._state.conn
            async with shop.db:
                assert await shop.db.count(shop.Item.select()) == 0
            assert not shop.db.is_closed()
            assert shop.db._state.conn is before
        assert shop.db.is_closed()

    shop.run(work)


@layers("aiosqlite")
def test_a_query_beside_rows_that_are_being_read_is_refused_at_once(backends, driver, layer, monkeypatch):
    """Not after seconds of waiting, and with the remedy; when the rows are closed or dropped, queries work."""
    monkeypatch.setattr(pwasyncio.AsyncConnectionWrapper, "streaming_timeout", 1.0)
    shop = Shop(backends(driver), layer)

    async def work():
        await shop.Item.abulk_create([shop.Item(number=number) for number in range(3)])
        query = shop.Item.select().order_by(shop.Item.number)
        rows = shop.db.iterate(query, buffer_size=1)
        assert (await anext(rows)).number == 0
        start = time.monotonic()
        with pytest.raises(peewee.InterfaceError) as refused:
            await shop.db.count(query)
        assert time.monotonic() - start < 0.5
        assert isinstance(refused.value, ConcurrentUse)
        assert "aclosing" in str(refused.value)
        async with contextlib.aclosing(rows):
            assert [row.number async for row in rows] == [1, 2]
        assert await shop.db.count(query) == 3
        async for _ in shop.db.iterate(query, buffer_size=1):
            break
        assert await shop.db.count(query) == 3

    assert shop.run(work) == [0, 1, 2]


@layers(ours=("aiosqlite",))  # the stock layer leaves a thread behind
def test_who_keeps_what_the_loop_ran_keeps_no_pragma_running(backends, driver, layer, monkeypatch):
    """A profiler holds callbacks, they hold the result of `PRAGMA journal_mode`, and SQLite commits nothing beside that."""
    kept = []
    run_handle = asyncio.Handle._run

    def keep(handle):
        kept.append(handle)
        run_handle(handle)

    monkeypatch.setattr(asyncio.Handle, "_run", keep)
    shop = Shop(backends(driver), layer)

    async def work():
        async with shop.db.atomic():
            await shop.Item.acreate(number=1)

    assert shop.run(work) == [1]


@layers("aiosqlite", ours=("aiosqlite",))
def test_who_keeps_an_error_keeps_no_statement_running(backends, driver, layer):
    """Rows of RETURNING that cannot be read: the error is kept for a report, and the transaction goes on and commits."""
    shop = Shop(backends(driver), layer)
    kept = []

    async def work():
        async with shop.db.atomic():
            try:
                await shop.db.aexecute_sql("INSERT INTO item (number) VALUES (1) RETURNING CAST(x'ff' AS TEXT)")
            except peewee.OperationalError as error:
                kept.append(error)
            await shop.Item.acreate(number=2)

    assert shop.run(work) == [1, 2]
    assert "decode" in str(kept[0])
