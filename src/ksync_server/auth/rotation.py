"""Key sets and the rows made under them: counted, moved to the current set, and retired once none is left.

Sealed secrets are moved at once, by `rotate` and by the periodic `reseal`, in transactions of a few rows.
What is only hashed can be moved when its secret is next shown: application and device passwords by the gate.
A recovery code is spent when it is shown, so those go when their owner makes new ones.

Each step may be the last one before a kill: whatever is left under an older set still opens, because `retire`
refuses while there is any.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from ksync_server.auth import audit, keys
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.auth.keys import Keys
from ksync_server.errors import ConfigError, Conflict
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Write

_PAGE = 100  # sealed secrets moved in one transaction: some 2 ms

_F, _R, _P, _D = t.second_factor.c, t.recovery_code.c, t.app_password.c, t.device_password.c
_SEALED = (
    sa.select(_F.id, _F.account_id, _F.secret)
    .where(_F.id > sa.bindparam("after"))
    .order_by(_F.id)
    .limit(_PAGE)
)
_RESEAL = (
    sa.update(t.second_factor)
    .where(_F.id == sa.bindparam("id_"), _F.secret == sa.bindparam("old", type_=sa.LargeBinary))
    .values(secret=sa.bindparam("new", type_=sa.LargeBinary))
)
# Revoked, ended and spent secrets open nothing under any set.
_live_passwords = sa.and_(
    _P.revoked_at.is_(None), sa.or_(_P.expires_at.is_(None), _P.expires_at > sa.bindparam("now"))
)
_owner = sa.func.coalesce(t.mailbox.c.account_id, 0)
_HASHED = {
    "application_passwords": sa.select(_P.key_id, _P.account_id, sa.func.count())
    .where(_live_passwords)
    .group_by(_P.key_id, _P.account_id),
    "device_passwords": sa.select(_D.key_id, _owner, sa.func.count())
    .select_from(t.device_password.join(t.mailbox, t.mailbox.c.id == _D.mailbox_id))
    .where(_D.revoked_at.is_(None))
    .group_by(_D.key_id, _owner),
    "recovery_codes": sa.select(_R.key_id, _R.account_id, sa.func.count())
    .where(_R.used_at.is_(None))
    .group_by(_R.key_id, _R.account_id),
}
_NAMES = sa.select(t.account.c.id, t.account.c.sync_id)


@dataclass(frozen=True, slots=True)
class Use:
    """How much of an account is under one key set."""

    key_id: str
    account_id: int  # 0: of mailboxes that are nobody's
    kind: str  # application_passwords, device_passwords, recovery_codes, second_factors
    count: int


def _uses(tx: Read) -> Iterator[Use]:
    for kind, statement in _HASHED.items():
        for key_id, account_id, count in tx.fast(statement, {"now": int(time.time())}):
            yield Use(key_id, account_id, kind, count)
    after = 0
    while rows := tx.fast(_SEALED, {"after": after}):
        for number, account_id, secret in rows:
            yield Use(keys.sealed_under(bytes(secret)), account_id, "second_factors", 1)
            after = number


def counts(tx: Read) -> dict[str, dict[str, int]]:
    """Key set -> kind of secret -> how many are under it and still open something.

    Cost: reads every row of the four tables.
    """
    found: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys((*_HASHED, "second_factors"), 0))
    for each in _uses(tx):
        found[each.key_id][each.kind] += each.count
    return dict(found)


def holders(tx: Read, key_id: str) -> list[dict[str, object]]:
    """The accounts that still have secrets under a key set, with how many of each kind."""
    found: dict[int, dict[str, int]] = defaultdict(lambda: dict.fromkeys((*_HASHED, "second_factors"), 0))
    for each in _uses(tx):
        if each.key_id == key_id:
            found[each.account_id][each.kind] += each.count
    names = {0: "(nobody)"} | dict(tuple(row) for row in tx.fast(_NAMES)) if found else {}
    rows = [{"sync_id": names[number], **kinds} for number, kinds in found.items() if number in names]
    return sorted(rows, key=lambda row: str(row["sync_id"]))


def require_sets(tx: Read, ring: Keys) -> None:
    """Whether the key file has every set that rows are under.

    Raises:
        ConfigError: names the sets that are missing and how many secrets need them.
    """
    for key_id, kinds in counts(tx).items():
        if key_id not in ring.sets:
            raise ConfigError(
                f"The key file has no key set {key_id!r}, which {sum(kinds.values())} stored secrets need:"
                " copy the file from the machine that has it."
            )


# -- rotating -------------------------------------------------------------------------------------


def prepare(database: Database, ring: Keys, path: Path, actor: Actor = OPERATOR) -> str:
    """Add a key set that nothing uses yet, or name the one that waits; `rotate` makes it current.

    Between the two the file is copied to every other machine, so that none meets a set that it does not have.

    Raises:
        ConfigError: the file cannot be written; nothing was changed in it.
    """
    waiting = _prepared(ring)
    if waiting is not None:
        return waiting
    name = keys.new_name()
    _record(database, actor, "keys.prepare", name)
    keys.add(path, name)
    return name


def rotate(database: Database, ring: Keys, path: Path, actor: Actor = OPERATOR) -> tuple[str, int]:
    """Make a new key set, or the prepared one, current, and move what is sealed to it.

    Running processes see the file change with the next secret they make.

    Returns:
        The current set's id, and how many sealed secrets were moved.

    Raises:
        ConfigError: the file cannot be written (nothing was changed in it), or a sealed secret does not open
            (it stays as it is; the others were moved).
    """
    name = _prepared(ring) or keys.new_name()
    _record(database, actor, "keys.rotate", name)
    keys.add(path, name)
    keys.use(path, name)
    return name, reseal(database, ring)


def _prepared(ring: Keys) -> str | None:
    """The newest set, where it is newer than the current one."""
    newest = list(ring.sets)[-1]
    return newest if newest != ring.current else None


def reseal(database: Database, ring: Keys) -> int:
    """Seal under the current set what is sealed under an older one; returns how many. Safe to repeat.

    A secret that is replaced meanwhile is left alone.

    Raises:
        ConfigError: some do not open under this key file; the others were moved.

    Cost: transactions of at most 100 rows.
    """
    moved, after, unopened = 0, 0, 0
    while rows := database.fast(_SEALED, {"after": after}):
        after = rows[-1][0]
        fresh = []
        for number, _, secret in rows:
            sealed = bytes(secret)
            try:
                if keys.sealed_under(sealed) not in ring.sets or ring.is_outdated(keys.sealed_under(sealed)):
                    fresh.append({"id_": number, "old": sealed, "new": ring.seal(ring.open(sealed))})
            except ConfigError:
                unopened += 1
        if fresh:
            moved += database.write(lambda tx, fresh=fresh: _move(tx, fresh))  # type: ignore[misc]
    if unopened:
        raise ConfigError(
            f"{unopened} second factors do not open under this key file; they stay as they are."
        )
    return moved


def _move(tx: Write, fresh: list[dict[str, object]]) -> int:
    return sum(tx.execute(_RESEAL, row).rowcount for row in fresh)


def retire(database: Database, ring: Keys, path: Path, name: str, actor: Actor = OPERATOR) -> None:
    """Take a key set out of the file, once nothing is left under it.

    Raises:
        NotFound: there is no such set.
        Conflict: it is current, or was until just now, or secrets are still under it: says how many.
        ConfigError: the file cannot be written; it is as it was.
    """
    keys.check_droppable(ring, name)
    reseal(database, ring)
    with database.read() as tx:
        kinds = counts(tx).get(name, {})
    left = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items() if count)
    if left:
        raise Conflict(f"Key set {name} is still needed: {left}. `keys holders {name}` lists whose.")
    _record(database, actor, "keys.retire", name)
    keys.drop(path, name)


def _record(database: Database, actor: Actor, action: str, name: str) -> None:
    """The audit row comes first: a change that was cut off after it shows as one that was begun."""
    database.write(lambda tx: audit.record(tx, actor, action, name))
