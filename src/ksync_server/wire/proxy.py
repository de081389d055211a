"""The PROXY protocol, versions 1 and 2: what a proxy says of a connection before its first byte.

A reader never takes a byte too many: what follows belongs to TLS or HTTP. So `Reader.wants` says how many
bytes may be looked at, and `Reader.take` how many of those it was given are the header's.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from ksync_server.errors import BadRequest

_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
_V1_START = b"PROXY "
_V1_BYTES = 107  # longest line of version 1, its end included
_V2_HEAD = 16
_LOCAL, _PROXY = 0, 1
_TCP4, _TCP6 = 0x11, 0x21
_SSL = 0x20  # type of the TLV that tells of TLS
_CLIENT_SSL = 0x01


@dataclass(frozen=True, slots=True)
class Origin:
    """Who is behind the proxy."""

    address: str
    port: int
    secure: bool = False  # the client spoke TLS with the proxy


class Reader:
    """Reads one header.

    Args:
        limit: longest header of version 2 in bytes.

    Spec: PROXY protocol 2.1 and 2.2.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = b""
        self._whole = _V2_HEAD  # of version 2, once its length is known
        self.done = False
        self.origin: Origin | None = None  # None after `done`: the connection is the proxy's own

    @property
    def wants(self) -> int:
        """How many more bytes may be looked at."""
        held = self._held
        if not _SIGNATURE.startswith(held[: len(_SIGNATURE)]):
            return _V1_BYTES - len(held)
        return self._whole - len(held)

    def take(self, data: bytes) -> int:
        """Read at most `wants` bytes.

        Returns:
            How many of them belong to the header.

        Raises:
            BadRequest: this is no header, or a longer one than is accepted.
        """
        held = self._held + data
        if _V1_START.startswith(held[: len(_V1_START)]):
            end = held.find(b"\n") + 1
            if not end and len(held) >= _V1_BYTES:
                raise BadRequest("The PROXY header is too long.")
            taken = (end or len(held)) - len(self._held)
            self._held = held[: end or None]
            if end:
                self._finish_v1(self._held)
            return taken
        if not _SIGNATURE.startswith(held[: len(_SIGNATURE)]):
            raise BadRequest("The connection does not begin with a PROXY header.")
        self._held = held
        if len(held) >= _V2_HEAD:
            self._whole = _V2_HEAD + int.from_bytes(held[14:16], "big")
            if self._whole > self._limit:
                raise BadRequest("The PROXY header is too long.")
            if len(held) == self._whole:
                self._finish_v2(held)
        return len(data)

    def _finish_v1(self, line: bytes) -> None:
        self.done = True
        if not line.endswith(b"\r\n") or not line.isascii():
            raise BadRequest("The PROXY header is malformed.")
        words = line[:-2].decode("ascii").split(" ")
        if words[1] == "UNKNOWN":
            return
        if len(words) != 6 or words[1] not in ("TCP4", "TCP6"):
            raise BadRequest("The PROXY header is malformed.")
        try:
            source, destination = (ipaddress.ip_address(word) for word in words[2:4])
        except ValueError:
            raise BadRequest("The PROXY header is malformed.") from None
        if {source.version, destination.version} != {int(words[1][3])}:
            raise BadRequest("The PROXY header is malformed.")
        self.origin = Origin(_text(source), _port(words[4]))
        _port(words[5])

    def _finish_v2(self, header: bytes) -> None:
        self.done = True
        version, command = header[12] >> 4, header[12] & 15
        if version != 2 or command not in (_LOCAL, _PROXY):
            raise BadRequest("The PROXY header is malformed.")
        size = {_TCP4: 4, _TCP6: 16}.get(header[13])
        if command == _LOCAL or size is None:
            return  # the proxy's own check of us, or a family that tells no address
        end = _V2_HEAD + 2 * size + 4
        if len(header) < end:
            raise BadRequest("The PROXY header is malformed.")
        address = ipaddress.ip_address(header[_V2_HEAD : _V2_HEAD + size])
        port = int.from_bytes(header[end - 4 : end - 2], "big")
        self.origin = Origin(_text(address), port, _told_of_tls(header[end:]))


def _text(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return str(getattr(address, "ipv4_mapped", None) or address)


def _port(word: str) -> int:
    if not (word.isascii() and word.isdigit()) or len(word) > 5 or int(word) > 65535:
        raise BadRequest("The PROXY header is malformed.")
    return int(word)


def _told_of_tls(rest: bytes) -> bool:
    """Whether the additional fields of version 2 say that the client used TLS."""
    while len(rest) >= 3:
        length = int.from_bytes(rest[1:3], "big")
        value, rest, kind = rest[3 : 3 + length], rest[3 + length :], rest[0]
        if len(value) < length:
            break
        if kind == _SSL:
            return bool(value) and bool(value[0] & _CLIENT_SSL)
    return False
