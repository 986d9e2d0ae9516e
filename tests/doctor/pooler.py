"""A pooler in transaction mode before PostgreSQL, as far as tests need one: logins without a password, no TLS.

pgbouncer is not everywhere. This does what makes the difference: a client keeps its connection, and gets one of the server's,
the one used last, from its first message until the server is outside a transaction and has nothing more to say.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
import threading
from typing import TYPE_CHECKING, Self

from tests.support.ports import HOST, reserved_port

if TYPE_CHECKING:
    from types import TracebackType

_TLS, _GSS, _CANCEL = 80877103, 80877104, 80877102
_AUTHENTICATED = b"R" + struct.pack(">II", 8, 0)
_IDLE = b"Z" + struct.pack(">I", 5) + b"I"
_ASKS = b"QS"  # messages that the server answers with ReadyForQuery


async def _message(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(5)
    (size,) = struct.unpack(">I", head[1:])
    return head + await reader.readexactly(size - 4)


class _Backend:
    """One connection of the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.parameters = b""

    @classmethod
    async def open(cls, address: tuple[str, int], login: bytes) -> Self:
        backend = cls(*await asyncio.open_connection(*address))
        backend.writer.write(struct.pack(">II", len(login) + 8, 196608) + login)
        while not (message := await _message(backend.reader)).startswith(b"Z"):
            assert not message.startswith(b"E"), message
            if message.startswith(b"S"):
                backend.parameters += message
        return backend


class TransactionPooler:
    """Listen at `address`; a context manager, with a thread and a loop of its own."""

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self._idle: list[_Backend] = []
        self._backends: list[_Backend] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pooler", daemon=True)
        self._reserved = reserved_port()
        self.port = 0

    @property
    def address(self) -> tuple[str, int]:
        return HOST, self.port

    def __enter__(self) -> Self:
        self.port = self._reserved.__enter__()
        self._thread.start()
        listening = asyncio.start_server(self._accept, HOST, self.port)
        self._listener = asyncio.run_coroutine_threadsafe(listening, self._loop).result(5)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._shutdown(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._reserved.__exit__(None, None, None)
        assert not self._thread.is_alive()
        self._loop.close()

    async def _shutdown(self) -> None:
        self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for backend in self._backends:
            backend.writer.close()
        await asyncio.sleep(0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the test is over
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            size, code = struct.unpack(">II", await reader.readexactly(8))
            startup = await reader.readexactly(size - 8)
            if code == _CANCEL:
                return
            if code not in (_TLS, _GSS):
                break
            writer.write(b"N")
        words = startup.rstrip(b"\0").split(b"\0")
        given = dict(zip(words[::2], words[1::2], strict=True))
        login = b"".join(name + b"\0" + given[name] + b"\0" for name in (b"user", b"database") if name in given) + b"\0"
        backend = await self._take(login)
        own_number = b"K" + struct.pack(">IiI", 12, -secrets.randbelow(2**30) - 1, secrets.randbelow(2**30))
        writer.write(_AUTHENTICATED + backend.parameters + own_number + _IDLE)
        self._idle.append(backend)
        client = asyncio.ensure_future(_message(reader))
        try:
            while not (await asyncio.shield(client)).startswith(b"X"):
                client = await self._transaction(client, reader, writer, await self._take(login))
        finally:
            client.cancel()

    async def _take(self, login: bytes) -> _Backend:
        if self._idle:
            return self._idle.pop()
        backend = await _Backend.open(self._server, login)
        self._backends.append(backend)
        return backend

    async def _transaction(
        self,
        client: asyncio.Future[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        backend: _Backend,
    ) -> asyncio.Future[bytes]:
        """Pass messages on until the server is outside a transaction; return the client's next one."""
        server = asyncio.ensure_future(_message(backend.reader))
        owed, unfinished = 0, False
        while True:
            await asyncio.wait({client, server}, return_when=asyncio.FIRST_COMPLETED)
            if client.done():
                message = client.result()
                backend.writer.write(message)
                owed += message[:1] in _ASKS
                unfinished = message[:1] not in _ASKS  # an extended query that has yet to get its Sync
                client = asyncio.ensure_future(_message(reader))
            if server.done():
                answer = server.result()
                writer.write(answer)
                owed -= answer.startswith(b"Z")
                if answer == _IDLE and not owed and not unfinished:
                    self._idle.append(backend)
                    return client
                server = asyncio.ensure_future(_message(backend.reader))
