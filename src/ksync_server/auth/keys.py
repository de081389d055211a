"""The key file: secrets that must not lie beside the rows they protect.

One key set is current; older ones stay so that what was made under them still opens. Losing the file makes
every application password, recovery code and second factor useless: back it up apart from the database.
"""

from __future__ import annotations

import base64
import hmac
import os
import secrets
import tomllib
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ksync_server.errors import ConfigError

_NONCE = 12


@dataclass(frozen=True, slots=True)
class KeySet:
    """32 random bytes each: one to hash secrets that are only compared, one to encrypt those read again."""

    pepper: bytes
    seal: bytes


@dataclass(frozen=True, slots=True)
class Keys:
    """All key sets by id, and which one is used for new secrets."""

    current: str
    sets: dict[str, KeySet]

    def digest(self, secret: bytes, key_id: str | None = None) -> tuple[str, bytes]:
        """HMAC-SHA256 of a secret under a pepper: (key id, 32 bytes).

        Raises:
            ConfigError: the key set is not in the file any more.
        """
        name = key_id or self.current
        return name, hmac.digest(self._set(name).pepper, secret, "sha256")

    def seal(self, secret: bytes) -> bytes:
        """Encrypt under the current key; the result names its key."""
        nonce = secrets.token_bytes(_NONCE)
        name = self.current.encode("ascii")
        return name + b":" + nonce + AESGCM(self._set(self.current).seal).encrypt(nonce, secret, name)

    def open(self, sealed: bytes) -> bytes:
        """Decrypt what `seal` made.

        Raises:
            ConfigError: its key is gone, or it was altered.
        """
        name, _, rest = sealed.partition(b":")
        try:
            return AESGCM(self._set(name.decode("ascii")).seal).decrypt(rest[:_NONCE], rest[_NONCE:], name)
        except (InvalidTag, ValueError):
            raise ConfigError(
                "A stored secret does not open: the key file belongs to another store."
            ) from None

    def _set(self, name: str) -> KeySet:
        try:
            return self.sets[name]
        except KeyError:
            raise ConfigError(f"The key file has no key set {name!r}.") from None


def load(path: Path) -> Keys:
    """Read the key file, or make it with one fresh key set (mode 0600, by rename, so never half).

    Raises:
        ConfigError: unreadable, malformed, or readable by others.
    """
    if not path.exists():
        _create(path)
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path}: other users can read it; chmod 600 it.")
        table = tomllib.loads(path.read_text("ascii"))
        sets = {
            name: KeySet(base64.b64decode(each["pepper"]), base64.b64decode(each["seal"]))
            for name, each in table["keys"].items()
        }
        keys = Keys(table["current"], sets)
        if any(len(each.pepper) < 32 or len(each.seal) != 32 for each in sets.values()):
            raise ConfigError(f"{path}: a key is too short.")
        if keys.current not in sets or any(":" in name for name in sets):
            raise ConfigError(f"{path}: current names a key set; names have no colon.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return keys


def _create(path: Path) -> None:
    def key() -> str:
        return base64.b64encode(secrets.token_bytes(32)).decode("ascii")

    path.parent.mkdir(parents=True, exist_ok=True)
    text = f'current = "k1"\n\n[keys.k1]\npepper = "{key()}"\nseal = "{key()}"\n'
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(part, path)  # unlike rename, this never replaces what another process just made
    except FileExistsError:
        pass
    finally:
        part.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
