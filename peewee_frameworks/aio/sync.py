"""Peewee's asynchronous idiom on a sync database: the same handlers, whichever driver is behind them.

``await db.run(function)``, ``await query.aexecute()``, ``await db.list(query)``, ``async with db.atomic()``,
``await Model.aget()``: on a database of Peewee's asyncio layer these wait for the driver, here each runs on a thread of one
bounded executor, admitted on the loop before a thread is used. Moving between drivers is a change of the database object.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import itertools
import logging
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import peewee

from peewee_frameworks.background import background
from peewee_frameworks.frame import current_lineage, get_frames
from peewee_frameworks.run import Runner, refuse_coroutines
from peewee_frameworks.scope import Scope
from peewee_frameworks.state import install

from .models import AsyncModel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from peewee_frameworks.state import State

_Result = TypeVar("_Result")

logger = logging.getLogger("peewee_frameworks.scope")

_DEFAULT_THREADS = 32
_DEFAULT_TIMEOUT = 30.0
_BATCH = 100

_making_runner = threading.Lock()


class _HeldOpen:
    """An entry in Peewee's stack of contexts: one ``async with db``."""


_HELD = _HeldOpen()


class Fetched:
    """The result of `aexecute_sql`, read to its end: what of a DB-API cursor can be had without the connection."""

    def __init__(self, cursor: Any) -> None:
        self.description = cursor.description
        self.rowcount = cursor.rowcount
        self.lastrowid = getattr(cursor, "lastrowid", None)
        self._rows = list(cursor.fetchall()) if cursor.description else []
        self._next = iter(self._rows)

    def fetchone(self) -> Any:
        """Return the next row, or None."""
        return next(self._next, None)

    def fetchall(self) -> list[Any]:
        """Return the rows that are left."""
        return list(self._next)

    def __iter__(self) -> Iterator[Any]:
        return self._next


