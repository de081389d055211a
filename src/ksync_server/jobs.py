"""Durable work in rows: claimed by a lease, fenced by a random token, run by any process of any node.

A worker that dies loses its lease, and another one takes the job up. What a worker writes after it lost its
lease misses, because its fence does not match any more.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server.errors import KsyncError
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Write

log = logging.getLogger(__name__)

_job = t.job
_due = _job.alias("due")
_CLAIM = (
    sa.update(_job)
    .where(
        _job.c.id
        == sa.select(_due.c.id)
        .where(
            sa.or_(
                sa.and_(_due.c.state == "ready", _due.c.run_at <= sa.bindparam("now")),
                sa.and_(_due.c.state == "running", _due.c.lease_until < sa.bindparam("now")),
            )
        )
        .order_by(_due.c.run_at, _due.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    .values(
        state="running",
        lease_until=sa.bindparam("until"),
        fence=sa.bindparam("fence_"),
        attempts=_job.c.attempts + 1,
    )
    .returning(_job.c.id, _job.c.kind, _job.c.arguments, _job.c.every_s, _job.c.attempts, _job.c.checkpoint)
)
_mine = sa.and_(_job.c.id == sa.bindparam("id_"), _job.c.fence == sa.bindparam("fence_"))
_RENEW = sa.update(_job).where(_mine).values(lease_until=sa.bindparam("until")).returning(_job.c.id)
_FINISH = (
    sa.update(_job)
    .where(_mine)
    .values(
        state=sa.bindparam("state_"),
        run_at=sa.bindparam("run_at_"),
        lease_until=None,
        fence=None,
        attempts=sa.bindparam("attempts_"),
        last_error=sa.bindparam("error_"),
    )
    .returning(_job.c.id)
)
_FIND = sa.select(_job.c.id, _job.c.every_s).where(_job.c.key == sa.bindparam("key_"))
_NEW = sa.insert(_job).values(
    kind=sa.bindparam("kind_"),
    key=sa.bindparam("key_"),
    arguments=sa.bindparam("arguments_"),
    state="ready",
    run_at=sa.bindparam("run_at_"),
    every_s=sa.bindparam("every_"),
    attempts=0,
)
_RHYTHM = sa.update(_job).where(_job.c.id == sa.bindparam("id_")).values(every_s=sa.bindparam("every_"))

_LONGEST_RETRY_S = 3600
_LAST_ERROR = 500  # characters kept


@dataclass(frozen=True, slots=True)
class Periodic:
    """Work that comes round: one row, so one run at a time over all nodes."""

    kind: str
    every_s: int
    run: Callable[[], object]  # does its own transactions, is safe to repeat from its start


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that is ours until its lease ends."""

    id: int
    kind: str
    arguments: dict[str, object]
    every_s: int | None
    attempts: int
    checkpoint: str | None
    fence: str


class LeaseLost(KsyncError):
    """Another worker has taken the job; what this one still does about it must not be kept."""


def ensure(database: Database, work: Iterable[Periodic]) -> None:
    """Make sure that periodic work has its rows, due at once when new; safe from several processes."""
    now = int(time.time())
    for each in work:
        arguments = {
            "kind_": each.kind,
            "key_": f"periodic {each.kind}",
            "arguments_": "{}",
            "run_at_": now,
            "every_": each.every_s,
        }

        def put(tx: Write, arguments: dict[str, object] = arguments) -> None:
            found = tx.one(_FIND, arguments)
            if found is None:
                tx.execute(_NEW, arguments)
            elif found[1] != arguments["every_"]:
                tx.fast(_RHYTHM, {**arguments, "id_": found[0]})

        try:
            database.write(put)
        except sa.exc.IntegrityError:  # another node was quicker
            continue


def enqueue(
    tx: Write, kind: str, arguments: dict[str, object], *, key: str | None = None, run_at: int | None = None
) -> int | None:
    """Queue work in the transaction of its cause: it exists if and only if the change does.

    Args:
        kind: what a worker has a handler for.
        arguments: small JSON, never a secret.
        key: at most one job of this key is ever queued; None = any number.
        run_at: Unix seconds before which it does not run; None = now.

    Returns:
        The job's id, None where one of that key is there.

    Cost: one insert, and one indexed read with a key.
    """
    if key is not None and tx.one(_FIND, {"key_": key}) is not None:
        return None
    now = int(time.time())
    row = {
        "kind": kind,
        "key": key,
        "arguments": json.dumps(arguments, sort_keys=True),
        "state": "ready",
        "run_at": now if run_at is None else run_at,
        "attempts": 0,
        "created_at": now,
    }
    number: int = tx.execute(sa.insert(_job).returning(_job.c.id), row).scalar_one()
    return number


