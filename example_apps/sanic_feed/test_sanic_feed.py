"""The feed, on a real server with two workers, as a client sees it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support import webservers
from tests.support.client import Request
from tests.support.databases import scratch
from tests.support.servers import KINDS, require_server
from tests.support.websocket import WebSocket


@pytest.fixture(scope="module", params=KINDS)
def place(request, tmp_path_factory):
    require_server(request.param)
    with scratch(request.param, tmp_path_factory.mktemp("feed")) as place:
        yield place


@pytest.fixture(scope="module")
def server(place):
    with webservers.sanic(
        "example_apps.sanic_feed:create_app",
        factory=True,
        workers=2,
        env={"DATABASE_URL": place.url, "OPS_TOKEN": "sesame"},
    ) as server:
        yield server
    assert not place.sessions()


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


def post(client, path, entry):
    body = json.dumps(entry).encode()
    return client.request(Request(path, "POST", body, {"Content-Type": "application/json"}))


def test_operators_see_what_the_pool_does(client):
    assert client.get("/db/ready").json() == {"status": "ok"}
    assert client.get("/db/").status == 403
    assert client.get("/db/?token=sesame").status == 200
    assert client.get("/db/status?token=sesame").json()["pools"]["default"]["max_connections"] == 10


def test_a_post_is_stored_listed_and_liked_once(client):
    stored = post(client, "/posts/", {"name": "ada", "text": "Hello"})
    assert stored.status == 201
    number = stored.json()["id"]
    liked = post(client, f"/posts/{number}/like", {"name": "bob"})
    assert (liked.status, liked.json()["likes"]) == (200, 1)
    assert post(client, f"/posts/{number}/like", {"name": "bob"}).status == 409
    (listed,) = [entry for entry in client.get("/posts/").json() if entry["id"] == number]
    assert (listed["author"], listed["likes"]) == ("ada", 1)  # the second like counted nowhere
    assert post(client, "/posts/999999/like", {"name": "bob"}).status == 404
    assert post(client, "/posts/", {"name": "ada"}).status == 400


def test_an_import_is_stored_as_a_whole_or_not_at_all(client):
    entries = [{"name": "eve", "text": f"number {number}"} for number in range(5)]
    assert post(client, "/posts/import", [*entries, {"name": "eve"}]).status == 400
    assert "eve" not in client.get("/posts/").text
    assert post(client, "/posts/import", entries).json() == {"stored": 5}
    lines = client.get("/posts/export").text.splitlines()
    assert [json.loads(line)["text"] for line in lines if "eve" in line] == [entry["text"] for entry in entries]


def test_a_post_reaches_websockets_and_events_of_both_workers(server, client):
    sockets = [WebSocket(f"{server.url}/live/socket") for _ in range(8)]
    streams = [server.client() for _ in range(8)]
    for stream in streams:
        stream.send(Request("/live/events"))
        assert stream.read_head().status == 200
        assert stream.read_body(1).startswith(b": welcome")
    sockets[0].send(json.dumps({"name": "zoe", "text": "Over the wire"}))
    for socket in sockets:
        while json.loads(socket.receive())["text"] != "Over the wire":
            pass  # what other tests wrote just before
    for stream in streams:
        while b"Over the wire" not in stream.read_body(1):
            pass
        stream.drop()
    assert "error" in json.loads(sockets[1].echo("no JSON"))
    for number, socket in enumerate(sockets):
        if number % 2:
            socket.abort()
        else:
            assert socket.close() == 1000


def test_writers_at_the_same_time(server):
    def write(number):
        with server.client() as client:
            return post(client, "/posts/", {"name": f"writer {number % 5}", "text": str(number)}).status

    with ThreadPoolExecutor(20) as threads:
        assert set(threads.map(write, range(60))) == {201}
    with server.client() as client:
        lines = client.get("/posts/export").text.splitlines()
    written = [json.loads(line)["text"] for line in lines if "writer" in line]
    assert sorted(written, key=int) == [str(number) for number in range(60)]
