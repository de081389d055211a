"""Header fields and paths: what clients send is understood, garbage is a bad request and nothing else."""

from __future__ import annotations

import base64
import contextlib
import string
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksync_server.errors import BadRequest, ClientError, RangeNotSatisfiable
from ksync_server.wire import headers
from ksync_server.wire.headers import INFINITY, ETag, IfCondition, IfList, Prefer
from tests import costs

# -- paths ----------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 3986 §3.3")
@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"/", ((), True)),
        (b"//", ((), True)),
        (b"/a", (("a",), False)),
        (b"/a/", (("a",), True)),
        (b"//a///b", (("a", "b"), False)),
        (b"/a%2Fb/c", (("a/b", "c"), False)),
        (b"/a%3Fb%23c%3Bd;e", (("a?b#c;d;e",), False)),
        (b"/100%25/%2525", (("100%", "%25"), False)),
        (b"/caf%C3%A9/" + "é".encode(), (("café", "é"), False)),
        (b"/...", (("...",), False)),
        (b"/a+b", (("a+b",), False)),
        (b"/a?b/c", (("a",), False)),
    ],
)
def test_paths_are_split_before_they_are_decoded(raw: bytes, expected: tuple[tuple[str, ...], bool]) -> None:
    assert headers.split_path(raw) == expected


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"*",
        b"a",
        b"http://example.org/a",
        b"/%",
        b"/%4",
        b"/%zz",
        b"/%u0041",
        b"/a%00b",
        b"/a%0Ab",
        b"/a\x7fb",
        b"/%ff%fe",
        b"/%ed%a0%80",
        b"/%c0%af",
        b"/\xe9",
        b"/.",
        b"/a/../b",
        b"/%2e%2e/b",
        b"/.%2E",
        b"/a/%2e",
        b"/folder/#ment",
    ],
)
def test_paths_that_name_nothing_are_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        headers.split_path(raw)


def test_names_that_hurt_survive_the_way_out_and_back(nasty_names: tuple[str, ...]) -> None:
    for name in nasty_names:
        path = headers.join_path((name, "x"), False)
        assert set(path) <= set(string.ascii_letters + string.digits + "/%-._~!$'()*,=:@"), path
        if name.isprintable() or not set(name) & {"\n", "\t"}:
            assert headers.split_path(path.encode()) == ((name, "x"), False)


@pytest.mark.spec("RFC 3986 §2.3")
def test_a_segment_has_as_few_escapes_as_clients_bear() -> None:
    assert headers.quote_segment("A-z_0.9~!$'()*,=:@") == "A-z_0.9~!$'()*,=:@"
    assert headers.quote_segment("a b&c+d;e/f?g#h%i") == "a%20b%26c%2Bd%3Be%2Ff%3Fg%23h%25i"
    assert headers.quote_segment("é") == "%C3%A9"
    assert headers.join_path((), True) == headers.join_path((), False) == "/"
    assert headers.join_path(("a", "b c"), True) == "/a/b%20c/"


segments = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
segments = segments.filter(lambda name: name not in (".", ".."))


@given(st.lists(segments, max_size=5), st.booleans())
def test_any_path_survives_the_way_out_and_back(names: list[str], slash: bool) -> None:
    path = headers.join_path(tuple(names), slash)
    assert headers.split_path(path.encode("ascii")) == (tuple(names), slash or not names)
    assert headers.parse_destination(path) == (None, None, path.encode())
    uri = f"https://sync.example.org:8443{path}"
    assert headers.parse_destination(uri) == ("https", "sync.example.org:8443", path.encode())


