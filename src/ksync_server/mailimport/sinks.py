"""Where messages go: what the importer asks of a destination, whatever it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Protocol

from ksync_server.errors import RemoteError


class Message(NamedTuple):
    """A message of the source, without its bytes."""

    uid: int
    size: int  # as the server says; some lie
    received: datetime
    flags: tuple[str, ...]
    labels: tuple[str, ...] = ()  # of Gmail
    number: str = ""  # Gmail's own, the same in every folder


class Parcel(NamedTuple):
    """A message with its bytes, in memory or in a file."""

    message: Message
    size: int  # of what was fetched
    sha256: bytes
    pieces: tuple[memoryview, ...] = ()
    file: Path | None = None  # of a long message


@dataclass(frozen=True, slots=True)
class Held:
    """What a folder of the destination says of itself."""

    uid_validity: int
    uid_next: int
    messages: int


@dataclass(frozen=True, slots=True)
class Stranger:
    """A message at the destination that has no row: perhaps a copy of ours, perhaps not."""

    handle: str
    size: int
    received: datetime
    flags: tuple[str, ...]


class Seen(NamedTuple):
    """What the destination says of a message that was placed."""

    size: int
    received: datetime
    flags: tuple[str, ...]


class Placed(NamedTuple):
    """The destination has the message. `lost`: keywords that it does not keep."""

    handle: str
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unwanted:
    """The destination refuses this message, and will again."""

    reason: str


class Full(RemoteError):
    """The destination has no room now; what it took of what was asked is found by `strangers`."""


class Unmade(RemoteError):
    """The destination does not make this folder, and will not."""


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes in use, and how many may be."""

    used: int
    limit: int


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that is there."""

    name: str
    attributes: frozenset[str]  # lower case, such as \\sent


class Sink(Protocol):
    """A destination. Names are as people have them; hierarchy is marked by `separator`."""

    @property
    def separator(self) -> str:
        """What stands between the parts of a folder's name; "" where there are no subfolders."""

    @property
    def prefix(self) -> str:
        """What every folder but INBOX must begin with, such as `INBOX.`."""

    @property
    def longest(self) -> int | None:
        """The longest message it takes, in bytes; None = it does not say."""

    @property
    def commands(self) -> int:
        """How many it was asked so far."""

    def uid(self, handle: str) -> int:
        """The UID of a message; 0 where messages have none."""

    def is_ours(self, handle: str, first_next: int) -> bool:
        """Whether a message came since the import first saw its folder, whose next UID was that then."""

    async def places(self) -> list[Place]:
        """The folders that are there."""

    async def room(self) -> Room | None:
        """Its quota, None where it has none."""

    async def ensure(self, name: str) -> Held:
        """Make a folder where it is missing, subscribed to, and say how it is.

        Raises:
            Unmade: the destination will not have it.
            RemoteError: the destination failed.
        """

    async def validities(self, names: Iterable[str]) -> Mapping[str, int]:
        """UIDVALIDITY of folders; those that are not there are missing."""

    async def strangers(self, name: str, since: int) -> list[Stranger]:
        """Messages of a folder from a UID on; all of them where messages have no UID."""

    async def digests(
        self, name: str, handles: Iterable[str], *, as_stored: bool = False
    ) -> Mapping[str, bytes]:
        """SHA-256 of messages, or of what `canonical` leaves of them; those that are gone, or that the
        destination cannot read, are missing."""

    async def put(self, name: str, parcels: Sequence[Parcel], origin: int) -> list[Placed | Unwanted]:
        """Add messages with their flags and dates; may be called again before it has returned.

        Args:
            origin: row of the source's folder: with its UID it names a message for good.

        Raises:
            LeaseLost: another worker may be at it by now.
            Full: there is no room.
            RemoteError: the destination failed; what it took is found by `strangers`.
        """

    async def link(self, name: str, handles: Sequence[str], to: str) -> Mapping[str, str]:
        """Add messages of one folder to another without sending them again; old handle -> new one."""

    async def flag(
        self, name: str, changes: Iterable[tuple[str, frozenset[str], frozenset[str]]]
    ) -> frozenset[str]:
        """Add and remove flags: (handle, added, removed); those that the folder has no place for."""

    async def look(self, name: str, handles: Iterable[str]) -> Mapping[str, Seen]:
        """What the destination says of messages; those that are gone are missing."""

    async def close(self) -> None:
        """End well."""

    def abort(self) -> None:
        """End at once, whatever is under way."""


_AS_STORED = bytes.maketrans(b"\0", b"\x80")


def canonical(data: bytes | memoryview) -> bytes:
    """Bytes without what some destinations change: CR, and NUL, which Dovecot stores as 0x80."""
    return bytes(data).translate(_AS_STORED, b"\r")
