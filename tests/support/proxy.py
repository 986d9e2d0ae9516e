"""A TCP proxy in front of a database server that can do what networks do to connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tests.support.concurrency import eventually
from tests.support.ports import HOST, reserved_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

Mode = Literal["forward", "hang", "refuse"]
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with 0 seconds: close() sends RST
CALL_SECONDS = 5


@dataclass
class Counters:
    """What passed; read them after the client has its answer, then they are exact."""

    accepted: int = 0
    to_server: int = 0
    to_client: int = 0
    round_trips: int = 0  # how often the direction turned to "client to server"


@dataclass(eq=False)
class _Link:
    """One client's connection and the connection to the server that belongs to it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    client_spoke_last: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def reset(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None:
                sock = writer.get_extra_info("socket")
                with contextlib.suppress(OSError, AttributeError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                writer.transport.abort()


class Proxy:
    """Forward TCP from `address` to the target, in a thread and loop of its own; use it as a context manager.

    The methods may be called from any thread; each returns when what it says is the case. After `with` all
    sockets are closed and the thread has ended.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.counters = Counters()
        self._mode: Mode = "forward"
        self._delay = 0.0
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Task[None] | None = None
        # Not the policy's loop: uvloop transports do not hand out what reset() needs.
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._port = reserved_port()
        self.port = 0

    @property
    def address(self) -> tuple[str, int]:
        """Where clients connect."""
        return HOST, self.port

    @property
    def live(self) -> int:
        """How many clients are connected now."""
        return len(self._links)

    def __enter__(self) -> Self:
        self.port = self._port.__enter__()
        self._thread.start()
        self._call(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._call(self._shutdown)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CALL_SECONDS)
            self._port.__exit__(None, None, None)
        assert not self._thread.is_alive(), "the proxy's thread did not end"
        self._loop.close()

    # What a network does

    def refuse(self) -> None:
        """Refuse new connections, as a server that is down; live ones go on."""
        self._call(self._close_listener, "refuse")

    def hang(self) -> None:
        """Accept new connections and stay silent, without a connection to the server; live ones go on."""
        self._call(self._set_mode, "hang")

    def delay(self, seconds: float) -> None:
        """Keep every chunk for so long, in both directions, before it goes on; 0 to stop."""
        self._delay = seconds

    def cut(self) -> int:
        """Reset all live connections (RST to both sides) and give how many there were."""
        return int(self._call(self._reset_links))

    def deafen(self) -> int:
        """Forward nothing more on the live connections, but keep them open; give how many. New ones work."""
        return int(self._call(self._shut_gates))

    def restore(self) -> None:
        """Forward again: new connections, deafened ones (what they sent meanwhile arrives now), no delay.

        A connection that was accepted while the proxy hung stays silent; `cut()` gets rid of it.
        """
        self._delay = 0.0
        self._call(self._open_again)

    def wait_live(self, count: int, deadline: float = 5.0) -> None:
        """Wait until so many clients are connected."""
        eventually(lambda: self.live == count, deadline, f"{count} live connections, there are {self.live}")

    # In the loop's thread

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        async def run() -> Any:
            result = function(*args)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(CALL_SECONDS)

    def _listen(self) -> None:
        listener = socket.create_server((HOST, self.port), backlog=512)
        listener.setblocking(False)
        self._listener = self._loop.create_task(self._accept(listener))

    def _set_mode(self, mode: Mode) -> None:
        self._mode = mode

    async def _close_listener(self, mode: Mode) -> None:
        self._mode = mode
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
            self._listener = None

    def _open_again(self) -> None:
        self._mode = "forward"
        for link in self._links:
            link.gate.set()
        if self._listener is None:
            self._listen()

    def _reset_links(self) -> int:
        links = list(self._links)
        for link in links:
            link.reset()
        self._links.clear()
        return len(links)

    def _shut_gates(self) -> int:
        for link in self._links:
            link.gate.clear()
        return len(self._links)

    async def _shutdown(self) -> None:
        await self._close_listener("refuse")
        self._reset_links()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        # Not asyncio.start_server: in 3.11 it forgets a connection that comes while it is being closed.
        with listener:
            while True:
                client, _ = await self._loop.sock_accept(listener)
                self.counters.accepted += 1
                task = self._loop.create_task(self._serve(client))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=client)
        link = _Link(writer)
        link.gate.set()
        self._links.add(link)
        try:
            if self._mode == "hang":
                while await reader.read(65536):
                    pass
            else:
                await self._forward(link, reader)
        except (OSError, asyncio.CancelledError):
            link.reset()
        finally:
            self._links.discard(link)
            for side in (link.client, link.server):
                if side is not None:
                    side.close()
            # One turn, in which the transports close their sockets.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)

    async def _forward(self, link: _Link, client_reader: asyncio.StreamReader) -> None:
        server_reader, link.server = await asyncio.open_connection(*self.target)
        for writer in (link.client, link.server):
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        up = asyncio.ensure_future(self._pump(link, client_reader, link.server, from_client=True))
        down = asyncio.ensure_future(self._pump(link, server_reader, link.client, from_client=False))
        try:
            # Whichever side ends first, the other has nobody to talk to: no half-open connections here.
            done, _ = await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)

    async def _pump(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, from_client: bool
    ) -> None:
        counters = self.counters
        while data := await reader.read(65536):
            await link.gate.wait()
            if self._delay:
                await asyncio.sleep(self._delay)
            if from_client:
                counters.to_server += len(data)
                counters.round_trips += not link.client_spoke_last
            else:
                counters.to_client += len(data)
            link.client_spoke_last = from_client
            writer.write(data)
            await writer.drain()
        await link.gate.wait()
