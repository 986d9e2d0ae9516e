"""What somebody who misspelled an option has meant."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

DISTANTLY = 0.6
_ALIKE = 0.85  # of difflib's ratio: drivers have options of their own that are a little like ours


def nearly(name: str, names: Iterable[str], alike: float = _ALIKE) -> str | None:
    """Return the one of these names that is all but `name`, if there is one.

    Args:
        name: what was written.
        names: what there is.
        alike: from which of difflib's ratios on; a lower one where `name` is an error anyhow.
    """
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=alike)
    return close[0] if close else None
