"""A backup taken under load restores clean, holds all that was acknowledged before it, and leaves no stale client.

Starts servers of its own, on both databases: writers of calendar objects and files (one extent and several), a
backup in the middle, a restore into the server that runs and goes on being written to, then into a fresh store
of the other database. Bounded: some hundred writes, about a minute for each database.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from conformance.client import DAV, Client
from conformance.conftest import Collection, make_calendar
from conformance.servers import REPOSITORY, Demo, PostgreSQL, demo, postgresql
from conformance.target import Target

WRITERS = 4
PAUSE_S = 0.2  # of a writer between two writes: the load lasts, and stays some hundred writes
BEFORE = 60  # acknowledged writes before the backup begins
AFTER = 40  # and between its end and the restore
MOST = 1000  # writes of one writer at most
KILLS = 3
LOAD_TIMEOUT_S = 120
EVENT = (
    "BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:-//example.org//load//EN\r\nBEGIN:VEVENT\r\nUID:{name}\r\n"
    "DTSTAMP:20260101T000000Z\r\nDTSTART:20260101T100000Z\r\nSUMMARY:{name}\r\n{more}END:VEVENT\r\n"
    "END:VCALENDAR\r\n"
)
SETTINGS = ["blobs.inline_bytes=1024", "blobs.extent_bytes=8192", "server.workers=2"]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQL]:
    with postgresql() as running:
        yield running


@dataclass
class Load:
    """Writers that go on until they are stopped, and what they were told."""

    target: Target
    calendar: str
    stop: threading.Event = field(default_factory=threading.Event)
    acknowledged: dict[str, bytes] = field(default_factory=dict)  # URL -> bytes
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        for number in range(WRITERS):
            thread = threading.Thread(target=self._work, args=(number,))
            thread.start()
            self.threads.append(thread)
        return self

    def __exit__(self, *details: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def wait(self, count: int) -> None:
        """Until so many more writes were acknowledged."""
        wanted, late = len(self.acknowledged) + count, time.monotonic() + LOAD_TIMEOUT_S
        while len(self.acknowledged) < wanted:
            assert time.monotonic() < late, (len(self.acknowledged), wanted, self.wrong[:3])
            self.stop.wait(0.02)

    def _work(self, writer: int) -> None:
        chance = random.Random(writer)
        on_drive = writer % 2 == 1
        client = self.target.drive() if on_drive else self.target.sync()
        for number in range(MOST):
            if self.stop.wait(PAUSE_S):
                break
            size = chance.choice((20, 20, 2000, 30_000))  # a row, an extent, several
            if on_drive:
                path, content = f"{writer}-{number}.bin", chance.randbytes(size)
            else:
                path = f"{self.calendar}{writer}-{number}.ics"
                more = "".join(f"COMMENT:{chance.getrandbits(200)}\r\n" for _ in range(size // 70))
                content = EVENT.format(name=f"{writer}-{number}", more=more).encode()
            try:
                answer = client.request("PUT", path, content, {"Content-Type": "text/calendar"})
            except (OSError, http.client.HTTPException) as error:
                self.wrong.append(f"{path}: {error!r}")
                continue
            if answer.status in (201, 204):
                self.acknowledged[client.url(path)] = content
            elif answer.status == 503 and answer.header("retry-after"):
                self.refused += 1
            else:
                self.wrong.append(f"{path}: {answer.status} {answer.body[:200]!r}")
        client.close()


@dataclass
class Phone:
    """A client that keeps what it saw, as phones do: names with their ETags and bytes, and a sync token."""

    calendar: Collection
    token: str = ""
    etags: dict[str, str] = field(default_factory=dict)
    bodies: dict[str, bytes] = field(default_factory=dict)

    def sync(self) -> bool:
        """Catch up; False when the token was not valid any more and everything was listed anew."""
        answer = self.calendar.sync(self.token)
        valid = answer.status == 207
        if not valid:
            assert answer.status in (403, 409), (answer.status, answer.body[:300])
            assert "{DAV:}valid-sync-token" in answer.preconditions
            answer = self.calendar.sync("")
        rows = answer.rows
        if not valid or not self.token:
            listed = {row.path for row in rows}
            for path in set(self.etags) - listed:
                del self.etags[path], self.bodies[path]
        for row in rows:
            if row.status == 404:
                self.etags.pop(row.path, None)
                self.bodies.pop(row.path, None)
            elif (etag := row.text(f"{DAV}getetag")) != self.etags.get(row.path):
                self.etags[row.path] = etag
                self.bodies[row.path] = self.calendar.client.request("GET", row.path).body
        self.token = answer.sync_token
        return valid


def command(data: Path, settings: list[str], *words: str) -> list[str]:
    line = [sys.executable, "-m", "ksync_server.cli", "--config", str(data / "ksync.toml")]
    for setting in settings:
        line += ["--set", setting]
    return [*line, *words, "--json"]


def run(data: Path, settings: list[str], *words: str) -> dict[str, Any]:
    done = subprocess.run(
        command(data, settings, *words),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def holds(target: Target, wanted: dict[str, bytes]) -> None:
    """Every one of these answers with its bytes."""
    clients = {"sync": target.sync(), "drive": target.drive()}
    for url, content in wanted.items():
        client = clients["drive" if url.endswith(".bin") else "sync"]
        answer = client.request("GET", url)
        assert (answer.status, answer.body == content) == (200, True), (url, answer.status)
    for client in clients.values():
        client.close()


def stale_state_is_refused(phone: Phone, calendar: Collection) -> None:
    """ETags and a token from before mean nothing, in whichever worker process answers."""
    etags, token = dict(phone.etags), phone.token
    survived = [path for path in sorted(etags) if calendar.client.request("GET", path).status == 200][:20]
    assert survived
    for path in survived:
        for _ in range(3):  # a new connection each: any worker may answer
            client = Client(calendar.client.base, calendar.client.login, calendar.client.password)
            old = etags[path]
            assert client.request("GET", path, headers={"If-None-Match": old}).status == 200
            again = client.request("PUT", path, phone.bodies[path], {"If-Match": old})
            assert again.status == 412, (again.status, again.body[:200])
            client.close()
    assert phone.token == token
    assert not phone.sync(), "the old token is not valid any more"
    assert not set(phone.etags.values()) & set(etags.values())
    members = calendar.client.propfind(calendar.path, "D:getetag", depth="1")
    now = {row.path: row.text(f"{DAV}getetag") for row in members if row.path.endswith(".ics")}
    assert phone.etags == now
    for path, body in phone.bodies.items():
        assert calendar.client.request("GET", path).body == body


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_backup_under_load_restores_clean(server: PostgreSQL, tmp_path: Path, database: str) -> None:
    data, folder = tmp_path / "data", tmp_path / "backup"
    with contextlib.ExitStack() as stack:
        first, second = f"database.url=sqlite:///{tmp_path / 'second.db'}", ""
        if database == "postgresql":
            second = first
            first = f"database.url={stack.enter_context(server.database())}"
        else:
            second = f"database.url={stack.enter_context(server.database())}"
            first = f"database.url=sqlite:///{data / 'ksync.db'}"
        settings = [*SETTINGS, first]
        with demo(data, settings=settings) as running:
            target = Target.from_ready(running.ready)
            calendar = make_calendar(target.sync())
            before = _into_the_running_server(running, target, calendar, settings, folder)
        fresh = [*SETTINGS, second, f"blobs.path={tmp_path / 'second-blobs'}"]
        run(data, fresh, "restore", str(folder))
        with demo(data, settings=fresh) as running:
            holds(Target.from_ready(running.ready), _moved(before, target, Target.from_ready(running.ready)))


def _moved(wanted: dict[str, bytes], old: Target, new: Target) -> dict[str, bytes]:
    """The same on another port."""
    return {
        url.replace(old.drive_url, new.drive_url).replace(old.sync_url, new.sync_url): content
        for url, content in wanted.items()
    }


def _into_the_running_server(
    running: Demo, target: Target, calendar: Collection, settings: list[str], folder: Path
) -> dict[str, bytes]:
    phone = Phone(calendar)
    with Load(target, calendar.path) as load:
        load.wait(BEFORE)
        before = dict(load.acknowledged)
        made = run(running.data, settings, "backup", str(folder))
        load.wait(AFTER)
        again = run(running.data, settings, "backup", str(folder), "--keep", "2")
        load.wait(AFTER)
        assert phone.sync()
        restored = run(running.data, settings, "restore", str(folder), "--state", made["state"], "--force")
        load.wait(AFTER // 3)  # the workers go on with the restored store
    assert load.wrong == [], load.wrong[:5]
    print(
        f"{len(before)} writes before, {len(load.acknowledged)} in all, {load.refused} answered 503;"
        f" {made['copied']} extents, then {again['copied']} new ones of {again['extents']};"
        f" {restored['rows']} rows restored"
    )
    assert again["copied"] < again["extents"]
    holds(target, before)
    stale_state_is_refused(phone, calendar)
    _killed_restores(running, target, settings, folder, made["state"], calendar)
    holds(target, before)
    return before


def _killed_restores(
    running: Demo, target: Target, settings: list[str], folder: Path, state: str, calendar: Collection
) -> None:
    """kill -9 at random moments of a restore: a server that answers, and the old store or the new one."""
    chance = random.Random(7)
    began = time.monotonic()
    run(running.data, settings, "restore", str(folder), "--state", state, "--force")
    whole = time.monotonic() - began
    members = calendar.members()
    for _ in range(KILLS):
        marker = f"marker-{chance.getrandbits(32)}.ics"
        assert calendar.put(marker, EVENT.format(name=marker, more="")).status == 201
        process = subprocess.Popen(
            command(running.data, settings, "restore", str(folder), "--state", state, "--force"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(whole * 0.5, whole))
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        found = calendar.members()
        assert found - {name for name in found if "marker" in name} == members
        assert calendar.put(marker, EVENT.format(name=marker, more="")).status in (201, 204)
    run(running.data, settings, "restore", str(folder), "--state", state, "--force")
    assert calendar.members() == members
