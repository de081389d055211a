"""PROPFIND and the pages for people."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa

from ksync_server.drive import listing, locks, tree
from ksync_server.drive.listing import LIVE
from ksync_server.store import blobs
from ksync_server.store import tables as t
from ksync_server.store.database import Read, Write
from tests.drive.harness import Client, Drive

D, OC, MS = "{DAV:}", "{http://owncloud.org/ns}", "{urn:schemas-microsoft-com:}"
FINDER = "WebDAVFS/3.0.0 (03008000) Darwin/23.0.0 (x86_64)"


def change(client: Client, fn: Callable[[tree.Change, Callable[[str], tree.Place]], None]) -> None:
    view = tree.View(client.grant, client.drive.settings.drive, False)

    def run(tx: Write) -> None:
        made = tree.begin(tx, view)
        fn(made, lambda path: tree.resolve(tx, view, tuple(part for part in path.split("/") if part)))

    client.drive.database.write(run)


def mkdir(client: Client, *paths: str) -> None:
    for path in paths:
        change(client, lambda made, at, path=path: tree.make_folder(made, at(path)) and None)  # type: ignore[misc]


def fill(client: Client, folder: str, names: list[str]) -> None:
    for start in range(0, len(names), 100):

        def some(made: tree.Change, at: Callable[[str], tree.Place], start: int = start) -> None:
            for name in names[start : start + 100]:
                tree.put_file(made, at(f"{folder}/{name}"), blobs.staged_bytes(b"x"))

        change(client, some)


def dead(client: Client, path: str, name: str, text: str) -> None:
    def store(made: tree.Change, at: Callable[[str], tree.Place]) -> None:
        node = at(path).node
        assert node is not None
        made.tx.execute(sa.insert(t.node_property).values(node_id=node.id, name=name, xml=text))

    change(client, store)


def locked(client: Client, path: str, *, infinite: bool = False) -> str:
    token = locks.new_token()

    def store(made: tree.Change, at: Callable[[str], tree.Place]) -> None:
        place = at(path)
        assert place.node is not None
        lock = locks.Lock(
            token,
            place.node.id,
            client.grant.account_id,
            True,
            infinite,
            '<x:owner xmlns:x="DAV:">me</x:owner>',
            600,
            made.now + 600,
            place.segments,
        )
        locks.create(made.tx, client.grant.drive_id, lock, client.drive.settings.drive, made.now)

    change(client, store)
    return token


# -- what a listing holds -------------------------------------------------------------------------


@pytest.mark.spec("RFC 4918 §9.1")
def test_depth_says_how_much_is_listed(client: Client) -> None:
    mkdir(client, "/f", "/f/g")
    client.put("/f/a")
    client.put("/f/g/b")
    name = D + "resourcetype"
    assert client.propfind("/f", name, depth="0").hrefs() == ["/f/"]
    assert client.propfind("/f/", name, depth="1").hrefs() == ["/f/", "/f/a", "/f/g/"]
    assert client.propfind("/f", name, depth="infinity").hrefs() == ["/f/", "/f/a", "/f/g/", "/f/g/b"]
    assert client.propfind("/f/a", name, depth="1").hrefs() == ["/f/a"]
    assert client.propfind("/f", name, depth="2").status == 400
    assert client.propfind("/none", name).status == 404


@pytest.mark.spec("RFC 4918 §9.1.1")
def test_depth_infinity_can_be_refused_with_its_precondition(make_client: Callable[..., Client]) -> None:
    client = make_client(finite_depth=True)
    client.put("/a")
    refused = client.propfind("/", depth="infinity")
    assert (refused.status, refused.text.split()[0]) == (403, "{DAV:}propfind-finite-depth")
    assert client.propfind("/a", depth="infinity").status == 207


@pytest.mark.spec("RFC 4918 §15")
def test_the_properties_of_a_file(client: Client) -> None:
    made = client.put("/a&b.txt", b"12345", X_OC_Mtime="1234567890")
    names = [*LIVE, D + "nothing", "{urn:x}unknown", "bare"]
    answer = client.propfind("/a%26b.txt", *names, depth="0").propstats()["/a%26b.txt"]
    found = {name: element.text for name, element in answer[200].items()}
    assert found[D + "displayname"] == "a&b.txt"
    assert found[D + "getcontentlength"] == "5"
    assert found[D + "getetag"] == made.headers["etag"]
    assert found[D + "getlastmodified"] == "Fri, 13 Feb 2009 23:31:30 GMT"
    assert found[MS + "Win32LastModifiedTime"] == "Fri, 13 Feb 2009 23:31:30 GMT"
    assert found[D + "lastmodified"] == "1234567890"
    assert found[D + "getcontenttype"] == "text/plain"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found[D + "creationdate"])
    assert found[OC + "fileid"] == made.headers["oc-fileid"]
    assert found[OC + "size"] == "5"
    checksum = answer[200][OC + "checksums"].find(OC + "checksum")
    assert checksum is not None
    assert checksum.text.split()[0] == "SHA1:8cb2237d0679ca88db6464eac60da96345513964"
    assert answer[200][D + "resourcetype"].elements() == []
    assert len(answer[200][D + "supportedlock"].elements()) == 2
    assert set(answer[404]) == {
        D + "nothing",
        "{urn:x}unknown",
        "bare",
        D + "quota-available-bytes",
        D + "quota-used-bytes",
    }


@pytest.mark.spec("RFC 4331 §3")
def test_the_properties_of_a_folder(client: Client) -> None:
    client.granted(quota_bytes=1000)
    mkdir(client, "/f")
    client.put("/f/a", b"12345")
    answer = client.propfind("/f", *LIVE, depth="0").propstats()["/f/"]
    found = answer[200]
    assert [child.tag for child in found[D + "resourcetype"].elements()] == [D + "collection"]
    assert found[D + "quota-available-bytes"].text == "995"
    assert found[D + "quota-used-bytes"].text == "5"
    assert set(answer[404]) == {D + "getcontentlength", D + "getcontenttype", OC + "checksums", OC + "size"}


def test_a_folders_etag_changes_with_its_members(client: Client) -> None:
    mkdir(client, "/f")

    def etag() -> str:
        return client.propfind("/f", D + "getetag", depth="0").propstats()["/f/"][200][D + "getetag"].text

    seen = [etag()]
    for _ in range(2):
        client.put("/f/a")
        seen.append(etag())
    assert len(set(seen)) == 3
    assert etag() == seen[-1]


@pytest.mark.spec("RFC 4918 §9.1.5")
@pytest.mark.parametrize("body", [b"", b'<propfind xmlns="DAV:"><allprop/></propfind>'])
def test_allprop_has_what_is_defined_and_dead_properties_and_no_404(client: Client, body: bytes) -> None:
    client.put("/a")
    dead(client, "/a", "{urn:x}p", '<x:p xmlns:x="urn:x">v<x:q/></x:p>')
    answer = client.send("PROPFIND", "/", body, depth="1").propstats()
    for statuses in answer.values():
        assert set(statuses) == {200}
    file = answer["/a"][200]
    assert file["{urn:x}p"].text == "v"
    assert D + "getetag" in file
    assert D + "lockdiscovery" in file
    assert D + "quota-used-bytes" not in file


@pytest.mark.spec("RFC 4918 §14.8")
def test_allprop_with_include_adds_what_is_named(client: Client) -> None:
    include = '<include><quota-used-bytes/><n xmlns="urn:x"/></include>'
    body = f'<propfind xmlns="DAV:"><allprop/>{include}</propfind>'
    found = client.send("PROPFIND", "/", body.encode(), depth="0").propstats()["/"]
    assert set(found) == {200}
    assert D + "quota-used-bytes" in found[200]


@pytest.mark.spec("RFC 4918 §9.1.4")
def test_propname_lists_the_names_that_each_resource_has(client: Client) -> None:
    client.put("/a")
    dead(client, "/a", "{urn:x}p", '<x:p xmlns:x="urn:x">v</x:p>')
    body = b'<propfind xmlns="DAV:"><propname/></propfind>'
    answer = client.send("PROPFIND", "/", body, depth="1").propstats()
    assert {"{urn:x}p", D + "getetag", D + "getcontentlength"} <= set(answer["/a"][200])
    assert all(not element.children for element in answer["/a"][200].values())
    assert D + "getcontentlength" not in answer["/"][200]


@pytest.mark.spec("RFC 4918 §15.8")
def test_locks_are_listed_on_all_that_they_hold(client: Client) -> None:
    mkdir(client, "/f", "/f/g")
    client.put("/f/g/a b")
    client.put("/other")
    deep, shallow = locked(client, "/f", infinite=True), locked(client, "/other")
    answer = client.propfind("/", D + "lockdiscovery", depth="infinity").propstats()
    tokens = {href: _tokens(found[200][D + "lockdiscovery"]) for href, found in answer.items()}
    assert tokens["/f/"] == tokens["/f/g/"] == tokens["/f/g/a%20b"] == [deep]
    assert tokens["/other"] == [shallow]
    assert tokens["/"] == []
    alone = client.propfind("/f/g/a%20b", D + "lockdiscovery", depth="0").propstats()["/f/g/a%20b"]
    assert _tokens(alone[200][D + "lockdiscovery"]) == [deep]


def _tokens(discovery: Any) -> list[str]:
    return [element.find(D + "href").text for element in discovery.walk() if element.tag == D + "locktoken"]


def test_joplins_condition_and_bodies_of_other_kinds(client: Client) -> None:
    assert client.propfind("/", D + "getetag", If_None_Match="JoplinIgnore-17").status == 207
    for body in (b"<", b"<a/>", b'<propfind xmlns="DAV:"/>', b'<!DOCTYPE a><propfind xmlns="DAV:"/>'):
        assert client.send("PROPFIND", "/", body, depth="0").status == 400
    chunked = client.send(
        "PROPFIND",
        "/",
        pieces=[b'<propfind xmlns="DAV:"><prop>', b"<getetag/></prop></propfind>"],
        chunked=True,
        depth="0",
    )
    assert set(chunked.propstats()["/"][200]) == {D + "getetag"}


@pytest.mark.spec("RFC 8144 §2.1")
def test_a_minimal_answer_leaves_out_what_is_not_there(client: Client) -> None:
    client.put("/a")
    answer = client.propfind("/a", D + "getetag", "{urn:x}y", depth="0", Prefer="return=minimal")
    assert answer.headers["preference-applied"] == "return=minimal"
    assert set(answer.propstats()["/a"]) == {200}
    noroot = client.propfind("/", D + "getetag", depth="1", Prefer="depth-noroot")
    assert noroot.hrefs() == ["/Common%20documents/", "/a"]
    nothing = client.propfind("/a", "{urn:x}y", depth="0", Prefer="return=minimal")
    assert nothing.propstats()["/a"] == {200: {}}


# -- views ----------------------------------------------------------------------------------------


def test_sync_programs_see_the_drive_folder_and_people_two_folders(
    make_client: Callable[..., Client],
) -> None:
    rclone, finder = make_client(), make_client(agent=FINDER)
    rclone.put("/a")
    name = D + "displayname"
    assert rclone.propfind("/", name).hrefs() == ["/", "/Common%20documents/", "/a"]
    assert finder.propfind("/", name).hrefs() == ["/", "/Deleted%20items/", "/Team%20files/"]
    inside = ["/Team%20files/", "/Team%20files/Common%20documents/", "/Team%20files/a"]
    for client in (rclone, finder):
        answer = client.propfind("/Team%20files", name).propstats()
        assert list(answer) == inside
        assert answer["/Team%20files/"][200][name].text == "Team files"
    whole = finder.propfind("/", name, depth="infinity").hrefs()
    assert sorted(whole) == sorted(["/", "/Deleted%20items/", *inside])


@pytest.mark.parametrize(
    ("agent", "folders"),
    [
        ("Microsoft-WebDAV-MiniRedir/10.0.19045", True),
        (FINDER, True),
        ("gvfs/1.50.3", True),
        ("Cyberduck/9.0.0 (Linux)", True),
        ("Mountain Duck/4.15", True),
        ("davfs2/1.6.1 neon/0.32.5", True),
        ("Mozilla/5.0 (X11; Linux x86_64) Firefox/140.0", True),
        ("Mozilla/5.0 (Linux) mirall/3.7.3git", False),
        ("rclone/v1.75.2", False),
        ("litmus/0.13 neon/0.32.2", False),
        ("", False),
    ],
)
def test_the_view_follows_the_program(make_client: Callable[..., Client], agent: str, folders: bool) -> None:
    shown = make_client(agent=agent).propfind("/", D + "displayname").hrefs()
    assert ("/Deleted%20items/" in shown) == folders


@pytest.mark.parametrize(("root_view", "folders"), [("drive", False), ("folders", True)])
def test_the_view_can_be_set_for_all(
    make_client: Callable[..., Client], root_view: str, folders: bool
) -> None:
    for agent in (FINDER, "rclone/v1"):
        shown = make_client(agent=agent, root_view=root_view).propfind("/", D + "displayname").hrefs()
        assert ("/Deleted%20items/" in shown) == folders


def test_nothing_is_made_beside_the_two_folders(make_client: Callable[..., Client]) -> None:
    finder = make_client(agent=FINDER)
    assert finder.put("/._.DS_Store").status == 403
    assert finder.put("/Team%20files/.DS_Store").status == 201
    assert finder.put("/.DS_Store").status == 204
    assert make_client().put("/.hidden").status == 201


def test_hrefs_keep_the_form_that_the_client_used(make_client: Callable[..., Client]) -> None:
    client = make_client(base="/drives/7")
    client.put("/a b")
    assert client.propfind("/", D + "getetag").hrefs() == [
        "/drives/7/",
        "/drives/7/Common%20documents/",
        "/drives/7/a%20b",
    ]
    assert client.propfind("/Team%20files/a%20b", D + "getetag").hrefs() == ["/drives/7/Team%20files/a%20b"]


def test_common_documents_and_the_trash_list_with_their_names(make_client: Callable[..., Client]) -> None:
    alice, bob = make_client(), make_client(bob=True)
    alice.put("/Common%20documents/x")
    answer = bob.propfind("/Common%20documents", D + "displayname").propstats()
    assert list(answer) == ["/Common%20documents/", "/Common%20documents/x"]
    assert answer["/Common%20documents/"][200][D + "displayname"].text == "Common documents"
    trash = bob.propfind("/Deleted%20items", D + "displayname", D + "current-user-privilege-set").propstats()
    found = trash["/Deleted%20items/"][200]
    assert found[D + "displayname"].text == "Deleted items"
    assert D + "write" not in [element.tag for element in found[D + "current-user-privilege-set"].walk()]


def test_names_that_hurt_are_listed_under_hrefs_that_lead_back(
    client: Client, nasty_names: tuple[str, ...]
) -> None:
    kept = []
    for name in nasty_names:
        answer = client.put("/" + quote(name, safe=""))
        assert answer.status in (201, 400)
        if answer.status == 201:
            kept.append(name)
    listed = client.propfind("/", D + "displayname").propstats()
    assert len(listed) == len(kept) + 2
    for href in listed:
        assert client.propfind(href, D + "displayname", depth="0").hrefs() == [href]


# -- size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [199, 200, 201, 450])
def test_pages_lose_and_repeat_nothing(client: Client, count: int) -> None:
    names = [f"n{number:04}" for number in range(count)]
    mkdir(client, "/f")
    fill(client, "/f", names)
    hrefs = client.propfind("/f", D + "getetag").hrefs()
    assert hrefs == ["/f/", *(f"/f/{name}" for name in names)]
    assert len(client.propfind("/", D + "getetag", depth="infinity").hrefs()) == count + 3


@pytest.mark.parametrize("what", ["dead properties", "locks"])
def test_members_with_much_to_tell_come_in_smaller_pages(
    client: Client, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What one account can attach to its files must not be in memory all at once."""
    pages: list[int] = []

    def counted(walk: listing._Walk, tx: Read) -> str:
        text = page(walk, tx)
        pages.append(len(text))
        return text

    def read(walk: listing._Walk, *given: Any) -> tuple[int, dict[int, dict[str, str]]]:
        count, found = dead_of(walk, *given)
        pages.append(sum(len(text) for each in found.values() for text in each.values()))
        return count, found

    page, dead_of = listing._Walk.page, listing._Walk._dead_of
    monkeypatch.setattr(listing._Walk, "page", counted)
    monkeypatch.setattr(listing._Walk, "_dead_of", read)
    monkeypatch.setattr(listing, "_PAGE_BYTES", 10_000)
    mkdir(client, "/large")
    names = [f"f{number:03}" for number in range(30)]
    fill(client, "/large", names)
    for name in names if what == "dead properties" else ():
        for prop in "ab":
            dead(
                client,
                f"/large/{name}",
                f"{{urn:e}}{prop}",
                f'<x:{prop} xmlns:x="urn:e">{"x" * 1000}</x:{prop}>',
            )
    if what == "locks":
        locked(client, "/large", infinite=True)
        with client.drive.database.engine.begin() as connection:
            connection.execute(
                sa.update(t.lock).values(owner_xml=f'<x:owner xmlns:x="DAV:">{"x" * 2000}</x:owner>')
            )
    body = b'<propfind xmlns="DAV:"><allprop/></propfind>'
    answer = client.send("PROPFIND", "/large", body, depth="1")
    assert answer.hrefs() == ["/large/", *(f"/large/{name}" for name in names)]
    assert answer.text.count("x" * 1000) >= 60
    assert len(pages) > 4
    assert max(pages) < 20_000


