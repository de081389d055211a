"""Device passwords at the one door: each opens its mailbox over IMAP and SMTP, nothing else opens that."""

from __future__ import annotations

import logging
import time

import pytest
import sqlalchemy as sa

from ksync_server.auth import (
    accounts,
    device_passwords,
    directory,
    mailboxes,
    organizations,
    passwords,
    rotation,
)
from ksync_server.auth.audit import Actor
from ksync_server.auth.gate import Credentials, DriveTarget, HomeTarget
from ksync_server.auth.rules import Secret, Service
from ksync_server.errors import (
    BadRequest,
    Forbidden,
    NotAuthenticated,
    NotFound,
    TooManyRequests,
)
from ksync_server.http import Peer
from ksync_server.store import tables as t
from tests.auth.harness import PASSWORD, PEER, SYNC_HOST, Door

ADDRESS = "alice@example.org"


def listed(door: Door, mailbox: mailboxes.Mailbox) -> list[dict[str, object]]:
    with door.database.read() as tx:
        return directory.device_passwords(tx, mailbox.id)


def test_several_devices_open_one_mailbox_and_each_goes_alone(door: Door) -> None:
    alice = door.account()
    box = door.mailbox(ADDRESS, alice)
    (first, phone), (_, laptop) = door.device(box), door.device(box, "laptop")
    elsewhere = door.another_process()
    for each in (door, elsewhere):
        for service in (Service.IMAP, Service.SMTP):
            for secret in (phone, laptop, phone.upper().replace("-", " ")):
                identity = each.log_in(ADDRESS.upper(), secret, service)
                assert identity.mailbox == box
                assert (identity.account_id, identity.secret) == (alice.id, Secret.DEVICE_PASSWORD)
                assert identity.app_password_id is None
                assert identity.scopes == frozenset()
    assert door.write(lambda tx: device_passwords.revoke(tx, box, first)) == 1
    for each in (door, elsewhere):
        with pytest.raises(NotAuthenticated):
            each.log_in(ADDRESS, phone, Service.IMAP)
        each.log_in(ADDRESS, laptop, Service.IMAP)
    with pytest.raises(NotFound):
        door.write(lambda tx: device_passwords.revoke(tx, box, first))
    door.device(box)
    assert door.write(lambda tx: device_passwords.revoke(tx, box)) == 2
    with pytest.raises(NotAuthenticated):
        door.log_in(ADDRESS, laptop, Service.IMAP)
    assert [row["revoked_at"] is None for row in listed(door, box)] == [False] * 3


def test_a_mailbox_that_is_nobodys_has_devices_and_opens_no_room(door: Door) -> None:
    box = door.mailbox("info@example.org")
    _, secret = door.device(box)
    identity = door.log_in("info@example.org", secret, Service.IMAP)
    assert (identity.account_id, identity.sync_id, identity.mailbox) == (0, "", box)
    drive = door.drive("kdrive-solo", door.account())
    with door.database.read() as tx:
        for service in Service:
            with pytest.raises((Forbidden, NotFound)):
                door.gate.authorize(tx, identity, HomeTarget(service, ""), "GET")
        with pytest.raises(Forbidden):
            door.gate.authorize(tx, identity, DriveTarget(drive), "GET")


@pytest.mark.parametrize("service", sorted(set(Service) - {Service.IMAP, Service.SMTP}))
def test_it_opens_nothing_but_mail(sqlite_door: Door, service: Service) -> None:
    alice = sqlite_door.account()
    _, secret = sqlite_door.device(sqlite_door.mailbox(ADDRESS, alice))
    for name in (ADDRESS, alice.sync_id, f"{alice.sync_id}@{SYNC_HOST}"):
        with pytest.raises(NotAuthenticated):
            sqlite_door.log_in(name, secret, service)


def test_mail_takes_nothing_else_and_no_other_name(sqlite_door: Door) -> None:
    door, alice = sqlite_door, sqlite_door.account()
    box, other = door.mailbox(ADDRESS, alice), door.mailbox("info@example.org")
    (_, secret), (_, app), (_, foreign) = door.device(box), door.app_password(alice), door.device(other)
    refused = [
        (ADDRESS, PASSWORD),
        (ADDRESS, app),
        (alice.sync_id, PASSWORD),
        (alice.sync_id, app),
        (alice.sync_id, secret),
        (f"{alice.sync_id}@{SYNC_HOST}", secret),
        (f"{ADDRESS}@{SYNC_HOST}", secret),
        ("", secret),
        ("alice", secret),
        ("info@example.org", secret),
        (ADDRESS, foreign),
        (ADDRESS, passwords.new_app_password(Secret.DEVICE_PASSWORD).shown),
        (ADDRESS, secret[:-1] + ("0" if secret[-1] != "0" else "1")),
        (ADDRESS, ""),
        ("nobody@example.org", secret),
    ]
    told = set()
    for name, shown in refused:
        for service in (Service.IMAP, Service.SMTP):
            with pytest.raises(NotAuthenticated) as answer:
                door.log_in(name, shown, service)
            told.add((type(answer.value), str(answer.value)))
    assert len(told) == 1, "every cause is told alike"
    door.log_in(ADDRESS, secret, Service.IMAP)


