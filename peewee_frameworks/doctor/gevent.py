"""What `peewee_frameworks.gevent` finds in this process, in the doctor's words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peewee_frameworks import gevent

from .report import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .case import Case

_LINK = "docs/how-to/gevent.md#when-the-order-was-wrong"
_SEVERITY: dict[gevent.Level, Severity] = {"note": "note", "serial": "warning", "unsafe": "error", "deadlock": "error"}
_WHY: dict[gevent.Level, str] = {
    "note": "This package makes up for it here; Peewee without it would not work.",
    "serial": "Greenlets are served one after the other: the worker is as slow as if it had one.",
    "unsafe": "Requests share what they must not share: one gets the other's connection, and its transaction.",
    "deadlock": "The worker can freeze, and no timeout fires.",
}
_PATCH_FIRST = (
    "from gevent import monkey; monkey.patch_all() as the first lines of what is loaded first: the module that the "
    "server names, and gunicorn.conf.py with preload_app"
)
_CHANGE = {
    "psycopg-before-patch": f"{_PATCH_FIRST}. Or peewee_frameworks.gevent.repair_psycopg() after the patch",
    "psycopg2-without-psycogreen": "psycogreen.gevent.patch_psycopg() after the patch, or psycopg 3",
    "driver-blocks-hub": "PyMySQL under gevent",
    "sockets-not-patched": "monkey.patch_all() without arguments",
    "threads-not-patched": "monkey.patch_all() without arguments",
}


def findings(case: Case) -> Iterator[Finding]:
    """Diagnose a database, before it is connected."""
    for found in gevent.diagnose(case.database):
        yield Finding(
            found.code,
            _SEVERITY[found.level],
            found.text[0].upper() + found.text[1:],
            _WHY[found.level],
            _CHANGE.get(found.code, _PATCH_FIRST),
            link=_LINK,
        )
