"""The endpoints in each framework, on its real server: who may see what, and what the database's silence does to them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.health.helpers import PATIENCE, QUERYING, TOKEN
from tests.support.client import Client, Request, Response
from tests.support.concurrency import eventually
from tests.support.databases import Place, scratch
from tests.support.process import ROOT, ServerProcess
from tests.support.proxy import Proxy
from tests.support.servers import require_server
from tests.support.webservers import gunicorn, sanic, uvicorn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FRAMEWORKS = ("flask", "sanic", "starlette", "fastapi")
WAITING = 32
DETAILS = ("/db/", "/db/status", "/db/events", "/db/metrics", "/db/ready?verbose")


def serve(framework: str, url: str, *, options: dict[str, Any] | None = None, **more: Any) -> ServerProcess:
    server = {"flask": gunicorn, "sanic": sanic}.get(framework, uvicorn)
    if framework == "flask":
        more = {"ready": "/db/live", "threads": WAITING + 8, **more}
    env = {"SERVED_URL": url, "SERVED_OPTIONS": json.dumps(options or {})}
    return server(f"tests.health.served:{framework}_app", factory=True, env=env, **more)


@dataclass
class Served:
    """An application in one of the frameworks, on MariaDB through a proxy, with a pool of two."""

    framework: str
    process: ServerProcess
    place: Place
    proxy: Proxy

    def get(self, path: str, token: str = "") -> Response:
        with Client(self.process.url, PATIENCE * 2) as client:
            return client.get(path, **({"X-Token": token} if token else {}))

    def status(self) -> dict[str, Any]:
        return self.get("/db/status", TOKEN).json()

    def pool(self) -> dict[str, Any]:
        return self.status()["pools"]["default"]

    @contextmanager
    def held(self, *names: str) -> Iterator[None]:
        """Keep a connection in use for each name meanwhile."""
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda n=name: answers.append(self.get(f"/hold/{n}").status)) for name in names
        ]
        for thread in threads:
            thread.start()
        try:
            eventually(lambda: self.pool()["used"] == len(names), PATIENCE)
            yield
        finally:
            for name in names:
                self.get(f"/let_go/{name}")
            for thread in threads:
                thread.join(PATIENCE)
        assert answers == [200] * len(names)

    @contextmanager
    def waiting(self, count: int) -> Iterator[list[int]]:
        """Have so many requests wait for a connection; give their statuses, complete at the end."""
        answers: list[int] = []
        threads = [threading.Thread(target=lambda: answers.append(self.get("/query").status)) for _ in range(count)]
        for thread in threads:
            thread.start()
        eventually(lambda: self.queue() == count, PATIENCE, f"{count} waiting")
        yield answers
        for thread in threads:
            thread.join(PATIENCE)

    def queue(self) -> int:
        """How many wait: for a connection, or for their turn to ask for one."""
        found = self.status()
        return found["pools"]["default"]["waiting"] + (found["queued"] or 0)


@pytest.fixture(scope="module", params=FRAMEWORKS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Each request of the application begins with a connection and a transaction, but for the health endpoints'."""
    require_server("mysql")
    options = {"connect": "eager", "transaction": True}
    with (
        scratch("mysql", tmp_path_factory.mktemp("served")) as place,
        Proxy(place.address) as proxy,
        serve(
            request.param,
            place.via(*proxy.address).pool_url(max_connections=2, timeout=30),
            options={**options, "exclude": ["/let_go/*", "let_go", "letting_go"]},
        ) as process,
    ):
        yield Served(request.param, process, place, proxy)
        process.stop()
        proxy.cut()


def test_everybody_may_ask_whether_it_lives_and_whether_it_is_ready(served):
    for mount in ("/db", "/open"):
        assert served.get(f"{mount}/live").json() == {"status": "ok"}
        assert served.get(f"{mount}/ready").json() == {"status": "ok"}


def test_without_a_guard_there_are_no_details(served):
    for path in DETAILS:
        response = served.get(path.replace("/db", "/open"), TOKEN)
        assert response.status == 404, path
        assert "without a guard" in response.json()["detail"]


