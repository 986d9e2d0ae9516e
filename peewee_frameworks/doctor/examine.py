"""All findings for one target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peewee_frameworks.errors import ConfigurationError, GeventNotPatched
from peewee_frameworks.redact import one_line, redact

from . import frameworks, gevent, loop, pool, postgres, server, sqlite, timeouts
from .case import Case
from .probe import NoAnswer, ask
from .report import Finding, Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .server import Server
    from .serving import Serving
    from .target import SetupRefused, Target


def examine(target: Target, serving: Serving, timeout: float) -> Report:
    """Look at a target and at its servers.

    Args:
        target: the databases, and the application if there is one.
        serving: how it is served.
        timeout: seconds that each server has to answer.
    """
    cases = [Case(alias, database, target, serving) for alias, database in target.databases.items()]
    findings = list(frameworks.findings_of_app(target, serving))
    # What is said without a connection comes first: to connect changes what there is to see.
    for case in cases:
        findings += (each.about(case.alias) for each in _before(case))
    asked: list[tuple[Case, Server]] = []
    for case in cases:
        try:
            asked.append((case, ask(case, timeout)))
        except Exception as error:  # noqa: BLE001 - whatever a driver raises
            findings.append(_failed(case, error).about(case.alias))
    for case, answer in asked:
        findings += (each.about(case.alias) for each in _after(case, answer))
    findings += server.capacity(asked)
    answers = {case.alias: answer for case, answer in asked}
    databases = {case.alias: _facts(case, answers.get(case.alias)) for case in cases}
    return Report(target.name, str(serving), serving.workers, databases, tuple(findings))


def refused(name: str, error: SetupRefused, serving: Serving) -> Report:
    """Report a target whose own code this package refuses."""
    finding = Finding(
        "configuration",
        "error",
        str(error),
        "The application does not start.",
        "what it says",
        detail=error.detail,
    )
    return Report(name, str(serving), serving.workers, {}, (finding,))


def _before(case: Case) -> Iterator[Finding]:
    yield from gevent.findings(case)
    yield from frameworks.findings(case)
    yield from loop.findings(case)
    yield from pool.findings(case)
    yield from timeouts.findings(case)
    if case.kind == "sqlite":
        yield from sqlite.findings_before(case)


def _after(case: Case, answer: Server) -> Iterator[Finding]:
    yield from pool.findings_after(case, answer)
    yield from server.findings(case, answer)
    if case.kind == "postgres":
        yield from postgres.findings(case, answer)
    if case.kind == "sqlite":
        yield from sqlite.findings(case, answer)


def _failed(case: Case, error: Exception) -> Finding:
    if isinstance(error, (ConfigurationError, GeventNotPatched)):
        return Finding(
            "configuration",
            "error",
            redact(str(error), [case.database]),
            "The application does not start.",
            "what it says",
        )
    if case.kind == "postgres" and (finding := postgres.finding_in(case, error)) is not None:
        return finding
    said = str(error) if isinstance(error, NoAnswer) else redact(one_line(error), [case.database])
    return Finding(
        "unreachable",
        "error",
        f"The database cannot be used: {said.removesuffix('.')}.",
        "Requests that query fail, and with check='fail' the application does not start. What the server could tell "
        "was not looked at.",
        "the server started, its address and the login corrected; or run the doctor where the application runs",
    )


def _facts(case: Case, answer: Server | None) -> dict[str, Any]:
    return {
        "database": case.name,
        "driver": case.driver,
        "pool": str(case.pool),
        "server": answer.version if answer else None,
        "pooler": answer.pooler if answer else None,
    }
