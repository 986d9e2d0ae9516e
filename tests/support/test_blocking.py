"""The judge of event loops finds what is our fault, and nothing else."""

from __future__ import annotations

import asyncio
import threading
import time

from peewee_frameworks import config
from peewee_frameworks.pool import PooledSqliteDatabase
from peewee_frameworks.pool.waiters import ThreadWaiter
from peewee_frameworks.spelling import nearly
from tests.support.blocking import unblocked


def judged(work, seconds=30.0):
    """Run callbacks that call `work` until the judge says something; give what it said."""

    async def main():
        with unblocked() as judge:
            end = time.monotonic() + seconds
            while not judge.guilty and time.monotonic() < end:
                asyncio.get_running_loop().call_soon(work)
                await asyncio.sleep(0)
            said, judge.guilty = judge.guilty, []
        return said

    return asyncio.run(main())


def test_our_code_that_waits_is_found():
    said = judged(lambda: ThreadWaiter(0.0).wait(0.3))
    assert said
    assert "waited" in said[0]
    assert "waiters.py" in said[0]


def test_our_code_that_computes_is_found():
    words = ["".join(chr(97 + (number * step) % 26) for step in range(60)) for number in range(2000)]
    said = judged(lambda: nearly("x" + words[7], words))
    assert said
    assert "computed" in said[0]
    assert "spelling.py" in said[0]


def test_the_applications_own_code_is_not_our_fault(tmp_path):
    db = PooledSqliteDatabase(str(tmp_path / "test.db"), max_connections=1)
    db.func("sleep")(time.sleep)
    db.connect()
    try:
        assert not judged(lambda: time.sleep(0.1), 0.3)
        assert not judged(lambda: db.execute_sql("SELECT sleep(0.1)").fetchall(), 0.3)
        assert not judged(lambda: sum(range(3_000_000)), 0.3)
    finally:
        db.close()
        db.pool.close()


def test_a_process_that_computes_elsewhere_is_not_our_fault():
    """Threads that take turns at the interpreter make everything late; the loop's thread waits in no call of ours."""
    end = threading.Event()

    def compute():
        while not end.is_set():
            sum(range(10_000))

    threads = [threading.Thread(target=compute) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        assert not judged(lambda: [config.safe_url("mysql://u@h/d") for _ in range(200)], 0.5)
    finally:
        end.set()
        for thread in threads:
            thread.join(10)
