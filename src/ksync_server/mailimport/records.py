"""What is imported, in rows: the imports, their folders, and a row for each message in each of its folders.

A row of `mail_copy` is written once the destination has said that it has the message, in the transaction that
keeps the job's lease. So whatever ends a run, the next one knows what is there: it has rows for all but what
was placed in the last moments, and that is found again at the destination, by size and SHA-256.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from ksync_server.errors import Conflict, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Read, Row, Write

ACTIVE = ("waiting", "running", "paused")
ENDED = ("done", "incomplete", "failed", "cancelled")

COPIED, LINKED, THERE, REFUSED = "copied", "linked", "there", "refused"


@dataclass(frozen=True, slots=True)
class Import:
    """One remote mailbox and where it goes."""

    id: int
    batch_id: int | None
    mailbox_id: int | None
    source: dict[str, Any]
    target: dict[str, Any]
    options: dict[str, Any]
    notify: str
    state: str
    passes: int
    job_id: int | None
    report: dict[str, Any] | None
    created_at: int
    ended_at: int | None


@dataclass(frozen=True, slots=True)
class SourceFolder:
    """What is known of a folder of the source; the numbers are those at which all of it was copied."""

    id: int
    uid_validity: int
    uid_next: int
    messages: int
    modseq: int


@dataclass(frozen=True, slots=True)
class TargetFolder:
    """What is known of a folder of the destination."""

    id: int
    uid_validity: int
    first_next: int
    settled_next: int


class Copy(NamedTuple):
    """A message of the source in one folder of the destination."""

    source_id: int
    uid: int
    target_id: int
    handle: str  # UID or file name at the destination; "" = refused
    how: str
    size: int
    sha256: bytes
    received: datetime
    flags: tuple[str, ...]
    reason: str | None = None

    def row(self) -> dict[str, object]:
        """As the table has it."""
        return {
            "source_id": self.source_id,
            "uid": self.uid,
            "target_id": self.target_id,
            "handle": self.handle,
            "how": self.how,
            "size": self.size,
            "sha256": self.sha256,
            "received_at": int(self.received.timestamp()),
            "flags": " ".join(self.flags),
            "reason": self.reason,
        }


_import = t.mail_import
_source = t.mail_source
_target = t.mail_target
_copy = t.mail_copy

_IMPORT = sa.select(
    *(_import.c[name] for name in Import.__dataclass_fields__),
)
_ONE_IMPORT = _IMPORT.where(_import.c.id == sa.bindparam("id_"))
_is_active = sa.or_(*(_import.c.state == state for state in ACTIVE))
_ABANDONED = (
    sa.select(_import.c.id, _import.c.job_id)
    .select_from(_import.outerjoin(t.job, t.job.c.id == _import.c.job_id))
    .where(_is_active, _import.c.job_id.is_not(None))
    .where(sa.or_(t.job.c.id.is_(None), t.job.c.ended_at.is_not(None)))
)
_OF_BATCH = sa.select(_import.c.id).where(_import.c.batch_id == sa.bindparam("batch_"), _is_active).limit(1)
_SOURCES = sa.select(
    _source.c.name,
    _source.c.id,
    _source.c.uid_validity,
    _source.c.uid_next,
    _source.c.messages,
    _source.c.modseq,
).where(_source.c.import_id == sa.bindparam("import_"))
_TARGETS = sa.select(
    _target.c.name, _target.c.id, _target.c.uid_validity, _target.c.first_next, _target.c.settled_next
).where(_target.c.import_id == sa.bindparam("import_"))
_COPIES = (
    sa.select(
        _copy.c.uid,
        _copy.c.target_id,
        _copy.c.handle,
        _copy.c.how,
        _copy.c.size,
        _copy.c.sha256,
        _copy.c.received_at,
        _copy.c.flags,
        _copy.c.reason,
    )
    .where(
        _copy.c.source_id == sa.bindparam("source_"),
        _copy.c.uid.between(sa.bindparam("first_"), sa.bindparam("last_")),
    )
    .order_by(_copy.c.uid)
)
_HANDLES = sa.select(_copy.c.handle).where(_copy.c.target_id == sa.bindparam("target_"), _copy.c.handle != "")
_ADD_COPY = sa.insert(_copy).values({column: sa.bindparam(column.name) for column in _copy.c})
_COUNTS = (
    sa.select(_source.c.name, _target.c.name, _copy.c.how, sa.func.count(), sa.func.sum(_copy.c.size))
    .select_from(
        _copy.join(_source, _source.c.id == _copy.c.source_id).join(
            _target, _target.c.id == _copy.c.target_id
        )
    )
    .where(_source.c.import_id == sa.bindparam("import_"))
    .group_by(_source.c.name, _target.c.name, _copy.c.how)
    .order_by(_source.c.name, _target.c.name)
)
_REFUSED = (
    sa.select(_source.c.name, _copy.c.uid, _copy.c.size, _copy.c.received_at, _copy.c.reason)
    .select_from(_copy.join(_source, _source.c.id == _copy.c.source_id))
    .where(_source.c.import_id == sa.bindparam("import_"), _copy.c.how == REFUSED)
    .order_by(_source.c.name, _copy.c.uid)
)


def _imported(row: Row) -> Import:
    values = list(row)
    for at in (3, 4, 5, 10):
        values[at] = None if values[at] is None else json.loads(values[at])
    return Import(*values)


def get(tx: Read, number: int) -> Import:
    """One import.

    Raises:
        NotFound: there is none of that number.
    """
    row = tx.one(_ONE_IMPORT, {"id_": number})
    if row is None:
        raise NotFound(f"There is no import {number}.")
    return _imported(row)


def list_imports(tx: Read, *, batch: int | None = None, limit: int = 100) -> list[Import]:
    """Imports, the newest first; those of one batch in the order of its file."""
    statement = _IMPORT.limit(limit)
    if batch is None:
        statement = statement.order_by(_import.c.id.desc())
    else:
        statement = statement.where(_import.c.batch_id == batch).order_by(_import.c.id)
    return [_imported(tuple(row)) for row in tx.execute(statement)]


def active(tx: Read) -> set[int]:
    """The numbers of the imports that have not ended."""
    return {row[0] for row in tx.execute(sa.select(_import.c.id).where(_is_active))}


def way(source: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[str, ...]:
    """From where to where; two imports on one way at once would both add what neither has a row for."""
    ends: list[tuple[str, ...]] = [(source["host"].lower(), str(source["port"]), source["user"].lower())]
    if target["kind"] == "imap":
        there = target["server"]
        ends.append((there["host"].lower(), str(there["port"]), there["user"].lower()))
    else:
        ends.append((target["kind"], target.get("path") or target["address"].lower()))
    return (*ends[0], *ends[1])


def ways(tx: Read, *, but: int = 0) -> dict[tuple[str, ...], int]:
    """Those on which imports are that have not ended, and which; one is left out.

    Cost: reads all of these.
    """
    c = _import.c
    rows = tx.execute(sa.select(c.source, c.target, c.id).where(_is_active, c.id != but))
    return {
        way(json.loads(source), json.loads(target)): number for source, target, number in map(tuple, rows)
    }


def require_free(taken: Mapping[tuple[str, ...], int], asked: tuple[str, ...]) -> None:
    """One import at a time goes a way.

    Raises:
        Conflict: another one is on it.
    """
    if (other := taken.get(asked)) is not None:
        raise Conflict(
            f"Import {other} copies the same mailbox there already; see `import mail watch {other}`."
        )


def abandoned(tx: Read) -> list[tuple[int, int]]:
    """Imports that have not ended although their pass's job has, or is not there any more: both numbers."""
    return [(number, job_id) for number, job_id in tx.fast(_ABANDONED)]


