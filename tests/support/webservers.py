"""The web servers that the tests run, each on a target "module:name".

`factory=True` if the name makes the application. What is not named here goes to ServerProcess as it is: env,
ready, announce, exits, start, end. All are ready when every worker is up; those that must be asked for it
get a GET of "/".
"""

from __future__ import annotations

from typing import Any, Literal

from sanic import __version__ as sanic_version

from tests.support.ports import HOST
from tests.support.process import ServerProcess, python
from tests.support.run_sanic import MANAGER_READY


def werkzeug(target: str, *, factory: bool = False, **process: Any) -> ServerProcess:
    """Werkzeug's development server, a thread per connection."""

    def command(port: int) -> list[str]:
        return python("tests.support.run_werkzeug", target, str(port), *["--factory"] * factory)

    return ServerProcess(command, **process)


def gunicorn(
    target: str,
    *,
    factory: bool = False,
    worker: Literal["sync", "gthread", "gevent"] = "gthread",
    workers: int = 1,
    threads: int = 8,
    preload: bool = False,
    options: tuple[str, ...] = (),
    **process: Any,
) -> ServerProcess:
    """Gunicorn; `threads` counts for gthread only. It listens before it has workers: asks for "/"."""

    def command(port: int) -> list[str]:
        settings = ["-b", f"{HOST}:{port}", "-k", worker, "-w", str(workers), "--no-control-socket"]
        if worker == "gthread":
            settings += ["--threads", str(threads)]
        if preload:
            settings.append("--preload")
        return python("gunicorn", *settings, *options, target + "()" * factory)

    return ServerProcess(command, **{"ready": "/", "announce": {"Booting worker with pid": workers}, **process})


def uvicorn(
    target: str,
    *,
    factory: bool = False,
    loop: Literal["uvloop", "asyncio"] = "uvloop",
    http: Literal["httptools", "h11"] = "httptools",
    workers: int = 1,
    options: tuple[str, ...] = (),
    **process: Any,
) -> ServerProcess:
    """Uvicorn; with several workers it listens before they are up: asks for "/"."""

    def command(port: int) -> list[str]:
        settings = ["--host", HOST, "--port", str(port), "--loop", loop, "--http", http, "--no-access-log"]
        settings += ["--workers", str(workers)] * (workers > 1) + ["--factory"] * factory
        return python("uvicorn", *settings, *options, target)

    several = {"ready": "/", "announce": {"Started server process [": workers}} if workers > 1 else {}
    return ServerProcess(command, **several | process)


def sanic(
    target: str,
    *,
    factory: bool = False,
    workers: int = 1,
    single_process: bool = False,
    options: tuple[str, ...] = (),
    **process: Any,
) -> ServerProcess:
    """Sanic's own server: a manager and worker processes, or one process only.

    A worker loses a SIGTERM that comes between its listen and its main loop, and the manager one that comes before
    it knows of all workers (25.12): hence the wait for the lines that they write last.
    """
    last = "Worker ready [" if sanic_version >= "25.12" else "Starting worker ["  # up to 25.3 there is nothing later
    announce = {last: workers} | ({} if single_process else {MANAGER_READY: 1})

    def command(port: int) -> list[str]:
        settings = ["--host", HOST, "--port", str(port), "--no-motd", "--no-access-logs"]
        settings += ["--single-process"] if single_process else ["--workers", str(workers)]
        return python("tests.support.run_sanic", target, *settings, *["--factory"] * factory, *options)

    return ServerProcess(command, **{"announce": announce, **process})


def hypercorn(
    target: str, *, factory: bool = False, workers: int = 1, options: tuple[str, ...] = (), **process: Any
) -> ServerProcess:
    """Hypercorn on asyncio."""

    def command(port: int) -> list[str]:
        name = target + "()" * factory
        return python("hypercorn", "-b", f"{HOST}:{port}", "-w", str(workers), *options, name)

    return ServerProcess(command, **{"ready": "/", **process})
