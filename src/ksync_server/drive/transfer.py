"""The bytes of files: uploads into a stage, downloads out of a blob, never with a transaction open.

Disk work runs in a thread pool of its own, a piece at a time, so that a stalled transfer holds no thread:
a web process serves hundreds of slow clients. Small content never leaves the event loop.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import mimetypes
import re
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from ksync_server import settings as configuration
from ksync_server.errors import (
    BadRequest,
    BodyTooLarge,
    ClientError,
    InsufficientStorage,
    Unavailable,
    UnsupportedMedia,
)
from ksync_server.http import Body, Headers, Request
from ksync_server.store.blobs import Blobs, Content, Stage, StagedBlob
from ksync_server.store.database import Database, Write

T = TypeVar("T")

# What Python's own table lacks; the machine's /etc/mime.types is not read, so that answers do not differ.
_MORE_TYPES = {
    ".7z": "application/x-7z-compressed",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".flac": "audio/flac",
    ".gz": "application/gzip",
    ".heic": "image/heic",
    ".ics": "text/calendar",
    ".m4a": "audio/mp4",
    ".md": "text/markdown",
    ".mkv": "video/x-matroska",
    ".odp": "application/vnd.oasis.opendocument.presentation",
    ".ods": "application/vnd.oasis.opendocument.spreadsheet",
    ".odt": "application/vnd.oasis.opendocument.text",
    ".ogg": "audio/ogg",
    ".pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    ".vcf": "text/vcard",
    ".webp": "image/webp",
    ".xhtml": "application/xhtml+xml",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
}
_TYPES = {**mimetypes.MimeTypes().types_map[True], **_MORE_TYPES}
_OCTETS = "application/octet-stream"
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+(?:\s*;[\x20-\x7e]*)?")
_LONGEST_TYPE = 255
_RELIEF_S = 0.1  # between two looks at who holds memory, while somebody waits for it
_ROOM_S = 45.0  # less than clients wait for an answer, more than one object takes
_ACTIVE = re.compile(
    r"(?i)text/html|application/xhtml|image/svg|[^;]*[/+]xml|[^;]*(?:java|ecma)script|text/xsl"
)


def content_type(name: str, given: str | None) -> str:
    """The media type of a file: as given at PUT, else by its extension."""
    if given:
        return given
    _, dot, extension = name.rpartition(".")
    return _TYPES.get("." + extension.lower(), _OCTETS) if dot else _OCTETS


def given_type(headers: Headers) -> str | None:
    """The Content-Type of an upload, where it is a media type worth keeping."""
    value = (headers.get("content-type") or "").strip()
    return value if len(value) <= _LONGEST_TYPE and _MEDIA_TYPE.fullmatch(value) else None


def is_active(media_type: str) -> bool:
    """Whether a browser could run what is inside, so that it is offered as a download instead."""
    return _ACTIVE.match(media_type) is not None


# -- checksums ------------------------------------------------------------------------------------


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


class _Adler32:
    def __init__(self) -> None:
        self._value = 1

    def update(self, data: bytes) -> None:
        self._value = zlib.adler32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


_HASHES: dict[str, Callable[[], _Hash]] = {
    "md5": lambda: hashlib.md5(usedforsecurity=False),
    "sha-1": lambda: hashlib.sha1(usedforsecurity=False),
    "sha-256": hashlib.sha256,
    "sha-512": hashlib.sha512,
    "adler32": _Adler32,
}
_NAMES = {"sha": "sha-1", "sha1": "sha-1", "sha256": "sha-256", "sha512": "sha-512"}


def declared_digests(headers: Headers) -> dict[str, bytes]:
    """What the client says the content's digests are, by algorithm; algorithms nobody knows are left out.

    OC-Checksum (`SHA1:hex`), Content-MD5, Digest (`SHA-256=base64`), Repr-Digest and Content-Digest
    (`sha-256=:base64:`).

    Raises:
        BadRequest: malformed.

    Spec: RFC 9530 §2, §3; RFC 1864; RFC 3230 §4.3.2.
    """
    found: dict[str, bytes] = {}
    for part in (headers.joined("oc-checksum") or "").replace(",", " ").split():
        algorithm, _, text = part.partition(":")
        _note(found, algorithm, lambda text=text: binascii.unhexlify(text))  # type: ignore[misc]
    if "content-md5" in headers:
        text = headers.get("content-md5") or ""
        _note(found, "md5", lambda: base64.b64decode(text, validate=True))
    for field in ("digest", "repr-digest", "content-digest"):
        for part in (headers.joined(field) or "").split(","):
            algorithm, _, text = part.strip().partition("=")
            inner = text.strip().strip(":")
            if algorithm.lower() != "adler32":  # hexadecimal there, and nobody sends it
                _note(found, algorithm, lambda inner=inner: base64.b64decode(inner, validate=True))  # type: ignore[misc]
    return found


def _note(found: dict[str, bytes], algorithm: str, decode: Callable[[], bytes]) -> None:
    name = _NAMES.get(algorithm.lower(), algorithm.lower())
    if name not in _HASHES:
        return
    try:
        digest = decode()
    except (binascii.Error, ValueError):
        raise BadRequest("A checksum is malformed.") from None
    if found.setdefault(name, digest) != digest:
        raise BadRequest("Two checksums of one kind differ.")


class _Checks:
    """Digests the stage does not make anyway, updated with what is written to it."""

    def __init__(self, declared: dict[str, bytes]) -> None:
        self._declared = declared
        own = {"sha-1", "sha-256", "md5"}
        self._hashes = {name: _HASHES[name]() for name in declared if name not in own}

    def update(self, piece: bytes) -> None:
        for running in self._hashes.values():
            running.update(piece)

    def verify(self, staged: StagedBlob) -> None:
        made = {name: running.digest() for name, running in self._hashes.items()}
        made |= {"sha-1": staged.sha1, "sha-256": staged.sha256, "md5": staged.md5}
        for name, digest in self._declared.items():
            if made[name] != digest:
                raise BadRequest(f"The content that arrived has another {name.upper()} checksum.")


# -- limits before the first byte -----------------------------------------------------------------


def check_upload(headers: Headers) -> None:
    """Refuse uploads that would be stored as something else than the client means.

    Raises:
        BadRequest: Content-Range, a part of a file (RFC 9110 §14.5).
        UnsupportedMedia: Content-Encoding; the encoded bytes would be taken for the file.
    """
    if "content-range" in headers:
        raise BadRequest("A PUT with Content-Range, a part of a file, is not taken here.")
    coding = (headers.get("content-encoding") or "identity").strip().lower()
    if coding not in ("identity", ""):
        raise UnsupportedMedia("Please send the file without Content-Encoding.")


def limit_of(request: Request, *, max_file_bytes: int, max_chunked_bytes: int) -> tuple[int, int | None]:
    """The most bytes this upload may have, and how many the client announced.

    Raises:
        BodyTooLarge: announced more; not a byte was read.
    """
    length = request.body.length
    limit = max_chunked_bytes if length is None else max_file_bytes
    announced = length
    if length is None:
        # Finder and ownCloud's clients say the size of what they send in chunks.
        for name in ("x-expected-entity-length", "oc-total-length"):
            value = (request.headers.get(name) or "").strip()
            if value.isascii() and value.isdigit() and len(value) <= 18:
                announced = int(value)
    if announced is not None and announced > limit:
        raise BodyTooLarge(f"A file may have at most {limit} bytes here.")
    return limit, announced


# -- transfers ------------------------------------------------------------------------------------


class Transfers:
    """Uploads and downloads of one web process."""

    def __init__(self, settings: configuration.Settings, database: Database, blobs: Blobs) -> None:
        self._drive = settings.drive
        self._lease_s = settings.blobs.stage_lease_s
        self._database = database
        self._blobs = blobs
        self._pool = ThreadPoolExecutor(max(settings.server.threads, 4), thread_name_prefix="transfer")
        self._active: Counter[int] = Counter()
        self._uploads: set[_Upload] = set()
        self._publishing: set[asyncio.Task[object]] = set()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True)

    def active(self, account_id: int) -> int:
        """Transfers of an account that are under way in this process."""
        return self._active[account_id]

    def check(self, account_id: int) -> None:
        """Whether the account may begin another transfer.

        Raises:
            Unavailable: it has as many as it may.
        """
        if self._active[account_id] >= self._drive.transfers:
            raise Unavailable(
                f"At most {self._drive.transfers} transfers at once.", headers=[(b"retry-after", b"5")]
            )

    @contextlib.contextmanager
    def counted(self, account_id: int) -> Iterator[None]:
        """Count a transfer while it runs.

        Raises:
            Unavailable: see `check`.
        """
        self.check(account_id)
        self._active[account_id] += 1
        try:
            yield
        finally:
            self._active[account_id] -= 1
            if not self._active[account_id]:
                del self._active[account_id]

    async def _run(self, fn: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, fn, *arguments)

    # -- uploads ----------------------------------------------------------------------------------

    async def upload(
        self,
        body: Body,
        *,
        account_id: int,
        limit: int,
        digests: dict[str, bytes],
        publish: Callable[[Write, StagedBlob], T],
    ) -> T:
        """Write a body where nobody sees it, then publish it in one transaction.

        Args:
            body: read to its end, in pieces of 1 B to 256 KiB.
            account_id: whose transfer it is. Content that stays in memory is none: a program may put a
                thousand small files at once.
            limit: largest size in bytes; checked while reading, since a chunked body declares none.
            digests: what the content's digests must be, see `declared_digests`.
            publish: makes it visible; runs inside the transaction, may run more than once.

        Returns:
            What `publish` returned.

        Raises:
            BodyTooLarge: one byte more than `limit` came.
            ClientGone: the peer closed early.
            BadRequest: a digest differs.
            ClientError: whatever `publish` raised.
            InsufficientStorage, Unavailable: disk or database failed, or the account has as many transfers as
                it may; the latter before a byte is read where a length is declared.
            In each case nothing of the attempt is visible and what was there before is untouched.

        Spec: RFC 9110 §9.3.4. Cost: one pass; memory of a few pieces, whatever the size.
        """
        with contextlib.ExitStack() as place:

            def begin() -> None:
                place.enter_context(self.counted(account_id))

            upload = _Upload(self, self._blobs.stage(limit), limit, _Checks(digests), begin)
            if body.length is not None and body.length > self._blobs.settings.inline_bytes:
                upload.begin_transfer()
            self._uploads.add(upload)
            staged = await upload.receive(body)
            return await self._published(upload, staged, publish)

    async def _published(
        self, upload: _Upload, staged: StagedBlob, publish: Callable[[Write, StagedBlob], T]
    ) -> T:
        # From here on the attempt ends as a whole: a client that goes away must not erase what a commit
        # that already runs is about to name.
        task = asyncio.create_task(self._publish(upload, staged, publish))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)
        return await asyncio.shield(task)

    async def _room(self) -> None:
        """Wait until the store's memory takes more: S3 objects are sent from memory, files use none.

        Raises:
            Unavailable: the store did not take enough in time.
        """
        memory = self._blobs.extents.memory
        if memory.free:
            return
        line = asyncio.create_task(memory.room(_ROOM_S))
        try:
            while not line.done():
                self._relieve()
                await asyncio.wait([line], timeout=_RELIEF_S)
        finally:
            line.cancel()
        if not line.result():
            raise Unavailable("Too many uploads at once.", headers=[(b"retry-after", b"10")])

    def _relieve(self) -> None:
        """Let extents leave before they are whole, the largest first.

        A slow client may hold an unfinished one for as long as it likes, and others would wait for it. Only
        as many as keep the store busy.
        """
        memory = self._blobs.extents.memory
        leaving = memory.leaving + sum(each.cutting for each in self._uploads)
        idle = sorted((each for each in self._uploads if each.idle), key=lambda each: each.held)
        while memory.full and idle and leaving < memory.most // 4:
            chosen = idle.pop()
            leaving += chosen.held
            chosen.cut()

    async def _publish(
        self, upload: _Upload, staged: StagedBlob, publish: Callable[[Write, StagedBlob], T]
    ) -> T:
        refused: list[ClientError] = []

        def fn(tx: Write) -> T:
            try:
                return publish(tx, staged)
            except ClientError as error:
                refused.append(error)
                raise

        try:
            return await self._database.writing(fn)
        except ClientError as error:
            # Any other failure leaves open whether the commit happened: the reaper knows later.
            if error in refused:
                await upload.abort()
            raise

    # -- downloads --------------------------------------------------------------------------------

    async def pieces(self, content: Content, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes `start` to `end` (exclusive).

        Cost: one piece of memory, and what the transport still holds of it; a thread only while the disk is
        read. Nothing is read ahead: what the kernel still has to send covers a read, and each of 200 clients
        that take nothing would hold a piece more.
        """
        if content.content is not None:
            yield content.content[start:end]
            return
        source = self._blobs.read(content, start, end, self._drive.chunk_bytes)
        reading: Future[bytes | None] | None = None
        try:
            while True:
                reading = self._pool.submit(next, source, None)
                piece = await asyncio.wrap_future(reading)
                if piece is None:
                    break
                yield piece
                del piece
        finally:
            if reading is not None:
                reading.add_done_callback(lambda _: _close(source))