def is_under_way(tx: Read, batch: int) -> bool:
    """Whether an import of a batch has not ended.

    Cost: one indexed look.
    """
    return bool(tx.fast(_OF_BATCH, {"batch_": batch}))


def create(
    tx: Write,
    *,
    source: Mapping[str, object],
    target: Mapping[str, object],
    options: Mapping[str, object],
    notify: str = "",
    batch_id: int | None = None,
    mailbox_id: int | None = None,
) -> int:
    """A new import that waits; its number."""
    values = {
        "batch_id": batch_id,
        "mailbox_id": mailbox_id,
        "source": json.dumps(source),
        "target": json.dumps(target),
        "options": json.dumps(options),
        "notify": notify,
        "state": "waiting",
        "passes": 0,
        "created_at": int(time.time()),
    }
    number: int = tx.execute(sa.insert(_import).values(values).returning(_import.c.id)).scalar_one()
    return number


def set_job(tx: Write, number: int, job_id: int) -> None:
    """A pass is queued.

    Raises:
        Conflict: one is under way.
    """
    which = sa.update(_import).where(
        _import.c.id == number, sa.or_(_import.c.job_id.is_(None), _import.c.state.in_(ENDED))
    )
    if not tx.execute(which.values(job_id=job_id, state="waiting", ended_at=None)).rowcount:
        raise Conflict(f"Import {number} is under way already.")


