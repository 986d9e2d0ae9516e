"""Handlers without a query for `bench_adapters.py`: CONTENDER is ``bare``, ``ours``, or the ``least`` that can be done.

The least is to set a context variable around the application and to reset it: no per-request state does with less.
"""

import contextvars
import os

from playhouse.pool import PooledSqliteDatabase

contender = os.environ["CONTENDER"]
db = PooledSqliteDatabase(":memory:", max_connections=1)
current = contextvars.ContextVar("current", default=None)


def least_asgi(app):
    async def layer(scope, receive, send):
        token = current.set(scope)
        try:
            await app(scope, receive, send)
        finally:
            current.reset(token)

    return layer


def flask():
    from flask import Flask

    app = Flask(__name__)

    @app.get("/")
    def index():
        return {"hello": "world"}

    if contender == "ours":
        from peewee_frameworks.flask import Peewee

        Peewee(db).init_app(app)
    elif contender == "least":
        bare = app.wsgi_app

        def layer(environ, start_response):
            token = current.set(environ)
            try:
                return bare(environ, start_response)
            finally:
                current.reset(token)

        app.wsgi_app = layer
    return app


def sanic():
    from sanic import Sanic, json

    class Least(Sanic):
        async def handle_request(self, request):
            token = current.set(request)
            try:
                await super().handle_request(request)
            finally:
                current.reset(token)

    app = (Least if contender == "least" else Sanic)("bench")

    @app.get("/")
    async def index(request):
        return json({"hello": "world"})

    if contender == "ours":
        from peewee_frameworks.sanic import Peewee

        Peewee(db).init_app(app)
    return app


def starlette():
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def index(request):
        return JSONResponse({"hello": "world"})

    app = Starlette(routes=[Route("/", index)])
    if contender == "ours":
        from peewee_frameworks.starlette import Peewee

        Peewee(db).init_app(app)
    return least_asgi(app) if contender == "least" else app


def fastapi():
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/")
    async def index():
        return {"hello": "world"}

    if contender == "ours":
        from peewee_frameworks.fastapi import Peewee

        Peewee(db).init_app(app)
    return least_asgi(app) if contender == "least" else app
