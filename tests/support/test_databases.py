"""A place is a test's own, and the server tells who is connected to it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from peewee import OperationalError
from playhouse import db_url

from tests.support.process import ROOT


def test_the_server_sees_the_sessions_and_their_transactions(place, database):
    assert place.sessions() == []
    database.execute_sql("CREATE TABLE word (text VARCHAR(9))")
    assert len(place.sessions()) == 1
    if place.kind != "sqlite":
        with database.atomic():
            database.execute_sql("INSERT INTO word VALUES ('one')")
            assert [session.in_transaction for session in place.sessions()] == [True]
        assert [session.in_transaction for session in place.sessions()] == [False]
    database.close_all()
    assert place.sessions() == []


def test_url_and_pool_url_lead_to_the_same_tables(place, database):
    database.execute_sql("CREATE TABLE word (text VARCHAR(9))")
    for url in (place.url, place.pool_url(max_connections=3)):
        other = db_url.connect(url)
        assert other.get_tables() == ["word"]
        assert len(place.sessions()) == 2
        getattr(other, "close_all", other.close)()


def test_two_places_do_not_meet(database_kind, make_place):
    one, two = (make_place(database_kind).make_database() for _ in range(2))
    one.execute_sql("CREATE TABLE word (text VARCHAR(9))")
    assert two.get_tables() == []
    one.close_all()
    two.close_all()


def test_killed_sessions_are_gone(place, database):
    if place.kind == "sqlite":
        pytest.skip("SQLite has no server")
    database.connect()
    assert place.kill_sessions() == 1
    assert place.sessions() == []
    with pytest.raises(OperationalError):
        database.execute_sql("SELECT 1")


def test_a_cut_through_the_proxy_shows_as_an_error_and_round_trips_are_counted(place, proxy):
    database = place.via(*proxy.address).make_database()
    database.connect()
    before = proxy.counters.round_trips
    database.execute_sql("SELECT 1")
    assert proxy.counters.round_trips == before + 1
    proxy.cut()
    with pytest.raises(OperationalError):
        database.execute_sql("SELECT 1")
    database.close_all()


@pytest.mark.parametrize(("required", "outcome"), [("0", "1 skipped"), ("1", "1 failed")])
def test_a_missing_server_is_a_skip_or_a_failure(required, outcome, tmp_path, free_port):
    (tmp_path / "test_it.py").write_text(
        "from tests.support.servers import require_server\ndef test_it():\n    require_server('postgres')\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(ROOT),
            "PEEWEE_FRAMEWORKS_REQUIRE_SERVERS": required,
            "PEEWEE_FRAMEWORKS_POSTGRES_URL": f"postgresql://nobody:secret@127.0.0.1:{free_port}/none",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome in run.stdout, run.stdout + run.stderr
    assert "secret" not in run.stdout
