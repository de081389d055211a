"""Time-based codes are used once, recovery codes too, and nothing of both can be read from the rows."""

from __future__ import annotations

import pyotp
import pytest
import sqlalchemy as sa

from ksync_server.auth import accounts, directory, keys, organizations, secondfactor
from ksync_server.auth.accounts import Account
from ksync_server.errors import BadRequest, ConfigError, Conflict, Forbidden, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Write
from tests.auth.harness import Door

NOW = 1_700_000_010.0  # 0 s into a time step


def enrol(door: Door, account: Account) -> secondfactor.Enrolment:
    return door.write(lambda tx: secondfactor.enrol_totp(tx, door.keys, account, "phone", "ksync"))


def confirm(door: Door, account: Account, code: str, now: float = NOW, window: int = 1) -> tuple[str, ...]:
    return door.write(
        lambda tx: secondfactor.confirm(tx, door.keys, account, code, window_steps=window, now=now)
    )


def verify(door: Door, account: Account, code: str, now: float = NOW, window: int = 1) -> bool:
    return door.write(
        lambda tx: secondfactor.verify_totp(tx, door.keys, account, code, window_steps=window, now=now)
    )


def code_at(secret: str, now: float) -> str:
    return str(pyotp.TOTP(secret).at(int(now)))


def is_on(door: Door, account: Account) -> bool:
    with door.database.read() as tx:
        return accounts.by_id(tx, account.id).second_factor


@pytest.mark.spec("RFC 6238 §B")
@pytest.mark.parametrize(
    ("at", "code"), [(59, "287082"), (1_111_111_109, "081804"), (20_000_000_000, "353130")]
)
def test_codes_are_those_of_the_standard(at: int, code: str) -> None:
    secret = "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ"
    assert secondfactor._step_of(secret, code, at, 0, after=0) == at // 30


def test_a_factor_counts_after_one_valid_code_and_the_epoch_rises(door: Door) -> None:
    account = door.account()
    made = enrol(door, account)
    assert not is_on(door, account)
    for wrong in ("000000", "", "12345", "1234567", "١٢٣٤٥٦", code_at(made.secret, NOW + 90)):
        with pytest.raises(Forbidden):
            confirm(door, account, wrong)
    assert not is_on(door, account)
    codes = confirm(door, account, code_at(made.secret, NOW))
    assert is_on(door, account)
    assert len(codes) == 10
    with door.database.read() as tx:
        assert accounts.by_id(tx, account.id).auth_epoch == account.auth_epoch + 1


@pytest.mark.spec("RFC 6238 §5.2")
def test_a_time_step_is_never_accepted_again(door: Door) -> None:
    account = door.account()
    made = enrol(door, account)
    confirm(door, account, code_at(made.secret, NOW))
    assert not verify(door, account, code_at(made.secret, NOW)), "the code that confirmed"
    assert not verify(door, account, code_at(made.secret, NOW - 30)), "an older one"
    spaced = code_at(made.secret, NOW + 30)
    assert verify(door, account, f" {spaced[:3]} {spaced[3:]} ", NOW + 30)
    assert not verify(door, account, spaced, NOW + 30)
    assert not verify(door, account, spaced, NOW + 45)
    assert verify(door, account, code_at(made.secret, NOW + 60), NOW + 60)


@pytest.mark.spec("RFC 6238 §6")
@pytest.mark.parametrize(("window", "accepted"), [(0, {0}), (1, {-1, 0, 1}), (2, {-2, -1, 0, 1, 2})])
def test_the_window_is_the_settings(sqlite_door: Door, window: int, accepted: set[int]) -> None:
    for step in range(-3, 4):
        account = sqlite_door.account(f"p{step + 3}.{window}")
        made = enrol(sqlite_door, account)
        code = code_at(made.secret, NOW + 30 * step)
        if step in accepted:
            assert confirm(sqlite_door, account, code, window=window)
        else:
            with pytest.raises(Forbidden):
                confirm(sqlite_door, account, code, window=window)


def test_several_factors_work_at_once_and_only_the_first_brings_codes(door: Door) -> None:
    account = door.account()
    first = enrol(door, account)
    assert len(confirm(door, account, code_at(first.secret, NOW))) == 10
    second = enrol(door, account)
    assert confirm(door, account, code_at(second.secret, NOW)) == ()
    assert verify(door, account, code_at(first.secret, NOW + 30), NOW + 30)
    assert verify(door, account, code_at(second.secret, NOW + 30), NOW + 30)


def test_turning_off_and_on_issues_a_new_secret(door: Door) -> None:
    account = door.account()
    first = enrol(door, account)
    confirm(door, account, code_at(first.secret, NOW))
    door.write(lambda tx: secondfactor.remove(tx, account, None, reason="lost phone"))
    assert not is_on(door, account)
    second = enrol(door, account)
    assert second.secret != first.secret
    with pytest.raises(Forbidden):
        confirm(door, account, code_at(first.secret, NOW))


