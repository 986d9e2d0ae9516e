"""Two `Peewee` instances in one application, with a database in common: the options of each hold for its own databases."""

from __future__ import annotations

import itertools
import sqlite3
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from flask import Flask, Response
from playhouse.pool import PooledSqliteDatabase
from sanic import Sanic
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from peewee_frameworks import fastapi, flask, sanic, starlette
from tests.adapters.contract.apps.work import make_models
from tests.support.ports import reserved_port

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports websockets.legacy
    from sanic_testing.reusable import ReusableClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

numbers = itertools.count()


class Place:
    """An SQLite database with the contract's two tables, and how many items others see in it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.db = PooledSqliteDatabase(
            path,
            max_connections=3,
            timeout=5,
            check_same_thread=False,
            pragmas={"journal_mode": "wal", "foreign_keys": 1},
        )
        self.Item, self.Part = make_models(self.db)
        with self.db.connection_context():
            self.db.create_tables([self.Item, self.Part])

    def count(self) -> int:
        """Count the rows that are committed."""
        outside = sqlite3.connect(self.path)
        try:
            return int(outside.execute("SELECT COUNT(*) FROM item").fetchone()[0])
        finally:
            outside.close()


@dataclass
class Two:
    """What the applications' route does: it writes into both databases."""

    mine: Place
    other: Place

    def work(self, kind: str) -> int:
        """Do what the route does, and return the status of its response."""
        self.mine.Item.create(owner="mine")
        self.other.Item.create(owner="other")
        if kind == "raise":
            raise RuntimeError("asked for")
        if kind == "spoil":
            self.mine.Part.create(item=-1)  # which the COMMIT finds
        return 409 if kind == "refuse" else 200

    def parts(self) -> Iterator[str]:
        """Make the body of the response: how many rows others see when its first byte is out."""
        yield "committed: "
        yield f"{self.mine.count()} {self.other.count()}"


@pytest.fixture
def two(tmp_path) -> Iterator[Two]:
    two = Two(Place(str(tmp_path / "mine.db")), Place(str(tmp_path / "other.db")))
    yield two
    for place in (two.mine, two.other):
        assert not place.db._in_use
        place.db.close_all()


# Each serves the work with these instances, the outermost first, and GETs a path.


def get_flask(two: Two, make: Callable[[Any], list[Any]], kind: str) -> tuple[int, str]:
    app = Flask("two")

    @app.get("/<kind>")
    def handler(kind: str) -> Response:
        return Response(two.parts(), two.work(kind))

    for orm in reversed(make(flask.Peewee)):
        orm.init_app(app)
    answer = app.test_client().get(f"/{kind}")
    return answer.status_code, answer.text


def get_sanic(two: Two, make: Callable[[Any], list[Any]], kind: str) -> tuple[int, str]:
    app = Sanic(f"two{next(numbers)}")
    app.config.TOUCHUP = False  # it rewrites the class, once for a process

    @app.get("/<kind>")
    async def handler(request: Any, kind: str) -> None:
        response = await request.respond(status=two.work(kind))
        for part in two.parts():
            await response.send(part)

    for orm in make(sanic.Peewee):
        orm.init_app(app)
    try:
        with reserved_port() as port, ReusableClient(app, port=port) as client:
            answer = client.get(f"/{kind}")[1]
            return answer.status, answer.text
    finally:
        Sanic._app_registry.pop(app.name, None)
        Sanic.test_mode = False


def get_starlette(two: Two, make: Callable[[Any], list[Any]], kind: str) -> tuple[int, str]:
    def handler(request: Any) -> StreamingResponse:
        return StreamingResponse(two.parts(), two.work(request.path_params["kind"]))

    app = Starlette(routes=[Route("/{kind}", handler)])
    for orm in reversed(make(starlette.Peewee)):
        orm.init_app(app)
    return get_asgi(app, kind)


def get_fastapi(two: Two, make: Callable[[Any], list[Any]], kind: str) -> tuple[int, str]:
    app = FastAPI()

    @app.get("/{kind}")
    def handler(kind: str) -> StreamingResponse:
        return StreamingResponse(two.parts(), two.work(kind))

    for orm in reversed(make(fastapi.Peewee)):
        orm.init_app(app)
    return get_asgi(app, kind)


def get_asgi(app: Any, kind: str) -> tuple[int, str]:
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get(f"/{kind}")
        return answer.status_code, answer.text


FRAMEWORKS = {"flask": get_flask, "sanic": get_sanic, "fastapi": get_fastapi, "starlette": get_starlette}
# Who serves what, the outermost first: databases of a plain instance, and of one whose requests are atomic.
LAYOUTS: dict[str, Callable[[Any, Two], list[Any]]] = {
    # The scope of the plain one has all there is.
    "one of two": lambda cls, two: [
        cls({"mine": two.mine.db, "other": two.other.db}),
        cls(two.mine.db, transaction=True),
    ],
    # The atomic one opens a scope too, for what the plain one has not.
    "both": lambda cls, two: [
        cls(two.mine.db),
        cls({"mine": two.mine.db, "other": two.other.db}, transaction=True),
    ],
    # A plain one inside neither commits nor rolls back: its `rollback_on` would keep everything.
    "both, around": lambda cls, two: [
        cls({"mine": two.mine.db, "other": two.other.db}, transaction=True),
        cls(two.mine.db, rollback_on=()),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_atomic_requests_of_one_instance_hold_for_its_databases(framework, layout, two):
    """Whoever opened the scope. What it does not serve commits by itself, statement by statement."""

    def make(cls: Any) -> list[Any]:
        return LAYOUTS[layout](cls, two)

    get = FRAMEWORKS[framework]
    both = layout != "one of two"
    assert get(two, make, "commit") == (200, "committed: 1 1")
    assert get(two, make, "refuse") == (409, "committed: 1 1" if both else "committed: 1 2")
    assert get(two, make, "raise")[0] == 500
    assert (two.mine.count(), two.other.count()) == (1, 1 if both else 3)
    # No byte was sent before the COMMIT of the database that refuses it. It is no two-phase commit: the other may have been.
    status, _ = get(two, make, "spoil")
    assert (status, two.mine.count()) == (500, 1)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_eager_connections_of_one_instance_are_those_of_its_databases(framework, two, monkeypatch):
    seen = []

    def note(kind: str) -> int:
        seen.append((len(two.mine.db._in_use), len(two.other.db._in_use)))
        return 200

    monkeypatch.setattr(two, "work", note)
    for databases, connected in ((two.mine.db, (1, 0)), ({"mine": two.mine.db, "other": two.other.db}, (1, 1))):

        def make(cls: Any, databases: Any = databases) -> list[Any]:
            around = two.mine.db if databases is not two.mine.db else {"mine": two.mine.db, "other": two.other.db}
            return [cls(around), cls(databases, connect="eager")]

        assert FRAMEWORKS[framework](two, make, "commit")[0] == 200
        assert seen.pop() == connected
