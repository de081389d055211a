"""Bytes: immutable content, staged where nobody sees it and published by one transaction.

Small content is a row. Larger content is cut into extents with random names on an `ExtentStore`, durable one
by one; then one transaction makes it visible. COPY shares a blob by counting references. Whatever dies on the
way leaves extents that no row names: the reaper erases them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import sqlalchemy as sa

from ksync_server import settings as configuration
from ksync_server.errors import BodyTooLarge, InsufficientStorage, Unavailable
from ksync_server.store import holds
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Write
from ksync_server.store.extents import ExtentStore, ExtentWriter, LocalExtents, Stored
from ksync_server.store.s3 import S3Extents

log = logging.getLogger(__name__)

T = TypeVar("T")

STAGE_ID = 16  # hex digits; the first part of every extent's key, so that the reaper can ask for it
_MANY = 8  # extents of one blob from which one statement for all is cheaper than one for each
_WAITING = 4  # threads for the content of calendars and contacts that is no row
_LOOK = 500  # keys looked up at once
REAP, REAP_ORPHANS = "blobs.reap", "blobs.reap-orphans"
"""The kinds of job that erase: a restore waits for those at work."""


# -- staging --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StagedBlob:
    """Content that is durable but that nobody can see yet; `publish` makes it a blob."""

    size: int  # bytes
    sha256: bytes  # 32 bytes
    sha1: bytes  # 20 bytes
    md5: bytes  # 16 bytes: what rclone compares first with vendor owncloud
    content: bytes | None  # small content
    extents: tuple[tuple[str, int], ...]  # key, size
    stage_id: str | None  # None for small content


@dataclass(frozen=True, slots=True)
class Content:
    """A blob's bytes, readable without a transaction: its extents outlive the longest download."""

    id: int
    size: int
    sha1: bytes
    sha256: bytes
    md5: bytes
    content: bytes | None
    extents: tuple[tuple[str, int], ...]


