"""A secret for one folder sees it as the root of its drive, and nothing else by any verb or header."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from ksync_server.auth import folders
from ksync_server.auth.gate import DriveGrant, DriveTarget, Identity
from ksync_server.drive import tree
from ksync_server.errors import NotFound
from ksync_server.store.database import Read
from ksync_server.wire import xml
from tests.drive.harness import Answer, Client, Drive, Gate

LOCK = (
    f"<d:lockinfo{xml.NAMESPACES}><d:lockscope><d:exclusive/></d:lockscope>"
    "<d:locktype><d:write/></d:locktype></d:lockinfo>"
).encode()
SECRET = "outside"  # in every name that the folder's program must never see
AGENTS = ("rclone/v1.75.2", "Microsoft-WebDAV-MiniRedir/10.0", "Mozilla/5.0 (X11)")


class NarrowGate(Gate):
    """As auth.gate: the folder is looked for in every transaction."""

    def __init__(self, grant: DriveGrant, folder_id: int) -> None:
        super().__init__([grant])
        self.folder_id = folder_id

    def authorize(self, tx: Read, identity: Identity, target: DriveTarget, verb: str) -> DriveGrant:
        grant = super().authorize(tx, identity, target, verb)
        places = {"root_id": grant.root_id, "common_id": grant.common_id}
        folder = folders.find(tx, self.folder_id, grant.drive_id, **places)
        if folder is None:
            raise NotFound("There is nothing here.")
        return replace(grant, folder=folder)


def node(drive: Drive, *path: str) -> tree.Node:
    with drive.database.read() as tx:
        found = tree.resolve(tx, drive.view(), path).node
    assert found is not None
    return found


MakeClient = Callable[..., Client]


@pytest.fixture(params=["Projects/Next", "Common documents/Next"])
def place(request: pytest.FixtureRequest) -> str:
    """Where the folder lies."""
    where: str = request.param
    return where


@pytest.fixture
def wide(make_client: MakeClient, place: str) -> Client:
    """Alice's own program: files inside the folder, beside it and above it."""
    client = make_client()
    for path in ("/Projects", f"/{place}", f"/{place}/sub"):
        client.send("MKCOL", path)
    for path in (f"/{place}/a.txt", f"/{place}/sub/b.txt", f"/{SECRET}.txt", f"/Projects/{SECRET}.txt"):
        assert client.put(path).status == 201
    client.put(f"/Common documents/{SECRET}.txt")
    client.put(f"/{SECRET}-deleted.txt")
    assert client.send("DELETE", f"/{SECRET}-deleted.txt").status == 204
    return client


@pytest.fixture
def narrow(make_client: MakeClient, wide: Client, drive: Drive, place: str) -> Client:
    """A program of alice with the folder's secret."""
    client = make_client()
    narrowed(client, drive, place)
    return client


def narrowed(client: Client, drive: Drive, place: str) -> None:
    gate = NarrowGate(client.grant, node(drive, *place.split("/")).id)
    client.gate = gate
    client.site._gate = gate


def checked(answer: Answer) -> Answer:
    """Nothing in it speaks of what lies outside."""
    said = answer.text + repr(answer.headers)
    assert not any(word in said for word in (SECRET, "Projects", "Common documents", "Deleted items")), said
    return answer


def test_the_folder_is_the_root_whatever_the_program(
    wide: Client, drive: Drive, make_client: MakeClient, place: str
) -> None:
    for agent in AGENTS:
        client = make_client(agent=agent)
        narrowed(client, drive, place)
        assert sorted(checked(client.propfind("/")).hrefs()) == ["/", "/a.txt", "/sub/"]
        every = checked(client.propfind("/", depth="infinity")).hrefs()
        assert sorted(every) == ["/", "/a.txt", "/sub/", "/sub/b.txt"]
        page = client.send("GET", "/")
        assert "a.txt" in page.text
        assert "../" not in page.text
        assert SECRET not in page.text
        assert "Common documents" not in page.text
        assert checked(client.send("GET", "/sub/b.txt")).body == b"content"


def test_every_property_of_the_folder_is_silent_about_the_rest(narrow: Client) -> None:
    for answer in (narrow.propfind("/"), narrow.propfind("/", *_NAMES), narrow.propfind("/sub", *_NAMES)):
        checked(answer)
    asked = narrow.propfind("/", "{DAV:}quota-used-bytes", "{DAV:}quota-available-bytes", depth="0")
    assert "{DAV:}quota-used-bytes" in asked.propstats()["/"][404]
    narrow.granted(quota_bytes=1000)
    narrow.gate.grants = {narrow.grant.account_id: narrow.grant}
    asked = narrow.propfind("/", "{DAV:}quota-available-bytes", depth="0")
    assert int(asked.propstats()["/"][200]["{DAV:}quota-available-bytes"].text) < 1000


