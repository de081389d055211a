"""Servers as people name them, and what they mean when they refuse."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass

from ksync_server.errors import Permanent, RemoteError
from ksync_server.wire.imap import Status

SECURITIES = ("tls", "starttls", "none")
MECHANISMS = ("password", "xoauth2", "oauth2")  # the secret is one, an access token, or a token file


@dataclass(frozen=True, slots=True)
class Server:
    """Where a mailbox is and how to get in; the secret is not part of it."""

    host: str
    port: int
    user: str
    security: str = "tls"  # one of SECURITIES
    mechanism: str = "password"  # one of MECHANISMS; oauth2 is XOAUTH2 with tokens that are had when needed
    ca_file: str = ""  # certificates (PEM) to trust instead of the system's

    def context(self, *, of_provider: bool = False) -> ssl.SSLContext:
        """Certificates are always checked, the host's name included.

        Args:
            of_provider: for its provider of tokens, who may be a public one: `ca_file` is trusted besides.

        Raises:
            Permanent: the file of trusted certificates cannot be used.
        """
        try:
            context = ssl.create_default_context(cafile=None if of_provider else self.ca_file or None)
            if of_provider and self.ca_file:
                context.load_verify_locations(self.ca_file)
            return context
        except (OSError, ssl.SSLError) as error:
            raise Permanent(f"{self.ca_file}: {error}") from None


class Refused(RemoteError):
    """NO or BAD; the connection goes on."""

    def __init__(self, command: str, status: Status) -> None:
        super().__init__(f"{command}: {status.word} {said(status)}")
        self.status = status


def said(status: Status) -> str:
    """A server's words on one line, cut to what a report may hold."""
    code = f"[{status.code}] " if status.code else ""
    return code + "".join(mark if mark.isprintable() else " " for mark in status.text)[:200]


_LATER = frozenset(
    {"UNAVAILABLE", "INUSE", "LIMIT", "SERVERBUG", "THROTTLED", "OVERQUOTA", "EXPIRED-CONNECTION"}
)
_NEVER = frozenset(
    {"AUTHENTICATIONFAILED", "AUTHORIZATIONFAILED", "EXPIRED", "PRIVACYREQUIRED", "CONTACTADMIN", "WEBALERT"}
)
_LATER_WORDS = re.compile(
    r"too many|try again|temporar|unavailable|overload|throttl|bandwidth|exceeded|later|timed? ?out", re.I
)


def is_temporary(status: Status) -> bool:
    """Whether the same command may succeed later.

    Spec: RFC 5530 §3; words where a server gives no code.
    """
    if status.code in _NEVER:
        return False
    return status.word == "BYE" or status.code in _LATER or bool(_LATER_WORDS.search(status.text))


def is_of_a_message(status: Status) -> bool:
    """Whether a refused body is the message's matter: the server does not say that it will do better later.

    SERVERBUG is no such promise: Dovecot says it of each message that it cannot read, for ever.
    """
    return status.code == "SERVERBUG" or not is_temporary(status)
