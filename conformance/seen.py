"""Every change of who gets in is seen by the very next request: in the other worker of a server, and on another node.

Two arrangements, each of real `ksync-server serve` processes: one node with two workers over SQLite, two nodes over one PostgreSQL. Changes
are made by this process, as the command line makes them.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conformance.servers import REPOSITORY, postgresql, stop
from ksync_server import settings as configuration
from ksync_server.app import Services
from ksync_server.auth import accounts, app_passwords, organizations, secondfactor
from ksync_server.auth.accounts import Account
from ksync_server.store import schema
from ksync_server.store.database import Database, Write
from ksync_server.worker import open_services

PASSWORD, NEXT_PASSWORD = "a long enough pass phrase", "the pass phrase after it"
START_S = 60
SLOW_HASH = 30  # passes of argon2id: so dear that CPU time shows whether one ran


@dataclass
class Node:
    """One `ksync-server serve`."""

    config: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    lines: list[Line] = field(default_factory=list)  # every connection to it, for the end

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
        command = [sys.executable, "-m", "ksync_server.cli", "serve", "--config", str(self.config)]
        with self.config.with_suffix(f".{self.port}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--set", f'server.listen=["127.0.0.1:{self.port}"]'],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if Line(self).ask("nobody", "").status == 401:
                    return
            assert self.process.poll() is None, "it ended"
            assert time.monotonic() < deadline, "it does not listen"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)

    def stop(self) -> None:
        while self.lines:
            self.lines.pop().close()
        if self.process is not None:
            stop(self.process)

    @property
    def workers(self) -> list[int]:
        """Processes that have the listening socket, the supervisor left out."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def cpu_s(self) -> float:
        """CPU time of all its workers."""
        ticks = 0
        for pid in self.workers:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes


class Line:
    """One kept-alive connection, so every request on it meets the same worker."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=60)
        self._connection.connect()  # raises where nobody listens yet
        self._port = self._connection.sock.getsockname()[1]
        node.lines.append(self)

    def close(self) -> None:
        self._connection.close()

    def ask(self, login: str, secret: str, path: str = "/", method: str = "PROPFIND") -> Answer:
        word = base64.b64encode(f"{login}:{secret}".encode()).decode()
        headers = {"Authorization": f"Basic {word}", "Depth": "0", "Content-Length": "0"}
        self._connection.request(method, path, headers=headers)
        response = self._connection.getresponse()
        return Answer(response.status, response.read())

    def worker(self) -> int:
        """The process at the other end."""
        inodes = set()
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            own, other = (int(address.rpartition(":")[2], 16) for address in fields[1:3])
            if (own, other) == (self.node.port, self._port):
                inodes.add(f"socket:[{fields[9]}]")
        for pid in self.node.workers:
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{name}") in inodes:
                        return pid
        raise AssertionError("nobody holds the connection")


def lines_to_both(node: Node) -> list[Line]:
    """A connection to each of two workers of a node."""
    found: dict[int, Line] = {}
    kept = []
    for _ in range(200):
        kept.append(Line(node))
        kept[-1].ask("nobody", "")
        found.setdefault(kept[-1].worker(), kept[-1])
        if len(found) == 2:
            return list(found.values())
    raise AssertionError("one worker takes every connection")


@dataclass
class Arrangement:
    """Nodes over one store, a connection to each process that must see changes, and this process's services."""

    nodes: list[Node]
    services: Services
    lines: list[Line] = field(default_factory=list)

    def change(self, fn: object) -> None:
        self.services.database.write(fn)  # type: ignore[arg-type]

    def statuses(self, login: str, secret: str, path: str = "/", method: str = "PROPFIND") -> set[int]:
        return {line.ask(login, secret, path, method).status for line in self.lines}

    def account(self, name: str) -> Account:
        hashed = self.services.gate.passwords.hash(PASSWORD)
        return self.services.database.write(
            lambda tx: accounts.create_account(
                tx, login_email=f"{name}@example.org", display_name=name, password_hash=hashed
            )
        )

    def app_password(self, account: Account) -> tuple[int, str]:
        number, secret = self.services.database.write(
            lambda tx: app_passwords.create(tx, self.services.keys, account, "phone")
        )
        return number, secret.shown


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _arrangement(folder: Path, url: str, workers: int, nodes: int) -> Iterator[Arrangement]:
    config = folder / "ksync.toml"
    config.write_text(
        f'[server]\nworkers = {workers}\nadmin_listen = ""\n[database]\nurl = {json.dumps(url)}\n'
        f'[auth]\nargon2_memory_kib = 8192\nargon2_time = {SLOW_HASH}\n[log]\nlevel = "warning"\n'
    )
    every = configuration.load(config)
    database = Database(every.database, threads=1)
    schema.migrate(database)
    database.close()
    services = open_services(every)
    running = [Node(config, _free_port()) for _ in range(nodes)]
    try:
        for node in running:
            node.start()
        lines = [line for node in running for line in (lines_to_both(node) if workers == 2 else [Line(node)])]
        yield Arrangement(running, services, lines)
    finally:
        for node in running:
            node.stop()
        services.close()


@pytest.fixture(scope="module", params=["two workers, SQLite", "two nodes, PostgreSQL"])
def there(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arrangement]:
    folder = tmp_path_factory.mktemp("seen")
    with contextlib.ExitStack() as stack:
        if request.param.endswith("SQLite"):
            yield stack.enter_context(_arrangement(folder, "sqlite:///ksync.db", 2, 1))
        else:
            url = stack.enter_context(stack.enter_context(postgresql()).database())
            yield stack.enter_context(_arrangement(folder, url, 1, 2))


