"""rclone as its users run it, vendors `other` and `owncloud`, FUSE mount included."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import unicodedata
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conformance.client import Client, escaped
from conformance.names import NASTY_NAMES
from conformance.peers import CLIENTS
from conformance.target import Target

MIB = 1024 * 1024
VENDORS = ("other", "owncloud")
NAMES = tuple(name for name in NASTY_NAMES if len(name.encode()) < 255 and name != "...")


@dataclass(frozen=True, slots=True)
class Rclone:
    """rclone with one configured remote, `drive:`."""

    config: Path
    vendor: str

    def __call__(
        self, *words: str, status: int | None = 0, stdin: bytes = b"", timeout: float = 120
    ) -> bytes:
        """Run and return standard output; `status` None accepts any exit code."""
        done = self.run(words, stdin=stdin, timeout=timeout)
        said = done.stderr.decode(errors="replace")[-4000:]
        assert status is None or done.returncode == status, (
            f"rclone {' '.join(words)}: {done.returncode}\n{said}"
        )
        return done.stdout

    def command(self, *words: str) -> list[str]:
        return [str(CLIENTS / "rclone"), "--config", str(self.config), *words]

    def run(
        self, words: Sequence[str], *, stdin: bytes = b"", timeout: float = 120
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.command(*words), input=stdin, capture_output=True, timeout=timeout, check=False
        )

    def stats(self, *words: str) -> dict[str, Any]:
        """Run a transfer and return the last statistics of its JSON log."""
        done = self.run([*words, "--use-json-log", "--stats", "1h", "--stats-log-level", "NOTICE", "-v"])
        said = done.stderr.decode(errors="replace")
        assert done.returncode == 0, said[-4000:]
        found = [json.loads(line)["stats"] for line in said.splitlines() if '"stats":' in line]
        assert found, said[-4000:]
        last: dict[str, Any] = found[-1]
        return last


def configured(folder: Path, vendor: str, url: str, login: str, password: str) -> Rclone:
    secret = subprocess.run(
        [str(CLIENTS / "rclone"), "obscure", "-"], input=password.encode(), capture_output=True, check=True
    )
    config = folder / f"rclone-{uuid.uuid4().hex}.conf"
    config.write_text(
        f"[drive]\ntype = webdav\nurl = {url}\nvendor = {vendor}\nuser = {login}\n"
        f"pass = {secret.stdout.decode().strip()}\npacer_min_sleep = 0\n"
    )
    return Rclone(config, vendor)


@pytest.fixture(params=VENDORS)
def rclone(request: pytest.FixtureRequest, target: Target, tmp_path: Path) -> Rclone:
    assert (CLIENTS / "rclone").exists(), "rclone is not installed (requirements/conformance.txt)"
    return configured(tmp_path, request.param, f"{target.drive_url}/", target.login, target.password)


@pytest.fixture
def room(rclone: Rclone) -> Iterator[str]:
    """A remote folder of this check alone."""
    path = f"drive:rclone-{uuid.uuid4().hex[:12]}"
    rclone("mkdir", path)
    yield path
    rclone("purge", path, status=None)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A local tree: nasty names, an empty file, an empty folder, 3 MB, old modification times."""
    root = tmp_path / "files"
    (root / "sub folder" / "deeper").mkdir(parents=True)
    (root / "empty folder").mkdir()
    for number, name in enumerate(NAMES):
        (root / name).write_bytes(f"content of {name}".encode())
        os.utime(root / name, (1_500_000_000 + number, 1_500_000_000 + number))
    (root / "sub folder" / "deeper" / "three megabytes").write_bytes(os.urandom(3 * MIB))
    (root / "sub folder" / "empty").write_bytes(b"")
    os.utime(root / "sub folder" / "empty", (1_400_000_000, 1_400_000_000))
    return root


def composed(name: object) -> str:
    """A name as rclone compares names: the drive says them in their composed form."""
    return unicodedata.normalize("NFC", str(name))


