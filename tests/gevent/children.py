"""Python processes of their own: what gevent patches, and in which order, can be tried once per process only.

The drivers that only these tests need are not installed with the others, because Peewee would prefer psycopg2 to psycopg:
`make test` puts them into a directory beside the interpreter, and only these children look there.
PEEWEE_FRAMEWORKS_GEVENT_DRIVERS names another directory; PEEWEE_FRAMEWORKS_PYTHONS names more interpreters, each with the
package's test dependencies, for the matrix to run on.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import server_url

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FROZEN = {"frozen": True}

pythons = [sys.executable, *filter(None, os.environ.get("PEEWEE_FRAMEWORKS_PYTHONS", "").split(os.pathsep))]


def drivers_directory(python: str = sys.executable) -> Path:
    """Where the drivers for these tests are."""
    named = os.environ.get("PEEWEE_FRAMEWORKS_GEVENT_DRIVERS") if python == sys.executable else None
    return Path(named) if named else Path(python).parent.parent / "gevent-drivers"


def environment(python: str = sys.executable) -> dict[str, str]:
    """What a child, or a server, needs to find the project and the drivers."""
    path = os.pathsep.join([str(ROOT), str(drivers_directory(python))])
    return {
        "PYTHONPATH": path,
        "PYTHONWARNINGS": "default",
        "MYSQL_URL": server_url("mysql"),
        "POSTGRES_URL": server_url("postgres"),
    }


@functools.cache
def missing(python: str, *modules: str) -> str | None:
    """Why these modules cannot be imported by this interpreter, or None."""
    command = [python, "-c", f"import {', '.join(modules)}"]
    done = subprocess.run(
        command, env={**os.environ, **environment(python)}, capture_output=True, text=True, timeout=30, check=False
    )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]


def require_modules(*modules: str, python: str = sys.executable) -> None:
    """Skip the running test where these modules are not installed."""
    if (reason := missing(python, *modules)) is not None:
        pytest.skip(f"{Path(python).name}: {reason}; `make test` installs the drivers for the tests of gevent")


def run_child(
    script: str, *arguments: str, deadline: float, python: str = sys.executable, **variables: str
) -> dict[str, Any]:
    """Run a script of this directory and return the JSON object it prints last, or FROZEN if the deadline passes."""
    command = [python, str(HERE / script), *arguments]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment(python), **variables},
            capture_output=True,
            text=True,
            timeout=deadline,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return FROZEN
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}"
    result: dict[str, Any] = json.loads(lines[-1])
    result["stderr"] = done.stderr
    return result