class Stage:
    """One upload on its way. Blocking: call `write` and `finish` from a worker thread once `spilled`."""

    def __init__(self, blobs: Blobs, limit: int) -> None:
        self._blobs = blobs
        self._limit = limit
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._sha1 = hashlib.sha1(usedforsecurity=False)
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._small: list[bytes] | None = []
        self._id: str | None = None
        self._writer: ExtentWriter | None = None
        self._in_extent = 0
        self._extents: list[tuple[str, int]] = []
        self._flushing: list[Future[None]] = []
        self._beat_at = 0.0

    @property
    def spilled(self) -> bool:
        """Whether the content outgrew memory, so that the next call may touch the disk."""
        return self._small is None

    def fits_in_memory(self, piece: bytes) -> bool:
        """Whether `write(piece)` will not touch the disk."""
        return self._small is not None and self.size + len(piece) <= self._blobs.settings.inline_bytes

    def write(self, piece: bytes) -> None:
        """Append bytes.

        Raises:
            BodyTooLarge: more than the limit; call `abort`.
            InsufficientStorage, Unavailable: the store failed; call `abort`.
        """
        self.size += len(piece)
        if self.size > self._limit:
            raise BodyTooLarge(f"A file may have at most {self._limit} bytes here.")
        self._sha256.update(piece)
        self._sha1.update(piece)
        self._md5.update(piece)
        if self._small is not None:
            if self.size <= self._blobs.settings.inline_bytes:
                self._small.append(piece)
                return
            self._begin()
        self._spill(piece)

    def _begin(self) -> None:
        """Leave memory: from here on a row with a lease protects the extents from the reaper."""
        self._id = secrets.token_hex(STAGE_ID // 2)
        self._blobs.open_stage(self._id)
        self._beat_at = time.monotonic()
        small, self._small = self._small or [], None
        for piece in small:
            self._spill(piece)

    def _spill(self, piece: bytes) -> None:
        view = memoryview(piece)
        extent_bytes = self._blobs.extents.extent_bytes
        while view:
            if self._writer is None:
                key = f"{self._id}{secrets.token_hex(8)}"
                self._writer = self._blobs.extents.create(key)
                self._extents.append((key, 0))
            part = view[: extent_bytes - self._in_extent]
            self._writer.write(bytes(part) if len(part) != len(piece) else piece)
            self._in_extent += len(part)
            view = view[len(part) :]
            if self._in_extent == extent_bytes:
                self.cut()
        if time.monotonic() - self._beat_at > self._blobs.settings.stage_lease_s / 4:
            self.beat()

    @property
    def in_extent(self) -> int:
        """Bytes in the extent that is being filled."""
        return self._in_extent

    def pending(self, size: int) -> list[Future[None]]:
        """What `write` of so many bytes would wait for; who must not block a thread awaits it first."""
        cuts = self._in_extent + size >= self._blobs.extents.extent_bytes
        return list(self._flushing) if cuts else []

    def beat(self) -> None:
        """Renew the lease; slow uploads call it while they wait for the client."""
        if self._id is not None:
            self._blobs.renew_stage(self._id)
            self._beat_at = time.monotonic()

    def cut(self) -> list[Future[None]]:
        """End the extent being filled and begin to make it durable; returns what is on its way.

        Extents may end anywhere, so this is right at any time between two writes.
        """
        if self._writer is not None:
            self._extents[-1] = (self._extents[-1][0], self._in_extent)
            while len(self._flushing) >= self._blobs.extents.flushes:
                self._flushing.pop(0).result()
            self._flushing.append(self._blobs.flusher.submit(self._writer.finish))
            self._writer = None
            self._in_extent = 0
        return list(self._flushing)

    def finish(self) -> StagedBlob:
        """Make everything durable.

        Raises:
            InsufficientStorage, Unavailable: the store failed; call `abort`.
        """
        self.cut()
        while self._flushing:
            self._flushing.pop(0).result()
        content = None if self._small is None else b"".join(self._small)
        return StagedBlob(
            self.size,
            self._sha256.digest(),
            self._sha1.digest(),
            self._md5.digest(),
            content,
            tuple(self._extents),
            self._id,
        )

    def abort(self) -> None:
        """Forget the upload; what is on the store is erased now, or by the reaper if that fails."""
        for future in self._flushing:
            with contextlib.suppress(Unavailable, InsufficientStorage):
                future.result()
        if self._writer is not None:
            self._writer.abort()
            self._writer = None
        with contextlib.suppress(Unavailable, InsufficientStorage):
            self._blobs.extents.erase(key for key, _ in self._extents)
        if self._id is not None:
            self._blobs.close_stage(self._id)
            self._id = None
        self._extents.clear()


def staged_bytes(content: bytes) -> StagedBlob:
    """A staged blob of content that is small enough for a row; no disk is touched."""
    return StagedBlob(
        len(content),
        hashlib.sha256(content).digest(),
        hashlib.sha1(content, usedforsecurity=False).digest(),
        hashlib.md5(content, usedforsecurity=False).digest(),
        content,
        (),
        None,
    )


# -- rows -----------------------------------------------------------------------------------------

_NEW_BLOB = (
    sa.insert(t.blob)
    .values(
        size=sa.bindparam("size"),
        sha256=sa.bindparam("sha256"),
        sha1=sa.bindparam("sha1"),
        md5=sa.bindparam("md5"),
        refs=sa.bindparam("refs", 1),
        content=sa.bindparam("content"),
    )
    .returning(t.blob.c.id)
)
_NEW_EXTENT = sa.insert(t.extent).values(
    blob_id=sa.bindparam("blob_id"),
    position=sa.bindparam("position"),
    key=sa.bindparam("key"),
    size=sa.bindparam("size"),
)
_NEW_EXTENTS = sa.insert(t.extent)
_END_STAGE = (
    sa.delete(t.stage)
    .where(t.stage.c.id == sa.bindparam("id_"), t.stage.c.lease_until > sa.bindparam("now"))
    .returning(t.stage.c.id)
)
_DROP_STAGE = sa.delete(t.stage).where(t.stage.c.id == sa.bindparam("id_"))
_NEW_STAGE = sa.insert(t.stage).values(
    id=sa.bindparam("id_"), lease_until=sa.bindparam("until"), created_at=sa.bindparam("now")
)
_RENEW_STAGE = (
    sa.update(t.stage).where(t.stage.c.id == sa.bindparam("id_")).values(lease_until=sa.bindparam("until"))
)
_COUNT = (
    sa.update(t.blob)
    .where(t.blob.c.id == sa.bindparam("id_"))
    .values(refs=t.blob.c.refs + sa.bindparam("by", type_=sa.BigInteger))
    .returning(t.blob.c.refs)
)
_EXTENTS = (
    sa.select(t.extent.c.key, t.extent.c.size)
    .where(t.extent.c.blob_id == sa.bindparam("id_"))
    .order_by(t.extent.c.position)
)
_BLOB = sa.select(t.blob.c.size, t.blob.c.sha1, t.blob.c.sha256, t.blob.c.md5, t.blob.c.content).where(
    t.blob.c.id == sa.bindparam("id_")
)
_DROP_BLOB = sa.delete(t.blob).where(t.blob.c.id == sa.bindparam("id_"))
_EXTENTS_TO_GARBAGE = sa.insert(t.garbage).from_select(
    ["key", "since"],
    sa.select(t.extent.c.key, sa.bindparam("since", type_=t.Time)).where(
        t.extent.c.blob_id == sa.bindparam("id_")
    ),
)
_OLD_GARBAGE = (
    sa.select(t.garbage.c.key).where(t.garbage.c.since < sa.bindparam("before")).limit(sa.bindparam("most"))
)
_DROP_GARBAGE = sa.delete(t.garbage).where(t.garbage.c.key == sa.bindparam("key"))
_DAMAGED = (
    sa.update(t.blob)
    .where(t.blob.c.id == sa.bindparam("id_"), t.blob.c.damaged_at.is_(None))
    .values(damaged_at=sa.bindparam("now"))
    .returning(t.blob.c.id)
)
_DEAD_STAGES = sa.delete(t.stage).where(t.stage.c.lease_until < sa.bindparam("now"))


_page = (
    sa.select(t.blob.c.id, t.blob.c.size, t.blob.c.damaged_at)
    .where(t.blob.c.id > sa.bindparam("after"))
    .order_by(t.blob.c.id)
    .limit(1000)
    .subquery()
)
_TOTALS = sa.select(
    sa.func.count(), sa.func.max(_page.c.id), sa.func.sum(_page.c.size), sa.func.count(_page.c.damaged_at)
).select_from(_page)
_GARBAGE = sa.select(sa.func.count()).select_from(t.garbage)


def publish(tx: Write, staged: StagedBlob) -> int:
    """Make staged content a blob with one reference; returns its id.

    Raises:
        Unavailable: its lease ran out (a stalled upload); nothing is published.

    Cost: 1 row for small content, else 1 + extents.
    """
    if staged.stage_id is not None:
        alive = tx.one(_END_STAGE, {"id_": staged.stage_id, "now": int(time.time())})
        if alive is None:
            raise Unavailable("The upload took too long.", headers=[(b"retry-after", b"1")])
    row = tx.one(
        _NEW_BLOB,
        {
            "size": staged.size,
            "sha256": staged.sha256,
            "sha1": staged.sha1,
            "md5": staged.md5,
            "content": staged.content,
            "refs": 1,
        },
    )
    assert row is not None
    extents = [
        {"blob_id": row[0], "position": position, "key": key, "size": size}
        for position, (key, size) in enumerate(staged.extents)
    ]
    if len(extents) > _MANY:
        tx.execute(_NEW_EXTENTS, extents)
    else:
        for extent in extents:
            tx.fast(_NEW_EXTENT, extent)
    return int(row[0])


def share(tx: Write, blob_id: int, by: int = 1) -> None:
    """Add references, e.g. for a COPY."""
    tx.fast(_COUNT, {"id_": blob_id, "by": by})


def release(tx: Write, blob_id: int, by: int = 1) -> None:
    """Take references off; the last one deletes the row and leaves the extents to the reaper."""
    row = tx.one(_COUNT, {"id_": blob_id, "by": -by})
    if row is None or row[0] > 0:
        return
    now = int(time.time())
    tx.fast(_EXTENTS_TO_GARBAGE, {"id_": blob_id, "since": now})
    tx.fast(_DROP_BLOB, {"id_": blob_id})


def content(tx: Read, blob_id: int) -> Content:
    """What is needed to read a blob after the transaction has ended."""
    row = tx.one(_BLOB, {"id_": blob_id})
    assert row is not None, "a blob that rows reference exists"
    size, sha1, sha256, md5, small = row
    if small is not None:
        return Content(blob_id, size, bytes(sha1), bytes(sha256), bytes(md5), bytes(small), ())
    extents = tuple((key, length) for key, length in tx.fast(_EXTENTS, {"id_": blob_id}))
    return Content(blob_id, size, bytes(sha1), bytes(sha256), bytes(md5), None, extents)


def named(tx: Read, keys: list[str]) -> set[str]:
    """Those of the keys that a living upload, a blob or the garbage names; the others nobody will ever name.

    In one snapshot: publishing takes the upload's row away and names the extent in the same transaction, and
    an upload has its row before its first extent.
    """
    found: set[str] = set()
    stages = {key[:STAGE_ID] for key in keys}
    living = {row[0] for row in tx.execute(sa.select(t.stage.c.id).where(t.stage.c.id.in_(stages)))}
    found.update(key for key in keys if key[:STAGE_ID] in living)
    for table in (t.extent, t.garbage):
        found.update(row[0] for row in tx.execute(sa.select(table.c.key).where(table.c.key.in_(keys))))
    return found


def open_extents(settings: configuration.Settings) -> ExtentStore:
    """The store that the settings name: S3 where there is a bucket, else local files.

    Raises:
        ConfigError: S3 without obstore, or credentials that cannot be read; no request is made yet.
    """
    if settings.s3.bucket:
        return S3Extents(settings.s3)
    return LocalExtents(settings.blobs.path, settings.blobs.extent_bytes)


class Blobs:
    """Staging and reading of bytes for one process."""

    def __init__(
        self, settings: configuration.Blobs, database: Database, extents: ExtentStore | None = None
    ) -> None:
        self.settings = settings
        self.extents: ExtentStore = extents or LocalExtents(settings.path, settings.extent_bytes)
        self.flusher = ThreadPoolExecutor(self.extents.threads, thread_name_prefix="flush")
        self._pool = ThreadPoolExecutor(_WAITING, thread_name_prefix="bytes")
        self.database = database

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True)
        self.flusher.shutdown(wait=True)

    async def pooled(self, fn: Callable[..., T], *arguments: object) -> T:
        """Run what waits for the store in threads of its own: when it is away, the database's stay free."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, fn, *arguments)

    def stage(self, limit: int) -> Stage:
        """Begin an upload of at most `limit` bytes; nothing happens until bytes come."""
        return Stage(self, limit)

    def open_stage(self, stage_id: str) -> None:
        """Protect an upload's extents by a lease."""
        now = int(time.time())
        until = now + int(self.settings.stage_lease_s)
        self.database.write(lambda tx: tx.fast(_NEW_STAGE, {"id_": stage_id, "until": until, "now": now}))

    def renew_stage(self, stage_id: str) -> None:
        """Extend the lease."""
        until = int(time.time() + self.settings.stage_lease_s)
        self.database.write(lambda tx: tx.fast(_RENEW_STAGE, {"id_": stage_id, "until": until}))

    def close_stage(self, stage_id: str) -> None:
        """Give the lease up."""
        self.database.write(lambda tx: tx.fast(_DROP_STAGE, {"id_": stage_id}))

    def read(self, blob: Content, start: int, end: int, piece: int) -> Iterator[bytes]:
        """Bytes `start` to `end` (exclusive) of a blob in pieces of at most `piece` bytes; blocking.

        Raises:
            Unavailable: the store does not answer; or bytes are missing, and the blob is marked as damaged.

        Cost: one extent is open at a time, one piece in memory.
        """
        if blob.content is not None:
            if end > start:
                yield blob.content[start:end]
            return
        offset = 0
        for key, size in blob.extents:
            low, high = max(start - offset, 0), min(end - offset, size)
            if low < high:
                try:
                    yield from self.extents.read(key, low, high, piece)
                except (FileNotFoundError, EOFError) as error:
                    self.mark_damaged(blob.id, f"extent {key} is missing or too short")
                    raise Unavailable(
                        "A part of this content is lost; the operator has been told.",
                        headers=[(b"retry-after", b"3600")],
                    ) from error
            offset += size

    def mark_damaged(self, blob_id: int, why: str) -> bool:
        """Note that a blob's bytes are wrong; returns whether that is news (one that is gone is none)."""
        now = int(time.time())
        news = self.database.write(lambda tx: tx.one(_DAMAGED, {"id_": blob_id, "now": now})) is not None
        if news:
            log.error("blob damaged", extra={"blob": blob_id, "reason": why})
        return news

    def totals(self) -> tuple[int, int, int, int]:
        """Number of blobs, their bytes, how many are damaged, and extents that wait to be erased.

        Cost: every blob's row once, by pages.
        """
        blobs = size = damaged = 0
        after = 0
        while True:
            count, last, bytes_, bad = self.database.fast(_TOTALS, {"after": after})[0]
            if not count:
                return blobs, size, damaged, int(self.database.fast(_GARBAGE)[0][0])
            blobs, size, damaged, after = blobs + count, size + int(bytes_), damaged + int(bad), last

    # -- reaping ----------------------------------------------------------------------------------

    def reap(self, *, most: int = 1000) -> int:
        """Erase extents that no row names any more; returns how many.

        An extent goes when it was released more than `reap_after_s` ago, or was written that long ago while
        neither a blob nor a living stage names it. Safe at any time, in any number of processes. While a
        backup or a restore holds the extents, nothing goes.

        Raises:
            Unavailable: the store does not answer; the next run goes on.
        """
        erased = self.reap_garbage(most)
        return erased + self.reap_orphans(most - erased)

    def reap_garbage(self, most: int) -> int:
        """Erase at most so many extents that were released `reap_after_s` ago, and end dead uploads.

        Raises:
            Unavailable: the store does not answer.
        """
        if holds.is_held(self.database):
            return 0
        now = int(time.time())
        self.database.write(lambda tx: tx.fast(_DEAD_STAGES, {"now": now}))
        before = now - int(self.settings.reap_after_s)
        keys = [key for (key,) in self.database.fast(_OLD_GARBAGE, {"before": before, "most": most})]
        for low in range(0, len(keys), _LOOK):
            if holds.is_held(self.database):
                return low
            page = self._unused(keys[low : low + _LOOK])
            self.extents.erase(page)

            def forget(tx: Write, page: list[str] = page) -> None:
                for key in page:
                    tx.fast(_DROP_GARBAGE, {"key": key})

            self.database.write(forget)
        return len(keys)

    def _unused(self, keys: list[str]) -> list[str]:
        """Without those that a blob names though the garbage does too: that fault must not cost the bytes."""
        with self.database.read() as tx:
            rows = tx.execute(sa.select(t.extent.c.key).where(t.extent.c.key.in_(keys)))
            used = {row[0] for row in rows}
        return [key for key in keys if key not in used]

    def reap_orphans(self, most: int) -> int:
        """Erase at most so many extents that were written `reap_after_s` ago and that nobody names.

        Raises:
            Unavailable: the store does not answer.

        Cost: a listing of the whole store.
        """
        erased = 0
        for page in pages(self.old_extents()):
            if erased >= most:
                break
            orphans = self.orphans(page)[: most - erased]
            if holds.is_held(self.database):
                break
            self.extents.erase(orphans)
            erased += len(orphans)
        return erased

    def old_extents(self) -> Iterator[Stored]:
        """What is on the store since `reap_after_s`."""
        before = time.time() - self.settings.reap_after_s
        return (each for each in self.extents.list_stored() if each.written_at <= before)

    def orphans(self, listed: list[Stored]) -> list[str]:
        """The keys among them that nobody names."""
        keys = [each.key for each in listed]
        with self.database.read() as tx:
            known = named(tx, keys)
        return [key for key in keys if key not in known]


def pages(stored: Iterable[Stored]) -> Iterator[list[Stored]]:
    """The same in lists that one query can ask for."""
    page: list[Stored] = []
    for each in stored:
        page.append(each)
        if len(page) == _LOOK:
            yield page
            page = []
    if page:
        yield page
