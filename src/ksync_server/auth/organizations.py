"""Organizations with their members, their products, and the drives of those: every change, with its audit.

Functions take a transaction and raise `BadRequest`, `Conflict` or `NotFound` with nothing changed. The gate
reads these rows on every request, so a change is seen by the next one (OFF2, APP5).
"""

from __future__ import annotations

import time
import unicodedata
import uuid
from collections.abc import Iterable

import sqlalchemy as sa

from ksync_server.auth import accounts, audit
from ksync_server.auth.accounts import Account, checked_name, fold
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.errors import BadRequest, Conflict, Forbidden, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Read, Write

ROLES = ("legal_representative", "administrator", "collaborator", "external")
MANAGERS = ("legal_representative", "administrator")
_FOLDER_NAME_BYTES = 255

# -- organizations and their members --------------------------------------------------------------

_HOLD = sa.select(t.organization.c.id).where(t.organization.c.id == sa.bindparam("id_")).with_for_update()
_ROLE_OF_NAME = (
    sa.select(t.member.c.role)
    .join(t.account, t.account.c.id == t.member.c.account_id)
    .where(
        t.member.c.organization_id == sa.bindparam("organization_id"),
        t.account.c.sync_id == sa.bindparam("sync_id"),
        t.account.c.state == "active",
    )
)
_REPRESENTATIVES = (
    sa.select(t.member.c.account_id)
    .join(t.account, t.account.c.id == t.member.c.account_id)
    .where(
        t.member.c.organization_id == sa.bindparam("organization_id"),
        t.member.c.role == "legal_representative",
        sa.or_(t.account.c.state == "active", t.account.c.state == "suspended"),
    )
)
_PRODUCTS = sa.select(t.product.c.id, t.product.c.offer).where(
    t.product.c.organization_id == sa.bindparam("organization_id")
)

_MAILBOX = (
    sa.select(t.mailbox.c.id).where(t.mailbox.c.organization_id == sa.bindparam("organization_id")).limit(1)
)


def create_organization(tx: Write, name: str, actor: Actor = OPERATOR) -> int:
    """A new organization; returns its id. An account that makes one is its legal representative (ACC9).

    Raises:
        BadRequest: a malformed name.
        NotFound: the actor is no account.
    """
    row = {
        "name": checked_name(name, "organization"),
        "requires_second_factor": False,
        "created_at": int(time.time()),
    }
    number: int = tx.execute(sa.insert(t.organization).returning(t.organization.c.id), row).scalar_one()
    audit.record(tx, actor, "org.create", str(number), {"name": row["name"]})
    if actor.name != OPERATOR.name:
        put_member(tx, number, accounts.get(tx, actor.name), "legal_representative")
    return number


def delete_organization(tx: Write, organization_id: int, actor: Actor = OPERATOR) -> None:
    """Delete an organization; its members' accounts stay.

    Raises:
        NotFound: no such organization.
        Forbidden: the actor is none of its legal representatives.
        Conflict: it has products or mailboxes; cancel and delete them first.
    """
    hold(tx, organization_id)
    require_role(tx, organization_id, actor, ("legal_representative",))
    products = tx.fast(_PRODUCTS, {"organization_id": organization_id})
    if products:
        offers = ", ".join(f"{offer} ({number})" for number, offer in products)
        raise Conflict(f"Organization {organization_id} has products: {offers}. Cancel them first.")
    if tx.one(_MAILBOX, {"organization_id": organization_id}) is not None:
        raise Conflict(f"Organization {organization_id} has mailboxes: delete them first.")
    tx.execute(sa.delete(t.organization).where(t.organization.c.id == organization_id))
    audit.record(tx, actor, "org.delete", str(organization_id))


def hold(tx: Write, organization_id: int) -> None:
    """Keep others from changing an organization's members and products until commit.

    Raises:
        NotFound: no such organization.
    """
    if tx.one(_HOLD, {"id_": organization_id}) is None:
        raise NotFound(f"There is no organization {organization_id}.")


