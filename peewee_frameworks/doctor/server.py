"""What a server says of itself, and what it means for a pool: it closes what rests too long, and bounds the connections."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .report import Finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .case import Case


class Limit(NamedTuple):
    """How many connections a server allows to those who share `key`, and what sets that number."""

    key: tuple[Any, ...]
    connections: int
    what: str


class Timeout(NamedTuple):
    """A timeout of the server, in seconds; 0: none."""

    name: str
    seconds: float


@dataclass
class Server:
    """What a server said.

    Attributes:
        version: for people: ``MariaDB 10.11.19``.
        tls: the protocol and cipher of this connection; "" if it is not encrypted; None for a library.
        pooler: ``transaction`` if a pooler in that mode stands between, ``other`` if one does that was not seen to be in it (in
            session mode, or too busy, or a pool of one connection that cannot look); None: none was seen.
        loses_statements: whether that pooler loses prepared statements.
        rest: after how long the server closes a connection that rests.
        transaction_rest: after how long one that rests in a transaction.
        limits: how many connections it allows.
        settings: what concerns only one kind of server.
        connect_seconds: how long the first connect took.
        round_trip_seconds: of ``SELECT 1``, the median of five.
    """

    version: str = ""
    tls: str | None = None
    pooler: str | None = None
    loses_statements: bool = False
    rest: Timeout | None = None
    transaction_rest: Timeout | None = None
    limits: list[Limit] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    connect_seconds: float = 0.0
    round_trip_seconds: float = 0.0


SHORT_REST = 300.0
"""Seconds below which connections that rest are closed all day long, and not only in the quiet hours."""


def findings(case: Case, server: Server) -> Iterator[Finding]:
    """Compare a pool with the server's timeouts."""
    pool, rest = case.pool, server.rest
    if pool.kind != "none" and rest is not None and rest.seconds and (pool.rests is None or pool.rests >= rest.seconds):
        option, set_to = case.lifetime_option, pool.lifetime if pool.kind != "asyncio" else pool.rests
        given = f"{option}={set_to:g} is not below it" if set_to else f"{option} is not set"
        yield Finding(
            "stale-timeout",
            "warning" if set_to or rest.seconds < SHORT_REST else "note",
            f"The server closes a connection that rests for {rest.seconds:g} s ({rest.name}), and {given}.",
            "The pool notices and connects again, so the first requests after a quiet time wait for a connect each. "
            "One whose connection the server closes between the pool's look and the query fails.",
            f"{option}={_below(rest.seconds):g}",
        )
    rest = server.transaction_rest
    if (
        rest is not None
        and not rest.seconds
        and case.runtime is not None
        and case.runtime.options.transaction is not False
    ):
        yield Finding(
            "idle-in-transaction",
            "note",
            f"Requests run in transactions, and the server never ends one that rests ({rest.name}=0).",
            "A request that hangs, or a worker that is cut off from the network, keeps its transaction open, and with "
            "it all the locks it has taken, until somebody ends its session by hand.",
            _how_to_set(case, rest.name),
        )


def _below(seconds: float) -> float:
    return min(SHORT_REST, max(1, int(seconds * 0.8)))


def _how_to_set(case: Case, name: str) -> str:
    if case.kind == "postgres":
        return f"ALTER ROLE … SET {name} = '60s', or options='-c {name}=60s' among the database's keywords"
    return f"SET GLOBAL {name} = 60, or init_command='SET SESSION {name} = 60' among the database's keywords"


def capacity(asked: Iterable[tuple[Case, Server]]) -> Iterator[Finding]:
    """Compare what all pools of all workers may open with what the server allows to all of them together."""
    needs: dict[Limit, list[Case]] = defaultdict(list)
    for case, server in asked:
        if case.pool.size and server.pooler is None:
            for limit in server.limits:
                needs[limit].append(case)
    told: set[tuple[str, ...]] = set()
    for limit, cases in sorted(needs.items(), key=lambda item: item[0].connections):
        # Health checks have a connection of their own to each database.
        beside = sum(case.runtime is not None and case.runtime.has_health for case in cases)
        workers, size = cases[0].serving.workers, sum(case.pool.size or 0 for case in cases) + beside
        aliases = tuple(case.alias for case in cases)
        if workers * size <= limit.connections or aliases in told:
            continue
        told.add(aliases)  # the tightest limit says it all
        fitting = (limit.connections // workers - beside) // len(cases)
        sizes = " + ".join(f"{case.pool.size}" for case in cases)
        health = f", and {beside} for health checks," if beside else ""
        yield Finding(
            "server-limit",
            "error",
            f"{cases[0].serving.count} with {sizes} connections each{health} may open {workers * size}, and the server allows "
            f"{limit.connections} ({limit.what}).",
            "Under load the server refuses the connections above that, and requests fail although their own pool has "
            "room.",
            f"{cases[0].size_option}={fitting}" + (f" in each of {', '.join(aliases)}" if len(aliases) > 1 else "")
            if fitting > 0
            else "fewer workers, or a pooler such as pgbouncer in front of the server",
            aliases[0] if len(aliases) == 1 else None,
        )
