"""Health of an application's databases: may traffic come (readiness), what do the pools do (status), and a page that shows it.

Framework-free: the adapters mount what `Health` answers, each in its framework's idiom.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import inspect
import json
import os
import secrets
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peewee_frameworks.errors import ConfigurationError
from peewee_frameworks.redact import one_line, redact
from peewee_frameworks.scope import current_scope

from .history import INTERVAL, Point, Series
from .probe import Outcome, probe_of
from .serving import is_stopping

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Container, Iterator, Mapping

    from peewee_frameworks.extension import Extension
    from peewee_frameworks.pool.stats import PoolStats
    from peewee_frameworks.state import State

__all__ = ["NAMES", "Answer", "Database", "Health", "Readiness", "let_go", "wants_guard"]

Verdict = Literal["ok", "degraded", "unavailable"]

NAMES = ("live", "ready", "", "status", "events", "metrics")
"""The endpoints, by the last part of their path; "" is the page."""

PROBE_TIMEOUT = 0.5
EVENTS_KEPT = 50
HOLDERS_TOLD = 100  # of a thousand, with their stacks, each watcher would get a megabyte a second
BLIND_SECONDS = 30.0
"""How long a stream of events lasts under a server that does not tell when it stops; the page connects again."""

EVENTS_HEADERS = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no", "Cache-Control": "no-store"}
"""Of the stream of events; proxies must not collect it."""

_ASKING = ("ready", "status")  # the databases
_TICK = 0.2  # seconds between two looks whether the server stops
_ORDER: tuple[Verdict, ...] = ("ok", "degraded", "unavailable")
_JSON = "application/json"
_VERBOSE = "verbose"
_NO_STORE = {"Cache-Control": "no-store"}
_NO_GUARD = (
    "The health endpoints were mounted without a guard, so only live and ready exist. Pass guard=, a function of the request "
    "that says who may see more."
)


def wants_guard(name: str, query: Container[str]) -> bool:
    """Return whether an endpoint says more than one word, so that only those may ask whom the guard lets in."""
    return name not in ("live", "ready") or (name == "ready" and _VERBOSE in query)


def check_guard(guard: Any, otherwise: str = "") -> None:
    """Refuse a guard that cannot be called with the request, when it is given and not with the first request.

    Args:
        guard: what was given; None is nobody.
        otherwise: what else might have been given, for the message.

    Raises: `ConfigurationError`.
    """
    if guard is None:
        return
    name = getattr(guard, "__qualname__", None) or repr(guard)
    remedy = f"Give a function of the request that says who may see more{otherwise}."
    if not callable(guard):
        raise ConfigurationError(f"guard={name} is not a function. {remedy}")
    if inspect.isgeneratorfunction(guard) or inspect.isasyncgenfunction(guard):
        raise ConfigurationError(
            f"guard={name} is a generator function: called, it runs nothing, and would let everybody in. {remedy}"
        )
    try:
        signature = inspect.signature(guard)
    except (TypeError, ValueError):  # not written in Python: nobody knows
        return
    try:
        signature.bind(None)
    except TypeError:
        raise ConfigurationError(f"guard={name}{signature} cannot be called with the request alone. {remedy}") from None


def let_go() -> None:
    """Give back what a guard's queries have taken, whatever the option ``release`` says: a stream lasts, and needs none."""
    scope = current_scope()
    while scope is not None:
        scope.idles = True
        scope.release_early()
        scope = scope.parent


@dataclass(frozen=True)
class Answer:
    """A response: what the adapters turn into one of their framework's."""

    status: int
    body: bytes
    content_type: str = _JSON
    headers: dict[str, str] = field(default_factory=lambda: dict(_NO_STORE))


@dataclass(frozen=True)
class Database:
    """What is known of one database; `seconds` is how long it took to answer, `reason` why it is not ``ok``."""

    status: Verdict
    seconds: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Readiness:
    """Whether traffic may come: the worst of what is said of each database."""

    databases: dict[str, Database]
    problem: str | None = None

    @property
    def status(self) -> Verdict:
        """``unavailable`` if a database does not answer, ``degraded`` if a pool is exhausted and requests wait."""
        if self.problem is not None:
            return "unavailable"
        return max((each.status for each in self.databases.values()), key=_ORDER.index, default="ok")

    def as_dict(self) -> dict[str, Any]:
        """Return it as it stands in the status document."""
        found: dict[str, Any] = {"status": self.status}
        if self.problem is not None:
            found["reason"] = self.problem
        found["databases"] = {alias: vars(each) for alias, each in self.databases.items()}
        return found


