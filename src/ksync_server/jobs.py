"""Durable work in rows: claimed by a lease, fenced by a random token, run by any process of any node.

    enqueue(tx, kind, arguments) -> row -> claim -> handler(Job) -> done | failed | cancelled | ready again
                                                      |
                                                      +- Job.checkpoint: effects in our store, where to go on
                                                         and the lease, in one transaction

A worker that dies stops renewing its lease, and another one takes the job up at its last checkpoint. Whatever
the first one still writes misses, because its fence does not match any more: an effect in our store happens
once. No clock decides that a worker is dead: a lease is taken over when a neighbour saw it stand still for
several of its own steady ticks. Times in rows are the database's.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from ksync_server.errors import Conflict, KsyncError, NotFound, Permanent
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Row, Write

STATES = ("ready", "running", "done", "failed", "cancelled")
_LAST_ERROR = 500  # characters kept
_PRUNED_AT_ONCE = 500


class Priority(IntEnum):
    """What goes first among the jobs that are due."""

    URGENT = 10  # somebody waits for it
    NORMAL = 0
    BACKGROUND = -10


class Now(FunctionElement[int]):
    """Unix seconds by the database's clock: the same one for all nodes."""

    type = sa.BigInteger()
    inherit_cache = True
    name = "ksync_now"


@compiles(Now, "sqlite")
def _sqlite_now(element: Now, compiler: Any, **options: Any) -> str:
    return "CAST(strftime('%s', 'now') AS INTEGER)"


@compiles(Now, "postgresql")
def _postgresql_now(element: Now, compiler: Any, **options: Any) -> str:
    return "CAST(floor(extract(epoch FROM now())) AS bigint)"


# -- what handlers see ----------------------------------------------------------------------------


