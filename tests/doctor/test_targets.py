"""What may be named, what it gives, and what is said when it cannot be had: clear, with the user's traceback, no passwords."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.doctor.helpers import Run, source
from tests.support.servers import require_server, server_kwargs

if TYPE_CHECKING:
    from tests.doctor.helpers import Project

SHOP = """
from peewee import DatabaseProxy
from peewee_frameworks.asgi import PeeweeMiddleware as ASGI
from peewee_frameworks.flask import Peewee
from peewee_frameworks.pool import PooledSqliteDatabase
from peewee_frameworks.starlette import Peewee as StarlettePeewee
from peewee_frameworks.wsgi import PeeweeMiddleware as WSGI
from flask import Flask
from starlette.applications import Starlette

open("shop.db", "ab").close()
open("archive.db", "ab").close()
wal = {"pragmas": {"journal_mode": "wal"}, "timeout": 5}
db = PooledSqliteDatabase("shop.db", **wal)
archive = PooledSqliteDatabase("archive.db", **wal)
both = {"main": db, "archive": archive}
proxy = DatabaseProxy()
proxy.initialize(db)
late = DatabaseProxy()
deferred = PooledSqliteDatabase(None)
url = "sqlite:///shop.db"
orm = Peewee(both)
asgi = ASGI(lambda scope, receive, send: None, db)
wsgi = WSGI(lambda environ, start: [], both)
by_lifespan = Starlette(lifespan=StarlettePeewee(db).lifespan())
by_middleware = Starlette(middleware=[StarlettePeewee(archive).middleware()])
bare = Flask("bare")
number = 42

class settings:
    database = db

def create_app():
    app = Flask("shop")
    orm.init_app(app)
    return app

def create_two():
    app = Flask("shop")
    Peewee(db).init_app(app)
    Peewee(archive).init_app(app)
    return app

def fails():
    raise RuntimeError("no such settings")
"""


@pytest.fixture
def shop(project: Project) -> Project:
    project.write(shop=SHOP)
    return project


@pytest.mark.parametrize(
    ("name", "aliases"),
    [
        ("db", ["default"]),
        ("both", ["main", "archive"]),
        ("proxy", ["default"]),
        ("url", ["default"]),
        ("settings.database", ["default"]),
        ("orm", ["main", "archive"]),
        ("asgi", ["default"]),
        ("wsgi", ["main", "archive"]),
        ("by_lifespan", ["default"]),
        ("by_middleware", ["default"]),
        ("create_app()", ["main", "archive"]),
        ("create_two()", ["default", "default (2)"]),
    ],
)
def test_what_may_be_named(name: str, aliases: list[str], shop: Project, capsys: Any, monkeypatch: Any) -> None:
    done = shop.run_here(capsys, monkeypatch, "check", f"shop:{name}", "--json")
    assert (done.code, done.err) == (0, "")
    assert list(done.json["databases"]) == aliases
    assert done.json["target"] == f"shop:{name}"


def test_a_url(shop: Project) -> None:
    (shop.directory / "shop.db").touch()
    done = shop.run("check", "sqlite:///shop.db", "--json")
    assert (done.code, done.json["target"]) == (0, "sqlite:///shop.db")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("shop", "'shop' is no target: it takes module:name, where name is a Peewee database"),
        ("shop:", "This is no target"),
        ("shop:db:x", "This is no target"),
        ("shop/app.py", "This is no target"),
        ("shop:orn", "shop:orn: the module shop has no 'orn'. What fits there: "),
        ("shop:settings.databas", "shop:settings.databas: the module shop has no 'databas'."),
        ("shop:create_app", "shop:create_app is a function. To call it write the parentheses: 'shop:create_app()'"),
        ("shop:number", "shop:number is a int; it takes module:name"),
        ("shop:bare", "shop:bare is a Flask application in which no Peewee is installed. Did you forget to call"),
        ("shop:late", "shop:late: "),
        ("shop:deferred", "shop:deferred: the database 'default' is deferred"),
        ("nowhere:app", "nowhere:app: there is no module 'nowhere' here."),
        ("shop.sub:app", "shop.sub:app: "),
        (
            "mysqll://root:opensesame@db/shop",
            "mysqll://db/shop: The database URL mysqll://db/shop has the unknown scheme",
        ),
        ("mysql://root:12/34@db/shop", "mysql://db/shop: The database URL mysql://… is malformed"),
        ("mysql://root:open/sesame@db/shop", "mysql://db/shop: The database URL mysql://… is malformed"),
        ("mysql:/root:opensesame@db/shop", "This is no target"),
        ("mysql://root:opensesame@db", "mysql://db: The database URL mysql://db does not work"),
    ],
)
def test_what_may_not(name: str, says: str, shop: Project, capsys: Any, monkeypatch: Any) -> None:
    for command in ("check", "doctor"):
        done = shop.run_here(capsys, monkeypatch, command, name)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(says), done.err
        assert "Traceback" not in done.err
        assert "sesame" not in done.err


def test_a_near_miss_is_suggested(shop: Project, capsys: Any, monkeypatch: Any) -> None:
    message = shop.run_here(capsys, monkeypatch, "check", "shop:orn").err
    assert "Did you mean 'orm'?" in message
    for name in ("db", "both", "proxy", "orm", "asgi", "wsgi", "by_lifespan"):
        assert f" {name}," in message
    for name in ("number", "bare", "late", "Peewee", "create_app"):
        assert f" {name}," not in message


def test_a_module_that_fails(project: Project) -> None:
    """Its own traceback, from its own first frame on; not ours, not importlib's."""
    project.write(
        broken="import settings\n",
        settings="def read():\n    return {}['DATABASE']\n\ndb = read()\n",
    )
    done = project.run("doctor", "broken:app")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == [
        "broken:app: the module failed when it was imported. This is what it said:",
        "Traceback (most recent call last):",
        f'  File "{project.directory}/broken.py", line 1, in <module>',
        "    import settings",
        f'  File "{project.directory}/settings.py", line 4, in <module>',
        "    db = read()",
        "         ^^^^^^",
        f'  File "{project.directory}/settings.py", line 2, in read',
        "    return {}['DATABASE']",
        "           ~~^^^^^^^^^^^^",
        "KeyError: 'DATABASE'",
    ]


