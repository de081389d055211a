"""A sync-collection that finds nothing new, against an authenticated OPTIONS on the same collection, one worker.

Bars: at most 2.5 times the CPU of OPTIONS on SQLite, and t(10,000 events) <= 1.3 t(100). PostgreSQL stands beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.content import fill_calendar
from bench.measure import Connection, Subject, interleave, show, verdict
from conformance.conftest import make_calendar
from conformance.servers import demo, postgresql
from conformance.target import Target
from ksync_server import settings as configuration

BAR = 2.5
FLAT = 1.3
SIZES = (100, 10_000)
HEADERS = {"Depth": "0", "Content-Type": "application/xml; charset=utf-8"}
BODY = (
    '<?xml version="1.0"?><D:sync-collection xmlns:D="DAV:"><D:sync-token>{token}</D:sync-token>'
    "<D:sync-level>1</D:sync-level><D:prop><D:getetag/></D:prop></D:sync-collection>"
)


def measure(folder: Path, settings: Sequence[str], database: str, sizes: Sequence[int]) -> list[Subject]:
    """OPTIONS and no-change sync for each size, in turns, on one server."""
    with demo(folder, settings=["server.workers=1", *settings]) as running:
        target = Target.from_ready(running.ready)
        connection = Connection(target.sync_url, target.login, target.password)
        opened = configuration.load(folder / "ksync.toml", tuple(settings))
        subjects: list[Subject] = []
        for size in sizes:
            made = make_calendar(target.sync())
            fill_calendar(opened, made.path, size)
            requests = {
                "OPTIONS": connection.prepare("OPTIONS", made.path),
                "no-change sync": connection.prepare(
                    "REPORT", made.path, BODY.format(token=made.sync().sync_token).encode(), HEADERS
                ),
            }
            for what, request in requests.items():
                status, body = connection.send(request)
                assert status in (200, 204, 207), (what, status, body[:300])
                assert b".ics" not in body, "nothing changed"
                subjects.append(
                    Subject(
                        f"{what}, {size} events, {database}",
                        running.process.pid,
                        lambda request=request: connection.send(request),  # type: ignore[misc]
                    )
                )
        interleave(subjects, rounds=7, seconds=1.0)
        return subjects


def main(count: int = 0) -> bool:
    sizes = (min(SIZES[0], count), count) if count else SIZES
    good = True
    with tempfile.TemporaryDirectory(prefix="ksync-bench-") as name:
        sqlite = measure(Path(name) / "sqlite", [], "SQLite", sizes)
        with postgresql(durable=True) as server, server.database() as url:
            postgres = measure(Path(name) / "postgresql", [f"database.url={url}"], "PostgreSQL", sizes)
    show("No-change sync against OPTIONS", [*sqlite, *postgres])
    for database, (options_small, small, options_large, large) in (
        ("SQLite", sqlite),
        ("PostgreSQL", postgres),
    ):
        ratio, growth = large.cpu / options_large.cpu, large.cpu / small.cpu
        if database == "SQLite":
            good &= verdict(
                f"sync / OPTIONS at {sizes[1]} events, CPU, {database}", ratio, BAR, at_least=False
            )
        else:
            print(f"     sync / OPTIONS at {sizes[1]} events, CPU, {database}: {ratio:.2f}")
        print(
            f"     sync / OPTIONS at {sizes[0]} events, CPU, {database}: {small.cpu / options_small.cpu:.2f}"
        )
        good &= verdict(f"t({sizes[1]}) / t({sizes[0]}), CPU, {database}", growth, FLAT, at_least=False)
    return good