@pytest.mark.spec("RFC 4918 §10.3")
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("http://example.org", ("http", "example.org", b"/")),
        ("HTTP://Example.org/a%2Fb", ("http", "Example.org", b"/a%2Fb")),
        ("https://[::1]:8080/a", ("https", "[::1]:8080", b"/a")),
        ("/q%3Fr.txt", (None, None, b"/q%3Fr.txt")),
        (" /s%3Bt.txt ", (None, None, b"/s%3Bt.txt")),
        ("/a b", (None, None, b"/a b")),
        ("/\xc3\xa9", (None, None, "/é".encode())),  # bytes of UTF-8 in a header
        ("/é", (None, None, "/é".encode())),  # a character, out of XML or of a Latin-1 header
        ("/日本", (None, None, "/日本".encode())),
    ],
)
def test_destinations(value: str, expected: tuple[str | None, str | None, bytes]) -> None:
    assert headers.parse_destination(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "",
        "nonsense",
        "a/b",
        "//example.org/a",
        "ftp://example.org/a",
        "http://",
        "http:///a",
        "http:/a",
        "file#2.txt",
        "/file#2.txt",
        "/what?.txt",
        "http://example.org/file#2.txt",
        "http://example.org?a",
        "/a\n#b",
    ],
)
def test_destinations_that_are_none_or_would_be_cut_short_are_refused(value: str) -> None:
    with pytest.raises(BadRequest):
        headers.parse_destination(value)


# -- authentication -------------------------------------------------------------------------------


def basic(user: bytes) -> str:
    return "Basic " + base64.b64encode(user).decode()


@pytest.mark.spec("RFC 7617 §2")
def test_basic_credentials_in_utf_8_and_latin_1() -> None:
    assert headers.parse_basic(basic(b"name:secret:with colon")) == ("name", "secret:with colon")
    assert headers.parse_basic(basic("zoë:pässword".encode())) == ("zoë", "pässword")
    assert headers.parse_basic(basic("zoë:pässword".encode("latin-1"))) == ("zoë", "pässword")
    assert headers.parse_basic(basic(b":")) == ("", "")
    assert headers.parse_basic("bAsIc   " + base64.b64encode(b"a:b").decode() + " ") == ("a", "b")


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "Basic",
        "Basic ",
        "Basic !!!!",
        "Basic YTpi YTpi",
        "Basic YTpiYQ",
        "Basic \xff\xff",
        basic(b"no colon"),
        basic(b"a\0:b"),
        "Bearer YTpi",
        "YTpi",
    ],
)
def test_what_is_not_basic_is_none_and_never_an_error(value: str | None) -> None:
    assert headers.parse_basic(value) is None


# -- conditions -----------------------------------------------------------------------------------


@pytest.mark.spec("RFC 9110 §13.1.1")
@pytest.mark.spec("RFC 9110 §5.6.1")
def test_lists_of_entity_tags() -> None:
    assert headers.parse_etags(" * ") == "*"
    assert headers.parse_etags('"a"') == (ETag("a"),)
    assert headers.parse_etags('W/"a" ,"b,c",""') == (ETag("a", True), ETag("b,c"), ETag(""))
    assert headers.parse_etags(', "a",, "b" ,') == (ETag("a"), ETag("b"))
    assert headers.parse_etags("") == ()
    assert headers.quote_etag("1-2-3") == '"1-2-3"'


def test_a_tag_without_quotes_is_read_and_equals_nothing() -> None:
    (joplin,) = headers.parse_etags("JoplinIgnore-1598")
    assert joplin.weak
    assert joplin.value != "JoplinIgnore-1598"
    assert [tag.weak for tag in headers.parse_etags('abc, "d", *')] == [True, False, True]


@pytest.mark.parametrize("value", ['"', '"a', '"a" "b"', 'a"b"', 'w/"a"', '"a"b'])
def test_tags_that_are_none_are_refused(value: str) -> None:
    with pytest.raises(BadRequest):
        headers.parse_etags(value)


def test_at_most_1000_tags() -> None:
    assert len(headers.parse_etags('"a",' * 1000)) == 1000
    with pytest.raises(BadRequest):
        headers.parse_etags('"a",' * 1001)


def etag(value: str, *, weak: bool = False, negate: bool = False) -> IfCondition:
    return IfCondition(negate, None, ETag(value, weak))


def token(value: str, *, negate: bool = False) -> IfCondition:
    return IfCondition(negate, value, None)


LOCK = "urn:uuid:181d4fae-7d8c-11d0-a765-00a0c91e6bf2"


