"""The only door: `identify` says who it is, `authorize` says whether they may do that.

Every protocol asks here, and both functions fail closed: what is not known to be allowed is refused.
"""

from __future__ import annotations

import hmac
import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, overload

import sqlalchemy as sa

from ksync_server import settings as configuration
from ksync_server.auth import accounts, app_passwords, folders, passwords, rules
from ksync_server.auth.accounts import Account
from ksync_server.auth.folders import Folder
from ksync_server.auth.keys import Keys
from ksync_server.auth.mailboxes import Mailbox
from ksync_server.auth.memory import Memory
from ksync_server.auth.notes import Notes, Use
from ksync_server.auth.offers import Offers, storage_of
from ksync_server.auth.rules import Secret
from ksync_server.auth.rules import Service as Service
from ksync_server.auth.throttle import Marks, Standing, Throttle, Try
from ksync_server.errors import (
    DAV,
    AppPasswordRequired,
    ClientError,
    ConfigError,
    Forbidden,
    NotAuthenticated,
    NotFound,
    NotImplementedHere,
    TooManyRequests,
)
from ksync_server.http import Peer
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Row

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the client sent, decoded."""

    name: str
    secret: str


@dataclass(frozen=True, slots=True)
class Identity:
    """An account that passed the door, and with which secret; or a mailbox, whose account may be nobody."""

    account_id: int  # 0 and sync id "": the mailbox is nobody's
    sync_id: str  # canonical, upper case
    login_email: str
    display_name: str
    scopes: frozenset[str]  # caldav, carddav, drive
    app_password_id: int | None  # None: the account password
    read_only: bool = False
    drive_id: int | None = None  # the only drive that it opens; None: all of the account's
    folder_id: int | None = None  # node: all that it sees of that drive
    mailbox: Mailbox | None = None  # all that a device password opens

    @property
    def secret(self) -> Secret:
        """The class of the secret that was shown."""
        if self.mailbox is not None:
            return Secret.DEVICE_PASSWORD
        return Secret.ACCOUNT_PASSWORD if self.app_password_id is None else Secret.APP_PASSWORD


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
    read_only: bool = False
    folder: Folder | None = None  # all that is seen of the drive, as its root; None: everything


_REFUSED = "The name or the password is not right, or an application password is needed."
_NOTHING_HERE = "There is nothing here."
_NEVER = 1 << 60  # Unix seconds
_OF_SECRET = 19  # columns of a row about a secret and its account; behind them a device password's mailbox
_holds = itemgetter(0)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why nobody was let in: for the log, and for the owner where the secret was a right one."""

    reason: str
    near: str | None = None  # sync id of the account whose secret it is, or that was looked at
    right: bool = False  # it is one of that account's, so its owner is told
    second_factor: bool = False  # the right account password, where only application passwords are taken
    repeated: bool = False  # this very secret was refused before: a program that does not know better
    blocked_s: int = 0  # not verified, because of too many wrong ones before


def _nearest(table: sa.Table) -> sa.ColumnElement[bool]:
    """The row of an id, or of its neighbour where nobody has it: one way through the store, whatever the
    outcome."""
    neighbour = table.alias("neighbour")
    first = sa.select(sa.func.min(neighbour.c.lookup))
    at_or_after = first.where(neighbour.c.lookup >= sa.bindparam("lookup"))
    return table.c.lookup == sa.func.coalesce(at_or_after.scalar_subquery(), first.scalar_subquery())