def check(rclone: Rclone, local: Path, remote: str) -> None:
    """`rclone check`: by content for `other`, by the server's hashes for `owncloud`."""
    done = rclone.run(["check", str(local), remote, *(["--download"] if rclone.vendor == "other" else [])])
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, said
    assert "0 differences found" in said, said
    assert "hashes could not be checked" not in said, said


def test_copy_then_check_then_list(rclone: Rclone, room: str, files: Path) -> None:
    rclone("copy", str(files), room, "--create-empty-src-dirs")
    check(rclone, files, room)
    listed = json.loads(rclone("lsjson", "-R", room))
    assert {composed(entry["Path"]) for entry in listed} == {
        composed(p.relative_to(files)) for p in files.rglob("*")
    }
    sizes = {composed(entry["Path"]): entry["Size"] for entry in listed if not entry["IsDir"]}
    assert sizes == {
        composed(p.relative_to(files)): p.stat().st_size for p in files.rglob("*") if p.is_file()
    }


def test_copy_twice_transfers_nothing_the_second_time(rclone: Rclone, room: str, files: Path) -> None:
    first = rclone.stats("copy", str(files), room)
    second = rclone.stats("copy", str(files), room)
    assert first["transfers"] == len(NAMES) + 2
    assert (second["transfers"], second["bytes"], second["errors"]) == (0, 0, 0)


def test_copy_twice_to_the_bare_drive_url_transfers_nothing_the_second_time(
    rclone: Rclone, files: Path, target: Target
) -> None:
    top = files / f"bare-{uuid.uuid4().hex[:12]}"
    (files / "sub folder").rename(top)
    try:
        first = rclone.stats(
            "copy", str(files), "drive:", "--include", f"/{top.name}/**", "--include", "/with space"
        )
        second = rclone.stats(
            "copy", str(files), "drive:", "--include", f"/{top.name}/**", "--include", "/with space"
        )
        assert (first["transfers"], first["errors"]) == (3, 0)
        assert (second["transfers"], second["bytes"], second["errors"]) == (0, 0, 0)
    finally:
        rclone("purge", f"drive:{top.name}", status=None)
        rclone("deletefile", "drive:with space", status=None)


def test_sync_removes_what_is_gone_and_sends_what_changed(rclone: Rclone, room: str, files: Path) -> None:
    rclone("sync", str(files), room)
    (files / "with space").unlink()
    (files / "plus+sign").write_bytes(b"another content and another size")
    (files / "fresh").write_bytes(b"fresh")
    counted = rclone.stats("sync", str(files), room)
    assert (counted["transfers"], counted["deletes"], counted["errors"]) == (2, 1, 0)
    check(rclone, files, room)
    assert rclone.stats("sync", str(files), room)["transfers"] == 0


def test_download_gives_the_same_bytes(rclone: Rclone, room: str, files: Path, tmp_path: Path) -> None:
    rclone("copy", str(files), room)
    rclone("copy", room, str(tmp_path / "back"))
    local = {composed(p.relative_to(files)): p.read_bytes() for p in files.rglob("*") if p.is_file()}
    back = tmp_path / "back"
    assert {composed(p.relative_to(back)): p.read_bytes() for p in back.rglob("*") if p.is_file()} == local


def test_rcat_then_cat(rclone: Rclone, room: str) -> None:
    for size in (0, 1, 200_000, 5 * MIB):
        content = os.urandom(size)
        rclone("rcat", f"{room}/streamed", stdin=content)
        assert rclone("cat", f"{room}/streamed") == content
    assert (
        rclone("cat", f"{room}/streamed", "--offset", "1000000", "--count", "16")
        == content[1_000_000:1_000_016]
    )


def test_moveto_renames_files_and_folders(rclone: Rclone, room: str) -> None:
    rclone("rcat", f"{room}/a/one", stdin=b"one")
    rclone("moveto", f"{room}/a/one", f"{room}/a/tw\u00f6?")
    rclone("moveto", f"{room}/a", f"{room}/b")
    assert rclone("cat", f"{room}/b/tw\u00f6?") == b"one"
    assert json.loads(rclone("lsjson", room))[0]["Name"] == "b"
    assert len(json.loads(rclone("lsjson", room))) == 1


