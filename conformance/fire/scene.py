"""What every part of the fire gets, and what it hands back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
    local: bool = True  # bytes are files in the data folder, which the harness reads itself
    said: list[str] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def blobs(self) -> Path:
        return self.data / "blobs"

    @property
    def settings(self) -> list[str]:
        """For `--set`."""
        return [*([f"database.url={self.database_url}"] if self.database_url else []), *self.more]

    def url(self, server: Server) -> str:
        """The database's URL."""
        return self.database_url or f"sqlite:///{server.data / 'ksync.db'}"

    def say(self, text: str) -> None:
        """Progress."""
        self.said.append(text)
        print(f"    {text}", flush=True)
