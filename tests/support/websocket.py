"""A websocket client without threads, which can also leave without a word.

It is sans-I/O `websockets` over one blocking socket, so 200 of them are 200 sockets and nothing else.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import TYPE_CHECKING

from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.http11 import Response
from websockets.uri import parse_uri

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from websockets.frames import Frame

RESET = struct.pack("ii", 1, 0)
MESSAGES = {Opcode.TEXT, Opcode.BINARY}


class WebSocket:
    """One open websocket; the constructor does the handshake. Every call ends within `deadline` seconds."""

    def __init__(self, url: str, deadline: float = 15.0) -> None:
        uri = parse_uri(url.replace("http://", "ws://", 1))
        self.deadline = deadline
        self.close_code: int | None = None
        self._protocol = ClientProtocol(uri)
        self._events: list[object] = []
        self.sock = socket.create_connection((uri.host, uri.port), deadline)
        try:
            self._protocol.send_request(self._protocol.connect())
            self._flush()
            self._next(lambda event: isinstance(event, Response))
            if self._protocol.handshake_exc is not None:
                raise self._protocol.handshake_exc
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        self.sock.close()

    def send(self, message: str | bytes) -> None:
        """Send one message."""
        if isinstance(message, str):
            self._protocol.send_text(message.encode())
        else:
            self._protocol.send_binary(message)
        self._flush()

    def receive(self) -> str | bytes:
        """Give the next message; ConnectionError if the server closes instead (see `close_code`)."""
        frame: Frame = self._next(lambda event: getattr(event, "opcode", None) in MESSAGES)
        assert frame.fin, "fragmented messages are not supported here"
        return bytes(frame.data).decode() if frame.opcode is Opcode.TEXT else bytes(frame.data)

    def echo(self, message: str) -> str | bytes:
        """Send a message and give the next one that comes."""
        self.send(message)
        return self.receive()

    def close(self, code: int = 1000) -> int | None:
        """Close with a handshake and give the code the server closed with; harmless if closed already."""
        if self.sock.fileno() == -1:
            return self.close_code
        try:
            if self.close_code is None:
                self._protocol.send_close(code)
                self._flush()
                self._next(lambda _: False)
        except ConnectionError:
            pass
        finally:
            self.sock.close()
        return self.close_code

    def abort(self, how: str = "rst") -> None:
        """Leave without a close frame: by reset ("rst") or by FIN ("fin")."""
        if how == "rst":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.sock.close()

    def _flush(self) -> None:
        self.sock.settimeout(self.deadline)
        for data in self._protocol.data_to_send():
            if data:
                self.sock.sendall(data)

    def _next(self, wanted: Callable[[object], bool]) -> object:
        end = time.monotonic() + self.deadline
        while True:
            while self._events:
                event = self._events.pop(0)
                if wanted(event):
                    return event
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no websocket message within {self.deadline} s")
            self.sock.settimeout(left)
            if data := self.sock.recv(65536):
                self._protocol.receive_data(data)
            else:
                self._protocol.receive_eof()
            self._events += self._protocol.events_received()
            self._flush()  # pongs, and the answer to a close frame
            if self._protocol.close_rcvd is not None:
                self.close_code = self._protocol.close_rcvd.code
            if not self._events and (not data or self.close_code is not None):
                raise ConnectionError(f"the server closed the websocket, code {self.close_code}")