def steady() -> float:
    """Seconds that also go by while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseLost(KsyncError):
    """Another worker has taken the job; what this one still does about it must not be kept."""


class Left(BaseException):
    """A job leaves its handler before its end. No error: it passes handlers as KeyboardInterrupt does."""


class Cancelled(Left):
    """Somebody asked for it; what was checkpointed stays."""


class Yielded(Left):
    """It goes on later from its last checkpoint, for others' sake or because it asked to; no failure."""

    def __init__(self, wait_s: float = 0.0) -> None:
        super().__init__(wait_s)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that is ours until its lease ends."""

    id: int
    kind: str
    arguments: dict[str, Any]
    every_s: int | None
    attempts: int
    checkpoint: Any  # what the last one kept; None = from the start
    fence: str
    lease_s: int


class Lease(NamedTuple):
    """Of a running job, as its row says it; a living worker changes it again and again."""

    id: int
    kind: str
    fence: str
    until: int  # Unix seconds


class Job:
    """A claimed job in its handler's hands. `state` is what the last checkpoint kept, None at the start."""

    def __init__(self, database: Database, claim: Claim, leave: Callable[[], bool] = lambda: False) -> None:
        self.id = claim.id
        self.arguments = claim.arguments
        self.state = claim.checkpoint
        self.cancelled = False  # asked for; known within a third of a lease, and at once by a checkpoint
        self.claim = claim
        self.database = database
        self.tries = claim.attempts  # without a checkpoint between them
        self._leave = leave
        self._said: str | None = None
        self.kept: str | None = None  # the arguments that are left when it is done; None = all
        self.ours_at = steady()  # when it was last sure to be ours
        self.is_unsaid = False  # what `progress` said is not written yet

    def checkpoint(self, state: object, effects: Callable[[Write], object] | None = None) -> None:
        """Keep effects in our store, where to go on, and the lease: all three or nothing.

        Args:
            state: small JSON that `Job.state` has when the job goes on, never a secret.
            effects: changes rows; runs in the transaction, as a function given to `Database.write` does.

        Raises:
            LeaseLost: it is somebody else's by now; nothing was kept.
            Cancelled: kept, and the job was asked to end.
            Yielded: kept, and others wait or the process stops.

        Cost: one transaction, one UPDATE besides the effects.
        """
        text, began = json.dumps(state), steady()
        self._kept(text, began, self.database.write(self._keeping(text, effects)))

    async def checkpointed(self, state: object, effects: Callable[[Write], object] | None = None) -> None:
        """`checkpoint` for the event loop."""
        text, began = json.dumps(state), steady()
        self._kept(text, began, await self.database.writing(self._keeping(text, effects)))

    def _keeping(self, text: str, effects: Callable[[Write], object] | None) -> Callable[[Write], bool]:
        self.is_unsaid = False

        def keep(tx: Write) -> bool:
            # First: from here to the end of the transaction nobody can take the job over.
            row = tx.one(_CHECKPOINT, {**self.values(), "checkpoint_": text})
            if row is None:
                raise LeaseLost(self.claim.kind)
            if effects is not None:
                effects(tx)
            return bool(row[0])

        return keep

    def _kept(self, text: str, began: float, cancelled: bool) -> None:
        self.cancelled, self.ours_at = cancelled, began
        self.state, self.tries = json.loads(text), 1
        if cancelled:
            raise Cancelled
        if self._leave():
            raise Yielded

    def progress(self, **fields: object) -> None:
        """Say to people how far it is, never a secret; replaces what was said, written within seconds."""
        self._said, self.is_unsaid = json.dumps(fields), True

    def require_lease(self) -> None:
        """To be called right before an effect outside of our store that cannot be taken back.

        A worker that was stopped for a while does not know that another one has the job by now: a lease that
        was not renewed for its own length counts as lost, well before neighbours take it over.

        Raises:
            LeaseLost: it was not.

        Cost: a look at the clock.
        """
        if steady() - self.ours_at > self.claim.lease_s:
            raise LeaseLost(self.claim.kind)

    def forget(self, **kept: object) -> None:
        """Leave only `kept` of the arguments in the row, from the moment that the job is done.

        Where it fails, is cancelled or its worker dies, it may run again and needs all of them.
        """
        self.kept = json.dumps(kept, sort_keys=True)

    def postpone(self, wait_s: float) -> NoReturn:
        """Leave now and go on after `wait_s`, from the last checkpoint; no failure.

        Raises:
            Yielded: always.
        """
        raise Yielded(wait_s)

    def secret(self, name: str) -> bytes:
        """A secret that was queued with it, as it was sealed (`auth.keys.Keys.open` opens it).

        Raises:
            Permanent: it is not kept any more, because the job has ended since, or there never was one.

        Cost: one indexed read.
        """
        rows = self.database.fast(_SECRET, {"id_": self.id, "name_": name})
        if not rows:
            raise Permanent(f"the {name} is not kept any more")
        return bytes(rows[0][0])

    def values(self) -> dict[str, object]:
        """What every statement about a claimed job needs."""
        claim = self.claim
        return {
            "id_": claim.id,
            "fence_": claim.fence,
            "lease_": claim.lease_s,
            "progress_": self._said,
        }


@dataclass(frozen=True, slots=True)
class Handler:
    """What runs the jobs of one kind.

    `run` may raise Permanent (the job has failed) or anything else (it is tried again after a pause that
    doubles). It begins at `Job.state` and may be run again from there.
    """

    run: Callable[[Job], object]
    attempts: int | None = None  # most tries without a checkpoint between them; None = jobs.attempts


@dataclass(frozen=True, slots=True)
class Periodic:
    """Work that comes round: one row, so one run at a time over all nodes; it never fails for good."""

    kind: str
    every_s: int
    run: Callable[[], object] | None = None  # safe to repeat from its start; None = the handler of its kind
    at_s: int | None = None  # seconds after midnight UTC on whose grid runs lie; None = after the last run


# -- rows -----------------------------------------------------------------------------------------

