"""Seats, storage and offers of products, and that a kSuite only goes up, stays where it is and is one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from ksync_server.auth import directory, offers, organizations, products
from ksync_server.auth.accounts import Account
from ksync_server.auth.audit import Actor
from ksync_server.auth.products import Product
from ksync_server.errors import BadRequest, ClientError, Conflict, Forbidden, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Write
from tests.auth.harness import PASSWORD, Door

GB = 10**9
NOW = 1_700_000_000


def organization(door: Door, *members: Account, role: str = "collaborator") -> int:
    def create(tx: Write) -> int:
        number = organizations.create_organization(tx, "Example")
        for member in members:
            organizations.put_member(tx, number, member, role)
        return number

    return door.write(create)


def create(door: Door, home: int, offer: str, **options: Any) -> Product:
    return door.write(lambda tx: products.create(tx, door.offers, home, offer, **options))


def change(door: Door, product: Product, offer: str, **options: Any) -> Product:
    return door.write(lambda tx: products.change_offer(tx, door.offers, product.id, offer, **options))


def seats(door: Door, product: Product, number: int, **options: Any) -> Product:
    return door.write(lambda tx: products.set_seats(tx, door.offers, product.id, number, **options))


def storage(door: Door, product: Product, number: int, **options: Any) -> Product:
    return door.write(lambda tx: products.set_storage(tx, door.offers, product.id, number, **options))


def convert(door: Door, product: Product, offer: str = "ksuite-business", **options: Any) -> Product:
    return door.write(lambda tx: products.convert_to_ksuite(tx, door.offers, product.id, offer, **options))


def drive(door: Door, product: Product, *members: Account) -> int:
    def make(tx: Write) -> int:
        number = organizations.create_drive(tx, product.id, "Files")
        for member in members:
            organizations.add_drive_member(tx, number, member)
        return number

    return door.write(make)


def fill(door: Door, drive_id: int, used_bytes: int) -> None:
    """As if files of this size were there."""
    row = {"used_bytes": used_bytes, "files": 1}
    door.write(lambda tx: tx.execute(sa.update(t.drive).where(t.drive.c.id == drive_id).values(**row)))


def refused(kind: type[ClientError], said: str, fn: Callable[[], object]) -> None:
    with pytest.raises(kind, match=said):
        fn()


# -- seats and storage ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offer", "wanted", "has"),
    [
        ("kdrive-solo", None, 1),
        ("kdrive-team", None, 30),
        ("kdrive-pro", None, None),
        ("ksuite-free", None, 1),
        ("ksuite-standard", 2, 2),
        ("kdrive-team", 3, 3),
        ("kdrive-team", 30, 30),
        ("ksuite-pro", 1, 1),
    ],
)
def test_a_product_has_the_seats_that_were_asked_for_or_those_of_its_offer(
    sqlite_door: Door, offer: str, wanted: int | None, has: int | None
) -> None:
    made = create(sqlite_door, organization(sqlite_door), offer, seats=wanted)
    assert made.seats == has
    assert made.offer == sqlite_door.offers.get(offer).id


@pytest.mark.parametrize(
    ("offer", "wanted"),
    [
        ("kdrive-solo", 2),
        ("kdrive-team", 2),
        ("kdrive-team", 31),
        ("ksuite-standard", 1),
        ("ksuite-free", 2),
        ("mail-premium", 4),
        ("kdrive-pro", 0),
        ("kdrive-pro", -1),
    ],
)
def test_seats_outside_the_offer_are_refused(sqlite_door: Door, offer: str, wanted: int) -> None:
    home = organization(sqlite_door)
    refused(BadRequest, "seats", lambda: create(sqlite_door, home, offer, seats=wanted))
    with sqlite_door.database.read() as tx:
        assert directory.products(tx) == []


def test_members_of_a_drive_take_the_seats(door: Door) -> None:
    people = [door.account(name) for name in ("alice", "bob", "carol", "dave")]
    team = create(door, home := organization(door, *people), "kdrive-team", seats=3)
    number = drive(door, team, *people[:3])
    fourth = people[3]

    def add(account: Account) -> None:
        door.write(lambda tx: organizations.add_drive_member(tx, number, account))

    refused(Conflict, "seats of product", lambda: add(fourth))
    add(people[0])  # has one already
    second = drive(door, team)  # another drive of the same product takes no further seat
    door.write(lambda tx: organizations.add_drive_member(tx, second, people[1]))
    refused(
        Conflict, "seats", lambda: door.write(lambda tx: organizations.add_drive_member(tx, second, fourth))
    )
    seats(door, team, 4)
    add(fourth)
    refused(Conflict, "4 users", lambda: seats(door, team, 3))
    door.write(lambda tx: organizations.remove_drive_member(tx, number, fourth))
    assert seats(door, team, 3).seats == 3
    assert home == team.organization_id


def test_members_of_the_organization_take_the_seats_of_a_ksuite_and_externals_do_not(door: Door) -> None:
    alice, bob, carol = (door.account(name) for name in ("alice", "bob", "carol"))
    home = organization(door, alice)
    suite = create(door, home, "ksuite-business", seats=1)

    def join(account: Account, role: str) -> None:
        door.write(lambda tx: organizations.put_member(tx, home, account, role))

    refused(Conflict, "seats", lambda: join(bob, "collaborator"))
    join(bob, "external")
    refused(Conflict, "seats", lambda: join(bob, "administrator"))
    join(alice, "administrator")  # has a seat
    number = drive(door, suite, alice)
    refused(Conflict, "seats", lambda: door.write(lambda tx: organizations.add_drive_member(tx, number, bob)))
    seats(door, suite, 2)
    join(bob, "collaborator")
    join(carol, "external")


def test_the_last_seat_is_given_once(door: Door) -> None:
    people = [door.account(f"p{number}") for number in range(4)]
    product = create(door, organization(door, *people), "kdrive-team", seats=3)
    number = drive(door, product, people[0], people[1])
    barrier, outcomes = threading.Barrier(2), []

    def add(account: Account) -> None:
        barrier.wait()
        try:
            door.write(lambda tx: organizations.add_drive_member(tx, number, account))
            outcomes.append("in")
        except Conflict:
            outcomes.append("full")

    threads = [threading.Thread(target=add, args=(person,)) for person in people[2:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["full", "in"]


def test_storage_of_a_product_is_its_drives_quota_at_once(door: Door) -> None:
    alice = door.account()
    product = create(door, organization(door, alice), "kdrive-solo", storage_bytes=10 * GB)
    first, second = drive(door, product, alice), drive(door, product, alice)
    identity = door.log_in("alice@example.org", PASSWORD)
    assert door.enter(identity, first).quota_bytes == 10 * GB
    fill(door, second, 4 * GB)
    assert door.enter(identity, first).quota_bytes == 6 * GB
    storage(door, product, 5000 * GB)
    assert door.enter(identity, first).quota_bytes == 4996 * GB
    refused(Conflict, "hold", lambda: storage(door, product, 4 * GB - 1))
    storage(door, product, 4 * GB)
    assert door.enter(identity, first).quota_bytes == 0
    for wrong in (0, -1):
        refused(BadRequest, "above zero", lambda wrong=wrong: storage(door, product, wrong))  # type: ignore[misc]


def test_an_unknown_offer_opens_nothing_and_cannot_be_chosen(door: Door) -> None:
    alice = door.account()
    home = organization(door, alice)
    for fn in (
        lambda: create(door, home, "gold"),
        lambda: change(door, create(door, home, "kdrive-solo"), "gold"),
    ):
        refused(BadRequest, "no offer 'gold'", fn)
    product = create(door, home, "kdrive-solo")
    number = drive(door, product, alice)
    door.write(lambda tx: tx.execute(sa.update(t.product).values(offer="gold")))
    identity = door.log_in("alice@example.org", PASSWORD)
    refused(Forbidden, "gold", lambda: door.enter(identity, number))
    refused(Conflict, "unknown", lambda: seats(door, product, 1))
    refused(Conflict, "unknown", lambda: storage(door, product, GB))
    assert change(door, product, "kdrive-pro").offer == "kdrive-pro"
    door.enter(identity, number)


# -- a kSuite only goes up ------------------------------------------------------------------------


def test_a_ksuite_only_goes_up(door: Door) -> None:
    home = organization(door)
    suite = create(door, home, "ksuite-standard", seats=5)
    refused(Conflict, "only goes up", lambda: change(door, suite, "ksuite-free"))
    refused(Conflict, "stays one", lambda: change(door, suite, "kdrive-pro"))
    refused(Conflict, "only goes up", lambda: seats(door, suite, 4))
    refused(Conflict, "only goes up", lambda: storage(door, suite, 1000 * GB - 1))
    assert seats(door, suite, 6).seats == 6
    assert storage(door, suite, 2000 * GB).storage_bytes == 2000 * GB
    refused(Conflict, "only goes up", lambda: storage(door, suite, 1999 * GB))
    up = change(door, suite, "ksuite-pro")
    assert (up.offer, up.seats, up.storage_bytes) == ("ksuite-business", 6, None)
    refused(Conflict, "only goes up", lambda: change(door, up, "ksuite-standard-2"))
    storage(door, up, 7000 * GB)
    assert change(door, suite, "ksuite-business").storage_bytes == 7000 * GB
    assert change(door, suite, "ksuite-enterprise").storage_bytes == 7000 * GB, "more than the offer's stays"


def test_a_free_ksuite_gets_the_seats_of_the_next_one(sqlite_door: Door) -> None:
    free = create(sqlite_door, organization(sqlite_door), "ksuite-free")
    assert free.seats == 1
    assert change(sqlite_door, free, "ksuite-standard").seats is None
    refused(Conflict, "only goes up", lambda: seats(sqlite_door, free, 3))


def test_there_is_one_ksuite_per_organization(door: Door) -> None:
    home = organization(door)
    create(door, home, "ksuite-free")
    refused(Conflict, "has a kSuite already", lambda: create(door, home, "ksuite-enterprise"))
    solo = create(door, home, "kdrive-solo")
    refused(Conflict, "convert", lambda: change(door, solo, "ksuite-business"))
    create(door, organization(door), "ksuite-free")
    with pytest.raises(sa.exc.IntegrityError):  # whatever goes round the rule
        door.write(lambda tx: tx.execute(sa.update(t.product).values(ksuite=True)))


def test_two_requests_at_once_make_one_ksuite(door: Door) -> None:
    home = organization(door)
    barrier, outcomes = threading.Barrier(2), []

    def make() -> None:
        barrier.wait()
        try:
            create(door, home, "ksuite-business")
            outcomes.append("made")
        except Conflict:
            outcomes.append("refused")

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["made", "refused"]


def test_a_higher_tier_with_less_storage_is_none(sqlite_door: Door, tmp_path: Path) -> None:
    path = tmp_path / "offers.toml"
    path.write_text(
        "[small]\nwebdav = true\nksuite = 1\nstorage_gb = 10\n"
        "[odd]\nwebdav = true\nksuite = 2\nstorage_gb = 9\n"
    )
    table = offers.load(path)
    home = organization(sqlite_door)
    suite = sqlite_door.write(lambda tx: products.create(tx, table, home, "small"))
    refused(
        Conflict,
        "less storage",
        lambda: sqlite_door.write(lambda tx: products.change_offer(tx, table, suite.id, "odd")),
    )


def test_a_ksuite_and_its_parts_stay_where_they_are(door: Door) -> None:
    home, elsewhere = organization(door), organization(door)
    suite, other = create(door, home, "ksuite-business"), create(door, home, "kdrive-pro")
    inside, outside = drive(door, suite), drive(door, other)
    refused(
        Conflict,
        "not transferable",
        lambda: door.write(lambda tx: products.move(tx, door.offers, suite.id, elsewhere)),
    )
    for act in (
        lambda tx: products.move_drive(tx, inside, other.id),
        lambda tx: products.cancel_drive(tx, inside),
    ):
        refused(Conflict, "moved or cancelled alone", lambda act=act: door.write(act))  # type: ignore[misc]
    door.write(lambda tx: products.move_drive(tx, outside, suite.id))
    second = drive(door, other)
    door.write(lambda tx: products.move(tx, door.offers, other.id, elsewhere))
    door.write(lambda tx: products.cancel_drive(tx, second))
    with door.database.read() as tx:
        assert [(row["id"], row["product_id"]) for row in directory.drives(tx)] == [
            (inside, suite.id),
            (outside, suite.id),
        ]
        assert {row["id"]: row["organization_id"] for row in directory.products(tx)}[other.id] == elsewhere


def test_a_drive_goes_to_products_of_its_own_organization_with_seats_for_its_members(door: Door) -> None:
    alice, bob = door.account(), door.account("bob")
    home = organization(door, alice, bob)
    team, solo = create(door, home, "kdrive-team"), create(door, home, "kdrive-solo")
    foreign = create(door, organization(door), "kdrive-pro")
    number = drive(door, team, alice, bob)

    def move(to: Product) -> None:
        door.write(lambda tx: products.move_drive(tx, number, to.id))

    refused(Conflict, "2 users", lambda: move(solo))
    refused(Conflict, "another organization", lambda: move(foreign))
    refused(NotFound, "no drive", lambda: door.write(lambda tx: products.move_drive(tx, 99, solo.id)))


def test_what_holds_something_is_not_cancelled(door: Door) -> None:
    home = organization(door, alice := door.account())
    product = create(door, home, "kdrive-solo")
    number = drive(door, product, alice)
    fill(door, number, 1)
    for act in (
        lambda tx: products.cancel(tx, door.offers, product.id),
        lambda tx: products.cancel_drive(tx, number),
    ):
        refused(Conflict, "still holds", lambda act=act: door.write(act))  # type: ignore[misc]
    refused(
        Conflict, "Cancel them", lambda: door.write(lambda tx: organizations.delete_organization(tx, home))
    )
    door.write(lambda tx: tx.execute(sa.update(t.drive).values(used_bytes=0, files=0)))
    door.write(lambda tx: products.cancel(tx, door.offers, product.id))
    with door.database.read() as tx:
        assert (directory.products(tx), directory.drives(tx)) == ([], [])
        assert tx.execute(sa.select(sa.func.count()).select_from(t.node)).scalar_one() == 0
        kinds = {row.kind for row in tx.execute(sa.select(t.collection.c.kind))}
    assert kinds == {"calendar", "addressbook"}
    door.write(lambda tx: organizations.delete_organization(tx, home))
    with door.database.read() as tx:
        assert directory.organizations(tx) == []
        assert len(directory.accounts(tx)) == 1


# -- a drive becomes a kSuite ---------------------------------------------------------------------


def test_the_users_of_a_drive_become_the_ksuites_and_set_its_seats(door: Door) -> None:
    alice, bob, carol, dave = (door.account(name) for name in ("alice", "bob", "carol", "dave"))
    home = organization(door, alice, bob, carol)
    door.write(lambda tx: organizations.put_member(tx, home, dave, "external"))
    product = create(door, home, "kdrive-pro")
    drive(door, product, alice, dave)
    suite = convert(door, product)
    assert (suite.ksuite, suite.offer, suite.seats) == (True, "ksuite-business", 4)
    refused(Conflict, "only goes up", lambda: seats(door, suite, 3))
    with door.database.read() as tx:
        last = directory.audit(tx, limit=1)[0]
    assert (last["action"], last["detail"]["seats"]) == ("product.convert", 4)


def test_seats_bought_before_are_kept(sqlite_door: Door) -> None:
    home = organization(sqlite_door, alice := sqlite_door.account())
    product = create(sqlite_door, home, "kdrive-team", seats=7)
    drive(sqlite_door, product, alice)
    assert convert(sqlite_door, product, "ksuite-standard").seats == 7


@pytest.mark.parametrize(
    ("mail", "mailboxes", "wanted"),
    [
        (("mail-premium", 8), 3, 8),
        (("mail-premium", None), 6, 6),
        (("mail-premium", 5), 7, 7),
        (("mail-starter", 1), 1, 2),
    ],
)
def test_a_mail_service_outside_joins_with_its_addresses(
    door: Door, mail: tuple[str, int | None], mailboxes: int, wanted: int
) -> None:
    alice, bob = door.account(), door.account("bob")
    home = organization(door, alice, bob)
    rows = [
        {
            "organization_id": home,
            "address": f"a{number}@example.org",
            "address_key": f"a{number}@example.org",
            "folder": f"f{number}",
            "created_at": 1,
        }
        for number in range(mailboxes)
    ]
    door.write(lambda tx: tx.execute(sa.insert(t.mailbox), rows))
    product, service = create(door, home, "kdrive-pro"), create(door, home, mail[0], seats=mail[1])
    drive(door, product, alice)
    suite = convert(door, product, mail_id=service.id)
    assert suite.seats == wanted
    with door.database.read() as tx:
        assert [row["id"] for row in directory.products(tx)] == [suite.id]
        assert tx.execute(sa.select(sa.func.count()).select_from(t.mailbox)).scalar() == mailboxes
        (joined,) = directory.audit(tx, actions=["product.join"])
    assert (joined["subject"], joined["detail"]) == (
        str(service.id),
        {"offer": mail[0], "into": suite.id, "seats": mail[1], "addresses": mailboxes},
    )


def test_what_does_not_fit_does_not_join_and_nothing_is_converted(sqlite_door: Door) -> None:
    door = sqlite_door
    home, other = organization(door, alice := door.account()), organization(door)
    product, solo = create(door, home, "kdrive-pro"), create(door, home, "kdrive-solo")
    drive(door, product, alice)
    theirs, ours = create(door, other, "mail-premium"), create(door, home, "mail-premium", seats=9)
    odd = create(door, home, "mail-starter")
    drive(door, odd)
    for each, kind, said in (
        (theirs.id, Conflict, "another organization"),
        (solo.id, Conflict, "not a mail service"),
        (product.id, Conflict, "not a mail service"),
        (odd.id, Conflict, "not a mail service"),
        (999, NotFound, "no product"),
    ):
        refused(kind, said, lambda each=each: convert(door, product, mail_id=each))
    refused(Conflict, "1 seats at most", lambda: convert(door, product, "ksuite-free", mail_id=ours.id))
    with door.database.read() as tx:
        rows = {row["id"]: row["ksuite"] for row in directory.products(tx)}
    assert rows == dict.fromkeys((product.id, solo.id, theirs.id, ours.id, odd.id), False)
    assert convert(door, product, mail_id=ours.id).seats == 9


@pytest.mark.parametrize(
    ("case", "kind", "said"),
    [
        ({"paid": False}, Conflict, "not paid"),
        ({"trial_until": NOW + 1}, Conflict, "on trial"),
        ({"trial_until": NOW}, None, ""),
        ({"offer": "gold"}, BadRequest, "no offer"),
        ({"offer": "my-ksuite"}, BadRequest, "not the offer of a kSuite"),
        ({"offer": "ksuite-free", "used": 15 * GB + 1}, Conflict, "hold"),
        ({"offer": "ksuite-free", "members": 2}, Conflict, "1 seats at most"),
        ({"drives": 0}, Conflict, "has no drive"),
        ({"other": "ksuite-free"}, Conflict, "has a kSuite already"),
    ],
)
def test_only_a_paid_drive_out_of_its_trial_becomes_a_ksuite(
    sqlite_door: Door, case: dict[str, Any], kind: type[ClientError] | None, said: str
) -> None:
    door = sqlite_door
    people = [door.account(name) for name in ("alice", "bob")][: case.get("members", 1)]
    home = organization(door, *people, role="external")
    if "other" in case:
        create(door, home, case["other"])
    given = {name: case[name] for name in ("paid", "trial_until") if name in case}
    product = create(door, home, "kdrive-pro", **given)
    if case.get("drives", 1):
        fill(door, drive(door, product, *people), case.get("used", 0))

    def act() -> Product:
        return convert(door, product, case.get("offer", "ksuite-business"), now=NOW)

    if kind is None:
        assert act().ksuite
    else:
        refused(kind, said, act)
        with door.database.read() as tx:
            row = next(row for row in directory.products(tx) if row["id"] == product.id)
        assert (row["offer"], bool(row["ksuite"]), row["seats"]) == ("kdrive-pro", False, None)


# -- who may --------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [*organizations.ROLES, None])
def test_products_are_changed_by_those_who_manage_the_organization(
    sqlite_door: Door, role: str | None
) -> None:
    door, alice = sqlite_door, sqlite_door.account()
    boss = door.account("boss")
    home = organization(door, boss, role="legal_representative")
    if role is not None:
        door.write(lambda tx: organizations.put_member(tx, home, alice, role))
    actor = Actor(alice.sync_id, "192.0.2.1")
    product = create(door, home, "kdrive-team", seats=3)
    drive(door, product)
    acts: list[Callable[[Write], object]] = [
        lambda tx: products.create(tx, door.offers, home, "kdrive-solo", actor=actor),
        lambda tx: products.set_seats(tx, door.offers, product.id, 4, actor),
        lambda tx: products.set_storage(tx, door.offers, product.id, 5000 * GB, actor),
        lambda tx: products.change_offer(tx, door.offers, product.id, "kdrive-pro", actor),
        lambda tx: organizations.create_drive(tx, product.id, "More", actor=actor),
        lambda tx: products.convert_to_ksuite(tx, door.offers, product.id, "ksuite-pro", actor),
        lambda tx: products.cancel(tx, door.offers, product.id, actor),
    ]
    for act in acts:
        if role in organizations.MANAGERS:
            door.write(act)
        else:
            refused(
                Forbidden, "Only a legal representative or administrator", lambda act=act: door.write(act)
            )  # type: ignore[misc]
    with door.database.read() as tx:
        left = [row["id"] for row in directory.products(tx)]
        actors = {row["actor"] for row in directory.audit(tx, subject=str(product.id), actions=["product."])}
    assert (product.id in left) is (role not in organizations.MANAGERS)
    assert (alice.sync_id in actors) is (role in organizations.MANAGERS)


def test_a_product_moves_between_organizations_that_its_mover_manages_both(sqlite_door: Door) -> None:
    door, alice = sqlite_door, sqlite_door.account()
    actor = Actor(alice.sync_id)
    mine, theirs = organization(door, alice, role="administrator"), organization(door)
    product = create(door, mine, "kdrive-solo")
    refused(
        Forbidden,
        "Only",
        lambda: door.write(lambda tx: products.move(tx, door.offers, product.id, theirs, actor)),
    )
    door.write(lambda tx: organizations.put_member(tx, theirs, alice, "administrator"))
    door.write(lambda tx: products.move(tx, door.offers, product.id, theirs, actor))
    refused(
        NotFound,
        "no organization",
        lambda: door.write(lambda tx: products.move(tx, door.offers, product.id, 99)),
    )


def test_what_is_paid_is_the_operators_word(sqlite_door: Door) -> None:
    door, alice = sqlite_door, sqlite_door.account()
    product = create(door, organization(door, alice, role="legal_representative"), "kdrive-solo", paid=False)

    def say(**options: Any) -> Product:
        return door.write(
            lambda tx: products.set_paid(tx, product.id, paid=True, trial_until=None, **options)
        )

    refused(Forbidden, "operator", lambda: say(actor=Actor(alice.sync_id)))
    assert say().paid


def test_a_suspended_administrator_manages_nothing(sqlite_door: Door) -> None:
    door, alice = sqlite_door, sqlite_door.account()
    home = organization(door, alice, role="administrator")
    door.write(lambda tx: tx.execute(sa.update(t.account).values(state="suspended")))
    refused(Forbidden, "Only", lambda: create(door, home, "kdrive-solo", actor=Actor(alice.sync_id)))
