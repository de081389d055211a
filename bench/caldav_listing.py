"""PROPFIND Depth 1 of a calendar of 10,000 events: ours and Radicale 3.9, side by side. Bar: 50 times faster (CPU).

Our cache of rendered answers is off, so each listing is made from the rows; Radicale's caches are warm.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bench.content import calendar_object, fill_calendar
from bench.measure import Connection, Subject, interleave, show, verdict
from conformance.conftest import make_calendar
from conformance.peers import Peer, radicale
from conformance.servers import demo
from conformance.target import Target
from ksync_server import settings

BAR = 50
BODY = (
    b'<?xml version="1.0"?><D:propfind xmlns:D="DAV:"><D:prop>'
    b"<D:getetag/><D:getcontenttype/><D:resourcetype/></D:prop></D:propfind>"
)
HEADERS = {"Depth": "1", "Content-Type": "application/xml; charset=utf-8"}


def listing(connection: Connection, path: str, count: int) -> bytes:
    request = connection.prepare("PROPFIND", path, BODY, HEADERS)
    status, body = connection.send(request)
    assert status == 207, (status, body[:300])
    assert body.count(b".ics") == count, f"{body.count(b'.ics')} of {count} events listed"
    return request


def fill_radicale(folder: Path, count: int) -> None:
    """Write the events where Radicale keeps them; by PUT each would take it a look at all the others."""
    for place, props in ((folder.parent, "{}"), (folder, '{"tag": "VCALENDAR"}')):
        place.mkdir(parents=True, exist_ok=True)
        (place / ".Radicale.props").write_text(props)
    for number in range(count):
        (folder / f"bench-{number:06}.ics").write_bytes(calendar_object(number))


def main(count: int = 10_000) -> bool:
    fast_disk = Path("/dev/shm")  # Radicale flushes a cache file of its own for every event
    with tempfile.TemporaryDirectory(
        prefix="ksync-bench-", dir=fast_disk if fast_disk.is_dir() else None
    ) as name:
        fill_radicale(Path(name) / "radicale/collections/collection-root/alice/bench", count)
        with radicale(Path(name) / "radicale") as peer:
            return compare(Path(name), peer, count)


def compare(folder: Path, peer: Peer, count: int) -> bool:
    theirs = Connection(peer.url, peer.login, peer.password)
    their_request = listing(theirs, "/alice/bench/", count)
    with demo(folder / "ours", settings=["server.workers=1", "dav.body_cache_bytes=0"]) as running:
        target = Target.from_ready(running.ready)
        path = make_calendar(target.sync()).path
        fill_calendar(settings.load(folder / "ours" / "ksync.toml"), path, count)
        ours = Connection(target.sync_url, target.login, target.password)
        our_request = listing(ours, path, count)
        subjects = [
            Subject("ksync-server, nothing cached", running.process.pid, lambda: ours.send(our_request)),
            Subject("Radicale 3.9", peer.process.pid, lambda: theirs.send(their_request)),
        ]
        interleave(subjects)
    show(f"PROPFIND Depth 1 of {count} events", subjects)
    return verdict("Radicale / ksync-server, CPU", subjects[1].cpu / subjects[0].cpu, BAR, at_least=True)