@pytest.mark.spec("RFC 4918 §10.4")
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (  # §10.4.6
            f'(<{LOCK}> ["I am an ETag"])\n  (["I am another ETag"])',
            (IfList(None, (token(LOCK), etag("I am an ETag"))), IfList(None, (etag("I am another ETag"),))),
        ),
        (  # §10.4.7
            f"(Not <{LOCK}> <urn:uuid:58f202ac-22cf-11d1-b12d-002035b29092>)",
            (
                IfList(
                    None, (token(LOCK, negate=True), token("urn:uuid:58f202ac-22cf-11d1-b12d-002035b29092"))
                ),
            ),
        ),
        (  # §10.4.8
            f"(<{LOCK}>) (Not <DAV:no-lock>)",
            (IfList(None, (token(LOCK),)), IfList(None, (token("DAV:no-lock", negate=True),))),
        ),
        (  # §10.4.9
            f'</resource1> (<{LOCK}> [W/"A weak ETag"]) (["strong ETag"])',
            (
                IfList("/resource1", (token(LOCK), etag("A weak ETag", weak=True))),
                IfList("/resource1", (etag("strong ETag"),)),
            ),
        ),
        (  # §10.4.10
            f"<http://www.example.org/specs/> (<{LOCK}>)",
            (IfList("http://www.example.org/specs/", (token(LOCK),)),),
        ),
        (  # §10.4.11
            '</specs/rfc2518.doc> (["4217"])</other>(not ["4217"])',
            (
                IfList("/specs/rfc2518.doc", (etag("4217"),)),
                IfList("/other", (etag("4217", negate=True),)),
            ),
        ),
        (f"(<{LOCK}>)", (IfList(None, (token(LOCK),)),)),
    ],
)
def test_the_examples_of_the_if_header(value: str, expected: tuple[IfList, ...]) -> None:
    assert headers.parse_if(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "",
        "()",
        "(",
        ")",
        "(<a>",
        "<a>",
        "<a> <b> (<c>)",
        "(<a>) <b>",
        "(Not)",
        "(Not Not <a>)",
        "Not (<a>)",
        "((<a>))",
        "(<a>))",
        "(<>)",
        "(<a b>)",
        "([a])",
        '(["a)',
        "(<a>), (<b>)",
        "<a> Not (<b>)",
        '["a"]',
        "opaquelocktoken:abc",
    ],
)
@pytest.mark.spec("RFC 4918 §10.4.2")
def test_if_headers_that_are_malformed_are_refused(value: str) -> None:
    with pytest.raises(BadRequest):
        headers.parse_if(value)


def test_an_if_header_has_at_most_200_conditions() -> None:
    assert len(headers.parse_if("(<a>)" * 200)) == 200
    with pytest.raises(BadRequest):
        headers.parse_if("(<a>)" * 201)


def written(lists: list[IfList]) -> str:
    pieces = []
    for one in lists:
        conditions = [
            ("Not " if test.negate else "")
            + (
                f"<{test.token}>"
                if test.etag is None
                else f'[{"W/" if test.etag.weak else ""}"{test.etag.value}"]'
            )
            for test in one.conditions
        ]
        pieces.append(f"<{one.resource}> " * (one.resource is not None) + f"({' '.join(conditions)})")
    return " ".join(pieces)


uris = st.text(string.ascii_letters + string.digits + ":/-.%()[]\"'", min_size=1, max_size=20)
tags = st.builds(ETag, st.text(string.printable.replace('"', ""), max_size=10), st.booleans())
conditions = st.builds(IfCondition, st.booleans(), uris, st.none()) | st.builds(
    IfCondition, st.booleans(), st.none(), tags
)


@given(
    st.booleans().flatmap(
        lambda tagged: st.lists(
            st.builds(
                IfList,
                uris if tagged else st.none(),
                st.lists(conditions, min_size=1, max_size=4).map(tuple),
            ),
            min_size=1,
            max_size=4,
        )
    )
)
def test_any_if_header_is_read_as_it_was_written(lists: list[IfList]) -> None:
    assert headers.parse_if(written(lists)) == tuple(lists)


