"""``pool``: what the pools of a running application do, read from its status document over HTTP.

The document is what ``GET <mount>/status`` of the health endpoints answers::

    {"worker": 4711, "pools": {"default": {… the fields of PoolStats …}}}

`parse` is the only place that knows its shape.
"""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from .target import is_name

if TYPE_CHECKING:
    from collections.abc import Mapping

_LONGEST = 1_000_000  # bytes of a document
_HELP = "The URL is that of the mounted health endpoints: http://127.0.0.1:8000/db"


class LiveError(Exception):
    """The status document cannot be had; the message says why, and names the URL without its login."""


class NoURL(LiveError):
    """The address is none of an HTTP server."""


@dataclass(frozen=True)
class Pool:
    """What is shown of one pool; times in seconds, totals since its start. None is what its kind of pool cannot tell."""

    used: int | None
    idle: int | None
    connecting: int | None
    waiting: int | None
    size: int | None
    timeouts: int | None
    leaks: int | None
    checkouts: int | None
    waits: tuple[int, float]
    uses: tuple[int, float]


@dataclass(frozen=True)
class Status:
    """One answer of one worker process."""

    worker: int | str
    pools: dict[str, Pool]
    document: dict[str, Any]
    at: float


class Source:
    """Where the document comes from."""

    def __init__(self, url: str, headers: Mapping[str, str], timeout: float) -> None:
        """Take the address.

        Args:
            url: of the mounted endpoints, or of the document itself. A login in it becomes an Authorization header.
            headers: to send with each request.
            timeout: seconds for one answer.

        Raises: `NoURL`.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise NoURL(f"This URL is malformed. {_HELP}") from None
        if parts.scheme not in ("http", "https") or not host:
            raise NoURL(f"{_no_url(url)} {_HELP}")
        path = parts.path.rstrip("/")
        path = path if path.rpartition("/")[2] == "status" else f"{path}/status"
        place = f"[{host}]" if ":" in host else host
        self.url = urlunsplit((parts.scheme, f"{place}:{port}" if port else place, path, parts.query, ""))
        self.shown = self.url.partition("?")[0]
        self._headers = {"Accept": "application/json", **headers}
        self._timeout = timeout
        if parts.username is not None and "Authorization" not in headers:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
        self._opener = urllib.request.build_opener(_NoRedirects)

    def read(self) -> Status:
        """Ask once.

        Raises: `LiveError`.
        """
        request = urllib.request.Request(self.url, headers=self._headers)  # noqa: S310 - http only, see above
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                body = response.read(_LONGEST + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise LiveError(self._answered(error)) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise LiveError(
                f"{self.shown} cannot be reached: {reason or type(error).__name__}. Is the application running there?"
            ) from None
        return parse(body, self.shown)

    def _answered(self, error: urllib.error.HTTPError) -> str:
        said = f"{self.shown} answered {error.code} {error.reason}."
        if error.code in (401, 403):
            return f"{said} Pass what its guard asks for, as --header 'Authorization: Bearer …'."
        if error.code == 404:  # noqa: PLR2004
            return f"{said} Nothing is mounted there. {_HELP}"
        if 300 <= error.code < 400:  # noqa: PLR2004
            return f"{said} The headers are not sent anywhere else: give the URL that it redirects to."
        return said


def _no_url(text: str) -> str:
    if "://" not in text and is_name(text):
        return (
            f"{text} would be imported into this process, whose pools are not those of the running application: that "
            "one is asked over HTTP."
        )
    return "This is not an http URL."


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows none: the Authorization header would go along, to whatever host it is."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def parse(body: bytes, source: str) -> Status:
    """Read a status document.

    Raises: `LiveError` if it is none.
    """
    try:
        document = json.loads(body)
    except ValueError:
        raise LiveError(f"{source} answered with something that is not JSON. {_HELP}") from None
    try:
        pools = {str(alias): _pool(stats) for alias, stats in document["pools"].items()}
        return Status(document["worker"], pools, document, time.monotonic())
    except (AttributeError, KeyError, TypeError, ValueError):
        raise LiveError(
            f"{source} answered with JSON that is not a status document (it has no worker and pools). {_HELP}"
        ) from None


def _pool(stats: Mapping[str, Any]) -> Pool:
    return Pool(
        used=_count(stats["used"]),
        idle=_count(stats["idle"]),
        connecting=_count(stats["connecting"]),
        waiting=_count(stats["waiting"]),
        size=_count(stats["max_connections"]),
        timeouts=_count(stats["timeouts"]),
        leaks=_count(stats["leaks"]),
        checkouts=_count(stats["checkouts"]),
        waits=_times(stats["wait_time"]),
        uses=_times(stats["use_time"]),
    )


def _count(value: Any) -> int | None:
    return None if value is None else int(value)


def _times(histogram: Any) -> tuple[int, float]:
    return (0, 0.0) if histogram is None else (int(histogram["count"]), float(histogram["sum"]))


# -- the table ------------------------------------------------------------------------------------------------------------

_COLUMNS = (
    "worker",
    "pool",
    "used",
    "of",
    "idle",
    "opening",
    "waiting",
    "timeouts",
    "leaks",
    "checkouts/s",
    "wait ms",
    "use ms",
)


class Table:
    """The latest answer of each worker, and what happened between it and the one before."""

    def __init__(self) -> None:
        self._latest: dict[int | str, Status] = {}
        self._before: dict[int | str, Status] = {}

    def add(self, status: Status) -> None:
        """Take an answer."""
        if status.worker in self._latest:
            self._before[status.worker] = self._latest[status.worker]
        self._latest[status.worker] = status

    def render(self) -> str:
        """Return the table as lines of text."""
        rows: list[tuple[str, ...]] = [_COLUMNS]
        for worker, status in sorted(self._latest.items(), key=lambda item: str(item[0])):
            before = self._before.get(worker)
            for alias, pool in status.pools.items():
                earlier = before.pools.get(alias) if before else None
                seconds = status.at - before.at if before else 0.0
                rows.append(_row(worker, alias, pool, earlier, seconds))
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        left = 2  # columns of words
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def _row(worker: int | str, alias: str, pool: Pool, earlier: Pool | None, seconds: float) -> tuple[str, ...]:
    # Without an earlier answer the means are those since the pool's start.
    rate = "-"
    if earlier and seconds and pool.checkouts is not None and earlier.checkouts is not None:
        rate = f"{(pool.checkouts - earlier.checkouts) / seconds:.0f}"
    waits = _mean(pool.waits, earlier.waits if earlier else (0, 0.0))
    uses = _mean(pool.uses, earlier.uses if earlier else (0, 0.0))
    counts = (pool.used, pool.size, pool.idle, pool.connecting, pool.waiting, pool.timeouts, pool.leaks)
    return (str(worker), alias, *("-" if count is None else str(count) for count in counts), rate, waits, uses)


def _mean(now: tuple[int, float], before: tuple[int, float]) -> str:
    count = now[0] - before[0]
    return f"{(now[1] - before[1]) / count * 1000:.1f}" if count > 0 else "-"
