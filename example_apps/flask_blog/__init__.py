"""A blog in Flask: posts, comments, an import that is stored as a whole or not at all, an export that streams.

Run it with ``flask --app example_apps.flask_blog run`` or ``gunicorn --threads 8 'example_apps.flask_blog:create_app()'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Flask

from peewee_frameworks.flask import Peewee

from .commands import blog_commands
from .models import Comment, Post, db
from .views import blog

if TYPE_CHECKING:
    from collections.abc import Mapping

orm = Peewee(
    db,
    create_tables=[Post, Comment],
    errors=True,
    exclude=["blog.health", "static"],
    transaction=lambda request: request.endpoint == "blog.import_posts",
)


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Make the application; ``FLASK_…`` variables of the environment are its configuration, and `config` wins."""
    app = Flask(__name__)
    app.config.from_prefixed_env()
    app.config.from_mapping(config or {})
    orm.init_app(app)
    app.register_blueprint(blog)
    app.cli.add_command(blog_commands)
    return app