def require_role(
    tx: Read, organization_id: int, actor: Actor, roles: Iterable[str] = MANAGERS, *, but: str = ""
) -> None:
    """Whether an actor may manage an organization; the operator may.

    Args:
        but: a sync id that may too, whatever its role.

    Raises:
        Forbidden: an account without one of these roles there, or one that is suspended or deleted.
    """
    if actor.name in (OPERATOR.name, but):
        return
    role = tx.scalar(_ROLE_OF_NAME, {"organization_id": organization_id, "sync_id": actor.name})
    if role not in roles:
        wanted = " or ".join(each.replace("_", " ") for each in roles)
        raise Forbidden(f"Only a {wanted} of organization {organization_id} may do this.")


def put_member(tx: Write, organization_id: int, account: Account, role: str, actor: Actor = OPERATOR) -> None:
    """Add an account to an organization or change its role (ACC2).

    Raises:
        BadRequest: no such role.
        NotFound: no such organization.
        Forbidden: the actor does not manage it; a legal representative is made or unmade by another alone.
        Conflict: every seat of its kSuite is taken, or the role is taken from its last legal representative.
    """
    if role not in ROLES:
        raise BadRequest(f"A role is one of {', '.join(ROLES)}.")
    hold(tx, organization_id)
    where = (t.member.c.organization_id == organization_id) & (t.member.c.account_id == account.id)
    before = tx.execute(sa.select(t.member.c.role).where(where)).scalar()
    highest = "legal_representative" in (before, role) and before != role
    require_role(tx, organization_id, actor, ("legal_representative",) if highest else MANAGERS)
    if role != "legal_representative":
        require_other_representative(tx, organization_id, account)
    if role != "external":
        for product_id, seats in tx.fast(_SEATS_OF_KSUITE, {"organization_id": organization_id}):
            _require_seat(tx, product_id, seats, account)
    if before is None:
        row = {"organization_id": organization_id, "account_id": account.id, "role": role}
        tx.execute(sa.insert(t.member), row)
    else:
        tx.execute(sa.update(t.member).where(where).values(role=role))
    audit.record(tx, actor, "org.member", str(organization_id), {"account": account.sync_id, "role": role})


def remove_member(tx: Write, organization_id: int, account: Account, actor: Actor = OPERATOR) -> None:
    """Take an account out of an organization: its drives refuse it from the next request on, its files stay.

    Raises:
        NotFound: no such organization, or the account is no member.
        Forbidden: the actor does not manage it; a legal representative is removed by another alone.
        Conflict: it is the last legal representative and the organization has products.
    """
    hold(tx, organization_id)
    where = (t.member.c.organization_id == organization_id) & (t.member.c.account_id == account.id)
    role = tx.execute(sa.select(t.member.c.role).where(where)).scalar()
    if role is None:
        raise NotFound(f"{account.sync_id} is not a member of organization {organization_id}.")
    highest = role == "legal_representative"
    require_role(tx, organization_id, actor, ("legal_representative",) if highest else MANAGERS)
    require_other_representative(tx, organization_id, account)
    tx.execute(sa.delete(t.member).where(where))
    audit.record(tx, actor, "org.member-removed", str(organization_id), {"account": account.sync_id})


def leave(tx: Write, organization_id: int, account: Account, actor: Actor = OPERATOR) -> None:
    """An external's own way out, e.g. where a second factor is required (ENF1); its files stay.

    Raises:
        NotFound: no such organization, or the account is no member.
        Forbidden: the account is no external there, or the actor is another account.
    """
    hold(tx, organization_id)
    if actor.name not in (OPERATOR.name, account.sync_id):
        raise Forbidden("Others are removed, not made to leave.")
    where = (t.member.c.organization_id == organization_id) & (t.member.c.account_id == account.id)
    role = tx.execute(sa.select(t.member.c.role).where(where)).scalar()
    if role is None:
        raise NotFound(f"{account.sync_id} is not a member of organization {organization_id}.")
    if role != "external":
        raise Forbidden("Only externals leave by themselves: ask an administrator to remove the account.")
    tx.execute(sa.delete(t.member).where(where))
    audit.record(tx, actor, "org.member-left", str(organization_id), {"account": account.sync_id})


