"""Requests whose end two programs could see in different places: refused and closed, and nothing smuggled.

Also who a request on a kept connection comes from, and heads that are slow or huge.

Every row sends, behind or inside a request, the bytes of another one: a PUT of `smuggled`. It must never be
carried out, except where it stands behind a whole request as the next one. The rows follow what is known in
public: CL.TE, TE.CL, TE.TE (the mutations of smuggler.py), CL.0 and 0.CL, funky chunks, HTTP/0.9 and 1.0.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from conformance.client import Client, basic
from conformance.conftest import Collection
from conformance.target import Target

REFUSED = "refused"  # one answer, 4xx or 5xx, then the end of the connection
KEPT = "kept"  # one answer without an effect; the body was read away and the connection goes on
BODY = "body"  # one answer 2xx: all that followed was the body of the front request, as it declared
ENDED = "ended"  # one answer 2xx to a whole request, then the end: what followed made no sense
NEXT = "next"  # the front request ended where it says, and what followed was the next one, rightly
WAITS = "waits"  # no answer yet: the body that was declared is not whole


@dataclass(frozen=True, slots=True)
class Row:
    """Bytes for one connection.

    In them @FRONT@ is the path of a file, @HOST@ and @AUTH@ are what they say, @PUT@ is the whole other
    request, @LEN@ the number of bytes behind the first head.
    """

    title: str
    payload: bytes
    outcome: str


def front(fields: bytes, body: bytes, line: bytes = b"PUT @FRONT@ HTTP/1.1") -> bytes:
    """A request with some fields, and what comes behind its head."""
    fields = fields + b"\r\n" if fields else b""
    return line + b"\r\nHost: @HOST@\r\n@AUTH@\r\n" + fields + b"\r\n" + body


QUIET_S = 0.3
FIELDS = b"X: y\r\n"
CL = b"Content-Length: @LEN@"
TE = b"Transfer-Encoding: chunked"
END = b"0\r\n\r\n"
PUT = b"@PUT@"


def te(title: str, fields: bytes, with_length: str, alone: str | None = None) -> list[Row]:
    """A mutation of Transfer-Encoding, with a length beside it and without one."""
    return [
        Row(f"TE {title}, with a length", front(fields + b"\r\n" + CL, END + PUT), with_length),
        Row(f"TE {title}, length first", front(CL + b"\r\n" + fields, END + PUT), with_length),
        Row(f"TE {title}, alone", front(fields, END + PUT), alone or with_length),
    ]


def cl(title: str, fields: bytes, outcome: str = REFUSED) -> Row:
    """A mutation of Content-Length; the other request stands where a length of 0 or none would end."""
    return Row(f"CL {title}", front(fields, PUT), outcome)


def chunk(title: str, body: bytes, outcome: str = REFUSED) -> Row:
    """A chunked body; the other request is inside it, or behind its end."""
    return Row(f"chunk {title}", front(TE, body), outcome)


def head(title: str, payload: bytes, outcome: str = REFUSED) -> Row:
    """Anything else about a head."""
    return Row(f"head {title}", payload, outcome)


def fill(template: bytes, client: Client, path: str) -> bytes:
    """A row's bytes for a server and a folder."""
    base = urlsplit(client.base)
    auth = f"Authorization: {basic(client.login, client.password)}".encode()
    other = client.head("PUT", path + "smuggled", "Content-Length: 1") + b"\r\nx"
    for token, value in (
        (b"@SIZE@", b"%x" % len(other)),
        (b"@PUT@", other),
        (b"@FRONT@", (path + "front").encode()),
        (b"@HOST@", base.netloc.encode()),
        (b"@AUTH@", auth),
    ):
        template = template.replace(token, value)
    behind = len(template.partition(b"\r\n\r\n")[2])
    return template.replace(b"@LEN@", b"%d" % behind).replace(b"@LEN+1@", b"%d" % (behind + 1))


