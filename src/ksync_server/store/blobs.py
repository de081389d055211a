"""Bytes: immutable content, staged where nobody sees it and published by one transaction.

Small content is a row. Larger content is cut into extents with random names on an `ExtentStore`: written
under a temporary name, flushed, renamed, the folder flushed; then one transaction makes it visible. COPY
shares a blob by counting references. Whatever dies on the way leaves extents that no row names: the reaper
erases them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa

from ksync_server import settings as configuration
from ksync_server.errors import BodyTooLarge, InsufficientStorage, Unavailable
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Write

_STAGE_ID = 16  # hex digits; the first part of every extent's key, so that the reaper can ask for it
_PARALLEL_FLUSHES = 2  # extents of one upload being flushed while the next one is received


# -- extents --------------------------------------------------------------------------------------


class ExtentWriter(Protocol):
    """One extent being written; invisible until `finish`."""

    def write(self, piece: bytes) -> None:
        """Append bytes."""

    def finish(self) -> None:
        """Make it durable under its key; may block for a disk flush."""

    def abort(self) -> None:
        """Leave nothing behind."""


class ExtentStore(Protocol):
    """Where extents live: local files, later S3 objects."""

    def create(self, key: str) -> ExtentWriter:
        """Begin an extent."""

    def read(self, key: str, start: int, end: int, piece: int) -> Iterator[bytes]:
        """Bytes `start` to `end` (exclusive) in pieces of at most `piece` bytes.

        Raises:
            FileNotFoundError: no such extent.
        """

    def erase(self, key: str) -> None:
        """Delete an extent; nothing happens when it is not there."""

    def list_older(self, seconds: float) -> Iterable[str]:
        """Keys last written more than `seconds` ago, half-written extents included."""


class LocalExtents:
    """Extents as files in a two-level folder tree, flushed before they count."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def _path(self, key: str) -> Path:
        return self._root / key[:2] / key[2:4] / key

    def create(self, key: str) -> ExtentWriter:
        """Begin an extent under a temporary name."""
        return _LocalWriter(self._path(key))

    def read(self, key: str, start: int, end: int, piece: int) -> Iterator[bytes]:
        """Stream a part of one file."""
        with open(self._path(key), "rb", buffering=0) as file:
            file.seek(start)
            left = end - start
            while left > 0:
                got = file.read(min(piece, left))
                if not got:
                    raise EOFError(key)
                left -= len(got)
                yield got

    def erase(self, key: str) -> None:
        """Unlink the file, and what an interrupted write left."""
        self._path(key).unlink(missing_ok=True)
        self._path(key).with_suffix(".part").unlink(missing_ok=True)

    def list_older(self, seconds: float) -> Iterable[str]:
        """Walk the tree."""
        limit = time.time() - seconds
        for path in self._root.glob("??/??/*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime <= limit:
                    yield path.stem


class _LocalWriter:
    def __init__(self, path: Path) -> None:
        self._final = path
        self._part = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._part, "xb", buffering=0)  # noqa: SIM115 - lives across calls
        except OSError as error:
            raise _disk(error) from error

    def write(self, piece: bytes) -> None:
        view = memoryview(piece)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise _disk(error) from error

    def finish(self) -> None:
        try:
            os.fdatasync(self._file.fileno())
            self._file.close()
            os.rename(self._part, self._final)
            # The two folders above may be new: flush the names up to the root.
            for folder in (self._final.parent, self._final.parent.parent, self._final.parent.parent.parent):
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise _disk(error) from error

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)
        self._final.unlink(missing_ok=True)


