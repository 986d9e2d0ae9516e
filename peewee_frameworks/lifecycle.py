"""The start and the stop of databases, in one process of an application: opened and checked, and closed, once each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

import peewee
from playhouse.pool import PooledDatabase as PlayhousePooledDatabase

from .background import background
from .errors import ConfigurationError, DatabaseUnavailable, PoolExhausted
from .forks import watch_forks
from .redact import redact
from .schema import create_tables
from .scope import connection_scope
from .state import unwrap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .config import Options
    from .state import State

logger = logging.getLogger("peewee_frameworks.app")

_LABEL = "the start of the application"


class Lifecycle:
    """What of some databases is open, for how many applications: the first start opens them, the last stop closes them.

    A database that several of these have open is closed by the last.
    """

    def __init__(self) -> None:
        self.applications = 0
        """How many have started and not stopped."""
        self._open: list[State] = []
        watch_forks(self)

    def after_fork(self) -> None:
        """Count nobody: nothing has been started in this process."""
        self.applications = 0
        while self._open:
            self._open.pop().users -= 1

    def start(self, databases: Mapping[str, State], options: Options) -> None:
        """Check that the databases answer and create tables, by option. Blocks; `start_async` does not.

        Args:
            databases: by alias.
            options: `check` and `create_tables` are asked.

        Raises: `DatabaseUnavailable` with ``check="fail"``; `ConfigurationError`. What had opened is closed then.
        """
        _refuse_deferred(databases)
        if not self.applications:
            opened: list[State] = []
            try:
                for alias, state in databases.items():
                    _enter(state, opened)
                    _start(alias, state, options)
            except BaseException:
                _close(opened)
                raise
            self._open += opened
        self.applications += 1

    async def start_async(self, databases: Mapping[str, State], options: Options) -> None:
        """Do what `start` does from an event loop, without blocking it; pools of asynchronous databases open in this loop."""
        _refuse_deferred(databases)
        if not self.applications:
            opened: list[State] = []
            try:
                for alias, state in databases.items():
                    _enter(state, opened)
                    await _start_async(alias, state, options)
            except BaseException:
                await _close_async(opened, options.close_timeout)
                raise
            self._open += opened
        self.applications += 1

    def is_last_stop(self) -> bool:
        """Count an application that stops; return whether it was the last, so that `close` has to follow."""
        self.applications = max(self.applications - 1, 0)
        return not self.applications

    def close(self) -> None:
        """Close what was opened, the last first; nothing if nothing was. Blocks."""
        _close(self._open)

    async def close_async(self, timeout: float) -> None:
        """Do what `close` does from an event loop, without blocking it.

        Args:
            timeout: seconds to wait for connections of asynchronous databases that are in use.
        """
        await _close_async(self._open, timeout)


def _refuse_deferred(databases: Mapping[str, State]) -> None:
    for alias, state in databases.items():
        if state.database.deferred:
            raise ConfigurationError(
                f"Database {alias!r}, a {type(state.database).__name__}, is deferred. Call `db.init(...)` before the "
                "application starts."
            )


def _enter(state: State, opened: list[State]) -> None:
    state.users += 1
    opened.append(state)


def _start(alias: str, state: State, options: Options) -> None:
    database = state.database
    if state.is_async:
        raise ConfigurationError(
            f"Database {alias!r}, {state.name}, is asynchronous, and this application is not. Give it a sync database."
        )
    _open_pool(database)
    models = _models_of(database, options)
    if options.check == "off" and not models:
        return
    try:
        with connection_scope(database, label=_LABEL):
            with _arguments_named(alias, state):
                database.connect()
            create_tables(database, models)
    except peewee.OperationalError as error:
        _unreachable(alias, state, options, error)


async def _start_async(alias: str, state: State, options: Options) -> None:
    if not state.is_async:
        await asyncio.wrap_future(background.submit(lambda: _start(alias, state, options)))
        return
    database = state.database
    models = _models_of(database, options)
    if options.check == "off" and not models:
        return
    try:
        async with connection_scope(database, label=_LABEL):
            with _arguments_named(alias, state):
                await database.aconnect()
            await database.run(create_tables, database, models)
    except peewee.OperationalError as error:
        _unreachable(alias, state, options, error)


@contextlib.contextmanager
def _arguments_named(alias: str, state: State) -> Iterator[None]:
    """Say whose arguments they are that a driver does not take; which ones, it says itself."""
    try:
        yield
    except (TypeError, peewee.ProgrammingError, DatabaseUnavailable) as error:
        told = "argument" if isinstance(error, TypeError) else "invalid connection option"  # libpq's
        if told not in str(error):  # of a hook of the application, perhaps
            raise
        reason = " ".join(redact(str(error), [state.database]).split())
        raise ConfigurationError(
            f"Database {alias!r}, {state.name}: its driver does not take the arguments that it was made with: {reason}."
        ) from error


def _models_of(database: Any, options: Options) -> list[Any]:
    return [model for model in options.create_tables if unwrap(model._meta.database) is database]


def _unreachable(alias: str, state: State, options: Options, error: Exception) -> None:
    reason = " ".join(redact(str(error), [state.database]).split())
    stop = "" if reason.endswith((".", "?")) else "."  # libpq asks whether it is running
    busy = isinstance(error, PoolExhausted)
    what = "has no connection to spare at start" if busy else "cannot be reached at start"
    message = f"Database {alias!r}, {state.name}, {what}: {reason}{stop} "
    remedy = "Have it given back first" if busy else "Start it, or correct its address, name, user or password"
    if options.check == "fail":
        raise DatabaseUnavailable(f"{message}{remedy}; or pass check='warn' to start without it.") from error
    logger.warning("%s", f"{message}{remedy}; the application starts without it.", extra={"database": state.name})


def _close(opened: list[State]) -> None:
    while opened:
        _leave(opened.pop())


async def _close_async(opened: list[State], timeout: float) -> None:
    while opened:
        await _leave_async(opened.pop(), timeout)


def _leave(state: State) -> None:
    state.users -= 1
    if state.users == 0:  # another application of this process may use the same database
        if state.runner is not None:
            state.runner.close()
        if state.probe is not None:
            state.probe.close()
        _close_pool(state.database)


async def _leave_async(state: State, timeout: float) -> None:
    if not state.is_async:  # an asynchronous probe keeps no connection
        await asyncio.wrap_future(background.submit(lambda: _leave(state)))
        return
    state.users -= 1
    if state.users == 0:
        await state.database.close_pool(timeout)


def _open_pool(database: Any) -> None:
    pool = getattr(database, "pool", None)
    if pool is not None:
        pool.open()  # an application may start again after it has stopped, as in tests


def _close_pool(database: Any) -> None:
    pool = getattr(database, "pool", None)
    if pool is not None:
        pool.close()
    elif isinstance(database, PlayhousePooledDatabase):
        database.close_idle()
