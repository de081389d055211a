"""The rules of the door over their whole product, against a table written by hand from the description.

The oracle below never asks the program: it is sections 2, 4 and 5 in the words of a test.
"""

from __future__ import annotations

import itertools
import secrets as randomness
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pyotp
import pytest
import sqlalchemy as sa

from ksync_server.auth import accounts, app_passwords, device_passwords, rules
from ksync_server.auth.accounts import Account
from ksync_server.auth.gate import Credentials, DriveTarget, HomeTarget, Identity
from ksync_server.auth.rules import Secret, Service
from ksync_server.drive import tree
from ksync_server.errors import ClientError, Forbidden, NotAuthenticated, NotFound, NotImplementedHere
from ksync_server.http import Peer
from ksync_server.store import tables as t
from ksync_server.store.database import Write
from tests.auth.harness import PASSWORD, PEER, Door

HERE, ELSEWHERE = PEER.address, "198.51.100.9"

# -- the pure rule: APP1, APP3, APP4, APP9 ---------------------------------------------------------

# Which secret opens what: "-" nothing, "off" while 2FA is off, "yes" always.
RULE = """
                                  caldav carddav drive sync imap smtp web  mint
account password                  off    off     off   off  -    -    off  -
application password              yes    yes     yes   yes  -    -    -    -
device password of a mailbox      -      -       -     -    yes  yes  -    -
web session after the password alone    - - - - - - - -
web session after the second factor     - - - - - - yes yes
"""


def _rule() -> dict[tuple[str, str], str]:
    head, *lines = RULE.strip().splitlines()
    services = head.split()
    found = {}
    for line in lines:
        words = line.split()
        name, cells = " ".join(words[: -len(services)]), words[-len(services) :]
        found |= {(name, service): cell for service, cell in zip(services, cells, strict=True)}
    return found


def test_every_secret_opens_what_the_table_says_and_nothing_else() -> None:
    table = _rule()
    assert set(table) == {(str(secret), str(service)) for secret in Secret for service in Service}
    for (secret, service), cell in table.items():
        for factor, state in itertools.product((False, True), ("active", "suspended", "deleted", "")):
            expected = state == "active" and (cell == "yes" or (cell == "off" and not factor))
            found = rules.opens(Secret(secret), Service(service), second_factor=factor, state=state)
            assert found == expected, (secret, service, factor, state)


# -- the whole door --------------------------------------------------------------------------------

# offer -> does it have WebDAV (OFF1)
OFFERS = {
    "kdrive-team": True,
    "ksuite-pro": True,
    "my-ksuite": False,
    "ksuite-standard": False,
    "unheard-of": False,
}
READS = {"GET", "HEAD", "OPTIONS", "PROPFIND", "REPORT"}
WRITES = {
    "PUT", "POST", "PATCH", "DELETE", "PROPPATCH", "MKCOL", "MKCALENDAR", "COPY", "MOVE", "LOCK", "UNLOCK",
    "ACL",
}  # fmt: skip
STRANGE = {"BREW", "get", "", "PUT ", "PROPFIND\0", "SEARCH"}
SCOPE_SETS = [
    set(each) for size in (1, 2, 3) for each in itertools.combinations(("caldav", "carddav", "drive"), size)
]
HOMES = {"caldav": {"caldav"}, "carddav": {"carddav"}, "sync": {"caldav", "carddav"}}


@dataclass(frozen=True, slots=True)
class Shown:
    """A secret as somebody shows it, and what the product's description says of it."""

    text: str
    kind: str  # account, app, device, or nothing: opens nothing anywhere
    scopes: set[str] = field(default_factory=set)
    read_only: bool = False
    drive: int | None = None
    folder: str = ""  # inside: the way to it is whole; gone: it is not
    addresses: tuple[str, ...] = (HERE, ELSEWHERE)  # from which it works


