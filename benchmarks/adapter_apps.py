"""Handlers without a query for `bench_adapters.py`, with our adapter or without (CONTENDER)."""

import os

from playhouse.pool import PooledSqliteDatabase

ours = os.environ["CONTENDER"] == "ours"
db = PooledSqliteDatabase(":memory:", max_connections=1)


def flask():
    from flask import Flask

    app = Flask(__name__)

    @app.get("/")
    def index():
        return {"hello": "world"}

    if ours:
        from peewee_frameworks.flask import Peewee

        Peewee(db).init_app(app)
    return app


def sanic():
    from sanic import Sanic, json

    app = Sanic("bench")

    @app.get("/")
    async def index(request):
        return json({"hello": "world"})

    if ours:
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
    if ours:
        from peewee_frameworks.starlette import Peewee

        Peewee(db).init_app(app)
    return app


def fastapi():
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/")
    async def index():
        return {"hello": "world"}

    if ours:
        from peewee_frameworks.fastapi import Peewee

        Peewee(db).init_app(app)
    return app