_job = t.job
_due = _job.alias("due")
_other = _job.alias("other")
_id = sa.bindparam("id_", type_=sa.BigInteger)
_lease = Now() + sa.bindparam("lease_", type_=sa.BigInteger)
_mine = sa.and_(_job.c.id == _id, _job.c.fence == sa.bindparam("fence_", type_=sa.Text))
_CLAIMED = (_job.c.id, _job.c.kind, _job.c.arguments, _job.c.every_s, _job.c.attempts, _job.c.checkpoint)
_TAKEN = {
    "state": "running",
    "lease_until": _lease,
    "fence": sa.bindparam("new_fence_", type_=sa.Text),
    "worker": sa.bindparam("worker_", type_=sa.Text),
    "attempts": _job.c.attempts + 1,
}
_TAKE_OVER = (
    sa.update(_job)
    .where(_mine, _job.c.lease_until == sa.bindparam("seen_", type_=sa.BigInteger))
    .values(_TAKEN)
    .returning(*_CLAIMED, _job.c.concurrency)
)
# Never the same value twice: neighbours tell a living worker by the change, whatever the clock does.
_KEPT = {
    "lease_until": sa.case((_job.c.lease_until >= _lease, _job.c.lease_until + 1), else_=_lease),
    "progress": sa.func.coalesce(sa.bindparam("progress_", type_=sa.Text), _job.c.progress),
}
_RENEW = sa.update(_job).where(_mine).values(_KEPT).returning(_job.c.cancel_asked)
_CHECKPOINT = (
    sa.update(_job)
    .where(_mine)
    .values({**_KEPT, "checkpoint": sa.bindparam("checkpoint_", type_=sa.Text), "attempts": 1})
    .returning(_job.c.cancel_asked)
)
_state = sa.bindparam("state_", type_=sa.Text)
_is_once = _job.c.every_s.is_(None)
_next_state = sa.case((sa.and_(_state == "ready", _job.c.cancel_asked, _is_once), "cancelled"), else_=_state)
_FINISH = (
    sa.update(_job)
    .where(_mine)
    .values(
        state=_next_state,
        run_at=Now() + sa.bindparam("wait_", type_=sa.BigInteger),
        lease_until=None,
        fence=None,
        worker=None,
        cancel_asked=sa.false(),
        attempts=sa.bindparam("attempts_", type_=sa.Integer),
        checkpoint=sa.case(
            (sa.bindparam("anew_", type_=sa.Integer) == 1, sa.null()), else_=_job.c.checkpoint
        ),
        arguments=sa.case(
            (_next_state == "done", sa.func.coalesce(sa.bindparam("kept_", type_=sa.Text), _job.c.arguments)),
            else_=_job.c.arguments,
        ),
        progress=sa.func.coalesce(sa.bindparam("progress_", type_=sa.Text), _job.c.progress),
        last_error=sa.bindparam("error_", type_=sa.Text),
        ended_at=sa.case((_next_state != "ready", Now()), else_=sa.null()),
    )
    .returning(_job.c.state)
)
_secret = t.job_secret.c
_SECRET = sa.select(_secret.sealed).where(
    _secret.job_id == _id, _secret.name == sa.bindparam("name_", type_=sa.Text)
)
_FORGET = sa.delete(t.job_secret).where(_secret.job_id == _id)
_NOW = sa.select(Now())
_ANY_DUE = sa.select(_job.c.id).where(_job.c.state == "ready", _job.c.run_at <= Now()).limit(1)
_SKEW_S = 60
_ready = _job.c.state == "ready"
# Of a future that no wait explains: the clock was ahead and has been set back since.
_too_late = sa.or_(
    sa.and_(_is_once, _job.c.created_at > Now() + _SKEW_S),
    _job.c.run_at > Now() + _job.c.every_s + _SKEW_S,
)
_ANY_TOO_LATE = sa.select(_job.c.id).where(_ready, _too_late).limit(1)
_CATCH_UP = (
    sa.update(_job)
    .where(_ready, _too_late)
    .values(
        run_at=sa.case((_is_once, _job.c.run_at - (_job.c.created_at - Now())), else_=Now() + _job.c.every_s),
        created_at=sa.case((_is_once, Now()), else_=_job.c.created_at),
    )
)
_RUNNING = sa.select(_job.c.id, _job.c.kind, _job.c.fence, _job.c.lease_until).where(
    _job.c.state == "running"
)
_kind = _job.c.kind == sa.bindparam("kind_", type_=sa.Text)
_RECENT = (
    sa.select(sa.func.count(), sa.func.min(_job.c.ended_at))
    .select_from(_job)
    .where(_kind, _job.c.ended_at > sa.bindparam("since_", type_=sa.BigInteger))
)
_WAITING = sa.select(sa.func.count()).select_from(_job).where(_kind, _job.c.state == "ready")
_BESIDE = sa.select(sa.func.count()).where(
    _job.c.concurrency == sa.bindparam("key_", type_=sa.Text), _job.c.state == "running", _job.c.id != _id
)
_AT_MOST = sa.select(_job.c.at_most).where(_job.c.id == _id)
_LOCK = sa.select(
    sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(sa.bindparam("key_", type_=sa.Text), 0))
)
_FIND = sa.select(_job.c.id, _job.c.every_s, _job.c.run_at).where(
    _job.c.key == sa.bindparam("key_", type_=sa.Text)
)
_RHYTHM = (
    sa.update(_job)
    .where(_job.c.id == _id)
    .values(every_s=sa.bindparam("every_"), run_at=sa.bindparam("run_at_"))
)
_INSERT = {
    "sqlite": sqlite.insert(_job).on_conflict_do_nothing(index_elements=["key"]).returning(_job.c.id),
    "postgresql": postgresql.insert(_job).on_conflict_do_nothing(index_elements=["key"]).returning(_job.c.id),
}


