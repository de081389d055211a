"""A demo server that is killed and started again on the same address and data."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import sqlalchemy as sa

from conformance.servers import REPOSITORY, Demo, demo
from ksync_server import settings as configuration
from ksync_server.settings import Settings
from ksync_server.store.blobs import Blobs, open_extents
from ksync_server.store.database import Database

END_TIMEOUT_S = 60  # what a worker without a supervisor may take to finish its requests
EXTENT_BYTES = 1 << 20  # small, so that uploads of some MiB have several
VICTIMS = ("web", "jobs", "supervisor", "group")


def wait_until(condition: Callable[[], object], what: str, seconds: float = END_TIMEOUT_S) -> float:
    """Wait for another process; returns how long it took.

    Raises:
        TimeoutError: it never happened.
    """
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.02)
    return time.monotonic() - started


def free_ports() -> int:
    """A port that is free together with the next one (the admin address of the demo)."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def _reserve(port: int) -> socket.socket:
    """Keep a port from becoming that of some client's connection while nobody listens on it."""
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", port))
    return kept


def lives(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_web(pid: int) -> bool:
    """Whether a worker serves HTTP: its event loop watches a listening socket."""
    folder = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):  # it ends
        for entry in (folder / "fd").iterdir():
            if os.readlink(entry) == "anon_inode:[eventpoll]":
                lines = (folder / "fdinfo" / entry.name).read_text().splitlines()
                watched = [line.split()[1] for line in lines if line.startswith("tfd:")]
                if {os.readlink(folder / "fd" / number) for number in watched} & _listening():
                    return True
    return False


def _listening() -> set[str]:
    """Every listening TCP socket of the machine, as it is named in /proc/<pid>/fd."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {f"socket:[{row[9]}]" for row in rows if row[3] == "0A"}


class Server:
    """One installation; `running` changes with every start."""

    def __init__(self, data: Path, settings: Sequence[str] = ()) -> None:
        self.data = data
        self._settings = [f"blobs.extent_bytes={EXTENT_BYTES}", "drive.transfers=400", *settings]
        self._port = free_ports()
        self._reserved = [_reserve(self._port), _reserve(self._port + 1)]
        self._stack = contextlib.ExitStack()
        self.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for each in self._reserved:
            each.close()

    def stop(self) -> int:
        """End it politely; returns the exit status."""
        self._stack.close()
        return int(self.running.process.returncode)

    def start(self) -> None:
        """Start it, again where it was."""
        started = demo(self.data, settings=self._settings, port=self._port)
        self.running: Demo = self._stack.enter_context(started)
        wait_until(self._is_complete, "all workers run")

    @property
    def pid(self) -> int:
        """The supervisor."""
        return self.running.process.pid

    def workers(self) -> set[int]:
        """The processes below the supervisor."""
        listed = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return {int(pid) for pid in listed.split()}

    def web_workers(self) -> set[int]:
        """Those that serve HTTP."""
        return {pid for pid in self.workers() if is_web(pid)}

    def _is_complete(self) -> bool:
        """Whether every web worker serves and the job worker runs."""
        wanted = max(1, self.configuration().server.workers)
        return len(self.web_workers()) == wanted and len(self.workers()) == wanted + 1

    def configuration(self) -> Settings:
        """What it runs with."""
        return configuration.load(self.data / "ksync.toml", self._settings)

    def kill(self, victim: str, choose: Callable[[list[int]], int]) -> str:
        """SIGKILL to a `web` or the `jobs` worker, the `supervisor` alone, or the whole `group`.

        Where the supervisor died the server is started again once all of it has ended.

        Returns:
            What was done, for the report.
        """
        workers = self.workers()
        web = {pid for pid in workers if is_web(pid)}
        if victim in ("web", "jobs"):
            pid = choose(sorted(web if victim == "web" else workers - web))
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not lives(pid), "a killed worker ends")
            wait_until(self._is_complete, "another worker takes its place")
            return f"{victim} worker"
        if victim == "group":
            self.crash()
            self.start()
            return victim
        os.kill(self.pid, signal.SIGKILL)
        self.running.process.wait(END_TIMEOUT_S)
        took = wait_until(lambda: not any(lives(pid) for pid in workers), "workers follow their supervisor")
        self._stack.close()
        self.start()
        return f"{victim} (all ended after {took:.1f} s)"

    def crash(self) -> None:
        """SIGKILL to all of it, and wait for its end; `start` begins anew."""
        workers = self.workers()
        os.killpg(self.pid, signal.SIGKILL)
        self.running.process.wait(END_TIMEOUT_S)
        wait_until(lambda: not any(lives(pid) for pid in workers), "all of it ends")
        self._stack.close()

    def errors(self) -> list[str]:
        """What the server logged as its own faults."""
        text = self.running.log.read_text(errors="replace")
        return [line for line in text.splitlines() if "Traceback" in line or " fault" in line]

    # -- what it keeps ----------------------------------------------------------------------------

    def verify(self, *arguments: str) -> list[str]:
        """What `ksync-server verify` finds, a line each; whether the server runs or has ended.

        That a check of it finds what it is for is proved by tests/verify, which breaks a store for each.
        """
        command = [sys.executable, "-m", "ksync_server.cli", "verify", "--json"]
        command += ["--config", str(self.data / "ksync.toml")]
        for setting in self._settings:
            command += ["--set", setting]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        try:
            found = json.loads(done.stdout)
        except ValueError:
            return [f"verify ended with {done.returncode}: {done.stderr[-1000:]}"]
        assert found["ok"] == (done.returncode == 0), done.returncode
        return [f"{each['check']}: {each['subject']} {each['text']}" for each in found["findings"]]

    def reap(self) -> None:
        """Erase what may be erased as if every grace period had passed; only once the server has ended."""
        loaded = self.configuration()
        database = Database(loaded.database)
        store = Blobs(
            msgspec.structs.replace(loaded.blobs, reap_after_s=-2.0), database, open_extents(loaded)
        )
        try:
            database.write(lambda tx: tx.execute(sa.text("UPDATE stage SET lease_until = 0")))
            while store.reap(most=100_000):
                pass
        finally:
            store.close()
            database.close()
