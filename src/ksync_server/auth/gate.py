"""The only door: `identify` says who it is, `authorize` says whether they may do that.

Every protocol asks here, and both functions fail closed: what is not known to be allowed is refused.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, overload

import sqlalchemy as sa

from ksync_server import settings as configuration
from ksync_server.auth import accounts, app_passwords, audit, passwords
from ksync_server.auth.accounts import Account
from ksync_server.auth.keys import Keys
from ksync_server.auth.offers import Offer, Offers
from ksync_server.errors import (
    AppPasswordRequired,
    ConfigError,
    Forbidden,
    NotAuthenticated,
    NotFound,
    NotImplementedHere,
    Unavailable,
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


VERBS = frozenset({"GET", "HEAD", "OPTIONS", "PROPFIND", "REPORT"}) | frozenset(
    {"PUT", "POST", "DELETE", "PROPPATCH", "MKCOL", "MKCALENDAR", "COPY", "MOVE", "LOCK", "UNLOCK"}
)
"""Methods that the gate knows; whether a site has them is the site's to say."""

_REFUSED = "The name or the password is not right, or an application password is needed."
_NOTHING_HERE = "There is nothing here."
_TELL_EVERY_S = 3600.0  # the owner is told of one cause once in this time and process
_REMEMBERED = 10_000  # secrets and accounts whose last note is remembered per process


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why nobody was let in: for the log, and for the owner where the secret was a right one."""

    reason: str
    owner: str | None = None  # sync id
    second_factor: bool = False  # the right account password, where only application passwords are taken


@dataclass(frozen=True, slots=True)
class _Use:
    """When and how an application password was used."""

    number: int
    at: int
    service: str
    address: str
    client: str


_APP_PASSWORD = (
    sa.select(
        t.app_password.c.id,
        t.app_password.c.digest,
        t.app_password.c.key_id,
        t.app_password.c.scopes,
        t.app_password.c.revoked_at,
        t.app_password.c.expires_at,
        t.app_password.c.addresses,
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
    .where(
        t.app_password.c.id == sa.bindparam("id_"),
        sa.func.coalesce(t.app_password.c.last_used_at, 0) < sa.bindparam("at"),
    )
    .values(
        last_used_at=sa.bindparam("at"),
        last_service=sa.bindparam("service"),
        last_address=sa.bindparam("address"),
        last_client=sa.bindparam("client"),
    )
)
_other = t.drive.alias("other")
_OTHERS_USE = (
    sa.select(sa.func.coalesce(sa.func.sum(_other.c.used_bytes), 0))
    .where(_other.c.product_id == t.drive.c.product_id, _other.c.id != t.drive.c.id)
    .correlate(t.drive)
    .scalar_subquery()
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
        _OTHERS_USE,
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
        self._sync_hosts = tuple(accounts.fold(host) for host in settings.hosts.log_in)
        self.passwords = passwords.AccountPasswords(settings.auth)
        self._notes = _Notes(database, settings.auth.last_used_s)

    def flush(self) -> None:
        """Wait until the notes of uses and refusals so far are written; requests never do."""
        self._notes.flush()

    # -- who is it ----------------------------------------------------------------------------------

    def is_quick(self, credentials: Credentials | None) -> bool:
        """Whether `identify` will run no argon2: then the event loop may call both with SQLite.

        Where it is not, `queued` keeps the work away from the threads that everybody shares.

        Cost: no read for an application password, one for an account password.
        """
        if credentials is None or self._is_too_long(credentials):
            return True
        if passwords.app_password_letters(credentials.secret) is not None:
            return True
        account = self._find(credentials.name)
        return account is not None and self._remembers(account, credentials.secret)

    def identify(self, credentials: Credentials | None, peer: Peer, *, service: Service) -> Identity:
        """The account behind a name and a secret.

        Args:
            credentials: what the client sent; None where it sent nothing usable.
            peer: for the notes of where a secret was used or refused.
            service: what the secret is used for; its scopes are the business of `authorize`, because a right
                secret of the wrong scope is a right log-in.

        Raises:
            NotAuthenticated: unknown name, wrong, revoked or expired secret, one that is not for the peer's
                address, suspended account.
            AppPasswordRequired: the right account password while 2FA is on (APP3). Clients cannot tell it
                from the others; its owner finds the reason in the audit.
            Unavailable: too many password verifications are waiting.

        Cost: one indexed read for an application password; for an account password a read and, where this
            process has not verified it since the last change of the account, one argon2id.
        """
        if credentials is None:
            raise NotAuthenticated(_REFUSED)
        outcome: Identity | _Refusal
        if self._is_too_long(credentials):
            outcome = _Refusal("secret too long")
        elif (letters := passwords.app_password_letters(credentials.secret)) is not None:
            outcome = self._by_app_password(credentials.name, letters, peer, service)
        else:
            outcome = self._by_account_password(credentials)
        if isinstance(outcome, Identity):
            return outcome
        self._note_refusal(outcome, credentials, peer, service)
        raise (AppPasswordRequired if outcome.second_factor else NotAuthenticated)(_REFUSED)

    def queued(self, credentials: Credentials | None, peer: Peer, *, service: Service) -> Future[Identity]:
        """`identify` in the few threads that verify account passwords; the future raises what it raises.

        Raises:
            Unavailable: too many verifications are waiting.
        """
        return self.passwords.queue(lambda: self.identify(credentials, peer, service=service))

    def _is_too_long(self, credentials: Credentials) -> bool:
        return len(credentials.secret.encode("utf-8", "surrogatepass")) > self._settings.auth.password_bytes

    def _by_app_password(self, name: str, letters: str, peer: Peer, service: Service) -> Identity | _Refusal:
        secret = passwords.parse_app_password(letters)
        if secret is None:
            return _Refusal("mistyped application password")
        rows = self._database.fast(_APP_PASSWORD, {"lookup": secret.lookup})
        if not rows:
            self._keys.digest(secret.secret.encode("ascii"))  # the same work as for a known one
            return _Refusal("no such application password")
        number, digest, key_id, scopes, revoked, expires, networks, used_at, *owner = rows[0]
        account_id, sync_id, email, key, shown, state = owner
        try:
            _, wanted = self._keys.digest(secret.secret.encode("ascii"), key_id)
        except ConfigError:
            return _Refusal(f"the key file has no key set {key_id}")
        if not hmac.compare_digest(wanted, bytes(digest)):
            return _Refusal("no such application password")
        typed, is_email = accounts.canonical_name(name, self._sync_hosts)
        if typed != (key if is_email else sync_id):
            return _Refusal("the application password of another account", sync_id)
        if revoked is not None:
            return _Refusal("revoked application password", sync_id)
        now = int(time.time())
        if expires is not None and expires <= now:
            return _Refusal("expired application password", sync_id)
        if networks and not passwords.is_within(peer.address, networks):
            return _Refusal("an address that the application password is not for", sync_id)
        if state != "active":
            return _Refusal(f"the account is {state}", sync_id)
        self._notes.use(used_at, _Use(number, now, service, peer.address, peer.user_agent[:200]))
        return Identity(account_id, sync_id, email, shown, frozenset(scopes.split()), number)

    def _by_account_password(self, credentials: Credentials) -> Identity | _Refusal:
        account = self._find(credentials.name)
        password = credentials.secret
        if account is None:
            self.passwords.verify(password, None)
            return _Refusal("no such account")
        if not self._remembers(account, password):
            refusal = self._refused_after_verifying(account, password)
            if refusal is not None:
                return refusal
            self.passwords.remember(account.id, password, account.auth_epoch)
        return Identity(
            account.id,
            account.sync_id,
            account.login_email,
            account.display_name,
            frozenset(app_passwords.SCOPES),
            None,
        )

    def _find(self, name: str) -> Account | None:
        with self._database.read() as tx:
            return accounts.find(tx, name, self._sync_hosts)

    def _remembers(self, account: Account, password: str) -> bool:
        """Whether this password was let in before; where none is let in, every try costs the same (APP7)."""
        return (
            account.state == "active"
            and not account.second_factor
            and self.passwords.is_known(account.id, password, account.auth_epoch)
        )

    def _refused_after_verifying(self, account: Account, password: str) -> _Refusal | None:
        stored = account.password_hash
        if not self.passwords.verify(password, stored):
            return _Refusal("wrong password")
        if account.state != "active":
            return _Refusal(f"the account is {account.state}", account.sync_id)
        if account.second_factor:
            return _Refusal("an application password is needed", account.sync_id, second_factor=True)
        if stored is not None and self.passwords.is_outdated(stored):
            self._rehash(account, password)
        return None

    def _rehash(self, account: Account, password: str) -> None:
        """Bring a stored hash to today's parameters; the same password, so nobody is logged out."""
        fresh = self.passwords.hash(password)
        update = (
            sa.update(t.account)
            .where(t.account.c.id == account.id, t.account.c.password_hash == account.password_hash)
            .values(password_hash=fresh)
        )
        self._notes.later(lambda tx: tx.execute(update))

    def _note_refusal(
        self, refusal: _Refusal, credentials: Credentials, peer: Peer, service: Service
    ) -> None:
        """Tell the operator's log, and the owner where somebody holds one of its right secrets (APP7)."""
        fields = {"login": credentials.name[:100], "address": peer.address, "service": str(service)}
        log.warning("log-in refused", extra={**fields, "reason": refusal.reason})
        if refusal.owner is not None:
            self._notes.refusal(refusal.owner, refusal.reason, peer, service)

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
            NotImplementedHere: an unknown verb.

        Cost: no read for a home, one indexed join for a drive.
        """
        if verb not in VERBS:
            raise NotImplementedHere(f"{verb[:20]} is not a method of this server.")
        if isinstance(target, HomeTarget):
            return self._home(identity, target)
        return self._drive(tx, identity, target)

    def _home(self, identity: Identity, target: HomeTarget) -> HomeGrant:
        if target.owner.upper() != identity.sync_id:
            raise NotFound(_NOTHING_HERE)
        wanted = _HOME_SCOPES.get(target.service, frozenset())
        if not wanted & identity.scopes:
            raise Forbidden(_wrong_scope(identity, " or ".join(sorted(wanted)) or "this"))
        return HomeGrant(identity.account_id, identity.sync_id)

    def _drive(self, tx: Read, identity: Identity, target: DriveTarget) -> DriveGrant:
        if Service.DRIVE not in identity.scopes:
            raise Forbidden(_wrong_scope(identity, "drive"))
        row = tx.one(_DRIVE, {"account_id": identity.account_id, "drive_id": target.drive_id})
        if row is None:
            raise NotFound(_NOTHING_HERE)
        collection_id, name, offer_name, root, trash, common, largest, chunked, quota, used, others = row
        offer = self._offers.find(offer_name)
        if offer is None or not offer.webdav:
            better = ", ".join(each.id for each in self._offers.list() if each.webdav)
            raise Forbidden(
                f"The offer {offer_name} of this drive does not include WebDAV."
                f" Its organization can change to one that does: {better}."
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
            quota_bytes=_quota(offer, quota, int(others)),
            used_bytes=used,
        )


_HOME_SCOPES = {
    Service.CALDAV: frozenset({"caldav"}),
    Service.CARDDAV: frozenset({"carddav"}),
    Service.SYNC: frozenset({"caldav", "carddav"}),
}


def _wrong_scope(identity: Identity, wanted: str) -> str:
    return (
        f"This application password is for {', '.join(sorted(identity.scopes)) or 'nothing'}."
        f" Make one for {wanted}."
    )


def _quota(offer: Offer, own: int | None, others_used: int) -> int | None:
    """What this drive may hold: its own limit, and what the offer's storage leaves beside its sisters."""
    if offer.storage_bytes is None:
        return own
    left = max(0, offer.storage_bytes - others_used)
    return left if own is None else min(own, left)


