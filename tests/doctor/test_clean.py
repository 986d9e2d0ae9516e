"""A sound configuration gets no finding at all, whichever database and framework it is."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from tests.doctor.helpers import look, source
from tests.support.servers import KINDS, require_server, server_kwargs

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.doctor.helpers import Project
    from tests.support.databases import Place
    from tests.support.servers import Kind


def test_a_sound_pool_has_no_finding(place: Place, sound: Callable[..., Any]) -> None:
    assert look(sound(place), workers=4).findings == ()


APPS = {
    "flask": """
        from flask import Flask
        app = Flask("shop")

        @app.get("/")
        def index():
            return str(Note.select().count())
    """,
    "sanic": """
        from sanic import Sanic, text
        app = Sanic("shop")

        @app.get("/")
        async def index(request):
            return text(str(await orm.run(Note.select().count)))
    """,
    "fastapi": """
        from fastapi import FastAPI
        app = FastAPI()

        @app.get("/")
        def index():
            return Note.select().count()
    """,
    "starlette": """
        from starlette.applications import Starlette
        from starlette.responses import PlainTextResponse
        from starlette.routing import Route

        async def index(request):
            return PlainTextResponse(str(await Note.select().aexecute()))

        app = Starlette(routes=[Route("/", index)])
    """,
}
MODULE = """
from peewee import CharField
from peewee_frameworks.{framework} import Peewee
{database}
class Note(db.Model):
    text = CharField()

orm = Peewee(db)
{app}
orm.init_app(app)
"""


@pytest.mark.parametrize("framework", APPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_application_has_no_finding(kind: Kind, framework: str, project: Project) -> None:
    """As the user runs it: exit status 0 even if notes were to fail it."""
    require_server(kind)
    database = source(kind)
    if kind == "sqlite":
        database = source(kind, database="shop.db", pragmas={"journal_mode": "wal"})
        (project.directory / "shop.db").touch()
    app = textwrap.dedent(APPS[framework])
    project.write(shop=MODULE.format(framework=framework, database=database, app=app))
    done = project.run("doctor", "shop:app", "--workers", "4", "--fail-on", "note")
    assert done.code == 0, done.out + done.err
    assert done.out.endswith("\n\nNothing found.\n")
    assert done.out.startswith("shop:app: 4 workers (from --workers)\n  default: Pooled")
    assert done.err == ""


ASYNC = {
    "psycopg": """
        from peewee_frameworks.aio import AsyncPsycopgDatabase
        db = AsyncPsycopgDatabase(max_size=5, keepalives_idle=30, **{login})
    """,
    "asyncpg": """
        from playhouse.pwasyncio import AsyncPostgresqlDatabase
        db = AsyncPostgresqlDatabase(command_timeout=30, **{login})
    """,
    "aiomysql": """
        from playhouse.pwasyncio import AsyncMySQLDatabase
        db = AsyncMySQLDatabase(pool_recycle=300, **{login})
    """,
    "aiosqlite": """
        from playhouse.pwasyncio import AsyncSqliteDatabase
        db = AsyncSqliteDatabase("shop.db", pragmas={{"journal_mode": "wal"}})
    """,
}
SERVERS = {"psycopg": "postgres", "asyncpg": "postgres", "aiomysql": "mysql", "aiosqlite": "sqlite"}


@pytest.mark.parametrize("driver", ASYNC)
def test_a_sound_asynchronous_database_has_no_finding(driver: str, project: Project) -> None:
    kind: Any = SERVERS[driver]
    require_server(kind)
    (project.directory / "shop.db").touch()
    project.write(shop=ASYNC[driver].format(login={} if kind == "sqlite" else server_kwargs(kind)))
    done = project.run("doctor", "shop:db", "--fail-on", "note", "--json")
    assert (done.code, done.err) == (0, ""), done.out
    assert done.json["findings"] == []
    assert done.json["databases"]["default"]["driver"] == driver


def test_an_application_imports_nothing_of_the_doctor(project: Project) -> None:
    """Neither at import nor in init_app, in any framework."""
    lines = [
        "import sys",
        *(
            f"import peewee_frameworks.{name}"
            for name in ("flask", "sanic", "fastapi", "starlette", "asgi", "wsgi", "gevent")
        ),
        "from flask import Flask",
        "peewee_frameworks.flask.Peewee('sqlite:///shop.db').init_app(Flask('shop'))",
        "print([name for name in sys.modules if name.startswith(('peewee_frameworks.doctor', 'peewee_frameworks.cli'))])",
    ]
    done = project.run(program=("-c", "\n".join(lines)))
    assert (done.out.strip(), done.err) == ("[]", "")
