"""A forked child: none of its parent's threads is there, and none of its parent's connections is its own."""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol


class Forked(Protocol):
    """Who has to know."""

    def after_fork(self) -> None:
        """Start over, in the child."""


_subjects: weakref.WeakSet[Forked] = weakref.WeakSet()


def watch_forks(subject: Forked) -> None:
    """Have ``subject.after_fork()`` called in forked children, as long as somebody else refers to it."""
    _subjects.add(subject)


_inherited: list[Any] = []


def keep(conn: Any) -> None:
    """Keep a parent's connection to the end of the child: some drivers say goodbye for one that is collected, on its socket."""
    _inherited.append(conn)


def _after_fork() -> None:
    for subject in list(_subjects):
        subject.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