# -- DAV ------------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 4918 §10.2")
def test_depth() -> None:
    assert headers.parse_depth(None, 1) == 1
    assert headers.parse_depth("0", INFINITY) == 0
    assert headers.parse_depth(" 1 ", 0) == 1
    assert headers.parse_depth("Infinity", 0) == INFINITY
    for value in ("", "2", "-1", "00", "infinite", "1,0", "١"):
        with pytest.raises(BadRequest):
            headers.parse_depth(value, 0)


@pytest.mark.spec("RFC 4918 §10.6")
def test_overwrite() -> None:
    assert headers.parse_overwrite(None)
    assert headers.parse_overwrite(" t ")
    assert not headers.parse_overwrite("F")
    for value in ("", "maybe", "TF"):
        with pytest.raises(BadRequest):
            headers.parse_overwrite(value)


@pytest.mark.spec("RFC 4918 §10.7")
def test_timeout_is_the_first_choice_understood_and_never_longer_than_allowed() -> None:
    assert headers.parse_timeout(None, 3600) == 3600
    assert headers.parse_timeout("Infinite, Second-4100000000", 3600) == 3600
    assert headers.parse_timeout("Second-600", 3600) == 600
    assert headers.parse_timeout("Extend-5, second-7", 3600) == 7
    assert headers.parse_timeout("Second-0", 3600) == 1
    assert headers.parse_timeout("Second-" + "9" * 5000, 3600) == 3600
    assert headers.parse_timeout("Second--5, Second-x, Second-²", 3600) == 3600


@pytest.mark.spec("RFC 4918 §10.5")
def test_a_lock_token_may_lack_its_brackets() -> None:
    assert headers.parse_lock_token(f" <{LOCK}> ") == headers.parse_lock_token(LOCK) == LOCK


# -- ranges, dates, lengths -----------------------------------------------------------------------


@pytest.mark.spec("RFC 9110 §14.1.2")
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bytes=0-499", ((0, 500),)),
        ("bytes=500-", ((500, 1000),)),
        ("bytes=-1", ((999, 1000),)),
        ("bytes=-5000", ((0, 1000),)),
        ("Bytes = 0-18446744073709551615", ((0, 1000),)),
        ("bytes=0-0,-1", ((0, 1), (999, 1000))),
        ("bytes=900-,0-9", ((900, 1000), (0, 10))),
        ("bytes=0-9,2000-", ((0, 10),)),
        ("bytes=0-9,5-14,100-", ((0, 15), (100, 1000))),
        ("bytes=5-2", None),
        ("bytes=0-4,5-2", None),
        ("bytes=", None),
        ("bytes=-", None),
        ("bytes=1", None),
        ("bytes=a-b", None),
        ("bytes=--5", None),
        ("bytes=+1-5", None),
        ("bytes=٠-٩", None),
        ("bytes 0-5", None),
        ("lines=0-5", None),
        ("", None),
    ],
)
def test_ranges(value: str, expected: tuple[tuple[int, int], ...] | None) -> None:
    assert headers.parse_range(value, 1000) == expected


@pytest.mark.spec("RFC 9110 §15.5.17")
@pytest.mark.parametrize(
    "value", ["bytes=1000-", "bytes=-0", "bytes=5000-6000,-0", "bytes=" + "0-0," * 16 + "1-1"]
)
def test_ranges_outside_or_too_many_are_refused_with_the_size(value: str) -> None:
    with pytest.raises(RangeNotSatisfiable) as refused:
        headers.parse_range(value, 1000)
    assert refused.value.headers == ((b"content-range", b"bytes */1000"),)


def test_the_last_bytes_of_nothing_are_the_whole_of_it() -> None:
    assert headers.parse_range("bytes=-5", 0) is None
    with pytest.raises(RangeNotSatisfiable):
        headers.parse_range("bytes=0-", 0)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=8), st.integers(1, 50)
)
def test_ranges_cover_exactly_what_was_asked_for(pairs: list[tuple[int, int]], size: int) -> None:
    pairs = [(min(pair), max(pair)) for pair in pairs]
    asked = {at for start, last in pairs for at in range(start, min(last + 1, size))}
    value = "bytes=" + ", ".join(f"{start}-{last}" for start, last in pairs)
    try:
        found = headers.parse_range(value, size)
    except RangeNotSatisfiable:
        assert not asked
        return
    assert found is not None
    covered = [at for start, end in found for at in range(start, end)]
    assert len(covered) == len(set(covered))
    assert set(covered) == asked


