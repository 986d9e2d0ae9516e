"""Call stacks that cost little to take and keep nothing alive: code and positions, never the frames, which hold the locals."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import CodeType, FrameType

LIMIT = 24
"""Calls that are kept, the innermost."""

_OURS = ("peewee", "peewee_frameworks", "playhouse")


class Stack(NamedTuple):
    """A stack as it was when it was taken, the innermost call first."""

    calls: tuple[tuple[CodeType, int, str], ...]

    def __str__(self) -> str:
        """Format it as a traceback is, the innermost call last, without our and Peewee's own calls at that end."""
        calls = list(self.calls)
        while len(calls) > 1 and calls[0][2].partition(".")[0] in _OURS:
            del calls[0]
        summary = traceback.StackSummary.from_list(
            [(code.co_filename, _line(code, position), code.co_name, None) for code, position, _ in reversed(calls)]
        )
        return "".join(summary.format()).rstrip()


def take(frame: FrameType | None, limit: int = LIMIT) -> Stack:
    """Take the stack of a thread from one of its frames outward.

    About a microsecond: line numbers and source lines are looked up when it is formatted.
    """
    calls: list[tuple[CodeType, int, str]] = []
    while frame is not None and len(calls) < limit:
        calls.append((frame.f_code, frame.f_lasti, frame.f_globals.get("__name__", "")))
        frame = frame.f_back
    return Stack(tuple(calls))


def take_awaiting(coroutine: object, limit: int = LIMIT) -> Stack:
    """Take the stack of a suspended coroutine, from the innermost that it awaits outward."""
    chain = [(frame.f_code, frame.f_lasti, frame.f_globals.get("__name__", "")) for frame in awaiting(coroutine)]
    return Stack(tuple(reversed(chain[-limit:])))


def outward(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the calls of a thread, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def awaiting(coroutine: object) -> Iterator[FrameType]:
    """Yield the calls of a suspended coroutine, the outermost first."""
    for _ in range(1000):  # a chain of awaits has an end; this one, whatever is in it
        for frame_name, next_name in (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await")):
            frame = getattr(coroutine, frame_name, None)
            if frame is not None:
                yield frame
                coroutine = getattr(coroutine, next_name)
                break
        else:
            return


def _line(code: CodeType, position: int) -> int:
    lines: Iterable[tuple[int, int, int | None]] = code.co_lines()
    return next((line for start, end, line in lines if start <= position < end and line), code.co_firstlineno)
