"""The asynchronous methods of models, for databases of either kind."""

from __future__ import annotations

from typing import Any

import peewee

from peewee_frameworks.errors import ConfigurationError
from peewee_frameworks.state import unwrap


def _database(model: Any) -> Any:
    database = model._meta.database
    if isinstance(database, peewee.Proxy):
        database = unwrap(database)
    if not hasattr(database, "run"):
        name = "no database" if database is None else type(database).__name__
        raise ConfigurationError(
            f"{model.__name__} is bound to {name}, which has no asynchronous methods. Use a database of "
            "peewee_frameworks.pool, peewee_frameworks.aio or playhouse.pwasyncio."
        )
    return database


class AsyncModelMixin:
    """What `playhouse.pwasyncio.AsyncModelMixin` gives, on every database that has `run`."""

    __slots__ = ()

    @classmethod
    async def acreate(cls, **query: Any) -> Any:
        """See `Model.create`."""
        return await _database(cls).run(cls.create, **query)  # type: ignore[attr-defined]

    @classmethod
    async def aget(cls, *query: Any, **filters: Any) -> Any:
        """See `Model.get`."""
        return await _database(cls).run(cls.get, *query, **filters)  # type: ignore[attr-defined]

    @classmethod
    async def aget_or_none(cls, *query: Any, **filters: Any) -> Any:
        """See `Model.get_or_none`."""
        return await _database(cls).run(cls.get_or_none, *query, **filters)  # type: ignore[attr-defined]

    @classmethod
    async def aget_by_id(cls, pk: Any) -> Any:
        """See `Model.get_by_id`."""
        return await _database(cls).run(cls.get_by_id, pk)  # type: ignore[attr-defined]

    @classmethod
    async def aget_or_create(cls, **kwargs: Any) -> Any:
        """See `Model.get_or_create`."""
        return await _database(cls).run(cls.get_or_create, **kwargs)  # type: ignore[attr-defined]

    @classmethod
    async def aset_by_id(cls, key: Any, value: Any) -> Any:
        """See `Model.set_by_id`."""
        return await _database(cls).run(cls.set_by_id, key, value)  # type: ignore[attr-defined]

    @classmethod
    async def adelete_by_id(cls, pk: Any) -> Any:
        """See `Model.delete_by_id`."""
        return await _database(cls).run(cls.delete_by_id, pk)  # type: ignore[attr-defined]

    @classmethod
    async def abulk_create(cls, model_list: Any, batch_size: int | None = None) -> Any:
        """See `Model.bulk_create`."""
        return await _database(cls).run(cls.bulk_create, model_list, batch_size)  # type: ignore[attr-defined]

    @classmethod
    async def abulk_update(cls, model_list: Any, fields: Any, batch_size: int | None = None) -> Any:
        """See `Model.bulk_update`."""
        return await _database(cls).run(cls.bulk_update, model_list, fields, batch_size)  # type: ignore[attr-defined]

    async def asave(self, force_insert: bool = False, only: Any = None) -> Any:
        """See `Model.save`."""
        return await _database(type(self)).run(self.save, force_insert, only)  # type: ignore[attr-defined]

    async def adelete_instance(self, recursive: bool = False, delete_nullable: bool = False) -> Any:
        """See `Model.delete_instance`."""
        delete = self.delete_instance  # type: ignore[attr-defined]
        return await _database(type(self)).run(delete, recursive, delete_nullable)

    async def afetch(self, field: Any) -> Any:
        """Return the row that a foreign key refers to, from the database only the first time.

        Raises: ValueError if it is no foreign key, or one with ``lazy_load=False``.
        """
        meta = self._meta  # type: ignore[attr-defined]
        field = meta.combined[field] if isinstance(field, str) else field
        if not isinstance(field, peewee.ForeignKeyField):
            raise ValueError("afetch() accepts a foreign-key field.")  # noqa: TRY004 - as pwasyncio's
        related = self.__rel__  # type: ignore[attr-defined]
        if field.name in related:
            return related[field.name]
        if not field.lazy_load:
            raise ValueError(f"{type(self).__name__}.{field.name} is declared with lazy_load=False.")
        return await _database(type(self)).run(getattr, self, field.name)


class AsyncModel(AsyncModelMixin, peewee.Model):
    """A model with asynchronous methods; what ``db.Model`` is on the databases of `peewee_frameworks.pool`."""
