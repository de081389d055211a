"""Application passwords: made and revoked; `auth.passwords` knows their letters, the gate lets them in.

Functions take a transaction and raise with nothing changed. Their rows are read on every request, so a
revocation is seen by the next one (APP5).
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import sqlalchemy as sa

from ksync_server.auth import audit, folders
from ksync_server.auth.accounts import Account, checked_name
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.auth.keys import Keys
from ksync_server.auth.passwords import AppPassword, networks, new_app_password
from ksync_server.errors import BadRequest, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Write

SCOPES = ("caldav", "carddav", "drive")
_TOLD = ("name", "scopes", "expires_at", "addresses", "read_only", "drive_id", "folder_id")

_ROOTS = (
    sa.select(t.drive_member.c.root_id, t.drive.c.common_id)
    .join(t.drive, t.drive.c.id == t.drive_member.c.drive_id)
    .where(
        t.drive.c.id == sa.bindparam("drive_id"), t.drive_member.c.account_id == sa.bindparam("account_id")
    )
)


def create(
    tx: Write,
    keys: Keys,
    account: Account,
    name: str,
    scopes: Iterable[str] = SCOPES,
    actor: Actor = OPERATOR,
    *,
    expires_at: int | None = None,
    addresses: Iterable[str] = (),
    read_only: bool = False,
    drive_id: int | None = None,
    folder_id: int | None = None,
) -> tuple[int, AppPassword]:
    """A new application password: its row id and the secret, which is shown now and never again (APP2).

    Args:
        name: what it is for.
        scopes: one or more of `SCOPES`.
        expires_at: Unix seconds from which on it is refused; None = never.
        addresses: addresses or networks it works from; none = everywhere.
        read_only: it changes nothing anywhere.
        drive_id: the only drive that it opens; it has no scope but `drive` then. None = every one.
        folder_id: node of the folder that is all it sees of that drive; None = the whole drive.

    Raises:
        BadRequest: a malformed name, no or unknown scopes, an end that has passed, or no network; a scope
            besides that of its only drive; a folder without its drive. Nothing was changed.
        NotFound: the drive is none of the account's, or has no such folder. Nothing was changed.
    """
    wanted = sorted(set(scopes))
    if not wanted or not set(wanted) <= set(SCOPES):
        raise BadRequest(f"Scopes are one or more of {', '.join(SCOPES)}.")
    if expires_at is not None and expires_at <= time.time():
        raise BadRequest("An application password cannot end in the past.")
    _check_place(tx, account, wanted, drive_id, folder_id)
    secret = new_app_password()
    while tx.execute(sa.select(t.app_password.c.id).where(t.app_password.c.lookup == secret.lookup)).first():
        secret = new_app_password()
    key_id, digest = keys.digest(secret.secret.encode("ascii"))
    row = {
        "lookup": secret.lookup,
        "account_id": account.id,
        "name": checked_name(name, "name of the application password"),
        "scopes": " ".join(wanted),
        "digest": digest,
        "key_id": key_id,
        "created_at": int(time.time()),
        "expires_at": expires_at,
        "addresses": networks(addresses),
        "read_only": read_only,
        "drive_id": drive_id,
        "folder_id": folder_id,
    }
    number = tx.execute(sa.insert(t.app_password).returning(t.app_password.c.id), row).scalar_one()
    audit.record(
        tx,
        actor,
        "app-password.create",
        account.sync_id,
        {name: row[name] for name in _TOLD} | {"id": number},
    )
    return number, secret


def _check_place(
    tx: Write, account: Account, scopes: list[str], drive_id: int | None, folder_id: int | None
) -> None:
    """Whether an application password can be for one drive, or one folder of it."""
    if drive_id is None:
        if folder_id is not None:
            raise BadRequest("A folder needs the drive that it is in.")
        return
    if scopes != ["drive"]:
        raise BadRequest("An application password for one drive has the scope drive alone.")
    row = tx.one(_ROOTS, {"drive_id": drive_id, "account_id": account.id})
    if row is None:
        raise NotFound(f"{account.sync_id} has no drive {drive_id}.")
    root_id, common_id = row
    if folder_id is not None and not folders.find(
        tx, folder_id, drive_id, root_id=root_id, common_id=common_id
    ):
        raise NotFound(f"The drive {drive_id} has no such folder.")


def revoke(tx: Write, account: Account, number: int | None = None, actor: Actor = OPERATOR) -> int:
    """Revoke one application password, or all of them; returns how many.

    Raises:
        NotFound: the one asked for is not there or revoked already.
    """
    c = t.app_password.c
    where = (c.account_id == account.id) & c.revoked_at.is_(None)
    if number is not None:
        where &= c.id == number
    count: int = tx.execute(
        sa.update(t.app_password).where(where).values(revoked_at=int(time.time()))
    ).rowcount
    if number is not None and count == 0:
        raise NotFound(f"{account.sync_id} has no application password {number}.")
    audit.record(tx, actor, "app-password.revoke", account.sync_id, {"id": number, "count": count})
    return count
