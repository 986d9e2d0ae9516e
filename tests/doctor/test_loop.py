"""Queries on the event loop, found by reading the endpoints; and that what is not one is left alone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import peewee
import pytest
from fastapi import APIRouter, Depends, FastAPI
from sanic import Sanic, text
from sanic.views import HTTPMethodView
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from peewee_frameworks import fastapi, sanic, starlette
from tests.doctor.helpers import found, look, severities

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.databases import Place

db: Any = peewee.DatabaseProxy()


class Note(peewee.Model):
    text = peewee.CharField(default="")

    class Meta:
        database = db


@pytest.fixture
def database(mysql: Place, sound: Callable[..., Any]) -> Iterator[Any]:
    real = sound(mysql)
    db.initialize(real)
    yield real
    db.initialize(None)


def make(database: Any, *endpoints: Any) -> Starlette:
    app = Starlette(routes=[Route(f"/{number}", endpoint) for number, endpoint in enumerate(endpoints)])
    starlette.Peewee(database).init_app(app)
    return app


orm: Any = None


async def queries(request: Any) -> Any:
    Note.get_by_id(1)
    Note.create(text="x")
    Note.update(text="y").where(Note.id == 1).execute()
    for _ in Note.select().where(Note.id > 1):
        pass
    [note.text for note in Note.select()]
    list(Note.select().order_by(Note.id))
    Note.select().count()
    db.execute_sql("SELECT 1")
    return PlainTextResponse(str(len(Note.select().dicts())))


async def waits(request: Any) -> Any:
    await orm.run(Note.get_by_id, 1)
    await orm.run(lambda: Note.get_by_id(1))
    await orm.run(list, Note.select())

    def unit() -> Any:
        return Note.create(text="x"), list(Note.select())

    await asyncio.to_thread(unit)
    await Note.aget_by_id(1)
    await Note.select().aexecute()
    query = Note.select().where(Note.id == 1)
    await db.list(query)
    async with db.atomic():
        await Note.acreate(text="x")
    names = dict(zip("ab", "cd", strict=True))
    names.get("a")
    return PlainTextResponse("")


def in_thread(request: Any) -> Any:
    return PlainTextResponse(str(Note.select().count()))


def test_each_query_on_the_loop_is_named(database: Any) -> None:
    finding = found(look(make(database, queries)))["query-on-loop"]
    assert finding.severity == "warning"
    first = queries.__code__.co_firstlineno
    assert finding.what.startswith(
        "A sync driver (pymysql) queries on the event loop: Note.get_by_id(1) in queries "
        f"(tests/doctor/test_loop.py:{first + 1}); Note.create(text='x') in queries"
    )
    assert finding.what.endswith("; and 6 more.")


def test_what_does_not_run_on_the_loop_is_left_alone(database: Any) -> None:
    assert severities(make(database, waits, in_thread)) == {}


def test_it_stands_still_as_the_finding_says(database: Any) -> None:
    """While one endpoint queries on the loop, nothing else happens; in a thread it does."""

    def sleep() -> None:
        with database.connection_context():
            database.execute_sql("SELECT SLEEP(0.5)")

    async def ticks(blocking: bool) -> int:
        count = 0

        async def tick() -> None:
            nonlocal count
            while True:
                count += 1
                await asyncio.sleep(0.01)

        task = asyncio.create_task(tick())
        await asyncio.sleep(0)
        before = count
        if blocking:
            sleep()
        else:
            await asyncio.to_thread(sleep)
        task.cancel()
        return count - before

    with database.connection_context():  # so that nobody waits for a connection on the loop
        pass
    assert asyncio.run(ticks(blocking=True)) == 0
    assert asyncio.run(ticks(blocking=False)) > 3


class Views(HTTPEndpoint):
    async def get(self, request: Any) -> Any:
        return PlainTextResponse(Note.get_by_id(1).text)


class Deep(HTTPMethodView):
    async def get(self, request: Any) -> Any:
        return text(Note.get_by_id(1).text)


def on_sanics_loop(request: Any) -> Any:
    return text(str(Note.select().count()))


async def dependency() -> Any:
    return Note.get_by_id(1)


async def depends(note: Annotated[Any, Depends(dependency)]) -> str:
    return note.text


def test_classes_of_views_and_mounts(database: Any) -> None:
    app = Starlette(routes=[Mount("/api", routes=[Route("/", Views)])])
    starlette.Peewee(database).init_app(app)
    assert "Note.get_by_id(1) in get" in found(look(app))["query-on-loop"].what


def test_fastapis_dependencies_and_routers(database: Any) -> None:
    app, router = FastAPI(), APIRouter()
    fastapi.Peewee(database).init_app(app)
    router.get("/")(depends)
    app.include_router(router, prefix="/api")
    what = found(look(app))["query-on-loop"].what
    assert "Note.get_by_id(1) in dependency" in what
    assert "in depends" not in what


def test_sanics_handlers_all_run_on_the_loop(database: Any) -> None:
    app = Sanic("loop-doctor")
    sanic.Peewee(database).init_app(app)
    app.get("/a")(on_sanics_loop)
    app.add_route(Deep.as_view(), "/b")
    finding = found(look(app))["query-on-loop"]
    assert "Note.select().count() in on_sanics_loop" in finding.what
    assert "Note.get_by_id(1) in get" in finding.what
    assert "def endpoints" not in finding.change


def test_models_of_another_database_do_not_count(database: Any, sqlite: Place, sound: Callable[..., Any]) -> None:
    other = sound(sqlite)
    assert severities(make(other, queries)) == {}  # they are the proxy's


def test_sqlite_is_quick_enough(sqlite: Place, sound: Callable[..., Any]) -> None:
    """A query is a call of a library; the how-to of Sanic says where that is fine."""
    real = sound(sqlite)
    db.initialize(real)
    assert severities(make(real, queries)) == {}
    db.initialize(None)
