"""The source's side of a pass: folder by folder, ahead of the destination's side.

    EXAMINE -> scan -> what has no row yet: bodies -> Came ...; then Stretch: all of it came; then Settled

How far it is ahead is bounded: bytes by the window, stretches by `_AHEAD`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from ksync_server.errors import Temporary
from ksync_server.mailimport import plan as plans
from ksync_server.mailimport import records
from ksync_server.mailimport.ledger import Ledger
from ksync_server.mailimport.plan import Folder, Map, Options
from ksync_server.mailimport.reading import Batch, Failed, Reader
from ksync_server.mailimport.records import Copy, SourceFolder
from ksync_server.mailimport.servers import Refused, is_temporary, said
from ksync_server.mailimport.sinks import Message
from ksync_server.mailimport.source import Source

_SCAN_UIDS = 5_000  # asked about at once
_AHEAD = 2  # stretches in memory, beside what the next scan says


@dataclass(frozen=True, slots=True)
class Route:
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
class Visit:
    """One folder of the source in this run."""

    row: SourceFolder
    route: Route
    is_whole: bool = True  # no message is without its place
    checked: int = 0  # messages that the destination says it has, since the folder was last settled


@dataclass(slots=True)
class Stretch:
    """Some messages of a folder, and what there is to do for them."""

    visit: Visit
    first_new: int  # from this UID on nothing was proven before
    copies: dict[int, list[Copy]] = field(default_factory=dict)  # by UID
    wanted: dict[str, list[Message]] = field(default_factory=dict)  # without a row; by where they go
    links: dict[tuple[str, str], list[Message]] = field(default_factory=dict)  # (from, to)
    flags: dict[str, list[tuple[Copy, tuple[str, ...]]]] = field(default_factory=dict)
    linked: set[tuple[int, int]] = field(default_factory=set)  # (UID, target), in this run

    @property
    def source_id(self) -> int:
        """Of the folder's row."""
        return self.visit.row.id


@dataclass(frozen=True, slots=True)
class Came:
    """Bodies of a stretch that go to one place, or one that failed."""

    stretch: Stretch
    name: str
    what: Batch | Failed


@dataclass(frozen=True, slots=True)
class Opening:
    """Messages for a folder of the destination will come."""

    name: str


@dataclass(frozen=True, slots=True)
class Empty:
    """A folder or label without messages: it is a folder too."""

    name: str
    of: str  # the source's name
    visit: Visit | None = None  # of a folder


@dataclass(frozen=True, slots=True)
class Renumbered:
    """A folder has new UIDs: the rows of its old ones say what is at the destination."""


@dataclass(frozen=True, slots=True)
class Settled:
    """A folder is done up to what the row says, unless something of it has no place."""

    visit: Visit
    row: SourceFolder
    is_end: bool  # all of it


Step = Opening | Came | Stretch | Empty | Renumbered | Settled


