"""The example on gunicorn, as its README line says, on each database."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.client import Request
from tests.support.databases import scratch
from tests.support.load import hammer, statuses
from tests.support.process import ServerProcess, python
from tests.support.servers import KINDS, require_server

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.servers import Kind

CONFIG = "example_apps/flask_gevent/gunicorn.conf.py"


def serve(url: str) -> ServerProcess:
    def command(port: int) -> list[str]:
        address = ["-b", f"127.0.0.1:{port}", "--no-control-socket"]
        return python("gunicorn", "-c", CONFIG, *address, "example_apps.flask_gevent.wsgi:app")

    return ServerProcess(command, env={"DATABASE_URL": url}, ready="/health", announce={"Booting worker with pid": 2})


@pytest.mark.parametrize("kind", KINDS)
def test_votes_are_counted_once_each(kind: Kind, tmp_path: Path) -> None:
    """Patched early enough even with preload; 100 votes at a time are 100 votes; children have connections of their own."""
    require_server(kind)
    with scratch(kind, tmp_path) as place, serve(place.url) as server:
        with server.client() as client:
            assert client.get("/health").json() == {"gevent": []}
            assert client.request(Request("/polls/lunch/soup", "POST")).status == 200
            assert client.request(Request("/polls/lunch/rice", "POST")).status == 200
        votes = [Request("/polls/lunch/soup", "POST")] * 50
        assert statuses(hammer(server.url, votes, concurrency=25)) == {200: 50}
        with server.client() as client:
            asked = client.get("/polls?poll=lunch&poll=dinner").json()
        assert asked == {"lunch": {"rice": 1, "soup": 51}, "dinner": {}}
        if kind != "sqlite":
            assert len(place.sessions()) <= 20
