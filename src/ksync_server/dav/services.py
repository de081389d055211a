"""What the sync host needs of the rest of the program."""

from __future__ import annotations

from typing import Protocol

from ksync_server import settings as configuration
from ksync_server.auth.gate import HomeGrant, HomeTarget, Identity
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database, Read


class Gate(Protocol):
    """What is asked of auth.gate.Gate."""

    def authorize(self, tx: Read, identity: Identity, target: HomeTarget, verb: str, /) -> HomeGrant:
        """Whether the identity may use the verb there."""


class Services(Protocol):
    """app.Services, as far as it is used here."""

    @property
    def settings(self) -> configuration.Settings: ...
    @property
    def database(self) -> Database: ...
    @property
    def blobs(self) -> Blobs: ...
    @property
    def gate(self) -> Gate: ...
