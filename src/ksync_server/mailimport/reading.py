"""Bodies of the source, fetched ahead of what is placed: how much at once, and what of those that fail.

    Reader.read -> requests under way -> Batch | Failed ...

What came before a failure is handed on before the failure is raised, so nothing is fetched twice for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ksync_server import settings as configuration
from ksync_server.errors import RemoteError, Temporary
from ksync_server.mailimport.ledger import Ledger
from ksync_server.mailimport.servers import Refused, is_of_a_message, said
from ksync_server.mailimport.sinks import Message, Parcel
from ksync_server.mailimport.source import Answer, Bodies, Poisoned, Source
from ksync_server.wire.imap import Status

_FIRST_WINDOW = 3 << 20  # bytes: what the first crash may cost
_SHARE = 16  # then the window is one part in so many of what the run has done
_CAREFUL_WINDOW = 256 << 10  # the same after a crash
_CAREFUL_SHARE = 48
_BATCH = 200  # messages asked for at once
_REQUESTS = 2  # that are under way, so that the server never waits for us


class DayIsOver(RemoteError):
    """The account's bytes of today are used up."""

    def __init__(self, wait_s: int) -> None:
        super().__init__("the daily limit of the source is reached")
        self.wait_s = wait_s


class Suspects(Temporary):
    """One of several messages cannot be read: the next run must ask for them one by one."""


