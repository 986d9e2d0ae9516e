"""What is Flask's own: contexts, signals, error handlers, async views, the command line. See contract/ for the rest."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import click
import peewee
import pytest
from flask import (
    Blueprint,
    Flask,
    Response,
    copy_current_request_context,
    g,
    got_request_exception,
    request,
    stream_with_context,
)
from flask.cli import FlaskGroup
from flask.globals import app_ctx
from starlette.applications import Starlette
from werkzeug.exceptions import HTTPException
from werkzeug.wsgi import ClosingIterator

from peewee_frameworks import ConfigurationError, DatabaseUnavailable, ScopeEnded, connection_scope, current_scope
from peewee_frameworks.flask import Peewee
from tests.adapters.contract.apps.work import make_models
from tests.support.concurrency import eventually, run_threads
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
    return SimpleNamespace(Item=item, Part=part)


def one(db):
    return str(db.execute_sql("SELECT 1").fetchone()[0])


def make_app(orm, *before):
    """Make an application that answers with what its route does: see the tests."""
    app = Flask("shop")
    for prepare in before:
        prepare(app)
    orm.init_app(app)

    @app.get("/")
    def index():
        return one(orm.database)

    @app.get("/held")
    def held():
        return str(len(orm.database._in_use))

    return app


def rows(models):
    with models.Item._meta.database:
        return models.Item.select().count()


# Installing


def test_init_app_connects_nothing(db):
    """A server may fork afterwards."""
    make_app(Peewee(db, connect="eager", transaction=True))
    assert not db._in_use
    assert not db._connections


def test_init_app_twice_is_refused_by_name(db):
    orm = Peewee(db)
    app = make_app(orm)
    with pytest.raises(ConfigurationError, match=r"twice on the Flask application 'shop'"):
        orm.init_app(app)
    assert app.extensions["peewee"] == [orm]


def test_one_peewee_serves_several_applications(db):
    orm = Peewee(db)
    for _ in range(2):
        app = make_app(orm)
        assert app.test_client().get("/").text == "1"
    assert not orm.runtime.in_flight()


def test_applications_of_one_peewee_have_the_same_settings(db):
    orm = Peewee(db)
    make_app(orm)
    with pytest.raises(ConfigurationError, match="<Flask 'shop'> has other PEEWEE_… settings"):
        make_app(orm, lambda app: app.config.update(PEEWEE_TRANSACTION=True))


def test_one_application_has_several_databases(db, make_place):
    other = make_place("sqlite").make_database()
    orm, second = Peewee(db), Peewee(other, transaction=True)
    app = make_app(orm)
    second.init_app(app)

    @app.get("/both")
    def both():
        return one(db) + one(other) + f" {db.in_transaction()} {other.in_transaction()}"

    assert app.test_client().get("/both").text == "11 False True"
    with app.app_context():
        assert one(db) + one(other) == "11"
        assert (len(db._in_use), len(other._in_use)) == (1, 1)
    assert (len(db._in_use), len(other._in_use)) == (0, 0)
    assert current_scope() is None
    other.close_all()


def test_the_database_may_be_named_in_the_config(make_place):
    place = make_place("sqlite")
    orm = Peewee()

    class Note(orm.Model):
        text = peewee.TextField()

    with pytest.raises(ConfigurationError, match=r"Call orm.init_app\(app\)"):
        Note.create_table()
    app = make_app(orm, lambda app: app.config.update(PEEWEE_DATABASE=place.pool_url(max_connections=2)))
    with app.app_context():
        Note.create_table()
        assert Note.select().count() == 0
    orm.database.close_all()


def test_options_come_from_the_prefixed_environment(db, monkeypatch):
    monkeypatch.setenv("FLASK_PEEWEE_ERRORS", "true")
    monkeypatch.setenv("FLASK_PEEWEE_CLOSE_TIMEOUT", "2.5")
    monkeypatch.setenv("FLASK_PEEWEE_EXCLUDE", '["static", "/health"]')
    orm = Peewee(db, close_timeout=3)
    make_app(orm, lambda app: app.config.from_prefixed_env())
    options = orm.runtime.options
    assert (options.errors, options.close_timeout, list(options.exclude)) == (True, 3, ["static", "/health"])


def test_a_switch_of_the_environment_may_be_one_or_zero(db, monkeypatch):
    """Flask makes a number of it."""
    monkeypatch.setenv("FLASK_PEEWEE_ERRORS", "1")
    monkeypatch.setenv("FLASK_PEEWEE_TRANSACTION", "0")
    orm = Peewee(db)
    make_app(orm, lambda app: app.config.from_prefixed_env())
    assert (orm.runtime.options.errors, orm.runtime.options.transaction) == (True, False)


def test_models_cannot_come_from_the_environment(db):
    with pytest.raises(ConfigurationError, match=r"PEEWEE_CREATE_TABLES='User' names no model class"):
        make_app(Peewee(db), lambda app: app.config.update(PEEWEE_CREATE_TABLES="User"))


def test_the_databases_url_under_another_name_is_recognised():
    with pytest.raises(ConfigurationError, match=r"PEEWEE_URL\. Did you mean PEEWEE_DATABASE"):
        make_app(Peewee(), lambda app: app.config.update(PEEWEE_URL="sqlite:///x.db"))


def test_the_database_that_is_yet_to_come_decorates_functions(tmp_path):
    """It says that it is not there only when one is called."""
    orm = Peewee()

    @orm.database.atomic()
    def work():
        return orm.database.in_transaction()

    with pytest.raises(ConfigurationError, match="The database is not known yet"):
        work()
    with pytest.raises(ConfigurationError, match="The database is not known yet"), orm.database.atomic():
        pass
    make_app(orm, lambda app: app.config.update(PEEWEE_DATABASE=f"sqlite:///{tmp_path}/late.db"))
    assert work()
    orm.database.close()


def test_unknown_keys_and_a_missing_database_are_refused(db, monkeypatch):
    with pytest.raises(ConfigurationError, match="Did you mean PEEWEE_ERRORS"):
        make_app(Peewee(db), lambda app: app.config.update(PEEWEE_ERROR=True))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    with pytest.raises(ConfigurationError, match="No database"):
        make_app(Peewee())


# Requests


def test_a_response_that_the_test_client_does_not_close_holds_nothing(db):
    orm = Peewee(db)
    client = make_app(orm).test_client()
    response = client.get("/")
    assert current_scope() is None
    assert not db._in_use
    del response
    client.get("/").close()
    assert not orm.runtime.in_flight()


def test_eager_requests_have_a_connection_before_every_hook(make_place):
    db = make_place("sqlite").make_database(autoconnect=False)
    seen = []

    def first_in_line(app):
        @app.before_request
        def early():
            seen.append(one(db))

    assert make_app(Peewee(db), first_in_line).test_client().get("/held").text == "1"
    assert seen == ["1"]
    db.close_all()


@pytest.mark.parametrize("exclude", ["/quiet/*", "quiet.ok", "quiet", lambda request: request.blueprint == "quiet"])
def test_paths_endpoints_blueprints_and_predicates_are_excluded(db, exclude):
    orm = Peewee(db, connect="eager", exclude=[exclude], check="off")
    app = make_app(orm)
    quiet = Blueprint("quiet", __name__, url_prefix="/quiet")

    @quiet.get("/ok")
    def ok():
        return str(len(db._in_use))

    app.register_blueprint(quiet)
    assert app.test_client().get("/quiet/ok").text == "0"
    assert app.test_client().get("/held").text == "1"


def test_callbacks_at_close_query_in_the_request(db):
    app = make_app(Peewee(db))
    seen = []

    @app.get("/callback")
    def callback():
        response = Response("ok")
        response.call_on_close(lambda: seen.append(one(db)))
        return response

    app.test_client().get("/callback").close()
    assert seen == ["1"]


class Rows(list):
    def __init__(self, parts, query):
        super().__init__(parts)
        self.query = query

    def __iter__(self):
        self.query()
        return super().__iter__()


class Told(Response):
    query = None

    def get_app_iter(self, environ):
        return ClosingIterator(self.iter_encoded(), [self.query, self.close])


class Called(Response):
    query = None

    def __call__(self, environ, start_response):
        body = super().__call__(environ, start_response)
        body._callbacks.insert(0, self.query)
        return body


@pytest.mark.parametrize("kind", [Told, Called, Rows])
def test_responses_of_ones_own_making_query_in_the_request(db, kind):
    """… at their end, or while they are sent."""
    app = make_app(Peewee(db))
    seen = []

    def query():
        seen.append((one(db), current_scope()))

    @app.get("/own")
    def own():
        response = Response("ok") if kind is Rows else kind("ok")
        if kind is Rows:
            response.response = Rows([b"ok"], query)
        else:
            response.query = query
        return response

    response = app.test_client().get("/own")
    assert response.text == "ok"
    response.close()
    assert seen
    assert all(scope is not None for _, scope in seen)
    assert not db._in_use


def test_an_application_whose_methods_take_the_context_first_is_served(db):
    """As Flask's do from 3.2 on."""

    class Later(Flask):
        def preprocess_request(self, context):
            assert context.app is self
            return super().preprocess_request()

        def full_dispatch_request(self):
            context = app_ctx._get_current_object()
            rv = self.preprocess_request(context)
            return self.finalize_request(self.dispatch_request() if rv is None else rv)

    app = Later("later")
    Peewee(db, connect="eager").init_app(app)
    app.get("/held", endpoint="held")(lambda: str(len(db._in_use)))
    assert app.test_client().get("/held").text == "1"


