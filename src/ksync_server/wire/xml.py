"""XML in and out: a capped, entity-free reader and string writers (no document object model).

Reading uses expat directly with limits checked while it parses. Any DOCTYPE is refused at once, so there are
no entities to expand and nothing outside is ever loaded. Writing is string assembly with the prefixes below
declared once on the root element.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from xml.parsers import expat

from ksync_server.errors import BadRequest, BodyTooLarge

PREFIXES = {
    "DAV:": "d",
    "urn:ietf:params:xml:ns:caldav": "c",
    "urn:ietf:params:xml:ns:carddav": "card",
    "http://calendarserver.org/ns/": "cs",
    "http://apple.com/ns/ical/": "ical",
    "http://me.com/_namespace/": "me",
    "http://owncloud.org/ns": "oc",
    "http://nextcloud.org/ns": "nc",
    "urn:schemas-microsoft-com:": "ms",
}
NAMESPACES = "".join(f' xmlns:{prefix}="{uri}"' for uri, prefix in PREFIXES.items())
DECLARATION = '<?xml version="1.0" encoding="utf-8"?>\n'
_XML = "http://www.w3.org/XML/1998/namespace"
_ENCODINGS = frozenset(("utf-8", "utf-16", "iso-8859-1", "us-ascii"))


@dataclass(frozen=True, slots=True)
class XmlLimits:
    """What one body may hold."""

    max_bytes: int = 1024 * 1024
    max_depth: int = 64  # elements inside each other: filters need 8
    max_elements: int = 50_000  # with their attributes; a multiget of 10,000 hrefs
    max_name: int = 1_000  # characters of a name with its namespace: expat hands out both for every element


@dataclass(frozen=True, slots=True)
class Element:
    """One element with its mixed content in order. Names are Clark: `{DAV:}prop`."""

    tag: str
    attributes: tuple[tuple[str, str], ...] = ()
    children: tuple[Element | str, ...] = ()
    lang: str | None = None  # xml:lang in scope (RFC 4918 §4.3)

    @property
    def text(self) -> str:
        """The text directly inside."""
        return "".join([child for child in self.children if isinstance(child, str)])

    def elements(self) -> list[Element]:
        """The child elements."""
        return [child for child in self.children if isinstance(child, Element)]

    def find(self, tag: str) -> Element | None:
        """The first child of that name."""
        for child in self.children:
            if isinstance(child, Element) and child.tag == tag:
                return child
        return None

    def all(self, tag: str) -> list[Element]:
        """Every child of that name."""
        return [child for child in self.elements() if child.tag == tag]

    def get(self, attribute: str) -> str | None:
        """An attribute's value by its Clark or plain name."""
        for name, value in self.attributes:
            if name == attribute:
                return value
        return None

    def walk(self) -> Iterator[Element]:
        """This element and every one below, in document order."""
        yield self
        for child in self.elements():
            yield from child.walk()


class _Builder:
    """Collects expat's events; raises as soon as a limit is passed."""

    def __init__(self, limits: XmlLimits) -> None:
        self._limits = limits
        self._open: list[tuple[str, tuple[tuple[str, str], ...], list[Element | str], str | None]] = []
        self._count = 0
        self._names: dict[str, str] = {}  # each Clark name once, however often it occurs
        self.root: Element | None = None

    def declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding is not None and encoding.lower() not in _ENCODINGS:
            raise BadRequest("The XML body is in an encoding that is not accepted; send UTF-8.")

    def namespace(self, prefix: str | None, uri: str | None) -> None:
        # Before the elements in it: a long one would be copied for each of them.
        if uri is None:
            return
        if len(uri) > self._limits.max_name:
            raise BadRequest("The XML body has a namespace that is too long.")
        if "}" in uri:
            # No URI has one, and many a reader (ElementTree, so WsgiDAV too) refuses the document for it.
            raise BadRequest("The XML body has a namespace that is no URI.")

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._count += 1 + len(attributes)
        if self._count > self._limits.max_elements or len(self._open) >= self._limits.max_depth:
            raise BadRequest("The XML body has too many elements or is nested too deep.")
        if name.startswith(_XML + " "):
            # Reserved (Namespaces in XML §3), and no other prefix may stand for it in an answer.
            raise BadRequest("The XML body has an element of the reserved namespace of xml.")
        inherited = self._open[-1][3] if self._open else None
        if not attributes:
            self._open.append((self._clark(name), (), [], inherited))
            return
        clean = tuple((self._clark(key), value) for key, value in attributes.items())
        self._open.append((self._clark(name), clean, [], attributes.get(f"{_XML} lang", inherited)))

    def _clark(self, name: str) -> str:
        known = self._names.get(name)
        if known is None:
            if len(name) > self._limits.max_name:
                raise BadRequest("The XML body has a name that is too long.")
            uri, space, local = name.rpartition(" ")
            known = self._names[name] = f"{{{uri}}}{local}" if space else name
        return known

    def text(self, data: str) -> None:
        content = self._open[-1][2]
        if content and isinstance(content[-1], str):
            content[-1] += data
        else:
            content.append(data)

    def end(self, name: str) -> None:
        tag, attributes, content, lang = self._open.pop()
        element = Element(tag, attributes, tuple(content), lang)
        if self._open:
            self._open[-1][2].append(element)
        else:
            self.root = element

    def doctype(self, *_: object) -> None:
        raise BadRequest("A DOCTYPE is not accepted.")


