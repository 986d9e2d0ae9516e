"""A Celery worker with its gevent pool, on MariaDB: tasks are greenlets, each with a scope of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pymysql
import pytest

from tests.support.concurrency import eventually
from tests.support.drivers import ROOT, environment, require_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.databases import Place

CONNECTIONS, TASKS = 4, 40
SEND = """
import json, sys
from tests.gevent.celery_app import Row, database, look, overrun, work
database.create_tables([Row])
database.close()
look.delay()
for job, fail in json.loads(sys.argv[1]):
    work.delay(job, fail=fail)
overrun.apply_async((1000,), time_limit=0.3)
"""


@contextlib.contextmanager
def worker(env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    options = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    command = ["celery", "-A", "tests.gevent.celery_app", "worker", "-P", "gevent", "-c", "20", "-l", "INFO", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(10)


def rows(place: Place) -> list[Any]:
    connection = pymysql.connect(database=place.database, **place.connect_kwargs())
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT job, note FROM row ORDER BY job, id")
        return list(cursor.fetchall())


@pytest.mark.parametrize("pool", ["ours", "stock"])
def test_a_celery_worker_runs_tasks_as_greenlets(pool: str, make_place: Callable[[Any], Place], tmp_path: Path) -> None:
    """At the same time, over few connections: right, rolled back if they fail or overrun; and the worker ends when told to."""
    require_modules("celery")
    place, broker, log = make_place("mysql"), tmp_path / "broker", tmp_path / "worker.log"
    (broker / "control").mkdir(parents=True)
    env = {**os.environ, **environment(), "PLACE_URL": place.url, "POOL": pool, "BROKER": str(broker)}
    jobs = [(job, job % 5 == 0) for job in range(1, TASKS + 1)]
    done = subprocess.run(
        [sys.executable, "-c", SEND, json.dumps(jobs)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    with worker(env, log) as process:
        right = {job for job, fail in jobs if not fail}

        def finished() -> bool:
            assert process.poll() is None, log.read_text()
            text = log.read_text()
            return (
                text.count(" succeeded in ") == len(right) + 1
                and "Hard time limit" in text
                and text.count("asked to fail") >= TASKS // 5
            )

        eventually(finished, deadline=60, message="the tasks did not end")
        found = rows(place)
        assert (0, "") in found, "the diagnosis: nothing is wrong"
        assert [job for job, _ in found if job] == sorted([*right, *right])
        notes = {note for job, note in found if job}
        assert "another session" not in notes
        assert max(int(note.partition(" ")[2]) for note in notes - {"first"}) > 1, "at the same time"
        # The server notices only when its SLEEP is over or interrupted that somebody was struck and is gone.
        eventually(lambda: len([one for one in place.sessions() if one.query is None]) <= CONNECTIONS)
        assert not any(session.in_transaction for session in place.sessions() if session.query is None)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log.read_text()
