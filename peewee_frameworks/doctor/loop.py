"""Queries that stop an event loop: those which a sync driver makes in a coroutine function, found by reading the source.

Only what can be nothing else is reported: a method that queries at once, called on a model (or a query of one, or a database)
whose database has a sync network driver, in the body of an endpoint that runs on the loop. A call that is only named, as in
``orm.run(User.get_by_id, 1)`` or in a lambda, is not one.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peewee

from .case import is_async
from .frameworks import endpoints
from .report import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .case import Case

_OF_MODEL = frozenset(
    {
        "bulk_create",
        "bulk_update",
        "create",
        "delete_by_id",
        "get",
        "get_by_id",
        "get_or_create",
        "get_or_none",
        "set_by_id",
        "table_exists",
    }
)
_OF_QUERY = frozenset({"count", "execute", "exists", "first", "get", "get_or_none", "iterator", "scalar", "scalars"})
_OF_DATABASE = frozenset({"begin", "commit", "connect", "create_tables", "execute_sql", "rollback"})
_MAKES_QUERY = frozenset({"delete", "insert", "insert_many", "raw", "replace", "select", "update"})
_READERS = frozenset({"dict", "len", "list", "set", "sorted", "tuple"})
_SHOWN = 3


def findings(case: Case) -> Iterator[Finding]:
    """Find the queries of an application's endpoints that run on its event loop."""
    if case.kind == "sqlite" or is_async(case.database):
        return
    places = [
        place for each in endpoints(case.target) if each.on_loop for place in _queries(each.function, case.database)
    ]
    if not places:
        return
    shown = "; ".join(places[:_SHOWN]) + (f"; and {len(places) - _SHOWN} more" if len(places) > _SHOWN else "")
    yield Finding(
        "query-on-loop",
        "warning",
        f"A sync driver ({case.driver}) queries on the event loop: {shown}.",
        "While the server works on such a query, the worker's loop stands still, and with it all its other requests.",
        "await orm.run(function, …) around the unit of work"
        + (", or def endpoints, which run on threads" if case.target.framework != "Sanic" else "")
        + "; or the asynchronous idiom (await Model.aget(…), await query.aexecute())",
    )


def _queries(function: Any, database: Any) -> Iterator[str]:
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        names = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    except (OSError, TypeError, AttributeError, SyntaxError, ValueError):
        return  # no source, or no function
    file = _short(inspect.getsourcefile(function) or "?")
    reader = _Reader(names, database)
    reader.read(tree.body[0])
    for line, text in reader.found:
        yield f"{text} in {function.__name__} ({file}:{first + line - 1})"


def _short(path: str) -> str:
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


class _Reader(ast.NodeVisitor):
    """Reads the body of one function; what a nested function or a lambda does is not done here."""

    def __init__(self, names: dict[str, Any], database: Any) -> None:
        self._names = names
        self._database = database
        self.found: list[tuple[int, str]] = []

    def read(self, function: Any) -> None:
        for statement in getattr(function, "body", ()):
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Pass over."""

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        """Pass over."""

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """Pass over."""

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Attribute):
            at_once = self._queries_at_once(function)
        else:
            reads = isinstance(function, ast.Name) and function.id in _READERS and bool(node.args)
            at_once = reads and self._is_query(node.args[0])
        if at_once:
            self._note(node)
        else:
            self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        if self._is_query(node.iter):
            self._note(node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        if not node.is_async and self._is_query(node.iter):
            self._note(node.iter)
        self.generic_visit(node)

    def _note(self, node: ast.expr) -> None:
        text = ast.unparse(node)
        self.found.append((node.lineno, text if len(text) <= 60 else f"{text[:59]}…"))  # noqa: PLR2004

    def _queries_at_once(self, function: ast.Attribute) -> bool:
        owner = self._value(function.value)
        if isinstance(owner, type) and issubclass(owner, peewee.Model):
            return function.attr in _OF_MODEL and self._is_ours(owner._meta.database)
        if isinstance(owner, (peewee.Database, peewee.Proxy)):
            return function.attr in _OF_DATABASE and self._is_ours(owner)
        return function.attr in _OF_QUERY and self._is_query(function.value)

    def _is_query(self, node: ast.expr) -> bool:
        """Return whether an expression is a query that has yet to run: ``Model.select().where(…)``."""
        while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = self._value(node.func.value)
            if isinstance(owner, type) and issubclass(owner, peewee.Model):
                return node.func.attr in _MAKES_QUERY and self._is_ours(owner._meta.database)
            node = node.func.value
        return False

    def _is_ours(self, database: Any) -> bool:
        while isinstance(database, peewee.Proxy):
            database = database.obj
        return database is self._database

    def _value(self, node: ast.expr) -> Any:
        """Return what a dotted name stands for in the function's module, or None."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._value(node.value)
            return None if owner is None else inspect.getattr_static(owner, node.attr, None)
        return None