def test_a_tree_of_many_folders_is_listed_whole(client: Client) -> None:
    def grow(made: tree.Change, at: Callable[[str], tree.Place]) -> None:
        tree.make_folder(made, at("/t"))
        for number in range(230):
            tree.make_folder(made, at(f"/t/{number}"))
            tree.put_file(made, at(f"/t/{number}/f"), blobs.staged_bytes(b""))

    change(client, grow)
    hrefs = client.propfind("/t", D + "getetag", depth="infinity").hrefs()
    assert len(hrefs) == 1 + 460
    assert {f"/t/{number}/f" for number in range(230)} <= set(hrefs)


def test_no_transaction_is_open_while_a_listing_is_sent(client: Client, drive: Drive) -> None:
    mkdir(client, "/f")
    fill(client, "/f", [f"n{number:04}" for number in range(450)])

    async def run() -> str:
        request = client.request("PROPFIND", "/f", {"depth": "1"})
        response = await client.site.handle(request, client.identity)
        assert not isinstance(response.body, bytes)
        first = await anext(response.body)
        # A write between two pages is neither blocked nor does it break the rest.
        await client.answer(client.request("PUT", "/f/z-new", {}, [b"x"], length=1))
        return first.decode() + "".join([piece.decode() async for piece in response.body])

    text = asyncio.run(run())
    assert text.count("<d:response>") == 452
    assert text.endswith("</d:multistatus>")


# -- pages for people -----------------------------------------------------------------------------


def test_a_browser_sees_a_safe_page(make_client: Callable[..., Client]) -> None:
    browser = make_client(agent="Mozilla/5.0 Firefox/140.0", base="/drives/1")
    evil = "<img src=x onerror=alert(1)>\"'&.txt"
    mkdir(browser, "/f")
    browser.put("/f/" + quote(evil, safe=""))
    top = browser.send("GET", "/")
    assert "Deleted items/" in top.text
    assert 'href="/drives/1/Team%20files/"' in top.text
    page = browser.send("GET", "/Team%20files/f")
    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert html.escape(evil) in page.text
    assert "<img" not in page.text
    assert "<script" not in page.text
    assert 'href="/drives/1/Team%20files/">../' in page.text
    head = browser.send("HEAD", "/")
    assert (head.status, head.body) == (200, b"")


def test_a_large_folder_is_a_whole_page(client: Client) -> None:
    mkdir(client, "/f")
    fill(client, "/f", [f"n{number:04}" for number in range(450)])
    assert client.send("GET", "/f/").text.count("<tr>") == 452
