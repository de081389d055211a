from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksync_server.wire import contentline, vcard
from ksync_server.wire.vcard import BadCard, Card, CardLimits
from tests import costs

CARDDAV = "{urn:ietf:params:xml:ns:carddav}"

APPLE = """BEGIN:VCARD
VERSION:3.0
PRODID:-//Apple Inc.//iPhone OS 17.5//EN
N:Dupont;Jean;;;
FN:Jean Dupont 🎉
item1.ADR;type=HOME;type=pref:;;1\\, rue du Rhône;Genève;;1204;Suisse
item1.X-ABADR:ch
item2.TEL;type=CELL;type=VOICE:+41 79 000 00 00
item2.X-ABLabel:_$!<Mobile>!$_
item3.URL;type=pref:https\\://example.org/
NOTE:one\\ntwo\\; three
UID:5b3c-CARD
END:VCARD
"""

OLD = """BEGIN:VCARD
VERSION:2.1
N;CHARSET=UTF-8;ENCODING=QUOTED-PRINTABLE:M=C3=BCller;J=C3=B6rg
FN;CHARSET=ISO-8859-1;QUOTED-PRINTABLE:J=F6rg =
M=FCl=
ler
TEL;HOME;VOICE:022 000 00 00
UID:21
END:VCARD
"""

FOUR = """BEGIN:VCARD
VERSION:4.0
UID:urn:uuid:1
FN:Band
KIND:group
MEMBER:urn:uuid:2
END:VCARD
"""


def refused(data: bytes, limits: CardLimits | None = None) -> str | None:
    limits = limits or CardLimits()
    with pytest.raises(BadCard) as caught:
        vcard.check_card(vcard.parse(data, limits), limits)
    assert caught.value.text
    return caught.value.precondition


def card(lines: str = "VERSION:3.0\r\nUID:1\r\nFN:x\r\n") -> bytes:
    return f"BEGIN:VCARD\r\n{lines}END:VCARD\r\n".encode()


def test_an_apple_card_is_read_with_its_groups() -> None:
    found = vcard.check_card(vcard.parse(APPLE.encode()))
    assert (found.version, found.uid, found.fn, found.kind) == (
        "3.0",
        "5b3c-CARD",
        "Jean Dupont 🎉",
        "individual",
    )
    address = found.first("ADR")
    assert address is not None
    assert address.group == "item1"
    assert address.param_values("TYPE") == ("HOME", "pref")
    assert vcard.texts_of(address, ";") == ["", "", "1, rue du Rhône", "Genève", "", "1204", "Suisse"]
    assert vcard.values(found, "URL") == ["https://example.org/"]
    assert vcard.values(found, "NOTE") == ["one\ntwo; three"]
    assert [prop.group for prop in found.all("X-ABLABEL")] == ["item2"]


def test_a_card_of_version_21_is_read_with_quoted_printable_and_bare_types() -> None:
    found = vcard.check_card(vcard.parse(OLD.encode()))
    assert found.fn == "Jörg Müller"
    name = found.first("N")
    assert name is not None
    assert vcard.texts_of(name, ";") == ["Müller", "Jörg"]
    phone = found.first("TEL")
    assert phone is not None
    assert phone.param_values("TYPE") == ("HOME", "VOICE")


def test_a_value_that_only_ends_in_an_equals_sign_joins_nothing() -> None:
    found = vcard.parse(card("VERSION:3.0\r\nUID:1\r\nKEY;ENCODING=b:QUJD=\r\nFN:x\r\n"))
    assert vcard.values(found, "KEY") == ["QUJD="]
    assert found.fn == "x"


def test_an_unknown_charset_or_wrong_octets_still_give_a_text() -> None:
    lines = "VERSION:2.1\r\nUID:1\r\nFN;CHARSET=%s;ENCODING=QUOTED-PRINTABLE:=FFx\r\n"
    for charset in ("X-KLINGON", "UTF-8", "", "a" * 99, "undefined", "rot13", "idna"):
        assert "x" in vcard.parse(card(lines % charset)).fn


def test_control_characters_hidden_in_quoted_printable_do_not_reach_the_text() -> None:
    hidden = vcard.parse(card("VERSION:2.1\r\nUID:1\r\nFN;ENCODING=QUOTED-PRINTABLE:a=00=0B=EF=BF=BEb\r\n"))
    assert hidden.fn == "ab"


@pytest.mark.parametrize("line", ["KIND:group", "X-ADDRESSBOOKSERVER-KIND:group", "KIND:GROUP"])
def test_groups_of_both_kinds_are_known(line: str) -> None:
    assert vcard.parse(card(f"VERSION:3.0\r\nUID:1\r\nFN:x\r\n{line}\r\n")).kind == "group"
    assert vcard.parse(FOUR.encode()).kind == "group"


