"""The blog's own tests: its API with Flask's test client, and the whole of it on a real server and each database."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.support.client import Request
from tests.support.databases import scratch
from tests.support.load import hammer, statuses
from tests.support.servers import KINDS, require_server
from tests.support.webservers import gunicorn

from . import create_app
from .models import Comment, Post, db

if TYPE_CHECKING:
    from pathlib import Path

POST = {"slug": "first", "title": "First", "body": "…"}


@pytest.fixture
def client(tmp_path: Path):
    """Give a client of the blog, on a database of its own."""
    db.init(str(tmp_path / "blog.db"))
    app = create_app({"TESTING": True})
    with app.app_context():
        db.create_tables([Post, Comment])
    yield app.test_client()
    assert db.pool.stats().used == 0
    db.close_all()


def test_posts_are_created_listed_and_shown(client):
    created = client.post("/posts", json=POST)
    assert (created.status_code, created.headers["Location"]) == (201, "/posts/first")
    assert [post["slug"] for post in client.get("/").json] == ["first"]
    comment = {"author": "Ada", "text": "Indeed."}
    assert client.post("/posts/first/comments", json=comment).status_code == 201
    assert client.get("/posts/first").json["comments"] == [comment]


def test_errors_are_answered_with_json(client):
    client.post("/posts", json=POST)
    assert client.post("/posts", json=POST).status_code == 409
    assert client.get("/posts/other").json == {"detail": "Not found."}
    assert client.post("/posts", json={"slug": "x"}).status_code == 422


def test_an_import_that_fails_half_way_stores_nothing(client):
    posts = [{**POST, "slug": f"post-{number}"} for number in range(3)]
    for failing in ({"slug": "no title"}, posts[0]):
        assert client.post("/import", json=[*posts, failing]).status_code in (422, 409)
        assert client.get("/posts").json == []
    assert client.post("/import", json=posts).json == {"stored": 3}


def test_the_export_holds_no_connection_between_two_pages(client):
    client.post("/import", json=[{**POST, "slug": f"post-{number}"} for number in range(250)])
    with client.get("/export") as response:
        pages = []
        for page in response.response:
            assert db.pool.stats().used == 0
            pages.append(page)
    assert len(pages) == 3
    assert [json.loads(line)["slug"] for line in b"".join(pages).splitlines()][-1] == "post-249"


def test_the_command_seeds(client):
    result = client.application.test_cli_runner().invoke(args=["blog", "seed", "--posts", "4"])
    assert result.output == "4 posts\n"
    assert len(client.get("/posts").json) == 4


def test_operators_see_what_the_pool_does(client, monkeypatch):
    assert client.get("/db/ready").json == {"status": "ok"}
    assert client.get("/db/").status_code == 403
    monkeypatch.setenv("OPS_TOKEN", "sesame")
    assert client.get("/db/?token=other").status_code == 403
    assert client.get("/db/?token=sesame").status_code == 200
    assert client.get("/db/status?token=sesame").json["pools"]["default"]["used"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_it_serves_a_mixed_load_on_a_real_server(kind, tmp_path):
    require_server(kind)
    with (
        scratch(kind, tmp_path) as place,
        gunicorn(
            "example_apps.flask_blog:create_app",
            factory=True,
            env={"DATABASE_URL": place.url},
            ready="/health",
        ) as process,
    ):
        requests = []
        for number in range(40):
            good = json.dumps({**POST, "slug": f"post-{number}"}).encode()
            half = json.dumps([{**POST, "slug": f"half-{number}"}, {}]).encode()
            for path, body in (("/posts", good), ("/import", half)):
                requests.append(Request(path, "POST", body, {"Content-Type": "application/json"}))
            requests += [Request("/posts"), Request("/export"), Request(f"/posts/none-{number}")]
        results = hammer(process.url, requests, concurrency=16)
        assert statuses(results) == {201: 40, 422: 40, 200: 80, 404: 40}, process.output[-3000:]
        with process.client() as client:
            slugs = [json.loads(line)["slug"] for line in client.get("/export").body.splitlines()]
        assert sorted(slugs) == sorted(f"post-{number}" for number in range(40))
        # A pool keeps its connections, and none is in a transaction.
        sessions = place.sessions()
        assert len(sessions) <= 10 * (3 if place.kind == "sqlite" else 1)
        assert not any(session.in_transaction for session in sessions)
