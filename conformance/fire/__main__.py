"""The server under fire, on SQLite and on PostgreSQL, with bytes in files and on S3.

    ./run conformance fire [PART ...] [--database sqlite|postgresql] [--bytes local|s3] [--errors SHARE]
                           [--kills N] [--requests N] [--seed N] [--set KEY=VALUE]

Each part starts servers of its own, under a load whose model knows every acknowledged write. With `--bytes s3`
large content goes to an S3 server (moto) behind a proxy; `--errors 0.05` lets 5 % of the requests to it fail.
`--set` gives the servers further settings.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path

from conformance.faults import Faults, faults
from conformance.fire.faults import databasefull, full, outage, readonly, standby, store
from conformance.fire.kills import kills
from conformance.fire.reload import reload
from conformance.fire.running import EXTENT_BYTES
from conformance.fire.scene import Finding, Scene
from conformance.servers import PostgreSQL, postgresql, s3

PARTS = {
    "kills": kills,
    "reload": reload,
    "store": store,
    "full": full,
    "outage": outage,
    "standby": standby,
    "databasefull": databasefull,
    "readonly": readonly,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run conformance fire", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--database", choices=("sqlite", "postgresql"), action="append")
    parser.add_argument("--kills", type=int, default=10, help="kill -9 so often on each database")
    parser.add_argument("--requests", type=int, default=10_000, help="of the rolling reload, at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--bytes", choices=("local", "s3"), default="local", help="where large content goes")
    parser.add_argument("--errors", type=float, default=0.0, help="share of the requests to S3 that fail")
    parser.add_argument("--report", type=Path, help="write a JUnit report here")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    findings: list[tuple[str, Finding]] = []
    for database in chosen.database or ("sqlite", "postgresql"):
        for part in chosen.parts or PARTS:
            print(f"{part} on {database}", flush=True)
            started = time.monotonic()
            found = play(part, database, chosen)
            findings += [(f"{part} on {database}", finding) for finding in found]
            for finding in found:
                print(f"{'ok  ' if finding.good else 'FAIL'} {finding.what}", flush=True)
                for wrong in finding.wrong[:10]:
                    print(f"       {wrong}", flush=True)
            print(f"    {time.monotonic() - started:.0f} s", flush=True)
    if chosen.report:
        write_report(chosen.report, findings)
    return 0 if findings and all(finding.good for _, finding in findings) else 1


def play(part: str, database: str, chosen: argparse.Namespace) -> Sequence[Finding]:
    """Run one part on one database, in a folder of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="ksync-fire-", ignore_cleanup_errors=True) as name,
        _database(database) as (url, server),
        _bytes(chosen.bytes, Path(name)) as (more, between),
    ):
        scene = Scene(
            Path(name),
            database,
            url,
            server,
            chosen.kills,
            chosen.requests,
            chosen.seed,
            (*more, *chosen.settings),
            between,
            chosen.errors,
        )
        if between is not None:
            between.plan = scene.plan
        try:
            return PARTS[part](scene)
        except (AssertionError, TimeoutError, RuntimeError) as error:
            return [Finding(f"{part} came to its end", [repr(error)[-2000:]])]


@contextlib.contextmanager
def _bytes(kind: str, folder: Path) -> Iterator[tuple[Sequence[str], Faults | None]]:
    """Settings for the store of bytes, and what stands in front of it."""
    if kind == "local":
        yield (), None
        return
    with s3() as server, faults(server.endpoint) as between:
        arguments = server.arguments(server.create(), folder)
        yield (
            (*arguments, f"s3.endpoint={between.endpoint}", f"s3.extent_bytes={EXTENT_BYTES}"),
            between,
        )


@contextlib.contextmanager
def _database(kind: str) -> Iterator[tuple[str, PostgreSQL | None]]:
    if kind == "sqlite":
        yield "", None
        return
    with postgresql(durable=True) as server, server.database() as url:
        yield url, server


def write_report(path: Path, findings: Sequence[tuple[str, Finding]]) -> None:
    """What happened, as other parts of conformance report it."""
    failed = sum(not finding.good for _, finding in findings)
    suite = ET.Element("testsuite", tests=str(len(findings)), failures=str(failed), errors="0", skipped="0")
    for part, finding in findings:
        case = ET.SubElement(suite, "testcase", classname=part, name=finding.what)
        if not finding.good:
            ET.SubElement(case, "failure").text = "\n".join(finding.wrong)
    ET.ElementTree(suite).write(path)


if __name__ == "__main__":
    sys.exit(main())