@dataclass(frozen=True, slots=True)
class World:
    """One account of each 2FA and state with every secret, a drive under each offer, and somebody else."""

    door: Door
    people: dict[tuple[bool, str], tuple[Account, dict[str, Shown]]]
    drives: dict[str, int]
    second: int  # another drive with WebDAV, of everybody
    foreign: int  # of somebody else
    stranger: Account

    def names(self, account: Account) -> dict[str, bool]:
        """What is typed as a name, and whether it is a mailbox's."""
        return {account.sync_id: False, account.login_email: False, mailbox_of(account): True}


def mailbox_of(account: Account) -> str:
    return f"mailbox.{account.login_email}"


def _folder(door: Door, account: Account, drive_id: int, *names: str) -> int:
    """Make a folder with those above it as the account's own."""
    identity = Identity(account.id, account.sync_id, "", "", frozenset({"drive"}), None)

    def make(tx: Write) -> int:
        grant = door.gate.authorize(tx, identity, DriveTarget(drive_id), "MKCOL")
        view = tree.View(grant, door.settings.drive, False)
        for depth in range(1, len(names) + 1):
            made = tree.make_folder(tree.begin(tx, view), tree.resolve(tx, view, names[:depth]))
        return made.id

    return door.write(make)


def _to_trash(door: Door, account: Account, drive_id: int, name: str) -> None:
    identity = Identity(account.id, account.sync_id, "", "", frozenset({"drive"}), None)

    def delete(tx: Write) -> None:
        grant = door.gate.authorize(tx, identity, DriveTarget(drive_id), "DELETE")
        view = tree.View(grant, door.settings.drive, False)
        tree.delete(tree.begin(tx, view), tree.resolve(tx, view, (name,)))

    door.write(delete)


def _secrets(door: Door, account: Account, drive_id: int, foreign_secret: str) -> dict[str, Shown]:
    box = door.mailbox(mailbox_of(account), account)
    number, lost = door.device(box)
    door.write(lambda tx: device_passwords.revoke(tx, box, number))
    stranger = door.device(door.mailbox(f"shared.{account.login_email}"))[1]
    every = {"caldav", "carddav", "drive"}

    def app(*scopes: str, **narrow: object) -> str:
        return door.app_password(account, *scopes, **narrow)[1]

    found = {
        "account password": Shown(PASSWORD, "account"),
        "account password in other case": Shown(PASSWORD.upper(), "nothing"),
        "wrong password": Shown("not the password", "nothing"),
        "empty": Shown("", "nothing"),
        "longer than any": Shown(PASSWORD * 1000, "nothing"),
        "another account's": Shown(foreign_secret, "nothing"),
        "device password": Shown(door.device(box)[1], "device"),
        "another device password": Shown(door.device(box)[1], "device"),
        "revoked device password": Shown(lost, "nothing"),
        "device password of another mailbox": Shown(stranger, "nothing"),
        "session": Shown(randomness.token_urlsafe(32), "nothing"),
    }
    for scopes in SCOPE_SETS:
        found["app " + " ".join(sorted(scopes))] = Shown(app(*sorted(scopes)), "app", scopes)
        found["read-only " + " ".join(sorted(scopes))] = Shown(
            app(*sorted(scopes), read_only=True), "app", scopes, read_only=True
        )
    inside = _folder(door, account, drive_id, "Projects", "Next", "Deep")
    gone = _folder(door, account, drive_id, "Old")
    below_gone = _folder(door, account, drive_id, "Older", "Sub")
    narrow = {"drive_id": drive_id}
    for name, more, folder in (
        ("one drive", {}, ""),
        ("one folder", {"folder_id": inside}, "inside"),
        ("folder in the trash", {"folder_id": gone}, "gone"),
        ("folder below one in the trash", {"folder_id": below_gone}, "gone"),
    ):
        for read_only in (False, True):
            text = app("drive", **narrow, **more, read_only=read_only)
            shown = Shown(text, "app", {"drive"}, read_only, drive_id, folder)
            found[f"{name}{', read-only' if read_only else ''}"] = shown
    _to_trash(door, account, drive_id, "Old")
    _to_trash(door, account, drive_id, "Older")
    app_number, revoked = door.app_password(account)
    door.write(lambda tx: app_passwords.revoke(tx, account, app_number))
    found["revoked"] = Shown(revoked, "nothing")
    expiring = app(expires_at=int(time.time()) + 3600)
    c = t.app_password.c
    of = sa.update(t.app_password).where(c.account_id == account.id, c.expires_at.is_not(None))
    door.write(lambda tx: tx.execute(of.values(expires_at=int(time.time()) - 1)))
    found["expired"] = Shown(expiring, "nothing")
    found["not expired"] = Shown(app(expires_at=int(time.time()) + 3600), "app", every)
    found["from here"] = Shown(app(addresses=["192.0.2.0/24"]), "app", every, addresses=(HERE,))
    found["from elsewhere"] = Shown(app(addresses=[ELSEWHERE]), "app", every, addresses=(ELSEWHERE,))
    return found


