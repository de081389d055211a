"""The only door: `identify` says who it is, `authorize` says whether they may do that.

Every protocol asks here, and both functions fail closed: what is not known to be allowed is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Service(StrEnum):
    """What a secret is being used for; the scopes of application passwords have the same names."""

    CALDAV = "caldav"
    CARDDAV = "carddav"
    DRIVE = "drive"
    SYNC = "sync"  # the sync host where neither calendars nor contacts are addressed: principals, "/"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the client sent, decoded."""

    name: str
    secret: str


@dataclass(frozen=True, slots=True)
class Identity:
    """An account that passed the door, and with which secret."""

    account_id: int
    sync_id: str  # canonical, upper case
    login_email: str
    display_name: str
    scopes: frozenset[str]  # caldav, carddav, drive
    app_password_id: int | None  # None: the account password


@dataclass(frozen=True, slots=True)
class HomeTarget:
    """The calendars or address books (or, with Service.SYNC, the principal) of an account."""

    service: Service
    owner: str  # sync id as written in the URL, any case


@dataclass(frozen=True, slots=True)
class DriveTarget:
    """One drive, by the number in its host name or path."""

    drive_id: int


@dataclass(frozen=True, slots=True)
class HomeGrant:
    """The home exists and this identity may use the verb there."""

    account_id: int
    sync_id: str


@dataclass(frozen=True, slots=True)
class DriveGrant:
    """The drive exists, its offer includes WebDAV, the identity is a member and may use the verb."""

    drive_id: int
    collection_id: int
    name: str
    offer: str  # canonical id
    account_id: int
    root_id: int  # node: the member's private root
    trash_id: int  # node: the member's deleted items
    common_id: int  # node: Common documents
    max_file_bytes: int
    max_chunked_bytes: int
    quota_bytes: int | None  # None = no limit
    used_bytes: int
