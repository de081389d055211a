"""Application passwords: made and revoked; `auth.passwords` knows their letters, the gate lets them in.

Functions take a transaction and raise with nothing changed. Their rows are read on every request, so a
revocation is seen by the next one (APP5).
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import sqlalchemy as sa

from ksync_server.auth import audit
from ksync_server.auth.accounts import Account, checked_name
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.auth.keys import Keys
from ksync_server.auth.passwords import AppPassword, networks, new_app_password
from ksync_server.errors import BadRequest, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Write

SCOPES = ("caldav", "carddav", "drive")


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
) -> tuple[int, AppPassword]:
    """A new application password: its row id and the secret, which is shown now and never again (APP2).

    Args:
        name: what it is for.
        scopes: one or more of `SCOPES`.
        expires_at: Unix seconds from which on it is refused; None = never.
        addresses: addresses or networks it works from; none = everywhere.

    Raises:
        BadRequest: a malformed name, no or unknown scopes, an end that has passed, or no network. Nothing was
            changed.
    """
    wanted = sorted(set(scopes))
    if not wanted or not set(wanted) <= set(SCOPES):
        raise BadRequest(f"Scopes are one or more of {', '.join(SCOPES)}.")
    if expires_at is not None and expires_at <= time.time():
        raise BadRequest("An application password cannot end in the past.")
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
    }
    number = tx.execute(sa.insert(t.app_password).returning(t.app_password.c.id), row).scalar_one()
    audit.record(
        tx,
        actor,
        "app-password.create",
        account.sync_id,
        {name: row[name] for name in ("name", "scopes", "expires_at", "addresses")} | {"id": number},
    )
    return number, secret


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
