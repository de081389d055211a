"""Organizations that require two-factor authentication (ENF1 to ENF3).

A requirement stops people at the web log-in, until they enrol. It is no business of the gate: sync and drive
programs go on as they are (ENF2), so nothing here raises an `auth_epoch`.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server.auth import accounts, audit, directory, organizations
from ksync_server.auth.accounts import Account
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.errors import NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Read, Write

_O, _M = t.organization.c, t.member.c
_REQUIRING = (
    sa.select(_O.id, _O.name, _M.role)
    .join(t.member, _M.organization_id == _O.id)
    .where(_M.account_id == sa.bindparam("account_id"), _O.requires_second_factor)
    .order_by(_O.id)
)
_ROLE = sa.select(_M.role).where(
    _M.organization_id == sa.bindparam("organization_id"), _M.account_id == sa.bindparam("account_id")
)


@dataclass(frozen=True, slots=True)
class Requirement:
    """One organization that wants an account to have a second factor."""

    organization_id: int
    name: str
    may_leave: bool  # externals may go instead (`organizations.leave`)


def require(tx: Write, organization_id: int, on: bool, actor: Actor = OPERATOR) -> None:
    """Require a second factor of every member, or stop requiring it (ENF1).

    Raises:
        NotFound: no such organization.
        Forbidden: the actor is no administrator or legal representative of it.
    """
    organizations.hold(tx, organization_id)
    organizations.require_role(tx, organization_id, actor)
    where = t.organization.c.id == organization_id
    tx.execute(sa.update(t.organization).where(where).values(requires_second_factor=on))
    audit.record(tx, actor, "org.second-factor", str(organization_id), {"required": on})


def requirements(tx: Read, account: Account) -> tuple[Requirement, ...]:
    """The organizations of an account that require a second factor of it, whether it has one or not."""
    rows = tx.fast(_REQUIRING, {"account_id": account.id})
    return tuple(Requirement(number, name, role == "external") for number, name, role in rows)


def pending(tx: Read, account: Account) -> tuple[Requirement, ...]:
    """What stops an account at its next web action: it may enrol a second factor, leave where it may, or log
    out. Empty where it goes on.

    Cost: two indexed reads.
    """
    if accounts.by_id(tx, account.id).second_factor:
        return ()
    return requirements(tx, account)


def alert(tx: Write, organization_id: int, account: Account, actor: Actor = OPERATOR) -> dict[str, object]:
    """Send a member a security alert that lists the state of its security settings (ENF3); returns it.

    Raises:
        NotFound: no such organization, or the account is no member.
        Forbidden: the actor does not manage it.
    """
    organizations.hold(tx, organization_id)
    organizations.require_role(tx, organization_id, actor)
    member = {"organization_id": organization_id, "account_id": account.id}
    if tx.one(_ROLE, member) is None:
        raise NotFound(f"{account.sync_id} is not a member of organization {organization_id}.")
    state = directory.security(tx, account)
    detail: dict[str, object] = {
        "organization": organization_id,
        "organization_name": tx.execute(sa.select(_O.name).where(_O.id == organization_id)).scalar_one(),
        "required": any(each.organization_id == organization_id for each in requirements(tx, account)),
        **state,
    }
    audit.record(tx, actor, "security.alert", account.sync_id, detail)
    return detail
