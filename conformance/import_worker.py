"""A process that does nothing but imports, so that it can be killed, measured and searched, and its store.

python -m conformance.import_worker FOLDER      works until its standard input ends
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from ksync_server import log, settings
from ksync_server.auth import keys
from ksync_server.mailimport import records
from ksync_server.store import schema
from ksync_server.store import tables as t
from ksync_server.store.database import Database
from tests.mailimport.harness import Desk, desk

_REPOSITORY = Path(__file__).resolve().parent.parent  # `servers` loads drivers that would be measured too
LEASE_S = 0.6  # a killed worker's import is taken over within 1.5 s
_MALLOC = {  # as `worker.tune_memory` sets it in every process of the server
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "2",
}
_HOLDER = sa.select(t.job.c.worker).where(t.job.c.id == sa.bindparam("id_"))
_ROWS = sa.select(sa.func.count()).select_from(t.mail_copy)


@dataclasses.dataclass
class Office:
    """A store where imports are ordered, and the process that does them."""

    folder: Path
    desk: Desk
    parent: subprocess.Popen[bytes]
    worker: int = 0  # its process id

    def start(self, how: str) -> None:
        """Have a worker: `fork`, so that it is there at once, or `stay` for one whose memory is all its own."""
        assert self.parent.stdin
        assert self.parent.stdout
        self.parent.stdin.write(how.encode() + b"\n")
        self.parent.stdin.flush()
        self.worker = int(self.parent.stdout.readline())

    def kill(self) -> None:
        """SIGKILL the worker, which must be a fork, and let another one go on."""
        os.kill(self.worker, signal.SIGKILL)
        self.start("fork")

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
        given, until = 0, time.monotonic() + within_s
        while (imported := self.desk.imported(number)).state not in records.ENDED:
            assert time.monotonic() < until, f"not done after {within_s} s: {self.desk.job(number)}"
            with self.desk.database.read() as tx:
                rows, holder = tx.scalar(_ROWS), tx.scalar(_HOLDER, {"id_": imported.job_id})
            if given < kills and rows >= blows[given] and str(holder).endswith(f"/{self.worker}"):
                time.sleep(chance.uniform(0, 0.05))
                self.kill()
                given += 1
            time.sleep(0.005)
        return given

    def memory(self, name: str = "VmRSS") -> int:
        """Bytes of the worker's memory, as the kernel counts them; `VmHWM` is the most that there was."""
        for line in Path(f"/proc/{self.worker}/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
        raise AssertionError(name)

    def forget_peak(self) -> None:
        """Let `VmHWM` begin anew."""
        Path(f"/proc/{self.worker}/clear_refs").write_text("5")


@contextlib.contextmanager
def office(
    url: str, folder: Path, *, how: str = "fork", threads: int = 4, **mail_import: Any
) -> Iterator[Office]:
    """An office with a fresh store and a worker.

    Args:
        url: of an empty database.
        how: see `Office.start`.
        threads: imports at once.
        mail_import: settings of that section.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {"url": url, "threads": threads, "mail_import": mail_import}
    (folder / "worker.json").write_text(json.dumps(chosen))
    opened = _open(folder)
    schema.migrate(opened.database)
    with (folder / "worker.log").open("ab") as log_file:
        parent = subprocess.Popen(
            [sys.executable, "-m", "conformance.import_worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            cwd=_REPOSITORY,
            env={**os.environ, **_MALLOC, "PYTHONPATH": f"{_REPOSITORY}:{_REPOSITORY / 'src'}"},
        )
    try:
        running = Office(folder, opened, parent)
        running.start(how)
        yield running
    finally:
        parent.terminate()
        parent.communicate()
        opened.database.close()


def _open(folder: Path) -> Desk:
    chosen = json.loads((folder / "worker.json").read_text())
    opened = desk(Database(settings.Database(url=chosen["url"])), folder, **chosen["mail_import"])
    jobs = settings.Jobs(workers=chosen["threads"], lease_s=LEASE_S, poll_s=0.05)
    mail = settings.Mail(relay="mail.example.org", from_address="post@example.org")
    together = msgspec.structs.replace(opened.settings, jobs=jobs, mail=mail)
    return dataclasses.replace(opened, settings=together, keys=keys.load(folder / "keys"))


def main(folder: Path) -> None:
    """Have a worker for each line that asks for one; SIGTERM, or the end of the lines, ends the last one too."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who was killed is not waited for
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    log.configure(settings.Log(level="debug"))
    child = 0
    try:
        for line in sys.stdin:
            is_forked = line.strip() == "fork"
            child = os.fork() if is_forked else 0
            if child or not is_forked:
                print(child or os.getpid(), flush=True)
            if not child:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                _open(folder).runner().run(threading.Event())
    finally:
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
