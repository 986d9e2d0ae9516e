"""Votes: a vote is counted in a transaction, and the results of several polls are asked for at the same time."""

from __future__ import annotations

import os

from flask import Flask, request
from gevent.pool import Pool
from peewee import CharField, IntegerField

from peewee_frameworks import connection_scope
from peewee_frameworks.flask import Peewee
from peewee_frameworks.gevent import diagnose
from peewee_frameworks.pool import connect

# SQLite for a first look; it is a library and stops all greenlets while it works. DATABASE_URL=mysql://… for the real thing.
db = connect(os.environ.get("DATABASE_URL", "sqlite:///votes.db"), max_connections=10, timeout=5)


class Choice(db.Model):
    """One answer of a poll, and how many chose it."""

    poll = CharField(40)
    name = CharField(40)
    votes = IntegerField(default=0)

    class Meta:
        """A name once in each poll."""

        indexes = ((("poll", "name"), True),)


orm = Peewee(db, errors=True, create_tables=[Choice])


def create_app() -> Flask:
    """Make the application."""
    app = Flask(__name__)
    orm.init_app(app)

    @app.post("/polls/<poll>/<name>")
    def vote(poll: str, name: str) -> dict:
        with db.atomic():
            chosen = Choice.update(votes=Choice.votes + 1).where(Choice.poll == poll, Choice.name == name)
            if not chosen.execute():
                Choice.create(poll=poll, name=name, votes=1)
        return results(poll)

    @app.get("/polls")
    def polls() -> dict:
        """Each poll in a greenlet of its own: it starts outside the request's scope, so it opens one."""
        names = request.args.getlist("poll")
        return dict(zip(names, Pool(4).imap(connection_scope(db)(results), names), strict=True))

    @app.get("/health")
    def health() -> dict:
        return {"gevent": [finding.code for finding in diagnose(db)]}

    return app


def results(poll: str) -> dict:
    """Return the votes for each answer."""
    return {choice.name: choice.votes for choice in Choice.select().where(Choice.poll == poll).order_by(Choice.name)}
