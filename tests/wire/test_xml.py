"""The reader refuses what is not plain XML within its limits; what the writer emits can be read again."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksync_server.errors import BadRequest, BodyTooLarge
from ksync_server.wire import xml
from ksync_server.wire.xml import Element, XmlLimits
from tests import costs

D = "{DAV:}"
LANG = "{http://www.w3.org/XML/1998/namespace}lang"


def wrapped(fragment: str) -> Element:
    """The fragment as the one child of an answer that declares our prefixes and a foreign default."""
    body = f'{xml.DECLARATION}<d:answer{xml.NAMESPACES} xmlns="urn:other">{fragment}</d:answer>'
    (child,) = xml.parse(body.encode()).elements()
    return child


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 4918 §9.1.3")
def test_names_are_resolved_whatever_the_prefix() -> None:
    body = b"""<?xml version="1.0" encoding="utf-8" ?>
      <D:propfind xmlns:D="DAV:">
        <D:prop xmlns:R="http://ns.example.org/boxschema/">
          <R:bigbox/> <R:author/> <x xmlns="DAV:"/> <y/>
        </D:prop>
      </D:propfind>"""
    prop = xml.parse(body).find(D + "prop")
    assert prop is not None
    assert [child.tag for child in prop.elements()] == [
        "{http://ns.example.org/boxschema/}bigbox",
        "{http://ns.example.org/boxschema/}author",
        D + "x",
        "y",
    ]


@pytest.mark.spec("RFC 4918 §17")
def test_one_prefix_may_stand_for_two_namespaces_in_one_document() -> None:
    body = b'<a xmlns="urn:1"><p:b xmlns:p="urn:2"/><p:b xmlns:p="urn:3"/><b/></a>'
    assert [child.tag for child in xml.parse(body).elements()] == ["{urn:2}b", "{urn:3}b", "{urn:1}b"]


def test_mixed_content_keeps_its_order() -> None:
    element = xml.parse(b"<a>1<b k='v'>2</b><![CDATA[<3>]]>&amp;&#52;<!-- no --><c/>5</a>")
    assert element.children == ("1", Element("b", (("k", "v"),), ("2",)), "<3>&4", Element("c"), "5")
    assert element.text == "1<3>&45"
    assert [one.tag for one in element.walk()] == ["a", "b", "c"]
    assert element.all("b") == [element.find("b")]
    assert element.elements()[0].get("k") == "v"
    assert element.elements()[0].get("other") is None
    assert element.find("d") is None


@pytest.mark.spec("RFC 4918 §4.3")
def test_the_language_in_scope_belongs_to_an_element() -> None:
    outer = xml.parse(b'<a xml:lang="en"><b><c xml:lang="fr"/></b><d xml:lang=""/></a>')
    assert [(one.tag, one.lang) for one in outer.walk()] == [("a", "en"), ("b", "en"), ("c", "fr"), ("d", "")]
    assert xml.parse(b"<a/>").lang is None


@pytest.mark.parametrize(
    "body",
    [
        "<é>ü</é>".encode(),
        b"\xef\xbb\xbf" + "<é>ü</é>".encode(),
        "<é>ü</é>".encode("utf-16"),
        '<?xml version="1.0" encoding="ISO-8859-1"?><é>ü</é>'.encode("latin-1"),
        '<?xml version="1.0" encoding="UTF-16"?><é>ü</é>'.encode("utf-16"),
    ],
)
@pytest.mark.spec("RFC 4918 §8.2")
def test_the_encodings_of_xml_processors_are_read(body: bytes) -> None:
    assert xml.parse(body) == Element("é", children=("ü",))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  ",
        b"text",
        b"<a>",
        b"<a></b>",
        b"<a/><b/>",
        b"<a>&undefined;</a>",
        b"<a>\xff</a>",
        b"<a>\x00</a>",
        b"<a>&#0;</a>",
        b"<a>&#xFFFE;</a>",
        b"<p:a/>",
        b'<a xmlns:p=""/>',
        b'<a xmlns="urn:{b}"/>',
        b'<a xmlns:p="urn:}" p:b="1"/>',
        b"<a><xml:b/></a>",
        b'<a b="1" b="2"/>',
        b'<a xmlns:p="u" xmlns:q="u" p:b="1" q:b="2"/>',
        b'<?xml version="1.0" encoding="windows-1252"?><a/>',
        b'<?xml version="1.0" encoding="utf-7"?><a/>',
        b'<?xml version="1.0" encoding="punycode"?><a/>',
        b'<?xml version="1.0" encoding="no.such"?><a/>',
        b"<!DOCTYPE a><a/>",
        b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>',
        b'<!DOCTYPE a SYSTEM "http://example.org/a.dtd"><a/>',
        b'<!DOCTYPE a [<!ENTITY % b SYSTEM "file:///etc/passwd">%b;]><a/>',
    ],
)
@pytest.mark.spec("RFC 4918 §20.6")
def test_what_is_not_plain_xml_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        xml.parse(body)


def test_limits_are_exact() -> None:
    assert xml.parse(b"<a><a/></a>", XmlLimits(max_depth=2))
    with pytest.raises(BadRequest):
        xml.parse(b"<a><a><a/></a></a>", XmlLimits(max_depth=2))
    assert xml.parse(b"<a><b c='1'/></a>", XmlLimits(max_elements=3))
    with pytest.raises(BadRequest):
        xml.parse(b"<a><b c='1'/></a>", XmlLimits(max_elements=2))
    assert xml.parse(b"<a/>", XmlLimits(max_bytes=4))
    with pytest.raises(BodyTooLarge):
        xml.parse(b"<a />", XmlLimits(max_bytes=4))
    assert xml.parse(b"<abc/>", XmlLimits(max_name=3))
    with pytest.raises(BadRequest):
        xml.parse(b"<abcd/>", XmlLimits(max_name=3))
    with pytest.raises(BadRequest):
        xml.parse(b"<a abcd=''/>", XmlLimits(max_name=3))


@pytest.mark.parametrize(
    "body",
    [
        b"<a>" * 200_000,
        b"<a>" + b"<b/>" * 200_000 + b"</a>",
        b'<a xmlns="' + b"n" * 500_000 + b'">' + b"<b/>" * 100_000 + b"</a>",
        b"<a " + b" ".join(b"b%d=''" % number for number in range(80_000)) + b"/>",
        b"<a>" + b"".join(b'<b xmlns:p%d="u"/>' % number for number in range(45_000)) + b"</a>",
        b"<a " + b"b" * 900_000 + b"=''/>",
        b"<a>" + b"<b/>&amp;" * 49_000 + b"</a>",
        b"<a>" + b"&#65;" * 200_000 + b"</a>",
    ],
    ids=["depth", "elements", "namespace", "attributes", "prefixes", "name", "pieces", "references"],
)
@pytest.mark.spec("RFC 4918 §20.6")
def test_a_hostile_mebibyte_costs_little(body: bytes) -> None:
    assert len(body) <= 1024 * 1024

    def read() -> None:
        with contextlib.suppress(BadRequest):
            xml.parse(body)

    costs.within(0.5, read)


@given(
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: f"<a>{text}</a>".encode("utf-8", "replace"))
)
def test_garbage_is_a_bad_request_and_nothing_else(body: bytes) -> None:
    try:
        xml.parse(body)
    except BadRequest:
        return


@given(st.text(alphabet="<>/a:b=\"' &;#x!?[]-x mlns\n", max_size=80))
def test_nearly_xml_is_a_bad_request_and_nothing_else(body: str) -> None:
    try:
        found = xml.parse(body.encode())
    except BadRequest:
        return
    assert xml.serialise(wrapped(xml.serialise(found))) == xml.serialise(found)


# -- writing --------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]).filter(xml.is_xml_text), max_size=12)
locals_ = st.from_regex(r"[A-Za-z_é][A-Za-z0-9_.é-]{0,6}", fullmatch=True)
spaces = st.sampled_from(
    ["DAV:", "urn:a", "http://ns.example.org/?a=1&b='2'\"", "urn:ietf:params:xml:ns:caldav"]
)
names = st.builds("{{{}}}{}".format, spaces, locals_) | locals_.filter(
    lambda name: not name.startswith("xmlns")
)
attributes = st.dictionaries(names, texts, max_size=3).map(lambda found: tuple(found.items()))


@st.composite
def elements(draw: st.DrawFn, depth: int = 3) -> Element:
    """Elements as the reader makes them: neighbouring text joined, no empty text."""
    children: list[Element | str] = []
    for _ in range(draw(st.integers(0, 3)) if depth else 0):
        child = draw(elements(depth=depth - 1) | texts.filter(bool))
        if isinstance(child, str) and children and isinstance(children[-1], str):
            continue
        children.append(child)
    return Element(draw(names), draw(attributes), tuple(children))


@given(elements())
@settings(deadline=None)
def test_a_serialised_element_is_read_back_the_same(element: Element) -> None:
    fragment = xml.serialise(element)
    assert xml.parse(fragment.encode()) == element
    assert wrapped(fragment) == element


@pytest.mark.spec("RFC 4918 §4.3")
def test_a_stored_property_keeps_the_language_it_was_in() -> None:
    (inner,) = xml.parse(b'<a xml:lang="en"><b>x<c xml:lang="fr"/><d/></b></a>').elements()
    fragment = xml.serialise(inner)
    assert fragment == '<b xmlns="" xml:lang="en">x<c xml:lang="fr"/><d/></b>'
    assert [one.lang for one in wrapped(fragment).walk()] == ["en", "fr", "en"]


@pytest.mark.spec("RFC 4918 §4.4")
def test_a_stored_property_keeps_other_attributes_of_xml() -> None:
    element = xml.parse(b'<a xml:space="preserve" xml:base="http://example.org/" xml:id="i"> </a>')
    assert xml.parse(xml.serialise(element).encode()) == element


def test_a_namespace_is_declared_once_for_a_nest_of_it() -> None:
    element = xml.parse(b'<a xmlns="urn:n"><b><c/></b><d xmlns="urn:m"/></a>')
    assert xml.serialise(element) == ('<x:a xmlns:x="urn:n"><x:b><x:c/></x:b><x:d xmlns:x="urn:m"/></x:a>')


@given(st.text())
def test_escaped_text_is_always_xml_and_unchanged_where_xml_can_carry_it(text: str) -> None:
    element = xml.parse(f'<a b="{xml.attribute(text)}">{xml.escape(text)}</a>'.encode())
    expected = "".join(char if xml.is_xml_text(char) else "\ufffd" for char in text)
    assert (element.text, element.get("b")) == (expected, expected)


@pytest.mark.parametrize("text", ["\x00", "a\x01b", "\x0b", "\x1f", "\ufffe", "\uffff", "\ud800"])
def test_characters_that_xml_cannot_carry_are_known(text: str) -> None:
    assert not xml.is_xml_text(text)
    assert "\ufffd" in xml.escape(text)
    assert "\ufffd" in xml.attribute(text)


@pytest.mark.parametrize("text", ["", "plain", "\t\r\n", "\x7f\x85", "é日本\U0001f600"])
def test_characters_that_xml_can_carry_are_known(text: str) -> None:
    assert xml.is_xml_text(text)


def test_names_use_the_prefixes_that_every_answer_declares() -> None:
    assert xml.name(D + "prop") == "d:prop"
    assert xml.empty("{urn:ietf:params:xml:ns:caldav}calendar-data") == "<c:calendar-data/>"
    assert xml.tag(D + "href", "/a") == "<d:href>/a</d:href>"
    assert xml.tag(D + "href", "") == "<d:href/>"
    assert xml.tag("{urn:u&}a", "1") == '<x:a xmlns:x="urn:u&amp;">1</x:a>'
    assert xml.name("plain") == 'plain xmlns=""'


@given(names)
def test_any_property_name_can_be_answered(name: str) -> None:
    assert wrapped(xml.empty(name)).tag == name
    assert wrapped(xml.tag(name, "1")) == Element(name, children=("1",))
