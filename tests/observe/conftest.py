"""Each framework's application on its own server."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import webservers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.process import ServerProcess

SERVERS: dict[str, Callable[..., ServerProcess]] = {
    "flask": webservers.werkzeug,
    "wsgi": webservers.gunicorn,
    "sanic": lambda target, **process: webservers.sanic(target, single_process=True, **process),
    "fastapi": webservers.uvicorn,
    "starlette": lambda target, **process: webservers.uvicorn(target, loop="asyncio", **process),
    "asgi": webservers.uvicorn,
}


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., Any]:
    """Serve an application of served.py: ``serve("flask", kind="stock", server_timing=True)``."""

    @contextmanager
    def serve(framework: str, kind: str = "ours", **options: Any) -> Iterator[ServerProcess]:
        environment = {"DATABASE": str(tmp_path / "observed.db"), "KIND": kind, "OPTIONS": json.dumps(options)}
        server = SERVERS[framework]
        with server(f"tests.observe.served:make_{framework}", factory=True, env=environment) as process:
            yield process

    return serve
