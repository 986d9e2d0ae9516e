"""The chat's own tests: its API with Starlette's test client, and the whole of it on a real server and each database."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from tests.support.client import Request
from tests.support.concurrency import eventually
from tests.support.databases import scratch
from tests.support.servers import KINDS, require_server
from tests.support.webservers import uvicorn
from tests.support.websocket import WebSocket

from . import create_app
from .models import db


@pytest.fixture
def client(tmp_path):
    """Give a client of the chat, on a database of its own."""
    db.init(str(tmp_path / "chat.db"))
    with TestClient(create_app()) as client:
        yield client
        eventually(lambda: db.pool.stats().used == 0)


def test_rooms_and_messages(client):
    assert client.post("/rooms", json={"name": "tea"}).status_code == 201
    assert client.post("/rooms", json={"name": "tea"}).status_code == 409
    assert client.post("/rooms", json={}).status_code == 400
    assert client.get("/rooms").json() == ["tea"]
    said = client.post("/rooms/tea/messages", json={"author": "Ada", "text": "Hello"})
    assert said.status_code == 201
    assert client.get("/rooms/tea/messages").json() == [said.json()]
    assert client.get("/rooms/milk/messages").status_code == 404
    assert client.get("/rooms/milk/events").status_code == 404


def test_what_one_says_all_hear(client):
    client.post("/rooms", json={"name": "tea"})
    with (
        client.websocket_connect("/rooms/tea/talk?author=Ada") as ada,
        client.websocket_connect("/rooms/tea/talk?author=Bob") as bob,
    ):
        ada.send_text("Milk first?")
        assert {socket.receive_json()["text"] for socket in (ada, bob)} == {"Milk first?"}
        bob.send_text("Never.")
        assert [socket.receive_json()["author"] for socket in (ada, bob)] == ["Bob", "Bob"]


def test_operators_see_what_the_pool_does(client, monkeypatch):
    assert client.get("/db/ready").json() == {"status": "ok"}
    assert client.get("/db/").status_code == 403
    monkeypatch.setenv("OPS_TOKEN", "sesame")
    assert client.get("/db/?token=other").status_code == 403
    assert client.get("/db/?token=sesame").status_code == 200
    assert client.get("/db/status?token=sesame").json()["pools"]["default"]["used"] == 0


@pytest.fixture(params=[*KINDS, "postgres-async"])
def address(request, tmp_path):
    """Give a place on each database, and its URL: with the sync driver, and with psycopg's asynchronous one."""
    kind, _, driver = request.param.partition("-")
    require_server(kind)
    with scratch(kind, tmp_path) as place:
        yield place, place.async_url("psycopg") if driver else place.url


def test_listeners_that_wait_hold_no_connection(address):
    """30 sockets and 30 streams on a pool of 10; half of them leave without a word."""
    place, url = address

    def post(client, path, entry):
        body = json.dumps(entry).encode()
        return client.request(Request(path, "POST", body, {"Content-Type": "application/json"}))

    app = "example_apps.starlette_chat:create_app"
    with uvicorn(app, factory=True, env={"DATABASE_URL": url}) as server, server.client() as client:
        assert post(client, "/rooms", {"name": "tea"}).status == 201
        sockets = [WebSocket(f"{server.url}/rooms/tea/talk") for _ in range(30)]
        streams = [server.client() for _ in range(30)]
        for stream in streams:
            stream.send(Request("/rooms/tea/events"))
            assert stream.read_head().status == 200
        assert post(client, "/rooms/tea/messages", {"author": "Ada", "text": "Hello"}).status == 201
        for socket in sockets:
            assert json.loads(socket.receive())["text"] == "Hello"
        for stream in streams:
            assert b"Hello" in stream.read_body(1)
        for number, (socket, stream) in enumerate(zip(sockets, streams, strict=True)):
            stream.drop("rst" if number % 2 else "fin")
            if number % 2:
                socket.abort()
            else:
                assert socket.close() == 1000
        assert len(client.get("/rooms/tea/messages").json()) == 1
    assert not place.sessions()
