# ruff: noqa: PLW0603, T201, DTZ
"""One case of the matrix, in a process of its own: ten greenlets, a pool of five, a query of 50 ms each.

Arguments: the order of imports, patches and creation; the driver; the pool: ``stock`` and ``ours`` have our state, ``raw`` is
playhouse.pool alone; "repair" or nothing.

Prints what came of it: how many greenlets succeeded, how many were inside a query at the same time, the most connections
in use, the errors and the findings of the diagnosis.
"""

import collections
import json
import logging
import os
import sys
import warnings

order, driver, kind = sys.argv[1:4]
repair = "repair" in sys.argv[4:]
logging.basicConfig(format="%(levelname)s %(message)s")


CONNECTORS = {
    "connector": ("PooledMySQLConnectorDatabase", {}),
    "connector pure": ("PooledMySQLConnectorDatabase", {"use_pure": True}),
    "mariadb": ("PooledMariaDBConnectorDatabase", {}),
}
is_mysql = driver in ("pymysql", "mysqlclient", *CONNECTORS)


def green():
    if driver == "psycopg2":
        from psycogreen.gevent import patch_psycopg

        patch_psycopg()


def patch(**options):
    from gevent import monkey

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gevent warns of some of these orders itself
        monkey.patch_all(**options)
    green()


def make():
    import peewee

    if driver == "mysqlclient":
        import MySQLdb

        peewee.mysql = MySQLdb
    if kind == "ours":
        from peewee_frameworks import pool
    else:
        from playhouse import pool
    from playhouse import db_url

    url = os.environ["MYSQL_URL" if is_mysql else "POSTGRES_URL"]
    options = db_url.parse(url) | {"max_connections": 5, "timeout": 0}
    if driver in CONNECTORS:
        name, more = CONNECTORS[driver]
        if kind != "ours":
            from playhouse import mysql_ext as pool
        made = getattr(pool, name)(**options, **more)
    elif is_mysql:
        made = pool.PooledMySQLDatabase(**options)
    else:
        made = pool.PooledPostgresqlDatabase(**options, prefer_psycopg3=driver == "psycopg")
    if kind != "raw":
        from peewee_frameworks.state import install

        install(made)
    return made


database = None
if order == "patched first":
    patch()
elif order == "driver first":
    __import__({"mysqlclient": "MySQLdb"}.get(driver, driver))
    patch()
elif order == "peewee first":
    __import__("playhouse.pool")
    patch()
elif order == "created first":
    database = make()
    patch()
elif order == "connected first":
    database = make()
    database.connect()
    database.close()
    patch()
elif order == "not patched":
    green()
elif order == "without threads":
    patch(thread=False)
elif order == "only sockets":
    from gevent import monkey

    monkey.patch_socket()
    monkey.patch_select()
    green()
elif order == "only threads":
    from gevent import monkey

    monkey.patch_thread()
    green()
else:
    raise SystemExit(f"unknown order {order!r}")
if database is None:
    database = make()

import gevent

from peewee_frameworks import connection_scope
from peewee_frameworks.gevent import check, diagnose

sleep = "SELECT SLEEP(0.05)" if is_mysql else "SELECT pg_sleep(0.05)"
running = peak = most = 0
errors = collections.Counter()


def query():
    global running, peak, most
    running += 1
    peak = max(peak, running)
    most = max(most, len(database._in_use))
    try:
        database.execute_sql(sleep).fetchall()
    finally:
        running -= 1


def work(number):
    try:
        if kind != "raw" and number % 2:
            with connection_scope(database):
                database.connect()
                query()
        else:
            database.connect()
            try:
                query()
            finally:
                database.close()
    except Exception as error:
        errors[f"{type(error).__name__}: {error}"] += 1
        return False
    return True


def look():
    if repair:
        check(database, repair=True)
    return [(finding.code, finding.level) for finding in diagnose(database)]


findings = gevent.spawn(look).get()
greenlets = [gevent.spawn(work, number) for number in range(10)]
gevent.joinall(greenlets)
ok = sum(bool(greenlet.value) for greenlet in greenlets)
print(json.dumps({"ok": ok, "peak": peak, "most": most, "errors": errors, "findings": findings}))
