"""IMAP on the wire: however bytes are cut they mean the same; garbage is a bad request, nothing else."""

from __future__ import annotations

import contextlib
import itertools
import re
import string
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imapclient import imap_utf7
from imapclient.exceptions import ProtocolError
from imapclient.response_parser import parse_response

from ksync_server.errors import BadRequest
from ksync_server.wire import imap
from ksync_server.wire.imap import (
    Body,
    Command,
    Continue,
    Data,
    Event,
    Fetched,
    Framer,
    Literal,
    LiteralData,
    LiteralStart,
    Status,
    Text,
    Value,
)
from tests import costs

# -- lines and literals ---------------------------------------------------------------------------


def framed(chunks: Iterable[bytes], **limits: int) -> tuple[list[object], bool]:
    """What a framer says of a stream, a literal's bytes in one piece; and whether it took all of it."""
    framer, found = Framer(**limits), list[object]()
    try:
        for chunk in chunks:
            for event in framer.feed(chunk):
                _add(found, event)
    except BadRequest:
        return found, False
    return found, True


def _add(found: list[object], event: Event) -> None:
    if not isinstance(event, LiteralData):
        found.append(event)
    elif isinstance(found[-1], bytes):
        found[-1] += bytes(event.data)
    else:
        found.append(bytes(event.data))


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    at = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(at)]


streams = st.lists(
    st.one_of(
        st.binary(max_size=12),
        st.sampled_from([b"\r\n", b"\n", b"\r", b"{3}\r\nabc", b"{0}\r\n", b"~{2+}\r\n\0\0", b"{4-}\r\n"]),
        st.sampled_from([b"{99999999999999999999}\r\n", b"{5}", b"{-1}\r\n", b"a b", b'"', b"(", b")"]),
    ),
    max_size=12,
).map(b"".join)


@given(streams, st.lists(st.integers(0, 500), max_size=6))
def test_a_stream_means_the_same_however_it_is_cut(data: bytes, places: list[int]) -> None:
    limits = {"line_bytes": 20, "literals": 3}
    whole = framed([data], **limits)
    assert framed((data[at : at + 1] for at in range(len(data))), **limits) == whole
    assert framed(cut(data, places), **limits) == whole


def test_literals_are_announced_and_their_bytes_are_not_copied() -> None:
    data = b"* 1 FETCH (BODY[] {5}\r\nab\r\nc FLAGS ~{0+}\r\n)\r\nnext\r\n"
    assert framed([data]) == (
        [
            Text(b"* 1 FETCH (BODY[] ", False),
            LiteralStart(5, True),
            b"ab\r\nc",
            Text(b" FLAGS ", False),
            LiteralStart(0, False, True),
            Text(b")", True),
            Text(b"next", True),
        ],
        True,
    )
    pieces = [each.data for each in Framer().feed(data) if isinstance(each, LiteralData)]
    assert [piece.obj for piece in pieces] == [data]


@pytest.mark.parametrize(
    "data", [b"x" * 21, b"x" * 21 + b"\r\n", b"x" * 15 + b"{1}\r\nyyyyyy\r\n", b"{1}\r\na" * 4]
)
def test_a_line_has_a_longest_length_and_so_many_literals(data: bytes) -> None:
    assert framed([data], line_bytes=20, literals=3)[1] is False
    for chunks in ([b"x" * 20 + b"\r\n"], [b"x" * 20 + b"\r", b"\n"]):
        assert framed(chunks, line_bytes=20)[1] is True


def test_a_framer_knows_whether_it_is_between_lines() -> None:
    framer = Framer()
    assert framer.is_between_lines
    for data, between in (
        (b"a", False),
        (b"\r\n", True),
        (b"{3}\r\n", False),
        (b"abc", False),
        (b"\r\n", True),
    ):
        list(framer.feed(data))
        assert framer.is_between_lines is between


# -- values ---------------------------------------------------------------------------------------

_ATOM_MARKS = "".join(set(string.printable) - set('()"[] \t\n\r\x0b\x0c'))
atoms = st.text(st.sampled_from(_ATOM_MARKS + "é日"), min_size=1, max_size=8).filter(
    lambda text: text.upper() != "NIL"
)
sections = st.builds("{}[{}]".format, st.sampled_from(["BODY", "X"]), st.text('ABC. ()"', max_size=6))
trees: st.SearchStrategy[list[Value]] = st.recursive(
    st.lists(st.one_of(atoms, sections, st.binary(max_size=8), st.none()), max_size=4),
    lambda inner: st.lists(st.one_of(atoms, st.binary(max_size=8), st.none(), inner), max_size=4),
    max_leaves=12,
)


