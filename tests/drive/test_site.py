"""The drive site's table of owners and its door."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from ksync_server.drive import site
from ksync_server.errors import BadRequest, NotFound
from tests.drive.harness import Client


@pytest.mark.spec("RFC 4918 §10.1")
@pytest.mark.parametrize("path", ["/", "/file", "/none", "/Deleted%20items/"])
def test_options_names_the_classes_and_every_method_that_is_there(client: Client, path: str) -> None:
    client.put("/file")
    answer = client.send("OPTIONS", path)
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["dav"] == "1, 2, 3"
    assert answer.headers["ms-author-via"] == "DAV"
    allowed = set(answer.headers["allow"].split(", "))
    assert allowed == {verb for verb in site.OWNERS if verb != "REPORT"}


@pytest.mark.parametrize("method", ["POST", "PATCH", "TRACE", "ACL", "SEARCH", "MKCALENDAR", "get"])
def test_other_methods_are_refused_with_those_that_are_there(client: Client, method: str) -> None:
    answer = client.send(method, "/")
    assert answer.status == 405
    assert "PROPFIND" in answer.headers["allow"]


@pytest.mark.spec("RFC 3253 §3.6")
def test_reports_are_refused_with_their_precondition(client: Client) -> None:
    body = b'<sync-collection xmlns="DAV:"/>'
    answer = client.send("REPORT", "/", body, depth="0")
    assert (answer.status, answer.text.split()[0]) == (403, "{DAV:}supported-report")


@pytest.mark.parametrize("method", list(site.OWNERS))
def test_every_verb_asks_the_gate_first(client: Client, method: str) -> None:
    client.put("/a")
    client.gate.asked.clear()
    client.gate.grants = {}
    request = client.request(method, "/a", {"Destination": "/b", "Depth": "0"}, [b"x"], length=1)
    with pytest.raises(NotFound):
        asyncio.run(client.answer(request))
    assert client.gate.asked[0] == method
    assert not request.body.started


@pytest.mark.parametrize("segment", ["a\0b", "a\nb", "\ufffe"])
@pytest.mark.parametrize("method", ["GET", "PUT", "PROPFIND"])
def test_names_that_cannot_be_are_a_bad_request(client: Client, method: str, segment: str) -> None:
    request = replace(client.request(method, "/x", {"depth": "0"}), segments=(segment,))
    with pytest.raises(BadRequest):
        asyncio.run(client.answer(request))
