"""Bytes of files through the site: GET, HEAD, PUT."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
import re
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from ksync_server.drive import transfer
from ksync_server.errors import BodyTooLarge, ClientError, ClientGone, Unavailable
from ksync_server.http import Headers
from ksync_server.store import tables as t
from tests.drive.harness import GONE, Client, Drive, closing, take, whole

MIB = 1024 * 1024
LARGE = bytes(range(256)) * 4096 + b"tail"  # 1 MiB and a bit: extents on disk


def extents_on_disk(drive: Drive) -> list[Path]:
    return [path for path in drive.settings.blobs.path.rglob("*") if path.is_file()]


def rows(drive: Drive, table: sa.Table) -> int:
    with drive.database.read() as tx:
        return int(tx.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def pieces_of(content: bytes, size: int) -> list[object]:
    return [content[start : start + size] for start in range(0, len(content), size)]


# -- PUT ------------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 9110 §9.3.4")
@pytest.mark.parametrize("content", [b"", b"small", b"x" * 16384, b"x" * 16385, LARGE])
@pytest.mark.parametrize("chunked", [False, True])
def test_what_was_put_is_what_is_got(client: Client, content: bytes, chunked: bool) -> None:
    made = client.send(
        "PUT", "/a.bin", pieces=pieces_of(content, 65536), length=len(content), chunked=chunked
    )
    assert made.status == 201
    got = client.send("GET", "/a.bin")
    assert (got.status, got.body) == (200, content)
    assert got.headers["content-length"] == str(len(content))
    assert got.headers["etag"] == made.headers["etag"]
    assert made.headers["oc-fileid"] == got.headers["oc-fileid"]
    again = client.send("PUT", "/a.bin", b"new")
    assert again.status == 204
    assert again.headers["etag"] != made.headers["etag"]
    assert client.send("GET", "/a.bin").body == b"new"


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 16384, 300_000, len(LARGE) - 1])
def test_cut_upload_keeps_the_previous_version_and_leaves_nothing(
    client: Client, drive: Drive, cut: int, declared: bool
) -> None:
    client.put("/old", b"previous version")
    etag = client.send("HEAD", "/old").headers["etag"]
    length = len(LARGE) if declared else None
    for path in ("/old", "/new"):
        request = client.request("PUT", path, {}, [*pieces_of(LARGE[:cut], 65536), GONE], length=length)
        with pytest.raises(ClientGone):
            asyncio.run(client.answer(request))
    got = client.send("GET", "/old")
    assert (got.body, got.headers["etag"]) == (b"previous version", etag)
    assert client.send("GET", "/new").status == 404
    assert extents_on_disk(drive) == []
    assert rows(drive, t.stage) == 0
    assert rows(drive, t.blob) == 1


def test_uploads_cut_at_two_hundred_points_leave_nothing(client: Client, drive: Drive) -> None:
    client.put("/old", b"previous version")
    points = random.Random(4918)
    content = LARGE[:400_000]

    async def attempts() -> None:
        for number in range(200):
            cut, size = points.randrange(len(content)), points.choice((1000, 16384, 65536))
            pieces = [*pieces_of(content[:cut], size), GONE]
            path = points.choice(("/old", "/new"))
            length = len(content) if number % 2 else None
            with pytest.raises(ClientGone):
                await client.answer(client.request("PUT", path, {}, pieces, length=length))

    asyncio.run(attempts())
    assert client.send("GET", "/old").body == b"previous version"
    assert client.send("GET", "/new").status == 404
    assert extents_on_disk(drive) == []
    assert rows(drive, t.stage) == 0
    assert rows(drive, t.blob) == 1


def test_a_slow_upload_keeps_its_lease_while_it_waits(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    drive.blobs.settings = msgspec.structs.replace(drive.blobs.settings, stage_lease_s=2.0)
    every = msgspec.structs.replace(drive.settings, blobs=drive.blobs.settings)

    def lease() -> int:
        with drive.database.read() as tx:
            return int(tx.execute(sa.select(t.stage.c.lease_until)).scalar_one())

    renewed = asyncio.Event()
    renew = drive.blobs.renew_stage

    async def wait_for_renewal() -> bytes:
        loop = asyncio.get_running_loop()

        def renewing(stage_id: str) -> None:
            before = lease()
            renew(stage_id)
            assert lease() >= before
            loop.call_soon_threadsafe(renewed.set)

        monkeypatch.setattr(drive.blobs, "renew_stage", renewing)
        await asyncio.wait_for(renewed.wait(), 10)
        return b"end"

    with closing(Client(replace(drive, settings=every))) as client:
        pieces = [*pieces_of(LARGE, 65536), wait_for_renewal]
        request = client.request("PUT", "/a", {}, pieces, length=None)
        assert asyncio.run(client.answer(request)).status == 201
        assert client.send("GET", "/a").body == LARGE + b"end"


def test_a_small_piece_never_overtakes_a_large_one_that_a_thread_still_writes(client: Client) -> None:
    go = threading.Event()
    pool = client.site._transfers._pool = ThreadPoolExecutor(1)
    pool.submit(go.wait)

    async def release() -> bytes:
        go.set()
        return b"end"

    large = bytes(range(256)) * 1024
    request = client.request("PUT", "/a", {}, [large, b"small", release], length=None)
    assert asyncio.run(client.answer(request)).status == 201
    assert client.send("GET", "/a").body == large + b"smallend"


def test_a_body_shorter_than_declared_is_a_cut_upload(client: Client, drive: Drive) -> None:
    request = client.request("PUT", "/a", {}, [b"12345"], length=10)
    with pytest.raises(ClientGone):
        asyncio.run(client.answer(request))
    assert client.send("GET", "/a").status == 404


def test_a_cancelled_upload_leaves_nothing(client: Client, drive: Drive) -> None:
    async def run() -> None:
        waiting = asyncio.Event()

        async def stall() -> bytes:
            waiting.set()
            await asyncio.Event().wait()
            raise AssertionError("never")

        request = client.request("PUT", "/a", {}, [*pieces_of(LARGE, 65536), stall], length=None)
        task = asyncio.create_task(client.answer(request))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert extents_on_disk(drive) == []
    assert rows(drive, t.stage) == 0
    assert client.send("GET", "/a").status == 404


def test_a_client_that_leaves_while_its_upload_is_published_loses_nothing_of_it(
    client: Client, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Erasing the stage while the commit names its extents would be a file without content."""

    async def run() -> None:
        published = asyncio.Event()
        loop = asyncio.get_running_loop()
        original = drive.database.submit

        def submit(fn: Any) -> Any:
            if "publish" in fn.__qualname__:
                loop.call_soon_threadsafe(task.cancel)
            future = original(fn)
            if "publish" in fn.__qualname__:
                future.add_done_callback(lambda _: loop.call_soon_threadsafe(published.set))
            return future

        monkeypatch.setattr(drive.database, "submit", submit)
        task = asyncio.create_task(
            client.answer(client.request("PUT", "/a", {}, pieces_of(LARGE, 65536), length=None))
        )
        with pytest.raises(asyncio.CancelledError):
            await task
        await published.wait()

    asyncio.run(run())
    assert client.send("GET", "/a").body == LARGE


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("limit", [5, 16384, 100_000])
def test_the_limits_are_exact_to_the_byte(client: Client, drive: Drive, limit: int, chunked: bool) -> None:
    if chunked:
        client.granted(max_chunked_bytes=limit)
    else:
        client.granted(max_file_bytes=limit)
    assert client.send("PUT", "/a", pieces=[b"x" * limit], length=limit, chunked=chunked).status == 201
    over = pieces_of(b"x" * (limit + 1), 10_000)
    assert client.send("PUT", "/a", pieces=over, length=limit + 1, chunked=chunked).status == 413
    assert client.send("GET", "/a").body == b"x" * limit
    assert rows(drive, t.blob) == 1
    assert rows(drive, t.stage) == 0


