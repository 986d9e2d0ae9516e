"""The drivers that are no dependency of ours, in processes of their own.

They are not installed with the others, because Peewee would prefer psycopg2 to psycopg: `make test` puts them into a directory
beside the interpreter, and only child processes look there. PEEWEE_FRAMEWORKS_DRIVERS names another directory.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.servers import server_url

ROOT = Path(__file__).resolve().parents[2]


def drivers_directory() -> Path:
    """Where the drivers are."""
    return Path(os.environ.get("PEEWEE_FRAMEWORKS_DRIVERS") or Path(sys.executable).parent.parent / "drivers")


def environment() -> dict[str, str]:
    """What a child, or a server, needs to find the project, the drivers and the databases."""
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(drivers_directory())]),
        "PYTHONWARNINGS": "default",
        "MYSQL_URL": server_url("mysql"),
        "POSTGRES_URL": server_url("postgres"),
    }


@functools.cache
def missing(*modules: str) -> str | None:
    """Why these modules cannot be imported by a child, or None."""
    command = [sys.executable, "-c", f"import {', '.join(modules)}"]
    done = subprocess.run(
        command, env={**os.environ, **environment()}, capture_output=True, text=True, timeout=30, check=False
    )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]


def require_modules(*modules: str) -> None:
    """Skip the running test where these modules are not installed."""
    if (reason := missing(*modules)) is not None:
        pytest.skip(f"{reason}; `make test` installs it, where it can be built")
