"""An import in this process: between two servers of `conformance.imap_server`, or into a Maildir."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from conformance.imap_server import Account, Server, serving
from ksync_server import jobs, settings
from ksync_server.auth.keys import Keys, KeySet
from ksync_server.jobs import Handler
from ksync_server.mailimport import passes, records
from ksync_server.runner import Runner
from ksync_server.store import tables as t
from ksync_server.store.database import Database

KEYS = Keys("k1", {"k1": KeySet(secrets.token_bytes(32), secrets.token_bytes(32))})


@dataclass
class Desk:
    """Where imports are ordered and done."""

    database: Database
    settings: settings.Settings
    keys: Keys = KEYS

    def order(
        self,
        source_port: int,
        target: int | Path,
        *,
        options: Mapping[str, object] | None = None,
        source_secret: str = "secret",
        target_secret: str = "secret",
        source: Mapping[str, object] | None = None,
        target_user: str = "alice@example.org",
        again: int | None = None,
        **more: Any,
    ) -> int:
        """Queue an import, or a further pass of one; its number."""
        if isinstance(target, Path):
            place: dict[str, object] = {"kind": "maildir", "path": str(target)}
        else:
            place = {"kind": "imap", "server": _server(target, target_user)}
        sealed = {
            passes.SOURCE: self.keys.seal(source_secret.encode()),
            passes.TARGET: self.keys.seal(target_secret.encode()),
        }

        def queue(tx: Any) -> int:
            number = again or records.create(
                tx,
                source={**_server(source_port, "alice@example.org"), **(source or {})},
                target=place,
                options=options or {},
                **more,
            )
            passes.queue(tx, self.settings, number, sealed)
            return number

        return self.database.write(queue)

    def runner(self) -> Runner:
        """A worker for the jobs of imports alone."""
        handler = Handler(passes.Passes(self.settings, self.database, self.keys).run)
        return Runner(self.database, (), {passes.KIND: handler}, self.settings.jobs)

    def work(self, *, most: int = 200, hurry: bool = True) -> int:
        """Run what is queued until nothing is due; how many runs it took.

        Args:
            hurry: pauses are cut short.
        """
        runner, runs = self.runner(), 0
        while runs < most:
            if hurry:
                self.database.write(
                    lambda tx: tx.execute(sa.update(t.job).where(t.job.c.state == "ready").values(run_at=0))
                )
            if not runner.step():
                return runs
            runs += 1
        with self.database.read() as tx:
            said = [job["progress"] for job in jobs.list_jobs(tx)]
        raise AssertionError(f"still at work after {most} runs: {said}")

    def imported(self, number: int) -> records.Import:
        """An import as it is now."""
        with self.database.read() as tx:
            return records.get(tx, number)

    def newest(self) -> int:
        """The import that was ordered last."""
        with self.database.read() as tx:
            return records.list_imports(tx, limit=1)[0].id

    def job(self, number: int) -> dict[str, Any]:
        """The newest job of an import."""
        with self.database.read() as tx:
            return jobs.get_job(tx, self.imported(number).job_id or 0)

    def do(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Order an import and work until it has ended; its report."""
        number = self.order(*arguments, **options)
        self.work()
        report = self.imported(number).report
        assert report is not None, self.job(number)
        return report


@dataclass
class Move:
    """An import from one server to another, or into a Maildir, in one pass or several."""

    desk: Desk
    there: int
    here: int | Path
    number: int | None = None

    def order(self, **more: Any) -> int:
        """Queue a pass."""
        self.number = self.desk.order(self.there, self.here, again=self.number, **more)
        return self.number

    def go(self, **more: Any) -> dict[str, Any]:
        """A whole pass; its report."""
        self.order(**more)
        self.desk.work()
        report = self.imported.report
        assert report is not None, self.desk.job(self.number or 0)
        return report

    @property
    def imported(self) -> records.Import:
        """The import as it is now."""
        return self.desk.imported(self.number or 0)

    @property
    def state(self) -> str:
        """Its state."""
        return self.imported.state


@contextlib.contextmanager
def moving(
    database: Database, folder: Path, source: Server, target: Server | Path, **changed: Any
) -> Iterator[Move]:
    """Two servers that run; settings may be changed."""
    with contextlib.ExitStack() as stack:
        there = stack.enter_context(serving(source))
        here = target if isinstance(target, Path) else stack.enter_context(serving(target))
        yield Move(desk(database, folder, **changed), there, here)


def exact(report: Mapping[str, Any], count: int, *, found: int | None = None) -> None:
    """So many messages came, nothing was refused and nothing is different."""
    said = {name: report[name] for name in ("found", "copied", "refused", "different", "problem")}
    wanted = {"found": count if found is None else found, "copied": count, "refused": 0}
    assert said == {**wanted, "different": 0, "problem": ""}, report["differences"] + report["refusals"]


def _server(port: int, user: str) -> dict[str, object]:
    return {"host": "127.0.0.1", "port": port, "user": user, "security": "none"}


def desk(database: Database, folder: Path, **changed: Any) -> Desk:
    """A desk that may ask servers on this machine without TLS."""
    return Desk(
        database,
        settings.Settings(
            mail_import=settings.MailImport(
                **{"plain": True, "spool": folder / "spool", "back_off_s": 0.1, **changed}
            ),
            outbound=settings.Outbound(private_networks=("127.0.0.0/8", "::1")),
        ),
    )


def contents(account: Account, *, skip: tuple[str, ...] = ()) -> Counter[tuple[object, ...]]:
    """All that an exact copy must have: folder, bytes, date, flags; each with how often it is there."""
    return Counter(
        (name, message.body, int(message.internal_date.timestamp()), message.flags)
        for name, folder in account.folders.items()
        if folder.selectable and name not in skip
        for message in folder.messages
    )


def until(condition: Any, *, seconds: float = 20) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
