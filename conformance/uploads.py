"""Uploads that are cut, too large or raced: the version before is intact, nothing of the attempt is left."""

from __future__ import annotations

import random
import socket
import time
import uuid
from urllib.parse import urlsplit

import pytest

from conformance.client import Client, read_answer, status_of
from conformance.conftest import Collection
from conformance.target import Target

MIB = 1024 * 1024
CUTS = 100  # of each form
SIZE = 400_000
OLD = b"the old version " * 1000


def chunked(content: bytes, size: int = 60_000) -> bytes:
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def cut(client: Client, path: str, body: bytes, fields: list[str], at: int, ending: str) -> None:
    """Send the head and the first `at` bytes of the body, then go away."""
    base = urlsplit(client.base)
    with socket.create_connection((base.hostname or "", base.port or 80), timeout=10) as connection:
        connection.sendall(client.head("PUT", path, *fields) + b"\r\n" + body[:at])
        if ending == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        elif ending == "half-closed":
            connection.shutdown(socket.SHUT_WR)
            read_answer(connection)


@pytest.mark.parametrize("form", ["declared", "chunked"])
def test_cut_uploads_keep_the_previous_version_and_leave_nothing(folder: Collection, form: str) -> None:
    chance = random.Random(4918)
    content = bytes(chance.randbytes(SIZE))
    body = content if form == "declared" else chunked(content)
    fields = [f"Content-Length: {SIZE}"] if form == "declared" else ["Transfer-Encoding: chunked"]
    etag = folder.client.request("PUT", folder / "old", OLD).etag
    (before,) = folder.client.propfind(folder.path, "D:quota-used-bytes")
    last = len(body) - 1
    points = [0, 1, last, last - 4, *(chance.randrange(last) for _ in range(CUTS - 4))]
    for turn, at in enumerate(points):
        ending = ("closed", "reset", "half-closed")[turn % 3]
        cut(folder.client, folder / ("old" if turn % 2 else "new"), body, fields, at, ending)
        if turn % 10 == 9:
            answer = folder.client.request("GET", folder / "old")
            assert (answer.body == OLD, answer.etag) == (True, etag), (turn, at, ending)
            assert folder.members() == {"old"}, (turn, at, ending)
    answer = folder.client.request("GET", folder / "old")
    assert (answer.body == OLD, answer.etag) == (True, etag)
    assert folder.members() == {"old"}
    (after,) = folder.client.propfind(folder.path, "D:quota-used-bytes")
    assert after.text("{DAV:}quota-used-bytes") == before.text("{DAV:}quota-used-bytes")
    assert folder.client.request("PUT", folder / "old", content).status == 204
    assert folder.client.request("GET", folder / "old").body == content


def test_nobody_sees_an_upload_before_its_end(folder: Collection) -> None:
    folder.client.request("PUT", folder / "old", OLD)
    base = urlsplit(folder.client.base)
    for name, known in (("old", OLD), ("new", None)):
        with socket.create_connection((base.hostname or "", base.port or 80), timeout=10) as connection:
            head = folder.client.head("PUT", folder / name, "Content-Length: 100000")
            connection.sendall(head + b"\r\n" + b"n" * 90_000)
            answer = folder.client.request("GET", folder / name)
            assert answer.status == (200 if known else 404)
            assert known is None or answer.body == known
            assert ("new" in folder.members()) is False
            connection.sendall(b"n" * 10_000)
            assert status_of(read_answer(connection)) in (201, 204)
        assert folder.client.request("GET", folder / name).body == b"n" * 100_000


def test_the_last_finished_of_two_uploads_wins_whole(folder: Collection) -> None:
    base = urlsplit(folder.client.base)
    place = (base.hostname or "", base.port or 80)
    with (
        socket.create_connection(place, timeout=10) as slow,
        socket.create_connection(place, timeout=10) as quick,
    ):
        head = folder.client.head("PUT", folder / "file", "Content-Length: 50000") + b"\r\n"
        slow.sendall(head + b"s" * 20_000)
        quick.sendall(head + b"q" * 50_000)
        assert status_of(read_answer(quick)) == 201
        assert folder.client.request("GET", folder / "file").body == b"q" * 50_000
        slow.sendall(b"s" * 30_000)
        assert status_of(read_answer(slow)) in (201, 204)
    assert folder.client.request("GET", folder / "file").body == b"s" * 50_000


def test_an_upload_into_a_folder_that_is_deleted_meanwhile_is_409(folder: Collection) -> None:
    base = urlsplit(folder.client.base)
    folder.client.request("MKCOL", folder / "short/")
    with socket.create_connection((base.hostname or "", base.port or 80), timeout=10) as connection:
        connection.sendall(
            folder.client.head("PUT", folder / "short/file", "Content-Length: 100000") + b"\r\n" + b"x"
        )
        while folder.client.request("DELETE", folder / "short/").status == 423:
            time.sleep(0.05)
        connection.sendall(b"x" * 99_999)
        assert status_of(read_answer(connection)) == 409
    assert folder.members() == set()


def test_a_declared_length_of_zero_and_an_empty_chunked_body_make_empty_files(folder: Collection) -> None:
    for name, body in (("declared", b""), ("chunked", iter([]))):
        assert folder.client.request("PUT", folder / name, body).status == 201
        answer = folder.client.request("GET", folder / name)
        assert (answer.status, answer.body, answer.header("Content-Length")) == (200, b"", "0")


def test_large_files_of_both_forms_come_back_whole(folder: Collection) -> None:
    piece = random.Random(1).randbytes(MIB)
    whole = piece * 70
    assert folder.client.request("PUT", folder / "chunked", iter([piece] * 70)).status == 201
    assert folder.client.request("PUT", folder / "declared", whole).status == 201
    for name in ("chunked", "declared"):
        answer = folder.client.request("GET", folder / name)
        assert answer.body == whole
        assert (
            folder.client.request("GET", folder / name, None, {"Range": "bytes=67108860-67108870"}).body
            == (whole[67108860:67108871])
        )


@pytest.mark.demo
@pytest.mark.parametrize(("form", "limit"), [("declared", 64 * MIB), ("chunked", 32 * MIB)])
def test_the_limit_is_exact_to_the_byte(target: Target, form: str, limit: int) -> None:
    dave = target.account("dave")
    client = Client(dave["drives"][0]["url"], dave["login"], dave["password"], timeout=60)
    name = f"limit-{uuid.uuid4().hex[:12]}"
    try:
        for size, expected in ((limit + 1, 413), (limit, 201), (limit + 1, 413)):
            content = bytes(MIB) * (size // MIB) + bytes(size % MIB)
            pieces = iter([content[start : start + MIB] for start in range(0, size, MIB)])
            try:
                answer = client.request("PUT", name, content if form == "declared" else pieces)
            finally:
                client.close()
            assert answer.status == expected, (size, answer.status)
        assert client.request("HEAD", name).header("Content-Length") == str(limit)
    finally:
        client.request("DELETE", name)
        client.close()


@pytest.mark.demo
def test_a_declared_length_over_the_limit_is_refused_before_the_first_byte(target: Target) -> None:
    dave = target.account("dave")
    client = Client(dave["drives"][0]["url"], dave["login"], dave["password"])
    head = client.head("PUT", "never", f"Content-Length: {64 * MIB + 1}", "Expect: 100-continue")
    started = time.monotonic()
    answer = client.raw(head + b"\r\n", timeout=3)
    assert answer.startswith(b"HTTP/1.1 413"), answer[:200]
    assert time.monotonic() - started < 0.5