def set_state(tx: Write, number: int, state: str) -> None:
    """It waits, runs or pauses."""
    tx.execute(sa.update(_import).where(_import.c.id == number).values(state=state))


def end(tx: Write, number: int, state: str, report: Mapping[str, object]) -> None:
    """A pass is over."""
    tx.execute(
        sa.update(_import)
        .where(_import.c.id == number)
        .values(
            state=state, report=json.dumps(report), passes=_import.c.passes + 1, ended_at=int(time.time())
        )
    )


def create_batch(tx: Write, name: str, notify: str = "") -> int:
    """Imports that are reported on together; its number."""
    values = {"name": name, "notify": notify, "created_at": int(time.time())}
    number: int = tx.execute(sa.insert(t.mail_batch).values(values).returning(t.mail_batch.c.id)).scalar_one()
    return number


def end_batch(tx: Write, number: int) -> None:
    """All of its imports have ended."""
    tx.execute(sa.update(t.mail_batch).where(t.mail_batch.c.id == number).values(ended_at=int(time.time())))


# -- folders --------------------------------------------------------------------------------------


def sources(tx: Read, number: int) -> dict[str, SourceFolder]:
    """Folders of the source that are known, by name."""
    return {row[0]: SourceFolder(*row[1:]) for row in tx.fast(_SOURCES, {"import_": number})}


def targets(tx: Read, number: int) -> dict[str, TargetFolder]:
    """Folders of the destination that are known, by name."""
    return {row[0]: TargetFolder(*row[1:]) for row in tx.fast(_TARGETS, {"import_": number})}


def add_source(tx: Write, number: int, name: str, uid_validity: int) -> SourceFolder:
    """Begin with a folder of the source."""
    values = {"import_id": number, "name": name, "uid_validity": uid_validity}
    found: int = tx.execute(sa.insert(_source).values(values).returning(_source.c.id)).scalar_one()
    return SourceFolder(found, uid_validity, 0, -1, 0)


def retire_source(tx: Write, folder: SourceFolder, name: str) -> None:
    """The server has given new UIDs to all of it: its rows only say what is at the destination already."""
    tx.execute(
        sa.update(_source)
        .where(_source.c.id == folder.id)
        .values(name=f"{name}\n{folder.uid_validity} {folder.id}")
    )