@pytest.mark.parametrize(
    ("headers", "length"),
    [({}, 1001), ({"X-Expected-Entity-Length": "1001"}, None), ({"OC-Total-Length": "1001"}, None)],
)
def test_a_declared_length_over_the_limit_is_refused_before_a_byte_is_read(
    client: Client, headers: dict[str, str], length: int | None
) -> None:
    client.granted(max_file_bytes=1000, max_chunked_bytes=1000)
    request = client.request("PUT", "/a", headers, [b"x" * 1001], length=length)
    with pytest.raises(BodyTooLarge):
        asyncio.run(client.answer(request))
    assert not request.body.started


@pytest.mark.spec("RFC 4331 §6")
def test_what_cannot_fit_the_quota_is_refused_before_a_byte_is_read(client: Client) -> None:
    client.granted(quota_bytes=10)
    client.put("/a", b"123456")
    request = client.request("PUT", "/b", {}, [b"12345"], length=5)
    with pytest.raises(ClientError) as caught:
        asyncio.run(client.answer(request))
    assert (caught.value.status, caught.value.precondition) == (507, "{DAV:}quota-not-exceeded")
    assert not request.body.started
    assert client.put("/a", b"1234567890").status == 204
    assert client.send("PUT", "/c", b"1", chunked=True).status == 507
    assert client.send("GET", "/c").status == 404


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/no/a", {}, 409),
        ("/folder", {}, 405),
        ("/folder/", {}, 405),
        ("/", {}, 405),
        ("/new/", {}, 409),
        ("/Deleted%20items/a", {}, 403),
        ("/Deleted%20items", {}, 405),
        ("/Team%20files/Deleted%20items", {}, 403),
        ("/a", {"Content-Range": "bytes 0-3/10"}, 400),
        ("/a", {"Content-Encoding": "gzip"}, 415),
        ("/a", {"If-Match": "*"}, 412),
        ("/a", {"If-Match": '"1"'}, 412),
        ("/old", {"If-None-Match": "*"}, 412),
        ("/old", {"If-Match": '"1"'}, 412),
        ("/old", {"If": '(["1"])'}, 412),
        ("/a", {"OC-Checksum": "SHA1:zz"}, 400),
        ("/a", {"If": "nonsense"}, 400),
        ("/" + "a" * 256, {}, 414),
    ],
)
def test_a_doomed_upload_is_refused_before_a_byte_is_read(
    client: Client, drive: Drive, path: str, headers: dict[str, str], status: int
) -> None:
    client.put("/old", b"previous")
    drive.database.write(lambda tx: _folder(client, tx))
    request = client.request("PUT", path, headers, [b"x"], length=1)
    with pytest.raises(ClientError) as caught:
        asyncio.run(client.answer(request))
    assert caught.value.status == status
    assert not request.body.started
    assert client.send("GET", "/old").body == b"previous"