@lru_cache(maxsize=16)
def _claim_of(kinds: frozenset[str]) -> tuple[sa.Executable, sa.Executable]:
    """The statements that find and take one ready job of one priority; made once per set of kinds."""
    # Not correlated: found once, however many due jobs of a full key stand in front.
    full = (
        sa.select(_other.c.concurrency)
        .where(_other.c.state == "running", _other.c.concurrency.is_not(None))
        .group_by(_other.c.concurrency)
        .having(sa.func.count() >= sa.func.min(_other.c.at_most))
    )
    chosen = (
        sa.select(_due.c.id)
        .where(_due.c.state == "ready", _due.c.priority == sa.bindparam("priority_", type_=sa.Integer))
        .where(_due.c.run_at <= Now(), sa.or_(_due.c.concurrency.is_(None), _due.c.concurrency.not_in(full)))
        .where(sa.or_(*(_due.c.kind == kind for kind in sorted(kinds))))
        .order_by(_due.c.run_at, _due.c.id)
        .limit(1)
    )
    locked = chosen.with_for_update(skip_locked=True, of=_due).scalar_subquery()
    take = sa.update(_job).where(_job.c.id == locked).values(_TAKEN)
    return chosen, take.returning(*_CLAIMED, _job.c.concurrency)


class _Full(Exception):
    """Another node took the last place of the job's concurrency key a moment ago."""


