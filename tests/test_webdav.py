"""The rules both products share: bodies, answers, conditions, locks, destinations."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksync_server import settings, webdav
from ksync_server.errors import (
    BadGateway,
    BadRequest,
    BodyTooLarge,
    ClientError,
    ClientGone,
    Conflict,
    Forbidden,
    Locked,
    PreconditionFailed,
    UnsupportedMedia,
)
from ksync_server.http import Body, Headers, Peer, Request
from ksync_server.webdav import ABSENT, INFINITY, Instruction, LockState, Propfind, ResourceState
from ksync_server.wire import xml
from ksync_server.wire.headers import http_date
from ksync_server.wire.xml import Element

D = "{DAV:}"
ALICE, BOB = 1, 2
LOCK = "urn:uuid:181d4fae-7d8c-11d0-a765-00a0c91e6bf2"
OTHER = "urn:uuid:58f202ac-22cf-11d1-b12d-002035b29092"


def request(
    method: str = "PUT",
    segments: tuple[str, ...] = ("a",),
    pieces: tuple[bytes | None, ...] = (b"",),
    *,
    base: str = "",
    scheme: str = "http",
    authority: str = "files.example.org",
    declared: bool = True,
    **fields: str,
) -> Request:
    """A request with header fields as keywords; a piece that is None is a connection that ends."""
    messages: list[dict[str, Any]] = [
        {"type": "http.disconnect"}
        if piece is None
        else {"type": "http.request", "body": piece, "more_body": at + 1 < len(pieces)}
        for at, piece in enumerate(pieces)
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in fields.items()]
    length = sum(len(piece or b"") for piece in pieces) if declared else None
    peer = Peer("127.0.0.1", False, "")
    body = Body(receive, length)
    return Request(method, segments, False, "", Headers(raw), peer, body, scheme, authority, base)


# -- request bodies -------------------------------------------------------------------------------

LIMITS = settings.Xml(max_bytes=60, max_depth=3, max_elements=10)


def read(asked: Request) -> Element | None:
    return asyncio.run(webdav.read_xml(asked, LIMITS))


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_is_read_whole_however_it_is_framed(declared: bool) -> None:
    assert read(request(pieces=(b"<a><b", b"/>", b"</a>"), declared=declared)) == xml.parse(b"<a><b/></a>")
    assert read(request(pieces=(b"",), declared=declared)) is None
    assert read(request(pieces=(b" \r\n",), declared=declared)) is None


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((b"<a", b">" + b"x" * 60), BodyTooLarge),
        ((b"<a>",), BadRequest),
        ((b"<a><b><c><d/></c></b></a>",), BadRequest),
        ((b"<!DOCTYPE a><a/>",), BadRequest),
        ((b"<a>", None), ClientGone),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_cannot_be_used_is_refused(
    pieces: tuple[bytes | None, ...], error: type[Exception], declared: bool
) -> None:
    with pytest.raises(error):
        read(request(pieces=pieces, declared=declared))


def test_a_body_declared_too_large_is_refused_before_it_is_read() -> None:
    asked = request(pieces=(b"x" * 61,))
    with pytest.raises(BodyTooLarge):
        read(asked)
    assert not asked.body.started


def test_a_large_body_is_parsed_beside_other_requests() -> None:
    asked = request(pieces=(b"<a>" + b"<b/>" * 40_000 + b"</a>",))
    others = 0

    async def both() -> Element | None:
        async def another() -> None:
            nonlocal others
            while True:
                others += 1
                await asyncio.sleep(0)

        going = asyncio.create_task(another())
        found = await webdav.read_xml(asked, settings.Xml())
        going.cancel()
        return found

    found = asyncio.run(both())
    assert found is not None
    assert len(found.children) == 40_000
    assert others > 1


@pytest.mark.parametrize("body", [b"<a>" * 40_000, b"<a>" + b" " * 200_000])
def test_a_large_body_is_refused_like_a_small_one(body: bytes) -> None:
    with pytest.raises(BadRequest):
        asyncio.run(webdav.read_xml(request(pieces=(body,)), settings.Xml()))


def test_a_compressed_body_is_refused() -> None:
    with pytest.raises(UnsupportedMedia):
        read(request(pieces=(b"<a/>",), content_encoding="gzip"))
    assert read(request(pieces=(b"<a/>",), content_encoding="identity")) is not None


@pytest.mark.spec("RFC 4918 §9.3")
@pytest.mark.parametrize("kind", [{}, {"content_type": "text/plain"}, {"content_type": "xzy-foo/bar-512"}])
def test_a_body_of_another_type_is_415_for_mkcol_and_400_elsewhere(kind: dict[str, str]) -> None:
    with pytest.raises(UnsupportedMedia):
        read(request("MKCOL", pieces=(b"afafafaf",), **kind))
    with pytest.raises(BadRequest):
        read(request("PROPFIND", pieces=(b"afafafaf",), **kind))


def test_broken_xml_that_is_said_to_be_xml_is_400() -> None:
    with pytest.raises(BadRequest):
        read(request("MKCOL", pieces=(b"<a>",), content_type='Application/XML; charset="utf-8"'))


def element(tag: str, inner: str) -> Element:
    return xml.parse(f"<d:{tag}{xml.NAMESPACES} xmlns:o='urn:o'>{inner}</d:{tag}>".encode())


@pytest.mark.spec("RFC 4918 §9.1")
@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ("<d:allprop/>", Propfind("allprop")),
        ("<d:propname/>", Propfind("propname")),
        ("<d:prop/>", Propfind("prop")),
        ("<o:x/><d:propname/>", Propfind("propname")),
        ("<d:prop><o:b/><d:a/><o:b>1</o:b></d:prop>", Propfind("prop", ("{urn:o}b", "{DAV:}a"))),
        ("<d:allprop/><d:include><o:b/><o:b/></d:include>", Propfind("allprop", ("{urn:o}b",))),
    ],
)
def test_what_a_propfind_asks_for(inner: str, expected: Propfind) -> None:
    assert webdav.parse_propfind(element("propfind", inner)) == expected


@pytest.mark.spec("RFC 4918 §9.1")
def test_a_propfind_without_a_body_asks_for_everything() -> None:
    assert webdav.parse_propfind(None) == Propfind("allprop")


@pytest.mark.parametrize(
    "inner", ["", "<o:x/>", "<d:prop/><d:prop/>", "<d:allprop/><d:propname/>", "<d:include/>"]
)
def test_a_propfind_that_asks_for_nothing_or_for_two_things_is_refused(inner: str) -> None:
    with pytest.raises(BadRequest):
        webdav.parse_propfind(element("propfind", inner))
    with pytest.raises(BadRequest):
        webdav.parse_propfind(element("propertyupdate", "<d:prop/>"))


def test_at_most_500_properties_are_asked_for() -> None:
    many = "".join(f"<o:p{number}/>" for number in range(500))
    assert len(webdav.parse_propfind(element("propfind", f"<d:prop>{many}<o:p0/></d:prop>")).names) == 500
    with pytest.raises(BadRequest):
        webdav.parse_propfind(element("propfind", f"<d:prop>{many}<o:more/></d:prop>"))


@pytest.mark.spec("RFC 4918 §9.2")
def test_a_proppatch_is_done_in_document_order() -> None:
    body = element(
        "propertyupdate",
        "<d:set><d:prop><o:a>1</o:a><o:b/></d:prop></d:set><o:unknown/>"
        "<d:remove><d:prop><o:a/></d:prop></d:remove><d:set><d:prop><o:a>2</o:a></d:prop></d:set>",
    )
    found = webdav.parse_proppatch(body)
    assert [(one.set, one.name, one.element.text) for one in found] == [
        (True, "{urn:o}a", "1"),
        (True, "{urn:o}b", ""),
        (False, "{urn:o}a", ""),
        (True, "{urn:o}a", "2"),
    ]


@pytest.mark.spec("RFC 4918 §4.3")
def test_a_property_has_the_language_of_the_elements_around_it() -> None:
    body = element("propertyupdate", "<d:set xml:lang='en'><d:prop><o:a>1</o:a></d:prop></d:set>")
    (only,) = webdav.parse_proppatch(body)
    assert only.element.lang == "en"


@pytest.mark.parametrize(
    "inner", ["", "<o:x/>", "<d:set/>", "<d:set><d:prop/></d:set>", "<d:set><d:prop/><d:prop/></d:set>"]
)
def test_a_proppatch_that_does_nothing_is_refused(inner: str) -> None:
    for body in (None, element("propertyupdate", inner), element("propfind", "<d:prop/>")):
        with pytest.raises(BadRequest):
            webdav.parse_proppatch(body)


@pytest.mark.spec("RFC 5689 §3")
def test_properties_of_a_new_collection() -> None:
    root = D + "mkcol"
    assert webdav.parse_mkcol(None, root) == ()
    (only,) = webdav.parse_mkcol(element("mkcol", "<d:set><d:prop><o:a>1</o:a></d:prop></d:set>"), root)
    assert only == Instruction(True, "{urn:o}a", Element("{urn:o}a", children=("1",)))
    with pytest.raises(BadRequest):
        webdav.parse_mkcol(element("mkcol", "<d:remove><d:prop><o:a/></d:prop></d:remove>"), root)
    with pytest.raises(UnsupportedMedia):
        webdav.parse_mkcol(element("propfind", "<d:allprop/>"), root)


# -- answers --------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 4918 §9.1.3")
def test_an_answer_is_what_a_strict_reader_expects() -> None:
    answer = webdav.multistatus(
        [
            webdav.response(
                "/a%20b/",
                webdav.propstat(200, "<d:displayname>a &amp; b</d:displayname>")
                + webdav.missing(["{urn:o}x", D + "getetag"]),
            ),
            webdav.response("/none", ""),
            webdav.failed("/gone?<&", 404),
            webdav.failed("/locked", 423, D + "lock-token-submitted"),
        ],
        "<d:sync-token>urn:x</d:sync-token>",
    )
    first, none, gone, locked, token = xml.parse(answer.encode()).elements()
    assert [child.tag for child in first.elements()] == [D + "href", D + "propstat", D + "propstat"]
    found, missing = first.all(D + "propstat")
    assert [child.tag for child in found.elements()] == [D + "prop", D + "status"]
    assert found.elements()[1].text == "HTTP/1.1 200 OK"
    assert [child.tag for child in missing.elements()[0].elements()] == ["{urn:o}x", D + "getetag"]
    assert missing.elements()[1].text == "HTTP/1.1 404 Not Found"
    assert [child.tag for child in none.elements()] == [D + "href", D + "propstat"]
    assert [child.text for child in gone.elements()] == ["/gone?<&", "HTTP/1.1 404 Not Found"]
    assert [child.tag for child in locked.elements()] == [D + "href", D + "status", D + "error"]
    assert token.text == "urn:x"
    assert webdav.propstat(200, "") == ""
    assert webdav.multistatus([]) == webdav.OPEN + webdav.CLOSE
    assert "599" in webdav.status(599)


@given(st.text())
def test_no_href_breaks_an_answer(href: str) -> None:
    (response,) = xml.parse(webdav.multistatus([webdav.failed(href, 404)]).encode()).elements()
    expected = "".join(char if xml.is_xml_text(char) else "\ufffd" for char in href)
    assert response.elements()[0].text == expected


@pytest.mark.spec("RFC 4918 §14.5")
@pytest.mark.spec("RFC 4918 §16")
def test_an_error_names_its_precondition_and_hrefs() -> None:
    body = xml.parse(webdav.error_body(D + "lock-token-submitted", ("/a&b", "/c"), "It is locked, <sorry>."))
    assert body.tag == D + "error"
    precondition, note = body.elements()
    assert precondition.tag == D + "lock-token-submitted"
    assert [child.text for child in precondition.all(D + "href")] == ["/a&b", "/c"]
    assert note.text == "It is locked, <sorry>."
    (only,) = xml.parse(webdav.error_body("{urn:ietf:params:xml:ns:caldav}valid-filter")).elements()
    assert only == Element("{urn:ietf:params:xml:ns:caldav}valid-filter")


# -- conditions -----------------------------------------------------------------------------------

NOW = 1_700_000_000
STATE = ResourceState(True, "e1", NOW)
EARLIER, THEN, LATER = http_date(NOW - 1), http_date(NOW), http_date(NOW + 1)


def outcome(state: ResourceState, **fields: str) -> bool:
    """Whether a PUT with these fields may go on."""
    try:
        webdav.check(webdav.conditions(request(**fields)), state)
    except PreconditionFailed:
        return False
    return True


@pytest.mark.spec("RFC 9110 §13.1.1")
@pytest.mark.parametrize(
    ("value", "there", "absent"),
    [
        ('"e1"', True, False),
        ('"e0", "e1"', True, False),
        ('"e0"', False, False),
        ('W/"e1"', False, False),
        ("e1", False, False),
        ("*", True, False),
        ("", False, False),
    ],
)
def test_if_match(value: str, there: bool, absent: bool) -> None:
    assert outcome(STATE, if_match=value) is there
    assert outcome(ABSENT, if_match=value) is absent


@pytest.mark.spec("RFC 9110 §13.1.2")
@pytest.mark.parametrize(
    ("value", "there"),
    [
        ('"e1"', False),
        ('"e0", W/"e1"', False),
        ('"e0"', True),
        ("*", False),
        ("JoplinIgnore-1598", True),
    ],
)
def test_if_none_match(value: str, there: bool) -> None:
    assert outcome(STATE, if_none_match=value) is there
    assert outcome(ABSENT, if_none_match=value)
    assert webdav.not_modified(webdav.conditions(request("GET", if_none_match=value)), STATE) is not there


@pytest.mark.spec("RFC 9110 §13.1.4")
def test_if_unmodified_since() -> None:
    assert not outcome(STATE, if_unmodified_since=EARLIER)
    assert outcome(STATE, if_unmodified_since=THEN)
    assert not outcome(STATE, if_unmodified_since=LATER), "changed since, while the clock was set back"
    assert outcome(STATE, if_unmodified_since="yesterday"), "a malformed date is ignored"
    assert outcome(ABSENT, if_unmodified_since=EARLIER), "no modification date, no condition"


@pytest.mark.spec("RFC 9110 §13.1.3")
def test_if_modified_since_counts_for_reading_only() -> None:
    assert outcome(STATE, if_modified_since=LATER)
    for value, unchanged in ((EARLIER, False), (THEN, True), (LATER, False), ("yesterday", False)):
        given = webdav.conditions(request("GET", if_modified_since=value))
        assert webdav.not_modified(given, STATE) is unchanged
        assert not webdav.not_modified(given, ResourceState(True, "e1"))


@pytest.mark.spec("RFC 9110 §13.2.2")
def test_entity_tags_come_before_dates() -> None:
    assert outcome(STATE, if_match='"e1"', if_unmodified_since=EARLIER)
    assert not outcome(STATE, if_match='"e0"', if_unmodified_since=LATER)
    given = webdav.conditions(request("GET", if_none_match='"e0"', if_modified_since=LATER))
    assert not webdav.not_modified(given, STATE)
    given = webdav.conditions(request("GET", if_match='"e0"', if_none_match='"e1"'))
    with pytest.raises(PreconditionFailed):
        webdav.not_modified(given, STATE)


def test_a_request_without_conditions_costs_nothing() -> None:
    assert webdav.conditions(request("GET", depth="1")) is webdav.UNCONDITIONAL
    assert not webdav.not_modified(webdav.UNCONDITIONAL, STATE)


def test_fields_given_twice_are_one_list() -> None:
    asked = request()
    asked = replace(asked, headers=Headers([(b"if-match", b'"e0"'), (b"if-match", b'"e1"')]))
    webdav.check(webdav.conditions(asked), STATE)


@pytest.mark.parametrize("field", ["if_match", "if_none_match", "if"])
def test_malformed_conditions_are_bad_requests(field: str) -> None:
    with pytest.raises(BadRequest):
        webdav.conditions(request(**{field: '("'}))


@pytest.mark.spec("RFC 9110 §13.1.5")
@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({}, True),
        ({"if_range": '"e1"'}, True),
        ({"if_range": '"e0"'}, False),
        ({"if_range": 'W/"e1"'}, False),
        ({"if_range": '"e0", "e1"'}, False),
        ({"if_range": THEN}, False),
        ({"if_range": "junk"}, False),
        ({"if_range": ""}, False),
    ],
)
def test_if_range_needs_the_very_same_content(fields: dict[str, str], counts: bool) -> None:
    assert webdav.if_range(request("GET", **fields), STATE) is counts
    assert webdav.if_range(request("GET", **fields), ResourceState(True)) is (not fields)


def lock(token: str = LOCK, account_id: int = ALICE, *, exclusive: bool = True) -> LockState:
    return LockState(token, "/root/", account_id, exclusive)


LOCKED = ResourceState(True, "I am an ETag", NOW, (lock(),))


@pytest.mark.spec("RFC 4918 §10.4")
@pytest.mark.parametrize(
    ("value", "holds"),
    [
        (f'(<{LOCK}> ["I am an ETag"]) (["I am another ETag"])', True),
        (f'(<{LOCK}> ["I am another ETag"])', False),
        (f'(<{OTHER}>) (["I am an ETag"])', True),
        (f"(Not <{LOCK}> <{OTHER}>)", False),
        (f"(Not <{OTHER}>)", True),
        (f"(<{OTHER}>) (Not <DAV:no-lock>)", True),
        (f"(<{LOCK}>) (<DAV:no-lock>)", True),
        ("(<DAV:no-lock>)", False),
        ('([W/"I am an ETag"])', False),
        ('(Not ["I am an ETag"])', False),
        (f"</locked> (<{LOCK}>)", True),
        (f"</absent> (<{LOCK}>)", False),
        ('</absent> (["x"])', False),
        ('</absent> (Not ["x"])', True),
        (f"</absent> (<{LOCK}>) </locked> (<{LOCK}>)", True),
    ],
)
def test_the_if_header_holds_if_one_of_its_lists_does(value: str, holds: bool) -> None:
    states = {"/locked": LOCKED, "/absent": ABSENT}
    given = webdav.conditions(request(**{"if": value}))
    if holds:
        webdav.check(given, LOCKED, states.__getitem__)
    else:
        with pytest.raises(PreconditionFailed):
            webdav.check(given, LOCKED, states.__getitem__)


def test_a_tagged_resource_is_looked_up_once_and_unknown_ones_match_nothing() -> None:
    asked: list[str] = []

    def resolve(href: str) -> ResourceState:
        asked.append(href)
        return ABSENT

    given = webdav.conditions(request(**{"if": '</x> (["a"]) (["b"]) </y> (["c"])'}))
    with pytest.raises(PreconditionFailed):
        webdav.check(given, STATE, resolve)
    assert asked == ["/x", "/y"]
    with pytest.raises(PreconditionFailed):
        webdav.check(given, STATE)


def unlocked(state: ResourceState, *, account_id: int = ALICE, **fields: str) -> bool:
    try:
        webdav.check_locks(webdav.conditions(request(**fields)), account_id, state)
    except Locked:
        return False
    return True


@pytest.mark.spec("RFC 4918 §16")
def test_the_refusal_of_a_locked_resource_names_what_is_locked() -> None:
    with pytest.raises(Locked) as refused:
        webdav.check_locks(webdav.UNCONDITIONAL, ALICE, LOCKED)
    assert refused.value.precondition == D + "lock-token-submitted"
    assert refused.value.hrefs == ("/root/",)


@pytest.mark.spec("RFC 4918 §7")
@pytest.mark.spec("RFC 4918 §10.4.1")
def test_a_change_under_a_lock_needs_its_token_from_its_owner() -> None:
    assert unlocked(STATE)
    assert not unlocked(LOCKED)
    assert unlocked(LOCKED, **{"if": f"(<{LOCK}>)"})
    assert unlocked(LOCKED, **{"if": f"<http://files.example.org/elsewhere> (<{LOCK}>)"})
    assert unlocked(LOCKED, **{"if": f'(<{LOCK}>) (["x"])'})
    assert not unlocked(LOCKED, **{"if": f"(<{OTHER}>)"})
    assert not unlocked(LOCKED, account_id=BOB, **{"if": f"(<{LOCK}>)"}), "a token alone opens nothing"
    assert not unlocked(LOCKED, if_match="*")


@pytest.mark.spec("RFC 4918 §6.2")
def test_a_holder_of_one_of_several_shared_locks_needs_the_own_token_only() -> None:
    shared = replace(LOCKED, locks=(lock(OTHER, BOB, exclusive=False), lock(LOCK, ALICE, exclusive=False)))
    assert unlocked(shared, **{"if": f"(<{LOCK}>)"})
    assert unlocked(shared, account_id=BOB, **{"if": f"(<{OTHER}>)"})
    assert not unlocked(shared, **{"if": f"(<{OTHER}>)"})
    assert not unlocked(shared)


def test_every_resource_that_changes_is_checked() -> None:
    given = webdav.conditions(request(**{"if": f"(<{LOCK}>)"}))
    webdav.check_locks(given, ALICE, LOCKED, STATE)
    with pytest.raises(Locked):
        webdav.check_locks(given, ALICE, LOCKED, replace(STATE, locks=(lock(OTHER),)))


# -- COPY, MOVE, DELETE ---------------------------------------------------------------------------


@pytest.mark.spec("RFC 4918 §9.6.1")
@pytest.mark.spec("RFC 4918 §9.8.3")
@pytest.mark.spec("RFC 4918 §9.9.2")
@pytest.mark.parametrize(
    ("method", "allowed"),
    [("COPY", {None, "0", "infinity"}), ("MOVE", {None, "infinity"}), ("DELETE", {None, "infinity"})],
)
def test_depth_of_a_tree(method: str, allowed: set[str | None]) -> None:
    for value in (None, "0", "1", "infinity", "junk"):
        asked = request(method, **({} if value is None else {"depth": value}))
        assert webdav.tree_depth(asked, folder=False) == 0, "ignored for a file"
        if value in allowed:
            assert webdav.tree_depth(asked, folder=True) == (0 if value == "0" else INFINITY)
        else:
            with pytest.raises(BadRequest):
                webdav.tree_depth(asked, folder=True)
    assert webdav.depth(request(), 1) == 1


def going(value: str, *, overwrite: str = "T", **options: Any) -> webdav.Destination:
    source = options.pop("segments", ("from", "a"))
    return webdav.destination(request("MOVE", source, destination=value, overwrite=overwrite, **options))


@pytest.mark.spec("RFC 4918 §10.3")
@pytest.mark.parametrize(
    ("value", "options"),
    [
        ("/to%2Fx/b%3F", {}),
        ("http://files.example.org/to%2Fx/b%3F", {}),
        ("http://FILES.example.org.:80/to%2Fx/b%3F", {}),
        ("http://alice:secret@files.example.org/to%2Fx/b%3F", {}),
        ("https://files.example.org/to%2Fx/b%3F", {"scheme": "https", "authority": "files.example.org:443"}),
        ("https://files.example.org/to%2Fx/b%3F", {}),  # a proxy speaks TLS for us
        ("http://[::1]:8080/to%2Fx/b%3F", {"authority": "[::1]:8080"}),
        ("http://[::1]/to%2Fx/b%3F", {"authority": "[::1]"}),
        ("/drives/7/to%2Fx/b%3F", {"base": "/drives/7"}),
        ("http://files.example.org/drives/7/to%2Fx/b%3F", {"base": "/drives/7"}),
    ],
)
def test_a_destination_on_the_same_site(value: str, options: dict[str, str]) -> None:
    assert going(value, **options) == webdav.Destination(("to/x", "b?"), False, True)
    assert going(value + "/", overwrite="F", **options) == webdav.Destination(("to/x", "b?"), True, False)


@pytest.mark.spec("RFC 4918 §9.8.5")
@pytest.mark.parametrize(
    ("value", "options", "error"),
    [
        ("http://other.example.org/b", {}, BadGateway),
        ("http://files.example.org:8080/b", {}, BadGateway),
        ("http://files.example.org@other.example.org/b", {}, BadGateway),
        ("/drives/8/b", {"base": "/drives/7"}, BadGateway),
        ("/drives/70/b", {"base": "/drives/7"}, BadGateway),
        ("/b", {"base": "/drives/7"}, BadGateway),
        ("/from/a", {}, Forbidden),
        ("/from/a/", {}, Forbidden),
        ("//from//%61", {}, BadRequest),
        ("http://files.example.org//from//%61", {}, Forbidden),
        ("/from/a/b", {}, Conflict),
        ("/from", {}, Conflict),
        ("/", {}, Conflict),
        ("/b", {"overwrite": "maybe"}, BadRequest),
        ("/b#c", {}, BadRequest),
        ("/b?c", {}, BadRequest),
        ("/../b", {}, BadRequest),
        ("/%00", {}, BadRequest),
        ("b", {}, BadRequest),
    ],
)
def test_a_destination_that_cannot_be(value: str, options: dict[str, str], error: type[ClientError]) -> None:
    with pytest.raises(error):
        going(value, **options)


def test_a_move_needs_a_destination() -> None:
    with pytest.raises(BadRequest):
        webdav.destination(request("MOVE"))


names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
names = names.filter(lambda name: name not in (".", ".."))


@given(st.lists(names, min_size=1, max_size=4).map(tuple), st.sampled_from(["", "/drives/7"]), st.booleans())
def test_every_href_we_answer_is_a_destination_we_take(
    path: tuple[str, ...], base: str, absolute: bool
) -> None:
    asked = request("MOVE", (*path, "source"), base=base)
    href = asked.href(path)
    value = f"http://files.example.org{href}" if absolute else href
    assert webdav.local_segments(asked, value) == path
    elsewhere = request("MOVE", ("source of all",), base=base, destination=value)
    if path != ("source of all",) and path[0] != "source of all":
        assert webdav.destination(elsewhere).segments == path


def test_hrefs_that_are_elsewhere_are_none() -> None:
    asked = request(base="/drives/7")
    assert webdav.local_segments(asked, " /drives/7/a%20b\n") == ("a b",)
    assert webdav.local_segments(asked, "/drives/7/日本") == ("日本",)
    assert webdav.local_segments(asked, "/drives/8/a") is None
    assert webdav.local_segments(asked, "http://other.example.org/drives/7/a") is None
    with pytest.raises(BadRequest):
        webdav.local_segments(asked, "nonsense")


# -- preferences ----------------------------------------------------------------------------------


@pytest.mark.spec("RFC 7240 §3")
def test_preferences_are_confirmed_only_where_they_were_honoured() -> None:
    wanted = webdav.prefer(request("PROPFIND", prefer="return=minimal, depth-noroot"))
    assert webdav.applied(wanted, minimal=True, noroot=True) == [
        (b"preference-applied", b"return=minimal, depth-noroot"),
        (b"vary", b"prefer, brief"),
    ]
    assert webdav.applied(wanted, minimal=True)[0] == (b"preference-applied", b"return=minimal")
    assert webdav.applied(wanted) == [(b"vary", b"prefer, brief")]
    nothing = webdav.prefer(request("PROPFIND"))
    assert webdav.applied(nothing, minimal=True, noroot=True) == [(b"vary", b"prefer, brief")]
    assert webdav.prefer(request("PROPFIND", brief="t")).minimal


def test_limits_are_those_of_the_settings() -> None:
    assert webdav.limits(LIMITS) == xml.XmlLimits(60, 3, 10)
    assert webdav.limits(settings.Xml()) == xml.XmlLimits()
    assert webdav.too_large(5).status == 413