def require_other_representative(tx: Read, organization_id: int, account: Account) -> None:
    """Whether an organization that has products keeps a legal representative without this account.

    Raises:
        Conflict: it is the last one.
    """
    where = {"organization_id": organization_id}
    if [number for (number,) in tx.fast(_REPRESENTATIVES, where)] == [account.id] and tx.one(
        _PRODUCTS, where
    ):
        raise Conflict(
            f"{account.sync_id} is the last legal representative of organization {organization_id}, which has"
            " products: name another one, or cancel the products first."
        )


def _require(tx: Read, table: sa.Table, number: int, what: str) -> None:
    if tx.execute(sa.select(table.c.id).where(table.c.id == number)).first() is None:
        raise NotFound(f"There is no {what} {number}.")


# -- products: the rows; their rules are in `auth.products` ---------------------------------------

_SEATS_OF_KSUITE = sa.select(t.product.c.id, t.product.c.seats).where(
    t.product.c.organization_id == sa.bindparam("organization_id"), t.product.c.ksuite
)
_SEATS_OF_DRIVE = (
    sa.select(t.product.c.id, t.product.c.seats)
    .join(t.drive, t.drive.c.product_id == t.product.c.id)
    .where(t.drive.c.id == sa.bindparam("drive_id"))
)
_ORGANIZATION_OF_DRIVE = (
    sa.select(t.product.c.organization_id)
    .join(t.drive, t.drive.c.product_id == t.product.c.id)
    .where(t.drive.c.id == sa.bindparam("drive_id"))
)
# Users of a product: the members of its drives; of a kSuite also whoever belongs to the organization.
_USERS = (
    sa.select(t.drive_member.c.account_id)
    .join(t.drive, t.drive.c.id == t.drive_member.c.drive_id)
    .where(t.drive.c.product_id == sa.bindparam("product_id"))
    .union(
        sa.select(t.member.c.account_id)
        .join(t.product, t.product.c.organization_id == t.member.c.organization_id)
        .where(
            t.product.c.id == sa.bindparam("product_id"), t.product.c.ksuite, t.member.c.role != "external"
        )
    )
)


def users(tx: Read, product_id: int) -> frozenset[int]:
    """The accounts that take a seat of a product: members of its drives; a kSuite's also those of the
    organization who are not external."""
    return frozenset(number for (number,) in tx.fast(_USERS, {"product_id": product_id}))


def _require_seat(tx: Read, product_id: int, seats: int | None, account: Account) -> None:
    if seats is None:
        return
    taken = users(tx, product_id)
    if account.id not in taken and len(taken) >= seats:
        raise Conflict(
            f"All seats of product {product_id} are taken ({seats}): add seats or remove somebody."
        )


def create_product(
    tx: Write,
    organization_id: int,
    offer: str,
    actor: Actor = OPERATOR,
    *,
    ksuite: bool = False,
    seats: int | None = None,
    storage_bytes: int | None = None,
    paid: bool = True,
    trial_until: int | None = None,
) -> int:
    """The row of a product under an offer; returns its id. The rules are `products.create`'s.

    Raises:
        NotFound: no such organization.
    """
    _require(tx, t.organization, organization_id, "organization")
    row = {
        "organization_id": organization_id,
        "offer": offer,
        "ksuite": ksuite,
        "seats": seats,
        "storage_bytes": storage_bytes,
        "paid": paid,
        "trial_until": trial_until,
        "created_at": int(time.time()),
    }
    number: int = tx.execute(sa.insert(t.product).returning(t.product.c.id), row).scalar_one()
    audit.record(tx, actor, "product.create", str(number), {"offer": offer, "organization": organization_id})
    return number


def set_offer(tx: Write, product_id: int, offer: str, actor: Actor = OPERATOR) -> None:
    """Write a product's offer; the next request sees it (OFF2). The rules are `products.change_offer`'s.

    Raises:
        NotFound: no such product.
    """
    update = sa.update(t.product).where(t.product.c.id == product_id).values(offer=offer)
    if tx.execute(update).rowcount == 0:
        raise NotFound(f"There is no product {product_id}.")
    audit.record(tx, actor, "product.offer", str(product_id), {"offer": offer})