def test_a_teardown_of_others_that_queries_and_raises_leaves_nothing(db):
    """Up to Flask 3.1 it skips the teardown functions after it."""
    orm = Peewee(db)
    app = make_app(orm)

    @app.teardown_appcontext
    def spoil(error):
        one(db)
        raise RuntimeError("asked for")

    with pytest.raises(RuntimeError, match="asked for"):
        app.test_client().get("/")
    with pytest.raises(RuntimeError, match="asked for"), app.app_context():
        one(db)
    assert not orm.runtime.in_flight()
    assert current_scope() is None


def test_a_request_within_a_request_has_a_scope_of_its_own(db):
    app = make_app(Peewee(db))

    @app.get("/outer")
    def outer():
        with db.atomic():
            return app.test_client().get("/").text + one(db)

    assert app.test_client().get("/outer").text == "11"


# Streams


@pytest.mark.parametrize("with_context", [True, False])
def test_a_stream_that_idles_holds_no_connection(db, with_context):
    """stream_with_context runs the teardown functions twice in Flask 3.1."""
    orm = Peewee(db)
    app = make_app(orm)

    @app.teardown_request
    def late(error):
        one(db)

    @app.get("/stream")
    def stream():
        def parts():
            for _ in range(3):
                yield one(db)

        return Response(stream_with_context(parts()) if with_context else parts())

    with app.test_client().get("/stream") as response:
        iterator = response.response
        for _ in range(3):
            assert next(iter(iterator)) in (b"1", "1")
            assert not db._in_use
    assert not orm.runtime.in_flight()


