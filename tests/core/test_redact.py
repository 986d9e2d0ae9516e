"""What others wrote is shown without passwords."""

from __future__ import annotations

from typing import Any

import peewee
import pytest

from peewee_frameworks.errors import DatabaseUnavailable
from peewee_frameworks.pool import PooledPostgresqlDatabase
from peewee_frameworks.redact import one_line, redact, user_traceback
from peewee_frameworks.state import install


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot reach mysql://root:sesame@db/shop", "cannot reach mysql://root:…@db/shop"),
        ("postgresql+pool://u:s@sam/e@db/x?a=b, again", "postgresql+pool://u:…@db/x?a=b, again"),
        ("https://example.org/path?x=1 and sqlite:///shop.db", "https://example.org/path?x=1 and sqlite:///shop.db"),
        ("invalid dsn: host=db password=sesame user=x", "invalid dsn: host=db password=… user=x"),
        ("PooledMySQLDatabase('shop', passwd='ses ame', port=1)", "PooledMySQLDatabase('shop', passwd=…, port=1)"),
        ('{"PASSWORD": "sesame", "user": "x"}', '{"PASSWORD": …, "user": "x"}'),
        ("Access denied for 'x'@'y' (using password: YES)", "Access denied for 'x'@'y' (using password: YES)"),
        ("connect('mysql://root:sesame@db/shop') with 'sesame'", "connect('mysql://root:…@db/shop') with '…'"),
        ("API_TOKEN=sesame", "API_TOKEN=…"),
        ('password authentication failed for user "shop"', 'password authentication failed for user "shop"'),
    ],
)
def test_what_looks_like_a_password(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "database",
    [
        peewee.MySQLDatabase("shop", password="open/@sesame"),
        peewee.MySQLDatabase("shop", passwd="open/@sesame"),
        peewee.PostgresqlDatabase("postgresql://shop:open%2F%40sesame@db/shop"),
        peewee.PostgresqlDatabase("shop", conninfo="host=db password='open/@sesame'"),
        peewee.PostgresqlDatabase("host=db password=open/@sesame dbname=shop"),
        peewee.MySQLDatabase("shop", host="shop:open%2F%40sesame@db"),
    ],
)
def test_the_passwords_of_a_database(database: Any) -> None:
    """Wherever they are in a message, however they are spelled."""
    for spelled in ("open/@sesame", "open%2F%40sesame", "open/%40sesame"):
        assert redact(f"the server says [{spelled}] is wrong", [database]) == "the server says […] is wrong"


def test_the_passwords_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "mysql://root:opensesame@db/shop")
    monkeypatch.setenv("PGPASSWORD", "abracadabra")
    assert redact("opensesame, abracadabra") == "…, …"


def test_an_error_is_one_line_with_the_drivers_class() -> None:
    class AccessDenied(Exception):
        pass

    try:
        try:
            raise AccessDenied("no\n  entry")
        except AccessDenied as cause:
            raise peewee.OperationalError("no\n  entry") from cause
    except peewee.OperationalError as error:
        assert one_line(error) == "AccessDenied: no entry"
    assert one_line(ValueError()) == "ValueError: no message"


def test_a_traceback_keeps_the_chain() -> None:
    def settings() -> None:
        try:
            raise KeyError("DATABASE")
        except KeyError as cause:
            raise RuntimeError("no settings, password='sesame'") from cause

    with pytest.raises(RuntimeError) as caught:
        settings()
    text = user_traceback(caught.value)
    assert text.index("KeyError: 'DATABASE'") < text.index("direct cause") < text.index("RuntimeError: no settings")
    assert "sesame" not in text


def test_a_drivers_error_at_connect_keeps_the_password():
    """A login that was put before the host comes back in what the resolver says."""
    db = PooledPostgresqlDatabase("shop", host="root:opensesame@nowhere.invalid", user="shop", connect_timeout=5)
    with pytest.raises(DatabaseUnavailable) as caught:
        install(db).database.connect()
    assert "opensesame" not in str(caught.value)
    db.pool.close()