def test_whom_the_guard_does_not_let_in_sees_none(served):
    for path in DETAILS:
        response = served.get(path, "wrong")
        assert response.status == 403, path
        assert set(response.json()) == {"detail"}


def test_whom_it_lets_in_sees_the_document_the_page_and_the_metrics(served):
    assert served.status()["worker"] in served.process.workers() or served.status()["worker"] == served.process.pid
    page = served.get("/db/", TOKEN)
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    metrics = served.get("/db/metrics", TOKEN)
    assert metrics.status == 200
    assert b"db_client_connection" in metrics.body
    if served.framework != "fastapi":  # whose dependencies cannot be asked now and then
        assert served.get("/db/ready?verbose", TOKEN).json()["databases"]["default"]["status"] == "ok"
    for path in ("/db/live", "/db/ready", "/db/status", "/db/metrics", "/db/"):
        assert served.get(path, TOKEN).headers["cache-control"] == "no-store", path


def test_the_command_line_shows_the_pool(served):
    command = [sys.executable, "-m", "peewee_frameworks", "pool", f"{served.process.url}/db", "--once"]
    done = subprocess.run(
        [*command, "--header", f"X-Token: {TOKEN}"],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 4,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    head, row = done.stdout.splitlines()
    assert head.split()[:4] == ["worker", "pool", "used", "of"]
    assert row.split()[1:4] == ["default", "0", "2"]


def test_while_requests_wait_it_is_degraded_then_unavailable_in_the_silence_then_degraded_again(served):
    """No health request takes a connection, waits behind those who do, or begins a transaction."""
    with served.held("one", "two"), served.waiting(WAITING) as answers:
        for path in ("/db/live", "/db/", "/db/metrics", "/db/status"):
            assert served.get(path, TOKEN).status == 200
        assert served.get("/db/ready").json() == {"status": "degraded"}
        turns, returns = [], []
        for _ in range(3):  # the best of three: other tests run beside this one
            turns.append(until(served, 503, silence))
            returns.append(until(served, 200, speech))
        assert (min(turns) < 1.0, min(returns) < 1.0) == (True, True), (turns, returns)
        assert served.queue() == WAITING
        # Two of the pool, which all wait for, and the probe's; one that was cut may not be gone yet.
        eventually(lambda: len(served.place.sessions()) <= 3)
        served.get("/let_go/one")
        served.get("/let_go/two")
    assert answers == [200] * WAITING


def silence(proxy: Proxy) -> None:
    proxy.hang()
    proxy.deafen()


def speech(proxy: Proxy) -> None:
    proxy.restore()


def until(served: Served, status: int, change: Any) -> float:
    """Return the seconds from a change until readiness answers so."""
    change(served.proxy)
    begin = time.monotonic()
    while served.get("/db/ready").status != status:
        assert time.monotonic() - begin < PATIENCE
    return time.monotonic() - begin


def read_events(client: Client) -> Iterator[dict[str, Any]]:
    text = b""
    while True:
        while b"\n\n" not in text:
            piece = client.read_body(at_least=1)
            if not piece:
                return
            text += piece
        event, _, text = text.partition(b"\n\n")
        yield json.loads(event.partition(b"data: ")[2])


@contextmanager
def listening(process: ServerProcess, **headers: str) -> Iterator[tuple[Response, Iterator[dict[str, Any]]]]:
    with process.client(PATIENCE * 2) as client:
        client.send(Request("/db/events", headers={"X-Token": TOKEN, **headers}))
        yield client.read_head(), read_events(client)


def streams(process: ServerProcess) -> bool:
    with listening(process) as (head, _):
        return head.status == 200


def test_they_tell_each_change_and_hold_no_connection(served):
    with listening(served.process) as (head, events):
        assert (head.status, head.headers["content-type"]) == (200, "text/event-stream")
        eventually(lambda: served.pool()["used"] == 0)
        assert next(event for event in events if event["pools"]["default"]["used"] == 0)["ready"]["status"] == "ok"
        with served.held("watched"):
            event = next(event for event in events if event["pools"]["default"]["used"] == 1)
            assert event["holders"][0]["label"].endswith("/hold/watched")
        assert next(event for event in events if event["pools"]["default"]["used"] == 0)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_guard_that_queries_leaves_the_stream_no_connection(framework, tmp_path):
    url = f"sqlite+pool:///{tmp_path / 'shop.db'}"
    with (
        serve(framework, url, options={"release": "request_end"}) as process,
        listening(process, **{"X-Token": QUERYING}) as (head, events),
    ):
        assert head.status == 200
        event = next(events)
        assert event["pools"]["default"]["checkouts"] >= 1
        assert next(events)["pools"]["default"]["used"] == 0


def test_who_connects_again_gets_the_points_since(served):
    with listening(served.process) as (_, events):
        first = next(events)
        second = next(events)
        assert second["latest"] > first["latest"]
        assert len(second["points"]["default"]) <= 2
    known = f"{second['worker']}:{second['latest']}"
    with listening(served.process, **{"Last-Event-ID": known}) as (_, events):
        assert all(point[0] > second["latest"] for point in next(events)["points"].get("default", ()))


def test_a_client_that_leaves_is_forgotten(served):
    """Else the unit of work stays, and the application's stop waits for it."""
    with listening(served.process) as (_, events):
        next(events)
    if served.framework == "flask":  # where each keeps a thread, so there are four at a time
        with contextlib.ExitStack() as stack:
            heads = [stack.enter_context(listening(served.process))[0] for _ in range(6)]
            assert [head.status for head in heads].count(204) >= 2
        eventually(lambda: streams(served.process), PATIENCE, "a place that is free again")
    served.process.stop()
    served.process.start()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_they_end_when_the_server_stops(framework, tmp_path):
    with (
        serve(framework, f"sqlite+pool:///{tmp_path / 'shop.db'}", end=14.0) as process,
        listening(process) as (_, events),
    ):
        next(events)
        begin = time.monotonic()
        process.stop()
        # The servers' own patience, after which they cut what is open: 10 seconds of Sanic's manager, 30 of gunicorn.
        assert time.monotonic() - begin < 9.0
        assert len(list(events)) < 5


@pytest.mark.parametrize(("threads", "most"), [(4, 2), (3, 1)])
def test_watchers_leave_a_worker_half_of_its_threads(tmp_path, threads, most):
    with (
        serve("flask", f"sqlite+pool:///{tmp_path / 'shop.db'}", threads=threads) as process,
        contextlib.ExitStack() as stack,
    ):
        heads = [stack.enter_context(listening(process))[0] for _ in range(threads)]
        assert sorted(head.status for head in heads) == [200] * most + [204] * (threads - most)
        with process.client() as client:
            assert client.get("/db/live").status == 200


@pytest.mark.parametrize("worker", [{"worker": "sync"}, {"worker": "gthread", "threads": 1}])
def test_a_worker_with_one_thread_does_not_stream(tmp_path, worker):
    with serve("flask", f"sqlite+pool:///{tmp_path / 'shop.db'}", **worker) as process:
        with listening(process) as (head, _):
            assert head.status == 204
        with process.client() as client:
            assert client.get("/db/status?since=0", **{"X-Token": TOKEN}).json()["points"]["default"]


def test_under_gevent_they_stream_beside_other_requests(tmp_path):
    with (
        serve("flask", f"sqlite+pool:///{tmp_path / 'shop.db'}", worker="gevent") as process,
        listening(process) as (head, events),
    ):
        assert head.status == 200
        next(events)
        with process.client() as client:
            assert client.get("/db/ready").json() == {"status": "ok"}
        next(events)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_nothing_is_mounted_unless_it_is_asked_for(framework: str, tmp_path: Path) -> None:
    """Importing the adapters, or installing, imports nothing of it."""
    code = f"""
import sys
from peewee_frameworks.{framework} import Peewee
from peewee_frameworks.pool import PooledSqliteDatabase
Peewee(PooledSqliteDatabase({str(tmp_path / "shop.db")!r}))
assert not [name for name in sys.modules if name.startswith("peewee_frameworks.health")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE * 4, cwd=ROOT)