class _Notes:
    """Writes nobody waits for: when a secret was used, and why a right one was refused."""

    def __init__(self, database: Database, every_s: float) -> None:
        self._database = database
        self._every_s = every_s
        self._lock = threading.Lock()
        self._uses: dict[int, _Use] = {}  # not written yet
        self._writing = False
        self._queued: set[Future[Any]] = set()
        self._noted: OrderedDict[tuple[str, object], float] = OrderedDict()  # what -> monotonic time

    def use(self, last_used_at: int | None, use: _Use) -> None:
        """Keep a use, at most one per secret and `every_s`; all that wait are written in one transaction."""
        if last_used_at is not None and use.at - last_used_at < self._every_s:
            return
        if not self._is_due("use", use.number, self._every_s):
            return
        with self._lock:
            self._uses[use.number] = use
            if self._writing:
                return
            self._writing = True
        self.later(self._write_uses)

    def _write_uses(self, tx: Write) -> None:
        with self._lock:
            uses = tuple(self._uses.values())
            self._uses.clear()
            self._writing = False
        for use in uses:
            values = {"at": use.at, "service": use.service, "address": use.address, "client": use.client}
            tx.fast(_USED, {"id_": use.number, **values})

    def refusal(self, sync_id: str, reason: str, peer: Peer, service: Service) -> None:
        """Leave a row in the audit, at most one per account and reason and hour."""
        if not self._is_due(reason, sync_id, _TELL_EVERY_S):
            return
        actor = audit.Actor(sync_id, peer.address)
        detail: dict[str, object] = {
            "reason": reason,
            "service": str(service),
            "client": peer.user_agent[:200],
        }
        self.later(lambda tx: audit.record(tx, actor, "log-in.refused", sync_id, detail))

    def _is_due(self, what: str, whose: object, every_s: float) -> bool:
        key, now = (what, whose), time.monotonic()
        with self._lock:
            if now - self._noted.get(key, -every_s) < every_s:
                return False
            self._noted[key] = now
            self._noted.move_to_end(key)
            while len(self._noted) > _REMEMBERED:
                self._noted.popitem(last=False)
        return True

    def later(self, fn: Callable[[Write], object]) -> None:
        """Queue a write; what becomes of it is the log's business alone."""
        try:
            future = self._database.submit(fn)
        except Unavailable as error:  # the process is stopping
            self._failed(error)
            return
        with self._lock:
            self._queued.add(future)
        future.add_done_callback(self._done)

    def _done(self, future: Future[Any]) -> None:
        with self._lock:
            self._queued.discard(future)
        problem = future.exception()
        if problem is not None:
            self._failed(problem)

    def _failed(self, problem: BaseException) -> None:
        log.warning("a note was not written", extra={"reason": str(problem)})
        with self._lock:
            self._writing = False

    def flush(self) -> None:
        """Wait until what was queued is written or has failed."""
        with self._lock:
            queued = tuple(self._queued)
        wait(queued)