def test_a_stream_dropped_inside_a_transaction_is_rolled_back(db, models):
    app = make_app(Peewee(db))

    @app.get("/stream")
    def stream():
        def parts():
            with db.atomic():
                models.Item.create(owner="x")
                yield "1"
                yield "2"

        return Response(parts())

    with app.test_client().get("/stream") as response:
        assert next(iter(response.response)) in (b"1", "1")
        assert len(db._in_use) == 1
    assert not db._in_use
    assert rows(models) == 0


# Atomic requests


def atomic_app(models, *before, **options):
    app = make_app(Peewee(models.Item._meta.database, transaction=True, **options), *before)

    @app.get("/write/<int:status>")
    def write(status):
        models.Item.create(owner="x")
        return "", status

    @app.get("/spoil")
    def spoil():
        models.Part.create(item=-1)  # fails at COMMIT
        return "stored"

    @app.get("/raise")
    def fail():
        models.Item.create(owner="x")
        raise RuntimeError("asked for")

    return app


def test_atomic_requests_commit_or_roll_back_by_status_without_a_warning(models, caplog):
    app = atomic_app(models)
    client = app.test_client()
    for status, expected in {201: 1, 302: 2, 404: 2, 500: 2}.items():
        client.get(f"/write/{status}")
        assert rows(models) == expected
    assert client.get("/raise").status_code == 500
    app.testing = True
    with pytest.raises(RuntimeError, match="asked for"):
        client.get("/raise")
    assert rows(models) == 2
    assert not [record for record in caplog.records if record.name.startswith("peewee_frameworks")]


