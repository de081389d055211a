"""What a backup looks like on disk.

    ksync-backup.json             what this folder is
    lock                          one backup at a time
    extents/ab/cd/<key>           bytes, shared by all states; never changed once written
    states/<state>/manifest.json  schema, generation, counts, SHA-256 of the parts
    states/<state>/rows.sqlite    every row; the same from SQLite and from PostgreSQL
    states/<state>/keys.toml      the key file, if it was asked for

A state's name is its number and the time: the highest number is the newest, whatever the clock did.

A state is made beside (`.part`) and published by one rename, so an interrupted backup leaves the earlier
states as they were. Extents need no checksum of their own: each blob's SHA-256 is among the rows.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ksync_server.errors import ConfigError, InsufficientStorage, KsyncError, Unavailable

FORMAT = 1
_MARK = "ksync-backup.json"
_PART = ".part"
_STATE = re.compile("[0-9]{6,}-[0-9]{8}T[0-9]{6}Z")
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a state holds; times are Unix seconds."""

    schema: int
    generation: str
    program: str  # version of the program that wrote it
    database: str  # the dialect it comes from
    began_at: int  # every write acknowledged before is in it
    ended_at: int
    rows_bytes: int
    rows_sha256: str
    counts: dict[str, int]  # rows of each table
    extents: int
    extent_bytes: int
    has_bytes: bool  # False: rows and the names of the extents alone
    keys_sha256: str | None  # of the key file; None: not in the backup
    key_sets: dict[str, str] = field(default_factory=dict)  # fingerprints of the key file's sets, by name
    damaged: list[int] = field(default_factory=list)  # blobs whose bytes the store itself had lost


@dataclass(frozen=True, slots=True)
class State:
    """One published state of a backup, checked as far as the manifest goes."""

    name: str
    folder: Path
    manifest: Manifest

    @property
    def rows(self) -> Path:
        """The database file; never opened in place, since SQLite would write beside it."""
        return self.folder / "rows.sqlite"

    @property
    def keys(self) -> Path:
        """The key file, where the manifest says that there is one."""
        return self.folder / "keys.toml"

    def check(self) -> None:
        """Compare rows and key file with their checksums.

        Raises:
            ConfigError: cut or altered.
        """
        try:
            good = sha256(self.rows) == self.manifest.rows_sha256
            if self.manifest.keys_sha256 is not None:
                good = good and sha256(self.keys) == self.manifest.keys_sha256
        except FileNotFoundError:
            good = False
        if not good:
            raise ConfigError(f"The backup {self.folder} is cut or was altered; it is not used.")


class Bundle:
    """A folder of backups."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._states = folder / "states"

    # -- writing ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder where it is missing, and keep other backups out of it.

        Raises:
            ConfigError: a folder with something else in it, or another backup is being made there.
        """
        mark = self.folder / _MARK
        if self.folder.is_dir() and not mark.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"{self.folder} is neither empty nor a backup.")
        for folder in (self.folder, self._states, self.folder / "extents"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not mark.exists():
            write_file(mark, json.dumps({"format": FORMAT}).encode())
            flush_folder(self.folder)
            flush_folder(self.folder.parent)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"Another backup is being made in {self.folder}.") from None
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def new_state(self, at: int) -> Iterator[Path]:
        """A folder to fill; it is a state once `publish` was called, and gone otherwise.

        Args:
            at: Unix seconds.
        """
        for stale in self._states.glob(f"*{_PART}"):
            shutil.rmtree(stale)
        last = self.names()[-1:]
        number = int(last[0].partition("-")[0]) + 1 if last else 1
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(at))
        part = self._states / f"{number:06}-{stamp}{_PART}"
        part.mkdir(mode=0o700)
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def publish(self, part: Path, manifest: Manifest) -> State:
        """Write the manifest and make a filled folder a state; durable when this returns."""
        body = _canonical(asdict(manifest))
        content = json.dumps(
            {**asdict(manifest), "format": FORMAT, "sha256": hashlib.sha256(body).hexdigest()}
        )
        write_file(part / "manifest.json", content.encode())
        flush_folder(part)
        final = part.with_name(part.name.removesuffix(_PART))
        part.rename(final)
        flush_folder(self._states)
        return State(final.name, final, manifest)

    def extent(self, key: str) -> Path:
        """Where an extent is or would be."""
        return self.folder / "extents" / key[:2] / key[2:4] / key

    def prune(self, keep: int) -> tuple[int, int]:
        """Forget all but the newest states, and the extents that no state names.

        Returns:
            States and extents that were erased.

        Raises:
            ConfigError: a state that stays cannot be read, so what it needs is not known; nothing is erased.
        """
        states = self.names()
        old, kept = states[:-keep], states[-keep:]
        for name in old:
            # By its new name a half-erased one is no state.
            gone = (self._states / name).rename(self._states / (name + _PART))
            shutil.rmtree(gone)
        flush_folder(self._states)
        needed: set[str] = set()
        for name in kept:
            needed.update(key for key, _ in extents_of(self._states / name / "rows.sqlite"))
        erased = 0
        for path in (self.folder / "extents").glob("??/??/*"):
            if path.name not in needed:
                path.unlink()
                erased += 1
        return len(old), erased

    # -- reading ----------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Names of the published states, oldest first."""
        if not self._states.is_dir():
            return []
        found = (path.name for path in self._states.iterdir())
        return sorted(name for name in found if _STATE.fullmatch(name))

    def state(self, name: str | None = None) -> State:
        """A state by its name, or the newest one.

        Raises:
            ConfigError: there is none, it is of a newer program, or its manifest is cut or altered.
        """
        names = self.names()
        if not names:
            raise ConfigError(f"There is no backup in {self.folder}.")
        if name is not None and name not in names:
            raise ConfigError(f"There is no state {name} in {self.folder}; there are: {', '.join(names)}.")
        folder = self._states / (name or names[-1])
        try:
            found: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
            version, wanted = found.pop("format"), found.pop("sha256")
            if version == FORMAT and hashlib.sha256(_canonical(found)).hexdigest() == wanted:
                return State(folder.name, folder, Manifest(**found))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            version = FORMAT
        if version != FORMAT:
            raise ConfigError(f"The backup {folder} has format {version}; this program knows {FORMAT}.")
        raise ConfigError(f"The backup {folder} is cut or was altered; it is not used.")


def extents_of(rows: Path) -> list[tuple[str, int]]:
    """Keys and sizes of every extent that a state's rows name, in the order of the keys."""
    # immutable: nothing is written beside a published file, and no lock is asked for.
    connection = sqlite3.connect(f"{rows.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        return connection.execute("SELECT key, size FROM extent ORDER BY key").fetchall()
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{rows} cannot be read: {error}") from error
    finally:
        connection.close()


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """A small file with its bytes on the disk; only the server's user may read it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_file(path: Path) -> None:
    """Bring a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Failures of the disk as sentences.

    Raises:
        InsufficientStorage: it is full.
        Unavailable: it failed otherwise.
    """
    try:
        yield
    except KsyncError:
        raise
    except (OSError, sqlite3.Error) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
            raise InsufficientStorage(f"{what}: the disk is full.") from error
        raise Unavailable(f"{what}: {error}.") from error


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
