"""Accounts: every change of them, with its audit.

Functions take a transaction and raise `BadRequest`, `Conflict` or `NotFound` with nothing changed. Each
change that decides who gets in raises the account's `auth_epoch` in the same transaction, so that the next
request in any process sees it (APP5).
"""

from __future__ import annotations

import re
import secrets
import time
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server.auth import audit
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.auth.passwords import AccountPasswords, app_password_letters
from ksync_server.errors import BadRequest, Conflict, Forbidden, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Write
from ksync_server.wire import xml

SYNC_ID = re.compile(r"[A-Z]{2}[0-9]{5}")
STATES = ("active", "suspended")
TEMPORARY_HOST = "login.invalid"  # nobody's (RFC 2606 §2): of log-in names that stand in for a lost address
_EMAIL = re.compile(r"[^@\s\x00-\x1f:]{1,200}@[^@\s\x00-\x1f:]{1,253}")
_MOBILE = re.compile(r"\+[1-9][0-9]{6,14}")  # ITU-T E.164
_BETWEEN_DIGITS = re.compile(r"[\s()./-]")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NAME_CHARACTERS = 200
_LONGEST_LOGIN = 500  # characters
_LOGGED_LOGIN = 100  # characters
_NO_NAME = "(not shown: no name)"


@dataclass(frozen=True, slots=True)
class Account:
    """One account, as its row is."""

    id: int
    sync_id: str
    login_email: str
    display_name: str
    password_hash: str | None
    auth_epoch: int
    state: str  # active, suspended, deleted, erasing
    second_factor: bool
    login_lost: bool = False  # its login address is gone: the next web log-in gives a new one (ACC5)
    purge_at: int | None = None  # deleted: until then it can be restored

    @property
    def shown_state(self) -> str:
        """The state as people read it."""
        if self.state == "active" and self.login_lost:
            return "connection address being changed"
        return self.state


def fold(name: str) -> str:
    """A log-in name as names are compared (ACC3)."""
    return unicodedata.normalize("NFC", name.strip().casefold())


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
    t.account.c.login_lost_at,
    t.account.c.purge_at,
)
_BY_SYNC_ID = sa.select(*_ACCOUNT_COLUMNS).where(t.account.c.sync_id == sa.bindparam("name"))
_BY_LOGIN = sa.select(*_ACCOUNT_COLUMNS).where(t.account.c.login_key == sa.bindparam("name"))
_BY_ID = sa.select(*_ACCOUNT_COLUMNS).where(t.account.c.id == sa.bindparam("id_"))
_RECOVERY = sa.select(t.account.c.recovery_email, t.account.c.recovery_mobile).where(
    t.account.c.id == sa.bindparam("id_")
)
_ERASED = sa.select(t.audit.c.id).where(
    t.audit.c.subject == sa.bindparam("name"), t.audit.c.action == "account.erased"
)
_RAISE_EPOCH = (
    sa.update(t.account)
    .where(t.account.c.id == sa.bindparam("id_"))
    .values(auth_epoch=t.account.c.auth_epoch + 1)
)


