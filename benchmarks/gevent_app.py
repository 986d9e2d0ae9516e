# ruff: noqa: E402 - the patch comes first
"""A blog's pages for `bench_gevent.py`, with our pool and adapter or with playhouse.pool and the usual hooks (CONTENDER)."""

from gevent import monkey

monkey.patch_all()

import os
import time

import gevent
from flask import Flask
from peewee import CharField, TextField
from playhouse import db_url

ours = os.environ["CONTENDER"] == "ours"
if ours:
    from peewee_frameworks.flask import Peewee
    from peewee_frameworks.pool import PooledMySQLDatabase
else:
    from playhouse.pool import PooledMySQLDatabase

db = PooledMySQLDatabase(**db_url.parse(os.environ["DATABASE_URL"]), max_connections=10, timeout=10)
lags: list[float] = []


class Post(db.Model):
    title = CharField(80)
    body = TextField()

    class Meta:
        table_name = "pf_bench_gevent"


app = Flask(__name__)
if ours:
    Peewee(db).init_app(app)
else:

    @app.before_request
    def connect():
        db.connect()

    @app.teardown_request
    def close(error):
        if not db.is_closed():
            db.close()


@app.get("/")
def index():
    return {"posts": [post.title for post in Post.select().order_by(Post.id).limit(10)]}


@app.get("/posts/<int:number>")
def post(number):
    found = Post.get_by_id(number)
    return {"title": found.title, "body": found.body}


@app.get("/bare/<int:number>")
def bare(number):
    """No query: what the framework and the hub cost by themselves."""
    return {"title": f"Post {number}", "body": "…" * 200}


@app.get("/lag")
def lag():
    """The p99 of how late a greenlet wakes that sleeps for 5 ms, since the last call; in milliseconds."""
    taken = sorted(lags)
    lags.clear()
    return {"p99": 1000 * taken[int(len(taken) * 0.99)] if taken else 0.0}


def watch():
    while True:
        before = time.perf_counter()
        gevent.sleep(0.005)
        lags.append(time.perf_counter() - before - 0.005)


gevent.spawn(watch)
