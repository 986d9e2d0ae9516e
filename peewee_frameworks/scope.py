"""The unit of work: a request, a websocket message, a job.

A scope holds one frame per database and has one way, open to final. It is fresh at every entry and reset at every end:
contexts leak between requests in most servers, so nothing here ever means "use it if one is set".
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import logging
import sys
import weakref
from typing import TYPE_CHECKING, Any, TypeVar, overload

import peewee

from .background import background
from .errors import ConcurrentUse, ConfigurationError
from .frame import Frames, get_frames, in_greenlet, native_thread, reset_frames, running_loop, set_frames
from .guarded import refuse_generators
from .state import install

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future
    from types import TracebackType

    from .frame import Frame
    from .state import State

logger = logging.getLogger("peewee_frameworks.scope")

_Function = TypeVar("_Function", bound="Callable[..., Any]")


def printable(path: str) -> str:
    """Return a request's path for a label: a line break or a terminal's colours in it do not get into a log."""
    if path.isprintable():
        return path
    from urllib.parse import quote  # noqa: PLC0415 - few paths are like that

    return "".join(each if each.isprintable() else quote(each, errors="surrogatepass") for each in path)


# The scopes of `connection_scope` and of jobs, by `id()`; those of requests are in `Runtime.live`, once they have asked for
# anything. Weakly: a scope that nobody ends must not keep its connection from being taken back. Not a `WeakSet`, which costs a
# fifth of a scope.
_open: dict[int, weakref.ref[Scope]] = {}


def open_scopes() -> list[Scope]:
    """Return the scopes of this process that are no request's."""
    found = []
    for key, ref in list(_open.items()):
        scope = ref()
        if scope is not None:
            found.append(scope)
        elif _open.get(key) is ref:  # abandoned, and collected
            _open.pop(key, None)
    return found


