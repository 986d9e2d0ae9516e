"""The recipe that FastAPI's documentation gave for Peewee and that tutorials copy. Kept to show what it does."""

import os
import time
from contextvars import ContextVar
from typing import Annotated, Any

import peewee
from fastapi import Depends, FastAPI
from fastapi.responses import PlainTextResponse

from .work import open_database

DEFAULT = {"closed": None, "conn": None, "ctx": None, "transactions": None, "commit_callbacks": None}
state: ContextVar[dict[str, Any]] = ContextVar("state", default=DEFAULT.copy())  # noqa: B039 - the recipe has it so


class ConnectionState(peewee._ConnectionState):
    def __init__(self, **kwargs: Any) -> None:
        super().__setattr__("_state", state)
        super().__init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        self._state.get()[name] = value

    def __getattr__(self, name: str) -> Any:
        return self._state.get()[name]


database = open_database(os.environ["DATABASE_URL"])
database._state = ConnectionState()


async def reset_state() -> None:
    database._state._state.set(DEFAULT.copy())
    database._state.reset()


def connected(_: Annotated[None, Depends(reset_state)]) -> Any:
    try:
        database.connect()
        yield
    finally:
        if not database.is_closed():
            database.close()


app = FastAPI(default_response_class=PlainTextResponse)


@app.get("/ok/{rid}", dependencies=[Depends(connected)])
def ok(rid: str) -> str:
    time.sleep(0.02)  # what an endpoint does beside its query
    return str(peewee.Select([], [peewee.Value(rid).alias("v")]).bind(database).scalar())