def exchange(client: Client, payload: bytes) -> tuple[list[int], int | None]:
    """Statuses of the answers, and that of a further request; None where the server closed before it."""
    base = urlsplit(client.base)
    with socket.create_connection((base.hostname or "", base.port or 80), timeout=5) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(payload)
        received, closed = read(connection)
        further = None
        if received and not closed:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(client.head("OPTIONS", "", "Connection: close") + b"\r\n")
            more, _ = read(connection)
            further = (statuses(more) or [None])[-1]
    return statuses(received), further if received else (None if closed else 0)


def read(connection: socket.socket) -> tuple[bytes, bool]:
    """What comes until the end, or until nothing came for a while behind an answer that leaves it open."""
    received = b""
    connection.settimeout(2)
    try:
        while piece := connection.recv(65536):
            received += piece
            if b"connection: close" not in received.lower():
                connection.settimeout(QUIET_S)
            else:
                connection.settimeout(10)  # it reads on for a while before it closes
    except ConnectionResetError:
        return received, True
    except TimeoutError:
        return received, False
    return received, True


def statuses(received: bytes) -> list[int]:
    """Of all final answers."""
    found = [int(match[1]) for match in _STATUS.finditer(received)]
    return [status for status in found if status != 100]


def outcome_of(client: Client, payload: bytes, path: str) -> tuple[str, object]:
    """What became of a row, and what was seen."""
    answers, further = exchange(client, payload)
    made = client.members(path)
    seen = (answers, further, made)
    good = [status for status in answers if status < 300]
    match len(answers):
        case 0:
            outcome = WAITS if further == 0 and not made else "no answer"
        case 1 if further is None:
            outcome = REFUSED if not good and not made else ENDED if good and made <= {"front"} else "?"
        case 1 if further == 200:
            outcome = BODY if made == {"front"} else KEPT if not made else "?"
        case 2 if further == 200:
            outcome = NEXT if made == {"front", "smuggled"} and len(good) == 2 else "?"
        case _:
            outcome = "?"
    return outcome, seen


_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n<]*\r\n")


