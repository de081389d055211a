"""One pass of an import: copy what is new, carry flags, ask the destination for each message, report.

    folder by folder:   scan -> bodies -> [window] -> placed at the destination -> rows and checkpoint
                        ... -> labels -> flags -> the destination says what it has -> the folder is settled

What is placed and has no row yet is bounded by the window. Whatever ends the run, the next one meets that at
the destination as strangers and knows it by its SHA-256, so nothing is lost and nothing is there twice. The
window grows with what a run has done, from little after a crash: what crashes cost is a small share of that.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ksync_server import settings as configuration
from ksync_server.errors import KsyncError, RemoteError, Temporary
from ksync_server.jobs import Job, Left
from ksync_server.mailimport import plan as plans
from ksync_server.mailimport import records
from ksync_server.mailimport.connection import Refused, is_temporary, said
from ksync_server.mailimport.plan import Folder, Map, Options
from ksync_server.mailimport.records import COPIED, LINKED, REFUSED, THERE, Copy, SourceFolder, TargetFolder
from ksync_server.mailimport.sinks import Held, Message, Parcel, Placed, Seen, Sink, Unmade, canonical
from ksync_server.mailimport.source import Bodies, Poisoned, Source
from ksync_server.store.database import Database, Write

_FIRST_WINDOW = 3 << 20  # bytes; a wider one is hardly quicker
_LEAST_WINDOW = 256 << 10  # the same after a crash
_SHARE = 48  # then the window is one part in so many of what the run has done
_BATCH = 200  # messages placed and recorded at once
_REQUESTS = 2  # of bodies that are under way, so that the server never waits for us
_SCAN_UIDS = 10_000  # asked about at once
_LISTED = 200  # differences and refusals that a report names one by one


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


class Window:
    """Bytes that are fetched, or asked for, and not recorded yet.

    Args:
        most: says how many there may be at most, which may change.
        careful: there was a crash.
    """

    def __init__(self, most: Callable[[], int], *, careful: bool) -> None:
        self._most = most
        self._least = _LEAST_WINDOW if careful else _FIRST_WINDOW
        self._used = 0
        self._done = 0  # bytes recorded in this run
        self._changed = asyncio.Event()

    @property
    def limit(self) -> int:
        """How many there may be now."""
        return min(self._most(), max(self._least, self._done // _SHARE))

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

    def leave(self, size: int, *, done: int = 0) -> None:
        """They are recorded, or will not come."""
        self._used -= size
        self._done += done
        self._changed.set()


@dataclass(slots=True)
class Target:
    """A folder of the destination in this run."""

    name: str
    row: TargetFolder
    held: Held
    strangers: dict[int, list[str]] = field(default_factory=dict)  # size -> handles without a row
    dated: dict[int, list[str]] = field(default_factory=dict)  # time received -> handles that may be ours
    digests: dict[str, bytes] = field(default_factory=dict)
    retired: dict[bytes, list[Copy]] = field(default_factory=dict)  # by SHA-256
    newest: int = 0  # UID of the newest copy in this run


@dataclass(frozen=True, slots=True)
class Batch:
    """Messages that go to one folder together."""

    target: str
    parcels: tuple[Parcel, ...]
    weight: int  # of the window


@dataclass(frozen=True, slots=True)
class Failed:
    """A message that cannot be had, and why."""

    message: Message
    reason: str  # "" = it is gone
    weight: int


@dataclass(frozen=True, slots=True)
class Kept:
    """The rows of a batch are kept, or could not be."""

    task: asyncio.Task[None]


_Ready = Batch | Failed | Kept | None  # None: nothing more comes


class Importer:
    """One run of one pass.

    Args:
        thread: runs what blocks, one after the other.
        window: says how many bytes may be fetched and not recorded yet.
    """

    def __init__(
        self,
        job: Job,
        database: Database,
        settings: configuration.MailImport,
        imported: records.Import,
        options: Options,
        source: Source,
        sink: Sink,
        thread: Executor,
        window: Callable[[], int],
    ) -> None:
        self._job = job
        self._database = database
        self._settings = settings
        self._import = imported
        self._options = options
        self._source = source
        self._sink = sink
        self._thread = thread
        state = job.state or {}
        self._window = Window(window, careful=bool(state.get("crashes")))
        self.counters = Counters(**state.get("counters", {}))
        self._failed_singly = bool(state.get("singly"))
        self._settled: list[int] = list(
            state.get("settled", [])
        )  # folders done, where no mod-sequence says so
        self._counted_bytes = self.counters.fetched_bytes  # that are in the account's day already
        self._keeping: asyncio.Task[None] | None = None
        self._targets: dict[str, Target] = {}
        self._known: dict[str, TargetFolder] = {}
        self._names: dict[int, str] = {}  # of targets
        self._budget = f"{source.connection.server.host} {source.connection.server.user}"
        self._began = time.monotonic()
        self._total_bytes = 0  # to do, where the source says it
        self._is_by_message = False
        self._is_first_run = job.state is None

    # -- the pass -----------------------------------------------------------------------------------

    async def run(self, folders: Sequence[Folder], where: Map) -> None:
        """Copy all folders; one that has not changed is not opened again.

        Raises:
            Permanent: nothing is left to import.
            RemoteError: a server failed; what is placed is recorded, the rest goes on later.
            Left: from the job's checkpoints.
        """
        number = self._import.id
        self._known = await self._read(records.targets, number)
        self._names = {row.id: name for name, row in self._known.items()}
        chosen = self._choose(folders)
        roles = plans.uses(folders, self._source.prefix)
        self.counters.found = sum(folder.messages for folder in chosen)
        self._total_bytes = sum(folder.size or 0 for folder in chosen)
        if self._is_first_run:  # what was refused in an earlier pass is tried again
            await self._commit(records.drop_refused, number)
        await self._forget_targets()
        sources = await self._read(records.sources, number)
        for folder in chosen:
            row = sources.get(folder.name)
            if row is not None and (row.id in self._settled or _is_unchanged(folder, row)):
                continue
            await self._folder(folder, row, _Route(folder, self._target_of(folder, where, roles), where))
        settled = [(target.row.id, target.newest + 1) for target in self._targets.values()]
        await self._write(records.settle_targets, settled)  # nobody need ask any more what is there
        self.counters.commands += self._source.connection.commands + self._sink.commands

    def _choose(self, folders: Sequence[Folder]) -> list[Folder]:
        if not self._source.is_gmail or self._options.gmail != "message":
            return plans.chosen(folders, self._options)
        if any(plans.ALL in folder.attributes for folder in folders):
            self._is_by_message = True
            views = {plans.ALL, "\\junk", "\\trash"}
            return [folder for folder in folders if views & folder.attributes]
        self.counters.note(
            "All Mail is hidden from IMAP, so each label was read by itself: a message with several labels is"
            " fetched several times. Gmail's settings show it (Labels, Show in IMAP)."
        )
        return plans.chosen(folders, self._options)

    def _target_of(self, folder: Folder, where: Map, roles: dict[str, str]) -> str | None:
        """Where a folder goes as a whole; None where each message says it by its labels."""
        if self._is_by_message:
            if plans.ALL in folder.attributes:
                return None
            return where.role("\\junk" if "\\junk" in folder.attributes else "\\trash")
        return where.folder(folder, roles)

    async def _folder(self, folder: Folder, row: SourceFolder | None, route: _Route) -> None:
        number = self._import.id
        try:
            folder = await self._source.open(folder)
        except Refused as error:
            self.counters.differs(folder.name, f"cannot be opened: {_for_good(error)}")
            return
        if row is not None and row.uid_validity != folder.uid_validity:
            # All UIDs are new. The old rows still say what is at the destination: `_recognise` pairs them.
            old = row
            await self._write(records.retire_source, old, folder.name)
            row = None
        if row is None:
            row = await self._write(records.add_source, number, folder.name, folder.uid_validity)
            if not folder.messages and route.target is not None:  # an empty folder is a folder too
                try:
                    await self._open_target(route.target)
                except Refused as error:
                    self.counters.differs(folder.name, f"cannot be made: {_for_good(error)}")
        is_whole = True
        if row.uid_next > 1 and _has_changed(folder, row):
            since = row.modseq if folder.modseq else 0
            step = row.uid_next if since else _SCAN_UIDS
            for first in range(1, row.uid_next, step):
                changed = await self._source.scan(first, min(first + step, row.uid_next) - 1, since=since)
                for at in range(0, len(changed), _SCAN_UIDS):
                    is_whole &= await self._stretch(row, route, changed[at : at + _SCAN_UIDS])
        for first in range(max(row.uid_next, 1), folder.uid_next, _SCAN_UIDS):
            last = min(first + _SCAN_UIDS, folder.uid_next) - 1
            is_whole &= await self._stretch(row, route, await self._source.scan(first, last))
            # The rest is still to come, so the numbers say that it is not done.
            if is_whole and last + 1 < folder.uid_next:
                row = replace(row, uid_next=last + 1, messages=-1, modseq=folder.modseq)
                await self._commit(records.settle_source, row)
        if not is_whole:  # another pass tries it again
            return
        row = replace(row, uid_next=folder.uid_next, messages=folder.messages, modseq=folder.modseq)
        if not folder.modseq:
            self._settled.append(row.id)
        await self._commit(records.settle_source, row)

    async def _forget_targets(self) -> None:
        """A folder of the destination that was made anew is filled again: its rows name nothing any more."""
        now = await self._sink.validities(self._known) if self._known else {}
        for name, row in list(self._known.items()):
            uid_validity = now.get(name, row.uid_validity)
            if uid_validity != row.uid_validity:
                self._known[name] = await self._write(records.forget_target, row, uid_validity)
                self._settled.clear()

    async def _stretch(self, row: SourceFolder, route: _Route, messages: Sequence[Message]) -> bool:
        """Do all there is to do for some messages of a folder, the proof included.

        Returns:
            Whether none of them is without its place.

        Cost: their rows and what the scan said of them in memory, 1 KiB each.
        """
        if not messages:
            return True
        walk = _Walk(row, route)
        first, last = messages[0].uid, messages[-1].uid
        for copy in await self._read(records.copies, row.id, first, last):
            walk.copies.setdefault(copy.uid, []).append(copy)
        await self._messages(walk, messages)
        await self._links(walk)
        await self._flags(walk)
        await self._check(walk)
        return walk.is_whole

    # -- bodies -------------------------------------------------------------------------------------

    async def _messages(self, walk: _Walk, found: Sequence[Message]) -> None:
        """Copy those that have no row, and note what else there is to do for those that have."""
        wanted: dict[str, list[Message]] = {}
        for message in found:
            places = walk.route.places(message, self._options)
            copies = walk.copies.get(message.uid)
            if not copies:
                wanted.setdefault(places[0], []).append(message)
                for other in places[1:]:
                    walk.links.setdefault((places[0], other), []).append(message)
                continue
            have = {self._names[copy.target_id]: copy for copy in copies if copy.handle}
            for name, copy in have.items():
                if copy.flags != message.flags:
                    walk.flags.setdefault(name, []).append((copy, message.flags))
            for name in places:
                if have and name not in have:
                    walk.links.setdefault((next(iter(have)), name), []).append(message)
        for name, messages in wanted.items():
            try:
                await self._copy(walk, name, messages)
            except Unmade as error:
                walk.is_whole = False
                self.counters.differs(name, f"{len(messages)} messages have no place: {error}")

    async def _copy(self, walk: _Walk, name: str, messages: Sequence[Message]) -> None:
        """Fetch and place messages of one destination, the two at the same time."""
        target = await self._open_target(name)
        ready: asyncio.Queue[_Ready] = asyncio.Queue()
        reader = asyncio.create_task(self._read_bodies(walk, name, messages, ready))
        try:
            while (each := await ready.get()) is not None:
                if isinstance(each, Failed):
                    await self._record_failed(walk, target, each)
                elif isinstance(each, Batch):
                    await self._place(walk, target, each, ready)
                elif each.task is self._keeping:
                    await self._kept()
            await self._kept()
            await reader  # what was fetched before a failure is placed by now
        finally:
            if self._keeping is not None:  # something else failed meanwhile
                with suppress(KsyncError, Left):
                    await self._kept()
            if not reader.done():
                reader.cancel()
                with suppress(asyncio.CancelledError, RemoteError, Poisoned):
                    await reader

    async def _read_bodies(
        self, walk: _Walk, name: str, messages: Sequence[Message], ready: asyncio.Queue[_Ready]
    ) -> None:
        longest = min(self._settings.message_bytes, self._sink.longest or self._settings.message_bytes)
        at_once = 1 if self._failed_singly else _BATCH
        reading = _Reading(name, ready, Bodies(self._source, self._settings))
        some: list[Message] = []
        weight = 0
        try:
            for message in messages:
                if message.size > longest:
                    text = f"it has {message.size} bytes, the most is {longest}"
                    ready.put_nowait(Failed(message, text, 0))
                elif message.size > self._settings.whole_bytes:
                    await self._ask(reading, some)
                    await self._drain(reading)
                    some, weight = [], 0
                    await self._take_long(reading, walk, message)
                else:
                    if some and (weight + message.size > self._window.limit // 4 or len(some) >= at_once):
                        await self._ask(reading, some)
                        some, weight = [], 0
                    some.append(message)
                    weight += message.size
            await self._ask(reading, some)
            await self._drain(reading)
        finally:
            ready.put_nowait(None)

    async def _ask(self, reading: _Reading, messages: list[Message]) -> None:
        if not messages:
            return
        weight = sum(message.size for message in messages)
        await self._keep_to_the_pace(weight)
        bodies = reading.bodies
        while bodies.requests and (bodies.requests >= _REQUESTS or self._window.is_full_for(weight)):
            await self._take(reading)
        await self._window.enter(weight)
        await bodies.ask(messages)

    async def _take(self, reading: _Reading) -> None:
        """Take what comes until a request is answered."""
        most = max(self._window.limit, 4 * self._settings.whole_bytes)  # more only where sizes lie
        parcels: list[Parcel] = []
        try:
            while isinstance(each := await reading.bodies.take(), Parcel):
                self.counters.fetched_bytes += each.size
                parcels.append(each)
                most -= each.size
                if most < 0:
                    raise Poisoned([parcel.message for parcel in parcels], "its sizes are not what it says")
        except Poisoned as error:
            await self._poisoned(error, reading)
            raise Temporary(f"the source cannot be read on: {error}") from None
        finally:  # what came before a failure is kept
            if parcels:
                weight = sum(parcel.message.size for parcel in parcels)
                reading.ready.put_nowait(Batch(reading.name, tuple(parcels), weight))
        if each.refused is not None and is_temporary(each.refused):
            raise Temporary(f"the source: {said(each.refused)}")
        reading.missing += each.missing
        self._window.leave(sum(message.size for message in each.missing))

    async def _drain(self, reading: _Reading) -> None:
        """Take all that was asked for; what did not come with the others is asked for alone."""
        while reading.bodies.requests:
            await self._take(reading)
        missing, reading.missing = reading.missing, []
        for message in missing:
            await self._window.enter(message.size)
            await reading.bodies.ask([message])
            reason = "the server does not give it"
            while isinstance(each := await reading.bodies.take(), Parcel):
                self.counters.fetched_bytes += each.size
                reading.ready.put_nowait(Batch(reading.name, (each,), each.message.size))
            if not each.missing:
                continue
            if each.refused is not None:
                if is_temporary(each.refused):
                    raise Temporary(f"the source: {said(each.refused)}")
                reason = said(each.refused)
            is_there = await self._source.is_there(message.uid)
            reading.ready.put_nowait(Failed(message, reason if is_there else "", message.size))

    async def _poisoned(self, error: Poisoned, reading: _Reading) -> None:
        if len(error.messages) == 1:
            reading.ready.put_nowait(Failed(error.messages[0], str(error), 0))
        else:
            self._failed_singly = True  # the next run finds out which one it is
            await self._commit(lambda tx: None)

    async def _take_long(self, reading: _Reading, walk: _Walk, message: Message) -> None:
        path = self._settings.spool / f"{self._import.id}-{walk.row.id}-{message.uid}"
        weight = min(message.size, self._window.limit)  # so that few wait in files
        await self._window.enter(weight)
        await self._keep_to_the_pace(message.size)
        reason = "the server does not give it"
        try:
            parcel = await self._source.spool(message, path)
        except Poisoned as error:
            await self._poisoned(error, reading)
            path.unlink(missing_ok=True)
            raise Temporary(f"the source cannot be read on: {error}") from None
        except Refused as error:
            if is_temporary(error.status):
                raise Temporary(str(error)) from None
            parcel, reason = None, said(error.status)
        if parcel is not None:
            self.counters.fetched_bytes += parcel.size
            reading.ready.put_nowait(Batch(reading.name, (parcel,), weight))
        else:
            is_there = await self._source.is_there(message.uid)
            reading.ready.put_nowait(Failed(message, reason if is_there else "", weight))

    async def _keep_to_the_pace(self, size: int) -> None:
        """Wait, or leave, so that neither the bandwidth nor the account's day is used up."""
        if self._settings.bytes_s:
            due_s = self._source.connection.received / self._settings.bytes_s
            await asyncio.sleep(max(due_s - (time.monotonic() - self._began), 0))
        daily = self._settings.daily_bytes
        if self._source.is_gmail:
            daily = min(daily or self._settings.gmail_daily_bytes, self._settings.gmail_daily_bytes)
        if daily:
            spent, rest_s = await self._read(records.spent, self._budget)
            if spent and spent + self._window.used + size > daily:
                raise DayIsOver(rest_s)

    # -- placing ------------------------------------------------------------------------------------

    async def _open_target(self, name: str) -> Target:
        """A folder of the destination, made where it is missing."""
        if name in self._targets:
            return self._targets[name]
        held = await self._sink.ensure(name)
        row = self._known.get(name)
        if row is None:
            number = self._import.id
            row = await self._write(records.add_target, number, name, held.uid_validity, held.uid_next)
        elif row.uid_validity != held.uid_validity:
            raise Temporary(f"{name} was made anew at the destination")
        self._known[name], self._names[row.id] = row, name
        self._targets[name] = target = Target(name, row, held)
        await self._meet(target)
        return target

    async def _meet(self, target: Target) -> None:
        """Messages of the destination that have no row: from before the import, or of a run that was cut."""
        if target.held.messages and target.held.uid_next > target.row.settled_next:
            known = await self._read(records.handles, target.row.id)
            for each in await self._sink.strangers(target.name, target.row.settled_next):
                if each.handle not in known:
                    target.strangers.setdefault(each.size, []).append(each.handle)
                    target.dated.setdefault(int(each.received.timestamp()), []).append(each.handle)
        for copy in await self._read(records.retired, self._import.id, target.row.id):
            target.retired.setdefault(copy.sha256, []).append(copy)

    async def _place(self, walk: _Walk, target: Target, batch: Batch, ready: asyncio.Queue[_Ready]) -> None:
        made: list[Copy] = []
        dropped: list[Copy] = []
        new: list[Parcel] = []
        for parcel in batch.parcels:
            found = await self._recognise(target, parcel)
            if found is None:
                new.append(parcel)
                continue
            handle, how, replaced = found
            made.append(self._recognised(walk, target, parcel, handle, how, replaced))
            if replaced is not None:
                dropped.append(replaced)
            self._count(how, 0)
        for parcel, placed in zip(new, await self._sink.put(target.name, new) if new else (), strict=True):
            if isinstance(placed, Placed):
                made.append(self._copied(walk, target, parcel, placed.handle, COPIED, placed.lost))
                self._count(COPIED, parcel.size)
                if placed.lost:
                    self.counters.note(f"The destination does not keep the keywords {' '.join(placed.lost)}.")
            else:
                made.append(self._refusal(walk, target, parcel.message, placed.reason))
        for copy in made:
            if copy.handle:
                walk.copies.setdefault(copy.uid, []).append(copy)

        def effects(tx: Write) -> None:
            records.drop(tx, dropped)
            records.add_copies(tx, made)

        async def keep() -> None:
            await self._commit(effects)
            for parcel in batch.parcels:
                if parcel.file is not None:
                    parcel.file.unlink(missing_ok=True)
            self._window.leave(batch.weight, done=sum(parcel.size for parcel in batch.parcels))

        try:
            await self._kept()
        except Left:  # the rows before these are kept, and these are placed: they are kept too
            await keep()
            raise
        self._keeping = asyncio.create_task(keep())
        self._keeping.add_done_callback(lambda task: ready.put_nowait(Kept(task)))

    async def _kept(self) -> None:
        """Wait until the rows of the last batch are kept: that goes on while the next one is placed.

        Raises:
            Left: from the job's checkpoint.
        """
        keeping, self._keeping = self._keeping, None
        if keeping is not None:
            await keeping

    async def _recognise(self, target: Target, parcel: Parcel) -> tuple[str, str, Copy | None] | None:
        """A message that is there already: its handle, how it came there, the row it replaces."""
        paired = target.retired.get(parcel.sha256)
        if paired:
            old = paired.pop(0)
            return old.handle, old.how, old
        if not target.strangers:
            return None
        handles = target.strangers.get(parcel.size, ())
        unknown = [handle for handle in handles if handle not in target.digests]
        if unknown:
            target.digests |= await self._sink.digests(target.name, unknown)
        for handle in handles:
            if target.digests.get(handle) == parcel.sha256:
                self._met(target, handle)
                return handle, self._came(target, handle), None
        return await self._recognise_changed(target, parcel)

    async def _recognise_changed(self, target: Target, parcel: Parcel) -> tuple[str, str, Copy | None] | None:
        """The same for a destination that stores line ends or NUL bytes in its own way."""
        handles = [
            handle
            for handle in target.dated.get(int(parcel.message.received.timestamp()), ())
            if target.digests.get(handle) != parcel.sha256
        ]
        if not handles:
            return None
        wanted = await asyncio.to_thread(_canonical, parcel)
        for handle, digest in (await self._sink.digests(target.name, handles, as_stored=True)).items():
            if digest == wanted:
                self._met(target, handle)
                return handle, self._came(target, handle), None
        return None

    def _met(self, target: Target, handle: str) -> None:
        for index in (target.strangers, target.dated):
            for handles in index.values():
                if handle in handles:
                    handles.remove(handle)
                    break

    def _came(self, target: Target, handle: str) -> str:
        """Whether a stranger was there before the import began."""
        ours = int(handle) >= target.row.first_next if handle.isdigit() else f".K{self._import.id}U" in handle
        return COPIED if ours else THERE

    def _copied(
        self,
        walk: _Walk,
        target: Target,
        parcel: Parcel,
        handle: str,
        how: str,
        lost: Iterable[str] = (),
    ) -> Copy:
        message = parcel.message
        flags = tuple(flag for flag in message.flags if flag not in set(lost))
        return Copy(
            walk.row.id,
            message.uid,
            target.row.id,
            handle,
            how,
            parcel.size,
            parcel.sha256,
            message.received,
            flags,
        )

    def _recognised(
        self, walk: _Walk, target: Target, parcel: Parcel, handle: str, how: str, replaced: Copy | None
    ) -> Copy:
        """A row for a message that is there; flags of the source that it may not have are added."""
        copy = self._copied(walk, target, parcel, handle, how)
        copy = replace(copy, flags=replaced.flags if replaced is not None else ())
        if copy.flags != parcel.message.flags:
            walk.flags.setdefault(target.name, []).append((copy, parcel.message.flags))
        return copy

    def _refusal(self, walk: _Walk, target: Target, message: Message, reason: str) -> Copy:
        return Copy(
            walk.row.id,
            message.uid,
            target.row.id,
            "",
            REFUSED,
            message.size,
            b"",
            message.received,
            message.flags,
            reason,
        )

    async def _record_failed(self, walk: _Walk, target: Target, failed: Failed) -> None:
        self._window.leave(failed.weight)
        if not failed.reason:
            self.counters.gone += 1
            return
        await self._commit(records.add_copies, [self._refusal(walk, target, failed.message, failed.reason)])

    def _count(self, how: str, size: int) -> None:
        counters = self.counters
        setattr(counters, how, getattr(counters, how) + 1)
        counters.copied_bytes += size

    # -- labels, flags, proof -----------------------------------------------------------------------

    async def _links(self, walk: _Walk) -> None:
        """Put messages into further folders without sending their bytes again."""
        for (first, name), messages in walk.links.items():
            try:
                source, target = await self._open_target(first), await self._open_target(name)
            except Unmade as error:
                walk.is_whole = False
                self.counters.differs(name, f"{len(messages)} messages could not be added: {error}")
                continue
            from_there: dict[str, Copy] = {}
            made: list[Copy] = []
            for message in messages:
                copies = walk.copies.get(message.uid, ())
                copy = next(
                    (each for each in copies if each.target_id == source.row.id and each.handle), None
                )
                if copy is None or any(each.target_id == target.row.id for each in copies):
                    continue
                parcel = Parcel(message, copy.size, copy.sha256)
                found = await self._recognise(target, parcel)
                if found is not None:
                    handle, how, replaced = found
                    how = LINKED if how == COPIED else how  # by a run that was cut
                    made.append(self._recognised(walk, target, parcel, handle, how, replaced))
                    self._count(how, 0)
                else:
                    from_there[copy.handle] = copy
            linked: Mapping[str, str] = {}
            if from_there:
                try:
                    linked = await self._sink.link(first, list(from_there), name)
                except Refused as error:
                    self.counters.note(f"{name}: {_for_good(error)}")
            for handle, copy in from_there.items():
                if handle in linked:
                    made.append(replace(copy, target_id=target.row.id, handle=linked[handle], how=LINKED))
                    self._count(LINKED, 0)
            for each in made:
                walk.copies.setdefault(each.uid, []).append(each)
                walk.linked.add((each.uid, each.target_id))
            if made:
                rows = tuple(made)
                await self._commit(records.add_copies, rows)
            missing = [copy for handle, copy in from_there.items() if handle not in linked]
            for copy in missing[:_LISTED]:
                self.counters.differs(name, f"UID {copy.uid} of the source could not be added")

    async def _flags(self, walk: _Walk) -> None:
        """Carry what changed at the source, and leave what the destination's owner changed."""
        for name, changed in walk.flags.items():
            await self._open_target(name)
            try:
                await self._sink.flag(
                    name,
                    (
                        (
                            copy.handle,
                            frozenset(flags) - frozenset(copy.flags),
                            frozenset(copy.flags) - frozenset(flags),
                        )
                        for copy, flags in changed
                    ),
                )
            except Refused as error:
                self.counters.differs(name, f"flags of {len(changed)} messages: {_for_good(error)}")
                continue
            self.counters.flags += len(changed)
            await self._commit(records.carry_flags, changed)
            for copy, flags in changed:
                copies = walk.copies.get(copy.uid, [])
                if copy in copies:  # what was taken away is not missed
                    kept = tuple(flag for flag in copy.flags if flag in flags)
                    copies[copies.index(copy)] = replace(copy, flags=kept)

    async def _check(self, walk: _Walk) -> None:
        """Ask the destination for every message that came there since the folder was last settled."""
        fresh: dict[int, dict[str, Copy]] = {}
        for copies in walk.copies.values():
            for copy in copies:
                if copy.handle and (
                    copy.uid >= walk.row.uid_next or (copy.uid, copy.target_id) in walk.linked
                ):
                    fresh.setdefault(copy.target_id, {})[copy.handle] = copy
        for target_id, wanted in fresh.items():
            name = self._names[target_id]
            found = {handle: seen async for handle, seen in self._sink.look(name, wanted)}
            if target := self._targets.get(name):
                target.newest = max([target.newest, *(int(handle) for handle in found if handle.isdigit())])
            again = {}
            for handle, copy in wanted.items():
                seen = found.get(handle)
                problem = "is missing" if seen is None else _difference(copy, seen)
                if seen is not None and problem == "size":
                    again[handle] = copy
                elif problem:
                    self.counters.differs(name, f"UID {copy.uid} of the source {problem}")
            await self._check_bodies(name, wanted if self._options.bodies else again)
            self.counters.checked += len(found)

    async def _check_bodies(self, name: str, copies: dict[str, Copy]) -> None:
        if not copies:
            return
        digests = await self._sink.digests(name, copies)
        for handle, copy in copies.items():
            if digests.get(handle) != copy.sha256:
                self.counters.differs(name, f"UID {copy.uid} of the source was changed by the destination")

    # -- rows ---------------------------------------------------------------------------------------

    def counted(self) -> dict[str, Any]:
        """The counters as a checkpoint keeps them."""
        return {name: getattr(self.counters, name) for name in Counters.__slots__}

    async def _commit(self, effects: Callable[..., object], *arguments: object) -> None:
        """Rows, counters, and the lease, in one transaction."""
        fetched = self.counters.fetched_bytes - self._counted_bytes
        self._counted_bytes += fetched
        state = {
            **(self._job.state or {}),
            "is_running": True,
            "counters": self.counted(),
            "settled": self._settled,
            "singly": self._failed_singly,
        }
        self._progress()

        def all_of_it(tx: Write) -> None:
            effects(tx, *arguments)
            if fetched > 0:
                records.spend(tx, self._budget, fetched)

        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._job.checkpoint, state, all_of_it)

    def _progress(self) -> None:
        counters = self.counters
        seconds = time.monotonic() - self._began
        said: dict[str, object] = {
            "messages": counters.copied + counters.there,
            "of": counters.found,
            "mb": round(counters.copied_bytes / 1e6, 1),
        }
        if self._total_bytes:
            said["of_mb"] = round(self._total_bytes / 1e6, 1)
            rate = self._source.connection.received / max(seconds, 0.1)
            said["seconds_left"] = round(max(self._total_bytes - counters.copied_bytes, 0) / max(rate, 1))
        self._job.progress(**said)

    async def _read(self, fn: Callable[..., Any], *arguments: object) -> Any:
        def read() -> Any:
            with self._database.read() as tx:
                return fn(tx, *arguments)

        return await asyncio.get_running_loop().run_in_executor(self._thread, read)

    async def _write(self, fn: Callable[..., Any], *arguments: object) -> Any:
        def write(tx: Write) -> Any:
            return fn(tx, *arguments)

        return await asyncio.get_running_loop().run_in_executor(self._thread, self._database.write, write)