def claim(database: Database, lease_s: float) -> Claim | None:
    """Take the job that is due longest, or one whose worker died.

    Returns:
        None where nothing is due.

    Cost: one UPDATE with an indexed subquery.
    """
    now = int(time.time())
    fence = secrets.token_hex(8)
    arguments = {"now": now, "until": now + int(lease_s), "fence_": fence}
    row = database.write(lambda tx: tx.one(_CLAIM, arguments))
    if row is None:
        return None
    number, kind, given, every_s, attempts, checkpoint = row
    return Claim(number, kind, json.loads(given), every_s, attempts, checkpoint, fence)


def renew(database: Database, job: Claim, lease_s: float) -> None:
    """Keep a job for longer.

    Raises:
        LeaseLost: it is somebody else's by now.
    """
    arguments = {"id_": job.id, "fence_": job.fence, "until": int(time.time() + lease_s)}
    if database.write(lambda tx: tx.one(_RENEW, arguments)) is None:
        raise LeaseLost(job.kind)


def finish(database: Database, job: Claim, error: str | None = None) -> None:
    """Give a job back: done, or due again after its rhythm, or later after a failure.

    Raises:
        LeaseLost: it is somebody else's by now; nothing was written.
    """
    now = int(time.time())
    wait_s = min(30 * 2 ** min(job.attempts, 10), _LONGEST_RETRY_S) if error else job.every_s or 0
    arguments = {
        "id_": job.id,
        "fence_": job.fence,
        "state_": "ready" if error or job.every_s else "done",
        "run_at_": now + (min(wait_s, job.every_s) if job.every_s else wait_s),
        "attempts_": job.attempts if error else 0,
        "error_": error[:_LAST_ERROR] if error else None,
    }
    if database.write(lambda tx: tx.one(_FINISH, arguments)) is None:
        raise LeaseLost(job.kind)


class Runner:
    """The loop of a job worker: claim, run while the lease is renewed, give back."""

    def __init__(
        self, database: Database, work: Iterable[Periodic], *, lease_s: float = 60.0, poll_s: float = 5.0
    ) -> None:
        self._database = database
        self._work = {each.kind: each for each in work}
        self._lease_s = lease_s
        self._poll_s = poll_s

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; a job under way is finished first."""
        ensure(self._database, self._work.values())
        while not stop.is_set():
            try:
                worked = self.step()
            except KsyncError as error:  # the database is away: it is asked again after a pause
                log.warning("jobs wait", extra={"reason": str(error)})
                worked = False
            if not worked:
                stop.wait(self._poll_s)

    def step(self) -> bool:
        """Run at most one job; returns whether there was one."""
        job = claim(self._database, self._lease_s)
        if job is None:
            return False
        began = time.monotonic()
        error = self._attempt(job)
        try:
            finish(self._database, job, error)
        except LeaseLost:
            log.warning("lease lost", extra={"kind": job.kind})
        seconds = round(time.monotonic() - began, 3)
        log.info("job", extra={"kind": job.kind, "seconds": seconds, "error": error})
        return True

    def _attempt(self, job: Claim) -> str | None:
        """The error's text, None when the work was done."""
        work = self._work.get(job.kind)
        if work is None:
            return "this program does not know that kind of work"
        over = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(job, over), name="lease", daemon=True)
        keeper.start()
        try:
            work.run()
        except Exception as error:  # the job loop is a boundary: one bad job must not end the others
            log.exception("job failed", extra={"kind": job.kind})
            return f"{type(error).__name__}: {error}"
        finally:
            over.set()
            keeper.join()
        return None

    def _keep(self, job: Claim, over: threading.Event) -> None:
        while not over.wait(self._lease_s / 3):
            try:
                renew(self._database, job, self._lease_s)
            except KsyncError as error:
                log.warning("lease not renewed", extra={"kind": job.kind, "reason": str(error)})