@pytest.fixture(scope="module")
def world(module_door: Door) -> World:
    door = module_door
    stranger = door.account("stranger")
    foreign_secret = door.app_password(stranger)[1]
    combinations = list(itertools.product((False, True), ("active", "suspended", "deleted")))
    accounts_of = {each: door.account(f"{'two' if each[0] else 'one'}.{each[1]}") for each in combinations}
    members = [*accounts_of.values()]
    drives = {offer: door.drive(offer, *members) for offer in OFFERS}
    second, foreign = door.drive("kdrive-solo", *members), door.drive("kdrive-solo", stranger)
    people = {}
    for (factor, state), account in accounts_of.items():
        shown = _secrets(door, account, drives["kdrive-team"], foreign_secret)
        if factor:
            code = pyotp.TOTP(door.turn_on_second_factor(account)).now()
            shown["password and code"] = Shown(PASSWORD + code, "nothing")
            shown["code and password"] = Shown(code + PASSWORD, "nothing")
            shown["code"] = Shown(code, "nothing")
        if state != "active":
            change = sa.update(t.account).where(t.account.c.id == account.id)
            door.write(lambda tx, change=change, state=state: tx.execute(change.values(state=state)))  # type: ignore[misc]
            door.write(lambda tx, account=account: accounts.raise_epoch(tx, account.id))  # type: ignore[misc]
        people[factor, state] = (account, shown)
    return World(door, people, drives, second, foreign, stranger)


def let_in(
    shown: Shown, factor: bool, state: str, service: str, address: str, *, mailbox: bool = False
) -> bool:
    """APP3, APP4, APP9: who passes the door."""
    if state != "active" or address not in shown.addresses:
        return False
    if mailbox or shown.kind == "device":  # the name of a mailbox is for mail alone, and mail knows no other
        return mailbox and shown.kind == "device" and service in ("imap", "smtp")
    if shown.kind == "account":
        return not factor and service in ("caldav", "carddav", "drive", "sync", "web")
    return shown.kind == "app" and service in ("caldav", "carddav", "drive", "sync")


def outcome(ask: Callable[[], object]) -> type[ClientError] | None:
    try:
        ask()
    except ClientError as error:
        return type(error)
    return None


def may_home(shown: Shown, service: str, own: bool, verb: str) -> type[ClientError] | None:
    """APP2 and the rule that others' homes are not there."""
    if verb not in READS | WRITES:
        return NotImplementedHere
    if not own:
        return NotFound
    if shown.kind == "app" and not shown.scopes & HOMES[service]:
        return Forbidden
    return Forbidden if shown.read_only and verb in WRITES else None


def may_drive(shown: Shown, drive_id: int, member: bool, webdav: bool, verb: str) -> type[ClientError] | None:
    """OFF2, OFF3, OFF6 and the scopes of APP2."""
    if verb not in READS | WRITES:
        return NotImplementedHere
    if shown.kind == "app" and "drive" not in shown.scopes:
        return Forbidden
    if shown.drive not in (None, drive_id) or not member:
        return NotFound
    if not webdav:
        return Forbidden
    if shown.folder == "gone":
        return NotFound
    return Forbidden if shown.read_only and verb in WRITES else None