_APP_PASSWORD = (
    sa.select(
        t.app_password.c.lookup,
        t.app_password.c.id,
        t.app_password.c.digest,
        t.app_password.c.key_id,
        t.app_password.c.scopes,
        t.app_password.c.revoked_at,
        t.app_password.c.expires_at,
        t.app_password.c.addresses,
        t.app_password.c.last_used_at,
        t.app_password.c.read_only,
        t.app_password.c.drive_id,
        t.app_password.c.folder_id,
        t.account.c.id,
        t.account.c.sync_id,
        t.account.c.login_email,
        t.account.c.login_key,
        t.account.c.display_name,
        t.account.c.state,
        t.account.c.second_factor,
    )
    .join(t.account, t.account.c.id == t.app_password.c.account_id)
    .where(_nearest(t.app_password))
)
_D, _M = t.device_password.c, t.mailbox.c
# The same columns, so that both kinds are judged by one function; then the mailbox.
_DEVICE_PASSWORD = (
    sa.select(
        _D.lookup,
        _D.id,
        _D.digest,
        _D.key_id,
        sa.literal(""),
        _D.revoked_at,
        sa.null(),
        sa.literal(""),
        _D.last_used_at,
        sa.false(),
        sa.null(),
        sa.null(),
        sa.func.coalesce(t.account.c.id, 0),
        sa.func.coalesce(t.account.c.sync_id, ""),
        _M.address,
        _M.address_key,
        sa.func.coalesce(t.account.c.display_name, ""),
        sa.case(
            (_M.state != "active", _M.state),
            (t.account.c.state != "active", sa.literal("that of an account that is ") + t.account.c.state),
            (
                sa.and_(_M.account_id.is_not(None), t.member.c.account_id.is_(None)),
                "of somebody who left the organization",
            ),
            else_="active",
        ),
        sa.false(),
        _M.id,
        _M.organization_id,
        _M.account_id,
        _M.address,
        _M.folder,
        _M.state,
        _M.quota_bytes,
    )
    .select_from(
        t.device_password.join(t.mailbox, _M.id == _D.mailbox_id)
        .outerjoin(t.account, t.account.c.id == _M.account_id)
        .outerjoin(
            t.member,
            (t.member.c.account_id == _M.account_id) & (t.member.c.organization_id == _M.organization_id),
        )
    )
    .where(_nearest(t.device_password))
)


