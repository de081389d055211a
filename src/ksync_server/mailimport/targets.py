"""Folders of the destination, and how a message is known that is there already.

A stranger is a message of such a folder that no row names: it was there before the import, or a run that was
cut placed it and could not keep its row. A message that is about to be placed is compared with them.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ksync_server.mailimport.records import COPIED, THERE, Copy, TargetFolder
from ksync_server.mailimport.sinks import Parcel, Sink, Stranger, canonical

_PIECE = 1 << 20  # read from a file and hashed at once


@dataclass(frozen=True, slots=True)
class Recognised:
    """A message is there."""

    handle: str
    how: str  # COPIED: by us, in a run that was cut; THERE: before the import
    replaced: Copy | None = None  # the row that says so, under a UID that the source does not use any more


class Target:
    """A folder of the destination in this run.

    Args:
        row: as it is kept.
        sink: reads bodies of strangers.
    """

    def __init__(self, name: str, row: TargetFolder, sink: Sink) -> None:
        self.name = name
        self.row = row
        self.newest = 0  # UID of the newest copy that was seen in this run
        self._sink = sink
        self._retired: dict[bytes, deque[Copy]] = {}  # by SHA-256
        self._dates: dict[str, int] = {}  # of the strangers that nobody has recognised yet
        self._unread: dict[int, list[str]] = {}  # by size: strangers whose SHA-256 is not known
        self._read: dict[bytes, deque[str]] = {}  # by SHA-256: the others
        self._dated: dict[int, dict[str, None]] = {}  # by time received: all of them, in order
        self._as_stored: dict[str, bytes] = {}  # SHA-256 of what `canonical` leaves of them

    def meet(self, strangers: Iterable[Stranger], retired: Iterable[Copy]) -> None:
        """Learn who is there without a row, and whose rows have old UIDs of the source."""
        for each in strangers:
            at = self._dates[each.handle] = int(each.received.timestamp())
            self._unread.setdefault(each.size, []).append(each.handle)
            self._dated.setdefault(at, {})[each.handle] = None
        for copy in retired:
            self._retired.setdefault(copy.sha256, deque()).append(copy)

    async def recognise(self, parcel: Parcel) -> Recognised | None:
        """Whether a message is there already; each one is given away once, so that two of a kind stay two.

        Raises:
            RemoteError: the destination failed.

        Cost: nothing where there are no strangers; else the bodies of those of its size, read once.
        """
        if paired := self._retired.get(parcel.sha256):
            old = paired.popleft()
            return Recognised(old.handle, old.how, old)
        if not self._dates:
            return None
        if unread := self._unread.pop(parcel.size, None):
            for handle, digest in (await self._sink.digests(self.name, unread)).items():
                self._read.setdefault(digest, deque()).append(handle)
        equal = self._read.get(parcel.sha256, ())
        while equal:
            handle = equal.popleft()
            if handle in self._dates:
                return self._given(handle)
        return await self._recognise_changed(parcel)

    async def _recognise_changed(self, parcel: Parcel) -> Recognised | None:
        """The same for a destination that stores line ends or NUL bytes in its own way."""
        handles = self._dated.get(int(parcel.message.received.timestamp()))
        if not handles:
            return None
        if unread := [handle for handle in handles if handle not in self._as_stored]:
            self._as_stored |= await self._sink.digests(self.name, unread, as_stored=True)
        wanted = await asyncio.to_thread(_canonical, parcel)
        handle = next((each for each in handles if self._as_stored.get(each) == wanted), None)
        return None if handle is None else self._given(handle)

    def _given(self, handle: str) -> Recognised:
        at = self._dates.pop(handle)
        del self._dated[at][handle]
        return Recognised(handle, COPIED if self._sink.is_ours(handle, self.row.first_next) else THERE)


def _canonical(parcel: Parcel) -> bytes:
    hashed = hashlib.sha256()
    for piece in parcel.pieces:
        hashed.update(canonical(piece))
    if parcel.file is not None:
        with parcel.file.open("rb") as file:
            while data := file.read(_PIECE):
                hashed.update(canonical(data))
    return hashed.digest()