# -- drives ---------------------------------------------------------------------------------------


_DRIVE_OF_MEMBER = (
    sa.select(t.member.c.role)
    .join(t.product, t.product.c.organization_id == t.member.c.organization_id)
    .join(t.drive, t.drive.c.product_id == t.product.c.id)
    .where(t.drive.c.id == sa.bindparam("drive_id"), t.member.c.account_id == sa.bindparam("account_id"))
)


def _root_node(tx: Write, drive_id: int, name: str, now: int) -> int:
    row = {
        "drive_id": drive_id,
        "parent_id": None,
        "name": name,
        "folder": True,
        "seq": 1,
        "size": 0,
        "mtime_ms": now * 1000,
        "created_at": now,
        "entries": 0,
    }
    number: int = tx.execute(sa.insert(t.node).returning(t.node.c.id), row).scalar_one()
    return number


def create_drive(
    tx: Write, product_id: int, name: str, *, reserved: Iterable[str] = (), actor: Actor = OPERATOR
) -> int:
    """An empty drive; returns its id, the number in its host name.

    Args:
        name: what its folder is called.
        reserved: names of the other two folders that members see beside or in it.

    Raises:
        BadRequest: a name that cannot be a folder's.
        NotFound: no such product.
        Forbidden: the actor does not manage its organization.
    """
    shown = unicodedata.normalize("NFC", checked_name(name, "drive name"))
    if "/" in shown or shown in (".", "..") or len(shown.encode("utf-8")) > _FOLDER_NAME_BYTES:
        raise BadRequest(f"A drive's name is a folder's name: no slash, {_FOLDER_NAME_BYTES} bytes at most.")
    if fold(shown) in {fold(each) for each in reserved}:
        raise BadRequest(f"{shown} is the name of a folder that every drive has.")
    c = t.product.c
    organization_id = tx.execute(sa.select(c.organization_id).where(c.id == product_id)).scalar()
    if organization_id is None:
        raise NotFound(f"There is no product {product_id}.")
    require_role(tx, organization_id, actor)
    now = int(time.time())
    collection = {"kind": "drive", "account_id": None, "name": str(uuid.uuid4()), "seq": 1, "created_at": now}
    collection_id = tx.execute(sa.insert(t.collection).returning(t.collection.c.id), collection).scalar_one()
    row = {
        "product_id": product_id,
        "collection_id": collection_id,
        "name": shown,
        "common_id": 0,
        "created_at": now,
        "used_bytes": 0,
        "files": 0,
    }
    number: int = tx.execute(sa.insert(t.drive).returning(t.drive.c.id), row).scalar_one()
    common = _root_node(tx, number, "common", now)
    tx.execute(sa.update(t.drive).where(t.drive.c.id == number).values(common_id=common))
    tx.execute(sa.update(t.collection).where(t.collection.c.id == collection_id).values(name=str(number)))
    audit.record(tx, actor, "drive.create", str(number), {"name": shown, "product": product_id})
    return number


def add_drive_member(tx: Write, drive_id: int, account: Account, actor: Actor = OPERATOR) -> None:
    """Give an account a private root and deleted items in a drive; nothing happens when it has them.

    A former member finds its files again.

    Raises:
        Conflict: the account is not in the drive's organization, or every seat of the product is taken.
        NotFound: no such drive.
        Forbidden: the actor does not manage the organization.
    """
    _hold_drive(tx, drive_id, actor)
    where = (t.drive_member.c.drive_id == drive_id) & (t.drive_member.c.account_id == account.id)
    if tx.execute(sa.select(t.drive_member.c.root_id).where(where)).first() is not None:
        return
    if tx.one(_DRIVE_OF_MEMBER, {"drive_id": drive_id, "account_id": account.id}) is None:
        raise Conflict(f"{account.sync_id} is not a member of the organization of drive {drive_id}.")
    for product_id, seats in tx.fast(_SEATS_OF_DRIVE, {"drive_id": drive_id}):
        _require_seat(tx, product_id, seats, account)
    row = {
        "drive_id": drive_id,
        "account_id": account.id,
        "root_id": _kept_root(tx, drive_id, f"root {account.sync_id}"),
        "trash_id": _kept_root(tx, drive_id, f"trash {account.sync_id}"),
    }
    tx.execute(sa.insert(t.drive_member), row)
    audit.record(tx, actor, "drive.member", str(drive_id), {"account": account.sync_id})


