"""Mailboxes: addresses of an organization, whose they are, and every change of them with its audit.

Functions take a transaction and raise with nothing changed. The gate reads the rows at every log-in, so a
change is seen by the next one (APP5). Mail itself is files (`folder_of`), which no function here touches.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from ksync_server.auth import accounts, audit, organizations, products, recovery
from ksync_server.auth.accounts import Account, fold
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.auth.offers import Offers
from ksync_server.errors import BadRequest, Conflict, NotFound
from ksync_server.settings import MAIL_ADDRESS
from ksync_server.store import tables as t
from ksync_server.store.database import Read, Row, Write

STATES = ("active", "suspended")
_LONGEST = 254  # bytes of an address: a path of 256 with its brackets (RFC 5321 section 4.5.3.1.3)

_M = t.mailbox.c


@dataclass(frozen=True, slots=True)
class Mailbox:
    """One mailbox, as its row is."""

    id: int
    organization_id: int
    account_id: int | None  # whose it is; None = nobody's: a shared one, or one that waits for somebody
    address: str
    folder: str  # random name
    state: str  # active, suspended
    quota_bytes: int | None  # None = no limit


_COLUMNS = (_M.id, _M.organization_id, _M.account_id, _M.address, _M.folder, _M.state, _M.quota_bytes)
_BY_ADDRESS = sa.select(*_COLUMNS).where(_M.address_key == sa.bindparam("key"))
_BY_ID = sa.select(*_COLUMNS).where(_M.id == sa.bindparam("id_"))
_OF_ACCOUNT = sa.select(*_COLUMNS).where(_M.account_id == sa.bindparam("account_id")).order_by(_M.id)
_IS_MEMBER = sa.select(t.member.c.role).where(
    t.member.c.organization_id == sa.bindparam("organization_id"),
    t.member.c.account_id == sa.bindparam("account_id"),
)
_REVOKE = sa.delete(t.device_password).where(t.device_password.c.mailbox_id == sa.bindparam("mailbox_id"))


def _mailbox(row: Row) -> Mailbox:
    return Mailbox(*row)


def find(tx: Read, address: str) -> Mailbox | None:
    """The mailbox of an address, whatever its case."""
    row = tx.one(_BY_ADDRESS, {"key": fold(address)})
    return None if row is None else _mailbox(row)


def find_by_id(tx: Read, number: int) -> Mailbox | None:
    """The mailbox of a row."""
    row = tx.one(_BY_ID, {"id_": number})
    return None if row is None else _mailbox(row)


def get(tx: Read, address: str) -> Mailbox:
    """`find`, or NotFound.

    Raises:
        NotFound: no such mailbox.
    """
    mailbox = find(tx, address)
    if mailbox is None:
        raise NotFound(f"There is no mailbox {address!r}.")
    return mailbox


def folder_of(root: Path, folder: str) -> Path:
    """The home of a mailbox, which holds its Maildir and Dovecot's own files.

    Args:
        root: `mail.folders`.
        folder: of the mailbox's row.
    """
    return root / folder


def maildir_of(root: Path, folder: str) -> Path:
    """The Maildir++ of a mailbox: its messages, and a folder for each mail folder."""
    return folder_of(root, folder) / "Maildir"


def owner_of(tx: Read, mailbox: Mailbox) -> Account | None:
    """The account whose mailbox it is."""
    return None if mailbox.account_id is None else accounts.find_by_id(tx, mailbox.account_id)


def create(
    tx: Write,
    offers: Offers,
    organization_id: int,
    address: str,
    *,
    account: Account | None = None,
    quota_bytes: int | None = None,
    sync_hosts: Iterable[str] = (),
    actor: Actor = OPERATOR,
) -> Mailbox:
    """A new, empty mailbox; nobody opens it before it has a device password.

    Args:
        account: whose it is; None = nobody's yet.
        quota_bytes: what its mail may take; None = no limit.

    Raises:
        BadRequest: no e-mail address, one at a sync host, or no quota.
        Conflict: the address is taken, or the organization's offers have no address left.
        NotFound: no such organization, or the account is not its member.
        Forbidden: the actor does not manage the organization.
    """
    text = accounts.checked_email(address, sync_hosts)
    if MAIL_ADDRESS.fullmatch(text) is None or len(text.encode("utf-8")) > _LONGEST:
        raise BadRequest(f"{address!r} is not an address that mail can be sent to.")
    _check_quota(quota_bytes)
    organizations.hold(tx, organization_id)
    organizations.require_role(tx, organization_id, actor)
    if find(tx, text) is not None:
        raise Conflict(f"{text} is a mailbox already.")
    _require_member(tx, organization_id, account)
    row = {
        "organization_id": organization_id,
        "account_id": None if account is None else account.id,
        "address": text,
        "address_key": fold(text),
        "folder": secrets.token_hex(16),
        "state": "active",
        "quota_bytes": quota_bytes,
        "created_at": int(time.time()),
    }
    tx.execute(sa.insert(t.mailbox), row)
    products.require_addresses(tx, offers, organization_id)
    detail: dict[str, object] = {
        "organization": organization_id,
        "account": _name(account),
        "quota_bytes": quota_bytes,
    }
    audit.record(tx, actor, "mailbox.create", text, detail)
    return get(tx, text)


def assign(tx: Write, mailbox: Mailbox, account: Account | None, actor: Actor = OPERATOR) -> Mailbox:
    """Give a mailbox to a member of its organization, or to nobody; its mail stays.

    Its device passwords go: they are on the devices of whoever had it.

    Raises:
        NotFound: the account is no member of the organization.
        Forbidden: the actor does not manage the organization.
    """
    _manage(tx, mailbox, actor)
    _require_member(tx, mailbox.organization_id, account)
    before = owner_of(tx, mailbox)
    if _name(before) != _name(account):
        _update(tx, mailbox, account_id=None if account is None else account.id)
        revoked = tx.execute(_REVOKE, {"mailbox_id": mailbox.id}).rowcount
        detail: dict[str, object] = {"from": _name(before), "to": _name(account), "revoked": revoked}
        audit.record(tx, actor, "mailbox.assign", mailbox.address, detail)
    return get(tx, mailbox.address)


def set_state(tx: Write, mailbox: Mailbox, state: str, actor: Actor = OPERATOR) -> Mailbox:
    """Suspend a mailbox (nobody opens it, its mail and device passwords stay) or end that.

    Raises:
        BadRequest: no such state.
        Forbidden: the actor does not manage the organization.
    """
    if state not in STATES:
        raise BadRequest(f"A state is one of {', '.join(STATES)}.")
    _manage(tx, mailbox, actor)
    _update(tx, mailbox, state=state)
    audit.record(tx, actor, f"mailbox.{state}", mailbox.address)
    return get(tx, mailbox.address)


def set_quota(tx: Write, mailbox: Mailbox, quota_bytes: int | None, actor: Actor = OPERATOR) -> Mailbox:
    """Change what a mailbox may hold (None: no limit); sessions see it at their next log-in.

    Raises:
        BadRequest: no number of bytes above zero.
        Forbidden: the actor does not manage the organization.
    """
    _check_quota(quota_bytes)
    _manage(tx, mailbox, actor)
    _update(tx, mailbox, quota_bytes=quota_bytes)
    detail: dict[str, object] = {"from": mailbox.quota_bytes, "to": quota_bytes}
    audit.record(tx, actor, "mailbox.quota", mailbox.address, detail)
    return get(tx, mailbox.address)


def delete(tx: Write, mailbox: Mailbox, hosted: Iterable[str], actor: Actor = OPERATOR) -> None:
    """Delete a mailbox with its device passwords; who logs in with its address gets a temporary name (ACC5).

    Its folder stays where it is: the caller says so, or erases it.

    Args:
        hosted: the domains whose mailboxes are here.

    Raises:
        Forbidden: the actor does not manage the organization.
        Conflict: an import is filling it.
    """
    _manage(tx, mailbox, actor)
    c = t.mail_import.c
    filling = tx.scalar(sa.select(c.id).where(c.mailbox_id == mailbox.id, c.ended_at.is_(None)).limit(1))
    if filling is not None:
        raise Conflict(
            f"Import {filling} is filling {mailbox.address}: `import mail cancel {filling}` first."
        )
    detail: dict[str, object] = {
        "organization": mailbox.organization_id,
        "account": _name(owner_of(tx, mailbox)),
        "folder": mailbox.folder,
    }
    tx.execute(sa.delete(t.mailbox).where(_M.id == mailbox.id))
    audit.record(tx, actor, "mailbox.delete", mailbox.address, detail)
    recovery.address_gone(tx, mailbox.address, hosted, actor)


def detach(tx: Write, account_id: int, sync_id: str) -> None:
    """Let go of the mailboxes of an account that is being erased: they are the organization's, and their mail
    stays until somebody deletes them. Nobody opens them meanwhile."""
    for row in tx.fast(_OF_ACCOUNT, {"account_id": account_id}):
        mailbox = _mailbox(row)
        tx.execute(_REVOKE, {"mailbox_id": mailbox.id})
        _update(tx, mailbox, account_id=None)
        detail: dict[str, object] = {"from": sync_id, "to": None, "why": "the account was erased"}
        audit.record(tx, Actor("server"), "mailbox.assign", mailbox.address, detail)


# -- single rules ---------------------------------------------------------------------------------


def _name(account: Account | None) -> str | None:
    return None if account is None else account.sync_id


def _manage(tx: Write, mailbox: Mailbox, actor: Actor) -> None:
    organizations.hold(tx, mailbox.organization_id)
    organizations.require_role(tx, mailbox.organization_id, actor)


def _require_member(tx: Read, organization_id: int, account: Account | None) -> None:
    where = {"organization_id": organization_id, "account_id": account.id if account else 0}
    if account is not None and tx.one(_IS_MEMBER, where) is None:
        raise NotFound(f"{account.sync_id} is not a member of organization {organization_id}.")


def _check_quota(quota_bytes: int | None) -> None:
    if quota_bytes is not None and quota_bytes <= 0:
        raise BadRequest("A quota is a number of bytes above zero.")


def _update(tx: Write, mailbox: Mailbox, **values: object) -> None:
    tx.execute(sa.update(t.mailbox).where(_M.id == mailbox.id).values(**values))