class Window:
    """Bytes that are fetched, or asked for, and not recorded yet.

    Args:
        most: says how many there may be at most, which may change.
        careful: there was a crash.
    """

    def __init__(self, most: Callable[[], int], *, careful: bool) -> None:
        self._most = most
        self._least, self._share = (_CAREFUL_WINDOW, _CAREFUL_SHARE) if careful else (_FIRST_WINDOW, _SHARE)
        self._used = 0
        self._done = 0  # bytes recorded in this run
        self._changed = asyncio.Event()

    @property
    def limit(self) -> int:
        """How many there may be now."""
        return min(self._most(), max(self._least, self._done // self._share))

    @property
    def used(self) -> int:
        """How many there are."""
        return self._used

    def is_full_for(self, size: int) -> bool:
        """Whether `enter` would wait."""
        return bool(self._used) and self._used + size > self.limit

    async def enter(self, size: int) -> None:
        """Wait for room; one that is larger than the window goes alone."""
        while self.is_full_for(size):
            self._changed.clear()
            await self._changed.wait()
        self._used += size

    def widen(self, size: int) -> None:
        """What came is longer than it was said to be."""
        self._used += size

    def leave(self, size: int, *, done: int = 0) -> None:
        """They are recorded, or will not come."""
        self._used -= size
        self._done += done
        self._changed.set()


@dataclass(frozen=True, slots=True)
class Batch:
    """Messages that came together."""

    parcels: tuple[Parcel, ...]
    weight: int  # of the window


@dataclass(frozen=True, slots=True)
class Failed:
    """A message that cannot be had, and why."""

    message: Message
    reason: str  # "" = it is gone
    weight: int


Put = Callable[[Batch | Failed], None]


class Reader:
    """Reads the bodies of one run.

    Args:
        longest: message that the destination takes, in bytes.
        ledger: counts what is fetched, and says whether one message is asked for at a time, to find the one
            that cannot be read.
    """

    def __init__(
        self,
        source: Source,
        settings: configuration.MailImport,
        window: Window,
        longest: int | None,
        ledger: Ledger,
    ) -> None:
        self._ledger = ledger
        self._source = source
        self._settings = settings
        self._window = window
        self._longest = min(settings.message_bytes, longest or settings.message_bytes)
        self._began = time.monotonic()

    async def read(self, messages: Iterable[Message], spool: Callable[[Message], Path], put: Put) -> None:
        """Fetch messages of the open folder.

        Args:
            spool: gives a long message its file.

        Raises:
            DayIsOver: no more today.
            Suspects: see there.
            RemoteError: the server failed.
        """
        bodies = Bodies(self._source, self._settings)
        missing: list[Message] = []
        some: list[Message] = []
        weight, limit = 0, self._window.limit
        for message in messages:
            if message.size > self._longest:
                text = f"it has {message.size} bytes, the most is {self._longest}"
                put(Failed(message, text, 0))
            elif message.size > min(self._settings.whole_bytes, limit):
                await self._ask(bodies, some, missing, put)
                await self._drain(bodies, missing, put)
                await self._take_long(message, spool(message), put)
                some, weight, limit = [], 0, self._window.limit
            else:
                most = 1 if self._ledger.singly else _BATCH
                if some and (weight + message.size > limit // 3 or len(some) >= most):
                    await self._ask(bodies, some, missing, put)
                    some, weight, limit = [], 0, self._window.limit
                some.append(message)
                weight += message.size
        await self._ask(bodies, some, missing, put)
        await self._drain(bodies, missing, put)

    async def _ask(
        self,
        bodies: Bodies,
        messages: list[Message],
        missing: list[Message],
        put: Put,
    ) -> None:
        if not messages:
            return
        weight = sum(message.size for message in messages)
        try:
            await self._keep_to_the_pace(weight)
        except DayIsOver:
            await self._drain(bodies, missing, put)  # it is counted, and would be fetched again
            raise
        while bodies.requests and (bodies.requests >= _REQUESTS or self._window.is_full_for(weight)):
            missing += await self._later(bodies, put)
        await self._window.enter(weight)
        await bodies.ask(messages)

    async def _take(self, bodies: Bodies, put: Put) -> Answer:
        """Wait until a request is answered; those that came go on."""
        try:
            answer = await bodies.take()
        except Poisoned as error:
            raise self._poisoned(error, put) from None
        if answer.parcels:
            size = sum(parcel.size for parcel in answer.parcels)
            claimed = sum(parcel.message.size for parcel in answer.parcels)
            self._ledger.fetched_bytes += size
            self._window.widen(max(size - claimed, 0))
            put(Batch(answer.parcels, max(size, claimed)))
        if answer.refused is not None:
            _require_of_a_message(answer.refused)
        return answer

    async def _later(self, bodies: Bodies, put: Put) -> tuple[Message, ...]:
        """The same; those that did not come, which are asked for once more later."""
        missing = (await self._take(bodies, put)).missing
        self._window.leave(sum(message.size for message in missing))
        return missing

    async def _drain(self, bodies: Bodies, missing: list[Message], put: Put) -> None:
        """Take all that was asked for; what did not come with the others is asked for alone."""
        while bodies.requests:
            missing += await self._later(bodies, put)
        for message in missing:
            await self._window.enter(message.size)
            await bodies.ask([message])
            answer = await self._take(bodies, put)
            if not answer.missing:
                continue
            reason = said(answer.refused) if answer.refused else "the server does not give it"
            is_there = await self._source.is_there(message.uid)
            put(Failed(message, reason if is_there else "", message.size))
        missing.clear()

    def _poisoned(self, error: Poisoned, put: Put) -> Temporary:
        if len(error.messages) != 1:
            return Suspects(f"the source cannot be read on: {error}")
        put(Failed(error.messages[0], str(error), 0))
        return Temporary(f"the source cannot be read on: {error}")

    async def _take_long(self, message: Message, path: Path, put: Put) -> None:
        weight = min(message.size, self._window.limit)  # so that few wait in files
        await self._window.enter(weight)
        await self._keep_to_the_pace(message.size)
        reason = "the server does not give it"
        parcel = None
        try:
            parcel = await self._source.spool(message, path)
        except Poisoned as error:
            await asyncio.to_thread(path.unlink, missing_ok=True)
            raise self._poisoned(error, put) from None
        except Refused as error:
            _require_of_a_message(error.status)
            reason = said(error.status)
        if parcel is not None:
            self._ledger.fetched_bytes += parcel.size
            put(Batch((parcel,), weight))
        else:
            is_there = await self._source.is_there(message.uid)
            put(Failed(message, reason if is_there else "", weight))

    async def _keep_to_the_pace(self, size: int) -> None:
        """Wait, or leave, so that neither the bandwidth nor the account's day is used up."""
        if self._settings.bytes_s:
            due_s = self._source.connection.received / self._settings.bytes_s
            await asyncio.sleep(max(due_s - (time.monotonic() - self._began), 0))
        daily = self._settings.daily_bytes
        if self._source.is_gmail:
            daily = min(daily or self._settings.gmail_daily_bytes, self._settings.gmail_daily_bytes)
        if daily:
            spent, rest_s = await self._ledger.spent()
            if spent and spent + self._window.used + size > daily:
                raise DayIsOver(rest_s)


def _require_of_a_message(status: Status) -> None:
    """A refused body is the message's matter.

    Raises:
        Temporary: it is not.
    """
    if not is_of_a_message(status):
        raise Temporary(f"the source: {said(status)}")
