from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from tests.metrics.scrape import Scrape, scrape
from tests.support import webservers
from tests.support.concurrency import eventually
from tests.support.databases import scratch
from tests.support.proxy import Proxy
from tests.support.servers import require_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.process import ServerProcess

APPS = "tests.metrics.apps"
SERVERS: dict[str, Callable[..., ServerProcess]] = {
    "flask": lambda **more: webservers.gunicorn(f"{APPS}:make_flask", factory=True, **more),
    "sanic": lambda **more: webservers.sanic(f"{APPS}:make_sanic", factory=True, **more),
    "fastapi": lambda **more: webservers.uvicorn(f"{APPS}:make_fastapi", factory=True, **more),
    "starlette": lambda **more: webservers.uvicorn(f"{APPS}:make_starlette", factory=True, **more),
}


@dataclass
class Served:
    """An application on its server, and the way from there to MariaDB."""

    framework: str
    process: ServerProcess
    proxy: Proxy

    def get(self, path: str) -> str:
        with self.process.client() as client:
            response = client.get(quote(path), Connection="close")
        assert response.status == 200, (response.text, self.process.output[-3000:])
        return response.text

    def provoke(self, what: str) -> int:
        """Let the application do something to its pool; return the process that did it."""
        return int(self.get(f"/provoke/{what}").strip('"'))

    def scrape(self) -> Scrape:
        return scrape(self.process)

    def eventually(self, name: str, value: float, **labels: str) -> Scrape:
        """Scrape until a sample has a value that is set in the background."""
        return self._until(lambda found: found == value, name, labels, f"is {value}")

    def at_least(self, name: str, value: float, **labels: str) -> Scrape:
        """Scrape until a sample has that value, or more."""
        return self._until(lambda found: found is not None and found >= value, name, labels, f">= {value}")

    def _until(self, right: Callable[[float | None], bool], name: str, labels: dict[str, str], what: str) -> Scrape:
        labels = {"pool_name": "shop", **labels}
        last: list[Scrape] = []

        def there() -> bool:
            last[:] = [self.scrape()]
            return right(last[0].get(name, **labels))

        eventually(there, message=f"{name}{labels} {what}")
        return last[0]


@contextmanager
def serving(framework: str, tmp_path: Any, **options: Any) -> Iterator[Served]:
    """Serve the application of a framework, on MariaDB behind a proxy."""
    require_server("mysql")
    with scratch("mysql", tmp_path) as place, Proxy(place.address) as proxy:
        settings = {"database": place.database, **place.via(*proxy.address).connect_kwargs()}
        env = {"METRICS_DATABASE": json.dumps(settings), **options.pop("env", {})}
        with SERVERS[framework](env=env, **options) as process:
            yield Served(framework, process, proxy)


@pytest.fixture(params=list(SERVERS), scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Each framework in turn, one process."""
    with serving(request.param, tmp_path_factory.mktemp("metrics")) as served:
        yield served