def test_an_abandoned_enrolment_is_void(door: Door) -> None:
    account = door.account()
    first, second = enrol(door, account), enrol(door, account)
    with pytest.raises(Forbidden):
        confirm(door, account, code_at(first.secret, NOW))
    confirm(door, account, code_at(second.secret, NOW))
    with pytest.raises(NotFound):
        confirm(door, account, code_at(second.secret, NOW + 30), NOW + 30)


def test_the_enrolment_is_an_otpauth_uri_and_a_qr_code(door: Door) -> None:
    made = enrol(door, door.account())
    assert len(made.secret) == 32, "160 bits in base32"
    assert made.uri == f"otpauth://totp/ksync:alice%40example.org?secret={made.secret}&issuer=ksync"
    assert made.qr_svg().startswith("<svg")
    assert "█" in made.qr_text()


def test_secrets_cannot_be_read_from_the_rows(door: Door) -> None:
    account = door.account()
    made = enrol(door, account)
    codes = confirm(door, account, code_at(made.secret, NOW))
    with door.database.read() as tx:
        stored = [bytes(row[0]) for row in tx.execute(sa.select(t.second_factor.c.secret))]
        digests = [bytes(row[0]) for row in tx.execute(sa.select(t.recovery_code.c.digest))]
        audit = repr(directory.audit(tx))
    assert all(made.secret.encode() not in each for each in stored)
    assert len(set(digests)) == 10
    for code in codes:
        assert code not in audit
        assert code.replace("-", "").encode() not in b"".join(digests)
    assert made.secret not in audit


def use(door: Door, account: Account, code: str) -> bool:
    return door.write(lambda tx: secondfactor.use_recovery_code(tx, door.keys, account, code))


def test_each_recovery_code_is_good_once(door: Door) -> None:
    account = door.account()
    made = enrol(door, account)
    codes = confirm(door, account, code_at(made.secret, NOW))
    assert len(set(codes)) == 10
    assert all(len(code.replace("-", "")) * 5 >= 64 for code in codes)
    for code in codes:
        assert use(door, account, f" {code.upper().replace('-', ' ')}")
        assert not use(door, account, code)
    with door.database.read() as tx:
        assert directory.recovery_codes_left(tx, account) == 0


def test_a_recovery_code_belongs_to_one_account(door: Door) -> None:
    alice, bob = door.account(), door.account("bob")
    made = enrol(door, alice)
    codes = confirm(door, alice, code_at(made.secret, NOW))
    assert not use(door, bob, codes[0])
    assert not use(door, alice, "")
    assert not use(door, alice, codes[0][:-1])
    assert use(door, alice, codes[0])


def test_a_new_set_kills_the_old(door: Door) -> None:
    account = door.account()
    with pytest.raises(Conflict):
        door.write(lambda tx: secondfactor.renew_recovery_codes(tx, door.keys, account))
    made = enrol(door, account)
    old = confirm(door, account, code_at(made.secret, NOW))
    new = door.write(lambda tx: secondfactor.renew_recovery_codes(tx, door.keys, account))
    assert len(new) == 10
    assert not use(door, account, old[0])
    assert use(door, account, new[0])


def test_an_operators_removal_needs_a_reason_and_leaves_it_in_the_audit(door: Door) -> None:
    account = door.account()
    door.turn_on_second_factor(account)
    for reason in ("", "    ", "x"):
        with pytest.raises(BadRequest):
            door.write(lambda tx, reason=reason: secondfactor.remove(tx, account, None, reason=reason))  # type: ignore[misc]
    assert is_on(door, account)
    door.write(lambda tx: secondfactor.remove(tx, account, None, reason="lost phone, identity checked"))
    with door.database.read() as tx:
        last = directory.audit(tx, subject=account.sync_id)[0]
        assert directory.recovery_codes_left(tx, account) == 0
    assert (last["actor"], last["action"]) == ("operator", "second-factor.remove")
    assert last["detail"]["reason"] == "lost phone, identity checked"
    with pytest.raises(NotFound):
        door.write(lambda tx: secondfactor.remove(tx, account, None, reason="lost phone"))


def test_the_last_factor_stays_while_an_organization_requires_one(door: Door) -> None:
    account = door.account()
    door.turn_on_second_factor(account)

    def join(tx: Write) -> None:
        number = organizations.create_organization(tx, "Example")
        organizations.put_member(tx, number, account, "collaborator")
        tx.execute(sa.update(t.organization).values(requires_second_factor=True))

    door.write(join)
    with pytest.raises(Conflict):
        door.write(lambda tx: secondfactor.remove(tx, account, None, reason="lost phone"))
    assert is_on(door, account)
    with door.database.read() as tx:
        old = directory.second_factors(tx, account)[0]["id"]
    door.turn_on_second_factor(account)
    door.write(lambda tx: secondfactor.remove(tx, account, old, reason="lost phone"))
    assert is_on(door, account)


