"""A month query on 10,000 events, 30 % recurring, with and without content: ours and Radicale 3.9, side by side.

Bars: at most 25 ms CPU each, and 50 times less than Radicale, whose caches are warm. Our occurrence index is warm, too:
each month was asked for once before.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from bench.caldav_listing import fill_radicale
from bench.content import calendar_object, put_all
from bench.measure import Connection, Subject, interleave, show, verdict
from conformance.conftest import make_calendar
from conformance.peers import Peer, radicale
from conformance.servers import demo
from conformance.target import Target

BAR_MS = 25
BAR = 50
HEADERS = {"Depth": "1", "Content-Type": "application/xml; charset=utf-8"}
BODY = (
    '<?xml version="1.0"?><C:calendar-query xmlns:D="DAV:" xmlns:C="urn:ietf:params:xml:ns:caldav">'
    '<D:prop><D:getetag/>{}</D:prop><C:filter><C:comp-filter name="VCALENDAR"><C:comp-filter name="VEVENT">'
    '<C:time-range start="20260901T000000Z" end="20261001T000000Z"/>'
    "</C:comp-filter></C:comp-filter></C:filter></C:calendar-query>"
)
DATA = {"without content": "", "with content": "<C:calendar-data/>"}


def query(connection: Connection, path: str, data: str) -> tuple[bytes, frozenset[bytes]]:
    """The request, and the names of what it finds."""
    request = connection.prepare("REPORT", path, BODY.format(data).encode(), HEADERS)
    status, body = connection.send(request)
    assert status == 207, (status, body[:300])
    return request, frozenset(re.findall(rb"bench-\d{6}\.ics", body))


def main(count: int = 10_000) -> bool:
    fast_disk = Path("/dev/shm")  # Radicale flushes a cache file of its own for every event
    with tempfile.TemporaryDirectory(
        prefix="ksync-bench-", dir=fast_disk if fast_disk.is_dir() else None
    ) as name:
        fill_radicale(Path(name) / "radicale/collections/collection-root/alice/bench", count)
        with radicale(Path(name) / "radicale") as peer:
            return compare(Path(name), peer, count)


def compare(folder: Path, peer: Peer, count: int) -> bool:
    with demo(folder / "ours", settings=["server.workers=1"]) as running:
        target = Target.from_ready(running.ready)
        path = make_calendar(target.sync()).path

        def connect() -> Connection:
            return Connection(target.sync_url, target.login, target.password)

        put_all(connect, lambda number: f"{path}bench-{number:06}.ics", calendar_object, count)
        subjects = []
        ours, theirs = connect(), Connection(peer.url, peer.login, peer.password)
        for what, data in DATA.items():
            our_request, our_names = query(ours, path, data)
            their_request, their_names = query(theirs, "/alice/bench/", data)
            assert our_names == their_names, f"{len(our_names)} and {len(their_names)} found"
            subjects += [
                Subject(
                    f"ksync-server, {what}, {len(our_names)} found",
                    running.process.pid,
                    lambda request=our_request: ours.send(request),  # type: ignore[misc]
                ),
                Subject(
                    f"Radicale 3.9, {what}",
                    peer.process.pid,
                    lambda request=their_request: theirs.send(request),  # type: ignore[misc]
                ),
            ]
        interleave(subjects, rounds=3, seconds=1.0)
    show(f"Month query on {count} events", subjects)
    good = True
    for at, what in enumerate(DATA):
        mine, other = subjects[2 * at : 2 * at + 2]
        good &= verdict(f"{what}, CPU ms", mine.cpu, BAR_MS, at_least=False)
        good &= verdict(f"{what}, Radicale / ksync-server, CPU", other.cpu / mine.cpu, BAR, at_least=True)
    return good
