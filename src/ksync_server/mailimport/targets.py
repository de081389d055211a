"""Folders of the destination, and how a message is known that is there already.

A stranger is a message of such a folder that no row names: it was there before the import, or a run that was
cut placed it and could not keep its row. A message that is about to be placed is compared with them.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ksync_server.mailimport.records import COPIED, THERE, Copy, TargetFolder
from ksync_server.mailimport.sinks import Message, Parcel, Sink, Stranger, canonical

_ALIKE = 20  # strangers of the same bytes that are compared by date and flags
_PIECE = 1 << 20  # read from a file and hashed at once


@dataclass(frozen=True, slots=True)
class Recognised:
    """A message is there."""

    handle: str
    how: str  # COPIED: by us, in a run that was cut; THERE: before the import
    replaced: Copy | None = None  # the row that says so, under a UID that the source does not use any more
    flags: tuple[str, ...] = ()  # that it has from us


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
        self._met: set[int] = set()  # folders of the source whose rows with old UIDs are known
        self._strangers: dict[str, Stranger] = {}  # that nobody has recognised yet
        self._unread: dict[int, list[str]] = {}  # by size: strangers whose SHA-256 is not known
        self._read: dict[bytes, deque[str]] = {}  # by SHA-256: the others
        self._dated: dict[int, dict[str, None]] = {}  # by time received: all of them, in order
        self._as_stored: dict[str, bytes] = {}  # SHA-256 of what `canonical` leaves of them

    def meet(self, strangers: Iterable[Stranger], retired: Iterable[Copy]) -> None:
        """Learn who is there without a row, and whose rows have old UIDs of the source."""
        for each in strangers:
            self._strangers[each.handle] = each
            self._unread.setdefault(each.size, []).append(each.handle)
            self._dated.setdefault(int(each.received.timestamp()), {})[each.handle] = None
        new = [copy for copy in retired if copy.source_id not in self._met]
        for copy in new:
            self._retired.setdefault(copy.sha256, deque()).append(copy)
        self._met |= {copy.source_id for copy in new}

    async def recognise(self, parcel: Parcel) -> Recognised | None:
        """Whether a message is there already; each one is given away once, so that two of a kind stay two.

        Raises:
            RemoteError: the destination failed.

        Cost: nothing where there are no strangers; else the bodies of those of its size, read once.
        """
        if paired := self._retired.get(parcel.sha256):
            old = paired.popleft()
            return Recognised(old.handle, old.how, old, old.flags)
        if not self._strangers:
            return None
        if unread := self._unread.pop(parcel.size, None):
            for handle, digest in (await self._sink.digests(self.name, unread)).items():
                self._read.setdefault(digest, deque()).append(handle)
        equal = self._read.get(parcel.sha256, deque[str]())
        while equal and equal[0] not in self._strangers:
            equal.popleft()
        alike = [handle for handle in itertools.islice(equal, _ALIKE) if handle in self._strangers]
        if alike:
            handle = max(alike, key=lambda each: self._likeness(each, parcel.message))
            equal.remove(handle)
            return self._given(handle)
        return await self._recognise_changed(parcel)

    def _likeness(self, handle: str, message: Message) -> tuple[bool, bool]:
        """How much a stranger of the same bytes is like a message: two of a kind may differ in the rest."""
        stranger = self._strangers[handle]
        return stranger.received == message.received, stranger.flags == message.flags

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
        stranger = self._strangers.pop(handle)
        del self._dated[int(stranger.received.timestamp())][handle]
        if self._sink.is_ours(handle, self.row.first_next):
            return Recognised(handle, COPIED, flags=stranger.flags)
        return Recognised(handle, THERE)


def _canonical(parcel: Parcel) -> bytes:
    hashed = hashlib.sha256()
    for piece in parcel.pieces:
        hashed.update(canonical(piece))
    if parcel.file is not None:
        with parcel.file.open("rb") as file:
            while data := file.read(_PIECE):
                hashed.update(canonical(data))
    return hashed.digest()
