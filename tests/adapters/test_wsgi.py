"""The framework-free WSGI middleware: the protocol, and Falcon on a real server."""

from __future__ import annotations

import gc
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import peewee
import pytest

from peewee_frameworks import connection_scope, current_scope
from peewee_frameworks.wsgi import PeeweeMiddleware
from tests.adapters.contract.apps.work import make_models
from tests.support.concurrency import eventually
from tests.support.load import hammer, statuses
from tests.support.webservers import gunicorn, werkzeug


@pytest.fixture
def db(make_place):
    database = make_place("sqlite").make_database(pragmas={"journal_mode": "wal", "foreign_keys": 1})
    yield database
    assert not database._in_use
    database.close_all()


@pytest.fixture
def models(db):
    item, part = make_models(db)
    db.create_tables([item, part])
    db.close()
    return item, part


class Call:
    """One request of a WSGI server: what it was answered, and the iterable that the server has to close."""

    def __init__(self, app, path="/", **environ):
        self.status = None
        self.environ = {"PATH_INFO": path, **environ}
        setup_testing_defaults(self.environ)
        self.body = app(self.environ, self.start_response)

    def start_response(self, status, headers, exc_info=None):
        self.status, self.headers = int(status.split()[0]), dict(headers)
        return bytearray().extend

    def read(self):
        try:
            return b"".join(self.body)
        finally:
            if hasattr(self.body, "close"):
                self.body.close()


def answer(start_response, body, status="200 OK"):
    start_response(status, [("Content-Type", "text/plain")])
    return body


def one(db):
    return str(db.execute_sql("SELECT 1").fetchone()[0]).encode()


# The scope


def test_a_finished_body_is_handed_on_and_the_request_is_over(db):
    """So that a server can look at its length."""
    body = [b"1"]

    def app(environ, start_response):
        assert one(db) == b"1"
        assert current_scope().label == "request GET /x"
        return answer(start_response, body)

    orm = PeeweeMiddleware(app, db)
    assert Call(orm, "/x").body is body
    assert not orm.runtime.in_flight()
    assert current_scope() is None


def test_the_end_of_an_application_waits_for_requests_that_have_asked_for_nothing_yet(db):
    """… in other threads."""
    begun, go = threading.Barrier(4), threading.Event()

    def app(environ, start_response):
        begun.wait(10)
        go.wait(10)
        return answer(start_response, [one(db)])

    orm = PeeweeMiddleware(app, db, close_timeout=30)
    orm.runtime.start()
    with ThreadPoolExecutor(4) as threads:
        requests = [threads.submit(lambda: Call(orm).read()) for _ in range(3)]
        begun.wait(10)
        stop = threads.submit(orm.runtime.stop)
        eventually(lambda: len(orm.runtime.live) == 3, message="it waits for them")
        assert not stop.done()
        go.set()
        assert [request.result(10) for request in requests] == [b"1"] * 3
        stop.result(10)
    assert not db._connections


def test_a_file_is_handed_on_for_the_server_to_send(db):
    file = FileWrapper(io.BytesIO(b"x"))
    orm = PeeweeMiddleware(lambda environ, start_response: answer(start_response, file), db)
    assert Call(orm, **{"wsgi.file_wrapper": FileWrapper}).body is file
    assert not orm.runtime.in_flight()


def test_each_part_of_a_stream_is_made_in_the_scope_and_sent_outside_it(db):
    """While a part is sent, the connection is back and the thread is the server's."""
    scopes = []

    def app(environ, start_response):
        def parts():
            for _ in range(3):
                scopes.append(current_scope())
                yield one(db)

        return answer(start_response, parts())

    orm = PeeweeMiddleware(app, db)
    call = Call(orm)
    for _ in range(3):
        assert next(call.body) == b"1"
        assert not db._in_use
        assert current_scope() is None
    call.read()
    assert len(set(scopes)) == 1
    assert scopes[0].ended
    assert not orm.runtime.in_flight()