def test_a_commit_that_fails_reaches_the_500_handler(models):
    app = atomic_app(models)

    @app.errorhandler(500)
    def failed(error):
        return f"{type(error.original_exception).__name__} {rows(models)}", 500

    response = app.test_client().get("/spoil")
    assert (response.status_code, response.text) == (500, "IntegrityError 0")


def test_a_commit_that_fails_reaches_the_handler_of_its_class(models):
    app = atomic_app(models)

    @app.errorhandler(peewee.IntegrityError)
    def conflict(error):
        return "mine", 418

    assert app.test_client().get("/spoil").status_code == 418


def test_a_commit_that_fails_is_a_conflict_by_option(models):
    response = atomic_app(models, errors=True).test_client().get("/spoil")
    assert (response.status_code, response.json["detail"]) == (409, "The request conflicts with the stored data.")


def test_an_after_request_function_that_raises_finds_the_transaction_open(models):
    """Wherever it was registered: what it raises makes the response an error, so nothing is stored."""

    def first(app):
        @app.after_request
        def spoil(response):
            if request.path == "/write/200":
                raise RuntimeError("asked for")
            return response

    app = atomic_app(models, first)
    assert app.test_client().get("/write/200").status_code == 500
    assert rows(models) == 0


def test_queries_of_other_hooks_belong_to_the_transaction(models):
    def first(app):
        @app.before_request
        def before():
            models.Item.create(owner="before")

        @app.after_request
        def after(response):
            models.Item.create(owner="after")
            return response

    client = atomic_app(models, first).test_client()
    client.get("/write/200")
    assert rows(models) == 3
    client.get("/write/409")
    assert rows(models) == 3


def test_a_predicate_decides_and_statuses_are_chosen(models):
    app = make_app(
        Peewee(
            models.Item._meta.database,
            transaction=lambda request: request.endpoint == "write",
            rollback_on=[299],
        )
    )

    @app.get("/<int:status>", endpoint="write")
    @app.get("/plain/<int:status>")
    def write(status):
        models.Item.create(owner="x")
        return str(models.Item._meta.database.in_transaction()), status

    client = app.test_client()
    assert client.get("/299").text == "True"
    assert rows(models) == 0
    assert client.get("/400").status_code == 400
    assert rows(models) == 1
    assert app.test_client().get("/plain/299").status_code == 299


# Errors


def error_app(db, models, *before):
    app = make_app(Peewee(db, errors=True), *before)

    @app.get("/missing")
    def missing():
        return models.Item.get(models.Item.owner == "nobody").owner

    @app.get("/duplicate")
    def duplicate():
        models.Item.create(owner="x", name="x")
        models.Item.create(owner="x", name="x")
        return ""

    @app.get("/syntax")
    def syntax():
        db.execute_sql("SELEKT")
        return ""

    return app


def test_database_errors_become_json(db, models):
    client = error_app(db, models).test_client()
    missing, duplicate = client.get("/missing"), client.get("/duplicate")
    assert (missing.status_code, missing.mimetype, missing.json) == (404, "application/json", {"detail": "Not found."})
    assert duplicate.status_code == 409
    assert client.get("/syntax").status_code == 500


def test_an_exhausted_pool_is_503_with_retry_after(make_place):
    db = make_place("sqlite").make_database(max_connections=1, timeout=0.05)
    client = make_app(Peewee(db, errors=True, check="off")).test_client()
    held, done = threading.Event(), threading.Event()

    def hold():
        with db.connection_context():
            held.set()
            assert done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    response = client.get("/")
    done.set()
    thread.join(10)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert client.get("/").status_code == 200
    db.close_all()


def test_the_applications_own_handlers_go_first(db, models):
    """Registered before init_app or after it."""

    def before(app):
        app.register_error_handler(peewee.DoesNotExist, lambda error: ("mine", 410))

    app = error_app(db, models, before)
    app.register_error_handler(peewee.IntegrityError, lambda error: ("mine too", 422))
    client = app.test_client()
    assert (client.get("/missing").status_code, client.get("/duplicate").status_code) == (410, 422)


def test_an_error_that_is_not_ours_goes_to_the_applications_general_handler(db, models):
    app = error_app(db, models)
    app.register_error_handler(peewee.DatabaseError, lambda error: (type(error).__name__, 418))
    assert app.test_client().get("/syntax").text == "OperationalError"


