"""Accounts, organizations, products, drives: what is refused, what is made, and that changes are audited."""

from __future__ import annotations

import json
import re

import pytest
import sqlalchemy as sa

from ksync_server.auth import accounts, app_passwords, audit, directory, organizations
from ksync_server.auth.accounts import Account
from ksync_server.errors import BadRequest, ClientError, Conflict, Forbidden, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Write
from tests.auth.harness import PASSWORD, SYNC_HOST, Door


def actions(door: Door) -> list[str]:
    """What the audit says, oldest first."""
    with door.database.read() as tx:
        return [row["action"] for row in reversed(directory.audit(tx))]


# -- accounts -------------------------------------------------------------------------------------


def test_a_new_account_has_a_sync_id_a_calendar_and_an_address_book(door: Door) -> None:
    account = door.account()
    assert re.fullmatch(r"[A-Z]{2}[0-9]{5}", account.sync_id)
    with door.database.read() as tx:
        found = tx.execute(
            sa.select(
                t.collection.c.kind,
                t.collection.c.name,
                t.collection.c.components,
                t.collection_property.c.xml,
            )
            .join(t.collection_property, t.collection_property.c.collection_id == t.collection.c.id)
            .where(t.collection.c.account_id == account.id)
            .order_by(t.collection.c.kind)
        ).all()
    assert [tuple(row)[:3] for row in found] == [("addressbook", "default", ""), ("calendar", "default", "")]
    assert "Contacts" in found[0].xml
    assert "Calendar" in found[1].xml
    assert actions(door) == ["account.create"]


def test_a_given_sync_id_is_kept_in_capitals(door: Door) -> None:
    assert door.account(sync_id=" ab12345 ").sync_id == "AB12345"


@pytest.mark.parametrize(
    "sync_id", ["A12345", "ABC1234", "AB1234", "AB123456", "AB1234٣", "", "ÄB12345", "AB12345\n1"]
)
def test_a_malformed_sync_id_is_refused(sqlite_door: Door, sync_id: str) -> None:
    with pytest.raises(BadRequest):
        sqlite_door.account(sync_id=sync_id)
    assert actions(sqlite_door) == []


@pytest.mark.parametrize(
    "email",
    [
        "",
        "alice",
        "@example.org",
        "alice@",
        "a@b@c",
        "a b@example.org",
        "a:b@example.org",
        f"alice@{SYNC_HOST}",
        f"alice@{SYNC_HOST.upper()}",
        "alice@DAV.example.org",
        "a\0@example.org",
        "a" * 300 + "@example.org",
    ],
)
def test_a_log_in_e_mail_that_cannot_work_is_refused(sqlite_door: Door, email: str) -> None:
    account = sqlite_door.account()
    with pytest.raises(BadRequest):
        sqlite_door.account(login_email=email)
    with pytest.raises(BadRequest):
        sqlite_door.write(
            lambda tx: accounts.set_login_email(tx, account, email, sqlite_door.settings.hosts.sync)
        )


@pytest.mark.parametrize("name", ["", "   ", "x" * 201, "a\0b", "a\nb", "a\u202eb", "\ud800"])
def test_a_name_that_cannot_be_shown_is_refused(sqlite_door: Door, name: str) -> None:
    account = sqlite_door.account()
    for make in (
        lambda: sqlite_door.account("bob", display_name=name),
        lambda: sqlite_door.write(lambda tx: organizations.create_organization(tx, name)),
        lambda: sqlite_door.app_password(account, name=name),
    ):
        with pytest.raises(BadRequest):
            make()
    assert actions(sqlite_door) == ["account.create"]


def test_names_are_nobody_elses(door: Door) -> None:
    alice, bob = door.account(sync_id="AB12345"), door.account("bob")
    with pytest.raises(Conflict):
        door.account("carol", sync_id="ab12345")
    with pytest.raises(Conflict):
        door.account("carol", login_email="ALICE@Example.org")
    with pytest.raises(Conflict):
        door.write(lambda tx: accounts.set_login_email(tx, bob, "Alice@example.org"))
    door.write(lambda tx: accounts.set_login_email(tx, alice, "Alice@Example.org"))
    with door.database.read() as tx:
        assert accounts.get(tx, "alice@example.org").login_email == "Alice@Example.org"
        assert [row["sync_id"] for row in directory.accounts(tx)] == sorted([alice.sync_id, bob.sync_id])
        with pytest.raises(NotFound):
            accounts.get(tx, "carol@example.org")


