"""A default database that the application's configuration will name."""

from __future__ import annotations

from typing import Any

import peewee

from .errors import ConfigurationError
from .guarded import GuardedProxy


class LateDatabase(GuardedProxy):
    """Stands for the default database until the configuration that names it is read, in `init_app` or at start."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if self.obj is None:
            raise not_ready()
        return getattr(self.obj, name)

    def _real(self) -> Any:
        if self.obj is None:
            raise not_ready()
        return self.obj

    @staticmethod
    def not_ready() -> ConfigurationError:
        """Say what to do, where a `DatabaseProxy` would ask for `initialize`."""
        return not_ready()


class _NotConfigured(ConfigurationError, AttributeError):
    """So that `hasattr` on the stand-in answers instead of failing."""


def not_ready() -> ConfigurationError:
    """Make the error for who comes before the configuration was read."""
    return _NotConfigured(
        "The database is not known yet: Peewee() was made without one, and the application's configuration has not been "
        "read. Call orm.init_app(app) (or start the application's lifespan) first, or pass the database: Peewee(db)."
    )


def is_late(database: Any) -> bool:
    """Return whether it is a proxy whose database is yet to come."""
    return isinstance(database, peewee.Proxy) and database.obj is None