def _disk(error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InsufficientStorage("The server's disk is full.")
    return Unavailable("The server's disk does not answer.", headers=[(b"retry-after", b"10")])


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
            InsufficientStorage, Unavailable: the disk failed; call `abort`.
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
        self._id = secrets.token_hex(_STAGE_ID // 2)
        self._blobs.open_stage(self._id)
        self._beat_at = time.monotonic()
        small, self._small = self._small or [], None
        for piece in small:
            self._spill(piece)

    def _spill(self, piece: bytes) -> None:
        view = memoryview(piece)
        extent_bytes = self._blobs.settings.extent_bytes
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
                self._close_extent()
        if time.monotonic() - self._beat_at > self._blobs.settings.stage_lease_s / 4:
            self.beat()

    def beat(self) -> None:
        """Renew the lease; slow uploads call it while they wait for the client."""
        if self._id is not None:
            self._blobs.renew_stage(self._id)
            self._beat_at = time.monotonic()

    def _close_extent(self) -> None:
        assert self._writer is not None
        self._extents[-1] = (self._extents[-1][0], self._in_extent)
        while len(self._flushing) >= _PARALLEL_FLUSHES:
            self._flushing.pop(0).result()
        self._flushing.append(self._blobs.flusher.submit(self._writer.finish))
        self._writer = None
        self._in_extent = 0

    def finish(self) -> StagedBlob:
        """Make everything durable.

        Raises:
            InsufficientStorage, Unavailable: the disk failed; call `abort`.
        """
        if self._writer is not None:
            self._close_extent()
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
        """Forget the upload; what is on disk is erased now, or by the reaper if that fails."""
        for future in self._flushing:
            with contextlib.suppress(Unavailable, InsufficientStorage):
                future.result()
        if self._writer is not None:
            self._writer.abort()
            self._writer = None
        for key, _ in self._extents:
            self._blobs.extents.erase(key)
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
_NEW_GARBAGE = sa.insert(t.garbage).values(key=sa.bindparam("key"), since=sa.bindparam("since"))
_OLD_GARBAGE = (
    sa.select(t.garbage.c.key).where(t.garbage.c.since < sa.bindparam("before")).limit(sa.bindparam("most"))
)
_DROP_GARBAGE = sa.delete(t.garbage).where(t.garbage.c.key == sa.bindparam("key"))
_KNOWN_EXTENT = sa.select(t.extent.c.key).where(t.extent.c.key == sa.bindparam("key"))
_KNOWN_GARBAGE = sa.select(t.garbage.c.key).where(t.garbage.c.key == sa.bindparam("key"))
_DEAD_STAGES = sa.delete(t.stage).where(t.stage.c.lease_until < sa.bindparam("now"))
_KNOWN_STAGE = sa.select(t.stage.c.id).where(t.stage.c.id == sa.bindparam("id_"))


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
    for position, (key, size) in enumerate(staged.extents):
        tx.fast(_NEW_EXTENT, {"blob_id": row[0], "position": position, "key": key, "size": size})
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
    for key, _ in tx.fast(_EXTENTS, {"id_": blob_id}):
        tx.fast(_NEW_GARBAGE, {"key": key, "since": now})
    tx.fast(_DROP_BLOB, {"id_": blob_id})


def content(tx: Read, blob_id: int) -> Content:
    """What is needed to read a blob after the transaction has ended."""
    row = tx.one(_BLOB, {"id_": blob_id})
    assert row is not None, "a blob that rows reference exists"
    size, sha1, sha256, md5, small = row
    extents = (
        ()
        if small is not None
        else tuple((key, length) for key, length in tx.fast(_EXTENTS, {"id_": blob_id}))
    )
    return Content(
        size, bytes(sha1), bytes(sha256), bytes(md5), None if small is None else bytes(small), extents
    )


class Blobs:
    """Staging and reading of bytes for one process."""

    def __init__(
        self, settings: configuration.Blobs, database: Database, extents: ExtentStore | None = None
    ) -> None:
        self.settings = settings
        self.extents: ExtentStore = extents or LocalExtents(settings.path)
        self.flusher = ThreadPoolExecutor(4, thread_name_prefix="flush")
        self._database = database

    def close(self) -> None:
        """End the flushing threads."""
        self.flusher.shutdown(wait=True)

    def stage(self, limit: int) -> Stage:
        """Begin an upload of at most `limit` bytes; nothing happens until bytes come."""
        return Stage(self, limit)

    def open_stage(self, stage_id: str) -> None:
        """Protect an upload's extents by a lease."""
        now = int(time.time())
        until = now + int(self.settings.stage_lease_s)
        self._database.write(lambda tx: tx.fast(_NEW_STAGE, {"id_": stage_id, "until": until, "now": now}))

    def renew_stage(self, stage_id: str) -> None:
        """Extend the lease."""
        until = int(time.time() + self.settings.stage_lease_s)
        self._database.write(lambda tx: tx.fast(_RENEW_STAGE, {"id_": stage_id, "until": until}))

    def close_stage(self, stage_id: str) -> None:
        """Give the lease up."""
        self._database.write(lambda tx: tx.fast(_DROP_STAGE, {"id_": stage_id}))

    def read(self, blob: Content, start: int, end: int, piece: int) -> Iterator[bytes]:
        """Bytes `start` to `end` (exclusive) of a blob in pieces of at most `piece` bytes; blocking.

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
                yield from self.extents.read(key, low, high, piece)
            offset += size

    def reap(self, *, most: int = 1000) -> int:
        """Erase extents that no row names any more; returns how many.

        An extent goes when it was released more than `reap_after_s` ago, or was written that long ago while
        neither a blob nor a living stage names it. Safe at any time, in any number of processes.
        """
        now = int(time.time())
        self._database.write(lambda tx: tx.fast(_DEAD_STAGES, {"now": now}))
        before = now - int(self.settings.reap_after_s)
        keys = [key for (key,) in self._database.fast(_OLD_GARBAGE, {"before": before, "most": most})]
        for key in keys:
            self.extents.erase(key)
            self._database.write(lambda tx, key=key: tx.fast(_DROP_GARBAGE, {"key": key}))  # type: ignore[misc]
        return len(keys) + self._reap_orphans(most - len(keys))

    def _reap_orphans(self, most: int) -> int:
        erased = 0
        for key in self.extents.list_older(self.settings.reap_after_s):
            if erased >= most:
                break
            # In this order: publishing takes the stage's row away and names the extent in one transaction.
            named = any(
                self._database.fast(statement, {"key": key, "id_": key[:_STAGE_ID]})
                for statement in (_KNOWN_STAGE, _KNOWN_EXTENT, _KNOWN_GARBAGE)
            )
            if not named:
                self.extents.erase(key)
                erased += 1
        return erased