def _complete(function: Callable[..., _Result], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Result:
    result = function(*args, **kwargs)
    if isinstance(result, peewee.CursorWrapper):
        result.fill_cache()  # here and not on the loop, and before the connection goes back
    return result


def _complete_and(
    end: Callable[[], object], function: Callable[..., _Result], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Result:
    try:
        return _complete(function, args, kwargs)
    finally:
        end()


def _runner(state: State) -> Runner:
    runner: Runner | None = state.runner
    return runner or _make_runner(state)


def _make_runner(state: State) -> Runner:
    with _making_runner:  # loops of several threads may come to it at once
        runner: Runner | None = state.runner
        if runner is not None:
            return runner
        database = state.database
        wait = getattr(database, "_wait_timeout", None) or _DEFAULT_TIMEOUT
        threads = getattr(database, "_max_connections", None) or _DEFAULT_THREADS
        runner = state.runner = Runner(threads, None if wait == float("inf") else wait)
        return runner


class _Unit:
    """The current unit of work; where there is none with this database, one for the while."""

    def __init__(self, state: State, label: str) -> None:
        self._state = state
        frames = get_frames()
        scope = frames.scope if frames is not None and frames.has(state) else None
        self.own = scope is None
        self.marks: tuple[Any, Any] = (None, None)  # of the context, before the block and in it
        self.scope = Scope([state], label) if scope is None else scope
        if self.own:
            self.scope.enter()

    def leave(self) -> None:
        """Leave it, and its end to somebody else."""
        if self.own:
            self.scope.exit()

    async def run(self, function: Callable[[], _Result]) -> _Result:
        """Call sync code on a thread, in this unit of work, from outside it."""
        if not self.own:
            return await run(self._state, function)
        self.scope.enter()
        try:
            return await _runner(self._state).run(self.scope, function)
        finally:
            self.scope.exit()

    async def end(self) -> None:
        if self.own:
            pending = self.scope.finish()
            self.scope.exit()
            for future in pending:
                await asyncio.wrap_future(future)


async def run(state: State, function: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> _Result:
    """Call sync code on a thread, in the current unit of work, or in one of its own.

    Raises: what the function raises; `PoolTimeout` if no place came free in time; `ConfigurationError` if it is a coroutine
        function.
    """
    refuse_coroutines(function)
    frames = get_frames()
    if frames is not None and frames.scope is not None and frames.has(state):
        scope = frames.scope
        if scope.idles:
            return await _runner(state).run(scope, _complete_and, scope.release_early, function, args, kwargs)
        return await _runner(state).run(scope, _complete, function, args, kwargs)
    scope = Scope([state], f"db.run({getattr(function, '__qualname__', function)})")
    scope.enter()
    try:
        return await _runner(state).run(scope, _complete_and, scope.finish, function, args, kwargs)
    finally:
        scope.exit()  # it is finished on the thread: a cancelled caller leaves the call to its end there


# -- transaction blocks --------------------------------------------------------------------------------------------------

# The units that blocks have opened. A block object may be entered several times, so each entry is noted with its context.
_units: contextvars.ContextVar[tuple[tuple[object, _Unit], ...]] = contextvars.ContextVar("peewee_units", default=())
_ending: set[asyncio.Task[Any]] = set()


async def enter_block(block: Any) -> Any:
    """Do what ``with block`` does at its begin, for ``async with``."""
    state = install(block.db)
    unit = _Unit(state, "an `async with` block")
    _units.set((*_units.get(), (block, unit)))

    before = current_lineage.get()
    marks: list[Any] = []

    def enter() -> Any:
        result = block.__enter__()
        marks.append(current_lineage.get())
        return result

    def undo() -> None:
        try:
            if marks:  # it went on in its thread
                current_lineage.set(marks[0])
                error = asyncio.CancelledError()
                block.__exit__(type(error), error, None)
        except Exception:
            logger.debug(
                "%s: a block whose begin was cancelled is undone by its scope's end.", state.name, exc_info=True
            )
        finally:
            if unit.own:
                unit.scope.finish()

    try:
        result = await _runner(state).call(unit.scope, enter, undo=undo)
    except asyncio.CancelledError:
        _pop(block).leave()
        raise
    except BaseException:
        await _pop(block).end()
        raise
    unit.marks = (before, marks[0])
    current_lineage.set(marks[0])  # set on the thread, in a copy of this context
    return result


async def exit_block(block: Any, *exc_info: Any) -> Any:
    """Do what ``with block`` does at its end.

    It comes though the caller is cancelled: what follows would be part of a block that nobody ends, and be rolled back.
    """
    # The loop closes a generator that was dropped, in a task of its own; the scope's end undoes the block.
    if exc_info[0] is GeneratorExit and not any(entry[0] is block for entry in _units.get()):
        return None
    unit = _pop(block)
    outcome = exc_info

    def leave() -> Any:
        try:
            return block.__exit__(*outcome)
        finally:
            if unit.scope.idles:
                unit.scope.release_early()

    ending = asyncio.ensure_future(_runner(install(block.db)).run(unit.scope, leave))
    try:
        return await asyncio.shield(ending)
    except asyncio.CancelledError:
        if outcome[0] is None:
            # No COMMIT that has not begun. Not the error itself, whose traceback would keep this call and itself.
            outcome = (asyncio.CancelledError, asyncio.CancelledError(), None)
        raise
    finally:
        before, mark = unit.marks
        if current_lineage.get() is mark:
            current_lineage.set(before)
        if ending.done():
            await unit.end()
        else:
            _background(_finish_after(ending, unit))
            unit.leave()


async def _finish_after(ending: asyncio.Future[Any], unit: _Unit) -> None:
    try:
        await asyncio.wait([ending])
    finally:
        if unit.own:
            unit.scope.finish()


async def call_block(block: Any, name: str) -> Any:
    """Call `commit` or `rollback` of a block in the middle of it."""
    return await run(install(block.db), getattr(block, name))


def _background(work: Any) -> None:
    task = asyncio.ensure_future(work)
    _ending.add(task)
    task.add_done_callback(_ending.discard)


def _pop(block: object) -> _Unit:
    entries = _units.get()
    for index in reversed(range(len(entries))):
        if entries[index][0] is block:
            _units.set(entries[:index] + entries[index + 1 :])
            return entries[index][1]
    raise RuntimeError(
        "The `async with` block ends in another task than it began in. End it where it began; a test's fixture must not hold "
        "it across its yield."
    )


# -- the database --------------------------------------------------------------------------------------------------------


class AsyncIdiom:
    """Mixed into a sync database: the methods that Peewee's asyncio layer gives its own."""

    __slots__ = ()

    async def run(self, function: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> _Result:
        """Call sync code that queries, on a thread, in the current unit of work; such calls take turns.

        Outside one, each call has a connection of its own; ``async with db`` or ``async with db.atomic()`` keeps one.

        Raises: what the function raises; `PoolTimeout` if no place came free in time.
        """
        return await run(install(self), function, *args, **kwargs)

    async def aexecute(self, query: Any) -> Any:
        """Execute a query; its rows are read."""
        query.bind(self)
        return await self.run(query.execute)

    async def aexecute_sql(self, sql: str, params: Any = None) -> Fetched:
        """Execute SQL; its rows are read."""
        return await self.run(lambda: Fetched(self.execute_sql(sql, params)))  # type: ignore[attr-defined]

    async def get(self, query: Any) -> Any:
        """Return the query's first row; raises `DoesNotExist`."""
        return await self.run(query.get)

    async def first(self, query: Any, n: int = 1) -> Any:
        """Return the first row or rows, or None."""
        return await self.run(query.first, n=n)

    async def list(self, query: Any) -> Any:
        """Return the rows as a list."""
        return await self.run(lambda: [*query])

    async def scalar(self, query: Any) -> Any:
        """Return the first column of the first row."""
        return await self.run(query.scalar)

    async def count(self, query: Any) -> int:
        """Return how many rows there are."""
        result: int = await self.run(query.count)
        return result

    async def exists(self, query: Any) -> bool:
        """Return whether there is a row."""
        result: bool = await self.run(query.exists)
        return result

    async def aprefetch(self, query: Any, *subqueries: Any) -> Any:
        """Return the rows with their related rows, read in a query for each model."""
        return await self.run(peewee.prefetch, query, *subqueries)

    async def iterate(self, query: Any, buffer_size: int | None = None) -> AsyncIterator[Any]:
        """Give the rows, a batch at a time; the driver may hold them all. Close it early with ``aclosing``."""
        query.bind(self)
        unit = _Unit(install(self), "db.iterate")
        unit.leave()  # whoever is given a row is where he was; and where he stays, if he goes on without the rest
        rows: Iterator[Any] = iter(())
        try:
            rows = await unit.run(lambda: query.clone().iterator(self))
            while batch := await unit.run(lambda: [*itertools.islice(rows, buffer_size or _BATCH)]):
                for row in batch:
                    yield row
        finally:
            rows = iter(())  # a traceback keeps what is here, and an open cursor keeps SQLite's file locked
            await unit.end()

    async def acreate_tables(self, *args: Any, **kwargs: Any) -> None:
        """Create tables."""
        await self.run(self.create_tables, *args, **kwargs)  # type: ignore[attr-defined]

    async def adrop_tables(self, *args: Any, **kwargs: Any) -> None:
        """Drop tables."""
        await self.run(self.drop_tables, *args, **kwargs)  # type: ignore[attr-defined]

    def after_commit(self, fn: Callable[[], Any]) -> Any:
        """Have `fn` called after the COMMIT; see Peewee's `Database.after_commit`.

        Raises: ValueError for a coroutine function, whose coroutine nobody would await.
        """
        if inspect.iscoroutinefunction(fn):
            raise ValueError(
                "after_commit() takes a plain function: nobody would await a coroutine. Give it a function that hands the work "
                "to a task or a queue."
            )
        return super().after_commit(fn)  # type: ignore[misc]

    def aatomic(self, *args: Any, **kwargs: Any) -> Any:
        """Return what `atomic` returns, for ``async with``."""
        install(self)
        return self.atomic(*args, **kwargs)  # type: ignore[attr-defined]

    async def aconnect(self) -> None:
        """Connect the current unit of work."""
        await self.run(self.connect, reuse_if_open=True)  # type: ignore[attr-defined]

    async def aclose(self) -> bool:
        """Give the connection of the current unit of work back; say whether there was one."""
        closed: bool = await self.run(self.close)  # type: ignore[attr-defined]
        return closed

    async def __aenter__(self) -> Any:
        state = install(self)
        unit = _Unit(state, "`async with db`")
        _units.set((*_units.get(), (self, unit)))

        def hold() -> None:
            self.connect(reuse_if_open=True)  # type: ignore[attr-defined]
            state.ctx.append(_HELD)

        try:
            await _runner(state).run(unit.scope, hold)
        except BaseException:
            await _pop(self).end()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        state = install(self)
        unit = _pop(self)

        def let_go() -> None:
            if _HELD in state.ctx:
                state.ctx.remove(_HELD)
                if not state.ctx and not state.transactions:
                    self.close()  # type: ignore[attr-defined]

        try:
            await _runner(state).run(unit.scope, let_go)
        finally:
            await unit.end()

    async def close_pool(self) -> None:
        """Close the pool and let the threads of `run` end, without blocking the loop; it opens again with `pool.open()`."""
        state = install(self)
        if state.runner is not None:
            state.runner.close()
        await asyncio.wrap_future(background.submit(self.pool.close))  # type: ignore[attr-defined]

    @property
    def Model(self) -> Any:  # noqa: N802 - it is a class
        """The base class for models of this database, with `aget`, `acreate` and the others."""
        model = self.__dict__.get("_Model")
        if model is None:
            meta = type("Meta", (), {"database": self})
            model = self.__dict__["_Model"] = type("BaseModel", (AsyncModel,), {"Meta": meta})
        return model
