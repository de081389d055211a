"""Mailboxes: whose an address is, how many there may be; no change loses mail or leaves a door open."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa

from ksync_server import background
from ksync_server.auth import accounts, directory, mailboxes, offers, organizations, products, removal
from ksync_server.auth.accounts import Account
from ksync_server.auth.audit import Actor
from ksync_server.auth.mailboxes import Mailbox
from ksync_server.auth.rules import Service
from ksync_server.errors import BadRequest, ClientError, Conflict, Forbidden, NotAuthenticated, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Write
from tests.auth.harness import SYNC_HOST, Door


def refused(kind: type[ClientError], said: str, fn: Callable[[], object]) -> None:
    with pytest.raises(kind, match=said):
        fn()


def rows(door: Door, **of: object) -> list[dict[str, object]]:
    with door.database.read() as tx:
        return directory.mailboxes(tx, **of)


def actions(door: Door, subject: str) -> list[str]:
    with door.database.read() as tx:
        return [row["action"] for row in directory.audit(tx, subject=subject)]


def change(door: Door, mailbox: Mailbox, fn: Callable[[Write, Mailbox], Mailbox]) -> Mailbox:
    return door.write(lambda tx: fn(tx, mailboxes.get(tx, mailbox.address)))


def test_an_address_is_one_mailbox_whatever_its_case(door: Door) -> None:
    alice = door.account()
    home = door.organization("mail-premium", alice)
    made = door.mailbox("Alice@Example.org", alice, home=home, quota_bytes=1000)
    assert (made.address, made.account_id, made.state, made.quota_bytes) == (
        "Alice@Example.org",
        alice.id,
        "active",
        1000,
    )
    with door.database.read() as tx:
        assert mailboxes.find(tx, "aLICE@example.ORG ") == made
        assert mailboxes.find(tx, "alice") is None
    refused(Conflict, "a mailbox already", lambda: door.mailbox("ALICE@EXAMPLE.ORG", home=home))
    other = door.mailbox("info@example.org", home=home)
    assert len(made.folder) == 32
    assert made.folder != other.folder
    assert [row["address"] for row in rows(door, organization_id=home)] == [
        "Alice@Example.org",
        "info@example.org",
    ]
    assert [row["address"] for row in rows(door, account=alice)] == ["Alice@Example.org"]
    assert actions(door, "Alice@Example.org") == ["mailbox.create"]


@pytest.mark.parametrize(
    "address",
    [
        "",
        "alice",
        "@example.org",
        "a b@example.org",
        "a@b@example.org",
        f"AB12345@{SYNC_HOST}",
        "a\n@example.org",
        "a@example..org",
        ".a@example.org",
        f"{'x' * 250}@example.org",
        "a@login.invalid",
        "a@example.org\0",
    ],
)
def test_what_mail_cannot_be_sent_to_is_no_mailbox(sqlite_door: Door, address: str) -> None:
    refused(BadRequest, "address|at the sync host", lambda: sqlite_door.mailbox(address))
    assert rows(sqlite_door) == []


def test_an_organization_has_as_many_addresses_as_its_offers(door: Door) -> None:
    """OFF1: the seats of every product with mail together; other products have none."""
    none = door.organization("kdrive-team")
    refused(
        Conflict,
        "have 0 addresses; 1 are needed.*mail-premium",
        lambda: door.mailbox("a@example.org", home=none),
    )
    home = door.organization("mail-starter")
    door.mailbox("one@example.org", home=home)
    refused(Conflict, "have 1 addresses", lambda: door.mailbox("two@example.org", home=home))
    more = door.write(lambda tx: products.create(tx, door.offers, home, "mail-premium", seats=5))
    for number in range(5):
        door.mailbox(f"more{number}@example.org", home=home)
    refused(Conflict, "have 6 addresses; 7 are needed", lambda: door.mailbox("x@example.org", home=home))
    ends: list[Callable[[Write], object]] = [
        lambda tx: products.cancel(tx, door.offers, more.id),
        lambda tx: products.change_offer(tx, door.offers, more.id, "kdrive-team"),
        lambda tx: products.move(tx, door.offers, more.id, none),
    ]
    for end in ends:
        refused(Conflict, "are needed", lambda end=end: door.write(end))
    door.write(lambda tx: products.set_seats(tx, door.offers, more.id, 7))
    door.mailbox("x@example.org", home=home)
    refused(
        Conflict, "are needed", lambda: door.write(lambda tx: products.set_seats(tx, door.offers, more.id, 5))
    )
    unlimited = door.organization("ksuite-business")
    with door.database.read() as tx:
        assert products.addresses(tx, door.offers, unlimited) is None
        assert products.addresses(tx, door.offers, home) == 8


def test_an_unknown_offer_has_no_address(sqlite_door: Door) -> None:
    home = sqlite_door.write(
        lambda tx: (
            organizations.create_product(tx, number := organizations.create_organization(tx, "E"), "new")
            and number
        )
    )
    refused(Conflict, "0 addresses", lambda: sqlite_door.mailbox("a@example.org", home=home))


def test_offers_with_mail_are_those_of_the_description() -> None:
    assert {each.id for each in offers.load(None).list() if each.mailboxes} == {
        "ksuite-free",
        "ksuite-standard",
        "ksuite-business",
        "ksuite-enterprise",
        "my-ksuite",
        "my-ksuite-plus",
        "mail-starter",
        "mail-premium",
    }


def test_a_mailbox_is_a_members_or_nobodys(door: Door) -> None:
    alice, bob, stranger = door.account(), door.account("bob"), door.account("stranger")
    home = door.organization("mail-premium", alice, bob)
    refused(NotFound, "not a member", lambda: door.mailbox("s@example.org", stranger, home=home))
    box = door.mailbox("team@example.org", alice, home=home)
    _, secret = door.device(box)
    door.log_in("team@example.org", secret, Service.IMAP)
    refused(
        NotFound, "not a member", lambda: change(door, box, lambda tx, m: mailboxes.assign(tx, m, stranger))
    )
    assert change(door, box, lambda tx, m: mailboxes.assign(tx, m, alice)).account_id == alice.id
    door.log_in("team@example.org", secret, Service.IMAP)  # the same owner: nothing changed
    assert change(door, box, lambda tx, m: mailboxes.assign(tx, m, bob)).account_id == bob.id
    with pytest.raises(NotAuthenticated):
        door.log_in("team@example.org", secret, Service.IMAP)  # it is on a device of alice's
    assert change(door, box, lambda tx, m: mailboxes.assign(tx, m, None)).account_id is None
    assert actions(door, box.address) == ["mailbox.assign", "mailbox.assign", "mailbox.create"]


def test_who_may(door: Door) -> None:
    alice, admin, stranger = door.account(), door.account("admin"), door.account("stranger")
    home = door.organization("mail-premium", alice)
    door.write(lambda tx: organizations.put_member(tx, home, admin, "administrator"))
    box = door.mailbox("a@example.org", alice, home=home, actor=Actor(admin.sync_id))
    changes: list[Callable[[Write, Actor], object]] = [
        lambda tx, actor: mailboxes.create(tx, door.offers, home, "b@example.org", actor=actor),
        lambda tx, actor: mailboxes.assign(tx, box, None, actor),
        lambda tx, actor: mailboxes.set_state(tx, box, "suspended", actor),
        lambda tx, actor: mailboxes.set_quota(tx, box, 5, actor),
        lambda tx, actor: mailboxes.delete(tx, box, (), actor),
    ]
    for one in changes:
        for who in (alice, stranger):
            refused(
                Forbidden, "Only", lambda one=one, who=who: door.write(lambda tx: one(tx, Actor(who.sync_id)))
            )
    for one in changes:
        door.write(lambda tx, one=one: one(tx, Actor(admin.sync_id)))
    assert [row["address"] for row in rows(door)] == ["b@example.org"]


def test_quotas_and_states_that_make_no_sense_are_refused(sqlite_door: Door) -> None:
    box = sqlite_door.mailbox("a@example.org")
    for quota in (0, -1):
        refused(
            BadRequest,
            "above zero",
            lambda quota=quota: sqlite_door.mailbox("b@example.org", quota_bytes=quota),
        )
        refused(
            BadRequest,
            "above zero",
            lambda quota=quota: change(sqlite_door, box, lambda tx, m: mailboxes.set_quota(tx, m, quota)),
        )
    refused(
        BadRequest,
        "active, suspended",
        lambda: change(sqlite_door, box, lambda tx, m: mailboxes.set_state(tx, m, "gone")),
    )
    assert change(sqlite_door, box, lambda tx, m: mailboxes.set_quota(tx, m, None)).quota_bytes is None


def test_a_deleted_address_stops_as_a_login_and_its_owner_gets_a_temporary_one(door: Door) -> None:
    """ACC5, where the domain is hosted here; an outside address is left alone."""
    alice, bob = door.account(), door.account("bob")
    home = door.organization("mail-premium", alice, bob)
    for account in (alice, bob):
        box = door.mailbox(account.login_email, account, home=home)
        _, secret = door.device(box)
        hosted = ("Example.org",) if account is alice else ("example.com",)
        door.write(lambda tx, box=box, hosted=hosted: mailboxes.delete(tx, box, hosted))
        with pytest.raises(NotAuthenticated):
            door.log_in(account.login_email, secret, Service.IMAP)
    with door.database.read() as tx:
        assert accounts.by_id(tx, alice.id).login_email.endswith("@login.invalid")
        assert accounts.by_id(tx, bob.id).login_email == "bob@example.org"
        assert mailboxes.find(tx, "alice@example.org") is None
        deleted = directory.audit(tx, subject="alice@example.org")[0]
    assert (deleted["action"], deleted["detail"]["account"]) == ("mailbox.delete", alice.sync_id)
    assert len(deleted["detail"]["folder"]) == 32, "whoever looks for the mail finds where it was"


def test_a_mailbox_is_not_deleted_while_an_import_fills_it(door: Door) -> None:
    box = door.mailbox("a@example.org", home=door.organization("mail-starter"))
    row = {"source": "{}", "target": "{}", "options": "{}", "state": "paused", "passes": 1, "created_at": 0}
    door.write(lambda tx: tx.execute(sa.insert(t.mail_import).values(mailbox_id=box.id, **row)))
    refused(Conflict, "import mail cancel 1", lambda: door.write(lambda tx: mailboxes.delete(tx, box, ())))
    door.write(lambda tx: tx.execute(sa.update(t.mail_import).values(state="cancelled", ended_at=1)))
    door.write(lambda tx: mailboxes.delete(tx, box, ()))


def test_an_organization_with_mailboxes_is_not_deleted(door: Door) -> None:
    home = door.organization("mail-starter")
    box = door.mailbox("a@example.org", home=home)
    with door.database.read() as tx:
        (product,) = directory.products(tx)
    door.write(
        lambda tx: organizations.set_offer(tx, product["id"], "unheard-of")
    )  # addresses are not looked at
    refused(Conflict, "products", lambda: door.write(lambda tx: organizations.delete_organization(tx, home)))
    refused(
        Conflict, "are needed", lambda: door.write(lambda tx: products.cancel(tx, door.offers, product["id"]))
    )
    door.write(lambda tx: mailboxes.delete(tx, box, ()))
    door.write(lambda tx: products.cancel(tx, door.offers, product["id"]))
    door.write(lambda tx: organizations.delete_organization(tx, home))


def erase(door: Door, account: Account) -> None:
    door.write(lambda tx: removal.delete(tx, account, grace_days=0))
    with door.database.read() as tx:
        due = removal.due(tx, 1 << 40)
    assert due == [(account.id, account.sync_id)]
    services = background.Services(door.settings, door.database, None, door.keys, door.offers, door.gate)
    background.erase_account(services, *due[0])


def test_an_erased_accounts_mailbox_stays_with_the_organization_and_opens_for_nobody(door: Door) -> None:
    alice, bob = door.account(), door.account("bob")
    home = door.organization("mail-premium", alice, bob)
    box = door.mailbox("alice@example.org", alice, home=home)
    _, secret = door.device(box)
    erase(door, alice)
    with pytest.raises(NotAuthenticated):
        door.log_in("alice@example.org", secret, Service.IMAP)
    (row,) = rows(door)
    assert (row["address"], row["sync_id"], row["folder"], row["device_passwords"]) == (
        "alice@example.org",
        None,
        box.folder,
        0,
    )
    assert actions(door, "alice@example.org") == ["mailbox.assign", "mailbox.create"]
    assert change(door, box, lambda tx, m: mailboxes.assign(tx, m, bob)).folder == box.folder