def written(found: list[Value], *, literal: Callable[[bytes], bool]) -> list[bytes | Literal]:
    """A line that says these values."""
    pieces: list[bytes | Literal] = [b""]

    def text(data: bytes) -> None:
        assert isinstance(pieces[-1], bytes)
        pieces[-1] += data

    def one(value: Value) -> None:
        if value is None:
            text(b"NIL")
        elif isinstance(value, str):
            text(value.encode("utf-8", "surrogateescape"))
        elif isinstance(value, list):
            text(b"(")
            several(value)
            text(b")")
        elif (quoted := imap.quoted(value)) is not None and not literal(value):
            text(quoted)
        else:
            pieces.extend([Literal(value), b""])

    def several(values: list[Value]) -> None:
        for place, each in enumerate(values):
            if place:
                text(b" ")
            one(each)

    several(found)
    return pieces


@given(trees, st.booleans())
def test_values_come_back_as_they_were_written(found: list[Value], literals: bool) -> None:
    assert imap.values(written(found, literal=lambda _: literals)) == found


@given(st.lists(st.one_of(st.binary(max_size=30).map(Literal), streams, st.binary(max_size=30)), min_size=1))
def test_garbage_is_a_bad_request_and_nothing_else(pieces: list[bytes | Literal]) -> None:
    line = [b"", *pieces] if isinstance(pieces[0], Literal) else pieces
    for read in (imap.values, imap.response, imap.command):
        with contextlib.suppress(BadRequest):
            read(line)


@pytest.mark.parametrize("prefix", [b"", b"* 1 FETCH ", b"* OK ", b"a1 "])
@pytest.mark.parametrize(
    "unit",
    [b"[", b'"', b'"\\', b"(", b")", b"{", b"\\", b"a[", b"[ ", b"[a]", b"(]", b" ", b"&-", b"UID 1 ", b"0"],
)
def test_a_megabyte_of_garbage_is_read_in_linear_time(prefix: bytes, unit: bytes) -> None:
    read = imap.command if prefix == b"a1 " else imap.response

    def read_both() -> None:
        for begin in (b"", b"(FLAGS ("):
            line = prefix + begin + unit * (1_000_000 // len(unit))
            with contextlib.suppress(BadRequest):
                read([line])
            with contextlib.suppress(BadRequest):
                list(imap.Answers(line_bytes=1 << 21).feed(line + b"\r\n"))

    costs.within(3, read_both)


def test_a_line_of_too_many_values_or_too_deep_is_a_bad_request() -> None:
    for line in (
        b"a " * 200_001,
        b"(" * 25 + b")" * 25,
        b"(",
        b")",
        b'"',
        b'"\\',
        b"a[",
        b"a\0",
        b"\x7f",
        b"[a",
    ):
        with pytest.raises(BadRequest):
            imap.values([line])
    assert imap.values([b"(" * 24 + b")" * 24])


def test_an_atom_a_string_and_nil_are_three_things() -> None:
    assert imap.values(
        [b'NIL nil "NIL" ', Literal(b"NIL"), b" NILS BODY[HEADER.FIELDS (A B)]<0> \\Seen"]
    ) == [
        None,
        None,
        b"NIL",
        b"NIL",
        "NILS",
        "BODY[HEADER.FIELDS (A B)]<0>",
        "\\Seen",
    ]


# -- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"+ idling", Continue("idling")),
        (b"+", Continue("")),
        (b"* OK hello", Status("", "OK", "", (), "hello")),
        (b"a1 ok", Status("a1", "OK", "", (), "")),
        (b"a1 NO [TryCreate] no such", Status("a1", "NO", "TRYCREATE", (), "no such")),
        (b"* OK [UIDVALIDITY 7] x", Status("", "OK", "UIDVALIDITY", ("7",), "x")),
        (b"* OK [PERMANENTFLAGS (\\Seen \\*)]", Status("", "OK", "PERMANENTFLAGS", (["\\Seen", "\\*"],), "")),
        (b"* BYE [x (] y", Status("", "BYE", "X", (), "y")),
        (b"k9 OK [APPENDUID 1 2:3] ", Status("k9", "OK", "APPENDUID", ("1", "2:3"), "")),
        (b"* PREAUTH [not closed", Status("", "PREAUTH", "", (), "[not closed")),
        (b"* 12 EXISTS", Data("EXISTS", 12, [])),
        (b"* search 1 2", Data("SEARCH", None, ["1", "2"])),
        (b'* LIST (\\Noselect) "/" ~', Data("LIST", None, [["\\Noselect"], b"/", "~"])),
        (b"* 3 fetch (uid 4)", Fetched(3, 4, others={})),
        (b"* 3 FETCH (UID 4 FLAGS (\\seen a) X 1)", Fetched(3, 4, ("\\Seen", "a"), others={"X": "1"})),
        (b"* 3 FETCH (FLAGS NIL RFC822.SIZE 9)", Fetched(3, flags=(), size=9, others={})),
    ],
)
def test_what_a_server_says(line: bytes, expected: object) -> None:
    assert imap.response([line]) == expected


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"OK", b"* ", b"*", b"* 1", b"* (a) b", b"a1 FETCH", b"* 1 FETCH (A)", b"* 1 FETCH (NIL 1)"),
        *(b"* 1 FETCH (UID NIL)", b"* 1 FETCH (INTERNALDATE NIL)", b"* 1 FETCH (RFC822.SIZE x)"),
        b"* 1 FETCH (FLAGS x)",
    ],
)
def test_what_no_server_says_is_a_bad_request(line: bytes) -> None:
    with pytest.raises(BadRequest):
        imap.response([line])