def test_an_application_that_is_a_generator_starts_its_response_late(db):
    def app(environ, start_response):
        first = one(db)
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield first
        yield one(db)

    orm = PeeweeMiddleware(app, db, connect="eager")
    assert Call(orm).read() == b"11"
    assert not orm.runtime.in_flight()


def test_a_stream_inside_a_block_keeps_its_connection(db):
    def app(environ, start_response):
        def parts():
            with db.connection_context():
                yield one(db)
                yield one(db)

        return answer(start_response, parts())

    call = Call(PeeweeMiddleware(app, db))
    next(call.body)
    assert len(db._in_use) == 1
    call.read()


def test_with_request_end_the_connection_stays_for_the_whole_response(db):
    def app(environ, start_response):
        one(db)
        return answer(start_response, iter([b"1", b"2"]))

    call = Call(PeeweeMiddleware(app, db, release="request_end"))
    next(call.body)
    assert len(db._in_use) == 1
    call.read()


def test_an_application_that_raises_ends_its_request(db):
    def app(environ, start_response):
        one(db)
        raise RuntimeError("asked for")

    orm = PeeweeMiddleware(app, db)
    with pytest.raises(RuntimeError, match="asked for"):
        Call(orm)
    assert not orm.runtime.in_flight()
    assert current_scope() is None


@pytest.mark.parametrize("kind", ["no body", "a body that fails"])
def test_a_body_that_cannot_be_iterated_ends_its_request(db, kind):
    """The server never gets it, so it is closed here."""
    closed = []

    class Failing:
        def __iter__(self):
            one(db)
            raise LookupError("asked for")

        def close(self):
            closed.append(one(db))

    def app(environ, start_response):
        one(db)
        return answer(start_response, None if kind == "no body" else Failing())

    wrapped = PeeweeMiddleware(app, db)
    with pytest.raises((LookupError, TypeError)):
        Call(wrapped)
    assert closed == ([] if kind == "no body" else [b"1"])
    assert current_scope() is None
    assert not db._in_use
    assert not wrapped.runtime.in_flight()


def test_a_list_with_an_iteration_of_its_own_is_made_in_the_scope(db):
    class Rows(list):
        def __iter__(self):
            return iter([one(db)])

    call = Call(PeeweeMiddleware(lambda environ, start: answer(start, Rows([b""])), db))
    assert call.read() == b"1"
    assert not db._in_use


def test_a_body_whose_close_raises_ends_its_request(db):
    class Body:
        def __iter__(self):
            yield one(db)

        def close(self):
            assert current_scope() is not None
            one(db)
            raise RuntimeError("asked for")

    orm = PeeweeMiddleware(lambda environ, start_response: answer(start_response, Body()), db)
    with pytest.raises(RuntimeError, match="asked for"):
        Call(orm).read()
    assert not orm.runtime.in_flight()


@pytest.mark.parametrize("release", ["response_start", "request_end"])
def test_a_body_that_nobody_closes_is_ended_by_the_next_request(db, release):
    """Test clients do that."""

    def app(environ, start_response):
        one(db)
        return answer(start_response, iter([b"1"]))

    orm = PeeweeMiddleware(app, db, release=release)
    Call(orm)
    gc.collect()  # `Call` is in a cycle with its body
    Call(orm).read()
    assert not orm.runtime.in_flight()


def test_a_scope_around_lends_the_pools_only_connection(make_place):
    """As a test does that queries, asks the application, and queries again."""
    db = make_place("sqlite").make_database(max_connections=1, timeout=0.1)
    orm = PeeweeMiddleware(lambda environ, start_response: answer(start_response, [one(db)]), db)
    with connection_scope(db):
        one(db)
        assert Call(orm).read() == b"1"
        assert one(db) == b"1"
    db.close_all()


