"""`verify`: everything the store counts or names twice, compared while the server runs, and put right.

Each check reads pages of rows, one snapshot each, so that a change under way is seen whole or not at all:
what it finds is wrong. A repair is a short transaction that first makes sure that nothing moved since the
look, else the check looks again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import sqlalchemy as sa

from ksync_server.auth import audit
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database
from ksync_server.verify import content, rows
from ksync_server.verify.finding import Check, Finding, Look, Suspicion

log = logging.getLogger(__name__)

__all__ = ["CHECKS", "Finding", "verify"]

CHECKS: dict[str, Check] = {**rows.CHECKS, **content.CHECKS}
"""Name -> check, in the order in which they run: what later ones count is put right before."""

_LOOKS = 4  # at one check, while others change the rows that are to be put right
_NAMED = 20  # subjects in one audit row


def verify(
    database: Database,
    blobs: Blobs,
    *,
    repair: bool = False,
    deep: bool = False,
    only: Callable[[str], bool] = lambda name: True,
) -> Iterator[Finding]:
    """Look for faults, one check after the other; safe while the server runs, in any number of processes.

    Args:
        repair: put right what can be.
        deep: read every byte too and compare checksums.
        only: which checks run, by their names.

    Raises:
        Unavailable: the database or the store of bytes does not answer; what was repaired stays repaired.

    Cost: every row once, by pages of at most 500, and a listing of the store of bytes; no lock is held longer
        than one small transaction.
    """
    look = Look(database, blobs, deep)
    for name, check in CHECKS.items():
        if only(name):
            yield from _run(look, name, check, repair)


def _run(look: Look, name: str, check: Check, repair: bool) -> Iterator[Finding]:
    told: set[tuple[str, str]] = set()
    repaired: list[str] = []
    try:
        for attempt in range(_LOOKS):
            moved = False
            for found in check(look):
                key = (found.subject, found.text)
                if key in told:
                    continue
                done = False
                if repair and found.fix is not None:
                    done = _fixed(found)
                    if not done and attempt < _LOOKS - 1:
                        moved = True
                        continue
                told.add(key)
                if done:
                    repaired.append(found.subject)
                    log.warning(
                        "repaired", extra={"check": name, "subject": found.subject, "reason": found.text}
                    )
                yield Finding(name, found.subject, found.text, done, found.help)
            if not moved:
                break
    finally:
        if repaired:
            detail: dict[str, object] = {"count": len(repaired), "first": repaired[:_NAMED]}
            look.database.write(lambda tx: audit.record(tx, audit.OPERATOR, "verify.repair", name, detail))


def _fixed(found: Suspicion) -> bool:
    assert found.fix is not None
    try:
        return found.fix()
    except sa.exc.IntegrityError:  # somebody refers to what was to be taken away
        return False
