"""``python -m peewee_frameworks``: see `peewee_frameworks.cli`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
