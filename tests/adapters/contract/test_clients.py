"""Without a server: test clients of all frameworks, Flask's command line, ASGI in-process."""

from __future__ import annotations

import asyncio
import importlib
import logging
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.adapters.contract.apps.work import Work, World
from tests.adapters.contract.served import rid
from tests.support.concurrency import eventually
from tests.support.databases import ASYNC_DRIVERS
from tests.support.process import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUTES = {"/ok": 200, "/handled": 418, "/nowhere": 404, "/missing": 404, "/atomic/commit": 200, "/atomic/status": 409}


class Judge:
    """Makes applications in this process and looks at their database after each request."""

    def __init__(self) -> None:
        self.works: list[Work] = []

    def make(self, module: str) -> Any:
        """Make an application and note its database."""
        before = set(World.made)
        app = importlib.import_module(f"tests.adapters.contract.apps.{module}").make_app()
        self.works += [world.work for world in set(World.made) - before]
        return app

    def check(self) -> None:
        for work in self.works:
            # What was rolled back comes back on a thread of its own.
            eventually(lambda: not work.watch.in_use, 5.0, f"{work.watch.users}")  # noqa: B023
            assert not work.watch.violations

    def close(self) -> None:
        for work in self.works:
            if not work.is_async:  # a pool that belongs to a loop closes with it
                work.db.close_all()


@pytest.fixture(autouse=True)
def no_records_of_psycopgs_pool(caplog: pytest.LogCaptureFixture) -> None:
    """A warning that is kept keeps the error, that its traceback, and that the half-open connection of a cancelled worker."""
    caplog.set_level(logging.ERROR, "psycopg.pool")


KINDS = ["sqlite", "mysql", "postgres"]
with_async_drivers = pytest.mark.parametrize("judge", [*KINDS, *ASYNC_DRIVERS], indirect=True)


@pytest.fixture(params=KINDS)
def judge(
    request: pytest.FixtureRequest, make_place: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Judge]:
    driver = request.param if request.param in ASYNC_DRIVERS else None
    place = make_place(ASYNC_DRIVERS[driver][1] if driver else request.param)
    work = Work(place.pool_url())
    work.db.create_tables([work.Item, work.Part])
    work.db.close_all()
    options: dict[str, Any] = {"max_connections": 5, "timeout": 10}
    url = place.async_url(driver, **options) if driver else place.pool_url(**options)
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.delenv("CONTRACT_DIR", raising=False)
    judge = Judge()
    yield judge
    judge.check()
    judge.close()
    eventually(lambda: not place.sessions(), message="sessions left")  # the server notices a moment later


def talk(judge: Judge, get: Callable[[str], Any]) -> None:
    for route, status in ROUTES.items():
        one = rid()
        response = get(f"{route}/{one}")
        assert response.status_code == status, response.text
        judge.check()


def test_flasks_test_client(judge: Judge):
    app = judge.make("flask_app")
    talk(judge, lambda path: app.test_client().get(path))
    with app.test_client() as client:
        talk(judge, client.get)
    one = rid()
    with app.app_context():
        assert app.test_client().get(f"/async/{one}").text == one


@with_async_drivers
@pytest.mark.parametrize("module", ["starlette_app", "fastapi_app"])
def test_starlettes_test_client(judge: Judge, module: str):
    """Without `with`: no lifespan, and each request on a new event loop. With it: one loop."""
    from starlette.testclient import TestClient

    app = judge.make(module)
    client = TestClient(app, raise_server_exceptions=False)
    talk(judge, client.get)
    talk(judge, client.get)
    with TestClient(app, raise_server_exceptions=False) as client:
        talk(judge, client.get)
        one = rid()
        with client.websocket_connect(f"/ws/plain/{one}") as socket:
            socket.send_text(one)
            assert socket.receive_text().startswith(one)
    with TestClient(app, raise_server_exceptions=False) as client:
        talk(judge, client.get)


@with_async_drivers
@pytest.mark.parametrize("module", ["starlette_app", "fastapi_app"])
def test_asgi_in_process(judge: Judge, module: str):
    """httpx's transport: the caller's loop, no lifespan, requests at the same time."""
    import httpx

    app = judge.make(module)

    async def all_at_once() -> list[Any]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(*(client.get(f"/ok/{one}") for one in ids))

    for _ in range(2):
        ids = [rid() for _ in range(30)]
        responses = asyncio.run(all_at_once())
        assert [response.text for response in responses] == ids
        judge.check()


@with_async_drivers
@pytest.mark.filterwarnings("ignore:websockets.legacy is deprecated:DeprecationWarning")  # sanic_testing imports it
@pytest.mark.filterwarnings("ignore:websockets.client.connect is deprecated:DeprecationWarning")
def test_sanics_asgi_client(judge: Judge):
    """The application runs in the caller's task; each request on a new loop."""
    from sanic import Sanic

    Sanic.test_mode = True
    app = judge.make("sanic_app")
    try:
        for route, status in ROUTES.items():
            one = rid()
            _, response = asyncio.run(app.asgi_client.get(f"{route}/{one}"))
            assert response.status == status
            judge.check()
    finally:
        Sanic.unregister_app(app)


def test_flasks_command_line(judge: Judge):
    one = rid()
    command = [sys.executable, "-m", "flask", "--app", "tests.adapters.contract.apps.flask_app:make_app", "value", one]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, one), done.stderr
    assert "Warning" not in done.stderr


def test_the_commands_runner(judge: Judge):
    app = judge.make("flask_app")
    one = rid()
    result = app.test_cli_runner().invoke(args=["value", one])
    assert result.output.strip() == one
    judge.check()
