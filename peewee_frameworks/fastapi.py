"""Peewee in FastAPI: what Starlette's adapter gives, and dependencies.

::

    orm = Peewee(db)
    app = FastAPI(lifespan=orm.lifespan())
    orm.init_app(app)

    Connection = Annotated[Database, Depends(orm.connection)]
    Atomic = Annotated[Database, Depends(orm.transaction, scope="function")]
"""

from __future__ import annotations

from collections.abc import AsyncIterator  # noqa: TC003 - FastAPI reads the dependencies' annotations
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException
from starlette.requests import HTTPConnection  # noqa: TC002 - as above

from . import starlette
from .asgi import SCOPE_KEY
from .errors import ConfigurationError
from .http import BUSY, CONFLICT, NOT_FOUND
from .scope import complete

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastapi import APIRouter
    from fastapi.params import Depends
    from starlette.applications import Starlette

    from .health.starlette import Guard
    from .scope import Scope

starlette.HTTP_EXCEPTIONS.insert(0, HTTPException)

_DETAIL = {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]}
_SAFE_METHODS = ("get", "head", "options", "trace")


class Peewee(starlette.Peewee):
    """One Peewee connection per request of a FastAPI application, given back exactly once.

    Everything of `peewee_frameworks.starlette.Peewee`, and the dependencies `connection` and `transaction`. An endpoint needs
    neither in order to query; they say in its signature that it does, and a test can override them.
    """

    def init_app(self, app: Starlette) -> None:
        """Install everything: scope, options, error responses (in the OpenAPI schema too), and the lifespan.

        Raises: `ConfigurationError` if this was done before, if the application has started, if no database is known.
        """
        super().init_app(app)
        if self.runtime.options.errors and isinstance(app, FastAPI):
            _document(app, self.responses)

    async def connection(self, connection: HTTPConnection) -> Any:
        """Give the default database; a dependency for endpoints, routers and applications, websockets too.

        It takes no thread and no connection: that is taken at the first query, and given back with the response.

        Raises: `ConfigurationError` if `init_app` was forgotten.
        """
        self._work(connection)
        return self.database

    def connection_to(self, alias: str) -> Callable[[HTTPConnection], Awaitable[Any]]:
        """Return a dependency that gives the database with this alias; the same one for the same alias."""
        if self.runtime.configured:
            self.runtime.get(alias)  # refuse a wrong alias here and not at the first request

        async def connection(connection: HTTPConnection) -> Any:
            self._work(connection)
            return self[alias]

        return self._dependencies.setdefault(alias, connection)

    async def transaction(self, connection: HTTPConnection) -> AsyncIterator[Any]:
        """Run the endpoint in a transaction on each database that it uses, and give the default one; a dependency.

        An exception rolls back, `HTTPException` included. With ``Depends(orm.transaction, scope="function")`` the COMMIT
        comes right after the endpoint has returned, and if it fails the application's exception handlers see it. With FastAPI's
        default scope it comes before the first byte of the response, and rolls back if the status is in ``rollback_on``.
        Where a transaction is open already, this takes part in it. After a deadline or a cancellation the endpoint's thread may
        go on, so on a sync database the transaction stays open to the end of the request, which rolls it back, with all that
        the request has written in it.

        Raises: `ConfigurationError` if `init_app` was forgotten; what a COMMIT raised.
        """
        work = self._work(connection)
        if work.is_atomic(self.runtime):
            yield self.database
            return
        await self.runtime.set_atomic(work)
        try:
            yield self.database
        except BaseException as error:
            await complete(work, error, self.runtime)
            raise
        await complete(work, by=self.runtime)

    def router(
        self, *, guard: Guard | Depends | None = None, probe_timeout: float | None = None, **options: Any
    ) -> APIRouter:
        """Return the health endpoints as a router, for ``app.include_router(orm.router(prefix="/db", guard=...))``.

        They are those of `app`, and not in the OpenAPI schema.

        Args:
            guard: who may see more than ``/live`` and ``/ready``: ``Depends(...)`` on a dependency that raises
                `HTTPException` for the others (or returns False), or a function of the `Request`. None: nobody.
            probe_timeout: seconds within which a database must answer for ``/ready``; 0.5 by default.
            options: as `APIRouter` takes them: ``prefix``, ``tags``, ``dependencies``…

        Raises: `ConfigurationError` for a timeout that is not above 0, or a guard that cannot be called with the request.
        """
        from .health import fastapi as health  # noqa: PLC0415 - for those who mount it

        return health.make_router(self, guard, probe_timeout, options)

    @property
    def responses(self) -> dict[int | str, dict[str, Any]]:
        """What ``errors=True`` may answer, as ``responses=`` takes it; `init_app` documents them by itself."""
        return {
            problem.status: {
                "description": problem.reason,
                "content": {"application/json": {"schema": _DETAIL, "example": {"detail": problem.detail}}},
                **(
                    {"headers": {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}}}
                    if problem.headers
                    else {}
                ),
            }
            for problem in (NOT_FOUND, CONFLICT, BUSY)
        }

    @cached_property
    def _dependencies(self) -> dict[str, Callable[[HTTPConnection], Awaitable[Any]]]:
        return {}  # alias → dependency: FastAPI caches, and tests override, by identity

    def _work(self, connection: HTTPConnection) -> Scope:
        work = self.runtime.find(connection.scope.get(SCOPE_KEY))
        if work is None:
            raise ConfigurationError(
                "A dependency of this Peewee was used in an application in which it is not installed. Did you forget to call "
                "orm.init_app(app)?"
            )
        return work


def _document(app: FastAPI, responses: dict[int | str, dict[str, Any]]) -> None:
    """Add the error responses to each operation that does not describe its own."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        schema: dict[str, Any] = make()
        for operations in schema.get("paths", {}).values():
            for method, operation in operations.items():
                for status, response in responses.items():
                    if isinstance(operation, dict) and (status != CONFLICT.status or method not in _SAFE_METHODS):
                        operation.setdefault("responses", {}).setdefault(str(status), response)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
