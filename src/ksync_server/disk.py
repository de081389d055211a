"""Disk nearly full: what grows is refused before anything can break; reading and deleting go on.

A database that meets a full disk fails in the middle of other people's work. So the last part of the disk is
kept for what must go on: deletions (which write rows too), log-ins, jobs, checkpoints of the write-ahead log.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ksync_server.errors import DAV, InsufficientStorage
from ksync_server.settings import Settings

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_GROWING = frozenset(["PUT", "POST", "PATCH", "MKCOL", "MKCALENDAR", "PROPPATCH", "COPY", "ACL"])


def folders(settings: Settings) -> dict[str, Path]:
    """What of the store is on disks of this machine: `database`, `blobs` -> folder."""
    found = {}
    if settings.database.url.startswith("sqlite:///"):
        found["database"] = Path(settings.database.url.removeprefix("sqlite:///")).parent
    if not settings.s3.bucket:
        found["blobs"] = settings.blobs.path
    return found


@dataclass(frozen=True, slots=True)
class Space:
    """Of one disk, in bytes."""

    free: int  # for us: what is reserved for root does not count
    total: int

    def reserve(self, settings: Settings) -> int:
        """What has to stay free."""
        disk = settings.disk
        return max(disk.reserve_bytes, int(self.total * disk.reserve_percent / 100))


def measure(folder: Path) -> Space | None:
    """The space of a folder's disk, or of its nearest parent's that exists; None where it cannot be told.

    Cost: one statvfs, 2 us on a local disk.
    """
    for place in (folder, *folder.parents):
        try:
            found = os.statvfs(place)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return Space(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)
    return None


class Disk:
    """Whether there is room, looked at once a second at most."""

    def __init__(
        self,
        settings: Settings,
        measure: Callable[[Path], Space | None] = measure,
        *,
        look_s: float = _LOOK_S,
    ) -> None:
        self._settings = settings
        self._folders = folders(settings)
        self._measure = measure
        self._look_s = look_s
        self._looked = -look_s
        self._room: int | None = None  # bytes above the reserve on the blobs' disk; None = unknown
        self.free: dict[str, int] = {}
        self.full: str | None = None  # which disk, while writes are refused

    def look(self) -> str | None:
        """Which disk is nearly full, None for none; says once in the log when that begins and ends."""
        now = time.monotonic()
        if now - self._looked < self._look_s:
            return self.full
        self._looked = now
        full = None
        for name, folder in self._folders.items():
            space = self._measure(folder)
            if space is None:
                continue  # a disk that does not answer fails in its own words
            self.free[name] = space.free
            reserve = space.reserve(self._settings)
            if name == "blobs":
                self._room = max(0, space.free - reserve)
            limit = reserve * (self._settings.disk.resume_percent / 100 if self.full == name else 1)
            if full is None and space.free < limit:
                full = name
        if full != self.full:
            extra = {"disk": full or self.full, "free_bytes": self.free.get(full or self.full or "")}
            if full:
                log.error("disk nearly full: what grows is refused", extra=extra)
            else:
                log.warning("disk has room again", extra=extra)
            self.full = full
        return full

    def check(self, method: str, length: int | None, *, has_body: bool) -> bool:
        """Before a request's body is read.

        Args:
            method: DELETE, MOVE, UNLOCK and what reads go on; so does a LOCK without a body, a refresh.
            length: declared bytes of the body; None = unknown.
            has_body: whether one is announced.

        Returns:
            Whether the request grows, so that `check_running` has to be asked while its body comes in.

        Raises:
            InsufficientStorage: it would grow, and there is no room, or none for so many bytes.
        """
        if not (method in _GROWING or (method == "LOCK" and has_body)):
            return False
        if self.look() is not None or (length is not None and self._room is not None and length > self._room):
            raise _refusal()
        return True

    def check_running(self) -> None:
        """While a body comes in.

        Raises:
            InsufficientStorage: no room is left for the rest.
        """
        if self.look() is not None:
            raise _refusal()


def _refusal() -> InsufficientStorage:
    return InsufficientStorage(
        "The server's disk is nearly full. Reading and deleting work; please tell the operator.",
        precondition=f"{DAV}sufficient-disk-space",
    )
