"""What the user names: a URL, or ``module:name`` of a database, a mapping, a `Peewee`, an application or a factory."""

from __future__ import annotations

import difflib
import inspect
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import peewee

from peewee_frameworks.config import open_databases, safe_url
from peewee_frameworks.errors import ConfigurationError, GeventNotPatched
from peewee_frameworks.redact import redact, user_traceback
from peewee_frameworks.runtime import Runtime
from peewee_frameworks.state import unwrap

from .boot import NoSuchName, Refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SHAPE = (
    "module:name, where name is a Peewee database, a mapping of them, a Peewee(...), an application in which one is "
    "installed, or a function that makes one of these: module:create_app(). Or a database URL"
)


class TargetError(Exception):
    """The target cannot be had; `detail` is the traceback of the user's code, if it was that which failed."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class SetupRefused(TargetError):
    """This package refuses what the user's code does at import: that is a finding, not a failure of the command."""

    def __init__(self, error: BaseException, detail: str) -> None:
        super().__init__(redact(str(error)), detail)
        self.error = error


@dataclass(frozen=True)
class Target:
    """What was found: an application if there is one, its databases by alias, and which `Peewee` serves each."""

    name: str
    databases: dict[str, Any]
    runtimes: dict[str, Runtime] = field(default_factory=dict)
    app: Any = None
    framework: str | None = None


def check_name(text: str) -> str:
    """Return a target as it may be shown.

    Raises: `TargetError` for what is neither a URL nor ``module:name``.
    """
    if "://" in text:
        return safe_url(text)
    if not is_name(text):
        # What is written with colons and the like may be a URL gone wrong, with a password in it.
        shown = repr(text) if text.replace(".", "").isidentifier() else "This"
        raise TargetError(f"{shown} is no target: it takes {_SHAPE}.")
    return text


def is_name(text: str) -> bool:
    """Return whether a text has the shape of ``module:name``."""
    module, separator, name = text.partition(":")
    parts = [*module.split("."), *name.removesuffix("()").split(".")]
    return bool(separator) and all(part.isidentifier() for part in parts)


def load(text: str, loaded: Any, failure: BaseException | None) -> Target:
    """Make of the command line's word, and of what `boot` has loaded for it, a target.

    Raises: `TargetError`.
    """
    name = check_name(text)
    if failure is not None:
        raise _failed(name, failure)
    return describe(name, text if "://" in text else loaded)


def describe(name: str, value: Any) -> Target:
    """Make a target of an object.

    Raises: `TargetError` for one in which there are no databases.
    """
    try:
        return _describe(name, value)
    except ConfigurationError as error:
        raise TargetError(f"{name}: {redact(str(error))}") from None


def _failed(name: str, error: BaseException) -> TargetError:
    if isinstance(error, Refused):
        return TargetError(redact(str(error)))
    if isinstance(error, NoSuchName):
        module, _, missing = error.args
        return TargetError(f"{name}: the module {module.__name__} has no {missing!r}. {_candidates(module, missing)}")
    if isinstance(error, (ConfigurationError, GeventNotPatched)):
        return SetupRefused(error, user_traceback(error))
    module_name = name.partition(":")[0]
    if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
        return TargetError(
            f"{name}: there is no module {error.name!r} here. It is looked for from the current directory, as the "
            "server does: change to the project's directory, or set PYTHONPATH."
        )
    what = "was called" if name.endswith("()") else "was imported"
    return TargetError(f"{name}: the module failed when it {what}. This is what it said:", user_traceback(error))


