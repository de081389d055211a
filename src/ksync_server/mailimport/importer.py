"""One pass of an import: copy what is new, carry flags, ask the destination for each message, report.

    source:        each folder: scan -> bodies -> [window] ...                          (`walking`, `reading`)
    destination:   -> placed -> rows and checkpoint ... -> labels -> flags
                      beside the next: -> it says what it has -> settled

What is placed and has no row yet is bounded by the window. Whatever ends the run, the next one meets that at
the destination as strangers and knows it by its SHA-256, so nothing is lost and nothing is there twice. The
window grows with what a run has done, from little after a crash: what crashes cost is a small share of that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import NamedTuple

from ksync_server import settings as configuration
from ksync_server.errors import RemoteError, Temporary
from ksync_server.jobs import Left
from ksync_server.mailimport import plan as plans
from ksync_server.mailimport import records
from ksync_server.mailimport.connection import ending
from ksync_server.mailimport.ledger import Ledger
from ksync_server.mailimport.plan import Folder, Map, Options
from ksync_server.mailimport.reading import Batch, Failed, Reader, Suspects, Window
from ksync_server.mailimport.records import COPIED, LINKED, REFUSED, Copy, TargetFolder
from ksync_server.mailimport.servers import Refused
from ksync_server.mailimport.sinks import Message, Parcel, Placed, Seen, Sink, Unmade
from ksync_server.mailimport.source import Source
from ksync_server.mailimport.targets import Recognised, Target
from ksync_server.mailimport.walking import (
    Came,
    Empty,
    Opening,
    Renumbered,
    Settled,
    Step,
    Stretch,
    Walker,
    for_good,
)

_AT_ONCE = 3  # batches on their way: one is written, one is answered, the rows of one are kept
_Placing = asyncio.Task[None]  # of a batch, until its rows are kept
_Ready = Step | asyncio.Task[None] | None  # a task is done; None: nothing more comes


class _Copied(NamedTuple):
    """A stretch of which all that is under way is known."""

    stretch: Stretch
    placing: tuple[_Placing, ...]


class Importer:
    """One run of one pass.

    Args:
        window: says how many bytes may be fetched and not recorded yet.
    """

    def __init__(
        self,
        ledger: Ledger,
        settings: configuration.MailImport,
        imported: records.Import,
        options: Options,
        source: Source,
        sink: Sink,
        window: Callable[[], int],
    ) -> None:
        self._ledger = ledger
        self._counters = ledger.counters
        self._import = imported
        self._options = options
        self._source = source
        self._sink = sink
        self._window = Window(window, careful=bool(ledger.crashes))
        self._placing: list[_Placing] = []  # the oldest first
        self._proving: asyncio.Queue[_Copied | Settled | None] = asyncio.Queue()
        self._unsettled = 0  # messages that were checked in folders that are not whole
        self._is_over = False  # nothing more is begun
        self._targets: dict[str, Target] = {}
        self._openings: dict[str, asyncio.Task[Target]] = {}
        self._known: dict[str, TargetFolder] = {}
        self._names: dict[int, str] = {}  # of targets
        reader = Reader(source, settings, self._window, sink.longest, ledger)
        self._walker = Walker(source, reader, ledger, options, self._names, settings.spool, imported.id)

    # -- the pass -----------------------------------------------------------------------------------

    async def run(self, folders: Sequence[Folder], where: Map) -> None:
        """Copy all folders.

        Raises:
            BadRequest: nothing is left to import, or a server says what no server may.
            RemoteError: a server failed; what is placed is recorded, the rest goes on later.
            Left: from the job's checkpoints.
        """
        number, ledger = self._import.id, self._ledger
        self._known = await ledger.read(records.targets, number)
        self._names |= {row.id: name for name, row in self._known.items()}
        chosen = self._walker.choose(folders)
        roles = plans.uses(folders, self._source.prefix)
        self._counters.found = sum(folder.messages for folder in chosen)
        ledger.total_bytes = sum(folder.size or 0 for folder in chosen)
        if ledger.is_first_run:  # what was refused in an earlier pass is tried again
            await ledger.commit(records.drop_refused, number)
        await self._forget_targets()
        ready: asyncio.Queue[_Ready] = asyncio.Queue()
        walk = asyncio.create_task(self._walker.walk(chosen, where, roles, ready.put_nowait))
        proof = asyncio.create_task(self._prove())
        proof.add_done_callback(ready.put_nowait)
        try:
            # With these, what is under way is waited for and gets its rows.
            with ending(self._sink, unless=(RemoteError, Left)):
                while (each := await ready.get()) is not None:
                    if each is proof:
                        await proof
                    await self._step(each, ready)
                await self._all_placed()
                self._proving.put_nowait(None)
                await proof
                await walk  # what was fetched before a failure is placed by now
        except Suspects:
            ledger.singly = True
            await ledger.commit(lambda tx: None)
            raise
        finally:
            walk.cancel()
            self._is_over = True
            self._proving.put_nowait(None)
            rest = [*self._placing, *self._openings.values(), walk, proof]
            await asyncio.wait(rest)  # what was being placed beside a failure has its rows by now
            for task in rest:
                if not task.cancelled():
                    task.exception()  # the first one is raised already
        settled = [(target.row.id, target.newest + 1) for target in self._targets.values()]
        await ledger.write(records.settle_targets, settled)  # nobody need ask any more what is there
        self._counters.checked += self._unsettled
        self._counters.commands += self._source.connection.commands + self._sink.commands

    async def _step(self, each: Step | asyncio.Task[None], ready: asyncio.Queue[_Ready]) -> None:
        if isinstance(each, Came):
            await self._came(each, ready)
        elif isinstance(each, Stretch):
            if each.links or each.flags:
                await self._all_placed()
                await self._links(each)
                await self._flags(each)
            self._proving.put_nowait(_Copied(each, tuple(self._placing)))
        elif isinstance(each, Renumbered):
            await self._all_placed()
            for target in list(self._targets.values()):
                target.meet((), await self._ledger.read(records.retired, self._import.id, target.row.id))
        elif isinstance(each, Opening):
            self._opening(each.name)
        elif isinstance(each, Empty):
            try:
                await self._open_target(each.name)
            except Unmade as error:
                if each.visit is not None:
                    each.visit.is_whole = False
                self._counters.differs(each.of, f"it cannot be made: {error}")
        elif isinstance(each, Settled):
            self._proving.put_nowait(each)
        elif each in self._placing:  # a failure is known at once
            await self._placed(each)

    async def _forget_targets(self) -> None:
        """A folder of the destination that was made anew is filled again: its rows name nothing any more."""
        now = await self._sink.validities(self._known) if self._known else {}
        for name, row in list(self._known.items()):
            uid_validity = now.get(name, row.uid_validity)
            if uid_validity != row.uid_validity:
                self._known[name] = await self._ledger.write(records.forget_target, row, uid_validity)
                self._ledger.settled.clear()

    # -- placing ------------------------------------------------------------------------------------

    async def _came(self, came: Came, ready: asyncio.Queue[_Ready]) -> None:
        stretch, what = came.stretch, came.what
        target = None
        if came.name not in self._ledger.unmade:
            try:
                target = await self._open_target(came.name)
            except Unmade as error:
                self._ledger.unmade.append(came.name)
                stretch.visit.is_whole = False
                many = len(stretch.wanted[came.name])
                self._counters.differs(came.name, f"{many} messages have no place: {error}")
                await self._ledger.commit(lambda tx: None)
        if target is None:
            self._window.leave(what.weight)
        elif isinstance(what, Failed):
            await self._record_failed(stretch, target, what)
        else:
            task = await self._place(stretch, target, what)
            task.add_done_callback(ready.put_nowait)

    def _opening(self, name: str) -> asyncio.Task[Target]:
        if name not in self._openings:
            self._openings[name] = asyncio.create_task(self._open(name))
        return self._openings[name]

    async def _open_target(self, name: str) -> Target:
        """A folder of the destination, made where it is missing.

        Raises:
            Unmade: it will not be had.
            RemoteError: the destination failed.
        """
        return await self._opening(name)

    async def _open(self, name: str) -> Target:
        held = await self._sink.ensure(name)
        row = self._known.get(name)
        if row is None:
            number = self._import.id
            row = await self._ledger.write(records.add_target, number, name, held.uid_validity, held.uid_next)
        elif row.uid_validity != held.uid_validity:
            raise Temporary(f"{name} was made anew at the destination")
        self._known[name], self._names[row.id] = row, name
        self._targets[name] = target = Target(name, row, self._sink)
        strangers = []
        if held.messages and held.uid_next > row.settled_next:
            known = await self._ledger.read(records.handles, row.id)
            found = await self._sink.strangers(name, row.settled_next)
            strangers = [each for each in found if each.handle not in known]
        target.meet(strangers, await self._ledger.read(records.retired, self._import.id, row.id))
        return target

    async def _place(self, stretch: Stretch, target: Target, batch: Batch) -> _Placing:
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
            made.append(self._recognised(stretch, target, parcel, found))
            if found.replaced is not None:
                dropped.append(found.replaced)
        task = asyncio.create_task(self._put(stretch, target, batch, new, made, dropped))
        self._placing.append(task)
        return task

    async def _all_placed(self) -> None:
        while self._placing:
            await self._placed(self._placing[0])

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
        stretch: Stretch,
        target: Target,
        batch: Batch,
        new: Sequence[Parcel],
        made: list[Copy],
        dropped: Sequence[Copy],
    ) -> None:
        """Place what is new, and keep the rows of all of a batch."""
        put = await self._sink.put(target.name, new, stretch.source_id) if new else ()
        for copy in made:
            self._counters.add(copy.how, 0)
        for parcel, placed in zip(new, put, strict=True):
            if isinstance(placed, Placed):
                made.append(self._copied(stretch, target, parcel, placed.handle, COPIED, placed.lost))
                self._counters.add(COPIED, parcel.size)
                if placed.lost:
                    keywords = " ".join(placed.lost)
                    self._counters.note(f"The destination does not keep the keywords {keywords}.")
            else:
                made.append(self._refusal(stretch, target, parcel.message, placed.reason))
        for copy in made:
            if copy.handle:
                stretch.copies.setdefault(copy.uid, []).append(copy)

        await self._ledger.commit(records.replace_copies, dropped, made)
        for parcel in batch.parcels:
            if parcel.file is not None:
                parcel.file.unlink(missing_ok=True)
        self._window.leave(batch.weight, done=sum(parcel.size for parcel in batch.parcels))

    def _copied(
        self,
        stretch: Stretch,
        target: Target,
        parcel: Parcel,
        handle: str,
        how: str,
        lost: Sequence[str] = (),
    ) -> Copy:
        message = parcel.message
        flags = tuple(flag for flag in message.flags if flag not in lost) if lost else message.flags
        return Copy(
            stretch.source_id,
            message.uid,
            target.row.id,
            handle,
            how,
            parcel.size,
            parcel.sha256,
            message.received,
            flags,
        )

    def _recognised(self, stretch: Stretch, target: Target, parcel: Parcel, found: Recognised) -> Copy:
        """A row for a message that is there; flags of the source that it may not have are added."""
        copy = self._copied(stretch, target, parcel, found.handle, found.how)
        copy = copy._replace(flags=found.flags)
        if copy.flags != parcel.message.flags:
            stretch.flags.setdefault(target.name, []).append((copy, parcel.message.flags))
        return copy

    def _refusal(self, stretch: Stretch, target: Target, message: Message, reason: str) -> Copy:
        return Copy(
            stretch.source_id,
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

    async def _record_failed(self, stretch: Stretch, target: Target, failed: Failed) -> None:
        self._window.leave(failed.weight)
        if not failed.reason:
            self._counters.gone += 1
            return
        await self._ledger.commit(
            records.add_copies, [self._refusal(stretch, target, failed.message, failed.reason)]
        )

    # -- labels, flags, proof -----------------------------------------------------------------------

    async def _links(self, stretch: Stretch) -> None:
        """Put messages into further folders without sending their bytes again."""
        for (first, name), messages in stretch.links.items():
            try:
                source, target = await self._open_target(first), await self._open_target(name)
            except Unmade as error:
                stretch.visit.is_whole = False
                self._counters.differs(name, f"{len(messages)} messages could not be added: {error}")
                continue
            from_there: dict[str, Copy] = {}
            made: list[Copy] = []
            dropped: list[Copy] = []
            for message in messages:
                copies = stretch.copies.get(message.uid, ())
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
                    made.append(self._recognised(stretch, target, parcel, found))
                    if found.replaced is not None:
                        dropped.append(found.replaced)
                else:
                    from_there[copy.handle] = copy
            linked: Mapping[str, str] = {}
            if from_there:
                try:
                    linked = await self._sink.link(first, list(from_there), name)
                except Refused as error:
                    self._counters.note(f"{name}: {for_good(error)}")
            stretch.visit.is_whole &= len(linked) == len(from_there)
            for handle, copy in from_there.items():
                if handle in linked:
                    made.append(copy._replace(target_id=target.row.id, handle=linked[handle], how=LINKED))
            for each in made:
                self._counters.add(each.how, 0)  # here, for others commit meanwhile
                stretch.copies.setdefault(each.uid, []).append(each)
                stretch.linked.add((each.uid, each.target_id))
            if made:
                await self._ledger.commit(records.replace_copies, dropped, made)
            for handle, copy in from_there.items():
                if handle not in linked:
                    self._counters.differs(name, f"UID {copy.uid} of the source could not be added")

    async def _flags(self, stretch: Stretch) -> None:
        """Carry what changed at the source, and leave what the destination's owner changed."""
        for name, changed in stretch.flags.items():
            try:
                await self._open_target(name)
                lost = await self._sink.flag(
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
            except (Refused, Unmade) as error:
                reason = for_good(error) if isinstance(error, Refused) else error
                self._counters.differs(name, f"flags of {len(changed)} messages: {reason}")
                stretch.visit.is_whole = False
                continue
            self._counters.flags += len(changed)
            carried = [(copy, tuple(flag for flag in flags if flag not in lost)) for copy, flags in changed]
            await self._ledger.commit(records.carry_flags, carried)
            for copy, flags in carried:
                copies = stretch.copies.get(copy.uid, [])
                if copy in copies:  # what was taken away is not missed
                    kept = tuple(flag for flag in copy.flags if flag in flags)
                    copies[copies.index(copy)] = copy._replace(flags=kept)

    async def _prove(self) -> None:
        """Ask about what was copied while more is being copied, and settle what is done.

        Raises:
            RemoteError: the destination failed.
            Left: from the job's checkpoint.
        """
        while (each := await self._proving.get()) is not None and not self._is_over:
            if isinstance(each, Settled):
                await self._settle(each)
                continue
            if each.placing:
                await asyncio.wait(each.placing)
            if any(task.exception() for task in each.placing):
                return  # who waits for them raises it
            await self._check(each.stretch)
            self._walker.done()

    async def _settle(self, each: Settled) -> None:
        checked, each.visit.checked = each.visit.checked, 0
        if not each.visit.is_whole:  # another pass tries it again
            self._unsettled += checked
        else:
            self._counters.checked += checked  # not before, since after a crash they are checked again
            if each.is_end and not each.row.modseq:
                self._ledger.settled.append(each.row.id)
            await self._ledger.commit(records.settle_source, each.row)

    async def _check(self, stretch: Stretch) -> None:
        """Ask the destination for every message that came there since the folder was last settled."""
        fresh: dict[int, dict[str, Copy]] = {}
        for copies in stretch.copies.values():
            for copy in copies:
                if copy.handle and self._is_unproven(stretch, copy):
                    fresh.setdefault(copy.target_id, {})[copy.handle] = copy
        for target_id, wanted in fresh.items():
            name = self._names[target_id]
            found = await self._sink.look(name, wanted)
            if target := self._targets.get(name):
                target.newest = max([target.newest, *map(self._sink.uid, found)])
            again = {}
            for handle, copy in wanted.items():
                seen = found.get(handle)
                problem = "is missing" if seen is None else _difference(copy, seen)
                if seen is not None and problem == "size":
                    again[handle] = copy
                elif problem:
                    self._counters.differs(name, f"UID {copy.uid} of the source {problem}")
            await self._check_bodies(name, wanted if self._options.bodies else again)
            stretch.visit.checked += len(found)

    def _is_unproven(self, stretch: Stretch, copy: Copy) -> bool:
        """Whether it came there since its folder was last settled, in this run or in one that was cut."""
        if copy.uid >= stretch.first_new or (copy.uid, copy.target_id) in stretch.linked:
            return True
        target = self._known[self._names[copy.target_id]]
        return copy.how == LINKED and self._sink.uid(copy.handle) >= target.settled_next

    async def _check_bodies(self, name: str, copies: dict[str, Copy]) -> None:
        if not copies:
            return
        digests = await self._sink.digests(name, copies)
        for handle, copy in copies.items():
            if digests.get(handle) != copy.sha256:
                self._counters.differs(name, f"UID {copy.uid} of the source was changed by the destination")


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
