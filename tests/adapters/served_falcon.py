"""A Falcon application with the framework-free WSGI middleware around it."""

from __future__ import annotations

import os

import falcon

from peewee_frameworks.http import HANDLED, problem_for
from peewee_frameworks.wsgi import PeeweeMiddleware
from tests.adapters.contract.apps.work import Work


class Routes:
    def __init__(self, work: Work) -> None:
        self.work = work

    def on_get(self, request, response, kind, rid):
        getattr(self, kind)(response, rid)

    def ok(self, response, rid):
        response.text = self.work.value(rid)

    def error(self, response, rid):
        self.work.value(rid)
        raise RuntimeError("asked for")

    def missing(self, response, rid):
        self.work.value(rid)
        raise falcon.HTTPNotFound

    def lost(self, response, rid):
        self.work.missing(rid)

    def stream(self, response, rid):
        response.stream = (self.work.value(rid).encode() for _ in range(3))

    def atomic(self, response, rid):
        self.work.write(rid)
        response.status = falcon.HTTP_409

    def on_get_stats(self, request, response):
        stats = self.work.stats()
        response.media = stats | {"count": self.work.Item.select().count()}


def answer(request, response, error, params):
    problem = problem_for(error)
    if problem is None:
        raise error
    response.status = problem.status
    response.data = problem.body
    response.set_headers(problem.headers)


def make_app():
    work = Work(os.environ["DATABASE_URL"])
    with work.db:
        work.db.create_tables([work.Item, work.Part])
    app = falcon.App()
    app.add_error_handler(HANDLED, answer)
    routes = Routes(work)
    app.add_route("/{kind}/{rid}", routes)
    app.add_route("/stats", routes, suffix="stats")
    return PeeweeMiddleware(app, work.db, transaction=lambda environ: environ["PATH_INFO"].startswith("/atomic"))
