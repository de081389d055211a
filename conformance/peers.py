"""Our peers as their makers ship them, for the same checks and for measurements side by side."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.client import basic
from conformance.servers import REPOSITORY, START_TIMEOUT_S, stop

CLIENTS = REPOSITORY / ".venv-conformance" / "bin"  # programs of requirements/conformance.txt


@dataclass(frozen=True, slots=True)
class Peer:
    """A running peer: login and password are `alice` / `secret`."""

    url: str
    process: subprocess.Popen[bytes]
    login: str = "alice"
    password: str = "secret"


def free_port() -> int:
    """A port that was free a moment ago; for programs that cannot be asked for port 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _running(command: Sequence[str | Path], url: str, log: Path) -> Iterator[Peer]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-4000:]}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        yield Peer(url, process)
    finally:
        stop(process)


def _answers(url: str) -> bool:
    request = urllib.request.Request(
        url, headers={"Authorization": basic("alice", "secret")}, method="OPTIONS"
    )
    try:
        with urllib.request.urlopen(request, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@contextlib.contextmanager
def radicale(folder: Path) -> Iterator[Peer]:
    """Radicale 3.9, its own server, default storage, one user in a plain htpasswd file."""
    folder.mkdir(parents=True, exist_ok=True)
    users = folder / "users"
    users.write_text("alice:secret\n")
    port = free_port()
    options = [
        f"--server-hosts=127.0.0.1:{port}",
        "--auth-type=htpasswd",
        f"--auth-htpasswd-filename={users}",
        "--auth-htpasswd-encryption=plain",
        "--auth-delay=0",
        f"--storage-filesystem-folder={folder / 'collections'}",
        "--logging-level=warning",
    ]
    with _running(
        [CLIENTS / "radicale", *options], f"http://127.0.0.1:{port}/", folder / "radicale.log"
    ) as peer:
        yield peer


@contextlib.contextmanager
def wsgidav(folder: Path) -> Iterator[Peer]:
    """WsgiDAV 4.4 on cheroot, as `pip install wsgidav cheroot` and its manual give it."""
    root = folder / "files"
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = folder / "wsgidav.yaml"
    config.write_text(
        f"host: 127.0.0.1\nport: {port}\nserver: cheroot\nverbose: 1\n"
        f'provider_mapping:\n  "/": "{root}"\n'
        "http_authenticator:\n  accept_basic: true\n  accept_digest: false\n  default_to_digest: false\n"
        'simple_dc:\n  user_mapping:\n    "*":\n      alice:\n        password: "secret"\n'
        "property_manager: true\nlock_storage: true\n"
    )
    url = f"http://127.0.0.1:{port}/"
    with _running([CLIENTS / "wsgidav", "-c", config], url, folder / "wsgidav.log") as peer:
        yield peer
