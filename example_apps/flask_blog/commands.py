"""``flask blog …``: a command has an application context, and with it a scope of its own."""

from __future__ import annotations

import click
from flask.cli import AppGroup

from .models import Comment, Post, db

blog_commands = AppGroup("blog", help="Manage the blog.")


@blog_commands.command("seed")
@click.option("--posts", default=3, help="How many posts to write.")
def seed(posts: int) -> None:
    """Make the tables and write some posts."""
    db.create_tables([Post, Comment])
    with db.atomic():
        for number in range(1, posts + 1):
            Post.get_or_create(slug=f"post-{number}", defaults={"title": f"Post {number}", "body": "…"})
    click.echo(f"{Post.select().count()} posts")
