"""The job of an import: connects both sides, runs a pass, and decides what its end means.

    queue(tx, ...) -> job -> Passes.run -> done | incomplete | failed | cancelled, or again after a pause

The secrets are the job's: sealed in its rows, opened in the worker alone, gone in the transaction that ends
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from ksync_server import jobs
from ksync_server import settings as configuration
from ksync_server.auth import mailboxes
from ksync_server.auth.keys import Keys
from ksync_server.auth.mailboxes import Mailbox
from ksync_server.errors import BadRequest, NotFound, Permanent, RemoteError
from ksync_server.jobs import Cancelled, Job, Yielded
from ksync_server.mail import dovecot
from ksync_server.mailimport import letters, records
from ksync_server.mailimport.connecting import connect
from ksync_server.mailimport.connection import ending
from ksync_server.mailimport.imap_sink import ImapSink
from ksync_server.mailimport.importer import Importer
from ksync_server.mailimport.ledger import Counters, Ledger
from ksync_server.mailimport.maildir_sink import MaildirSink
from ksync_server.mailimport.plan import Folder, Map, Options, is_sane
from ksync_server.mailimport.reading import DayIsOver
from ksync_server.mailimport.servers import Server
from ksync_server.mailimport.sinks import Sink
from ksync_server.mailimport.source import Source
from ksync_server.networks import Networks
from ksync_server.store.database import Database, Read, Write

log = logging.getLogger(__name__)

KIND = "mail.import"
SOURCE, TARGET = "source password", "destination password"  # names of secrets

_WAYS = f"{KIND} ways"  # of two imports that begin at once, the second one sees the first
_DOUBLINGS = 20  # of a pause; the longest comes first


def taken_ways(tx: Write, *, but: int = 0) -> dict[tuple[str, ...], int]:
    """`records.ways`, and until this transaction ends nobody else takes one."""
    jobs.lock(tx, _WAYS)
    return records.ways(tx, but=but)


def queue(
    tx: Write,
    settings: configuration.Settings,
    number: int,
    secrets: Mapping[str, bytes],
    *,
    taken: Mapping[tuple[str, ...], int] | None = None,
) -> int:
    """Queue a pass of an import.

    Args:
        secrets: sealed, by SOURCE and TARGET.
        taken: as `taken_ways` says; None = it is asked.

    Returns:
        The job's id.

    Raises:
        NotFound: no such import.
        Conflict: a pass of it is under way, or another import goes the same way.
    """
    imported = records.get(tx, number)
    others = taken_ways(tx, but=number) if taken is None else taken
    records.require_free(others, records.way(imported.source, imported.target))
    host = imported.source["host"].lower()
    job_id = jobs.enqueue(
        tx,
        KIND,
        {"import": number},
        concurrency=f"{KIND} {host}",
        at_most=settings.mail_import.host_imports,
        secrets=secrets,
    )
    assert job_id is not None
    records.set_job(tx, number, job_id)
    return job_id


class Passes:
    """What runs the jobs of KIND."""

    def __init__(self, settings: configuration.Settings, database: Database, keys: Keys) -> None:
        self._settings = settings
        self._database = database
        self._keys = keys
        self._running = 0  # imports in this process
        self._lock = threading.Lock()

    def _window(self) -> int:
        """The share of one import in what this process may hold."""
        return self._settings.mail_import.window_bytes // max(self._running, 1)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    def run(self, job: Job) -> None:
        """One run of a pass, to its end or to a pause.

        Raises:
            Permanent: the pass has failed; its report says why.
            Yielded: it goes on later.
            Cancelled, LeaseLost: as the job's checkpoints.
        """
        try:
            with self._database.read() as tx:
                imported = records.get(tx, job.arguments["import"])
        except NotFound:
            return  # it went with its mailbox
        if imported.job_id != job.id:
            return
        if imported.state in records.ENDED:  # the run that ended it was cut before the job's end was written
            if imported.state == "failed":
                raise Permanent((imported.report or {}).get("problem") or "the import has failed")
            return
        state = dict(job.state or {})
        if state.pop("is_running", False):  # nobody said that the last run ended
            state["crashes"] = state.get("crashes", 0) + 1
        job.state = state or None
        self._database.write(lambda tx: records.set_state(tx, imported.id, "running"))
        run = _Run(self._settings, self._database, self._keys, job, imported, self._window)
        try:
            self._run(job, imported, run)
        except Cancelled:
            self._end(job, imported, "cancelled", run.report("It was cancelled."), fenced=False)
            raise

    def _run(self, job: Job, imported: records.Import, run: _Run) -> None:
        try:
            with self._counted(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                report = runner.run(run.run())
        except Permanent as error:
            self._end(job, imported, "failed", run.report(str(error)))
            raise
        except Yielded:
            self._rest(job)
            raise
        except DayIsOver as pause:
            self._rest(job)
            self._pause(job, imported, str(pause), pause.wait_s)
        except (RemoteError, BadRequest, OSError) as error:
            self._retry(job, imported, run, error)
        else:
            complete = not (report["refused"] or report["different"])
            self._end(job, imported, "done" if complete else "incomplete", report)

    def _end(
        self, job: Job, imported: records.Import, state: str, report: dict[str, Any], *, fenced: bool = True
    ) -> None:
        mail = self._settings.mail

        def effects(tx: Write) -> None:
            records.end(tx, imported.id, state, report)
            letters.tell(tx, mail, imported, state, report)

        if fenced:
            with contextlib.suppress(Cancelled, Yielded):  # it has ended, whatever is asked of it
                job.checkpoint(job.state, effects)
        else:  # the checkpoint that was told to end kept the lease a moment ago
            self._database.write(effects)
        log.info("import", extra={"import": imported.id, "state": state, "copied": report["copied"]})
        self._sweep()

    def _sweep(self) -> None:
        """Remove what imports that have ended left in the spool, wherever they were ended."""
        spool = self._settings.mail_import.spool
        files = [path for path in spool.glob("*-*-*") if path.name.partition("-")[0].isdigit()]
        if not files:
            return
        with self._database.read() as tx:
            active = records.active(tx)
        for path in files:
            if int(path.name.partition("-")[0]) not in active:
                path.unlink(missing_ok=True)

    def _rest(self, job: Job, **more: int) -> None:
        """Keep that this run ended as it should: what is found at the next one was no crash.

        Raises:
            Cancelled, LeaseLost: as the job's checkpoints.
        """
        with contextlib.suppress(Yielded):  # what follows is a pause in any case
            job.checkpoint({**(job.state or {}), "is_running": False, **more})

    def _pause(self, job: Job, imported: records.Import, reason: str, wait_s: float) -> None:
        job.progress(**report_progress(job), note=reason)
        self._database.write(lambda tx: records.set_state(tx, imported.id, "paused"))
        job.postpone(wait_s)

    def _retry(self, job: Job, imported: records.Import, run: _Run, error: Exception) -> None:
        """A server failed: again after a pause that doubles until something moves."""
        settings = self._settings.mail_import
        state = job.state or {}
        now = int(time.time())
        moved = run.has_moved or "failing_since" not in state
        since = now if moved else int(state["failing_since"])
        failures = 0 if moved else int(state.get("failures", 0)) + 1
        if not 0 <= now - since < settings.give_up_s:
            text = f"given up after {settings.give_up_s // 3600} hours: {error}"
            self._end(job, imported, "failed", run.report(text))
            raise Permanent(text)
        wait_s = min(settings.back_off_s * 2 ** min(failures, _DOUBLINGS), settings.longest_back_off_s)
        wait_s *= random.uniform(0.8, 1.2)  # noqa: S311 - what failed together is not tried together
        self._rest(job, failing_since=since, failures=failures)
        log.info(
            "import pauses", extra={"import": imported.id, "reason": str(error), "wait_s": round(wait_s)}
        )
        self._pause(job, imported, str(error), wait_s)


def report_progress(job: Job) -> dict[str, object]:
    """Counters of the last checkpoint, for people."""
    counters = (job.state or {}).get("counters", {})
    return {name: counters.get(name, 0) for name in ("copied", "found")}


class _Run:
    """One run: its connections, and what it counted."""

    def __init__(
        self,
        settings: configuration.Settings,
        database: Database,
        keys: Keys,
        job: Job,
        imported: records.Import,
        window: Callable[[], int],
    ) -> None:
        self._window = window
        self._settings = settings
        self._database = database
        self._keys = keys
        self._job = job
        self._import = imported
        with database.read() as tx:
            self._mailbox = mailboxes.find_by_id(tx, imported.mailbox_id or 0)
        self._began = time.time()
        self._before = _counted(job.state)

    @property
    def has_moved(self) -> bool:
        """Whether this run came any further."""
        return _counted(self._job.state) != self._before

    def report(self, problem: str = "") -> dict[str, Any]:
        """What the pass has done so far."""
        with self._database.read() as tx:
            report = _report(tx, self._import.id, self._job.state, problem)
        return {**report, "seconds": round(time.time() - self._began, 1)}

    async def run(self) -> dict[str, Any]:
        """Connect, copy, and report.

        Raises:
            RemoteError, BadRequest: a server failed.
            Left: from the job's checkpoints.
        """
        options = msgspec.convert(self._import.options, Options)
        source = await self._source()
        with ending(source.connection):
            secret = self._open(TARGET)
            sink = await open_sink(
                self._settings,
                self._import.target,
                secret,
                tag=str(self._import.id),
                mailbox=self._mailbox,
                require_turn=self._job.require_lease,
            )
            with ending(sink):
                report = await self._copy(options, source, sink)
        await sink.close()
        await source.connection.close()
        return report

    async def _copy(self, options: Options, source: Source, sink: Sink) -> dict[str, Any]:
        settings = self._settings.mail_import
        connection = source.connection
        account = f"{connection.server.host} {connection.server.user}"
        ledger = Ledger(self._job, self._database, account, lambda: connection.received)
        importer = Importer(ledger, settings, self._import, options, source, sink, self._window)
        folders, insane = sane(await source.folders())
        for name in insane:
            ledger.counters.differs(ascii(name)[:60], "a folder cannot be asked for by this name")
        where = Map(await sink.places(), sink.separator, sink.prefix, options, source.prefix)
        await importer.run(folders, where)
        report = self._finished(ledger)
        await self._name_refused(source, report)
        return report

    def _finished(self, ledger: Ledger) -> dict[str, Any]:
        self._job.state = {**(self._job.state or {}), "counters": ledger.counters.kept()}
        return self.report()

    async def _name_refused(self, source: Source, report: dict[str, Any]) -> None:
        """Give each refused message its subject, as far as the server still says it."""
        folders: dict[str, list[dict[str, Any]]] = {}
        for each in report["refusals"]:
            folders.setdefault(each["folder"], []).append(each)
        for name, refused in folders.items():
            try:
                await source.open(Folder(name, "", frozenset()))
                found = await source.subjects([each["uid"] for each in refused])
            except (RemoteError, BadRequest):
                return  # the report does without
            for each in refused:
                each["subject"] = found.get(each["uid"], "")

    async def _source(self) -> Source:
        server = msgspec.convert(self._import.source, Server)
        secret = self._open(SOURCE)
        connection = await connect(
            server, secret, self._settings.mail_import, _networks(self._settings), utf8=True
        )
        return Source(connection, self._settings.mail_import)

    def _open(self, name: str) -> str:
        if name == TARGET and self._import.target["kind"] != "imap":
            return ""
        return self._keys.open(self._job.secret(name)).decode("utf-8")


_REFUSALS = 1000  # named one by one


def _report(tx: Read, number: int, state: Any, problem: str = "") -> dict[str, Any]:
    """What a pass came to, from its rows and the state of its job."""
    counters = Counters(**(state or {}).get("counters", {}))
    refused = records.refused(tx, number)
    return {
        **counters.kept(),
        "refused": len(refused),
        "problem": problem,
        "folders": _by_folder(records.counts(tx, number)),
        "refusals": [
            {"folder": folder, "uid": uid, "bytes": size, "received_at": at, "reason": reason}
            for folder, uid, size, at, reason in refused[:_REFUSALS]
        ],
    }


def end_abandoned(settings: configuration.Settings, database: Database) -> None:
    """End imports whose job ended without them: cancelled while it waited, or given up by the job worker.

    Until then their batch would wait for them, and nobody be told.
    """
    with database.read() as tx:
        found = records.abandoned(tx)
    for number, job_id in found:

        def end(tx: Write, number: int = number, job_id: int = job_id) -> None:
            imported = records.get(tx, number)
            if imported.job_id != job_id or imported.state not in records.ACTIVE:
                return  # another node was quicker, or it goes on
            try:
                job = jobs.get_job(tx, job_id)
            except NotFound:  # forgotten by now
                job = {"state": "failed", "last_error": None, "checkpoint": None}
            state = "cancelled" if job["state"] == "cancelled" else "failed"
            problem = "It was cancelled." if state == "cancelled" else str(job["last_error"] or "unknown")
            report = {**_report(tx, number, job["checkpoint"], problem), "seconds": 0}
            records.end(tx, number, state, report)
            letters.tell(tx, settings.mail, imported, state, report)

        database.write(end)


def _counted(state: Any) -> tuple[int, int]:
    counters = (state or {}).get("counters", {})
    return counters.get("copied", 0) + counters.get("there", 0), counters.get("fetched_bytes", 0)


def _by_folder(counts: list[tuple[str, str, str, int, int]]) -> list[dict[str, Any]]:
    """One entry for each pair of folders."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for source, target, how, messages, size in counts:
        entry = found.setdefault((source, target), {"folder": source, "to": target, "bytes": 0})
        entry[how] = entry.get(how, 0) + messages
        entry["bytes"] += size
    return list(found.values())