_NAMES = (
    "{DAV:}displayname",
    "{DAV:}current-user-privilege-set",
    "{DAV:}lockdiscovery",
    "{DAV:}supportedlock",
    "{DAV:}quota-available-bytes",
    "{http://owncloud.org/ns}permissions",
    "{http://owncloud.org/ns}fileid",
)


@pytest.mark.parametrize(
    "path",
    [
        "/Deleted items",
        "/Deleted items/outside-deleted.txt",
        "/Common documents",
        "/Common documents/outside.txt",
        "/Team files",
        "/Team files/outside.txt",
        "/Projects",
        "/Projects/Next/a.txt",
        "/outside.txt",
    ],
)
def test_no_name_of_the_drive_means_anything_inside(narrow: Client, path: str) -> None:
    for method in ("GET", "PROPFIND", "DELETE", "PROPPATCH", "UNLOCK"):
        assert narrow.send(method, path).status in (400, 404), method
    assert narrow.send("COPY", path, destination="https://files.example.org/taken").status == 404
    assert narrow.send("MOVE", path, destination="https://files.example.org/taken").status == 404


@pytest.mark.parametrize(
    "path", ["/../outside.txt", "/sub/../../outside.txt", "/%2e%2e/outside.txt", "/..%2foutside.txt"]
)
def test_no_path_leads_out(narrow: Client, path: str) -> None:
    for method in ("GET", "PROPFIND", "DELETE", "PUT", "MKCOL"):
        assert narrow.send(method, path).status in (400, 404), method


def test_files_are_made_changed_moved_and_copied_inside(narrow: Client, wide: Client, place: str) -> None:
    assert narrow.put("/new.txt", b"new").status == 201
    assert wide.send("GET", f"/{place}/new.txt").body == b"new"
    assert narrow.send("MKCOL", "/folder").status == 201
    to = "https://files.example.org/folder/moved.txt"
    assert narrow.send("MOVE", "/new.txt", destination=to).status == 201
    assert narrow.send("COPY", "/folder/", destination="https://files.example.org/sub/copy").status == 201
    assert wide.send("GET", f"/{place}/sub/copy/moved.txt").body == b"new"
    assert narrow.send("COPY", "/a.txt", destination="https://files.example.org/outside.txt").status == 201
    assert wide.send("GET", f"/{place}/outside.txt").status == 200
    assert wide.send("GET", "/outside.txt").headers["content-length"] == "7"
    up = narrow.send("COPY", "/a.txt", destination="https://files.example.org/../stolen.txt")
    assert up.status in (400, 404)


def test_what_it_deletes_goes_to_the_members_deleted_items(narrow: Client, wide: Client) -> None:
    assert narrow.send("DELETE", "/a.txt").status == 204
    assert narrow.put("/sub/b.txt", b"next").status == 204
    assert wide.send("GET", "/Deleted items/a.txt").body == b"content"
    assert narrow.send("GET", "/Deleted items/a.txt").status == 404


def test_the_folder_itself_cannot_be_moved_deleted_replaced_or_locked(
    narrow: Client, wide: Client, place: str
) -> None:
    assert narrow.send("DELETE", "/").status == 403
    assert narrow.send("MOVE", "/", destination="https://files.example.org/sub/x").status in (403, 409)
    assert narrow.send("COPY", "/", destination="https://files.example.org/sub/x").status in (403, 409)
    assert narrow.send("MOVE", "/a.txt", destination="https://files.example.org/").status in (403, 409)
    assert narrow.put("/").status in (403, 405)
    assert narrow.send("MKCOL", "/").status == 405
    assert narrow.send("LOCK", "/", LOCK, depth="infinity").status in (403, 423)
    assert wide.send("GET", f"/{place}/a.txt").status == 200


def token_of(answer: Answer) -> str:
    return answer.headers["lock-token"].strip("<>")


def test_a_lock_taken_inside_has_its_root_in_both_views(narrow: Client, wide: Client, place: str) -> None:
    taken = narrow.send("LOCK", "/a.txt", LOCK)
    assert taken.status == 200
    assert "<d:lockroot><d:href>/a.txt</d:href></d:lockroot>" in checked(taken).text
    for client, path in ((narrow, "/a.txt"), (wide, f"/{place}/a.txt".replace(" ", "%20"))):
        found = client.propfind(path, "{DAV:}lockdiscovery", depth="0")
        assert f"<d:lockroot><d:href>{path}</d:href></d:lockroot>" in found.text
        refused = client.put(path, b"x")
        assert refused.status == 423
    assert wide.put(f"/{place}/a.txt", b"x", If=f"(<{token_of(taken)}>)").status == 204
    assert narrow.send("UNLOCK", "/a.txt", lock_token=f"<{token_of(taken)}>").status == 204