@pytest.mark.spec("RFC 6352 §5.1")
@pytest.mark.parametrize(
    ("data", "precondition"),
    [
        (b"", "valid-address-data"),
        (b"BEGIN:VCARD\r\n", "valid-address-data"),
        (b"BEGIN:VCALENDAR\r\nEND:VCALENDAR\r\n", "valid-address-data"),
        (card()[:-12], "valid-address-data"),
        (card() + card(), "valid-address-data"),
        (card() + b"X:1\r\n", "valid-address-data"),
        (card("VERSION:3.0\r\nFN:x\r\n"), "valid-address-data"),
        (card("VERSION:3.0\r\nUID:\r\nFN:x\r\n"), "valid-address-data"),
        (card("VERSION:3.0\r\nUID:1\r\nUID:2\r\n"), "valid-address-data"),
        (card("VERSION:3.0\r\nUID:1\\n2\r\n"), "valid-address-data"),
        (card("VERSION:3.0\r\nUID:" + "1" * 1001 + "\r\n"), "valid-address-data"),
        (card("UID:1\r\nFN:x\r\n"), "valid-address-data"),
        (card("VERSION:5.0\r\nUID:1\r\n"), "supported-address-data"),
        (card("VERSION:3.0\r\nUID:1\r\nFN:a\x0bb\r\n"), "valid-address-data"),
        (card("VERSION:3.0\r\nUID:1\r\nFN:\ufffe\r\n"), "valid-address-data"),
        (card().replace(b"FN:x", b"FN:\xff"), "valid-address-data"),
        (card("X" + ";a" * 200_000 + ":\r\n"), "valid-address-data"),
    ],
)
def test_what_is_not_one_card_with_a_uid_is_refused(data: bytes, precondition: str) -> None:
    assert refused(data) == CARDDAV + precondition


def test_a_card_over_a_limit_of_size_is_refused_and_at_it_is_read() -> None:
    assert refused(card(), CardLimits(max_bytes=len(card()) - 1)) == CARDDAV + "max-resource-size"
    assert refused(card(), CardLimits(max_properties=4)) == CARDDAV + "max-resource-size"
    assert vcard.parse(card(), CardLimits(max_bytes=len(card()), max_properties=5)).uid == "1"


def test_a_card_without_a_name_is_let_pass() -> None:
    found = vcard.check_card(vcard.parse(card("VERSION:3.0\r\nUID:1\r\nEMAIL:a@example.org\r\n")))
    assert found.fn == ""


@pytest.mark.spec("RFC 6352 §10.4.2")
def test_partial_data_gives_the_asked_properties_of_every_group_and_the_version() -> None:
    asked = {"FN": False, "ADR": True, "X-ABADR": False}
    assert vcard.select(vcard.parse(APPLE.encode()), asked) == (
        "BEGIN:VCARD\r\nVERSION:3.0\r\nFN:Jean Dupont 🎉\r\n"
        "item1.ADR;type=HOME;type=pref:\r\nitem1.X-ABADR:ch\r\nEND:VCARD\r\n"
    )


def test_version_keeps_its_value_even_when_asked_without() -> None:
    assert "VERSION:3.0" in vcard.select(vcard.parse(APPLE.encode()), {"VERSION": True})


@pytest.mark.parametrize("text", [APPLE, OLD, FOUR])
def test_a_written_card_is_read_back_alike(text: str) -> None:
    found = vcard.parse(text.encode())
    again = vcard.parse(vcard.serialise(found).encode())
    assert (again.uid, again.fn, again.kind, again.version) == (
        found.uid,
        found.fn,
        found.kind,
        found.version,
    )


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"))


@given(texts, texts, st.sampled_from(["", "item1", "g-2"]))
def test_what_is_written_is_read_back_and_folded_at_75_octets(text: str, label: str, group: str) -> None:
    escaped = contentline.escape(text)
    note = contentline.make_property("NOTE", escaped, (("X-LABEL", (label,)),), group=group)
    written = vcard.serialise(Card((note,), "3.0", None, "", "individual"))
    assert all(len(line.encode()) <= 75 for line in written.split("\r\n"))
    found = vcard.parse(written.encode()).first("NOTE")
    assert found is not None
    assert (vcard.text_of(found), found.param("X-LABEL"), found.group) == (text, label, group)


@given(st.binary(max_size=300))
def test_garbage_is_refused_and_nothing_else(data: bytes) -> None:
    _only_bad_card(lambda: data)
    _only_bad_card(lambda: b"BEGIN:VCARD\r\nVERSION:2.1\r\nUID:1\r\n" + data + b"\r\nEND:VCARD\r\n")


@given(st.sampled_from([APPLE, OLD, FOUR]), st.integers(0, 400), st.binary(max_size=2))
def test_one_changed_byte_is_read_or_refused(text: str, at: int, instead: bytes) -> None:
    data = text.encode()
    at %= len(data)
    _only_bad_card(lambda: data[:at] + instead + data[at + 1 :])


def _only_bad_card(build: Callable[[], bytes]) -> None:
    try:
        found = vcard.check_card(vcard.parse(build()))
    except BadCard:
        return
    for prop in found.properties:
        vcard.texts_of(prop)
    assert vcard.select(found, {"FN": True})
    assert vcard.check_card(vcard.parse(vcard.serialise(found).encode())).uid == found.uid


@pytest.mark.parametrize(
    "line",
    [
        b"PHOTO;ENCODING=b:" + b"QUJD" * 400_000,
        b"FN;ENCODING=QUOTED-PRINTABLE:" + b"=\r\n" * 9_000,
        b"FN;ENCODING=QUOTED-PRINTABLE:" + b"=" * 1_000_000,
        b"." * 1_000_000 + b":",
        b"a" * 1_000_000 + b".b:",
    ],
)
def test_a_megabyte_of_malice_in_one_line_stays_linear(line: bytes) -> None:
    def read() -> None:
        found = vcard.parse(b"BEGIN:VCARD\r\nVERSION:2.1\r\n" + line + b"\r\nFN:x\r\nEND:VCARD\r\n")
        assert [vcard.text_of(prop) for prop in found.properties]

    costs.within(1, read)