@pytest.mark.spec("RFC 9110 §8.6")
def test_content_length_is_digits() -> None:
    assert headers.parse_content_length("00042") == 42
    assert headers.parse_content_length("9" * 18) == 10**18 - 1
    for value in ("", " 5", "+5", "-5", "5,5", "0x5", "5_0", "٥", "5\n", "9" * 19):
        with pytest.raises(BadRequest):
            headers.parse_content_length(value)


@pytest.mark.spec("RFC 9110 §5.6.7")
def test_three_forms_of_one_date() -> None:
    for value in (
        "Sun, 06 Nov 1994 08:49:37 GMT",
        "Sunday, 06-Nov-94 08:49:37 GMT",
        "Sun Nov  6 08:49:37 1994",
        " Sun, 6 Nov 1994 08:49:37 GMT ",
    ):
        assert headers.parse_http_date(value) == 784111777
    assert headers.http_date(784111777) == "Sun, 06 Nov 1994 08:49:37 GMT"
    assert headers.iso_date(784111777) == "1994-11-06T08:49:37Z"
    assert headers.parse_http_date("Friday, 31-Dec-99 23:59:60 GMT") == 946684799
    assert headers.parse_http_date("Friday, 01-Jan-21 00:00:00 GMT") == 1609459200


@pytest.mark.parametrize(
    "value",
    [
        "",
        "0",
        "yesterday",
        "Sun, 31 Feb 1994 08:49:37 GMT",
        "Sun, 06 Foo 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 24:49:37 GMT",
        "Sun, 06 Nov 1994 08:49:61 GMT",
        "Sun, 06 Nov 0000 08:49:37 GMT",
        "Sun, 06 Nov 1994 08:49:37 CET",
        "Sun, 06 Nov 1994 08:49:37",
        "Sun, ٠6 Nov 1994 08:49:37 GMT",
        "Sun Nov  6 08:49:37 94",
    ],
)
def test_dates_that_are_none(value: str) -> None:
    assert headers.parse_http_date(value) is None


@given(st.integers(-62135596800, 253402300799))
def test_any_time_survives_the_way_out_and_back(at: int) -> None:
    assert headers.parse_http_date(headers.http_date(at)) == at
    assert datetime.fromisoformat(headers.iso_date(at)).timestamp() == at


@given(st.integers(-(2**31), 2**32))
def test_dates_are_those_of_the_standard_library(at: int) -> None:
    assert headers.http_date(at) == format_datetime(datetime.fromtimestamp(at, UTC), usegmt=True)


def test_times_that_no_header_can_say_are_the_nearest_it_can() -> None:
    assert headers.http_date(10**15) == "Fri, 31 Dec 9999 23:59:59 GMT"
    assert headers.iso_date(-(10**15)) == "0001-01-01T00:00:00Z"


def test_modification_times_of_clients() -> None:
    assert headers.parse_oc_mtime("1700000000") == 1700000000
    assert headers.parse_oc_mtime(" 1700000000.25 ") == 1700000000.25
    assert headers.parse_oc_mtime("-5") == -5
    assert headers.parse_oc_mtime("253402300799") == 253402300799
    for value in (
        None,
        "",
        "x",
        "1e9",
        "nan",
        "inf",
        "0x5",
        "1_000",
        "٥",
        "253402300800",
        "9" * 13,
        "1.",
        ".5",
    ):
        assert headers.parse_oc_mtime(value) is None


# -- negotiation ----------------------------------------------------------------------------------


@pytest.mark.spec("RFC 7240 §2")
@pytest.mark.spec("RFC 8144 §2")
def test_preferences() -> None:
    assert headers.parse_prefer(None) == Prefer()
    assert headers.parse_prefer("return=minimal") == Prefer(minimal=True)
    assert headers.parse_prefer('foo; bar, Return = "Minimal"; x=y, depth-noroot') == Prefer(
        minimal=True, depth_noroot=True
    )
    assert headers.parse_prefer("return=representation, return=minimal") == Prefer(representation=True)
    assert headers.parse_prefer("respond-async, wait=10, =, ;") == Prefer()
    assert headers.parse_prefer(None, " t ") == Prefer(minimal=True)
    assert headers.parse_prefer(None, "f") == Prefer()


