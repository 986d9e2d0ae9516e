"""Orders: several statements that hold together."""

from typing import Any

from fastapi import APIRouter, BackgroundTasks, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from .dependencies import Atomic, Connection
from .models import Line, Order, Product, orm

orders = APIRouter(prefix="/orders", tags=["orders"])


class Item(BaseModel):
    """So much of a product."""

    product: int
    quantity: int = Field(ge=1)


class NewOrder(BaseModel):
    """What somebody wants."""

    customer: str = Field(min_length=1, max_length=80)
    items: list[Item] = Field(min_length=1)


class StoredOrder(BaseModel):
    """What somebody bought."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    customer: str
    total: int = Field(description="cents")


@orders.post("", response_model=StoredOrder, status_code=201)
async def place_order(db: Atomic, wanted: NewOrder, tasks: BackgroundTasks) -> Any:
    """Place an order. If the third product is sold out, nothing of the first two has happened."""
    order = await db.run(store, wanted)
    tasks.add_task(confirm, order.id)
    return order


def store(wanted: NewOrder) -> Order:
    """Store an order: ordinary Peewee code, in the request's transaction."""
    order = Order.create(customer=wanted.customer)
    for item in sorted(wanted.items, key=lambda item: item.product):  # two orders lock products in the same order
        taken = Product.update(stock=Product.stock - item.quantity).where(
            Product.id == item.product, Product.stock >= item.quantity
        )
        if not taken.execute():
            product = Product.get_by_id(item.product)
            raise HTTPException(409, f"Only {product.stock} of {product.name} left.")
        price = Product.get_by_id(item.product).price
        Line.create(order=order, product=item.product, quantity=item.quantity, price=price)
        order.total += price * item.quantity
    order.save()
    return order


@orders.get("/{number}", response_model=StoredOrder)
async def show_order(_: Connection, number: int) -> Any:
    """Show an order; the query is awaited, and waits for its connection without blocking."""
    return await Order.aget_by_id(number)


async def confirm(number: int) -> None:
    """Tell the customer. A background task queries in the scope of its request, on a connection taken anew."""
    order = await Order.aget_by_id(number)
    count = await orm.database.count(order.lines)
    print(f"To {order.customer}: your order {order.id} of {count} products is on its way.")
