"""The smallest applications, for the tests of the test support: WSGI, ASGI and Sanic with the same routes.

GET /text, GET /stream (an endless body in pieces), POST /length (of the body), GET /pid; websocket /echo
(ASGI, Sanic).
"""

from __future__ import annotations

import asyncio
import os
import time
from itertools import repeat
from typing import Any


def wsgi(environ: Any, start_response: Any) -> Any:
    path = environ["PATH_INFO"]
    if path == "/stream":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return (time.sleep(0.001) or b"x" * 100 for _ in repeat(None))
    if path == "/length":
        size = int(environ["CONTENT_LENGTH"] or 0)
        body = str(len(environ["wsgi.input"].read(size))).encode()
    else:
        body = {"/text": b"text", "/pid": str(os.getpid()).encode()}.get(path, b"")
    start_response("200 OK" if body else "404 Not Found", [("Content-Length", str(len(body)))])
    return [body]


def make_wsgi() -> Any:
    return wsgi


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})
    else:
        await http(scope["path"], receive, send)


async def http(path: str, receive: Any, send: Any) -> None:
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = {"/text": b"text", "/pid": str(os.getpid()).encode(), "/length": str(size).encode()}.get(path, b"")
    status = 200 if body or path == "/stream" else 404
    await send({"type": "http.response.start", "status": status, "headers": []})
    if path == "/stream":
        gone = asyncio.ensure_future(receive())
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 100, "more_body": True})
            await asyncio.sleep(0.001)
    await send({"type": "http.response.body", "body": body})


def make_asgi() -> Any:
    return asgi


def make_sanic() -> Any:
    from sanic import Sanic, text

    app = Sanic("sample")

    @app.get("/text")
    async def text_(request):
        return text("text")

    @app.get("/pid")
    async def pid(request):
        return text(str(os.getpid()))

    @app.post("/length")
    async def length(request):
        return text(str(len(request.body)))

    @app.get("/stream")
    async def stream(request):
        response = await request.respond()
        while True:
            await response.send("x" * 100)
            await asyncio.sleep(0.001)

    @app.websocket("/echo")
    async def echo(request, ws):
        async for message in ws:
            await ws.send(message)

    return app
