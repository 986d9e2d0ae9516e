"""A shop in FastAPI: products, and orders that are stored as a whole or not at all.

Run it with ``uvicorn --factory example_apps.fastapi_shop:create_app`` and look at ``/docs``; with
``DATABASE_URL=postgresql+async://postgres@127.0.0.1/test`` on an asynchronous driver.
"""

from __future__ import annotations

from fastapi import Depends, FastAPI

from .dependencies import operator
from .models import orm
from .orders import orders
from .products import products


def create_app() -> FastAPI:
    """Make the application."""
    app = FastAPI(title="Shop", lifespan=orm.lifespan())
    orm.init_app(app)
    app.include_router(products)
    app.include_router(orders)
    app.include_router(orm.router(prefix="/db", guard=Depends(operator)))
    return app
