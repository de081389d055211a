"""Where this server connects to on behalf of people: the one guard against requests into private networks."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from itertools import zip_longest

from ksync_server.errors import Permanent, Temporary
from ksync_server.networks import Networks, parse

_MOST = 4  # addresses of a host that are tried: each may be silent until the time is up


async def addresses(host: str, port: int, allowed: Networks) -> list[str]:
    """Addresses of a host to connect to, four at most; connect to one of these, never to the name.

    Args:
        host: a name or an address, as a person typed it.
        allowed: networks that may be reached although they are not public.

    Raises:
        Permanent: no such host, or an address of it is in a network that is neither public nor allowed.
        Temporary: the name cannot be looked up now.

    Cost: one look-up, in a thread of the loop's pool.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:
            raise Permanent(f"There is no host {host!r}.") from None
        raise Temporary(f"{host!r} cannot be looked up: {error.strerror}") from None
    except UnicodeError:
        raise Permanent(f"{host!r} is no host name.") from None
    reached = list(dict.fromkeys(str(each[4][0]) for each in found))
    for address in reached:
        if not (is_public(address) or address in allowed):
            raise Permanent(
                f"{host!r} is {address}, in a network that is not public;"
                " outbound.private_networks lists those that may be reached."
            )
    # Both families among the first: one of them may lead nowhere. Whoever owns the name makes the list.
    liked = [address for address in reached if (":" in address) == (":" in reached[0])]
    rest = [address for address in reached if address not in liked]
    mixed = [address for pair in zip_longest(liked, rest) for address in pair if address is not None]
    return mixed[:_MOST]


def is_public(address: str) -> bool:
    """Whether an address belongs to the Internet at large: not to this machine, a site, or a special use."""
    parsed = parse(address)
    if parsed is None or not parsed.is_global or parsed.is_multicast:
        return False
    inner = [getattr(parsed, "sixtofour", None), *(getattr(parsed, "teredo", None) or ())]
    if parsed in _NAT64:
        inner.append(ipaddress.ip_address(int(parsed) & 0xFFFFFFFF))
    return all(each is None or each.is_global for each in inner)


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
