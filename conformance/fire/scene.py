"""What every part of the fire gets, and what it hands back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conformance.faults import PASS, Faults, Plan, shaky
from conformance.fire.running import Server
from conformance.servers import PostgreSQL


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that must hold, and what contradicts it."""

    what: str
    wrong: Sequence[str] = ()

    @property
    def good(self) -> bool:
        return not self.wrong


@dataclass(slots=True)
class Scene:
    """Where a part plays, and how large it is."""

    folder: Path  # of this part alone
    database: str  # sqlite or postgresql
    database_url: str  # "" = SQLite in the data folder
    postgresql: PostgreSQL | None  # the server of that database
    kills: int = 10
    requests: int = 10_000
    seed: int = 1
    more: Sequence[str] = ()  # further settings
    store: Faults | None = None  # in front of the S3 server; None: bytes are files in the data folder
    errors: float = 0.0  # the share of requests to it that fail
    said: list[str] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def settings(self) -> list[str]:
        """For `--set`."""
        return [*([f"database.url={self.database_url}"] if self.database_url else []), *self.more]

    @property
    def plan(self) -> Plan:
        """How the S3 server answers while nothing else is asked of it."""
        return shaky(self.errors, random.Random(self.seed)) if self.errors else lambda method, path: PASS

    def say(self, text: str) -> None:
        """Progress."""
        self.said.append(text)
        print(f"    {text}", flush=True)


def whole(server: Server) -> list[Finding]:
    """Rows and bytes of a server that has ended, once all that may be erased is."""
    server.reap()
    found = server.verify("--deep", "--set", "blobs.reap_after_s=0")
    return [
        Finding("verify --deep: every row agrees, every byte has its SHA-256, no extent is left over", found)
    ]
