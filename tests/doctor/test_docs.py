"""The documentation names every finding, option and field, and nothing that there is not; every link leads somewhere."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
from typing import Any

import peewee

from peewee_frameworks import cli
from peewee_frameworks.doctor import check
from peewee_frameworks.doctor.report import Finding, Report
from tests.doctor.helpers import ROOT, look

PACKAGE = ROOT / "peewee_frameworks"
HOW_TO = (ROOT / "docs/how-to/doctor.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
GEVENT = (ROOT / "docs/how-to/gevent.md").read_text(encoding="utf-8")


def findings_made_in(directory: str) -> set[str]:
    """The codes that stand as the first argument of a Finding(…)."""
    codes = set()
    for path in (PACKAGE / directory).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            made = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding"
            if made and isinstance(node.args[0], ast.Constant):
                codes.add(node.args[0].value)
    return codes


def test_every_finding_has_a_section() -> None:
    assert set(re.findall(r"^### (\S+)$", HOW_TO, re.MULTILINE)) == findings_made_in("doctor")


def test_every_finding_of_gevent_is_in_its_table() -> None:
    codes = {
        node.args[0].value
        for node in ast.walk(ast.parse((PACKAGE / "gevent.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding"
    }
    rows = re.findall(r"^\| (`.+?`) \|", GEVENT.partition("## When the order was wrong")[2], re.MULTILINE)
    assert codes <= {code for row in rows for code in re.findall(r"`([^`]+)`", row)}


def test_every_finding_has_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests/doctor").glob("test_*.py"))
    for code in findings_made_in("doctor"):
        assert f'"{code}"' in tests, code


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere() -> None:
    for name, text in (("how-to/doctor.md", HOW_TO), ("reference/cli.md", REFERENCE)):
        for link in re.findall(r"\]\(([^)]+)\)", text):
            path, _, anchor = link.partition("#")
            page = (ROOT / "docs" / name).parent / path if path else ROOT / "docs" / name
            assert page.exists(), link
            assert not anchor or anchor in anchors(page.read_text(encoding="utf-8")), link
    for link in {Finding(code, "note", "", "", "").link for code in findings_made_in("doctor")}:
        path, _, anchor = link.partition("#")
        assert anchor in anchors((ROOT / path).read_text(encoding="utf-8")), link


def commands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (
        action.choices
        for action in cli._parser(has_app=False)._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(choices)


def test_every_option_is_in_the_reference() -> None:
    for name, parser in commands().items():
        section = re.search(rf"^## {name}$(.*?)(?=^## |\Z)", REFERENCE, re.MULTILINE | re.DOTALL)
        assert section is not None
        written = set(re.findall(r"^\| `(--[a-z-]+)", section[1], re.MULTILINE))
        real = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
        assert written == real - {"--help"}, name


def test_the_documents_have_the_fields_that_are_shown() -> None:
    doctor, checked = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", REFERENCE, re.DOTALL))
    report: Report = look(peewee.SqliteDatabase(":memory:"))
    real: Any = report.as_json()
    assert real.keys() == doctor.keys()
    assert real["databases"]["default"].keys() == doctor["databases"]["default"].keys()
    assert real["findings"][0].keys() == doctor["findings"][0].keys()
    assert real["summary"].keys() == doctor["summary"].keys()
    assert {field.name for field in dataclasses.fields(check.Checked)} == checked["databases"]["default"].keys()
    assert checked.keys() == check.as_json("", {}).keys()
