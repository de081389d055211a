"""Run every part on SQLite and on PostgreSQL side by side, print one table, fail if anything failed.

    python -m conformance [PART ...] [--database sqlite|postgresql] [--peer radicale|wsgidav] [-k EXPRESSION]
    python -m conformance fire ...      the server under fire, with choices of its own: see `fire --help`

A part that did not run, ran no check, or skipped one has failed. With `--peer` the parts run against that
server instead; then the table is for reading, and nothing is demanded of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from conformance import peers
from conformance.fire import __main__ as fire
from conformance.servers import REPOSITORY, demo, postgresql, s3
from conformance.target import Target

FOLDER = Path(__file__).resolve().parent
PARTS = {
    "start": FOLDER / "start.py",
    "doors": FOLDER / "doors.py",
    "seen": FOLDER / "seen.py",
    "rfc4918": FOLDER / "rfc4918.py",
    "http": FOLDER / "rfc9110.py",
    "framing": FOLDER / "framing.py",
    "uploads": FOLDER / "uploads.py",
    "rfc4791": FOLDER / "rfc4791.py",
    "hostile": FOLDER / "hostile.py",
    "rfc6578": FOLDER / "rfc6578.py",
    "rfc6352": FOLDER / "rfc6352.py",
    "restore": FOLDER / "restore.py",
    "litmus": FOLDER / "external" / "litmus.py",
    "pycaldav": FOLDER / "external" / "pycaldav.py",
    "vdirsyncer": FOLDER / "external" / "vdirsyncer.py",
    "rclone": FOLDER / "external" / "rclone.py",
    "deploy": FOLDER / "external" / "deploy.py",
    "jobs": FOLDER / "jobs.py",
    "dovecot": FOLDER / "external" / "dovecot.py",  # starts servers of its own
    "dovecot24": FOLDER / "external" / "dovecot.py",  # the same with the Dovecot of Debian 13
    "mail_import": FOLDER / "mail_import.py",
    "import24": FOLDER / "mail_import.py",
    "fire": FOLDER / "fire" / "__main__.py",  # starts and kills servers of its own
    "fire-s3": FOLDER / "fire" / "__main__.py",
}
OF_PEERS = {
    "radicale": ("rfc4791", "rfc6578", "rfc6352", "hostile", "pycaldav", "vdirsyncer"),
    "wsgidav": ("rfc4918", "http", "uploads", "litmus", "rclone"),
}
# What anybody can run in two minutes a database; the rest: `./run conformance fire`.
FIRE = {
    "fire": ("kills", "reload", "full", "outage", "--kills", "5", "--requests", "1000"),
    "fire-s3": ("--bytes", "s3", "--errors", "0.05", "--kills", "4"),
}
ON_S3 = {"sqlite": "kills", "postgresql": "store"}  # one of the two on each: half the time
# Do not look at the target: once is enough.
ONCE = {"start", "deploy", "jobs", "restore", "seen", "dovecot", "dovecot24", "mail_import", "import24"}
# With what dovecot_tree.sh unpacked, and which checks.
IN_TREE = {"dovecot24": "", "import24": "between_two_dovecots or read_by_dovecot or behind_tokens"}
PART_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one part did on one server."""

    server: str
    part: str
    passed: int
    failed: int
    seconds: float
    output: str

    @property
    def green(self) -> bool:
        return self.failed == 0 and self.passed > 0


def main() -> int:
    if sys.argv[1:2] == ["fire"]:
        return fire.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="./run conformance", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--database", choices=("sqlite", "postgresql"), action="append")
    parser.add_argument(
        "--bytes", choices=("files", "s3"), default="files", help="where file content is kept"
    )
    parser.add_argument("--peer", choices=sorted(OF_PEERS))
    parser.add_argument("--ready", type=Path, help="ready file of a demo that runs already")
    parser.add_argument("-k", help="only checks whose names match, as in pytest")
    chosen = parser.parse_args()
    if unknown := set(chosen.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    parts = chosen.parts or OF_PEERS.get(chosen.peer, PARTS)
    own = [part for part in parts if part not in ONCE and not (part in FIRE and chosen.ready)]
    once = deque(part for part in parts if part in ONCE)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="ksync-conformance-", ignore_cleanup_errors=True) as name:
        lanes = list(_lanes(chosen, Path(name)))
        with ThreadPoolExecutor(len(lanes)) as pool:
            running = [pool.submit(_run_lane, lane, own, once, chosen.k) for lane in lanes]
            for lane in running:
                outcomes += lane.result()
    print_table(outcomes)
    return 0 if chosen.peer or (outcomes and all(outcome.green for outcome in outcomes)) else 1


Lane = contextlib.AbstractContextManager[tuple[str, Target, Path | None]]


def _lanes(chosen: argparse.Namespace, folder: Path) -> Iterator[Lane]:
    """A server each, to be started by who enters it; the lanes run at the same time."""
    if chosen.ready:
        target = Target.from_ready(json.loads(chosen.ready.read_text()))
        yield contextlib.nullcontext(("running", target, chosen.ready))
    elif chosen.peer:
        yield _peer(chosen.peer, folder)
    else:
        for database in chosen.database or ("sqlite", "postgresql"):
            yield _own(database, chosen.bytes, folder)


