"""HTTP at its edges: framing, hosts, sizes. Every odd request gets a 4xx at once and is never carried out."""

from __future__ import annotations

import base64
import uuid
from urllib.parse import urlsplit

import pytest

from conformance.client import Client, basic, status_of
from conformance.conftest import Collection
from conformance.target import Target

spec = pytest.mark.spec
CHUNKED = "Transfer-Encoding: chunked"


def send(
    folder: Collection, name: str, fields: list[str], body: bytes, method: str = "PUT"
) -> tuple[int, bytes]:
    answer = folder.client.raw(folder.client.head(method, folder / name, *fields) + b"\r\n" + body)
    return status_of(answer), answer


@spec("RFC 9112 §6.1")
def test_content_length_with_chunked_is_refused_or_ends_the_connection(folder: Collection) -> None:
    smuggled = folder.client.head("PUT", folder / "smuggled", "Content-Length: 1") + b"\r\nx"
    status, answer = send(folder, "file", ["Content-Length: 6", CHUNKED], b"0\r\n\r\nX" + smuggled)
    assert status in (400, 201, 204), answer
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    assert "smuggled" not in folder.members()


@spec("RFC 9112 §6.3")
@pytest.mark.parametrize(
    "fields",
    [
        ["Content-Length: 1", "Content-Length: 2"],
        ["Content-Length: +1"],
        ["Content-Length: -1"],
        ["Content-Length: 1 1"],
        ["Content-Length: 0x1"],
        ["Content-Length: "],
        ["Content-Length: one"],
        ["Content-Length: 99999999999999999999999999"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: gzip, chunked"],
        ["Transfer-Encoding: xchunked"],
        ["Content-Length : 1"],
        ["Transfer-Encoding : chunked"],
        ["X-Nul: a\x00b", "Content-Length: 1"],
        ["Bad Name: x", "Content-Length: 1"],
        [": nothing", "Content-Length: 1"],
    ],
)
def test_odd_framing_is_refused(folder: Collection, fields: list[str]) -> None:
    status, answer = send(folder, "file", fields, b"x")
    assert 400 <= status <= 501, (fields, status, answer[:300])
    assert status != 500, answer
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    assert folder.members() == set()


@spec("RFC 9112 §7.1")
@pytest.mark.parametrize(
    "body",
    [
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b"+5\r\nhello\r\n0\r\n\r\n",
        b"zz\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhelloworld\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
        b"5;" + b"e" * 10_000_000 + b"\r\nhello\r\n0\r\n\r\n",
        b"\r\nhello\r\n0\r\n\r\n",
    ],
    ids=["0x5", "-5", "+5", "zz", "long data", "64 bits", "long extension", "empty size"],
)
def test_odd_chunks_store_nothing(folder: Collection, body: bytes) -> None:
    status, answer = send(folder, "file", [CHUNKED], body)
    assert status in (0, 400, 413, 431), (status, answer[:300])
    assert folder.members() == set()


@spec("RFC 9112 §7.1.1")
def test_chunk_extensions_and_trailers_are_read_and_ignored(folder: Collection) -> None:
    status, _ = send(folder, "file", [CHUNKED], b'5;a="b;c"\r\nhello\r\n000\r\nX-Trailer: y\r\n\r\n')
    assert status == 201
    assert folder.client.request("GET", folder / "file").body == b"hello"


@spec("RFC 9112 §3.2")
@pytest.mark.parametrize("hosts", [[], ["127.0.0.1", "example.org"], ["a b"], ["exa\\mple"]], ids=str)
def test_a_request_needs_exactly_one_good_host(folder: Collection, hosts: list[str]) -> None:
    lines = [f"PUT {folder / 'file'} HTTP/1.1", *(f"Host: {host}" for host in hosts)]
    lines += [
        f"Authorization: {basic(folder.client.login, folder.client.password)}",
        "Content-Length: 1",
        "",
        "x",
    ]
    status = status_of(folder.client.raw("\r\n".join(lines).encode()))
    assert status in (400, 421), status
    assert folder.members() == set()


@spec("RFC 9112 §3.2.2")
def test_an_absolute_request_target_is_taken(folder: Collection) -> None:
    url = folder.client.url(folder / "file")
    here = urlsplit(url).netloc
    head = f"PUT {url} HTTP/1.1\r\nHost: {here}\r\nContent-Length: 5\r\n"
    head += f"Authorization: {basic(folder.client.login, folder.client.password)}\r\n\r\nhello"
    assert status_of(folder.client.raw(head.encode())) == 201
    assert folder.members() == {"file"}


@spec("RFC 9110 §9.1")
@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "BREW", "get", "PATCH", "ACL", "BIND"])
def test_methods_that_are_not_ours_are_refused(target: Target, method: str) -> None:
    for client, place in ((target.drive(), target.drive_url), (target.sync(), target.sync_url)):
        answer = client.request(method, urlsplit(place).path or "/")
        assert answer.status in (400, 404, 405, 501), (method, answer.status)
        assert basic(client.login, client.password).encode() not in answer.body
        client.close()


