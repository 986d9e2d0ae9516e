"""Ask a live server, within a time limit: through a connection of the database's own, as the application would have it."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from _queue import Empty
from _queue import SimpleQueue as NativeQueue
from typing import TYPE_CHECKING, Any

from peewee_frameworks.scope import connection_scope

from . import mysql, postgres, sqlite
from .case import is_async
from .server import Server

if TYPE_CHECKING:
    from collections.abc import Callable

    from .case import Case

_ROUND_TRIPS = 5
_LABEL = "peewee_frameworks on the command line"


class NoAnswer(Exception):
    """The server did not answer in time, or there is no file to open; the message says which."""


def ask(case: Case, timeout: float) -> Server:
    """Connect, read what the findings need, and give the connection back.

    Args:
        case: the database.
        timeout: seconds for all of it.

    Raises: `NoAnswer`, and what connecting or querying raises.
    """
    database = case.database
    if case.kind == "sqlite" and (missing := sqlite.missing_file(database)):
        raise NoAnswer(f"there is no file {missing}, and looking makes none")
    reader = {"sqlite": sqlite.read, "mysql": mysql.read, "postgres": postgres.read}.get(case.kind)

    def read(server: Server) -> None:
        took = []
        for _ in range(_ROUND_TRIPS):
            started = time.perf_counter()
            database.execute_sql("SELECT 1").fetchone()
            took.append(time.perf_counter() - started)
        server.round_trip_seconds = statistics.median(took)
        if reader is not None:
            reader(case, server)

    def ask_sync() -> Server:
        server = Server()
        started = time.perf_counter()
        try:
            with connection_scope(database, label=_LABEL):
                database.connect(reuse_if_open=True)
                server.connect_seconds = time.perf_counter() - started
                read(server)
        finally:
            if hasattr(database, "close_idle"):
                database.close_idle()
        return server

    async def ask_async() -> Server:
        server = Server()
        started = time.perf_counter()
        try:
            async with connection_scope(database, label=_LABEL):
                await database.aconnect()
                server.connect_seconds = time.perf_counter() - started
                await database.run(read, server)
        finally:
            await database.close_pool()
        return server

    return within(timeout, (lambda: asyncio.run(ask_async())) if is_async(database) else ask_sync)


def within(seconds: float, function: Callable[[], Server]) -> Server:
    """Call a function in a thread and return what it returns; the thread is left behind if it takes longer.

    A native thread, patched or not: a driver that waits in C would stop a greenlet's clock too.

    Raises: `NoAnswer`; what the function raises.
    """
    outcome: Any = NativeQueue()

    def work() -> None:
        try:
            outcome.put((function(), None))
        except BaseException as error:  # noqa: BLE001 - raised again below
            outcome.put((None, error))

    _native("_thread", "start_new_thread")(work, ())
    try:
        server, error = outcome.get(timeout=seconds)
    except Empty:
        raise NoAnswer(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    result: Server = server
    return result


def _native(module: str, name: str) -> Any:
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None:
        return monkey.get_original(module, name)
    return getattr(__import__(module), name)
