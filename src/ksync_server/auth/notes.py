"""Writes that no request waits for: when a secret was used, and why a right one was refused."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from ksync_server.auth import audit
from ksync_server.auth.rules import Secret, Service
from ksync_server.errors import Unavailable
from ksync_server.http import Peer
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Write

log = logging.getLogger(__name__)

_TELL_EVERY_S = 3600.0  # one cause is put into the audit once in this time and process
_REMEMBERED = 10_000  # secrets and accounts whose last note is remembered per process


def _used(table: sa.Table) -> sa.Update:
    c = table.c
    return (
        sa.update(table)
        .where(c.id == sa.bindparam("id_"), sa.func.coalesce(c.last_used_at, 0) < sa.bindparam("at"))
        .values(
            last_used_at=sa.bindparam("at"),
            last_service=sa.bindparam("service"),
            last_address=sa.bindparam("address"),
            last_client=sa.bindparam("client"),
        )
    )


_USED = {Secret.APP_PASSWORD: _used(t.app_password), Secret.DEVICE_PASSWORD: _used(t.device_password)}


@dataclass(frozen=True, slots=True)
class Use:
    """When and how an application or device password was used."""

    kind: Secret
    number: int
    at: int
    service: str
    address: str
    client: str


class Notes:
    """The notes of one process; thread-safe."""

    def __init__(self, database: Database, every_s: float) -> None:
        self._database = database
        self._every_s = every_s
        self._lock = threading.Lock()
        self._uses: dict[tuple[Secret, int], Use] = {}  # not written yet
        self._writing = False
        self._queued: set[Future[Any]] = set()
        self._noted: OrderedDict[tuple[str, object], float] = OrderedDict()  # what -> monotonic time

    def use(self, last_used_at: int | None, use: Use) -> bool:
        """Keep a use, at most one per secret and `every_s`; all that wait are written in one transaction.

        Returns:
            Whether it is one that is kept.
        """
        if last_used_at is not None and use.at - last_used_at < self._every_s:
            return False
        secret = use.kind, use.number
        if not self._is_due("use", secret, self._every_s):
            return False
        with self._lock:
            self._uses[secret] = use
            if self._writing:
                return True
            self._writing = True
        self.later(self._write_uses)
        return True

    def _write_uses(self, tx: Write) -> None:
        with self._lock:
            uses = tuple(self._uses.values())
            self._uses.clear()
            self._writing = False
        for use in uses:
            values = {"at": use.at, "service": use.service, "address": use.address, "client": use.client}
            tx.fast(_USED[use.kind], {"id_": use.number, **values})

    def refusal(self, sync_id: str | None, reason: str, peer: Peer, service: Service, *, told: bool) -> None:
        """Leave a row in the audit, at most one per account and reason and hour, and tell the owner by
        e-mail, at most once a day (APP7).

        Args:
            sync_id: the account that was looked at; None where there is none.
            told: its right secret was refused; otherwise nothing is written, yet as much is done until then.
        """
        if not self._is_due(reason, sync_id, _TELL_EVERY_S) or not told or sync_id is None:
            return
        actor = audit.Actor(sync_id, peer.address)
        detail: dict[str, object] = {
            "reason": reason,
            "service": str(service),
            "client": peer.user_agent[:200],
        }
        day = time.strftime("%Y-%m-%d", time.gmtime(time.time()))
        key = f"log-in.refused {sync_id} {reason} {day}"
        self.later(lambda tx: audit.record(tx, actor, "log-in.refused", sync_id, detail, notice_key=key))

    def _is_due(self, what: str, whose: object, every_s: float) -> bool:
        key, now = (what, whose), time.monotonic()
        with self._lock:
            if now - self._noted.get(key, -every_s) < every_s:
                return False
            self._noted[key] = now
            self._noted.move_to_end(key)
            while len(self._noted) > _REMEMBERED:
                self._noted.popitem(last=False)
        return True

    def later(self, fn: Callable[[Write], object]) -> None:
        """Queue a write; what becomes of it is the log's business alone."""
        try:
            future = self._database.submit(fn)
        except Unavailable as error:  # the process is stopping
            self._failed(error)
            return
        with self._lock:
            self._queued.add(future)
        future.add_done_callback(self._done)

    def _done(self, future: Future[Any]) -> None:
        with self._lock:
            self._queued.discard(future)
        problem = future.exception()
        if problem is not None:
            self._failed(problem)

    def _failed(self, problem: BaseException) -> None:
        log.warning("a note was not written", extra={"reason": str(problem)})
        with self._lock:
            self._writing = False

    def flush(self) -> None:
        """Wait until what was queued is written or has failed."""
        with self._lock:
            queued = tuple(self._queued)
        wait(queued)
