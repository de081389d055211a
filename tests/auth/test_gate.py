"""The door: who gets in, what is noted and remembered; `test_product.py` has the product of its rules."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from dataclasses import dataclass, replace

import pyotp
import pytest
import sqlalchemy as sa

from ksync_server.auth import accounts, app_passwords, directory, offers, organizations, passwords
from ksync_server.auth.accounts import Account
from ksync_server.auth.gate import Credentials, DriveTarget, HomeTarget, Identity, Service
from ksync_server.auth.rules import VERBS
from ksync_server.errors import (
    AppPasswordRequired,
    BadRequest,
    ClientError,
    Forbidden,
    NotAuthenticated,
    NotFound,
    NotImplementedHere,
    Unavailable,
)
from ksync_server.http import Peer
from ksync_server.store import tables as t
from ksync_server.store.database import Write
from tests.auth.harness import PASSWORD, PEER, SYNC_HOST, Door

SYNC_AND_DRIVE = (Service.CALDAV, Service.CARDDAV, Service.SYNC, Service.DRIVE)
SCOPES = [
    tuple(each) for size in (1, 2, 3) for each in itertools.combinations(("caldav", "carddav", "drive"), size)
]

# -- who is it: the table of section 5 ------------------------------------------------------------

# (secret, 2FA) for active accounts; everything else stays outside.
LET_IN = {
    ("account password", "2FA off"),
    ("application password", "2FA off"),
    ("application password", "2FA on"),
}
SECRETS = (
    "account password",
    "account password + TOTP code",
    "TOTP code + account password",
    "TOTP code",
    "account password in other case",
    "wrong password",
    "empty",
    "application password",
    "revoked application password",
    "application password of another account",
    "application password with one wrong letter",
    "application password that nobody has",
    "application password with other random letters",
    "longer than any",
)


@dataclass(frozen=True, slots=True)
class Person:
    """An account with one secret of each kind."""

    account: Account
    secrets: dict[str, str]
    scoped: dict[tuple[str, ...], str]


def _person(door: Door, name: str, *, second_factor: bool, state: str, stranger: str) -> Person:
    account = door.account(name)
    _, app = door.app_password(account)
    number, revoked = door.app_password(account)
    door.write(lambda tx: app_passwords.revoke(tx, account, number))
    forged = app.replace("-", "")[:6] + passwords.new_app_password().secret[6:-3]
    forged += passwords._check_letters(forged)
    scoped = {scopes: door.app_password(account, *scopes)[1] for scopes in SCOPES}
    code = "123456"
    if second_factor:
        code = pyotp.TOTP(door.turn_on_second_factor(account)).now()
    if state != "active":
        door.write(lambda tx: accounts.set_state(tx, account, state))
    wrong = app[:-1] + ("0" if app[-1] != "0" else "1")
    secrets = {
        "account password": PASSWORD,
        "account password + TOTP code": PASSWORD + code,
        "TOTP code + account password": code + PASSWORD,
        "TOTP code": code,
        "account password in other case": PASSWORD.upper(),
        "wrong password": "not the password",
        "empty": "",
        "application password": app,
        "revoked application password": revoked,
        "application password of another account": stranger,
        "application password with one wrong letter": wrong,
        "application password that nobody has": passwords.new_app_password().shown,
        "application password with other random letters": forged,
        "longer than any": PASSWORD * 1000,
    }
    return Person(account, secrets, scoped)


@pytest.fixture(scope="module")
def people(module_door: Door) -> dict[tuple[str, str], Person]:
    """One account for each state and second factor."""
    _, stranger = module_door.app_password(module_door.account("stranger"))
    return {
        (factor, state): _person(
            module_door,
            f"{factor[4:]}.{state}",
            second_factor=factor == "2FA on",
            state=state,
            stranger=stranger,
        )
        for factor in ("2FA off", "2FA on")
        for state in ("active", "suspended")
    }


@pytest.mark.parametrize("state", ["active", "suspended"])
@pytest.mark.parametrize("factor", ["2FA off", "2FA on"])
@pytest.mark.parametrize("secret", SECRETS)
def test_who_gets_in_is_what_the_table_says(
    module_door: Door, people: dict[tuple[str, str], Person], secret: str, factor: str, state: str
) -> None:
    person = people[factor, state]
    expected = state == "active" and (secret, factor) in LET_IN
    for service, name in itertools.product(
        SYNC_AND_DRIVE, (person.account.sync_id, person.account.login_email)
    ):
        if expected:
            identity = module_door.log_in(name, person.secrets[secret], service)
            assert identity.account_id == person.account.id
            assert (identity.app_password_id is None) == (secret == "account password")
        else:
            with pytest.raises(NotAuthenticated):
                module_door.log_in(name, person.secrets[secret], service)


def _what_the_client_sees(door: Door, name: str, secret: str) -> tuple[object, ...]:
    with pytest.raises(NotAuthenticated) as caught:
        door.log_in(name, secret)
    error = caught.value
    return error.status, str(error), error.text, error.precondition, error.hrefs, error.headers


def test_every_refusal_looks_the_same_to_the_client(
    module_door: Door, people: dict[tuple[str, str], Person]
) -> None:
    seen = {
        _what_the_client_sees(module_door, person.account.sync_id, person.secrets[secret])
        for (factor, state), person in people.items()
        for secret in SECRETS
        if state != "active" or (secret, factor) not in LET_IN
    }
    for name in ("nobody@example.org", "ZZ99999", "", "a" * 10_000, "\0", "\ud800", f"@{SYNC_HOST}", "x@y@z"):
        for secret in (PASSWORD, passwords.new_app_password().shown):
            seen.add(_what_the_client_sees(module_door, name, secret))
    with pytest.raises(NotAuthenticated) as caught:
        module_door.gate.identify(None, PEER, service=Service.SYNC)
    error = caught.value
    seen.add((error.status, str(error), error.text, error.precondition, error.hrefs, error.headers))
    assert len(seen) == 1


def test_the_right_password_while_2fa_is_on_is_told_apart_inside(
    module_door: Door, people: dict[tuple[str, str], Person]
) -> None:
    with pytest.raises(AppPasswordRequired):
        module_door.log_in(people["2FA on", "active"].account.sync_id, PASSWORD)
    with pytest.raises(NotAuthenticated) as caught:
        module_door.log_in(people["2FA on", "active"].account.sync_id, "wrong")
    assert type(caught.value) is NotAuthenticated


@pytest.mark.parametrize("name", ["nobody@example.org", "ZZ99999", "passwordless", "alice@example.org"])
def test_an_unknown_name_costs_the_same_argon2_as_a_wrong_password(sqlite_door: Door, name: str) -> None:
    sqlite_door.account()
    sqlite_door.account("passwordless", sync_id="PA00001", password_hash=None)
    name = "PA00001" if name == "passwordless" else name
    hashes: list[str] = []
    hasher = sqlite_door.gate.passwords._hasher

    class Counting:
        def verify(self, stored: str, password: bytes) -> bool:
            hashes.append(stored)
            return hasher.verify(stored, password)

    sqlite_door.gate.passwords._hasher = Counting()  # type: ignore[assignment]
    for _ in range(2):
        with pytest.raises(NotAuthenticated):
            sqlite_door.log_in(name, "wrong")
    assert len(hashes) == 2
    assert all(stored.startswith("$argon2id$v=19$m=8,t=1,p=1$") for stored in hashes)


def test_the_right_password_under_2fa_costs_argon2_every_time_as_a_wrong_one_does(sqlite_door: Door) -> None:
    alice = sqlite_door.account()
    sqlite_door.log_in(alice.sync_id, PASSWORD)
    sqlite_door.turn_on_second_factor(alice)
    for _ in range(2):
        assert not sqlite_door.is_quick(alice.sync_id, PASSWORD)
        with pytest.raises(AppPasswordRequired):
            sqlite_door.log_in(alice.sync_id, PASSWORD)


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        "{id}",
        "{lower}",
        "{id}@sync.example.org",
        "{lower}@SYNC.Example.ORG",
        "{id}@dav.example.org",
        "{lower}@127.0.0.1",
        "Jürgen.Großmann@Example.org",
        "JÜRGEN.GROSSMANN@EXAMPLE.ORG",
        "ju\u0308rgen.großmann@example.org",
        "  {id} ",
    ],
)
@pytest.mark.parametrize("kind", ["account password", "application password"])
def test_every_name_of_an_account_is_accepted_with_one_canonical_answer(
    module_door: Door, form: str, kind: str
) -> None:
    with module_door.database.read() as tx:
        account = accounts.find(tx, "jürgen.großmann@example.org")
    account = account or module_door.account("Jürgen.Großmann")
    name = form.format(id=account.sync_id, lower=account.sync_id.lower())
    secret = PASSWORD if kind == "account password" else module_door.app_password(account)[1]
    identity = module_door.log_in(name, secret)
    assert (identity.sync_id, identity.login_email) == (account.sync_id, "Jürgen.Großmann@example.org")


@pytest.mark.parametrize(
    "name", ["{id}@example.org", "{id}@sync.example.org@sync.example.org", "{id}/", "{id}:"]
)
def test_names_that_only_resemble_one_are_refused(sqlite_door: Door, name: str) -> None:
    account = sqlite_door.account()
    _, secret = sqlite_door.app_password(account)
    with pytest.raises(NotAuthenticated):
        sqlite_door.log_in(name.format(id=account.sync_id), secret)


@pytest.mark.parametrize(
    "change", [str.upper, str.swapcase, lambda s: s.replace("-", " "), lambda s: s.replace("-", "")]
)
def test_case_spaces_and_hyphens_of_an_application_password_do_not_matter(door: Door, change: object) -> None:
    account = door.account()
    _, secret = door.app_password(account)
    assert door.log_in(account.sync_id, f" {change(secret)}\t").account_id == account.id  # type: ignore[operator]


def test_each_application_password_takes_one_look_at_one_row_whatever_comes_of_it(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    real = door.database.fast

    def fast(*arguments: object) -> list[tuple[object, ...]]:
        rows = real(*arguments)
        looks.append(len(rows))
        return rows

    account, other = door.account(), door.account("bob")
    number, revoked = door.app_password(account)
    good, expired, elsewhere, others = (
        door.app_password(each, **narrow)[1]
        for each, narrow in (
            (account, {}),
            (account, {"expires_at": int(time.time()) + 1}),
            (account, {"addresses": ["198.51.100.1"]}),
            (other, {}),
        )
    )
    door.write(lambda tx: app_passwords.revoke(tx, account, number))
    known = sorted(each.replace("-", "")[:6] for each in (revoked, good, expired, elsewhere, others))
    wrong = [_with_id(each) for each in (known[2], "000000", "zzzzzz", known[0][:-1] + "0")]
    door.gate.flush()
    monkeypatch.setattr(door.database, "fast", fast)
    later = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: later)
    assert door.log_in(account.sync_id, good).account_id == account.id
    for secret in (revoked, expired, elsewhere, others, *wrong):
        with pytest.raises(NotAuthenticated):
            door.log_in(account.sync_id, secret)
    assert looks == [1] * 9


def _with_id(lookup: str) -> str:
    """A well-formed application password that nobody has."""
    text = lookup + passwords.new_app_password().secret[6:-3]
    return text + passwords._check_letters(text)


def test_where_there_is_no_application_password_none_is_right(door: Door) -> None:
    door.account()
    with pytest.raises(NotAuthenticated):
        door.log_in("alice@example.org", passwords.new_app_password().shown)


# -- at once, in every process --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["account password", "application password"])
@pytest.mark.parametrize("change", ["suspended", "password", "2FA on", "revoked", "all revoked", "e-mail"])
def test_a_change_is_seen_by_the_next_request_of_every_process(door: Door, change: str, kind: str) -> None:
    account = door.account()
    number, app = door.app_password(account)
    secret = PASSWORD if kind == "account password" else app
    processes = [door, door.another_process()]
    for process in processes:
        for _ in range(2):
            process.log_in("alice@example.org", secret)
    refused = {
        "suspended": {"account password", "application password"},
        "password": {"account password"},
        "2FA on": {"account password"},
        "revoked": {"application password"},
        "all revoked": {"application password"},
        "e-mail": {"account password", "application password"},
    }
    match change:
        case "suspended":
            door.write(lambda tx: accounts.set_state(tx, account, "suspended"))
        case "password":
            fresh = door.gate.passwords.hash("another long pass phrase")
            door.write(lambda tx: accounts.set_password_hash(tx, account, fresh))
        case "2FA on":
            door.turn_on_second_factor(account)
        case "revoked":
            door.write(lambda tx: app_passwords.revoke(tx, account, number))
        case "all revoked":
            assert door.write(lambda tx: app_passwords.revoke(tx, account)) == 1
        case _:
            door.write(lambda tx: accounts.set_login_email(tx, account, "alice@example.com"))
    for process in processes:
        if kind in refused[change]:
            with pytest.raises(NotAuthenticated):
                process.log_in("alice@example.org", secret)
        else:
            process.log_in("alice@example.org", secret)


@pytest.mark.parametrize("change", [{"second_factor": True}, {"state": "suspended"}, {"state": "new state"}])
def test_even_a_change_that_forgot_the_epoch_is_seen(door: Door, change: dict[str, object]) -> None:
    account = door.account()
    door.log_in(account.sync_id, PASSWORD)
    door.write(lambda tx: tx.execute(sa.update(t.account).values(**change)))
    with pytest.raises(NotAuthenticated):
        door.log_in(account.sync_id, PASSWORD)


def test_a_suspension_that_ends_lets_the_owner_in_again(sqlite_door: Door) -> None:
    account = sqlite_door.account()
    sqlite_door.log_in(account.sync_id, PASSWORD)
    for state in ("suspended", "active"):
        sqlite_door.write(lambda tx, state=state: accounts.set_state(tx, account, state))  # type: ignore[misc]
    assert sqlite_door.log_in(account.sync_id, PASSWORD).account_id == account.id


# -- argon2 and the event loop --------------------------------------------------------------------


def test_what_needs_no_argon2_is_quick(door: Door) -> None:
    account = door.account()
    _, app = door.app_password(account)
    name = account.sync_id.lower()
    assert door.is_quick(account.sync_id, app)
    assert door.is_quick("nobody", app[:-1] + "z")
    assert door.is_quick(account.sync_id, "x" * 2000)
    assert not door.is_quick(name, PASSWORD)
    assert not door.is_quick("nobody", PASSWORD)
    door.log_in(account.sync_id, PASSWORD)
    assert door.is_quick(name, PASSWORD)
    assert not door.is_quick(account.sync_id, PASSWORD + "x")
    door.write(lambda tx: accounts.raise_epoch(tx, account.id))
    assert not door.is_quick(name, PASSWORD)


def test_more_log_ins_than_the_queue_holds_are_told_to_come_back(sqlite_door: Door) -> None:
    account = sqlite_door.account()
    door = sqlite_door.another_process(argon2_parallel=1, argon2_queue=3)
    hold, held = threading.Event(), threading.Event()

    def work() -> None:
        held.set()
        hold.wait(10)

    first = door.gate.passwords.queue(work)
    held.wait(10)
    names = (account.sync_id, account.login_email)
    waiting = [door.gate.queued(Credentials(name, PASSWORD), PEER, service=Service.SYNC) for name in names]
    with pytest.raises(Unavailable) as caught:
        door.gate.queued(Credentials(account.sync_id, "another"), PEER, service=Service.SYNC)
    assert (b"retry-after", b"5") in caught.value.headers
    with pytest.raises(Unavailable):
        door.log_in("nobody", PASSWORD)
    hold.set()
    first.result(10)
    assert [future.result(10).account_id for future in waiting] == [account.id] * 2
    assert door.log_in(account.sync_id, PASSWORD).account_id == account.id


def test_a_thousand_requests_with_one_secret_wait_for_one_verification(sqlite_door: Door) -> None:
    account = sqlite_door.account()
    door = sqlite_door.another_process(argon2_parallel=1, argon2_queue=3)
    hold, held = threading.Event(), threading.Event()

    def work() -> None:
        held.set()
        hold.wait(10)

    door.gate.passwords.queue(work)
    held.wait(10)
    right, wrong = Credentials(account.sync_id, PASSWORD), Credentials(account.sync_id, "wrong")
    waiting = [door.gate.queued(right, PEER, service=Service.SYNC) for _ in range(1000)]
    refused = [door.gate.queued(wrong, PEER, service=Service.SYNC) for _ in range(1000)]
    assert waiting[0].cancel()  # one that left takes nobody else with it
    hold.set()
    assert {future.result(10).account_id for future in waiting[1:]} == {account.id}
    for future in refused:
        with pytest.raises(NotAuthenticated):
            future.result(10)
    assert door.gate.queued(right, PEER, service=Service.SYNC).result(10).account_id == account.id


def test_a_hash_of_old_parameters_is_renewed_at_the_next_log_in(door: Door) -> None:
    account = door.account()
    new = door.another_process(argon2_time=2)
    assert new.log_in(account.sync_id, PASSWORD).account_id == account.id
    new.gate.flush()
    with door.database.read() as tx:
        renewed = accounts.by_id(tx, account.id)
    assert renewed.password_hash is not None
    assert ",t=2," in renewed.password_hash
    assert renewed.auth_epoch == account.auth_epoch
    assert new.is_quick(account.sync_id, PASSWORD)
    assert door.another_process().log_in(account.sync_id, PASSWORD).account_id == account.id


def test_remembered_log_ins_expire_and_can_be_switched_off(sqlite_door: Door) -> None:
    account = sqlite_door.account()
    for off in (sqlite_door.another_process(cache_entries=0), sqlite_door.another_process(cache_s=0.0)):
        off.log_in(account.sync_id, PASSWORD)
        assert not off.is_quick(account.sync_id, PASSWORD)


# -- what is noted --------------------------------------------------------------------------------


def _app_password(door: Door, account: Account) -> dict[str, object]:
    door.gate.flush()
    with door.database.read() as tx:
        return directory.app_passwords(tx, account)[0]


def test_the_last_use_says_when_where_and_what_and_is_written_once_a_minute(door: Door) -> None:
    account = door.account()
    _, secret = door.app_password(account)
    assert _app_password(door, account)["last_used_at"] is None
    for number in range(3):
        peer = Peer(f"192.0.2.{number}", True, "x" * 1000)
        door.gate.identify(Credentials(account.sync_id, secret), peer, service=Service.CALDAV)
    row = _app_password(door, account)
    assert isinstance(row["last_used_at"], int)
    assert (row["last_service"], row["last_address"], row["last_client"]) == (
        "caldav",
        "192.0.2.0",
        "x" * 200,
    )


def test_a_later_use_is_written_again(door: Door) -> None:
    account = door.account()
    _, secret = door.app_password(account)
    old = sa.update(t.app_password).values(last_used_at=1_000, last_address="192.0.2.1")
    door.write(lambda tx: tx.execute(old))
    door.log_in(account.sync_id, secret)
    row = _app_password(door, account)
    assert row["last_address"] == PEER.address
    assert isinstance(row["last_used_at"], int)
    assert row["last_used_at"] > 1_000


def test_a_refused_secret_was_not_used(door: Door) -> None:
    account, other = door.account(), door.account("bob")
    _, secret = door.app_password(account)
    with pytest.raises(NotAuthenticated):
        door.log_in(other.sync_id, secret)
    assert _app_password(door, account)["last_used_at"] is None


def test_an_application_password_opens_until_its_end_and_from_its_addresses(door: Door) -> None:
    account = door.account()
    end = int(time.time()) + 3600
    for addresses in (["192.0.2.7"], ["198.51.100.1", " 192.0.2.0/28 "], ["::/0", "0.0.0.0/0"]):
        _, secret = door.write(
            lambda tx, some=addresses: app_passwords.create(  # type: ignore[misc]
                tx, door.keys, account, "phone", expires_at=end, addresses=some
            )
        )
        assert door.log_in(account.sync_id, secret.shown).account_id == account.id
    with door.database.read() as tx:
        rows = directory.app_passwords(tx, account)
    assert [row["expires_at"] for row in rows] == [end] * 3
    assert rows[1]["addresses"] == ["192.0.2.0/28", "198.51.100.1/32"]


def test_an_application_password_that_could_never_open_anything_is_not_made(door: Door) -> None:
    account = door.account()
    for wrong in ({"expires_at": int(time.time())}, {"addresses": ["office"]}, {"addresses": [""]}):
        with pytest.raises(BadRequest):
            door.write(
                lambda tx, wrong=wrong: app_passwords.create(tx, door.keys, account, "phone", **wrong)  # type: ignore[misc]
            )
    with door.database.read() as tx:
        assert directory.app_passwords(tx, account) == []


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        ("2FA", "an application password is needed"),
        ("revoked", "revoked application password"),
        ("expired", "expired application password"),
        ("elsewhere", "an address that the application password is not for"),
        ("suspended", "the account is suspended"),
        ("another name", "the application password of another account"),
    ],
)
def test_the_owner_and_the_log_are_told_why_a_right_secret_was_refused(
    door: Door, cause: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    account = door.account()
    _, app = door.app_password(account)
    name, secret = account.sync_id, app
    if cause == "2FA":
        door.turn_on_second_factor(account)
        secret = PASSWORD
    elif cause == "revoked":
        door.write(lambda tx: app_passwords.revoke(tx, account))
    elif cause == "suspended":
        door.write(lambda tx: accounts.set_state(tx, account, "suspended"))
    elif cause == "expired":
        door.write(lambda tx: tx.execute(sa.update(t.app_password).values(expires_at=int(time.time()))))
    elif cause == "elsewhere":
        _, app = door.write(
            lambda tx: app_passwords.create(tx, door.keys, account, "office", addresses=["198.51.100.0/24"])
        )
        secret = app.shown
    else:
        name = "nobody@example.org"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with pytest.raises(NotAuthenticated):
                door.log_in(name, secret)
    door.gate.flush()
    with door.database.read() as tx:
        rows = [
            row for row in directory.audit(tx, subject=account.sync_id) if row["action"] == "log-in.refused"
        ]
    assert [row["detail"]["reason"] for row in rows] == [reason]
    assert (rows[0]["actor"], rows[0]["address"]) == (account.sync_id, PEER.address)
    assert [record.__dict__["reason"] for record in caplog.records] == [reason] * 3
    assert caplog.records[0].__dict__["address"] == PEER.address
    everything = repr([record.__dict__ for record in caplog.records]) + repr(rows)
    assert secret not in everything


@pytest.mark.parametrize("cause", ["2FA", "revoked", "expired"])
def test_the_owner_gets_one_email_for_each_reason_and_day(
    door: Door, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = door.account()
    _, secret = door.app_password(account)
    if cause == "2FA":
        door.turn_on_second_factor(account)
        secret = PASSWORD
    elif cause == "revoked":
        door.write(lambda tx: app_passwords.revoke(tx, account))
    else:
        door.write(lambda tx: tx.execute(sa.update(t.app_password).values(expires_at=1)))
    noon = 1_900_000_000 // 86_400 * 86_400 + 43_200
    clock, hours = [noon], [0.0]
    monkeypatch.setattr(time, "time", lambda: float(clock[0]))
    monkeypatch.setattr(time, "monotonic", lambda: hours[0])
    processes = [door, door.another_process()]

    def told() -> tuple[int, int]:
        """Rows in the audit, and e-mails that wait."""
        for process in processes:
            with pytest.raises(NotAuthenticated):
                process.log_in(account.sync_id, secret)
            process.gate.flush()
        key = sa.select(sa.func.count()).where(t.job.c.key.like(f"notice log-in.refused {account.sync_id}%"))
        rows = sa.select(sa.func.count()).where(t.audit.c.action == "log-in.refused")
        with door.database.read() as tx:
            return tx.execute(rows).scalar_one(), tx.execute(key).scalar_one()

    assert told() == (2, 1)
    assert told() == (2, 1), "once an hour in the audit of a process"
    clock[0], hours[0] = noon + 7200, 7200.0
    assert told() == (4, 1)
    clock[0], hours[0] = noon + 86_400, 86_400.0
    assert told() == (6, 2)


def test_a_wrong_password_leaves_nothing_in_the_audit(door: Door) -> None:
    account = door.account()
    with pytest.raises(NotAuthenticated):
        door.log_in(account.sync_id, "wrong")
    door.gate.flush()
    with door.database.read() as tx:
        assert [row["action"] for row in directory.audit(tx)] == ["account.create"]


def test_an_application_password_of_a_lost_key_set_is_refused_not_an_error(sqlite_door: Door) -> None:
    account = sqlite_door.account()
    _, secret = sqlite_door.app_password(account)
    sqlite_door.write(lambda tx: tx.execute(sa.update(t.app_password).values(key_id="k0")))
    with pytest.raises(NotAuthenticated):
        sqlite_door.log_in(account.sync_id, secret)


# -- may they: sections 2 and 5 -------------------------------------------------------------------

WEBDAV = {
    "ksuite-free": False,
    "ksuite-standard-1": False,
    "ksuite-standard": False,
    "ksuite-standard-2": False,
    "ksuite-business": True,
    "ksuite-pro": True,
    "ksuite-enterprise": True,
    "ksuite-entreprise": True,
    "my-ksuite": False,
    "my-ksuite-plus": False,
    "kdrive-solo": True,
    "kdrive-team": True,
    "kdrive-pro": True,
    "mail-starter": False,
    "mail-premium": False,
    "": False,
    "KSUITE-PRO": False,
    "ksuite-business ": False,
    "something-new": False,
}
HOME_NEEDS = {"caldav": {"caldav"}, "carddav": {"carddav"}, "sync": {"caldav", "carddav"}}


@pytest.fixture(scope="module")
def drives(module_door: Door, people: dict[tuple[str, str], Person]) -> dict[str, int]:
    """A drive of everybody under each offer."""
    members = [person.account for person in people.values()]
    return {offer: module_door.drive(offer, *members) for offer in WEBDAV}


def _outcome(ask: object) -> type[ClientError] | None:
    try:
        ask()  # type: ignore[operator]
    except ClientError as error:
        return type(error)
    return None


@pytest.mark.parametrize("verb", [*sorted(VERBS), "BREW", "get", "", "GET "])
def test_what_an_identity_may_do_is_what_the_table_says(
    module_door: Door, people: dict[tuple[str, str], Person], drives: dict[str, int], verb: str
) -> None:
    own = people["2FA on", "active"]
    foreign = people["2FA off", "active"].account.sync_id
    known = verb not in ("BREW", "get", "", "GET ")
    for scopes in SCOPES:
        identity = module_door.log_in(own.account.sync_id, own.scoped[scopes])
        assert identity.scopes == set(scopes)
        for offer, drive_id in drives.items():
            expected = None if "drive" in scopes and WEBDAV[offer] else Forbidden
            found = _outcome(lambda: module_door.enter(identity, drive_id, verb))  # noqa: B023
            assert found == (expected if known else NotImplementedHere), (scopes, offer)
        for service, needs in HOME_NEEDS.items():
            expected = None if needs & set(scopes) else Forbidden
            for owner in (own.account.sync_id, own.account.sync_id.lower()):
                found = _outcome(lambda: module_door.home(identity, Service(service), owner, verb))  # noqa: B023
                assert found == (expected if known else NotImplementedHere), (scopes, service)
            for owner in (foreign, "ZZ99999", "", "\0"):
                found = _outcome(lambda: module_door.home(identity, Service(service), owner, verb))  # noqa: B023
                assert found == (NotFound if known else NotImplementedHere), (scopes, service, owner)


def test_an_account_password_has_every_scope(
    module_door: Door, people: dict[tuple[str, str], Person], drives: dict[str, int]
) -> None:
    person = people["2FA off", "active"]
    identity = module_door.log_in(person.account.sync_id, PASSWORD)
    assert module_door.enter(identity, drives["kdrive-solo"]).account_id == person.account.id
    for service in ("caldav", "carddav", "sync"):
        grant = module_door.home(identity, Service(service), person.account.sync_id.lower())
        assert (grant.account_id, grant.sync_id) == (person.account.id, person.account.sync_id)


def test_the_drive_service_has_no_home(module_door: Door, people: dict[tuple[str, str], Person]) -> None:
    person = people["2FA off", "active"]
    identity = module_door.log_in(person.account.sync_id, PASSWORD)
    with pytest.raises(Forbidden):
        module_door.home(identity, Service.DRIVE, person.account.sync_id)


def test_a_drive_of_others_and_none_at_all_are_alike(door: Door) -> None:
    alice, bob = door.account(), door.account("bob")
    foreign = [door.drive(offer, bob) for offer in ("kdrive-solo", "my-ksuite", "unknown")]
    identity = door.log_in(alice.sync_id, PASSWORD)
    seen = set()
    for drive_id in (*foreign, 999_999, 0, -1):
        with pytest.raises(NotFound) as caught:
            door.enter(identity, drive_id)
        seen.add((str(caught.value), caught.value.headers, caught.value.precondition))
    assert len(seen) == 1


def test_it_takes_both_the_organization_and_the_drive_to_be_a_member(door: Door) -> None:
    alice, bob = door.account(), door.account("bob")
    drive_id = door.drive("kdrive-team", bob)
    with door.database.read() as tx:
        organization_id = directory.organizations(tx)[0]["id"]
    identity = door.log_in(alice.sync_id, PASSWORD)
    door.write(lambda tx: organizations.put_member(tx, organization_id, alice, "administrator"))
    with pytest.raises(NotFound):
        door.enter(identity, drive_id)
    door.write(lambda tx: organizations.add_drive_member(tx, drive_id, alice))
    assert door.enter(identity, drive_id).account_id == alice.id
    assert (
        door.enter(identity, drive_id).root_id
        != door.enter(door.log_in(bob.sync_id, PASSWORD), drive_id).root_id
    )
    door.write(lambda tx: organizations.remove_member(tx, organization_id, alice))
    with pytest.raises(NotFound):
        door.enter(identity, drive_id)


def test_the_refusal_names_the_offer_and_what_to_do(door: Door) -> None:
    alice = door.account()
    drive_id = door.drive("my-ksuite", alice)
    with pytest.raises(Forbidden) as caught:
        door.enter(door.log_in(alice.sync_id, PASSWORD), drive_id)
    assert "my-ksuite" in caught.value.text
    assert "kdrive-solo" in caught.value.text
    assert "my-ksuite-plus" not in caught.value.text


def test_the_refusal_of_a_scope_says_which_one_is_needed(door: Door) -> None:
    alice = door.account()
    drive_id = door.drive("kdrive-solo", alice)
    _, secret = door.app_password(alice, "caldav")
    identity = door.log_in(alice.sync_id, secret)
    with pytest.raises(Forbidden, match=r"is for caldav.*one for drive"):
        door.enter(identity, drive_id)
    with pytest.raises(Forbidden, match=r"is for caldav.*one for carddav"):
        door.home(identity, Service.CARDDAV, alice.sync_id)


def test_a_change_of_offer_or_membership_is_seen_by_the_next_request(door: Door) -> None:
    alice = door.account()
    drive_id = door.drive("kdrive-solo", alice)
    identity = door.log_in(alice.sync_id, PASSWORD)
    with door.database.read() as tx:
        product_id = directory.drives(tx)[0]["product_id"]
        organization_id = directory.organizations(tx)[0]["id"]
    first = door.enter(identity, drive_id)
    door.write(lambda tx: organizations.set_offer(tx, product_id, "my-ksuite"))
    with pytest.raises(Forbidden):
        door.enter(identity, drive_id)
    door.write(lambda tx: organizations.set_offer(tx, product_id, "ksuite-pro"))
    assert door.enter(identity, drive_id).offer == "ksuite-business"
    door.write(lambda tx: organizations.remove_drive_member(tx, drive_id, alice))
    with pytest.raises(NotFound):
        door.enter(identity, drive_id)
    door.write(lambda tx: organizations.add_drive_member(tx, drive_id, alice))
    back = door.enter(identity, drive_id)
    assert (back.root_id, back.trash_id) == (first.root_id, first.trash_id)
    door.write(lambda tx: organizations.remove_member(tx, organization_id, alice))
    with pytest.raises(NotFound):
        door.enter(identity, drive_id)
    door.write(lambda tx: organizations.put_member(tx, organization_id, alice, "external"))
    assert replace(door.enter(identity, drive_id), offer=first.offer, quota_bytes=first.quota_bytes) == first


def test_limits_are_the_drives_or_the_settings_or_the_offers(door: Door) -> None:
    alice = door.account()
    drive_id = door.drive("kdrive-solo", alice)
    identity = door.log_in(alice.sync_id, PASSWORD)
    limits = door.settings.drive
    plain = door.enter(identity, drive_id)
    assert (plain.max_file_bytes, plain.max_chunked_bytes) == (
        limits.max_file_bytes,
        limits.max_chunked_bytes,
    )
    assert (plain.quota_bytes, plain.used_bytes) == (2_000_000_000_000, 0)
    door.write(
        lambda tx: organizations.set_drive_limits(
            tx,
            drive_id,
            max_file_bytes=64,
            max_chunked_bytes=32,
            quota_bytes=0,
            chunked_ceiling_bytes=limits.chunked_ceiling_bytes,
        )
    )
    own = door.enter(identity, drive_id)
    assert (own.max_file_bytes, own.max_chunked_bytes, own.quota_bytes) == (64, 32, 0)


def test_drives_of_one_product_share_the_offers_storage(door: Door) -> None:
    alice = door.account()
    first = door.drive("kdrive-solo", alice)

    def sister(tx: Write) -> int:
        product_id = directory.drives(tx)[0]["product_id"]
        return organizations.create_drive(tx, product_id, "Second")

    second = door.write(sister)
    door.write(lambda tx: organizations.add_drive_member(tx, second, alice))
    door.write(lambda tx: tx.execute(sa.update(t.drive).where(t.drive.c.id == second).values(used_bytes=500)))
    identity = door.log_in(alice.sync_id, PASSWORD)
    grants = [door.enter(identity, each) for each in (first, second)]
    assert [grant.quota_bytes for grant in grants] == [2_000_000_000_000 - 500, 2_000_000_000_000]
    assert [grant.used_bytes for grant in grants] == [0, 500]


def test_a_secret_of_the_wrong_scope_is_a_right_log_in(door: Door) -> None:
    alice = door.account()
    _, secret = door.app_password(alice, "carddav")
    identity = door.log_in(alice.sync_id, secret, Service.DRIVE)
    assert identity == Identity(
        alice.id, alice.sync_id, alice.login_email, alice.display_name, frozenset({"carddav"}), 1
    )


def test_targets_of_another_type_are_refused(door: Door) -> None:
    alice = door.account()
    identity = door.log_in(alice.sync_id, PASSWORD)
    with door.database.read() as tx:
        with pytest.raises(NotFound):
            door.gate.authorize(tx, identity, DriveTarget(1), "GET")
        with pytest.raises(NotFound):
            door.gate.authorize(tx, identity, HomeTarget(Service.SYNC, "ZZ00000"), "GET")


def test_the_offers_of_the_table_are_those_of_the_file() -> None:
    table = offers.load(None)
    known = {name for name in WEBDAV if table.find(name)}
    assert {name: table.find(name).webdav for name in known} == {name: WEBDAV[name] for name in known}  # type: ignore[union-attr]
    assert set(WEBDAV) - known == {"", "KSUITE-PRO", "ksuite-business ", "something-new"}