def test_a_page_for_404_is_used_for_a_row_that_is_missing(db, models):
    app = error_app(db, models)
    app.register_error_handler(404, lambda error: (f"<h1>{error.description}</h1>", 404))
    assert app.test_client().get("/missing").text == "<h1>Not found.</h1>"


def test_a_handler_for_all_http_errors_is_used(db, models):
    app = error_app(db, models)

    @app.errorhandler(HTTPException)
    def problem(error):
        response = error.get_response()
        response.data = json.dumps({"code": error.code})
        return response

    assert app.test_client().get("/missing").json == {"code": 404}


# Application contexts


def test_a_command_has_a_scope_and_gives_back(db):
    orm = Peewee(db)
    app = make_app(orm)

    @app.cli.command("count")
    def count():
        click.echo(f"{one(db)} {current_scope().label}")

    result = app.test_cli_runner().invoke(args=["count"])
    assert result.output == "1 the application context of 'shop'\n"
    assert not orm.runtime.in_flight()


def test_a_command_that_fails_in_a_transaction_leaves_nothing(db, models):
    app = make_app(Peewee(db))

    @app.cli.command("spoil")
    def spoil():
        with db.atomic():
            models.Item.create(owner="x")
            raise RuntimeError("asked for")

    assert str(app.test_cli_runner().invoke(args=["spoil"]).exception) == "asked for"
    assert not db._in_use
    assert rows(models) == 0


def test_the_shell_queries_in_a_scope(db):
    app = make_app(Peewee(db))
    app.shell_context_processor(lambda: {"one": one, "db": db, "current_scope": current_scope})
    cli = FlaskGroup(create_app=lambda: app)
    result = app.test_cli_runner().invoke(cli, ["shell"], input="print(one(db), current_scope().label)\n")
    assert "1 the application context of 'shop'" in result.output
    assert not db._in_use


def test_a_context_in_a_context_shares_its_scope(db):
    app = make_app(Peewee(db))
    with app.app_context():
        scope = current_scope()
        with app.app_context():
            assert one(db) == "1"
            assert current_scope() is scope
        assert not scope.ended
        assert one(db) == "1"
    assert scope.ended


def test_a_context_inside_a_view_shares_the_requests_connection(db, models):
    app = make_app(Peewee(db))

    @app.get("/nested")
    def nested():
        with db.atomic():
            models.Item.create(owner="x")
            with app.app_context(), app.test_request_context():
                seen = models.Item.select().count()
            return f"{seen} {models.Item.select().count()} {len(db._in_use)}"

    assert app.test_client().get("/nested").text == "1 1 1"


def test_requests_inside_a_fixtures_context_use_connections_of_their_own(make_place):
    """Even if the pool has one only, as with SQLite in memory: the context lends it while it is idle."""
    db = make_place("sqlite").make_database(max_connections=1, timeout=0.05)
    app = make_app(Peewee(db))
    with app.app_context():
        scope = current_scope()
        assert one(db) == "1"
        assert app.test_client().get("/").text == "1"
        assert current_scope() is scope
        assert one(db) == "1"
    assert not db._in_use
    db.close_all()


def test_sqlite_in_memory_with_a_pool_of_one(make_place):
    from playhouse.pool import PooledSqliteDatabase

    db = PooledSqliteDatabase(":memory:", max_connections=1, timeout=1)
    item, part = make_models(db)
    app = make_app(Peewee(db, create_tables=[item, part]))

    @app.get("/count")
    def count():
        return str(item.select().count())

    assert app.test_client().get("/count").text == "0"
    with app.app_context():
        item.create(owner="x")
        assert app.test_client().get("/count").text == "1"
    db.close_all()


def test_a_test_request_context_has_a_scope(db):
    app = make_app(Peewee(db, transaction=True))
    with app.test_request_context("/"):
        assert app.full_dispatch_request().get_data() == b"1"
        assert not db.in_transaction()
        assert one(db) == "1"
    assert not db._in_use