class DayIsOver(RemoteError):
    """The account's bytes of today are used up."""

    def __init__(self, wait_s: int) -> None:
        super().__init__("the daily limit of the source is reached")
        self.wait_s = wait_s


@dataclass(slots=True)
class _Reading:
    """Bodies on their way to one folder."""

    name: str
    ready: asyncio.Queue[_Ready]
    bodies: Bodies
    missing: list[Message] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Route:
    """Where the messages of one folder go."""

    folder: Folder
    target: str | None  # None: each message's labels say it
    where: Map

    def places(self, message: Message, options: Options) -> tuple[str, ...]:
        """The folders of a message; the first one gets its bytes."""
        if self.target is not None:
            return (self.target,)
        return plans.placed(message.labels, self.where, options)


@dataclass(slots=True)
class _Walk:
    """What is gathered for a stretch of one folder of the source."""

    row: SourceFolder
    route: _Route
    copies: dict[int, list[Copy]] = field(default_factory=dict)  # by UID
    links: dict[tuple[str, str], list[Message]] = field(default_factory=dict)  # (from, to)
    flags: dict[str, list[tuple[Copy, tuple[str, ...]]]] = field(default_factory=dict)
    linked: set[tuple[int, int]] = field(default_factory=set)  # (UID, target), in this run
    is_whole: bool = True  # no message is without its place


