"""What the demo asks each application: mostly what works, some of what fails, streams, and clients that go away."""

from __future__ import annotations

import json
from typing import Any

from tests.support.client import Request

from .load import Step


def get(path: str, *expected: int, drops: bool = False) -> Step:
    """Make a step that reads."""
    return Step(Request(path), expected or (200,), drops)


def post(path: str, entry: Any, *expected: int) -> Step:
    """Make a step that writes."""
    body = json.dumps(entry).encode()
    return Step(Request(path, "POST", body, {"Content-Type": "application/json"}), expected or (201,))


def article(number: int) -> dict[str, str]:
    """Make a post of the blog."""
    return {"slug": f"post-{number}", "title": f"Post {number}", "body": "…"}


FLASK_BLOG = [
    lambda n: post("/posts", article(n)),
    lambda _: get("/posts"),
    lambda n: post("/import", [article(100_000 + n), {"slug": "and no more"}], 422),
    lambda n: get(f"/posts/none-{n}", 404),
    lambda _: get("/export"),
    lambda _: get("/export", drops=True),
    lambda _: post("/posts", article(-1), 201, 409),
    lambda _: get("/posts"),
    lambda _: get("/health"),
    lambda _: get("/nowhere", 404),
]

SANIC_FEED = [
    lambda n: post("/posts/", {"name": f"author-{n % 7}", "text": f"Post {n}"}),
    lambda _: get("/posts/"),
    lambda n: post("/posts/import", [{"name": f"author-{n}", "text": "half"}, {"name": "and no more"}], 400),
    lambda _: post("/posts/999999/like", {"name": "ada"}, 404),
    lambda _: get("/posts/export"),
    lambda _: get("/posts/export", drops=True),
    lambda n: post("/posts/1/like", {"name": f"reader-{n}"}, 200, 404),
    lambda _: get("/posts/"),
    lambda _: get("/live/events", drops=True),
    lambda _: get("/nowhere", 404),
]


def order(customer: str, *items: tuple[int, int]) -> dict[str, Any]:
    """Make an order of the shop."""
    return {"customer": customer, "items": [{"product": product, "quantity": quantity} for product, quantity in items]}


# The first products may still be on their way when the first orders come: hence 404 beside what is usual.
FASTAPI_SHOP = [
    lambda n: post("/products", {"name": f"Product {n}", "price": 100, "stock": 5}),
    lambda _: get("/products"),
    lambda n: post("/orders", order(f"customer-{n}", (1, 1), (2, 1)), 201, 404, 409),
    lambda n: post("/orders", order(f"customer-{n}", (1, 1), (2, 1_000_000)), 404, 409),
    lambda _: get("/products/1", 200, 404),
    lambda _: get("/products", drops=True),
    lambda _: post("/products", {"name": "Product again", "price": 100, "stock": 5}, 201, 409),
    lambda _: get("/orders/1", 200, 404),
    lambda n: post("/orders", {"customer": f"customer-{n}", "items": []}, 422),
    lambda _: get("/nowhere", 404),
]

STARLETTE_CHAT = [
    lambda n: post("/rooms", {"name": f"room-{n}"}),
    lambda _: get("/rooms"),
    lambda n: post("/rooms/room-0/messages", {"author": f"author-{n}", "text": "Hello"}, 201, 404),
    lambda _: get("/rooms/room-0/messages", 200, 404),
    lambda n: post("/rooms/nowhere/messages", {"author": f"author-{n}", "text": "Hello"}, 404),
    lambda _: get("/rooms/room-0/events", drops=True),
    lambda _: post("/rooms", {"name": "again"}, 201, 409),
    lambda _: get("/rooms"),
    lambda _: post("/rooms", {}, 400),
    lambda _: get("/nowhere", 404),
]
