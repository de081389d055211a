"""A TCP proxy that counts: how many bytes a server sent, whoever asked and whatever became of them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

_PIECE = 1 << 16


class Tap:
    """Where to connect instead, and what has come through so far."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self.port = 0
        self.sent_bytes = 0  # by the server
        self._under_way: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()

    async def serve(self, started: threading.Event) -> None:
        """Pass connections on until `stop`."""
        self._loop = asyncio.get_running_loop()
        listener = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        started.set()
        async with listener:
            await self._stop.wait()
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)

    def stop(self) -> None:
        """End `serve` and every connection, from another thread."""
        assert self._loop
        self._loop.call_soon_threadsafe(self._stop.set)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._under_way.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
                await asyncio.gather(
                    self._copy(reader, server_writer, counted=False),
                    self._copy(server_reader, writer, counted=True),
                )
        finally:
            writer.close()
            self._under_way.discard(task)

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool
    ) -> None:
        try:
            while data := await reader.read(_PIECE):
                self.sent_bytes += len(data) if counted else 0
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


@contextlib.contextmanager
def tapped(server_port: int) -> Iterator[Tap]:
    """A tap on a server of this machine, for as long as the block runs."""
    tap, started = Tap(server_port), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(tap.serve(started)), name="tap", daemon=True)
    thread.start()
    assert started.wait(10), "the tap did not start"
    try:
        yield tap
    finally:
        tap.stop()
        thread.join(10)