def _folder(client: Client, tx: Any, path: str = "folder") -> None:
    from ksync_server.drive import tree

    view = tree.View(client.grant, client.drive.settings.drive, False)
    change = tree.begin(tx, view)
    tree.make_folder(change, tree.resolve(tx, view, tuple(path.split("/"))))


def test_a_change_during_the_upload_is_seen_when_it_is_published(client: Client) -> None:
    client.put("/a", b"first")
    etag = client.send("HEAD", "/a").headers["etag"]

    async def overtaken() -> bytes:
        other = client.request("PUT", "/a", {}, [b"second"], length=6)
        await client.answer(other)
        return b"third"

    request = client.request("PUT", "/a", {"If-Match": etag}, [overtaken], length=None)
    with pytest.raises(ClientError) as caught:
        asyncio.run(client.answer(request))
    assert caught.value.status == 412
    assert client.send("GET", "/a").body == b"second"


def test_a_member_who_was_put_out_during_the_upload_publishes_nothing(client: Client) -> None:
    async def put_out() -> bytes:
        client.gate.grants = {}
        return LARGE

    grants = client.gate.grants
    request = client.request("PUT", "/a", {}, [LARGE, put_out], length=None)
    with pytest.raises(ClientError):
        asyncio.run(client.answer(request))
    client.gate.grants = grants
    assert client.send("GET", "/a").status == 404
    assert extents_on_disk(client.drive) == []


def test_exactly_one_of_ten_racing_creations_wins(client: Client) -> None:
    async def one(number: int) -> int:
        request = client.request("PUT", "/a", {"If-None-Match": "*"}, [f"{number}".encode()], length=1)
        try:
            return (await client.answer(request)).status
        except ClientError as error:
            return error.status

    async def race() -> list[int]:
        return await asyncio.gather(*(one(number) for number in range(10)))

    assert sorted(asyncio.run(race())) == [201] + [412] * 9


def test_transfers_of_one_account_are_capped(make_client: Callable[..., Client]) -> None:
    client = make_client(transfers=2)
    client.put("/large", LARGE)

    async def run() -> None:
        entered = asyncio.Event()
        go = asyncio.Event()

        async def hold() -> bytes:
            entered.set()
            await go.wait()
            return LARGE

        request = client.request("PUT", "/a", {}, [hold], length=len(LARGE))
        upload = asyncio.create_task(client.answer(request))
        download = await client.site.handle(client.request("GET", "/large"), client.identity)
        assert not isinstance(download.body, bytes)
        await take(download.body, 1)
        await entered.wait()
        with pytest.raises(Unavailable) as refused:
            await client.answer(client.request("GET", "/large"))
        assert dict(refused.value.headers)[b"retry-after"]
        go.set()
        await upload
        assert len(b"".join([piece async for piece in download.body])) > 0
        assert len((await client.answer(client.request("GET", "/large"))).body) == len(LARGE)

    asyncio.run(run())


