"""Tables made at start, by several workers at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peewee

if TYPE_CHECKING:
    from collections.abc import Sequence


def create_tables(database: Any, models: Sequence[type[peewee.Model]]) -> None:
    """Create the tables and indexes that are missing, on the connection of the caller.

    All workers of a server start at the same time, and no server serialises ``CREATE … IF NOT EXISTS``: the one that comes
    second fails with a duplicate key. What it failed on exists then, so it looks again; the same failure twice is another one.

    Raises: what creating raises, for any other reason.
    """
    failed = None
    while True:
        try:
            database.create_tables(models)
        except peewee.DatabaseError as error:
            if str(error) == failed:
                raise
            failed = str(error)
        else:
            return