class Health:
    """What one mount of the health endpoints answers.

    Neither liveness nor readiness takes a connection from a pool or waits behind requests: see `health.probe`.
    """

    def __init__(self, orm: Extension, timeout: float | None = None) -> None:
        """Look after the databases of a `Peewee`; nothing connects.

        Args:
            orm: whose databases.
            timeout: seconds within which a database must answer a readiness probe; 0.5 by default.

        Raises: `ConfigurationError` for a timeout that is not above 0.
        """
        self.timeout = PROBE_TIMEOUT if timeout is None else timeout
        if not self.timeout > 0:
            raise ConfigurationError(
                f"probe_timeout={timeout!r}: give seconds above 0; {PROBE_TIMEOUT} is the default."
            )
        # Whether the server has been told to stop, where it tells its application; None where it does not.
        self.ended: bool | None = None
        self._orm = orm
        self._series = Series(self._stats, lambda: orm.runtime.queued)
        self._events: collections.deque[dict[str, Any]] = collections.deque(maxlen=EVENTS_KEPT)
        self._listening: set[int] = set()
        self._listen()

    # -- readiness ------------------------------------------------------------------------------------------------------

    def readiness(self) -> Readiness:
        """Ask all databases at once, within `timeout`. Blocks; `readiness_async` does not."""
        states = self._states()
        if isinstance(states, Readiness):
            return states
        end = time.monotonic() + self.timeout
        asked = {alias: (probe_of(state), probe_of(state).start(self.timeout)) for alias, state in states.items()}
        outcomes = {}
        for alias, (probe, future) in asked.items():
            try:
                outcomes[alias] = future.result(max(0.0, end - time.monotonic()))
            except TimeoutError:
                outcomes[alias] = probe.give_up(future)
        return self._judge(outcomes)

    async def readiness_async(self) -> Readiness:
        """Do what `readiness` does without blocking the event loop."""
        states = self._states()
        if isinstance(states, Readiness):
            return states
        asked = await asyncio.gather(*(probe_of(state).ask(self.timeout) for state in states.values()))
        return self._judge(dict(zip(states, asked, strict=True)))

    def _states(self) -> dict[str, State] | Readiness:
        if self._orm.runtime.ending:
            return Readiness({}, "The application is stopping.")
        try:
            states = self._orm.runtime.states
        except ConfigurationError as error:
            return Readiness({}, str(error))
        self._listen()
        return dict(zip(self._orm.databases, states, strict=True))

    def _stats(self) -> dict[str, PoolStats]:
        try:
            return self._orm.stats()
        except ConfigurationError:  # the configuration has not been read
            return {}

    def _judge(self, outcomes: dict[str, Outcome]) -> Readiness:
        self._series.take()
        stats = self._stats()
        return Readiness({alias: self._database(alias, found, stats.get(alias)) for alias, found in outcomes.items()})

    def _database(self, alias: str, outcome: Outcome, stats: Any) -> Database:
        if outcome.error is not None:
            return Database("unavailable", None, self._redacted(alias, outcome.error))
        seconds = round(outcome.seconds, 6)
        if stats is not None and stats.closed:
            return Database("unavailable", seconds, "The pool is closed.")
        if outcome.refused is not None:
            reason = f"It answers, but opens no further connection: {self._redacted(alias, outcome.refused)}"
            return Database("degraded", seconds, reason)
        if stats is not None and stats.suspended:
            return Database("degraded", seconds, "The pool is suspended.")
        if stats is not None and stats.max_connections and (stats.used or 0) >= stats.max_connections:
            # A pool that does not know who waits is taken to have somebody waiting when it has nothing left.
            waiting = None if stats.waiting is None else stats.waiting + (self._orm.runtime.queued or 0)
            if waiting is None or waiting > 0:
                told = "" if waiting is None else f", and {waiting} wait"
                return Database("degraded", seconds, f"All {stats.max_connections} connections are in use{told}.")
        return Database("ok", seconds)

    # -- the last minutes -----------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Follow what happens in the pools; those of a proxy or of a late configuration are found later."""
        for alias, database in self._orm.databases.items():
            pool = getattr(database, "pool", None)
            if pool is None or id(pool) in self._listening:
                continue
            self._listening.add(id(pool))
            note = weakref.WeakMethod(self._note)  # a pool may outlive the application: in tests many of them
            for kind in ("connect_error", "timeout", "invalidate", "leak", "reconnect_failed"):
                pool.events.on(kind, functools.partial(_pass_on, note, alias, kind))

    def _note(self, alias: str, kind: str, **details: Any) -> None:
        if kind == "leak":
            label = self._label_of(alias, details["connection"])
            by = f", by {label}" if label else ""
            text = f"A connection has been in use for {details['seconds']:.1f} s{by}."
        elif "error" in details:
            text = self._redacted(alias, details["error"])
        else:
            text = str(details.get("reason", ""))
        self._events.append({"at": round(time.time(), 3), "pool": alias, "kind": kind, "text": text})

    def _label_of(self, alias: str, conn: Any) -> str | None:
        engine = self._orm[alias].pool._engine
        entry = None if engine is None else engine.held.get(id(conn))
        label: str | None = None if entry is None or entry.suspect is None else entry.suspect.label
        return label

    def _redacted(self, alias: str, error: BaseException) -> str:
        return redact(one_line(error), [self._orm[alias]])

    def document(self, readiness: Readiness, since: float | None = None) -> dict[str, Any]:
        """Return the status document.

        Args:
            readiness: what was just found.
            since: with the points of the plots after this moment; None leaves them out.
        """
        self._series.take()
        stats = self._stats()
        found = {
            "worker": os.getpid(),
            "at": round(time.time(), 3),
            "ready": readiness.as_dict(),
            "queued": self._orm.runtime.queued,
            "pools": {alias: each.as_dict() for alias, each in stats.items()},
            "holders": [holder.as_dict() for holder in self._orm.holders()[:HOLDERS_TOLD]] if stats else [],
            "events": list(self._events)[::-1],
        }
        if since is not None:
            found["latest"] = self._series.latest
            found["fields"] = Point._fields
            found["points"] = self._series.since(since)
        return found

    # -- answers --------------------------------------------------------------------------------------------------------

    def answer(self, name: str, query: Mapping[str, str]) -> Answer:
        """Answer one of the `NAMES`, but for ``events``. Blocks for `timeout` at most; `answer_async` does not.

        Args:
            name: the endpoint; who may ask is the caller's business, see `wants_guard`.
            query: the parameters in the URL.
        """
        return self._answer(name, query, self.readiness() if name in _ASKING else None)

    async def answer_async(self, name: str, query: Mapping[str, str]) -> Answer:
        """Do what `answer` does without blocking the event loop."""
        return self._answer(name, query, await self.readiness_async() if name in _ASKING else None)

    def _answer(self, name: str, query: Mapping[str, str], readiness: Readiness | None) -> Answer:
        if readiness is None:
            if name == "live":
                return _json(200, {"status": "ok"})
            return self._metrics() if name == "metrics" else _page_answer()
        if name == "status":
            since = query.get("since")
            return _json(200, self.document(readiness, None if since is None else _seen(since)))
        shown = readiness.as_dict() if _VERBOSE in query else {"status": readiness.status}
        return _json(503 if readiness.status == "unavailable" else 200, shown)

    def _metrics(self) -> Answer:
        from peewee_frameworks.metrics import render  # noqa: PLC0415 - for those who scrape

        try:
            body, content_type = render(self._orm)
        except ConfigurationError as error:  # there is no prometheus_client
            return _json(404, {"detail": str(error)})
        return Answer(200, body, content_type)

    def refused(self, *, guarded: bool) -> Answer:
        """Answer those who may not see more: 403 by the guard, 404 where there is none."""
        if guarded:
            return _json(403, {"detail": "The guard of the health endpoints refused this request."})
        return _json(404, {"detail": _NO_GUARD})

    # -- server-sent events -----------------------------------------------------------------------------------------------

    def events(self, last: str | None) -> Iterator[bytes]:
        """Send the status document once a second, until the server stops.

        Args:
            last: the header ``Last-Event-ID``: the points up to there are known.
        """
        stream = _Stream(last, self.ending)
        while True:
            yield stream.message(self.document(self.readiness(), stream.since))
            while not stream.is_due():
                if stream.is_over():
                    return
                time.sleep(_TICK)

    async def events_async(self, last: str | None) -> AsyncIterator[bytes]:
        """Do what `events` does on an event loop."""
        stream = _Stream(last, self.ending)
        while True:
            yield stream.message(self.document(await self.readiness_async(), stream.since))
            while not stream.is_due():
                if stream.is_over():
                    return
                await asyncio.sleep(_TICK)

    def ending(self) -> bool | None:
        """Return whether the application or its server stops; None if that cannot be known."""
        if self._orm.runtime.ending or self.ended:
            return True
        return is_stopping() if self.ended is None else False


