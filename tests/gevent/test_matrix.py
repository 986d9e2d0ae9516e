"""Every order of import, patch and creation, with every driver, on a stock pool and on ours."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.gevent.children import FROZEN, run_child
from tests.support.drivers import missing, require_modules
from tests.support.servers import require_server

if TYPE_CHECKING:
    from collections.abc import Iterator

ORDERS = [
    "patched first",
    "driver first",
    "peewee first",
    "created first",
    "connected first",
    "not patched",
    "without threads",
    "only sockets",
    "only threads",
]
LATE = ORDERS[1:5]
MODULES = {
    "pymysql": ["pymysql"],
    "psycopg": ["psycopg"],
    "psycopg2": ["psycopg2", "psycogreen"],
    "mysqlclient": ["MySQLdb"],
}
MATRIX = "test_ten_greenlets_succeed_or_are_told_why_not"
FREEZE_SECONDS = 3.0
DEADLINE = 30.0


def yields(order: str, driver: str) -> bool:
    """Whether the driver lets other greenlets run while it waits, in a process patched like this."""
    if driver == "mysqlclient":
        return False
    if driver == "pymysql":
        return order not in ("not patched", "only threads")
    if driver == "psycopg":
        return order in ("patched first", "without threads", "only sockets")
    return True  # psycogreen needs no patch


def expected_codes(order: str, driver: str, kind: str) -> set[str]:
    codes = set()
    if order == "not patched":
        codes.add("hub-not-patched")
    elif order in ("without threads", "only sockets"):
        codes.add("threads-not-patched")
    elif order == "only threads":
        codes.add("sockets-not-patched")
    if order in ("peewee first", "created first", "connected first"):
        codes.add("peewee-before-patch")
    if order in ("created first", "connected first") and kind == "stock":
        codes.add("database-before-patch")
    if order == "connected first" and driver == "pymysql":
        codes.add("connection-before-patch")
    if driver == "psycopg" and order in LATE:
        codes.add("psycopg-before-patch")
    if driver == "mysqlclient":
        codes.add("driver-blocks-hub")
    return codes


def is_refused(order: str, driver: str) -> bool:
    """Whether a stock pool cannot work: the driver yields, and the pool's locks do not."""
    return order in ("not patched", "without threads", "only sockets") and yields(order, driver)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, ...], Future[dict[str, Any]]]]:
    """The outcome of each case that was chosen, two processes at a time."""
    futures: dict[tuple[str, ...], Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor(2) as executor:
        for item in request.session.items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            if (
                item.path == request.path
                and item.originalname == MATRIX
                and missing(*MODULES[params["driver"]]) is None
            ):
                case = (params["order"], params["driver"], params["kind"])
                futures[case] = executor.submit(run_child, "matrix_case.py", *case, deadline=DEADLINE)
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.mark.parametrize("kind", ["ours", "stock"])
@pytest.mark.parametrize("driver", MODULES)
@pytest.mark.parametrize("order", ORDERS)
def test_ten_greenlets_succeed_or_are_told_why_not(
    order: str, driver: str, kind: str, outcomes: dict[tuple[str, ...], Future[dict[str, Any]]]
) -> None:
    """Ours serves all, at the same time where the driver can; a stock pool does too or is refused before it freezes."""
    require_server("mysql" if driver in ("pymysql", "mysqlclient") else "postgres")
    require_modules(*MODULES[driver])
    outcome = outcomes[order, driver, kind].result(DEADLINE + 60)

    assert outcome != FROZEN
    assert {code for code, _ in outcome["findings"]} == expected_codes(order, driver, kind)
    if kind == "stock" and is_refused(order, driver):
        assert outcome["ok"] == 0
        (message,) = outcome["errors"]
        assert message.startswith("GeventNotPatched")
        assert "from gevent import monkey\nmonkey.patch_all()" in message
        assert "deadlock" in {level for _, level in outcome["findings"]}
        return
    assert outcome["errors"] == {}
    assert outcome["ok"] == 10
    assert outcome["most"] <= 5
    assert (outcome["peak"] > 1) is yields(order, driver)  # how many at once is the machine's affair, up to 5
    for code, level in outcome["findings"]:  # each is told once, and no more often
        told = outcome["stderr"].count(f"[{code}]")
        assert told == (0 if level == "note" else 1), outcome["stderr"]


@pytest.mark.parametrize("kind", ["ours", "stock"])
@pytest.mark.parametrize(
    ("driver", "module", "yields"),
    [
        ("connector pure", "mysql.connector", True),
        ("connector", "mysql.connector.connection_cext", False),
        ("mariadb", "mariadb", False),
    ],
)
def test_the_connectors_serve_all_and_the_diagnosis_knows_which_of_them_block(
    driver: str, module: str, yields: bool, kind: str
) -> None:
    """MySQL Connector yields in Python and blocks in C; MariaDB's blocks."""
    require_server("mysql")
    require_modules(module)
    outcome = run_child("matrix_case.py", "patched first", driver, kind, deadline=DEADLINE)

    assert outcome["errors"] == {}
    assert outcome["ok"] == 10
    assert (outcome["peak"] > 1) is yields
    assert [code for code, _ in outcome["findings"]] == ([] if yields else ["driver-blocks-hub"])


@pytest.mark.parametrize("order", LATE)
@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_a_late_psycopg_is_repaired_by_option(order: str, kind: str) -> None:
    """With `repair`, psycopg 3 serves greenlets at the same time although it was imported before the patch."""
    require_server("postgres")
    outcome = run_child("matrix_case.py", order, "psycopg", kind, "repair", deadline=DEADLINE)

    assert outcome["errors"] == {}
    assert (outcome["ok"], outcome["peak"]) == (10, 5)
    assert "psycopg-before-patch" not in {code for code, _ in outcome["findings"]}


@pytest.mark.parametrize(
    ("order", "driver", "code"),
    [("created first", "pymysql", "database-before-patch"), ("without threads", "psycopg", "threads-not-patched")],
)
def test_playhouse_alone_freezes_where_the_diagnosis_says_deadlock(order: str, driver: str, code: str) -> None:
    """The recipe that fails: without this package, the process stands still and no timeout fires."""
    require_server("mysql" if driver == "pymysql" else "postgres")

    assert run_child("matrix_case.py", order, driver, "raw", deadline=FREEZE_SECONDS) == FROZEN
    looked = run_child("diagnose_case.py", order, driver, deadline=DEADLINE)
    assert [code, "deadlock"] in looked["findings"]
    assert looked["refused"].startswith("Pooled")


def test_playhouse_alone_shares_connections_where_the_diagnosis_says_unsafe() -> None:
    """The recipe that fails: Peewee imported before the patch has one state for all greenlets."""
    require_server("mysql")
    outcome = run_child("matrix_case.py", "peewee first", "pymysql", "raw", deadline=DEADLINE)

    assert outcome["ok"] < 10
    assert any("Connection already opened" in error for error in outcome["errors"])
    assert outcome["findings"] == [["peewee-before-patch", "unsafe"]]


def test_a_stock_pool_is_refused_before_a_wait_would_freeze_an_unpatched_hub() -> None:
    """Served one after the other, until somebody keeps a connection and yields: then the wait is refused at once."""
    require_server("mysql")
    outcome = run_child("exhausted_case.py", deadline=DEADLINE)

    assert outcome["first"] == 1
    assert outcome["second"].startswith("GeventNotPatched: PooledMySQLDatabase('")
    assert "monkey.patch_all()" in outcome["second"]
