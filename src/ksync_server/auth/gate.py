"""The only door: `identify` says who it is, `authorize` says whether they may do that.

Every protocol asks here, and both functions fail closed: what is not known to be allowed is refused.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import overload

import sqlalchemy as sa

from ksync_server import settings as configuration
from ksync_server.auth import accounts, passwords
from ksync_server.auth.accounts import Account
from ksync_server.auth.keys import Keys
from ksync_server.auth.offers import Offers
from ksync_server.errors import (
    AppPasswordRequired,
    Forbidden,
    MethodNotAllowed,
    NotAuthenticated,
    NotFound,
)
from ksync_server.http import Peer
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Write

log = logging.getLogger(__name__)


class Service(StrEnum):
    """What a secret is being used for; the scopes of application passwords have the same names."""

    CALDAV = "caldav"
    CARDDAV = "carddav"
    DRIVE = "drive"
    SYNC = "sync"  # the sync host where neither calendars nor contacts are addressed: principals, "/"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the client sent, decoded."""

    name: str
    secret: str


@dataclass(frozen=True, slots=True)
class Identity:
    """An account that passed the door, and with which secret."""

    account_id: int
    sync_id: str  # canonical, upper case
    login_email: str
    display_name: str
    scopes: frozenset[str]  # caldav, carddav, drive
    app_password_id: int | None  # None: the account password


@dataclass(frozen=True, slots=True)
class HomeTarget:
    """The calendars or address books (or, with Service.SYNC, the principal) of an account."""

    service: Service
    owner: str  # sync id as written in the URL, any case


@dataclass(frozen=True, slots=True)
class DriveTarget:
    """One drive, by the number in its host name or path."""

    drive_id: int


@dataclass(frozen=True, slots=True)
class HomeGrant:
    """The home exists and this identity may use the verb there."""

    account_id: int
    sync_id: str


@dataclass(frozen=True, slots=True)
class DriveGrant:
    """The drive exists, its offer includes WebDAV, the identity is a member and may use the verb."""

    drive_id: int
    collection_id: int
    name: str
    offer: str  # canonical id
    account_id: int
    root_id: int  # node: the member's private root
    trash_id: int  # node: the member's deleted items
    common_id: int  # node: Common documents
    max_file_bytes: int
    max_chunked_bytes: int
    quota_bytes: int | None  # None = no limit
    used_bytes: int


VERBS = frozenset(
    [
        "GET",
        "HEAD",
        "OPTIONS",
        "PUT",
        "POST",
        "PATCH",
        "DELETE",
        "PROPFIND",
        "PROPPATCH",
        "REPORT",
        "MKCOL",
        "MKCALENDAR",
        "COPY",
        "MOVE",
        "LOCK",
        "UNLOCK",
        "ACL",
        "SEARCH",
    ]
)
_REFUSED = "The name or the password is not right, or an application password is needed."
_TELL_EVERY_S = 600.0  # the owner is told once in this time that a right password was refused

_APP_PASSWORD = (
    sa.select(
        t.app_password.c.id,
        t.app_password.c.digest,
        t.app_password.c.key_id,
        t.app_password.c.scopes,
        t.app_password.c.revoked_at,
        t.app_password.c.last_used_at,
        t.account.c.id,
        t.account.c.sync_id,
        t.account.c.login_email,
        t.account.c.login_key,
        t.account.c.display_name,
        t.account.c.state,
    )
    .join(t.account, t.account.c.id == t.app_password.c.account_id)
    .where(t.app_password.c.lookup == sa.bindparam("lookup"))
)
_USED = (
    sa.update(t.app_password)
    .where(t.app_password.c.id == sa.bindparam("id_"))
    .values(
        last_used_at=sa.bindparam("at"),
        last_service=sa.bindparam("service"),
        last_address=sa.bindparam("address"),
        last_client=sa.bindparam("client"),
    )
)
_DRIVE = (
    sa.select(
        t.drive.c.collection_id,
        t.drive.c.name,
        t.product.c.offer,
        t.drive_member.c.root_id,
        t.drive_member.c.trash_id,
        t.drive.c.common_id,
        t.drive.c.max_file_bytes,
        t.drive.c.max_chunked_bytes,
        t.drive.c.quota_bytes,
        t.drive.c.used_bytes,
    )
    .join(t.product, t.product.c.id == t.drive.c.product_id)
    .join(
        t.member,
        (t.member.c.organization_id == t.product.c.organization_id)
        & (t.member.c.account_id == sa.bindparam("account_id")),
    )
    .join(
        t.drive_member,
        (t.drive_member.c.drive_id == t.drive.c.id)
        & (t.drive_member.c.account_id == sa.bindparam("account_id")),
    )
    .where(t.drive.c.id == sa.bindparam("drive_id"))
)