def test_a_client_that_keeps_the_context_keeps_a_scope(db):
    orm = Peewee(db)
    with make_app(orm).test_client() as client:
        for _ in range(2):
            client.get("/").close()
            assert request.path == "/"
            assert one(db) == "1"
            assert current_scope().label == "the application context of 'shop'"
    assert current_scope() is None
    assert not orm.runtime.in_flight()


def test_a_thread_with_a_copied_context_has_a_scope_of_its_own(db):
    orm = Peewee(db)
    app = make_app(orm)
    results = []

    @app.get("/thread")
    def thread():
        @copy_current_request_context
        def work():
            results.append((one(db), request.path, len(db._in_use), "leftover" in g))

        g.leftover = True
        with db.connection_context():
            worker = threading.Thread(target=work)
            worker.start()
            worker.join(10)
            return str(len(db._in_use))

    assert app.test_client().get("/thread").text == "1"
    assert results == [("1", "/thread", 2, False)]
    assert not orm.runtime.in_flight()


def test_a_query_after_the_end_says_which_context_it_was(db):
    import contextvars

    app = make_app(Peewee(db))
    with app.app_context():
        later = contextvars.copy_context()
    with pytest.raises(ScopeEnded, match="application context of 'shop' has ended"):
        later.run(one, db)


def test_a_proxy_may_be_initialised_inside_a_context(db):
    proxy = peewee.DatabaseProxy()
    app = make_app(Peewee(proxy))
    with app.app_context():
        proxy.initialize(db)
    with app.app_context():
        assert one(proxy) == "1"
    assert app.test_client().get("/").text == "1"


# Async views


def test_an_async_view_queries_in_the_request(db):
    orm = Peewee(db)
    app = make_app(orm)

    @app.get("/async")
    async def view():
        await asyncio.sleep(0)
        first = await asyncio.gather(*(orm.run(one, db) for _ in range(5)))
        return f"{first} {one(db)} {len(db._in_use)}"

    assert app.test_client().get("/async").text == "['1', '1', '1', '1', '1'] 1 1"
    assert not orm.runtime.in_flight()


def test_an_async_view_waits_for_a_connection_in_orm_run(make_place):
    """A wait on the view's own event loop is refused, and the message names the remedy."""
    db = make_place("sqlite").make_database(max_connections=1, timeout=10)
    orm = Peewee(db, errors=True, check="off")
    app = make_app(orm)
    inside, held, done = threading.Event(), threading.Event(), threading.Event()

    @app.get("/plain")
    async def plain():
        return one(db)

    @app.get("/run")
    async def run():
        inside.set()
        return await orm.run(one, db)

    def hold():
        with db.connection_context():
            held.set()
            assert inside.wait(10)
            assert done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    assert app.test_client().get("/plain").status_code == 503

    def ask(index):
        if index == 0:
            return app.test_client().get("/run").text
        assert inside.wait(10)
        done.set()
        return None

    assert run_threads(2, ask)[0] == "1"
    thread.join(10)
    assert app.test_client().get("/plain").text == "1"
    gc.collect()  # asgiref leaves an exception, and the thread of the loop that raised it, in a cycle
    assert not db._in_use
    db.close_all()


def test_an_eager_async_view_has_its_connection_before_its_loop_runs(db):
    app = make_app(Peewee(db, connect="eager"))

    @app.get("/async")
    async def view():
        return f"{len(db._in_use)} {one(db)}"

    assert app.test_client().get("/async").text == "1 1"


@pytest.mark.leaves_threads("asgiref keeps one thread for sync code that async code calls outside any request")
def test_orm_run_outside_a_request_opens_a_scope(db):
    orm = Peewee(db)

    async def main():
        return await orm.run(lambda: current_scope().label.partition(" ")[0] + one(db))

    assert asyncio.run(main()).startswith("orm.run(")


def test_an_async_error_handler_queries(db, models):
    app = error_app(db, models)

    @app.errorhandler(peewee.DoesNotExist)
    async def missing(error):
        return one(db), 410

    with app.test_client().get("/missing") as response:
        assert response.status_code == 410
    # SQLite only: the exception holds the view's cursor, which was read on another thread than the handler's, so that
    # connection is closed when the cursor is gone; asgiref has left the exception in a cycle.
    gc.collect()
    eventually(lambda: not db._in_use)


# The start


