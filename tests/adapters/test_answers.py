"""What `errors=True` answers: what the client is not told is in the log, and what is no fault of the service is not."""

from __future__ import annotations

import logging

import httpx
import peewee
import pytest
from fastapi import FastAPI
from flask import Flask
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from peewee_frameworks import DatabaseUnavailable, asgi, fastapi, flask, starlette, wsgi


def ask_flask(db, work):
    app = Flask("shop")
    flask.Peewee(db, errors=True, check="off").init_app(app)
    app.get("/")(work)
    return app.test_client().get("/").status_code


def ask_fastapi(db, work):
    app = FastAPI()
    fastapi.Peewee(db, errors=True, check="off").init_app(app)
    app.get("/")(work)
    return TestClient(app).get("/").status_code


def ask_starlette(db, work):
    app = Starlette(routes=[Route("/", lambda request: work())])
    starlette.Peewee(db, errors=True, check="off").init_app(app)
    return TestClient(app).get("/").status_code


def ask_asgi(db, work):
    async def app(scope, receive, send):
        work()

    return TestClient(asgi.PeeweeMiddleware(app, db, errors=True, check="off")).get("/").status_code


def ask_wsgi(db, work):
    app = wsgi.PeeweeMiddleware(lambda environ, start: work(), db, errors=True, check="off")
    with httpx.Client(transport=httpx.WSGITransport(app=app), base_url="http://shop") as client:
        return client.get("/").status_code


@pytest.mark.parametrize("ask", [ask_flask, ask_fastapi, ask_starlette, ask_asgi, ask_wsgi])
def test_the_reason_of_a_503_is_one_line_in_the_log(ask, tmp_path, caplog):
    db = peewee.SqliteDatabase(tmp_path / "nowhere" / "file.db")

    def work():
        db.execute_sql("SELECT 1")

    with caplog.at_level(logging.INFO, "peewee_frameworks"):
        assert ask(db, work) == 503
    (record,) = [record for record in caplog.records if record.name == "peewee_frameworks.app"]
    assert record.message.startswith("request GET /: DatabaseUnavailable: ")
    assert "unable to open database file" in record.message
    assert (record.levelname, record.request, record.status, record.exc_info) == ("WARNING", "request GET /", 503, None)


@pytest.mark.parametrize("ask", [ask_flask, ask_fastapi, ask_starlette, ask_asgi, ask_wsgi])
def test_no_password_gets_into_the_log(ask, tmp_path, caplog):
    """Whoever wrote the message."""
    db = peewee.SqliteDatabase(tmp_path / "file.db")

    def work():
        raise DatabaseUnavailable("postgresql://shop:wh1sper@db.internal/shop is away")

    with caplog.at_level(logging.INFO, "peewee_frameworks"):
        assert ask(db, work) == 503
    assert "db.internal/shop is away" in caplog.text
    assert "wh1sper" not in caplog.text


@pytest.mark.parametrize("ask", [ask_flask, ask_fastapi, ask_starlette, ask_asgi, ask_wsgi])
def test_a_row_that_is_not_there_is_not_logged(ask, tmp_path, caplog):
    """The error has the statement and its values."""
    db = peewee.SqliteDatabase(tmp_path / "file.db")

    class Item(db.Model):
        pass

    def work():
        db.create_tables([Item])
        Item.get_by_id(5)

    with caplog.at_level(logging.INFO, "peewee_frameworks"):
        assert ask(db, work) == 404
    assert not [record for record in caplog.records if record.name == "peewee_frameworks.app"]
