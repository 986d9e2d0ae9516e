"""Who holds a connection now, for how long, and in which unit of work: for operators, status pages and leak reports.

Nothing is noted at a checkout for this. A frame knows its connection and the label of its scope; our pools know since when
their connections are out, and so do playhouse's; where nobody does, as with an unpooled database, the frame notes it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from . import where
from .pool.entries import snapshot
from .pool.leaks import Suspect, taken_at
from .runtime import runtimes
from .scope import open_scopes
from .state import State

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from .frame import Frame
    from .runtime import Runtime
    from .scope import Scope
    from .where import Place


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
    """Where it was taken, or where its holder was when it passed the threshold; None if neither was recorded."""

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)


class Use(NamedTuple):
    """One connection that a frame holds."""

    conn: Any
    frame: Frame
    scope: Scope | None
    owner: Any  # of a frame outside any scope: a task, a greenlet, or what stands for a thread


class Out(NamedTuple):
    """One connection that is in use: what its pool knows of it, and its frame."""

    number: int
    since: float
    """By whichever clock; it and the number tell one use of a connection from the next."""
    seconds: float
    use: Use | None
    stack: str | None


def holders(runtime: Runtime) -> list[Holder]:
    """Return who holds connections of the databases of one `Peewee`, the longest first.

    Raises: `ConfigurationError` before the databases are known.
    """
    out = [
        (alias, threshold_of(runtime, state), item)
        for alias, state in zip(runtime.databases, runtime.states, strict=True)
        for item in connections_out(state)
    ]
    places = places_of([item.use for _, _, item in out if item.use is not None])
    found = [
        Holder(
            alias,
            item.number,
            item.seconds,
            None if item.use is None else item.use.frame.label,
            place.owner if item.use is not None and (place := places.get(id(item.use.conn))) is not None else None,
            leaked=threshold is not None and item.seconds >= threshold,
            stack=item.stack,
        )
        for alias, threshold, item in out
    ]
    return sorted(found, key=lambda holder: holder.seconds, reverse=True)


def threshold_of(runtime: Runtime, state: State) -> float | None:
    """Return the seconds after which a connection of this database is suspected: the pool's, else the application's."""
    pool = getattr(state.database, "pool", None)
    own: float | None = pool.options.leak_threshold if pool is not None else None
    return runtime.options.leak_threshold if own is None else own


def connections_out(state: State) -> Iterator[Out]:
    """Yield the connections of a database that are in use."""
    uses = uses_of(state)
    pool = getattr(state.database, "pool", None)
    if pool is not None:
        engine = pool._engine
        now = pool._clock()
        for key, entry in snapshot(engine.held.items()) if engine is not None else ():
            yield Out(entry.id, entry.since, max(now - entry.since, 0.0), uses.get(key), taken_at(entry.stack))
        return
    lent: Mapping[int, Any] = dict(getattr(state.database, "_in_use", {}))
    for key, use in uses.items():
        if key in lent:
            since, now = lent[key].checked_out, time.time()
        else:
            now = time.monotonic()
            since = getattr(use.frame, "since", now)
        yield Out(key, since, max(now - since, 0.0), use, taken_at(getattr(use.frame, "stack", None)))


def uses_of(state: State) -> dict[int, Use]:
    """Return the connections that frames hold, by their ``id()``, in all scopes of this process and outside any."""
    found: list[tuple[Frame, Scope | None, Any]] = [
        (frame, scope, None) for scope in open_in_process() if (frame := scope.frames.get(state)) is not None
    ]
    found += [(frame, None, owner) for owner, frame in state.implicit_owners()]
    return {
        id(conn): Use(conn, frame, scope, owner) for frame, scope, owner in found if (conn := frame.conn) is not None
    }


def open_in_process() -> Iterable[Scope]:
    """Return the scopes that are open in this process, whoever opened them."""
    return {*open_scopes(), *(scope for runtime in snapshot(runtimes) for scope in snapshot(runtime.live))}


def places_of(uses: Collection[Use], *, greenlets: bool = False) -> dict[int, Place]:
    """Return where the holders of connections are now, by the ``id()`` of the connection, as far as that can be told."""
    places = where.locate([use.scope for use in uses if use.scope is not None], greenlets=greenlets)
    found = {}
    for use in uses:
        place = where.of_owner(use.owner) if use.scope is None else places.get(use.scope)
        if place is not None:
            found[id(use.conn)] = place
    return found


def label_of(state: Any, conn: Any) -> str | None:
    """Return what an exhausted pool's message calls who holds a connection, as far as that is known."""
    if not isinstance(state, State):  # of Peewee's own, which knows neither scopes nor owners
        return None
    for frame in state.implicit_frames():
        if frame.conn is conn:
            return (
                f"{frame.label} (in an application: was init_app forgotten, or to give Peewee this database? In a script or a "
                "test: db.close(), or `with connection_scope(db):` around the queries)"
            )
    for scope in open_in_process():
        found = scope.frames.get(state)
        if found is not None and found.conn is conn:
            return found.label
    return None


def describe(state: Any, conns: Collection[Any]) -> dict[int, Suspect]:
    """Say of connections that are suspected to be leaked who holds them, by their ``id()``."""
    if not isinstance(state, State):  # of Peewee's own, which knows neither scopes nor owners
        return {}
    uses = uses_of(state)
    uses = {key: uses[key] for key in map(id, conns) if key in uses}
    places = places_of(uses.values(), greenlets=True)
    return {key: _suspect(use, places.get(key)) for key, use in uses.items()}


def _suspect(use: Use, place: Place | None) -> Suspect:
    if place is None:
        return Suspect(use.frame.label)
    return Suspect(use.frame.label, place.owner, f"Its holder is now at:\n{place.stack}")
