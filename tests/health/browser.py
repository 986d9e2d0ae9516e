"""A real browser for the tests: the system's Chromium, headless."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.servers import REQUIRE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str:
    """Give the path of Chromium; skips where there is none, or fails where there should be."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    reason = f"no Chromium for the status page's tests (looked for {', '.join(NAMES)})"
    if os.environ.get(REQUIRE) == "1" and os.geteuid() == 0 and shutil.which("apt-get"):
        pytest.fail(f"{reason}; apt-get install chromium ({REQUIRE}=1)", pytrace=False)
    pytest.skip(reason)


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """Give a browser context with a profile of its own."""
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile), headless=True, executable_path=path, args=list(FLAGS)
        )
        try:
            yield context
        finally:
            context.close()
