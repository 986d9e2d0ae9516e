"""Serve one of the example applications, to look around: ``make serve APP=flask_blog``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

ADDRESS = ("127.0.0.1", "8000")
COMMANDS = {
    "flask_blog": ["gunicorn", "--threads", "8", "--bind", ":".join(ADDRESS), "example_apps.flask_blog:create_app()"],
    "flask_gevent": ["gunicorn", "-k", "gevent", "--bind", ":".join(ADDRESS), "example_apps.flask_gevent.wsgi:app"],
    "sanic_feed": [
        "sanic",
        "example_apps.sanic_feed:create_app",
        "--factory",
        "--host",
        ADDRESS[0],
        "--port",
        ADDRESS[1],
    ],
    "fastapi_shop": ["uvicorn", "--factory", "example_apps.fastapi_shop:create_app", "--port", ADDRESS[1]],
    "starlette_chat": ["uvicorn", "--factory", "example_apps.starlette_chat:create_app", "--port", ADDRESS[1]],
}


def main() -> int:
    """Run the server until it is interrupted."""
    parser = argparse.ArgumentParser(prog="make serve APP=…", description=__doc__)
    parser.add_argument("app", choices=COMMANDS)
    app = parser.parse_args().app
    url, token = f"http://{':'.join(ADDRESS)}", os.environ.setdefault("OPS_TOKEN", "look-around")
    print(f"{url} serves {app}; Ctrl-C ends it.", flush=True)
    if app != "flask_gevent":
        print(f"{url}/db/?token={token} shows what its pool does.", flush=True)
    try:
        return subprocess.call([sys.executable, "-m", *COMMANDS[app]])
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
