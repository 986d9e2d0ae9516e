"""A real server in a child process: started, awaited, listened to, ended; each within a deadline."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.client import Client
from tests.support.ports import HOST, accepts, reserved_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

ROOT = Path(__file__).resolve().parents[2]


class ServerError(AssertionError):
    """A server did not start, did not end or did not end well; the message holds the end of its output."""


class ServerProcess:
    """A child process that serves on `url` between enter and exit of the context manager.

    Args:
        command: gives the command line for a port.
        env: what to add to the environment; the repository's root is on PYTHONPATH.
        ready: the path to GET until a response comes, any status; None waits for a TCP connect only, so that the
            application sees no request but the test's own.
        announce: texts and how often the output must hold each first, for servers that listen before they are up.
        exits: the exit codes that are well on SIGTERM.
        start: seconds until it must be ready.
        end: seconds from SIGTERM until the process and its workers must have ended.

    The port stays reserved until exit: `stop()` and `start()` give the same URL.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        *,
        env: Mapping[str, str] | None = None,
        ready: str | None = None,
        announce: Mapping[str, int] | None = None,
        exits: Sequence[int] = (0, -signal.SIGTERM),
        start: float = 30.0,
        end: float = 15.0,
    ) -> None:
        self.command = command
        self.env = dict(env or {})
        self.ready = ready
        self.announce = dict(announce or {})
        self.exits = exits
        self.start_seconds = start
        self.end_seconds = end
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        """The base URL, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """The process that was started: the only one, or the parent of the workers."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the parent process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def output(self) -> str:
        """What all processes wrote to stdout and stderr so far."""
        self._file.flush()
        return Path(self._file.name).read_text(errors="replace")

    def workers(self) -> list[int]:
        """Give the pids of the other processes of the server that live now."""
        return [pid for pid in _group(self.pid) if pid != self.pid]

    def client(self, deadline: float = 15.0) -> Client:
        """Open one raw connection to the server."""
        return Client(self.url, deadline)

    def __enter__(self) -> Self:
        try:
            self.port = self._stack.enter_context(reserved_port())
            self._file = self._stack.enter_context(tempfile.NamedTemporaryFile(suffix=".log"))
            self.start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if self._process is None:
                return
            try:
                self.stop()
            except ServerError as problem:
                if error is None:
                    raise
                error.add_note(str(problem))
            else:
                if error is not None:
                    error.add_note(self._tail())

    def start(self) -> None:
        """Start the process and wait until it is ready."""
        ours = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(ROOT)}
        environment = {**os.environ, **ours, **self.env}
        self._seen = len(self.output)
        self._process = subprocess.Popen(
            list(self.command(self.port)),
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,  # one group: signals reach workers, and none of ours
        )
        try:
            self._await_ready()
        except BaseException:
            self.kill()
            raise

    def signal(self, number: int) -> None:
        """Send a signal to the parent process only."""
        os.kill(self.pid, number)

    def wait(self, deadline: float | None = None) -> int:
        """Wait for the end of the parent and all workers, without a signal; give the exit code."""
        assert self._process is not None
        seconds = self.end_seconds if deadline is None else deadline
        end = time.monotonic() + seconds
        try:
            code = self._process.wait(seconds)
            while left := _group(self.pid):
                if time.monotonic() > end:
                    raise ServerError(f"workers {left} outlive their parent.{self._tail()}")
                time.sleep(0.01)
        except subprocess.TimeoutExpired:
            self._dump_stacks()
            raise ServerError(f"still running after {seconds} s.{self._tail()}") from None
        finally:
            self.kill()
        return code

    def stop(self) -> int:
        """SIGTERM, wait for parent and workers, give the exit code; ServerError if late or not well."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()
        code = self.wait()
        if code not in self.exits:
            raise ServerError(f"exit code {code}, not one of {tuple(self.exits)}.{self._tail()}")
        return code

    def kill(self) -> None:
        """SIGKILL everything that is left, at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
            self._process = None

    def _await_ready(self) -> None:
        assert self._process is not None
        end = time.monotonic() + self.start_seconds
        while True:
            if (code := self._process.poll()) is not None:
                raise ServerError(f"ended with {code} before it was ready.{self._tail()}")
            left = end - time.monotonic()
            if left <= 0:
                raise ServerError(f"not ready within {self.start_seconds} s.{self._tail()}")
            if self._answers(left):
                return
            time.sleep(0.01)

    def _answers(self, left: float) -> bool:
        if self.announce:
            output = self.output[self._seen :]
            if any(output.count(text) < count for text, count in self.announce.items()):
                return False
        if self.ready is None:
            return accepts(self.port)
        try:
            with Client(self.url, min(left, 5.0)) as client:
                client.get(self.ready, Connection="close")
        except (OSError, ValueError):
            return False
        return True

    def _dump_stacks(self) -> None:
        """Let the processes write where their threads are (faulthandler does, on SIGABRT), which ends them."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)

    def _tail(self) -> str:
        return f"\n--- output of {' '.join(self.command(self.port))}\n{self.output[-6000:]}"


def _group(pgid: int) -> list[int]:
    """List the live processes of a group (zombies do not count); needs Linux's /proc, else always empty."""
    found = []
    for process in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group, *_ = process.read_text().rpartition(")")[2].split()
            if int(group) == pgid and state not in {"Z", "X"}:
                found.append(int(process.parent.name))
    return sorted(found)


def python(*arguments: str) -> list[str]:
    """Give the command line that runs a module with the tests' own interpreter."""
    return [sys.executable, "-m", *arguments]
