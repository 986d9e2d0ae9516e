"""The reference names everything there is, with its default, and nothing that there is not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from peewee_frameworks.pool import EVENTS, Pool, PooledDatabase, PoolOptions, PoolStats

TEXT = (Path(__file__).parents[2] / "docs" / "reference" / "pool.md").read_text(encoding="utf-8")


def section(title):
    return re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)[1]


def first_cells(text):
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return [name for row in rows for name in re.findall(r"`(?:await )?(\w+)", row)]


def words(text):
    return set(re.findall(r"`(\w+)`", text))


def test_every_option_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", section("Options"), re.MULTILINE)
    defaults = {name: default.strip("`").strip('"') for name, default in rows}
    fields = {field.name: field.default for field in dataclasses.fields(PoolOptions)}
    assert defaults.keys() == fields.keys()
    for name, default in fields.items():
        if name != "pool_name":  # the database's
            written = defaults[name]
            assert written == str(default) or float(written) == default, name


def test_every_method_of_the_pool():
    public = {name for name in vars(Pool) if not name.startswith("_")} - {
        "engine",
        "name",
        "maintain",
        "after_fork",
        "forget",
    }
    assert set(first_cells(section("`db.pool`"))) == public


def test_every_method_of_a_database_that_playhouse_has_too():
    own = {name for name in vars(PooledDatabase) if not name.startswith("_")} - {"init", "begin", "commit", "rollback"}
    assert set(first_cells(section("Databases"))) == own - {"connect_params"}


def test_every_statistic_and_event():
    assert set(first_cells(section("Statistics"))) == {field.name for field in dataclasses.fields(PoolStats)}
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", section("Events"), re.MULTILINE)
    written = {name: words(details) for names, details in rows for name in words(names)}
    assert written.keys() == EVENTS.keys()
    for name, details in written.items():
        assert details == set(re.findall(r"\w+", re.search(r"\((.+)\)$", EVENTS[name])[1])), name
