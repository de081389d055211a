"""PROXY headers, versions 1 and 2: read to the byte, in pieces of any size, or refused."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksync_server.errors import BadRequest
from ksync_server.wire.proxy import Origin, Reader

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
LIMIT = 1024


def v2(command: int = 0x21, family: int = 0x11, body: bytes = b"") -> bytes:
    return SIGNATURE + bytes([command, family]) + len(body).to_bytes(2, "big") + body


def addresses(source: str, port: int = 50000) -> bytes:
    packed = ipaddress.ip_address(source).packed
    return packed + bytes(len(packed)) + port.to_bytes(2, "big") + (443).to_bytes(2, "big")


def tlv(kind: int, value: bytes) -> bytes:
    return bytes([kind]) + len(value).to_bytes(2, "big") + value


TLS = tlv(0x20, b"\x01\x00\x00\x00\x00")
HEADERS: list[tuple[bytes, Origin | None]] = [
    (b"PROXY TCP4 192.0.2.1 198.51.100.1 50000 443\r\n", Origin("192.0.2.1", 50000)),
    (b"PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n", Origin("2001:db8::1", 1)),
    (b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n", Origin("192.0.2.1", 1)),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", None),
    (v2(body=addresses("192.0.2.1")), Origin("192.0.2.1", 50000)),
    (v2(family=0x21, body=addresses("2001:db8::1")), Origin("2001:db8::1", 50000)),
    (v2(body=addresses("192.0.2.1") + tlv(4, b"noop") + TLS), Origin("192.0.2.1", 50000, True)),
    (v2(body=addresses("192.0.2.1") + tlv(0x20, b"\x00\x00\x00\x00\x00")), Origin("192.0.2.1", 50000)),
    (v2(body=addresses("192.0.2.1") + b"\x20\xff\xff\x01"), Origin("192.0.2.1", 50000)),
    (v2(command=0x20), None),
    (v2(command=0x20, body=addresses("192.0.2.1")), None),
    (v2(family=0x00), None),
    (v2(family=0x31, body=bytes(216)), None),
]


def read(reader: Reader, data: bytes, sizes: list[int]) -> bytes:
    """Feed as a socket would: never more than `wants`, in pieces of these sizes; return what is left."""
    at = 0
    while not reader.done and data:
        size = max(1, min(sizes[at % len(sizes)], reader.wants))
        assert reader.wants > 0
        data = data[reader.take(data[:size]) :]
        at += 1
    return data


@pytest.mark.parametrize(("header", "origin"), HEADERS, ids=lambda value: repr(value)[:60])
@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_a_header_is_read_in_any_pieces_and_nothing_behind_it(
    header: bytes, origin: Origin | None, sizes: list[int]
) -> None:
    for behind in (b"", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01" * 100):
        reader = Reader(LIMIT)
        assert read(reader, header + behind, sizes) == behind
        assert reader.done
        assert reader.origin == origin


@pytest.mark.parametrize(
    "header",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"PROXX",
        b"PROXY\r\n",
        b"proxy TCP4 192.0.2.1 198.51.100.1 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 1 2\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 1\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 1 2 3\r\n",
        b"PROXY  TCP4 192.0.2.1 198.51.100.1 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 1 65536\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 -1 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.1 +1 2\r\n",
        b"PROXY TCP4 2001:db8::1 198.51.100.1 1 2\r\n",
        b"PROXY TCP6 192.0.2.1 198.51.100.1 1 2\r\n",
        b"PROXY TCP4 192.0.2.256 198.51.100.1 1 2\r\n",
        b"PROXY TCP4 0300.0.2.1 198.51.100.1 1 2\r\n",
        b"PROXY UDP4 192.0.2.1 198.51.100.1 1 2\r\n",
        b"PROXY TCP4 \xd9\xa1.0.2.1 198.51.100.1 1 2\r\n",
        b"PROXY UNKNOWN " + b"x" * 107,
        b"\r\n\r\nGET / HTTP/1.1\r\n",
        v2(command=0x11, body=addresses("192.0.2.1")),
        v2(command=0x22, body=addresses("192.0.2.1")),
        v2(body=addresses("192.0.2.1")[:11]),
        v2(family=0x21, body=addresses("192.0.2.1")),
        v2(body=addresses("192.0.2.1") + bytes(LIMIT)),
    ],
    ids=lambda value: repr(value)[:60],
)
@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_what_is_no_header_is_refused(header: bytes, sizes: list[int]) -> None:
    with pytest.raises(BadRequest):
        read(Reader(LIMIT), header, sizes)


@given(st.one_of(st.binary(max_size=300), st.builds(bytes.__add__, st.just(SIGNATURE), st.binary())))
def test_garbage_is_refused_or_waited_for_within_the_limit(data: bytes) -> None:
    reader = Reader(LIMIT)
    try:
        read(reader, data, [64])
    except BadRequest:
        return
    assert reader.done or reader.wants <= LIMIT
