"""A process that does nothing but imports, so that it can be killed, measured and searched, and its store.

python -m conformance.import_worker FOLDER      works until its standard input ends
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import sqlalchemy as sa

from conformance.servers import REPOSITORY
from ksync_server import log, settings
from ksync_server.auth import keys
from ksync_server.mailimport import records
from ksync_server.store import schema
from ksync_server.store import tables as t
from ksync_server.store.database import Database
from ksync_server.worker import tune_memory
from tests.mailimport.harness import Desk, desk

LEASE_S = 0.6  # a killed worker's import is taken over within 1.5 s
_HOLDER = sa.select(t.job.c.worker).where(t.job.c.id == sa.bindparam("id_"))
_ROWS = sa.select(sa.func.count()).select_from(t.mail_copy)


@dataclasses.dataclass
class Office:
    """A store where imports are ordered, and the process that does them."""

    folder: Path
    desk: Desk
    worker: subprocess.Popen[bytes]
    spare: subprocess.Popen[bytes] | None = (
        None  # has its modules loaded, which takes longer than a small import
    )

    def kill(self) -> None:
        """SIGKILL the worker, and let another one go on."""
        _end(self.worker)
        self.worker, self.spare = self.spare or _start(self.folder), _start(self.folder)
        _let_go(self.worker)

    def close(self) -> None:
        """End all."""
        for process in (self.worker, self.spare):
            if process is not None:
                _end(process)

    def finish(self, numbers: list[int], *, within_s: float = 60) -> dict[int, float]:
        """Wait until imports have ended; when each of them was seen to, by the monotonic clock.

        Raises:
            AssertionError: not within that time.
        """
        ended: dict[int, float] = {}
        until = time.monotonic() + within_s
        imports = t.mail_import.c
        over = sa.select(imports.id).where(imports.id.in_(numbers), imports.state.in_(records.ENDED))
        while len(ended) < len(numbers):
            assert time.monotonic() < until, f"{len(numbers) - len(ended)} imports not within {within_s} s"
            with self.desk.database.read() as tx:
                for (number,) in tx.execute(over):
                    ended.setdefault(number, time.monotonic())
            time.sleep(0.01)
        return ended

    def finish_killed(
        self, number: int, *, kills: int, messages: int, seed: int | None, within_s: float
    ) -> int:
        """Finish an import while its worker is killed at random moments, spread over the whole of it.

        Returns:
            How often a worker was killed that had the import in its hands.
        """
        chance = random.Random(seed)
        blows = sorted(chance.uniform(0, 0.95) * messages for _ in range(kills))
        self.spare = self.spare or _start(self.folder)
        given, until = 0, time.monotonic() + within_s
        while (imported := self.desk.imported(number)).state not in records.ENDED:
            assert time.monotonic() < until, f"not done after {within_s} s: {self.desk.job(number)}"
            with self.desk.database.read() as tx:
                rows, holder = tx.scalar(_ROWS), tx.scalar(_HOLDER, {"id_": imported.job_id})
            if given < kills and rows >= blows[given] and str(holder).endswith(f"/{self.worker.pid}"):
                time.sleep(chance.uniform(0, 0.05))
                self.kill()
                given += 1
            time.sleep(0.005)
        return given

    def memory(self, name: str = "VmRSS") -> int:
        """Bytes of the worker's memory, as the kernel counts them; `VmHWM` is the most that there was."""
        for line in Path(f"/proc/{self.worker.pid}/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
        raise AssertionError(name)

    def forget_peak(self) -> None:
        """Let `VmHWM` begin anew."""
        Path(f"/proc/{self.worker.pid}/clear_refs").write_text("5")


@contextlib.contextmanager
def office(url: str, folder: Path, *, threads: int = 4, **mail_import: Any) -> Iterator[Office]:
    """An office with a fresh store and a worker.

    Args:
        url: of an empty database.
        threads: imports at once.
        mail_import: settings of that section.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {"url": url, "threads": threads, "mail_import": mail_import}
    (folder / "worker.json").write_text(json.dumps(chosen))
    opened = _open(folder)
    schema.migrate(opened.database)
    running = Office(folder, opened, _start(folder))
    try:
        _let_go(running.worker)
        yield running
    finally:
        running.close()
        opened.database.close()


def _open(folder: Path) -> Desk:
    chosen = json.loads((folder / "worker.json").read_text())
    opened = desk(Database(settings.Database(url=chosen["url"])), folder, **chosen["mail_import"])
    jobs = settings.Jobs(workers=chosen["threads"], lease_s=LEASE_S, poll_s=0.05)
    mail = settings.Mail(relay="mail.example.org", from_address="post@example.org")
    together = msgspec.structs.replace(opened.settings, jobs=jobs, mail=mail)
    return dataclasses.replace(opened, settings=together, keys=keys.load(folder / "keys"))


def _start(folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "worker.log").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "conformance.import_worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'src'}"},
        )


def _let_go(worker: subprocess.Popen[bytes]) -> None:
    assert worker.stdin
    worker.stdin.write(b"\n")
    worker.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _work(folder: Path, lifeline: IO[str]) -> None:
    log.configure(settings.Log(level="debug"))
    tune_memory()  # as every process of the server does
    if not lifeline.readline():
        return
    opened, stop = _open(folder), threading.Event()
    threading.Thread(target=lambda: (lifeline.read(), stop.set()), daemon=True).start()
    opened.runner().run(stop)
    opened.database.close()


if __name__ == "__main__":
    _work(Path(sys.argv[1]), sys.stdin)
