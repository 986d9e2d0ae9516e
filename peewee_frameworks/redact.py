"""Take passwords out of text that others wrote: tracebacks, drivers' errors.

What this package writes itself never holds one.
"""

from __future__ import annotations

import importlib
import os
import re
import traceback
from typing import TYPE_CHECKING, Any

import peewee

if TYPE_CHECKING:
    from collections.abc import Iterable

_PACKAGE = os.path.join(os.path.dirname(os.path.realpath(__file__)), "")  # noqa: PTH118, PTH120 - it costs no import
_IN_URL = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://[^\s:@/'\"]*:)[^\s'\"]*(@)")
_BY_NAME = re.compile(
    r"((?:pass(?:word|wd)?|pwd|passphrase|secret|token)\w*[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|(?!(?:YES|NO)\b)[^\s,;&)\]}]+)",
    re.IGNORECASE,
)
_PARAMETERS = ("password", "passwd", "sslpassword", "ssl_key_password")
_VARIABLES = ("PGPASSWORD", "MYSQL_PWD")
_URL_VARIABLES = ("DATABASE_URL", "PEEWEE_DATABASE")
_SHORTEST = 3  # to blank out each "a" of a message would tell more than it hides


def redact(text: str, databases: Iterable[Any] = ()) -> str:
    """Return the text without the passwords of these databases and of the environment, and what looks like one."""
    known = _known(databases)
    for found in _IN_URL.finditer(text):  # a traceback may have it once more, by itself
        secret = found[0][len(found[1]) : -1]
        known.update(each for each in _spellings(secret) if len(each) >= _SHORTEST)
    text = _BY_NAME.sub(r"\1…", _IN_URL.sub(r"\1…\2", text))
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, "…")
    return text


def _known(databases: Iterable[Any]) -> set[str]:
    found = [os.environ.get(name) for name in _VARIABLES]
    found += [_password_of(os.environ.get(name, "")) for name in _URL_VARIABLES]
    for database in databases:
        params = getattr(database, "connect_params", {})
        found += [dict.get(params, name) for name in _PARAMETERS]
        found += [_password_of(text) for text in (database.database, params.get("dsn"), params.get("conninfo"))]
        found.append(_password_of(f"//{params.get('host')}"))  # a login that was meant for a URL
    spellings = {spelled for secret in found if isinstance(secret, str) for spelled in _spellings(secret)}
    return {secret for secret in spellings if len(secret) >= _SHORTEST}


def _spellings(secret: str) -> tuple[str, ...]:
    from urllib.parse import quote, unquote  # noqa: PLC0415 - there is a secret, so something has failed

    plain = unquote(secret)
    return secret, plain, quote(plain), quote(plain, safe="")


def _password_of(text: Any) -> str | None:
    """Return the password in a URL, or in libpq's keywords and values."""
    from urllib.parse import urlsplit  # noqa: PLC0415 - as above

    text = str(text or "")
    try:
        password: str | None = urlsplit(text).password
        if password:
            return password
    except ValueError:
        pass  # no URL
    match = re.search(r"\bpassword\s*=\s*('(?:[^'\\]|\\.)*'|\S+)", text)
    return match[1].strip("'") if match else None


def user_traceback(error: BaseException) -> str:
    """Return the traceback of an error in the user's code, without passwords and frames of ours and of importlib."""
    told = traceback.TracebackException.from_exception(error)
    shown: Any = told
    while shown is not None:
        kept = [frame for frame in shown.stack if not _is_ours(frame.filename)]
        shown.stack = traceback.StackSummary.from_list(kept)
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
    return redact("".join(told.format()))


def _is_ours(filename: str) -> bool:
    return filename.startswith((_PACKAGE, "<frozen ", importlib.__path__[0]))


def one_line(error: BaseException) -> str:
    """Return an error of a driver as one line, its class first; Peewee wraps the driver's in one of the same name."""
    inner = error.__cause__ if isinstance(error, peewee.PeeweeException) and error.__cause__ is not None else error
    text = " ".join(str(inner).split()) or "no message"
    return f"{type(inner).__name__}: {text}"
