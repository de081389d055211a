"""vdirsyncer keeps a folder of files and the server equal, calendars and contacts, conflicts included."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conformance.client import Client
from conformance.conftest import Collection, home, make_book, make_calendar
from conformance.peers import CLIENTS
from conformance.target import Target


def event(uid: str, summary: str) -> str:
    return (
        f"BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:-//example.org//c//EN\r\nBEGIN:VEVENT\r\nUID:{uid}\r\n"
        f"DTSTAMP:20260101T000000Z\r\nDTSTART:20260501T100000Z\r\nSUMMARY:{summary}\r\nEND:VEVENT\r\nEND:VCALENDAR\r\n"
    )


def card(uid: str, name: str) -> str:
    return f"BEGIN:VCARD\r\nVERSION:3.0\r\nUID:{uid}\r\nFN:{name}\r\nN:{name};;;;\r\nEND:VCARD\r\n"


@dataclass(frozen=True, slots=True)
class Pair:
    """A local folder and a remote collection that vdirsyncer keeps equal."""

    folder: Path
    collection: Collection
    config: Path
    suffix: str

    def run(self, *words: str, status: int | None = 0) -> str:
        done = subprocess.run(
            [str(CLIENTS / "vdirsyncer"), "-c", str(self.config), *words],
            input=b"y\n" * 20,
            capture_output=True,
            timeout=120,
            check=False,
        )
        said = (done.stdout + done.stderr).decode(errors="replace")
        assert status is None or done.returncode == status, f"vdirsyncer {words}: {done.returncode}\n{said}"
        return said

    def sync(self, status: int = 0) -> str:
        return self.run("sync", status=status)

    def content(self, uid: str, text: str) -> str:
        return event(uid, text) if self.suffix == ".ics" else card(uid, text)

    def put_local(self, uid: str, text: str) -> None:
        (self.folder / f"{uid}{self.suffix}").write_bytes(self.content(uid, text).encode())

    def put_remote(self, uid: str, text: str) -> None:
        href = next((name for name in self.collection.members() if uid in name), f"{uid}{self.suffix}")
        assert self.collection.put(href, self.content(uid, text)).status in (201, 204)

    def delete_remote(self, uid: str) -> None:
        href = next(name for name in self.collection.members() if uid in name)
        assert self.collection.client.request("DELETE", self.collection / href).status == 204

    def local(self) -> dict[str, str]:
        return {path.name: path.read_bytes().decode() for path in self.folder.glob(f"*{self.suffix}")}

    def remote(self) -> dict[str, str]:
        client = self.collection.client
        return {
            name: client.request("GET", self.collection / name).body.decode()
            for name in self.collection.members()
        }

    def assert_both_hold(self, *texts: str) -> None:
        for side in (self.local(), self.remote()):
            assert len(side) == len(texts), side
            assert all(any(text in content for content in side.values()) for text in texts), (texts, side)


def configure(target: Target, tmp_path: Path, kind: str, name: str, resolution: str | None) -> Path:
    config = tmp_path / f"config-{resolution}"
    local = tmp_path / "local"
    local.mkdir(exist_ok=True)
    suffix = ".ics" if kind == "caldav" else ".vcf"
    conflict = f'conflict_resolution = "{resolution}"\n' if resolution else ""
    config.write_text(
        f'[general]\nstatus_path = "{tmp_path / "status"}"\n\n'
        f'[pair both]\na = "files"\nb = "server"\ncollections = [["one", "{name}", "{name}"]]\n{conflict}'
        f'metadata = ["displayname"{", " + chr(34) + "color" + chr(34) if kind == "caldav" else ""}]\n\n'
        f'[storage files]\ntype = "filesystem"\npath = "{local}"\nfileext = "{suffix}"\n\n'
        f'[storage server]\ntype = "{kind}"\nurl = "{target.sync_url}/"\n'
        f'username = "{target.login}"\npassword = "{target.password}"\n'
    )
    return config


@pytest.fixture(params=["caldav", "carddav"])
def pair(request: pytest.FixtureRequest, target: Target, sync: Client, tmp_path: Path) -> Iterator[Pair]:
    collection = make_calendar(sync) if request.param == "caldav" else make_book(sync)
    name = collection.path.rstrip("/").rpartition("/")[2]
    made = Pair(
        tmp_path / "local" / name,
        collection,
        configure(target, tmp_path, request.param, name, None),
        ".ics" if request.param == "caldav" else ".vcf",
    )
    said = made.run("discover")
    assert made.folder.is_dir(), said
    yield made
    sync.request("DELETE", collection.path)


def test_new_items_of_both_sides_reach_the_other(pair: Pair) -> None:
    pair.put_local("local-1", "from the folder")
    pair.put_remote("remote-1", "from the server \U0001f600")
    pair.sync()
    pair.assert_both_hold("from the folder", "from the server \U0001f600")


def test_a_second_sync_changes_nothing(pair: Pair) -> None:
    for number in range(5):
        pair.put_local(f"local-{number}", f"local {number}")
        pair.put_remote(f"remote-{number}", f"remote {number}")
    pair.sync()
    before = (pair.local(), pair.remote(), pair.collection.sync().sync_token)
    said = pair.sync()
    assert not [line for line in said.splitlines() if "Copying" in line or "Deleting" in line], said
    assert (pair.local(), pair.remote(), pair.collection.sync().sync_token) == before


def test_the_server_keeps_the_bytes_of_the_folder(pair: Pair) -> None:
    pair.put_local("exact", "bytes, as \\; they are")
    pair.sync()
    assert list(pair.remote().values()) == [pair.content("exact", "bytes, as \\; they are")]


def test_changes_and_deletions_go_both_ways(pair: Pair) -> None:
    for uid in ("changed-here", "changed-there", "deleted-here", "deleted-there", "kept"):
        pair.put_local(uid, uid)
    pair.sync()
    pair.assert_both_hold("changed-here", "changed-there", "deleted-here", "deleted-there", "kept")
    pair.put_local("changed-here", "new words of the folder")
    pair.put_remote("changed-there", "new words of the server")
    (pair.folder / f"deleted-here{pair.suffix}").unlink()
    pair.delete_remote("deleted-there")
    pair.sync()
    pair.assert_both_hold("new words of the folder", "new words of the server", "kept")


def test_a_conflict_without_a_rule_is_an_error_and_loses_nothing(pair: Pair) -> None:
    pair.put_local("both", "first")
    pair.sync()
    pair.put_local("both", "changed in the folder")
    pair.put_remote("both", "changed on the server")
    said = pair.sync(status=1)
    assert "conflict" in said.lower(), said
    assert "changed in the folder" in "".join(pair.local().values())
    assert "changed on the server" in "".join(pair.remote().values())


@pytest.mark.parametrize(
    ("rule", "winner"), [("a wins", "changed in the folder"), ("b wins", "changed on the server")]
)
def test_a_conflict_ends_as_the_rule_says(pair: Pair, rule: str, winner: str) -> None:
    pair.put_local("both", "first")
    pair.sync()
    pair.put_local("both", "changed in the folder")
    pair.put_remote("both", "changed on the server")
    with_rule = pair.config.read_text().replace(
        "[storage files]", f'conflict_resolution = "{rule}"\n[storage files]'
    )
    pair.config.write_text(with_rule)
    pair.run("discover")
    pair.sync()
    pair.assert_both_hold(winner)


def test_names_and_colours_travel(pair: Pair) -> None:
    pair.collection.client.proppatch(
        pair.collection.path, "<D:displayname>Ferien &amp; Reisen \U0001f600</D:displayname>"
    )
    pair.run("metasync")
    assert (pair.folder / "displayname").read_text() == "Ferien & Reisen \U0001f600"
    (pair.folder / "displayname").write_text("Vacances")
    pair.run("metasync")
    (row,) = pair.collection.client.propfind(pair.collection.path, "D:displayname")
    assert row.text("{DAV:}displayname") == "Vacances"


@pytest.mark.parametrize("kind", ["caldav", "carddav"])
def test_discover_creates_a_missing_collection_on_the_server(
    target: Target, tmp_path: Path, kind: str
) -> None:
    name = f"made-{uuid.uuid4().hex[:8]}"
    config = configure(target, tmp_path, kind, name, None)
    folder = tmp_path / "local" / name
    folder.mkdir(parents=True)
    suffix = ".ics" if kind == "caldav" else ".vcf"
    (folder / f"one{suffix}").write_bytes((event if kind == "caldav" else card)("one", "one").encode())
    for words in (("discover",), ("sync",)):
        done = subprocess.run(
            [str(CLIENTS / "vdirsyncer"), "-c", str(config), *words],
            input=b"y\n" * 20,
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace")
    client = target.sync()
    path = f"{home(client, 'calendar' if kind == 'caldav' else 'addressbook')}{name}/"
    assert len(client.members(path)) == 1
    client.request("DELETE", path)
