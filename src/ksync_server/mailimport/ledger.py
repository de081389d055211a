"""What a run of an import keeps in our store: rows, counters and the job's lease, in one transaction."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ksync_server.jobs import Job
from ksync_server.mailimport import records
from ksync_server.store.database import Database, Write

_LISTED = 200  # differences and notes that a report names one by one


@dataclass(slots=True)
class Counters:
    """What a pass did; kept in the job's checkpoint."""

    found: int = 0  # messages of the source, in the folders that are imported
    copied: int = 0
    linked: int = 0
    there: int = 0
    gone: int = 0  # deleted at the source while we were at it
    flags: int = 0  # messages whose flags were carried later
    checked: int = 0  # that the destination was asked for at the end
    commands: int = 0  # to both servers
    fetched_bytes: int = 0
    copied_bytes: int = 0
    different: int = 0
    differences: list[str] = field(default_factory=list)  # the first of them
    notes: list[str] = field(default_factory=list)

    def kept(self) -> dict[str, Any]:
        """As a checkpoint keeps them."""
        return {name: getattr(self, name) for name in self.__slots__}

    def add(self, how: str, size: int) -> None:
        """Count a message that has its place."""
        setattr(self, how, getattr(self, how) + 1)
        self.copied_bytes += size

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self.notes and len(self.notes) < _LISTED:
            self.notes.append(text)

    def differs(self, name: str, problem: str) -> None:
        """Say once what in a folder of the destination is not as at the source."""
        text = f"{name}: {problem}"
        if text not in self.differences:
            self.different += 1
            if len(self.differences) < _LISTED:
                self.differences.append(text)


class Ledger:
    """The store, for one run.

    Args:
        budget: the account whose bytes of the day are counted.
        received: says how many bytes came from the source so far.
    """

    def __init__(self, job: Job, database: Database, budget: str, received: Callable[[], int]) -> None:
        state = job.state or {}
        self.counters = Counters(**state.get("counters", {}))
        self.is_first_run = "counters" not in state
        self.crashes = int(state.get("crashes", 0))
        self.singly = bool(state.get("singly"))  # bodies are asked for one by one
        self.settled: list[int] = list(state.get("settled", []))  # done, where no mod-sequence says so
        self.unmade: list[str] = list(
            state.get("unmade", [])
        )  # destinations that will not be had in this pass
        self.total_bytes = 0  # to do, where the source says it
        self.fetched_bytes = 0  # of bodies, in this run
        self.generation = database.generation
        self._job = job
        self._database = database
        self._budget = budget
        self._received = received
        self._counted_bytes = 0  # of `fetched_bytes`: they are in the account's day
        self._began = time.monotonic()
        self._waiting: list[Callable[[Write], object]] = []  # for the next transaction
        self._next: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    async def commit(self, effects: Callable[..., object], *arguments: object) -> None:
        """Rows, counters, and the lease, in one transaction; with those of others where several wait for it.

        Raises:
            Left: see `Job.checkpoint`.
        """
        self._waiting.append(lambda tx: effects(tx, *arguments))
        if self._next is None:
            self._next = asyncio.create_task(self._commit())
        await asyncio.shield(self._next)

    async def _commit(self) -> None:
        async with self._turn:
            waiting, self._waiting, self._next = self._waiting, [], None
            fetched = self.fetched_bytes - self._counted_bytes
            self._counted_bytes += fetched
            self.counters.fetched_bytes += fetched
            state = {
                **(self._job.state or {}),
                "is_running": True,
                "counters": self.counters.kept(),
                "settled": self.settled,
                "unmade": self.unmade,
                "singly": self.singly,
            }
            self._progress()

            def all_of_it(tx: Write) -> None:
                for effects in waiting:
                    effects(tx)
                if fetched > 0:
                    records.spend(tx, self._budget, fetched)

            await self._job.checkpointed(state, all_of_it)

    async def read(self, fn: Callable[..., Any], *arguments: object) -> Any:
        """What a function says of a snapshot."""
        return await self._database.reading(lambda tx: fn(tx, *arguments))

    async def write(self, fn: Callable[..., Any], *arguments: object) -> Any:
        """Change rows beside the checkpoint."""
        return await self._database.writing(lambda tx: fn(tx, *arguments))

    async def spent(self) -> tuple[int, int]:
        """Bytes of the account's day, and the seconds until it starts anew."""
        found: tuple[int, int] = await self.read(records.spent, self._budget)
        return found

    def _progress(self) -> None:
        counters = self.counters
        seconds = time.monotonic() - self._began
        said: dict[str, object] = {
            "messages": counters.copied + counters.there,
            "of": counters.found,
            "mb": round(counters.copied_bytes / 1e6, 1),
        }
        if self.total_bytes:
            said["of_mb"] = round(self.total_bytes / 1e6, 1)
            rate = self._received() / max(seconds, 0.1)
            said["seconds_left"] = round(max(self.total_bytes - counters.copied_bytes, 0) / max(rate, 1))
        self._job.progress(**said)
