"""One pass of an import: copy what is new, carry flags, ask the destination for each message, report.

    folder by folder:   scan -> bodies -> [window] -> placed at the destination -> rows and checkpoint
                        ... -> labels -> flags -> the destination says what it has -> the folder is settled

What is placed and has no row yet is bounded by the window. Whatever ends the run, the next one meets that at
the destination as strangers and knows it by its SHA-256, so nothing is lost and nothing is there twice. The
window grows with what a run has done, from little after a crash: what crashes cost is a small share of that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ksync_server import settings as configuration
from ksync_server.errors import KsyncError, RemoteError, Temporary
from ksync_server.jobs import Job, Left
from ksync_server.mailimport import plan as plans
from ksync_server.mailimport import records
from ksync_server.mailimport.connection import Refused, is_temporary, said
from ksync_server.mailimport.plan import Folder, Map, Options
from ksync_server.mailimport.reading import Batch, Failed, Reader, Suspects, Window
from ksync_server.mailimport.records import COPIED, LINKED, REFUSED, Copy, SourceFolder, TargetFolder
from ksync_server.mailimport.sinks import Message, Parcel, Placed, Seen, Sink, Unmade
from ksync_server.mailimport.source import Source
from ksync_server.mailimport.targets import Recognised, Target
from ksync_server.store.database import Database, Write

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

    def kept(self) -> dict[str, Any]:
        """As a checkpoint keeps them."""
        return {name: getattr(self, name) for name in self.__slots__}

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


_Placing = asyncio.Task[None]  # of a batch, until its rows are kept
_Ready = Batch | Failed | _Placing | None  # a task is done; None: nothing more comes
_AT_ONCE = 3  # batches on their way: one is written, one is answered, the rows of one are kept


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
        self.counters = Counters(**state.get("counters", {}))
        self._is_first_run = "counters" not in state
        self._singly = bool(state.get("singly"))
        self._settled: list[int] = list(state.get("settled", []))  # done, where no mod-sequence says so
        self._window = Window(window, careful=bool(state.get("crashes")))
        self._budget = f"{source.connection.server.host} {source.connection.server.user}"
        self._reader = Reader(
            source,
            settings,
            self._window,
            sink.longest,
            lambda: self._read(records.spent, self._budget),
            singly=self._singly,
        )
        self._counted_bytes = 0  # of what the reader fetched: they are in the account's day
        self._placing: list[_Placing] = []  # the oldest first
        self._targets: dict[str, Target] = {}
        self._known: dict[str, TargetFolder] = {}
        self._names: dict[int, str] = {}  # of targets
        self._began = time.monotonic()
        self._total_bytes = 0  # to do, where the source says it
        self._is_by_message = False

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
            # All UIDs are new. The old rows still say what is at the destination: `Target` pairs them.
            old = row
            await self._write(records.retire_source, old, folder.name)
            row = None
        if row is None:
            row = await self._write(records.add_source, number, folder.name, folder.uid_validity)
        if not folder.messages and row.messages < 0 and route.target is not None:
            try:  # an empty folder is a folder too
                await self._open_target(route.target)
            except Unmade as error:
                self.counters.differs(folder.name, f"it cannot be made: {error}")
                return
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
        reader = asyncio.create_task(
            self._reader.read(messages, partial(self._spool, walk.row.id), ready.put_nowait)
        )
        try:
            while (each := await ready.get()) is not None:
                if isinstance(each, Failed):
                    await self._record_failed(walk, target, each)
                elif isinstance(each, Batch):
                    task = await self._place(walk, target, each)
                    task.add_done_callback(ready.put_nowait)
                elif each in self._placing:  # a failure is known at once
                    await self._placed(each)
            while self._placing:
                await self._placed(self._placing[0])
            await reader  # what was fetched before a failure is placed by now
        except Suspects:
            self._singly = True
            await self._commit(lambda tx: None)
            raise
        finally:
            while self._placing:  # one of them failed, or something else: rows of the others are kept
                with suppress(KsyncError, Left):
                    await self._placed(self._placing[0])
            if not reader.done():
                reader.cancel()
                with suppress(asyncio.CancelledError, RemoteError):
                    await reader

    def _spool(self, source_id: int, message: Message) -> Path:
        """The file of a long message while it comes; none of another boot, which may have holes after a crash
        of the machine, and none from before a restore, which gives numbers again."""
        told = f"{self._import.id}-{source_id}-{message.uid}-{self._database.generation}-{_boot()}"
        return self._settings.spool / told

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
        self._targets[name] = target = Target(name, row, self._sink)
        strangers = []
        if held.messages and held.uid_next > row.settled_next:
            known = await self._read(records.handles, row.id)
            found = await self._sink.strangers(name, row.settled_next)
            strangers = [each for each in found if each.handle not in known]
        target.meet(strangers, await self._read(records.retired, self._import.id, row.id))
        return target

    async def _place(self, walk: _Walk, target: Target, batch: Batch) -> _Placing:
        """Begin to place a batch, once there is room for it."""
        while len(self._placing) >= _AT_ONCE:
            await self._placed(self._placing[0])
        made: list[Copy] = []
        dropped: list[Copy] = []
        new: list[Parcel] = []
        for parcel in batch.parcels:
            found = await target.recognise(parcel)
            if found is None:
                new.append(parcel)
                continue
            made.append(self._recognised(walk, target, parcel, found))
            if found.replaced is not None:
                dropped.append(found.replaced)
            self._count(found.how, 0)
        task = asyncio.create_task(self._put(walk, target, batch, new, made, dropped))
        self._placing.append(task)
        return task

    async def _placed(self, task: _Placing) -> None:
        """Wait until a batch is placed and its rows are kept.

        Raises:
            RemoteError: the destination failed.
            Left: from the job's checkpoint.
        """
        self._placing.remove(task)
        await task

    async def _put(
        self,
        walk: _Walk,
        target: Target,
        batch: Batch,
        new: Sequence[Parcel],
        made: list[Copy],
        dropped: Sequence[Copy],
    ) -> None:
        """Place what is new, and keep the rows of all of a batch."""
        put = await self._sink.put(target.name, new, walk.row.id) if new else ()
        for parcel, placed in zip(new, put, strict=True):
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

        await self._commit(effects)
        for parcel in batch.parcels:
            if parcel.file is not None:
                parcel.file.unlink(missing_ok=True)
        self._window.leave(batch.weight, done=sum(parcel.size for parcel in batch.parcels))

    def _copied(
        self,
        walk: _Walk,
        target: Target,
        parcel: Parcel,
        handle: str,
        how: str,
        lost: Sequence[str] = (),
    ) -> Copy:
        message = parcel.message
        flags = tuple(flag for flag in message.flags if flag not in lost) if lost else message.flags
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

    def _recognised(self, walk: _Walk, target: Target, parcel: Parcel, found: Recognised) -> Copy:
        """A row for a message that is there; flags of the source that it may not have are added."""
        copy = self._copied(walk, target, parcel, found.handle, found.how)
        copy = copy._replace(flags=() if found.replaced is None else found.replaced.flags)
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
                found = await target.recognise(parcel)
                if found is not None:
                    if found.how == COPIED:  # by a run that was cut
                        found = replace(found, how=LINKED)
                    made.append(self._recognised(walk, target, parcel, found))
                    self._count(found.how, 0)
                else:
                    from_there[copy.handle] = copy
            linked: Mapping[str, str] = {}
            if from_there:
                try:
                    linked = await self._sink.link(first, list(from_there), name)
                except Refused as error:
                    self.counters.note(f"{name}: {_for_good(error)}")
            walk.is_whole &= len(linked) == len(from_there)
            for handle, copy in from_there.items():
                if handle in linked:
                    made.append(copy._replace(target_id=target.row.id, handle=linked[handle], how=LINKED))
                    self._count(LINKED, 0)
            for each in made:
                walk.copies.setdefault(each.uid, []).append(each)
                walk.linked.add((each.uid, each.target_id))
            if made:
                rows = tuple(made)
                await self._commit(records.add_copies, rows)
            for handle, copy in from_there.items():
                if handle not in linked:
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
                walk.is_whole = False
                continue
            self.counters.flags += len(changed)
            await self._commit(records.carry_flags, changed)
            for copy, flags in changed:
                copies = walk.copies.get(copy.uid, [])
                if copy in copies:  # what was taken away is not missed
                    kept = tuple(flag for flag in copy.flags if flag in flags)
                    copies[copies.index(copy)] = copy._replace(flags=kept)

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
                target.newest = max([target.newest, *map(self._sink.uid, found)])
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

    async def _commit(self, effects: Callable[..., object], *arguments: object) -> None:
        """Rows, counters, and the lease, in one transaction."""
        fetched = self._reader.fetched_bytes - self._counted_bytes
        self._counted_bytes += fetched
        self.counters.fetched_bytes += fetched
        state = {
            **(self._job.state or {}),
            "is_running": True,
            "counters": self.counters.kept(),
            "settled": self._settled,
            "singly": self._singly,
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
    if seen.received != copy.received and int(seen.received.timestamp()) != int(copy.received.timestamp()):
        return f"was received {_moment(copy.received)}, the destination says {_moment(seen.received)}"
    if seen.flags == copy.flags:
        return ""
    missing = {flag.lower() for flag in copy.flags} - {flag.lower() for flag in seen.flags}
    return f"the destination has not the flags {' '.join(sorted(missing))}" if missing else ""


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S %z}"


@lru_cache(maxsize=1)
def _boot() -> str:
    """A name for this run of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
