"""Which case runs where, and why not elsewhere. A case that is not named in the table runs on every server.

All cases run with each server on the first database of its line, so with each framework on two of the three databases. Those
marked ``core`` run on the others of the line too, so with each framework on all three. Starting a server is what costs: this
is what fits into a few minutes. ``PEEWEE_FRAMEWORKS_CONTRACT=full`` (`make contract`) runs every case with every server on
every database.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.servers import Kind

PLACES: dict[str, tuple[Kind, ...]] = {
    "flask-werkzeug": ("sqlite",),
    "flask-gthread": ("postgres", "mysql", "sqlite"),
    "sanic-workers": ("mysql", "postgres"),
    "sanic-single": ("postgres", "sqlite"),
    "fastapi-uvloop": ("postgres", "mysql", "sqlite"),
    "fastapi-asyncio": ("mysql",),
    "starlette-uvloop": ("mysql", "postgres", "sqlite"),
    "starlette-asyncio": ("sqlite",),
}

# The same with asynchronous drivers: each framework's whole contract on the first of a line, its core on the others.
ASYNC_PLACES: dict[str, tuple[str, ...]] = {
    "sanic-single": ("psycopg", "aiomysql"),
    "fastapi-asyncio": ("psycopg", "aiosqlite", "asyncpg"),
    "starlette-asyncio": ("aiosqlite", "aiomysql", "asyncpg"),
}

_TEARDOWN = "has no teardown functions: what runs at the end is middleware, which is tested"
_SYNC = "is sync: a handler has a thread of its own, and nothing cancels it"
_NO_RUN = "is sync: it has no orm.run"
_NO_SOCKETS = "has no websockets"
_NO_BACKGROUND = "has no background tasks"
_NO_ASYNC_STREAM = "streams from sync generators only"
_NO_MOUNT = "mounts no applications; its blueprints belong to the application itself"
_SANIC_SYNC = "runs sync handlers on the event loop: nothing can be between two parts of them"
_SANIC_STREAM = "streams from async code only"
_THREAD_PIPELINE = "Werkzeug's server speaks HTTP/1.0 style: it closes after each response"
_DEPENDENCY = "has no dependencies"

# Test: {framework, or framework-server: why the case is not one there}
NOT_APPLICABLE: dict[str, dict[str, str]] = {
    "test_a_teardown_of_others_raises": {"sanic": _TEARDOWN, "fastapi": _TEARDOWN, "starlette": _TEARDOWN},
    "test_disconnect_of_an_async_handler": {
        "flask": _SYNC,
        "sanic": "has async handlers only; test_disconnect_in_the_middle_of_the_handler is this case",
    },
    "test_a_deadline_around_a_sync_endpoint": {
        "flask": _SYNC,
        "sanic": _SANIC_SYNC,
    },
    "test_a_deadline_around_orm_run": {"flask": _NO_RUN},
    "test_a_sync_stream_idles_without_a_connection": {"sanic": _SANIC_STREAM},
    "test_an_async_stream_idles_without_a_connection": {"flask": _NO_ASYNC_STREAM},
    "test_flasks_stream_with_context": dict.fromkeys(("sanic", "fastapi", "starlette"), "is Flask's"),
    "test_100_idle_streams_hold_nothing": {"flask": "has 40 threads, and a stream has one to itself"},
    "test_a_sync_generator_dropped_mid_stream_touches_nobody": {"sanic": _SANIC_STREAM},
    "test_an_async_generator_dropped_mid_stream": {"flask": _NO_ASYNC_STREAM},
    "test_a_stream_inside_a_transaction_keeps_its_connection": {"sanic": _SANIC_STREAM},
    "test_children_take_turns_in_orm_run": {"flask": _NO_RUN},
    "test_a_background_task_queries_in_the_request_that_started_it": {
        "flask": _NO_BACKGROUND,
        "sanic": "its background tasks outlive the request: test_a_task_of_the_application",
    },
    "test_an_orphan_task": {"flask": "ends the loop of an async view with the view"},
    "test_a_task_of_the_application": dict.fromkeys(("flask", "fastapi", "starlette"), "is Sanic's app.add_task"),
    "test_flasks_copied_request_context": dict.fromkeys(("sanic", "fastapi", "starlette"), "is Flask's"),
    "test_echo": {"flask": _NO_SOCKETS},
    "test_an_error_ends_the_websocket_and_nothing_else": {"flask": _NO_SOCKETS},
    "test_abort": {"flask": _NO_SOCKETS},
    "test_200_idle_websockets_hold_nothing": {"flask": _NO_SOCKETS},
    "test_one_transaction_from_several_threads": {"flask": "has one thread a request"},
    "test_the_transaction_dependency": dict.fromkeys(("flask", "sanic", "starlette"), _DEPENDENCY),
    "test_a_dependency_whose_commit_fails_is_an_error": dict.fromkeys(("flask", "sanic", "starlette"), _DEPENDENCY),
    "test_a_sync_dependency_that_yields_inside_atomic": dict.fromkeys(("flask", "sanic", "starlette"), _DEPENDENCY),
    "test_a_mounted_application_shares_the_scope": {"sanic": _NO_MOUNT},
    "test_a_wsgi_application_in_an_asgi_application": {
        "flask": "is WSGI; test_a_mounted_application_shares_the_scope",
        "sanic": _NO_MOUNT,
    },
    "test_pipelined_requests": {"flask-werkzeug": _THREAD_PIPELINE},
}

_THREADS = "a thread cannot query an asynchronous database, and is told so"

# Test: why it is no case with an asynchronous driver.
NOT_ASYNCHRONOUS: dict[str, str] = {
    "test_a_deadline_around_a_thread": _THREADS,
    "test_threads_of_one_request_get_their_own_answer_or_an_error": _THREADS,
    "test_a_thread_that_outlives_its_request": _THREADS,
    "test_a_thread_that_never_closes_gives_back_when_it_has_ended": _THREADS,
    "test_flasks_copied_request_context": _THREADS,
    "test_a_wsgi_application_in_an_asgi_application": "WSGI is sync",
    "test_80_concurrent_requests_meet_40_threads": "no thread is needed; test_300_concurrent_requests_share_5_connections",
}
