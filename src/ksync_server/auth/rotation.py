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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from ksync_server.auth import audit, keys
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.auth.keys import Keys
from ksync_server.errors import ConfigError, Conflict
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Row, Write

_PAGE = 100  # sealed secrets moved in one transaction: some 2 ms

_F, _R, _J = t.second_factor.c, t.recovery_code.c, t.job_secret.c
_P, _D, _M = t.app_password.c, t.device_password.c, t.mailbox.c


@dataclass(frozen=True, slots=True)
class _Sealed:
    """A table with sealed secrets: a page of it by key, and the change of one row, if it is what was read.

    Rows are two columns of a key, the account, what is sealed.
    """

    page: sa.Executable
    change: sa.Executable


_after, _after_name = sa.bindparam("after", type_=sa.BigInteger), sa.bindparam("after_name", type_=sa.Text)
_id, _name = sa.bindparam("id_", type_=sa.BigInteger), sa.bindparam("name_", type_=sa.Text)
_old, _new = (sa.bindparam(each, type_=sa.LargeBinary) for each in ("old", "new"))
_SEALED = {
    "second_factors": _Sealed(
        sa.select(_F.id, sa.literal_column("''"), _F.account_id, _F.secret)
        .where(_F.id > _after)
        .order_by(_F.id)
        .limit(_PAGE),
        sa.update(t.second_factor)
        .where(_F.id == _id, _F.secret == _old)
        .values(secret=_new)
        .returning(_F.id),
    ),
    "job_secrets": _Sealed(
        sa.select(_J.job_id, _J.name, t.job.c.account_id, _J.sealed)
        .join(t.job, t.job.c.id == _J.job_id)
        .where(sa.tuple_(_J.job_id, _J.name) > sa.tuple_(_after, _after_name))
        .order_by(_J.job_id, _J.name)
        .limit(_PAGE),
        sa.update(t.job_secret)
        .where(_J.job_id == _id, _J.name == _name, _J.sealed == _old)
        .values(sealed=_new)
        .returning(_J.job_id),
    ),
}
# Revoked, ended and spent secrets open nothing under any set.
_live_passwords = sa.and_(
    _P.revoked_at.is_(None), sa.or_(_P.expires_at.is_(None), _P.expires_at > sa.bindparam("now"))
)
_HASHED = {
    "application_passwords": sa.select(_P.key_id, _P.account_id, sa.func.count())
    .where(_live_passwords)
    .group_by(_P.key_id, _P.account_id),
    "device_passwords": sa.select(_D.key_id, _M.account_id, sa.func.count())
    .select_from(t.device_password.join(t.mailbox, _M.id == _D.mailbox_id))
    .where(_D.revoked_at.is_(None))
    .group_by(_D.key_id, _M.account_id),
    "recovery_codes": sa.select(_R.key_id, _R.account_id, sa.func.count())
    .where(_R.used_at.is_(None))
    .group_by(_R.key_id, _R.account_id),
}
_NAMES = sa.select(t.account.c.id, t.account.c.sync_id)
KINDS = (*_HASHED, *_SEALED)
"""The kinds of secret that key sets are counted by."""


@dataclass(frozen=True, slots=True)
class Use:
    """How much of an account is under one key set."""

    key_id: str
    account_id: int | None  # None: the server's, or of mailboxes that are nobody's
    kind: str  # one of KINDS
    count: int


def _pages(read: Callable[[sa.Executable, dict[str, object]], list[Row]], kind: str) -> Iterator[list[Row]]:
    """All sealed secrets of a kind, a few at a time."""
    after, name = 0, ""
    while rows := read(_SEALED[kind].page, {"after": after, "after_name": name}):
        yield rows
        after, name = rows[-1][:2]


def _uses(tx: Read) -> Iterator[Use]:
    for kind, statement in _HASHED.items():
        for key_id, account_id, count in tx.fast(statement, {"now": int(time.time())}):
            yield Use(key_id, account_id, kind, count)
    for kind in _SEALED:
        for rows in _pages(tx.fast, kind):
            for _, _, account_id, sealed in rows:
                yield Use(keys.sealed_under(bytes(sealed)), account_id, kind, 1)


def counts(tx: Read) -> dict[str, dict[str, int]]:
    """Key set -> kind of secret -> how many are under it and still open something.

    Cost: reads every row of the five tables.
    """
    found: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(KINDS, 0))
    for each in _uses(tx):
        found[each.key_id][each.kind] += each.count
    return dict(found)


def holders(tx: Read, key_id: str) -> list[dict[str, object]]:
    """The accounts that still have secrets under a key set, with how many of each kind; None = the server,
    or mailboxes that are nobody's."""
    found: dict[int | None, dict[str, int]] = defaultdict(lambda: dict.fromkeys(KINDS, 0))
    for each in _uses(tx):
        if each.key_id == key_id:
            found[each.account_id][each.kind] += each.count
    names = {None: None, **dict(tuple(row) for row in tx.fast(_NAMES))} if found else {}
    rows = [{"sync_id": names[number], **kinds} for number, kinds in found.items() if number in names]
    return sorted(rows, key=lambda row: (row["sync_id"] is None, str(row["sync_id"])))


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
    moved, unopened = 0, []
    for kind in _SEALED:
        fresh, bad = _resealed(database, ring, kind)
        moved += fresh
        unopened += [f"{bad} {_words(kind)}"] if bad else []
    if unopened:
        raise ConfigError(f"{', '.join(unopened)} do not open under this key file; they stay as they are.")
    return moved


def _resealed(database: Database, ring: Keys, kind: str) -> tuple[int, int]:
    """How many of a kind were moved, and how many do not open."""
    moved, unopened = 0, 0
    for rows in _pages(database.fast, kind):
        fresh = []
        for number, name, _, secret in rows:
            sealed = bytes(secret)
            try:
                if keys.sealed_under(sealed) not in ring.sets or ring.is_outdated(keys.sealed_under(sealed)):
                    new = ring.seal(ring.open(sealed))
                    fresh.append({"id_": number, "name_": name, "old": sealed, "new": new})
            except ConfigError:
                unopened += 1
        if fresh:
            moved += database.write(partial(_move, kind=kind, fresh=fresh))
    return moved, unopened


def _move(tx: Write, kind: str, fresh: list[dict[str, object]]) -> int:
    return sum(len(tx.fast(_SEALED[kind].change, row)) for row in fresh)


def _words(kind: str) -> str:
    return kind.replace("_", " ")


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
    left = ", ".join(f"{count} {_words(kind)}" for kind, count in kinds.items() if count)
    if left:
        raise Conflict(f"Key set {name} is still needed: {left}. `keys holders {name}` lists whose.")
    _record(database, actor, "keys.retire", name)
    keys.drop(path, name)


def _record(database: Database, actor: Actor, action: str, name: str) -> None:
    """The audit row comes first: a change that was cut off after it shows as one that was begun."""
    database.write(lambda tx: audit.record(tx, actor, action, name))