@spec("RFC 6585 §5")
@pytest.mark.parametrize("case", ["one long field", "many fields", "long target"])
def test_large_heads_are_refused(folder: Collection, case: str) -> None:
    fields = {
        "one long field": ["X-Long: " + "a" * 200_000],
        "many fields": [f"X-{number}: y" for number in range(5000)],
        "long target": [],
    }[case]
    name = "n" * 70_000 if case == "long target" else "file"
    status, answer = send(folder, name, [*fields, "Content-Length: 1"], b"x")
    assert status in (0, 400, 414, 431), (status, answer[:200])
    assert folder.members() == set()


@spec("RFC 9110 §10.1.1")
def test_100_continue_only_for_an_upload_that_can_succeed(folder: Collection) -> None:
    expect = "Expect: 100-continue"
    answer = folder.client.raw(
        folder.client.head("PUT", folder / "file", "Content-Length: 1", expect, 'If-Match: "none"') + b"\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 412"), answer[:100]
    answer = folder.client.raw(
        folder.client.head("PUT", folder / "none/file", "Content-Length: 1", expect) + b"\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 409"), answer[:100]
    answer = folder.client.raw(
        folder.client.head("PUT", folder / "file", "Content-Length: 1", expect) + b"\r\n", timeout=1
    )
    assert answer.startswith(b"HTTP/1.1 100"), answer[:100]


@spec("RFC 9110 §8.6")
def test_an_impossible_content_length_is_refused_before_the_body(folder: Collection) -> None:
    status, answer = send(folder, "file", ["Content-Length: 10000000000000000"], b"x")
    assert status in (413, 507), answer[:200]


@pytest.mark.parametrize(
    "credentials", [b"\xff\xfe", b"no colon", b":", b"a:\x00", b"\n:\n", b"a" * 20_000 + b":b"]
)
def test_odd_credentials_are_401(target: Target, credentials: bytes) -> None:
    for url in (target.drive_url, target.sync_url):
        client = Client(url)
        value = "Basic " + base64.b64encode(credentials).decode()
        answer = client.request("PROPFIND", "", None, {"Authorization": value, "Depth": "0"})
        assert answer.status in (401, 431), answer.status
        client.close()


def test_a_connection_serves_many_requests(folder: Collection) -> None:
    for _ in range(50):
        assert folder.client.request("PROPFIND", folder.path, None, {"Depth": "0"}).status == 207
    name = uuid.uuid4().hex
    request = folder.client.head("PUT", folder / name, "Content-Length: 2") + b"\r\nhi"
    pipelined = folder.client.raw(
        request + folder.client.head("GET", folder / name, "Connection: close") + b"\r\n", timeout=2
    )
    assert pipelined.startswith(b"HTTP/1.1 201"), pipelined[:100]
