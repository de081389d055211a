"""Where extents live: what a store of immutable pieces can do, and the one on local disks.

`store.s3` is the other one. An extent is written once under a random key, read in ranges, erased; nobody ever
changes one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ksync_server.errors import ConfigError, InsufficientStorage, Unavailable

KEY = re.compile(r"[0-9a-f]{32}")


class ExtentWriter(Protocol):
    """One extent being written; invisible until `finish`."""

    def write(self, piece: bytes) -> None:
        """Append bytes."""

    def finish(self) -> None:
        """Make it durable under its key; may block for a disk flush or a request."""

    def abort(self) -> None:
        """Leave nothing behind; what cannot be taken away now is the reaper's."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An extent that is on the store, named by a row or not."""

    key: str
    size: int  # bytes; 0 for one that was never finished
    written_at: float  # Unix seconds by the store's clock


class Memory:
    """Bytes of uploads that this process holds because the store does not have them yet, and their bound.

    Local files hold none. What is held is counted by the writers; who receives a body asks `full` before
    taking more and waits with `room`, first come, first served.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0  # bytes, those on their way to the store included
        self.leaving = 0  # of them: on their way
        self._lock = threading.Lock()
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    @property
    def full(self) -> bool:
        """Whether nobody should take more in."""
        return self.held >= self.most

    @property
    def free(self) -> bool:
        """Whether there is room and nobody waits for it."""
        return self.held < self.most and not self._waiting

    def take(self, size: int) -> None:
        """Count bytes that came."""
        with self._lock:
            self.held += size

    def leave(self, size: int) -> None:
        """Bytes of those held are being sent."""
        with self._lock:
            self.leaving += size

    def give(self, size: int, *, leaving: bool = False) -> None:
        """The store has them, or nobody wants them any more; the next one who waits goes on."""
        with self._lock:
            self.held -= size
            self.leaving -= size if leaving else 0
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            if self.held >= self.most or not self._waiting:
                return
            loop, future = self._waiting.popleft()
        with contextlib.suppress(RuntimeError):  # its loop is closed
            loop.call_soon_threadsafe(_resolve, future)

    async def room(self, wait_s: float) -> bool:
        """Wait in line for room at most so long; returns whether there is."""
        if self.free:
            return True
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self._waiting.append((loop, future))
        self._wake()
        try:
            async with asyncio.timeout(wait_s):
                await future
        except TimeoutError:
            return False
        finally:
            with self._lock, contextlib.suppress(ValueError):
                self._waiting.remove((loop, future))
            self._wake()  # one that was woken and gave up, or there is room for more than one
        return True


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class ExtentStore(Protocol):
    """Immutable pieces under random keys of 32 hexadecimal digits."""

    extent_bytes: int  # the longest; one may be shorter anywhere in a file
    flushes: int  # extents of one upload made durable at once while the next one is received
    threads: int  # extents of all uploads made durable at once
    memory: Memory

    def create(self, key: str) -> ExtentWriter:
        """Begin an extent."""

    def read(self, key: str, start: int, end: int, piece: int) -> Iterator[bytes]:
        """Bytes `start` to `end` (exclusive) in pieces of at most `piece` bytes.

        Raises:
            FileNotFoundError: no such extent.
            EOFError: it is shorter.
            Unavailable: the store does not answer.
        """

    def size(self, key: str) -> int | None:
        """The size of a finished extent, None where there is none.

        Raises:
            Unavailable: the store does not answer.
        """

    def erase(self, keys: Iterable[str]) -> None:
        """Delete extents; those that are not there are no mistake.

        Raises:
            Unavailable: the store does not answer; some may be gone.
        """

    def list_stored(self) -> Iterator[Stored]:
        """Every extent in the order of the keys, half-written ones included; others' files are not named.

        Raises:
            Unavailable: the store does not answer.
        """

    def check(self) -> None:
        """Try everything that is needed once.

        Raises:
            ConfigError: it does not work; says why.
        """

    def problem(self) -> str | None:
        """Why the store cannot be used at this moment, None where it can; one cheap look."""


class LocalExtents:
    """Extents as files in a two-level folder tree, flushed before they count."""

    flushes = 2
    threads = 4

    def __init__(self, root: Path, extent_bytes: int) -> None:
        self._root = root
        self.extent_bytes = extent_bytes
        self.memory = Memory(extent_bytes)  # never used: files take what they are given

    def _path(self, key: str) -> Path:
        return self._root / key[:2] / key[2:4] / key

    def path(self, key: str) -> Path:
        """The file of an extent, which never changes: a backup may link it."""
        return self._path(key)

    def create(self, key: str) -> ExtentWriter:
        """Begin an extent under a temporary name."""
        return _LocalWriter(self._path(key))

    def read(self, key: str, start: int, end: int, piece: int) -> Iterator[bytes]:
        """Stream a part of one file."""
        try:
            with open(self._path(key), "rb", buffering=0) as file:
                file.seek(start)
                left = end - start
                while left > 0:
                    got = file.read(min(piece, left))
                    if not got:
                        raise EOFError(key)
                    left -= len(got)
                    yield got
        except FileNotFoundError:
            raise
        except OSError as error:
            raise disk_failure(error) from error

    def size(self, key: str) -> int | None:
        """The file's size."""
        try:
            return self._path(key).stat().st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk_failure(error) from error

    def erase(self, keys: Iterable[str]) -> None:
        """Unlink the files, and what interrupted writes left."""
        try:
            for key in keys:
                self._path(key).unlink(missing_ok=True)
                self._path(key).with_suffix(".part").unlink(missing_ok=True)
        except OSError as error:
            raise disk_failure(error) from error

    def list_stored(self) -> Iterator[Stored]:
        """Walk the tree, one folder of names in memory at a time."""
        try:
            for first in _names(self._root):
                for second in _names(self._root / first):
                    yield from self._folder(self._root / first / second)
        except OSError as error:
            raise disk_failure(error) from error

    def _folder(self, folder: Path) -> Iterator[Stored]:
        for name in _names(folder):
            key, dot, _ = name.partition(".")
            if KEY.fullmatch(key) and folder == self._path(key).parent:
                with contextlib.suppress(FileNotFoundError):
                    state = (folder / name).stat()
                    yield Stored(key, 0 if dot else state.st_size, state.st_mtime)

    def check(self) -> None:
        """Whether the folder, or the nearest one above it that is there, can be written."""
        folder = self._root
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"blobs.path: {folder} cannot be written")

    def problem(self) -> str | None:
        """Whether the folder is there and can be written."""
        writable = os.access(self._root, os.W_OK | os.X_OK)
        return None if writable else f"blobs.path: {self._root} cannot be written"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


class _LocalWriter:
    def __init__(self, path: Path) -> None:
        self._final = path
        self._part = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._part, "xb", buffering=0)  # noqa: SIM115 - lives across calls
        except OSError as error:
            raise disk_failure(error) from error

    def write(self, piece: bytes) -> None:
        view = memoryview(piece)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise disk_failure(error) from error

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
            raise disk_failure(error) from error

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):  # a disk that has turned read-only
            self._part.unlink(missing_ok=True)
            self._final.unlink(missing_ok=True)


def disk_failure(error: OSError) -> Exception:
    """What a client is told of a disk that fails."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InsufficientStorage("The server's disk is full.")
    return Unavailable("The server's disk does not answer.", headers=[(b"retry-after", b"10")])
