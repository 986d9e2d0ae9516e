"""``prometheus_client``'s multi-process mode: each worker publishes, and whichever is scraped tells of all.

In that mode (``PROMETHEUS_MULTIPROC_DIR``) a collector would tell of its own process only. So each process writes its numbers
into the files of the library, from the application's start to its end, once a second and at each scrape it answers.

A worker that ends writes that it has no connections any more. One that was killed cannot; so each holds a lock on a file of
its own, and who finds the lock free forgets the gauges of that process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peewee_frameworks.errors import ConfigurationError
from peewee_frameworks.forks import watch_forks
from peewee_frameworks.pool.stats import BOUNDS, Histogram
from peewee_frameworks.pool.workers import threads_here
from peewee_frameworks.runtime import MULTIPROCESS as DIRECTORY

from .families import METRICS, Metric, moments, values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric as Family

    from peewee_frameworks.runtime import Runtime

    Key = tuple[str, tuple[str, ...]]

logger = logging.getLogger("peewee_frameworks.metrics")


INTERVAL = 1.0  # seconds between two rounds of publishing
BUCKETS = (*map(str, BOUNDS), "+Inf")
_LOCK = "peewee_frameworks_{}.lock"
_LOCK_TRIES = 10


def enabled() -> bool:
    """Return whether the process is in the multi-process mode."""
    return DIRECTORY in os.environ


def begin(runtime: Runtime) -> None:
    """Publish the pools of an application that has started, until `end`; without the library or its directory, nothing."""
    try:
        import prometheus_client  # noqa: F401, PLC0415 - an extra
    except ImportError:
        return
    if not Path(os.environ[DIRECTORY]).is_dir():
        logger.warning("%s", _no_directory(), extra={"directory": os.environ[DIRECTORY]})
        return
    _publisher.add(runtime)
    threads_here().maintainer.schedule(_publisher)


def end(runtime: Runtime) -> None:
    """Publish for the last time."""
    _publisher.remove(runtime)


def publish(runtime: Runtime) -> None:
    """Publish now, and from now on.

    Raises: `ConfigurationError` if there is no directory for it.
    """
    if not Path(os.environ[DIRECTORY]).is_dir():
        raise ConfigurationError(_no_directory())
    begin(runtime)
    _publisher.write()


def _no_directory() -> str:
    return (
        f"{DIRECTORY}={os.environ[DIRECTORY]!r} is not a directory, so no metrics are shared between the worker processes. "
        "Make it, empty, before the server starts."
    )


def collect(names: set[str]) -> Iterator[Family]:
    """Give what all processes have published under some names."""
    from prometheus_client.multiprocess import MultiProcessCollector  # noqa: PLC0415 - an extra

    _forget_dead()
    # Not those that `MultiProcessCollector.collect` would take: for a moment the file of a process that starts is empty, and
    # for ever if it is killed then, and that is an error there (struct.error).
    files = [str(path) for path in Path(os.environ[DIRECTORY]).glob("*.db") if _is_begun(path)]
    for family in MultiProcessCollector.merge(files):  # type: ignore[no-untyped-call]
        if family.name in names:
            yield family


def _is_begun(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except FileNotFoundError:  # of a process that was found dead this very moment
        return False


class _Publisher:
    """Writes the numbers of this process; the pools' maintainer calls it."""

    def __init__(self) -> None:
        self._fresh()
        watch_forks(self)

    def _fresh(self) -> None:
        self._lock: Any = None  # made with the first use, so that it is of the kind ``threading`` has then
        self._alive: Any = None
        self._runtimes: list[weakref.ref[Runtime]] = []
        self._gauges: dict[Key, Any] = {}
        self._counters: dict[Key, tuple[Any, float]] = {}  # the value in the file, and what it was when last read here

    def after_fork(self) -> None:
        """Start over in a forked child, whose applications have not started."""
        if self._alive is not None:
            self._alive.close()
        self._fresh()

    def add(self, runtime: Runtime) -> None:
        """Publish the pools of an application, too."""
        if self._lock is None:
            self._lock = threading.Lock()
        with self._lock:
            if not any(ref() is runtime for ref in self._runtimes):
                self._runtimes.append(weakref.ref(runtime))

    def remove(self, runtime: Runtime) -> None:
        """Publish the last of an application."""
        self.write()
        self._runtimes = [ref for ref in self._runtimes if ref() not in (None, runtime)]
        self.write()

    def maintain(self) -> float | None:
        """Publish; return the seconds until the next time."""
        self.write()
        return INTERVAL if self._runtimes else None

    def write(self) -> None:
        """Publish now."""
        if self._lock is None:
            return
        with self._lock:
            if self._alive is None:
                self._alive = _hold_lock()
            stale = set(self._gauges)
            for moment in moments(runtime for ref in self._runtimes if (runtime := ref()) is not None):
                for metric in METRICS:
                    for label, value in values(metric, moment):
                        labels = (moment.pool,) if label is None else (moment.pool, label)
                        stale -= self._write(metric, labels, value)
            for key in stale:
                self._gauges[key].set(0)

    def _write(self, metric: Metric, labels: tuple[str, ...], value: Any) -> set[Key]:
        if isinstance(value, Histogram):
            for bound, count in zip(BUCKETS, value.buckets, strict=True):
                self._grow(metric, "_bucket", (*labels, bound), count)
            self._grow(metric, "_sum", labels, value.sum)
        elif metric.kind == "counter":
            self._grow(metric, "_total", labels, value)
        else:
            key = (metric.name, labels)
            if key not in self._gauges:
                self._gauges[key] = _make(metric, "", labels)
            self._gauges[key].set(value)
            return {key}
        return set()

    def _grow(self, metric: Metric, suffix: str, labels: tuple[str, ...], value: float) -> None:
        # By difference: a pool that was disposed of counts anew, and so does a process with the number of an earlier one.
        key = (metric.name + suffix, labels)
        stored, before = self._counters.get(key) or (_make(metric, suffix, labels), 0)
        stored.inc(value - before if value >= before else value)
        self._counters[key] = stored, value


