"""What there is, for operators: accounts, organizations, products, drives, secrets and audit as plain values.

Never a secret, hash or digest. Each function reads one table by an index or whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from ksync_server.auth.accounts import Account
from ksync_server.auth.audit import TOLD
from ksync_server.store import tables as t
from ksync_server.store.database import Read

Rows = list[dict[str, Any]]


def _rows(tx: Read, statement: sa.Select[Any]) -> Rows:
    return [dict(row._mapping) for row in tx.execute(statement)]


def accounts(tx: Read, *, without_second_factor: bool = False) -> Rows:
    """Every account by sync id, or those without a second factor (ENF3)."""
    c = t.account.c
    statement = sa.select(
        c.sync_id,
        c.login_email,
        c.display_name,
        c.state,
        c.second_factor,
        c.login_lost_at,
        c.purge_at,
        c.created_at,
    ).order_by(c.sync_id)
    return _rows(tx, statement.where(c.second_factor.is_(False)) if without_second_factor else statement)


def recovery(tx: Read, account: Account) -> dict[str, Any]:
    """Where an account's owner can be reached when its login fails (ACC1)."""
    c = t.account.c
    return _rows(tx, sa.select(c.recovery_email, c.recovery_mobile).where(c.id == account.id))[0]


def organizations(tx: Read) -> Rows:
    """Every organization with the number of its members."""
    c = t.organization.c
    members = sa.select(sa.func.count()).where(t.member.c.organization_id == c.id).scalar_subquery()
    statement = sa.select(c.id, c.name, members.label("members"), c.requires_second_factor, c.created_at)
    return _rows(tx, statement.order_by(c.id))


def members(tx: Read, organization_id: int, *, without_second_factor: bool = False) -> Rows:
    """The members of an organization with their roles, or those without a second factor (ENF3).

    `stopped` are those that the organization's requirement stops at their next web action (ENF1).
    """
    a, m, o = t.account.c, t.member.c, t.organization.c
    stopped = sa.and_(o.requires_second_factor, a.second_factor.is_(False)).label("stopped")
    statement = (
        sa.select(a.sync_id, a.login_email, a.display_name, m.role, a.state, a.second_factor, stopped)
        .select_from(
            t.member.join(t.account, m.account_id == a.id).join(t.organization, m.organization_id == o.id)
        )
        .where(m.organization_id == organization_id)
    )
    if without_second_factor:
        statement = statement.where(a.second_factor.is_(False))
    rows = _rows(tx, statement.order_by(a.sync_id))
    return [{**row, "stopped": bool(row["stopped"])} for row in rows]


def products(tx: Read) -> Rows:
    """Every product with its organization and offer, what it may hold, and whether it is paid."""
    p, o = t.product.c, t.organization.c
    statement = sa.select(
        p.id,
        p.organization_id,
        o.name.label("organization"),
        p.offer,
        p.ksuite,
        p.seats,
        p.storage_bytes,
        p.paid,
        p.trial_until,
        p.created_at,
    ).select_from(t.product.join(t.organization, o.id == p.organization_id))
    return _rows(tx, statement.order_by(p.id))


def drives(tx: Read) -> Rows:
    """Every drive with its offer, limits in bytes (None: the setting's or the offer's) and use."""
    d, p = t.drive.c, t.product.c
    limits = (d.max_file_bytes, d.max_chunked_bytes, d.quota_bytes)
    statement = sa.select(
        d.id, d.name, d.product_id, p.offer, *limits, d.used_bytes, d.files, d.created_at
    ).select_from(t.drive.join(t.product, p.id == d.product_id))
    return _rows(tx, statement.order_by(d.id))


def drive_members(tx: Read, drive_id: int) -> Rows:
    """The accounts that see a drive."""
    a, m = t.account.c, t.drive_member.c
    statement = (
        sa.select(a.sync_id, a.login_email, a.display_name)
        .select_from(t.drive_member.join(t.account, m.account_id == a.id))
        .where(m.drive_id == drive_id)
    )
    return _rows(tx, statement.order_by(a.sync_id))


def app_passwords(tx: Read, account: Account) -> Rows:
    """Application passwords, revoked and expired ones too: created, last used, where and by what (APP2)."""
    c = t.app_password.c
    use = (c.last_used_at, c.last_service, c.last_address, c.last_client)
    narrow = (c.scopes, c.read_only, c.drive_id, c.folder_id, c.expires_at, c.addresses)
    statement = sa.select(c.id, c.name, *narrow, c.created_at, c.revoked_at, *use)
    rows = _rows(tx, statement.where(c.account_id == account.id).order_by(c.id))
    return [{**row, "scopes": row["scopes"].split(), "addresses": row["addresses"].split()} for row in rows]


