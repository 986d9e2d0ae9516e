"""A unit of work that is killed at its first switch to the hub, then one that is killed at its second, and so on.

So it is hit everywhere: waiting for a connection, connecting, inside each query, inside BEGIN and COMMIT, giving back.

What strikes is GreenletExit where the pool is cold, and gevent.Timeout where it is warm.

Arguments: the driver, and the pool (``stock`` or ``ours``). The environment's PLACE_URL is an empty place for tables.

Prints where each way to work was struck, and what was wrong.
"""

# ruff: noqa: T201, PLW0603, SIM105
from gevent import monkey

monkey.patch_all()

import collections
import gc
import json
import logging
import os
import sys
from pathlib import Path

import gevent
import greenlet
import peewee
from playhouse import db_url

from peewee_frameworks import connection_scope

driver, kind = sys.argv[1:3]
logging.disable(logging.WARNING)  # "rolled back", "closed, not reused": expected, many times

if driver == "psycopg2":
    from psycogreen.gevent import patch_psycopg

    patch_psycopg()
if kind == "ours":
    from peewee_frameworks import pool
else:
    from playhouse import pool

options = db_url.parse(os.environ["PLACE_URL"]) | {"max_connections": 2, "timeout": 5}
if driver == "pymysql":
    database = pool.PooledMySQLDatabase(**options)
    SESSIONS = "SELECT COUNT(*) FROM information_schema.processlist WHERE db = DATABASE()"
else:
    database = pool.PooledPostgresqlDatabase(**options, prefer_psycopg3=driver == "psycopg")
    SESSIONS = "SELECT COUNT(*) FROM pg_stat_activity WHERE application_name = current_setting('application_name')"


class Row(peewee.Model):
    job = peewee.IntegerField()

    class Meta:
        database = database


class Strike:
    """Throws into a greenlet when it switches to the hub for the n-th time."""

    def __init__(self, number, error):
        self.number = number
        self.error = error
        self.count = 0
        self.victim = None
        self.place = None

    def run(self, function, *args):
        """Run a function; return (what came, whether it was struck)."""
        self.victim = gevent.spawn(self.call, function, *args)
        greenlet.settrace(self.trace)
        try:
            self.victim.join(10)
        finally:
            greenlet.settrace(None)
        assert self.victim.ready(), "the greenlet did not end"
        return self.victim.value, self.count >= self.number

    def call(self, function, *args):
        try:
            return function(*args)
        except BaseException as error:
            return error

    def trace(self, event, greenlets):
        origin, target = greenlets
        if origin is self.victim and target is gevent.get_hub():
            self.count += 1
            if self.count == self.number:
                gevent.get_hub().loop.run_callback(self.throw)

    def throw(self):
        if not self.victim.ready():
            self.place = find_place(self.victim.gr_frame)
            self.victim.throw(self.error)


def find_place(frame):
    """Name what a greenlet is waiting for: a transaction's step, a statement's first word, a connect, a connection."""
    while frame is not None:
        name, file = frame.f_code.co_name, Path(frame.f_code.co_filename).name
        if (name, file) == ("_execute_cursor", "peewee.py"):
            return frame.f_locals["sql"].split()[0]
        if file == "peewee.py" and name in ("begin", "commit", "rollback", "_connect", "_close"):
            return name
        if file == "pool.py" and name in ("acquire", "connect"):  # ours, playhouse's
            return "waiting"
        frame = frame.f_back
    return "?"


def transaction(job):
    with connection_scope(database):
        with database.atomic():
            Row.create(job=job)
            with database.atomic():
                Row.create(job=job)
        return scalar("SELECT %s", job)


def private(job):
    """Outside a scope, as scripts do."""
    database.connect(reuse_if_open=True)
    try:
        with database.atomic():
            Row.create(job=job)
            Row.create(job=job)
        return scalar("SELECT %s", job)
    finally:
        database.close()


def scalar(sql, *params):
    return database.execute_sql(sql, params).fetchall()[0][0]


def go_on(job):
    """A handler that survives the strike outside a transaction, and asks again."""
    with connection_scope(database):
        try:
            scalar("SELECT %s", -job)
        except (gevent.Timeout, gevent.GreenletExit):
            pass
        return scalar("SELECT %s", job)


