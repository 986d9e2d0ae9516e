"""How the application is served: what the command line, the server's own settings and the environment say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Serving:
    """The processes, and what is known of each.

    Attributes:
        workers: processes, each with pools of its own.
        source: where that number comes from; None: assumed to be one.
        server: the server's name, if known.
        requests: requests that one worker can work on at the same time, if the server bounds them.
        gevent: gunicorn's gevent worker.
        preload: gunicorn loads the application before it forks.
        reset_contextvars: uvicorn gives each request a fresh context.
    """

    workers: int = 1
    source: str | None = None
    server: str | None = None
    requests: int | None = None
    gevent: bool = False
    preload: bool = False
    reset_contextvars: bool = False

    @classmethod
    def find(cls, workers: int | None, served_by: Mapping[str, Any] | None, environment: Mapping[str, str]) -> Serving:
        """Bring together ``--workers``, what was read from ``--served-by``, and WEB_CONCURRENCY, in this order."""
        known = dict(served_by or {})
        concurrency = environment.get("WEB_CONCURRENCY", "")
        if workers is not None:
            known |= {"workers": workers, "source": "--workers"}
        elif served_by:
            known |= {"source": "--served-by"}
        elif concurrency.isdigit():
            known |= {"workers": int(concurrency), "source": "WEB_CONCURRENCY"}
        return cls(**known)

    @property
    def count(self) -> str:
        """The number of workers, in words."""
        return "1 worker" if self.workers == 1 else f"{self.workers} workers"

    def __str__(self) -> str:
        return (
            f"{self.count} ({f'from {self.source}' if self.source else 'assumed; tell with --workers or --served-by'})"
        )
