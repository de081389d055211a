"""The verbs that WsgiDAV owns, through the site: its defects mended, its answers true, nothing by half."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from conformance.names import NASTY_NAMES
from ksync_server.drive import copying, engine, tree
from ksync_server.errors import BadRequest, ClientError, Unavailable
from ksync_server.http import Response
from ksync_server.store import tables as t
from ksync_server.store.database import Database
from ksync_server.wire import xml
from tests.drive.harness import Answer, Client, Drive

MakeClient = Callable[..., Client]
ORIGIN = "https://files.example.org"


def lock_body(scope: str = "exclusive", owner: str = "<d:owner>alice</d:owner>", extra: str = "") -> bytes:
    return (
        f'<d:lockinfo xmlns:d="DAV:"><d:lockscope><d:{scope}/></d:lockscope>'
        f"<d:locktype><d:write/></d:locktype>{owner}{extra}</d:lockinfo>"
    ).encode()


def lock(client: Client, path: str, scope: str = "exclusive", depth: str = "0", **headers: str) -> str:
    """Lock a path; returns the token."""
    answer = client.send("LOCK", path, lock_body(scope), depth=depth, **headers)
    assert answer.status in (200, 201), answer.text
    return answer.headers["lock-token"].strip("<>")


def holding(token: str) -> dict[str, str]:
    """The header that submits a token, whatever it locks."""
    return {"if": f"(<{token}>) (Not <DAV:no-lock>)"}


def patch(*updates: str) -> bytes:
    inner = "".join(updates)
    return f'<d:propertyupdate xmlns:d="DAV:" xmlns:e="urn:example">{inner}</d:propertyupdate>'.encode()


def set_(inner: str) -> str:
    return f"<d:set><d:prop>{inner}</d:prop></d:set>"


def remove(inner: str) -> str:
    return f"<d:remove><d:prop>{inner}</d:prop></d:remove>"


def statuses(answer: Answer) -> dict[str, int]:
    """Of a PROPPATCH: property -> status."""
    assert answer.status == 207, answer.text
    (propstats,) = answer.propstats().values()
    return {name: status for status, found in propstats.items() for name in found}


def dead(client: Client, path: str, *names: str) -> dict[str, xml.Element]:
    """Of a PROPFIND: the properties that are there."""
    (propstats,) = client.propfind(path, *names, depth="0").propstats().values()
    return propstats.get(200, {})


def mtime(client: Client, path: str) -> str:
    return dead(client, path, "{DAV:}lastmodified")["{DAV:}lastmodified"].text


def names(client: Client, path: str) -> list[str]:
    """The names in a folder."""
    with client.drive.database.read() as tx:
        view = client.drive.view(client.grant)
        node = tree.resolve(tx, view, tuple(part for part in path.split("/") if part)).node
        return [] if node is None else [member.name for member in tree.list_page(tx, node.id)]


def usage(drive: Drive) -> tuple[int, int]:
    with drive.database.read() as tx:
        return tree.usage(tx, drive.alice.drive_id)


# -- MKCOL ----------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 4918 §9.3")
def test_mkcol_makes_a_folder_once_and_only_in_a_folder(client: Client) -> None:
    assert client.send("MKCOL", "/new/").status == 201
    again = client.send("MKCOL", "/new")
    assert (again.status, "MKCOL" in again.headers["allow"]) == (405, False)
    assert client.send("MKCOL", "/missing/child").status == 409
    client.put("/file")
    assert client.send("MKCOL", "/file/child").status == 409
    assert client.send("MKCOL", "/file").status == 405
    assert names(client, "/") == ["file", "new"]


@pytest.mark.spec("RFC 4918 §9.3.1")
@pytest.mark.parametrize("chunked", [True, False])
def test_mkcol_with_a_body_is_refused_and_an_empty_chunked_one_is_none(client: Client, chunked: bool) -> None:
    assert client.send("MKCOL", "/new", b"<body/>", chunked=chunked).status == 415
    assert client.send("MKCOL", "/new", chunked=chunked).status == 201


@pytest.mark.parametrize(("sent", "kept"), [("1500000000", "1500000000"), ("1500000000.25", "1500000000")])
def test_mkcol_takes_the_time_of_rclone(client: Client, sent: str, kept: str) -> None:
    answer = client.send("MKCOL", "/new", x_oc_mtime=sent)
    assert (answer.status, answer.headers["x-oc-mtime"]) == (201, "accepted")
    assert mtime(client, "/new") == kept


@pytest.mark.parametrize("name", ["Deleted items", "Common documents", "Team files"])
def test_no_folder_takes_a_name_of_the_drive(client: Client, name: str) -> None:
    assert client.send("MKCOL", f"/{name}").status == 405
    assert client.send("MKCOL", f"/Team files/{name}").status in (403, 405)
    client.send("MKCOL", "/a")
    assert client.send("MOVE", "/a", destination=f"/Team%20files/{name.replace(' ', '%20')}").status == 403
    assert client.send("MOVE", f"/{name}", destination="/elsewhere").status == 403
    assert client.send("DELETE", f"/{name}").status == 403
    assert client.send("MKCOL", f"/a/{name}").status == 201


def test_a_name_that_no_listing_could_carry_is_refused(client: Client) -> None:
    view = client.drive.view()
    for name in ("line\nfeed", "nul\0", "bell\x07", "\ufffe", "..", "a/b"):
        request = replace(client.request("MKCOL", "/new"), segments=(name,))
        with pytest.raises(BadRequest):
            asyncio.run(client.site._engine.handle(request, lambda _: view))


# -- COPY and MOVE --------------------------------------------------------------------------------


@pytest.mark.spec("RFC 4918 §9.8.5")
@pytest.mark.parametrize("verb", ["COPY", "MOVE"])
def test_a_new_target_is_201_and_a_replaced_one_204(client: Client, verb: str) -> None:
    for name in ("one", "two"):
        client.put(f"/{name}", name.encode())
    assert client.send(verb, "/one", destination="/target").status == 201
    assert client.send(verb, "/two", destination=f"{ORIGIN}/target").status == 204
    assert client.send("GET", "/target").body == b"two"
    assert names(client, "/Deleted items") == ["target"]


@pytest.mark.parametrize("verb", ["COPY", "MOVE"])
def test_every_name_survives_as_a_destination(client: Client, verb: str) -> None:
    for name in NASTY_NAMES:
        client.send("MKCOL", "/from")
        quoted = client.request("GET", "/").href((name,))
        assert client.send(verb, "/from", destination=quoted).status == 201
        assert set(names(client, "/")) - {"from"} == {tree.nfc(name)}
        assert client.send("DELETE", quoted).status == 204


@pytest.mark.spec("RFC 4918 §9.8.3")
def test_copy_with_depth_0_copies_the_folder_alone(client: Client) -> None:
    client.send("MKCOL", "/from")
    client.put("/from/member")
    assert client.send("COPY", "/from", destination="/to", depth="0").status == 201
    assert names(client, "/to") == []
    assert client.send("COPY", "/from", destination="/deep").status == 201
    assert names(client, "/deep") == ["member"]


def test_depth_of_a_copied_file_is_ignored(client: Client) -> None:
    client.put("/file")
    assert client.send("COPY", "/file", destination="/copy", depth="1").status == 201


@pytest.mark.spec("RFC 4918 §9.9.2")
@pytest.mark.parametrize(("verb", "depth"), [("COPY", "1"), ("MOVE", "0"), ("MOVE", "1"), ("DELETE", "0")])
def test_a_wrong_depth_for_a_folder_is_refused(client: Client, verb: str, depth: str) -> None:
    client.send("MKCOL", "/from")
    assert client.send(verb, "/from", destination="/to", depth=depth).status == 400
    assert names(client, "/") == ["from"]


@pytest.mark.spec("RFC 4918 §10.6")
@pytest.mark.parametrize("verb", ["COPY", "MOVE"])
def test_overwrite_f_keeps_what_is_there(client: Client, verb: str) -> None:
    client.put("/one", b"1")
    client.put("/two", b"2")
    assert client.send(verb, "/one", destination="/two", overwrite="F").status == 412
    assert client.send("GET", "/two").body == b"2"
    assert client.send(verb, "/one", destination="/three", overwrite="F").status == 201


@pytest.mark.parametrize("verb", ["COPY", "MOVE"])
def test_nothing_goes_onto_or_into_itself_whatever_it_is_called(client: Client, verb: str) -> None:
    client.send("MKCOL", "/a")
    client.send("MKCOL", "/a/b")
    for target in ("/a", "/Team%20files/a", "/a/b/c", "/Team%20files/a/b/c", "/a/b"):
        assert client.send(verb, "/a", destination=target).status in (403, 409), target
    assert client.send(verb, "/a/b", destination="/Team%20files/a").status == 403
    assert (names(client, "/"), names(client, "/a")) == (["a"], ["b"])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 400),
        ({"destination": "nonsense"}, 400),
        ({"destination": "https://other.example.org/x"}, 502),
        ({"destination": "/missing/x"}, 409),
        ({"destination": "/%zz"}, 400),
        ({"destination": "/x", "overwrite": "maybe"}, 400),
    ],
)
def test_a_destination_that_leads_nowhere_is_refused(
    client: Client, headers: dict[str, str], status: int
) -> None:
    client.put("/file")
    for verb in ("COPY", "MOVE"):
        assert client.send(verb, "/file", **headers).status == status
    assert names(client, "/") == ["file"]


def test_moving_out_of_the_deleted_items_restores(client: Client) -> None:
    client.put("/file", b"precious")
    assert client.send("DELETE", "/file").status == 204
    assert client.send("MOVE", "/Deleted items/file", destination="/back").status == 201
    assert client.send("GET", "/back").body == b"precious"


def test_copied_and_moved_files_take_the_time_of_rclone(client: Client) -> None:
    client.put("/file")
    for verb, target in (("COPY", "/copy"), ("MOVE", "/moved")):
        answer = client.send(verb, "/file", destination=target, x_oc_mtime="1234567890")
        assert (answer.status, answer.headers["x-oc-mtime"]) == (201, "accepted")
        assert mtime(client, target) == "1234567890"


def test_a_tree_too_large_for_one_transaction_is_copied_whole(client: Client, drive: Drive) -> None:
    client.send("MKCOL", "/big")
    client.send("MKCOL", "/big/sub")
    for number in range(110):
        client.put(f"/big/{number}")
        client.put(f"/big/sub/{number}")
    before = usage(drive)
    assert client.send("COPY", "/big", destination="/copy", x_oc_mtime="1").status == 201
    assert len(names(client, "/copy")) == 111
    assert len(names(client, "/copy/sub")) == 110
    assert usage(drive) == (before[0] * 2, before[1] * 2)
    assert mtime(client, "/copy") == "1"


def test_a_refused_copy_of_a_large_tree_leaves_nothing_behind(make_client: MakeClient, drive: Drive) -> None:
    client = make_client()
    client.send("MKCOL", "/big")
    for number in range(210):
        client.put(f"/big/{number}")
    before = usage(drive)
    client.granted(quota_bytes=before[0] + 100)
    assert client.send("COPY", "/big", destination="/copy").status == 507
    client.site.close()
    assert names(client, "/") == ["big"]
    assert usage(drive) == before


# -- DELETE ---------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 4918 §9.6")
def test_delete_puts_trees_into_the_deleted_items(client: Client) -> None:
    client.send("MKCOL", "/a")
    client.put("/a/file")
    assert client.send("DELETE", "/a/").status == 204
    assert client.send("DELETE", "/a").status == 404
    assert names(client, "/Deleted items/a") == ["file"]


def test_deleted_items_are_kept_unless_the_operator_lets_programs_erase_them(make_client: MakeClient) -> None:
    client = make_client()
    client.put("/file")
    client.send("DELETE", "/file")
    assert client.send("DELETE", "/Deleted items/file").status == 403
    purging = make_client(purge_over_webdav=True)
    assert purging.send("DELETE", "/Deleted items/file").status == 204
    purging.site.close()
    assert names(client, "/Deleted items") == []
    assert usage(client.drive) == (0, 0)


@pytest.mark.spec("RFC 4918 §9.6.1")
@pytest.mark.parametrize("verb", ["DELETE", "MOVE"])
def test_a_tree_with_a_locked_member_stays_whole_and_the_answer_names_it(client: Client, verb: str) -> None:
    client.send("MKCOL", "/a")
    client.send("MKCOL", "/a/b")
    client.put("/a/b/locked")
    token = lock(client, "/a/b/locked")
    answer = client.send(verb, "/a", destination="/to")
    assert answer.status == 207
    assert "<d:href>/a/b/locked</d:href><d:status>HTTP/1.1 423 Locked</d:status>" in answer.text
    assert names(client, "/a/b") == ["locked"]
    assert client.send(verb, "/a", destination="/to", **holding(token)).status in (201, 204)
    assert names(client, "/a") == []


@pytest.mark.spec("RFC 4918 §9.8.3")
def test_a_target_with_a_locked_member_is_not_replaced(client: Client) -> None:
    client.put("/file")
    client.send("MKCOL", "/to")
    client.put("/to/locked")
    lock(client, "/to/locked")
    for verb in ("COPY", "MOVE"):
        assert client.send(verb, "/file", destination="/to").status == 207
    assert names(client, "/to") == ["locked"]


@pytest.mark.spec("RFC 4918 §7.4")
def test_members_of_a_locked_folder_come_and_go_with_its_token_alone(client: Client) -> None:
    client.send("MKCOL", "/a")
    client.put("/a/file")
    client.put("/other")
    token = lock(client, "/a", depth="0")
    for verb, path, target in (
        ("DELETE", "/a/file", ""),
        ("MOVE", "/a/file", "/out"),
        ("MOVE", "/other", "/a/in"),
        ("COPY", "/other", "/a/in"),
        ("MKCOL", "/a/in", ""),
    ):
        refused = client.send(verb, path, **({"destination": target} if target else {}))
        assert refused.status == 423, verb
        assert refused.text.startswith("{DAV:}lock-token-submitted")
    assert client.send("MKCOL", "/a/in", **holding(token)).status == 201
    assert client.send("DELETE", "/a/file", **holding(token)).status == 204


# -- LOCK -----------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 4918 §9.10")
def test_lock_answers_with_its_token_and_what_it_locked(client: Client) -> None:
    client.put("/file")
    owner = '<d:owner xml:lang="fr"><d:href>mailto:alice@example.org</d:href></d:owner>'
    answer = client.send("LOCK", "/file", lock_body(owner=owner), timeout="Infinite, Second-4100000000")
    assert answer.status == 200
    token = answer.headers["lock-token"]
    discovery = xml.parse(answer.body).find("{DAV:}lockdiscovery")
    assert discovery is not None
    (active,) = discovery.elements()
    found = {child.tag.removeprefix("{DAV:}"): child for child in active.elements()}
    assert found["depth"].text == "infinity"
    assert found["timeout"].text == "Second-3600"
    assert found["locktoken"].elements()[0].text == token.strip("<>")
    assert found["lockroot"].elements()[0].text == "/file"
    assert found["owner"].lang == "fr"
    assert found["owner"].elements()[0].text == "mailto:alice@example.org"
    listed = dead(client, "/file", "{DAV:}lockdiscovery")["{DAV:}lockdiscovery"]
    assert token.strip("<>") in [element.text for element in listed.walk()]


@pytest.mark.spec("RFC 4918 §7.3")
def test_locking_an_unmapped_address_makes_an_empty_file(client: Client) -> None:
    answer = client.send("LOCK", "/new.txt", lock_body())
    assert (answer.status, client.send("GET", "/new.txt").body) == (201, b"")
    assert client.put("/new.txt", b"x").status == 423
    token = answer.headers["lock-token"].strip("<>")
    assert client.put("/new.txt", b"x", **holding(token)).status == 204
    assert client.send("LOCK", "/missing/new.txt", lock_body()).status == 409


@pytest.mark.spec("RFC 4918 §7.4")
def test_locking_an_unmapped_address_in_a_locked_folder_needs_its_token(client: Client) -> None:
    client.send("MKCOL", "/a")
    token = lock(client, "/a", depth="0")
    assert client.send("LOCK", "/a/new", lock_body()).status == 423
    assert names(client, "/a") == []
    assert client.send("LOCK", "/a/new", lock_body(), **holding(token)).status == 201


@pytest.mark.spec("RFC 4918 §9.10.6")
def test_a_second_lock_is_refused_and_the_first_one_named(client: Client) -> None:
    client.send("MKCOL", "/a")
    client.put("/a/file")
    lock(client, "/a", depth="infinity")
    for path in ("/a", "/a/file", "/Team files/a"):
        refused = client.send("LOCK", path, lock_body())
        assert refused.status == 423
        assert refused.text.startswith("{DAV:}no-conflicting-lock")
    assert client.send("LOCK", "/a/new", lock_body()).status == 423
    assert names(client, "/a") == ["file"]


@pytest.mark.spec("RFC 4918 §6.2")
def test_any_one_of_several_shared_locks_opens_what_they_hold(make_client: MakeClient) -> None:
    alice, bob = make_client(), make_client(bob=True)
    path = "/Common documents/file"
    alice.put(path)
    first = lock(alice, path, "shared")
    second = lock(bob, path, "shared")
    assert alice.send("LOCK", path, lock_body()).status == 423
    assert alice.put(path, b"", **holding(first)).status == 204
    assert bob.send("PROPPATCH", path, patch(set_("<e:x/>")), **holding(second)).status == 207
    assert bob.send("DELETE", path).status == 423
    assert bob.send("DELETE", path, **holding(second)).status == 204


@pytest.mark.spec("RFC 4918 §6.4")
def test_the_token_of_somebody_else_opens_nothing(make_client: MakeClient) -> None:
    alice, bob = make_client(), make_client(bob=True)
    path = "/Common documents/file"
    alice.put(path)
    token = lock(alice, path)
    assert bob.put(path, b"", **holding(token)).status == 423
    assert bob.send("DELETE", path, **holding(token)).status == 423
    assert bob.send("LOCK", path, **{"if": f"(<{token}>)"}).status == 403
    assert bob.send("UNLOCK", path, lock_token=f"<{token}>").status == 403
    assert alice.send("UNLOCK", path, lock_token=f"<{token}>").status == 204


def test_both_addresses_of_a_place_share_locks_and_properties(client: Client) -> None:
    client.put("/file")
    token = lock(client, "/Team files/file")
    assert client.send("PROPPATCH", "/file", patch(set_("<e:x>1</e:x>"))).status == 423
    assert client.send("PROPPATCH", "/file", patch(set_("<e:x>1</e:x>")), **holding(token)).status == 207
    assert dead(client, "/Team files/file", "{urn:example}x")["{urn:example}x"].text == "1"
    assert client.send("UNLOCK", "/file", lock_token=token).status == 204
    assert client.put("/file").status == 204


@pytest.mark.spec("RFC 4918 §9.10.2")
def test_a_lock_is_refreshed_by_its_token_alone(client: Client) -> None:
    client.send("MKCOL", "/a")
    client.put("/a/file")
    token = lock(client, "/a", depth="infinity", timeout="Second-10")
    answer = client.send("LOCK", "/a/file", **{"if": f"(<{token}>)", "timeout": "Second-500"})
    assert (answer.status, "lock-token" in answer.headers) == (200, False)
    assert "<d:timeout>Second-500</d:timeout>" in answer.text
    assert "<d:lockroot><d:href>/a</d:href></d:lockroot>" in answer.text
    assert client.send("LOCK", "/a/file").status == 400
    assert client.send("LOCK", "/a/file", **{"if": "(<urn:other>)"}).status == 412
    assert client.send("LOCK", "/other", **{"if": f"(<{token}>)"}).status == 412


def test_the_time_of_a_lock_has_a_limit(client: Client) -> None:
    asked = {"Second-60": 60, "Infinite": 3600, f"Second-{'9' * 5000}": 3600, "Second-0": 1, "later": 3600}
    for number, (timeout, granted) in enumerate(asked.items()):
        answer = client.send("LOCK", f"/{number}", lock_body(), timeout=timeout)
        assert f"<d:timeout>Second-{granted}</d:timeout>" in answer.text


def test_an_expired_lock_is_none(client: Client) -> None:
    token = lock(client, "/file")
    with client.drive.database.engine.begin() as connection:
        connection.execute(sa.update(t.lock).values(expires_at=1))
    assert client.put("/file").status == 204
    assert client.send("UNLOCK", "/file", lock_token=token).status == 409
    lock(client, "/file")


def test_an_account_cannot_lock_without_end(make_client: MakeClient) -> None:
    client = make_client(max_locks=2)
    lock(client, "/one")
    lock(client, "/two")
    assert client.send("LOCK", "/three", lock_body()).status == 507
    assert names(client, "/") == ["one", "two"]


def test_the_folders_of_the_drive_are_not_locked(client: Client) -> None:
    for path in ("/", "/Team files", "/Common documents", "/Deleted items"):
        assert client.send("LOCK", path, lock_body()).status == 403


def test_a_lock_body_that_is_none_makes_nothing(client: Client) -> None:
    for body in (
        b"<lock",
        b"<other/>",
        b'<!DOCTYPE d [<!ENTITY x "y">]><lockinfo xmlns="DAV:"/>',
        b'<lockinfo xmlns="DAV:"><lockscope/><locktype><write/></locktype></lockinfo>',
        b'<lockinfo xmlns="DAV:"><lockscope><shared/></lockscope><locktype><read/></locktype></lockinfo>',
    ):
        assert client.send("LOCK", "/new", body).status == 400, body
    assert names(client, "/") == []


@pytest.mark.spec("RFC 4918 §17")
def test_unknown_elements_of_a_lock_body_are_ignored(client: Client) -> None:
    assert client.send("LOCK", "/new", lock_body(extra='<x xmlns="urn:example"/>')).status == 201


def test_a_lock_owner_has_a_limit(make_client: MakeClient) -> None:
    client = make_client(max_lock_owner_bytes=1000)
    assert client.send("LOCK", "/new", lock_body(owner=f"<d:owner>{'x' * 1001}</d:owner>")).status == 413
    assert names(client, "/") == []


@pytest.mark.parametrize("brackets", [True, False])
def test_unlock_takes_a_token_with_or_without_brackets(client: Client, brackets: bool) -> None:
    token = lock(client, "/file")
    assert client.send("UNLOCK", "/file", lock_token=f"<{token}>" if brackets else token).status == 204
    assert client.put("/file").status == 204


@pytest.mark.spec("RFC 4918 §9.11.1")
def test_unlock_of_what_the_token_does_not_lock_is_refused(client: Client) -> None:
    token = lock(client, "/file")
    client.put("/other")
    wrong = client.send("UNLOCK", "/other", lock_token=token)
    assert (wrong.status, wrong.text.split()[0]) == (409, "{DAV:}lock-token-matches-request-uri")
    assert client.send("UNLOCK", "/missing", lock_token=token).status == 404
    assert client.send("UNLOCK", "/file").status == 400
    assert client.put("/file").status == 423


@pytest.mark.spec("RFC 4918 §7.5")
def test_locks_stay_behind_when_what_they_locked_moves(client: Client) -> None:
    token = lock(client, "/file")
    assert client.send("MOVE", "/file", destination="/moved").status == 423
    assert client.send("MOVE", "/file", destination="/moved", **holding(token)).status == 201
    assert client.put("/moved").status == 204
    assert client.put("/file").status == 201


def test_another_process_sees_a_lock_at_once(drive: Drive, make_client: MakeClient) -> None:
    database = Database(drive.settings.database, threads=2)
    here = make_client()
    there = Client(Drive(database, drive.blobs, drive.settings, drive.alice, drive.bob))
    try:
        token = lock(here, "/file")
        assert there.put("/file").status == 423
        assert there.send("DELETE", "/file").status == 423
        assert there.send("UNLOCK", "/file", lock_token=token).status == 204
        assert here.put("/file").status == 204
    finally:
        there.site.close()
        database.close()


# -- PROPPATCH ------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 4918 §4.3")
def test_dead_properties_come_back_as_they_were_set(client: Client) -> None:
    client.put("/file")
    value = '<e:x a="1" e:b="2">text<e:in/> &lt;tail&gt;</e:x>'
    body = f'<d:propertyupdate xmlns:d="DAV:" xmlns:e="urn:example" xml:lang="de">{set_(value)}' + (
        set_('<none xmlns="">plain</none><e:ü xml:lang="fr">é</e:ü>') + "</d:propertyupdate>"
    )
    answer = client.send("PROPPATCH", "/file", body.encode(), chunked=True)
    assert statuses(answer) == {"{urn:example}x": 200, "none": 200, "{urn:example}ü": 200}
    found = dead(client, "/file", "{urn:example}x", "none", "{urn:example}ü")
    inner = xml.parse(f'<e:x xmlns:e="urn:example" xml:lang="de" {value[5:]}'.encode())
    assert found["{urn:example}x"].children == inner.children
    assert dict(found["{urn:example}x"].attributes).items() >= {"a": "1", "{urn:example}b": "2"}.items()
    assert found["{urn:example}x"].lang == "de"
    assert found["none"].text == "plain"
    assert (found["{urn:example}ü"].text, found["{urn:example}ü"].lang) == ("é", "fr")


@pytest.mark.spec("RFC 4918 §9.2")
def test_one_refused_property_refuses_them_all(client: Client) -> None:
    client.put("/file")
    before = mtime(client, "/file")
    answer = client.send(
        "PROPPATCH",
        "/file",
        patch(set_("<e:x>1</e:x>"), set_("<d:getetag>x</d:getetag><d:lastmodified>1</d:lastmodified>")),
    )
    assert statuses(answer) == {"{urn:example}x": 424, "{DAV:}getetag": 403, "{DAV:}lastmodified": 424}
    assert "<d:error><d:cannot-modify-protected-property/></d:error>" in answer.text
    assert dead(client, "/file", "{urn:example}x") == {}
    assert mtime(client, "/file") == before


def test_live_properties_are_protected(client: Client) -> None:
    client.put("/file")
    live = ("creationdate", "displayname", "getcontentlength", "getcontenttype", "getetag", "resourcetype")
    for name in (*live, "lockdiscovery", "supportedlock", "quota-used-bytes", "owner", "unknown"):
        for how in (set_, remove):
            answer = client.send("PROPPATCH", "/file", patch(how(f"<d:{name}/>")))
            assert statuses(answer) == {f"{{DAV:}}{name}": 403}


@pytest.mark.parametrize(
    "sent",
    [
        "<d:lastmodified>1500000000</d:lastmodified>",
        "<d:getlastmodified>Fri, 14 Jul 2017 02:40:00 GMT</d:getlastmodified>",
        '<Win32LastModifiedTime xmlns="urn:schemas-microsoft-com:">Fri, 14 Jul 2017 02:40:00 GMT'
        "</Win32LastModifiedTime>",
    ],
)
def test_a_set_time_is_the_time_and_makes_no_new_version(client: Client, sent: str) -> None:
    client.put("/file")
    etag = client.send("HEAD", "/file").headers["etag"]
    assert list(statuses(client.send("PROPPATCH", "/file", patch(set_(sent)))).values()) == [200]
    assert mtime(client, "/file") == "1500000000"
    head = client.send("HEAD", "/file").headers
    assert (head["etag"], head["last-modified"]) == (etag, "Fri, 14 Jul 2017 02:40:00 GMT")


def test_the_checksum_that_rclone_sends_with_a_time_must_be_right(client: Client) -> None:
    client.put("/file", b"content")
    time = "<d:lastmodified>1500000000</d:lastmodified>"
    checksum = '<o:checksums xmlns:o="http://owncloud.org/ns"><o:checksum>{}</o:checksum></o:checksums>'
    right = f"SHA1:{hashlib.sha1(b'content').hexdigest()}"
    md5 = f"MD5:{hashlib.md5(b'content').hexdigest()}"
    wrong = f"SHA1:{hashlib.sha1(b'other').hexdigest()}"
    answer = client.send("PROPPATCH", "/file", patch(set_(time + checksum.format(wrong))))
    assert sorted(statuses(answer).values()) == [409, 424]
    assert mtime(client, "/file") != "1500000000"
    answer = client.send("PROPPATCH", "/file", patch(set_(time + checksum.format(f"{md5} {right}"))))
    assert sorted(statuses(answer).values()) == [200, 200]
    assert mtime(client, "/file") == "1500000000"
    folder = client.send("PROPPATCH", "/", patch(set_(checksum.format(right))))
    assert list(statuses(folder).values()) == [409]


def test_a_time_that_is_none_is_a_conflict(client: Client) -> None:
    client.put("/file")
    for value in ("yesterday", "", "-1", "1e9", "999999999999", "NaN"):
        answer = client.send("PROPPATCH", "/file", patch(set_(f"<d:lastmodified>{value}</d:lastmodified>")))
        assert statuses(answer) == {"{DAV:}lastmodified": 409}, value


def test_properties_windows_sets_are_taken(client: Client) -> None:
    client.put("/file")
    ms = 'xmlns="urn:schemas-microsoft-com:"'
    answer = client.send(
        "PROPPATCH",
        "/file",
        patch(
            set_(f"<Win32CreationTime {ms}>Fri, 14 Jul 2017 02:40:00 GMT</Win32CreationTime>"),
            set_(f"<Win32FileAttributes {ms}>00000020</Win32FileAttributes>"),
        ),
    )
    assert set(statuses(answer).values()) == {200}
    name = "{urn:schemas-microsoft-com:}Win32FileAttributes"
    assert dead(client, "/file", name)[name].text == "00000020"


@pytest.mark.spec("RFC 4918 §9.2")
def test_updates_are_carried_out_in_their_order(client: Client) -> None:
    client.put("/file")
    client.send("PROPPATCH", "/file", patch(set_("<e:x>1</e:x>"), remove("<e:x/>"), set_("<e:y/>")))
    assert set(dead(client, "/file", "{urn:example}x", "{urn:example}y")) == {"{urn:example}y"}
    client.send("PROPPATCH", "/file", patch(remove("<e:y/><e:never/>"), set_("<e:x>1</e:x><e:x>2</e:x>")))
    found = dead(client, "/file", "{urn:example}x", "{urn:example}y")
    assert {name: element.text for name, element in found.items()} == {"{urn:example}x": "2"}


def test_properties_have_limits(make_client: MakeClient) -> None:
    client = make_client(max_property_bytes=1000, max_properties=3)
    client.put("/file")
    long = client.send("PROPPATCH", "/file", patch(set_(f"<e:x>{'x' * 1000}</e:x><e:y/>")))
    assert statuses(long) == {"{urn:example}x": 507, "{urn:example}y": 424}
    assert statuses(client.send("PROPPATCH", "/file", patch(set_("<e:a/><e:b/><e:c/><e:d/>")))) == {
        "{urn:example}a": 424,
        "{urn:example}b": 424,
        "{urn:example}c": 424,
        "{urn:example}d": 507,
    }
    client.send("PROPPATCH", "/file", patch(set_("<e:a/><e:b/><e:c/>")))
    swapped = client.send("PROPPATCH", "/file", patch(remove("<e:a/>"), set_("<e:d/>")))
    assert set(statuses(swapped).values()) == {200}


def test_properties_have_a_limit_together(make_client: MakeClient) -> None:
    """No quota counts them, and a listing holds all of a resource in memory."""
    client = make_client(max_dead_bytes=1000)
    client.put("/file")
    half = "x" * 400
    assert set(statuses(client.send("PROPPATCH", "/file", patch(set_(f"<e:a>{half}</e:a>")))).values()) == {
        200
    }
    many = client.send("PROPPATCH", "/file", patch(set_(f"<e:b>{half}</e:b><e:c>{half}</e:c>")))
    assert statuses(many) == {"{urn:example}b": 424, "{urn:example}c": 507}
    instead = client.send("PROPPATCH", "/file", patch(remove("<e:a/>"), set_(f"<e:b>{half}</e:b>")))
    assert set(statuses(instead).values()) == {200}


@pytest.mark.spec("RFC 4918 §9.8.2")
def test_dead_properties_are_copied_and_moved(client: Client) -> None:
    client.send("MKCOL", "/a")
    client.put("/a/file")
    client.send("PROPPATCH", "/a/file", patch(set_("<e:x>1</e:x>")))
    client.send("COPY", "/a", destination="/copy")
    client.send("MOVE", "/a", destination="/moved")
    for path in ("/copy/file", "/moved/file"):
        assert dead(client, path, "{urn:example}x")["{urn:example}x"].text == "1"


def test_a_proppatch_without_sense_is_refused(client: Client) -> None:
    client.put("/file")
    assert client.send("PROPPATCH", "/missing", patch(set_("<e:x/>"))).status == 404
    for body in (b"", b"<x/>", patch(), b"not xml", b"<!DOCTYPE x><x/>"):
        assert client.send("PROPPATCH", "/file", body).status == 400, body
    assert client.send("PROPPATCH", "/file", b" " * (1024 * 1024 + 1)).status == 413


def test_the_root_takes_properties_too(client: Client) -> None:
    answer = client.send("PROPPATCH", "/", patch(set_("<e:x>1</e:x>")))
    assert set(statuses(answer).values()) == {200}
    assert dead(client, "/Team files", "{urn:example}x")["{urn:example}x"].text == "1"


@pytest.mark.parametrize("folders", ["folders", "drive"])
def test_no_verb_harms_the_bare_address(make_client: MakeClient, folders: str) -> None:
    client = make_client(root_view=folders)
    client.put("/Team files/file")
    refused = {"MKCOL": 405, "DELETE": 403, "LOCK": 403, "UNLOCK": 409, "PROPPATCH": 207}
    bodies = {"LOCK": lock_body(), "PROPPATCH": patch(set_("<e:x/>"))}
    for verb, status in refused.items():
        assert client.send(verb, "/", bodies.get(verb, b""), lock_token="urn:x").status == status, verb
    for verb in ("COPY", "MOVE"):
        assert client.send(verb, "/", destination="/to").status in (403, 409)
        assert client.send(verb, "/file", destination="/").status in (403, 409)
    assert names(client, "/") == ["file"]


def test_a_right_that_ends_while_the_body_arrives_has_ended(client: Client) -> None:
    client.put("/file")

    async def revoke() -> bytes:
        client.gate.grants = {}
        return patch(set_("<e:x/>"))

    assert client.send("PROPPATCH", "/file", pieces=[revoke], chunked=True).status == 404
    client.granted()
    assert dead(client, "/file", "{urn:example}x") == {}


# -- conditions -----------------------------------------------------------------------------------


@pytest.mark.spec("RFC 9110 §13.1.1")
@pytest.mark.parametrize(
    ("verb", "path", "header", "value"),
    [
        ("MKCOL", "/new", "if-match", "*"),
        ("DELETE", "/file", "if-match", '"other"'),
        ("DELETE", "/file", "if-none-match", "*"),
        ("MOVE", "/file", "if", '(["other"])'),
        ("COPY", "/file", "if", "(<urn:no-lock>)"),
        ("LOCK", "/new", "if-match", "*"),
        ("PROPPATCH", "/file", "if-unmodified-since", "Fri, 14 Jul 2017 02:40:00 GMT"),
    ],
)
def test_a_false_condition_changes_nothing(
    client: Client, verb: str, path: str, header: str, value: str
) -> None:
    client.put("/file", b"kept")
    body = {"LOCK": lock_body(), "PROPPATCH": patch(set_("<e:x/>"))}.get(verb, b"")
    answer = client.send(verb, path, body, **{header: value, "destination": "/to"})
    assert answer.status == 412
    assert names(client, "/") == ["file"]


def test_a_true_condition_lets_the_change_happen(client: Client) -> None:
    etag = client.put("/file").headers["etag"]
    assert client.send("DELETE", "/file", if_match=etag).status == 204


@pytest.mark.spec("RFC 4918 §10.4.4")
def test_a_tagged_list_may_name_another_resource(client: Client) -> None:
    client.put("/file")
    token = lock(client, "/to")
    tagged = {"if": f"<{ORIGIN}/to> (<{token}>)", "destination": "/to"}
    assert client.send("COPY", "/file", **tagged).status == 204
    assert client.send("COPY", "/file", **{**tagged, "if": f"</file> (<{token}>)"}).status == 412


def test_headers_that_servers_behind_proxies_trust_change_nothing(client: Client) -> None:
    answer = client.send(
        "MKCOL",
        "/new",
        x_script_name="/elsewhere",
        x_forwarded_host="other.example.org",
        x_forwarded_proto="ftp",
        x_remote_user="root",
    )
    assert (answer.status, names(client, "/")) == (201, ["new"])


# -- others at the same time ----------------------------------------------------------------------


def interfering(
    client: Client, monkeypatch: pytest.MonkeyPatch, times: int, fn: Callable[[int], Any]
) -> None:
    """Run `fn` between what WsgiDAV saw and the transaction that applies it."""
    publish, left = engine.Engine._publish, list(range(times))

    async def disturbed(self: engine.Engine, run: Any) -> None:
        if self is client.site._engine and left:
            number = left.pop(0)
            with ThreadPoolExecutor(1) as other:
                await asyncio.get_running_loop().run_in_executor(other, fn, number)
        await publish(self, run)

    monkeypatch.setattr(engine.Engine, "_publish", disturbed)


def test_what_changed_since_the_engine_looked_is_looked_at_again(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, other = make_client(), make_client()
    interfering(client, monkeypatch, 1, lambda _: other.send("MKCOL", "/new"))
    assert client.send("MKCOL", "/new").status == 405
    client.put("/one", b"1")
    interfering(client, monkeypatch, 1, lambda _: other.put("/two", b"2"))
    assert client.send("MOVE", "/one", destination="/two").status == 204
    assert names(client, "/Deleted items") == ["two"]


def test_a_lock_taken_since_the_engine_looked_counts(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, other = make_client(), make_client()
    client.put("/file", b"kept")
    interfering(client, monkeypatch, 1, lambda _: lock(other, "/file"))
    assert client.send("DELETE", "/file").status == 423
    assert client.send("GET", "/file").body == b"kept"


def test_a_condition_that_became_false_since_the_engine_looked_counts(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, other = make_client(), make_client()
    etag = client.put("/file").headers["etag"]
    interfering(client, monkeypatch, 1, lambda _: other.put("/file", b"newer"))
    assert client.send("DELETE", "/file", if_match=etag).status == 412
    assert client.send("GET", "/file").body == b"newer"


def test_changes_elsewhere_do_not_disturb(make_client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    client, other = make_client(), make_client()
    client.send("MKCOL", "/a")
    runs: list[object] = []
    attempt = engine.Engine._attempt
    monkeypatch.setattr(
        engine.Engine, "_attempt", lambda self, call: (runs.append(call), attempt(self, call))[1]
    )
    interfering(client, monkeypatch, 1, lambda _: other.put("/a/other"))
    assert client.send("MKCOL", "/a/new").status == 201
    assert len([call for call in runs if call.request.method == "MKCOL"]) == 1  # type: ignore[attr-defined]


def test_an_engine_that_is_always_overtaken_asks_to_try_later(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, other = make_client(), make_client()
    client.put("/file")

    def disturb(number: int) -> None:
        verb = "DELETE" if number % 2 else "MKCOL"
        other.send(verb, "/to")

    interfering(client, monkeypatch, 100, disturb)
    answer = client.send("MOVE", "/file", destination="/to")
    assert (answer.status, answer.headers["retry-after"]) == (Unavailable.status, "1")
    assert "file" in names(client, "/")


def test_a_copied_tree_that_changes_meanwhile_is_copied_as_it_became(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, drive: Drive
) -> None:
    client, other = make_client(), make_client()
    client.send("MKCOL", "/big")
    for number in range(205):
        client.put(f"/big/{number}")
    prepare = copying.prepare_copy
    changed: list[int] = []

    def disturbed(*args: Any, **kwargs: Any) -> copying.Prepared:
        prepared = prepare(*args, **kwargs)
        if not changed:
            changed.append(other.put("/big/late").status)
        return prepared

    monkeypatch.setattr(copying, "prepare_copy", disturbed)
    assert client.send("COPY", "/big", destination="/copy").status == 201
    client.site.close()
    with drive.database.read() as tx:
        copied = tree.resolve(tx, drive.view(), ("copy", "late")).node
    assert copied is not None
    assert usage(drive)[1] == 2 * (205 + 1 + 1)


@pytest.mark.parametrize("verb", ["MKCOL", "LOCK"])
def test_one_of_many_that_make_the_same_wins(client: Client, verb: str) -> None:
    view = client.drive.view()
    body = lock_body() if verb == "LOCK" else b""

    async def one() -> int:
        pieces = [body] if body else []
        request = client.request(verb, "/same", {}, pieces, length=len(body))
        try:
            answer: Response = await client.site._engine.handle(request, lambda _: view)
        except ClientError as error:
            return error.status
        return answer.status

    async def race() -> list[int]:
        return await asyncio.gather(*(one() for _ in range(10)))

    found = sorted(asyncio.run(race()))
    assert found == [201] + [{"MKCOL": 405, "LOCK": 423}[verb]] * 9
