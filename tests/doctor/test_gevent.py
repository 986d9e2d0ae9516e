"""The order of imports and patches, as the server would have it: each target in an interpreter of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.doctor.helpers import source
from tests.support.drivers import ROOT, drivers_directory, require_modules
from tests.support.proxy import Proxy
from tests.support.servers import require_server, server_kwargs

if TYPE_CHECKING:
    from tests.doctor.helpers import Project

PATCH = "from gevent import monkey\nmonkey.patch_all()\n"
FLASK = """
from flask import Flask
from peewee_frameworks.flask import Peewee

def create_app():
    app = Flask("shop")
    Peewee(db).init_app(app)
    return app

app = create_app()
"""
GUNICORN = "gunicorn -k gevent -w 2"


@pytest.fixture(autouse=True)
def _gevent() -> None:
    require_modules("gevent", "gunicorn")
    require_server("mysql")
    require_server("postgres")


def test_a_module_that_patches_first(project: Project) -> None:
    """Nothing is wrong, although the command line itself has imported Peewee long before: not in that process."""
    project.write(wsgi=PATCH + source("postgres") + FLASK)
    done = project.run("doctor", "wsgi:app", "--fail-on", "note")
    assert (done.code, done.err) == (0, ""), done.out


def test_a_module_that_imports_peewee_and_then_patches(project: Project) -> None:
    project.write(wsgi="import peewee\n" + PATCH + source("postgres") + FLASK)
    done = project.run("doctor", "wsgi:app", "--json")
    assert done.codes == {"peewee-before-patch": "note", "psycopg-before-patch": "warning"}
    (finding,) = (each for each in done.json["findings"] if each["code"] == "psycopg-before-patch")
    assert "repair_psycopg" in finding["change"]
    assert finding["link"] == "docs/how-to/gevent.md#when-the-order-was-wrong"
    assert done.code == 1


def test_the_change_that_it_names_ends_it(project: Project) -> None:
    repair = "from peewee_frameworks.gevent import repair_psycopg\nrepair_psycopg()\n"
    project.write(wsgi="import peewee\n" + PATCH + repair + source("postgres") + FLASK)
    assert project.run("doctor", "wsgi:app", "--json").codes == {"peewee-before-patch": "note"}


def test_gunicorns_worker_patches_before_it_loads_the_application(project: Project) -> None:
    project.write(wsgi=source("postgres") + FLASK)
    done = project.run("doctor", "wsgi:app", "--served-by", GUNICORN, "--json")
    assert done.codes == {}
    assert done.json["workers"] == 2


def test_with_preload_it_patches_after(project: Project) -> None:
    """And where the configuration file patches, before again: gunicorn's own reading of its settings decides."""
    project.write(wsgi=source("postgres") + FLASK)
    late = {"peewee-before-patch": "note", "psycopg-before-patch": "warning"}
    assert project.run("doctor", "wsgi:app", "--served-by", f"{GUNICORN} --preload", "--json").codes == late
    variable = {"GUNICORN_CMD_ARGS": "-k gevent --preload -w 3"}
    done = project.run("doctor", "wsgi:app", "--json", **variable)
    assert (done.codes, done.json["workers"]) == (late, 3)
    project.write(**{"gunicorn.conf": PATCH + "worker_class = 'gevent'\npreload_app = True\nworkers = 4\n"})
    done = project.run("doctor", "wsgi:app", "--served-by", "gunicorn", "--json")
    assert (done.codes, done.json["workers"]) == ({}, 4)


def test_a_stock_pool_that_would_freeze_is_an_error(project: Project) -> None:
    """Made before the patch, by --preload, and not put right by an adapter: the target is the database alone."""
    login = server_kwargs("mysql")
    project.write(
        shop="from playhouse.pool import PooledMySQLDatabase\n"
        f"db = PooledMySQLDatabase(timeout=5, stale_timeout=300, read_timeout=30, ssl_disabled=True, **{login!r})\n"
    )
    done = project.run("doctor", "shop:db", "--served-by", f"{GUNICORN} --preload", "--json")
    assert done.codes == {"peewee-before-patch": "error", "database-before-patch": "error", "stock-pool": "note"}
    assert done.code == 1


def test_psycopg2_without_psycogreen(project: Project) -> None:
    """A driver written in C on the hub, and its remedy."""
    require_modules("psycopg2", "psycogreen")
    where = {"PYTHONPATH": f"{ROOT}:{drivers_directory()}"}
    database = source("postgres")
    project.write(blocking=PATCH + database + FLASK)
    done = project.run("doctor", "blocking:app", "--json", **where)
    assert done.codes == {"psycopg2-without-psycogreen": "warning"}, done.err
    assert done.json["databases"]["default"]["driver"] == "psycopg2"
    green = "from psycogreen.gevent import patch_psycopg\npatch_psycopg()\n"
    project.write(green=PATCH + green + database + FLASK)
    assert project.run("doctor", "green:app", "--json", **where).codes == {}


def test_requests_under_gevent_are_counted(project: Project) -> None:
    project.write(wsgi=source("mysql", timeout=None) + FLASK)
    (finding,) = project.run("doctor", "wsgi:app", "--served-by", GUNICORN, "--json").json["findings"]
    assert finding["code"] == "pool-does-not-wait"
    assert "gunicorn has up to 1000 requests under way in each worker" in finding["what"]


@pytest.mark.parametrize("kind", ["mysql", "postgres"])
def test_the_time_limit_holds_in_a_patched_process(kind: str, project: Project) -> None:
    """Whether the driver yields or waits in C; the pool's own limit is 10 s, libpq's two minutes."""
    login = server_kwargs(kind)
    with Proxy((login["host"], login["port"])) as proxy:
        proxy.hang()
        project.write(
            wsgi="import peewee\n" + PATCH + source(kind, host=proxy.address[0], port=proxy.address[1]) + FLASK
        )
        done = project.run("check", "wsgi:db", "--timeout", "1", "--json")
    assert done.code == 1
    assert done.json["databases"]["default"]["error"] == "no answer within 1 s"
