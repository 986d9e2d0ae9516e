"""Websockets: one scope a message; an idle one holds nothing."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.adapters.contract.served import Served, rid
from tests.support.websocket import WebSocket


def talk(served: Served, kind: str, one: str) -> WebSocket:
    return WebSocket(f"{served.process.url}/ws/{kind}/{one}")


@pytest.mark.core
@pytest.mark.parametrize("kind", ["scoped", "plain"])
def test_echo(served: Served, kind):
    one = rid()
    with talk(served, kind, one) as socket:
        for number in range(1, 6):
            scope = f"message {number}" if kind == "scoped" else f"websocket /ws/plain/{one}"
            if served.is_sanic and kind == "plain":
                scope = f"request GET /ws/plain/{one}"
            assert socket.echo(f"{one}.{number}") == f"{one}.{number} in {scope}"
            served.holds_nothing()


@pytest.mark.parametrize("kind", ["scoped", "plain"])
@pytest.mark.parametrize("message", ["error", "atomic"])
def test_an_error_ends_the_websocket_and_nothing_else(served: Served, kind, message):
    one = rid()
    socket = talk(served, kind, one)
    socket.echo("hello")
    with pytest.raises(ConnectionError):
        socket.echo(message)
    socket.abort()
    served.settle()
    assert served.count(one) == 0
    served.expect_right("/ok", 10)


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize("kind", ["scoped", "plain"])
def test_abort(served: Served, kind, how):
    """Idle, and with a message under way."""
    for under_way in (False, True):
        sockets = [talk(served, kind, rid()) for _ in range(5)]
        for socket in sockets:
            socket.echo("hello")
            if under_way:
                socket.send("more")
            socket.abort(how)
        served.settle()
    served.expect_right("/ok", 10)


def test_200_idle_websockets_hold_nothing(served: Served):
    with ExitStack() as stack:
        sockets = [stack.enter_context(talk(served, "scoped" if n % 2 else "plain", rid())) for n in range(200)]
        for number, socket in enumerate(sockets):
            assert str(socket.echo(f"m{number}")).startswith(f"m{number} in ")
        served.holds_nothing()
        served.expect_right("/ok", 20)
        assert str(sockets[-1].echo("again")).startswith("again in ")