def swallow(job):
    """A handler that survives the strike inside its transaction: what follows must not be committed by itself."""
    with connection_scope(database):
        try:
            with database.atomic():
                Row.create(job=job)
                try:
                    scalar("SELECT %s", -job)
                except (gevent.Timeout, gevent.GreenletExit):
                    pass
                Row.create(job=job)
        except peewee.PeeweeException:
            pass
        return job


def hold(freed):
    with connection_scope(database):
        scalar("SELECT 1")
        freed.wait()


with connection_scope(database):
    database.create_tables([Row])
problems = []
places = collections.defaultdict(list)
job = 0


def check_all(what, number, outcome, struck, error):
    where = f"{what} {number}"
    if isinstance(outcome, BaseException):
        if outcome is not error:
            problems.append(f"{where}: {outcome!r} instead of {error!r}, because of {outcome.__context__!r}")
    elif outcome != job:
        problems.append(f"{where}: got {outcome!r} instead of {job!r}")
    with gevent.Timeout(5, False):  # what is cleaned in the background
        while database._in_use:
            gevent.sleep(0.005)
    if database._in_use:
        problems.append(f"{where}: {len(database._in_use)} connections lost")
        database.close_all()
    # Two at once, so that every connection that is kept gives an answer.
    answers = [gevent.spawn(answer, 1000 + index) for index in range(4)]
    gevent.joinall(answers, timeout=10)
    got = [one.value for one in answers]
    if got != [1000, 1001, 1002, 1003]:
        problems.append(f"{where}: afterwards {got} {[one.exception for one in answers]}")
    with connection_scope(database):
        rows = Row.select().where(Row.job == job).count()
    if rows not in ((0, 2) if struck else (2,)) and what != "go_on":
        problems.append(f"{where}: {rows} rows")


def answer(value):
    with connection_scope(database):
        found = scalar("SELECT %s", value)
        gevent.sleep(0.001)
        return found


def shoot(what, function, number, *, cold):
    global job
    job += 1
    if cold:
        database.close_idle()
    strike = Strike(number, gevent.GreenletExit() if cold else gevent.Timeout())
    outcome, struck = strike.run(function, job)
    check_all(what, number, outcome, struck, strike.error)
    if strike.place not in (None, *places[what]):
        places[what].append(strike.place)
    return struck


STEPS = {"begin", "INSERT", "SAVEPOINT", "RELEASE", "commit", "SELECT"}
CONNECT = "waiting" if kind == "ours" else "_connect"  # ours connects in the background
WAYS = [
    ("transaction cold", transaction, {*STEPS, CONNECT}),
    ("transaction", transaction, STEPS),
    ("private cold", private, {CONNECT, "begin", "INSERT", "commit", "SELECT"}),
    ("go_on", go_on, {"SELECT"}),
    ("swallow", swallow, {"begin", "INSERT", "SELECT"}),
]

for what, function, wanted in WAYS:
    # On a busy machine an answer may be there before it is waited for; then one switch is missing, and the next is struck.
    for _ in range(5):
        number = 1
        while shoot(what, function, number, cold="cold" in what):
            number += 1
        if wanted <= set(places[what]):
            break

# All connections are held by others: the first switch is the wait.
for number in (1, 2, 3):
    freed = gevent.event.Event()
    holders = [gevent.spawn(hold, freed) for _ in range(2)]
    while len(database._in_use) < 2:
        gevent.sleep(0.001)
    gevent.spawn_later(0.01, freed.set)
    shoot("waiting", transaction, number, cold=False)
    gevent.joinall(holders)

with gevent.Timeout(5, False):  # the server needs a moment to see that a connection is closed
    while True:
        with connection_scope(database):
            sessions = scalar(SESSIONS)
        if sessions <= 2:
            break
        gc.collect()  # what playhouse had not quite connected hangs in a cycle with the traceback
        gevent.sleep(0.01)
if sessions > 2:
    problems.append(f"{sessions} sessions on the server, with a pool of 2")
print(json.dumps({"places": places, "problems": problems}))
