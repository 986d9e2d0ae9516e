"""``check``: reach each database, measure the way, name the server, say whether the way is encrypted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from peewee_frameworks.doctor import check, target
from tests.doctor.helpers import source
from tests.support.private import mariadb_with_tls, postgres_with_tls
from tests.support.proxy import Proxy
from tests.support.servers import KINDS, require_server, server_kwargs, server_url

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.doctor.helpers import Project
    from tests.support.databases import Place
    from tests.support.servers import Kind

NAMES = {"sqlite": "SQLite 3.", "mysql": ("MariaDB ", "MySQL "), "postgres": "PostgreSQL "}


@pytest.mark.parametrize("kind", KINDS)
def test_a_database_that_answers(kind: Kind, project: Project) -> None:
    require_server(kind)
    (project.directory / "shop.db").touch()
    project.write(shop=source("sqlite", database="shop.db") if kind == "sqlite" else source(kind))
    done = project.run("check", "shop:db", "--json")
    assert (done.code, done.err) == (0, "")
    assert {key: value for key, value in done.json.items() if key != "databases"} == {"schema": 1, "target": "shop:db"}
    result = done.json["databases"]["default"]
    assert result["database"].startswith("Pooled")
    assert (result["ok"], result["error"], result["pooler"]) == (True, None, None)
    assert result["server"].startswith(NAMES[kind])
    assert 0 < result["round_trip_seconds"] < result["connect_seconds"] < 10 or kind == "sqlite"
    text = project.run("check", "shop:db")
    assert text.code == 0
    assert text.out.startswith(f"default: ok      {result['database']}: {result['server']}, ")
    assert text.out.endswith(" ms\n")


def test_several_databases_of_which_one_is_down(project: Project, free_port: int) -> None:
    require_server("mysql")
    down = source("mysql", port=free_port, password="opensesame").replace("db = ", "down = ")
    project.write(shop=f"{source('mysql')}{down}both = {{'main': db, 'archive': down}}\n")
    done = project.run("check", "shop:both", "--json")
    assert done.code == 1
    main, archive = (done.json["databases"][alias] for alias in ("main", "archive"))
    assert main["ok"] is True
    assert archive["ok"] is False
    assert "Connection refused" in archive["error"]
    assert archive["server"] is None
    text = project.run("check", "shop:both")
    assert "\narchive: FAILED  PooledMySQLDatabase(" in text.out
    assert "opensesame" not in done.out + text.out


def test_a_round_trip_is_what_it_takes(postgres: Place, sound: Callable[..., Any]) -> None:
    """Measured through a proxy that keeps each direction for 50 ms."""
    with Proxy(postgres.address) as proxy:
        proxy.delay(0.05)
        database = sound(postgres.via(*proxy.address))
        result = check.check(target.describe("it", database), 20.0)["default"]
    assert result.round_trip_seconds is not None
    assert 0.1 <= result.round_trip_seconds < 5
    assert result.connect_seconds is not None
    assert result.connect_seconds > result.round_trip_seconds


@pytest.mark.parametrize("kind", ["mysql", "postgres"])
@pytest.mark.parametrize("silent", [True, False])
def test_a_server_that_does_not_answer(kind: Kind, silent: bool, project: Project) -> None:
    """It accepts and stays silent, or goes on talking slower than one can wait; PyMySQL itself would wait for ever."""
    require_server(kind)
    login = server_kwargs(kind)
    with Proxy((login["host"], login["port"])) as proxy:
        if silent:
            proxy.hang()
        else:
            proxy.delay(0.8)
        url = server_url(kind).replace(
            f"{login['host']}:{login['port']}", f"root:opensesame@{proxy.address[0]}:{proxy.port}"
        )
        url = url.replace(f"{login['user']}@root:", f"{login['user']}:")
        done = project.run("check", url, "--timeout", "1", "--json")
    assert done.code == 1
    assert done.json["databases"]["default"]["error"] == "no answer within 1 s"
    assert "opensesame" not in done.out + done.err


def test_a_wrong_password(project: Project) -> None:
    """The driver's message is told, the password is not."""
    require_server("mysql")
    login = server_kwargs("mysql")
    url = f"mysql://{login['user']}:opensesame@{login['host']}:{login['port']}/{login['database']}"
    done = project.run("check", url)
    assert done.code == 1
    assert "Access denied for user" in done.out
    assert "opensesame" not in done.out + done.err


TLS = {
    "postgres": (
        postgres_with_tls,
        """
        from peewee import PostgresqlDatabase
        login = dict(user="postgres", host="{host}", port={port}, prefer_psycopg3=True)
        encrypted = PostgresqlDatabase("postgres", sslmode="require", **login)
        plain = PostgresqlDatabase("postgres", sslmode="disable", **login)
        both = dict(encrypted=encrypted, plain=plain)
        """,
    ),
    "mysql": (
        mariadb_with_tls,
        """
        import ssl
        from peewee import MySQLDatabase
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        login = dict(user="root", host="{host}", port={port})
        encrypted = MySQLDatabase("mysql", ssl=context, **login)
        plain = MySQLDatabase("mysql", ssl_disabled=True, **login)
        both = dict(encrypted=encrypted, plain=plain)
        """,
    ),
}


@pytest.mark.parametrize("kind", TLS)
def test_whether_the_way_is_encrypted(kind: str, project: Project) -> None:
    """On a server with a certificate, with TLS and without."""
    serve, module = TLS[kind]
    with serve() as (host, port):
        project.write(shop=module.format(host=host, port=port))
        done = project.run("check", "shop:both", "--json")
        assert done.code == 0, done.out + done.err
        encrypted, plain = (done.json["databases"][alias]["tls"] for alias in ("encrypted", "plain"))
        assert encrypted.startswith("TLSv1.")
        assert plain == ""
        text = project.run("check", "shop:both").out
    assert f", TLS {encrypted}, " in text
    assert ", no TLS, " in text