def test_a_lock_above_holds_the_folder_and_says_no_name(
    narrow: Client, wide: Client, place: str, drive: Drive
) -> None:
    above = "/Projects" if place.startswith("Projects") else f"/{place}"
    taken = wide.send("LOCK", above, LOCK, depth="infinity")
    assert taken.status == 200
    token = token_of(taken)
    refused = narrow.put("/new.txt")
    assert refused.status == 423
    checked(refused)
    seen = checked(narrow.propfind("/a.txt", "{DAV:}lockdiscovery", depth="0"))
    assert "<d:lockroot><d:href>/</d:href></d:lockroot>" in seen.text
    conflict = narrow.send("LOCK", "/a.txt", LOCK)
    assert conflict.status == 423
    checked(conflict)
    assert narrow.put("/new.txt", If=f"(<{token}>)").status == 201, "the account's own lock opens for it"
    if above == "/Projects":
        assert narrow.send("UNLOCK", "/a.txt", lock_token=f"<{token}>").status == 409
        assert narrow.send("LOCK", "/a.txt", If=f"(<{token}>)").status in (403, 412)
        assert wide.put("/Projects/x.txt").status == 423, "it is still locked"
    assert wide.send("UNLOCK", above, lock_token=f"<{token}>").status == 204


def test_a_lock_below_beside_or_in_the_other_form_is_told_right(
    narrow: Client, wide: Client, place: str
) -> None:
    assert wide.send("LOCK", f"/Team files/{place}/sub", LOCK, depth="infinity").status == 200
    seen = narrow.propfind("/sub/b.txt", "{DAV:}lockdiscovery", depth="0")
    assert "<d:lockroot><d:href>/sub</d:href></d:lockroot>" in seen.text
    assert wide.send("LOCK", f"/{SECRET}.txt", LOCK).status == 200
    checked(narrow.propfind("/", "{DAV:}lockdiscovery", depth="infinity"))


def test_an_if_header_knows_nothing_outside(narrow: Client, wide: Client) -> None:
    outside = wide.send("GET", f"/{SECRET}.txt").headers["etag"]
    for href in (f"/{SECRET}.txt", f"https://files.example.org/{SECRET}.txt", f"/../{SECRET}.txt"):
        assert narrow.put("/a.txt", b"x", If=f"<{href}> ([{outside}])").status == 412, href
        assert narrow.put("/a.txt", b"x", If=f"<{href}> (Not [{outside}])").status == 204, href
    inside = narrow.send("GET", "/sub/b.txt").headers["etag"]
    assert narrow.put("/a.txt", b"x", If=f"</sub/b.txt> ([{inside}])").status == 204


def test_a_folder_that_is_renamed_or_moved_stays_the_root(narrow: Client, wide: Client, place: str) -> None:
    to = "https://files.example.org/Projects/Renamed"
    assert wide.send("MOVE", f"/{place}", destination=to).status == 201
    assert sorted(checked(narrow.propfind("/")).hrefs()) == ["/", "/a.txt", "/sub/"]


def test_a_folder_in_the_deleted_items_opens_nothing(narrow: Client, wide: Client, place: str) -> None:
    above = "/Projects" if place.startswith("Projects") else f"/{place}"
    assert wide.send("DELETE", above).status == 204
    for method in (
        "GET",
        "HEAD",
        "OPTIONS",
        "PROPFIND",
        "PUT",
        "MKCOL",
        "DELETE",
        "PROPPATCH",
        "LOCK",
        "UNLOCK",
    ):
        for path in ("/", "/a.txt", "/new"):
            assert narrow.send(method, path).status == 404, (method, path)
    for method in ("COPY", "MOVE"):
        assert narrow.send(method, "/a.txt", destination="https://files.example.org/b").status == 404


def test_reading_alone_is_what_the_privileges_say(client: Client) -> None:
    """RFC 3744 §5.5: a program sees that it cannot write before it tries."""
    client.put("/a.txt")
    names = ("{DAV:}current-user-privilege-set", "{http://owncloud.org/ns}permissions")
    assert "d:write" in client.propfind("/a.txt", *names).text
    client.granted(read_only=True)
    for path in ("/", "/a.txt", "/Deleted items", "/Common documents"):
        (found,) = client.propfind(path, *names, depth="0").propstats().values()
        privileges = [element.elements()[0].tag for element in found[200][names[0]].elements()]
        assert privileges == ["{DAV:}read"]
        assert found[200][names[1]].text == "G"