_ITEMS = (
    *(b"UID 5", b"UID 99999999999", b"UID", b"RFC822.SIZE 12", b"RFC822.SIZE 1234567890123456789012"),
    *(b"FLAGS ()", b"FLAGS (\\Seen $a)", b"FLAGS (NIL a)", b"FLAGS (nil)", b"FLAGS ([x] a])", b'FLAGS ("q")'),
    *(
        b"FLAGS (\xc3\xa9 {)",
        b"flags (a)",
        b'INTERNALDATE " 1-Jan-2020 00:00:00 +0000"',
        b'INTERNALDATE "\\""',
    ),
    *(b"INTERNALDATE NIL", b"BODY[] ", b"BODY[] NIL", b'BODY[] "x"', b"BODY[]", b"MODSEQ (1)", b"(", b")"),
)
fetches = st.builds(
    lambda inner, end: b"* 7 FETCH (" + b"".join(inner) + end,
    st.lists(st.sampled_from([*_ITEMS, *(item + b" " for item in _ITEMS)]), max_size=4),
    st.sampled_from([b")", b")", b"", b" )", b"))"]),
)


def answered(chunks: Iterable[bytes], *, bodies: bool) -> list[object]:
    """What a server says in a stream, bodies in one piece; its end is "garbage" where nothing is said."""
    answers, found = imap.Answers(line_bytes=2000), list[object]()
    answers.expects_bodies = bodies
    try:
        for chunk in chunks:
            for each in answers.feed(chunk):
                if not isinstance(each, memoryview):
                    found.append(each)
                elif isinstance(found[-1], bytes):
                    found[-1] += bytes(each)
                else:
                    found.append(bytes(each))
    except BadRequest:
        found.append("garbage")
    return [each._replace(others=dict(each.others)) if isinstance(each, Fetched) else each for each in found]


_lines = st.one_of(
    fetches.map(lambda line: line + b"\r\n"),
    st.sampled_from(
        [b"* 7 FETCH (UID 5 BODY[] ", b"* 7 FETCH (UID 9 FLAGS (a) BODY[] ", b"* 7 FETCH (BODY[]<4> "]
    ).flatmap(
        lambda head: st.sampled_from([b"{5}\r\n", b"{0}\r\n", b"{12}\r\n", b"{5}\n"]).map(head.__add__)
    ),
    st.sampled_from(
        [b")\r\n", b"* 7 FETCH (UID 5 {3}\r\n", b" FLAGS (a))\r\n", b" UID 6)\r\n", b"hello", b")\n"]
    ),
    st.sampled_from(
        [b"k1 OK\r\n", b"* 8 EXISTS\r\n", b"* LIST () NIL {5}\r\n", b"* 7 FETCH (UID 5)\n", b"\r\n"]
    ),
)