class Walker:
    """Walks through the source in one run.

    Args:
        spool: folder of the files of long messages.
        number: of the import.
    """

    def __init__(
        self,
        source: Source,
        reader: Reader,
        ledger: Ledger,
        options: Options,
        names: Mapping[int, str],
        spool: Path,
        number: int,
    ) -> None:
        self._source = source
        self._reader = reader
        self._ledger = ledger
        self._options = options
        self._names = names  # of targets, by row
        self._spool = spool
        self._number = number
        self._ahead = asyncio.Semaphore(_AHEAD)
        self._is_by_message = False
        self._empty_labels: list[str] = []

    # -- which folders, and where to ----------------------------------------------------------------

    def choose(self, folders: Sequence[Folder]) -> list[Folder]:
        """The folders that are read: of Gmail by message, those that show every message once."""
        if not self._source.is_gmail or self._options.gmail != "message":
            return plans.chosen(folders, self._options)
        if any(plans.ALL in folder.attributes for folder in folders):
            self._is_by_message = True
            self._empty_labels = plans.empty_labels(folders, self._options)
            views = {plans.ALL, "\\junk", "\\trash"}
            return [folder for folder in folders if views & folder.attributes]
        self._ledger.counters.note(
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

    # -- the walk -----------------------------------------------------------------------------------

    async def walk(
        self,
        chosen: Sequence[Folder],
        where: Map,
        roles: dict[str, str],
        put: Callable[[Step | None], None],
    ) -> None:
        """Read all folders; one that has not changed is not opened again. At the end `put` is given None.

        Raises:
            DayIsOver, Suspects: see `Reader.read`.
            RemoteError: the source failed.
        """
        try:
            sources = await self._ledger.read(records.sources, self._number)
            for folder in chosen:
                row = sources.get(folder.name)
                if row is not None and (row.id in self._ledger.settled or _is_unchanged(folder, row)):
                    continue
                await self._folder(folder, row, self._target_of(folder, where, roles), where, put)
            known = set(self._names.values())
            for label in self._empty_labels:
                if (name := where.label(label)) not in known:
                    put(Empty(name, label))
        finally:
            put(None)

    async def _folder(
        self,
        folder: Folder,
        row: SourceFolder | None,
        target: str | None,
        where: Map,
        put: Callable[[Step | None], None],
    ) -> None:
        ledger = self._ledger
        try:
            folder = await self._source.open(folder)
        except Refused as error:
            ledger.counters.differs(folder.name, f"cannot be opened: {for_good(error)}")
            return
        if row is not None and row.uid_validity != folder.uid_validity:
            # All UIDs are new. The old rows still say what is at the destination: `Target` pairs them.
            await ledger.write(records.retire_source, row, folder.name)
            put(Renumbered())
            row = None
        if row is None:
            row = await ledger.write(records.add_source, self._number, folder.name, folder.uid_validity)
        visit = Visit(row, Route(folder, target, where))
        if not folder.messages and row.messages < 0 and target is not None:
            put(Empty(target, folder.name, visit))
        if folder.messages and folder.uid_next > row.uid_next and target is not None:
            put(Opening(target))
        if row.uid_next > 1 and _has_changed(folder, row):
            since = row.modseq if folder.modseq else 0
            step = row.uid_next if since else _SCAN_UIDS
            for first in range(1, row.uid_next, step):
                changed = await self._source.scan(first, min(first + step, row.uid_next) - 1, since=since)
                for at in range(0, len(changed), _SCAN_UIDS):
                    await self._stretch(visit, changed[at : at + _SCAN_UIDS], put)
        for first in range(max(row.uid_next, 1), folder.uid_next, _SCAN_UIDS):
            last = min(first + _SCAN_UIDS, folder.uid_next) - 1
            await self._stretch(visit, await self._source.scan(first, last), put)
            # The rest is still to come, so the numbers say that it is not done.
            if last + 1 < folder.uid_next:
                further = replace(row, uid_next=last + 1, messages=-1, modseq=folder.modseq)
                put(Settled(visit, further, is_end=False))
        numbers = {"uid_next": folder.uid_next, "messages": folder.messages, "modseq": folder.modseq}
        put(Settled(visit, replace(row, **numbers), is_end=True))

    async def _stretch(
        self, visit: Visit, messages: Sequence[Message], put: Callable[[Step | None], None]
    ) -> None:
        """Read what is new among some messages.

        Cost: their rows and what the scan said of them in memory, 1 KiB each.
        """
        if not messages:
            return
        await self._ahead.acquire()
        stretch = Stretch(visit, visit.row.uid_next)
        known = await self._ledger.read(records.copies, visit.row.id, messages[0].uid, messages[-1].uid)
        for copy in known:
            stretch.copies.setdefault(copy.uid, []).append(copy)
        self._sort(stretch, messages)
        for name, wanted in stretch.wanted.items():
            if name in self._ledger.unmade:
                visit.is_whole = False
            # What is said to have no place while it comes is not asked for any more.
            still = (message for message in wanted if name not in self._ledger.unmade)
            await self._bodies(stretch, name, still, put)
        put(stretch)

    def done(self) -> None:
        """A stretch is not in memory any more."""
        self._ahead.release()

    def _sort(self, stretch: Stretch, messages: Sequence[Message]) -> None:
        """Tell those that have no row from those for which something else may be to do."""
        for message in messages:
            places = stretch.visit.route.places(message, self._options)
            copies = stretch.copies.get(message.uid)
            if not copies:
                stretch.wanted.setdefault(places[0], []).append(message)
                for other in places[1:]:
                    stretch.links.setdefault((places[0], other), []).append(message)
                continue
            have = {self._names[copy.target_id]: copy for copy in copies if copy.handle}
            for name, copy in have.items():
                if copy.flags != message.flags:
                    stretch.flags.setdefault(name, []).append((copy, message.flags))
            for name in places:
                if have and name not in have:
                    stretch.links.setdefault((next(iter(have)), name), []).append(message)

    async def _bodies(
        self,
        stretch: Stretch,
        name: str,
        messages: Iterator[Message],
        put: Callable[[Step | None], None],
    ) -> None:
        def spool(message: Message) -> Path:
            """The file of a long message while it comes; none of another boot, which may have holes after a
            crash of the machine, and none from before a restore, which gives numbers again."""
            told = f"{self._number}-{stretch.source_id}-{message.uid}-{self._ledger.generation}-{_boot()}"
            return self._spool / told

        await self._reader.read(messages, spool, lambda what: put(Came(stretch, name, what)))


def for_good(error: Refused) -> str:
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


@lru_cache(maxsize=1)
def _boot() -> str:
    """A name for this run of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
