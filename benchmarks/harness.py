"""Rows, interleaved repeats, medians, a table and JSON.

A module ``benchmarks/bench_*.py`` exposes ``ROWS``, a list of `Row`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One question, asked to several contenders.

    Each contender is a function that measures once and returns a number in ``unit``, or a mapping of which ``value``
    is that number. ``floor`` names the physical or unavoidable cost; ``passes`` judges (ours, medians by contender), among
    those whose details are ``comparable``.
    """

    name: str
    question: str
    unit: str
    floor: str
    contenders: Mapping[str, Callable[[], Any]]
    target: str = ""
    passes: Callable[[float, Mapping[str, float]], bool] | None = None
    lower_is_better: bool = True
    repeats: int = 3
    ours: str = "peewee_frameworks"
    comparable: Callable[[Mapping[str, Any]], bool] = lambda _details: True


@dataclass
class Outcome:
    row: Row
    samples: dict[str, list[float]] = field(default_factory=dict)
    details: dict[str, list[Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.samples.items() if values}

    @property
    def verdict(self) -> str:
        ours = self.medians.get(self.row.ours)
        if ours is None:
            return "failed"
        if self.row.passes is None:
            return "-"
        try:
            rivals = {
                name: value
                for name, value in self.medians.items()
                if name == self.row.ours or self.row.comparable(self.details[name][-1])
            }
            return "reached" if self.row.passes(ours, rivals) else "MISSED"
        except KeyError as error:
            return f"no {error}"


def discover() -> list[Row]:
    rows: list[Row] = []
    for path in sorted(HERE.glob("bench_*.py")):
        rows += importlib.import_module(f"benchmarks.{path.stem}").ROWS
    return rows


def run(rows: Sequence[Row], repeats: int | None, minutes: float) -> Iterator[Outcome]:
    """Measure each row; the contenders take turns, so that a slow minute of the machine hits them all.

    After two thirds of the minutes rows are measured once, and when they are over no row is begun.
    """
    start = time.monotonic()
    end, hurry = start + minutes * 60, start + minutes * 40
    for row in rows:
        if time.monotonic() > end:
            print(f"\n{row.name}: not measured, the {minutes:g} minutes are over (--minutes)")
            continue
        outcome = Outcome(row)
        for repeat in range(repeats or row.repeats):
            if repeat and time.monotonic() > hurry:
                break
            for name, measure in row.contenders.items():
                if name in outcome.errors:
                    continue
                try:
                    result = measure()
                except Exception as error:
                    outcome.errors[name] = f"{type(error).__name__}: {error}"
                    continue
                details = result if isinstance(result, dict) else {"value": result}
                outcome.samples.setdefault(name, []).append(float(details["value"]))
                outcome.details.setdefault(name, []).append(details)
        yield outcome


def print_row(outcome: Outcome) -> None:
    row, medians = outcome.row, outcome.medians
    print(f"\n{row.name}: {row.question}")
    print(f"  floor: {row.floor}")
    ours = medians.get(row.ours)
    for name in row.contenders:
        if name in outcome.errors:
            print(f"  {name:36} failed: {outcome.errors[name][:90]}")
            continue
        value = medians[name]
        ratio = f"{value / ours:8.2f} x ours" if ours else ""
        extra = outcome.details[name][-1]
        notes = ", ".join(f"{key} {shown(number)}" for key, number in extra.items() if key != "value")
        print(f"  {name:36} {shown(value):>10} {row.unit:6} {ratio:17} {notes}".rstrip())
    if row.target:
        print(f"  target: {row.target}: {outcome.verdict}")


def shown(number: Any) -> str:
    return f"{number:.4g}" if isinstance(number, float) else str(number)


def machine() -> dict[str, Any]:
    versions = {}
    for name in ("peewee", "PyMySQL", "psycopg", "psycopg-pool", "SQLAlchemy", "DBUtils"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load": [round(value, 2) for value in os.getloadavg()],
        "versions": versions,
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def write(path: Path, header: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "machine": header,
                "rows": [
                    {
                        "name": outcome.row.name,
                        "question": outcome.row.question,
                        "unit": outcome.row.unit,
                        "floor": outcome.row.floor,
                        "target": outcome.row.target,
                        "verdict": outcome.verdict,
                        "medians": outcome.medians,
                        "samples": outcome.details,
                        "errors": outcome.errors,
                    }
                    for outcome in outcomes
                ],
            },
            indent=2,
        )
    )


def main(arguments: Sequence[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", metavar="NAME", action="append", help="rows whose name contains NAME; repeatable")
    parser.add_argument("--repeats", type=int, help="instead of each row's own number")
    parser.add_argument("--minutes", type=float, default=14.0, help="after this long, begin no more rows (default 14)")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--json", type=Path, default=Path("bench-results/results.json"), help="where the JSON goes")
    options = parser.parse_args(arguments)
    rows = [row for row in discover() if not options.only or any(part in row.name for part in options.only)]
    if options.list:
        for row in rows:
            print(f"{row.name:28} {row.question}")
        return 0
    logging.getLogger("peewee_frameworks").setLevel(logging.ERROR)  # dirty returns are warned about, and meant here
    header = machine()
    print(" ".join(f"{key}={value}" for key, value in header.items()))
    start = time.monotonic()
    outcomes: list[Outcome] = []
    for outcome in run(rows, options.repeats, options.minutes):
        outcomes.append(outcome)
        print_row(outcome)
        write(options.json, header, outcomes)  # each time: what was measured stays when the rest is interrupted
    print(f"\n{'row':28} {'ours':>12} {'target':60} verdict")
    for outcome in outcomes:
        ours = outcome.medians.get(outcome.row.ours)
        text = "-" if ours is None else f"{shown(ours)} {outcome.row.unit}"
        print(f"{outcome.row.name:28} {text:>12} {outcome.row.target[:60]:60} {outcome.verdict}")
    print(f"\n{time.monotonic() - start:.0f} s; written: {options.json}")
    return 0 if all(not outcome.errors.get(outcome.row.ours) for outcome in outcomes) else 1


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
