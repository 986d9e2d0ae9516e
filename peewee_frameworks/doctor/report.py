"""Findings, and how they are told: to people, to machines, as an exit status."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

SCHEMA = 1
"""Version of the JSON document: a field that is renamed or removed raises it, one that is added does not."""

DOCUMENTATION = "docs/how-to/doctor.md"
WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """One thing that will go wrong.

    Attributes:
        code: its name; stays the same between versions.
        severity: ``error``: it fails, or freezes, or mixes requests up, in normal operation; ``warning``: it does so when
            something else happens, load or a network that fails; ``note``: it costs something, and works.
        what: the fact, with its numbers.
        why: what comes of it.
        change: what to write instead.
        subject: the alias of the database that it is about; None: the application.
        link: where the documentation explains it.
        detail: a traceback, if there is one.
    """

    code: str
    severity: Severity
    what: str
    why: str
    change: str
    subject: str | None = None
    link: str = ""
    detail: str = ""

    def __post_init__(self) -> None:
        if not self.link:
            object.__setattr__(self, "link", f"{DOCUMENTATION}#{self.code}")

    def about(self, subject: str) -> Finding:
        """Return the same about another database."""
        return dataclasses.replace(self, subject=subject)


@dataclass(frozen=True)
class Report:
    """All that was found at one target."""

    target: str
    serving: str
    workers: int
    databases: dict[str, dict[str, Any]]
    findings: tuple[Finding, ...]

    @property
    def sorted(self) -> list[Finding]:
        """The findings, the most severe first."""
        return sorted(self.findings, key=lambda finding: SEVERITIES.index(finding.severity))

    def fails(self, least: Severity) -> bool:
        """Return whether a finding is at least so severe."""
        return any(SEVERITIES.index(each.severity) <= SEVERITIES.index(least) for each in self.findings)

    def count(self) -> dict[str, int]:
        """Return how many there are of each severity."""
        return {each: sum(finding.severity == each for finding in self.findings) for each in SEVERITIES}

    def as_json(self) -> dict[str, Any]:
        """Return the document that ``--json`` prints; see docs/reference/cli.md."""
        return {
            "schema": SCHEMA,
            "target": self.target,
            "workers": self.workers,
            "databases": self.databases,
            "findings": [dataclasses.asdict(finding) for finding in self.sorted],
            "summary": self.count(),
        }

    def as_text(self) -> str:
        """Return it for people."""
        lines = [f"{self.target}: {self.serving}"]
        for alias, facts in self.databases.items():
            told = [facts["database"], facts["pool"], facts["server"], through(facts["pooler"])]
            lines.append(f"  {alias}: " + ", ".join(each for each in told if each))
        for finding in self.sorted:
            about = f" ({finding.subject})" if finding.subject else ""
            lines += ["", f"{finding.severity}: {finding.code}{about}", *_paragraph("", finding.what)]
            lines += textwrap.indent(finding.detail.rstrip(), "    ").splitlines()
            lines += [
                *_paragraph("Why: ", finding.why),
                *_paragraph("Change: ", finding.change),
                f"  See {finding.link}",
            ]
        counted = [f"{number} {name}{'s' * (number != 1)}" for name, number in self.count().items() if number]
        return "\n".join([*lines, "", ", ".join(counted) or "Nothing found."])


def through(pooler: str | None) -> str:
    """Say what stands between us and the server."""
    if pooler is None:
        return ""
    return "through a pooler" + (" in transaction mode" if pooler == "transaction" else "")


def _paragraph(title: str, text: str) -> Iterable[str]:
    return textwrap.wrap(title + text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
