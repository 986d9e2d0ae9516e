"""SQLite: what its file and its connections are set to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import playhouse.pool

from peewee_frameworks.sqlite import is_in_memory

from .frameworks import has_transactions
from .report import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .case import Case
    from .server import Server


def read(case: Case, server: Server) -> None:
    """Read the pragmas of a connection as the application gets it."""
    execute = case.database.execute_sql
    server.version = f"SQLite {execute('SELECT sqlite_version()').fetchone()[0]}"
    for name in ("journal_mode", "busy_timeout"):
        server.settings[name] = execute(f"PRAGMA {name}").fetchone()[0]


def missing_file(database: Any) -> str | None:
    """Return the name of the file if it does not exist: to connect would make it."""
    name = str(database.database)
    if is_in_memory(database) or not name or name.startswith("file:") or Path(name).exists():
        return None
    return name


def findings_before(case: Case) -> Iterator[Finding]:
    """Find what can be said without a connection."""
    if is_in_memory(case.database):
        if case.serving.workers > 1:
            yield Finding(
                "sqlite-memory",
                "error",
                f"The database is in memory, and there are {case.serving.count}.",
                "Each process has a database of its own, which is empty when the process starts.",
                "a file, for example SqliteDatabase('shop.db')",
            )
        return
    # An adapter sets it before the first connection.
    stock = isinstance(case.database, playhouse.pool.PooledSqliteDatabase) and case.pool.kind == "playhouse"
    if stock and case.runtime is None and case.params.get("check_same_thread", True):
        yield Finding(
            "sqlite-same-thread",
            "error",
            "The pool is playhouse.pool's and check_same_thread is not False.",
            "sqlite3 binds a connection to the thread that opened it, and the pool hands it to others: they get "
            "ProgrammingError. (An application with a Peewee(...) of this package sets it by itself; name the "
            "application to have that looked at.)",
            "check_same_thread=False, or PooledSqliteDatabase of peewee_frameworks.pool",
        )


def findings(case: Case, server: Server) -> Iterator[Finding]:
    """Find what makes one connection wait for, or fail beside, another."""
    if is_in_memory(case.database):
        return
    mode, wait = server.settings["journal_mode"], server.settings["busy_timeout"]
    if mode != "wal":
        yield Finding(
            "sqlite-journal",
            "warning",
            f"The journal mode is {mode!r}, not 'wal'.",
            "A write waits until all readers are done, and all readers wait for a commit: requests hold each other "
            "up, and those that wait longer than the busy timeout fail with 'database is locked'.",
            "pragmas={'journal_mode': 'wal'}",
        )
    if not wait:
        yield Finding(
            "sqlite-busy-timeout",
            "warning",
            "The busy timeout is 0.",
            "There is one writer at a time, and a second one fails at once with 'database is locked' instead of "
            "waiting for its turn.",
            "timeout=5 (seconds; Peewee's default)"
            if case.pool.kind == "none"
            else "no busy_timeout=0 among the pragmas",
        )
    runtime = case.runtime
    if runtime is not None and case.database._lock_type is None and has_transactions(case.target, runtime):
        yield Finding(
            "sqlite-deferred",
            "warning",
            "Requests run in transactions, which begin as readers (lock_type is not set).",
            "A transaction that has read and then writes fails at once with 'database is locked' if another one has "
            "written meanwhile; the busy timeout does not help there.",
            "lock_type='IMMEDIATE' among the database's keywords, and transactions only for the requests that write",
        )
