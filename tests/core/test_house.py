"""The rules of the house: who may touch Peewee's private state, and what importing the package costs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import peewee
import playhouse
import pytest

import peewee_frameworks

PACKAGE = Path(peewee_frameworks.__file__).parent
INSTALLS = "state.py"


def assignments_to_state(path: Path) -> list[int]:
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        lines += [t.lineno for t in targets if isinstance(t, ast.Attribute) and t.attr == "_state" and t.lineno]
    return lines


def peewee_protocol(path: Path) -> list[str]:
    """Where a file names the classes behind Peewee's `_state`, or what they keep in a thread-local."""
    return [
        f"{path.name}:{number}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "_ConnectionState" in line or "_ConnectionLocal" in line
    ]


def test_only_the_state_module_replaces_peewees_state():
    """One place puts our state into a database; everybody else goes through it."""
    writers = {path.name for path in PACKAGE.glob("*.py") if assignments_to_state(path)}
    assert writers == {INSTALLS}


def test_peewees_state_is_read_only_where_the_design_says():
    """In the core, `_state` is known to the state, the guard and the frame; adapters never see it."""
    readers = {path.name for path in PACKAGE.glob("*.py") if re.search(r"\._state\b", path.read_text())}
    assert readers <= {"state.py", "guarded.py", "frame.py", "gevent.py"}
    adapters = {
        "flask.py",
        "sanic.py",
        "fastapi.py",
        "starlette.py",
        "asgi.py",
        "wsgi.py",
        "runtime.py",
        "run.py",
        "http.py",
    }
    assert not readers & adapters
    assert not [line for name in ("frame.py", "guarded.py", "scope.py") for line in peewee_protocol(PACKAGE / name)]


# Run where nothing but Peewee and this package can be imported.
IMPORT = """
import json, sys, time
import peewee
asked = []

class Asked:
    def find_spec(self, name, path=None, target=None):
        asked.append(name)  # what is found, and what is tried

sys.meta_path.insert(0, Asked())
before = time.process_time()
import peewee_frameworks
seconds = time.process_time() - before
print(json.dumps({"asked": asked, "seconds": seconds}))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function that imports the package in a new process, in which only Peewee is installed."""
    directory = tmp_path_factory.mktemp("alone")
    for module in (peewee_frameworks, playhouse):
        (directory / module.__name__).symlink_to(Path(module.__path__[0]))
    (directory / "peewee.py").symlink_to(Path(peewee.__file__))
    environment = {"PYTHONPATH": str(directory), "PYTHONPYCACHEPREFIX": str(directory / "compiled")}

    def run():
        command = [sys.executable, "-S", "-c", IMPORT]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
        return json.loads(done.stdout)

    run()  # which compiles
    return run


def test_importing_the_package_imports_no_framework_and_no_driver(alone):
    """Nor does it try, and neither asyncio: beyond what Peewee imports there is a little of the standard library."""
    roots = {name.partition(".")[0] for name in alone()["asked"]}
    assert "peewee_frameworks" in roots
    assert not roots - sys.stdlib_module_names - {"peewee_frameworks", "playhouse"}
    assert not roots & {"asyncio", "multiprocessing", "pathlib", "ssl", "subprocess", "urllib"}


def test_importing_the_package_costs_less_than_30_ms(alone):
    """Above `import peewee`: processor time, the best of several, so that a busy machine does not judge."""
    assert min(alone()["seconds"] for _ in range(10)) < 0.03


def test_the_oldest_versions_that_are_tested_are_those_that_may_be_installed():
    """`make test-lowest` installs what lowest.txt says; pyproject.toml promises it to users."""
    root = PACKAGE.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(entry for extra in project["optional-dependencies"].values() for entry in extra),
    ]
    bounds = {re.sub(r"\[.*\]", "", entry).partition(",")[0] for entry in requirements if ">=" in entry}
    tested = set((root / "tests" / "lowest.txt").read_text().replace("==", ">=").split())
    missing = {
        bound for bound in bounds if not any(re.fullmatch(re.escape(bound) + r"(\.0)*", entry) for entry in tested)
    }
    assert bounds
    assert not missing