def test_another_key_file_opens_nothing(sqlite_door: Door) -> None:
    account = sqlite_door.account()
    made = enrol(sqlite_door, account)
    other = keys.load(sqlite_door.settings.auth.key_file.with_name("other.toml"))
    with pytest.raises(ConfigError):
        sqlite_door.write(
            lambda tx: secondfactor.confirm(
                tx, other, account, code_at(made.secret, NOW), window_steps=1, now=NOW
            )
        )


# -- what removing takes, and what else there is --------------------------------------------------


@pytest.mark.parametrize(
    ("password", "second", "own", "allowed"),
    [
        (True, True, True, True),
        (True, False, True, False),
        (False, True, True, False),
        (False, False, True, False),
        (True, True, False, False),
    ],
)
def test_removing_ones_own_takes_the_password_and_a_log_in_that_passed_the_second_factor(
    sqlite_door: Door, password: bool, second: bool, own: bool, allowed: bool
) -> None:
    door = sqlite_door
    account, bob = door.account(), door.account("bob")
    door.turn_on_second_factor(account)
    proven = secondfactor.Proven(account.id if own else bob.id, password=password, second_factor=second)

    def act() -> None:
        door.write(lambda tx: secondfactor.remove_own(tx, account, None, proven, address="192.0.2.1"))

    if not allowed:
        with pytest.raises(Forbidden):
            act()
        assert is_on(door, account)
        return
    act()
    assert not is_on(door, account)
    with door.database.read() as tx:
        last = directory.notices(tx, account, limit=1)[0]
    assert (last["action"], last["actor"], last["address"]) == (
        "second-factor.remove",
        account.sync_id,
        "192.0.2.1",
    )
    assert "reason" not in last["detail"]


def test_an_operators_removal_is_told_at_both_addresses_with_the_reason(door: Door) -> None:
    account = door.account()
    door.write(lambda tx: accounts.set_recovery(tx, account, email="a@example.net"))
    door.turn_on_second_factor(account)
    door.turn_on_second_factor(account)
    with door.database.read() as tx:
        first = directory.second_factors(tx, account)[0]["id"]
    door.write(lambda tx: secondfactor.remove(tx, account, first, reason="lost phone"))
    assert is_on(door, account)
    with door.database.read() as tx:
        last = directory.notices(tx, account, limit=1)[0]
    assert last["detail"] == {
        "id": first,
        "names": ["app"],
        "still_on": True,
        "reason": "lost phone",
        "told": ["alice@example.org", "a@example.net"],
    }


def test_the_log_in_offers_every_other_method_and_last_of_all_help(door: Door) -> None:
    account = door.account()

    def kinds() -> list[tuple[str, str]]:
        with door.database.read() as tx:
            return [(each.kind, each.name) for each in secondfactor.alternatives(tx, account)]

    assert kinds() == [("help", "")]
    enrol(door, account)
    assert kinds() == [("help", "")], "a factor that was never confirmed is none"
    made = enrol(door, account)
    codes = confirm(door, account, code_at(made.secret, NOW))
    second = door.write(lambda tx: secondfactor.enrol_totp(tx, door.keys, account, "tablet", "ksync"))
    confirm(door, account, code_at(second.secret, NOW))
    assert kinds() == [("totp", "phone"), ("totp", "tablet"), ("recovery-code", ""), ("help", "")]
    for code in codes:
        assert use(door, account, code)
    assert kinds() == [("totp", "phone"), ("totp", "tablet"), ("help", "")]


def test_a_used_recovery_code_is_told_with_how_many_are_left(door: Door) -> None:
    account = door.account()
    made = enrol(door, account)
    codes = confirm(door, account, code_at(made.secret, NOW))
    for left in (9, 8):
        assert use(door, account, codes[left])
        with door.database.read() as tx:
            last = directory.notices(tx, account, limit=1)[0]
        assert (last["action"], last["detail"]) == ("second-factor.recovery-code-used", {"left": left})


def test_a_code_with_leading_zeros_works(door: Door) -> None:
    account = door.account()
    made = enrol(door, account)
    confirm(door, account, code_at(made.secret, NOW))
    at = NOW + 60
    while not (code := code_at(made.secret, at)).startswith("0"):
        at += 30
    assert not verify(door, account, code.lstrip("0"), at)
    assert verify(door, account, code, at)


def test_the_removed_factors_codes_open_nothing_after_it_is_on_again(door: Door) -> None:
    account = door.account()
    first = enrol(door, account)
    old = confirm(door, account, code_at(first.secret, NOW))
    door.write(lambda tx: secondfactor.remove(tx, account, None, reason="new phone"))
    second = enrol(door, account)
    new = confirm(door, account, code_at(second.secret, NOW))
    assert not verify(door, account, code_at(first.secret, NOW + 30), NOW + 30)
    assert verify(door, account, code_at(second.secret, NOW + 30), NOW + 30)
    assert not use(door, account, old[0])
    assert use(door, account, new[0])