def test_server_side_copy(rclone: Rclone, room: str) -> None:
    rclone("rcat", f"{room}/one", stdin=b"one")
    rclone("copyto", f"{room}/one", f"{room}/deep/er/copy")
    assert rclone("cat", f"{room}/deep/er/copy") == rclone("cat", f"{room}/one") == b"one"


def test_owncloud_keeps_modification_times_and_hashes(target: Target, tmp_path: Path) -> None:
    rclone = configured(tmp_path, "owncloud", f"{target.drive_url}/", target.login, target.password)
    path = f"drive:times-{uuid.uuid4().hex[:12]}"
    source = tmp_path / "dated"
    source.write_bytes(b"dated")
    os.utime(source, (1_234_567_890, 1_234_567_890))
    try:
        rclone("copyto", str(source), f"{path}/dated")
        (entry,) = json.loads(rclone("lsjson", "--hash", path))
        assert entry["ModTime"].startswith("2009-02-13T23:31:30")
        expected = rclone("hashsum", "sha1", str(source)).split()[0].decode()
        assert entry["Hashes"]["sha1"] == expected
        rclone("touch", f"{path}/dated", "--timestamp", "2001-02-03T04:05:06", status=None)
    finally:
        rclone("purge", path, status=None)


@pytest.mark.demo
def test_purge_puts_the_folder_into_the_deleted_items(rclone: Rclone, room: str, target: Target) -> None:
    name = f"doomed-{uuid.uuid4().hex[:12]}"
    rclone("rcat", f"{room}/{name}/kept", stdin=b"kept")
    rclone("purge", f"{room}/{name}")
    assert f"{name}/kept" in trash_of(target.drive())


def trash_of(client: Client, path: str = "Deleted%20items/") -> set[str]:
    """Everything in the deleted-items folder, as paths below it."""
    found: set[str] = set()
    for name in client.members(path):
        found.add(name)
        below = f"{path}{escaped(name)}/"
        (row,) = client.propfind(below.rstrip("/"), "D:resourcetype")
        if len(row.properties["{DAV:}resourcetype"]):
            found |= {f"{name}/{member}" for member in client.members(below)}
    return found


@pytest.fixture
def mounted(rclone: Rclone, room: str, tmp_path: Path) -> Iterator[Path]:
    """The remote folder, mounted as its makers publish it."""
    assert Path("/dev/fuse").is_char_device(), "no /dev/fuse: a drive cannot be mounted on this machine"
    assert shutil.which("fusermount3"), "fusermount3 is not installed (Debian: apt install fuse3)"
    point = tmp_path / "mounted"
    point.mkdir()
    log = tmp_path / "mount.log"
    command = rclone.command("mount", room, str(point))
    command += [
        "--vfs-cache-mode",
        "full",
        "--daemon",
        "--allow-other",
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    command += ["--vfs-write-back", "0s", "--dir-cache-time", "1s", "--log-file", str(log)]
    # Not captured: the daemon keeps the pipes of its parent open.
    subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60, check=True)
    try:
        assert os.path.ismount(point), log.read_text()
        yield point
    finally:
        subprocess.run(["fusermount3", "-uz", str(point)], check=True)


