"""Device passwords of mailboxes: made and revoked; `auth.passwords` knows their letters, the gate takes them.

One for each device, each opens one mailbox and nothing else (APP4). Their rows are read at every log-in, so a
revocation is seen by the next one (APP5). Functions take a transaction and raise with nothing changed.
"""

from __future__ import annotations

import time

import sqlalchemy as sa

from ksync_server.auth import audit, mailboxes, organizations
from ksync_server.auth.accounts import checked_name
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.auth.keys import Keys
from ksync_server.auth.mailboxes import Mailbox
from ksync_server.auth.passwords import AppPassword, new_app_password
from ksync_server.auth.rules import Secret
from ksync_server.errors import Forbidden, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Read, Write

_D = t.device_password.c


def create(
    tx: Write, keys: Keys, mailbox: Mailbox, name: str, actor: Actor = OPERATOR
) -> tuple[int, AppPassword]:
    """A new device password: its row id and the secret, which is shown now and never again.

    The owner is told.

    Args:
        name: of the device.

    Raises:
        BadRequest: a malformed name.
        Forbidden: the actor is neither the mailbox's owner nor, where it is nobody's, one who manages its
            organization: an administrator does not read a member's mail.
    """
    owner = mailboxes.owner_of(tx, mailbox)
    if owner is None:
        organizations.require_role(tx, mailbox.organization_id, actor)
    elif actor.name not in (OPERATOR.name, owner.sync_id):
        raise Forbidden("Only the owner of a mailbox makes device passwords for it.")
    secret = new_app_password(Secret.DEVICE_PASSWORD)
    while tx.execute(sa.select(_D.id).where(_D.lookup == secret.lookup)).first():
        secret = new_app_password(Secret.DEVICE_PASSWORD)
    key_id, digest = keys.digest(secret.secret.encode("ascii"))
    row = {
        "lookup": secret.lookup,
        "mailbox_id": mailbox.id,
        "name": checked_name(name, "name of the device"),
        "digest": digest,
        "key_id": key_id,
        "created_at": int(time.time()),
    }
    number = tx.execute(sa.insert(t.device_password).returning(_D.id), row).scalar_one()
    detail = {"id": number, "name": row["name"], "mailbox": mailbox.address}
    audit.record(tx, actor, "device-password.create", _subject(tx, mailbox), detail)
    return number, secret


def revoke(tx: Write, mailbox: Mailbox, number: int | None = None, actor: Actor = OPERATOR) -> int:
    """Revoke one device password of a mailbox, or all of them; returns how many.

    Raises:
        NotFound: the one asked for is not there or revoked already.
        Forbidden: the actor is neither the owner nor one who manages the organization.
    """
    owner = mailboxes.owner_of(tx, mailbox)
    mine = "" if owner is None else owner.sync_id
    organizations.require_role(tx, mailbox.organization_id, actor, but=mine)
    where = (_D.mailbox_id == mailbox.id) & _D.revoked_at.is_(None)
    if number is not None:
        where &= _D.id == number
    count: int = tx.execute(
        sa.update(t.device_password).where(where).values(revoked_at=int(time.time()))
    ).rowcount
    if number is not None and count == 0:
        raise NotFound(f"{mailbox.address} has no device password {number}.")
    detail: dict[str, object] = {"id": number, "count": count, "mailbox": mailbox.address}
    audit.record(tx, actor, "device-password.revoke", _subject(tx, mailbox), detail)
    return count


def _subject(tx: Read, mailbox: Mailbox) -> str:
    """Whose secret it is: the owner, who is told; the address where the mailbox is nobody's."""
    owner = mailboxes.owner_of(tx, mailbox)
    return mailbox.address if owner is None else owner.sync_id