@settings(max_examples=1000)
@given(st.lists(_lines, max_size=6).map(b"".join), st.lists(st.integers(0, 500), max_size=6), st.booleans())
def test_the_short_way_for_plain_messages_agrees_with_the_long_one(
    data: bytes, places: list[int], bodies: bool
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(imap, "_PLAIN_FETCH", re.compile(rb"(?!)"))
        long = answered([data], bodies=bodies)
        assert answered(cut(data, places), bodies=bodies) == long
    assert answered([data], bodies=bodies) == long
    assert answered(cut(data, places), bodies=bodies) == long


def test_plain_messages_do_go_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imap, "response", lambda *_: pytest.fail("the long way"))
    date = b'INTERNALDATE "17-Jul-1996 02:44:25 -0700"'
    data = b"* 1 FETCH (UID 5 FLAGS (\\Seen $x) %s RFC822.SIZE 9)\r\n" % date
    data += b"* 1 FETCH (UID 5 BODY[] {3}\r\nabc)\r\n* 1 FETCH (FLAGS ())\r\n"
    received = datetime(1996, 7, 17, 2, 44, 25, tzinfo=timezone(timedelta(hours=-7)))
    assert answered([data], bodies=True) == [
        Fetched(1, 5, ("$x", "\\Seen"), received, 9, {}),
        Body(3, 5),
        b"abc",
        Fetched(1, 5, others={"BODY[]": None}),
        Fetched(1, None, (), others={}),
    ]


def test_bodies_that_nobody_asked_for_are_bounded() -> None:
    body = b"* 1 FETCH (UID 5 BODY[] {1500}\r\n" + b"x" * 1500 + b")\r\n"
    assert len(answered([body * 3], bodies=False)) == 3
    assert answered([body.replace(b"1500", b"2500")], bodies=False) == ["garbage"]
    assert answered([b"* 1 FETCH (A {1500}\r\n" + b"x" * 1500 + b" B {600}\r\n"], bodies=True) == ["garbage"]


_words = st.from_regex(r"[A-Za-z\\$][A-Za-z0-9.-]{0,6}", fullmatch=True).filter(
    lambda text: text.upper() != "NIL"
)
_simple = st.one_of(_words, st.integers(0, 999).map(str), st.binary(max_size=8), st.none())


@given(
    st.recursive(
        st.lists(_simple, max_size=4), lambda inner: st.lists(st.one_of(_simple, inner)), max_leaves=12
    )
)
def test_imapclient_reads_the_same(found: list[Value]) -> None:
    """It makes numbers of digits, and does not tell a string from an atom."""
    pieces: list[bytes | tuple[bytes, bytes]] = []
    text = b""
    for each in written(found, literal=lambda value: b"\\" in value or value.isdigit()):
        if isinstance(each, Literal):
            assert each.data is not None
            pieces.append((text + b"{%d}" % len(each.data), each.data))
            text = b""
        else:
            text += each
    try:
        other = parse_response([*pieces, text])
    except (ProtocolError, ValueError):
        return
    assert _plain(list(other)) == _plain(found)


def _plain(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    return int(data) if isinstance(data, bytes) and data.isdigit() else data


# -- commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"a1 NOOP"], Command("a1", "NOOP", [])),
        ([b"a.1 uid fetch 1:* (FLAGS)"], Command("a.1", "UID FETCH", ["1:*", ["FLAGS"]])),
        ([b'x LOGIN "a b" ', Literal(b"p\0"), b""], Command("x", "LOGIN", [b"a b", b"p\0"])),
        ([b"] SELECT INBOX"], Command("]", "SELECT", ["INBOX"])),
    ],
)
def test_what_a_client_says(pieces: list[bytes | Literal], expected: Command) -> None:
    assert imap.command(pieces) == expected


@pytest.mark.parametrize(
    "line",
    [b"", b"a1", b"+ NOOP", b"* NOOP", b"a1  NOOP", b" NOOP", b"a\0 NOOP", b"a1 9", b"a( NOOP", b"a1 UID"],
)
def test_what_no_client_says_is_a_bad_request(line: bytes) -> None:
    if line == b"a1 UID":
        assert imap.command([line]).name == "UID"
        return
    with pytest.raises(BadRequest):
        imap.command([line])


# -- parts ----------------------------------------------------------------------------------------


@given(st.one_of(st.binary(max_size=20), st.text(max_size=12).map(str.encode)))
def test_any_name_in_bytes_is_text_that_can_be_kept(data: bytes) -> None:
    for utf8 in (False, True):
        name = imap.decode_name(data, utf8=utf8)
        assert name.encode("utf-8").decode("utf-8") == name
    if data.isascii() and b"&" not in data and data.decode().isprintable():
        assert imap.encode_name(imap.decode_name(data)) == data


