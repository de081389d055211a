"""When a log-in fails its owner: a login address that is gone (ACC5), a forgotten password, and the last
resort, an operator who looks at documents (ACC8).

Nothing here touches a second factor: who comes back this way still needs it.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server.auth import accounts, audit
from ksync_server.auth.accounts import Account, fold
from ksync_server.auth.audit import OPERATOR, Actor
from ksync_server.auth.keys import Keys
from ksync_server.auth.passwords import AccountPasswords
from ksync_server.errors import BadRequest, ConfigError, Conflict, Forbidden
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Write

_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"
_NAME_LETTERS = 10
_REASON = 5  # characters at least
_LINK_S = 3600
_DOCUMENTS_S = 72 * 3600  # for which documents of an identity check may be kept

_BY_LOGIN = sa.select(t.account.c.id).where(t.account.c.login_key == sa.bindparam("name"))

# -- a login address that is gone -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TemporaryLogin:
    """What stands in for a lost login address, and where its owner can be reached."""

    sync_id: str
    login: str
    recovery_email: str | None  # told by e-mail
    recovery_mobile: str | None  # for whoever sends text messages


def login_lost(tx: Write, account: Account, hosted: Iterable[str], actor: Actor = OPERATOR) -> TemporaryLogin:
    """Replace a login address whose mailbox here is gone; the old name stops at once.

    Password, second factors, sync id, application passwords and data stay as they are. The next web log-in,
    under the temporary name, must give a new address (`Account.login_lost`, `accounts.set_login_email`).

    Args:
        hosted: the domains whose mailboxes are here.

    Raises:
        Conflict: the address is outside, and so is nobody's business here; nothing was changed.
    """
    old = account.login_email
    if fold(old).rpartition("@")[2] not in {fold(each) for each in hosted}:
        raise Conflict(f"{old} is not an address of this server: nothing changes.")
    name = "".join(secrets.choice(_LETTERS) for _ in range(_NAME_LETTERS)) + "@" + accounts.TEMPORARY_HOST
    email, mobile = accounts.recovery_of(tx, account)
    told = [email] if email is not None and fold(email) != fold(old) else []
    accounts.update(tx, account.id, login_email=name, login_key=name, login_lost_at=int(time.time()))
    accounts.raise_epoch(tx, account.id)
    detail: dict[str, object] = {"from": old, "temporary": name, "told": told}
    audit.record(tx, actor, "account.connection-address", account.sync_id, detail)
    return TemporaryLogin(account.sync_id, name, told[0] if told else None, mobile)


def address_gone(
    tx: Write, address: str, hosted: Iterable[str], actor: Actor = OPERATOR
) -> TemporaryLogin | None:
    """`login_lost` for whoever logs in with an address that was deleted; for the mail service.

    Returns:
        None where nobody does, or the address is outside.
    """
    row = tx.one(_BY_LOGIN, {"name": fold(address)})
    domains = {fold(each) for each in hosted}
    if row is None or fold(address).rpartition("@")[2] not in domains:
        return None
    return login_lost(tx, accounts.by_id(tx, row[0]), domains, actor)


# -- an identity check ----------------------------------------------------------------------------

_CHECKED, _DELETED = "account.identity-check", "account.documents-deleted"
_CHECKS = (
    sa.select(t.audit.c.subject, t.audit.c.action, t.audit.c.at)
    .where(sa.or_(t.audit.c.action == _CHECKED, t.audit.c.action == _DELETED))
    .order_by(t.audit.c.id)
)


def identity_checked(tx: Write, account: Account, *, reason: str, actor: Actor = OPERATOR) -> int:
    """Note that somebody's documents were looked at, the last resort of who lost the rest; the owner is told.

    It opens nothing by itself and no second factor is touched. The documents are with the operator and never
    here: what is kept here is until when they must be deleted.

    Args:
        reason: kept in the audit and told.

    Returns:
        Unix seconds by which the documents must be gone.

    Raises:
        BadRequest: no reason.
    """
    if len(reason.strip()) < _REASON:
        raise BadRequest("Say why documents were looked at; the reason is kept in the audit.")
    until = int(time.time()) + _DOCUMENTS_S
    detail: dict[str, object] = {"reason": reason.strip(), "documents_until": until}
    audit.record(tx, actor, _CHECKED, account.sync_id, detail)
    return until


def documents_deleted(tx: Write, sync_id: str, actor: Actor = OPERATOR) -> None:
    """Note that the documents of an account's identity checks are deleted, be it that the account is, too.

    Raises:
        Conflict: there is no check whose documents are left.
    """
    if sync_id not in documents_kept(tx):
        raise Conflict(f"There is no identity check of {sync_id} whose documents are left.")
    audit.record(tx, actor, _DELETED, sync_id)


def documents_kept(tx: Read) -> dict[str, int]:
    """Accounts with an identity check whose documents were not noted as deleted, and when they must be.

    Cost: reads the audit.
    """
    kept: dict[str, int] = {}
    for sync_id, action, at in tx.fast(_CHECKS):
        if action == _CHECKED:
            kept.setdefault(sync_id, at + _DOCUMENTS_S)
        else:
            kept.pop(sync_id, None)
    return kept


# -- a forgotten password -------------------------------------------------------------------------


def start_reset(tx: Write, account: Account, *, reason: str, actor: Actor = OPERATOR) -> str:
    """Tell the owner, at the recovery e-mail, that a reset was asked for and how to go on; no secret changes.

    The mail has no link: a page that takes `reset_token` is not served yet.

    Args:
        reason: kept in the audit and told.

    Returns:
        Where it was told.

    Raises:
        BadRequest: no reason.
        Conflict: the account is not active, or has no recovery e-mail: identify its owner and set one first.
    """
    if len(reason.strip()) < _REASON:
        raise BadRequest("Say why the password is reset; the reason is kept in the audit.")
    if account.state != "active":
        raise Conflict(f"{account.sync_id} is {account.state}.")
    email, _ = accounts.recovery_of(tx, account)
    if email is None:
        raise Conflict(
            f"{account.sync_id} has no recovery e-mail: make sure who asks (account identity-check), then set"
            " one (account recovery)."
        )
    detail: dict[str, object] = {"reason": reason.strip(), "told": [email]}
    audit.record(tx, actor, "account.reset", account.sync_id, detail)
    return email


def reset_token(tx: Read, keys: Keys, account: Account, *, now: int | None = None) -> str:
    """What the e-mail's link carries, good for an hour; stored nowhere.

    Any change of the account's secrets, state or recovery e-mail, its own use included, makes it void: its
    `auth_epoch` is in it.
    """
    until = (int(time.time()) if now is None else now) + _LINK_S
    key_id, digest = keys.digest(_token_bytes(tx, accounts.by_id(tx, account.id), until))
    return f"{account.id}.{until}.{key_id}.{digest.hex()}"


def finish_reset(
    database: Database,
    keys: Keys,
    passwords: AccountPasswords,
    token: str,
    new: str,
    *,
    address: str = "",
    now: int | None = None,
) -> Account:
    """Set the password that the holder of a token chose; nobody is logged in, the second factor stays.

    Raises:
        BadRequest: the new password is too short, too long or too common; the token is still good.
        Forbidden: the token is malformed, forged, too old or used, or the account is not active.
        Unavailable: too many verifications are waiting.
    """
    passwords.check_new(new)
    at = int(time.time()) if now is None else now
    with database.read() as tx:
        _account_of(tx, keys, token, at)  # before the slow hash
    fresh = passwords.hash(new)

    def change(tx: Write) -> Account:
        account = _account_of(tx, keys, token, at)
        actor = Actor(account.sync_id, address)
        accounts.set_password_hash(tx, account, fresh, actor, how="reset")
        return accounts.by_id(tx, account.id)

    return database.write(change)


def _account_of(tx: Read, keys: Keys, token: str, now: int) -> Account:
    refused = Forbidden("This link is not good any more: ask for a new one.")
    try:
        number, until, key_id, given = token.split(".")
        account_id, ends, digest = int(number), int(until), bytes.fromhex(given)
        account = accounts.find_by_id(tx, account_id)
        if ends <= now or account is None:
            raise refused
        _, wanted = keys.digest(_token_bytes(tx, account, ends), key_id)
    except (ValueError, OverflowError, ConfigError):
        raise refused from None
    if account.state != "active" or not hmac.compare_digest(wanted, digest):
        raise refused
    return account


def _token_bytes(tx: Read, account: Account, until: int) -> bytes:
    email, _ = accounts.recovery_of(tx, account)
    return f"reset {account.id} {account.auth_epoch} {until} {email}".encode()