def _for_good(error: Refused) -> str:
    """Why a server will not do something.

    Raises:
        Temporary: it may do it later.
    """
    if is_temporary(error.status):
        raise Temporary(str(error)) from None
    return said(error.status)


def _is_unchanged(folder: Folder, before: SourceFolder) -> bool:
    return before.messages >= 0 and not _has_changed(folder, before)


def _has_changed(folder: Folder, before: SourceFolder) -> bool:
    """Whether there may be something new; without mod-sequences nobody can tell of flags but by looking."""
    if not folder.modseq:
        return folder.messages > 0 or before.messages > 0 or folder.uid_next != before.uid_next
    return (folder.uid_validity, folder.uid_next, folder.messages, folder.modseq) != (
        before.uid_validity,
        before.uid_next,
        before.messages,
        before.modseq,
    )


def _difference(copy: Copy, seen: Seen) -> str:
    if seen.size != copy.size:
        return "size"
    if int(seen.received.timestamp()) != int(copy.received.timestamp()):
        return f"was received {_moment(copy.received)}, the destination says {_moment(seen.received)}"
    missing = {flag.lower() for flag in copy.flags} - {flag.lower() for flag in seen.flags}
    return f"the destination has not the flags {' '.join(sorted(missing))}" if missing else ""


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S %z}"


def _canonical(parcel: Parcel) -> bytes:
    hashed = hashlib.sha256()
    for piece in parcel.pieces:
        hashed.update(canonical(piece))
    if parcel.file is not None:
        with Path(parcel.file).open("rb") as file:
            while data := file.read(1 << 20):
                hashed.update(canonical(data))
    return hashed.digest()