def test_a_revoked_application_password(there: Arrangement) -> None:
    account = there.account("revoked")
    number, secret = there.app_password(account)
    _, other = there.app_password(account)
    for _ in range(2):
        assert there.statuses(account.sync_id, secret) == {207}
    there.change(lambda tx: app_passwords.revoke(tx, account, number))
    assert there.statuses(account.sync_id, secret) == {401}
    assert there.statuses(account.sync_id, other) == {207}
    there.change(lambda tx: app_passwords.revoke(tx, account))
    assert there.statuses(account.sync_id, other) == {401}


def test_a_changed_password(there: Arrangement) -> None:
    account = there.account("password")
    _, secret = there.app_password(account)
    assert there.statuses(account.login_email, PASSWORD) == {207}
    fresh = there.services.gate.passwords.hash(NEXT_PASSWORD)
    there.change(lambda tx: accounts.set_password_hash(tx, account, fresh))
    assert there.statuses(account.login_email, PASSWORD) == {401}
    assert there.statuses(account.login_email, NEXT_PASSWORD) == {207}
    assert there.statuses(account.login_email, secret) == {207}


def test_two_factor_authentication_on_and_off(there: Arrangement) -> None:
    import pyotp

    account = there.account("factor")
    _, secret = there.app_password(account)
    assert there.statuses(account.sync_id, PASSWORD) == {207}

    def turn_on(tx: Write) -> None:
        made = secondfactor.enrol_totp(tx, there.services.keys, account, "app", "ksync")
        now = time.time()
        code = pyotp.TOTP(made.secret).at(int(now))
        secondfactor.confirm(tx, there.services.keys, account, code, window_steps=1, now=now)

    there.change(turn_on)
    assert there.statuses(account.sync_id, PASSWORD) == {401}
    assert there.statuses(account.sync_id, secret) == {207}
    there.change(lambda tx: secondfactor.remove(tx, account, None, reason="a test"))
    assert there.statuses(account.sync_id, PASSWORD) == {207}


def test_a_suspended_account(there: Arrangement) -> None:
    account = there.account("suspended")
    _, secret = there.app_password(account)
    for state, status in (("active", 207), ("suspended", 401), ("active", 207)):
        there.change(lambda tx, state=state: accounts.set_state(tx, account, state))  # type: ignore[misc]
        assert there.statuses(account.sync_id, PASSWORD) == {status}, state
        assert there.statuses(account.sync_id, secret) == {status}, state


def test_an_offer_and_a_membership(there: Arrangement) -> None:
    account = there.account("offer")
    _, secret = there.app_password(account)

    def create(tx: Write) -> tuple[int, int]:
        organization = organizations.create_organization(tx, "Example")
        product = organizations.create_product(tx, organization, "ksuite-standard")
        number = organizations.create_drive(tx, product, "Files")
        organizations.put_member(tx, organization, account, "legal_representative")
        organizations.add_drive_member(tx, number, account)
        return product, number

    product, number = there.services.database.write(create)
    drive = f"/drives/{number}/"
    assert there.statuses(account.sync_id, secret, drive) == {403}
    there.change(lambda tx: organizations.set_offer(tx, product, "ksuite-pro"))
    assert there.statuses(account.sync_id, secret, drive) == {207}
    assert there.statuses(account.sync_id, PASSWORD, drive) == {207}
    there.change(lambda tx: organizations.remove_drive_member(tx, number, account))
    assert there.statuses(account.sync_id, secret, drive) == {404}


def test_wrong_passwords_are_counted_by_all_together_and_beyond_a_restart(there: Arrangement) -> None:
    """CVE-2021-41177: a limit that a restart, or another process, forgets is none."""
    account = there.account("throttled")
    seen: list[int] = []
    for number in range(40):
        seen.append(there.lines[number % 2].ask(account.sync_id, f"wrong {number}").status)
        if seen[-2:] == [429, 429]:
            break
    # Counts of a process are written once a second: the other one may let a few more through until then.
    assert seen[:5] == [401] * 5
    assert seen[-2:] == [429, 429], seen
    for node in there.nodes:
        node.stop()
        node.start()
    there.lines[:] = [
        line
        for node in there.nodes
        for line in (lines_to_both(node) if len(there.nodes) == 1 else [Line(node)])
    ]
    assert there.statuses(account.sync_id, "another wrong one") == {429}
    assert there.statuses(account.sync_id, PASSWORD) == {429}
    assert there.statuses(account.sync_id, there.app_password(account)[1]) == {207}


def test_a_remembered_password_costs_no_argon2_in_the_other_worker_and_after_a_reload(
    there: Arrangement,
) -> None:
    account = there.account("remembered")
    node = there.nodes[0]
    line = next(line for line in there.lines if line.node is node)
    before = node.cpu_s()
    assert line.ask(account.sync_id, PASSWORD).status == 207
    one = node.cpu_s() - before
    assert one > 0.02, "one argon2id shows in the CPU time of the workers"
    old = set(node.workers)
    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + START_S
    while set(node.workers) & old:
        assert time.monotonic() < deadline, "it did not reload"
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.process.wait(0.05)
    fresh = lines_to_both(node) if len(there.nodes) == 1 else [Line(node)]
    before = node.cpu_s()
    for line in fresh:
        assert line.ask(account.sync_id, PASSWORD).status == 207
    assert node.cpu_s() - before < one / 2
    there.lines[:] = [*fresh, *(Line(other) for other in there.nodes[1:])]
