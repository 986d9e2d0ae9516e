"""Servers of a test's own, for what must not be set on the shared ones: TLS, a pooler. Skips where they are not installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.concurrency import eventually
from tests.support.ports import HOST, accepts, reserved_port
from tests.support.servers import server_kwargs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE = 60
# Database servers refuse to run as root.
_USER: dict[str, Any] = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.getuid() == 0 else {}


def _program(name: str, variable: str | None = None) -> str:
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", *map(str, versions)])
    found = (os.environ.get(variable) if variable else None) or shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is not installed" + (f"; {variable} may name it" if variable else ""))
    return found


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pf_test_") as name:
        yield Path(name)


def _own(directory: Path) -> None:
    if _USER:
        for path in (directory, *directory.rglob("*")):
            shutil.chown(path, _USER["user"], _USER["group"])


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE, **_USER)


@contextlib.contextmanager
def _serve(command: Callable[[int], list[str]]) -> Iterator[tuple[str, int]]:
    with reserved_port() as port, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command(port), stdout=log, stderr=subprocess.STDOUT, **_USER)
        try:
            eventually(lambda: accepts(port) or process.poll() is not None, DEADLINE, "the server listens")
            if process.poll() is not None:
                log.seek(0)
                pytest.fail(f"{command(port)[0]} ended: {log.read().decode()[-2000:]}")
            yield HOST, port
        finally:
            process.terminate()
            process.wait(DEADLINE)


def _certificate(directory: Path) -> None:
    command = [
        _program("openssl"),
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    files = ["-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")]
    subprocess.run([*command, *files], check=True, capture_output=True, timeout=DEADLINE)
    (directory / "key.pem").chmod(0o600)


@contextlib.contextmanager
def postgres_with_tls() -> Iterator[tuple[str, int]]:
    """A PostgreSQL whose superuser is `postgres`, without a password."""
    server = _program("postgres")
    with _directory() as directory:
        _certificate(directory)
        _own(directory)
        data = str(directory / "data")
        _run(_program("initdb"), "-D", data, "-A", "trust", "-U", "postgres", "--no-sync")

        def command(port: int) -> list[str]:
            settings = {
                "listen_addresses": HOST,
                "port": port,
                "unix_socket_directories": "",
                "fsync": "off",
                "ssl": "on",
                "ssl_cert_file": directory / "cert.pem",
                "ssl_key_file": directory / "key.pem",
            }
            return [server, "-D", data, *(f"--{name}={value}" for name, value in settings.items())]

        with _serve(command) as address:
            yield address


@contextlib.contextmanager
def mariadb_with_tls() -> Iterator[tuple[str, int]]:
    """A MariaDB whose superuser is `root`, without a password."""
    server = _program("mariadbd")
    with _directory() as directory:
        _certificate(directory)
        _own(directory)
        data = str(directory / "data")
        own = ["--no-defaults", f"--datadir={data}"]
        _run(_program("mariadb-install-db"), *own, "--auth-root-authentication-method=normal", "--skip-test-db")

        def command(port: int) -> list[str]:
            place = [
                f"--bind-address={HOST}",
                f"--port={port}",
                f"--socket={directory}/socket",
                f"--pid-file={directory}/pid",
            ]
            tls = [f"--ssl-cert={directory}/cert.pem", f"--ssl-key={directory}/key.pem"]
            return [server, *own, *place, *tls, "--innodb-buffer-pool-size=16M"]

        with _serve(command) as address:
            yield address


_PGBOUNCER = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {own_port}
unix_socket_dir =
auth_type = trust
auth_file = {directory}/users.txt
pool_mode = {mode}
ignore_startup_parameters = extra_float_digits,options,application_name
"""


@contextlib.contextmanager
def pgbouncer(mode: str) -> Iterator[tuple[str, int]]:
    """The real one, before the tests' own server."""
    program = _program("pgbouncer", "PEEWEE_FRAMEWORKS_PGBOUNCER")
    login = server_kwargs("postgres")
    with _directory() as directory:

        def command(port: int) -> list[str]:
            text = _PGBOUNCER.format(
                host=login["host"], port=login["port"], own_port=port, directory=directory, mode=mode
            )
            (directory / "pgbouncer.ini").write_text(text)
            (directory / "users.txt").write_text(f'"{login["user"]}" "{login.get("password", "")}"\n')
            _own(directory)
            return [program, str(directory / "pgbouncer.ini")]

        with _serve(command) as address:
            yield address
