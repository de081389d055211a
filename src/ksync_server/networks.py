"""Addresses of peers, and the networks that settings name."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from ksync_server.errors import ConfigError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_IPV6_SITE_BITS = 64  # one subscriber has at least this network to himself


class Networks:
    """The networks of one setting; single addresses are networks too."""

    def __init__(self, setting: str, networks: Iterable[str]) -> None:
        try:
            self._networks = [_as_ipv4(ipaddress.ip_network(each, strict=False)) for each in networks]
        except ValueError as error:
            raise ConfigError(f"{setting}: {error}") from None

    def __bool__(self) -> bool:
        return bool(self._networks)

    def __contains__(self, address: str) -> bool:
        if not self._networks:
            return False
        parsed = parse(address)
        return parsed is not None and any(parsed in network for network in self._networks)


def _as_ipv4(
    network: ipaddress.IPv4Network | ipaddress.IPv6Network,
) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """`::ffff:10.0.0.0/104` is 10.0.0.0/8, because peers that come so are read as IPv4."""
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is None or network.prefixlen < 96:
        return network
    return ipaddress.ip_network((mapped, network.prefixlen - 96))


def parse(hop: str) -> Address | None:
    """An address as proxies write it: bare, `1.2.3.4:5`, `[::1]:5`, mapped IPv4 as IPv4; or None."""
    bare = hop
    if hop.startswith("["):
        bare = hop[1:].partition("]")[0]
    elif hop.count(":") == 1:
        bare = hop.partition(":")[0]
    try:
        parsed = ipaddress.ip_address(bare.partition("%")[0])
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed


def is_loopback(address: str) -> bool:
    """Whether the peer is this machine; a Unix socket's has no address."""
    parsed = parse(address)
    return address == "" if parsed is None else parsed.is_loopback


def subscriber(address: str) -> str:
    """What one subscriber has: an IPv4 address, or an IPv6 network of 64 bits."""
    parsed = parse(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, _IPV6_SITE_BITS), strict=False))
    return address if parsed is None else str(parsed)