def sane(folders: list[Folder]) -> tuple[list[Folder], list[str]]:
    """Folders whose names can be asked for, and the names of the others."""
    return [each for each in folders if is_sane(each.name)], [
        each.name for each in folders if not is_sane(each.name)
    ]


def _networks(settings: configuration.Settings) -> Networks:
    return Networks("outbound.private_networks", settings.outbound.private_networks)


async def open_sink(
    settings: configuration.Settings,
    target: dict[str, Any],
    secret: str,
    *,
    tag: str = "",
    mailbox: Mailbox | None = None,
    require_turn: Callable[[], None] = lambda: None,
) -> Sink:
    """The destination of an import.

    Args:
        tag: of the import, for the names of files.
        mailbox: where it is one of ours.
        require_turn: as `ImapSink` takes it.

    Raises:
        RemoteError: it cannot be reached, or does not let us in.
    """
    if target["kind"] == "maildir":
        return MaildirSink(Path(target["path"]), tag)
    if mailbox is not None:
        owner = dovecot.owner_of(settings.mail)
        root = mailboxes.maildir_of(settings.mail.folders, mailbox.folder)
        given = (owner.uid, owner.gid) if os.geteuid() == 0 and settings.mail.owner else None
        return MaildirSink(root, tag, escaped=True, quota_bytes=mailbox.quota_bytes, owner=given)
    server = msgspec.convert(target["server"], Server)
    connection = await connect(server, secret, settings.mail_import, _networks(settings))
    sink = ImapSink(connection, require_turn)
    with ending(sink):
        await sink.begin()
    return sink
