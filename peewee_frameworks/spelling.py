"""What somebody who misspelled an option has meant."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_ALIKE = 0.85  # of difflib's ratio: drivers have options of their own that are a little like ours


def nearly(name: str, names: Iterable[str]) -> str | None:
    """Return the one of these names that is all but `name`, if there is one."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=_ALIKE)
    return close[0] if close else None