def _rekey(table: sa.Table) -> sa.Update:
    c = table.c
    return (
        sa.update(table)
        .where(c.id == sa.bindparam("id_"), c.key_id == sa.bindparam("old_key"))
        .values(key_id=sa.bindparam("new_key"), digest=sa.bindparam("digest"))
    )


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of secret that nobody guesses: where its rows are, and whose they are."""

    row: sa.Select[Any]
    rekey: sa.Update
    called: str
    of: str  # what it opens, and what `state` is the state of


_KINDS = {
    Secret.APP_PASSWORD: _Kind(_APP_PASSWORD, _rekey(t.app_password), "application password", "account"),
    Secret.DEVICE_PASSWORD: _Kind(_DEVICE_PASSWORD, _rekey(t.device_password), "device password", "mailbox"),
}
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
        t.product.c.storage_bytes,
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
    """Both decisions for one process; thread-safe.

    Args:
        memory: of good account passwords, shared with other processes; None = one of its own.
    """

    def __init__(
        self,
        settings: configuration.Settings,
        database: Database,
        keys: Keys,
        offers: Offers,
        memory: Memory | None = None,
    ) -> None:
        self._settings = settings
        self._database = database
        self._keys = keys
        self._offers = offers
        self._sync_hosts = tuple(accounts.fold(host) for host in settings.hosts.log_in)
        self.passwords = passwords.AccountPasswords(settings.auth, memory)
        self.throttle = Throttle(settings.auth, database, keys)
        self._notes = Notes(database, settings.auth.last_used_s)
        self._verifying: dict[tuple[Credentials | None, str, Service], Future[Identity]] = {}
        self._present = 0  # the id of some account that exists

    def flush(self) -> None:
        """Wait until what is to be written of uses and refusals so far is; requests never do."""
        self._notes.flush()
        self.throttle.flush()

    def close(self) -> None:
        """Write the counts that wait; the database is still open."""
        self.throttle.close()

    # -- who is it ----------------------------------------------------------------------------------

    def recognise(self, credentials: Credentials | None, peer: Peer, *, service: Service) -> Identity | None:
        """`identify` as far as it goes without argon2: None where only argon2 can tell.

        So the event loop may call it with SQLite. Where it gives None, `queued` keeps the work away from the
        threads that everybody shares.

        Raises:
            NotAuthenticated, AppPasswordRequired, TooManyRequests: as `identify`.

        Cost: one indexed read for an application or device password, two for an account password.
        """
        return self._admit(credentials, peer, service, verify=False)

    def identify(self, credentials: Credentials | None, peer: Peer, *, service: Service) -> Identity:
        """The account behind a name and a secret.

        Args:
            credentials: what the client sent; None where it sent nothing usable.
            peer: for the notes of where a secret was used or refused, and for throttling.
            service: what the secret is used for; its scopes are the business of `authorize`, because a right
                secret of the wrong scope is a right log-in.

        Raises:
            NotAuthenticated: unknown name, wrong, revoked or expired secret, one that is not for the peer's
                address, suspended account, a class of secret that the service does not take.
            AppPasswordRequired: the right account password while 2FA is on (APP3). Clients cannot tell it
                from the others; its owner is told.
            TooManyRequests: too many wrong account passwords before; nothing was verified (APP8).
            Unavailable: too many password verifications are waiting.

        Cost: one indexed read for an application or device password; for an account password two reads and,
            where the service takes one and no process has verified it since the last change of the account,
            one argon2id.
        """
        identity = self._admit(credentials, peer, service, verify=True)
        assert identity is not None, "verified"
        return identity

    def queued(self, credentials: Credentials | None, peer: Peer, *, service: Service) -> Future[Identity]:
        """`identify` in the few threads that verify account passwords; the future raises what it raises.

        Requests that come with one secret while it is being verified wait for that one result: a program may
        open a thousand connections at once.

        Raises:
            Unavailable: too many verifications are waiting.
        """
        key = (credentials, peer.address, service)
        shared = self._verifying.get(key)
        if shared is None:
            shared = self.passwords.queue(lambda: self.identify(credentials, peer, service=service))
            self._verifying[key] = shared
            shared.add_done_callback(lambda _: self._verifying.pop(key, None))
        own: Future[Identity] = Future()
        shared.add_done_callback(lambda done: _hand_on(done, own))
        return own

    def _admit(
        self, credentials: Credentials | None, peer: Peer, service: Service, *, verify: bool
    ) -> Identity | None:
        if credentials is None:
            raise NotAuthenticated(_REFUSED)
        outcome: Identity | _Refusal | None
        if len(credentials.secret.encode("utf-8", "surrogatepass")) > self._settings.auth.password_bytes:
            outcome = _Refusal("secret too long")
        elif (letters := passwords.app_password_letters(credentials.secret)) is not None:
            outcome = self._by_letters(credentials.name, letters, peer, service)
        else:
            outcome = self._by_account_password(credentials, peer, service, verify=verify)
        if not isinstance(outcome, _Refusal):
            return outcome
        self._note_refusal(outcome, credentials, peer, service)
        raise _error(outcome)

    # -- application and device passwords -----------------------------------------------------------

    def _by_letters(self, name: str, letters: str, peer: Peer, service: Service) -> Identity | _Refusal:
        secret = passwords.parse_app_password(letters)
        if secret is None:
            return _Refusal("mistyped application password")
        kind = _KINDS[secret.kind]
        rows = self._database.fast(kind.row, {"lookup": secret.lookup})
        if not rows:
            return _Refusal(f"no such {kind.called}")  # there is none at all
        refusal = self._judge(rows[0], name, secret, peer, service)
        return self._bearer(rows[0], secret, name, peer, service) if refusal is None else refusal

    def _judge(
        self, row: Row, name: str, secret: passwords.AppPassword, peer: Peer, service: Service
    ) -> _Refusal | None:
        """Why a secret is refused, None where it is right; everything is looked at always."""
        lookup, _, digest, key_id, _, revoked, expires, networks, _, _, _, _, *owner = row[:_OF_SECRET]
        _, sync_id, _, login_key, _, state, second_factor = owner
        typed, is_email = accounts.canonical_name(name, self._sync_hosts)
        # A mailbox has no name but its address (MAIL1).
        by_id = sync_id if secret.kind is Secret.APP_PASSWORD else None
        kind, of = _KINDS[secret.kind].called, _KINDS[secret.kind].of
        try:
            _, wanted = self._keys.digest(secret.secret.encode("ascii"), key_id)
        except ConfigError:
            wanted = b""
        right = hmac.compare_digest(wanted, bytes(digest))
        now = time.time()
        inside = passwords.is_within(peer.address, networks or "0.0.0.0/0 ::/0") or not networks
        causes = (
            (lookup != secret.lookup, f"no such {kind}", False),
            (not wanted, f"the key file has no key set {key_id}", False),
            (not right, f"no such {kind}", False),
            (
                typed != (login_key if is_email else by_id),
                f"the {kind} of another {of}",
                True,
            ),
            (revoked is not None, f"revoked {kind}", True),
            (now >= (expires or _NEVER), f"expired {kind}", True),
            (not inside, f"an address that the {kind} is not for", True),
            (state != "active", f"the {of} is {state}", True),
            (
                not rules.opens(secret.kind, service, second_factor=bool(second_factor)),
                f"{service} takes no {kind}",
                True,
            ),
        )
        holds, reason, owned = max(causes, key=_holds)  # the first of those that hold; looks at each
        return _Refusal(reason, sync_id or None, right=owned) if holds else None

    def _bearer(
        self, row: Row, secret: passwords.AppPassword, name: str, peer: Peer, service: Service
    ) -> Identity:
        _, number, _, key_id, scopes, _, _, _, used_at, read_only, drive_id, folder_id, *owner = row[
            :_OF_SECRET
        ]
        account_id, sync_id, email, _, shown, _, _ = owner
        if self._keys.is_outdated(key_id):
            self._rekey(number, key_id, secret)
        use = Use(secret.kind, number, int(time.time()), service, peer.address, peer.user_agent[:200])
        if self._notes.use(used_at, use):
            typed, _ = accounts.canonical_name(name, self._sync_hosts)
            self.throttle.trust(self.throttle.attempt(typed, peer.address, ""))
        scoped = frozenset(scopes.split())
        mailbox = Mailbox(*row[_OF_SECRET:]) if secret.kind is Secret.DEVICE_PASSWORD else None
        app_password_id = number if mailbox is None else None
        return Identity(
            account_id,
            sync_id,
            email,
            shown,
            scoped,
            app_password_id,
            bool(read_only),
            drive_id,
            folder_id,
            mailbox,
        )

    # -- account passwords --------------------------------------------------------------------------

    def _by_account_password(
        self, credentials: Credentials, peer: Peer, service: Service, *, verify: bool
    ) -> Identity | _Refusal | None:
        typed, _ = accounts.canonical_name(credentials.name, self._sync_hosts)
        attempt = self.throttle.attempt(typed, peer.address, credentials.secret)
        if not verify:  # a look that lets nobody in whose password is not remembered
            return self._tried(attempt, self.throttle.waiting(attempt), credentials, service, verify=False)
        with self.throttle.trying(attempt) as waiting:
            return self._tried(attempt, waiting, credentials, service, verify=True)

    def _tried(
        self, attempt: Try, waiting: Marks, credentials: Credentials, service: Service, *, verify: bool
    ) -> Identity | _Refusal | None:
        now = int(time.time())
        with self._database.read() as tx:
            account = accounts.find(tx, credentials.name, self._sync_hosts)
            standing = self.throttle.standing(tx, attempt, waiting, now)
        if self._remembers(account, attempt, standing, credentials.secret, service):
            assert account is not None, "nobody is remembered"
            return owner(account)
        self._level(account)
        if standing.blocked_s:
            self.throttle.failed(attempt, standing)
            return _Refusal("too many wrong log-ins", repeated=standing.known, blocked_s=standing.blocked_s)
        if not rules.opens(Secret.ACCOUNT_PASSWORD, service, second_factor=False):
            # Not verified, since it opens nothing here either way: nothing to learn, and no argon2 to burn.
            self.throttle.failed(attempt, standing)
            return _Refusal(f"{service} takes no account password", repeated=standing.known)
        if not verify:
            return None
        refusal = self._verified(account, credentials.secret, service, repeated=standing.known)
        if refusal is not None:
            self.throttle.failed(attempt, standing)
            return refusal
        assert account is not None, "verified"
        self.throttle.succeeded(attempt, standing, now)
        self.passwords.remember(account.id, credentials.secret, account.auth_epoch, attempt.network)
        return owner(account)

    def _level(self, account: Account | None) -> None:
        """A hit and a miss among the accounts for every cause of a refusal alike."""
        if account is not None:
            self._present = account.id
        with self._database.read() as tx:
            if account is None and self._present:
                accounts.find_by_id(tx, self._present)
            else:
                accounts.find(tx, "")

    def _remembers(
        self, account: Account | None, attempt: Try, standing: Standing, password: str, service: Service
    ) -> bool:
        """Whether this password was let in before; where none is let in, every try costs the same (APP7).

        While tries are blocked, a password counts that was used from this very network: nobody who guesses
        from elsewhere learns anything.
        """
        number, epoch = (account.id, account.auth_epoch) if account is not None else (0, 0)
        known = self.passwords.is_known(
            number, password, epoch, attempt.network, anywhere=not standing.blocked_s
        )
        return known and not standing.exhausted and account is not None and _opens(account, service)

    def _verified(
        self, account: Account | None, password: str, service: Service, *, repeated: bool
    ) -> _Refusal | None:
        stored = account.password_hash if account is not None else None
        if not self.passwords.verify(password, stored):
            near = account.sync_id if account else None
            return _Refusal("wrong password" if account else "no such account", near, repeated=repeated)
        assert account is not None, "a hash matched"
        if not _opens(account, service):
            if account.state != "active":
                return _Refusal(
                    f"the account is {account.state}", account.sync_id, right=True, repeated=repeated
                )
            reason = "an application password is needed"
            return _Refusal(reason, account.sync_id, right=True, second_factor=True, repeated=repeated)
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

    def _rekey(self, number: int, key_id: str, secret: passwords.AppPassword) -> None:
        """Bring an application or device password to the current key set, now that its letters are here."""
        now_id, digest = self._keys.digest(secret.secret.encode("ascii"))
        row = {"id_": number, "old_key": key_id, "new_key": now_id, "digest": digest}
        statement = _KINDS[secret.kind].rekey
        self._notes.later(lambda tx: tx.fast(statement, row))

    def _note_refusal(
        self, refusal: _Refusal, credentials: Credentials, peer: Peer, service: Service
    ) -> None:
        """Tell the operator's log, and the owner where somebody holds one of its right secrets (APP7).

        fail2ban reads the line (deploy/fail2ban/): a repeated secret is no guess.
        """
        guess = not refusal.repeated and not refusal.right
        fields = {
            "address": peer.address,
            "guess": "yes" if guess else "no",
            "reason": refusal.reason,
            "service": str(service),
            "login": accounts.logged_name(credentials.name),
        }
        log.warning("log-in refused", extra=fields)
        self._notes.refusal(refusal.near, refusal.reason, peer, service, told=refusal.right)

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
            Forbidden: the application password's scopes, or the drive's offer, do not include this; or it
                may only read.
            NotFound: no such target, or not one of this identity's; nobody can tell which.
            NotImplementedHere: an unknown verb.

        Cost: no read for a home, one indexed join for a drive, and one row for each folder above the only one
            that a secret opens.
        """
        if verb not in rules.VERBS:
            raise NotImplementedHere(f"{verb[:20]} is not a method of this server.")
        if isinstance(target, HomeTarget):
            granted: HomeGrant | DriveGrant = self._home(identity, target)
        else:
            granted = self._drive(tx, identity, target)
        if identity.read_only and verb not in rules.READS:
            raise Forbidden(
                "This application password is for reading alone.", precondition=DAV + "need-privileges"
            )
        return granted

    def _home(self, identity: Identity, target: HomeTarget) -> HomeGrant:
        if target.owner.upper() != identity.sync_id:
            raise NotFound(_NOTHING_HERE)
        wanted = rules.scopes_for(target.service) - {Service.DRIVE}
        if not wanted & identity.scopes or not _takes(identity, target.service):
            raise Forbidden(_wrong_scope(identity, " or ".join(sorted(wanted)) or "this"))
        return HomeGrant(identity.account_id, identity.sync_id)

    def _drive(self, tx: Read, identity: Identity, target: DriveTarget) -> DriveGrant:
        if not rules.scopes_for(Service.DRIVE) & identity.scopes or not _takes(identity, Service.DRIVE):
            raise Forbidden(_wrong_scope(identity, "drive"))
        if identity.drive_id not in (None, target.drive_id) or (
            identity.folder_id is not None and identity.drive_id is None
        ):
            raise NotFound(_NOTHING_HERE)
        row = tx.one(_DRIVE, {"account_id": identity.account_id, "drive_id": target.drive_id})
        if row is None:
            raise NotFound(_NOTHING_HERE)
        (
            collection_id,
            name,
            offer_name,
            root,
            trash,
            common,
            largest,
            chunked,
            quota,
            used,
            storage,
            others,
        ) = row
        offer = self._offers.find(offer_name)
        if offer is None or not offer.webdav:
            better = ", ".join(each.id for each in self._offers.list() if each.webdav)
            raise Forbidden(
                f"The offer {offer_name} of this drive does not include WebDAV."
                f" Its organization can change to one that does: {better}."
            )
        folder = None
        if identity.folder_id is not None:
            folder = folders.find(tx, identity.folder_id, target.drive_id, root_id=root, common_id=common)
            if folder is None:
                raise NotFound(_NOTHING_HERE)
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
            quota_bytes=_quota(storage_of(offer, storage), quota, int(others)),
            used_bytes=used,
            read_only=identity.read_only,
            folder=folder,
        )


