"""What the tests of the doctor share: a look from inside, and the command line as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peewee_frameworks import cli
from peewee_frameworks.doctor import boot, target
from peewee_frameworks.doctor.examine import examine
from peewee_frameworks.doctor.serving import Serving
from tests.support.servers import server_kwargs

if TYPE_CHECKING:
    from peewee_frameworks.doctor.report import Finding, Report

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60
# playhouse.db_url gives PyMySQL the password of a mysql:// URL under its old name.
WARNINGS = "error,ignore:'passwd' is deprecated:DeprecationWarning"


def look(thing: Any, *, timeout: float = 10.0, **serving: Any) -> Report:
    """Examine a database, a mapping, a `Peewee` or an application of this process."""
    return examine(target.describe("it", thing), Serving(**serving), timeout)


def found(report: Report) -> dict[str, Finding]:
    """The findings by their code."""
    return {finding.code: finding for finding in report.findings}


def severities(thing: Any, **serving: Any) -> dict[str, str]:
    """Code → severity of everything that is found."""
    return {code: finding.severity for code, finding in found(look(thing, **serving)).items()}


# What a database of each kind needs for the doctor to find nothing, but for the pool's own options.
TIMEOUTS = {"sqlite": {}, "mysql": {"read_timeout": 30}, "postgres": {"keepalives_idle": 30}}
SOUND = {"max_connections": 5, "timeout": 5, "stale_timeout": 300}


@dataclass(frozen=True)
class Run:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def codes(self) -> dict[str, str]:
        """Code → severity, of a run with ``--json``."""
        return {each["code"]: each["severity"] for each in self.json["findings"]}


class Project:
    """A directory with a user's modules, and the command line run in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, **modules: str) -> None:
        """Write modules, or packages with dots as double underscores, by name."""
        for name, text in modules.items():
            (self.directory / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")

    def run_here(self, capsys: Any, monkeypatch: Any, *arguments: str) -> Run:
        """Run a command that takes a target in this process, which is quicker; `boot` in a process of its own does the same."""
        monkeypatch.chdir(self.directory)
        monkeypatch.syspath_prepend(self.directory)
        started: dict[str, Any] = {}
        try:
            if target.is_name(arguments[1]):
                started["loaded"] = boot.resolve(arguments[1])
        except Exception as error:
            started["failure"] = error
        finally:
            for name in {path.stem for path in self.directory.glob("*.py")} & sys.modules.keys():
                del sys.modules[name]
        code = cli.main(list(arguments), cli.Started(**started))
        return Run(code, *capsys.readouterr())

    def run(self, *arguments: str, program: tuple[str, ...] = ("-m", "peewee_frameworks"), **variables: str) -> Run:
        """Run the command line; warnings are errors in it too."""
        kept = {key: value for key, value in os.environ.items() if key not in ("WEB_CONCURRENCY", "GUNICORN_CMD_ARGS")}
        environment = {**kept, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": WARNINGS, "COLUMNS": "100", **variables}
        done = subprocess.run(
            [sys.executable, *program, *arguments],
            cwd=self.directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        return Run(done.returncode, done.stdout, done.stderr)


def source(kind: str, **options: Any) -> str:
    """A module with a database `db` of our pool on the tests' server of this kind, nothing wrong with it but `options`."""
    kwargs = {**SOUND, **TIMEOUTS[kind], **({} if kind == "sqlite" else server_kwargs(kind)), **options}
    name = {"sqlite": "PooledSqliteDatabase", "mysql": "PooledMySQLDatabase", "postgres": "PooledPostgresqlDatabase"}[
        kind
    ]
    arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    return f"from peewee_frameworks.pool import {name}\ndb = {name}({arguments})\n"
