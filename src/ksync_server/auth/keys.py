"""The key file: secrets that must not lie beside the rows they protect.

One key set is current; older ones stay so that what was made under them still opens. Losing the file makes
every application password, recovery code and second factor useless: back it up apart from the database.

The file changes by rename alone, and a running process reads it again as soon as it has changed. What rows
use which set, and how they move to the current one, is in `auth.rotation`.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hmac
import logging
import os
import re
import secrets
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ksync_server.errors import ConfigError, Conflict, NotFound

log = logging.getLogger(__name__)

_NONCE = 12
_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
_RETIRE_AFTER_S = 120  # a request that began under the old set has written, or failed, by then


@dataclass(frozen=True, slots=True)
class KeySet:
    """32 random bytes each: one to hash secrets that are only compared, one to encrypt those read again."""

    pepper: bytes
    seal: bytes
    created_at: int = 0  # Unix seconds; 0 = not known


@dataclass(frozen=True, slots=True)
class _Contents:
    """What the file says."""

    current: str
    sets: Mapping[str, KeySet]
    current_since: int


class Keys:
    """All key sets by id, and which one is used for new secrets; thread-safe."""

    def __init__(self, current: str, sets: Mapping[str, KeySet], *, path: Path | None = None) -> None:
        """Key sets that are not read again; `load` gives those of a file, which are."""
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._contents = _Contents(current, dict(sets), 0)

    @property
    def current(self) -> str:
        """The id of the set for new secrets.

        Cost: one stat of the file, a microsecond.
        """
        return self._fresh().current

    @property
    def sets(self) -> Mapping[str, KeySet]:
        """Every set by its id."""
        return self._fresh().sets

    @property
    def current_since(self) -> int:
        """Unix seconds when the current set became it; 0 = since ever."""
        return self._fresh().current_since

    def is_outdated(self, name: str) -> bool:
        """Whether what was made under a set should move to the current one, which is newer.

        Never the other way: two machines with unlike files would move one row to and fro.
        """
        contents = self._fresh()
        if name == contents.current:
            return False
        order = tuple(contents.sets)
        return name in contents.sets and order.index(name) < order.index(contents.current)

    def digest(self, secret: bytes, key_id: str | None = None) -> tuple[str, bytes]:
        """HMAC-SHA256 of a secret under a pepper: (key id, 32 bytes).

        Raises:
            ConfigError: the key set is not in the file.
        """
        name = key_id or self.current
        return name, hmac.digest(self._set(name).pepper, secret, "sha256")

    def seal(self, secret: bytes) -> bytes:
        """Encrypt under the current key; the result names its key."""
        nonce = secrets.token_bytes(_NONCE)
        current = self.current
        name = current.encode("ascii")
        return name + b":" + nonce + AESGCM(self._set(current).seal).encrypt(nonce, secret, name)

    def open(self, sealed: bytes) -> bytes:
        """Decrypt what `seal` made.

        Raises:
            ConfigError: its key set is not in the file, or it was altered.
        """
        name, _, rest = sealed.partition(b":")
        try:
            return AESGCM(self._set(sealed_under(sealed)).seal).decrypt(rest[:_NONCE], rest[_NONCE:], name)
        except (InvalidTag, ValueError):
            raise ConfigError(
                "A stored secret does not open: the key file belongs to another store."
            ) from None

    def _set(self, name: str) -> KeySet:
        found = self._contents.sets.get(name) or self._fresh().sets.get(name)
        if found is None:
            raise ConfigError(
                f"The key file {self._path or ''} has no key set {name!r}:"
                " copy the file from the machine that has it."
            )
        return found

    def _fresh(self) -> _Contents:
        """The contents of the file as it is now; those last read where it cannot be read."""
        if self._path is None:
            return self._contents
        try:
            seen = _identity(self._path)
        except OSError:
            seen = ()
        if seen != self._seen:
            try:
                self._contents = _read(self._path)
            except ConfigError as error:  # what was read before is better than nothing
                log.error("the key file cannot be read again", extra={"reason": str(error)})
            self._seen = seen
        return self._contents


def sealed_under(sealed: bytes) -> str:
    """The id of the key set that `Keys.seal` used."""
    return sealed.partition(b":")[0].decode("ascii", "replace")


def load(path: Path) -> Keys:
    """Read the key file, or make it with one fresh key set (mode 0600, by link, so never half).

    Raises:
        ConfigError: unreadable, malformed, or readable by others.
    """
    if not path.exists():
        _create(path)
    contents = _read(path)
    keys = Keys(contents.current, contents.sets, path=path)
    keys.sets  # noqa: B018 - remembers which file this was
    return keys


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode


def _read(path: Path) -> _Contents:
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path}: other users can read it; chmod 600 it.")
        table = tomllib.loads(path.read_text("ascii"))
        sets = {
            name: KeySet(
                base64.b64decode(each["pepper"]),
                base64.b64decode(each["seal"]),
                int(each.get("created_at", 0)),
            )
            for name, each in table["keys"].items()
        }
        contents = _Contents(table["current"], sets, int(table.get("current_since", 0)))
        if any(len(each.pepper) < 32 or len(each.seal) != 32 for each in sets.values()):
            raise ConfigError(f"{path}: a key is too short.")
        if contents.current not in sets or not all(_NAME.fullmatch(name) for name in sets):
            raise ConfigError(f"{path}: current names a key set; names are letters, digits, - and _.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return contents


# -- changing the file ----------------------------------------------------------------------------


def new_name() -> str:
    """An id for a key set; random, so that files of machines that were changed apart can be put together."""
    return f"k-{secrets.token_hex(4)}"


def add(path: Path, name: str, *, now: int | None = None) -> None:
    """Add a fresh key set, the last of the file; nothing uses it yet. One that is there stays as it is.

    Raises:
        ConfigError: the file cannot be used or written; it is as it was.
    """
    with _changing(path) as contents:
        if name not in contents.sets:
            at = int(time.time()) if now is None else now
            fresh = KeySet(secrets.token_bytes(32), secrets.token_bytes(32), at)
            _replace(
                path, _Contents(contents.current, {**contents.sets, name: fresh}, contents.current_since)
            )


def use(path: Path, name: str, *, now: int | None = None) -> None:
    """Make a key set of the file the one for new secrets.

    Raises:
        NotFound: the file has no such set.
        ConfigError: the file cannot be used or written; it is as it was.
    """
    with _changing(path) as contents:
        if name not in contents.sets:
            raise NotFound(f"{path} has no key set {name!r}.")
        if name != contents.current:
            at = int(time.time()) if now is None else now
            _replace(path, _Contents(name, contents.sets, at))


def drop(path: Path, name: str, *, now: int | None = None) -> None:
    """Take a key set out of the file, for good: the caller knows that nothing is left under it.

    Raises:
        NotFound: the file has no such set.
        Conflict: it is the current one, or another became that so recently that a request under way may still
            write under the old one.
        ConfigError: the file cannot be used or written; it is as it was.
    """
    with _changing(path) as contents:
        check_droppable(contents, name, now=now)
        left = {each: keys for each, keys in contents.sets.items() if each != name}
        _replace(path, _Contents(contents.current, left, contents.current_since))


def check_droppable(keys: Keys | _Contents, name: str, *, now: int | None = None) -> None:
    """Whether `drop` may take a set away.

    Raises:
        NotFound: there is no such set.
        Conflict: see `drop`.
    """
    if name not in keys.sets:
        raise NotFound(f"The key file has no key set {name!r}.")
    if name == keys.current:
        raise Conflict(f"{name} is the current key set: rotate first.")
    age_s = (int(time.time()) if now is None else now) - keys.current_since
    if age_s < _RETIRE_AFTER_S:
        raise Conflict(
            f"{keys.current} is current for {age_s} s only, and requests that began before may still write"
            f" under another set. Try again {_RETIRE_AFTER_S - age_s} s from now."
        )


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[_Contents]:
    """The file's contents while no other command changes it: a lock on a file beside it."""
    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for left in path.parent.glob(f"{path.name}.*.part"):  # by a command that was killed
            left.unlink(missing_ok=True)
        yield _read(path)
    finally:
        os.close(descriptor)