def _run_lane(lane: Lane, own: list[str], once: deque[str], expression: str | None) -> list[Outcome]:
    """Every part that looks at the lane's server, then of the others what no lane has begun yet."""
    outcomes = []
    with lane as (server, target, ready):
        parts = deque(own)
        while parts or once:
            try:
                part = (parts or once).popleft()
            except IndexError:  # the other lane was quicker
                break
            outcome = run_part(server, part, target, ready, expression)
            outcomes.append(outcome)
            said = f"{'ok  ' if outcome.green else 'FAIL'} {server:<11}{part:<11}"
            print(said if outcome.green else f"{said}\n{outcome.output}", flush=True)
    return outcomes


@contextlib.contextmanager
def _peer(kind: str, folder: Path) -> Iterator[tuple[str, Target, Path | None]]:
    with getattr(peers, kind)(folder) as peer:
        url = peer.url.rstrip("/")
        yield kind, Target(url, url, peer.login, peer.password), None


@contextlib.contextmanager
def _own(database: str, kind: str, folder: Path) -> Iterator[tuple[str, Target, Path | None]]:
    with (
        _database_settings(database) as settings,
        _bytes_settings(kind, folder / f"{database}-bytes") as more,
        demo(folder / database, settings=[*settings, *more]) as running,
    ):
        ready = folder / f"{database}.json"
        ready.touch(mode=0o600)
        ready.write_text(json.dumps(dict(running.ready)))
        yield database, Target.from_ready(running.ready), ready
        _show_server_errors(running.log)


def _show_server_errors(log: Path) -> None:
    lines = [
        line
        for line in log.read_text(errors="replace").splitlines()
        if "Traceback" in line or '"error"' in line
    ]
    if lines:
        print(f"the server logged {len(lines)} errors, the first: {lines[0][:2000]}")


@contextlib.contextmanager
def _database_settings(database: str) -> Iterator[list[str]]:
    if database == "sqlite":
        yield []
        return
    with postgresql() as server, server.database() as url:
        yield [f"database.url={url}"]


@contextlib.contextmanager
def _bytes_settings(kind: str, folder: Path) -> Iterator[list[str]]:
    if kind == "files":
        yield []
        return
    folder.mkdir()
    with s3() as server:
        # Small objects, so that files of the checks have several.
        yield [*server.arguments(server.create(), folder), "s3.extent_bytes=65536"]


def run_part(server: str, part: str, target: Target, ready: Path | None, expression: str | None) -> Outcome:
    """Run one part's checks in a process of their own and count what its report says."""
    python = peers.CLIENTS / "python" if part == "pycaldav" else Path(sys.executable)
    environment = {**os.environ, **target.environment(), "PYTHONPATH": str(REPOSITORY)}
    if ready:
        environment["KSYNC_READY"] = str(ready)
    if part in IN_TREE:
        tree = environment.get("KSYNC_DOVECOT_TREE") or str(REPOSITORY / ".dovecot-2.4")
        environment["KSYNC_DOVECOT_TREE"] = tree
        expression = " and ".join(f"({each})" for each in (IN_TREE[part], expression) if each) or None
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ksync-part-", ignore_cleanup_errors=True) as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", PARTS[part], f"--junitxml={report}", f"--basetemp={folder}/tmp"]
        command += ["-p", "no:cacheprovider", "--tb=short", "--rootdir", REPOSITORY]
        command += ["-k", expression] if expression else []
        command += [] if ready else ["-m", "not demo"]
        if part in FIRE:
            command = [python, "-m", "conformance.fire", *FIRE[part], "--database", server]
            command += ["--report", report, *([ON_S3[server]] if part == "fire-s3" else [])]
        try:
            done = subprocess.run(
                [str(word) for word in command],
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=PART_TIMEOUT_S,
                check=False,
            )
            output = done.stdout.decode(errors="replace")
        except subprocess.TimeoutExpired as late:
            output = f"{(late.stdout or b'').decode(errors='replace')}\nnot done after {PART_TIMEOUT_S} s"
        passed, failed = _count(report)
    return Outcome(server, part, passed, failed, time.monotonic() - started, output)


def _count(report: Path) -> tuple[int, int]:
    """Passed and not passed (failures, errors and skips alike); a missing report is one failure."""
    if not report.exists():
        return 0, 1
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    total = sum(int(suite.get("tests", "0")) for suite in suites)
    bad = sum(int(suite.get(kind, "0")) for suite in suites for kind in ("failures", "errors", "skipped"))
    return total - bad, bad


def print_table(outcomes: list[Outcome]) -> None:
    print(f"\n{'server':<12}{'part':<12}{'passed':>7}{'failed':>8}{'seconds':>9}")
    for outcome in outcomes:
        print(
            f"{outcome.server:<12}{outcome.part:<12}{outcome.passed:>7}{outcome.failed:>8}{outcome.seconds:>9.1f}"
            + ("" if outcome.green else "  FAILED")
        )
    passed, failed = sum(outcome.passed for outcome in outcomes), sum(outcome.failed for outcome in outcomes)
    print(f"{'':<12}{'all':<12}{passed:>7}{failed:>8}{sum(outcome.seconds for outcome in outcomes):>9.1f}")


if __name__ == "__main__":
    sys.exit(main())
