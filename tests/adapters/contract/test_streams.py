"""Streams: idle ones hold nothing, a query in one works, a dropped one harms nobody."""

from __future__ import annotations

import pytest

from tests.adapters.contract.served import Served, rid


def idle_then_go_on(served: Served, path: str, one: str, line: str) -> None:
    with served.client() as client:
        client.send_bytes(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert client.read_head().status == 200
        first = client.read_body(len(line))
        served.reached(one)
        served.holds_nothing()
        served.expect_right("/ok", 10)
        served.holds_nothing()  # a query on the event loop is refused where it would have to wait (WouldBlock)
        served.open(one)
        assert (first + client.read_body()).decode() == line * 2


@pytest.mark.core
def test_a_sync_stream_idles_without_a_connection(served: Served):
    one = rid()
    idle_then_go_on(served, f"/stream/plain/{one}", one, f"{one}\n")


@pytest.mark.core
def test_an_async_stream_idles_without_a_connection(served: Served):
    one = rid()
    idle_then_go_on(served, f"/astream/plain/{one}", one, f"{one}\n")


def test_server_sent_events_idle_without_a_connection(served: Served):
    one = rid()
    idle_then_go_on(served, f"/events/{one}", one, f"data: {one}\n\n")


def test_flasks_stream_with_context(served: Served):
    """Its teardowns run twice."""
    one = rid()
    idle_then_go_on(served, f"/stream/plain/{one}?context=1", one, f"{one}\n")


def test_100_idle_streams_hold_nothing(served: Served):
    route = "/events" if served.is_sanic else "/astream/plain"
    ids = [rid() for _ in range(100)]
    clients = [served.start(f"{route}/{one}") for one in ids]
    try:
        for one, client in zip(ids, clients, strict=True):
            assert client.read_head().status == 200
            assert one in client.read_body(len(one)).decode()
        served.holds_nothing()
        served.expect_right("/ok", 40)
        for one in ids:
            served.open(one)
        for one, client in zip(ids, clients, strict=True):
            assert one in client.read_body().decode()
    finally:
        for client in clients:
            client.drop("fin")


def drop_mid_stream(served: Served, path: str, one: str, how) -> None:
    client = served.start(path)
    assert client.read_head().status == 200
    assert client.read_body(len(one)).decode().startswith(one)
    served.reached(one)
    client.drop(how)
    served.expect_right("/ok", 10)
    served.open(one)
    served.expect_right("/ok", 40)
    served.settle()
    served.expect_right("/ok", 10)


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize("kind", ["endless", "with", "context", "atomic"])
def test_a_sync_generator_dropped_mid_stream_touches_nobody(served: Served, kind, how):
    """It may be finalised whenever the garbage collector finds it, in whatever context runs then."""
    one = rid()
    drop_mid_stream(served, f"/stream/{kind}/{one}", one, how)
    assert served.count(one) == 0


@pytest.mark.parametrize("how", ["rst", "fin"])
def test_an_async_generator_dropped_mid_stream(served: Served, how):
    one = rid()
    drop_mid_stream(served, f"/astream/endless/{one}", one, how)


def test_a_stream_inside_a_transaction_keeps_its_connection(served: Served):
    """And is undisturbed by others."""
    one = rid()
    with served.client() as client:
        client.send_bytes(f"GET /stream/atomic/{one} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert client.read_head().status == 200
        client.read_body(len(one))
        served.reached(one)
        assert served.in_use == 1
        served.expect_right("/ok", 20)
        served.open(one)
        assert client.read_body(len(one)).decode().startswith(("\n", one))