def test_the_first_request_checks_the_database_and_later_ones_do_not(tmp_path):
    from playhouse.pool import PooledSqliteDatabase

    db = PooledSqliteDatabase(str(tmp_path / "later" / "shop.db"), max_connections=2)
    item, part = make_models(db)
    orm = Peewee(db, errors=True, create_tables=[item, part], exclude=["health", "static"])
    app = make_app(orm)
    app.add_url_rule("/health", "health", lambda: "ok")
    client = app.test_client()
    assert client.get("/health").text == "ok"
    for _ in range(2):
        assert client.get("/held").status_code == 503
    (tmp_path / "later").mkdir()
    assert client.get("/held").text == "0"
    assert item.table_exists()
    db.close()
    orm.stop()
    assert not db._connections
    orm.start()
    orm.stop()
    with pytest.raises(DatabaseUnavailable, match=r"cannot be reached at start.*check='warn'"):
        Peewee(PooledSqliteDatabase(str(tmp_path / "nowhere" / "x.db"))).start()


@pytest.mark.parametrize("check", ["warn", "off"])
def test_the_check_warns_or_is_left_out(tmp_path, check, caplog):
    from playhouse.pool import PooledSqliteDatabase

    db = PooledSqliteDatabase(str(tmp_path / "later" / "shop.db"), max_connections=2)
    with caplog.at_level(logging.WARNING, "peewee_frameworks"):
        client = make_app(Peewee(db, check=check)).test_client()
        for _ in range(2):
            assert client.get("/held").text == "0"
    assert len([record for record in caplog.records if "cannot be reached" in record.message]) == (check == "warn")


def test_requests_that_wait_for_a_check_that_fails_share_its_outcome(tmp_path):
    """Each would wait for the database as long again."""
    attempts = []
    barrier = threading.Barrier(9)  # the first attempt waits until everybody is there

    class Slow(peewee.SqliteDatabase):
        def _connect(self):
            attempts.append(1)
            if len(attempts) == 1:
                barrier.wait(10)
            raise peewee.OperationalError("down")

    app = make_app(Peewee(Slow(str(tmp_path / "x.db")), errors=True, exclude=["/held"]))

    def ask(index):
        if index == 8:
            eventually(lambda: attempts)
            barrier.wait(10)
            return 503
        if index:
            eventually(lambda: attempts)
            threading.Thread(target=barrier.wait, args=(10,), daemon=True).start()
        return app.test_client().get("/").status_code

    assert set(run_threads(9, ask)) == {503}
    assert len(attempts) < 8


# Real servers


@pytest.mark.parametrize("server", [gunicorn, werkzeug])
def test_a_mixed_load_leaves_nothing_and_shares_nothing(place, server):
    """160 requests at once on a stock pool of 5: successes, errors, streams, async views, transactions that fail."""
    kinds = {
        "ok": 200,
        "async": 200,
        "stream": 200,
        "context-stream": 200,
        "error": 500,
        "missing": 404,
        "atomic": 409,
        "spoil": 500 if place.kind == "mysql" else 409,
    }
    environment = {"DATABASE_URL": place.pool_url(max_connections=5, timeout=10)}
    with server("tests.adapters.served_flask:make_app", factory=True, env=environment) as process:
        paths = [f"/{kind}/r{number}" for number in range(20) for kind in kinds]
        results = hammer(process.url, paths, concurrency=40)
        for result in results:
            _, kind, rid = result.request.path.split("/")
            if kinds[kind] == 200:
                assert (result.status, result.text) == (200, rid * 3 if "stream" in kind else rid), statuses(results)
            else:
                assert result.status in ({500, 503} if (kind, place.kind) == ("spoil", "mysql") else {kinds[kind]})

        def stats():
            with process.client() as client:
                return client.get("/_stats").json()

        # Clients have their responses before the server closes the bodies; one scope is that of the question.
        found = eventually(lambda: found if ((found := stats())["in_use"], found["live"]) == (0, 1) else None)
        assert found["violations"] == []
        assert found["peak"] <= 5
        assert found["rows"] == 0


