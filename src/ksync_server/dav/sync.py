"""sync-collection: what changed since a token, whatever the size of the collection (RFC 6578)."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server.dav import data, objects
from ksync_server.dav.collections import Collection
from ksync_server.dav.places import Kind
from ksync_server.errors import DAV, BadRequest, Forbidden
from ksync_server.store import changes
from ksync_server.store import tables as t
from ksync_server.store.database import Read, Row
from ksync_server.wire.xml import Element

_O = t.object_.c
_P = sa.bindparam
_BETWEEN = (
    sa.select(*objects.COLUMNS)
    .where(_O.collection_id == _P("collection_id"), _O.seq > _P("after"), _O.seq <= _P("until"))
    .order_by(_O.seq)
    .limit(_P("most"))
)


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """A sync-collection body."""

    token: str  # "" = everything
    limit: int | None  # rows at most; None = the client does not care
    names: tuple[str, ...]  # properties asked of each member
    data: data.DataRequest | None


def parse(body: Element, kind: Kind) -> SyncRequest:
    """The body of a sync-collection report.

    Raises:
        BadRequest: no token, no prop, no or an unknown level, a limit that is none.
        Forbidden: sync-traversal-supported: level infinite; or a form of content that we do not answer.

    Spec: RFC 6578 §3.2, §3.3, §6.
    """
    token, prop = body.find(DAV + "sync-token"), body.find(DAV + "prop")
    if token is None or prop is None:
        raise BadRequest("A sync-collection has a sync-token, a sync-level and a prop.")
    level = body.find(DAV + "sync-level")
    match level.text.strip() if level else "":
        case "1":
            pass
        case "infinite":
            raise Forbidden("Only sync-level 1 is here.", precondition=DAV + "sync-traversal-supported")
        case _:
            raise BadRequest("The sync-level is 1 or infinite.")
    names = tuple(dict.fromkeys(child.tag for child in prop.elements()))
    return SyncRequest(token.text.strip(), _limit(body), names, data.find(kind, prop))


def _limit(body: Element) -> int | None:
    limit = body.find(DAV + "limit")
    if limit is None:
        return None
    rows = limit.find(DAV + "nresults")
    text = rows.text.strip() if rows else ""
    if not (text.isascii() and text.isdigit()) or not text.strip("0"):
        raise BadRequest("nresults is a number from 1.")
    return int(text) if len(text) < 10 else None


@dataclass(frozen=True, slots=True)
class SyncPage:
    """What one answer tells. Changed members are read afterwards, by `rows`."""

    collection: Collection
    after: int  # change numbers of the changed members told: after < number <= until
    until: int
    deleted: tuple[str, ...]
    truncated: bool
    token: str  # resumes after the last one told


def page(tx: Read, collection: Collection, asked: SyncRequest, most: int) -> SyncPage:
    """What to tell a client, and the token for its next question.

    Args:
        collection: read in the same snapshot.
        most: members in one answer at most (`dav.max_sync_rows`).

    Raises:
        Forbidden: valid-sync-token.

    Cost: nothing but a comparison when nothing changed; else two index ranges.
    """
    newest = changes.sync_token(tx.generation, collection.id, collection.seq)
    if asked.token == newest:
        return SyncPage(collection, collection.seq, collection.seq, (), False, newest)
    start = changes.position(tx, collection.id, asked.token)
    limit = most if asked.limit is None else min(asked.limit, most)
    found = changes.since(tx, collection.id, start, limit)
    token = changes.sync_token(tx.generation, collection.id, found.position)
    return SyncPage(collection, start.seq, found.position.seq, found.deleted, found.truncated, token)


def rows(tx: Read, found: SyncPage, after: int, most: int) -> list[Row]:
    """Changed members of a page (`objects.COLUMNS`) with numbers over `after`, by number.

    May be asked in later transactions than `page`: who was changed again since has a number beyond the page,
    and the client learns of it with its next question.
    """
    values = {"collection_id": found.collection.id, "after": after, "until": found.until, "most": most}
    return tx.fast(_BETWEEN, values)