def test_changing_the_password_takes_the_current_one(door: Door) -> None:
    account = door.account()

    def change(current: str, new: str) -> None:
        accounts.change_password(door.database, door.gate.passwords, account, current=current, new=new)

    with pytest.raises(Forbidden):
        change("wrong", "another long pass phrase")
    with pytest.raises(BadRequest):
        change(PASSWORD, "short")
    change(PASSWORD, "another long pass phrase")
    assert door.log_in(account.sync_id, "another long pass phrase").account_id == account.id
    with door.database.read() as tx:
        last = directory.audit(tx, subject=account.sync_id)[0]
    assert (last["actor"], last["action"]) == (account.sync_id, "account.password")
    with pytest.raises(Conflict):  # `account` is as it was before: somebody changed it meanwhile
        change(PASSWORD, "a third long pass phrase")
    assert door.log_in(account.sync_id, "another long pass phrase").account_id == account.id


def test_every_change_that_decides_who_gets_in_raises_the_epoch(door: Door) -> None:
    account = door.account()

    def epoch() -> int:
        with door.database.read() as tx:
            return accounts.by_id(tx, account.id).auth_epoch

    before = epoch()
    changes = [
        lambda tx: accounts.set_password_hash(tx, account, None),
        lambda tx: accounts.set_login_email(tx, account, "a@example.org"),
        lambda tx: accounts.set_state(tx, account, "suspended"),
        lambda tx: accounts.set_state(tx, account, "active"),
    ]
    for number, change in enumerate(changes, 1):
        door.write(change)
        assert epoch() == before + number
    door.turn_on_second_factor(account)
    assert epoch() == before + len(changes) + 1


def test_a_state_is_one_of_those_known(sqlite_door: Door) -> None:
    account = sqlite_door.account()
    with pytest.raises(BadRequest):
        sqlite_door.write(lambda tx: accounts.set_state(tx, account, "on holiday"))


# -- organizations, products, drives --------------------------------------------------------------


def test_a_drive_has_its_roots_and_every_member_has_two(door: Door) -> None:
    alice, bob = door.account(), door.account("bob")
    drive_id = door.drive("kdrive-team", alice, bob)
    door.write(lambda tx: organizations.add_drive_member(tx, drive_id, bob))
    with door.database.read() as tx:
        nodes = {row.id: row for row in tx.execute(sa.select(t.node)).all()}
        drive = tx.execute(sa.select(t.drive)).one()
        members = tx.execute(sa.select(t.drive_member)).all()
        collection = tx.execute(sa.select(t.collection).where(t.collection.c.kind == "drive")).one()
        rows = directory.drive_members(tx, drive_id)
    assert len(nodes) == 5
    assert {drive.common_id, *(row.root_id for row in members), *(row.trash_id for row in members)} == set(
        nodes
    )
    assert all(
        row.parent_id is None and row.folder and row.mtime_ms and row.created_at for row in nodes.values()
    )
    assert (collection.id, collection.name, collection.account_id) == (
        drive.collection_id,
        str(drive_id),
        None,
    )
    assert [row["sync_id"] for row in rows] == sorted([alice.sync_id, bob.sync_id])
    assert actions(door).count("drive.member") == 2


@pytest.mark.parametrize(
    "name", ["", "a/b", ".", "..", "é" * 128, "Common documents", "deleted ITEMS", "a\nb"]
)
def test_a_drives_name_is_a_folders_name(sqlite_door: Door, name: str) -> None:
    def create(tx: Write) -> None:
        product_id = organizations.create_product(
            tx, organizations.create_organization(tx, "Example"), "kdrive-solo"
        )
        organizations.create_drive(tx, product_id, name, reserved=("Deleted items", "Common documents"))

    with pytest.raises(BadRequest):
        sqlite_door.write(create)
    assert actions(sqlite_door) == []


def test_a_decomposed_drive_name_is_composed(sqlite_door: Door) -> None:
    def create(tx: Write) -> None:
        product_id = organizations.create_product(
            tx, organizations.create_organization(tx, "Example"), "kdrive-solo"
        )
        organizations.create_drive(tx, product_id, "Cafe\u0301")

    sqlite_door.write(create)
    with sqlite_door.database.read() as tx:
        assert directory.drives(tx)[0]["name"] == "Café"


