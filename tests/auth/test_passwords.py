"""Application passwords as people type them, and account passwords as people choose them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksync_server import settings
from ksync_server.auth import passwords
from ksync_server.auth.passwords import LENGTH, AccountPasswords, app_password_letters, parse_app_password
from ksync_server.auth.rules import Secret
from ksync_server.errors import BadRequest

LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"
bodies = st.text(LETTERS, min_size=LENGTH - 3, max_size=LENGTH - 3)


KINDS = st.sampled_from([Secret.APP_PASSWORD, Secret.DEVICE_PASSWORD])


def whole(body: str, kind: Secret = Secret.APP_PASSWORD) -> str:
    return body + passwords._check_letters(body, kind)


def test_a_new_one_is_read_back_from_what_is_shown() -> None:
    for _ in range(100):
        made = passwords.new_app_password()
        assert parse_app_password(app_password_letters(made.shown) or "") == made
        assert made.shown.count("-") == 8
        assert {len(group) for group in made.shown.split("-")} == {4}


def test_it_holds_at_least_128_random_bits_beside_its_id() -> None:
    made = passwords.new_app_password()
    assert 5 * (LENGTH - len(made.lookup) - 3) >= 128
    many = [passwords.new_app_password() for _ in range(500)]
    assert len({each.lookup for each in many}) == len({each.secret[6:] for each in many}) == 500
    assert {letter for each in many for letter in each.secret} == set(LETTERS)


@given(bodies, st.data())
def test_case_separators_and_look_alikes_do_not_matter(body: str, data: st.DataObject) -> None:
    text = whole(body)
    typed = "".join(
        data.draw(st.sampled_from(["", "", "-", " ", "\u2011", "\u00a0", "\t"]))
        + data.draw(
            st.sampled_from(sorted({letter, letter.upper(), *{"0": "oO", "1": "iIlL"}.get(letter, "")}))
        )
        for letter in text
    )
    assert app_password_letters(typed) == text
    assert parse_app_password(text) is not None


@given(bodies, KINDS)
def test_a_secret_is_of_one_kind_only(body: str, kind: Secret) -> None:
    found = parse_app_password(whole(body, kind))
    assert found is not None
    assert found.kind is kind
    made = passwords.new_app_password(kind)
    assert parse_app_password(made.secret) == made


@given(bodies, st.integers(0, LENGTH - 1), st.sampled_from(LETTERS), KINDS)
def test_any_single_wrong_letter_is_found(body: str, at: int, letter: str, kind: Secret) -> None:
    text = whole(body, kind)
    wrong = text[:at] + letter + text[at + 1 :]
    assert (parse_app_password(wrong) is None) == (wrong != text)


@given(bodies, st.integers(0, LENGTH - 5), KINDS)
def test_exchanged_neighbours_are_found(body: str, at: int, kind: Secret) -> None:
    text = whole(body, kind)
    wrong = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    assert (parse_app_password(wrong) is None) == (wrong != text)


@given(st.text(max_size=200))
def test_anything_may_be_typed(typed: str) -> None:
    letters = app_password_letters(typed)
    assert letters is None or (len(letters) == LENGTH and set(letters) <= set(LETTERS))


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "short",
        "0" * (LENGTH - 1),
        "0" * (LENGTH + 1),
        "u" * LENGTH,
        "٣" * LENGTH,
        "0" * 35 + "\0",
        " " * 10_000,
    ],
)
def test_text_of_another_shape_is_none(typed: str) -> None:
    assert app_password_letters(typed) is None


# -- account passwords ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept() -> AccountPasswords:
    return AccountPasswords(settings.Auth(argon2_memory_kib=8, argon2_time=1))


@pytest.mark.spec("OWASP ASVS 5.0 §6.2")
@pytest.mark.parametrize(
    "password",
    [
        "12345678",
        "Password1",
        "QWERTZUI1"[:7],
        "aaaaaaaaaaaa",
        "abababababab",
        "é" * 7,
        "x" * 1025,
        "iloveyou",
    ],
)
def test_short_common_and_endless_passwords_are_refused(kept: AccountPasswords, password: str) -> None:
    with pytest.raises(BadRequest):
        kept.check_new(password)


@pytest.mark.spec("OWASP ASVS 5.0 §6.2")
@pytest.mark.parametrize(
    "password",
    [
        "pässwörd",
        "correct horse battery",
        " leading and trailing ",
        "k" * 20 + "abc" * 200,
        "日本語のパスワード",
    ],
)
def test_any_other_text_may_be_chosen(kept: AccountPasswords, password: str) -> None:
    kept.check_new(password)


def test_an_account_password_cannot_look_like_an_application_password(kept: AccountPasswords) -> None:
    for password in (passwords.new_app_password().shown, "correct horse battery staple elephants it"):
        if app_password_letters(password):
            with pytest.raises(BadRequest, match="application password"):
                kept.check_new(password)
    assert app_password_letters(passwords.new_app_password().shown)


def test_a_password_is_compared_whole_and_as_it_is(kept: AccountPasswords) -> None:
    password = "Pässwörd " + "x" * 990
    stored = kept.hash(password)
    assert stored.startswith("$argon2id$")
    assert kept.verify(password, stored)
    for other in (
        password[:-1],
        password + " ",
        password.upper(),
        password.replace("ä", "a\u0308"),
        password[:72],
        "",
        "\ud800",
    ):
        assert not kept.verify(other, stored)
    assert not kept.verify("", None)
    assert not kept.verify(password, "not a hash")


def test_the_same_password_has_another_hash_each_time(kept: AccountPasswords) -> None:
    assert kept.hash("correct horse battery") != kept.hash("correct horse battery")


def test_the_defaults_are_those_of_owasp() -> None:
    plain = settings.Auth()
    stored = AccountPasswords(plain).hash("correct horse battery")
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")


def test_what_is_remembered_holds_for_one_account_password_and_epoch(kept: AccountPasswords) -> None:
    kept.remember(1, "one", 7, "192.0.2.1")
    assert kept.is_known(1, "one", 7, "192.0.2.1")
    assert not kept.is_known(2, "one", 7, "192.0.2.1")
    assert not kept.is_known(1, "two", 7, "192.0.2.1")
    assert not kept.is_known(1, "one", 8, "192.0.2.1")


def test_a_password_is_known_elsewhere_too_unless_guesses_are_being_refused(kept: AccountPasswords) -> None:
    kept.remember(1, "one", 7, "192.0.2.1")
    assert not kept.is_known(1, "one", 7, "192.0.2.2", anywhere=False)
    assert kept.is_known(1, "one", 7, "192.0.2.2")
    assert kept.is_known(1, "one", 7, "192.0.2.2", anywhere=False), "it was used there since"


def test_addresses_are_compared_as_addresses() -> None:
    kept = passwords.networks(["192.0.2.0/24", "2001:db8::/32", "192.0.2.0/24"])
    assert kept == "192.0.2.0/24 2001:db8::/32"
    for inside in ("192.0.2.255", "::ffff:192.0.2.1", "2001:DB8::1"):
        assert passwords.is_within(inside, kept), inside
    for outside in ("192.0.3.0", "2001:db9::1", "", "unknown"):
        assert not passwords.is_within(outside, kept), outside
