"""What endpoints ask for in their signatures."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from peewee import Database

from .models import orm

Connection = Annotated[Database, Depends(orm.connection)]
"""The database; a connection is taken at the first query and given back with the response."""

Atomic = Annotated[Database, Depends(orm.transaction, scope="function")]
"""The database in a transaction: committed when the endpoint has returned, rolled back if it raises."""
