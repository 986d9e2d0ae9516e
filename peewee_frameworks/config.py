"""Options: keywords, a framework's config mapping, the environment, URLs. Validated here, once, at start.

Secrets never appear in a message or a repr: a URL is shown without its user, password and query.
"""

from __future__ import annotations

import fnmatch
import inspect
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict
from urllib.parse import SplitResult, unquote, urlsplit

import peewee

from .errors import ConfigurationError
from .names import no_database
from .spelling import DISTANTLY, nearly

logger = logging.getLogger("peewee_frameworks.app")

PREFIX = "PEEWEE_"
DEFAULT_ALIAS = "default"

Databases = peewee.Database | peewee.Proxy | str | Mapping[str, Any]
Predicate = Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `Peewee` in every framework.

    Attributes:
        connect: ``"lazy"`` takes a connection at the first query, ``"eager"`` before the handler runs. None is lazy, or
            eager where a database has ``autoconnect=False``.
        transaction: True runs every request in a transaction, a callable decides per request. Committed before the first
            byte of the response, so that a COMMIT that fails becomes an error response.
        rollback_on: the response statuses on which an atomic request is rolled back, as numbers or a predicate. 400 to 599
            by default, because an exception that a handler turned into a response arrives here as its status.
        exclude: requests that are neither connected eagerly nor atomic: patterns (`fnmatch`) for the path, endpoint,
            route or blueprint name, or predicates of the request. A query in one still works.
        release: ``"response_start"`` gives the connection back at the first byte of the response unless a transaction or a
            result is open, and takes one again if a stream queries; ``"request_end"`` keeps it to the end.
        errors: answer exhausted pools, unreachable databases, deadlocks and locks that did not come with 503, `DoesNotExist`
            with 404 and `IntegrityError` with 409.
        check: at start, ``"fail"`` raises if a database cannot be reached, ``"warn"`` logs it and starts, ``"off"`` does
            not try.
        create_tables: models whose tables are created at start, if missing.
        run_threads: threads of `orm.run`; by default the size of the largest pool, or 32.
        run_timeout: seconds a unit of work waits to be admitted to `orm.run`; by default the pool's timeout, or 30.
        close_timeout: seconds to wait at the end for requests in flight.
        leak_threshold: seconds in use after which a connection is reported in the log, with the request and where it is; None
            is never. A pool's own ``leak_threshold`` goes first.
        leak_stacks: record where each connection is taken from the start, not only once there was a suspect; a few
            microseconds each time.
        server_timing: tell in each response, in a ``Server-Timing`` header, how long the request has queried and has waited
            for connections so far. Browsers show it in their network view; it tells strangers too.
        query_budget: queries that one request may send; one that sends more is reported in the log, with the statements that
            it repeats. None is any number.
    """

    # Checked at run time, because they also come from configuration: hence Any where a type would hide a check.
    connect: str | None = None
    transaction: bool | Predicate = False
    rollback_on: Collection[int] | Callable[[int], bool] = field(default=range(400, 600))
    exclude: Any = ()
    release: str = "response_start"
    errors: bool = False
    check: str = "fail"
    create_tables: Any = ()
    run_threads: int | None = None
    run_timeout: float | None = None
    close_timeout: float = 10.0
    leak_threshold: float | None = None
    leak_stacks: bool = False
    server_timing: bool = False
    query_budget: int | None = None

    def __post_init__(self) -> None:
        """Validate.

        Raises: `ConfigurationError` naming the option, what was given and what is possible.
        """
        _one_of("connect", self.connect, (None, "lazy", "eager"))
        _one_of("release", self.release, ("response_start", "request_end"))
        _one_of("check", self.check, ("fail", "warn", "off"))
        _one_of("errors", self.errors, (True, False))
        if not isinstance(self.transaction, bool) and not callable(self.transaction):
            raise ConfigurationError(
                f"transaction={self.transaction!r}: give True, False or a function of the request."
            )
        if isinstance(self.exclude, str) or not isinstance(self.exclude, Iterable):
            raise ConfigurationError(f"exclude={self.exclude!r}: give a list of patterns and functions.")
        for entry in self.exclude:
            if not isinstance(entry, str) and not callable(entry):
                raise ConfigurationError(f"exclude holds {entry!r}, which is neither a pattern nor a function.")
        statuses: Any = self.rollback_on
        if not callable(statuses) and (isinstance(statuses, str) or not isinstance(statuses, Collection)):
            raise ConfigurationError(
                f"rollback_on={self.rollback_on!r}: give statuses, as range(400, 600), or a function."
            )
        if isinstance(self.create_tables, type) or not isinstance(self.create_tables, Iterable):
            raise ConfigurationError(f"create_tables={self.create_tables!r}: give a list of models.")
        for model in self.create_tables:
            if not (isinstance(model, type) and issubclass(model, peewee.Model)):
                raise ConfigurationError(f"create_tables holds {model!r}, which is not a Peewee model.")
        _refuse_async("transaction", self.transaction)
        _refuse_async("rollback_on", self.rollback_on)
        for entry in self.exclude:
            _refuse_async("exclude", entry)
        _positive("run_threads", self.run_threads)
        _positive("run_timeout", self.run_timeout)
        _positive("close_timeout", self.close_timeout)
        _positive("leak_threshold", self.leak_threshold)
        _one_of("leak_stacks", self.leak_stacks, (True, False))
        _one_of("server_timing", self.server_timing, (True, False))
        _positive("query_budget", self.query_budget)

    def rolls_back(self, status: int) -> bool:
        """Return whether a response of this status rolls an atomic request back."""
        return self.rollback_on(status) if callable(self.rollback_on) else status in self.rollback_on

    def excludes(self, request: Any, names: Iterable[str]) -> bool:
        """Return whether the request is excluded, by one of its names (path, endpoint, blueprint) or by a predicate."""
        return any(
            entry(request) if callable(entry) else any(fnmatch.fnmatchcase(name, entry) for name in names)
            for entry in self.exclude
        )

    def is_atomic(self, request: Any) -> bool:
        """Return whether the request runs in a transaction."""
        return bool(self.transaction(request)) if callable(self.transaction) else self.transaction


class PolicyKeywords(TypedDict, total=False):
    """Those that may differ between the parts of an application; None means "not given"."""

    connect: Literal["lazy", "eager"] | None
    transaction: bool | Predicate | None
    rollback_on: Collection[int] | Callable[[int], bool] | None
    exclude: Iterable[str | Predicate] | None
    release: Literal["response_start", "request_end"] | None


class OptionKeywords(PolicyKeywords, total=False):
    """All of them, as keywords of `Peewee(...)`."""

    errors: bool | None
    check: Literal["fail", "warn", "off"] | None
    create_tables: Iterable[type[peewee.Model]] | None
    run_threads: int | None
    run_timeout: float | None
    close_timeout: float | None
    leak_threshold: float | None
    leak_stacks: bool | None
    server_timing: bool | None
    query_budget: int | None


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_NAMES = tuple(option.name for option in fields(Options))
_KEYS = {PREFIX + "DATABASE": "database", **{PREFIX + name.upper(): name for name in _NAMES}}
# What a string from the environment becomes.
_NUMBERS = {
    "run_threads": int,
    "query_budget": int,
    "run_timeout": float,
    "close_timeout": float,
    "leak_threshold": float,
}
_SWITCHES = ("transaction", "errors", "leak_stacks", "server_timing")
_LISTS = ("exclude",)
# What others call the database's URL.
_DATABASE_ELSEWHERE = tuple(PREFIX + name for name in ("URL", "URI", "DB", "DATABASE_URL", "DATABASE_URI", "DB_URL"))


def resolve(
    keywords: Mapping[str, Any], mapping: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
) -> tuple[Databases, Options]:
    """Bring the sources together: keywords of `Peewee(...)`, then the framework's config, then the environment.

    Args:
        keywords: options as given to `Peewee`, ``database`` among them; None means "not given".
        mapping: a framework's config, whose keys that begin with ``PEEWEE_`` are ours.
        environment: where ``PEEWEE_DATABASE`` and then ``DATABASE_URL`` are looked up last; `os.environ` if None.

    Raises: `ConfigurationError` for an unknown key, for a database given twice, for none at all.
    """
    environment = os.environ if environment is None else environment
    configured = _read(mapping or {})
    given = {name: value for name, value in keywords.items() if value is not None}
    for name in given:
        if name != "database" and name not in _NAMES:
            raise ConfigurationError(f"Unknown option {name}.{_of_pool(name) or _suggest(name, _NAMES)}")
    if "database" in given and "database" in configured:
        raise ConfigurationError(
            f"The database is given twice: to Peewee(...) and as {PREFIX}DATABASE. Remove one of the two."
        )
    merged = {**configured, **given}
    database = merged.pop("database", None)
    if database is None:
        database = _from_environment(environment)
    return database, Options(**merged)


def _from_environment(environment: Mapping[str, str]) -> str:
    variables = [PREFIX + "DATABASE", "DATABASE_URL"]
    for variable in variables:
        if url := environment.get(variable):
            if "://" not in url:
                raise ConfigurationError(
                    f"{variable} in the environment is no database URL, such as mysql+pool://user@host/name."
                )
            try:
                split_url(url)
            except ConfigurationError as error:
                raise ConfigurationError(f"{variable} in the environment: {error}") from None
            return url
    empty = " and ".join(variable for variable in variables if variable in environment)
    raise ConfigurationError(
        f"No database. Pass one to Peewee(...), or set {PREFIX}DATABASE in the application's config, or {PREFIX}DATABASE "
        f"or DATABASE_URL in the environment{f', where {empty} is empty now' if empty else ''}."
    )


def _read(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return option name → value for the keys of a framework's config that are ours."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        if not key.startswith(PREFIX):
            continue
        if key not in _KEYS:
            told = _of_pool(key.removeprefix(PREFIX).lower()) or _suggest(key, _KEYS)
            raise ConfigurationError(f"Unknown configuration key {key}.{told}")
        found[_KEYS[key]] = _parse(key, _KEYS[key], value)
    return found


def open_databases(given: Databases) -> dict[str, Any]:
    """Return alias → database for a database, a proxy, a URL, or a mapping of aliases to those.

    Raises: `ConfigurationError` for an empty mapping, an alias that is no string, a bad URL.
    """
    if not isinstance(given, Mapping):
        return {DEFAULT_ALIAS: _open(given, DEFAULT_ALIAS)}
    if not given:
        raise ConfigurationError("The mapping of databases is empty. Give at least one: {'default': db}.")
    for alias in given:
        if not isinstance(alias, str):
            raise ConfigurationError(f"The alias {alias!r} is not a string.")
    return {alias: _open(database, alias) for alias, database in given.items()}


def _open(database: Any, alias: str) -> Any:
    if isinstance(database, str):
        return connect_url(database)
    if isinstance(database, (peewee.Database, peewee.Proxy)):
        return database
    raise ConfigurationError(
        f"Database {alias!r}: {no_database(database)} Peewee() takes a URL, too, and a mapping of aliases to databases."
    )


def connect_url(url: str) -> Any:
    """Make a database from a URL such as ``mysql+pool://user:secret@host/shop?max_connections=20``.

    The schemes are those of ``playhouse.db_url``; ``…+pool`` gives a database of `peewee_frameworks.pool` where it has one,
    ``…+async`` an asynchronous one (`peewee_frameworks.aio`).

    Raises: `ConfigurationError` for a URL that is malformed or of an unknown scheme; it never shows the password.
    """
    from playhouse import db_url  # noqa: PLC0415 - it imports every driver extension that is installed

    from .aio import urls as asynchronous  # noqa: PLC0415 - it stands on this module
    from .pool import urls as pooled  # noqa: PLC0415 - it too

    parts = split_url(url)
    scheme = parts.scheme
    ours = pooled.SCHEMES | asynchronous.SCHEMES
    known = db_url.schemes.keys() | ours
    if scheme not in known:
        raise ConfigurationError(
            f"The database URL {safe_url(url)} has the unknown scheme {scheme!r}.{pooled.suggest(scheme)} "
            "It looks like mysql+pool://user@host/name, postgresql+pool://user@host/name or sqlite:///file.db."
        )
    try:
        return pooled.connect(url) if scheme in ours else _connect_as_playhouse(scheme, url)
    except Exception as error:  # noqa: BLE001 - whatever a driver makes of the URL's parameters
        # Peewee's own message quotes the URL, password included: so neither that message nor the chain to it.
        quoted = (url, parts.password, unquote(parts.password or ""))
        reason = type(error).__name__
        if not any(secret and secret in str(error) for secret in quoted):
            if isinstance(error, ConfigurationError):  # it has the remedy
                raise ConfigurationError(f"The database URL {safe_url(url)} does not work: {error}") from None
            reason += f": {error}"
        raise ConfigurationError(
            f"The database URL {safe_url(url)} does not work ({reason}). It needs a database name after the host, "
            "as in mysql+pool://user@host/name; local files take three slashes, as in sqlite:///file.db."
        ) from None


def _connect_as_playhouse(scheme: str, url: str) -> Any:
    from playhouse import db_url  # noqa: PLC0415 - as above

    from .pool.urls import SCHEMES  # noqa: PLC0415 - as above

    arguments: dict[str, Any] = db_url.parse(url, unquote_user=True, unquote_password=True)
    if "passwd" in arguments:  # PyMySQL's name for it from 1.0 on is the other
        arguments["password"] = arguments.pop("passwd")
    if not arguments.get("database"):  # Peewee would make a deferred one, and wait for its `init`
        raise ValueError("it names no database")
    if f"{scheme}+pool" in SCHEMES:
        _note_no_pool(scheme, url, arguments)
    return db_url.schemes[scheme](**arguments)


def _note_no_pool(scheme: str, url: str, arguments: Mapping[str, Any]) -> None:
    """Say of a URL that makes no pool, as the hosts of applications give them, what that means.

    Raises: `ConfigurationError` if it has an option of a pool, which the driver would not know.
    """
    from .pool.options import OPTION_NAMES  # noqa: PLC0415 - it stands on this module

    drivers = {"connect_timeout"} | ({"timeout"} if scheme == "sqlite" else set())
    if options := sorted(arguments.keys() & OPTION_NAMES - drivers):
        raise ConfigurationError(
            f"{', '.join(options)} {'is an option' if len(options) == 1 else 'are options'} of a pool, and {scheme}:// makes "
            f"none. Write {scheme}+pool://."
        )
    if scheme != "sqlite":
        logger.warning(
            "The database URL %s makes no pool, so each unit of work connects anew. Write %s+pool:// for a pool.",
            safe_url(url),
            scheme,
            extra={"database": safe_url(url)},
        )


def split_url(url: str) -> SplitResult:
    """Return the parts of a database URL.

    Raises: `ConfigurationError` for one that is malformed. A password with a ``/`` in it makes a part of it the port, and
        Python's message would quote it: so neither that message nor the chain to it. If that part is a number, the rest
        would be the database's name, which stands in messages and metrics.
    """
    parts: SplitResult | None
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - it is parsed when it is asked for
    except ValueError:
        parts = None
    if parts is not None and parts.netloc and "@" in parts.path:
        parts = None
    if parts is not None and parts.netloc and parts.scheme.partition("+")[0] == "sqlite":
        raise ConfigurationError(
            f"The database URL {safe_url(url)} names a host, and no file: write {safe_url(url).replace('://', ':///')}, with "
            "four slashes if the file's path is absolute."
        )
    scheme, separator, _ = url.partition(":")
    if parts is None or (separator and not url.startswith("://", len(scheme))):
        shown = f"{scheme}://…" if _SCHEME.fullmatch(scheme) else "(not a URL)"
        raise ConfigurationError(
            f"The database URL {shown} is malformed: '://' comes after the scheme, what follows the host's ':' must be a "
            "number, and in user and password all but letters, digits and -._~ must be percent-encoded (/ is %2F, @ is %40)."
        ) from None
    return parts


def safe_url(url: str) -> str:
    """Return a well-formed URL without user, password and query, fit for a message."""
    scheme, separator, rest = url.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        return "(not a URL)"
    address, _, more = rest.partition("?")
    if "@" in more or "#" in rest:  # perhaps the rest of a password
        return f"{scheme}://…"
    address = address.rpartition("@")[2]
    return f"{scheme}://{address}"


def _parse(key: str, name: str, value: Any) -> Any:
    """Turn what comes from the environment, a string, or a number that a framework makes of it, into what the option takes."""
    if not isinstance(value, str):
        return bool(value) if name in _SWITCHES and type(value) is int and value in (0, 1) else value
    if name == "create_tables":
        raise ConfigurationError(
            f"{key}={value!r} names no model class. Give them in Python: Peewee(create_tables=[...])."
        )
    try:
        if name in _NUMBERS:
            return _NUMBERS[name](value)
    except ValueError:
        raise ConfigurationError(f"{key}={value!r} is not a number.") from None
    if name in _SWITCHES:
        switch = {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }
        if value.lower() not in switch:
            raise ConfigurationError(f"{key}={value!r} is neither true nor false.")
        return switch[value.lower()]
    if name in _LISTS:
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _of_pool(name: str) -> str:
    """Return what to do with an option that is the pool's and not ours, or nothing."""
    from .pool.options import ELSEWHERE, OPTION_NAMES  # noqa: PLC0415 - it stands on this module

    name = ELSEWHERE.get(name, name)
    if name not in OPTION_NAMES:
        return ""
    return (
        f" It is an option of the pool: give it to the database, as PooledPostgresqlDatabase(..., {name}=...), or in its URL, "
        f"as postgresql+pool://host/name?{name}=..."
    )


def _suggest(name: str, known: Iterable[str]) -> str:
    meant = PREFIX + "DATABASE" if name in _DATABASE_ELSEWHERE else nearly(name, known, DISTANTLY)
    return f" Did you mean {meant}?" if meant else ""


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is option or (isinstance(option, str) and value == option) for option in allowed):
        shown = ", ".join(repr(option) for option in allowed if option is not None)
        raise ConfigurationError(f"{name}={value!r} is not possible; choose from {shown}.")


def _refuse_async(name: str, function: Any) -> None:
    if inspect.iscoroutinefunction(function):
        raise ConfigurationError(
            f"{name}: {function.__qualname__} is an async function, which would always count as true. Give a plain `def`."
        )


def _positive(name: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
        raise ConfigurationError(f"{name}={value!r} must be a number above 0.")
