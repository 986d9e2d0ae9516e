"""Asynchronous databases under uvicorn's own ways to have several processes, one after the other or at once."""

from __future__ import annotations

import contextlib
import re

import pytest

from tests.support.concurrency import eventually
from tests.support.webservers import uvicorn

APP = """
import os

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from peewee_frameworks.pool import connect
from peewee_frameworks.starlette import Peewee

db = connect(os.environ["DATABASE_URL"], max_connections=2)
orm = Peewee(db)


async def answer(_):
    (value,) = await db.run(lambda: db.execute_sql("SELECT 42").fetchone())
    return PlainTextResponse(f"version 1: {value} of {os.getpid()}")


app = Starlette(routes=[Route("/", answer)], lifespan=orm.lifespan(), middleware=[orm.middleware()])
"""


def answers(server, wanted, count=1):
    """Ask, on a connection each, until `count` processes have given the answer wanted; give their ids."""
    found = set()

    def asked():
        with contextlib.suppress(OSError), server.client() as client:  # refused between the old one and the new
            response = client.get("/")
            assert response.status == 200, server.output[-3000:]
            if response.text.startswith(wanted):
                found.add(response.text.rpartition(" ")[2])
        return len(found) >= count

    eventually(asked, 30, f"{wanted!r}: {found}\n{server.output[-3000:]}")
    return found


@pytest.fixture
def application(tmp_path):
    path = tmp_path / "served" / "reloaded.py"
    path.parent.mkdir()
    path.write_text(APP)
    return path


@pytest.mark.parametrize("driver", ["psycopg", "aiomysql"])
def test_uvicorn_reloads(application, backends, driver):
    """The new process has a pool of its own, in its loop; the old one's sessions are gone."""
    backend, directory = backends(driver), str(application.parent)
    options = ("--app-dir", directory, "--reload", "--reload-dir", directory)
    environment = {"DATABASE_URL": backend.place.async_url(backend.driver)}
    with uvicorn("reloaded:app", env=environment, options=options, ready="/") as server:
        (first,) = answers(server, "version 1: 42")
        application.write_text(re.sub("version 1", "version 2, as long as it may be", APP))
        (second,) = answers(server, "version 2, as long as it may be: 42")
        assert first != second
        eventually(lambda: len(backend.place.sessions()) <= 4, message="the old one's sessions are left")
    eventually(lambda: not backend.place.sessions(), message="sessions are left")


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_uvicorn_with_two_workers(application, backends, driver):
    """Each with a pool in its own loop."""
    backend = backends(driver)
    environment = {"DATABASE_URL": backend.place.async_url(backend.driver)}
    options = ("--app-dir", str(application.parent))
    with uvicorn("reloaded:app", env=environment, options=options, workers=2) as server:
        assert len(answers(server, "version 1: 42", count=2)) == 2
    eventually(lambda: not backend.place.sessions(), message="sessions are left")
