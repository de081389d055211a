"""A deleted account lets nobody in at once, can be taken back within the grace, and then leaves nothing."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from ksync_server import app as edge
from ksync_server import background, settings
from ksync_server.auth import accounts, directory, organizations, products, removal
from ksync_server.auth.accounts import Account
from ksync_server.auth.audit import Actor
from ksync_server.drive import erasing
from ksync_server.errors import ClientError, Conflict, Forbidden, NotAuthenticated, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Write
from tests.auth.harness import PASSWORD, SYNC_HOST, Door

DAY = 86400
NOW = 1_700_000_000
EVENT = (
    b"BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:-//example.org//test//EN\r\nBEGIN:VEVENT\r\nUID:%d\r\n"
    b"DTSTAMP:20260101T000000Z\r\nDTSTART:20260101T100000Z\r\nSUMMARY:Tea\r\nEND:VEVENT\r\nEND:VCALENDAR\r\n"
)


def refused(kind: type[ClientError], said: str, fn: Callable[[], object]) -> None:
    with pytest.raises(kind, match=said):
        fn()


def delete(door: Door, account: Account, days: int = 30, now: int = NOW, **options: Any) -> int:
    return door.write(lambda tx: removal.delete(tx, account, grace_days=days, now=now, **options))


def restore(door: Door, account: Account, now: int = NOW, **options: Any) -> Account:
    return door.write(lambda tx: removal.restore(tx, account, now=now, **options))


# -- the grace ------------------------------------------------------------------------------------


def test_nobody_gets_in_from_the_next_request_on_and_everything_is_back_after(door: Door) -> None:
    account = door.account()
    door.write(lambda tx: accounts.set_recovery(tx, account, email="a@example.net"))
    _, secret = door.app_password(account)
    elsewhere = door.another_process()
    for each in (door, elsewhere):
        for shown in (PASSWORD, secret):
            each.log_in("alice@example.org", shown)
    assert delete(door, account) == NOW + 30 * DAY
    for each in (door, elsewhere):
        for shown in (PASSWORD, secret):
            with pytest.raises(NotAuthenticated):
                each.log_in("alice@example.org", shown)
    door.gate.flush()
    with door.database.read() as tx:
        rows = {row["action"]: row for row in directory.notices(tx, account)}
        assert directory.accounts(tx)[0]["state"] == "deleted"
    assert rows["account.deletion"]["detail"] == {
        "was": "active",
        "purge_at": NOW + 30 * DAY,
        "told": ["alice@example.org", "a@example.net"],
    }
    refused(Conflict, "deleted already", lambda: delete(door, account))
    assert restore(door, account, NOW + 30 * DAY - 1).state == "active"
    for each in (door, elsewhere):
        for shown in (PASSWORD, secret):
            assert each.log_in("alice@example.org", shown).account_id == account.id
    refused(Conflict, "not deleted", lambda: restore(door, account))


def test_what_was_suspended_is_so_again(door: Door) -> None:
    account = door.account()
    door.write(lambda tx: accounts.set_state(tx, account, "suspended"))
    delete(door, account)
    refused(
        Conflict, "restore it first", lambda: door.write(lambda tx: accounts.set_state(tx, account, "active"))
    )
    assert restore(door, account).state == "suspended"


def test_the_grace_ends(door: Door) -> None:
    account = door.account()
    delete(door, account, days=1)
    refused(Conflict, "is over", lambda: restore(door, account, NOW + DAY))
    with door.database.read() as tx:
        assert removal.due(tx, NOW + DAY - 1) == []
        assert removal.due(tx, NOW + DAY) == [(account.id, account.sync_id)]
    assert not door.write(lambda tx: removal.claim(tx, account.id, NOW + DAY - 1))
    assert door.write(lambda tx: removal.claim(tx, account.id, NOW + DAY))
    refused(
        Conflict, "is over", lambda: restore(door, account, NOW)
    )  # whatever the clock of this machine says


def test_an_account_is_deleted_by_its_owner_or_the_operator(sqlite_door: Door) -> None:
    door, alice, bob = sqlite_door, sqlite_door.account(), sqlite_door.account("bob")
    refused(Forbidden, "its owner", lambda: delete(door, alice, actor=Actor(bob.sync_id)))
    delete(door, alice, actor=Actor(alice.sync_id))
    refused(Forbidden, "operator", lambda: restore(door, alice, actor=Actor(alice.sync_id)))


def test_the_last_legal_representative_of_an_organization_with_products_stays(door: Door) -> None:
    alice, bob = door.account(), door.account("bob")
    home = door.write(lambda tx: organizations.create_organization(tx, "Example"))

    def put(account: Account, role: str) -> None:
        door.write(lambda tx: organizations.put_member(tx, home, account, role))

    put(alice, "legal_representative")
    put(bob, "administrator")
    put(alice, "administrator")  # it has no products: nobody is bound
    put(alice, "legal_representative")
    product = door.write(lambda tx: products.create(tx, door.offers, home, "kdrive-pro"))
    said = "last legal representative"
    for act in (
        lambda: delete(door, alice),
        lambda: put(alice, "administrator"),
        lambda: put(alice, "external"),
        lambda: door.write(lambda tx: organizations.remove_member(tx, home, alice)),
    ):
        refused(Conflict, said, act)
    put(alice, "legal_representative")
    delete(door, bob)  # not one
    restore(door, bob)
    put(bob, "legal_representative")
    delete(door, bob)
    refused(Conflict, said, lambda: delete(door, alice))  # a deleted one represents nobody
    restore(door, bob)
    delete(door, alice)
    refused(Conflict, said, lambda: delete(door, bob))
    door.write(lambda tx: products.cancel(tx, door.offers, product.id))
    delete(door, bob)


def test_two_legal_representatives_do_not_go_at_once(door: Door) -> None:
    people = [door.account(name) for name in ("alice", "bob")]

    def create(tx: Write) -> None:
        home = organizations.create_organization(tx, "Example")
        for each in people:
            organizations.put_member(tx, home, each, "legal_representative")
        products.create(tx, door.offers, home, "kdrive-pro")

    door.write(create)
    barrier, outcomes = threading.Barrier(2), []

    def go(account: Account) -> None:
        barrier.wait()
        try:
            delete(door, account)
            outcomes.append("gone")
        except Conflict:
            outcomes.append("stays")

    threads = [threading.Thread(target=go, args=(each,)) for each in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["gone", "stays"]


# -- erasing --------------------------------------------------------------------------------------


@dataclass
class House:
    """A whole server in process, with two people who share a drive."""

    door: Door
    services: edge.Services
    app: edge.App
    alice: Account
    bob: Account
    drive_id: int

    def send(self, method: str, path: str, body: bytes = b"", *, who: str = "alice") -> int:
        """Answer a request; paths that begin with /d/ are on the drive."""
        on_drive = path.startswith("/d/")
        host = f"{self.drive_id}.connect.localhost" if on_drive else SYNC_HOST
        token = base64.b64encode(f"{who}@example.org:{PASSWORD}".encode())
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "https",
            "client": ("127.0.0.1", 0),
            "raw_path": (path[2:] if on_drive else path).encode("ascii"),
            "query_string": b"",
            "headers": [
                (b"host", host.encode("ascii")),
                (b"authorization", b"Basic " + token),
                (b"content-length", str(len(body)).encode("ascii")),
                (b"content-type", b"text/calendar"),
                (b"user-agent", b"rclone/v1.70"),
            ],
        }
        statuses: list[int] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        asyncio.run(self.app(scope, receive, send))
        return statuses[0]

    def put(self, path: str, body: bytes, who: str = "alice") -> None:
        assert self.send("PUT", path, body, who=who) == 201, path

    def erase_due(self, kind: str = "accounts.erase") -> None:
        """The periodic work, as the job worker runs it."""
        (work,) = [each for each in background.periodic(self.services) if each.kind == kind]
        work.run()

    def count(self, table: sa.Table) -> int:
        with self.door.database.read() as tx:
            return int(tx.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())

    def use(self) -> tuple[int, int]:
        """Bytes and files of the drive, as its row says."""
        with self.door.database.read() as tx:
            row = tx.execute(sa.select(t.drive.c.used_bytes, t.drive.c.files)).one()
        return row.used_bytes, row.files


@pytest.fixture
def house(door: Door, tmp_path: Path) -> Iterator[House]:
    """Both have a calendar with events, files of their own, and files in common."""
    every = msgspec.structs.replace(
        door.settings, blobs=settings.Blobs(path=tmp_path / "blobs", inline_bytes=64, extent_bytes=4096)
    )
    (tmp_path / "blobs").mkdir()
    alice, bob = door.account(), door.account("bob")
    drive_id = door.drive("kdrive-pro", alice, bob)
    services = edge.build(every)
    app = edge.application(services)
    made = House(door, services, app, alice, bob, drive_id)
    for number in range(3):
        for who in (alice, bob):
            path = f"/calendars/{who.sync_id}/default/{number}.ics"
            made.put(path, EVENT % number, who.display_name.lower())
    yield made
    app.close()
    services.close()


def fill_drive(house: House) -> None:
    assert house.send("MKCOL", "/d/deep") == 201
    house.put("/d/deep/small.txt", b"small")
    house.put("/d/big.bin", b"b" * 10_000)
    house.put("/d/gone.txt", b"gone")
    assert house.send("DELETE", "/d/gone.txt") == 204
    house.put("/d/Common%20documents/shared.txt", b"for all")
    house.put("/d/mine.txt", b"bob's own", who="bob")


def test_after_the_grace_nothing_of_it_is_left_and_others_lose_nothing(house: House) -> None:
    door, alice, bob = house.door, house.alice, house.bob
    fill_drive(house)
    door.app_password(alice)
    _, others = door.app_password(bob)
    door.turn_on_second_factor(alice)
    house.put(f"/calendars/{bob.sync_id}/default/last.ics", EVENT % 9, "bob")
    before = house.count(t.blob)
    delete(door, alice, days=0, now=int(time.time()) - 1)
    house.erase_due()
    with door.database.read() as tx:
        assert [row["sync_id"] for row in directory.accounts(tx)] == [bob.sync_id]
        rows = directory.audit(tx, subject=alice.sync_id)
        referenced = {row[0] for row in tx.execute(sa.select(t.object_.c.blob_id))}
        referenced |= {row[0] for row in tx.execute(sa.select(t.node.c.blob_id)) if row[0] is not None}
        blobs = {row.id: row.refs for row in tx.execute(sa.select(t.blob.c.id, t.blob.c.refs))}
        roots = {row.name for row in tx.execute(sa.select(t.node.c.name).where(t.node.c.parent_id.is_(None)))}
    assert rows[0]["action"] == "account.erased"
    assert rows[-1]["action"] == "account.create", "the audit stays"
    assert blobs == dict.fromkeys(referenced, 1), "every share of bytes was given back, and no other"
    assert before > len(blobs)
    assert house.count(t.second_factor) == house.count(t.recovery_code) == 0
    assert house.count(t.app_password) == 1
    assert house.count(t.collection) == 3, "bob's two and the drive"
    assert roots == {"common", f"root {bob.sync_id}", f"trash {bob.sync_id}"}
    assert house.use() == (len(b"for all") + len(b"bob's own"), 2)
    assert house.send("GET", "/d/Common%20documents/shared.txt", who="bob") == 200
    assert house.send("GET", "/d/mine.txt", who="bob") == 200
    assert house.send("GET", f"/calendars/{bob.sync_id}/default/last.ics", who="bob") == 200
    assert house.send("PROPFIND", "/") == 401
    door.log_in(bob.sync_id, others)
    house.erase_due()  # nothing is due, nothing changes
    assert house.count(t.blob) == len(blobs)


def test_files_of_a_drive_that_it_had_left_go_too(house: House) -> None:
    door, alice = house.door, house.alice
    fill_drive(house)
    door.write(lambda tx: organizations.remove_drive_member(tx, house.drive_id, alice))
    delete(door, alice, days=0, now=int(time.time()) - 1)
    house.erase_due()
    assert house.use() == (len(b"for all") + len(b"bob's own"), 2)


def test_its_sync_id_is_never_given_again_and_its_address_is_free(house: House) -> None:
    door, alice = house.door, house.alice
    delete(door, alice, days=0, now=int(time.time()) - 1)
    refused(Conflict, "another account", lambda: door.account())
    house.erase_due()
    refused(Conflict, "belonged", lambda: door.account(sync_id=alice.sync_id))
    again = door.account()
    assert again.sync_id != alice.sync_id
    refused(NotFound, "no account", lambda: door.write(lambda tx: accounts.get(tx, alice.sync_id)))


def test_those_within_the_grace_are_left_alone(house: House) -> None:
    delete(house.door, house.alice, days=1, now=int(time.time()))
    before = house.count(t.object_)
    house.erase_due()
    assert house.count(t.object_) == before
    assert restore(house.door, house.alice, int(time.time())).state == "active"
    assert house.send("GET", f"/calendars/{house.alice.sync_id}/default/0.ics") == 200


class Killed(BaseException):
    """The process ends here."""


def test_wherever_it_is_cut_the_next_run_ends_it(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    door, alice, bob = house.door, house.alice, house.bob
    fill_drive(house)
    door.app_password(alice)
    delete(door, alice, days=0, now=int(time.time()) - 1)
    database = house.services.database
    real: Callable[..., Any] = database.write
    cuts, left = 0, 0
    eraser = threading.current_thread()

    def write(fn: Callable[[Write], Any]) -> Any:
        nonlocal left
        if threading.current_thread() is not eraser:  # counts of log-ins may be written meanwhile
            return real(fn)
        if left == 0:
            raise Killed
        left -= 1
        return real(fn)

    monkeypatch.setattr(database, "write", write)
    finished = False
    while not finished:  # each run is cut one transaction later than the one before it
        left = cuts + 1
        try:
            house.erase_due()
            finished = True
        except Killed:
            cuts += 1
            refused(Conflict, "over", lambda: restore(door, alice, NOW))
        assert cuts < 60
    assert cuts >= 5
    monkeypatch.setattr(database, "write", real)
    house.erase_due("dav.purge-deleted")
    erasing.expire_trash(database, house.services.settings.drive, int(time.time()) + 2 * 3600)
    with door.database.read() as tx:
        assert [row["sync_id"] for row in directory.accounts(tx)] == [bob.sync_id]
        actions = [row["action"] for row in directory.audit(tx, subject=alice.sync_id)]
    assert actions.count("account.erased") == 1
    assert house.use() == (len(b"for all") + len(b"bob's own"), 2)
    assert house.count(t.object_) == 3
