from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest

from .stub import Server, make_pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from peewee_frameworks.pool import Pool


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    for name in ("connect", "ping", "rollback", "close"):
        gate = getattr(server, f"{name}_gate")
        if gate is not None:
            gate.set()


@pytest.fixture
def pool_of(server: Server) -> Iterator[Callable[..., Pool]]:
    pools: list[Pool] = []

    def make(**options: Any) -> Pool:
        pool = make_pool(server, **options)
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close(0)
    pools.clear()
    gc.collect()