def test_preloaded_workers_connect_for_themselves(make_place):
    """Nothing is connected before the fork, so no two processes share a connection."""
    place = make_place("postgres")
    environment = {"DATABASE_URL": place.pool_url(max_connections=5, timeout=10)}
    target = "tests.adapters.served_flask:app"
    with gunicorn(target, env=environment, preload=True, workers=2, ready="/_ready") as process:
        assert place.sessions() == []
        results = hammer(process.url, [f"/pid/r{number}" for number in range(40)], concurrency=20)
        pids = {result.text for result in results}
        assert pids <= {str(pid) for pid in process.workers()}
        assert str(process.pid) not in pids
        assert str(os.getpid()) not in pids
        assert len(place.sessions()) <= 5 * len(pids)


def test_a_predicate_that_raises_is_a_500_and_rolls_back(models):
    app = atomic_app(models, rollback_on=lambda status: 1 / 0)
    assert app.test_client().get("/write/200").status_code == 500
    assert rows(models) == 0


@pytest.mark.parametrize(
    ("path", "handler", "status", "stored"),
    [
        ("/raise", None, 500, 0),
        ("/raise", 500, 503, 0),
        ("/raise", RuntimeError, 503, 1),
        ("/write/404", None, 404, 1),
    ],
)
def test_an_exception_that_nobody_handles_rolls_back_whatever_its_status(models, path, handler, status, stored):
    """`rollback_on` is for responses that somebody meant; a page for 500 is none, not even one of the application's."""
    app = atomic_app(models, rollback_on=[409])
    if handler is not None:
        app.register_error_handler(handler, lambda error: (f"{models.Item.select().count()} so far", 503))
    answer = app.test_client().get(path)
    assert answer.status_code == status
    assert handler is None or answer.text == "1 so far"
    assert rows(models) == stored


def test_of_two_instances_on_one_database_the_one_that_began_hears_of_the_exception(models):
    """The other one is asked first."""
    app = atomic_app(
        models, Peewee(models.Item._meta.database, transaction=True, rollback_on=[409]).init_app, rollback_on=[409]
    )
    answer = app.test_client().get("/raise")
    assert answer.status_code == 500
    assert rows(models) == 0


def test_a_signal_of_what_somebody_has_handled_rolls_nothing_back(models):
    """Flask-RESTful sends it of every exception, and answers it then."""
    app = atomic_app(models, rollback_on=[409])

    @app.get("/handled")
    def handled():
        models.Item.create(owner="x")
        got_request_exception.send(app, exception=LookupError())
        return "", 404

    assert app.test_client().get("/handled").status_code == 404
    assert rows(models) == 1


def test_init_app_comes_before_the_first_request(db):
    app = Flask("late")
    app.test_client().get("/")
    with pytest.raises(ConfigurationError, match=r"'late' has served a request already"):
        Peewee(db).init_app(app)
    assert "peewee" not in app.extensions or not app.extensions["peewee"]


def test_an_application_of_another_framework_is_refused(db):
    with pytest.raises(ConfigurationError, match=r"init_app\(Starlette\).*flask\.Peewee serves Flask"):
        Peewee(db).init_app(Starlette())


def test_an_application_that_answers_inside_a_view_leaves_the_commit_to_the_one_around(db, models):
    """With one Peewee for both: what the view does after it is still the same transaction."""
    orm = Peewee(db, transaction=True)
    outer, inner = Flask("outer"), Flask("inner")

    @inner.get("/")
    def answer():
        models.Item.create(owner="inner")
        return "written"

    @outer.get("/")
    def view():
        written = Response.from_app(inner, request.environ, buffered=True)
        models.Item.create(owner="outer")
        return written.data, 409

    for app in (outer, inner):
        orm.init_app(app)
    assert outer.test_client().get("/").status_code == 409
    with connection_scope(db):
        assert models.Item.select().count() == 0


def test_a_forked_child_starts_and_stops_for_itself(tmp_path):
    """What its parent has started is not counted there: the child's stop closes the child's pool."""
    code = f"""
import os
from flask import Flask
from peewee_frameworks.flask import Peewee
from peewee_frameworks.pool import PooledSqliteDatabase
db = PooledSqliteDatabase({str(tmp_path / "x.db")!r})
orm = Peewee(db)
orm.init_app(Flask("shop"))
orm.start()
child = os.fork()
if child == 0:
    orm.start()
    assert not db.pool.stats().closed
    orm.stop()
    assert db.pool.stats().closed
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert not db.pool.stats().closed
orm.stop()
assert db.pool.stats().closed
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
