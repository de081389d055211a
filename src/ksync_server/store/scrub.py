"""The scrub: every stored byte is read now and then and compared with the checksum of its upload.

What is next follows from `blob.scrubbed_at` alone, never read before first, then longest ago: so a run that
is cut goes on where it was, and several never harm each other.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server.errors import Unavailable
from ksync_server.store import blobs as store
from ksync_server.store import tables as t
from ksync_server.store.blobs import Blobs, Content
from ksync_server.store.database import Write

log = logging.getLogger(__name__)

_B = t.blob.c
_PIECE = 1024 * 1024
_PAGE = 64  # blobs taken and noted at once
_FLUSH = 0  # no blob has this id
_LARGE = 8 * 1024 * 1024  # what was read is noted after so many bytes at the latest
_NEVER = sa.select(_B.id).where(_B.scrubbed_at.is_(None)).order_by(_B.id).limit(_PAGE)
_OLDEST = (
    sa.select(_B.id)
    .where(_B.scrubbed_at < sa.bindparam("before"))
    .order_by(_B.scrubbed_at, _B.id)
    .limit(_PAGE)
)
_NEXT = sa.select(_B.id).where(_B.id > sa.bindparam("after")).order_by(_B.id).limit(_PAGE)
_THERE = sa.select(_B.id).where(_B.id == sa.bindparam("id_"))
_SOUND = (
    sa.update(t.blob)
    .where(_B.id == sa.bindparam("id_"))
    .values(scrubbed_at=sa.bindparam("now"), damaged_at=None)
)
_SEEN = sa.update(t.blob).where(_B.id == sa.bindparam("id_")).values(scrubbed_at=sa.bindparam("now"))


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """One blob that was read."""

    id: int
    size: int  # bytes
    sound: bool


@dataclass(frozen=True, slots=True)
class Report:
    """What one run did."""

    blobs: int
    bytes: int
    damaged: int
    finished: bool  # whether nothing is due any more


class _Pace:
    """No more than so many bytes in a second, on the average since the start."""

    def __init__(self, bytes_s: float, sleep: Callable[[float], None]) -> None:
        self._bytes_s = bytes_s
        self._sleep = sleep
        self._began = time.monotonic()
        self._done = 0

    def passed(self, size: int) -> None:
        """So many bytes were read: wait until that is no more than allowed."""
        self._done += size
        ahead_s = self._done / self._bytes_s - (time.monotonic() - self._began)
        if ahead_s > 0:
            self._sleep(ahead_s)


def run(blobs: Blobs, *, sleep: Callable[[float], None] = time.sleep) -> Report:
    """Read what is due, for `scrub_slice_s` at most, and one blob to its end; the next run goes on.

    Args:
        sleep: how the bound of `scrub_bytes_s` is kept.

    Raises:
        Unavailable: the database or the store does not answer; what was read before counts.

    Cost: `scrub_bytes_s` of reading, one transaction for 64 blobs or 8 MiB.
    """
    settings = blobs.settings
    if not settings.scrub_days:
        return Report(0, 0, 0, True)
    pace = _Pace(settings.scrub_bytes_s, sleep)
    until = time.monotonic() + settings.scrub_slice_s
    count = size = damaged = 0
    before = int(time.time()) - settings.scrub_days * 86400
    for each in scrubbing(blobs, due(blobs, before), pace.passed):
        count, size, damaged = count + 1, size + each.size, damaged + (not each.sound)
        if time.monotonic() > until:
            return Report(count, size, damaged, False)
    return Report(count, size, damaged, True)


def due(blobs: Blobs, before: int) -> Iterator[int]:
    """Blobs that nobody read since `before` (Unix seconds), in the order in which they should be."""
    while rows := blobs.database.fast(_NEVER) or blobs.database.fast(_OLDEST, {"before": before}):
        yield from (number for (number,) in rows)
        yield _FLUSH  # what was read is noted before the next ones are asked for


def every(blobs: Blobs) -> Iterator[int]:
    """Every blob, in the order of the ids."""
    after = 0
    while rows := blobs.database.fast(_NEXT, {"after": after}):
        yield from (number for (number,) in rows)
        after = rows[-1][0]


def scrubbing(
    blobs: Blobs, numbers: Iterable[int], passed: Callable[[int], None] = lambda size: None
) -> Iterator[Scrubbed]:
    """Read blobs and note how they are.

    Args:
        numbers: `due` or `every`.
        passed: told how many bytes were read, after each piece.

    Raises:
        Unavailable: the database or the store does not answer; what was read before counts.
    """
    notes: list[Scrubbed] = []
    try:
        for number in numbers:
            if number == _FLUSH or len(notes) >= _PAGE or sum(each.size for each in notes) >= _LARGE:
                _note(blobs, notes)
            found = None if number == _FLUSH else _read(blobs, number, passed)
            if found is not None:
                notes.append(found)
                yield found
    finally:
        _note(blobs, notes)


def _read(blobs: Blobs, number: int, passed: Callable[[int], None]) -> Scrubbed | None:
    """Compare one blob; None when it is gone."""
    with blobs.database.read() as tx:
        if tx.one(_THERE, {"id_": number}) is None:
            return None
        content = store.content(tx, number)
    sound = _is_sound(blobs, content, passed)
    if not sound:
        blobs.mark_damaged(number, "the bytes are not those that were uploaded")
    return Scrubbed(number, content.size, sound)


def _is_sound(blobs: Blobs, content: Content, passed: Callable[[int], None]) -> bool:
    digest, size = hashlib.sha256(), 0
    try:
        for piece in blobs.read(content, 0, content.size, _PIECE):
            digest.update(piece)
            size += len(piece)
            passed(len(piece))
    except Unavailable as error:
        if isinstance(error.__cause__, FileNotFoundError | EOFError):
            return False
        raise
    return size == content.size and digest.digest() == content.sha256


def _note(blobs: Blobs, notes: list[Scrubbed]) -> None:
    if not notes:
        return
    now = int(time.time())

    def write(tx: Write) -> None:
        for each in notes:
            tx.fast(_SOUND if each.sound else _SEEN, {"id_": each.id, "now": now})

    blobs.database.write(write)
    notes.clear()
