"""What is logged, where: one tree of loggers, nothing per checkout, and a reference that lists every message."""

from __future__ import annotations

import ast
import functools
import logging
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from peewee_frameworks.flask import Peewee
from peewee_frameworks.pool import PooledSqliteDatabase
from tests.support.concurrency import eventually, run_threads

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "peewee_frameworks"
REFERENCE = (ROOT / "docs/reference/logging.md").read_text(encoding="utf-8")
LEVELS = {"debug": "DEBUG", "info": "INFO", "warning": "WARNING", "error": "ERROR", "exception": "ERROR"}


class Call:
    """One call of a logger in the source."""

    def __init__(self, path: Path, node: ast.Call, loggers: dict[str, str]) -> None:
        assert isinstance(node.func, ast.Attribute)
        self.place = f"{path.relative_to(ROOT)}:{node.lineno}"
        self.logger = loggers[node.func.value.id]
        arguments = node.args
        if node.func.attr == "log":  # the level is an expression
            self.level, arguments = "by case", arguments[1:]
        else:
            self.level = LEVELS[node.func.attr]
        self.message = arguments[0].value
        self.extra = next((keyword.value for keyword in node.keywords if keyword.arg == "extra"), None)

    @property
    def fields(self) -> set[str] | None:
        """The names of its extra fields; None if they are made elsewhere."""
        if self.extra is None:
            return set()
        return {key.value for key in self.extra.keys} if isinstance(self.extra, ast.Dict) else None


@functools.cache
def calls() -> list[Call]:
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        loggers = {
            node.targets[0].id: node.value.args[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) == "logging.getLogger"
        }
        if path.name == "pool.py":
            loggers["followed"] = "peewee.pool"  # imported
        found += [
            Call(path, node, loggers)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in loggers
            and node.func.attr in {*LEVELS, "log"}
        ]
    return found


def rows() -> dict[tuple[str, str, str], set[str]]:
    """(logger, level, message) → fields, as the reference has them."""
    found = {}
    for section in re.split(r"^## ", REFERENCE, flags=re.MULTILINE)[1:]:
        logger = re.match(r"`([\w.]+)`\n", section)
        if logger:
            for level, message, _, fields in re.findall(
                r"^\| (\S.*?) \| `(.+?)` \| (.+?) \| (.*?) ?\|$", section, re.MULTILINE
            ):
                found[logger[1], level, message] = set(re.findall(r"`(\w+)`", fields))
    return found


def test_the_reference_lists_every_message_with_its_level_and_fields():
    written, real = rows(), calls()
    assert len(real) > 30
    assert {(call.logger, call.level, call.message.partition("\n")[0]) for call in real} == written.keys()
    for call in real:
        if call.fields is not None:
            assert call.fields == written[call.logger, call.level, call.message.partition("\n")[0]], call.place


def test_every_message_above_debug_has_fields():
    """So that who collects logs can find a request or a pool without reading sentences."""
    bare = [call.place for call in calls() if call.extra is None and call.level != "DEBUG"]
    assert all("pool/workers.py" in place for place in bare), bare  # these are about no pool in particular


def test_all_loggers_are_in_one_tree():
    names = {call.logger for call in calls()}
    assert all(name.startswith("peewee_frameworks.") for name in names - {"peewee.pool"})


@pytest.mark.parametrize("options", [{}, {"leak_threshold": 30, "query_budget": 100, "server_timing": True}])
def test_a_busy_application_says_nothing(tmp_path, caplog, options):
    """Connects, waits and hundreds of checkouts, and not one message at INFO or above."""
    db = PooledSqliteDatabase(str(tmp_path / "busy.db"), max_connections=3, timeout=20)
    app = Flask("busy")
    Peewee(db, **options).init_app(app)
    app.add_url_rule("/", "view", lambda: str(db.execute_sql("SELECT 1").fetchone()[0]))
    caplog.set_level(logging.INFO)
    with closing(db.pool):
        texts = run_threads(8, lambda _: [app.test_client().get("/").text for _ in range(50)])
        assert texts == [["1"] * 50] * 8
        assert db.pool.stats().checkouts >= 400
    assert [record for record in caplog.records if record.name.startswith("peewee")] == []


def test_who_followed_playhouses_logger_is_told_the_life_of_connections(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "peewee.pool")
    db = PooledSqliteDatabase(str(tmp_path / "followed.db"))
    with closing(db.pool):
        db.pool.release(db.pool.acquire())
        db.pool.close_idle()
    told = [record for record in caplog.records if record.name == "peewee.pool"]
    assert {record.levelno for record in told} == {logging.DEBUG}
    assert [record.getMessage() for record in told] == [
        "Created new connection 1.",
        "Returning 1 to pool.",
        "Connection 1 was closed: close_idle().",
    ]
    assert {(record.pool, record.connection) for record in told} == {(db.pool.name, 1)}


def test_a_level_that_is_set_later_is_noticed(tmp_path):
    db = PooledSqliteDatabase(str(tmp_path / "later.db"))
    logger: Any = logging.getLogger("peewee.pool")
    with closing(db.pool):
        db.pool.release(db.pool.acquire())
        assert not db.pool._watch
        logger.setLevel(logging.DEBUG)
        try:
            eventually(lambda: db.pool._watch)
        finally:
            logger.setLevel(logging.NOTSET)
        eventually(lambda: not db.pool._watch)