def test_no_account_password_is_verified_for_mail(sqlite_door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens nothing there: bots that try them over IMAP get no argon2 to burn, no answer to learn from."""
    door, alice = sqlite_door, sqlite_door.account()

    def verify(*_: object) -> bool:
        raise AssertionError("argon2")

    monkeypatch.setattr(door.gate.passwords, "verify", verify)
    for name in (ADDRESS, "nobody@example.org"):
        for secret in (PASSWORD, "wrong"):
            with pytest.raises(NotAuthenticated):
                door.gate.recognise(Credentials(name, secret), PEER, service=Service.IMAP)
    assert alice.login_email == ADDRESS


def test_guesses_over_imap_are_counted_and_devices_get_in_meanwhile(door: Door) -> None:
    box = door.mailbox(ADDRESS, door.account())
    _, secret = door.device(box)
    here, elsewhere = "198.51.100.1", "198.51.100.2"
    for number in range(5):
        with pytest.raises(NotAuthenticated):
            door.log_in(ADDRESS, f"guess {number}", Service.IMAP, here)
    with pytest.raises(TooManyRequests):
        door.log_in(ADDRESS, "guess 5", Service.IMAP, here)
    with pytest.raises(NotAuthenticated):
        door.log_in(ADDRESS, "guess 6", Service.IMAP, elsewhere)
    door.log_in(ADDRESS, secret, Service.IMAP, here)
    door.gate.flush()
    with pytest.raises(TooManyRequests):
        door.another_process().log_in(ADDRESS, "guess 7", Service.IMAP, here)


def test_a_device_that_repeats_a_revoked_secret_locks_nobody_out(door: Door) -> None:
    alice = door.account()
    box = door.mailbox(ADDRESS, alice)
    (number, revoked), (_, secret) = door.device(box), door.device(box)
    door.write(lambda tx: device_passwords.revoke(tx, box, number))
    for _ in range(30):
        with pytest.raises(NotAuthenticated):
            door.log_in(ADDRESS, revoked, Service.IMAP)
    door.log_in(ADDRESS, secret, Service.IMAP)
    door.log_in(ADDRESS, PASSWORD, Service.CALDAV)


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        ("revoked", "revoked device password"),
        ("mailbox suspended", "the mailbox is suspended"),
        ("account suspended", "the mailbox is that of an account that is suspended"),
        ("left", "the mailbox is of somebody who left the organization"),
        ("another name", "the device password of another mailbox"),
        ("calendars", "caldav takes no device password"),
        ("application password", "imap takes no application password"),
    ],
)
def test_the_owner_and_the_log_are_told_why_a_right_secret_was_refused(
    door: Door, cause: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    alice = door.account()
    home = door.organization("mail-premium", alice)
    box = door.mailbox(ADDRESS, alice, home=home)
    _, secret = door.device(box)
    name, service = ADDRESS, Service.IMAP
    if cause == "revoked":
        door.write(lambda tx: device_passwords.revoke(tx, box))
    elif cause == "mailbox suspended":
        door.write(lambda tx: mailboxes.set_state(tx, box, "suspended"))
    elif cause == "account suspended":
        door.write(lambda tx: accounts.set_state(tx, alice, "suspended"))
    elif cause == "left":
        door.write(lambda tx: organizations.remove_member(tx, home, alice))
    elif cause == "another name":
        name = "info@example.org"
    elif cause == "calendars":
        service = Service.CALDAV
    else:
        _, secret = door.app_password(alice)
    with caplog.at_level(logging.WARNING), pytest.raises(NotAuthenticated):
        door.log_in(name, secret, service)
    door.gate.flush()
    with door.database.read() as tx:
        (row,) = directory.audit(tx, subject=alice.sync_id, actions=["log-in.refused"])
    assert row["detail"]["reason"] == reason
    assert caplog.records[0].__dict__["reason"] == reason
    assert caplog.records[0].__dict__["guess"] == "no"
    assert secret not in repr([record.__dict__ for record in caplog.records]) + repr(row)


def test_what_ends_lets_the_same_devices_in_again(door: Door) -> None:
    alice = door.account()
    home = door.organization("mail-premium", alice)
    box = door.mailbox(ADDRESS, alice, home=home)
    _, secret = door.device(box)
    door.write(lambda tx: mailboxes.set_state(tx, box, "suspended"))
    door.write(lambda tx: mailboxes.set_state(tx, box, "active"))
    door.write(lambda tx: accounts.set_state(tx, alice, "suspended"))
    door.write(lambda tx: accounts.set_state(tx, alice, "active"))
    door.turn_on_second_factor(alice)
    assert door.log_in(ADDRESS, secret, Service.IMAP).mailbox == box


def test_the_last_use_is_kept_once_a_minute_and_apart_from_application_passwords(door: Door) -> None:
    alice = door.account()
    box = door.mailbox(ADDRESS, alice)
    (number, secret), (app_number, app) = door.device(box), door.app_password(alice)
    assert number == app_number, "the same number in two tables"
    before = int(time.time())
    door.log_in(ADDRESS, secret, Service.IMAP)
    door.log_in(ADDRESS, app, Service.CALDAV)
    door.gate.flush()
    door.gate.identify(Credentials(ADDRESS, secret), Peer("192.0.2.99", True, ""), service=Service.SMTP)
    door.gate.flush()
    (row,) = listed(door, box)
    assert (row["last_service"], row["last_address"]) == ("imap", PEER.address)
    assert before <= int(str(row["last_used_at"])) <= time.time()
    with door.database.read() as tx:
        (other,) = directory.app_passwords(tx, alice)
    assert other["last_service"] == "caldav"


def test_it_moves_to_a_new_key_set_when_it_is_used(door: Door) -> None:
    alice = door.account()
    box, shared = door.mailbox(ADDRESS, alice), door.mailbox("info@example.org")
    (_, secret), _ = door.device(box), door.device(shared)
    first = door.keys.current
    second, _ = rotation.rotate(door.database, door.keys, door.settings.auth.key_file)
    with door.database.read() as tx:
        holders = {row["sync_id"]: row["device_passwords"] for row in rotation.holders(tx, first)}
    assert holders == {alice.sync_id: 1, None: 1}
    door.log_in(ADDRESS, secret, Service.IMAP)
    door.gate.flush()
    with door.database.read() as tx:
        counts = rotation.counts(tx)
        rows = (
            tx.execute(sa.select(t.device_password.c.key_id).order_by(t.device_password.c.id)).scalars().all()
        )
    assert (counts[first]["device_passwords"], counts[second]["device_passwords"]) == (1, 1)
    assert rows == [second, first]
    door.log_in(ADDRESS, secret, Service.IMAP)


def test_the_secret_is_nowhere_but_where_it_is_shown(door: Door) -> None:
    box = door.mailbox(ADDRESS, door.account())
    _, secret = door.device(box)
    with door.database.read() as tx:
        rows = repr(
            [
                tuple(row)
                for table in (t.device_password, t.audit, t.job)
                for row in tx.execute(sa.select(table))
            ]
        )
    assert secret not in rows
    assert secret.replace("-", "") not in rows


def test_who_makes_and_revokes_them(door: Door) -> None:
    """An administrator reads no member's mail, yet may lock a lost device out."""
    alice, admin, other = door.account(), door.account("admin"), door.account("other")
    home = door.organization("mail-premium", alice, other)
    door.write(lambda tx: organizations.put_member(tx, home, admin, "administrator"))
    box, shared = door.mailbox(ADDRESS, alice, home=home), door.mailbox("info@example.org", home=home)
    door.device(box, actor=Actor(alice.sync_id))
    door.device(shared, actor=Actor(admin.sync_id))
    for mailbox, actor in ((box, admin), (box, other), (shared, alice), (shared, other)):
        with pytest.raises(Forbidden):
            door.device(mailbox, actor=Actor(actor.sync_id))
    for mailbox, actor in ((box, other), (shared, alice)):
        with pytest.raises(Forbidden):
            door.write(lambda tx, m=mailbox, a=actor: device_passwords.revoke(tx, m, actor=Actor(a.sync_id)))
    assert door.write(lambda tx: device_passwords.revoke(tx, box, actor=Actor(admin.sync_id))) == 1
    with pytest.raises(BadRequest):
        door.device(box, " ")


def test_its_owner_is_told_and_of_nobodys_mailbox_nobody(door: Door) -> None:
    alice = door.account()
    box, shared = door.mailbox(ADDRESS, alice), door.mailbox("info@example.org")
    door.device(box, "pocket")
    door.device(shared)
    with door.database.read() as tx:
        (row,) = directory.notices(tx, alice)
        (other,) = directory.audit(tx, subject="info@example.org", actions=["device-password.create"])
    assert row["detail"] == {"id": 1, "name": "pocket", "mailbox": ADDRESS}
    assert other["detail"]["mailbox"] == "info@example.org"
