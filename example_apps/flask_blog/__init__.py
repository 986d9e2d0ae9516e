"""A blog in Flask: posts, comments, an import that is stored as a whole or not at all, an export that streams.

Run it with ``flask --app example_apps.flask_blog run`` or ``gunicorn --threads 8 'example_apps.flask_blog:create_app()'``.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Any

from flask import Flask

from peewee_frameworks.flask import Peewee

from .commands import blog_commands
from .models import Comment, Post, db
from .views import blog

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flask import Request

orm = Peewee(
    db,
    create_tables=[Post, Comment],
    errors=True,
    exclude=["blog.health", "static"],
    transaction=lambda request: request.endpoint == "blog.import_posts",
)


def is_operator(request: Request) -> bool:
    """Let in who knows OPS_TOKEN: ``/db/?token=…`` shows what the pool does. Without such a variable, nobody."""
    token = os.environ.get("OPS_TOKEN", "")
    return token != "" and secrets.compare_digest(request.args.get("token", "").encode(), token.encode())


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Make the application; ``FLASK_…`` variables of the environment are its configuration, and `config` wins."""
    app = Flask(__name__)
    app.config.from_prefixed_env()
    app.config.from_mapping(config or {})
    orm.init_app(app)
    app.register_blueprint(blog)
    app.register_blueprint(orm.blueprint(url_prefix="/db", guard=is_operator))
    app.cli.add_command(blog_commands)
    return app
