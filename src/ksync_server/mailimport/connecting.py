"""Reaching a server: its names and addresses, TLS, the log-in."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import replace

from ksync_server import outbound
from ksync_server import settings as configuration
from ksync_server.errors import Permanent, RemoteError, Temporary
from ksync_server.mailimport import tokens
from ksync_server.mailimport.connection import Connection, ending
from ksync_server.mailimport.servers import Server
from ksync_server.networks import Networks, is_loopback, parse

_FAR_S = 0.01  # seconds to connect from which on compression pays


async def connect(
    server: Server,
    secret: str,
    settings: configuration.MailImport,
    private_networks: Networks,
    *,
    utf8: bool = False,
) -> Connection:
    """A connection that is encrypted as asked, and logged in.

    Args:
        secret: what the server's mechanism takes: a password, an access token, or a token file for one.
        utf8: take messages with UTF-8 in their headers as they are (RFC 6855): other clients may be given a
            copy that was made plain. To give messages a server needs no such thing.

    Raises:
        Permanent: no such host, one that may not be reached, no TLS, a certificate that cannot be trusted, or
            a log-in or an access token that is refused.
        Temporary: the server does not answer, or does not want us now.
    """
    if server.security == "none" and not settings.plain:
        raise Permanent("A server may be asked without TLS only where mail_import.plain is set.")
    if server.mechanism == "oauth2":
        secret = await tokens.obtain(
            tokens.parse(secret),
            server.user,
            context=server.context(of_provider=True),
            timeout_s=settings.connect_timeout_s,
            private_networks=private_networks,
        )
    first: RemoteError | None = None
    for host in names(server.host):
        try:
            made, far = await _reached(replace(server, host=host), settings, private_networks)
        except Untrusted:
            raise
        except (Permanent, Temporary) as error:  # the next name, if there is one
            first = first or error
            continue
        with ending(made):
            await made.log_in(secret, utf8=utf8, compress=far)
        return made
    assert first is not None
    raise first


def names(host: str) -> tuple[str, ...]:
    """Hosts to try where a person may have typed a domain: that host first, then imap. and mail. of it."""
    if parse(host) is not None or "." not in host or host.lower().startswith(("imap.", "mail.")):
        return (host,)
    return host, f"imap.{host}", f"mail.{host}"


class Untrusted(Permanent):
    """The certificate is not the server's, or nobody we trust says so."""


async def _reached(
    server: Server, settings: configuration.MailImport, private_networks: Networks
) -> tuple[Connection, bool]:
    """A connection that is greeted, and whether it is far away."""
    loop = asyncio.get_running_loop()
    context = server.context() if server.security == "tls" else None
    last: RemoteError | None = None
    for address in await outbound.addresses(server.host, server.port, private_networks):
        made = Connection(server, settings)
        began = loop.time()
        try:
            with ending(made):
                async with asyncio.timeout(settings.connect_timeout_s):
                    await loop.create_connection(
                        lambda made=made: made,
                        address,
                        server.port,
                        ssl=context,
                        server_hostname=server.host if context else None,
                    )
                    answered_s = loop.time() - began
                    await made.greet()
        except ssl.SSLCertVerificationError as error:
            raise Untrusted(f"{server.host} cannot be trusted: {error.verify_message}") from None
        except TimeoutError:
            last = Temporary(f"{server.host} does not answer within {settings.connect_timeout_s:.0f} s")
        except ConnectionRefusedError:
            last = Temporary(f"nobody answers at {server.host}, port {server.port}")
        except (OSError, ssl.SSLError) as error:
            last = Temporary(f"{server.host}: {_reason(error, server)}")
        else:
            # On this machine compression costs more than it saves.
            return made, answered_s > _FAR_S and not is_loopback(address)
    assert last is not None
    raise last


def _reason(error: OSError, server: Server) -> str:
    if isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER":
        return f"no TLS is spoken on port {server.port}: it may be another port, or `starttls`"
    return error.strerror or str(error)