def test_small_uploads_are_no_transfers_and_one_in_chunks_is_when_it_grows(
    make_client: Callable[..., Client],
) -> None:
    client = make_client(transfers=1)
    client.put("/large", LARGE)

    async def run() -> None:
        download = await client.site.handle(client.request("GET", "/large"), client.identity)
        assert not isinstance(download.body, bytes)
        await take(download.body, 1)
        for length in (5, None):
            answer = await client.answer(client.request("PUT", "/small", {}, [b"small"], length=length))
            assert answer.status in (201, 204)
        never = client.request("PUT", "/a", {}, [LARGE], length=len(LARGE))
        with pytest.raises(Unavailable):
            await client.answer(never)
        assert not never.body.started
        with pytest.raises(Unavailable):
            await client.answer(client.request("PUT", "/a", {}, [LARGE], length=None))
        await download.body.aclose()  # type: ignore[attr-defined]
        assert (await client.answer(client.request("PUT", "/a", {}, [LARGE], length=None))).status == 201

    asyncio.run(run())


def test_modification_time_and_type_are_kept_as_given(client: Client) -> None:
    made = client.put("/a.txt", X_OC_Mtime="1234567890.5", Content_Type="text/x-special; charset=latin-1")
    assert made.headers["x-oc-mtime"] == "accepted"
    got = client.send("GET", "/a.txt")
    assert got.headers["last-modified"] == "Fri, 13 Feb 2009 23:31:30 GMT"
    assert got.headers["content-type"] == "text/x-special; charset=latin-1"
    for value in ("yesterday", "-5", "999999999999"):
        assert "x-oc-mtime" not in client.put("/b.txt", X_OC_Mtime=value).headers
    client.put("/c.TXT")
    assert client.send("GET", "/c.TXT").headers["content-type"] == "text/plain"
    client.put("/d", Content_Type="no type")
    assert client.send("GET", "/d").headers["content-type"] == "application/octet-stream"


def _digest(name: str) -> str:
    return base64.b64encode(hashlib.new(name, LARGE).digest()).decode()


@pytest.mark.spec("RFC 9530 §3")
@pytest.mark.parametrize(
    ("header", "good"),
    [
        ("OC-Checksum", "SHA1:" + hashlib.sha1(LARGE).hexdigest()),
        ("OC-Checksum", "MD5:" + hashlib.md5(LARGE).hexdigest().upper()),
        ("OC-Checksum", f"ADLER32:{zlib.adler32(LARGE):08x}"),
        ("Content-MD5", _digest("md5")),
        ("Digest", f"SHA-256={_digest('sha256')},unknown=1"),
        ("Repr-Digest", f"sha-512=:{_digest('sha512')}:"),
        ("Content-Digest", f"sha-256=:{_digest('sha256')}:"),
    ],
)
def test_a_declared_checksum_decides_whether_the_upload_is_kept(
    client: Client, drive: Drive, header: str, good: str
) -> None:
    header = header.replace("-", "_")
    assert client.put("/a", LARGE, **{header: good}).status == 201
    before = len(extents_on_disk(drive))
    assert client.put("/a", LARGE + b"!", **{header: good}).status == 400
    assert client.send("GET", "/a").body == LARGE
    assert len(extents_on_disk(drive)) == before


@given(st.text(st.characters(max_codepoint=255), max_size=40))
def test_any_digest_header_is_read_or_a_client_error(value: str) -> None:
    for name in (b"digest", b"oc-checksum", b"content-md5", b"repr-digest"):
        try:
            transfer.declared_digests(Headers([(name, value.encode("latin-1"))]))
        except ClientError:
            continue


# -- GET, HEAD ------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 9110 §14")
@pytest.mark.parametrize("content", [bytes(range(200)), LARGE])
def test_one_range_is_a_part_with_its_place(client: Client, content: bytes) -> None:
    client.put("/a", content)
    size = len(content)
    for value, start, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=-5", size - 5, size),
        (f"bytes={size - 1}-", size - 1, size),
        ("bytes=0-99999999", 0, size),
    ):
        got = client.send("GET", "/a", Range=value)
        assert (got.status, got.body) == (206, content[start:end])
        assert got.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert got.headers["content-length"] == str(end - start)