def settle_source(tx: Write, folder: SourceFolder) -> None:
    """All of it is copied and its flags are carried, as of these numbers."""
    values = {"uid_next": folder.uid_next, "messages": folder.messages, "modseq": folder.modseq}
    tx.execute(sa.update(_source).where(_source.c.id == folder.id).values(values))


def add_target(tx: Write, number: int, name: str, uid_validity: int, uid_next: int) -> TargetFolder:
    """Begin with a folder of the destination, before the first message goes there."""
    values = {
        "import_id": number,
        "name": name,
        "uid_validity": uid_validity,
        "first_next": uid_next,
        "settled_next": 1,
    }
    found: int = tx.execute(sa.insert(_target).values(values).returning(_target.c.id)).scalar_one()
    return TargetFolder(found, uid_validity, uid_next, 1)


def settle_targets(tx: Write, settled: Iterable[tuple[int, int]]) -> None:
    """Every copy below a UID has its row: (target, UID)."""
    c = _target.c
    for target_id, uid_next in settled:
        further = sa.update(_target).where(c.id == target_id, c.settled_next < uid_next)
        tx.execute(further.values(settled_next=uid_next))


def forget_target(tx: Write, folder: TargetFolder, uid_validity: int) -> TargetFolder:
    """The destination's folder is another one now: what its rows name is not there any more."""
    tx.execute(sa.delete(_copy).where(_copy.c.target_id == folder.id))
    tx.execute(
        sa.update(_target).where(_target.c.id == folder.id).values(uid_validity=uid_validity, settled_next=1)
    )
    reopened = sa.select(_source.c.id).where(
        _source.c.import_id
        == sa.select(_target.c.import_id).where(_target.c.id == folder.id).scalar_subquery()
    )
    tx.execute(sa.update(_source).where(_source.c.id.in_(reopened)).values(uid_next=0, messages=-1, modseq=0))
    return TargetFolder(folder.id, uid_validity, folder.first_next, 1)


# -- copies ---------------------------------------------------------------------------------------


def copies(tx: Read, source_id: int, first: int, last: int) -> list[Copy]:
    """What is known of the messages of a folder with these UIDs."""
    values = {"source_": source_id, "first_": first, "last_": last}
    return [
        Copy(
            source_id,
            uid,
            target,
            handle,
            how,
            size,
            bytes(sha),
            datetime.fromtimestamp(at, UTC),
            tuple(flags.split()),
            reason,
        )
        for uid, target, handle, how, size, sha, at, flags, reason in tx.fast(_COPIES, values)
    ]


def handles(tx: Read, target_id: int) -> set[str]:
    """What in a folder of the destination is known."""
    return {row[0] for row in tx.fast(_HANDLES, {"target_": target_id})}


def retired(tx: Read, number: int, target_id: int) -> list[Copy]:
    """Rows whose source has other UIDs by now: what is at the destination, to be paired anew."""
    columns = (_copy.c.source_id, _copy.c.uid, _copy.c.handle, _copy.c.how, _copy.c.size, _copy.c.sha256)
    rest = (_copy.c.received_at, _copy.c.flags)
    rows = tx.execute(
        sa.select(*columns, *rest)
        .join(_source, _source.c.id == _copy.c.source_id)
        .where(_source.c.import_id == number, _source.c.name.contains("\n"))
        .where(_copy.c.target_id == target_id, _copy.c.handle != "")
        .order_by(_copy.c.source_id, _copy.c.uid)
    )
    return [
        Copy(
            source,
            uid,
            target_id,
            handle,
            how,
            size,
            bytes(sha),
            datetime.fromtimestamp(at, UTC),
            tuple(flags.split()),
        )
        for source, uid, handle, how, size, sha, at, flags in map(tuple, rows)
    ]


def add_copies(tx: Write, made: Iterable[Copy]) -> None:
    """Rows of messages that are placed or refused."""
    tx.many(_ADD_COPY, (each.row() for each in made))