def _text(contents: _Contents) -> str:
    lines = [f'current = "{contents.current}"']
    if contents.current_since:
        lines.append(f"current_since = {contents.current_since}")
    for name, each in contents.sets.items():
        lines += ["", f"[keys.{name}]"]
        if each.created_at:
            lines.append(f"created_at = {each.created_at}")
        lines.append(f'pepper = "{base64.b64encode(each.pepper).decode("ascii")}"')
        lines.append(f'seal = "{base64.b64encode(each.seal).decode("ascii")}"')
    return "\n".join(lines) + "\n"


def _replace(path: Path, contents: _Contents) -> None:
    """The whole new file or, whatever happens, the whole old one; owner and group stay."""
    path = path.resolve()  # a symbolic link stays one
    owner = path.stat()
    try:
        part = _write_part(path, contents)
        try:
            if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
                os.chown(part, owner.st_uid, owner.st_gid)
            os.replace(part, path)
        except BaseException:
            part.unlink()
            raise
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    _flush_folder(path)


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = KeySet(secrets.token_bytes(32), secrets.token_bytes(32), int(time.time()))
    name = new_name()  # two machines that each made a file of their own are told apart
    part = _write_part(path, _Contents(name, {name: fresh}, 0))
    try:
        os.link(part, path)  # unlike rename, this never replaces what another process just made
    except FileExistsError:
        pass
    finally:
        part.unlink()
    _flush_folder(path)


def _write_part(path: Path, contents: _Contents) -> Path:
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(_text(contents))
        file.flush()
        os.fsync(file.fileno())
    return part


def _flush_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
