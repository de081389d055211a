"""Bytes on S3 end to end, with real processes; `verify` and `scrub` beside the running server."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from conformance.client import Client, status_of
from conformance.faults import Faults, faults
from conformance.servers import REPOSITORY, S3, Demo, demo
from conformance.target import Target
from ksync_server import settings
from ksync_server.store.s3 import S3Extents

EXTENT = 65536
LARGE = random.Random(4918).randbytes(5 * EXTENT + 777)


@dataclass(frozen=True, slots=True)
class OnS3:
    """A demo whose bytes are in a bucket behind a proxy that can fail."""

    demo: Demo
    server: S3
    bucket: str
    between: Faults
    arguments: tuple[str, ...]

    @property
    def drive(self) -> Client:
        return Target.from_ready(self.demo.ready).drive()

    def admin(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"{self.demo.ready['admin_url']}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def settings(self) -> settings.S3:
        given = self.server.settings(self.bucket, self.demo.data.parent)
        path = Path(given.pop("credentials_file"))
        return settings.S3(**given, credentials_file=path, prefix="store/one")  # type: ignore[arg-type]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        options = [word for setting in self.arguments for word in ("--set", setting)]
        return run("--config", str(self.demo.data / "ksync.toml"), *options, *words)

    def verify(self, *words: str, code: int = 0) -> Any:
        done = self.run("verify", "--json", *words)
        assert done.returncode == code, (done.stdout, done.stderr)
        return json.loads(done.stdout)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ksync_server.cli", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
    )


@pytest.fixture(scope="module")
def on_s3(s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnS3]:
    folder = tmp_path_factory.mktemp("s3")
    bucket = s3_server.create()
    with faults(s3_server.endpoint) as between:
        given = {**s3_server.settings(bucket, folder), "endpoint": between.endpoint}
        given |= {"extent_bytes": str(EXTENT), "patience_s": "1.0", "prefix": "store/one"}
        arguments = tuple(f"s3.{key}={value}" for key, value in given.items())
        with demo(folder / "data", settings=["server.workers=1", *arguments]) as running:
            yield OnS3(running, s3_server, bucket, between, arguments)


@pytest.fixture(autouse=True)
def no_faults(on_s3: OnS3) -> None:
    on_s3.between.plan = lambda method, path: "pass"


def test_what_was_put_is_what_is_got_in_whole_and_in_ranges(on_s3: OnS3) -> None:
    drive = on_s3.drive
    made = drive.request("PUT", "a.bin", LARGE)
    assert made.status == 201
    assert not list((on_s3.demo.data / "blobs").rglob("*"))
    got = drive.request("GET", "a.bin")
    assert (got.status, hashlib.sha256(got.body).digest()) == (200, hashlib.sha256(LARGE).digest())
    for start, end in ((0, 0), (EXTENT - 1, EXTENT), (10, 3 * EXTENT), (len(LARGE) - 5, len(LARGE) - 1)):
        got = drive.request("GET", "a.bin", headers={"Range": f"bytes={start}-{end}"})
        assert (got.status, got.body) == (206, LARGE[start : end + 1])


def test_a_copy_shares_the_objects_and_versions_have_their_own(on_s3: OnS3) -> None:
    drive = on_s3.drive
    assert drive.request("PUT", "v", LARGE).status == 201
    before = on_s3.server.keys(on_s3.bucket)
    destination = {"Destination": drive.url("copy-of-v")}
    assert drive.request("COPY", "v", headers=destination).status == 201
    assert on_s3.server.keys(on_s3.bucket) == before
    newer = LARGE[::-1]
    assert drive.request("PUT", "v", newer).status == 204
    assert len(on_s3.server.keys(on_s3.bucket)) == len(before) + 6
    assert drive.request("GET", "v").body == newer
    assert drive.request("GET", "copy-of-v").body == LARGE
    assert drive.request("DELETE", "v").status == 204
    assert drive.request("GET", "copy-of-v").body == LARGE


def test_a_cut_upload_leaves_the_version_before_and_no_object(on_s3: OnS3) -> None:
    drive = on_s3.drive
    assert drive.request("PUT", "old", b"the version before " * 1000).status == 201
    before = on_s3.server.keys(on_s3.bucket)
    base = urlsplit(drive.base)
    for cut in (20_000, EXTENT, 3 * EXTENT + 5, len(LARGE) - 1):
        for path in ("old", "new"):
            with socket.create_connection((base.hostname or "", base.port or 80), timeout=10) as connection:
                head = drive.head("PUT", path, f"Content-Length: {len(LARGE)}")
                connection.sendall(head + b"\r\n" + LARGE[:cut])
    deadline = time.monotonic() + 30
    while (now := on_s3.server.keys(on_s3.bucket)) != before and time.monotonic() < deadline:
        drive.request("OPTIONS", "")
    assert now == before
    assert drive.request("GET", "old").body == b"the version before " * 1000
    assert drive.request("GET", "new").status == 404


def test_a_store_that_is_away_means_try_again_and_no_harm(on_s3: OnS3) -> None:
    drive = on_s3.drive
    assert drive.request("PUT", "kept", LARGE).status == 201
    assert on_s3.admin("readyz") == (200, "ready\n")
    on_s3.between.plan = lambda method, path: 503
    for method, path, body in (("PUT", "kept", LARGE[:-1]), ("PUT", "fresh", LARGE), ("GET", "kept", b"")):
        answer = drive.request(method, path, body)
        assert (answer.status, answer.header("Retry-After")) == (503, "10"), (method, path)
    assert drive.request("PUT", "small", b"rows need no S3").status == 201
    assert {"kept", "small"} <= drive.members()
    status, text = on_s3.admin("readyz")
    assert (status, "s3.bucket" in text, "SlowDown" in text) == (503, True, True)
    on_s3.between.plan = lambda method, path: "pass"
    assert on_s3.admin("readyz") == (200, "ready\n")
    assert drive.request("GET", "kept").body == LARGE
    assert drive.request("GET", "fresh").status == 404
    assert on_s3.verify()["findings"] == []


def test_one_request_in_ten_failing_is_not_felt(on_s3: OnS3) -> None:
    drive = on_s3.drive
    chance = random.Random(503)
    on_s3.between.plan = lambda method, path: (
        chance.choice((500, 503, "lost")) if chance.random() < 0.1 else "pass"
    )
    for number in range(15):
        content = LARGE[number * 1000 :]
        assert drive.request("PUT", "rough", content).status in (201, 204)
        assert drive.request("GET", "rough").body == content


def test_a_lost_object_breaks_the_download_off_and_is_told_everywhere(on_s3: OnS3) -> None:
    drive = on_s3.drive
    before = set(on_s3.server.keys(on_s3.bucket))
    assert drive.request("PUT", "hurt", LARGE).status == 201
    lost = min(set(on_s3.server.keys(on_s3.bucket)) - before)
    extents = S3Extents(on_s3.settings())
    key = lost.rpartition("/")[2]
    content = b"".join(extents.read(key, 0, extents.size(key) or 0, EXTENT))
    extents.erase([key])
    broken = drive.raw(drive.head("GET", "hurt", "Connection: close") + b"\r\n", timeout=30)
    assert len(broken) < len(LARGE)
    assert status_of(broken) in (200, 503)
    found = on_s3.verify("--repair", code=1)["findings"]
    assert {each["check"] for each in found} == {"extents", "damaged"}
    scrubbed = on_s3.run("scrub", "--all", "--json")
    assert scrubbed.returncode == 1
    assert len(json.loads(scrubbed.stdout)["damaged"]) == 1
    extents.put(key, content)  # as a backup brings it back
    assert on_s3.verify("--deep")["findings"] == []
    assert drive.request("GET", "hurt").body == LARGE


def test_the_admin_address_tells_what_is_stored(on_s3: OnS3) -> None:
    assert on_s3.drive.request("PUT", "measured", LARGE).status == 201
    deadline = time.monotonic() + 30
    while "ksync_blobs " not in (text := on_s3.admin("metrics")[1]) and time.monotonic() < deadline:
        on_s3.drive.request("OPTIONS", "")
    for name in ("ksync_blob_bytes", "ksync_blobs_damaged", "ksync_extents_garbage"):
        assert f"\n{name} " in text


def test_settings_that_do_not_work_are_said_before_anything_serves(on_s3: OnS3) -> None:
    config = str(on_s3.demo.data / "ksync.toml")
    good = [word for setting in on_s3.arguments for word in ("--set", setting)]
    assert run("check-config", "--config", config, *good).stdout.startswith(
        "The configuration can be used.\n"
    )
    for wrong, word in (
        ("s3.bucket=no-such-bucket", "NoSuchBucket"),
        ("s3.endpoint=http://127.0.0.1:9", "error sending request"),
        ("s3.credentials_file=none.ini", "s3.credentials_file"),
    ):
        for command in ("check-config", "serve"):
            done = run(command, "--config", config, *good, "--set", wrong)
            assert (done.returncode, word in done.stderr) == (1, True), (command, done.stderr)
            assert "of the tests alone" not in done.stderr
            assert "Traceback" not in done.stderr


def test_verify_says_in_sentences_what_is_wrong_and_ends_with_one(on_s3: OnS3) -> None:
    with sqlite3.connect(on_s3.demo.data / "ksync.db", timeout=10) as rows:
        rows.execute("UPDATE drive SET used_bytes = used_bytes + 1 WHERE id = 1")
    rows.close()
    done = on_s3.run("verify")
    assert done.returncode == 1
    assert "drive-use: drive 1 counts " in done.stdout
    assert "verify --repair" in done.stdout
    done = on_s3.run("verify", "--repair")
    assert done.returncode == 0
    assert "(repaired)" in done.stdout
    assert on_s3.run("verify").returncode == 0