def _pass_on(note: weakref.WeakMethod[Callable[..., None]], alias: str, kind: str, **details: Any) -> None:
    listener = note()
    if listener is not None:
        listener(alias, kind, **details)


class _Stream:
    """One watcher: what it has seen, and when it gets more."""

    def __init__(self, last: str | None, ending: Callable[[], bool | None]) -> None:
        self.since = _seen(last or "")
        self._ending = ending
        self._began = self._due = time.monotonic()

    def message(self, document: dict[str, Any]) -> bytes:
        self.since = document["latest"]
        self._due = max(self._due + INTERVAL, time.monotonic() + INTERVAL / 2)
        return f"id: {document['worker']}:{self.since}\nretry: 1000\ndata: {json.dumps(document)}\n\n".encode()

    def is_due(self) -> bool:
        return time.monotonic() >= self._due

    def is_over(self) -> bool:
        ending = self._ending()
        return ending or (ending is None and time.monotonic() - self._began > BLIND_SECONDS)


def _page_answer() -> Answer:
    """Answer the page, which loads nothing from elsewhere, and may not."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        **_NO_STORE,
    }
    return Answer(200, _page().replace("{{nonce}}", nonce).encode(), "text/html; charset=utf-8", headers)


@functools.cache
def _page() -> str:
    return Path(__file__).with_name("status.html").read_text(encoding="utf-8")


def _json(status: int, document: dict[str, Any]) -> Answer:
    return Answer(status, json.dumps(document).encode())


def _seen(text: str) -> float:
    """Return up to when somebody knows the points of this process: one of the parts, each ``worker:time``."""
    for part in text.split(","):
        worker, _, at = part.partition(":")
        if worker == str(os.getpid()):
            try:
                return float(at)
            except ValueError:
                break
    return 0.0