@given(st.lists(st.sampled_from([b"&", b"-", b"&-", b"AA", b"A", b"Jjo", b"2D3", b"3gA", b","]), max_size=6))
def test_what_is_no_modified_utf7_stays_as_it_is(parts: list[bytes]) -> None:
    data = b"".join(parts)
    name = imap.decode_name(data)
    assert name == data.decode() or imap.encode_name(name) == data


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_a_name_in_text_comes_back_from_bytes(name: str) -> None:
    assert imap.decode_name(imap.encode_name(name)) == name
    assert imap.encode_name(name) == imap_utf7.encode(name) or any(
        mark < " " or mark == "\x7f" for mark in name
    )
    assert imap.encode_name(name).isascii()
    assert imap.decode_name(imap.encode_name(name, utf8=True), utf8=True) == name


@pytest.mark.spec("RFC 3501 §5.1.3")
def test_names_of_the_standard() -> None:
    name = b"~peter/mail/&U,BTFw-/&ZeVnLIqe-"
    assert imap.decode_name(name) == "~peter/mail/台北/日本語"
    assert imap.encode_name("R&D") == b"R&-D"
    assert imap.decode_name(b"&Jjo!") == "&Jjo!"


@given(st.sets(st.integers(1, 300)), st.integers(1, 40))
def test_a_sequence_set_names_each_number_once(numbers: set[int], longest: int) -> None:
    sets = list(imap.sequence_set(numbers, longest=longest))
    assert [each for text in sets for each in imap.numbers(text)] == sorted(numbers)
    assert all(len(text) <= longest or "," not in text for text in sets)


@pytest.mark.parametrize("text", ["", "*", "1:*", "a", "1,,2", "-1", "1:2:3", "1:1000001", "٣", "1" * 19])
def test_what_is_no_set_of_numbers_is_a_bad_request(text: str) -> None:
    with pytest.raises(BadRequest):
        imap.numbers(text)


zones = st.integers(-12 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@given(st.datetimes(timezones=zones).filter(lambda moment: 1 < moment.year < 9999))
def test_a_date_comes_back_with_its_zone(moment: datetime) -> None:
    second = moment.replace(microsecond=0)
    back = imap.internal_date(imap.write_date(second)[1:-1])
    assert (back, back.utcoffset()) == (second, second.utcoffset())


@given(
    st.one_of(
        st.binary(max_size=30),
        st.from_regex(rb"[ 0-3]?\d-(Jan|feb|XXX)-\d{4} \d\d:\d\d:\d\d( [+-]\d{4})?", fullmatch=True),
    )
)
def test_a_date_is_one_that_can_be_kept_or_a_bad_request(data: bytes) -> None:
    with contextlib.suppress(BadRequest):
        moment = imap.internal_date(data)
        assert datetime.fromtimestamp(int(moment.timestamp()), UTC) == moment


def test_a_date_at_either_end_of_time_is_a_bad_request() -> None:
    for data in (b"01-Jan-0001 00:00:00 +0100", b"31-Dec-9999 23:59:59 -0100"):
        with pytest.raises(BadRequest):
            imap.internal_date(data)
    assert imap.internal_date(b" 1-jan-2020 00:00:60 +0000").second == 59


def test_flags_are_sorted_in_the_capitals_of_the_standard() -> None:
    assert imap.flags(["\\seen", "\\SEEN", "$b", "\\Recent", None, "\\*"]) == ("$b", "NIL", "\\Seen")
    for value in (None, "a", [["a"]]):
        with pytest.raises(BadRequest):
            imap.flags(value)


@pytest.mark.parametrize(
    ("flag", "can"),
    [
        ("\\Seen", True),
        ("$a-b", True),
        ("a b", False),
        ("", False),
        ("\\", False),
        ("a]", False),
        ("é", False),
        ("a\\", False),
        ("a\n", False),
    ],
)
def test_only_atoms_can_be_written_as_flags(flag: str, can: bool) -> None:
    assert imap.is_flag(flag) is can


@given(
    st.one_of(
        st.binary(max_size=20), st.text(max_size=10).map(lambda text: text.encode("utf-8", "surrogatepass"))
    )
)
def test_a_quoted_string_says_its_bytes_or_cannot(data: bytes) -> None:
    for utf8 in (False, True):
        quoted = imap.quoted(data, utf8=utf8)
        if quoted is not None:
            assert imap.values([quoted]) == [data]
            assert not {0, 10, 13} & set(quoted)


@pytest.mark.parametrize("value", [None, b"1", "x", "-1", ["1"], "9" * 19])
def test_what_is_no_number_is_a_bad_request(value: Value) -> None:
    with pytest.raises(BadRequest):
        imap.number(value)
