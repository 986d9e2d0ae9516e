"""The probe: a connection beside the pool, one question at a time, an answer in time whatever the server does."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import Any

import pytest
from playhouse.pwasyncio import AsyncMySQLDatabase, AsyncPostgresqlDatabase, AsyncSqliteDatabase

from peewee_frameworks.aio.psycopg import AsyncPsycopgDatabase
from peewee_frameworks.health.probe import NoAnswer, Outcome, Probe, probe_of
from peewee_frameworks.state import install
from tests.health.helpers import PATIENCE, POOLED, all_held, make_database
from tests.support.concurrency import eventually, run_threads

OURS_AND_STOCK = pytest.mark.parametrize("ours", [True, False], ids=["ours", "playhouse"])
SERVERS = pytest.mark.parametrize("database_kind", ["mysql", "postgres"], indirect=True)
SHORT = 0.3


def ask(probe: Probe, timeout: float = PATIENCE) -> Outcome:
    """Ask as `Health.readiness` does."""
    future = probe.start(timeout)
    try:
        return future.result(timeout)
    except TimeoutError:
        return probe.give_up(future)


@pytest.fixture
def probing():
    """Make the probe of a database; closed at the end, with the database."""
    probes: list[tuple[Probe, Any]] = []

    def make(database: Any) -> Probe:
        probe = probe_of(install(database))
        probes.append((probe, database))
        return probe

    yield make
    for probe, database in probes:
        probe.close()
        database.close_all()


@OURS_AND_STOCK
def test_it_asks_on_a_connection_of_its_own_although_the_pool_has_none_left(place, probing, ours):
    database = make_database(place, ours, max_connections=2)
    probe = probing(database)
    with all_held(database, 2):
        before = len(place.sessions())
        for _ in range(3):
            assert ask(probe).error is None
        # SQLite's is opened for each question, since a file that was deleted stays open; it may keep a descriptor for later.
        assert len(place.sessions()) - before in ((0, 1) if place.kind == "sqlite" else (1,))
        assert len(database._in_use) == 2


@SERVERS
@OURS_AND_STOCK
def test_a_server_that_is_silent_is_given_up_and_asked_again_when_it_speaks(place, proxy, probing, ours):
    database = make_database(place.via(*proxy.address), ours)
    probe = probing(database)
    assert ask(probe).error is None
    proxy.hang()
    proxy.deafen()
    for _ in range(3):
        assert ask(probe, SHORT).error is not None
    proxy.restore()
    eventually(lambda: ask(probe).error is None, PATIENCE, "the server answers again")
    proxy.cut()


@SERVERS
def test_a_silent_server_costs_one_thread_and_one_connection_however_many_ask(place, proxy, probing):
    database = make_database(place.via(*proxy.address))
    probe = probing(database)
    proxy.hang()
    before = proxy.counters.accepted

    def workers() -> int:
        return sum(thread.name.startswith("peewee-pool-worker") for thread in threading.enumerate())

    idle = workers()  # of tests before, perhaps
    futures = run_threads(16, lambda _: probe.start(1.0))
    assert len({id(future) for future in futures}) == 1
    eventually(lambda: proxy.counters.accepted > before)
    assert proxy.counters.accepted == before + 1
    assert workers() <= max(idle, 1)
    assert isinstance(probe.give_up(futures[0]).error, NoAnswer)
    assert futures[0].result(PATIENCE).error is not None  # the thread comes back by itself
    proxy.cut()


@SERVERS
def test_a_connection_that_the_server_has_closed_is_no_answer(place, probing):
    probe = probing(make_database(place))
    assert ask(probe).error is None
    assert place.kill_sessions() == 1
    assert ask(probe).error is None


@SERVERS
def test_closing_it_ends_its_session_and_the_next_question_opens_another(place, probing):
    probe = probing(make_database(place))
    ask(probe)
    assert len(place.sessions()) == 1
    probe.close()
    eventually(lambda: not place.sessions(), message="the session is still there")
    assert ask(probe).error is None


@SERVERS
def test_closing_it_while_it_hangs_leaves_nothing_behind(place, proxy, probing):
    probe = probing(make_database(place.via(*proxy.address)))
    assert ask(probe).error is None
    proxy.deafen()
    future = probe.start(PATIENCE)
    eventually(lambda: probe._run is not None and probe._run.conn is not None)
    probe.close()
    assert future.result(PATIENCE).error is not None
    proxy.restore()  # while it is deaf it does not see who hangs up
    proxy.wait_live(0)


@SERVERS
def test_a_server_that_refuses_is_told_from_one_that_is_silent(place, proxy, probing):
    database = make_database(place.via(*proxy.address))
    probe = probing(database)
    proxy.refuse()
    error = ask(probe).error
    assert error is not None
    assert not isinstance(error, NoAnswer)


@SERVERS
def test_a_server_that_is_full_up_is_asked_on_an_idle_connection_if_nobody_wants_it(place, proxy, probing):
    database = make_database(place.via(*proxy.address))
    probe = probing(database)
    with database.connection_context():
        database.execute_sql("SELECT 1")
    proxy.refuse()
    outcome = ask(probe)
    assert outcome.error is None
    assert outcome.refused is not None
    assert (database.pool.stats().used, database.pool.stats().idle) == (0, 1)
    with all_held(database, 1):
        assert ask(probe).error is not None
    proxy.restore()
    assert ask(probe).refused is None


@SERVERS
def test_a_forked_child_leaves_the_parents_connection_alone(place, probing):
    probe = probing(make_database(place))
    ask(probe)
    sessions = {session.id for session in place.sessions()}
    pid = os.fork()
    if pid == 0:
        fine = probe._conn is None and ask(probe).error is None
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ask(probe).error is None
    assert sessions <= {session.id for session in place.sessions()}


def test_a_file_that_cannot_be_opened_is_no_answer(tmp_path, probing):
    probe = probing(POOLED["sqlite"](str(tmp_path / "nowhere" / "shop.db")))
    assert isinstance(ask(probe).error, Exception)
    (tmp_path / "nowhere").mkdir()
    assert ask(probe).error is None


def test_a_file_that_somebody_locks_is_waited_for_no_longer_than_was_said(tmp_path, probing):
    database = POOLED["sqlite"](str(tmp_path / "shop.db"), timeout=PATIENCE * 4)
    probe = probing(database)
    with database.connection_context():
        database.execute_sql("CREATE TABLE t (x)")
        with database.atomic("EXCLUSIVE"):
            future = probe.start(SHORT)
            assert future.result(PATIENCE).error is not None
    assert ask(probe).error is None


def test_a_database_in_memory_is_not_opened_a_second_time(probing):
    database = POOLED["sqlite"](":memory:")
    probe = probing(database)
    assert ask(probe).error is None
    assert probe._conn is None


def make_async(kind: Any, place: Any) -> Any:
    kwargs = dict(place.kwargs)
    if kind is AsyncPostgresqlDatabase:  # asyncpg has other names for the rest
        kwargs = {name: kwargs[name] for name in ("host", "port", "user")}
        kwargs["server_settings"] = {"application_name": place.tag}
    sizes = {"min_size": 1} if kind is AsyncPsycopgDatabase else {"pool_size": 2, "acquire_timeout": 5}
    return kind(place.database, **sizes, **kwargs)


@pytest.mark.parametrize(
    ("database_kind", "cls"),
    [
        ("mysql", AsyncMySQLDatabase),
        ("postgres", AsyncPostgresqlDatabase),
        ("postgres", AsyncPsycopgDatabase),
        ("sqlite", AsyncSqliteDatabase),
    ],
    indirect=["database_kind"],
)
class TestAsynchronousDatabases:
    pytestmark = pytest.mark.anyio

    async def test_they_are_asked_beside_their_pool_and_nothing_is_left(self, place, cls, responsive_loop):
        database = make_async(cls, place)
        probe = probe_of(install(database))
        outcomes = await asyncio.gather(*(probe.ask(PATIENCE) for _ in range(8)))
        assert {outcome.error for outcome in outcomes} == {None}
        assert len({id(outcome) for outcome in outcomes}) == 1
        assert (await probe.ask(PATIENCE)).error is None
        await asyncio.to_thread(eventually, lambda: not place.sessions(), message="a session is left")

    async def test_a_silent_server_is_given_up(self, place, cls, proxy, responsive_loop):
        database = make_async(cls, place.via(*proxy.address))
        probe = probe_of(install(database))
        proxy.hang()
        assert isinstance((await probe.ask(SHORT)).error, NoAnswer)
        proxy.restore()
        outcome = await probe.ask(PATIENCE)
        if outcome.error is not None:  # it had joined the question that was given up
            outcome = await probe.ask(PATIENCE)
        assert outcome.error is None
        proxy.cut()


@pytest.mark.anyio
async def test_a_sync_database_never_blocks_the_loop_that_asks(tmp_path, responsive_loop):
    """Not even one whose file is locked."""
    database = POOLED["sqlite"](str(tmp_path / "shop.db"))
    probe = probe_of(install(database))
    locked, free = threading.Event(), threading.Event()

    def lock() -> None:
        with database.connection_context(), database.atomic("EXCLUSIVE"):
            locked.set()
            free.wait(PATIENCE)

    thread = threading.Thread(target=lock, daemon=True)
    thread.start()
    await asyncio.to_thread(locked.wait, PATIENCE)
    assert (await probe.ask(SHORT)).error is not None
    free.set()
    await asyncio.to_thread(thread.join, PATIENCE)
    end = time.monotonic() + PATIENCE
    while (await probe.ask(PATIENCE)).error is not None:
        assert time.monotonic() < end
    database.close_all()
