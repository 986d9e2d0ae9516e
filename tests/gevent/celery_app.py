"""The Celery application that `test_celery.py` has a worker run: ``celery -A tests.gevent.celery_app worker -P gevent``.

BROKER is a directory for messages, PLACE_URL an empty place for tables on MariaDB, POOL (``ours``, ``stock``) its pool.
"""

from __future__ import annotations

import os

import peewee
from celery import Celery
from playhouse import db_url

if os.environ["POOL"] == "ours":
    from peewee_frameworks import pool
else:
    from playhouse import pool

from peewee_frameworks import connection_scope
from peewee_frameworks.gevent import check, diagnose

CONNECTIONS = 4
database = pool.PooledMySQLDatabase(**db_url.parse(os.environ["PLACE_URL"]), max_connections=CONNECTIONS, timeout=10)
folder = os.environ["BROKER"]
app = Celery("tests", broker="filesystem://")
app.conf.update(
    broker_transport_options={
        "data_folder_in": folder,
        "data_folder_out": folder,
        "control_folder": f"{folder}/control",
    },
    worker_prefetch_multiplier=100,
)
inside: set[int] = set()


class Row(peewee.Model):
    job = peewee.IntegerField()
    note = peewee.CharField()

    class Meta:
        database = database


def scalar(sql: str, *params: object) -> object:
    return database.execute_sql(sql, params).fetchall()[0][0]


@app.task
@connection_scope(database)
def look():
    """Note what the diagnosis says, from inside a task."""
    check(database)
    Row.create(job=0, note=",".join(finding.code for finding in diagnose(database)))


@app.task
@connection_scope(database)
def work(job: int, *, fail: bool = False):
    """Two rows or none, and how many tasks were inside a query with this one."""
    session = scalar("SELECT CONNECTION_ID()")
    with database.atomic():
        Row.create(job=job, note="first")
        inside.add(job)
        try:
            scalar("SELECT SLEEP(0.05)")
            together = len(inside)
        finally:
            inside.discard(job)
        if fail:
            raise RuntimeError("asked to fail")
        same = scalar("SELECT CONNECTION_ID()") == session
        Row.create(job=job, note=f"together {together}" if same else "another session")


@app.task
@connection_scope(database)
def overrun(job: int):
    """Struck by its time limit, gevent's Timeout, in the middle of a query in a transaction."""
    with database.atomic():
        Row.create(job=job, note="to be rolled back")
        scalar("SELECT SLEEP(30)")
        Row.create(job=job, note="too late")
