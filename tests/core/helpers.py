"""Small tools of the core's tests."""

from __future__ import annotations

import contextvars
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE = 10.0


def in_thread(function: Callable[..., Any], *args: Any, context: contextvars.Context | None = None) -> Any:
    """Call `function` on a thread of its own, in an empty context or the one given, and give what it gives."""
    return start(function, *args, context=context).result(DEADLINE)


def start(function: Callable[..., Any], *args: Any, context: contextvars.Context | None = None) -> Future[Any]:
    """Start `function` on a thread of its own; the future has its result when the thread's call has ended."""
    future: Future[Any] = Future()
    context = contextvars.Context() if context is None else context

    def work() -> None:
        try:
            result = context.run(function, *args)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=work, daemon=True, name="test-thread").start()
    return future


class Gate:
    """A place in the code where one thread stops until another lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, *_: Any) -> int:
        self.reached.set()
        assert self.opened.wait(DEADLINE), "nobody opened the gate"
        return 1

    def wait(self) -> None:
        assert self.reached.wait(DEADLINE), "nobody came to the gate"

    def open(self) -> None:
        self.opened.set()


class SlowStatement:
    """Makes an SQLite statement stop in the middle, inside the driver, until told to go on."""

    def __init__(self, database: Any) -> None:
        self.gate = Gate()
        self.database = database
        name = f"gate_{id(self):x}"
        self.sql = f"SELECT {name}()"
        database.register_function(self.gate, name, 0)
        database.close_idle()  # a function is known to connections made after it

    def run(self) -> Any:
        return self.database.execute_sql(self.sql).fetchone()
