"""No connection on behalf of people leads into a network that is not public, unless the settings say so."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from ksync_server import outbound
from ksync_server.errors import Permanent, Temporary
from ksync_server.networks import Networks

NONE = Networks("outbound.private_networks", ())


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1"),
        *("::1", "::", "fe80::1", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1"),
        *(
            "::ffff:10.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b::a00:1",
            "2002:7f00:1::1",
            "2002:a00:1::1",
            "fe80::1%eth0",
        ),
        *("", "example.org", "1.2.3", "0x7f.1"),
    ],
)
def test_what_is_not_of_the_internet_at_large_is_private(address: str) -> None:
    assert not outbound.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808"])
def test_what_is_of_the_internet_at_large_is_public(address: str) -> None:
    assert outbound.is_public(address)


def resolving(monkeypatch: pytest.MonkeyPatch, *found: str) -> None:
    """Let every name have these addresses."""

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in each], socket.SOCK_STREAM, 6, "", (each, port)) for each in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_one_private_address_of_a_name_is_enough_to_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, "8.8.8.8", "10.0.0.1")
    with pytest.raises(Permanent, match=r"10\.0\.0\.1, in a network that is not public"):
        asyncio.run(outbound.addresses("mail.example.org", 993, NONE))


def test_what_is_connected_to_is_an_address_that_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, "8.8.8.8", "8.8.8.8", "2606:4700::1111")
    found = asyncio.run(outbound.addresses("mail.example.org", 993, NONE))
    assert found == ["8.8.8.8", "2606:4700::1111"]


def test_a_network_that_is_allowed_may_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, "10.1.2.3")
    allowed = Networks("outbound.private_networks", ("10.1.0.0/16",))
    assert asyncio.run(outbound.addresses("mail.example.org", 143, allowed)) == ["10.1.2.3"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [(socket.EAI_NONAME, Permanent), (socket.EAI_AGAIN, Temporary), (socket.EAI_FAIL, Temporary)],
)
def test_a_name_that_is_not_found_is_told_from_one_that_cannot_be_looked_up(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(number, "said")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(kind):
        asyncio.run(outbound.addresses("mail.example.org", 143, NONE))


@pytest.mark.parametrize("host", ["a" * 64 + ".example.org", "xn--\u00fc"])
def test_what_is_no_name_is_refused(host: str) -> None:
    with pytest.raises((Permanent, Temporary)):
        asyncio.run(outbound.addresses(host, 143, NONE))


def test_four_addresses_of_a_host_are_tried_of_both_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may be silent for as long as anybody waits, and one family may lead nowhere."""
    six, four = [f"2606:4700::{number}" for number in range(1, 9)], ["8.8.8.8", "8.8.4.4", "1.1.1.1"]
    for found, tried in (
        (six + four, [six[0], four[0], six[1], four[1]]),
        (four + six, [four[0], six[0], four[1], six[1]]),
        (six, six[:4]),
        (four[:1], four[:1]),
    ):
        resolving(monkeypatch, *found)
        assert asyncio.run(outbound.addresses("imap.example.org", 993, NONE)) == tried
