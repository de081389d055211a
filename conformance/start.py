"""A newcomer's first minute: a copy of the project, nothing but Python, `./run`, and a client that lists a calendar."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from conformance.client import Client
from conformance.servers import REPOSITORY, STOP_TIMEOUT_S, stop

LIMIT_S = 60
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", ".*_cache", "__pycache__", "*.egg-info", "demo-data", "data"
)
DROPPED = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "KSYNC_READY")


def bare_environment() -> dict[str, str]:
    """What the machine has, without our environments and without uv."""
    python = Path(sys.base_prefix) / "bin"
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in DROPPED and not name.startswith("UV_")
    }
    return {**kept, "PATH": f"{python}:/usr/bin:/bin"}


def test_a_first_start_listens_within_a_minute_and_serves_a_client(tmp_path: Path) -> None:
    place = tmp_path / "project"
    shutil.copytree(REPOSITORY, place, ignore=NOT_COPIED)
    ready_file, log = tmp_path / "ready.json", tmp_path / "log"
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["./run", "demo", "--port", "0", "--ready-file", str(ready_file)],
            cwd=place,
            env=bare_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while not ready_file.exists():
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() - started < LIMIT_S, log.read_text(errors="replace")[-4000:]
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        seconds = time.monotonic() - started
        print(f"listened after {seconds:.1f} s")
        ready = json.loads(ready_file.read_text())
        assert ready_file.stat().st_mode & 0o777 == 0o600
        assert (place / "demo-data").is_dir(), "./run alone keeps its data in ./demo-data"
        alice = next(account for account in ready["accounts"] if account["name"] == "alice")
        client = Client(ready["sync_url"], alice["login"], alice["password"])
        assert client.propfind("", "D:current-user-principal")
        client.close()
        said = log.read_text(errors="replace")
        assert alice["password"] in said, "the demo prints what to log in with"
        assert ready["sync_url"].rstrip("/") in said
    finally:
        status = stop(process)
    assert status == 0, f"ended by SIGTERM within {STOP_TIMEOUT_S} s, exit code {status}"