@pytest.mark.spec("RFC 9110 §12.5.3")
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, False),
        ("", False),
        ("gzip", True),
        ("deflate, GZIP;q=0.5", True),
        ("x-gzip", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("gzip;q=0.001", True),
        ("*", True),
        ("*;q=0, gzip", True),
        ("gzip;q=0, *", False),
        ("identity, br", False),
    ],
)
def test_gzip(value: str | None, expected: bool) -> None:
    assert headers.accepts_gzip(value) is expected


@pytest.mark.spec("RFC 9110 §8.3.1")
def test_media_types() -> None:
    assert headers.parse_content_type(None) == ("", {})
    assert headers.parse_content_type(" Text/Calendar ") == ("text/calendar", {})
    assert headers.parse_content_type('text/vcard; Charset="utf-8"; version=4.0 ;x="a;\\"b"; junk') == (
        "text/vcard",
        {"charset": "utf-8", "version": "4.0", "x": 'a;"b'},
    )
    assert headers.parse_content_type(';;="; a="b') == ("", {"a": ""})


# -- everything -----------------------------------------------------------------------------------

GRAMMARS: dict[str, Callable[[str], object]] = {
    "path": lambda value: headers.split_path(b"/" + value.encode("utf-8", "replace")),
    "bytes": lambda value: headers.split_path(value.encode("latin-1", "replace")),
    "destination": headers.parse_destination,
    "basic": headers.parse_basic,
    "token68": lambda value: headers.parse_basic("Basic " + value),
    "etags": headers.parse_etags,
    "if": headers.parse_if,
    "depth": lambda value: headers.parse_depth(value, 0),
    "overwrite": headers.parse_overwrite,
    "timeout": lambda value: headers.parse_timeout(value, 3600),
    "lock token": headers.parse_lock_token,
    "range": lambda value: headers.parse_range(value, 1000),
    "ranges": lambda value: headers.parse_range("bytes=" + value, 1000),
    "content length": headers.parse_content_length,
    "date": headers.parse_http_date,
    "mtime": headers.parse_oc_mtime,
    "prefer": headers.parse_prefer,
    "brief": lambda value: headers.parse_prefer(None, value),
    "encoding": headers.accepts_gzip,
    "type": headers.parse_content_type,
}
characters = st.characters(max_codepoint=255) | st.sampled_from("<>()[]\"'/%*,;=-WNotbytesq0.é日")


@pytest.mark.parametrize("grammar", GRAMMARS)
@given(value=st.text(characters, max_size=60))
def test_garbage_is_refused_cleanly_or_ignored(grammar: str, value: str) -> None:
    with contextlib.suppress(BadRequest, RangeNotSatisfiable):
        GRAMMARS[grammar](value)


HOSTILE = (
    *(char * 65536 for char in " ,;/\"'<>()[]%*=-#?0a"),
    *(
        f"{start}{' ' * 65530}{end}"
        for start in ("a", '"a"', "(", "(<a>", "Not", "a;q")
        for end in ('"', "<", "x")
    ),
    *(
        piece * (65536 // len(piece))
        for piece in ("%41", "a/", "<a>", "(<a>)", "(<a", "(Not ", '["a"]', '"a",')
    ),
    *(
        piece * (65536 // len(piece))
        for piece in ("0-0,", "-1,", ';a="', ';a="\\"', 'W/"', "a=b;", ", ", "a ,")
    ),
    *(piece * (65536 // len(piece)) for piece in ('("', "([", '(["', "http://", "Basic ", "\xe9", "日")),
)


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_64_kib_of_anything_cost_less_than_50_ms(grammar: str) -> None:
    def read(value: str) -> None:
        with contextlib.suppress(ClientError):
            GRAMMARS[grammar](value)

    for value in HOSTILE:
        costs.within(0.05, lambda value=value: read(value))
