"""One connection's bytes: lines and literals in, buffered and throttled answers out, TLS and DEFLATE between."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conformance.imap_server.server import Server

_PIECE = 64 * 1024
LONGEST_LINE = 64 * 1024


class Wire:
    """Reads and writes for a session, counting what passes."""

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self._input = bytearray()
        self._output: list[bytes] = []
        self._output_bytes = 0
        self._inflate: zlib._Decompress | None = None
        self._deflate: zlib._Compress | None = None

    # in

    def pending(self) -> bool:
        """Whether the client has already sent more than was read."""
        return bool(self._input)

    async def _fill(self) -> None:
        chunk = await self._reader.read(_PIECE)
        if not chunk:
            raise ConnectionResetError("the client is gone")
        self._server.statistics.bytes_received += len(chunk)
        self._input += self._inflate.decompress(chunk) if self._inflate else chunk

    async def line(self) -> bytes:
        """The next line with its end, at most 64 KiB of it."""
        start = 0
        while (end := self._input.find(b"\n", start)) < 0 and len(self._input) < LONGEST_LINE:
            start = len(self._input)
            await self._fill()
        end = end + 1 if end >= 0 else LONGEST_LINE
        line = bytes(self._input[:end])
        del self._input[:end]
        return line

    async def exactly(self, size: int) -> bytes:
        """The next `size` bytes."""
        while len(self._input) < size:
            await self._fill()
        data = bytes(memoryview(self._input)[:size])
        del self._input[:size]
        return data

    # out

    async def write(self, data: bytes) -> None:
        """Send soon; larger pieces at once."""
        self._output.append(data)
        self._output_bytes += len(data)
        if self._output_bytes >= _PIECE:
            await self.flush()

    async def flush(self) -> None:
        """Send what was written."""
        data = b"".join(self._output)
        self._output.clear()
        self._output_bytes = 0
        if not data:
            return
        if self._deflate:
            data = self._deflate.compress(data) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        self._server.statistics.bytes_sent += len(data)
        rate = self._server.bytes_per_s
        if rate is None:
            self._writer.write(data)
            await self._writer.drain()
            return
        step = max(1, int(rate / 20))
        for start in range(0, len(data), step):
            self._writer.write(data[start : start + step])
            await self._writer.drain()
            await asyncio.sleep(min(step, len(data) - start) / rate)

    def compress(self) -> None:
        """From here on both directions are DEFLATE (RFC 4978)."""
        self._deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
        self._inflate = zlib.decompressobj(-15)

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Upgrade; what was sent in the clear beyond STARTTLS is thrown away."""
        self._input.clear()
        await self._writer.start_tls(context)

    async def close(self) -> None:
        """Send what is left and close."""
        await self.flush()
        self._writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await self._writer.wait_closed()

    def abort(self) -> None:
        """Close at once."""
        self._writer.transport.abort()
