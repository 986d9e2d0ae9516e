"""The recipe of many tutorials: a sync dependency that connects, yields and closes. Kept to show what it does."""

import os
from typing import Annotated, Any

import peewee
from fastapi import Depends, FastAPI
from fastapi.responses import PlainTextResponse

from .work import open_database

database = open_database(os.environ["DATABASE_URL"])


def connected() -> Any:
    database.connect(reuse_if_open=True)
    try:
        yield database
    finally:
        if not database.is_closed():
            database.close()


app = FastAPI(default_response_class=PlainTextResponse)


@app.get("/ok/{rid}")
def ok(rid: str, db: Annotated[Any, Depends(connected)]) -> str:
    return str(peewee.Select([], [peewee.Value(rid).alias("v")]).bind(db).scalar())