def _hold_drive(tx: Write, drive_id: int, actor: Actor) -> None:
    """Keep the seats of a drive's product from being taken by others, for an actor who manages it."""
    organization_id = tx.scalar(_ORGANIZATION_OF_DRIVE, {"drive_id": drive_id})
    if organization_id is None:
        raise NotFound(f"There is no drive {drive_id}.")
    hold(tx, organization_id)
    require_role(tx, organization_id, actor)


def _kept_root(tx: Write, drive_id: int, name: str) -> int:
    """The root of that name, made where there is none: a member who comes back keeps what it had."""
    c = t.node.c
    where = (c.drive_id == drive_id) & c.parent_id.is_(None) & (c.name == name)
    number: int | None = tx.execute(sa.select(c.id).where(where)).scalar()
    return _root_node(tx, drive_id, name, int(time.time())) if number is None else number


def remove_drive_member(tx: Write, drive_id: int, account: Account, actor: Actor = OPERATOR) -> None:
    """Close a drive to an account from the next request on; its private files stay in the drive.

    Raises:
        NotFound: no such drive, or the account is no member.
        Forbidden: the actor does not manage the organization.
    """
    _hold_drive(tx, drive_id, actor)
    where = (t.drive_member.c.drive_id == drive_id) & (t.drive_member.c.account_id == account.id)
    if tx.execute(sa.delete(t.drive_member).where(where)).rowcount == 0:
        raise NotFound(f"{account.sync_id} is not a member of drive {drive_id}.")
    audit.record(tx, actor, "drive.member-removed", str(drive_id), {"account": account.sync_id})


def delete_empty_drive(tx: Write, drive_id: int, actor: Actor = OPERATOR) -> None:
    """Take a drive that holds nothing away, with its members' empty folders.

    Raises:
        Conflict: it holds files or folders, deleted ones included; nothing was changed.
        NotFound: no such drive.
    """
    c = t.drive.c
    row = tx.execute(
        sa.select(c.files, c.used_bytes, c.collection_id).where(c.id == drive_id).with_for_update()
    ).first()
    if row is None:
        raise NotFound(f"There is no drive {drive_id}.")
    if row.files or row.used_bytes:
        raise Conflict(
            f"Drive {drive_id} still holds {row.files} files and folders, deleted ones included:"
            " erase them first."
        )
    tx.execute(sa.delete(t.drive).where(c.id == drive_id))
    tx.execute(sa.delete(t.collection).where(t.collection.c.id == row.collection_id))
    audit.record(tx, actor, "drive.delete", str(drive_id))


def set_drive_limits(
    tx: Write,
    drive_id: int,
    *,
    max_file_bytes: int | None = None,
    max_chunked_bytes: int | None = None,
    quota_bytes: int | None = None,
    chunked_ceiling_bytes: int,
    actor: Actor = OPERATOR,
) -> None:
    """Change a drive's own limits; None leaves one as it is (DRV3).

    Raises:
        BadRequest: below zero, or over the ceiling for uploads without a length.
        NotFound: no such drive.
    """
    values = {
        "max_file_bytes": max_file_bytes,
        "max_chunked_bytes": max_chunked_bytes,
        "quota_bytes": quota_bytes,
    }
    given = {name: value for name, value in values.items() if value is not None}
    if any(value < 0 for value in given.values()):
        raise BadRequest("A limit is not negative.")
    if max_chunked_bytes is not None and max_chunked_bytes > chunked_ceiling_bytes:
        raise BadRequest(f"Uploads without a length end at {chunked_ceiling_bytes} bytes.")
    _require(tx, t.drive, drive_id, "drive")
    if given:
        tx.execute(sa.update(t.drive).where(t.drive.c.id == drive_id).values(**given))
        audit.record(tx, actor, "drive.limits", str(drive_id), dict(given))
