"""The command line: ``doctor``, ``check`` and ``pool``. What they do is in `peewee_frameworks.doctor`.

Exit status: 0, all is well; 1, it is not (a finding, a database or an application that cannot be reached); 2, the command could
not do its work (a wrong argument, a target that cannot be imported).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .doctor import boot, check, examine, live, target
from .doctor.report import SEVERITIES
from .doctor.serving import Serving
from .redact import redact

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_WELL, _NOT_WELL, _UNABLE = 0, 1, 2
_INTERRUPTED = 130  # as shells count: 128 and the number of the signal
_TIMEOUT = 5.0
_CLEAR = "\x1b[H\x1b[2J"


@dataclass(frozen=True)
class Started:
    """What a command that looks at a target begins with.

    Attributes:
        serving: what `doctor.boot` has read from ``--served-by``.
        loaded: the object that the target names; None for a URL.
        failure: what was raised meanwhile.
        name: how the object is called, where no target stands among the arguments.
    """

    serving: Mapping[str, Any] | None = None
    loaded: Any = None
    failure: BaseException | None = None
    name: str | None = None


def main(arguments: Sequence[str] | None = None, started: Started | None = None) -> int:
    """Run one command and return the exit status.

    Args:
        arguments: those of the command line; `sys.argv` if None.
        started: given by `doctor.boot`, in whose process the target was imported first, and by the commands of a framework.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(has_app=started is not None and started.name is not None).parse_args(arguments)
    try:
        begun = started if started is not None or options.run is _pool else _start(options, arguments)
        status: int = begun if isinstance(begun, int) else options.run(options, begun)
    except target.TargetError as error:
        _say(f"{error}\n{error.detail}".rstrip())
        return _UNABLE
    except live.LiveError as error:
        _say(str(error))
        return _UNABLE if isinstance(error, live.NoURL) else _NOT_WELL
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def _start(options: argparse.Namespace, arguments: Sequence[str]) -> Started | int:
    """Import the target in a process of its own, and run the command there; a URL needs none."""
    target.check_name(options.target)
    served_by = options.served_by or ("gunicorn" if os.environ.get("GUNICORN_CMD_ARGS") else "")
    if "://" in options.target and not served_by:
        return Started()
    begin = json.dumps({"target": options.target, "served_by": served_by})
    status = subprocess.call([sys.executable, boot.__file__, begin, *arguments])  # noqa: S603 - ourselves
    if status in (_WELL, _NOT_WELL, _UNABLE, _INTERRUPTED):
        return status
    how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
    _say(f"{options.target}: the process that imports it {how} before the command was done.")
    return _UNABLE


class _Parser(argparse.ArgumentParser):
    """Repeats what it does not understand, but no passwords."""

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


def _parser(has_app: bool) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flask peewee" if has_app else "python -m peewee_frameworks",
        description="Look at the databases of an application.",
    )
    parser.add_argument("--version", action="version", version=f"peewee_frameworks {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    doctor = commands.add_parser("doctor", help="say what will go wrong, and what to change")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--workers", type=_count, metavar="N", help="server processes (default: WEB_CONCURRENCY, or 1)")
    if not has_app:
        doctor.add_argument(
            "--served-by",
            metavar="COMMAND",
            help="the server's command line, quoted: 'gunicorn -k gevent -w 4' (default: gunicorn if GUNICORN_CMD_ARGS is set)",
        )
    doctor.add_argument(
        "--fail-on", choices=SEVERITIES, default="warning", help="exit with 1 from this severity on (default: warning)"
    )

    checker = commands.add_parser("check", help="connect; show round trip time, server version, TLS")
    checker.set_defaults(run=_check, served_by=None)

    for command in (doctor, checker):
        command.add_argument(
            "--timeout", type=_seconds, default=_TIMEOUT, metavar="SECONDS", help="for each database (default: 5)"
        )
        if not has_app:
            command.add_argument(
                "target", metavar="TARGET", help="module:name of a database, a Peewee, an application, or a URL"
            )

    if not has_app:
        pool = commands.add_parser("pool", help="show what the pools of a running application do")
        pool.set_defaults(run=_pool)
        pool.add_argument("url", metavar="URL", help="where the health endpoints are mounted: http://host:port/db")
        pool.add_argument(
            "--header",
            action="append",
            default=[],
            type=_header,
            metavar="'NAME: VALUE'",
            help="for the endpoints' guard",
        )
        pool.add_argument(
            "--interval", type=_seconds, default=1.0, metavar="SECONDS", help="between two looks (default: 1)"
        )
        pool.add_argument(
            "--timeout", type=_seconds, default=_TIMEOUT, metavar="SECONDS", help="for an answer (default: 5)"
        )
        pool.add_argument("--once", action="store_true", help="look once")

    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("a whole number from 1 on is needed")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError("a number of seconds above 0 is needed")
    return seconds


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError("write it as 'Name: value'")  # never the value itself
    return name.strip(), value.strip()


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201 - a command line


def _show(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command line


# -- commands -------------------------------------------------------------------------------------------------------------


def _load(options: argparse.Namespace, started: Started) -> target.Target:
    if started.name is not None:
        return target.describe(started.name, started.loaded)
    return target.load(options.target, started.loaded, started.failure)


def _doctor(options: argparse.Namespace, started: Started) -> int:
    serving = Serving.find(options.workers, started.serving, os.environ)
    try:
        report = examine.examine(_load(options, started), serving, options.timeout)
    except target.SetupRefused as error:
        report = examine.refused(started.name or target.check_name(options.target), error, serving)
    _show(json.dumps(report.as_json(), indent=2) if options.json else report.as_text())
    return _NOT_WELL if report.fails(options.fail_on) else _WELL


def _check(options: argparse.Namespace, started: Started) -> int:
    found = _load(options, started)
    results = check.check(found, options.timeout)
    if options.json:
        _show(json.dumps(check.as_json(found.name, results), indent=2))
    else:
        _show("\n".join(f"{alias}: {result}" for alias, result in results.items()))
    return _WELL if all(result.ok for result in results.values()) else _NOT_WELL


def _pool(options: argparse.Namespace, _: Started | None) -> int:
    source = live.Source(options.url, dict(options.header), options.timeout)
    table = live.Table()
    # The first answer must be one: then the address and the headers are right.
    status: live.Status | live.LiveError = source.read()
    while True:
        if isinstance(status, live.Status):
            table.add(status)
            _show(json.dumps(status.document) if options.json else _page(options, source, table))
        else:
            _say(str(status))
        if options.once:
            return _WELL
        time.sleep(options.interval)
        try:
            status = source.read()
        except live.LiveError as error:  # it may be restarting
            status = error


def _page(options: argparse.Namespace, source: live.Source, table: live.Table) -> str:
    if options.once:
        return table.render()
    if not sys.stdout.isatty():
        return f"{table.render()}\n"
    return f"{_CLEAR}{source.shown}, every {options.interval:g} s; Ctrl-C ends\n\n{table.render()}"
