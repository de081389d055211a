"""Accounts, organizations, products, drives, application passwords: every change of them, with its audit.

Functions take a transaction and raise `BadRequest`, `Conflict` or `NotFound` with nothing changed. Each
change that decides who gets in raises the account's `auth_epoch` in the same transaction, so that the next
request in any process sees it (APP5).
"""

from __future__ import annotations

import json
import re
import secrets
import time
import unicodedata
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server.auth.keys import Keys
from ksync_server.auth.passwords import AccountPasswords, AppPassword, networks, new_app_password
from ksync_server.errors import BadRequest, Conflict, Forbidden, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Write
from ksync_server.wire import xml

SYNC_ID = re.compile(r"[A-Z]{2}[0-9]{5}")
ROLES = ("legal_representative", "administrator", "collaborator", "external")
SCOPES = ("caldav", "carddav", "drive")
STATES = ("active", "suspended")
_EMAIL = re.compile(r"[^@\s\x00-\x1f:]{1,200}@[^@\s\x00-\x1f:]{1,253}")
_MOBILE = re.compile(r"\+[1-9][0-9]{6,14}")  # ITU-T E.164
_BETWEEN_DIGITS = re.compile(r"[\s()./-]")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NAME_CHARACTERS = 200
_LONGEST_LOGIN = 500  # characters
_FOLDER_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class Actor:
    """Who makes a change, for the audit."""

    name: str = "operator"  # or a sync id
    address: str = ""


OPERATOR = Actor()


@dataclass(frozen=True, slots=True)
class Account:
    """One account, as its row is."""

    id: int
    sync_id: str
    login_email: str
    display_name: str
    password_hash: str | None
    auth_epoch: int
    state: str
    second_factor: bool


def fold(name: str) -> str:
    """A log-in name as names are compared (ACC3)."""
    return unicodedata.normalize("NFC", name.strip().casefold())


def audit(
    tx: Write, actor: Actor, action: str, subject: str, detail: dict[str, object] | None = None
) -> None:
    """Write the audit row of a change (ACC6); `detail` never holds a secret."""
    row = {
        "at": int(time.time()),
        "actor": actor.name,
        "address": actor.address,
        "action": action,
        "subject": subject,
        "detail": json.dumps(detail or {}, sort_keys=True),
    }
    tx.execute(sa.insert(t.audit), row)


# -- accounts -------------------------------------------------------------------------------------

_ACCOUNT_COLUMNS = (
    t.account.c.id,
    t.account.c.sync_id,
    t.account.c.login_email,
    t.account.c.display_name,
    t.account.c.password_hash,
    t.account.c.auth_epoch,
    t.account.c.state,
    t.account.c.second_factor,
)
_BY_SYNC_ID = sa.select(*_ACCOUNT_COLUMNS).where(t.account.c.sync_id == sa.bindparam("name"))
_BY_LOGIN = sa.select(*_ACCOUNT_COLUMNS).where(t.account.c.login_key == sa.bindparam("name"))
_BY_ID = sa.select(*_ACCOUNT_COLUMNS).where(t.account.c.id == sa.bindparam("id_"))
_RAISE_EPOCH = (
    sa.update(t.account)
    .where(t.account.c.id == sa.bindparam("id_"))
    .values(auth_epoch=t.account.c.auth_epoch + 1)
)


def _account(row: tuple[object, ...]) -> Account:
    number, sync_id, login, shown, hashed, epoch, state, factor = row
    return Account(
        int(str(number)),
        str(sync_id),
        str(login),
        str(shown),
        None if hashed is None else str(hashed),
        int(str(epoch)),
        str(state),
        bool(factor),
    )


def canonical_name(name: str, sync_hosts: Iterable[str] = ()) -> tuple[str, bool]:
    """What a typed log-in name stands for: (key to look for, whether it is an e-mail name).

    Sync ids come in any case and with `@<sync host>` behind them; e-mail names are compared without case
    (ACC3). A name that cannot belong to anybody is "".
    """
    folded = fold(name)
    if len(folded) > _LONGEST_LOGIN or not xml.is_xml_text(folded):
        return "", False
    local, at, host = folded.rpartition("@")
    if not at:
        return folded.upper(), False
    if host in {fold(each) for each in sync_hosts}:
        return local.upper(), False
    return folded, True


def find(tx: Read, name: str, sync_hosts: Iterable[str] = ()) -> Account | None:
    """The account of any of its names: sync id in any case, `<sync id>@<sync host>`, login e-mail."""
    key, is_email = canonical_name(name, sync_hosts)
    row = tx.one(_BY_LOGIN if is_email else _BY_SYNC_ID, {"name": key})
    return None if row is None else _account(row)


def get(tx: Read, name: str, sync_hosts: Iterable[str] = ()) -> Account:
    """`find`, or NotFound.

    Raises:
        NotFound: no such account.
    """
    account = find(tx, name, sync_hosts)
    if account is None:
        raise NotFound(f"There is no account {name!r}.")
    return account