@pytest.mark.spec("RFC 9110 §14.6")
@pytest.mark.parametrize("content", [bytes(range(200)), LARGE])
def test_several_ranges_are_parts_of_one_answer(client: Client, content: bytes) -> None:
    client.put("/a.bin", content)
    got = client.send("GET", "/a.bin", Range="bytes=0-3, 100-149, -1")
    assert got.status == 206
    assert got.headers["content-length"] == str(len(got.body))
    boundary = re.fullmatch(r"multipart/byteranges; boundary=(\w+)", got.headers["content-type"])
    assert boundary
    parts = got.body.split(b"--" + boundary[1].encode())
    assert parts[0] == b""
    assert parts[-1] == b"--\r\n"
    bodies = [part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for part in parts[1:-1]]
    assert bodies == [content[:4], content[100:150], content[-1:]]
    assert b"content-range: bytes 100-149/" in parts[2]


@pytest.mark.spec("RFC 9110 §15.5.17")
def test_ranges_that_do_not_exist_are_416_and_nonsense_is_ignored(client: Client) -> None:
    client.put("/a", b"0123456789")
    beyond = client.send("GET", "/a", Range="bytes=10-")
    assert (beyond.status, beyond.headers["content-range"]) == (416, "bytes */10")
    for value in ("bytes=5-2", "lines=1-2", "bytes=a-b", "bytes"):
        assert client.send("GET", "/a", Range=value).status == 200
    client.put("/empty", b"")
    assert client.send("GET", "/empty", Range="bytes=0-").status == 200


@pytest.mark.spec("RFC 9110 §13.1.5")
def test_if_range_of_another_version_gets_the_whole_file(client: Client) -> None:
    client.put("/a", b"0123456789")
    etag = client.send("HEAD", "/a").headers["etag"]
    assert client.send("GET", "/a", Range="bytes=0-1", If_Range=etag).status == 206
    client.put("/a", b"abcdefghij")
    got = client.send("GET", "/a", Range="bytes=0-1", If_Range=etag)
    assert (got.status, got.body) == (200, b"abcdefghij")


@pytest.mark.spec("RFC 9110 §13.1.2")
def test_conditions_of_get(client: Client) -> None:
    client.put("/a", b"0123456789")
    head = client.send("HEAD", "/a")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", "10")
    etag, changed = head.headers["etag"], head.headers["last-modified"]
    unchanged = client.send("GET", "/a", If_None_Match=etag)
    assert (unchanged.status, unchanged.body, unchanged.headers["etag"]) == (304, b"", etag)
    assert client.send("GET", "/a", If_None_Match=f"W/{etag}").status == 304
    assert client.send("GET", "/a", If_Modified_Since=changed).status == 304
    assert client.send("GET", "/a", If_Match='"other"').status == 412
    assert client.send("GET", "/a", If_None_Match="JoplinIgnore-1").status == 200
    assert client.send("GET", "/none").status == 404


@pytest.mark.parametrize(
    ("name", "attached"),
    [
        ("a.html", True),
        ("a.svg", True),
        ("a.xhtml", True),
        ("a.js", True),
        ("a.txt", False),
        ("a.png", False),
    ],
)
def test_bytes_of_users_never_run_in_a_browser(client: Client, name: str, attached: bool) -> None:
    client.put(f"/{name}", b"<script>alert(1)</script>")
    got = client.send("GET", f"/{name}")
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["content-security-policy"].startswith("sandbox;")
    assert ("content-disposition" in got.headers) == attached


def test_a_download_goes_on_while_the_file_is_replaced(client: Client) -> None:
    content = LARGE * 2
    client.put("/a", content)

    async def run() -> bytes:
        response = await client.site.handle(client.request("GET", "/a"), client.identity)
        assert not isinstance(response.body, bytes)
        first = await take(response.body, 1)
        await client.answer(client.request("PUT", "/a", {}, [b"new"], length=3))
        rest = (await whole(response)).body
        return first[0] + rest

    assert asyncio.run(run()) == content
    assert client.send("GET", "/a").body == b"new"


def test_an_abandoned_download_gives_its_place_back(make_client: Callable[..., Client]) -> None:
    client = make_client(transfers=1)
    client.put("/a", LARGE)

    async def run() -> None:
        response = await client.site.handle(client.request("GET", "/a"), client.identity)
        assert not isinstance(response.body, bytes)
        await take(response.body, 1)
        await response.body.aclose()  # type: ignore[attr-defined]

    asyncio.run(run())
    assert client.send("GET", "/a").body == LARGE
