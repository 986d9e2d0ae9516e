"""One application on one real server and one database, and what a test may ask of it."""

from __future__ import annotations

import itertools
import json
import socket
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.adapters.contract.apps.work import Work
from tests.support import webservers
from tests.support.client import Client, Request
from tests.support.concurrency import eventually
from tests.support.load import Result, hammer, statuses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.client import Response
    from tests.support.databases import Place
    from tests.support.process import ServerProcess

APPS = "tests.adapters.contract.apps"

SERVERS: dict[str, Callable[..., ServerProcess]] = {
    "flask-werkzeug": lambda **process: webservers.werkzeug(f"{APPS}.flask_app:make_app", factory=True, **process),
    "flask-gthread": lambda **process: webservers.gunicorn(
        f"{APPS}.flask_app:make_app", factory=True, threads=40, **process
    ),
    # Sync workers are killed when they do not answer in time: a deadline for each request.
    "flask-sync": lambda **process: webservers.gunicorn(
        f"{APPS}.flask_app:make_app", factory=True, worker="sync", options=("--timeout", "2"), **process
    ),
    "sanic-workers": lambda **process: webservers.sanic(
        f"{APPS}.sanic_app:make_app", factory=True, workers=2, **process
    ),
    "sanic-single": lambda **process: webservers.sanic(
        f"{APPS}.sanic_app:make_app", factory=True, single_process=True, **process
    ),
    "fastapi-uvloop": lambda **process: webservers.uvicorn(
        f"{APPS}.fastapi_app:make_app", factory=True, loop="uvloop", **process
    ),
    "fastapi-asyncio": lambda **process: webservers.uvicorn(
        f"{APPS}.fastapi_app:make_app", factory=True, loop="asyncio", http="h11", **process
    ),
    "fastapi-workers": lambda **process: webservers.uvicorn(
        f"{APPS}.fastapi_app:make_app", factory=True, workers=2, **process
    ),
    "starlette-uvloop": lambda **process: webservers.uvicorn(
        f"{APPS}.starlette_app:make_app", factory=True, loop="uvloop", **process
    ),
    "starlette-asyncio": lambda **process: webservers.uvicorn(
        f"{APPS}.starlette_app:make_app", factory=True, loop="asyncio", **process
    ),
}

POOL = 5
_numbers = itertools.count(1)


def rid() -> str:
    """Make the id of a request; no two are equal."""
    return f"r{next(_numbers)}"


