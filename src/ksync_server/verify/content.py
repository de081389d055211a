"""Checks of rows against bytes: what is on the store, what should be, and with `deep` what is inside."""

from __future__ import annotations

import time
from collections.abc import Iterator

import sqlalchemy as sa

from ksync_server.store import scrub
from ksync_server.store import tables as t
from ksync_server.store.blobs import pages
from ksync_server.store.database import Write
from ksync_server.store.extents import Stored
from ksync_server.verify.finding import PAGE, Check, Look, Suspicion, between, every, first

_B, _E, _G = t.blob.c, t.extent.c, t.garbage.c
_LOST = "its bytes are lost: restore from a backup, or upload again what holds it"
_REST_S = 2 * 86400  # the reaper comes round every day at least


# -- blobs against their parts --------------------------------------------------------------------

_parts = sa.select(sa.func.coalesce(sa.func.sum(_E.size), 0)).where(_E.blob_id == _B.id).scalar_subquery()
_MISFIT = sa.select(_B.id, _B.size, sa.func.coalesce(sa.func.length(_B.content), 0), _parts).where(
    between(_B.id), _B.size != sa.func.coalesce(sa.func.length(_B.content), _parts)
)


def blob_sizes(look: Look) -> Iterator[Suspicion]:
    """A blob is as long as its row's content, or as its extents together."""
    for blob, size, inline, extents in look.pages(_B.id, _MISFIT):
        text = f"should have {size} bytes, has {inline or extents}"
        yield Suspicion(f"blob {blob}", text, help=_LOST)


# -- garbage --------------------------------------------------------------------------------------

_USED_GARBAGE = sa.select(_G.key).where(between(_G.key), sa.exists().where(_E.key == _G.key))
_OVERDUE = sa.select(sa.func.count()).select_from(t.garbage).where(_G.since < sa.bindparam("before"))


def garbage_in_use(look: Look) -> Iterator[Suspicion]:
    """Nothing that a blob names waits to be erased."""
    for (key,) in look.pages(_G.key, _USED_GARBAGE, ""):

        def drop(tx: Write, key: str = key) -> bool:
            used = sa.exists().where(_E.key == _G.key)
            return tx.execute(sa.delete(t.garbage).where(_G.key == key, used)).rowcount == 1

        yield Suspicion(f"extent {key}", "is named by a blob and by the garbage", look.fix(drop))


def garbage_overdue(look: Look) -> Iterator[Suspicion]:
    """What was let go is erased in time."""
    before = int(time.time() - look.blobs.settings.reap_after_s) - _REST_S
    with look.database.read() as tx:
        overdue = tx.execute(_OVERDUE, {"before": before}).scalar_one()
    if overdue:

        def reap() -> bool:
            while look.blobs.reap_garbage(PAGE) == PAGE:
                pass
            return True

        text = f"{overdue} extents wait to be erased for days: the job worker does not come to it"
        yield Suspicion("garbage", text, reap)


# -- rows against the store -----------------------------------------------------------------------


def extents(look: Look) -> Iterator[Suspicion]:
    """Every extent of a blob is on the store with its size; what is there and old enough has a name.

    Rows and listing are walked side by side in the order of the keys. What does not fit is asked for once
    more, one by one: while the listing came, files were uploaded and erased.
    """
    low = ""
    for page in pages(look.blobs.extents.list_stored()):
        yield from _span(look, low, page[-1].key, page)
        low = page[-1].key
    yield from _span(look, low, None, [])


def _span(look: Look, low: str, high: str | None, listed: list[Stored]) -> Iterator[Suspicion]:
    """The keys in `low < key <= high`."""
    sizes = {each.key: each.size for each in listed}
    after = low
    while True:
        query = sa.select(_E.key, _E.size).where(_E.key > after).order_by(_E.key).limit(PAGE)
        with look.database.read() as tx:
            rows = every(tx, query if high is None else query.where(_E.key <= high))
        for key, size in rows:
            if sizes.get(key) != size:
                yield from _misfit(look, key)
        if len(rows) < PAGE:
            break
        after = rows[-1][0]
    before = time.time() - look.blobs.settings.reap_after_s
    for key in look.blobs.orphans([each for each in listed if each.written_at <= before]):

        def erase(key: str = key) -> bool:
            look.blobs.extents.erase([key])
            return True

        yield Suspicion(f"extent {key}", f"of {sizes[key]} bytes is named by nobody", erase)


def _misfit(look: Look, key: str) -> Iterator[Suspicion]:
    found = look.blobs.extents.size(key)
    with look.database.read() as tx:
        row = first(tx, sa.select(_E.blob_id, _E.size).where(_E.key == key))
    if row is None or row[1] == found:
        return
    blob, size = row
    text = f"of blob {blob} " + (
        f"has {found} bytes in place of {size}" if found is not None else "is missing on the store"
    )
    look.blobs.mark_damaged(blob, f"extent {key} {text}")
    yield Suspicion(f"extent {key}", text, help=_LOST)


# -- content --------------------------------------------------------------------------------------

_DAMAGED = sa.select(_B.id, _B.damaged_at).where(between(_B.id), _B.damaged_at.is_not(None))
_HOLDERS = sa.union_all(
    sa.select(sa.literal("file").label("kind"), t.node.c.id).where(t.node.c.blob_id == sa.bindparam("blob")),
    sa.select(sa.literal("object"), t.object_.c.id).where(t.object_.c.blob_id == sa.bindparam("blob")),
).limit(10)


def damaged(look: Look) -> Iterator[Suspicion]:
    """No blob is known to be damaged; with `deep`, every byte is read before that is said."""
    if look.deep:
        for _ in scrub.scrubbing(look.blobs, scrub.every(look.blobs)):
            pass
    for blob, at in look.pages(_B.id, _DAMAGED):
        with look.database.read() as tx:
            holders = every(tx, _HOLDERS, {"blob": blob})
        held = ", ".join(f"{kind} {number}" for kind, number in holders)
        moment = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(at))
        yield Suspicion(f"blob {blob}", f"of {held} was found damaged at {moment}", help=_LOST)


CHECKS: dict[str, Check] = {
    "blob-sizes": blob_sizes,
    "garbage-in-use": garbage_in_use,
    "garbage-overdue": garbage_overdue,
    "extents": extents,
    "damaged": damaged,
}
