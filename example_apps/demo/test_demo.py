"""The demo finds what it looks for: its exit status says so."""

from __future__ import annotations

import json
import runpy
import sys

import pytest

from example_apps.demo import faulty, plan  # as `make demo` imports it
from tests.support import webservers

# An application: the columns that its line then has in "wrong", "in use" and "shared".
FAULTS = {"sound": (0, 0, 0), "leaking": (0, 1, 0), "sharing": (0, 0, 1), "answering_wrong": (1, 0, 0)}


@pytest.mark.parametrize("name", FAULTS)
def test_the_demo_fails_for_each_fault_by_itself(name, monkeypatch, capsys):
    """A connection that leaked or was shared, an answer that was wrong: as `make demo` runs it, on a real server."""
    subject = plan.Subject(name, "uvicorn", webservers.uvicorn, faulty.MIX, faulty.__name__)
    monkeypatch.setattr(plan, "SUBJECTS", (subject,))
    monkeypatch.setattr(plan, "CLIENTS", 1)  # or a connection that two share might fail a third one too
    monkeypatch.setattr(plan, "PATIENCE", 1.0)
    monkeypatch.setattr(sys, "argv", ["demo", "--requests", "40"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_module("example_apps.demo", run_name="__main__")
    told = capsys.readouterr().out
    line = next(line for line in told.splitlines() if line.startswith(name)).split()
    wrong, _opened, _peak, in_use, shared = map(int, line[-7:-2])
    assert (wrong, in_use, shared) == FAULTS[name], told
    assert exited.value.code == int(name != "sound")
    assert json.loads(told.splitlines()[-1]) == {"ok": name == "sound"}