@dataclass
class Served:
    """A server under test; `settle` is the contract that holds after every case."""

    name: str
    place: Place
    process: ServerProcess
    directory: Path
    work: Work = field(repr=False)  # the test's own connection to the same tables
    is_async: bool = False  # the driver of the application's database
    broken: bool = False  # something was not given back: the cases after it need not wait for it again

    @property
    def framework(self) -> str:
        return self.name.partition("-")[0]

    @property
    def is_sanic(self) -> bool:
        return self.framework == "sanic"

    @property
    def is_flask(self) -> bool:
        return self.framework == "flask"

    # Requests

    def client(self, deadline: float = 15.0) -> Client:
        return self.process.client(deadline)

    def get(self, path: str, **headers: str) -> Response:
        """GET one path on a connection of its own."""
        with self.client() as client:
            return client.get(path, **headers)

    def hammer(self, paths: list[str], concurrency: int = 20) -> list[Result]:
        return hammer(self.process.url, paths, concurrency=concurrency)

    def expect_right(self, route: str, count: int, concurrency: int = 20) -> None:
        """Send many requests at once: each gets 200 and its own answer."""
        rids = [rid() for _ in range(count)]
        results = self.hammer([f"{route}/{one}" for one in rids], concurrency)
        assert statuses(results) == {200: count}, self.process.output[-3000:]
        assert [result.text for result in results] == rids

    def start(self, path: str, **headers: str) -> Client:
        """Send a request and read nothing."""
        client = self.client()
        client.send(Request(path, headers=headers))
        return client

    def counts(self, owners: list[str]) -> list[int]:
        """Count the rows of each request, as anybody else sees them."""
        try:
            return self.work.counts(owners)
        finally:
            self.work.db.close_all()

    def count(self, owner: str) -> int:
        """Count the rows of one request."""
        return self.counts([owner])[0]

    # The side channel

    def ask(self, question: str, name: str = "") -> list[Any]:
        """Ask every process of the application."""
        answers = []
        for path in sorted(self.directory.glob("*.sock")):
            with closing(socket.socket(socket.AF_UNIX)) as channel:
                channel.settimeout(10)
                try:
                    channel.connect(str(path))
                except (ConnectionRefusedError, FileNotFoundError):
                    path.unlink(missing_ok=True)  # that process has ended
                    continue
                try:
                    channel.sendall(json.dumps({"ask": question, "name": name}).encode() + b"\n")
                    answers.append(json.loads(channel.makefile().read()))
                except (ConnectionResetError, BrokenPipeError, json.JSONDecodeError):
                    continue  # it ended just now
        return answers

    def reached(self, gate: str) -> None:
        """Wait until a handler stands at the gate."""
        eventually(lambda: any(self.ask("reached", gate)), message=f"nobody came to the gate {gate}")

    def open(self, gate: str) -> None:
        self.ask("open", gate)

    def notes(self, rid: str, count: int = 1) -> list[Any]:
        """Wait for what work that outlived its request noted."""
        return eventually(
            lambda: (
                notes if len(notes := [note for notes in self.ask("notes", rid) for note in notes]) >= count else None
            ),
            message=f"no notes of {rid}",
        )

    @property
    def in_use(self) -> int:
        return sum(stats["in_use"] for stats in self.ask("stats"))

    def holds_nothing(self) -> None:
        """No connection is in use now, or in a moment; whatever is open."""
        eventually(lambda: self.in_use == 0, 5.0, f"{self.ask('stats')}")

    def reap(self) -> None:
        """Connect until what dead threads have left is taken back."""

        def reaped() -> bool:
            self.expect_right("/ok", 4)
            return self.in_use == 0

        eventually(reaped, 5.0, f"{self.ask('stats')}")

    def settle(self) -> None:
        """After every case: nothing in use, no scope open, nobody saw another live request's connection."""

        def busy() -> list[Any]:
            return [stats for stats in self.ask("stats") if stats["in_use"] or stats["users"] or stats["live"]]

        try:
            eventually(lambda: not busy(), 0.2 if self.broken else 8.0)
        except AssertionError:
            self.broken = True
            raise AssertionError(f"{self.name}: not given back: {busy()}\n{self.process.output[-5000:]}") from None
        stats = self.ask("stats")
        assert stats, "the application does not answer"
        violations = [text for one in stats for text in one["violations"]]
        self.ask("forget")
        assert not violations, f"{self.name}: {violations}"
        assert all(one["peak"] <= POOL for one in stats)

    def no_strays(self) -> None:
        """The server's sessions are the idle connections of the pools, and no transaction is open on one."""

        def strays() -> bool:
            told = self.ask("stats")
            sessions = self.place.sessions()
            if self.place.kind == "sqlite":
                # Counted by the write-ahead log, which each that has queried has open: of the file itself SQLite keeps the
                # descriptors of closed connections for the next ones.
                return len(self.place.descriptors("-wal")) > sum(stats["idle"] for stats in told)
            return len(sessions) != sum(stats["idle"] for stats in told) or any(
                session.in_transaction for session in sessions
            )

        eventually(lambda: not strays(), message=f"{self.place.sessions()} against {self.ask('stats')}")


@contextmanager
def serve(
    name: str, place: Place, directory: Path, *, driver: str | None = None, other: bool = False, **process: Any
) -> Iterator[Served]:
    """Run one of the applications, on an asynchronous driver if one is named; afterwards no session of it is left."""
    directory.mkdir(parents=True, exist_ok=True)
    work = Work(place.pool_url(max_connections=2))
    work.db.create_tables([work.Item, work.Part])
    work.db.close_all()
    pool: dict[str, Any] = {"max_connections": POOL, "timeout": 10}
    url = place.pool_url(**pool) if driver is None else place.async_url(driver, **pool)
    environment = {"DATABASE_URL": url, "CONTRACT_DIR": str(directory)}
    if other:
        environment |= {"CONTRACT_OTHER": url, "CONTRACT_CONNECT": "eager"}
    if name == "sanic-single":
        environment["SANIC_USE_UVLOOP"] = (
            "false"  # one of each framework's loops is asyncio's own, whose callbacks are judged
        )
    environment |= process.pop("env", {})
    with SERVERS[name](env=environment, **process) as server:
        served = Served(name, place, server, directory, work, is_async=driver is not None)
        yield served
        work.db.close_all()
    try:
        eventually(lambda: not place.sessions(), message=f"sessions left after {name} has ended: {place.sessions()}")
    finally:
        work.db.close_all()
