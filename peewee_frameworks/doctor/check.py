"""``check``: can the databases be reached, how far away are they, what are they, and is the way encrypted?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peewee_frameworks.redact import one_line, redact

from .case import Case
from .probe import NoAnswer, ask
from .report import SCHEMA, through
from .serving import Serving

if TYPE_CHECKING:
    from .target import Target


@dataclass(frozen=True)
class Checked:
    """One database; times in seconds, None where there was no answer.

    `tls` is the protocol and cipher, ``"yes"`` where the driver tells no more, ``""`` for a plain connection, None where there
    is no network.
    """

    database: str
    ok: bool
    server: str | None = None
    tls: str | None = None
    pooler: str | None = None
    connect_seconds: float | None = None
    round_trip_seconds: float | None = None
    error: str | None = None

    def __str__(self) -> str:
        if not self.ok:
            return f"FAILED  {self.database}: {self.error}"
        told = [self.server]
        if self.tls is not None:
            told.append(f"TLS {self.tls}" if self.tls else "no TLS")
        told.append(through(self.pooler))
        connect, trip = self.connect_seconds or 0, self.round_trip_seconds or 0
        told += [f"connect {connect * 1000:.1f} ms", f"round trip {trip * 1000:.2f} ms"]
        return f"ok      {self.database}: " + ", ".join(each for each in told if each)


def check(target: Target, timeout: float) -> dict[str, Checked]:
    """Connect to each database of a target and ask it, within `timeout` seconds each; return alias → result."""
    return {
        alias: _check(Case(alias, database, target, Serving()), timeout) for alias, database in target.databases.items()
    }


def _check(case: Case, timeout: float) -> Checked:
    try:
        server = ask(case, timeout)
    except Exception as error:  # noqa: BLE001 - whatever a driver raises
        said = str(error) if isinstance(error, NoAnswer) else redact(one_line(error), [case.database])
        return Checked(case.name, ok=False, error=said)
    return Checked(
        case.name,
        True,
        server.version,
        server.tls,
        server.pooler,
        server.connect_seconds,
        server.round_trip_seconds,
    )


def as_json(name: str, results: dict[str, Checked]) -> dict[str, Any]:
    """Return the document that ``--json`` prints; see docs/reference/cli.md."""
    return {"schema": SCHEMA, "target": name, "databases": {alias: asdict(result) for alias, result in results.items()}}