def by_id(tx: Read, account_id: int) -> Account:
    """The account with this row id, which exists."""
    row = tx.one(_BY_ID, {"id_": account_id})
    assert row is not None
    return _account(row)


def raise_epoch(tx: Write, account_id: int) -> None:
    """Make every process forget what it knew about who this account is."""
    tx.fast(_RAISE_EPOCH, {"id_": account_id})


def checked_email(email: str, sync_hosts: Iterable[str] = ()) -> str:
    """A usable login e-mail.

    Raises:
        BadRequest: no address, or one at a sync host, which would be mistaken for a sync id.
    """
    text = email.strip()
    if _EMAIL.fullmatch(text) is None or not xml.is_xml_text(text):
        raise BadRequest(f"{email!r} is not an e-mail address.")
    if fold(text).rpartition("@")[2] in {fold(host) for host in sync_hosts}:
        raise BadRequest("A login e-mail cannot be at the sync host.")
    return text


def checked_name(name: str, what: str) -> str:
    """A name that people and XML can show.

    Raises:
        BadRequest: empty, too long, or with control characters.
    """
    text = name.strip()
    if not text or len(text) > _NAME_CHARACTERS or not xml.is_xml_text(text) or not text.isprintable():
        raise BadRequest(f"{what}: 1 to {_NAME_CHARACTERS} printable characters.")
    return text


def create_account(
    tx: Write,
    *,
    login_email: str,
    display_name: str,
    password_hash: str | None,
    sync_id: str | None = None,
    sync_hosts: Iterable[str] = (),
    actor: Actor = OPERATOR,
) -> Account:
    """A new account with its first calendar and address book.

    Raises:
        BadRequest: a malformed name, e-mail or sync id.
        Conflict: the e-mail or sync id is taken.
    """
    email = checked_email(login_email, sync_hosts)
    name = checked_name(display_name, "display name")
    if tx.one(_BY_LOGIN, {"name": fold(email)}):
        raise Conflict(f"{email} belongs to another account.")
    number = _free_sync_id(tx) if sync_id is None else sync_id.strip().upper()
    if SYNC_ID.fullmatch(number) is None:
        raise BadRequest("A sync id is two letters and five digits.")
    if tx.one(_BY_SYNC_ID, {"name": number}):
        raise Conflict(f"{number} belongs to another account.")
    now = int(time.time())
    row = {
        "sync_id": number,
        "login_email": email,
        "login_key": fold(email),
        "display_name": name,
        "password_hash": password_hash,
        "auth_epoch": 1,
        "state": "active",
        "second_factor": False,
        "created_at": now,
    }
    try:
        account_id = tx.execute(sa.insert(t.account).returning(t.account.c.id), row).scalar_one()
    except sa.exc.IntegrityError:  # somebody else took the name a moment ago
        raise Conflict(f"{email} or {number} belongs to another account.") from None
    create_collection(tx, account_id, "calendar", "default", "Calendar")
    create_collection(tx, account_id, "addressbook", "default", "Contacts")
    audit(tx, actor, "account.create", number, {"login_email": email})
    return by_id(tx, account_id)


def _free_sync_id(tx: Read) -> str:
    for _ in range(1000):
        letters = "".join(secrets.choice(_LETTERS) for _ in range(2))
        number = f"{letters}{secrets.randbelow(100_000):05}"
        if tx.one(_BY_SYNC_ID, {"name": number}) is None:
            return number
    raise Conflict("No free sync id was found.")


def create_collection(tx: Write, account_id: int, kind: str, name: str, display_name: str) -> int:
    """An empty calendar (for all components) or address book of an account; returns its id.

    Args:
        kind: calendar or addressbook.
        name: last segment of its URL, free in this home.
    """
    row = {"kind": kind, "account_id": account_id, "name": name, "seq": 1, "created_at": int(time.time())}
    number: int = tx.execute(sa.insert(t.collection).returning(t.collection.c.id), row).scalar_one()
    value = xml.serialise(xml.Element("{DAV:}displayname", children=(display_name,)))
    tx.execute(
        sa.insert(t.collection_property),
        {"collection_id": number, "name": "{DAV:}displayname", "xml": value},
    )
    return number


def change_password(
    database: Database,
    passwords: AccountPasswords,
    account: Account,
    *,
    current: str,
    new: str,
    address: str = "",
) -> None:
    """A person's own change of password: it takes the current one (ACC4).

    Hashes outside the transaction; a change in between wins.

    Raises:
        BadRequest: the new password is too short, too long or too common.
        Forbidden: the current password is not right.
        Conflict: the account changed meanwhile.
        Unavailable: too many verifications are waiting.
    """
    passwords.check_new(new)
    if not passwords.verify(current, account.password_hash):
        raise Forbidden("The current password is not right.")
    fresh = passwords.hash(new)

    def change(tx: Write) -> None:
        if by_id(tx, account.id).auth_epoch != account.auth_epoch:
            raise Conflict("The account was changed meanwhile. Try again.")
        set_password_hash(tx, account, fresh, Actor(account.sync_id, address))

    database.write(change)


