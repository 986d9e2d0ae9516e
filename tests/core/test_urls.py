"""Database URLs that cannot work, and options and stand-ins that are not ready: refused, with words that help and no secret."""

from __future__ import annotations

import re
import traceback

import peewee
import pytest

from peewee_frameworks.asgi import PeeweeMiddleware
from peewee_frameworks.config import Options, connect_url, safe_url
from peewee_frameworks.errors import ConfigurationError
from peewee_frameworks.flask import Peewee
from peewee_frameworks.pool import PooledMySQLDatabase, PooledPostgresqlDatabase, PooledSqliteDatabase, connect


@pytest.mark.parametrize("make", [connect_url, connect])
@pytest.mark.parametrize(
    "url",
    [
        "postgresql+pool://u:hunter2/@127.0.0.1/shop",
        "postgresql+pool://u:hunter2/x@y@127.0.0.1/shop",
        "mysql+pool://u:hunter2#x@h/d",
        "mysql+pool://u:hunter2?x@h/d",
        "mysql+pool://u:1?hunter2@h",
        "mysql+pool://u:hunter2℀@h/d",
        "mysql+pool://u:hunter2[@h/d",
        "mysql+pool://u:hunter2@h",
        "mysql:u:hunter2@h/d",
        "//u:hunter2@[h/d",
        "oracle://u:hunter2@h/d",
        "u:hunter2@h/d",
        "mysql+async://u:hunter2@h",
        "postgresql+async://u:hunter2@h/d?max_connections=3&max_size=4",
        "postgresql+async://u:hunter2@h/d?max_connections=0",
        "sqlite+async:///x.db?timeout=1&acquire_timeout=hunter2",
    ],
)
def test_no_message_about_a_url_shows_a_part_of_its_password(make, url):
    with pytest.raises(ConfigurationError) as caught:
        make(url)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_url_in_a_message_keeps_what_is_no_secret():
    assert safe_url("mysql+pool://u:hunter2@h:3306/shop?timeout=5") == "mysql+pool://h:3306/shop"
    assert safe_url("mysql+pool://u:1?hunter2@h/shop") == "mysql+pool://…"


@pytest.mark.parametrize("options", [{"rollback_on": "5xx"}, {"create_tables": peewee.Model}, {"create_tables": 3}])
def test_options_that_would_fail_later_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Options(**options)


def test_a_scope_before_init_app_is_told_to_call_init_app():
    with pytest.raises(ConfigurationError, match=r"init_app"):
        Peewee().scope().__enter__()


def test_a_proxy_of_ones_own_is_told_to_be_initialised():
    with pytest.raises(ConfigurationError, match=r"proxy\.initialize"):
        PeeweeMiddleware(None, peewee.DatabaseProxy()).runtime.states  # noqa: B018 - a property that installs


@pytest.mark.parametrize(
    ("url", "cls"),
    [
        ("mysql+pool://u:p%40ss@h/d?max_connections=3", PooledMySQLDatabase),
        ("postgresql+pool://u:p%40ss@h/d", PooledPostgresqlDatabase),
        ("sqlite+pool:///d.db", PooledSqliteDatabase),
        ("mysql://u:p%40ss@h/d", peewee.MySQLDatabase),
        ("sqlite:///d.db?timeout=5", peewee.SqliteDatabase),
        ("sqlite:///d.db", peewee.SqliteDatabase),
    ],
)
def test_a_url_gives_our_pool_where_it_asks_for_one(url, cls):
    """Given to `Peewee` or in DATABASE_URL; the password under the name that PyMySQL has for it today."""
    database = connect_url(url)
    assert type(database) is cls
    assert database.connect_params.get("password") == ("p@ss" if "@" in url else None)
    assert "passwd" not in database.connect_params


@pytest.mark.parametrize("make", [connect_url, connect])
@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("postgresql+async://u:p%40ss@h/d?max_connections=3&timeout=7", "AsyncPsycopgDatabase"),
        ("postgresql+asyncpg://u:p%40ss@h/d?max_connections=3&timeout=7", "AsyncPostgresqlDatabase"),
        ("mysql+async://u:p%40ss@h/d?max_connections=3&timeout=7", "AsyncMySQLDatabase"),
        ("sqlite+async:///d.db?max_connections=3&timeout=7", "AsyncSqliteDatabase"),
    ],
)
def test_a_url_gives_an_asynchronous_database_under_the_pools_own_option_names(make, url, name):
    database = make(url)
    assert name in {cls.__name__ for cls in type(database).__mro__}
    assert (database._pool_size, database._acquire_timeout) == (3, 7)
    assert database.connect_params.get("password") == ("p@ss" if "@" in url else None)
    assert database.Model.acreate


