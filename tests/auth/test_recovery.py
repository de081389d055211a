"""Ways back in: a login address that is gone, a forgotten password; neither weakens a second factor."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from ksync_server.auth import accounts, audit, directory, recovery, secondfactor
from ksync_server.auth.accounts import Account
from ksync_server.auth.audit import NOTICE, Actor
from ksync_server.auth.gate import Service
from ksync_server.errors import (
    AppPasswordRequired,
    BadRequest,
    ClientError,
    Conflict,
    Forbidden,
    NotAuthenticated,
)
from ksync_server.store import tables as t
from ksync_server.store.database import Write
from tests.auth.harness import PASSWORD, SYNC_HOST, Door

HOSTED = ("example.org",)
NEW = "another long pass phrase"


def refused(kind: type[ClientError], said: str, fn: Callable[[], object]) -> None:
    with pytest.raises(kind, match=said):
        fn()


def now_of(door: Door, account: Account) -> Account:
    with door.database.read() as tx:
        return accounts.by_id(tx, account.id)


def told(door: Door, account: Account) -> dict[str, Any]:
    """The newest thing that its owner was told; the e-mail of it is queued."""
    with door.database.read() as tx:
        row = directory.notices(tx, account, limit=1)[0]
        newest = tx.execute(
            sa.select(sa.func.max(t.audit.c.id)).where(
                t.audit.c.subject == account.sync_id, t.audit.c.action == row["action"]
            )
        ).scalar_one()
        queued = [
            json.loads(each.arguments)["audit"]
            for each in tx.execute(sa.select(t.job.c.arguments).where(t.job.c.kind == NOTICE))
        ]
    assert newest in queued
    return row


# -- a login address that is gone -----------------------------------------------------------------


def lose(door: Door, account: Account, hosted: tuple[str, ...] = HOSTED) -> recovery.TemporaryLogin:
    return door.write(lambda tx: recovery.login_lost(tx, account, hosted))


def test_the_old_name_stops_at_once_and_everything_else_goes_on(door: Door) -> None:
    account = door.account(sync_id="AB12345")
    door.write(lambda tx: accounts.set_recovery(tx, account, email="a@example.net", mobile="+41791234567"))
    _, secret = door.app_password(account)
    elsewhere = door.another_process()
    number = door.drive("kdrive-pro", account)
    for each in (door, elsewhere):
        each.log_in("alice@example.org", PASSWORD)
    made = lose(door, account)
    assert (made.recovery_email, made.recovery_mobile) == ("a@example.net", "+41791234567")
    assert made.login.endswith("@login.invalid")
    row = told(door, account)
    assert (row["action"], row["detail"]) == (
        "account.connection-address",
        {"from": "alice@example.org", "temporary": made.login, "told": ["a@example.net"]},
    )
    for each in (door, elsewhere):
        for shown in (PASSWORD, secret):
            with pytest.raises(NotAuthenticated):
                each.log_in("alice@example.org", shown)
            for name in ("AB12345", f"ab12345@{SYNC_HOST}", made.login, made.login.upper()):
                identity = each.log_in(name, shown, Service.CALDAV)
                assert identity.sync_id == "AB12345"
                assert each.enter(identity, number).drive_id == number
                each.home(identity, Service.CARDDAV, "AB12345")
    after = now_of(door, account)
    assert (after.login_lost, after.shown_state) == (True, "connection address being changed")
    assert (after.state, after.password_hash) == ("active", account.password_hash)


def test_a_new_address_ends_the_state(door: Door) -> None:
    account = door.account()
    made = lose(door, account)
    lost = now_of(door, account)
    refused(
        BadRequest,
        "Nobody has an address",
        lambda: door.write(lambda tx: accounts.set_login_email(tx, lost, "me@login.invalid")),
    )
    assert now_of(door, account).login_lost
    actor = Actor(account.sync_id, "192.0.2.1")
    door.write(lambda tx: accounts.set_login_email(tx, lost, "alice@example.net", actor=actor))
    after = now_of(door, account)
    assert (after.login_lost, after.shown_state, after.sync_id) == (False, "active", account.sync_id)
    door.log_in("alice@example.net", PASSWORD)
    with pytest.raises(NotAuthenticated):
        door.log_in(made.login, PASSWORD)
    assert told(door, account)["detail"]["told"] == ["alice@example.net"], "the temporary name gets no mail"


def test_a_second_factor_is_as_strong_as_before(door: Door) -> None:
    account = door.account()
    door.turn_on_second_factor(account)
    made = lose(door, account)
    with pytest.raises(AppPasswordRequired):
        door.log_in(made.login, PASSWORD)
    with door.database.read() as tx:
        assert [each.kind for each in secondfactor.alternatives(tx, account)] == [
            "totp",
            "recovery-code",
            "help",
        ]


@pytest.mark.parametrize(
    ("hosted", "changed"),
    [
        ((), False),
        (("example.net",), False),
        (("ample.org",), False),
        (("EXAMPLE.org",), True),
        (("example.net", "example.org"), True),
    ],
)
def test_addresses_outside_are_never_affected(
    sqlite_door: Door, hosted: tuple[str, ...], changed: bool
) -> None:
    account = sqlite_door.account()
    if changed:
        assert lose(sqlite_door, account, hosted).login
        lost = now_of(sqlite_door, account)
        refused(Conflict, "not an address of this server", lambda: lose(sqlite_door, lost, hosted))
    else:
        refused(Conflict, "not an address of this server", lambda: lose(sqlite_door, account, hosted))
        assert now_of(sqlite_door, account) == account
        sqlite_door.log_in("alice@example.org", PASSWORD)


def test_the_mail_service_names_the_address_that_is_gone(door: Door) -> None:
    alice, bob = door.account(), door.account("bob", login_email="bob@example.net")

    def gone(address: str) -> recovery.TemporaryLogin | None:
        return door.write(lambda tx: recovery.address_gone(tx, address, HOSTED))

    assert gone("nobody@example.org") is None
    assert gone("bob@example.net") is None
    assert (now_of(door, alice), now_of(door, bob)) == (alice, bob)
    made = gone("ALICE@Example.org")
    assert made is not None
    assert (made.sync_id, made.recovery_email) == (alice.sync_id, None)
    assert gone("alice@example.org") is None, "it is nobody's any more"


def test_a_recovery_address_that_is_the_lost_one_is_not_told(sqlite_door: Door) -> None:
    account = sqlite_door.account()
    sqlite_door.write(lambda tx: accounts.set_recovery(tx, account, email="Alice@example.org"))
    assert lose(sqlite_door, account).recovery_email is None


# -- a forgotten password -------------------------------------------------------------------------


def start(door: Door, account: Account, reason: str = "forgot it, called us", by: Actor | None = None) -> str:
    return door.write(lambda tx: recovery.start_reset(tx, account, reason=reason, actor=by or Actor()))


def token(door: Door, account: Account, **options: Any) -> str:
    with door.database.read() as tx:
        return recovery.reset_token(tx, door.keys, account, **options)


def finish(door: Door, given: str, new: str = NEW, **options: Any) -> Account:
    return recovery.finish_reset(door.database, door.keys, door.gate.passwords, given, new, **options)


@pytest.fixture
def alice(door: Door) -> Account:
    """An account with a recovery e-mail."""
    account = door.account()
    door.write(lambda tx: accounts.set_recovery(tx, account, email="a@example.net"))
    return account


def test_an_identity_check_is_told_opens_nothing_and_its_documents_have_an_end(
    door: Door, alice: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(account: Account, reason: str = "lost everything, passport seen") -> int:
        return door.write(lambda tx: recovery.identity_checked(tx, account, reason=reason))

    def kept() -> dict[str, int]:
        with door.database.read() as tx:
            return recovery.documents_kept(tx)

    def delete(account: Account) -> None:
        door.write(lambda tx: recovery.documents_deleted(tx, account.sync_id))

    door.turn_on_second_factor(alice)
    before, bob = now_of(door, alice), door.account("bob")
    refused(BadRequest, "Say why", lambda: check(alice, " x "))
    at = int(time.time())
    until = check(alice)
    assert 0 <= until - at - 72 * 3600 <= 60
    assert now_of(door, alice) == before, "no secret, factor or epoch changes"
    row = told(door, alice)
    assert (row["action"], row["actor"], row["detail"]["documents_until"]) == (
        "account.identity-check",
        "operator",
        until,
    )
    assert "account.identity-check" in audit.TOLD
    monkeypatch.setattr(time, "time", lambda: at + 3600.0)
    check(alice)
    check(bob)
    assert abs(kept()[alice.sync_id] - until) <= 60, "of the first check that is open"
    assert set(kept()) == {alice.sync_id, bob.sync_id}
    delete(alice)
    assert set(kept()) == {bob.sync_id}
    refused(Conflict, "no identity check", lambda: delete(alice))
    check(alice)
    assert kept()[alice.sync_id] == at + 3600 + 72 * 3600


def test_starting_changes_nothing_and_tells_the_recovery_e_mail(door: Door, alice: Account) -> None:
    before = now_of(door, alice)
    assert start(door, alice) == "a@example.net"
    assert now_of(door, alice) == before
    row = told(door, alice)
    assert (row["action"], row["actor"]) == ("account.reset", "operator")
    assert row["detail"] == {"reason": "forgot it, called us", "told": ["a@example.net"]}
    door.log_in("alice@example.org", PASSWORD)


def test_a_reset_needs_a_reason_an_active_account_and_a_recovery_e_mail(door: Door, alice: Account) -> None:
    refused(BadRequest, "Say why", lambda: start(door, alice, " x "))
    bob = door.account("bob")
    refused(Conflict, "no recovery e-mail", lambda: start(door, bob))
    door.write(lambda tx: accounts.set_state(tx, alice, "suspended"))
    refused(Conflict, "suspended", lambda: start(door, now_of(door, alice)))


def test_the_owner_chooses_the_password_once(door: Door, alice: Account) -> None:
    given = token(door, alice)
    refused(BadRequest, "at least 8", lambda: finish(door, given, "short"))
    assert finish(door, given, address="192.0.2.9").sync_id == alice.sync_id
    door.log_in("alice@example.org", NEW)
    with pytest.raises(NotAuthenticated):
        door.log_in("alice@example.org", PASSWORD)
    refused(Forbidden, "not good any more", lambda: finish(door, given, "a third long pass phrase"))
    row = told(door, alice)
    assert (row["action"], row["actor"], row["address"], row["detail"]) == (
        "account.password",
        alice.sync_id,
        "192.0.2.9",
        {"how": "reset"},
    )


def test_a_reset_leaves_the_second_factor_on(door: Door, alice: Account) -> None:
    door.turn_on_second_factor(alice)
    with door.database.read() as tx:
        before = directory.security(tx, alice)
    finish(door, token(door, alice))
    with pytest.raises(AppPasswordRequired):
        door.log_in("alice@example.org", NEW)
    with door.database.read() as tx:
        assert directory.security(tx, alice) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda tx, account: accounts.set_password_hash(tx, account, None),
        lambda tx, account: accounts.set_login_email(tx, account, "b@example.org"),
        lambda tx, account: accounts.set_recovery(tx, account, email="thief@example.net"),
        lambda tx, account: accounts.set_state(tx, account, "suspended"),
    ],
    ids=["password", "login", "recovery", "suspended"],
)
def test_any_change_of_the_account_makes_a_link_void(
    door: Door, alice: Account, change: Callable[[Write, Account], None]
) -> None:
    given = token(door, alice)
    door.write(lambda tx: change(tx, alice))
    refused(Forbidden, "not good any more", lambda: finish(door, given))


def test_links_end_and_cannot_be_made_up(sqlite_door: Door) -> None:
    door = sqlite_door
    account, bob = door.account(), door.account("bob")
    given = token(door, account, now=1_000_000)
    refused(Forbidden, "not good", lambda: finish(door, given, now=1_003_600))
    number, until, key_id, digest = given.split(".")
    forged = [
        "",
        "....",
        "a.b.c.d",
        f"{bob.id}.{until}.{key_id}.{digest}",
        f"{number}.{int(until) + 1}.{key_id}.{digest}",
        f"{number}.{until}.k9.{digest}",
        f"{number}.{until}.{key_id}.{digest[:-2]}00"
        if digest[-2:] != "00"
        else f"{number}.{until}.{key_id}.",
        f"{number}.{until}.{key_id}.",
        f"99.{until}.{key_id}.{digest}",
        f"{10**30}.{until}.{key_id}.{digest}",
        f"{number}.{until}.{key_id}.é",
    ]
    for each in forged:
        refused(Forbidden, "not good", lambda each=each: finish(door, each, now=1_003_599))  # type: ignore[misc]
    assert finish(door, given, now=1_003_599).id == account.id


def test_an_operator_who_sets_a_password_is_not_silent(door: Door, alice: Account) -> None:
    door.write(lambda tx: accounts.set_password_hash(tx, alice, None))
    row = told(door, alice)
    assert (row["action"], row["actor"]) == ("account.password", "operator")


# -- what owners are told -------------------------------------------------------------------------


def test_the_list_of_notices_is_what_the_owner_was_told_and_nothing_else(door: Door) -> None:
    account, bob = door.account(), door.account("bob")
    door.write(lambda tx: accounts.set_recovery(tx, account, email="a@example.net"))
    door.app_password(account)
    door.turn_on_second_factor(account)
    with pytest.raises(AppPasswordRequired):
        door.log_in("alice@example.org", PASSWORD)
    door.gate.flush()
    with door.database.read() as tx:
        found = [row["action"] for row in reversed(directory.notices(tx, account))]
        every = [row["action"] for row in reversed(directory.audit(tx, subject=account.sync_id))]
        assert directory.notices(tx, bob) == []
        assert len(directory.notices(tx, account, limit=2)) == 2
    assert found == [
        "account.recovery",
        "app-password.create",
        "second-factor.confirm",
        "second-factor.recovery-codes",
        "log-in.refused",
    ]
    assert [each for each in every if each not in found] == ["account.create"]


def test_a_changed_recovery_e_mail_is_told_to_the_old_one(door: Door, alice: Account) -> None:
    door.write(lambda tx: accounts.set_recovery(tx, alice, email="thief@example.net"))
    row = told(door, alice)
    assert row["action"] == "account.recovery"
    assert row["detail"]["told"] == ["alice@example.org", "a@example.net"]


def test_the_audit_is_filtered_by_action_and_time(door: Door) -> None:
    account = door.account()
    door.app_password(account)
    door.turn_on_second_factor(account)
    rows = [
        {"at": at, "actor": "operator", "action": "account.old", "subject": account.sync_id}
        for at in (1000, 2000)
    ]
    door.write(lambda tx: tx.execute(sa.insert(t.audit), rows))
    with door.database.read() as tx:

        def actions(**options: Any) -> list[str]:
            return [row["action"] for row in directory.audit(tx, **options)]

        assert actions(actions=["app-password.create"]) == ["app-password.create"]
        assert set(actions(actions=["second-factor."])) == {
            "second-factor.confirm",
            "second-factor.recovery-codes",
        }
        assert actions(actions=["second_factor.", "account"]) == []
        assert len(actions(actions=["account.old"], since=1001)) == 1
        assert len(actions(subject=account.sync_id, actions=["account."], since=1000)) == 3
        assert actions(subject="nobody") == []
        assert len(actions(limit=2)) == 2