def set_password_hash(
    tx: Write, account: Account, password_hash: str | None, actor: Actor = OPERATOR
) -> None:
    """Replace the password (None: no log-in with one); ends every remembered log-in.

    Application passwords live on; revoke them where the password was lost to somebody.
    """
    _update(tx, account.id, password_hash=password_hash)
    raise_epoch(tx, account.id)
    audit(tx, actor, "account.password", account.sync_id)


def set_login_email(
    tx: Write, account: Account, email: str, sync_hosts: Iterable[str] = (), actor: Actor = OPERATOR
) -> None:
    """Change the login e-mail; the old name stops at once.

    Raises:
        BadRequest: malformed.
        Conflict: taken.
    """
    text = checked_email(email, sync_hosts)
    other = tx.one(_BY_LOGIN, {"name": fold(text)})
    if other is not None and other[0] != account.id:
        raise Conflict(f"{text} belongs to another account.")
    _update(tx, account.id, login_email=text, login_key=fold(text))
    raise_epoch(tx, account.id)
    audit(tx, actor, "account.login-email", account.sync_id, {"from": account.login_email, "to": text})


def set_recovery(
    tx: Write,
    account: Account,
    *,
    email: str | None = None,
    mobile: str | None = None,
    actor: Actor = OPERATOR,
) -> None:
    """Set where an account's owner can be reached when its login fails (ACC1).

    Args:
        email: an address; "" removes it, None leaves it.
        mobile: an international number; kept as `+` and digits; "" removes it, None leaves it.

    Raises:
        BadRequest: malformed; nothing was changed.
    """
    changed: dict[str, str | None] = {}
    if email is not None:
        changed["recovery_email"] = checked_email(email) if email.strip() else None
    if mobile is not None:
        digits = _BETWEEN_DIGITS.sub("", mobile)
        if digits and not _MOBILE.fullmatch(digits):
            raise BadRequest(f"{mobile!r} is not an international number such as +41 79 123 45 67.")
        changed["recovery_mobile"] = digits or None
    if changed:
        _update(tx, account.id, **changed)
        audit(tx, actor, "account.recovery", account.sync_id, {"changed": sorted(changed)})


def set_state(tx: Write, account: Account, state: str, actor: Actor = OPERATOR) -> None:
    """Suspend or reactivate an account.

    Raises:
        BadRequest: no such state.
    """
    if state not in STATES:
        raise BadRequest(f"A state is one of {', '.join(STATES)}.")
    _update(tx, account.id, state=state)
    raise_epoch(tx, account.id)
    audit(tx, actor, f"account.{state}", account.sync_id)


def _update(tx: Write, account_id: int, **values: object) -> None:
    tx.execute(sa.update(t.account).where(t.account.c.id == account_id).values(**values))


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
    audit(tx, actor, "org.create", str(number), {"name": row["name"]})
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
    audit(tx, actor, "org.member", str(organization_id), {"account": account.sync_id, "role": role})


def remove_member(tx: Write, organization_id: int, account: Account, actor: Actor = OPERATOR) -> None:
    """Take an account out of an organization: its drives refuse it from the next request on, its files stay.

    Raises:
        NotFound: it is no member.
    """
    where = (t.member.c.organization_id == organization_id) & (t.member.c.account_id == account.id)
    if tx.execute(sa.delete(t.member).where(where)).rowcount == 0:
        raise NotFound(f"{account.sync_id} is not a member of organization {organization_id}.")
    audit(tx, actor, "org.member-removed", str(organization_id), {"account": account.sync_id})


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
    audit(tx, actor, "product.create", str(number), {"offer": offer, "organization": organization_id})
    return number


def set_offer(tx: Write, product_id: int, offer: str, actor: Actor = OPERATOR) -> None:
    """Move a product to another offer; the next request sees it (OFF2).

    Raises:
        NotFound: no such product.
    """
    update = sa.update(t.product).where(t.product.c.id == product_id).values(offer=offer)
    if tx.execute(update).rowcount == 0:
        raise NotFound(f"There is no product {product_id}.")
    audit(tx, actor, "product.offer", str(product_id), {"offer": offer})


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
    audit(tx, actor, "drive.create", str(number), {"name": shown, "product": product_id})
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
    audit(tx, actor, "drive.member", str(drive_id), {"account": account.sync_id})


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
    audit(tx, actor, "drive.member-removed", str(drive_id), {"account": account.sync_id})


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
        audit(tx, actor, "drive.limits", str(drive_id), dict(given))


# -- application passwords ------------------------------------------------------------------------


def create_app_password(
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
    audit(
        tx,
        actor,
        "app-password.create",
        account.sync_id,
        {name: row[name] for name in ("name", "scopes", "expires_at", "addresses")} | {"id": number},
    )
    return number, secret


def revoke_app_passwords(
    tx: Write, account: Account, number: int | None = None, actor: Actor = OPERATOR
) -> int:
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
    audit(tx, actor, "app-password.revoke", account.sync_id, {"id": number, "count": count})
    return count