def enqueue(
    tx: Write,
    kind: str,
    arguments: dict[str, object],
    *,
    key: str | None = None,
    run_at: int | None = None,
    priority: Priority = Priority.NORMAL,
    concurrency: str | None = None,
    at_most: int = 1,
    account_id: int | None = None,
    secrets: Mapping[str, bytes] = {},
) -> int | None:
    """Queue work in the transaction of its cause: it exists if and only if the change does.

    Args:
        kind: what a worker has a handler for; it waits where none has.
        arguments: small JSON, never a secret.
        key: at most one job of this key is ever queued, while its row is kept; None = any number.
        run_at: Unix seconds before which it does not run; None = now.
        concurrency: of the jobs with this key, `at_most` run at once, over all nodes (of several numbers the
            smallest counts); None = no bound.
        account_id: whose job it is; it goes with the account. None = the server's.
        secrets: what it must know and no row may say, by names that people read (`password`); sealed already
            (`auth.keys.Keys.seal`). They are gone with the transaction that makes the job done, failed or
            cancelled, so what is retried after that has none.

    Returns:
        The job's id, None where one of that key is there.

    Cost: one insert, one more for secrets.
    """
    row = {
        "kind": kind,
        "key": key,
        "arguments": json.dumps(arguments, sort_keys=True),
        "state": "ready",
        "run_at": Now() if run_at is None else run_at,
        "priority": int(Priority(priority)),
        "concurrency": concurrency,
        "at_most": at_most,
        "account_id": account_id,
        "attempts": 0,
        "created_at": Now(),
    }
    number: int | None = tx.execute(_INSERT[tx.dialect].values(row)).scalar()
    if number is not None and secrets:
        sealed = [{"job_id": number, "name": name, "sealed": each} for name, each in secrets.items()]
        tx.execute(sa.insert(t.job_secret), sealed)
    return number


def ensure(database: Database, work: Iterable[Periodic]) -> None:
    """Make sure that periodic work has its rows, due at once when new; safe from several processes."""
    for each in work:

        def put(tx: Write, each: Periodic = each) -> None:
            now = int(tx.scalar(_NOW))
            run_at = now if each.at_s is None else now + _until(now, each.every_s, each.at_s)
            key = f"periodic {each.kind}"
            found = tx.one(_FIND, {"key_": key})
            if found is None:
                enqueue(tx, each.kind, {}, key=key, run_at=run_at)
                found = tx.one(_FIND, {"key_": key})
            assert found is not None
            # Far in the future: the rhythm became shorter, or the clock was ahead once.
            if found[1] != each.every_s or found[2] > now + each.every_s:
                at = min(found[2], run_at if each.at_s is not None else now + each.every_s)
                tx.fast(_RHYTHM, {"id_": found[0], "every_": each.every_s, "run_at_": at})

        database.write(put)


def catch_up(database: Database, work: Iterable[Periodic]) -> bool:
    """Where the clock was set back, move work that waits for its old time: once, whichever node comes first.

    A job that waits for another try, queued before the clock was ahead, keeps its time.

    Returns:
        Whether there was such work.

    Cost: a look at the ready jobs.
    """
    if not database.fast(_ANY_TOO_LATE):
        return False
    ensure(database, work)  # knows what lies on a grid
    database.write(lambda tx: tx.fast(_CATCH_UP))
    return True


def _until(now: int, every_s: int, at_s: int) -> int:
    """Seconds to the next point of the grid, never 0."""
    return every_s - (now - at_s) % every_s


def claim(database: Database, kinds: Iterable[str], *, lease_s: float, worker: str = "") -> Claim | None:
    """Take the ready job of the highest priority that is due longest and whose concurrency key has room.

    Returns:
        None where there is none of these kinds.

    Cost: one indexed read where nothing is due, one per priority where nothing can be taken (it looks at each
        due job in front whose key is full); else a transaction of one UPDATE.
    """
    known = frozenset(kinds)
    if not known or not database.fast(_ANY_DUE):
        return None
    find, statement = _claim_of(known)
    first = next((each for each in Priority if database.fast(find, {"priority_": int(each)})), None)
    if first is None:
        return None
    values = _taking(lease_s, worker)

    def take(tx: Write) -> Row | None:
        row = tx.one(statement, {**values, "priority_": int(first)})
        if row is not None:
            _require_room(tx, row)
        return row

    try:
        row = database.write(take)
    except _Full:  # it is asked for again at the next look
        return None
    return None if row is None else _claimed(row, values)