class Scope(Frames):
    """One unit of work over some databases, with a frame for each, made when it is first looked at.

    Adapters make one per request: `enter` it, run the application, `finish` it (never raises), `exit` it. Everyone else
    uses `connection_scope`.
    """

    # Set for each, and no default of the class: CPython keeps no note of how to set what its class has, too.
    touched: bool
    """Whether anything was asked of it yet, so that there may be something to commit or to give back; see `touch`."""
    started: bool
    """Whether its response has begun; adapters note it here."""
    idles: bool
    """Whether it may sit there between two queries, its response having begun: `orm.run` then gives back at once."""
    ended: bool
    """Whether `finish` was called."""
    served: tuple[Any, ...]
    """Whose options hold for it already: the same adapter further in, or of a sub-application, must not do it again."""
    # Many requests use no database: what else a scope begins with is the class's, so that little is to be made for each.
    atomic: Mapping[State, object] | None = None
    """Which of its databases begin a transaction when they connect, and who will end it."""
    tally: Any = None
    """What it has queried, where an option asks for that; see queries.py."""
    thread = 0
    """The thread that opened it and is in it until its end, if nothing else tells who is; 0 where an event loop runs."""
    task: weakref.ref[asyncio.Task[Any]] | None = None
    """The task that opened it with ``async with``."""
    slot: Any = None
    """What `orm.run` keeps with the scope; see run.py."""
    turn: Any = None
    """Whose turn it is among its calls of `orm.run` that need no thread."""
    label: str
    parent: Scope | None = None
    """The scope around, if any."""
    failed: BaseException | None = None
    """What has left the application, for whoever answers it around."""
    answering = False
    """Whether the application has begun to answer, and what is under way when it is complete is the answer's body."""
    _on_release: Callable[[], None] | None = None
    _token: contextvars.Token[Frames | None] | None = None

    def __init__(self, states: Sequence[State], label: str, parent: Scope | None = None, owner: Any = None) -> None:
        """Make a scope for the given databases; the other databases of `parent` stay visible in it.

        Args:
            states: what `install` returned for each database.
            label: what messages call it, for example ``"request GET /orders"``.
            parent: the scope around, if any; never taken from the context variable by itself.
            owner: who opened it and will end it.
        """
        self.states = states
        self.label = label
        self.parent = parent
        self.owner = owner
        self.frames = {}
        self.touched = self.started = self.idles = self.ended = False
        self.served = ()
        if running_loop() is None and not in_greenlet():
            self.thread = native_thread()
        if owner is None:
            _open[id(self)] = weakref.ref(self)

    @property
    def scope(self) -> Scope:
        """Itself."""
        return self

    @property
    def chain(self) -> Iterator[Scope]:
        """Itself and the scopes around, from the inside outwards."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    def has(self, state: State) -> bool:
        """Return whether it, or a scope around it, has this database."""
        return state in self.states or (self.parent is not None and self.parent.has(state))

    def has_all(self, states: Iterable[State]) -> bool:
        """Return whether it, or a scope around it, has each of these databases."""
        return all(self.has(state) for state in states)

    def find(self, state: State) -> Frame | None:
        """Return the frame of a database, made now if need be; None if neither it nor a scope around has it."""
        frame = self.frames.get(state)
        if frame is None:
            if state in self.states:
                frame = self._make_frame(state)
            elif self.parent is not None:
                frame = self.parent.find(state)
        return frame

    def touch(self) -> None:
        """Note that something is asked of it for the first time; on any thread, and if on several, more than once."""
        self.touched = True
        if self.owner is not None:
            self.owner.touched(self)

    def _make_frame(self, state: State) -> Frame:
        """Make the frame of one of its databases, or return the one that another thread made meanwhile."""
        if not self.touched:
            self.touch()
        frame = state.new_frame(self.label)
        frame.on_release = self._on_release
        if self.atomic and state in self.atomic:
            frame.make_atomic()
        frame = self.frames.setdefault(state, frame)
        if self.ended:  # looked at for the first time by somebody who outlived it
            frame.finish()
        return frame

    @property
    def own_frames(self) -> Iterable[Frame]:
        """The frames of its databases that were used so far."""
        return self.frames.values()

    @property
    def connected(self) -> bool:
        """Whether any of its databases holds a connection now."""
        return any(frame.conn is not None for frame in list(self.frames.values()))  # asked on any thread

    @property
    def holding(self) -> bool:
        """Whether a place in a pool is taken for it: while it is connected, and until the connection is back."""
        return any(frame.conn is not None or frame.returning for frame in list(self.frames.values()))

    def enter(self) -> None:
        """Make this the current scope of the running context."""
        self._token = set_frames(self)

    def exit(self) -> bool:
        """Make the scope before it current again; return whether this is the context in which it was entered."""
        _open.pop(id(self), None)
        token, self._token = self._token, None
        if token is not None:
            try:
                reset_frames(token)
            except ValueError:  # a generator may be closed in another context, where there is nothing to reset
                return False
        return True

    def set_atomic(self, states: Iterable[State] | None = None, by: object = None) -> None:
        """Wrap what follows in a transaction per database, begun when the database first connects, or now if it is connected.

        Where somebody has done so already, it stays his: what is done here becomes a part of it.

        Args:
            states: these databases only, its own or of the scopes around.
            by: who will end the transactions; the scope itself by default.
        """
        for state in self.states if states is None else states:
            scope = next(scope for scope in self.chain if state in scope.states)
            if scope.atomic and state in scope.atomic:
                continue
            if not scope.touched:
                scope.touch()
            scope.atomic = {**(scope.atomic or {}), state: self if by is None else by}
            frame = scope.frames.get(state)
            if frame is not None:
                frame.make_atomic()
                if frame.conn is not None and frame.request_transaction is None and not frame.transactions:
                    with state.bound(frame):
                        frame.begin_request_transaction()

    def is_atomic(self, by: object = None) -> bool:
        """Return whether somebody has made a database of it, or of a scope around, atomic and not ended that yet."""
        by = self if by is None else by
        scope: Scope | None = self
        while scope is not None:  # not `chain`: it is asked of every request that queries
            if scope.atomic and by in scope.atomic.values():
                return True
            scope = scope.parent
        return False

    def atomic_frames(self, by: object = None, *, forget: bool = False) -> list[Frame]:
        """Return the frames, of its databases and of those around, whose transactions somebody has to end.

        Args:
            by: who.
            forget: whether what connects from now on begins no transaction any more.
        """
        found: list[Frame] = []
        by = self if by is None else by
        for scope in self.chain:
            if atomic := scope.atomic:
                if forget:  # before the look at the frames: another thread may be making one
                    scope.atomic = {state: who for state, who in atomic.items() if who is not by}
                frames = scope.frames
                found += [frames[state] for state, who in atomic.items() if who is by and state in frames]
        return found

    def has_transaction(self, by: object = None) -> bool:
        """Return whether the transaction of an atomic request is open, or may begin yet in a call that goes on."""
        return self._has_call(by) or any(frame.has_request_transaction for frame in self.atomic_frames(by))

    def complete(self, error: BaseException | None = None, by: object = None) -> None:
        """Commit the atomic request, or roll it back because of `error`.

        With several databases they are committed one after the other; if one fails, the rest is rolled back and the error
        raised. What committed before stays: this is no two-phase commit.

        Args:
            error: why to roll back.
            by: who, as `set_atomic` was told.

        Raises: what a COMMIT raised; `ConcurrentUse` instead of a COMMIT amid a call of `orm.run`.
        """
        refusal = None if error is not None else self.refusal_to_commit(by)
        reason = error or refusal
        _end_all(self.frames_to_end(reason, by), reason)
        if refusal is not None:
            raise refusal

    def frames_to_end(self, error: BaseException | None, by: object) -> list[Frame]:
        """Return the frames whose transactions `complete` has to end; what connects from now on begins none."""
        if not self._is_outlived(error, by):
            frames = self.atomic_frames(by, forget=True)
            for frame in frames:
                frame.patient = self.answering and error is None
            return frames
        # A thread whose caller was cancelled or timed out goes on. After a ROLLBACK its rest would be committed, statement by
        # statement, and so would all of it, if it has not connected yet. So the transaction stays open, or begins yet, and
        # `finish` rolls back all of it.
        for scope in self.chain:
            for state in scope.atomic or ():
                scope.find(state)
        frames = self.atomic_frames(by, forget=True)
        for frame in frames:
            if not frame.state.is_async:
                frame.leave_open()
        return [frame for frame in frames if frame.state.is_async]

    def _is_outlived(self, error: BaseException | None, by: object) -> bool:
        """Return whether a thread may go on with what an error has ended."""
        if error is None:
            return False
        # Nobody tells of a framework's own threads. A `connection_scope`, which ends what is its own, is over with it.
        if by is not None and isinstance(error, getattr(sys.modules.get("asyncio"), "CancelledError", ())):
            return True
        return self._has_call(by)

    def _has_call(self, by: object) -> bool:
        """Return whether a call of `orm.run` goes on in what somebody has made atomic, though its caller may be gone."""
        by = self if by is None else by
        # It is the innermost scope's, which need not be this one. Those around the outermost that is atomic are no part of it.
        chain = list((current_scope() or self).chain)
        while chain and by not in (chain[-1].atomic or {}).values():
            chain.pop()
        return any(getattr(scope.slot, "busy", False) for scope in chain)

    def refusal_to_commit(self, by: object = None) -> ConcurrentUse | None:
        """Return the error for a COMMIT that would keep half of a call of `orm.run`, which goes on in here; else None."""
        if self.answering or not self._has_call(by):
            return None
        return ConcurrentUse(
            f"{self.label} cannot commit: a call of orm.run goes on in its transaction, and what that has done so far would be "
            "committed without the rest. Await the call, also one that was cancelled or timed out, before the response "
            "starts, or open `connection_scope(db)` inside it; everything is rolled back."
        )

    def note_answer(self) -> None:
        """Note that the application answers now, though a middleware around it has not passed that on yet.

        What is queried from now on is the body's, which goes on beside the COMMIT: that waits for it, and it for that. But
        where something is under way already, it was given up by the application, and is half of something.
        """
        chain = list((current_scope() or self).chain)
        in_use = any(frame.in_use for scope in chain for frame in list(scope.frames.values()))
        if not in_use and not any(getattr(scope.slot, "busy", False) for scope in chain):
            for scope in self.chain:  # of several applications, or adapters
                scope.answering = True

    def connect(self, states: Iterable[State] | None = None) -> None:
        """Connect every database now (``connect="eager"``), and keep nested ``with db`` blocks from closing it.

        Args:
            states: these databases only.

        Raises: what connecting raises; what had been connected is given back by `finish`.
        """
        for state in self.states if states is None else states:
            frame = self.find(state)
            if frame is not None and frame.conn is None:
                frame.pin()
                with state.bound(frame):
                    state.database.connect()

    def release_early(self) -> None:
        """Give back the connections on which nothing is going on; later queries take them again."""
        for frame in list(self.frames.values()):
            frame.release_early()

    def finish(self) -> list[Future[None]]:
        """End the scope: roll back what is open with a warning, give back every connection. Never raises.

        Returns: what is still being given back on other threads, because this one runs an event loop.
        """
        self.ended = True
        if self.tally is not None:
            self.tally.close(self)
        if not self.frames:
            return []
        return [pending for frame in list(self.frames.values()) if (pending := frame.finish()) is not None]

    def on_release(self, callback: Callable[[], None]) -> None:
        """Call `callback`, on any thread, whenever one of the connections was given back."""
        self._on_release = callback
        for frame in list(self.frames.values()):
            frame.on_release = callback

    def __repr__(self) -> str:
        return f"<Scope {self.label!r} {'ended' if self.ended else 'open'}>"


def current_scope() -> Scope | None:
    """Return the scope the caller runs in, or None."""
    frames = get_frames()
    return None if frames is None else frames.scope


async def complete(scope: Scope, error: BaseException | None = None, by: object = None) -> None:
    """Do what `Scope.complete` does from an event loop, without blocking it.

    Raises: what a COMMIT raised; `ConcurrentUse` instead of a COMMIT amid a call of `orm.run`.
    """
    import asyncio  # noqa: PLC0415 - running, or this could not be awaited

    refusal = None if error is not None else scope.refusal_to_commit(by)
    reason = error or refusal
    frames = scope.frames_to_end(reason, by)
    if any(frame.state.is_async for frame in frames):
        await _end_each(frames, reason)
    elif any(frame.has_request_transaction for frame in frames):
        context = contextvars.copy_context()
        await asyncio.wrap_future(background.submit(lambda: context.run(_end_all, frames, reason)))
    else:
        _end_all(frames, reason)
    if refusal is not None:
        raise refusal


async def _end_each(frames: list[Frame], error: BaseException | None) -> None:
    import asyncio  # noqa: PLC0415 - as above

    failed = error
    for frame in frames:
        end = functools.partial(frame.end_request_transaction, failed)
        try:
            if frame.state.is_async:
                await frame.state.database.run(end)
            else:
                context = contextvars.copy_context()
                await asyncio.wrap_future(background.submit(functools.partial(context.run, end)))
        except Exception as raised:  # noqa: BLE001 - as in `_end_all`
            failed = _first(raised, failed, error)
    if failed is not None and failed is not error:
        raise failed


def _end_all(frames: list[Frame], error: BaseException | None) -> None:
    failed = error
    for frame in frames:
        try:
            frame.end_request_transaction(failed)
        except Exception as raised:  # noqa: BLE001 - the first is raised below, when all have ended
            failed = _first(raised, failed, error)
    if failed is not None and failed is not error:
        raise failed


def _first(raised: Exception, failed: BaseException | None, error: BaseException | None) -> BaseException:
    """Return the error to raise when all databases have ended: the first that is not the caller's own."""
    if failed is None:
        return raised
    if failed is not error:
        raised.__context__ = failed
    return failed