ROWS = [
    *te("plain", b"Transfer-Encoding: chunked", REFUSED, NEXT),
    *te("no blank", b"Transfer-Encoding:chunked", REFUSED, NEXT),
    *te("tab", b"Transfer-Encoding:\tchunked", REFUSED, NEXT),
    *te("blanks", b"Transfer-Encoding:   chunked  ", REFUSED, NEXT),
    *te("tab behind", b"Transfer-Encoding: chunked\t", REFUSED),
    *te("other case", b"TrAnSFer-EnCODinG: cHuNkeD", REFUSED, NEXT),
    *te("tab before the colon", b"Transfer-Encoding\t: chunked", REFUSED),
    *te("space before the colon", b"Transfer-Encoding : chunked", REFUSED),
    *te("space before the name", b" Transfer-Encoding: chunked", REFUSED),
    *te("space in the name", b"Transfer Encoding: chunked", REFUSED),
    *te("underscore", b"Transfer_Encoding: chunked", BODY, ENDED),
    *te("of another field", b"Content-Encoding: chunked", KEPT, REFUSED),
    *te("vertical tab", b"Transfer-Encoding:\x0bchunked", REFUSED),
    *te("form feed", b"Transfer-Encoding:\x0cchunked", REFUSED),
    *te("0xFF", b"Transfer-Encoding:\xffchunked", REFUSED),
    *te("0xA0", b"Transfer-Encoding: chunked\xa0", REFUSED),
    *te("accent in the value", b"Transfer-Encoding: ch\x96nked", REFUSED),
    *te("accent in the name", b"Transf\x82r-Encoding: chunked", REFUSED),
    *te("chunked, cow", b"Transfer-Encoding: chunked, cow", REFUSED),
    *te("cow, chunked", b"Transfer-Encoding: cow, chunked", REFUSED),
    *te("chunked, identity", b"Transfer-Encoding: chunked, identity", REFUSED),
    *te("identity", b"Transfer-Encoding: identity", REFUSED),
    *te("chunked twice in one", b"Transfer-Encoding: chunked, chunked", REFUSED),
    *te("comma first", b"Transfer-Encoding: ,chunked", REFUSED),
    *te("comma last", b"Transfer-Encoding: chunked,", REFUSED),
    *te("two fields, cow last", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: cow", REFUSED),
    *te("two fields, cow first", b"Transfer-Encoding: cow\r\nTransfer-Encoding: chunked", REFUSED),
    *te("two fields", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", REFUSED),
    *te("two fields, one empty", b"Transfer-Encoding:\r\nTransfer-Encoding: chunked", REFUSED),
    *te("empty", b"Transfer-Encoding:", REFUSED),
    *te("quoted", b'Transfer-Encoding: "chunked"', REFUSED),
    *te("apostrophes", b"Transfer-Encoding: 'chunked'", REFUSED),
    *te("brackets", b"Transfer-Encoding: [chunked]", REFUSED),
    *te("prefix", b"Transfer-Encoding: chunk", REFUSED),
    *te("longer", b"Transfer-Encoding: chunkedx", REFUSED),
    *te("nested", b"Transfer-Encoding: cow chunked bar", REFUSED),
    *te("parameter", b"Transfer-Encoding: chunked;q=1", REFUSED),
    *te("colon", b"Transfer-Encoding: chunked:", REFUSED),
    *te("folded", b"Transfer-Encoding:\r\n chunked", REFUSED),
    *te("folded by a tab", b"Transfer-Encoding:\r\n\tchunked", REFUSED),
    *te("folded behind", b"Transfer-Encoding: chunked\r\n , cow", REFUSED),
    *te("folded by LF", b"Transfer-Encoding:\n chunked", REFUSED),
    *te("colon on the next line", b"Transfer-Encoding\r\n : chunked", REFUSED),
    *te("CR behind", b"Transfer-Encoding: chunked\r", REFUSED),
    *te("CR in the name", b"Transfer\r-Encoding: chunked", REFUSED),
    *te("behind a bare CR", b"X: X\rTransfer-Encoding: chunked", REFUSED),
    *te("behind a bare LF", b"X: X\nTransfer-Encoding: chunked", REFUSED),
    *te("behind two CR", b"X: X\r\r\nTransfer-Encoding: chunked", REFUSED),
    *te("NUL behind", b"Transfer-Encoding: chunked\x00", REFUSED),
    *te("NUL before", b"Transfer-Encoding:\x00chunked", REFUSED),
    *te("NUL in the name", b"Transfer-Encoding\x00: chunked", REFUSED),
    *te("no name", b": chunked\r\nTransfer-Encoding: chunked", REFUSED),
    *te("no colon", b"Transfer-Encoding chunked", REFUSED),
    *te("one letter a line, folded", b"Transfer-Encoding: c\r\n hunked", REFUSED),
    *te("named by Connection", b"Transfer-Encoding: chunked\r\nConnection: Transfer-Encoding", REFUSED, NEXT),
    cl("none", b"X: y", NEXT),
    cl("right", CL, BODY),
    cl("leading zero", b"Content-Length: 0@LEN@", BODY),
    cl("zero", b"Content-Length: 0", NEXT),
    cl("blanks around", b"Content-Length:   @LEN@  ", BODY),
    cl("twice, alike", CL + b"\r\n" + CL),
    cl("twice, 0 first", b"Content-Length: 0\r\n" + CL),
    cl("twice, 0 last", CL + b"\r\nContent-Length: 0"),
    cl("list alike", b"Content-Length: @LEN@, @LEN@"),
    cl("list", b"Content-Length: 0, @LEN@"),
    cl("plus", b"Content-Length: +@LEN@"),
    cl("minus", b"Content-Length: -1"),
    cl("minus zero", b"Content-Length: -0"),
    cl("hexadecimal", b"Content-Length: 0x20"),
    cl("exponent", b"Content-Length: 1e2"),
    cl("decimal point", b"Content-Length: 5.0"),
    cl("underscore in the number", b"Content-Length: 1_0"),
    cl("blank in the number", b"Content-Length: 1 0"),
    cl("letter behind", b"Content-Length: @LEN@a"),
    cl("semicolon", b"Content-Length: @LEN@;"),
    cl("quoted", b'Content-Length: "@LEN@"'),
    cl("empty", b"Content-Length:"),
    cl("blank", b"Content-Length: "),
    cl("digits that are no ASCII", "Content-Length: \u0661".encode()),
    cl("superscript", b"Content-Length: \xb2"),
    cl("2^64", b"Content-Length: 18446744073709551616"),
    cl("2^64 + 5", b"Content-Length: 18446744073709551621"),
    cl("2^63", b"Content-Length: 9223372036854775808"),
    cl("400 digits", b"Content-Length: " + b"9" * 400),
    cl("vertical tab", b"Content-Length:\x0b@LEN@"),
    cl("NUL behind", b"Content-Length: @LEN@\x00"),
    cl("space before the colon", b"Content-Length : @LEN@"),
    cl("tab before the colon", b"Content-Length\t: @LEN@"),
    cl("space before the name", b" Content-Length: @LEN@"),
    cl("space in the name", b"Content Length: @LEN@"),
    cl("underscore in the name", b"Content_Length: @LEN@", NEXT),
    cl("folded", b"Content-Length:\r\n @LEN@"),
    cl("folded, a digit on each line", b"Content-Length: 1\r\n 0"),
    cl("behind a bare CR", b"X: y\rContent-Length: @LEN@"),
    cl("behind a bare LF", b"X: y\nContent-Length: @LEN@"),
    cl("CR behind", b"Content-Length: @LEN@\r"),
    cl("named by Connection", CL + b"\r\nConnection: Content-Length", BODY),
    chunk("good", b"3\r\nabc\r\n0\r\n\r\n" + PUT, NEXT),
    chunk("inside", b"@SIZE@\r\n@PUT@\r\n0\r\n\r\n", BODY),
    chunk("upper case", b"A\r\n0123456789\r\n0\r\n\r\n" + PUT, NEXT),
    chunk("leading zeros", b"0003\r\nabc\r\n000\r\n\r\n" + PUT, NEXT),
    chunk("0x", b"0x3\r\nabc\r\n0\r\n\r\n" + PUT),
    chunk("plus", b"+3\r\nabc\r\n0\r\n\r\n" + PUT),
    chunk("minus", b"-3\r\nabc\r\n0\r\n\r\n" + PUT),
    chunk("underscore", b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n" + PUT),
    chunk("no size", b"\r\nabc\r\n0\r\n\r\n" + PUT),
    chunk("blank before the size", b" 3\r\nabc\r\n0\r\n\r\n" + PUT),
    chunk("blank behind the size", b"3 \r\nabc\r\n0\r\n\r\n" + PUT),
    chunk("tab behind the size", b"3\t\r\nabc\r\n0\r\n\r\n" + PUT),
    chunk("NUL behind the size", b"3\x00\r\nabc\r\n0\r\n\r\n" + PUT),
    chunk("2^64", b"10000000000000000\r\n" + PUT),
    chunk("2^64 + 3", b"10000000000000003\r\nabc\r\n0\r\n\r\n" + PUT),
    chunk("2^64 - 1", b"ffffffffffffffff\r\n" + PUT, WAITS),
    chunk("2^32 + 3 is not 3", b"100000003\r\nabc\r\n0\r\n\r\n" + PUT, WAITS),
    chunk("many zeros", b"0" * 40 + b"3\r\nabc\r\n0\r\n\r\n" + PUT, NEXT),
    chunk("extension", b"3;a=b\r\nabc\r\n0;c\r\n\r\n" + PUT, NEXT),
    chunk("quoted extension", b'3;a="b c"\r\nabc\r\n0\r\n\r\n' + PUT, NEXT),
    chunk("extension with a quoted line end", b'3;a="b\r\nabc\r\n0\r\n\r\n' + PUT),
    chunk("extension with a bare LF", b"3;a\nabc\r\n0\r\n\r\n" + PUT),
    chunk("extension with a bare CR", b"3;a\rb\r\nabc\r\n0\r\n\r\n" + PUT),
    chunk("extension with a NUL", b"3;a\x00\r\nabc\r\n0\r\n\r\n" + PUT),
    chunk("bare semicolon", b"3;\r\nabc\r\n0\r\n\r\n" + PUT),
    chunk("bare semicolon and LF (TERM.EXT)", b"3;\nabc\r\n0\r\n\r\n" + PUT),
    chunk("size ended by LF", b"3\nabc\r\n0\r\n\r\n" + PUT),
    chunk("size ended by CR", b"3\rabc\r\n0\r\n\r\n" + PUT),
    chunk("size ended by CR CR LF", b"3\r\r\nabc\r\n0\r\n\r\n" + PUT),
    chunk("data ended by LF", b"3\r\nabc\n0\r\n\r\n" + PUT),
    chunk("data ended by CR", b"3\r\nabc\r0\r\n\r\n" + PUT),
    chunk("data ended by two other bytes (SPILL)", b"3\r\nabcXX0\r\n\r\n" + PUT),
    chunk("data without an end", b"3\r\nabc0\r\n\r\n" + PUT),
    chunk("data longer than its size", b"3\r\nabcdef\r\n0\r\n\r\n" + PUT),
    chunk("last chunk ended by LF", b"3\r\nabc\r\n0\n\r\n" + PUT),
    chunk("end by LF alone", b"3\r\nabc\r\n0\r\n\n" + PUT),
    chunk("end by LF LF", b"3\r\nabc\r\n0\n\n" + PUT),
    chunk("end by CR", b"3\r\nabc\r\n0\r\n\r" + PUT),
    chunk("no last chunk", b"3\r\nabc\r\n" + PUT),
    chunk("trailer", b"3\r\nabc\r\n0\r\nT: x\r\n\r\n" + PUT, NEXT),
    chunk("trailer Content-Length", b"3\r\nabc\r\n0\r\nContent-Length: 99\r\n\r\n" + PUT, REFUSED),
    chunk("trailer Transfer-Encoding", b"3\r\nabc\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n" + PUT, REFUSED),
    chunk("trailer Host", b"3\r\nabc\r\n0\r\nHost: elsewhere.example.org\r\n\r\n" + PUT, NEXT),
    chunk("trailer with a bare LF", b"3\r\nabc\r\n0\r\nT: x\n\r\n" + PUT),
    chunk("trailer with a space before the colon", b"3\r\nabc\r\n0\r\nT : x\r\n\r\n" + PUT),
    chunk("trailer folded", b"3\r\nabc\r\n0\r\nT: x\r\n y\r\n\r\n" + PUT),
    chunk("trailer that is the other request", b"3\r\nabc\r\n0\r\n" + PUT),
    head("HTTP/0.9", b"GET @FRONT@\r\n" + PUT),
    head("HTTP/0.9 with fields", b"PUT @FRONT@\r\nHost: @HOST@\r\n@AUTH@\r\n\r\n" + PUT),
    head("HTTP/0.9 by name", front(b"Content-Length: 0", PUT, b"PUT @FRONT@ HTTP/0.9")),
    head("HTTP/1.0 with chunks", front(TE, END + PUT, b"PUT @FRONT@ HTTP/1.0")),
    head("HTTP/1.0 with chunks and a length", front(TE + b"\r\n" + CL, END + PUT, b"PUT @FRONT@ HTTP/1.0")),
    head("HTTP/1.0, something behind", front(b"Content-Length: 0", PUT, b"PUT @FRONT@ HTTP/1.0"), ENDED),
    head(
        "HTTP/1.0 keep-alive, something behind",
        front(b"Content-Length: 0\r\nConnection: keep-alive", PUT, b"PUT @FRONT@ HTTP/1.0"),
        ENDED,
    ),
    head("HTTP/1.2", front(b"Content-Length: 0", PUT, b"PUT @FRONT@ HTTP/1.2")),
    head("HTTP/1.10", front(b"Content-Length: 0", PUT, b"PUT @FRONT@ HTTP/1.10")),
    head("HTTP/01.1", front(b"Content-Length: 0", PUT, b"PUT @FRONT@ HTTP/01.1")),
    head("HTTP/2.0", front(b"Content-Length: 0", PUT, b"PUT @FRONT@ HTTP/2.0")),
    head("http in lower case", front(b"Content-Length: 0", PUT, b"PUT @FRONT@ http/1.1")),
    head("no version number", front(b"Content-Length: 0", PUT, b"PUT @FRONT@ HTTP/")),
    head("preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + PUT),
    head("TLS ClientHello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + PUT),
    head("PROXY line", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + PUT),
    head("ICE, RTSP", front(b"Content-Length: 0", PUT, b"PUT @FRONT@ RTSP/1.0")),
    head("unknown method", front(b"Content-Length: 0", PUT, b"FOO @FRONT@ HTTP/1.1")),
    head("method in lower case", front(b"Content-Length: 0", PUT, b"put @FRONT@ HTTP/1.1")),
    head("space before the method", front(b"Content-Length: 0", PUT, b" PUT @FRONT@ HTTP/1.1")),
    head("two spaces", front(b"Content-Length: 0", PUT, b"PUT  @FRONT@ HTTP/1.1"), NEXT),
    head("tab for a space", front(b"Content-Length: 0", PUT, b"PUT\t@FRONT@ HTTP/1.1")),
    head("space in the target", front(b"Content-Length: 0", PUT, b"PUT @FRONT@ x HTTP/1.1")),
    head("CR in the target", front(b"Content-Length: 0", PUT, b"PUT @FRONT@\rx HTTP/1.1")),
    head("NUL in the target", front(b"Content-Length: 0", PUT, b"PUT @FRONT@\x00 HTTP/1.1")),
    head("line ended by LF", front(b"Content-Length: 0", PUT).replace(b"1.1\r\n", b"1.1\n", 1)),
    head("line ended by CR", front(b"Content-Length: 0", PUT).replace(b"1.1\r\n", b"1.1\r", 1)),
    head("field ended by LF", front(b"X: y\nContent-Length: 0", PUT)),
    head("ended by LF LF", front(b"Content-Length: 0", b"").replace(b"\r\n\r\n", b"\n\n") + PUT),
    head("ended by CR LF LF", front(b"Content-Length: 0", b"").replace(b"\r\n\r\n", b"\r\n\n") + PUT),
    head("an empty line first", b"\r\n" + front(b"Content-Length: 0", PUT), NEXT),
    head("an empty name", front(b": x\r\nContent-Length: 0", PUT)),
    head("a field without a colon", front(b"nonsense\r\nContent-Length: 0", PUT)),
    head(
        "the first field folded",
        b"PUT @FRONT@ HTTP/1.1\r\n Host: @HOST@\r\n@AUTH@\r\nContent-Length: 0\r\n\r\n" + PUT,
    ),
    head("a folded value", front(b"X: a\r\n b\r\nContent-Length: 0", PUT)),
    head("a NUL in a value", front(b"X: a\x00b\r\nContent-Length: 0", PUT)),
    head("a CR in a value", front(b"X: a\rb\r\nContent-Length: 0", PUT)),
    head("a DEL in a value", front(b"X: a\x7fb\r\nContent-Length: 0", PUT)),
    head("brackets in a name", front(b"X(y): a\r\nContent-Length: 0", PUT)),
    head("no Host", b"PUT @FRONT@ HTTP/1.1\r\n@AUTH@\r\nContent-Length: 0\r\n\r\n" + PUT),
    head("two Hosts", front(b"Host: elsewhere.example.org\r\nContent-Length: 0", PUT)),
    head("two Hosts alike", front(b"Host: @HOST@\r\nContent-Length: 0", PUT)),
    head("an empty Host", b"GET / HTTP/1.1\r\nHost:\r\nContent-Length: @LEN@\r\n\r\n" + PUT, KEPT),
    head(
        "a list of Hosts",
        b"GET / HTTP/1.1\r\nHost: @HOST@, elsewhere\r\nContent-Length: @LEN@\r\n\r\n" + PUT,
        KEPT,
    ),
    head(
        "a user in Host", b"GET / HTTP/1.1\r\nHost: user@@HOST@\r\nContent-Length: @LEN@\r\n\r\n" + PUT, KEPT
    ),
    head("a path in Host", b"GET / HTTP/1.1\r\nHost: @HOST@/x\r\nContent-Length: @LEN@\r\n\r\n" + PUT, KEPT),
    head(
        "a foreign Host",
        b"GET / HTTP/1.1\r\nHost: elsewhere.example.org\r\nContent-Length: @LEN@\r\n\r\n" + PUT,
        KEPT,
    ),
    head(
        "an absolute target of a foreign host",
        front(CL, PUT, b"PUT http://elsewhere.example.org@FRONT@ HTTP/1.1"),
        KEPT,
    ),
    head("an absolute target", front(CL, PUT, b"PUT http://@HOST@@FRONT@ HTTP/1.1"), BODY),
    head(
        "an absolute target without Host",
        b"PUT http://@HOST@@FRONT@ HTTP/1.1\r\n@AUTH@\r\n" + CL + b"\r\n\r\n" + PUT,
    ),
    head("another scheme", front(CL, PUT, b"PUT ftp://@HOST@@FRONT@ HTTP/1.1")),
    head("a target without a slash", front(CL, PUT, b"PUT front HTTP/1.1")),
    head("CONNECT", b"CONNECT @HOST@ HTTP/1.1\r\nHost: @HOST@\r\n@AUTH@\r\n\r\n" + PUT),
    head("TRACE with a body", front(CL, PUT, b"TRACE @FRONT@ HTTP/1.1"), KEPT),
    head(
        "an upgrade, something behind",
        front(b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 0", PUT),
        ENDED,
    ),
    head(
        "an upgrade to HTTP/2, something behind",
        front(
            b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\nContent-Length: 0",
            PUT,
        ),
        ENDED,
    ),
    head(
        "an upgrade with a body",
        front(b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + CL, PUT),
        ENDED,
    ),
    head("Connection: close, something behind", front(b"Content-Length: 0\r\nConnection: close", PUT), ENDED),
    head(
        "401 with the other request as its body",
        b"PUT @FRONT@ HTTP/1.1\r\nHost: @HOST@\r\n" + CL + b"\r\n\r\n" + PUT,
        KEPT,
    ),
    head("409 with the other request as its body", front(CL, PUT, b"PUT @FRONT@/none/x HTTP/1.1"), KEPT),
    head(
        "409 with it as a chunked body",
        front(TE, b"@SIZE@\r\n" + PUT + b"\r\n" + END, b"PUT @FRONT@/none/x HTTP/1.1"),
    ),
    head(
        "409, expecting 100, which sends anyway",
        front(CL + b"\r\nExpect: 100-continue", PUT, b"PUT @FRONT@/none/x HTTP/1.1"),
    ),
    head("413, a body larger than is read away", front(b"Content-Length: 99999999999999", PUT)),
    head("416, Content-Range", front(CL + b"\r\nContent-Range: bytes 0-1/2", PUT), KEPT),
    head("an unknown expectation (0.CL)", front(CL + b"\r\nExpect: y 100-continue", PUT), BODY),
    head(
        "two expectations (0.CL)", front(CL + b"\r\nExpect: 100-continue\r\nExpect: 100-continue", PUT), BODY
    ),
    head("GET with a body (CL.0)", front(CL, PUT, b"GET @FRONT@ HTTP/1.1"), KEPT),
    head("GET with chunks", front(TE, b"@SIZE@\r\n" + PUT + b"\r\n" + END, b"GET @FRONT@ HTTP/1.1")),
    head("HEAD with a body", front(CL, PUT, b"HEAD @FRONT@ HTTP/1.1"), KEPT),
    head("DELETE with a body", front(CL, PUT, b"DELETE @FRONT@ HTTP/1.1"), KEPT),
    head("OPTIONS * with a body", front(CL, PUT, b"OPTIONS * HTTP/1.1"), KEPT),
    head("a redirect with a body (CL.0)", front(CL, PUT, b"GET /.well-known/caldav HTTP/1.1"), KEPT),
    head("a length longer than what came", front(b"Content-Length: @LEN+1@", PUT), WAITS),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_the_end_of_a_request_is_never_in_doubt(folder: Collection, row: Row) -> None:
    outcome, seen = outcome_of(folder.client, fill(row.payload, folder.client, folder.path), folder.path)
    assert outcome == row.outcome, seen


# -- heads that are slow or huge ------------------------------------------------------------------


def test_a_head_that_trickles_is_ended(folder: Collection) -> None:
    base = urlsplit(folder.client.base)
    started = time.monotonic()
    received = b""
    with socket.create_connection((base.hostname or "", base.port or 80), timeout=0.25) as connection:
        connection.sendall(folder.client.head("GET", folder.path))
        while time.monotonic() - started < 30:
            try:
                connection.sendall(b"X: y\r\n")
                piece = connection.recv(1000)
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break
            received += piece
            if not piece:
                break
    assert statuses(received) == [408]
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("line", [b"X: ", b"", b"X-", FIELDS], ids=["value", "target", "name", "fields"])
def test_a_head_of_20_mb_is_refused_early(folder: Collection, line: bytes) -> None:
    base = urlsplit(folder.client.base)
    piece = line * 10_000 if line == FIELDS else b"y" * 65536
    opening = folder.client.head("GET", folder.path) + line if line else b"GET /"
    sent, received = 0, b""
    with socket.create_connection((base.hostname or "", base.port or 80), timeout=5) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(opening)
            while sent < 20_000_000:
                connection.sendall(piece)
                sent += len(piece)
        with contextlib.suppress(ConnectionResetError):
            received = connection.recv(1000)
    assert sent < 20_000_000
    assert statuses(received) in ([414], [431], [])  # [] where the reset overtook the answer


# -- who is asking (CVE-2019-18928) ---------------------------------------------------------------


def ask(client: Client, *authorizations: str | None, trailer: str = "") -> list[int]:
    """Statuses of OPTIONS requests of the drive sent at once on one connection, one for each authorization."""
    base = urlsplit(client.base)
    payload = b""
    for number, value in enumerate(authorizations):
        lines = [f"OPTIONS {client.path('')} HTTP/1.1", f"Host: {base.netloc}"]
        lines += [f"Authorization: {value}"] if value else []
        lines += ["Connection: close"] if number == len(authorizations) - 1 else []
        if trailer and not value:
            lines += ["Transfer-Encoding: chunked", "Trailer: Authorization", "", "0", trailer]
        payload += "\r\n".join([*lines, "", ""]).encode()
    with socket.create_connection((base.hostname or "", base.port or 80), timeout=10) as connection:
        connection.sendall(payload)
        return statuses(read(connection)[0])


def test_a_request_without_a_login_never_has_that_of_the_one_before(drive: Client) -> None:
    right = basic(drive.login, drive.password)
    wrong = basic(drive.login, "no such password")
    assert ask(drive, right, None, right, wrong, None, right) == [200, 401, 200, 401, 401, 200]
    assert ask(drive, right, "Negotiate YII=", "Basic", "Basic !!!", "Bearer x", right) == [
        200,
        401,
        401,
        401,
        401,
        200,
    ]


def test_a_login_in_a_trailer_is_none(drive: Client) -> None:
    right = basic(drive.login, drive.password)
    assert ask(drive, right, None, trailer=f"Authorization: {right}") == [200, 401]


@pytest.mark.demo
def test_two_people_on_one_connection_are_told_apart(target: Target) -> None:
    alice, carol = target.account("alice"), target.account("carol")
    base = urlsplit(target.sync_url)
    payload = b""
    for person in (alice, carol, alice):
        home = f"/calendars/{alice['sync_id']}/"
        login = basic(person["login"], person["password"])
        payload += f"PROPFIND {home} HTTP/1.1\r\nHost: {base.netloc}\r\nDepth: 0\r\nAuthorization: {login}\r\n\r\n".encode()
    with socket.create_connection((base.hostname or "", base.port or 80), timeout=10) as connection:
        connection.sendall(payload)
        assert statuses(read(connection)[0]) == [207, 404, 207]


def test_a_kept_connection_asks_anew_for_every_request(drive: Client) -> None:
    connection = http.client.HTTPConnection(urlsplit(drive.base).netloc, timeout=10)
    right = {"Authorization": basic(drive.login, drive.password)}
    for _ in range(20):
        for headers, expected in ((right, 200), ({}, 401)):
            connection.request("OPTIONS", drive.path(""), headers=headers)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == expected
    connection.close()
