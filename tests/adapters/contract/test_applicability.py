"""The table of what runs where says the truth."""

from __future__ import annotations

import re
from pathlib import Path

from tests.adapters.contract.applicability import ASYNC_PLACES, NOT_APPLICABLE, NOT_ASYNCHRONOUS, PLACES
from tests.adapters.contract.served import SERVERS
from tests.support.databases import ASYNC_DRIVERS
from tests.support.servers import KINDS


def test_every_line_names_a_case_and_a_server_and_has_a_reason():
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    cases = set(re.findall(r"^def (test_\w+)\(served: Served", source, re.MULTILINE))
    known = set(PLACES) | {name.partition("-")[0] for name in PLACES}
    assert set(PLACES) | set(ASYNC_PLACES) <= set(SERVERS)
    assert set(NOT_ASYNCHRONOUS) <= cases
    for case, reasons in NOT_APPLICABLE.items():
        assert case in cases, case
        assert set(reasons) <= known, case
        assert all(reasons.values()), case


def test_every_framework_meets_every_database():
    for framework in ("flask", "sanic", "fastapi", "starlette"):
        kinds = [kinds for name, kinds in PLACES.items() if name.startswith(framework)]
        assert set().union(*kinds) == set(KINDS), "the core cases"
        assert len({each[0] for each in kinds}) == 2, "all cases"


def test_every_asynchronous_framework_meets_asynchronous_drivers():
    """The whole contract with psycopg and aiosqlite at least, the core of it with all."""
    assert {name.partition("-")[0] for name in ASYNC_PLACES} == {"sanic", "fastapi", "starlette"}
    assert {drivers[0] for drivers in ASYNC_PLACES.values()} >= {"psycopg", "aiosqlite"}
    assert {driver for drivers in ASYNC_PLACES.values() for driver in drivers} == set(ASYNC_DRIVERS)
