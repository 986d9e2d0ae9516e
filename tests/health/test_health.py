"""What is said of the databases: readiness, the status document, the points of the plots."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest

from peewee_frameworks.doctor import live
from peewee_frameworks.errors import ConfigurationError, PoolTimeout
from peewee_frameworks.extension import Extension
from peewee_frameworks.health import HOLDERS_TOLD, Health
from peewee_frameworks.health.history import KEPT, Series, percentile
from peewee_frameworks.pool import PooledSqliteDatabase
from peewee_frameworks.pool.stats import Histogram, PoolStats
from tests.health.helpers import PATIENCE, all_held, health_of, make_database
from tests.support.concurrency import eventually

SERVERS = pytest.mark.parametrize("database_kind", ["mysql", "postgres"], indirect=True)


@pytest.fixture
def lite(make_place):
    return make_database(make_place("sqlite"))


def body(answer):
    return json.loads(answer.body)


def take_one(database):
    with database.connection_context():
        database.execute_sql("SELECT 1")


# -- readiness ----------------------------------------------------------------------------------------------------------


def test_it_is_ok_while_the_databases_answer_and_the_pool_has_room(lite):
    with health_of(lite) as health:
        answer = health.answer("ready", {})
        assert (answer.status, body(answer)) == (200, {"status": "ok"})


def test_a_full_pool_is_no_trouble_until_somebody_waits(lite):
    with health_of(lite) as health, all_held(lite, 2):
        assert health.readiness().status == "ok"
        thread = threading.Thread(target=take_one, args=[lite], daemon=True)
        thread.start()
        eventually(lambda: lite.pool.stats().waiting)
        found = health.readiness()
        assert found.status == "degraded"
        assert found.databases["default"].reason == "All 2 connections are in use, and 1 wait."
        answer = health.answer("ready", {})
        assert (answer.status, body(answer)) == (200, {"status": "degraded"})
    thread.join(PATIENCE)


def test_playhouses_pool_does_not_know_who_waits_so_it_is_degraded_when_it_is_full(make_place):
    database = make_database(make_place("sqlite"), ours=False, max_connections=2)
    with health_of(database) as health:
        with all_held(database, 1):
            assert health.readiness().status == "ok"
        with all_held(database, 2):
            assert health.readiness().status == "degraded"


@SERVERS
def test_a_silent_server_makes_it_unavailable_and_says_why_to_those_who_may_know(place, proxy):
    with health_of(make_database(place.via(*proxy.address)), timeout=0.3) as health:
        eventually(lambda: health.readiness().status == "ok")
        proxy.deafen()
        proxy.hang()
        answer = health.answer("ready", {})
        assert (answer.status, body(answer)) == (503, {"status": "unavailable"})
        verbose = health.answer("ready", {"verbose": ""})
        assert verbose.status == 503
        assert set(body(verbose)["databases"]["default"]) == {"status", "seconds", "reason"}
        proxy.cut()


@SERVERS
def test_a_server_that_answers_but_opens_no_further_connection_makes_it_degraded(place, proxy):
    database = make_database(place.via(*proxy.address))
    with health_of(database) as health:
        with database.connection_context():
            database.execute_sql("SELECT 1")
        proxy.refuse()
        found = health.readiness()
        assert found.status == "degraded"
        assert "opens no further connection" in found.databases["default"].reason


def test_the_worst_database_decides_and_the_others_are_asked_all_the_same(lite, tmp_path):
    other = PooledSqliteDatabase(str(tmp_path / "nowhere" / "other.db"))
    orm = Extension({"default": lite, "other": other}, check="off")
    found = Health(orm, 10).readiness()
    assert found.status == "unavailable"
    assert {alias: each.status for alias, each in found.databases.items()} == {"default": "ok", "other": "unavailable"}
    lite.close_all()


def test_before_the_configuration_is_read_it_is_unavailable():
    health = Health(Extension())
    answer = health.answer("ready", {"verbose": ""})
    assert answer.status == 503
    assert "init_app" in body(answer)["reason"]
    assert body(health.answer("ready", {})) == {"status": "unavailable"}
    assert health.answer("status", {}).status == 200


def test_a_closed_pool_and_a_stopping_application_are_unavailable(lite):
    with health_of(lite) as health:
        lite.pool.close()
        assert health.readiness().databases["default"].reason == "The pool is closed."
        lite.pool.open()
        assert health.readiness().status == "ok"
        lite.pool.suspend()
        assert health.readiness().status == "degraded"
        lite.pool.resume()
    assert health.readiness().problem == "The application is stopping."


def test_an_application_that_starts_again_is_ready_again(lite):
    orm = Extension(lite, check="off")
    health = Health(orm, 10)
    for _ in range(2):
        orm.runtime.start()
        assert health.readiness().status == "ok"
        orm.runtime.stop()
        assert health.readiness().status == "unavailable"


@SERVERS
def test_stopping_the_application_closes_the_probes_connection(place):
    database = make_database(place)
    with health_of(database) as health:
        assert health.readiness().status == "ok"
        assert len(place.sessions()) >= 1
    eventually(lambda: not place.sessions())


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_that_is_none_is_refused(lite, timeout):
    with pytest.raises(ConfigurationError, match="probe_timeout"):
        Health(Extension(lite), timeout)


def test_liveness_asks_nobody(lite):
    health = Health(Extension(lite, check="off"))
    lite.pool.close()
    assert health.answer("live", {}).status == 200


# -- the status document --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "playhouse"])
def test_the_document_is_what_the_command_line_reads(make_place, ours):
    with health_of(make_database(make_place("sqlite"), ours, max_connections=3)) as health:
        status = live.parse(health.answer("status", {}).body, "here")
        pool = status.pools["default"]
        assert (pool.used, pool.size) == (0, 3)
        assert (pool.waiting is None) is not ours
        table = live.Table()
        table.add(status)
        assert len(table.render().splitlines()) == 2


def test_it_tells_who_holds_a_connection(lite):
    with health_of(lite) as health, health._orm.scope("job 7"):
        lite.execute_sql("SELECT 1")
        (holder,) = body(health.answer("status", {}))["holders"]
        assert (holder["label"], holder["alias"], holder["leaked"]) == ("job 7", "default", False)


def test_it_tells_what_has_happened(lite):
    with health_of(lite) as health:
        with all_held(lite, 2), pytest.raises(PoolTimeout):
            lite.pool.acquire(timeout=0.01)
        lite.pool.invalidate_all("the password was changed")
        events = body(health.answer("status", {}))["events"]
        assert [event["kind"] for event in events] == ["invalidate", "timeout"]  # the latest first
        assert events[0]["text"] == "the password was changed"
        assert events[0]["pool"] == "default"


def test_of_very_many_holders_it_tells_the_longest(make_place):
    database = make_database(make_place("sqlite"), max_connections=103)
    with health_of(database) as health:
        conns = [database.pool.acquire() for _ in range(103)]
        document = body(health.answer("status", {}))
        assert document["pools"]["default"]["used"] == 103
        assert len(document["holders"]) == HOLDERS_TOLD
        seconds = [holder["seconds"] for holder in document["holders"]]
        assert seconds == sorted(seconds, reverse=True)
        for conn in conns:
            database.pool.release(conn)


def test_a_suspected_leak_is_told_with_the_unit_of_work(make_place):
    database = make_database(make_place("sqlite"), leak_threshold=0.05)
    with health_of(database) as health:
        with health._orm.scope("job 7"):
            database.execute_sql("SELECT 1")
            (event,) = eventually(lambda: body(health.answer("status", {}))["events"])
        assert event["kind"] == "leak"
        assert event["text"].endswith(" s, by job 7.")


@SERVERS
def test_no_password_is_in_it(place, proxy):
    secret = "hunter2-and-more"
    proxy.refuse()
    kwargs = {**place.via(*proxy.address).kwargs, "password": secret}
    database = make_database(replace(place, kwargs=kwargs))
    orm = Extension(database, check="off")
    health = Health(orm, 10)
    with pytest.raises(Exception, match=r"refused|connect"):
        database.connect()
    told = health.answer("status", {}).body + health.answer("ready", {"verbose": ""}).body
    assert b"refused" in told or b"connect" in told
    assert secret.encode() not in told
    database.close_all()


def test_two_mounts_of_one_application_do_not_count_an_event_twice(lite):
    orm = Extension(lite, check="off")
    one, other = Health(orm), Health(orm)
    one.answer("status", {})
    one.answer("status", {})
    lite.pool.invalidate_all("once")
    for health in (one, other):
        assert len(body(health.answer("status", {}))["events"]) == 1
    lite.close_all()


# -- the points of the plots ----------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def moment(**known):
    return {"default": PoolStats(name="shop", max_connections=2, **known)}


def histogram(*seconds_in_bucket, total):
    buckets = (*seconds_in_bucket, *[0] * (10 - len(seconds_in_bucket)))
    return Histogram(sum(buckets), total, buckets)


def series_of(*moments):
    clock, queue = Clock(), list(moments)
    series = Series(lambda: queue.pop(0), lambda: None, clock)
    for _ in moments:
        series.take()
        clock.now += 2.0
    return series.since(0)["default"]


def test_a_point_tells_what_has_happened_since_the_one_before():
    first, second = series_of(
        moment(used=1, checkouts=10, timeouts=0, use_time=histogram(4, total=0.002)),
        moment(used=2, checkouts=14, timeouts=1, use_time=histogram(4, 0, 2, total=0.018)),
    )
    assert (first.used, first.checkouts, first.use_mean) == (1, None, None)
    assert (second.used, second.checkouts, second.timeouts) == (2, 2.0, 1)
    assert second.use_mean == pytest.approx(0.008)
    assert 0.005 < second.use_p95 <= 0.01
    assert second.wait_mean is None  # nobody waited, or nobody knows


def test_a_pool_that_was_disposed_of_counts_from_nothing_again():
    _, second = series_of(
        moment(checkouts=100, use_time=histogram(100, total=1.0)),
        moment(checkouts=3, use_time=histogram(3, total=0.003)),
    )
    assert second.checkouts == 1.5
    assert second.use_mean == pytest.approx(0.001)


def test_points_are_a_second_apart_and_the_oldest_go():
    clock, asked = Clock(), []
    series = Series(lambda: asked.append(clock.now) or moment(), lambda: 3, clock)
    for _ in range(10):
        series.take()
        clock.now += 0.25
    assert asked == [100.0, 101.0, 102.0]
    for _ in range(KEPT * 2):
        clock.now += 1.0
        series.take()
    points = series.since(0)["default"]
    assert len(points) == KEPT
    assert points[0].queued == 3
    assert series.since(points[-2].at)["default"] == points[-1:]
    assert series.latest == points[-1].at


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [([1], 0.00095), ([0, 10], 0.0048), ([19, 1], 0.001), ([0] * 9 + [4], 10.0), ([10, 0, 0, 10], 0.046)],
)
def test_a_percentile_lies_evenly_within_its_bucket(buckets, expected):
    assert percentile([*buckets, *[0] * (10 - len(buckets))], 0.95) == pytest.approx(expected)


# -- the page ---------------------------------------------------------------------------------------------------------------


def test_the_page_may_load_nothing_and_be_framed_by_nobody(lite):
    page = Health(Extension(lite)).answer("", {})
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in policy
    text = page.body.decode()
    nonce = policy.partition("'nonce-")[2].partition("'")[0]
    assert text.count(f'nonce="{nonce}"') == 2
    assert "{{" not in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    again = Health(Extension(lite)).answer("", {}).headers["Content-Security-Policy"]
    assert again != policy
