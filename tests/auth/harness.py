"""What tests of the door share: a store with accounts, and log-ins."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pyotp

from ksync_server import settings
from ksync_server.auth import (
    accounts,
    app_passwords,
    device_passwords,
    keys,
    mailboxes,
    offers,
    organizations,
    products,
    secondfactor,
)
from ksync_server.auth.accounts import Account
from ksync_server.auth.gate import (
    Credentials,
    DriveGrant,
    DriveTarget,
    Gate,
    HomeGrant,
    HomeTarget,
    Identity,
    Service,
)
from ksync_server.auth.mailboxes import Mailbox
from ksync_server.auth.memory import Memory
from ksync_server.errors import NotAuthenticated, TooManyRequests
from ksync_server.http import Peer
from ksync_server.store import schema
from ksync_server.store.database import Database, Write

T = TypeVar("T")
PASSWORD = "a long enough pass phrase"
PEER = Peer("192.0.2.7", True, "DAVx5/4.5")
SYNC_HOST = "sync.example.org"


@dataclass(frozen=True, slots=True)
class Door:
    """A store, its keys and its gate."""

    settings: settings.Settings
    database: Database
    keys: keys.Keys
    offers: offers.Offers
    gate: Gate
    others: list[Gate] = field(default_factory=list)  # of other processes, to be closed with this one

    @staticmethod
    @contextlib.contextmanager
    def opened(url: str, folder: Path, **auth: Any) -> Iterator[Door]:
        """A migrated store; `auth` changes settings of the door."""
        every = settings.Settings(
            database=settings.Database(url=url),
            hosts=settings.Hosts(sync=(SYNC_HOST, "dav.example.org")),
            auth=settings.Auth(
                **{
                    "key_file": folder / "keys.toml",
                    "argon2_memory_kib": 8,
                    "argon2_time": 1,
                    **auth,
                }
            ),
        )
        database = Database(every.database, threads=4)
        schema.migrate(database)
        ring, table = keys.load(every.auth.key_file), offers.load(None)
        door = Door(every, database, ring, table, Gate(every, database, ring, table))
        try:
            yield door
        finally:
            for gate in (door.gate, *door.others):
                gate.close()
            database.close()

    def another_process(self, memory: Memory | None = None, **auth: Any) -> Door:
        """The gate of another worker over the same store; of another server unless `memory` is shared."""
        every = msgspec.structs.replace(
            self.settings, auth=msgspec.structs.replace(self.settings.auth, **auth)
        )
        gate = Gate(every, self.database, self.keys, self.offers, memory)
        self.others.append(gate)
        return replace(self, settings=every, gate=gate)

    def is_quick(self, name: str, secret: str, peer: Peer = PEER) -> bool:
        """Whether no argon2 is needed to let in or to refuse."""
        try:
            found = self.gate.recognise(Credentials(name, secret), peer, service=Service.DRIVE)
        except (NotAuthenticated, TooManyRequests):
            return True
        return found is not None

    def write(self, fn: Callable[[Write], T]) -> T:
        """Run a change."""
        return self.database.write(fn)

    def account(self, name: str = "alice", **options: Any) -> Account:
        """A new account `<name>@example.org` with PASSWORD."""
        hashed = self.gate.passwords.hash(PASSWORD)
        return self.write(
            lambda tx: accounts.create_account(
                tx,
                **{
                    "login_email": f"{name}@example.org",
                    "display_name": name.title(),
                    "password_hash": hashed,
                    "sync_hosts": self.settings.hosts.log_in,
                    **options,
                },
            )
        )

    def app_password(
        self, account: Account, *scopes: str, name: str = "phone", **narrow: Any
    ) -> tuple[int, str]:
        """A new application password: its id, and the secret as shown."""
        number, secret = self.write(
            lambda tx: app_passwords.create(
                tx, self.keys, account, name, scopes or app_passwords.SCOPES, **narrow
            )
        )
        return number, secret.shown

    def organization(self, offer: str = "mail-premium", *members: Account, **options: Any) -> int:
        """A new organization with a product under an offer."""

        def create(tx: Write) -> int:
            home = organizations.create_organization(tx, "Example")
            products.create(tx, self.offers, home, offer, **options)
            for member in members:
                organizations.put_member(tx, home, member, "collaborator")
            return home

        return self.write(create)

    def mailbox(
        self, address: str, account: Account | None = None, *, home: int | None = None, **options: Any
    ) -> Mailbox:
        """A new mailbox, in an organization of its own unless one is named."""
        members = () if account is None else (account,)
        place = self.organization("mail-premium", *members) if home is None else home
        hosts = self.settings.hosts.log_in
        return self.write(
            lambda tx: mailboxes.create(
                tx, self.offers, place, address, **{"account": account, "sync_hosts": hosts, **options}
            )
        )

    def device(self, mailbox: Mailbox, name: str = "phone", **options: Any) -> tuple[int, str]:
        """A new device password: its id, and the secret as shown."""
        number, secret = self.write(
            lambda tx: device_passwords.create(tx, self.keys, mailbox, name, **options)
        )
        return number, secret.shown

    def turn_on_second_factor(self, account: Account) -> str:
        """Turn 2FA on; returns a TOTP secret."""
        made = self.write(lambda tx: secondfactor.enrol_totp(tx, self.keys, account, "app", "ksync"))
        now = time.time()
        code = pyotp.TOTP(made.secret).at(int(now))
        self.write(lambda tx: secondfactor.confirm(tx, self.keys, account, code, window_steps=1, now=now))
        return made.secret

    def drive(self, offer: str, *members: Account, organization: int | None = None) -> int:
        """A new drive under an offer."""

        def create(tx: Write) -> int:
            home = organization or organizations.create_organization(tx, "Example")
            number = organizations.create_drive(
                tx, organizations.create_product(tx, home, offer), "Team files"
            )
            for member in members:
                organizations.put_member(tx, home, member, "collaborator")
                organizations.add_drive_member(tx, number, member)
            return number

        return self.write(create)

    def log_in(
        self, name: str, secret: str, service: Service = Service.DRIVE, address: str = PEER.address
    ) -> Identity:
        """Identify."""
        peer = replace(PEER, address=address)
        return self.gate.identify(Credentials(name, secret), peer, service=service)

    def home(self, identity: Identity, service: Service, owner: str, verb: str = "PROPFIND") -> HomeGrant:
        """Authorize for a home."""
        with self.database.read() as tx:
            return self.gate.authorize(tx, identity, HomeTarget(service, owner), verb)

    def enter(self, identity: Identity, drive_id: int, verb: str = "PROPFIND") -> DriveGrant:
        """Authorize for a drive."""
        with self.database.read() as tx:
            return self.gate.authorize(tx, identity, DriveTarget(drive_id), verb)
