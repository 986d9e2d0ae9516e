"""Every server starts, serves what clients do to it, and ends; the clients read it right."""

from __future__ import annotations

import os
import signal

import pytest

from tests.support import webservers
from tests.support.client import Request
from tests.support.concurrency import eventually
from tests.support.load import hammer, statuses
from tests.support.process import ServerError
from tests.support.websocket import WebSocket

WSGI = "tests.support.sample_apps:wsgi"
ASGI = "tests.support.sample_apps:asgi"
SANIC = "tests.support.sample_apps:make_sanic"

SERVERS = {
    "werkzeug": lambda: webservers.werkzeug(WSGI),
    "werkzeug-factory": lambda: webservers.werkzeug("tests.support.sample_apps:make_wsgi", factory=True),
    "gunicorn-sync": lambda: webservers.gunicorn(WSGI, worker="sync", workers=2),
    "gunicorn-gthread": lambda: webservers.gunicorn(WSGI, worker="gthread", preload=True),
    "gunicorn-gevent": lambda: webservers.gunicorn(
        "tests.support.sample_apps:make_wsgi", factory=True, worker="gevent"
    ),
    "uvicorn-uvloop": lambda: webservers.uvicorn(ASGI),
    "uvicorn-asyncio": lambda: webservers.uvicorn(ASGI, loop="asyncio", http="h11"),
    "uvicorn-workers": lambda: webservers.uvicorn("tests.support.sample_apps:make_asgi", factory=True, workers=2),
    "sanic-single": lambda: webservers.sanic(SANIC, factory=True, single_process=True),
    "sanic-workers": lambda: webservers.sanic(SANIC, factory=True, workers=2),
    "hypercorn": lambda: webservers.hypercorn(ASGI),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_serves_and_ends(name):
    with SERVERS[name]() as server:
        with server.client() as client:
            assert client.get("/text").text == "text"
        results = hammer(server.url, ["/text"] * 40 + ["/none"] * 10, concurrency=20)
        assert statuses(results) == {200: 40, 404: 10}
        assert {result.text for result in results[:40]} == {"text"}
        with server.client() as client:
            assert client.post("/length", b"x" * 400_000).text == "400000"
        with server.client() as client:
            client.send(Request("/stream"))
            assert client.read_head().status == 200
            assert set(client.read_body(500)) == {ord("x")}
            client.drop("rst")
        with server.client() as client:
            client.send_part(Request("/length", "POST", b"y" * 1000), 10)
            client.drop("fin")
        with server.client() as client:
            assert client.get("/text").text == "text"


@pytest.mark.parametrize("name", ["gunicorn-gthread", "uvicorn-uvloop", "uvicorn-asyncio", "sanic-single"])
def test_keep_alive_and_pipelining(name):
    with SERVERS[name]() as server, server.client() as client:
        requests = [Request("/text"), Request("/length", "POST", b"z" * 100_000), Request("/text", "HEAD")]
        if name == "sanic-single":
            requests.pop()
        texts = [response.text for response in client.pipeline([*requests, Request("/text")])]
        assert texts[:2] == ["text", "100000"]
        assert texts[-1] == "text"
        assert client.get("/text").status == 200


@pytest.mark.parametrize("name", ["uvicorn-uvloop", "sanic-single"])
def test_websockets_echo_close_and_abort(name):
    with SERVERS[name]() as server:
        with WebSocket(f"{server.url}/echo") as socket:
            assert [socket.echo(word) for word in ("one", "two")] == ["one", "two"]
            assert socket.close() == 1000
        with WebSocket(f"{server.url}/echo") as socket:
            socket.abort()


def test_a_server_that_does_not_start_says_why():
    with pytest.raises(ServerError, match="no_such_name"), webservers.werkzeug("tests.support:no_such_name"):
        pass


def test_a_server_restarts_on_its_port_and_a_killed_worker_is_replaced():
    with webservers.gunicorn(WSGI, workers=1) as server:
        url, (worker,) = server.url, server.workers()
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: server.workers() not in ([], [worker]), message="a new worker")
        assert server.stop() == 0
        server.start()
        assert server.url == url
        with server.client() as client:
            assert client.get("/text").text == "text"


def test_a_server_that_does_not_end_is_killed_and_reported():
    # A request under way holds gunicorn for its graceful timeout of 30 seconds.
    server = webservers.gunicorn(WSGI, end=1)
    with server, server.client() as client:
        client.send(Request("/stream"))
        client.read_head()
        with pytest.raises(ServerError, match="still running"):
            server.stop()
    assert not server.running
