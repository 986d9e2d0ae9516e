"""What each framework's `Peewee` has in common: databases, options, scopes. The hooks are the adapters' own.

A class all the same, where the house prefers none: four copies of twelve options and their documentation would drift apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .config import PREFIX
from .errors import ConfigurationError
from .runtime import Runtime
from .scope import connection_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Unpack

    from .config import Databases, OptionKeywords
    from .holders import Holder
    from .pool.stats import PoolStats

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


class Extension:
    """The databases of an application, and a connection of each for every request.

    One instance may serve several applications; one application may have several instances, one per database or group of
    databases.
    """

    def __init__(self, database: Databases | None = None, **options: Unpack[OptionKeywords]) -> None:
        """Take the databases and options; nothing connects yet.

        Args:
            database: a Peewee database, a `DatabaseProxy`, a URL, or a mapping of aliases to those. None reads
                ``PEEWEE_DATABASE`` from the framework's config, then ``PEEWEE_DATABASE`` or ``DATABASE_URL`` from the
                environment, when the application is set up or starts.
            options: see `peewee_frameworks.config.Options`; None means what the framework's config says, or the default.

        Raises: `ConfigurationError` for options that cannot work.
        """
        self.runtime = Runtime(database, **options)
        self._settings: dict[str, Any] | None = None

    @property
    def database(self) -> Any:
        """The default database; a proxy for it as long as the configuration has not been read."""
        return self.runtime.database

    @property
    def databases(self) -> dict[str, Any]:
        """Alias → database."""
        return self.runtime.databases

    def __getitem__(self, alias: str) -> Any:
        """Return the database with this alias; `ConfigurationError` if there is none."""
        return self.runtime.get(alias)

    @property
    def Model(self) -> Any:  # noqa: N802 - it is a class
        """The base class for models bound to the default database."""
        return self.database.Model

    def holders(self) -> list[Holder]:
        """Return who holds a connection of these databases now, the longest first; costs nothing until it is called.

        In this process only: each worker has its own.

        Raises: `ConfigurationError` before the databases are known.
        """
        from .holders import holders  # noqa: PLC0415 - it imports our pool, which not every application uses

        return holders(self.runtime)

    def scope(self, label: str | None = None) -> connection_scope:
        """Return a `connection_scope` over all databases, for work outside requests or with connections of its own."""
        return connection_scope(*(self.databases.values() or [self.database]), label=label)

    def stats(self) -> dict[str, PoolStats]:
        """Return the moment of each database's pool, by alias; see `peewee_frameworks.stats`.

        Raises: `ConfigurationError` while the databases are not known.
        """
        from .stats import stats_of  # noqa: PLC0415 - which imports the pool, for those who ask

        return stats_of(self.runtime)

    def _check_kind(self, app: Any, kind: type[Any]) -> None:
        """Raise `ConfigurationError` for an application of another framework."""
        if not isinstance(app, kind):
            raise ConfigurationError(
                f"init_app({type(app).__name__}): {type(self).__module__}.Peewee serves {kind.__name__} applications. "
                "Import the Peewee of your framework, and give its init_app the application itself."
            )

    def _read_config(self, app: Any, config: Mapping[str, Any]) -> None:
        """Configure from an application's ``PEEWEE_…`` keys, which are the same in each application that it serves.

        Raises: `ConfigurationError`.
        """
        settings = {key: value for key, value in config.items() if key.startswith(PREFIX)}
        if self._settings not in (None, settings):
            raise ConfigurationError(
                f"{app!r} has other {PREFIX}… settings than an application that this Peewee serves already. Make a Peewee for "
                "each, or give both the same configuration."
            )
        self.runtime.configure(config)
        self._settings = settings

    async def run(self, function: Callable[_Args, _Result], /, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        """Call sync code that queries, on a thread, in the current request's scope; such calls take turns.

        Raises: what the function raises; `PoolTimeout` if it was not admitted in time.
        """
        return await self.runtime.run(function, *args, **kwargs)
