"""Threads of the pool, shared fairly: one account's reports use a few of them at a time, the others wait.

Sixteen queries that each take seconds would else hold every thread of a process, and so everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from ksync_server.store.database import Database, Read, Write

T = TypeVar("T")


class _Places:
    """The places of one account, while somebody has or wants one."""

    __slots__ = ("free", "wanted")

    def __init__(self, at_once: int) -> None:
        self.free = asyncio.Semaphore(at_once)
        self.wanted = 0


class Turns:
    """Blocking steps of reports, at most `at_once` of an account at a time; for one event loop."""

    def __init__(self, database: Database, at_once: int) -> None:
        self._database = database
        self._at_once = at_once
        self._places: dict[int, _Places] = {}

    def of(self, account_id: int) -> Pool:
        """The pool as an account's reports use it."""
        return Pool(self, self._database, account_id)

    @contextlib.asynccontextmanager
    async def turn(self, account_id: int) -> AsyncIterator[None]:
        """Wait for a place of the account and hold it; nothing is held while an answer is sent."""
        places = self._places.setdefault(account_id, _Places(self._at_once))
        places.wanted += 1
        try:
            async with places.free:
                yield
        finally:
            places.wanted -= 1
            if not places.wanted:
                del self._places[account_id]


class Pool:
    """`Database.reading`, `pooled` and `submit` for the reports of one account."""

    def __init__(self, turns: Turns, database: Database, account_id: int) -> None:
        self._turns = turns
        self._database = database
        self._account_id = account_id

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Wait for one of the account's places, for blocking work in other threads."""
        return self._turns.turn(self._account_id)

    async def reading(self, fn: Callable[[Read], T]) -> T:
        """Run a longer read in the pool, when it is the account's turn."""
        async with self.turn():
            return await self._database.reading(fn)

    async def pooled(self, fn: Callable[..., T], *arguments: object) -> T:
        """Run blocking work in the pool, when it is the account's turn."""
        async with self.turn():
            return await self._database.pooled(fn, *arguments)

    def submit(self, fn: Callable[[Write], T]) -> Future[T]:
        """Queue a write that nobody waits for."""
        return self._database.submit(fn)
