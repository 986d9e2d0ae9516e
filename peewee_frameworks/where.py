"""Where units of work are now: the thread, task or greenlet that runs in each, and its stack.

Requests note no owner: that would cost each of them something, and whoever began may not be the one that is at work. So we look
when somebody asks. A suspended task and a thread that runs code in a copied context have that context, which names the scope;
the other threads have one of our own calls on their stack.
"""

from __future__ import annotations

import contextvars
import functools
import gc
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from .frame import current_frames
from .pool.entries import snapshot
from .stacks import Stack, awaiting, outward, take, take_awaiting

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from types import FrameType

    from .scope import Scope

    _Inhabitant = tuple[Scope | None, Callable[[], "Place"]]


class Place(NamedTuple):
    """Who runs in a unit of work, and where."""

    owner: str
    stack: Stack


def locate(scopes: Iterable[Scope], *, greenlets: bool = False) -> dict[Scope, Place]:
    """Return where scopes are now, as far as that can be told. Where several run in one, one of them.

    Args:
        scopes: those to look for.
        greenlets: look for suspended greenlets too, which takes a walk through all objects there are.
    """
    wanted = set(scopes)
    if not wanted:
        return {}
    threads = sys._current_frames()
    # Threads first: a task may wait for a thread of the same scope, and then the thread is where it is.
    found = _assign(wanted, ((_scope_of_thread(frame), _placing(ident, frame)) for ident, frame in threads.items()))
    found |= _assign(wanted - found.keys(), _suspended(greenlets=greenlets))
    for scope in wanted - found.keys():
        task = None if scope.task is None else scope.task()
        if task is not None and not task.done():
            found[scope] = of_task(task)
        elif scope.thread in threads:
            found[scope] = _place_of_thread(scope.thread, threads[scope.thread])
    return found


def _assign(wanted: Collection[Scope], inhabitants: Iterable[_Inhabitant]) -> dict[Scope, Place]:
    found: dict[Scope, Place] = {}
    if not wanted:
        return found
    for inner, make in inhabitants:
        scope: Scope | None = inner
        while scope is not None:  # who is in a nested scope is in those around it
            if scope in wanted and (scope is inner or scope not in found):
                found[scope] = make()
            scope = scope.parent
        if len(found) == len(wanted):
            break  # there may be thousands of idle tasks
    return found


def _suspended(*, greenlets: bool) -> Iterator[_Inhabitant]:
    """Yield the scope that each task and greenlet is in, and what tells where that is."""
    for task in _tasks():
        context = _context_of(task)
        scope = (
            _scope_in(context) if context is not None else _scope_of_calls(reversed(list(awaiting(task.get_coro()))))
        )
        yield scope, functools.partial(of_task, task)
    if greenlets:
        for greenlet in _greenlets():
            yield _scope_in(greenlet.gr_context), functools.partial(of_greenlet, greenlet)


def of_task(task: Any) -> Place:
    """Return where a suspended task is."""
    return Place(f"task {task.get_name()!r}", take_awaiting(task.get_coro()))


def of_greenlet(greenlet: Any) -> Place:
    """Return where a suspended greenlet is."""
    return Place(f"greenlet {getattr(greenlet, 'name', hex(id(greenlet)))!r}", take(greenlet.gr_frame))


def of_owner(owner: Any) -> Place | None:
    """Return where the owner of a connection outside any scope is; None if it has ended."""
    if hasattr(owner, "get_coro"):
        return of_task(owner)
    if hasattr(owner, "gr_frame"):
        return None if owner.gr_frame is None else of_greenlet(owner)
    return of_thread(owner.ident) if hasattr(owner, "ident") else None


def of_thread(ident: int) -> Place | None:
    """Return where a thread is; None if it has ended."""
    frame = sys._current_frames().get(ident)
    return None if frame is None else _place_of_thread(ident, frame)


def _placing(ident: int, frame: FrameType) -> Callable[[], Place]:
    return lambda: _place_of_thread(ident, frame)


def _place_of_thread(ident: int, frame: FrameType) -> Place:
    return Place(_thread_name(ident), take(frame))


def _thread_name(ident: int) -> str:
    name = next((thread.name for thread in threading.enumerate() if thread.ident == ident), hex(ident))
    return f"thread {name!r}"


def _scope_in(context: Any) -> Scope | None:
    frames = context.get(current_frames) if isinstance(context, contextvars.Context) else None
    return None if frames is None else frames.scope


def _context_of(task: Any) -> Any:
    if hasattr(task, "get_context"):  # Python 3.12
        return task.get_context()
    # Before that, what it waits for knows in which context to wake it; once that has happened, nobody does.
    for callback, context in getattr(getattr(task, "_fut_waiter", None), "_callbacks", None) or ():
        if getattr(callback, "__self__", None) is task:
            return context
    return None


def _tasks() -> Iterator[Any]:
    tasks: Any = sys.modules.get("asyncio.tasks")
    if tasks is not None:
        # Of all loops; `asyncio.all_tasks` asks which, and nobody has a list of those.
        for name in ("_all_tasks", "_scheduled_tasks", "_eager_tasks"):
            yield from (task for task in snapshot(getattr(tasks, name, ())) if not task.done())


def _greenlets() -> Iterator[Any]:
    greenlet: Any = sys.modules.get("greenlet")
    if greenlet is not None:
        kind = greenlet.greenlet
        yield from (thing for thing in gc.get_objects() if isinstance(thing, kind) and thing.gr_frame is not None)


# -- threads --------------------------------------------------------------------------------------------------------------

# The calls from which a thread's scope can be told, and the local variable that tells. Of no other call the locals are read:
# Python keeps a copy of what is read with the frame.
_TELLING = {
    ("peewee_frameworks.wsgi", "__call__"): ("work", lambda work: work),
    ("peewee_frameworks.asgi", "__call__"): ("work", lambda work: work),  # while its task runs
    ("peewee_frameworks.sanic", "handle_request"): ("part", lambda part: part),
    ("peewee_frameworks.wsgi", "__next__"): ("self", lambda body: body.work),
    ("peewee_frameworks.wsgi", "close"): ("self", lambda body: body.work),
    ("asyncio.events", "_run"): ("self", lambda handle: _scope_in(handle._context)),
    ("concurrent.futures.thread", "run"): ("self", lambda item: _scope_in(_bound_context(getattr(item, "fn", None)))),
    ("threading", "run"): ("self", lambda thread: _scope_in(_bound_context(getattr(thread, "_target", None)))),
    ("peewee_frameworks.crew", "run"): ("self", lambda call: _scope_in(call._context)),
    ("anyio._backends._asyncio", "run"): ("context", _scope_in),
}


def _scope_of_thread(frame: FrameType | None) -> Scope | None:
    return _scope_of_calls(outward(frame))


def _scope_of_calls(calls: Iterable[FrameType]) -> Scope | None:
    """Return the scope that the first of the calls tells of that can: the innermost, as they come."""
    for frame in calls:
        told = _TELLING.get((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        if told is not None:
            name, scope_of = told
            value = frame.f_locals.get(name)
            scope: Scope | None = None if value is None else scope_of(value)  # type: ignore[no-untyped-call]
            if scope is not None:
                return scope
    return None


def _bound_context(function: Any) -> Any:
    """Return the context of ``context.run``, perhaps in a partial, as `asyncio.to_thread` makes it."""
    return getattr(getattr(function, "func", function), "__self__", None)
