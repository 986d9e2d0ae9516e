"""What is exported: one table of names, kinds and texts for all exporters, and the values that go with them.

The names ``db.client.connection.*``, their kinds and units are OpenTelemetry's semantic conventions; the others are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from peewee_frameworks.errors import ConfigurationError
from peewee_frameworks.stats import pool_name, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from peewee_frameworks.pool.stats import Histogram, PoolStats
    from peewee_frameworks.runtime import Runtime
    from peewee_frameworks.state import State

    Number = int | float
    Value = Number | Histogram | Mapping[str, Number | None] | None


class Moment(NamedTuple):
    """One pool at one moment."""

    pool: str
    """Its name, which no other pool has."""
    stats: PoolStats
    queued: int | None
    """Units of work that wait for their turn in `orm.run`; with the first database of a `Peewee`, and only with that."""


@dataclass(frozen=True)
class Metric:
    """One metric: how it is called, and where its value stands in a `Moment`."""

    name: str
    """With dots, as OpenTelemetry has it."""
    kind: Literal["gauge", "counter", "histogram"]
    unit: str
    """``s`` or, in braces, what is counted."""
    text: str
    read: Callable[[Moment], Value]
    """Gives None where the pool cannot tell, and a mapping where there is a value for each value of `label`."""
    label: str | None = None


def _states(moment: Moment) -> Mapping[str, Number | None]:
    return {state: getattr(moment.stats, state) for state in ("idle", "used", "connecting", "checking", "closing")}


_STATE, _REASON = "db.client.connection.state", "peewee.pool.close.reason"

METRICS = (
    Metric(
        "db.client.connection.count",
        "gauge",
        "{connection}",
        "Connections by state; their sum is what the server sees.",
        _states,
        _STATE,
    ),
    Metric(
        "db.client.connection.max",
        "gauge",
        "{connection}",
        "Connections that may be open at once.",
        lambda moment: moment.stats.max_connections,
    ),
    Metric(
        "db.client.connection.idle.min",
        "gauge",
        "{connection}",
        "Connections that are kept open though idle.",
        lambda moment: moment.stats.min_connections,
    ),
    Metric(
        "db.client.connection.idle.max",
        "gauge",
        "{connection}",
        "Connections that may be idle at once: as many as may be open.",
        lambda moment: moment.stats.max_connections,
    ),
    Metric(
        "db.client.connection.pending_requests",
        "gauge",
        "{request}",
        "Callers that wait for a connection now.",
        lambda moment: moment.stats.waiting,
    ),
    Metric(
        "db.client.connection.timeouts",
        "counter",
        "{timeout}",
        "Callers that waited for a connection in vain.",
        lambda moment: moment.stats.timeouts,
    ),
    Metric(
        "db.client.connection.create_time",
        "histogram",
        "s",
        "Time that it took to open a connection.",
        lambda moment: moment.stats.create_time,
    ),
    Metric(
        "db.client.connection.wait_time",
        "histogram",
        "s",
        "Time that callers waited who did not find a connection at once.",
        lambda moment: moment.stats.wait_time,
    ),
    Metric(
        "db.client.connection.use_time",
        "histogram",
        "s",
        "Time from taking a connection to giving it back.",
        lambda moment: moment.stats.use_time,
    ),
    Metric(
        "peewee.run.queued",
        "gauge",
        "{call}",
        "Units of work that wait for their turn in orm.run, and then may have to wait for a connection.",
        lambda moment: moment.queued,
    ),
    Metric(
        "peewee.pool.refused",
        "counter",
        "{request}",
        "Callers that were not let into the queue: it was full, or they would not wait.",
        lambda moment: moment.stats.refused,
    ),
    Metric(
        "peewee.pool.connects", "counter", "{connection}", "Connections opened.", lambda moment: moment.stats.connects
    ),
    Metric(
        "peewee.pool.connect_errors",
        "counter",
        "{error}",
        "Attempts to connect that failed.",
        lambda moment: moment.stats.connect_errors,
    ),
    Metric(
        "peewee.pool.closes",
        "counter",
        "{connection}",
        "Connections closed, by reason.",
        lambda moment: moment.stats.closes,
        _REASON,
    ),
    Metric(
        "peewee.pool.invalidations",
        "counter",
        "{invalidation}",
        "How often all connections opened so far were given up: the server was gone, or somebody asked for it.",
        lambda moment: moment.stats.generation,
    ),
    Metric(
        "peewee.pool.pings",
        "counter",
        "{ping}",
        "Round trips to see whether a server answers.",
        lambda moment: moment.stats.pings,
    ),
    Metric(
        "peewee.pool.rollbacks",
        "counter",
        "{rollback}",
        "Connections given back with a transaction open, which was rolled back.",
        lambda moment: moment.stats.rollbacks,
    ),
    Metric(
        "peewee.pool.leaks",
        "counter",
        "{connection}",
        "Connections in use for longer than leak_threshold.",
        lambda moment: moment.stats.leaks,
    ),
    Metric(
        "peewee.pool.reaped",
        "counter",
        "{connection}",
        "Connections taken back from threads and tasks that had ended.",
        lambda moment: moment.stats.reaped,
    ),
    Metric(
        "peewee.pool.suspended",
        "gauge",
        "1",
        "1 while the pool hands nothing out because somebody has suspended it.",
        lambda moment: None if moment.stats.suspended is None else int(moment.stats.suspended),
    ),
)


def pool_names(runtimes: Iterable[Runtime]) -> dict[State, str]:
    """Name the pools of some applications so that no two have one name: with their alias where it takes that.

    A database that several of them share is there once. What is not known yet is left out.
    """
    names: dict[State, str] = {}
    for runtime in runtimes:
        try:
            states = dict(zip(runtime.databases, runtime.states, strict=True))
        except ConfigurationError:
            continue
        for alias, state in states.items():
            if state not in names:
                names[state] = next(name for name in _candidates(pool_name(state), alias) if name not in names.values())
    return names


def _candidates(name: str, alias: str) -> Iterator[str]:
    yield name
    yield f"{name}/{alias}"
    number = 2
    while True:
        yield f"{name}/{alias}#{number}"
        number += 1


def moments(runtimes: Iterable[Runtime]) -> list[Moment]:
    """Read the statistics of each pool."""
    runtimes = list(runtimes)
    names = pool_names(runtimes)
    queued: dict[State, int] = {}
    for runtime in runtimes:
        if runtime.queued is not None:
            first = runtime.states[0]
            queued[first] = queued.get(first, 0) + runtime.queued
    return [Moment(name, read(state), queued.get(state)) for state, name in names.items()]


def values(metric: Metric, moment: Moment) -> Iterator[tuple[str | None, Number | Histogram]]:
    """Give the values of a metric that are known, each with the value of its label."""
    value = metric.read(moment)
    if metric.label is None:
        if value is not None:
            yield None, value  # type: ignore[misc]
    else:
        for label, part in (value or {}).items():  # type: ignore[union-attr]
            if part is not None:
                yield label, part
