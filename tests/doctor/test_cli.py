"""The command line as a process: exit status, JSON, how the application is served, and Flask's own command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import peewee_frameworks
from peewee_frameworks.doctor import boot
from peewee_frameworks.doctor.report import SEVERITIES
from peewee_frameworks.doctor.serving import Serving
from tests.doctor.helpers import DEADLINE, ROOT, source
from tests.support.concurrency import eventually
from tests.support.proxy import Proxy
from tests.support.servers import require_server, server_kwargs

if TYPE_CHECKING:
    from tests.doctor.helpers import Project

NOTE = {"stale_timeout": None}
WARNING = {"timeout": None}
ERROR = {"max_connections": 100_000}


@pytest.fixture(autouse=True)
def _mysql() -> None:
    require_server("mysql")


@pytest.mark.parametrize(
    ("options", "fail_on", "code"),
    [
        ({}, "note", 0),
        (NOTE, None, 0),
        (NOTE, "note", 1),
        (WARNING, None, 1),
        (WARNING, "error", 0),
        (ERROR, "error", 1),
    ],
)
def test_the_exit_status(options: dict[str, Any], fail_on: str | None, code: int, project: Project) -> None:
    """0: nothing from `--fail-on` on, which is a warning by default; 1: something; the report is the same."""
    project.write(shop=source("mysql", **options))
    done = project.run("doctor", "shop:db", *(["--fail-on", fail_on] if fail_on else []))
    assert (done.code, done.err) == (code, "")
    assert done.out.endswith("Nothing found.\n") is (options == {})


def test_the_json_document(project: Project) -> None:
    project.write(shop=source("mysql", **NOTE, **WARNING))
    document = project.run("doctor", "shop:db", "--json", "--workers", "2").json
    findings = document.pop("findings")
    login = server_kwargs("mysql")
    assert document == {
        "schema": 1,
        "target": "shop:db",
        "workers": 2,
        "databases": {
            "default": {
                "database": f"PooledMySQLDatabase({login['database']!r})",
                "driver": "pymysql",
                "pool": "peewee_frameworks.pool of 5 connections",
                "server": document["databases"]["default"]["server"],
                "pooler": None,
            }
        },
        "summary": {"error": 0, "warning": 1, "note": 1},
    }
    assert [(each["code"], each["severity"]) for each in findings] == [
        ("pool-does-not-wait", "warning"),
        ("stale-timeout", "note"),
    ]
    for each in findings:
        assert set(each) == {"code", "severity", "what", "why", "change", "subject", "link", "detail"}
        assert each["severity"] in SEVERITIES
        assert each["subject"] == "default"
        assert each["link"] == f"docs/how-to/doctor.md#{each['code']}"
        assert all(each[name] for name in ("what", "why", "change"))


@pytest.mark.parametrize(
    ("arguments", "variables", "workers"),
    [
        ([], {}, "1 worker (assumed; tell with --workers or --served-by)"),
        (["--workers", "3"], {"WEB_CONCURRENCY": "5"}, "3 workers (from --workers)"),
        ([], {"WEB_CONCURRENCY": "5"}, "5 workers (from WEB_CONCURRENCY)"),
        (["--served-by", "gunicorn -w 4 shop:db"], {"WEB_CONCURRENCY": "5"}, "4 workers (from --served-by)"),
        (["--served-by", "gunicorn"], {"WEB_CONCURRENCY": "5"}, "5 workers (from --served-by)"),
        ([], {"GUNICORN_CMD_ARGS": "--workers=6"}, "6 workers (from --served-by)"),
        (["--served-by", "python -m uvicorn shop:app --workers 7"], {}, "7 workers (from --served-by)"),
    ],
)
def test_the_number_of_workers(arguments: list[str], variables: dict[str, str], workers: str, project: Project) -> None:
    project.write(shop=source("mysql"))
    done = project.run("doctor", "shop:db", *arguments, **variables)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"shop:db: {workers}\n")


@pytest.mark.parametrize(
    ("command", "serving"),
    [
        ("uvicorn shop:app", {"server": "uvicorn", "workers": 1, "reset_contextvars": False}),
        (
            "/venv/bin/uvicorn --reset-contextvars --workers=2 a:b",
            {"server": "uvicorn", "workers": 2, "reset_contextvars": True},
        ),
        ("hypercorn -w 3 a:b", {"server": "hypercorn", "workers": 3, "reset_contextvars": False}),
        ("sanic shop:app --workers 4", {"server": "sanic", "workers": 4, "reset_contextvars": False}),
        ("sanic shop:app --fast", {"server": "sanic", "workers": os.cpu_count(), "reset_contextvars": False}),
        ("gunicorn", {"server": "gunicorn", "workers": 1, "requests": 1, "gevent": False, "preload": False}),
        (
            "gunicorn --threads 8 -w 2",
            {"server": "gunicorn", "workers": 2, "requests": 8, "gevent": False, "preload": False},
        ),
        (
            "gunicorn -k gevent --worker-connections 50 --preload",
            {"server": "gunicorn", "workers": 1, "requests": 50, "gevent": True, "preload": True},
        ),
        (
            "gunicorn -k uvicorn_worker.UvicornWorker",
            {"server": "gunicorn", "workers": 1, "requests": None, "gevent": False, "preload": False},
        ),
    ],
)
def test_each_servers_command_line(command: str, serving: dict[str, Any], monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("WEB_CONCURRENCY", "GUNICORN_CMD_ARGS"):
        monkeypatch.delenv(name, raising=False)
    assert boot.read_serving(command, "shop:app") == serving
    Serving.find(None, serving, {})


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("waitress-serve shop:app", "--served-by: the doctor knows gunicorn, uvicorn, hypercorn and sanic"),
        ("gunicorn 'unclosed", "--served-by cannot be read: No closing quotation"),
        ("gunicorn --no-such-option", "--served-by: gunicorn refuses its configuration"),
        ("uvicorn --workers many", "--served-by: uvicorn's --workers wants a number"),
    ],
)
def test_a_command_line_that_cannot_be_understood(command: str, says: str, project: Project) -> None:
    project.write(shop=source("mysql"))
    done = project.run("doctor", "shop:db", "--served-by", f"{command} --token opensesame")
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert "Traceback" not in done.err
    if "no-such" not in command:  # that is gunicorn's own message
        assert "opensesame" not in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["doctor"],
        ["doctor", "shop:db", "--workers", "0"],
        ["doctor", "shop:db", "--fail-on", "everything"],
        ["check", "shop:db", "--timeout", "0"],
        ["check", "shop:db", "--timeout", "soon"],
        ["pool"],
    ],
)
def test_wrong_usage(arguments: list[str], project: Project) -> None:
    done = project.run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("usage: python -m peewee_frameworks")


def test_help_and_version(project: Project) -> None:
    assert project.run("--version").out == f"peewee_frameworks {peewee_frameworks.__version__}\n"
    text = project.run("--help").out
    assert all(name in text for name in ("doctor", "check", "pool"))


def test_the_target_is_imported_once(project: Project) -> None:
    """By one process, however it ends."""
    project.write(shop="print('imported', flush=True)\n" + source("mysql"))
    done = project.run("doctor", "shop:db")
    assert done.err.count("imported") == 1
    assert done.out.startswith("shop:db: ")


def test_what_the_target_prints_is_no_part_of_the_answer(project: Project) -> None:
    project.write(shop=source("mysql") + "import os\nprint('welcome')\nos.system('echo hello')\n")
    done = project.run("check", "shop:db", "--json")
    assert done.json["databases"]["default"]["ok"]
    assert sorted(done.err.split()) == ["hello", "welcome"]


def test_it_ends_though_the_target_has_started_a_thread_that_does_not(project: Project) -> None:
    threads = "import threading\nthreading.Thread(target=threading.Event().wait).start()\n"
    project.write(shop=source("mysql") + threads)
    done = project.run("check", "shop:db", "--json")
    assert done.code == 0
    assert done.json["databases"]["default"]["ok"]


@pytest.mark.parametrize(
    ("last", "says"), [("os._exit(7)", "exit status 7"), ("os.kill(os.getpid(), signal.SIGKILL)", "signal 9")]
)
def test_a_target_that_ends_its_process(last: str, says: str, project: Project) -> None:
    project.write(shop=f"import os, signal\n{last}\n")
    done = project.run("doctor", "shop:db")
    assert (done.code, done.out) == (2, "")
    assert says in done.err


def test_the_current_directory_comes_first(project: Project) -> None:
    """A module of the user's may have the name of one of ours."""
    project.write(server="from target import db\n", target=source("mysql"))
    assert project.run("check", "server:db").code == 0


