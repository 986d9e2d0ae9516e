"""The example applications, as they are, with a recorder beside them: what the demo's servers serve."""

from __future__ import annotations

from typing import Any

from . import recorder


def flask_blog() -> Any:
    """Make the blog."""
    from example_apps.flask_blog import create_app
    from example_apps.flask_blog.models import db

    app = create_app()
    app.wsgi_app = recorder.wsgi(app.wsgi_app, recorder.Recorder(db))  # type: ignore[method-assign]
    return app


def sanic_feed() -> Any:
    """Make the feed."""
    from sanic import HTTPResponse

    from example_apps.sanic_feed import create_app
    from example_apps.sanic_feed.models import db

    app, watching = create_app(), recorder.Recorder(db)

    @app.get(recorder.PATH)
    async def report(_: Any) -> Any:
        return HTTPResponse(watching.report(), content_type="application/json")

    return app


def fastapi_shop() -> Any:
    """Make the shop."""
    from example_apps.fastapi_shop import create_app
    from example_apps.fastapi_shop.models import db

    return recorder.asgi(create_app(), recorder.Recorder(db))


def starlette_chat() -> Any:
    """Make the chat."""
    from example_apps.starlette_chat import create_app
    from example_apps.starlette_chat.models import db

    return recorder.asgi(create_app(), recorder.Recorder(db))
