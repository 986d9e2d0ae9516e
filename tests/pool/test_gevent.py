"""The pool under gevent, patched and not; each case in a process of its own, for a patch cannot be undone."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("gevent")

STUB = """
import time
class Conn:
    in_transaction = False
    def close(self): pass
def connect():
    time.sleep(0.01)
    return Conn()
"""


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_patched_first_greenlets_share_the_pool_and_the_upkeep_is_greenlets():
    code = f"""
from gevent import monkey; monkey.patch_all()
import gevent, threading
from peewee_frameworks.pool import Pool, PoolOptions
{STUB}
pool = Pool(connect, PoolOptions(max_connections=3, timeout=5))
def work():
    conn = pool.acquire(); gevent.sleep(0.01); pool.release(conn)
start = time.monotonic()
jobs = [gevent.spawn(work) for _ in range(30)]
gevent.joinall(jobs, raise_error=True)
native = len([line for line in open("/proc/self/status") if line.startswith("Threads:\\t1\\n")])
print(pool.stats().idle, time.monotonic() - start < 1, native)
"""
    assert run(code) == "3 True 1"


def test_imported_before_the_patch_the_pool_still_works_for_its_lock_is_made_at_the_first_use():
    code = f"""
from peewee_frameworks.pool import Pool, PoolOptions
{STUB}
pool = Pool(connect, PoolOptions(max_connections=2, timeout=5))
from gevent import monkey; monkey.patch_all()
import gevent
def work():
    conn = pool.acquire(); gevent.sleep(0.01); pool.release(conn)
gevent.joinall([gevent.spawn(work) for _ in range(10)], raise_error=True)
print(pool.stats().idle)
"""
    assert run(code) == "2"


def test_used_before_the_patch_the_pool_still_works_for_it_does_no_io_under_its_lock():
    code = f"""
from peewee_frameworks.pool import Pool, PoolOptions
{STUB}
pool = Pool(connect, PoolOptions(max_connections=2, timeout=5))
pool.release(pool.acquire())
from gevent import monkey; monkey.patch_all()
import gevent
def work():
    conn = pool.acquire(); gevent.sleep(0.01); pool.release(conn)
gevent.joinall([gevent.spawn(work) for _ in range(10)], raise_error=True)
print(pool.stats().idle)
"""
    assert run(code) == "2"


def test_a_wait_in_an_unpatched_hub_lets_the_hub_go_on():
    """Rule 23, and better: the wait is the hub's own kind, so the holder can give back."""
    code = f"""
import gevent
from peewee_frameworks.pool import Pool, PoolOptions
{STUB}
pool = Pool(connect, PoolOptions(max_connections=1, timeout=5))
def work():
    conn = pool.acquire(); gevent.sleep(0.01); pool.release(conn)
start = time.monotonic()
gevent.joinall([gevent.spawn(work) for _ in range(5)], raise_error=True)
print(pool.stats().idle, time.monotonic() - start < 2)
"""
    assert run(code) == "1 True"


def test_a_killed_greenlet_gives_its_grant_to_the_next():
    code = f"""
from gevent import monkey; monkey.patch_all()
import gevent
from peewee_frameworks.pool import Pool, PoolOptions
{STUB}
pool = Pool(connect, PoolOptions(max_connections=1, timeout=5))
for _ in range(100):
    conn = pool.acquire()
    waiter = gevent.spawn(pool.acquire)
    gevent.sleep(0)
    pool.release(conn)
    waiter.kill()
    if not isinstance(waiter.value, gevent.GreenletExit):
        pool.release(waiter.value)  # it had been faster
    pool.release(pool.acquire())
print(pool.stats().idle, pool.stats().used, pool.stats().waiting)
"""
    assert run(code) == "1 0 0"


@pytest.mark.parametrize("patch", ["from gevent import monkey; monkey.patch_all()", "import gevent"])
def test_a_pool_that_idles_does_not_keep_the_hub_running(patch):
    """A script may end with ``gevent.wait()``: what looks after the pool waits, and is no work to wait for."""
    code = f"""
{patch}
import gevent
from peewee_frameworks.pool import Pool, PoolOptions
{STUB}
pool = Pool(connect, PoolOptions(max_connections=2, min_connections=1, stale_timeout=60, timeout=5))
done = []
def work():
    conn = pool.acquire(); gevent.sleep(0.01); pool.release(conn); done.append(True)
for _ in range(5):
    gevent.spawn(work)
print(gevent.wait(timeout=15), len(done), pool.stats().total > 0)
gevent.spawn(work)
print(gevent.get_hub().join(timeout=15), len(done))
"""
    assert run(code) == "True 5 True\nTrue 6"


def test_whoever_waits_for_ever_keeps_the_hub_running_until_the_server_is_back():
    """Nothing is under way between two attempts to connect but the upkeep's timer: that is no reason for a LoopExit."""
    code = f"""
from gevent import monkey; monkey.patch_all()
from peewee_frameworks.pool import Pool, PoolOptions
{STUB}
attempts = []
def late():
    attempts.append(True)
    if len(attempts) < 5:
        raise OSError("away")
    return connect()
pool = Pool(late, PoolOptions(max_connections=1, timeout=0, on_connect_error="retry"))
conn = pool.acquire()
print(type(conn).__name__, len(attempts))
"""
    assert run(code) == "Conn 5"


def test_mysql_under_gevent_queries_at_the_same_time():
    code = """
from gevent import monkey; monkey.patch_all()
import gevent, time
from peewee_frameworks.pool import connect
from tests.support.servers import server_url, unreachable
if unreachable("mysql"):
    print("ok")
    raise SystemExit
db = connect(server_url("mysql"), max_connections=10, timeout=5)
def work():
    with db.connection_context():
        db.execute_sql("select sleep(0.1)").fetchone()
gevent.joinall([gevent.spawn(work) for _ in range(10)], raise_error=True)
start = time.monotonic()
gevent.joinall([gevent.spawn(work) for _ in range(10)], raise_error=True)
print("ok" if time.monotonic() - start < 0.9 else time.monotonic() - start)
"""
    assert run(code) == "ok"
