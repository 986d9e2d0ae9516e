"""The shop's own tests: its API with FastAPI's test client, and the whole of it on a real server and each database."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient

from tests.support.client import Request
from tests.support.concurrency import eventually
from tests.support.databases import scratch
from tests.support.load import hammer, statuses
from tests.support.servers import KINDS, require_server
from tests.support.webservers import uvicorn

from . import create_app
from .models import db


@pytest.fixture
def client(tmp_path):
    """Give a client of the shop, on a database of its own."""
    db.init(str(tmp_path / "shop.db"))
    with TestClient(create_app()) as client:
        yield client
        eventually(lambda: db.pool.stats().used == 0)


def add(client, name="tea", stock=3, price=250):
    return client.post("/products", json={"name": name, "price": price, "stock": stock})


def test_products_are_added_listed_and_shown(client):
    added = add(client)
    assert added.status_code == 201
    number = added.json()["id"]
    assert client.get(f"/products/{number}").json() == {"id": number, "name": "tea", "price": 250, "stock": 3}
    assert [product["name"] for product in client.get("/products").json()] == ["tea"]
    assert add(client).status_code == 409
    assert client.get("/products/999").status_code == 404


def test_an_order_that_fails_half_way_changes_nothing(client):
    tea, milk = add(client).json()["id"], add(client, "milk", stock=1, price=100).json()["id"]

    def order(*items):
        items = [{"product": product, "quantity": quantity} for product, quantity in items]
        return client.post("/orders", json={"customer": "Ada", "items": items})

    assert order((tea, 2), (milk, 2)).json() == {"detail": "Only 1 of milk left."}
    assert order((tea, 2), (999, 1)).status_code == 404
    assert client.get(f"/products/{tea}").json()["stock"] == 3
    placed = order((tea, 2), (milk, 1))
    assert (placed.status_code, placed.json()["total"]) == (201, 600)
    number = placed.json()["id"]
    assert client.get(f"/orders/{number}").json() == {"id": number, "customer": "Ada", "total": 600}
    assert client.get(f"/products/{tea}").json()["stock"] == 1
    assert client.get("/orders/999").status_code == 404


def test_the_error_responses_are_documented(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"201", "404", "409", "422", "503"} == set(paths["/orders"]["post"]["responses"])
    assert {"200", "404", "422", "503"} == set(paths["/products/{number}"]["get"]["responses"])


def test_operators_see_what_the_pool_does(client, monkeypatch):
    assert client.get("/db/ready").json() == {"status": "ok"}
    assert client.get("/db/").status_code == 403
    monkeypatch.setenv("OPS_TOKEN", "sesame")
    assert client.get("/db/?token=other").status_code == 403
    assert client.get("/db/?token=sesame").status_code == 200
    assert client.get("/db/status?token=sesame").json()["pools"]["default"]["used"] == 0


@pytest.fixture(params=[*KINDS, "postgres-async"])
def address(request, tmp_path):
    """Give a place on each database, and its URL: with the sync driver, and with psycopg's asynchronous one."""
    kind, _, driver = request.param.partition("-")
    require_server(kind)
    with scratch(kind, tmp_path) as place:
        yield place, place.async_url("psycopg") if driver else place.url


def test_many_customers_buy_the_last_pieces(address):
    """40 at once want one of 15 pieces and one of plenty: 15 get both, 25 neither."""
    place, url = address

    def body(entry):
        return {"body": json.dumps(entry).encode(), "headers": {"Content-Type": "application/json"}}

    app = "example_apps.fastapi_shop:create_app"
    with uvicorn(app, factory=True, env={"DATABASE_URL": url}) as server:
        with server.client() as client:
            rare, plenty = (
                client.request(Request("/products", "POST", **body({"name": name, "price": 1, "stock": stock}))).json()[
                    "id"
                ]
                for name, stock in (("rare", 15), ("plenty", 1000))
            )
        # Plenty first, if it has the lower number: what fails, fails half way.
        order = {"customer": "Bob", "items": [{"product": number, "quantity": 1} for number in (plenty, rare)]}
        results = hammer(server.url, [Request("/orders", "POST", **body(order))] * 40, concurrency=20)
        assert statuses(results) == {201: 15, 409: 25}
        with server.client() as client:
            assert client.get(f"/products/{rare}").json()["stock"] == 0
            assert client.get(f"/products/{plenty}").json()["stock"] == 985
    assert not place.sessions()
