"""The rules of the house: who may touch Peewee's private state, and what importing the package costs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

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


IMPORTS = """
import json, sys
import peewee, playhouse.pool
before = set(sys.modules)
import peewee_frameworks
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_importing_the_package_imports_no_framework_and_no_driver():
    """Beyond what Peewee imports there is the standard library and ourselves."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=60, check=True)
    roots = {name.partition(".")[0] for name in json.loads(done.stdout)}
    foreign = {root for root in roots if root not in sys.stdlib_module_names and root != "peewee_frameworks"}
    assert foreign == set()