def _close(source: Iterator[bytes]) -> None:
    close = getattr(source, "close", None)
    if close:
        close()


class _Upload:
    """A body on its way into a stage."""

    def __init__(
        self, transfers: Transfers, stage: Stage, limit: int, checks: _Checks, begin: Callable[[], None]
    ) -> None:
        self._transfers = transfers
        self._stage = stage
        self._limit = limit
        self._checks = checks
        self._begin: Callable[[], None] | None = begin  # None once it is counted as a transfer
        self._handed_over = False
        self._writing: asyncio.Future[Any] | None = None
        self.cutting = 0  # bytes of an extent that is about to leave
        self._beating: asyncio.Task[None] | None = None

    def begin_transfer(self) -> None:
        """Count it, once.

        Raises:
            Unavailable: see `Transfers.check`.
        """
        if self._begin is not None:
            self._begin()
            self._begin = None

    async def receive(self, body: Body) -> StagedBlob:
        """Stage the whole body, or leave nothing."""
        try:
            await self._read(body)
            staged = await self._finish()
            self._checks.verify(staged)
        except BaseException:
            await asyncio.shield(self.abort())
            raise
        return staged

    async def _read(self, body: Body) -> None:
        """Batches of pieces, each written while the next one is received."""
        stage, most = self._stage, self._transfers._drive.chunk_bytes
        batch: list[bytes] = []
        size = total = 0
        async for piece in body:
            total += len(piece)
            if total > self._limit:
                raise BodyTooLarge(f"A file may have at most {self._limit} bytes here.")
            # Never beside a thread: after the first hand-over the stage belongs to the pool.
            if not batch and not self._handed_over and stage.fits_in_memory(piece):
                self._write(piece)
                continue
            self.begin_transfer()
            batch.append(piece)
            size += len(piece)
            if size >= most:
                await self._hand_over(batch)
                batch, size = [], 0
        if batch:
            await self._hand_over(batch)

    def _write(self, piece: bytes) -> None:
        self._stage.write(piece)
        self._checks.update(piece)

    async def _hand_over(self, batch: list[bytes]) -> None:
        await self._written()
        self._handed_over = True
        piece = batch[0] if len(batch) == 1 else b"".join(batch)
        await self._transfers._room()
        await self._sent(self._stage.pending(len(piece)))
        await self._written()  # `_room` of another upload may have cut this one while it waited
        loop = asyncio.get_running_loop()
        self._writing = loop.run_in_executor(self._transfers._pool, self._write, piece)
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat())

    @staticmethod
    async def _sent(flushing: Iterable[Future[None]]) -> None:
        """Wait for extents on their way without a thread; how they ended comes out of the stage."""
        waited = [asyncio.wrap_future(each) for each in flushing]
        for each in waited:
            each.add_done_callback(lambda done: done.cancelled() or done.exception())
        if waited:
            await asyncio.wait(waited)  # unlike gather, it cancels nothing when it is cancelled itself

    @property
    def held(self) -> int:
        """Bytes of the extent that is being filled."""
        return self._stage.in_extent

    @property
    def idle(self) -> bool:
        """Whether it holds a part of an extent while no thread is at it."""
        return self.held > 0 and (self._writing is None or self._writing.done())

    def cut(self) -> None:
        """End the extent being filled. Only while `idle`."""
        before = self._writing
        if before is not None and before.exception() is not None:
            return  # its own task will find that and leave
        self.cutting = self.held
        loop = asyncio.get_running_loop()
        self._writing = loop.run_in_executor(self._transfers._pool, self._stage.cut)
        self._writing.add_done_callback(self._was_cut)

    def _was_cut(self, _: object) -> None:
        self.cutting = 0

    async def _written(self) -> None:
        """Wait for the batch being written; an error of it comes out here."""
        while (writing := self._writing) is not None:
            await asyncio.shield(writing)
            if self._writing is writing:
                self._writing = None

    async def _beat(self) -> None:
        """Keep the lease while the client is slow: a written piece renews it too, but it may not come."""
        while True:
            await asyncio.sleep(self._transfers._lease_s / 4)
            with contextlib.suppress(Unavailable, InsufficientStorage):
                await self._transfers._run(self._stage.beat)

    async def _finish(self) -> StagedBlob:
        self._transfers._uploads.discard(self)
        await self._written()
        await self._stop_beating()
        if not self._handed_over:
            return self._stage.finish()
        loop, pool = asyncio.get_running_loop(), self._transfers._pool
        await self._sent(self._stage.pending(self._transfers._blobs.extents.extent_bytes))
        cutting = self._writing = loop.run_in_executor(pool, self._stage.cut)
        await self._sent(await asyncio.shield(cutting))
        finishing = self._writing = loop.run_in_executor(pool, self._stage.finish)
        return await asyncio.shield(finishing)

    async def _stop_beating(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait([self._beating])
            self._beating = None

    async def abort(self) -> None:
        """Leave nothing; waits for the piece being written first."""
        self._transfers._uploads.discard(self)
        await self._stop_beating()
        if self._writing is not None:
            await asyncio.wait([self._writing])
            with contextlib.suppress(ClientError):  # it is known already, or the client is gone
                self._writing.result()
        if self._handed_over:
            await self._transfers._run(self._stage.abort)
        else:
            self._stage.abort()
