"""Offers: the table of product tiers, read from offers.toml; unknown ones open nothing."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import msgspec

from ksync_server.errors import BadRequest, ConfigError
from ksync_server.settings import GB


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    webdav: bool
    mailboxes: bool = False
    aliases: tuple[str, ...] = ()
    webhooks: int | None = None
    seats_min: int = 0
    seats_max: int | None = None
    storage_gb: int | None = None
    mail: bool = False
    ksuite: int | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """What one tier opens and how much of it."""

    id: str
    webdav: bool
    mailboxes: bool  # as many addresses as seats
    webhooks: int | None  # None = no limit
    seats_min: int
    seats_max: int | None
    storage_bytes: int | None
    mail: bool  # a mail service: its seats are addresses, and it may join a kSuite
    ksuite: int | None  # its rank among the kSuites; None = it is none


def storage_of(offer: Offer, own: int | None) -> int | None:
    """What the drives of a product under an offer hold together at most; None = no limit.

    Args:
        own: the product's own figure in bytes; None = it has the offer's.
    """
    return offer.storage_bytes if own is None else own


class Offers:
    """The table, by id and alias."""

    def __init__(self, rows: dict[str, _Row]) -> None:
        self._offers = {
            name: Offer(
                name,
                row.webdav,
                row.mailboxes,
                row.webhooks,
                row.seats_min,
                row.seats_max,
                None if row.storage_gb is None else row.storage_gb * GB,
                row.mail,
                row.ksuite,
            )
            for name, row in rows.items()
        }
        self._names = {name: name for name in rows}
        for name, row in rows.items():
            for alias in row.aliases:
                if self._names.setdefault(alias, name) != name:
                    raise ConfigError(f"offers: {alias} names two offers")

    def find(self, name: str) -> Offer | None:
        """The offer of that id or alias, None for an unknown one (which opens nothing: OFF6)."""
        canonical = self._names.get(name)
        return None if canonical is None else self._offers[canonical]

    def get(self, name: str) -> Offer:
        """The offer of that id or alias.

        Raises:
            BadRequest: there is none; says which there are (OFF6).
        """
        found = self.find(name)
        if found is None:
            raise BadRequest(f"There is no offer {name!r}. There are: {', '.join(self._offers)}.")
        return found

    def aliases(self, offer_id: str) -> tuple[str, ...]:
        """The other names of an offer."""
        return tuple(name for name, own in self._names.items() if own == offer_id and name != own)

    def list(self) -> tuple[Offer, ...]:
        """All offers in the order of the file."""
        return tuple(self._offers.values())


def load(path: Path | None) -> Offers:
    """Read offers.toml; None reads the shipped table.

    Raises:
        ConfigError: unreadable or malformed.
    """
    try:
        if path is None:
            text = resources.files("ksync_server").joinpath("offers.toml").read_text("utf-8")
        else:
            text = path.read_text("utf-8")
        return Offers(msgspec.convert(tomllib.loads(text), dict[str, _Row]))
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path or 'offers.toml'}: {error}") from None
