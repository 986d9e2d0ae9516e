"""The proxy does to a connection what it says."""

from __future__ import annotations

import socket
import socketserver
import threading
from typing import TYPE_CHECKING

import pytest

from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        try:
            while data := self.request.recv(65536):
                self.request.sendall(data)
        except ConnectionResetError:
            pass


class EchoServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with EchoServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            with Proxy(server.server_address) as proxy:  # type: ignore[arg-type]
                yield proxy
        finally:
            server.shutdown()
            thread.join(5)


def dial(proxy: Proxy, timeout: float = 5) -> socket.socket:
    return socket.create_connection(proxy.address, timeout)


def ask(sock: socket.socket, data: bytes = b"ping") -> bytes:
    sock.sendall(data)
    return sock.recv(100)


def test_it_forwards_and_counts(proxy):
    with dial(proxy) as one, dial(proxy) as two:
        for sock in (one, two, one):
            assert ask(sock) == b"ping"
        assert proxy.live == 2
        counters = proxy.counters
        assert (counters.accepted, counters.round_trips) == (2, 3)
        assert (counters.to_server, counters.to_client) == (12, 12)
    proxy.wait_live(0)


def test_refused_connections_work_again_after_restore(proxy):
    with dial(proxy) as live:
        ask(live)
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            dial(proxy)
        assert ask(live) == b"ping"
        proxy.restore()
        with dial(proxy) as new:
            assert ask(new) == b"ping"


def test_a_hanging_proxy_accepts_and_says_nothing(proxy):
    proxy.hang()
    with dial(proxy, 0.1) as sock, pytest.raises(TimeoutError):
        ask(sock)


def test_a_cut_resets_live_connections_and_new_ones_work(proxy):
    with dial(proxy) as sock, dial(proxy) as new:
        ask(sock)
        ask(new)
        assert proxy.cut() == 2
        assert proxy.live == 0
        with pytest.raises(ConnectionResetError):
            ask(sock)
    with dial(proxy) as new:
        assert ask(new) == b"ping"


def test_a_deaf_connection_stays_open_and_gets_its_answer_after_restore(proxy):
    with dial(proxy, 0.1) as deaf:
        ask(deaf)
        assert proxy.deafen() == 1
        with pytest.raises(TimeoutError):
            ask(deaf, b"late")
        with dial(proxy) as new:
            assert ask(new) == b"ping"
        proxy.restore()
        deaf.settimeout(5)
        assert deaf.recv(100) == b"late"


def test_a_delay_holds_each_direction(proxy):
    with dial(proxy, 5) as sock:
        ask(sock)
        proxy.delay(0.2)
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            ask(sock)
        sock.settimeout(5)
        assert sock.recv(100) == b"ping"
