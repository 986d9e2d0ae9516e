"""Serve the four example applications on real servers, drive each hard, and print what became of the connections.

Exits 0 only if every answer was the right one, nothing is left in use, and no connection ever had two holders.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.concurrency import eventually

from . import plan, recorder
from .load import DROPPED, Outcome, drive

if TYPE_CHECKING:
    from .plan import Subject

HEADER = (
    "application",
    "server",
    "requests",
    "answers",
    "wrong",
    "opened",
    "peak",
    "in use",
    "shared",
    "p50 ms",
    "p99 ms",
)


class Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._shown = name, total, -1
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int) -> None:
        tenth = 40 * done // self._total
        if self._terminal and tenth != self._shown:
            self._shown = tenth
            end = "\r" if done < self._total else "\r\033[K"
            print(f"{self._name:15} [{'#' * tenth:40}] {done}/{self._total}", end=end, file=sys.stderr, flush=True)


def run(subject: Subject, requests: int, directory: Path) -> tuple[Outcome, dict[str, Any]]:
    """Serve and drive one application; return what came back, and what its recorder saw."""
    environment = {"DATABASE_URL": f"sqlite:///{directory / subject.name}.db"}
    with subject.serve(subject.target, factory=True, env=environment) as server:
        outcome = drive(server.url, subject.mix, requests, plan.CLIENTS, Progress(subject.name, requests))

        def report() -> dict[str, Any]:
            with server.client() as client:
                seen: dict[str, Any] = client.get(recorder.PATH).json()
            return seen

        try:  # a stream that was dropped ends when the server notices
            eventually(lambda: report()["in_use"] == 0, deadline=plan.PATIENCE)
        except AssertionError:
            print(f"{subject.name}: still in use: {report()['holders']}", file=sys.stderr)
        return outcome, report()


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--requests", type=int, default=plan.REQUESTS, help="for each application (%(default)s)")
    requests = parser.parse_args().requests
    print(
        f"{requests} requests to each application from {plan.CLIENTS} clients at once, on SQLite with a pool of 10.\n"
    )
    columns = "{:15} {:17} {:>8} {:34} {:>6} {:>6} {:>4} {:>6} {:>6} {:>7} {:>7}"
    print(columns.format(*HEADER))
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        for subject in plan.SUBJECTS:
            outcome, seen = run(subject, requests, Path(directory))
            total = outcome.statuses.total()
            statuses = sorted(outcome.statuses.items(), key=lambda item: (item[0] == DROPPED, item[0]))
            answers = " ".join(f"{count}*{said}" for said, count in statuses)
            row = (len(outcome.wrong), seen["opened"], seen["peak"], seen["in_use"], len(seen["shared"]))
            times = [f"{1000 * outcome.percentile(share):.0f}" for share in (0.5, 0.99)]
            print(columns.format(subject.name, subject.server, total, answers, *row, *times), flush=True)
            for problem in outcome.wrong[:5] + seen["shared"][:5]:
                print(f"    {problem}")
            failed |= total < requests or bool(outcome.wrong or seen["in_use"] or seen["shared"])
    print(
        "\nA connection leaked, was shared, or an answer was wrong."
        if failed
        else "\nNothing leaked, nothing was shared."
    )
    print(json.dumps({"ok": not failed})) if not sys.stdout.isatty() else None
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
