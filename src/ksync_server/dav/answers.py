"""Multistatus bodies: whole when they are small, streamed when not, kept while nothing changes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Hashable

from ksync_server.http import Response, xml

_WHOLE = 128 * 1024  # a smaller answer is sent with its length


async def multistatus(pieces: AsyncGenerator[str, None], headers: list[tuple[bytes, bytes]]) -> Response:
    """A 207 of pieces of text, streamed once they are more than a packet or two.

    Raises:
        ClientError: whatever the first pieces raise; nothing has been sent then.
    """
    begun: list[str] = []
    size = 0
    async for piece in pieces:
        begun.append(piece)
        size += len(piece)
        if size > _WHOLE:
            response = xml(207, _rest("".join(begun), pieces))
            break
    else:
        response = xml(207, "".join(begun))
    response.headers += headers
    return response


async def _rest(begun: str, pieces: AsyncGenerator[str, None]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(pieces):
        yield begun.encode("utf-8")
        async for piece in pieces:
            yield piece.encode("utf-8")
            await asyncio.sleep(0)  # a fast reader must not keep the loop from the others


class BodyCache:
    """Rendered bodies of unchanged collections, the longest unused ones going first; for one event loop.

    A key names everything that the body depends on, the collection's change number among it, so nothing in
    here is ever wrong, only unused.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.largest = max_bytes // 4  # one body at most
        self._bodies: OrderedDict[Hashable, bytes] = OrderedDict()
        self._size = 0

    def get(self, key: Hashable) -> bytes | None:
        """A body, or None."""
        body = self._bodies.get(key)
        if body is not None:
            self._bodies.move_to_end(key)
        return body

    def put(self, key: Hashable, body: bytes) -> None:
        """Keep a body of at most `largest` bytes."""
        if len(body) > self.largest or key in self._bodies:
            return
        self._bodies[key] = body
        self._size += len(body)
        while self._size > self.max_bytes:
            _, dropped = self._bodies.popitem(last=False)
            self._size -= len(dropped)