@pytest.mark.parametrize("address", [HERE, ELSEWHERE])
@pytest.mark.parametrize("state", ["active", "suspended", "deleted"])
@pytest.mark.parametrize("factor", [False, True], ids=["2FA off", "2FA on"])
def test_the_door_and_every_room_are_what_the_table_says(
    world: World, factor: bool, state: str, address: str
) -> None:
    account, shown = world.people[factor, state]
    peer = Peer(address, True, "")
    checked = opened = 0
    for (name, secret), service in itertools.product(shown.items(), Service):
        for login, mailbox in world.names(account).items():
            expected = let_in(secret, factor, state, str(service), address, mailbox=mailbox)
            credentials = Credentials(login, secret.text)
            if not expected:
                with pytest.raises(NotAuthenticated):
                    world.door.gate.identify(credentials, peer, service=service)
                continue
            identity = world.door.gate.identify(credentials, peer, service=service)
            assert identity.account_id == account.id, (name, service)
            assert (identity.mailbox is not None) is mailbox
            opened += 1
            checked += _rooms(world, account, secret, identity, service)
    assert state != "active" or (opened > 20 and checked > 5_000), (opened, checked)


def _rooms(world: World, account: Account, secret: Shown, identity: Identity, service: Service) -> int:
    """Every target and verb for one identity; returns how many."""
    verbs = sorted(READS | WRITES | STRANGE)
    gate, count = world.door.gate, 0
    if secret.kind == "device":
        return _no_room(world, account, identity)
    with world.door.database.read() as tx:
        for verb in verbs:
            if service is not Service.DRIVE:
                name = str(service) if str(service) in HOMES else "sync"
                owners = {account.sync_id: True, account.sync_id.lower(): True, world.stranger.sync_id: False}
                for owner, own in {**owners, "ZZ99999": False, "": False}.items():
                    target = HomeTarget(Service(name), owner)
                    found = outcome(lambda: gate.authorize(tx, identity, target, verb))  # noqa: B023
                    assert found == may_home(secret, name, own, verb), (secret, name, owner, verb)
                    count += 1
                continue
            places = {number: (True, OFFERS[offer]) for offer, number in world.drives.items()}
            places |= {world.second: (True, True), world.foreign: (False, True), 999_999: (False, False)}
            for drive_id, (member, webdav) in places.items():
                place = DriveTarget(drive_id)
                found = outcome(lambda: gate.authorize(tx, identity, place, verb))  # noqa: B023
                assert found == may_drive(secret, drive_id, member, webdav, verb), (secret, drive_id, verb)
                count += 1
    return count


def _no_room(world: World, account: Account, identity: Identity) -> int:
    """A device password opens no room at all, whatever asks; returns how many were tried."""
    targets: list[HomeTarget | DriveTarget] = [DriveTarget(number) for number in world.drives.values()]
    owners = (account.sync_id, account.sync_id.lower(), world.stranger.sync_id, "")
    targets += [HomeTarget(service, owner) for service in Service for owner in owners]
    with world.door.database.read() as tx:
        for target, verb in itertools.product(targets, sorted(READS | WRITES)):
            with pytest.raises((Forbidden, NotFound)):
                world.door.gate.authorize(tx, identity, target, verb)
    return len(targets)


def test_mail_and_web_targets_of_a_home_are_refused_whatever_is_shown(world: World) -> None:
    account, shown = world.people[False, "active"]
    identity = world.door.log_in(account.sync_id, shown["account password"].text)
    for service in (Service.IMAP, Service.SMTP, Service.WEB, Service.MINT, Service.DRIVE):
        with pytest.raises(Forbidden):
            world.door.home(identity, service, account.sync_id)


def test_a_folder_without_its_drive_opens_nothing(world: World) -> None:
    """A row that no command makes: it fails closed all the same."""
    account, _ = world.people[False, "active"]
    identity = Identity(
        account.id, account.sync_id, "", "", frozenset({"drive"}), 1, False, None, folder_id=1
    )
    for drive_id in world.drives.values():
        with pytest.raises(NotFound):
            world.door.enter(identity, drive_id)
