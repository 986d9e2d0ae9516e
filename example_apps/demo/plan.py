"""What the demo serves, and how hard it drives that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support import webservers

from . import mixes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.support.process import ServerProcess

REQUESTS = 1000
CLIENTS = 32
PATIENCE = 15.0
"""Seconds after the last answer in which everything must have come back."""


@dataclass(frozen=True)
class Subject:
    """One application: how it is served, and what it is asked."""

    name: str
    server: str
    serve: Callable[..., ServerProcess]
    mix: Sequence[Callable[[int], Any]]
    module: str = "example_apps.demo.served"

    @property
    def target(self) -> str:
        """What makes it, as servers take it."""
        return f"{self.module}:{self.name}"


SUBJECTS = (
    Subject("flask_blog", "gunicorn gthread", webservers.gunicorn, mixes.FLASK_BLOG),
    Subject("sanic_feed", "sanic", webservers.sanic, mixes.SANIC_FEED),
    Subject("fastapi_shop", "uvicorn", webservers.uvicorn, mixes.FASTAPI_SHOP),
    Subject("starlette_chat", "uvicorn", webservers.uvicorn, mixes.STARLETTE_CHAT),
)