def _error(refusal: _Refusal) -> ClientError:
    """One answer for every cause. A blocked try gets 429: a program that is told 401 asks for another
    password or drops the account, one that is told to come back later does."""
    if refusal.blocked_s:
        minutes = -(-refusal.blocked_s // 60)
        return TooManyRequests(
            f"Too many wrong log-ins. Try again in {minutes} minutes; application passwords work meanwhile.",
            headers=[(b"retry-after", str(refusal.blocked_s).encode("ascii"))],
        )
    return (AppPasswordRequired if refusal.second_factor else NotAuthenticated)(_REFUSED)


def owner(account: Account) -> Identity:
    """The identity of who showed the account's own password: everything that is the account's."""
    every = frozenset(app_passwords.SCOPES)
    return Identity(account.id, account.sync_id, account.login_email, account.display_name, every, None)


def _opens(account: Account, service: Service) -> bool:
    """Whether the account's own password opens a service."""
    return rules.opens(
        Secret.ACCOUNT_PASSWORD, service, second_factor=account.second_factor, state=account.state
    )


def _takes(identity: Identity, service: Service) -> bool:
    """Whether a service takes the class of secret at all; `identify` knew about 2FA."""
    return rules.opens(identity.secret, service, second_factor=False)


def _wrong_scope(identity: Identity, wanted: str) -> str:
    return (
        f"This application password is for {', '.join(sorted(identity.scopes)) or 'nothing'}."
        f" Make one for {wanted}."
    )


def _quota(storage: int | None, own: int | None, others_used: int) -> int | None:
    """What this drive may hold: its own limit, and what the product's storage leaves beside its sisters."""
    if storage is None:
        return own
    left = max(0, storage - others_used)
    return left if own is None else min(own, left)


def _hand_on(done: Future[Identity], own: Future[Identity]) -> None:
    """Give one of those who wait for a verification its outcome."""
    if not own.set_running_or_notify_cancel():
        return
    problem = done.exception()
    if problem is None:
        own.set_result(done.result())
    else:
        own.set_exception(problem)
