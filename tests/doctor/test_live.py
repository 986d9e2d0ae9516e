"""``pool``: the statistics of a real pool, served by a real HTTP server, in the terminal."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from peewee_frameworks import connection_scope
from peewee_frameworks.doctor import live
from peewee_frameworks.pool import PooledSqliteDatabase, PoolStats
from tests.doctor.helpers import DEADLINE, ROOT
from tests.support.concurrency import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.doctor.helpers import Project


class Application:
    """Answers GET /db/status as the health endpoints do; a test changes `worker`, `stats`, `answer`."""

    def __init__(self, database: Any) -> None:
        self.database = database
        self.workers = [4711]
        self.answer: tuple[int, bytes] | None = None
        self.asked: list[dict[str, str]] = []
        self.hang = threading.Event()
        self.hang.set()
        application = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                application.asked.append({**self.headers, "path": self.path})
                application.hang.wait(DEADLINE)
                status, body = application.answer or application.status()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client did not wait
                    self.send_response(status)
                    if 300 <= status < 400:
                        self.send_header("Location", "/elsewhere/status")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/db"

    def status(self) -> tuple[int, bytes]:
        if len([each for each in self.asked if each["path"].startswith("/db/status")]) != len(self.asked):
            return 404, b"not here"
        worker = self.workers[(len(self.asked) - 1) % len(self.workers)]
        stats = dataclasses.asdict(self.database.pool.stats())
        return 200, json.dumps({"worker": worker, "pools": {"default": stats}}).encode()


@pytest.fixture
def application(tmp_path: Path) -> Iterator[Application]:
    database = PooledSqliteDatabase(str(tmp_path / "shop.db"), max_connections=5, timeout=5)
    made = Application(database)
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.hang.set()
    made.server.shutdown()
    made.server.server_close()
    thread.join(5)
    database.pool.close()


def columns(text: str) -> list[dict[str, str]]:
    head, *rows = text.strip().splitlines()
    names = head.replace(" ms", "").split()
    return [dict(zip(names, row.split(), strict=True)) for row in rows]


@pytest.mark.parametrize("suffix", ["", "/", "/status", "/status/", "?full=1"])
def test_the_numbers_are_those_of_the_pool(suffix: str, application: Application, project: Project) -> None:
    with connection_scope(application.database), connection_scope(application.database):
        application.database.execute_sql("SELECT 1")
        done = project.run("pool", application.url + suffix, "--once")
    assert (done.code, done.err) == (0, "")
    (row,) = columns(done.out)
    stats = application.database.pool.stats()
    assert row == {
        "worker": "4711",
        "pool": "default",
        "used": "1",
        "of": "5",
        "idle": "0",
        "opening": "0",
        "waiting": "0",
        "timeouts": "0",
        "leaks": "0",
        "checkouts/s": "-",
        "wait": f"{stats.wait_time.sum / stats.wait_time.count * 1000:.1f}",
        "use": "-",
    }


def test_json_is_the_document(application: Application, project: Project) -> None:
    done = project.run("pool", application.url, "--once", "--json")
    assert done.json["worker"] == 4711
    assert set(done.json["pools"]["default"]) == {field.name for field in dataclasses.fields(PoolStats)}


def test_it_goes_on_and_shows_what_has_changed(application: Application, project: Project) -> None:
    """A row for each worker that answered; the rate and the means are those since its answer before. Ctrl-C ends it."""
    application.workers = [1, 2]
    with connection_scope(application.database):
        application.database.execute_sql("SELECT 1")
    command = [sys.executable, "-m", "peewee_frameworks", "pool", application.url, "--interval", "0.01"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, cwd=project.directory, env=environment, text=True
    ) as process:
        tables = read_tables(process)
        first, second = next(tables), next(tables)
        assert [row["worker"] for row in first] == ["1"]
        assert [row["worker"] for row in second] == ["1", "2"]
        assert (first[0]["checkouts/s"], first[0]["use"] != "-") == ("-", True)
        while next(tables)[0]["checkouts/s"] == "-":
            pass
        for _ in range(3):
            with connection_scope(application.database):
                application.database.execute_sql("SELECT 1")
        while not any(float(row["checkouts/s"].replace("-", "0")) > 0 for row in next(tables)):
            pass
        application.answer = (503, b"restarting")
        before = len(application.asked)
        eventually(lambda: len(application.asked) >= before + 3, DEADLINE, "it goes on asking")
        application.answer = None
        assert next(tables)
        process.send_signal(signal.SIGINT)
        for _ in tables:
            pass
        assert process.wait(DEADLINE) == 130


def read_tables(process: Any) -> Iterator[list[dict[str, str]]]:
    lines: list[str] = []
    for line in process.stdout:
        if line.strip():
            lines.append(line)
        elif lines:
            yield columns("".join(lines))
            lines = []


def test_a_header_for_the_guard(application: Application, project: Project) -> None:
    done = project.run("pool", application.url, "--once", "--header", "Authorization: Bearer opensesame")
    assert done.code == 0
    assert application.asked[-1]["Authorization"] == "Bearer opensesame"
    login = application.url.replace("//", "//admin:open%2Fsesame@")
    assert project.run("pool", login, "--once").code == 0
    assert application.asked[-1]["Authorization"] == "Basic " + base64.b64encode(b"admin:open/sesame").decode()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((401, b""), "answered 401 Unauthorized. Pass what its guard asks for, as --header 'Authorization: Bearer …'."),
        ((403, b""), "answered 403 Forbidden. Pass what its guard asks for"),
        (
            (404, b""),
            "answered 404 Not Found. Nothing is mounted there. The URL is that of the mounted health endpoints",
        ),
        ((500, b"boom"), "answered 500 Internal Server Error."),
        ((302, b""), "answered 302 Found. The headers are not sent anywhere else: give the URL that it redirects to."),
        ((200, b"<html>"), "answered with something that is not JSON."),
        ((200, b"[]"), "answered with JSON that is not a status document (it has no worker and pools)."),
        ((200, b'{"status": "ok"}'), "answered with JSON that is not a status document"),
        ((200, b'{"worker": 1, "pools": {"default": {}}}'), "answered with JSON that is not a status document"),
    ],
)
def test_each_other_answer_is_told(
    answer: tuple[int, bytes], says: str, application: Application, project: Project
) -> None:
    application.answer = answer
    login = application.url.replace("//", "//admin:opensesame@")
    done = project.run("pool", f"{login}?token=hushhush", "--once")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"{application.url}/status {says}")
    assert "opensesame" not in done.err
    assert "hushhush" not in done.err
    assert "Traceback" not in done.err
    assert [each["path"] for each in application.asked] == ["/db/status?token=hushhush"]


def test_nobody_listens(free_port: int, project: Project) -> None:
    done = project.run("pool", f"http://admin:opensesame@127.0.0.1:{free_port}/db", "--once")
    assert done.code == 1
    assert done.err == (
        f"http://127.0.0.1:{free_port}/db/status cannot be reached: [Errno 111] Connection refused. Is the application running "
        "there?\n"
    )


def test_it_does_not_wait_for_ever(application: Application, project: Project) -> None:
    application.hang.clear()
    done = project.run("pool", application.url, "--once", "--timeout", "0.2")
    assert done.code == 1
    assert "cannot be reached: timed out" in done.err


@pytest.mark.parametrize(
    "url", ["shop:app", "mysql://root:opensesame@db/shop", "db", "http://", "http://host:opensesame/db"]
)
def test_what_is_no_http_url_is_refused(url: str, project: Project) -> None:
    """An application that this command would import is another process than the one that runs: it says so."""
    done = project.run("pool", url, "--once")
    assert done.code == 2
    assert "The URL is that of the mounted health endpoints: http://127.0.0.1:8000/db" in done.err
    assert "opensesame" not in done.err


def test_a_target_is_told_why_not(project: Project) -> None:
    done = project.run("pool", "shop:app")
    assert (
        "shop:app would be imported into this process, whose pools are not those of the running application" in done.err
    )


@pytest.mark.parametrize("header", ["opensesame", ": opensesame", "A: opensesame\nB: c"])
def test_a_malformed_header_is_not_repeated(header: str, project: Project) -> None:
    done = project.run("pool", "http://127.0.0.1/db", "--header", header)
    assert done.code == 2
    assert "write it as 'Name: value'" in done.err
    assert "opensesame" not in done.err


def test_a_document_is_parsed_in_one_place() -> None:
    document = {"worker": 1, "pools": {"default": dataclasses.asdict(PooledSqliteDatabase(":memory:").pool.stats())}}
    status = live.parse(json.dumps(document).encode(), "here")
    assert status.worker == 1
    assert status.pools["default"].size == 1
