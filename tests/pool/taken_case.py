"""Connections are closed under the hands of threads that are inside a query, hundreds of times; with the URL as its argument.

In a process of its own, because a driver's C code may not survive that: freed memory of libpq, finalised statements of SQLite.
"""

from __future__ import annotations

import logging
import sys
import threading
import time

import peewee

from peewee_frameworks.pool import connect

USERS, ROUNDS, DEADLINE = 4, 150, 30.0
SLOW = {
    "mysql": "select %s, sleep(0.0005)",
    "postgres": "select %s, pg_sleep(0.0005)",
    "sqlite": "with recursive c(x) as (select 1 union all select x + 1 from c limit 5000) select count(*) + ? from c",
}

logging.disable(logging.WARNING)
db = connect(sys.argv[1], max_connections=USERS, timeout=DEADLINE)
ended = threading.Event()
refused: list[str] = []


def use() -> None:
    while not ended.is_set():
        try:
            with db.connection_context():
                for number in range(20):
                    db.execute_sql(SLOW[sys.argv[2]], (number,)).fetchone()
        except peewee.PeeweeException as error:
            refused.append(str(error))
        except Exception as error:  # a driver, in its own words, at a fetch
            refused.append(repr(error))


users = [threading.Thread(target=use, daemon=True) for _ in range(USERS)]
for user in users:
    user.start()
end, taken = time.monotonic() + DEADLINE, 0
while taken < ROUNDS and time.monotonic() < end:
    taken += db.pool.close_held()
    time.sleep(0.001)
ended.set()
for user in users:
    user.join(DEADLINE)
db.close()
with db.connection_context():
    assert db.execute_sql("select 1").fetchone() == (1,)
db.pool.close()
end = time.monotonic() + DEADLINE
# What must not be closed under its user is closed by the upkeep, and counts until it is.
while (db.pool.cut or db.pool.stats().total) and time.monotonic() < end:
    time.sleep(0.01)
print(  # noqa: T201 - what the test reads
    f"taken {taken >= ROUNDS}, hung {sum(user.is_alive() for user in users)}, open {db.pool.stats().total + len(db.pool.cut)}, "
    f"told {any('closed while it was in use' in text for text in refused)}"
)