def _account(row: tuple[object, ...]) -> Account:
    number, sync_id, login, shown, hashed, epoch, state, factor, lost_at, purge_at = row
    return Account(
        int(str(number)),
        str(sync_id),
        str(login),
        str(shown),
        None if hashed is None else str(hashed),
        int(str(epoch)),
        str(state),
        bool(factor),
        lost_at is not None,
        None if purge_at is None else int(str(purge_at)),
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


def logged_name(typed: str) -> str:
    """A typed log-in name as the log may have it: a secret that was typed into the wrong field is not shown.

    Only what has the form of a name is: a sync id or an e-mail address, and none whose front is an
    application password, as programs write it that put a domain behind every name.
    """
    name = typed.strip()
    is_name = SYNC_ID.fullmatch(name.upper()) or _EMAIL.fullmatch(name)
    if not is_name or app_password_letters(name.partition("@")[0]) is not None:
        return _NO_NAME
    return name[:_LOGGED_LOGIN]


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


def find_by_id(tx: Read, account_id: int) -> Account | None:
    """The account with this row id."""
    row = tx.one(_BY_ID, {"id_": account_id})
    return None if row is None else _account(row)


def by_id(tx: Read, account_id: int) -> Account:
    """The account with this row id, which exists."""
    found = find_by_id(tx, account_id)
    assert found is not None
    return found


def recovery_of(tx: Read, account: Account) -> tuple[str | None, str | None]:
    """Recovery e-mail and mobile number (ACC1)."""
    row = tx.one(_RECOVERY, {"id_": account.id})
    assert row is not None
    return row[0], row[1]


def addresses(tx: Read, account: Account) -> list[str]:
    """Every e-mail address at which its owner is told of what matters most: login and recovery."""
    login = [] if account.login_lost else [account.login_email]
    recovery, _ = recovery_of(tx, account)
    return login + ([recovery] if recovery and recovery not in login else [])


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
    if fold(text).rpartition("@")[2] == TEMPORARY_HOST:
        raise BadRequest(f"Nobody has an address at {TEMPORARY_HOST}.")
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
    if tx.one(_BY_SYNC_ID, {"name": number}) or tx.one(_ERASED, {"name": number}):
        raise Conflict(f"{number} belongs, or belonged, to another account.")
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
    audit.record(tx, actor, "account.create", number, {"login_email": email})
    return by_id(tx, account_id)


def _free_sync_id(tx: Read) -> str:
    for _ in range(1000):
        letters = "".join(secrets.choice(_LETTERS) for _ in range(2))
        number = f"{letters}{secrets.randbelow(100_000):05}"
        if not tx.one(_BY_SYNC_ID, {"name": number}) and not tx.one(_ERASED, {"name": number}):
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
    tx: Write,
    account: Account,
    password_hash: str | None,
    actor: Actor = OPERATOR,
    *,
    how: str | None = None,
) -> None:
    """Replace the password (None: no log-in with one); ends every remembered log-in. Its owner is told.

    Application passwords live on; revoke them where the password was lost to somebody.

    Args:
        how: what the audit says of it beside the actor, e.g. `reset`.
    """
    update(tx, account.id, password_hash=password_hash)
    raise_epoch(tx, account.id)
    audit.record(tx, actor, "account.password", account.sync_id, {} if how is None else {"how": how})


def set_login_email(
    tx: Write, account: Account, email: str, sync_hosts: Iterable[str] = (), actor: Actor = OPERATOR
) -> None:
    """Change the login e-mail; the old name stops at once. The old address is told too.

    Raises:
        BadRequest: malformed.
        Conflict: taken.
    """
    text = checked_email(email, sync_hosts)
    other = tx.one(_BY_LOGIN, {"name": fold(text)})
    if other is not None and other[0] != account.id:
        raise Conflict(f"{text} belongs to another account.")
    update(tx, account.id, login_email=text, login_key=fold(text), login_lost_at=None)
    raise_epoch(tx, account.id)
    told = [*addresses(tx, account), text]
    audit.record(
        tx,
        actor,
        "account.login-email",
        account.sync_id,
        {"from": account.login_email, "to": text, "told": told},
    )


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
        told = addresses(tx, account)  # the recovery e-mail as it was: a thief's change is told to its owner
        update(tx, account.id, **changed)
        detail: dict[str, object] = {"changed": sorted(changed), "told": told}
        audit.record(tx, actor, "account.recovery", account.sync_id, detail)


def set_state(tx: Write, account: Account, state: str, actor: Actor = OPERATOR) -> None:
    """Suspend or reactivate an account.

    Raises:
        BadRequest: no such state.
        Conflict: the account is deleted; `removal.restore` takes that back.
    """
    if state not in STATES:
        raise BadRequest(f"A state is one of {', '.join(STATES)}.")
    if by_id(tx, account.id).state not in STATES:
        raise Conflict(f"{account.sync_id} is deleted: restore it first.")
    update(tx, account.id, state=state)
    raise_epoch(tx, account.id)
    audit.record(tx, actor, f"account.{state}", account.sync_id)


def update(tx: Write, account_id: int, **values: object) -> None:
    """Write columns of an account's row; rules, epoch and audit are the caller's."""
    tx.execute(sa.update(t.account).where(t.account.c.id == account_id).values(**values))