@pytest.mark.parametrize("make", [connect_url, connect])
@pytest.mark.parametrize("scheme", ["postgresql+async", "postgresql+asyncpg", "mysql+async", "sqlite+async"])
@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("max_conections=3", "Unknown option max_conections. Did you mean max_connections?"),
        ("max_connections=five", "max_connections must be a number, not 'five'."),
        ("timeout=soon", "timeout must be a number, not 'soon'."),
    ],
)
def test_a_wrong_option_of_an_asynchronous_url_is_refused_with_the_remedy_alone(make, scheme, option, remedy):
    host = "" if scheme.startswith("sqlite") else "h"
    with pytest.raises(ConfigurationError) as caught:
        make(f"{scheme}://{host}/d?{option}")
    prefix = f"The database URL {scheme}://{host}/d does not work: "
    assert str(caught.value).removeprefix(prefix) == remedy


def test_what_asyncpg_does_not_know_is_a_setting_of_the_session():
    """As in a URL of its own."""
    database = connect("postgresql+asyncpg://u@h/d?application_name=shop&statement_cache_size=0", search_path="app")
    assert database.connect_params["server_settings"] == {"application_name": "shop", "search_path": "app"}
    assert database.connect_params["statement_cache_size"] == 0


async def always(*_):
    return True


@pytest.mark.parametrize("option", ["transaction", "rollback_on", "exclude"])
def test_an_async_function_is_no_predicate(option):
    """Its coroutine would count as true, for each request."""
    with pytest.raises(ConfigurationError, match=rf"{option}: always is an async function"):
        Options(**{option: [always] if option == "exclude" else always})


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        (
            "mysql://u@h/d?max_connections=8",
            r"max_connections is an option of a pool, and mysql:// .* Write mysql\+pool://",
        ),
        (
            "sqlite:///d.db?max_connections=8&stale_timeout=9",
            r"max_connections, stale_timeout are options .* sqlite\+pool://",
        ),
        ("mariadb://u@h/d", r"unknown scheme 'mariadb'\. Did you mean mysql\+pool\?"),
        ("postgresql+psycopg2://u@h/d", r"Did you mean postgresql\+pool\?"),
        ("sqlite+aiosqlite:///d.db", r"Did you mean sqlite\+async\?"),
        ("mysq://u@h/d", r"Did you mean mysql\+pool\?"),
        ("oracle://u@h/d", r"unknown scheme 'oracle'\. It looks like"),
        ("sqlite://d.db", r"names a host, and no file: write sqlite:///d\.db, with four"),
        ("sqlite+pool://u:p@d.db", r"names a host, and no file: write sqlite\+pool:///d\.db, with four"),
    ],
)
def test_a_url_that_some_other_library_or_a_pool_would_take_is_told_what_to_write(url, remedy):
    with pytest.raises(ConfigurationError, match=remedy):
        Peewee(url)


@pytest.mark.parametrize("scheme", ["sqlite", "sqlite+pool", "sqlite+async"])
def test_a_file_that_stands_where_a_host_would_is_not_a_database_in_memory(scheme):
    with pytest.raises(ConfigurationError, match=f"write {re.escape(scheme)}:///d.db"):
        connect(f"{scheme}://d.db")


@pytest.mark.parametrize("scheme", ["mariadb", "postgresql+psycopg2", "mysq"])
def test_so_is_one_given_to_connect(scheme):
    with pytest.raises(ConfigurationError, match=r"Did you mean (mysql|postgresql)\+pool\? There are mysql\[\+pool\]"):
        connect(f"{scheme}://u@h/d")


@pytest.mark.parametrize(("url", "told"), [("postgresql://u:hunter2@h/d", True), ("sqlite:///d.db", False)])
def test_a_url_that_makes_no_pool_says_so_in_the_log(url, told, caplog):
    """As platforms hand them out; SQLite needs none."""
    connect_url(url)
    messages = [record.getMessage() for record in caplog.records]
    expected = (
        "The database URL postgresql://h/d makes no pool, so each unit of work connects anew. Write postgresql+pool://"
    )
    assert [message.startswith(expected) for message in messages] == [True] * told
    assert "hunter2" not in str(messages)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DATABASE_URL": ""}, "where DATABASE_URL is empty now"),
        ({"DATABASE_URL": "", "PEEWEE_DATABASE": "shop"}, "PEEWEE_DATABASE in the environment is no database URL"),
        (
            {"DATABASE_URL": "mysql://u:hunter2@h:x/d"},
            "DATABASE_URL in the environment: The database URL .* is malformed",
        ),
    ],
)
def test_an_environment_that_names_no_database_is_told_which_variable(environment, message, monkeypatch):
    for variable in ("DATABASE_URL", "PEEWEE_DATABASE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=message) as caught:
        PeeweeMiddleware(lambda *_: None)
    assert "hunter2" not in str(caught.value)


def test_an_option_of_the_pool_is_told_where_it_belongs():
    with pytest.raises(
        ConfigurationError, match=r"Unknown option max_connections\. It is an option of the pool: .*=\.\.\.$"
    ):
        Peewee("sqlite:///d.db", max_connections=3)
    with pytest.raises(ConfigurationError, match=r"key PEEWEE_STALE_TIMEOUT\. It is an option of the pool"):
        Peewee("sqlite:///d.db").runtime.configure({"PEEWEE_STALE_TIMEOUT": 3})
