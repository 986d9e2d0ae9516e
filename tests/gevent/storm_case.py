"""200 greenlets send 20 requests each over 10 connections, and 5 % of the requests are killed at random moments.

The environment's PLACE_URL is an empty place for tables on MariaDB. Prints the counts, and what was wrong.
"""

# ruff: noqa: T201, PLW0603
from gevent import monkey

monkey.patch_all()

import json
import logging
import os
import random
import time

import gevent
import peewee
from playhouse import db_url

from peewee_frameworks.pool import PooledMySQLDatabase
from peewee_frameworks.wsgi import PeeweeMiddleware

CLIENTS, REQUESTS, CONNECTIONS, KILLED = 200, 20, 10, 0.05

logging.disable(logging.WARNING)
dice = random.Random(5)
database = PooledMySQLDatabase(**db_url.parse(os.environ["PLACE_URL"]), max_connections=CONNECTIONS, timeout=30)


class Row(peewee.Model):
    job = peewee.IntegerField()

    class Meta:
        database = database


problems = []
held = {}
most = 0


def application(environ, start_response):
    global most
    job = environ["job"]
    database.connect(reuse_if_open=True)
    connection = database.connection()
    if id(connection) in held:
        problems.append(f"{job} shares a connection with {held[id(connection)]}")
    held[id(connection)] = job
    most = max(most, len(held))
    try:
        if job % 4 == 0:
            with database.atomic():
                Row.create(job=job)
                Row.create(job=job)
        value = database.execute_sql("SELECT %s FROM (SELECT SLEEP(0.002)) nap", (job,)).fetchall()[0][0]
    finally:
        held.pop(id(connection), None)
    start_response("200 OK", [])
    return [str(value).encode()]


app = PeeweeMiddleware(application, database)


def request(job):
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": f"/{job}", "SCRIPT_NAME": "", "job": job}
    body = app(environ, lambda status, headers, exc_info=None: None)
    try:
        return int(b"".join(body))
    finally:
        getattr(body, "close", int)()


def client(number):
    outcomes = []
    for index in range(REQUESTS):
        job = number * REQUESTS + index + 1
        worker = gevent.spawn(request, job)
        if dice.random() < KILLED:
            gevent.sleep(dice.random() * 0.1)
            # A Timeout is what a server's time limit raises; an exit is what its shutdown does.
            worker.kill(gevent.Timeout(None) if job % 2 else gevent.GreenletExit)
        worker.join()
        outcomes.append((job, worker.value if worker.successful() else worker.exception))
    return outcomes


gevent.get_hub().exception_stream = None  # the timeouts are expected
database.create_tables([Row])
database.close()
began = time.monotonic()
clients = [gevent.spawn(client, number) for number in range(CLIENTS)]
gevent.joinall(clients, timeout=60)
seconds = time.monotonic() - began
killed = 0
answered = []
for one in clients:
    for job, outcome in one.value or problems.append("a client did not end") or ():
        if outcome == job:
            answered.append(job)
        elif isinstance(outcome, (gevent.Timeout, gevent.GreenletExit)):
            killed += 1
        else:
            problems.append(f"{job}: {outcome!r}")

with gevent.Timeout(10, False):
    while database._in_use:
        gevent.sleep(0.01)
with database.connection_context():
    counts = dict(Row.select(Row.job, peewee.fn.COUNT(Row.id)).group_by(Row.job).tuples())
problems += [f"{job}: {count} rows" for job, count in counts.items() if count != 2]
problems += [f"{job}: answered, and its rows are not there" for job in answered if job % 4 == 0 and job not in counts]
stats = database.pool.stats()
print(
    json.dumps(
        {
            "right": len(answered),
            "killed": killed,
            "most": most,
            "lost": stats.used,
            "waiting": stats.waiting,
            "seconds": seconds,
            "problems": problems[:20],
        }
    )
)
