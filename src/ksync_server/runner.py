"""The job worker of a process: claims jobs, runs their handlers, keeps leases, takes over from the dead."""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ksync_server import jobs
from ksync_server import settings as configuration
from ksync_server.errors import KsyncError, Permanent, RemoteError
from ksync_server.jobs import Cancelled, Claim, Handler, Job, Lease, LeaseLost, Periodic, Yielded
from ksync_server.store.database import Database

log = logging.getLogger(__name__)

_TICK_S = 2.0  # progress is written this often
_STILL_TICKS = 5  # a lease seen unchanged so often, a third of its length apart, is a dead worker's


class Runner:
    """The job worker of a process: threads that claim and run jobs, and one that keeps their leases."""

    def __init__(
        self,
        database: Database,
        periodic: Iterable[Periodic] = (),
        handlers: Mapping[str, Handler] | None = None,
        settings: configuration.Jobs | None = None,
    ) -> None:
        self._database = database
        self._settings = settings or configuration.Jobs()
        self._periodic = {each.kind: each for each in periodic}
        self._handlers = dict(handlers or {})
        for each in self._periodic.values():
            if each.run is not None:
                self._handlers[each.kind] = Handler(_without_job(each.run))
        self._name = f"{socket.gethostname()}/{os.getpid()}"
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._active: dict[str, Job] = {}  # by fence: what this process must keep
        self._still: dict[Lease, int] = {}  # leases of others -> ticks without a change
        self._orphans: list[Lease] = []

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; jobs under way leave at their next checkpoint."""
        self._stop = stop
        over = threading.Event()
        names = [f"job-{number}" for number in range(self._settings.workers)]
        threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        keeper = threading.Thread(target=self._keep, args=(over,), name="leases", daemon=True)
        self._ensure()
        for thread in (*threads, keeper):
            thread.start()
        for thread in threads:
            thread.join()
        over.set()
        keeper.join()

    def _ensure(self) -> None:
        while not self._stop.is_set():
            try:
                jobs.ensure(self._database, self._periodic.values())
            except KsyncError as error:  # the database is away
                log.warning("jobs wait", extra={"reason": str(error)})
                self._stop.wait(self._settings.poll_s)
            else:
                return

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                worked = self.step()
            except Exception as error:  # the job loop is a boundary: it must outlive whatever a step meets
                log.warning(
                    "jobs wait", exc_info=not isinstance(error, KsyncError), extra={"reason": str(error)}
                )
                worked = False
            if not worked:
                # Spread, so that the threads of all nodes do not look at the same moment.
                self._stop.wait(self._settings.poll_s * random.uniform(0.5, 1))  # noqa: S311 - no secret

    def step(self) -> bool:
        """Run at most one job; returns whether there was one."""
        claimed = self._claim()
        if claimed is None:
            return False
        began = time.monotonic()

        def leave() -> bool:
            over = time.monotonic() - began > self._settings.slice_s
            return self._stop.is_set() or (over and jobs.is_any_due(self._database))

        job = Job(self._database, claimed, leave)
        with self._lock:
            self._active[claimed.fence] = job
        try:
            state, error = self._attempt(job)
        finally:
            with self._lock:
                del self._active[claimed.fence]
        fields = {"id": job.id, "kind": claimed.kind, "seconds": round(time.monotonic() - began, 3)}
        log.info("job", extra={**fields, "state": state, "error": error})
        return True

    def _claim(self) -> Claim | None:
        lease_s = self._settings.lease_s
        with self._lock:
            orphan = self._orphans.pop() if self._orphans else None
        if orphan is not None:
            claimed = jobs.take_over(self._database, orphan, lease_s=lease_s, worker=self._name)
            if claimed is not None:
                log.warning("job of a dead worker", extra={"id": claimed.id, "kind": claimed.kind})
                return claimed
        return jobs.claim(self._database, self._handlers, lease_s=lease_s, worker=self._name)

    def _attempt(self, job: Job) -> tuple[str, str | None]:
        """Run the handler once and give the job back: its new state, and what went wrong."""
        claimed = job.claim
        handler = self._handlers[claimed.kind]
        most = handler.attempts or self._settings.attempts
        try:
            if claimed.every_s is None and claimed.attempts > most:
                raise Permanent(f"given up: the worker died in each of {most} tries")
            handler.run(job)
        except LeaseLost:
            return "lost", None
        except Cancelled:
            return self._ended(job, "cancelled"), None
        except Yielded as left:
            return self._give_back(job, "ready", wait_s=left.wait_s, attempts=job.tries - 1), None
        except Permanent as error:
            return self._failed(job, str(error), most, for_good=True)
        except RemoteError as error:
            return self._failed(job, str(error), most)
        except Exception as error:  # the job loop is a boundary: one bad job must not end the others
            if not isinstance(error, KsyncError):
                log.exception("job failed", extra={"kind": claimed.kind})
            return self._failed(job, f"{type(error).__name__}: {error}", most)
        return self._ended(job, "done"), None

    def _ended(self, job: Job, state: str) -> str:
        periodic = self._periodic.get(job.claim.kind)
        if job.claim.every_s is None or periodic is None:
            return self._give_back(job, state)
        return self._give_back(job, "ready", wait_s=jobs.wait_of(self._database, periodic), anew=True)

    def _failed(self, job: Job, error: str, most: int, *, for_good: bool = False) -> tuple[str, str]:
        claimed, settings, tried = job.claim, self._settings, job.tries
        if claimed.every_s is None and (for_good or tried >= most):
            return self._give_back(job, "failed", attempts=tried, error=error), error
        wait_s = min(settings.retry_s * 2 ** min(tried - 1, 20), settings.longest_retry_s)
        if claimed.every_s is not None:
            wait_s = min(wait_s, claimed.every_s)
        wait_s *= random.uniform(0.5, 1)  # noqa: S311 - what failed together is not tried together
        return self._give_back(job, "ready", wait_s=wait_s, attempts=tried, error=error), error

    def _give_back(self, job: Job, state: str, **how: Any) -> str:
        """`finish`, asked again while the database is away: what is done should not be done twice."""
        until = time.monotonic() + self._settings.lease_s
        while True:
            try:
                return jobs.finish(self._database, job, state, **how)
            except LeaseLost:
                return "lost"
            except KsyncError as error:
                log.warning("jobs wait", extra={"reason": str(error)})
                if self._stop.wait(self._settings.poll_s) or time.monotonic() > until:
                    return "lost"

    # -- leases -----------------------------------------------------------------------------------

    def _keep(self, over: threading.Event) -> None:
        third_s = self._settings.lease_s / 3
        due = time.monotonic() + third_s
        while not over.wait(min(third_s, _TICK_S)):
            now = time.monotonic()
            try:
                if now >= due:
                    self._renew(list(self._active.values()))
                    self._watch()
                    if jobs.catch_up(self._database, self._periodic.values()):
                        log.warning("the clock was set back: due jobs go on")
                    due = now + third_s
                else:
                    self._renew([job for job in list(self._active.values()) if job.is_unsaid])
            except Exception as error:  # the job loop is a boundary: leases are kept whatever happens
                log.warning("leases not renewed", extra={"reason": str(error)})

    def _renew(self, active: list[Job]) -> None:
        if active:
            jobs.renew(self._database, active)

    def _watch(self) -> None:
        """Count for how many ticks each lease of others has stood still; a tick without an answer is none."""
        still: dict[Lease, int] = {}
        orphans = []
        for lease in jobs.leases(self._database):
            if lease.fence in self._active or lease.kind not in self._handlers:
                continue
            still[lease] = self._still.get(lease, 0) + 1
            if still[lease] >= _STILL_TICKS:
                orphans.append(lease)
        self._still = still
        with self._lock:
            self._orphans = orphans


def _without_job(run: Callable[[], object]) -> Callable[[Job], object]:
    return lambda job: run()