def take_over(database: Database, lease: Lease, *, lease_s: float, worker: str = "") -> Claim | None:
    """Take a job whose lease stood still: its place under its concurrency key comes along.

    Returns:
        None where the worker lives after all, or another one was quicker.
    """
    values = _taking(lease_s, worker)
    before = {"id_": lease.id, "fence_": lease.fence, "seen_": lease.until}
    row = database.write(lambda tx: tx.one(_TAKE_OVER, {**values, **before}))
    return None if row is None else _claimed(row, values)


def _taking(lease_s: float, worker: str) -> dict[str, Any]:
    return {"lease_": max(1, round(lease_s)), "new_fence_": secrets.token_hex(8), "worker_": worker}


def _claimed(row: Row, values: Mapping[str, Any]) -> Claim:
    number, kind, arguments, every_s, attempts, checkpoint, _ = row
    state = None if checkpoint is None else json.loads(checkpoint)
    fence, lease_s = values["new_fence_"], values["lease_"]
    return Claim(number, kind, json.loads(arguments), every_s, attempts, state, fence, lease_s)


def lock(tx: Write, key: str) -> None:
    """PostgreSQL: transactions of one key go one after the other from here on, each seeing those before it;
    SQLite's do so by themselves."""
    if tx.dialect != "sqlite":
        tx.fast(_LOCK, {"key_": key})


def _require_room(tx: Write, row: Row) -> None:
    """PostgreSQL: claims of one key go one after the other from here on, each seeing those before it."""
    number, key = row[0], row[6]
    if key is None or tx.dialect == "sqlite":
        return
    lock(tx, key)
    if tx.scalar(_BESIDE, {"id_": number, "key_": key}) >= tx.scalar(_AT_MOST, {"id_": number}):
        raise _Full


def finish(
    database: Database,
    job: Job,
    state: str,
    *,
    wait_s: float = 0,
    attempts: int = 0,
    error: str | None = None,
    anew: bool = False,
) -> str:
    """Give a job back.

    Args:
        state: done, failed, cancelled, and its secrets go; ready = due again after `wait_s`, unless it was
            cancelled meanwhile.
        attempts: what counts as tried so far.
        anew: the next run begins from the start.

    Returns:
        The state it has now.

    Raises:
        LeaseLost: it is somebody else's by now; nothing was written.
    """
    values = {
        **job.values(),
        "state_": state,
        "wait_": round(wait_s),
        "attempts_": attempts,
        "error_": error[:_LAST_ERROR] if error else None,
        "anew_": int(anew),
        "kept_": job.kept,
    }

    def give_back(tx: Write) -> str:
        row = tx.one(_FINISH, values)
        if row is None:
            raise LeaseLost(job.claim.kind)
        if row[0] != "ready":
            tx.fast(_FORGET, {"id_": job.id})
        return str(row[0])

    return database.write(give_back)


def renew(database: Database, jobs: Sequence[Job]) -> None:
    """Keep the leases of claimed jobs and write what they said of their progress; a lost one stays lost.

    Cost: one transaction, one UPDATE for each.
    """
    values = [job.values() for job in jobs]
    began = steady()
    for job in jobs:
        job.is_unsaid = False
    rows = database.write(lambda tx: [tx.one(_RENEW, each) for each in values])
    for job, row in zip(jobs, rows, strict=True):
        if row is not None:
            job.cancelled, job.ours_at = bool(row[0]), began


def is_any_due(database: Database) -> bool:
    """Whether some job of any kind could run now. Cost: one indexed read."""
    return bool(database.fast(_ANY_DUE))


def leases(database: Database) -> list[Lease]:
    """Of all running jobs, ours too."""
    return [Lease(*row) for row in database.fast(_RUNNING)]


def wait_of(database: Database, work: Periodic) -> int:
    """Seconds until the next run of periodic work that ended now."""
    if work.at_s is None:
        return work.every_s
    return _until(int(database.fast(_NOW)[0][0]), work.every_s, work.at_s)


# -- for operators --------------------------------------------------------------------------------