def mailboxes(tx: Read, *, organization_id: int | None = None, account: Account | None = None) -> Rows:
    """Mailboxes by address, with whose they are and how many device passwords they have."""
    m, a, d = t.mailbox.c, t.account.c, t.device_password.c
    live = sa.select(sa.func.count()).where(d.mailbox_id == m.id, d.revoked_at.is_(None)).scalar_subquery()
    statement = sa.select(
        m.address,
        m.organization_id,
        a.sync_id,
        m.state,
        m.quota_bytes,
        live.label("device_passwords"),
        m.folder,
        m.created_at,
    ).select_from(t.mailbox.outerjoin(t.account, a.id == m.account_id))
    if organization_id is not None:
        statement = statement.where(m.organization_id == organization_id)
    if account is not None:
        statement = statement.where(m.account_id == account.id)
    return _rows(tx, statement.order_by(m.address_key))


def device_passwords(tx: Read, mailbox_id: int) -> Rows:
    """Device passwords of a mailbox, revoked ones too: created, last used, where and by what (APP2)."""
    c = t.device_password.c
    use = (c.last_used_at, c.last_service, c.last_address, c.last_client)
    statement = sa.select(c.id, c.name, c.created_at, c.revoked_at, *use)
    return _rows(tx, statement.where(c.mailbox_id == mailbox_id).order_by(c.id))


def second_factors(tx: Read, account: Account) -> Rows:
    """Second factors, the one that waits for its first code too (confirmed_at is None)."""
    c = t.second_factor.c
    statement = sa.select(c.id, c.kind, c.name, c.created_at, c.confirmed_at)
    return _rows(tx, statement.where(c.account_id == account.id).order_by(c.id))


def recovery_codes_left(tx: Read, account: Account) -> int:
    """How many unused recovery codes there are."""
    c = t.recovery_code.c
    unused = sa.select(sa.func.count()).where(c.account_id == account.id, c.used_at.is_(None))
    return int(tx.execute(unused).scalar_one())


def security(tx: Read, account: Account) -> dict[str, Any]:
    """The state of an account's security settings: what is set, never the setting of a secret (ENF3)."""
    a, p = t.account.c, t.app_password.c
    wanted = (a.second_factor, a.password_hash, a.recovery_email, a.recovery_mobile, a.login_lost_at)
    row = tx.execute(sa.select(*wanted).where(a.id == account.id)).one()
    usable = (p.account_id == account.id) & p.revoked_at.is_(None)
    live = sa.select(sa.func.count()).where(
        usable, sa.or_(p.expires_at.is_(None), p.expires_at > int(time.time()))
    )
    factors = [each for each in second_factors(tx, account) if each["confirmed_at"] is not None]
    return {
        "second_factor": bool(row.second_factor),
        "factors": [{"kind": each["kind"], "name": each["name"]} for each in factors],
        "recovery_codes_left": recovery_codes_left(tx, account),
        "password": row.password_hash is not None,
        "application_passwords": int(tx.execute(live).scalar_one()),
        "recovery_email": row.recovery_email is not None,
        "recovery_mobile": row.recovery_mobile is not None,
        "login_lost": row.login_lost_at is not None,
    }


def audit(
    tx: Read,
    *,
    subject: str | None = None,
    actions: Iterable[str] = (),
    since: int | None = None,
    limit: int = 50,
) -> Rows:
    """The newest changes and refusals first.

    Args:
        subject: only those of one sync id, or id; by an index.
        actions: only these; one that ends in `.` stands for all that begin with it.
        since: Unix seconds; nothing older.
    """
    c = t.audit.c
    statement = sa.select(c.at, c.actor, c.address, c.action, c.subject, c.detail)
    if subject is not None:
        statement = statement.where(c.subject == subject)
    wanted = [
        c.action.startswith(each, autoescape=True) if each.endswith(".") else c.action == each
        for each in actions
    ]
    if wanted:
        statement = statement.where(sa.or_(*wanted))
    if since is not None:
        statement = statement.where(c.at >= since)
    rows = _rows(tx, statement.order_by(c.id.desc()).limit(limit))
    return [{**row, "detail": json.loads(row["detail"])} for row in rows]


def notices(tx: Read, account: Account, *, limit: int = 50) -> Rows:
    """What the owner of an account was told, newest first: the audit's rows of that kind, no copy of them."""
    return audit(tx, subject=account.sync_id, actions=sorted(TOLD), limit=limit)
