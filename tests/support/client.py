"""A raw HTTP/1.1 client, for what well-behaved clients do not do: pipelining, half requests, drops, resets.

Every call ends within the client's deadline (seconds, default 15): TimeoutError.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType
    from typing import Self

Drop = Literal["rst", "fin"]
RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Request:
    """What to ask; `path` with its query."""

    path: str
    method: str = "GET"
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self, host: str) -> bytes:
        headers = {"Host": host, **self.headers}
        if self.body or self.method in {"POST", "PUT", "PATCH"}:
            headers.setdefault("Content-Length", str(len(self.body)))
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"{self.method} {self.path} HTTP/1.1\r\n{head}\r\n".encode() + self.body


@dataclass
class Response:
    """What came; header names in lower case, the last of equal ones wins."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    version: str = "HTTP/1.1"

    @property
    def keep_alive(self) -> bool:
        """Whether the server takes another request on this connection."""
        connection = self.headers.get("connection", "").lower()
        return connection == "keep-alive" if self.version == "HTTP/1.0" else connection != "close"

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One TCP connection to a web server.

    `request` and `get` do the usual. For the rest: `send` (or `send_bytes`, for parts) and then
    `read_response`, or `read_head` followed by `read_body` in pieces. `drop` ends the connection without
    manners.
    """

    def __init__(self, url: str, deadline: float = 15.0) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        self.host = parts.netloc
        self.deadline = deadline
        self._buffer = b""
        self._methods: list[str] = []
        self._left: int | None = 0  # of the body; None: until the server closes
        self._chunked = False
        self.sock = socket.create_connection((parts.hostname, parts.port or 80), deadline)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()

    # The usual

    def request(self, request: Request) -> Response:
        """Send one request and read its response."""
        self.send(request)
        return self.read_response()

    def get(self, path: str, **headers: str) -> Response:
        """GET one path; header names with underscores for dashes."""
        return self.request(Request(path, headers=_dashed(headers)))

    def post(self, path: str, body: bytes = b"", **headers: str) -> Response:
        """POST one body."""
        return self.request(Request(path, "POST", body, _dashed(headers)))

    def pipeline(self, requests: Iterable[Request]) -> list[Response]:
        """Send all requests in one go, before any response, then read the responses in order."""
        requests = list(requests)
        self.send(*requests)
        return [self.read_response() for _ in requests]

    # In parts

    def send(self, *requests: Request) -> None:
        """Send requests without reading anything."""
        self._methods += [request.method for request in requests]
        self.send_bytes(b"".join(request.encode(self.host) for request in requests))

    def send_part(self, request: Request, count: int) -> None:
        """Send the whole head and `count` bytes of the body; negative: leave off so much of the head."""
        data = request.encode(self.host)
        self._methods.append(request.method)
        self.send_bytes(data[: len(data) - len(request.body) + count])

    def send_bytes(self, data: bytes) -> None:
        """Send these bytes."""
        self.sock.settimeout(self.deadline)
        self.sock.sendall(data)

    def read_response(self) -> Response:
        """Read the next response to its end; informational ones (1xx) are passed over."""
        response = self.read_head()
        response.body = self.read_body()
        return response

    def read_head(self) -> Response:
        """Read status and headers of the next response; its body stays to be read."""
        end = time.monotonic() + self.deadline
        while True:
            head = self._until(b"\r\n\r\n", end).decode("latin-1")
            status_line, *lines = head.split("\r\n")
            version, status, *_ = status_line.split(" ", 2)
            pairs = (line.partition(":") for line in lines)
            headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
            response = Response(int(status), headers, version=version)
            if response.status >= 200 or response.status == 101:
                break
        method = self._methods.pop(0) if self._methods else "GET"
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self._left = int(headers["content-length"]) if "content-length" in headers else None
        if method == "HEAD" or response.status in {101, 204, 304}:
            self._chunked, self._left = False, 0
        elif self._chunked:
            self._left = 0
        return response

    def read_body(self, at_least: int | None = None) -> bytes:
        """Read the body: to its end, or until at least so many bytes have come (fewer only at the end)."""
        end = time.monotonic() + self.deadline
        body = bytearray()
        while at_least is None or len(body) < at_least:
            piece = self._piece(end)
            if not piece:
                break
            body += piece
        return bytes(body)

    def read_eof(self) -> bytes:
        """Read what still comes until the server closes the connection; a reset counts as closed."""
        end = time.monotonic() + self.deadline
        try:
            while self._receive(end):
                pass
        except ConnectionResetError:
            pass
        data, self._buffer = self._buffer, b""
        return data

    def drop(self, how: Drop = "rst") -> None:
        """Close the connection now, whatever is under way: by reset, or by an orderly FIN."""
        if how == "rst":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.sock.close()

    # Bytes

    def _receive(self, end: float) -> bool:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer within {self.deadline} s; so far {self._buffer[:200]!r}")
        self.sock.settimeout(left)
        data = self.sock.recv(65536)
        self._buffer += data
        return bool(data)

    def _need(self, end: float) -> None:
        if not self._receive(end):
            raise ConnectionError(f"the server closed the connection; unfinished: {self._buffer[:200]!r}")

    def _until(self, mark: bytes, end: float) -> bytes:
        while mark not in self._buffer:
            self._need(end)
        data, _, self._buffer = self._buffer.partition(mark)
        return data

    def _piece(self, end: float) -> bytes:
        """Give the next bytes of the body as they come, b"" at its end."""
        if self._chunked and not self._left:
            self._left = int(self._until(b"\r\n", end).partition(b";")[0], 16)
            if not self._left:
                while self._until(b"\r\n", end):  # trailers, then the empty line
                    pass
                self._chunked = False
        if self._left == 0:
            return b""
        if not self._buffer:
            if self._left is None:
                if not self._receive(end):
                    self._left = 0
                    return b""
            else:
                self._need(end)
        size = len(self._buffer) if self._left is None else self._left
        piece, self._buffer = self._buffer[:size], self._buffer[size:]
        if self._left is not None:
            self._left -= len(piece)
            if self._chunked and not self._left:
                while len(self._buffer) < 2:
                    self._need(end)
                self._buffer = self._buffer[2:]
        return piece


def _dashed(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}
