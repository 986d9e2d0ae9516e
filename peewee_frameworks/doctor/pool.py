"""Pools: how many connections, and what happens when all are in use."""

from __future__ import annotations

import math
import ssl
import sys
from typing import TYPE_CHECKING

from .frameworks import ANYIO_THREADS, endpoints, runs_on_anyio
from .report import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .case import Case
    from .server import Server


def findings(case: Case) -> Iterator[Finding]:
    """Find what the settings alone tell."""
    if case.pool.kind == "none":
        return
    yield from _waits(case)
    if case.kind != "sqlite":
        yield from _unbounded(case)
        yield from _more_than_threads(case)


def _unbounded(case: Case) -> Iterator[Finding]:
    if case.pool.size is None:
        yield Finding(
            "pool-unbounded",
            "warning",
            "max_connections is None or 0: the pool has no limit.",
            "A rush of requests opens as many connections, until the server refuses them: to other applications too.",
            "max_connections=20, or what the server's limit divided by the workers allows",
        )


def _waits(case: Case) -> Iterator[Finding]:
    pool = case.pool
    if pool.size is None:
        return
    if pool.timeout is None:
        if case.serving.requests is not None and case.serving.requests <= pool.size:
            return  # there are never more requests than connections
        many = f" {_crowd(case)}" if _crowd(case) else ""
        yield Finding(
            "pool-does-not-wait",
            "warning",
            f"timeout is not set, so a request that finds none of the {pool.size} connections free fails at once.{many}",
            "A short rush becomes errors (MaxConnectionsExceeded) although a connection would be free a few "
            "milliseconds later.",
            "timeout=5 (seconds that a request may wait for a connection)",
        )
    elif math.isinf(pool.timeout):
        yield Finding(
            "pool-waits-for-ever",
            "warning",
            "timeout=0: a request waits for a connection for ever.",
            "If connections leak, or the database hangs, each further request takes a thread and never gives it back, "
            "and the application stops answering without an error in its log.",
            "timeout=5 (seconds that a request may wait for a connection)",
        )


def _crowd(case: Case) -> str:
    """Say how many requests there may be at the same time."""
    if case.serving.requests is not None:
        return f"{case.serving.server} has up to {case.serving.requests} requests under way in each worker."
    if runs_on_anyio(case.target) and any(not each.on_loop for each in endpoints(case.target)):
        return f"Sync endpoints run on {ANYIO_THREADS} threads in each worker."
    return ""


def _more_than_threads(case: Case) -> Iterator[Finding]:
    size = case.pool.size
    if case.pool.kind == "asyncio" or size is None or size <= ANYIO_THREADS or not runs_on_anyio(case.target):
        return
    found = list(endpoints(case.target))
    if found and not any(each.on_loop for each in found):
        yield Finding(
            "pool-larger-than-threads",
            "note",
            f"The pool has {size} connections, and all endpoints are sync functions, which AnyIO runs on "
            f"{ANYIO_THREADS} threads.",
            f"No more than {ANYIO_THREADS} can query at the same time, so the other connections only count against the "
            "server's limit.",
            f"max_connections={ANYIO_THREADS}, or more threads: "
            f"anyio.to_thread.current_default_thread_limiter().total_tokens = {size} in the lifespan",
        )


def findings_after(case: Case, server: Server) -> Iterator[Finding]:
    """Find what also depends on the server."""
    if case.kind == "sqlite":
        return
    trip = f"{server.round_trip_seconds * 1000:.1f} ms"
    if case.pool.kind == "none" and server.pooler is None:
        yield Finding(
            "no-pool",
            "warning",
            "The database has no pool.",
            f"Each request opens a connection of its own (here {server.connect_seconds * 1000:.0f} ms, and a query "
            f"takes {trip}), and nothing but the server's limit bounds how many there are.",
            "a database of peewee_frameworks.pool, with max_connections=… and timeout=…",
        )
    if case.pool.kind == "playhouse":
        yield Finding(
            "stock-pool",
            "note",
            "The pool is playhouse.pool's.",
            f"It makes a round trip at each checkout to see whether the connection still works (here {trip}), and "
            "holds one lock while it does and while it connects: all other requests of the worker wait meanwhile, "
            "which shows when the server or the network is slow.",
            "from peewee_frameworks.pool import … instead of playhouse.pool; the arguments are the same",
        )
    if case.driver == "pymysql" and case.pool.kind in ("none", "playhouse") and _builds_contexts(case):
        yield Finding(
            "tls-context",
            "warning" if case.pool.kind == "none" else "note",
            "PyMySQL makes a TLS context for each connection"
            + ("." if server.tls else ", although the server has no TLS."),
            "That reads the system's certificates again: about 20 ms of CPU and 0.8 MB each time. A burst of connects "
            "is slow for that alone.",
            "a database of peewee_frameworks.pool, whose connections share one"
            + ("; or ssl=context, made once" if server.tls else "; or ssl_disabled=True"),
        )


def _builds_contexts(case: Case) -> bool:
    params = case.params
    if params.get("ssl_disabled") or isinstance(params.get("ssl"), ssl.SSLContext):
        return False
    always = tuple(sys.modules["pymysql"].VERSION[:2]) >= (1, 2)
    return always or any(name.startswith("ssl") and value for name, value in params.items())