def drop_refused(tx: Write, number: int) -> None:
    """What was refused is tried again, so the folders are read again from there on."""
    ours = sa.select(_source.c.id).where(_source.c.import_id == number)
    which = sa.and_(_copy.c.source_id.in_(ours), _copy.c.how == REFUSED)
    first = sa.select(_copy.c.source_id, sa.func.min(_copy.c.uid)).where(which).group_by(_copy.c.source_id)
    for source_id, uid in map(tuple, tx.execute(first).all()):
        further = sa.update(_source).where(_source.c.id == source_id, _source.c.uid_next > uid)
        tx.execute(further.values(uid_next=uid, messages=-1))
    tx.execute(sa.delete(_copy).where(which))


def replace_copies(tx: Write, gone: Iterable[Copy], made: Iterable[Copy]) -> None:
    """Rows of messages that have their place, instead of those that said so before."""
    drop(tx, gone)
    add_copies(tx, made)


def drop(tx: Write, gone: Iterable[Copy]) -> None:
    """Rows that another one replaces."""
    for each in gone:
        tx.execute(
            sa.delete(_copy).where(
                _copy.c.source_id == each.source_id,
                _copy.c.uid == each.uid,
                _copy.c.target_id == each.target_id,
            )
        )


_FLAGS = (
    sa.update(_copy)
    .where(
        _copy.c.source_id == sa.bindparam("source_"),
        _copy.c.uid == sa.bindparam("uid_"),
        _copy.c.target_id == sa.bindparam("target_"),
    )
    .values(flags=sa.bindparam("flags_"))
)


def carry_flags(tx: Write, changed: Iterable[tuple[Copy, tuple[str, ...]]]) -> None:
    """The flags of copies as the source has them now, once the destination has them too."""
    for copy, flags in changed:
        values = {"source_": copy.source_id, "uid_": copy.uid, "target_": copy.target_id}
        tx.fast(_FLAGS, {**values, "flags_": " ".join(flags)})


def counts(tx: Read, number: int) -> list[tuple[str, str, str, int, int]]:
    """Source folder, destination folder, how, messages, bytes."""
    return [
        (source.partition("\n")[0], target, how, int(many), int(size or 0))
        for source, target, how, many, size in tx.fast(_COUNTS, {"import_": number})
    ]


def refused(tx: Read, number: int) -> list[tuple[str, int, int, int, str]]:
    """Folder, UID, size, time received and reason of every message that could not be placed."""
    return [tuple(row) for row in tx.fast(_REFUSED, {"import_": number})]


# -- budgets --------------------------------------------------------------------------------------

_budget = t.mail_budget
_DAY_S = 86400
_SPENT = sa.select(_budget.c.since, _budget.c.bytes).where(_budget.c.key == sa.bindparam("key_"))


def spent(tx: Read, key: str) -> tuple[int, int]:
    """Bytes fetched from an account in the last day's count, and the seconds until it starts anew."""
    row = tx.one(_SPENT, {"key_": key})
    now = int(time.time())
    if row is None or not 0 <= now - row[0] < _DAY_S:
        return 0, _DAY_S
    return int(row[1]), row[0] + _DAY_S - now


_SPEND = (
    sa.update(_budget)
    .where(
        _budget.c.key == sa.bindparam("key_"),
        _budget.c.since.between(sa.bindparam("first_"), sa.bindparam("now_")),
    )
    .values(bytes=_budget.c.bytes + sa.bindparam("size_"))
    .returning(_budget.c.key)
)


def spend(tx: Write, key: str, size: int) -> None:
    """Count bytes that were fetched.

    Cost: one UPDATE.
    """
    now = int(time.time())
    if tx.one(_SPEND, {"key_": key, "first_": now - _DAY_S + 1, "now_": now, "size_": size}) is None:
        tx.execute(sa.delete(_budget).where(_budget.c.key == key))
        tx.execute(sa.insert(_budget).values(key=key, since=now, bytes=size))
