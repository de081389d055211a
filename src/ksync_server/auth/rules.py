"""The rule of the door as one table: which secret opens which service, with and without a second factor.

Pure and small on purpose: `auth.gate` asks here for every protocol, so that none has a rule of its own. What
is not in the table is refused.
"""

from __future__ import annotations

from enum import StrEnum


class Secret(StrEnum):
    """The classes of secret that people and programs present (APP1, APP9)."""

    ACCOUNT_PASSWORD = "account password"  # noqa: S105 - a name
    APP_PASSWORD = "application password"  # noqa: S105 - a name
    DEVICE_PASSWORD = "device password of a mailbox"  # noqa: S105 - a name
    HALF_SESSION = "web session after the password alone"
    SESSION = "web session after the second factor"  # or after the password where 2FA is off


class Service(StrEnum):
    """What a secret is being used for; the scopes of application passwords have the same names."""

    CALDAV = "caldav"
    CARDDAV = "carddav"
    DRIVE = "drive"
    SYNC = "sync"  # the sync host where neither calendars nor contacts are addressed: principals, "/"
    IMAP = "imap"
    SMTP = "smtp"
    WEB = "web"  # the web pages of an account: a log-in that is complete
    MINT = "mint"  # making application passwords and device passwords


_SYNC = frozenset({Service.CALDAV, Service.CARDDAV, Service.DRIVE, Service.SYNC})
_MAIL = frozenset({Service.IMAP, Service.SMTP})
_PAGES = frozenset({Service.WEB, Service.MINT})
_NOTHING = frozenset[Service]()

_OPENS: dict[Secret, tuple[frozenset[Service], frozenset[Service]]] = {
    # secret: what it opens with 2FA off, and with 2FA on
    Secret.ACCOUNT_PASSWORD: (_SYNC | {Service.WEB}, _NOTHING),
    Secret.APP_PASSWORD: (_SYNC, _SYNC),
    Secret.DEVICE_PASSWORD: (_MAIL, _MAIL),
    Secret.HALF_SESSION: (_NOTHING, _NOTHING),
    Secret.SESSION: (_PAGES, _PAGES),
}
_SCOPES: dict[Service, frozenset[str]] = {
    Service.CALDAV: frozenset({"caldav"}),
    Service.CARDDAV: frozenset({"carddav"}),
    Service.DRIVE: frozenset({"drive"}),
    Service.SYNC: frozenset({"caldav", "carddav"}),
}

READS = frozenset({"GET", "HEAD", "OPTIONS", "PROPFIND", "REPORT"})
"""Methods that change nothing; every other one is a write, those that nobody has thought of too."""
WRITES = frozenset(
    {"PUT", "POST", "PATCH", "DELETE", "PROPPATCH", "MKCOL", "MKCALENDAR", "COPY", "MOVE", "LOCK", "UNLOCK"}
    | {"ACL"}
)
VERBS = READS | WRITES
"""Methods that the gate knows; whether a site has them is the site's to say."""


def opens(secret: Secret, service: Service, *, second_factor: bool, state: str = "active") -> bool:
    """Whether a right secret of a class opens a service for an account.

    Args:
        second_factor: whether two-factor authentication (2FA) of the account is on.
        state: of the account; only `active` opens anything.
    """
    return state == "active" and service in _OPENS[secret][second_factor]


def scopes_for(service: Service) -> frozenset[str]:
    """The scopes of which an application password needs one; none where no scope suffices."""
    return _SCOPES.get(service, frozenset())