class connection_scope:  # noqa: N801 - reads as the function it is used as
    """Give a block, or each call of a function, connections of its own: scripts, jobs, messages, background work.

    ::

        with connection_scope(db): ...
        async with connection_scope(db, other): ...

        @connection_scope(db, transaction=True)
        def job(): ...

    Connections are taken at the first query and given back at the end, whatever happens. A scope inside another has its
    own connection; the databases it does not name stay those of the scope around it.
    """

    def __init__(self, *databases: Any, transaction: bool = False, label: str | None = None) -> None:
        """Describe the scope.

        Args:
            databases: one or more Peewee databases (or proxies).
            transaction: begin a transaction at the first query, commit at the end, roll back on an exception.
            label: what messages call the unit of work; by default where it was opened.

        Raises: `ConfigurationError` without a database.
        """
        if not databases or (callable(databases[0]) and not isinstance(databases[0], (peewee.Database, peewee.Proxy))):
            given = getattr(databases[0], "__name__", "") if databases else ""
            raise ConfigurationError(
                f"connection_scope({given}) needs the database: write `connection_scope(db)`; for a model, its database."
            )
        self._databases = databases
        self._transaction = transaction
        self._label = label
        self._scope: Scope | None = None

    def _open(self, label: str) -> Scope:
        if self._scope is not None:
            raise ConfigurationError(
                "This connection_scope object is entered already. Make one for each block: `with connection_scope(db):`."
            )
        scope = self._scope = Scope([install(db) for db in self._databases], label, current_scope())
        if self._transaction:
            scope.set_atomic()
        scope.enter()
        return scope

    def _close(self) -> Scope:
        scope, self._scope = self._scope, None
        assert scope is not None  # noqa: S101 - __exit__ without __enter__
        return scope

    def __enter__(self) -> Scope:
        return self._open(self._label or _place(inspect.currentframe()))

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        scope = self._close()
        try:
            scope.complete(exc)
        finally:
            scope.finish()
            _leave(scope, exc)

    async def __aenter__(self) -> Scope:
        scope = self._open(self._label or _place(inspect.currentframe()))
        import asyncio  # noqa: PLC0415 - as in `complete`

        task = asyncio.current_task()
        scope.task = None if task is None else weakref.ref(task)
        return scope

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        scope = self._close()
        try:
            await complete(scope, exc)
        finally:
            pending = scope.finish()
            _leave(scope, exc)
            if pending:
                import asyncio  # noqa: PLC0415 - as in `complete`

                # The next block may want the only connection of the pool; a cancel here loses nothing, they go on.
                for future in pending:
                    await asyncio.wrap_future(future)

    @overload
    def __call__(self, function: _Function) -> _Function: ...
    @overload
    def __call__(self, function: Any) -> Any: ...
    def __call__(self, function: Any) -> Any:
        """Decorate a function or a coroutine function: each call is a scope.

        Raises: `ConfigurationError` for a generator function, whose body runs after the call has returned.
        """
        refuse_generators(function, "connection_scope")
        label = self._label or f"{function.__module__}.{function.__qualname__}"

        def fresh() -> connection_scope:
            return connection_scope(*self._databases, transaction=self._transaction, label=label)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                async with fresh():
                    return await function(*args, **kwargs)

            return call_async

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with fresh():
                return function(*args, **kwargs)

        return call


def _leave(scope: Scope, error: BaseException | None) -> None:
    if not scope.exit() and error is None:
        logger.warning(
            "%s ended in another context than it began in, so what ran between did not see it. A sync generator that a "
            "framework runs in threads (a dependency, a stream) cannot hold a scope open across its yields, nor can a fixture: "
            "use an async generator, `transaction=`, or `Depends(orm.transaction)`.",
            scope.label,
            extra={"request": scope.label},
        )


def _place(frame: Any) -> str:
    caller = frame.f_back if frame is not None else None
    if caller is None:
        return "scope"
    return f"scope in {caller.f_code.co_qualname} (line {caller.f_lineno})"
