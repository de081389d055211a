"""A destination in a Maildir++ on this machine, as Dovecot reads it.

A message is a file whose name says which message of which import it is: writing it twice gives one file. It
is complete and on the disk before its name appears (tmp, fdatasync, rename, fsync of the folder). UIDs are
Dovecot's to give, so its `dovecot-uidlist` is never touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from ksync_server.errors import Temporary
from ksync_server.mailimport.sinks import (
    Full,
    Held,
    Parcel,
    Place,
    Placed,
    Room,
    Seen,
    Stranger,
    Unmade,
    Unwanted,
    canonical,
)
from ksync_server.wire import imap

T = TypeVar("T")

_LETTERS = {"\\Draft": "D", "\\Flagged": "F", "\\Answered": "R", "\\Seen": "S", "\\Deleted": "T"}
_FLAGS = {letter: flag for flag, letter in _LETTERS.items()}
_KEYWORDS = 26  # that a Maildir has letters for: a to z
_PIECE = 1 << 20
_LOCK_S = 30.0  # a lock that is older belongs to nobody
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class MaildirSink:
    """See `sinks.Sink`. Handles are the names of files without their flags."""

    prefix = ""
    longest: int | None = None
    commands = 0

    def __init__(
        self,
        root: Path,
        tag: str = "",
        *,
        escaped: bool = False,
        quota_bytes: int | None = None,
        owner: tuple[int, int] | None = None,
    ) -> None:
        """Where to write.

        Args:
            root: the Maildir; made where it is missing.
            tag: of the import, part of the files' names.
            escaped: folders have `/` between their parts and may have dots in them, as Dovecot's listescape
                writes them; else a dot makes a level.
            quota_bytes: what all of it may take; None = what the disk has.
            owner: user and group whose it is to be; None = ours.
        """
        self._root = root
        self._tag = tag
        self._escaped = escaped
        self._quota = quota_bytes
        self._owner = owner
        self._turn = (
            asyncio.Lock()
        )  # of whatever reads or changes it: what is known of the files is one thing
        self._used: int | None = None  # bytes, once it is known
        self.separator = "/" if escaped else "."
        self._files: dict[str, dict[str, Path]] = {}  # by folder: base name -> file

    async def _off(self, fn: Callable[..., T], *arguments: Any) -> T:
        """Run what waits for the disk in a thread.

        Raises:
            Full: no room on the disk.
            Temporary: another failure of the disk.
        """
        try:
            async with self._turn:
                return await asyncio.to_thread(fn, *arguments)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise Full(f"no room in {self._root}: {error.strerror}") from None
            raise Temporary(f"{error.filename or self._root}: {error.strerror}") from None

    def _folder(self, name: str) -> Path:
        if name == "INBOX":
            return self._root
        return self._root / ("." + self._on_disk(name).decode("ascii", "surrogateescape"))

    def _parts(self, name: str) -> list[bytes]:
        """The parts of a name as Dovecot's list of folders has them."""
        parts = imap.encode_name(name).split(self.separator.encode())
        if not self._escaped:
            return parts
        escaped = (part.replace(b"\\", b"\\5c").replace(b".", b"\\2e") for part in parts)
        return [b"\\7e" + part[1:] if part.startswith(b"~") else part for part in escaped]

    def _on_disk(self, name: str) -> bytes:
        return b".".join(self._parts(name))

    def _name(self, on_disk: bytes) -> str:
        if self._escaped:
            on_disk = on_disk.replace(b".", b"/")
            for escaped, mark in ((b"\\2e", b"."), (b"\\7e", b"~"), (b"\\5c", b"\\")):
                on_disk = on_disk.replace(escaped, mark)
        return imap.decode_name(on_disk)

    def _ours(self, path: Path) -> None:
        """Give what was made to its owner."""
        if self._owner is not None:
            os.chown(path, *self._owner)

    # -- folders ----------------------------------------------------------------------------------

    def uid(self, handle: str) -> int:
        """See `Sink`; UIDs are Dovecot's."""
        return 0

    def is_ours(self, handle: str, first_next: int) -> bool:
        """See `Sink`."""
        return f".K{self._tag}F" in handle

    async def places(self) -> list[Place]:
        """See `Sink`."""
        return [Place(name, frozenset()) for name in await self._off(self._names)]

    def _names(self) -> list[str]:
        if not self._root.is_dir():
            return ["INBOX"]
        found = (path.name[1:] for path in self._root.glob(".*") if (path / "cur").is_dir())
        return ["INBOX", *sorted(self._name(os.fsencode(name)) for name in found)]

    async def room(self) -> Room | None:
        """See `Sink`; without a quota, what the disk has."""

        def room() -> Room:
            found = os.statvfs(_nearest(self._root))
            free = found.f_bavail * found.f_frsize
            if self._quota is None:
                return Room(0, free)
            used = self._in_use()
            return Room(used, min(self._quota, used + free))

        return await self._off(room)

    def _in_use(self) -> int:
        if self._used is None:
            files = (path for part in ("cur", "new") for path in self._root.glob(f"**/{part}/*"))
            self._used = sum(_size(path) for path in files)
        return self._used

    async def ensure(self, name: str) -> Held:
        """See `Sink`; its UIDs are no numbers of ours, so all of it is asked for."""
        await self._off(self._make, name)
        files = await self._off(self._listed, name)
        return Held(1, len(files) + 1, len(files))

    async def validities(self, names: Iterable[str]) -> Mapping[str, int]:
        """See `Sink`; names of files stay what they are."""
        return {}

    def _make(self, name: str) -> None:
        folder = self._folder(name)
        if len(os.fsencode(folder.name)) > 255:
            raise Unmade(f"The name of a folder is too long: {name!r:.80}")
        wanted = [self._root, folder, *(folder / part for part in ("tmp", "new", "cur"))]
        for path in wanted:
            if not path.is_dir():
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._ours(path)
        if folder != self._root and not (folder / "maildirfolder").exists():
            (folder / "maildirfolder").touch()
            self._ours(folder / "maildirfolder")
        self._subscribe(name)

    def _subscribe(self, name: str) -> None:
        """Dovecot's list, one name a line."""
        if name == "INBOX":
            return
        # One a line: with a head of the format's number, parts have tabs between them (Dovecot 2.3 and 2.4).
        path = self._root / "subscriptions"
        with path.open("a+b") as file:
            file.seek(0)
            lines = file.readlines()
            if not lines and self._escaped:
                file.write(b"V\t2\n\n")
            has_parts = self._escaped if not lines else lines[0].startswith(b"V\t2")
            line = (b"\t" if has_parts else b".").join(self._parts(name)) + b"\n"
            if line not in lines:
                file.write(line)
        self._ours(path)

    def _listed(self, name: str) -> dict[str, Path]:
        if name not in self._files:
            self._files[name] = self._scanned(name)
        return self._files[name]

    def _scanned(self, name: str) -> dict[str, Path]:
        folder = self._folder(name)
        found = {}
        for part in ("new", "cur"):
            with contextlib.suppress(FileNotFoundError):
                for entry in os.scandir(folder / part):
                    found[entry.name.partition(":")[0]] = Path(entry.path)
        return found

    # -- what is there ----------------------------------------------------------------------------

    async def strangers(self, name: str, since: int) -> list[Stranger]:
        """See `Sink`."""

        def look() -> list[Stranger]:
            self._files.pop(name, None)
            keywords = self._keywords(name)
            found = []
            for handle, path in self._listed(name).items():
                with contextlib.suppress(FileNotFoundError):
                    seen = _seen(path, keywords)
                    found.append(Stranger(handle, seen.size, seen.received, seen.flags))
            return found

        return await self._off(look)

    async def look(self, name: str, handles: Iterable[str]) -> Mapping[str, Seen]:
        """See `Sink`."""

        def seen() -> dict[str, Seen]:
            self._files.pop(name, None)
            files = self._listed(name)
            keywords = self._keywords(name)
            found = {}
            for handle in handles:
                path = files.get(handle)
                if path is None:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found[handle] = _seen(path, keywords)
            return found

        return await self._off(seen)

    async def digests(
        self, name: str, handles: Iterable[str], *, as_stored: bool = False
    ) -> Mapping[str, bytes]:
        """See `Sink`."""

        def digest() -> dict[str, bytes]:
            files = self._listed(name)
            found = {}
            for handle in handles:
                if handle in files:
                    with contextlib.suppress(FileNotFoundError), files[handle].open("rb") as file:
                        hashed = hashlib.sha256()
                        while data := file.read(_PIECE):
                            hashed.update(canonical(data) if as_stored else data)
                        found[handle] = hashed.digest()
            return found

        return await self._off(digest)

    # -- what is added ----------------------------------------------------------------------------

    async def put(self, name: str, parcels: Sequence[Parcel], origin: int) -> list[Placed | Unwanted]:
        """See `Sink`."""
        return await self._off(self._put, name, parcels, origin)

    def _put(self, name: str, parcels: Sequence[Parcel], origin: int) -> list[Placed | Unwanted]:
        folder, files = self._folder(name), self._listed(name)
        letters, lost = self._letters(name, {flag for parcel in parcels for flag in parcel.message.flags})
        placed: list[Placed | Unwanted] = []
        new = sum(parcel.size for parcel in parcels if self._handle(parcel, origin) not in files)
        if self._quota is not None:
            if self._in_use() + new > self._quota:
                raise Full(f"the mailbox may have {self._quota / 1e6:,.2f} MB, and they are used")
            self._used = self._in_use() + new
        for parcel in parcels:
            message = parcel.message
            handle = self._handle(parcel, origin)
            if handle not in files:
                suffix = "".join(sorted(letters[flag] for flag in message.flags if flag in letters))
                part = folder / "tmp" / handle
                at = int(message.received.timestamp())
                _write(part, parcel, at)
                self._ours(part)
                final = folder / "cur" / f"{handle}:2,{suffix}"
                os.rename(part, final)
                files[handle] = final
            placed.append(Placed(handle, tuple(flag for flag in message.flags if flag in lost)))
        _flush(folder / "cur")
        return placed

    def _handle(self, parcel: Parcel, origin: int) -> str:
        """A name that is this message's in this folder, however often it is written."""
        message = parcel.message
        at = max(int(message.received.timestamp()), 0)
        host = socket.gethostname().replace("/", "\\057").replace(":", "\\072").replace(",", "_")[:60]
        return f"{at}.K{self._tag}F{origin}U{message.uid}H{parcel.sha256[:6].hex()}.{host},S={parcel.size}"

    async def link(self, name: str, handles: Sequence[str], to: str) -> Mapping[str, str]:
        """See `Sink`; a hard link, so the bytes are there once."""

        def link() -> dict[str, str]:
            source, target = self._listed(name), self._listed(to)
            keywords = self._keywords(name)
            flags = {
                handle: _flags_of(source[handle].name, keywords) for handle in handles if handle in source
            }
            letters, _ = self._letters(to, {flag for each in flags.values() for flag in each})
            made = {}
            for handle, each in flags.items():
                if handle not in target:
                    suffix = "".join(sorted(letters[flag] for flag in each if flag in letters))
                    path = self._folder(to) / "cur" / f"{handle}:2,{suffix}"
                    os.link(source[handle], path)
                    target[handle] = path
                made[handle] = handle
            _flush(self._folder(to) / "cur")
            return made

        return await self._off(link)

    async def flag(
        self, name: str, changes: Iterable[tuple[str, frozenset[str], frozenset[str]]]
    ) -> frozenset[str]:
        """See `Sink`."""

        def flag() -> frozenset[str]:
            self._files.pop(name, None)
            files = self._listed(name)
            wanted = list(changes)
            letters, lost = self._letters(name, {flag for _, added, _ in wanted for flag in added})
            keywords = self._keywords(name)
            for handle, added, removed in wanted:
                path = files.get(handle)
                if path is None:
                    continue
                flags = (_flags_of(path.name, keywords) | added) - removed
                suffix = "".join(sorted(letters[flag] for flag in flags if flag in letters))
                final = self._folder(name) / "cur" / f"{handle}:2,{suffix}"
                with contextlib.suppress(FileNotFoundError):
                    os.rename(path, final)
                    files[handle] = final
            _flush(self._folder(name) / "cur")
            return frozenset(lost)

        return await self._off(flag)

    # -- keywords ---------------------------------------------------------------------------------

    def _keywords(self, name: str) -> dict[str, str]:
        """Letter -> keyword, as Dovecot's file says."""
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self._folder(name) / "dovecot-keywords").read_text("utf-8", "replace").splitlines():
                number, _, keyword = line.partition(" ")
                if number.isdigit() and int(number) < _KEYWORDS and keyword:
                    found[chr(ord("a") + int(number))] = keyword
        return found

    def _letters(self, name: str, flags: set[str]) -> tuple[dict[str, str], set[str]]:
        """The letters of flags in a folder, new keywords given one; and those for which none is left."""
        wanted = sorted(flag for flag in flags if not flag.startswith("\\"))
        letters = {keyword: letter for letter, keyword in self._keywords(name).items()}
        if not all(keyword in letters for keyword in wanted):
            with _locked(self._folder(name)):
                letters = {keyword: letter for letter, keyword in self._keywords(name).items()}
                free = (
                    chr(ord("a") + at)
                    for at in range(_KEYWORDS)
                    if chr(ord("a") + at) not in letters.values()
                )
                for keyword in wanted:
                    if keyword not in letters and (letter := next(free, "")):
                        letters[keyword] = letter
                self._write_keywords(name, letters)
        return letters | _LETTERS, {keyword for keyword in wanted if keyword not in letters}

    def _write_keywords(self, name: str, letters: Mapping[str, str]) -> None:
        path = self._folder(name) / "dovecot-keywords"
        part = path.with_name(f"dovecot-keywords.{os.getpid()}.tmp")
        ordered = sorted((ord(letter) - ord("a"), keyword) for keyword, letter in letters.items())
        part.write_text("".join(f"{number} {keyword}\n" for number, keyword in ordered), "utf-8")
        self._ours(part)
        os.replace(part, path)

    async def close(self) -> None:
        """See `Sink`."""

    def abort(self) -> None:
        """See `Sink`."""