def test_it_keeps_to_the_specification(db):
    def app(environ, start_response):
        assert one(db) == b"1"
        return answer(start_response, iter([b"x"] if environ["PATH_INFO"] == "/stream" else [b"y"]))

    checked = validator(PeeweeMiddleware(validator(app), db))
    for path in ("/stream", "/list"):
        environ = {"PATH_INFO": path, "SCRIPT_NAME": "", "QUERY_STRING": ""}
        assert Call(checked, **environ).read()


# Options


def test_an_atomic_request_is_committed_before_its_first_byte(db, models):
    item, _ = models

    def app(environ, start_response):
        item.create(owner="x")
        assert db.in_transaction()
        status = environ["PATH_INFO"][1:] + " Status"
        start_response(status, [("Content-Type", "text/plain")])
        assert not db.in_transaction()
        return iter([str(item.select().count()).encode()])

    orm = PeeweeMiddleware(app, db, transaction=True)
    assert Call(orm, "/200").read() == b"1"
    assert Call(orm, "/409").read() == b"1"


@pytest.mark.parametrize("errors", [True, False])
def test_a_commit_that_fails_is_no_success(db, models, errors):
    _, part = models

    def app(environ, start_response):
        part.create(item=-1)
        return answer(start_response, [b"stored"])

    orm = PeeweeMiddleware(app, db, transaction=True, errors=errors)
    if errors:
        call = Call(orm)
        assert (call.status, call.read()) == (409, b'{"detail": "The request conflicts with the stored data."}')
    else:
        with pytest.raises(peewee.IntegrityError):
            Call(orm)
    with db:
        assert part.select().count() == 0


def test_excluded_paths_are_neither_eager_nor_atomic(db):
    def app(environ, start_response):
        return answer(start_response, [str(len(db._in_use)).encode()])

    orm = PeeweeMiddleware(
        app, db, connect="eager", exclude=["/health*", "/caf\u00e9", lambda environ: "NO_DB" in environ]
    )
    assert Call(orm, "/").read() == b"1"
    assert Call(orm, "/health/live").read() == b"0"
    assert Call(orm, "/caf\u00e9".encode().decode("latin-1")).read() == b"0"  # as servers hand paths on
    assert Call(orm, "/", NO_DB="1").read() == b"0"


def test_errors_become_responses_by_option(db, models):
    item, _ = models

    def app(environ, start_response):
        return answer(start_response, [item.get(item.owner == "nobody").owner])

    call = Call(PeeweeMiddleware(app, db, errors=True))
    assert (call.status, call.headers["Content-Type"]) == (404, "application/json")
    with pytest.raises(peewee.DoesNotExist):
        Call(PeeweeMiddleware(app, db))


def test_an_exception_that_becomes_a_response_rolls_back_whatever_its_status(db, models):
    """As under ASGI: `rollback_on` is for the responses of the application."""
    item, _ = models

    def app(environ, start_response):
        item.create(owner="x")
        return answer(start_response, [item.get(item.owner == "nobody").owner])

    call = Call(PeeweeMiddleware(app, db, transaction=True, errors=True, rollback_on=range(500, 600)))
    assert call.status == 404
    with db:
        assert item.select().count() == 0


# Applications in applications


def test_an_inner_application_shares_the_scope_and_adds_its_options(db, models):
    """Two Peewee on one database, one inside the other: one connection, atomic because the inner one says so."""
    item, _ = models

    def app(environ, start_response):
        item.create(owner="x")
        assert db.in_transaction()
        return answer(start_response, [str(len(db._in_use)).encode()], "409 Conflict")

    orm = PeeweeMiddleware(PeeweeMiddleware(PeeweeMiddleware(app, db), db, transaction=True), db)
    assert Call(orm).read() == b"1"
    with db:
        assert item.select().count() == 0