def parse(body: bytes, limits: XmlLimits = XmlLimits()) -> Element:
    """One XML document.

    Args:
        body: UTF-8, UTF-16 with its mark, or the encoding that the document declares: US-ASCII, ISO-8859-1.
        limits: checked while parsing.

    Raises:
        BodyTooLarge: over `max_bytes`.
        BadRequest: not well-formed, not namespace well-formed, another encoding, a DOCTYPE, or over another
            limit.

    Spec: RFC 4918 §8.2, §17, §20.6. Cost: linear, no network, no entities.
    """
    if len(body) > limits.max_bytes:
        raise BodyTooLarge(f"At most {limits.max_bytes} bytes of XML are accepted.")
    builder = _Builder(limits)
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.buffer_size = 65536
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.text
    parser.StartDoctypeDeclHandler = builder.doctype
    parser.StartNamespaceDeclHandler = builder.namespace
    parser.XmlDeclHandler = builder.declaration
    try:
        parser.Parse(body, True)
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise BadRequest(f"The XML body is not well-formed: {error}") from None
    finally:
        # Handlers hold the parser and it holds them: without this, garbage waits for the collector.
        parser.StartElementHandler = parser.EndElementHandler = None
        parser.CharacterDataHandler = parser.StartDoctypeDeclHandler = None
        parser.StartNamespaceDeclHandler = parser.XmlDeclHandler = None
    if builder.root is None:
        raise BadRequest("The XML body is empty.")
    return builder.root


# -- writing --------------------------------------------------------------------------------------

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SPECIAL = re.compile("[&<>\r]|[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SPECIAL_ATTRIBUTE = re.compile('[&<>"\t\n\r]|[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]')
_ENTITIES = {
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    '"': "&quot;",
    "\r": "&#13;",
    "\n": "&#10;",
    "\t": "&#9;",
}


def is_xml_text(text: str) -> bool:
    """Whether XML 1.0 can carry every character (XML §2.2)."""
    return _NOT_XML.search(text) is None


def _entity(match: re.Match[str]) -> str:
    return _ENTITIES.get(match[0], "\ufffd")


def escape(text: str) -> str:
    """Character data; what XML cannot carry becomes U+FFFD (XML §2.2).

    Cost: one scan, and a copy for each kind of character to be replaced: objects have a CR in every line.
    """
    if _SPECIAL.search(text) is None:
        return text
    if _NOT_XML.search(text):
        text = _NOT_XML.sub("\ufffd", text)
    for character in "&<>\r":
        if character in text:
            text = text.replace(character, _ENTITIES[character])
    return text


def attribute(text: str) -> str:
    """An attribute's value for double quotes; white space survives the reader (XML §3.3.3)."""
    return _SPECIAL_ATTRIBUTE.sub(_entity, text) if _SPECIAL_ATTRIBUTE.search(text) else text


@lru_cache(maxsize=2048)
def name(clark: str) -> str:
    """The start of a tag for a Clark name: `d:prop`, or `x:foo xmlns:x="..."` for an unknown namespace."""
    if not clark.startswith("{"):
        return f'{clark} xmlns=""'
    uri, _, local = clark[1:].rpartition("}")
    prefix = PREFIXES.get(uri)
    if prefix:
        return f"{prefix}:{local}"
    return f'x:{local} xmlns:x="{attribute(uri)}"' if uri else f'{local} xmlns=""'


def empty(clark: str) -> str:
    """`<d:prop/>`."""
    return f"<{name(clark)}/>"


def tag(clark: str, inner: str) -> str:
    """`<d:prop>inner</d:prop>`; `inner` is markup already."""
    start = name(clark)
    return f"<{start}>{inner}</{start.partition(' ')[0]}>" if inner else f"<{start}/>"


def serialise(element: Element) -> str:
    """A fragment that declares its own namespaces, so that it can be stored and put into any answer.

    `parse` gives the same element back, but that a language in scope is written on the outermost element.

    Spec: RFC 4918 §4.3. Cost: linear.
    """
    pieces: list[str] = []
    _write(element, pieces, None, None)
    return "".join(pieces)


def _write(element: Element, pieces: list[str], outer: str | None, lang: str | None) -> None:
    """`outer` is the namespace of the element around this one, None where anything may be in scope."""
    uri, _, local = element.tag[1:].rpartition("}") if element.tag.startswith("{") else ("", "", element.tag)
    plain = f"x:{local}" if uri else local
    pieces.append(f"<{plain}")
    if uri != outer:
        pieces.append(f' xmlns:x="{attribute(uri)}"' if uri else ' xmlns=""')
    _write_attributes(element, pieces, lang)
    if not element.children:
        pieces.append("/>")
        return
    pieces.append(">")
    for child in element.children:
        if isinstance(child, str):
            pieces.append(escape(child))
        else:
            _write(child, pieces, uri, element.lang)
    pieces.append(f"</{plain}>")


def _write_attributes(element: Element, pieces: list[str], lang: str | None) -> None:
    has_lang = False
    for number, (key, value) in enumerate(element.attributes):
        text = attribute(value)
        space, _, local = key[1:].rpartition("}") if key.startswith("{") else ("", "", key)
        if space == _XML:  # no other prefix may stand for it (Namespaces in XML §3)
            has_lang = has_lang or local == "lang"
            pieces.append(f' xml:{local}="{text}"')
        elif space:
            pieces.append(f' xmlns:a{number}="{attribute(space)}" a{number}:{local}="{text}"')
        else:
            pieces.append(f' {key}="{text}"')
    if element.lang is not None and element.lang != lang and not has_lang:
        pieces.append(f' xml:lang="{attribute(element.lang)}"')
