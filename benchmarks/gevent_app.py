# ruff: noqa: E402 - the patch comes first
"""A blog's page for `bench_gevent.py`. What serves it is named by CONTENDER.

"ours": our pool and adapter; "playhouse": its pool and the usual hooks; "bare": connections of PyMySQL in a queue of gevent's,
which is the least that can be done.
"""

from gevent import monkey

monkey.patch_all()

import os
import time

import gevent
import pymysql
from flask import Flask
from gevent.queue import LifoQueue
from peewee import CharField, TextField
from playhouse import db_url

from benchmarks.harness import percentile

contender = os.environ["CONTENDER"]
if contender == "ours":
    from peewee_frameworks.flask import Peewee
    from peewee_frameworks.pool import PooledMySQLDatabase
else:
    from playhouse.pool import PooledMySQLDatabase

CONNECTIONS = 10
parsed = db_url.parse(os.environ["DATABASE_URL"])
db = PooledMySQLDatabase(**parsed, max_connections=CONNECTIONS, timeout=10)
lags: list[float] = []


class Post(db.Model):
    title = CharField(80)
    body = TextField()

    class Meta:
        table_name = "pf_bench_gevent"


app = Flask(__name__)
if contender == "ours":
    Peewee(db).init_app(app)
elif contender == "playhouse":

    @app.before_request
    def connect():
        db.connect()

    @app.teardown_request
    def close(error):
        if not db.is_closed():
            db.close()


if contender == "bare":
    free = LifoQueue()
    for _ in range(CONNECTIONS):
        free.put(pymysql.connect(autocommit=True, **parsed))

    @app.get("/posts/<int:number>")
    def post(number):
        connection = free.get(timeout=10)
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT title, body FROM pf_bench_gevent WHERE id = %s", (number,))
                title, body = cursor.fetchone()
        finally:
            free.put(connection)
        return {"title": title, "body": body}

else:

    @app.get("/posts/<int:number>")
    def post(number):
        found = Post.get_by_id(number)
        return {"title": found.title, "body": found.body}


@app.get("/lag")
def lag():
    """How late a greenlet woke that slept for 5 ms, since the last call, in milliseconds."""
    taken = sorted(lags)
    lags.clear()
    return {"median": 1000 * percentile(taken, 0.5), "p99": 1000 * percentile(taken, 0.99)} if taken else {}


def watch():
    while True:
        before = time.perf_counter()
        gevent.sleep(0.005)
        lags.append(time.perf_counter() - before - 0.005)


gevent.spawn(watch)
