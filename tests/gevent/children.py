"""Python processes of their own: what gevent patches, and in which order, can be tried once per process only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.drivers import environment

HERE = Path(__file__).resolve().parent
FROZEN = {"frozen": True}


def run_child(script: str, *arguments: str, deadline: float, **variables: str) -> dict[str, Any]:
    """Run a script of this directory and return the JSON object it prints last, or FROZEN if the deadline passes."""
    command = [sys.executable, str(HERE / script), *arguments]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment(), **variables},
            capture_output=True,
            text=True,
            timeout=deadline,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return FROZEN
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}"
    result: dict[str, Any] = json.loads(lines[-1])
    result["stderr"] = done.stderr
    return result