def test_a_factory_that_fails(shop: Project) -> None:
    done = shop.run("check", "shop:fails()")
    assert done.code == 2
    assert done.err.startswith("shop:fails(): the module failed when it was called. This is what it said:\nTraceback")
    assert done.err.endswith("RuntimeError: no such settings\n")


def test_a_module_that_is_missing_in_the_module(project: Project) -> None:
    project.write(shop="import no_such_driver\n")
    done = project.run("check", "shop:app")
    assert done.code == 2
    assert "ModuleNotFoundError: No module named 'no_such_driver'" in done.err
    assert 'shop.py", line 1' in done.err


def test_a_module_that_exits(project: Project) -> None:
    project.write(shop="import sys\nsys.exit('set SETTINGS first')\n")
    done = project.run("check", "shop:app")
    assert done.code == 2
    assert "SystemExit: set SETTINGS first" in done.err


def leaks(done: Run) -> bool:
    return "sesame" in done.out + done.err


@pytest.mark.parametrize(
    "text",
    [
        "from peewee import MySQLDatabase\ndb = MySQLDatabase('shop', password='opensesame', thread_safe=1 / 0)\n",
        "password = 'opensesame'; raise ValueError('cannot connect to mysql://root:opensesame@db/shop')\n",
        "settings = {'DATABASE_PASSWORD': 'opensesame', 'other': 1 / 0}\n",
        "raise ValueError('invalid dsn: host=db password=opensesame dbname=shop')\n",
        "import os\nraise ValueError('bad url ' + os.environ['DATABASE_URL'])\n",
        "from peewee_frameworks.config import connect_url\ndb = connect_url('mysql://root:open/sesame@db/shop')\n",
        "from playhouse.db_url import connect\ndb = connect('mysql://root:opensesame@db')\n",
    ],
)
def test_a_traceback_shows_no_password(text: str, project: Project, capsys: Any, monkeypatch: Any) -> None:
    """Neither in the lines of source that it quotes nor in the message."""
    monkeypatch.setenv("DATABASE_URL", "mysql://root:open%2Fsesame@db/shop")
    project.write(shop=text)
    for command in ("check", "doctor"):
        done = project.run_here(capsys, monkeypatch, command, "shop:db")
        assert done.code in (1, 2)
        assert "shop.py" in done.out + done.err
        assert not leaks(done), done.out + done.err


@pytest.mark.filterwarnings("ignore:'passwd' is deprecated:DeprecationWarning")  # playhouse.db_url
@pytest.mark.parametrize("command", [["check"], ["doctor", "--json"]])
@pytest.mark.parametrize("kind", ["mysql", "postgres"])
@pytest.mark.parametrize("form", ["url", "pooled url", "keywords", "conninfo"])
def test_no_output_holds_a_password(
    kind: Any, form: str, command: list[str], project: Project, capsys: Any, monkeypatch: Any
) -> None:
    """Of a login that the server refuses: its message and ours, in every way a password can be given."""
    require_server(kind)
    login = server_kwargs(kind)
    user, place = "no_such_user", f"{login['host']}:{login['port']}/{login['database']}"
    scheme = {"mysql": "mysql", "postgres": "postgresql"}[kind]
    url = f"{scheme}{'+pool' if form == 'pooled url' else ''}://{user}:open%2F%40sesame@{place}"
    name, *options = command
    if "url" in form:
        done = project.run_here(capsys, monkeypatch, name, url, *options)
    else:
        given = {"user": user, "password": "open/@sesame"}
        if form == "conninfo" and kind == "postgres":
            dsn = f"host={login['host']} port={login['port']} user={user} password='open/@sesame' connect_timeout=bad"
            given = {"conninfo": dsn, "user": user}
        project.write(shop=source(kind, **given))
        done = project.run_here(capsys, monkeypatch, name, "shop:db", *options)
    assert done.code == 1, done.out + done.err
    assert not leaks(done), done.out + done.err


def test_what_argparse_repeats_holds_no_password(project: Project) -> None:
    done = project.run("check", "shop:db", "mysql://root:opensesame@db/shop")
    assert done.code == 2
    assert "unrecognized arguments" in done.err
    assert not leaks(done)