class Gate:
    """Both decisions for one process; thread-safe."""

    def __init__(
        self, settings: configuration.Settings, database: Database, keys: Keys, offers: Offers
    ) -> None:
        self._settings = settings
        self._database = database
        self._keys = keys
        self._offers = offers
        self._sync_hosts = tuple(accounts.fold(host) for host in settings.hosts.sync)
        self.passwords = passwords.AccountPasswords(settings.auth)
        self._lock = threading.Lock()
        self._used: dict[int, float] = {}  # application password -> when its use was last written
        self._told: dict[int, float] = {}  # account -> when its owner was last told of a refusal

    # -- who is it ----------------------------------------------------------------------------------

    def is_quick(self, credentials: Credentials | None) -> bool:
        """Whether `identify` runs no argon2 for this: then the event loop may call it with SQLite.

        An application password, nothing at all, or a secret over the length limit.
        """
        return (
            credentials is None
            or len(credentials.secret) > self._settings.auth.password_bytes
            or passwords.parse_app_password(credentials.secret) is not None
        )

    def identify(self, credentials: Credentials | None, peer: Peer, *, service: Service) -> Identity:
        """The account behind a name and a secret.

        Args:
            credentials: what the client sent; None where it sent nothing usable.

        Raises:
            NotAuthenticated: unknown name, wrong or revoked secret, suspended account.
            AppPasswordRequired: the right account password while 2FA is on (APP3); clients cannot tell it
                from the others, the owner is told.
            Unavailable: too many password verifications are waiting.

        Cost: one indexed read for an application password; for an account password one more comparison when
        this process knows it, else one argon2id.
        """
        if credentials is None:
            raise NotAuthenticated(_REFUSED)
        if len(credentials.secret.encode("utf-8", "surrogatepass")) > self._settings.auth.password_bytes:
            raise self._refused(credentials, peer, service)
        secret = passwords.parse_app_password(credentials.secret)
        if secret is not None:
            identity = self._by_app_password(credentials.name, secret, peer, service)
        else:
            identity = self._by_account_password(credentials, peer, service)
        if identity is None:
            raise self._refused(credentials, peer, service)
        return identity

    def _refused(self, credentials: Credentials, peer: Peer, service: Service) -> NotAuthenticated:
        name = credentials.name[:100].encode("ascii", "backslashreplace").decode("ascii")
        log.warning("log-in failed", extra={"login": name, "address": peer.address, "service": str(service)})
        return NotAuthenticated(_REFUSED)

    def _names(self, name: str) -> tuple[str, bool]:
        """The name folded, without the sync host, and whether it is an e-mail name."""
        folded = accounts.fold(name)
        local, at, host = folded.rpartition("@")
        if at and host in self._sync_hosts:
            return local, False
        return folded, bool(at)

    def _by_app_password(
        self, name: str, secret: passwords.AppPassword, peer: Peer, service: Service
    ) -> Identity | None:
        rows = self._database.fast(_APP_PASSWORD, {"lookup": secret.lookup})
        if not rows:
            return None
        (number, digest, key_id, scopes, revoked, used_at, account_id, sync_id, email, key, shown, state) = (
            rows[0]
        )
        _, wanted = self._keys.digest(secret.secret.encode("ascii"), key_id)
        if not hmac.compare_digest(wanted, bytes(digest)):
            return None
        folded, is_email = self._names(name)
        if folded != (key if is_email else sync_id.casefold()) or revoked is not None or state != "active":
            return None
        self._note_use(number, used_at, peer, service)
        return Identity(account_id, sync_id, email, shown, frozenset(scopes.split()), number)

    def _note_use(self, number: int, used_at: int | None, peer: Peer, service: Service) -> None:
        """Write "last used" at most once a minute, and let nobody wait for it."""
        now = time.time()
        if used_at is not None and now - used_at < self._settings.auth.last_used_s:
            return
        with self._lock:
            if now - self._used.get(number, 0.0) < self._settings.auth.last_used_s:
                return
            if len(self._used) > 100_000:
                self._used.clear()
            self._used[number] = now
        values = {
            "id_": number,
            "at": int(now),
            "service": str(service),
            "address": peer.address,
            "client": peer.user_agent[:200],
        }
        self._database.submit(lambda tx: tx.fast(_USED, values))

    def _by_account_password(self, credentials: Credentials, peer: Peer, service: Service) -> Identity | None:
        folded, is_email = self._names(credentials.name)
        with self._database.read() as tx:
            account = accounts.find(tx, folded) if is_email == ("@" in folded) else None
        password = credentials.secret
        known = account is not None and self.passwords.is_known(account.id, password, account.auth_epoch)
        if not known:
            stored = account.password_hash if account else None
            if not self.passwords.verify(password, stored) or account is None:
                return None
            assert stored is not None
            self.passwords.remember(account.id, password, account.auth_epoch)
            if self.passwords.is_outdated(stored):
                self._rehash(account, password)
        assert account is not None
        if account.state != "active":
            return None
        if account.second_factor:
            self._refused(credentials, peer, service)
            self._tell_owner(account, peer, service)
            raise AppPasswordRequired(_REFUSED)
        return Identity(
            account.id,
            account.sync_id,
            account.login_email,
            account.display_name,
            frozenset(accounts.SCOPES),
            None,
        )

    def _rehash(self, account: Account, password: str) -> None:
        """Bring a stored hash to today's parameters; the same password, so nobody is logged out."""
        fresh = self.passwords.hash(password)
        update = (
            sa.update(t.account)
            .where(t.account.c.id == account.id, t.account.c.password_hash == account.password_hash)
            .values(password_hash=fresh)
        )
        self._database.submit(lambda tx: tx.execute(update))

    def _tell_owner(self, account: Account, peer: Peer, service: Service) -> None:
        """Leave a notice: the right password was refused because of 2FA (APP7: the owner is told why)."""
        now = time.monotonic()
        with self._lock:
            if now - self._told.get(account.id, -_TELL_EVERY_S) < _TELL_EVERY_S:
                return
            self._told[account.id] = now
        actor = accounts.Actor(account.sync_id, peer.address)
        detail: dict[str, object] = {"service": str(service), "client": peer.user_agent[:200]}

        def note(tx: Write) -> None:
            accounts.audit(tx, actor, "password.refused-second-factor", account.sync_id, detail)

        self._database.submit(note)

    # -- may they -----------------------------------------------------------------------------------

    @overload
    def authorize(self, tx: Read, identity: Identity, target: HomeTarget, verb: str) -> HomeGrant: ...
    @overload
    def authorize(self, tx: Read, identity: Identity, target: DriveTarget, verb: str) -> DriveGrant: ...

    def authorize(
        self, tx: Read, identity: Identity, target: HomeTarget | DriveTarget, verb: str
    ) -> HomeGrant | DriveGrant:
        """Whether an identity may use a verb on a target; read anew on each request (OFF2, APP5).

        Raises:
            Forbidden: the application password's scopes, or the drive's offer, do not include this.
            NotFound: no such target, or not one of this identity's; nobody can tell which.
            MethodNotAllowed: an unknown verb.

        Cost: no read for a home, one indexed join for a drive.
        """
        if verb not in VERBS:
            raise MethodNotAllowed(f"{verb[:20]} is not a method of this server.")
        if isinstance(target, HomeTarget):
            return self._home(identity, target)
        return self._drive(tx, identity, target)

    def _home(self, identity: Identity, target: HomeTarget) -> HomeGrant:
        allowed = (
            {Service.CALDAV, Service.CARDDAV}
            if target.service is Service.SYNC
            else {target.service} & {Service.CALDAV, Service.CARDDAV}
        )
        if not allowed & identity.scopes:
            raise Forbidden(f"This application password does not open {target.service}.")
        if target.owner.upper() != identity.sync_id:
            raise NotFound("There is nothing here.")
        return HomeGrant(identity.account_id, identity.sync_id)

    def _drive(self, tx: Read, identity: Identity, target: DriveTarget) -> DriveGrant:
        if Service.DRIVE not in identity.scopes:
            raise Forbidden("This application password does not open drives.")
        row = tx.one(_DRIVE, {"account_id": identity.account_id, "drive_id": target.drive_id})
        if row is None:
            raise NotFound("There is nothing here.")
        collection_id, name, offer_name, root, trash, common, largest, chunked, quota, used = row
        offer = self._offers.find(offer_name)
        if offer is None or not offer.webdav:
            shown = offer.id if offer else offer_name
            raise Forbidden(
                f"The offer {shown} of this drive does not include WebDAV. Choose one that does, such as"
                " ksuite-business or kdrive-solo."
            )
        limits = self._settings.drive
        return DriveGrant(
            drive_id=target.drive_id,
            collection_id=collection_id,
            name=name,
            offer=offer.id,
            account_id=identity.account_id,
            root_id=root,
            trash_id=trash,
            common_id=common,
            max_file_bytes=limits.max_file_bytes if largest is None else largest,
            max_chunked_bytes=min(
                limits.max_chunked_bytes if chunked is None else chunked, limits.chunked_ceiling_bytes
            ),
            quota_bytes=offer.storage_bytes if quota is None else quota,
            used_bytes=used,
        )
