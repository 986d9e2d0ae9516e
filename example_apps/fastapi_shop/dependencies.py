"""What endpoints ask for in their signatures."""

from __future__ import annotations

import os
import secrets
from typing import Annotated

from fastapi import Depends, HTTPException
from peewee import Database

from .models import orm

Connection = Annotated[Database, Depends(orm.connection)]
"""The database; a connection is taken at the first query and given back with the response."""

Atomic = Annotated[Database, Depends(orm.transaction, scope="function")]
"""The database in a transaction: committed when the endpoint has returned, rolled back if it raises."""


def operator(token: str = "") -> None:
    """Let in who knows OPS_TOKEN: ``/db/?token=…`` shows what the pool does. Without such a variable, nobody."""
    expected = os.environ.get("OPS_TOKEN", "")
    if not expected or not secrets.compare_digest(token.encode(), expected.encode()):
        raise HTTPException(403, "For operators only.")