def list_jobs(
    tx: Read,
    *,
    states: Iterable[str] = (),
    kind: str | None = None,
    number: int | None = None,
    limit: int = 50,
) -> list[dict[str, Any]]:
    """Jobs as plain values, the newest first; `number` names a single one."""
    c = _job.c
    columns = (c.id, c.kind, c.state, t.account.c.sync_id.label("account"), c.priority, c.attempts)
    times = (c.created_at, c.run_at, c.every_s, c.ended_at, c.worker, c.cancel_asked)
    rest = (c.concurrency, c.at_most, c.progress, c.last_error, c.arguments, c.checkpoint)
    statement = sa.select(*columns, *times, *rest).select_from(_job.outerjoin(t.account))
    if wanted := tuple(states):
        statement = statement.where(c.state.in_(wanted))
    if kind is not None:
        statement = statement.where(c.kind == kind)
    if number is not None:
        statement = statement.where(c.id == number)
    rows = [dict(row._mapping) for row in tx.execute(statement.order_by(c.id.desc()).limit(limit))]
    for row in rows:
        for name in ("progress", "arguments", "checkpoint"):
            row[name] = None if row[name] is None else json.loads(row[name])
    return rows


def get_job(tx: Read, number: int) -> dict[str, Any]:
    """One job.

    Raises:
        NotFound: there is none, or not any more.
    """
    rows = list_jobs(tx, number=number)
    if not rows:
        raise NotFound(f"There is no job {number}.")
    return rows[0]


def pace(tx: Read, kind: str, *, within_s: int) -> tuple[int, int, int]:
    """For a kind that must keep to a rate over all nodes: how many jobs of it ended in the last seconds, how
    many seconds ago the first of those did, and how many wait."""
    now = int(tx.scalar(_NOW))
    ended, first = tx.fast(_RECENT, {"kind_": kind, "since_": now - within_s})[0]
    return int(ended), now - int(first or now), int(tx.scalar(_WAITING, {"kind_": kind}))


def cancel(tx: Write, number: int) -> str:
    """End a waiting job now, a running one at its next checkpoint.

    Returns:
        `cancelled`, or `running` while it is asked to end.

    Raises:
        NotFound: no such job.
        Conflict: it has ended, or comes round and does not run now.
    """
    c = _job.c
    waiting = sa.update(_job).where(c.id == number, c.state == "ready", c.every_s.is_(None))
    if tx.execute(waiting.values(state="cancelled", ended_at=Now())).rowcount:
        tx.fast(_FORGET, {"id_": number})
        return "cancelled"
    running = sa.update(_job).where(c.id == number, c.state == "running")
    if tx.execute(running.values(cancel_asked=True)).rowcount:
        return "running"
    row = get_job(tx, number)
    if row["state"] == "ready":
        raise Conflict(f"Job {number} comes round by itself; only a run of it can be cancelled.")
    raise Conflict(f"Job {number} is {row['state']} already.")


def retry(tx: Write, number: int) -> None:
    """Let a failed, cancelled or waiting job run now, from its last checkpoint and with all its tries.

    Secrets of one that had ended are gone: if it needs them, it fails again and says so.

    Raises:
        NotFound: no such job.
        Conflict: it runs, or is done.
    """
    c = _job.c
    which = sa.update(_job).where(c.id == number, c.state.in_(("ready", "failed", "cancelled")))
    if tx.execute(which.values(state="ready", run_at=Now(), attempts=0, ended_at=None)).rowcount == 0:
        raise Conflict(f"Job {number} is {get_job(tx, number)['state']}.")


def prune(database: Database, days: int) -> int:
    """Forget jobs that ended longer ago; how many.

    Cost: one transaction per 500 of them.
    """
    old = (
        sa.select(_job.c.id)
        .where(_job.c.ended_at < Now() - days * 86400)
        .order_by(_job.c.ended_at)
        .limit(_PRUNED_AT_ONCE)
    )
    delete = sa.delete(_job).where(_job.c.id.in_(old))
    count = 0
    while gone := database.write(lambda tx: tx.execute(delete).rowcount):
        count += gone
    return count
