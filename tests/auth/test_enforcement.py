"""Required second factors stop people on the web, never a program; who may require, leave, alert and list."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from ksync_server.auth import accounts, directory, enforcement, organizations, secondfactor
from ksync_server.auth.accounts import Account
from ksync_server.auth.audit import NOTICE, Actor
from ksync_server.auth.gate import Service
from ksync_server.errors import AppPasswordRequired, ClientError, Conflict, Forbidden, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Write
from tests.auth.harness import PASSWORD, Door


def organization(door: Door, **roles: str) -> tuple[int, dict[str, Account]]:
    """An organization whose members are called like their roles, or as given."""
    people = {name: door.account(name) for name in roles}

    def create(tx: Write) -> int:
        number = organizations.create_organization(tx, "Example")
        for name, role in roles.items():
            organizations.put_member(tx, number, people[name], role)
        return number

    return door.write(create), people


def refused(kind: type[ClientError], said: str, fn: Callable[[], object]) -> None:
    with pytest.raises(kind, match=said):
        fn()


def pending(door: Door, account: Account) -> tuple[enforcement.Requirement, ...]:
    with door.database.read() as tx:
        return enforcement.pending(tx, account)


def require(door: Door, home: int, on: bool = True, actor: Account | None = None) -> None:
    by = Actor() if actor is None else Actor(actor.sync_id, "192.0.2.1")
    door.write(lambda tx: enforcement.require(tx, home, on, by))


def test_members_without_one_are_stopped_until_they_enrol(door: Door) -> None:
    home, people = organization(door, alice="administrator", bob="collaborator", eve="external")
    assert [pending(door, each) for each in people.values()] == [(), (), ()]
    require(door, home)
    wanted = enforcement.Requirement(home, "Example", may_leave=False)
    assert pending(door, people["alice"]) == (wanted,)
    assert pending(door, people["bob"]) == (wanted,)
    assert pending(door, people["eve"]) == (enforcement.Requirement(home, "Example", may_leave=True),)
    door.turn_on_second_factor(people["bob"])
    assert pending(door, people["bob"]) == ()
    assert pending(door, people["alice"]) == (wanted,)
    require(door, home, on=False)
    assert pending(door, people["alice"]) == ()


def test_every_organization_that_requires_one_is_named(sqlite_door: Door) -> None:
    door = sqlite_door
    first, people = organization(door, alice="collaborator")
    second = door.write(lambda tx: organizations.create_organization(tx, "Other"))
    third = door.write(lambda tx: organizations.create_organization(tx, "Third"))
    for number in (second, third):
        door.write(lambda tx, n=number: organizations.put_member(tx, n, people["alice"], "external"))  # type: ignore[misc]
    for number in (first, second):
        require(door, number)
    found = pending(door, people["alice"])
    assert [(each.name, each.may_leave) for each in found] == [("Example", False), ("Other", True)]


@pytest.mark.parametrize("role", [*organizations.ROLES, None])
def test_administrators_and_legal_representatives_require_it(sqlite_door: Door, role: str | None) -> None:
    door = sqlite_door
    home, _ = organization(door, boss="legal_representative")
    alice = door.account()
    if role is not None:
        door.write(lambda tx: organizations.put_member(tx, home, alice, role))
    if role in organizations.MANAGERS:
        require(door, home, actor=alice)
        with door.database.read() as tx:
            last = directory.audit(tx, subject=str(home), limit=1)[0]
        assert (last["actor"], last["address"]) == (alice.sync_id, "192.0.2.1")
        assert (last["action"], last["detail"]) == ("org.second-factor", {"required": True})
    else:
        refused(Forbidden, "Only", lambda: require(door, home, actor=alice))
        refused(Forbidden, "Only", lambda: require(door, home, on=False, actor=alice))
    refused(NotFound, "no organization", lambda: require(door, 99))


def test_sync_and_drive_programs_go_on_as_they_are(door: Door) -> None:
    home, people = organization(door, alice="collaborator", bob="collaborator")
    alice, bob = people["alice"], people["bob"]
    number = door.drive("kdrive-pro", alice, organization=home)
    before = door.log_in(alice.sync_id, PASSWORD)
    _, secret = door.app_password(alice)
    require(door, home)
    assert pending(door, alice)
    for name in (alice.sync_id, "alice@example.org"):
        for shown in (PASSWORD, secret):
            for service in (Service.CALDAV, Service.CARDDAV, Service.DRIVE, Service.SYNC):
                assert door.log_in(name, shown, service).account_id == alice.id
                assert door.another_process().log_in(name, shown, service).account_id == alice.id
    assert door.enter(before, number).drive_id == number
    assert door.home(before, Service.CALDAV, alice.sync_id).account_id == alice.id
    with door.database.read() as tx:
        assert accounts.by_id(tx, alice.id).auth_epoch == alice.auth_epoch
    door.app_password(alice)  # new programs too
    door.log_in(bob.sync_id, PASSWORD)


def test_enrolling_is_what_closes_the_password_not_the_requirement(door: Door) -> None:
    home, people = organization(door, alice="collaborator")
    require(door, home)
    door.log_in("alice@example.org", PASSWORD)
    door.turn_on_second_factor(people["alice"])
    with pytest.raises(AppPasswordRequired):
        door.log_in("alice@example.org", PASSWORD)


def test_externals_may_leave_instead_and_nobody_else(door: Door) -> None:
    home, people = organization(door, boss="administrator", bob="collaborator", eve="external")
    boss, bob, eve = people.values()
    number = door.drive("kdrive-pro", eve, organization=home)
    door.write(lambda tx: organizations.put_member(tx, home, eve, "external"))
    require(door, home)
    identity = door.log_in("eve@example.org", PASSWORD)
    door.enter(identity, number)

    def leave(who: Account, by: Actor) -> None:
        door.write(lambda tx: organizations.leave(tx, home, who, by))

    refused(Forbidden, "Only externals", lambda: leave(bob, Actor(bob.sync_id)))
    refused(Forbidden, "Others are removed", lambda: leave(eve, Actor(boss.sync_id)))
    leave(eve, Actor(eve.sync_id))
    assert pending(door, eve) == ()
    refused(NotFound, "nothing here", lambda: door.enter(identity, number))
    refused(NotFound, "not a member", lambda: leave(eve, Actor(eve.sync_id)))
    door.log_in("eve@example.org", PASSWORD)


def test_members_without_one_are_listed(door: Door) -> None:
    home, people = organization(door, alice="administrator", bob="collaborator", eve="external")
    door.turn_on_second_factor(people["bob"])

    def rows(**options: bool) -> dict[str, bool]:
        with door.database.read() as tx:
            return {row["sync_id"]: row["stopped"] for row in directory.members(tx, home, **options)}

    assert set(rows().values()) == {False}
    require(door, home)
    assert rows() == {each.sync_id: each is not people["bob"] for each in people.values()}
    assert set(rows(without_second_factor=True)) == {people["alice"].sync_id, people["eve"].sync_id}


def test_an_alert_says_the_state_of_the_settings_and_no_secret(door: Door) -> None:
    home, people = organization(door, boss="administrator", bob="collaborator")
    bob, boss = people["bob"], people["boss"]
    _, secret = door.app_password(bob, name="old phone")
    door.write(lambda tx: accounts.set_recovery(tx, bob, email="bob@example.net"))
    require(door, home)

    def alert(who: Account, by: Account) -> dict[str, object]:
        return door.write(lambda tx: enforcement.alert(tx, home, who, Actor(by.sync_id)))

    state = {
        "organization": home,
        "organization_name": "Example",
        "required": True,
        "second_factor": False,
        "factors": [],
        "recovery_codes_left": 0,
        "password": True,
        "application_passwords": 1,
        "recovery_email": True,
        "recovery_mobile": False,
        "login_lost": False,
    }
    assert alert(bob, boss) == state
    with door.database.read() as tx:
        (told, *_) = directory.notices(tx, bob)
        queued = [
            json.loads(row.arguments)
            for row in tx.execute(sa.select(t.job.c.arguments).where(t.job.c.kind == NOTICE))
        ]
        number = tx.execute(sa.select(t.audit.c.id).where(t.audit.c.action == "security.alert")).scalar_one()
    assert (told["action"], told["actor"], told["detail"]) == ("security.alert", boss.sync_id, state)
    assert {"audit": number} in queued, "the e-mail is queued with the row"
    assert secret not in json.dumps(told)
    door.turn_on_second_factor(bob)
    again = alert(bob, boss)
    assert (again["second_factor"], again["factors"]) == (True, [{"kind": "totp", "name": "app"}])
    assert again["recovery_codes_left"] == 10
    refused(Forbidden, "Only", lambda: alert(boss, bob))
    refused(NotFound, "not a member", lambda: alert(door.account("carol"), boss))


def test_a_factor_stays_while_one_organization_of_several_requires_it(door: Door) -> None:
    home, people = organization(door, alice="collaborator")
    alice = people["alice"]
    door.turn_on_second_factor(alice)
    require(door, home)
    proven = secondfactor.Proven(alice.id, password=True, second_factor=True)
    for act in (
        lambda tx: secondfactor.remove(tx, alice, None, reason="lost phone"),
        lambda tx: secondfactor.remove_own(tx, alice, None, proven),
    ):
        refused(Conflict, "requires a second factor", lambda act=act: door.write(act))  # type: ignore[misc]
    with door.database.read() as tx:
        assert accounts.by_id(tx, alice.id).second_factor
    require(door, home, on=False)
    door.write(lambda tx: secondfactor.remove_own(tx, alice, None, proven))


# -- roles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [*organizations.ROLES, None])
def test_members_are_changed_by_those_who_manage_the_organization(
    sqlite_door: Door, role: str | None
) -> None:
    door = sqlite_door
    home, people = organization(door, boss="legal_representative", bob="collaborator")
    alice, carol = door.account(), door.account("carol")
    if role is not None:
        door.write(lambda tx: organizations.put_member(tx, home, alice, role))
    by = Actor(alice.sync_id)
    acts: list[Callable[[Write], object]] = [
        lambda tx: organizations.put_member(tx, home, carol, "collaborator", by),
        lambda tx: organizations.put_member(tx, home, people["bob"], "administrator", by),
        lambda tx: organizations.remove_member(tx, home, people["bob"], by),
    ]
    highest: list[Callable[[Write], object]] = [
        lambda tx: organizations.put_member(tx, home, carol, "legal_representative", by),
        lambda tx: organizations.put_member(tx, home, people["boss"], "collaborator", by),
        lambda tx: organizations.remove_member(tx, home, people["boss"], by),
    ]
    for act in acts:
        if role in organizations.MANAGERS:
            door.write(act)
        else:
            refused(Forbidden, "Only", lambda act=act: door.write(act))  # type: ignore[misc]
    for act in highest:
        if role == "legal_representative":
            door.write(act)
        else:
            refused(Forbidden, "Only a legal representative", lambda act=act: door.write(act))  # type: ignore[misc]


def test_who_makes_an_organization_is_its_legal_representative(door: Door) -> None:
    alice = door.account()
    home = door.write(lambda tx: organizations.create_organization(tx, "Mine", Actor(alice.sync_id)))
    with door.database.read() as tx:
        (row,) = directory.members(tx, home)
    assert (row["sync_id"], row["role"]) == (alice.sync_id, "legal_representative")
