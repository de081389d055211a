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

from ksync_server.auth import audit
from ksync_server.auth.accounts import Account, checked_name, fold
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.errors import BadRequest, Conflict, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Read, Write

ROLES = ("legal_representative", "administrator", "collaborator", "external")
_FOLDER_NAME_BYTES = 255

# -- organizations and products -------------------------------------------------------------------


def create_organization(tx: Write, name: str, actor: Actor = OPERATOR) -> int:
    """A new organization; returns its id.

    Raises:
        BadRequest: a malformed name.
    """
    row = {
        "name": checked_name(name, "organization"),
        "requires_second_factor": False,
        "created_at": int(time.time()),
    }
    number: int = tx.execute(sa.insert(t.organization).returning(t.organization.c.id), row).scalar_one()
    audit.record(tx, actor, "org.create", str(number), {"name": row["name"]})
    return number


def put_member(tx: Write, organization_id: int, account: Account, role: str, actor: Actor = OPERATOR) -> None:
    """Add an account to an organization or change its role (ACC2).

    Raises:
        BadRequest: no such role.
        NotFound: no such organization.
    """
    if role not in ROLES:
        raise BadRequest(f"A role is one of {', '.join(ROLES)}.")
    _require(tx, t.organization, organization_id, "organization")
    where = (t.member.c.organization_id == organization_id) & (t.member.c.account_id == account.id)
    if tx.execute(sa.update(t.member).where(where).values(role=role)).rowcount == 0:
        row = {"organization_id": organization_id, "account_id": account.id, "role": role}
        tx.execute(sa.insert(t.member), row)
    audit.record(tx, actor, "org.member", str(organization_id), {"account": account.sync_id, "role": role})


def remove_member(tx: Write, organization_id: int, account: Account, actor: Actor = OPERATOR) -> None:
    """Take an account out of an organization: its drives refuse it from the next request on, its files stay.

    Raises:
        NotFound: it is no member.
    """
    where = (t.member.c.organization_id == organization_id) & (t.member.c.account_id == account.id)
    if tx.execute(sa.delete(t.member).where(where)).rowcount == 0:
        raise NotFound(f"{account.sync_id} is not a member of organization {organization_id}.")
    audit.record(tx, actor, "org.member-removed", str(organization_id), {"account": account.sync_id})


def _require(tx: Read, table: sa.Table, number: int, what: str) -> None:
    if tx.execute(sa.select(table.c.id).where(table.c.id == number)).first() is None:
        raise NotFound(f"There is no {what} {number}.")


def create_product(tx: Write, organization_id: int, offer: str, actor: Actor = OPERATOR) -> int:
    """A product of an organization under an offer; returns its id. The caller checked the offer's name.

    Raises:
        NotFound: no such organization.
    """
    _require(tx, t.organization, organization_id, "organization")
    row = {"organization_id": organization_id, "offer": offer, "created_at": int(time.time())}
    number: int = tx.execute(sa.insert(t.product).returning(t.product.c.id), row).scalar_one()
    audit.record(tx, actor, "product.create", str(number), {"offer": offer, "organization": organization_id})
    return number


def set_offer(tx: Write, product_id: int, offer: str, actor: Actor = OPERATOR) -> None:
    """Move a product to another offer; the next request sees it (OFF2).

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
    """
    shown = unicodedata.normalize("NFC", checked_name(name, "drive name"))
    if "/" in shown or shown in (".", "..") or len(shown.encode("utf-8")) > _FOLDER_NAME_BYTES:
        raise BadRequest(f"A drive's name is a folder's name: no slash, {_FOLDER_NAME_BYTES} bytes at most.")
    if fold(shown) in {fold(each) for each in reserved}:
        raise BadRequest(f"{shown} is the name of a folder that every drive has.")
    _require(tx, t.product, product_id, "product")
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
        Conflict: the account is not in the drive's organization.
        NotFound: no such drive.
    """
    _require(tx, t.drive, drive_id, "drive")
    where = (t.drive_member.c.drive_id == drive_id) & (t.drive_member.c.account_id == account.id)
    if tx.execute(sa.select(t.drive_member.c.root_id).where(where)).first() is not None:
        return
    if tx.one(_DRIVE_OF_MEMBER, {"drive_id": drive_id, "account_id": account.id}) is None:
        raise Conflict(f"{account.sync_id} is not a member of the organization of drive {drive_id}.")
    row = {
        "drive_id": drive_id,
        "account_id": account.id,
        "root_id": _kept_root(tx, drive_id, f"root {account.sync_id}"),
        "trash_id": _kept_root(tx, drive_id, f"trash {account.sync_id}"),
    }
    tx.execute(sa.insert(t.drive_member), row)
    audit.record(tx, actor, "drive.member", str(drive_id), {"account": account.sync_id})


def _kept_root(tx: Write, drive_id: int, name: str) -> int:
    """The root of that name, made where there is none: a member who comes back keeps what it had."""
    c = t.node.c
    where = (c.drive_id == drive_id) & c.parent_id.is_(None) & (c.name == name)
    number: int | None = tx.execute(sa.select(c.id).where(where)).scalar()
    return _root_node(tx, drive_id, name, int(time.time())) if number is None else number


def remove_drive_member(tx: Write, drive_id: int, account: Account, actor: Actor = OPERATOR) -> None:
    """Close a drive to an account from the next request on; its private files stay in the drive.

    Raises:
        NotFound: it is no member.
    """
    where = (t.drive_member.c.drive_id == drive_id) & (t.drive_member.c.account_id == account.id)
    if tx.execute(sa.delete(t.drive_member).where(where)).rowcount == 0:
        raise NotFound(f"{account.sync_id} is not a member of drive {drive_id}.")
    audit.record(tx, actor, "drive.member-removed", str(drive_id), {"account": account.sync_id})


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