def test_databases_that_the_outer_application_lacks_are_added(db, make_place):
    other = make_place("sqlite").make_database()

    def app(environ, start_response):
        assert one(db) == one(other) == b"1"
        return answer(start_response, iter([f"{len(db._in_use)} {len(other._in_use)}".encode()]))

    outer = PeeweeMiddleware(PeeweeMiddleware(app, other, connect="eager"), db, connect="eager")
    assert Call(outer).read() == b"1 1"
    assert not outer.runtime.in_flight()
    other.close_all()


def test_a_dispatcher_that_tries_applications_in_turn_gives_each_a_scope(db):
    def missing(environ, start_response):
        one(db)
        return answer(start_response, [b""], "404 Not Found")

    def found(environ, start_response):
        return answer(start_response, [one(db)])

    apps = [PeeweeMiddleware(app, db) for app in (missing, found)]

    def cascade(environ, start_response):
        apps[0](environ, lambda *_: None)
        return apps[1](environ, start_response)

    assert Call(cascade).read() == b"1"


def test_the_next_application_of_a_dispatcher_is_still_inside_the_one_around(db, models, make_place):
    """… which has begun a transaction; the application before it had a database more."""
    item = models[0]
    other = make_place("sqlite").make_database()

    def missing(environ, start_response):
        return answer(start_response, [one(other)], "404 Not Found")

    def found(environ, start_response):
        item.create(owner="found")
        return answer(start_response, [str(len(db._in_use)).encode()])

    apps = [PeeweeMiddleware(missing, {"default": db, "other": other}), PeeweeMiddleware(found, db)]

    def cascade(environ, start_response):
        item.create(owner="around")
        apps[0](environ, lambda *_: None)
        body = apps[1](environ, lambda *_: None)
        start_response("409 Conflict", [])
        return body

    assert Call(PeeweeMiddleware(cascade, db, transaction=True)).read() == b"1"
    with connection_scope(db):
        assert not item.select().count()
    other.close_all()


# Falcon


@pytest.mark.parametrize("server", [gunicorn, werkzeug])
def test_falcon_on_a_real_server(place, server):
    """96 requests at once on 5 connections, among them errors and streams: nothing stays out, nothing was shared."""
    environment = {"DATABASE_URL": place.pool_url(max_connections=5, timeout=10)}
    with server("tests.adapters.served_falcon:make_app", factory=True, env=environment) as process:
        process_paths = [
            f"/{kind}/r{number}"
            for number in range(16)
            for kind in ("ok", "error", "missing", "lost", "stream", "atomic")
        ]
        results = hammer(process.url, process_paths, concurrency=40)
        assert statuses(results) == {200: 32, 500: 16, 404: 32, 409: 16}, process.output[-3000:]
        for result in results:
            if result.status == 200:
                rid = result.request.path.rpartition("/")[2]
                assert result.text == (rid * 3 if "stream" in result.request.path else rid)

        def stats():
            with process.client() as client:
                return client.get("/stats").json()

        found = eventually(lambda: found if not (found := stats())["in_use"] else None)
        assert found["violations"] == []
        assert found["count"] == 0  # all atomic requests were rolled back by their status
        assert found["peak"] <= 5


@pytest.mark.parametrize("more", [False, True], ids=["its scope", "a scope of its own"])
def test_an_exception_that_the_application_around_answers_rolls_back_what_it_came_from(db, models, make_place, more):
    """… and no more: what the application around writes then is kept."""
    item, _ = models
    other = make_place("sqlite").make_database()

    def failing(environ, start_response):
        item.create(owner="inside")
        raise LookupError("asked for")

    inner = PeeweeMiddleware(failing, {"default": db, "other": other} if more else db, transaction=True)

    def around(environ, start_response):
        try:
            return inner(environ, start_response)
        except LookupError:
            item.create(owner="around")
            return answer(start_response, [b"sorry"])

    call = Call(PeeweeMiddleware(around, db))
    assert (call.status, call.read()) == (200, b"sorry")
    with connection_scope(db):
        assert [each.owner for each in item.select()] == ["around"]
