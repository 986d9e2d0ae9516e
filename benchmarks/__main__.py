"""``python -m benchmarks [--only NAME] [--repeats N]``."""

from __future__ import annotations

import sys

from .harness import main

sys.exit(main(sys.argv[1:]))
