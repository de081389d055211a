"""URLs of the sync host: what a path names, and the path of each thing.

`/` and `/principals/`, `/principals/<SYNCID>/`, `/calendars/<SYNCID>/`, `/calendars/<SYNCID>/<name>/`,
`/calendars/<SYNCID>/<name>/<object>` and the same below `/addressbooks/`. A sync id is taken in any case and
answered in upper case.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ksync_server.auth.gate import HomeTarget, Identity, Service
from ksync_server.errors import NotFound
from ksync_server.http import Request


class Kind(StrEnum):
    """What a home set holds; the value is that of `collection.kind`."""

    CALENDAR = "calendar"
    ADDRESSBOOK = "addressbook"

    @property
    def segment(self) -> str:
        """First segment of its URLs."""
        return "calendars" if self is Kind.CALENDAR else "addressbooks"

    @property
    def service(self) -> Service:
        """The scope a secret needs there."""
        return Service.CALDAV if self is Kind.CALENDAR else Service.CARDDAV


class Level(StrEnum):
    """How deep in the tree a path points."""

    ROOT = "root"  # "/"
    BRANCH = "branch"  # /principals/, /calendars/, /addressbooks/
    PRINCIPAL = "principal"
    HOME = "home"
    COLLECTION = "collection"
    OBJECT = "object"
    BELOW = "below"  # deeper than any resource can be


PRINCIPALS = "principals"
_KINDS = {kind.segment: kind for kind in Kind}


@dataclass(frozen=True, slots=True)
class Place:
    """What a path names, whether or not it is there."""

    level: Level
    kind: Kind | None = None  # None: the root and principals
    owner: str = ""  # sync id as written; "" where the path has none
    collection: str = ""
    object: str = ""

    @property
    def service(self) -> Service:
        """The scope a secret needs there."""
        return self.kind.service if self.kind else Service.SYNC

    def target(self, identity: Identity) -> HomeTarget:
        """What to ask the gate for; paths without a sync id are everybody's own."""
        return HomeTarget(self.service, self.owner or identity.sync_id)


def parse(segments: tuple[str, ...]) -> Place:
    """The place of a decoded path relative to the site.

    Raises:
        NotFound: no such branch.
    """
    if not segments:
        return Place(Level.ROOT)
    head, *rest = segments
    kind = _KINDS.get(head)
    if kind is None and head != PRINCIPALS:
        raise NotFound("There is nothing at this address.")
    if not rest:
        return Place(Level.BRANCH, kind)
    owner = rest[0]
    if kind is None:
        if len(rest) > 1:
            raise NotFound("There is nothing at this address.")
        return Place(Level.PRINCIPAL, None, owner)
    match rest[1:]:
        case []:
            return Place(Level.HOME, kind, owner)
        case [collection]:
            return Place(Level.COLLECTION, kind, owner, collection)
        case [collection, name]:
            return Place(Level.OBJECT, kind, owner, collection, name)
        case _:
            return Place(Level.BELOW, kind, owner, rest[1])


def principal(request: Request, sync_id: str) -> str:
    """Href of a principal."""
    return request.href((PRINCIPALS, sync_id), folder=True)


def home(request: Request, kind: Kind, sync_id: str) -> str:
    """Href of a home set."""
    return request.href((kind.segment, sync_id), folder=True)


def collection(request: Request, kind: Kind, sync_id: str, name: str) -> str:
    """Href of a collection; an object's is this followed by its quoted name."""
    return request.href((kind.segment, sync_id, name), folder=True)
