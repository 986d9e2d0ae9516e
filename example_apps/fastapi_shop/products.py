"""Products. Endpoints await their queries: on a thread with a sync driver, on the loop with an asynchronous one."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from .dependencies import Connection
from .models import Product

products = APIRouter(prefix="/products", tags=["products"])


class NewProduct(BaseModel):
    """What a product is."""

    model_config = ConfigDict(from_attributes=True)

    name: str = Field(min_length=1, max_length=80)
    price: int = Field(ge=0, description="cents")
    stock: int = Field(ge=0)


class StoredProduct(NewProduct):
    """… and its number."""

    id: int


@products.get("", response_model=list[StoredProduct])
async def list_products(db: Connection, after: int = 0, limit: int = 50) -> Any:
    """List products by number."""
    return await db.list(Product.select().where(Product.id > after).order_by(Product.id).limit(limit))


@products.get("/{number}", response_model=StoredProduct)
async def show_product(_: Connection, number: int) -> Any:
    """Show a product; 404 comes from Peewee's own DoesNotExist."""
    return await Product.aget_by_id(number)


@products.post("", response_model=StoredProduct, status_code=201)
async def add_product(_: Connection, product: NewProduct) -> Any:
    """Add a product; a name that is taken is a 409, from Peewee's own IntegrityError."""
    return await Product.acreate(**product.model_dump())
