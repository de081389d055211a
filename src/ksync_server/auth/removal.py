"""Deleting an account, with a time in which it can be taken back, and erasing it after that.

What is deleted lets nobody in from the next request on. Its data goes in small transactions by periodic work:
`background.periodic` calls `claim`, then the products' own erasers, then `finish`, each of which may be cut
anywhere and repeated. The audit stays, and the sync id is never given again.
"""

from __future__ import annotations

import json
import time

import sqlalchemy as sa

from ksync_server.auth import accounts, audit, mailboxes, organizations
from ksync_server.auth.accounts import Account
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.errors import Conflict, Forbidden
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Write

_A = t.account.c
_ROWS = 100  # erased in one transaction: some 2 ms
_DAY_S = 86400

_ORGANIZATIONS = (
    sa.select(t.member.c.organization_id)
    .where(t.member.c.account_id == sa.bindparam("id_"))
    .order_by(t.member.c.organization_id)
)
_LAST_DELETION = (
    sa.select(t.audit.c.detail)
    .where(t.audit.c.subject == sa.bindparam("sync_id"), t.audit.c.action == "account.deletion")
    .order_by(t.audit.c.id.desc())
    .limit(1)
)
_DUE = (
    sa.select(_A.id, _A.sync_id)
    .where(
        sa.or_(
            _A.state == "erasing",
            sa.and_(_A.state == "deleted", _A.purge_at <= sa.bindparam("now")),
        )
    )
    .order_by(_A.id)
    .limit(sa.bindparam("most"))
)
_CLAIM = (
    sa.update(t.account)
    .where(
        _A.id == sa.bindparam("id_"),
        sa.or_(
            _A.state == "erasing",
            sa.and_(_A.state == "deleted", _A.purge_at <= sa.bindparam("now")),
        ),
    )
    .values(state="erasing", password_hash=None)
    .returning(_A.id)
)
_HELD = (
    sa.select(t.collection.c.id).where(t.collection.c.account_id == sa.bindparam("id_")).limit(1),
    sa.select(t.drive_member.c.drive_id).where(t.drive_member.c.account_id == sa.bindparam("id_")).limit(1),
)
_DROP = sa.delete(t.account).where(_A.id == sa.bindparam("id_"), _A.state == "erasing").returning(_A.sync_id)


def _some_of(table: sa.Table) -> sa.Executable:
    some = sa.select(table.c.id).where(table.c.account_id == sa.bindparam("id_")).limit(_ROWS)
    return sa.delete(table).where(table.c.id.in_(some)).returning(table.c.id)


# What an account may have any number of; the rest goes with its row.
_MANY = tuple(_some_of(table) for table in (t.app_password, t.recovery_code, t.second_factor, t.job))


def delete(
    tx: Write, account: Account, *, grace_days: int, actor: Actor = OPERATOR, now: int | None = None
) -> int:
    """Delete an account: nobody gets in from the next request on, and its data is erased after the grace.

    The owner is told at the login and the recovery e-mail.

    Returns:
        Unix seconds until when it can be restored.

    Raises:
        Forbidden: the actor is another account.
        Conflict: it is deleted already, or the last legal representative of an organization with products.
    """
    if actor.name not in (OPERATOR.name, account.sync_id):
        raise Forbidden("An account is deleted by its owner or the operator.")
    for (organization_id,) in tx.fast(_ORGANIZATIONS, {"id_": account.id}):
        organizations.hold(tx, organization_id)
        organizations.require_other_representative(tx, organization_id, account)
    found = accounts.by_id(tx, account.id)
    if found.state not in accounts.STATES:
        raise Conflict(f"{account.sync_id} is deleted already.")
    purge_at = (int(time.time()) if now is None else now) + grace_days * _DAY_S
    accounts.update(tx, account.id, state="deleted", purge_at=purge_at)
    accounts.raise_epoch(tx, account.id)
    detail: dict[str, object] = {
        "was": found.state,
        "purge_at": purge_at,
        "told": accounts.addresses(tx, found),
    }
    audit.record(tx, actor, "account.deletion", account.sync_id, detail)
    return purge_at


def restore(tx: Write, account: Account, actor: Actor = OPERATOR, *, now: int | None = None) -> Account:
    """Take a deletion back within the grace: everything is as it was. The owner is told.

    Raises:
        Forbidden: the actor is an account, which cannot have got in.
        Conflict: it is not deleted, or the grace is over.
    """
    if actor.name != OPERATOR.name:
        raise Forbidden("Only the operator restores an account.")
    found = accounts.by_id(tx, account.id)
    at = int(time.time()) if now is None else now
    if found.state in accounts.STATES:
        raise Conflict(f"{account.sync_id} is not deleted.")
    if found.state == "erasing" or found.purge_at is None or found.purge_at <= at:
        raise Conflict(f"The time to restore {account.sync_id} is over: it is being erased.")
    accounts.update(tx, account.id, state=_state_before(tx, found), purge_at=None)
    accounts.raise_epoch(tx, account.id)
    detail: dict[str, object] = {"told": accounts.addresses(tx, found)}
    audit.record(tx, actor, "account.restored", account.sync_id, detail)
    return accounts.by_id(tx, account.id)


def _state_before(tx: Read, account: Account) -> str:
    row = tx.one(_LAST_DELETION, {"sync_id": account.sync_id})
    was = json.loads(row[0])["was"] if row is not None else "suspended"
    return was if was in accounts.STATES else "suspended"


def due(tx: Read, now: int, *, most: int = 100) -> list[tuple[int, str]]:
    """Accounts whose grace is over, those half erased included: row id and sync id."""
    return [(number, sync_id) for number, sync_id in tx.fast(_DUE, {"now": now, "most": most})]


def claim(tx: Write, account_id: int, now: int) -> bool:
    """Begin to erase: from here on nobody restores it. False where it was restored, or erased, meanwhile."""
    return tx.one(_CLAIM, {"id_": account_id, "now": now}) is not None


def finish(database: Database, account_id: int) -> bool:
    """Erase the secrets, a few at a time, and the account itself once nothing of it is left.

    Its mailboxes belong to their organizations and stay there, opened by nobody (`mailboxes.detach`).

    Returns:
        False where a collection or a place in a drive is still there: erase those first, then call again.
    """
    for statement in _MANY:
        while database.write(lambda tx, s=statement: tx.fast(s, {"id_": account_id})):  # type: ignore[misc]
            pass
    return database.write(lambda tx: _drop(tx, account_id))


def _drop(tx: Write, account_id: int) -> bool:
    if any(tx.one(statement, {"id_": account_id}) is not None for statement in _HELD):
        return False
    account = accounts.find_by_id(tx, account_id)
    if account is not None and account.state == "erasing":
        mailboxes.detach(tx, account.id, account.sync_id)
    for (sync_id,) in tx.fast(_DROP, {"id_": account_id}):
        audit.record(tx, Actor("server"), "account.erased", sync_id)
    return True
