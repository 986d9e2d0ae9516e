"""The pool over mysqlclient, MySQL Connector, MariaDB's connector and psycopg2, where they are installed.

A child process for each: where psycopg2 is installed Peewee prefers it, and a driver written in C may take its process with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from tests.support.drivers import ROOT, environment, missing, require_modules
from tests.support.servers import require_server

from . import other_drivers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DRIVERS = other_drivers.DRIVERS
CASES = [name for name in vars(other_drivers) if name.startswith("test_")]
DEADLINE = 100.0

Outcomes = dict[str, tuple[str, str]]


def run_cases(driver: str, directory: Path) -> tuple[Outcomes, str]:
    """Run all cases with a driver; return what came of each, and what was printed."""
    report = directory / f"{driver}.xml"
    command = [sys.executable, "-m", "pytest", "tests/pool/other_drivers.py", "-k", f"[{driver}]"]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--junit-xml={report}",
        f"--basetemp={directory / driver}",
    ]
    try:
        done = subprocess.run(
            [*command, *options],
            cwd=ROOT,
            env={**os.environ, **environment()},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return {}, f"not done after {DEADLINE:g} s: {error.output!r}"
    printed = f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-8000:]}{done.stderr[-4000:]}"
    return (_read(report) if report.exists() else {}), printed


def _read(report: Path) -> Outcomes:
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        notes = [
            (child.tag, f"{child.get('message')}\n{child.text or ''}") for child in case if child.tag != "properties"
        ]
        outcomes[case.get("name", "").partition("[")[0]] = notes[0] if notes else ("passed", "")
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[tuple[Outcomes, str]]]]:
    """What came of each driver that is installed, two at a time."""
    directory = tmp_path_factory.mktemp("drivers")
    with ThreadPoolExecutor(2) as executor:
        yield {
            driver: executor.submit(run_cases, driver, directory)
            for driver, (module, *_) in DRIVERS.items()
            if missing(module) is None
        }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("driver", DRIVERS)
def test_the_pool_over(driver: str, case: str, outcomes: dict[str, Future[tuple[Outcomes, str]]]) -> None:
    """What `other_drivers.py` says of each driver."""
    module, kind, *_ = DRIVERS[driver]
    require_server(kind)
    require_modules(module)
    found, printed = outcomes[driver].result(2 * DEADLINE)

    assert case in found, printed
    outcome, text = found[case]
    if outcome == "skipped":
        pytest.skip(text.partition("\n")[0])
    assert outcome == "passed", text
