"""Who holds a connection now, for how long, and in which unit of work: for operators, status pages and leak reports.

Nothing is noted at a checkout for this. A frame knows its connection and the label of its scope; our pools know since when
their connections are out, and so do playhouse's; where nobody does, as with an unpooled database, the frame notes it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .pool.entries import snapshot
from .scope import open_scopes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from .frame import Frame
    from .runtime import Runtime
    from .scope import Scope
    from .state import State


@dataclass(frozen=True, slots=True)
class Holder:
    """One connection that is in use, as `Extension.holders` gives it."""

    alias: str
    """The database's."""
    connection: int | None
    """Which one: its number in our pool, as in the pool's messages; elsewhere what ``playhouse.pool`` logs as its key."""
    seconds: float
    """Since when it is held."""
    label: str | None
    """The unit of work, for example ``"request GET /orders"``; None for a connection that was taken from the pool by hand."""
    owner: str | None
    """The thread or task that is in that unit of work now, where one can be told."""
    leaked: bool
    """Whether it is held for longer than the leak threshold."""
    stack: str | None
    """Where it was taken, or where its owner was when it passed the threshold; None if neither was recorded."""

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)


def holders(runtime: Runtime) -> list[Holder]:
    """Return who holds connections of the databases of one `Peewee`, the longest first.

    Raises: `ConfigurationError` before the databases are known.
    """
    found: list[Holder] = []
    for alias, state in zip(runtime.databases, runtime.states, strict=True):
        found += _holders_of(alias, state)
    return sorted(found, key=lambda holder: holder.seconds, reverse=True)


def _holders_of(alias: str, state: State) -> Iterator[Holder]:
    frames = {id(conn): (frame, conn) for frame in frames_of(state) if (conn := frame.conn) is not None}
    pool = getattr(state.database, "pool", None)
    if pool is not None:
        yield from _of_pool(alias, pool, frames)
        return
    out = dict(getattr(state.database, "_in_use", {}))
    for key, (frame, _) in frames.items():
        seconds = time.time() - out[key].checked_out if key in out else _seconds_of(frame)
        yield Holder(alias, key, max(seconds, 0.0), frame.label, None, leaked=False, stack=None)


def _seconds_of(frame: Frame) -> float:
    since: float | None = getattr(frame, "since", None)
    return 0.0 if since is None else time.monotonic() - since


def _of_pool(alias: str, pool: Any, frames: Mapping[int, tuple[Frame, Any]]) -> Iterator[Holder]:
    engine, threshold = pool._engine, pool.options.leak_threshold
    if engine is None:
        return
    now = pool._clock()
    for key, entry in snapshot(engine.held.items()):
        frame = frames.get(key)
        seconds = max(now - entry.since, 0.0)
        yield Holder(
            alias,
            entry.id,
            seconds,
            None if frame is None else frame[0].label,
            None,
            leaked=threshold is not None and seconds >= threshold,
            stack=None,
        )


def frames_of(state: State) -> Iterator[Frame]:
    """Yield the records of a database in all scopes that are open in this process, and in what is outside any scope."""
    for scope in scopes_of_process():
        frame = scope.frames.get(state)
        if frame is not None:
            yield frame
    yield from state.implicit_frames()


def scopes_of_process() -> Iterable[Scope]:
    """Return the scopes that are open in this process, whoever opened them."""
    from .runtime import runtimes  # noqa: PLC0415 - which stands above this module

    return {*snapshot(open_scopes), *(scope for runtime in snapshot(runtimes) for scope in snapshot(runtime.live))}
