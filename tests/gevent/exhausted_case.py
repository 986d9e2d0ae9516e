"""Nothing is patched; a greenlet keeps the only connection of a stock pool, and a second one wants it."""

# ruff: noqa: T201
import json
import os

import gevent
from playhouse import db_url
from playhouse.pool import PooledMySQLDatabase

from peewee_frameworks import connection_scope

database = PooledMySQLDatabase(**db_url.parse(os.environ["MYSQL_URL"]), max_connections=1, timeout=0)


def use(seconds):
    try:
        with connection_scope(database):
            found = database.execute_sql("SELECT 1").fetchall()[0][0]
            gevent.sleep(seconds)
            return found
    except Exception as error:
        return f"{type(error).__name__}: {error}"


first, second = gevent.spawn(use, 0.2), gevent.spawn(use, 0)
gevent.joinall([first, second])
print(json.dumps({"first": first.value, "second": second.value}))
