"""The Flask application that the tests serve under gevent; PLACE_URL and POOL (``ours``, ``stock``) choose its database."""

from __future__ import annotations

import os
import sys

import peewee
from flask import Flask, copy_current_request_context, request
from playhouse import db_url

if os.environ["POOL"] == "ours":
    from peewee_frameworks import pool
else:
    from playhouse import pool

from peewee_frameworks import connection_scope
from peewee_frameworks.flask import Peewee
from peewee_frameworks.gevent import diagnose

url = os.environ["PLACE_URL"]
options = db_url.parse(url) | {"max_connections": 5, "timeout": 5}
if url.startswith("mysql"):
    database = pool.PooledMySQLDatabase(**options)
    NAP, SELF = "SELECT SLEEP(%s)", "SELECT CONNECTION_ID()"
else:
    database = pool.PooledPostgresqlDatabase(**options, prefer_psycopg3=True)
    NAP, SELF = "SELECT pg_sleep(%s)", "SELECT pg_backend_pid()"


class Row(peewee.Model):
    job = peewee.IntegerField()

    class Meta:
        database = database


orm = Peewee(database, errors=True, create_tables=[Row])
app = Flask(__name__)
orm.init_app(app)


def scalar(sql: str, *params: object) -> object:
    return database.execute_sql(sql, params).fetchall()[0][0]


@app.get("/")
def index():
    return {
        "in_use": len(database._in_use),
        "findings": [finding.code for finding in diagnose(database)],
        "patched": "gevent.monkey" in sys.modules and sys.modules["gevent.monkey"].is_module_patched("threading"),
    }


@app.get("/value/<int:number>")
def value(number):
    fresh = database.is_closed()
    before = scalar(SELF)
    scalar(NAP, 0.02)
    return {"value": scalar("SELECT %s", number), "same": before == scalar(SELF), "fresh": fresh}


@app.post("/row/<int:job>")
def row(job):
    """Two rows or none; `fail` fails between them, `nap` waits there."""
    with database.atomic():
        Row.create(job=job)
        scalar(NAP, request.args.get("nap", 0, float))
        if "fail" in request.args:
            raise RuntimeError("asked to fail")
        Row.create(job=job)
    return {"rows": Row.select().where(Row.job == job).count()}


@app.get("/children")
def children():
    """Children of each kind: each begins without a connection and has one of its own."""
    import gevent
    from gevent.pool import Pool

    mine = scalar(SELF)
    seen = []

    def child(number):
        fresh = database.is_closed()
        with connection_scope(database):
            seen.append((fresh, scalar(SELF)))
            return scalar("SELECT %s", number)

    results = Pool(2).map(child, range(4))
    spawned = [gevent.spawn(child, 4), gevent.spawn(copy_current_request_context(child), 5)]
    gevent.joinall(spawned, raise_error=True)
    results += [one.get() for one in spawned]
    return {
        "results": results,
        "fresh": all(fresh for fresh, _ in seen),
        "own": all(other != mine for _, other in seen),
        "still": scalar(SELF) == mine,
    }


@app.get("/timeout")
def timeout():
    """A time limit that strikes in the middle of a query, and a handler that goes on."""
    import gevent

    database.execute_sql("SELECT 1")
    with gevent.Timeout(0.02, False):
        scalar(NAP, 0.5)
    return {"value": scalar("SELECT 42")}