def test_what_is_not_there_is_said(door: Door) -> None:
    alice, bob = door.account(), door.account("bob")
    drive_id = door.drive("kdrive-team", alice)
    with door.database.read() as tx:
        organization_id = directory.organizations(tx)[0]["id"]
    before = actions(door)
    refused: list[tuple[type[ClientError], object]] = [
        (NotFound, lambda tx: organizations.put_member(tx, 99, alice, "administrator")),
        (BadRequest, lambda tx: organizations.put_member(tx, organization_id, alice, "boss")),
        (NotFound, lambda tx: organizations.remove_member(tx, organization_id, bob)),
        (NotFound, lambda tx: organizations.create_product(tx, 99, "kdrive-solo")),
        (NotFound, lambda tx: organizations.set_offer(tx, 99, "kdrive-solo")),
        (NotFound, lambda tx: organizations.create_drive(tx, 99, "Files")),
        (NotFound, lambda tx: organizations.add_drive_member(tx, 99, alice)),
        (Conflict, lambda tx: organizations.add_drive_member(tx, drive_id, bob)),
        (NotFound, lambda tx: organizations.remove_drive_member(tx, drive_id, bob)),
        (NotFound, lambda tx: app_passwords.revoke(tx, alice, 99)),
        (BadRequest, lambda tx: app_passwords.create(tx, door.keys, alice, "phone", ())),
        (BadRequest, lambda tx: app_passwords.create(tx, door.keys, alice, "phone", ("imap",))),
    ]
    for error, change in refused:
        with pytest.raises(error):
            door.write(change)  # type: ignore[arg-type]
    assert actions(door) == before


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({"max_file_bytes": -1}, BadRequest),
        ({"quota_bytes": -1}, BadRequest),
        ({"max_chunked_bytes": 100 * 10**9 + 1}, BadRequest),
        ({"max_chunked_bytes": 100 * 10**9}, None),
        ({"max_file_bytes": 0}, None),
        ({}, None),
    ],
)
def test_limits_of_a_drive_have_limits(
    sqlite_door: Door, limits: dict[str, int], error: type[ClientError] | None
) -> None:
    drive_id = sqlite_door.drive("kdrive-solo")

    def change(tx: Write) -> None:
        ceiling = sqlite_door.settings.drive.chunked_ceiling_bytes
        organizations.set_drive_limits(tx, drive_id, chunked_ceiling_bytes=ceiling, **limits)

    if error is None:
        sqlite_door.write(change)
        with sqlite_door.database.read() as tx:
            row = directory.drives(tx)[0]
        assert {name: row[name] for name in limits} == limits
    else:
        with pytest.raises(error):
            sqlite_door.write(change)


# -- application passwords ------------------------------------------------------------------------


def test_a_list_of_application_passwords_shows_no_secret(door: Door) -> None:
    account = door.account()
    number, secret = door.app_password(account, "drive", "caldav")
    with door.database.read() as tx:
        row = directory.app_passwords(tx, account)[0]
        stored = tx.execute(sa.select(t.app_password)).one()
    assert (row["id"], row["name"], row["scopes"]) == (number, "phone", ["caldav", "drive"])
    letters = secret.replace("-", "")
    assert letters[6:20] not in json.dumps(row, default=str) + repr(tuple(stored))
    assert len(bytes(stored.digest)) == 32


def test_one_or_all_are_revoked_and_only_once(door: Door) -> None:
    alice, bob = door.account(), door.account("bob")
    first, second, third = (door.app_password(person)[0] for person in (alice, alice, bob))

    def revoke(account: Account, number: int | None = None) -> int:
        return door.write(lambda tx: app_passwords.revoke(tx, account, number))

    with pytest.raises(NotFound):
        revoke(alice, third)
    assert revoke(alice, first) == 1
    with pytest.raises(NotFound):
        revoke(alice, first)
    assert revoke(alice) == 1
    assert revoke(alice) == 0
    assert revoke(bob, third) == 1
    with pytest.raises(NotFound):
        revoke(alice, second)


# -- the audit ------------------------------------------------------------------------------------


def test_the_audit_says_who_what_and_when_and_never_a_secret(door: Door) -> None:
    account = door.account()
    _, secret = door.app_password(account)
    totp = door.turn_on_second_factor(account)
    door.write(
        lambda tx: accounts.set_login_email(
            tx, account, "a@example.org", actor=audit.Actor("AB12345", "192.0.2.1")
        )
    )
    with door.database.read() as tx:
        rows = directory.audit(tx, subject=account.sync_id)
    assert rows[0]["actor"] == "AB12345"
    assert rows[0]["address"] == "192.0.2.1"
    assert rows[0]["detail"] == {
        "from": "alice@example.org",
        "to": "a@example.org",
        "told": ["alice@example.org", "a@example.org"],
    }
    assert all(row["at"] > 1_700_000_000 for row in rows)
    text = json.dumps(rows)
    for hidden in (PASSWORD, secret, secret.replace("-", ""), totp, "argon2"):
        assert hidden not in text