def test_ctrl_c_ends_it(project: Project) -> None:
    login = server_kwargs("mysql")
    with Proxy((login["host"], login["port"])) as proxy:
        proxy.hang()
        project.write(shop=source("mysql", host=proxy.address[0], port=proxy.address[1]))
        command = [sys.executable, "-m", "peewee_frameworks", "check", "shop:db", "--timeout", "50"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, cwd=project.directory, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        ) as process:
            eventually(lambda: proxy.live, DEADLINE, "it has connected")
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(DEADLINE) == 130
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.read() + process.stderr.read() == ""


FLASK = """
from flask import Flask
from peewee_frameworks.flask import Peewee

def create_app():
    app = Flask("shop")
    Peewee(db).init_app(app)
    return app
"""


def flask(project: Project, *arguments: str, **variables: str) -> Any:
    return project.run("--app", "shop", *arguments, program=("-m", "flask"), **variables)


def test_flasks_command_line(project: Project) -> None:
    """The same commands, of the application that Flask has loaded."""
    project.write(shop=source("mysql", **WARNING) + FLASK)
    done = flask(project, "peewee", "doctor", "--workers", "3", "--json")
    assert (done.code, done.err) == (1, "")
    assert done.json["target"] == "the Flask application 'shop'"
    assert done.json["workers"] == 3
    assert done.codes == {"pool-does-not-wait": "warning"}
    assert flask(project, "peewee", "doctor", "--fail-on", "error").code == 0
    check = flask(project, "peewee", "check")
    assert check.code == 0
    assert check.out.startswith("default: ok ")
    wrong = flask(project, "peewee", "doctor", "--nonsense")
    assert wrong.code == 2
    assert wrong.err.startswith("usage: flask peewee")
    assert "--served-by" not in flask(project, "peewee", "doctor", "--help").out
    assert "  peewee " in flask(project, "--help").out


def test_a_command_group_of_the_applications_own_is_left_alone(project: Project) -> None:
    own = '@app.cli.command("peewee")\n    def own():\n        print("mine")\n    '
    project.write(shop=source("mysql") + FLASK.replace("Peewee(db)", f"{own}Peewee(db)"))
    assert flask(project, "peewee").out == "mine\n"


def test_two_instances_are_one_group(project: Project) -> None:
    second = source("mysql").replace("db = ", "second = ")
    project.write(
        shop=source("mysql")
        + second
        + FLASK.replace("Peewee(db).init_app(app)", "Peewee(db).init_app(app)\n    Peewee(second).init_app(app)")
    )
    done = flask(project, "peewee", "check", "--json")
    assert list(done.json["databases"]) == ["default", "default (2)"]