def wait_for(reached: Any, what: str, seconds: float = 20) -> None:
    """Look until `reached()` is true: a mount writes back when it likes."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not after {seconds:.0f} s: {what}"
        time.sleep(0.1)


def test_mount_reads_and_writes(rclone: Rclone, room: str, mounted: Path) -> None:
    content = os.urandom(2 * MIB)
    rclone("rcat", f"{room}/from elsewhere", stdin=content)
    wait_for((mounted / "from elsewhere").exists, "the mount shows what another client stored")
    assert (mounted / "from elsewhere").read_bytes() == content
    (mounted / "folder").mkdir()
    (mounted / "folder" / "written").write_bytes(content[:MIB])
    wait_for(
        lambda: rclone("cat", f"{room}/folder/written", status=None) == content[:MIB],
        "another client sees the write",
    )
    with (mounted / "folder" / "written").open("r+b") as file:
        file.seek(10)
        file.write(b"changed in place")
    changed = content[:10] + b"changed in place" + content[26:MIB]
    wait_for(
        lambda: rclone("cat", f"{room}/folder/written", status=None) == changed,
        "another client sees the change",
    )
    (mounted / "folder" / "written").rename(mounted / "renamed")
    wait_for(
        lambda: rclone("cat", f"{room}/renamed", status=None) == changed, "another client sees the new name"
    )
    (mounted / "renamed").unlink()
    wait_for(lambda: b"renamed" not in rclone("lsf", room), "another client sees the removal")


@pytest.mark.demo
@pytest.mark.parametrize("form", ["declared", "chunked"])
def test_over_the_limit_rclone_shows_413_and_the_old_file_is_in_the_deleted_items(
    target: Target, tmp_path: Path, form: str
) -> None:
    """rclone DELETEs its target after a refused upload: the version before must then be in the trash."""
    dave = target.account("dave")
    url = dave["drives"][0]["url"]
    vendor = "other" if form == "declared" else "owncloud"  # the others do not stream what has no length
    rclone = configured(tmp_path, vendor, url, dave["login"], dave["password"])
    client = Client(url, dave["login"], dave["password"])
    name = f"over-{uuid.uuid4().hex[:12]}"
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate((64 if form == "declared" else 32) * MIB + 1)
    rclone("rcat", f"drive:{name}", stdin=b"the old version")
    if form == "declared":
        done = rclone.run(["copyto", str(large), f"drive:{name}", "--retries", "1", "-vv", "--ignore-times"])
    else:
        with large.open("rb") as file:
            done = subprocess.run(
                [*rclone.command("rcat", f"drive:{name}"), "--retries", "1", "-vv"],
                stdin=file,
                capture_output=True,
                timeout=120,
                check=False,
            )
    said = done.stderr.decode(errors="replace")
    assert done.returncode != 0
    assert "413" in said, said[-3000:]
    answer = client.request("GET", name)
    if answer.status == 404:
        (kept,) = [entry for entry in client.members("Deleted%20items/") if entry.startswith(name)]
        answer = client.request("GET", f"Deleted%20items/{escaped(kept)}")
    assert (answer.status, answer.body) == (200, b"the old version")


@pytest.mark.demo
@pytest.mark.parametrize("program", ["curl", "rclone"])
@pytest.mark.parametrize("form", ["declared", "chunked"])
def test_over_the_limit_413_is_seen_twenty_times_of_twenty(
    target: Target, tmp_path: Path, form: str, program: str
) -> None:
    dave = target.account("dave")
    url = dave["drives"][0]["url"]
    vendor = "other" if form == "declared" else "owncloud"
    rclone = configured(tmp_path, vendor, url, dave["login"], dave["password"])
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate((64 if form == "declared" else 32) * MIB + 1)
    netrc = tmp_path / "netrc"
    netrc.write_text(f'machine 127.0.0.1 login "{dave["login"]}" password "{dave["password"]}"\n')
    seen = []
    for turn in range(20):
        name = f"never-{turn}"
        if program == "curl":
            command = [
                "curl",
                "-sS",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                "--netrc-file",
                str(netrc),
                "-T",
            ]
            command += [str(large)] if form == "declared" else ["-"]
            command += [] if turn % 2 else ["-H", "Expect:"]
            command += [f"{url.rstrip('/')}/{name}"]
        else:
            command = [
                str(CLIENTS / "rclone"),
                "--config",
                str(rclone.config),
                "--retries",
                "1",
                "--low-level-retries",
            ]
            command += [
                "1",
                "-v",
                *(["copyto", str(large)] if form == "declared" else ["rcat"]),
                f"drive:{name}",
            ]
        with large.open("rb") as file:
            done = subprocess.run(command, stdin=file, capture_output=True, timeout=60, check=False)
        seen.append(b"413" in (done.stdout if program == "curl" else done.stderr))
        assert seen[-1], (turn, done.stdout[-500:], done.stderr.decode(errors="replace")[-2000:])
    client = Client(url, dave["login"], dave["password"])
    assert len(seen) == 20
    assert not {name for name in client.members("") if name.startswith("never-")}
