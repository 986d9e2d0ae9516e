"""Import the target as its server does, in a fresh interpreter, and only then anything of ours.

Run as a program by ``cli.py``, since ``import peewee_frameworks`` imports Peewee, and whether Peewee was imported before
gevent's patch is one of the questions. So this file knows the standard library only.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import json
import os
import shlex
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

# How each server names the number of its processes; all of them but sanic read WEB_CONCURRENCY.
_WORKERS = {
    "uvicorn": ("--workers",),
    "hypercorn": ("-w", "--workers"),
    "sanic": ("-w", "--workers"),
}


class Refused(Exception):
    """The command line of the server cannot be understood; the message says why."""


def read_serving(command: str, target: str) -> dict[str, Any]:
    """Read from a server's command line how it would serve the target: the fields of `serving.Serving`.

    Args:
        command: for example ``gunicorn -k gevent -w 4``; the application's name in it is allowed and not looked at.
        target: what gunicorn is told to be the application, if its configuration does not name one.

    Raises: `Refused`.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise Refused(f"--served-by cannot be read: {error}.") from None
    if words[1:2] == ["-m"]:  # python -m gunicorn
        words = words[2:]
    server = Path(words[0]).name if words else ""
    if server == "gunicorn":
        return _gunicorn(words[1:], target)
    if server not in _WORKERS:
        raise Refused(
            "--served-by: the doctor knows gunicorn, uvicorn, hypercorn and sanic. For another server give the number "
            "of its processes with --workers."
        )
    return _others(server, words[1:])


def _others(server: str, words: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    default = os.environ.get("WEB_CONCURRENCY", "1") if server != "sanic" else "1"
    parser.add_argument(*_WORKERS[server], dest="workers", default=default)
    parser.add_argument("--reset-contextvars", action="store_true")
    parser.add_argument("--fast", action="store_true")
    given, _ = parser.parse_known_args(words)
    if not given.workers.isdigit() or given.workers == "0":
        raise Refused(f"--served-by: {server}'s --workers wants a number.")
    workers = (os.cpu_count() or 1) if server == "sanic" and given.fast else int(given.workers)
    return {"server": server, "workers": workers, "reset_contextvars": given.reset_contextvars}


def _gunicorn(words: list[str], target: str) -> dict[str, Any]:
    """Let gunicorn read its own settings: the command line, GUNICORN_CMD_ARGS, the file, WEB_CONCURRENCY."""
    try:
        from gunicorn.app.wsgiapp import WSGIApplication  # noqa: PLC0415 - only who uses gunicorn has it
    except ImportError:
        raise Refused("--served-by gunicorn: gunicorn is not installed in this environment.") from None
    mine, sys.argv = sys.argv, ["gunicorn", *words, target]
    try:
        settings: Any = WSGIApplication("%(prog)s [OPTIONS] [APP_MODULE]", prog="gunicorn").cfg
    except SystemExit:
        raise Refused("--served-by: gunicorn refuses its configuration; what it says stands above.") from None
    finally:
        sys.argv = mine
    worker = settings.worker_class_str
    gevent = "gevent" in worker
    if gevent:
        requests = settings.worker_connections
    elif worker in ("sync", "gthread"):
        requests = settings.threads if worker == "gthread" else 1
    else:
        requests = None
    return {
        "server": "gunicorn",
        "workers": settings.workers,
        "requests": requests,
        "gevent": gevent,
        "preload": bool(settings.preload_app),
    }


class NoSuchName(Exception):
    """The module has no such name: the module, the name, and the first part of it that is missing."""


def resolve(target: str) -> Any:
    """Import what ``module:name`` means, or call it if it is ``module:name()``.

    Raises: `NoSuchName`, and whatever the import or the call raises.
    """
    module_name, _, expression = target.partition(":")
    module = importlib.import_module(module_name)
    found: Any = module
    for part in expression.removesuffix("()").split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise NoSuchName(module, expression, part) from None
    return found() if expression.endswith("()") else found


def main() -> NoReturn:
    """Run ``python boot.py OPTIONS ARGUMENT…``: OPTIONS is a JSON object, the rest are the command line's arguments."""
    # As servers do it: the current directory first, and not that of this program.
    here, current = Path(__file__).resolve().parent, Path.cwd()
    sys.path[:] = [str(current), *(path for path in sys.path if Path(path).resolve() not in (here, current))]
    options: dict[str, str] = json.loads(sys.argv[1])
    target, served_by, arguments = options["target"], options["served_by"], sys.argv[2:]
    started: dict[str, Any] = {}
    try:
        if served_by:
            started["serving"] = read_serving(served_by, target)
        with _stdout_for_the_answer():
            started["loaded"] = _load(target, **started.get("serving", {}))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the command says it, in its own words
        started["failure"] = error
    except KeyboardInterrupt:
        _end(130)  # as shells count: 128 and the number of the signal

    from peewee_frameworks import cli  # noqa: PLC0415 - after the target: see above

    failure = started.get("failure")
    if isinstance(failure, (Refused, NoSuchName)):
        # This file is __main__ here; the package has its own copy of these classes.
        known = importlib.import_module("peewee_frameworks.doctor.boot")
        started["failure"] = getattr(known, type(failure).__name__)(*failure.args)
    _end(cli.main(arguments, cli.Started(**started)))


@contextlib.contextmanager
def _stdout_for_the_answer() -> Iterator[None]:
    """Let what the target prints meanwhile go to stderr: on stdout is the command's answer, which may be JSON."""
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        yield
        return
    try:
        yield
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _end(status: int) -> NoReturn:
    """End although the target may have started threads that never do, a scheduler's for example."""
    main_thread = threading.main_thread()
    if any(not thread.daemon and thread is not main_thread for thread in threading.enumerate()):
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _load(target: str, *, gevent: bool = False, preload: bool = False, **_: Any) -> Any:
    if gevent and not preload:
        _patch()
    loaded = None if "://" in target else resolve(target)
    if gevent and preload:
        _patch()  # gunicorn's worker patches when it starts, and the master has loaded the application before
    return loaded


def _patch() -> None:
    from gevent import monkey  # noqa: PLC0415 - only who uses gevent has it

    monkey.patch_all()


if __name__ == "__main__":
    main()