def _candidates(module: Any, missing: str) -> str:
    fitting = [key for key, value in vars(module).items() if not key.startswith("_") and _fits(value)]
    close = difflib.get_close_matches(missing, [key for key in vars(module) if not key.startswith("__")], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return (f"What fits there: {', '.join(fitting)}." if fitting else "Nothing there fits.") + hint


def _fits(value: Any) -> bool:
    if isinstance(value, type):
        return False
    try:
        if isinstance(value, str):  # any text could be meant as a URL
            return False
        _describe("", value)
    except Exception:  # noqa: BLE001 - a module holds anything: Flask's `request` raises when it is only looked at
        return False
    return True


def _describe(name: str, value: Any) -> Target:
    if isinstance(value, (str, peewee.Database, peewee.Proxy, Mapping)):
        return Target(name, _ready(open_databases(value)))
    framework = _framework(value)
    runtimes = list(_runtimes(value, framework))
    if runtimes:
        databases, serving = _of_runtimes(runtimes)
        app = value if framework else None
        return Target(name, databases, serving, app, framework or _ADAPTERS.get(type(value).__module__))
    if framework:
        raise TargetError(
            f"{name} is a {framework} application in which no Peewee is installed. Did you forget to call "
            "orm.init_app(app)? To look at the database alone, name it: module:db."
        )
    if isinstance(value, types.FunctionType):
        raise TargetError(f"{name} is a function. To call it write the parentheses: '{name}()', quoted for the shell.")
    raise TargetError(f"{name} is a {type(value).__name__}; it takes {_SHAPE}.")


def _ready(databases: Mapping[str, Any]) -> dict[str, Any]:
    found = {alias: unwrap(database) for alias, database in databases.items()}
    for alias, database in found.items():
        if database.deferred:
            raise ConfigurationError(
                f"the database {alias!r} is deferred: nothing has called `db.init(...)`. Name what does: the "
                "application, or the function that makes it."
            )
    return found


def _of_runtimes(runtimes: Iterable[Runtime]) -> tuple[dict[str, Any], dict[str, Runtime]]:
    databases: dict[str, Any] = {}
    serving: dict[str, Runtime] = {}
    for runtime in runtimes:
        if not runtime.configured:
            runtime.configure()  # Starlette's lifespan would do it at start
        for alias, database in _ready(runtime.databases).items():
            unique, number = alias, 2
            while unique in databases:  # each `Peewee` of an application may have its own "default"
                unique, number = f"{alias} ({number})", number + 1
            databases[unique], serving[unique] = database, runtime
    return databases, serving


# -- applications -------------------------------------------------------------------------------------------------------

_FRAMEWORKS = (("Flask", "flask.app"), ("Sanic", "sanic.app"), ("FastAPI", "fastapi.applications"))
_STARLETTE = ("Starlette", "starlette.applications")
_ADAPTERS = {f"peewee_frameworks.{name.lower()}": name for name in ("Flask", "Sanic", "FastAPI", "Starlette")}


def _framework(value: Any) -> str | None:
    """Name the framework of an application; a framework that is not imported has none here."""
    for name, module in (*_FRAMEWORKS, _STARLETTE):
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None and isinstance(value, cls):
            return name
    for name in ("asgi", "wsgi"):
        cls = getattr(sys.modules.get(f"peewee_frameworks.{name}"), "PeeweeMiddleware", None)
        if cls is not None and isinstance(value, cls):
            return name.upper()
    return None


def _runtimes(value: Any, framework: str | None) -> Iterator[Runtime]:
    """Find the runtimes of the `Peewee` instances in an application, or of one instance."""
    if framework in ("Flask", "Sanic"):
        found = value.extensions.get("peewee", ()) if framework == "Flask" else getattr(value.ctx, "peewee", ())
        yield from (orm.runtime for orm in found)
    elif framework in ("FastAPI", "Starlette"):
        yield from (orm.runtime for orm in starlette_instances(value))
    elif isinstance(runtime := getattr(value, "runtime", None), Runtime):
        yield runtime


def starlette_instances(app: Any) -> list[Any]:
    """Return the `Peewee` instances of a Starlette application, those which its lifespan will install included."""
    found = list(getattr(app.state, "peewee_instances", ()))
    found += [orm for orm in (middleware_instance(each) for each in app.user_middleware) if orm is not None]
    found += lifespan_instances(app)
    return list(dict.fromkeys(found))


def middleware_instance(middleware: Any) -> Any:
    """Return the `Peewee` whose ``orm.middleware()`` this is, or None."""
    return _peewee(getattr(middleware.cls, "__self__", None))


def lifespan_instances(app: Any) -> list[Any]:
    """Return the `Peewee` instances whose ``orm.lifespan()`` an application has."""
    return _in_closure(app.router.lifespan_context)


def _in_closure(function: Any, depth: int = 4) -> list[Any]:
    # FastAPI wraps lifespans in functions of its own, and ``orm.lifespan(mine)`` wraps the user's.
    found = []
    cells = getattr(inspect.unwrap(function), "__closure__", None) or ()
    for cell in cells:
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if _peewee(value) is not None:
            found.append(value)
        elif depth and callable(value):
            found += _in_closure(value, depth - 1)
    return found


def _peewee(value: Any) -> Any:
    return value if isinstance(getattr(value, "runtime", None), Runtime) else None