def _flags_of(name: str, keywords: Mapping[str, str]) -> frozenset[str]:
    _, _, letters = name.partition(":2,")
    return frozenset(
        {**_FLAGS, **keywords}[letter] for letter in letters if letter in _FLAGS or letter in keywords
    )


def _seen(path: Path, keywords: Mapping[str, str]) -> Seen:
    stat = path.stat()
    date = datetime.fromtimestamp(int(stat.st_mtime), UTC)
    return Seen(stat.st_size, date, tuple(sorted(_flags_of(path.name, keywords))))


def _write(path: Path, parcel: Parcel, at: int) -> None:
    """A whole file on the disk, with the message's date."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.writelines(parcel.pieces)
        if parcel.file is not None:
            with parcel.file.open("rb") as spooled:
                while data := spooled.read(_PIECE):
                    file.write(data)
        file.flush()
        os.fdatasync(file.fileno())
    os.utime(path, (at, at))


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock under which Dovecot changes its list of keywords: a file that is made by one alone."""
    path = folder / "dovecot-uidlist.lock"
    until = time.monotonic() + _LOCK_S
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            break
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _LOCK_S:
                    path.unlink()
                    continue
            if time.monotonic() > until:
                raise Temporary(f"{path} is held by another program") from None
            time.sleep(0.05)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    """As its name says, else as it is; 0 where it is gone."""
    found = re.search(r",S=(\d+)", path.name)
    if found:
        return int(found[1])
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _nearest(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