def _make(metric: Metric, suffix: str, labels: tuple[str, ...]) -> Any:
    from prometheus_client import values as stored  # noqa: PLC0415 - an extra

    from .prometheus import label_names, prometheus_name  # noqa: PLC0415 - which stands on this module

    name, names = prometheus_name(metric), label_names(metric)
    if suffix == "_bucket":
        names = (*names, "le")
    mode = {"multiprocess_mode": "livesum"} if metric.kind == "gauge" else {}
    return stored.ValueClass(metric.kind, name, name + suffix, names, labels, metric.text, **mode)


# -- the living and the dead ----------------------------------------------------------------------------------------------


def _hold_lock() -> Any:
    """Take the lock that says that this process lives; whoever ends, however, lets it go."""
    try:
        import fcntl  # noqa: PLC0415 - not on Windows
    except ImportError:
        return None
    path = Path(os.environ[DIRECTORY], _LOCK.format(os.getpid()))
    for _ in range(_LOCK_TRIES):
        file = path.open("w")
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:
                return file  # held until the end
        file.close()  # who looked for the dead had it in hand, and has removed it
    return path.open("w")  # a file system without locks


def _forget_dead() -> None:
    try:
        import fcntl  # noqa: PLC0415 - not on Windows
    except ImportError:
        return
    from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415 - an extra

    before, after = _LOCK.split("{}")
    for path in Path(os.environ[DIRECTORY]).glob(_LOCK.format("[0-9]*")):
        with contextlib.suppress(OSError), path.open() as file:  # it may be gone; or locked, and then its process lives
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mark_process_dead(path.name.removeprefix(before).removesuffix(after))  # type: ignore[no-untyped-call]
            path.unlink()


_publisher = _Publisher()
