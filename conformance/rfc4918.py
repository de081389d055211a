"""What a strict reader of RFC 4918 (WebDAV) and RFC 4331 (quota) expects of a drive."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote

import pytest

from conformance.client import DAV, NAMESPACES, Answer, Client
from conformance.client import escaped as esc
from conformance.conftest import Collection
from conformance.names import CONTROL_NAMES, NASTY_NAMES
from conformance.target import Target

spec = pytest.mark.spec
EXAMPLE = "{http://example.org/ns/}"
LOCK = f'<?xml version="1.0"?><D:lockinfo {NAMESPACES}><D:lockscope><D:%s/></D:lockscope>'
LOCK += "<D:locktype><D:write/></D:locktype><D:owner><D:href>urn:me</D:href></D:owner></D:lockinfo>"


def put(folder: Collection, name: str, content: bytes = b"content", **headers: str) -> Answer:
    fields = {key.replace("_", "-"): value for key, value in headers.items()}
    return folder.client.request("PUT", folder / esc(name), content, fields)


def get(folder: Collection, name: str) -> Answer:
    return folder.client.request("GET", folder / esc(name))


def transfer(method: str, folder: Collection, source: str, target: str, **headers: str) -> Answer:
    """COPY or MOVE between two escaped paths below the folder."""
    fields = {"Destination": folder.client.url(folder / target)}
    fields.update({key.replace("_", "-"): value for key, value in headers.items()})
    return folder.client.request(method, folder / source, None, fields)


def lock(
    folder: Collection, path: str, scope: str = "exclusive", depth: str = "infinity", **headers: str
) -> Answer:
    fields = {"Depth": depth, "Timeout": "Second-600"}
    fields.update({key.replace("_", "-"): value for key, value in headers.items()})
    return folder.client.request("LOCK", folder / path, LOCK % scope, fields)


def token_of(answer: Answer) -> str:
    assert answer.status in (200, 201), (answer.status, answer.body[:500])
    return answer.header("Lock-Token").strip("<>")


def unlock(folder: Collection, path: str, token: str) -> int:
    return folder.client.request("UNLOCK", folder / path, None, {"Lock-Token": f"<{token}>"}).status


@pytest.fixture
def tree(folder: Collection) -> Collection:
    """`a/` with `one`, `b/` and `b/two`."""
    for name in ("a/", "a/b/"):
        assert folder.client.request("MKCOL", folder / name).status == 201
    assert put(folder, "unused").status == 201
    assert folder.client.request("PUT", folder / "a/one", b"1").status == 201
    assert folder.client.request("PUT", folder / "a/b/two", b"22").status == 201
    return folder


# PUT, GET, HEAD, OPTIONS


@spec("RFC 4918 §10.1")
def test_options_tells_the_compliance_classes_and_the_methods(folder: Collection) -> None:
    for path in (folder.path, folder.client.path("")):
        answer = folder.client.request("OPTIONS", path)
        assert answer.status in (200, 204)
        classes = {part.strip() for part in answer.header("DAV").split(",")}
        assert {"1", "2"} <= classes
        allowed = {part.strip() for part in answer.header("Allow").split(",")}
        assert {
            "OPTIONS",
            "GET",
            "HEAD",
            "PUT",
            "DELETE",
            "PROPFIND",
            "PROPPATCH",
            "MKCOL",
            "COPY",
            "MOVE",
        } <= allowed
        assert {"LOCK", "UNLOCK"} <= allowed


@spec("RFC 4918 §9.7")
def test_put_creates_then_replaces_and_get_returns_the_bytes(folder: Collection) -> None:
    first = put(folder, "file", b"one")
    assert first.status == 201
    second = put(folder, "file", b"two two")
    assert second.status == 204
    answer = get(folder, "file")
    assert (answer.status, answer.body) == (200, b"two two")
    assert answer.etag == second.etag != first.etag
    assert re.fullmatch(r'"[^"]+"', answer.etag), "strong at once"


@spec("RFC 4918 §9.4")
def test_head_is_get_without_a_body(folder: Collection) -> None:
    put(folder, "file", b"x" * 1000)
    got, head = get(folder, "file"), folder.client.request("HEAD", folder / "file")
    assert head.body == b""
    for name in ("ETag", "Last-Modified", "Content-Length", "Content-Type", "Accept-Ranges"):
        assert head.header(name) == got.header(name), name


@spec("RFC 4918 §15.6")
def test_getetag_is_the_etag_of_get(folder: Collection) -> None:
    put(folder, "file")
    (row,) = folder.client.propfind(folder / "file", "D:getetag", "D:getcontentlength", "D:getlastmodified")
    answer = get(folder, "file")
    assert row.text(f"{DAV}getetag") == answer.etag
    assert row.text(f"{DAV}getcontentlength") == answer.header("Content-Length")
    assert row.text(f"{DAV}getlastmodified") == answer.header("Last-Modified")


@spec("RFC 4918 §8.6")
def test_same_size_writes_have_different_etags(folder: Collection) -> None:
    etags = [put(folder, "file", bytes([65 + turn]) * 10).etag for turn in range(8)]
    assert len(set(etags)) == 8


@spec("RFC 4918 §9.7.1")
def test_put_without_a_parent_is_409(folder: Collection) -> None:
    assert folder.client.request("PUT", folder / "none/file", b"x").status == 409
    assert folder.client.request("PUT", folder / "none/below/file", b"x").status == 409


@spec("RFC 4918 §9.7.2")
def test_put_to_a_collection_is_405(folder: Collection) -> None:
    assert folder.client.request("PUT", folder.path, b"x").status in (405, 409)
    assert folder.client.request("PUT", folder.path.rstrip("/"), b"x").status in (405, 409)
    assert folder.members() == set()


@spec("RFC 9110 §14.5")
def test_put_with_content_range_is_400(folder: Collection) -> None:
    put(folder, "file", b"0123456789")
    assert put(folder, "file", b"xx", Content_Range="bytes 2-3/10").status == 400
    assert get(folder, "file").body == b"0123456789"


def test_a_file_that_a_browser_would_run_is_sent_harmless(folder: Collection) -> None:
    put(folder, "page.html", b"<script>alert(1)</script>", Content_Type="text/html")
    answer = get(folder, "page.html")
    assert answer.header("X-Content-Type-Options") == "nosniff"
    assert "sandbox" in answer.header("Content-Security-Policy")


# Conditions


@spec("RFC 9110 §13.1")
def test_conditions_of_put(folder: Collection) -> None:
    assert put(folder, "file", b"new", If_Match="*").status == 412
    assert put(folder, "file", b"new", If_Match='"any"').status == 412
    assert folder.members() == set()
    etag = put(folder, "file", b"one", If_None_Match="*").etag
    assert put(folder, "file", b"two", If_None_Match="*").status == 412
    assert put(folder, "file", b"two", If_None_Match=etag).status == 412
    assert put(folder, "file", b"two", If_Match='"other"').status == 412
    assert put(folder, "file", b"two", If_Match=f"W/{etag}").status == 412, "If-Match compares strongly"
    assert get(folder, "file").body == b"one"
    assert put(folder, "file", b"two", If_Match=f'"other", {etag}').status == 204
    assert put(folder, "file", b"three", If_Match="*").status == 204
    assert put(folder, "file", b"four", If_Unmodified_Since="Mon, 01 Jan 2001 00:00:00 GMT").status == 412
    assert get(folder, "file").body == b"three"


@spec("RFC 9110 §13.1.2")
@spec("RFC 9110 §13.1.3")
def test_conditions_of_get(folder: Collection) -> None:
    put(folder, "file", b"one")
    whole = get(folder, "file")

    def status(**headers: str) -> int:
        fields = {key.replace("_", "-"): value for key, value in headers.items()}
        return folder.client.request("GET", folder / "file", None, fields).status

    assert status(If_None_Match=whole.etag) == 304
    assert status(If_None_Match=f"W/{whole.etag}") == 304
    assert status(If_None_Match='"other"') == 200
    assert status(If_Match='"other"') == 412
    assert status(If_Modified_Since=whole.header("Last-Modified")) == 304
    assert status(If_Modified_Since="Mon, 01 Jan 2001 00:00:00 GMT") == 200
    assert status(If_Modified_Since="nonsense") == 200
    assert status(If_None_Match='"other"', If_Modified_Since=whole.header("Last-Modified")) == 200


def test_joplin_propfind_with_if_none_match_is_never_304(folder: Collection) -> None:
    answer = folder.client.request(
        "PROPFIND", folder.path, None, {"Depth": "1", "If-None-Match": "JoplinIgnore-1590"}
    )
    assert answer.status == 207


@spec("RFC 9110 §14")
def test_ranges(folder: Collection) -> None:
    content = bytes(range(256)) * 400
    put(folder, "file", content)

    def part(value: str, **headers: str) -> tuple[int, bytes, str]:
        fields = {"Range": value, **{key.replace("_", "-"): text for key, text in headers.items()}}
        answer = folder.client.request("GET", folder / "file", None, fields)
        return answer.status, answer.body, answer.header("Content-Range")

    size = len(content)
    assert part("bytes=0-9") == (206, content[:10], f"bytes 0-9/{size}")
    assert part("bytes=100-") == (206, content[100:], f"bytes 100-{size - 1}/{size}")
    assert part("bytes=-7") == (206, content[-7:], f"bytes {size - 7}-{size - 1}/{size}")
    assert part(f"bytes=-{size * 2}") == (206, content, f"bytes 0-{size - 1}/{size}")
    assert part(f"bytes=0-{size * 2}")[1] == content
    assert part(f"bytes={size}-")[0::2] == (416, f"bytes */{size}")
    assert part("bytes=-0")[0] == 416
    for ignored in ("bytes=5-2", "lines=1-2", "bytes=a-b", "bytes 0-9"):
        assert part(ignored)[:2] == (200, content), ignored
    etag = get(folder, "file").etag
    assert part("bytes=0-9", If_Range=etag)[0] == 206
    assert part("bytes=0-9", If_Range='"other"')[:2] == (200, content)


@spec("RFC 9110 §14.2")
def test_two_ranges_are_two_parts_or_the_whole(folder: Collection) -> None:
    put(folder, "file", b"0123456789" * 10)
    answer = folder.client.request("GET", folder / "file", None, {"Range": "bytes=0-4,50-54"})
    if answer.status == 206:
        assert answer.header("Content-Type").startswith("multipart/byteranges")
        assert answer.body.lower().count(b"content-range: bytes") == 2
    else:
        assert (answer.status, len(answer.body)) == (200, 100)


# MKCOL, DELETE


@spec("RFC 4918 §9.3")
def test_mkcol(folder: Collection) -> None:
    make = folder.client.request
    assert make("MKCOL", folder / "new/").status == 201
    assert make("MKCOL", folder / "new/").status == 405
    assert make("MKCOL", folder / "new").status == 405
    assert make("MKCOL", folder / "none/below/").status == 409
    put(folder, "file")
    assert make("MKCOL", folder / "file").status == 405
    assert make("MKCOL", folder / "file/below/").status in (403, 409)
    assert make("MKCOL", folder / "body/", b"not understood", {"Content-Type": "text/plain"}).status == 415
    assert folder.members() == {"new", "file"}


@spec("RFC 4918 §9.6")
def test_delete(tree: Collection) -> None:
    assert tree.client.request("DELETE", tree / "none").status == 404
    assert tree.client.request("DELETE", tree / "a/", None, {"Depth": "1"}).status == 400
    assert tree.client.request("DELETE", tree / "a/", None, {"Depth": "0"}).status == 400
    assert tree.client.request("DELETE", tree / "a/one", None, {"If-Match": '"other"'}).status == 412
    assert tree.client.request("DELETE", tree / "a/").status == 204
    assert tree.client.request("GET", tree / "a/b/two").status == 404
    assert tree.members() == {"unused"}


def test_webdav_methods_are_never_redirected(tree: Collection) -> None:
    for method in ("PROPFIND", "GET", "PROPPATCH", "LOCK", "DELETE"):
        body = LOCK % "exclusive" if method == "LOCK" else None
        answer = tree.client.request(
            method, tree / "a", body, {"Depth": "0"} if method == "PROPFIND" else None
        )
        assert answer.status not in (301, 302, 303, 307, 308), method
        if method == "LOCK":
            unlock(tree, "a", token_of(answer))
    assert "a" not in tree.members()


# COPY, MOVE


@spec("RFC 4918 §9.8")
def test_copy_of_a_file(folder: Collection) -> None:
    put(folder, "source", b"source")
    assert transfer("COPY", folder, "source", "new").status == 201
    assert transfer("COPY", folder, "source", "new").status == 204
    put(folder, "other", b"other")
    assert transfer("COPY", folder, "other", "new", Overwrite="F").status == 412
    assert get(folder, "new").body == b"source"
    assert transfer("COPY", folder, "other", "new", Overwrite="T").status == 204
    assert get(folder, "new").body == b"other"
    assert transfer("COPY", folder, "source", "none/new").status == 409
    assert transfer("COPY", folder, "none", "new").status == 404
    assert transfer("COPY", folder, "source", "source").status == 403
    assert transfer("COPY", folder, "source", "with-depth", Depth="1").status == 201, (
        "Depth means nothing for a file"
    )


@spec("RFC 4918 §9.8.3")
def test_copy_of_a_tree(tree: Collection) -> None:
    assert transfer("COPY", tree, "a/", "deep/").status == 201
    assert tree.client.request("GET", tree / "deep/b/two").body == b"22"
    assert transfer("COPY", tree, "a/", "shallow/", Depth="0").status == 201
    assert tree.client.members(tree / "shallow/") == set()
    assert transfer("COPY", tree, "a/", "bad/", Depth="1").status == 400
    assert transfer("COPY", tree, "a/", "a/b/again/").status in (403, 409)
    assert transfer("COPY", tree, "a/", "a/").status == 403


@spec("RFC 4918 §9.8.4")
def test_copy_replaces_a_tree_whole(tree: Collection) -> None:
    tree.client.request("MKCOL", tree / "old/")
    tree.client.request("PUT", tree / "old/rest", b"x")
    assert transfer("COPY", tree, "a/", "old/").status == 204
    assert tree.client.members(tree / "old/") == {"one", "b"}


@spec("RFC 4918 §9.9")
def test_move(tree: Collection) -> None:
    assert transfer("MOVE", tree, "a/", "moved/").status == 201
    assert tree.client.request("GET", tree / "moved/b/two").body == b"22"
    assert tree.client.request("GET", tree / "a/one").status == 404
    assert transfer("MOVE", tree, "moved/", "moved/b/c/").status in (403, 409)
    assert transfer("MOVE", tree, "moved/", "moved/").status == 403
    assert transfer("MOVE", tree, "moved/", "none/x/").status == 409
    assert transfer("MOVE", tree, "unused", "moved/", Overwrite="F").status == 412
    assert transfer("MOVE", tree, "moved/one", "unused").status == 204
    assert get(tree, "unused").body == b"1"
    assert transfer("MOVE", tree, "moved/", "bad/", Depth="0").status == 400
    assert tree.members() == {"moved", "unused"}


@spec("RFC 4918 §9.9")
def test_move_that_changes_only_capitals(folder: Collection) -> None:
    put(folder, "name", b"x")
    assert transfer("MOVE", folder, "name", "NAME").status == 201
    assert folder.members() == {"NAME"}


@spec("RFC 4918 §10.3")
@pytest.mark.parametrize("method", ["COPY", "MOVE"])
def test_destinations_that_are_none(folder: Collection, method: str) -> None:
    put(folder, "file")
    send = folder.client.request
    assert send(method, folder / "file").status == 400
    for destination, allowed in (
        ("http://elsewhere.example.org/file", {502, 403}),
        ("ftp://elsewhere.example.org/file", {400, 502, 403}),
        ("nonsense", {400, 502}),
        ("", {400}),
        ("http://", {400, 502}),
        ("http://[", {400, 502}),
        (folder.client.url(folder / "target") + "#fragment", {400}),
        (folder.client.url(folder / "%ff%fe"), {400, 403}),
        (folder.client.url(folder / "a%00b"), {400, 403}),
        (folder.client.url(folder / "bad%zzescape"), {400}),
    ):
        answer = send(method, folder / "file", None, {"Destination": destination})
        assert answer.status in allowed, (destination, answer.status)
    answer = send(
        method, folder / "file", None, {"Destination": folder / "absolute path".replace(" ", "%20")}
    )
    assert answer.status == 201, "an absolute path is a Destination too"
    assert folder.members() - {"file"} == {"absolute path"}


@spec("RFC 4918 §10.6")
def test_a_nonsense_overwrite_is_400(folder: Collection) -> None:
    put(folder, "file")
    put(folder, "other")
    assert transfer("COPY", folder, "file", "other", Overwrite="maybe").status == 400


# PROPFIND, PROPPATCH


@spec("RFC 4918 §9.1")
def test_propfind_depths(tree: Collection) -> None:
    def paths(depth: str) -> list[str]:
        rows = tree.client.propfind(tree.path, "D:resourcetype", depth=depth)
        return sorted(unquote(row.path).removeprefix(unquote(tree.path)).rstrip("/") for row in rows)

    assert paths("0") == [""]
    assert paths("1") == ["", "a", "unused"]
    answer = tree.client.request("PROPFIND", tree.path, None, {"Depth": "infinity"})
    if answer.status == 207:
        assert paths("infinity") == ["", "a", "a/b", "a/b/two", "a/one", "unused"]
        without = tree.client.request("PROPFIND", tree.path).rows
        assert len(without) == 6, "no Depth means infinity"
    else:
        assert (answer.status, answer.preconditions) == (403, (f"{DAV}propfind-finite-depth",))
    for depth in ("2", "-1", "1,noroot", "one"):
        assert tree.client.request("PROPFIND", tree.path, None, {"Depth": depth}).status == 400, depth


@spec("RFC 4918 §9.1.5")
def test_propfind_hrefs_of_collections_end_with_a_slash(tree: Collection) -> None:
    for path in (tree.path, tree.path.rstrip("/")):
        for row in tree.client.propfind(path, "D:resourcetype", depth="1"):
            assert row.path.endswith("/") == bool(len(row.properties[f"{DAV}resourcetype"])), row.href


@spec("RFC 4918 §9.1.3")
def test_unknown_properties_are_404_in_their_own_propstat(folder: Collection) -> None:
    (row,) = folder.client.propfind(folder.path, "D:resourcetype", "E:unknown", "D:unknown")
    assert row.refused == {f"{EXAMPLE}unknown": 404, f"{DAV}unknown": 404}
    assert f"{DAV}resourcetype" in row.properties


@spec("RFC 4918 §9.1.4")
@spec("RFC 4918 §9.1.6")
def test_allprop_propname_and_an_empty_body(folder: Collection) -> None:
    put(folder, "file")
    folder.client.proppatch(folder / "file", "<E:dead>value</E:dead>")
    everything = folder.client.propfind(folder / "file")[0]
    live = {
        "creationdate",
        "getcontentlength",
        "getcontenttype",
        "getetag",
        "getlastmodified",
        "resourcetype",
    }
    live |= {"supportedlock", "lockdiscovery"}
    assert {f"{DAV}{name}" for name in live} <= set(everything.properties)
    assert everything.text(f"{EXAMPLE}dead") == "value"
    assert everything.refused == {}
    empty = folder.client.request("PROPFIND", folder / "file", None, {"Depth": "0"}).rows[0]
    assert set(empty.properties) == set(everything.properties)
    body = f'<?xml version="1.0"?><D:propfind {NAMESPACES}><D:propname/></D:propfind>'
    names = folder.client.request("PROPFIND", folder / "file", body, {"Depth": "0"}).rows[0]
    assert set(everything.properties) <= set(names.properties)
    assert all(not "".join(element.itertext()) for element in names.properties.values())


@spec("RFC 4918 §8.2")
@pytest.mark.parametrize(
    "body",
    [
        "<",
        "not xml",
        '<?xml version="1.0"?><D:propfind xmlns:D="DAV:"/>',
        '<?xml version="1.0"?><D:propfind xmlns:D="DAV:"><D:prop><bad:x/></D:prop></D:propfind>',
        '<?xml version="1.0"?><D:propfind xmlns:D="DAV:"><D:allprop/><D:propname/></D:propfind>',
        '<?xml version="1.0"?><D:lockinfo xmlns:D="DAV:"/>',
    ],
)
def test_a_bad_propfind_body_is_4xx(folder: Collection, body: str) -> None:
    answer = folder.client.request("PROPFIND", folder.path, body, {"Depth": "0", "Content-Type": "text/xml"})
    assert answer.status in (400, 415, 422), answer.status


@spec("RFC 4918 §9.2")
@spec("RFC 4918 §4.3")
def test_dead_properties_come_back_as_they_were_set(folder: Collection) -> None:
    put(folder, "file")
    values = {
        "text": "plain &lt;&amp;&gt; \U0001f600 e\u0301",
        "mixed": 'before<E:b xmlns:F="urn:f" F:attr="1">in<D:c/></E:b>after',
        "empty": "",
        "spaces": "  two  ",
    }
    for name, value in values.items():
        (row,) = folder.client.proppatch(folder / "file", f'<E:{name} xml:lang="fr">{value}</E:{name}>').rows
        assert set(row.properties) == {EXAMPLE + name}
    (row,) = folder.client.propfind(folder / "file", *(f"E:{name}" for name in values))
    assert row.refused == {}
    assert "".join(row.properties[f"{EXAMPLE}text"].itertext()) == "plain <&> \U0001f600 e\u0301"
    assert "".join(row.properties[f"{EXAMPLE}spaces"].itertext()) == "  two  "
    mixed = row.properties[f"{EXAMPLE}mixed"]
    assert (mixed.text, mixed[0].tag, mixed[0].attrib, mixed[0].tail) == (
        "before",
        f"{EXAMPLE}b",
        {"{urn:f}attr": "1"},
        "after",
    )
    assert mixed.get("{http://www.w3.org/XML/1998/namespace}lang") == "fr"
    assert transfer("COPY", folder, "file", "copy").status == 201
    assert transfer("MOVE", folder, "copy", "moved").status == 201
    (moved,) = folder.client.propfind(folder / "moved", "E:text")
    assert moved.text(f"{EXAMPLE}text") == "plain <&> \U0001f600 e\u0301"


@spec("RFC 4918 §9.2")
def test_proppatch_is_all_or_nothing_and_in_order(folder: Collection) -> None:
    put(folder, "file")
    (row,) = folder.client.proppatch(folder / "file", "<E:a>1</E:a><D:getetag>x</D:getetag><E:b>2</E:b>").rows
    assert row.refused == {f"{EXAMPLE}a": 424, f"{DAV}getetag": 403, f"{EXAMPLE}b": 424}
    (row,) = folder.client.propfind(folder / "file", "E:a")
    assert row.refused == {f"{EXAMPLE}a": 404}
    (row,) = folder.client.proppatch(folder / "file", "<E:a>1</E:a>", "<E:a/>").rows
    assert not row.refused
    (row,) = folder.client.propfind(folder / "file", "E:a")
    assert row.refused == {f"{EXAMPLE}a": 404}, "set, then removed"
    (row,) = folder.client.proppatch(folder / "file", "", "<E:never/>").rows
    assert set(row.properties) == {f"{EXAMPLE}never"}, "removing what is not there succeeds"


@spec("RFC 4331 §3")
@spec("RFC 4331 §4")
def test_quota_properties(folder: Collection) -> None:
    def quota() -> tuple[int, int]:
        (row,) = folder.client.propfind(folder.path, "D:quota-available-bytes", "D:quota-used-bytes")
        return int(row.text(f"{DAV}quota-available-bytes")), int(row.text(f"{DAV}quota-used-bytes"))

    before = quota()
    put(folder, "file", b"x" * 100_000)
    after = quota()
    assert after[1] - before[1] == 100_000
    assert before[0] - after[0] == 100_000


# LOCK, If


@spec("RFC 4918 §9.10")
def test_an_exclusive_lock_keeps_others_out(folder: Collection) -> None:
    put(folder, "file", b"one")
    answer = lock(folder, "file", depth="0")
    token = token_of(answer)
    assert (answer.status, put(folder, "file", b"two").status) == (200, 423)
    assert lock(folder, "file", depth="0").status == 423
    assert lock(folder, "file", scope="shared", depth="0").status == 423
    assert folder.client.request("DELETE", folder / "file").status == 423
    assert folder.client.proppatch(folder / "file", "<E:a>1</E:a>").status == 423
    assert transfer("MOVE", folder, "file", "moved").status == 423
    put(folder, "other")
    assert transfer("COPY", folder, "other", "file").status == 423
    assert put(folder, "file", b"two", If=f"(<{token}>)").status == 204
    assert put(folder, "file", b"three", If="(<urn:uuid:00000000-0000-0000-0000-000000000000>)").status == 412
    assert unlock(folder, "file", token) == 204
    assert put(folder, "file", b"three").status == 204


@spec("RFC 4918 §15.8")
def test_lockdiscovery_shows_the_lock(folder: Collection) -> None:
    put(folder, "file")
    answer = lock(folder, "file", depth="0")
    token = token_of(answer)
    (row,) = folder.client.propfind(folder / "file", "D:lockdiscovery", "D:supportedlock")
    (active,) = row.properties[f"{DAV}lockdiscovery"].findall(f"{DAV}activelock")
    assert active.findtext(f"{DAV}locktoken/{DAV}href") == token
    assert active.findtext(f"{DAV}depth") == "0"
    assert (active.findtext(f"{DAV}lockroot/{DAV}href") or "").endswith(folder / "file")
    assert active.findtext(f"{DAV}owner/{DAV}href") == "urn:me"
    assert re.fullmatch(r"Second-\d+|Infinite", active.findtext(f"{DAV}timeout") or "")
    assert len(row.properties[f"{DAV}supportedlock"]) == 2
    unlock(folder, "file", token)


@spec("RFC 4918 §9.10.2")
def test_refreshing_a_lock(folder: Collection) -> None:
    put(folder, "file")
    token = token_of(lock(folder, "file", depth="0"))
    send = folder.client.request
    answer = send("LOCK", folder / "file", None, {"If": f"(<{token}>)", "Timeout": "Second-300"})
    assert answer.status == 200
    assert answer.xml.findtext(f".//{DAV}locktoken/{DAV}href") == token
    assert not answer.header("Lock-Token")
    assert send("LOCK", folder / "file", None, {"If": "(<urn:uuid:0>)"}).status == 412
    assert send("LOCK", folder / "file").status == 400
    unlock(folder, "file", token)


@spec("RFC 4918 §6.2")
def test_shared_locks(folder: Collection) -> None:
    put(folder, "file")
    first, second = (token_of(lock(folder, "file", "shared", "0")) for _ in range(2))
    assert first != second
    assert lock(folder, "file", "exclusive", "0").status == 423
    assert put(folder, "file", b"x").status == 423
    assert put(folder, "file", b"x", If=f"(<{first}>)").status == 204
    assert put(folder, "file", b"x", If=f"(<{second}>)").status == 204
    assert [unlock(folder, "file", token) for token in (first, second)] == [204, 204]


@spec("RFC 4918 §7.3")
def test_locking_an_unmapped_url_makes_an_empty_file(folder: Collection) -> None:
    answer = lock(folder, "reserved", depth="0")
    token = token_of(answer)
    assert answer.status == 201
    assert (get(folder, "reserved").status, get(folder, "reserved").body) == (200, b"")
    assert lock(folder, "none/below", depth="0").status == 409
    assert put(folder, "reserved", b"now", If=f"(<{token}>)").status == 204
    unlock(folder, "reserved", token)


@spec("RFC 4918 §9.10.3")
@spec("RFC 4918 §7.5")
def test_a_lock_of_infinite_depth_covers_members_and_new_members(tree: Collection) -> None:
    token = token_of(lock(tree, "a/"))
    send = tree.client.request
    assert send("PUT", tree / "a/one", b"x").status == 423
    assert send("PUT", tree / "a/new", b"x").status == 423
    assert send("MKCOL", tree / "a/newcol/").status == 423
    assert send("DELETE", tree / "a/b/two").status == 423
    assert transfer("MOVE", tree, "unused", "a/unused").status == 423
    where = tree.client.url(tree / "a/")
    assert send("PUT", tree / "a/new", b"x", {"If": f"<{where}> (<{token}>)"}).status == 201
    assert send("PUT", tree / "a/newer", b"x", {"If": f"(<{token}>)"}).status == 201
    assert lock(tree, "a/one", depth="0").status == 423
    assert unlock(tree, "a/one", token) == 204, "a lock is removed by any URL in its scope"
    assert send("PUT", tree / "a/one", b"x").status == 204


@spec("RFC 4918 §7.4")
def test_a_lock_of_depth_0_guards_the_members_of_a_collection_not_their_content(tree: Collection) -> None:
    token = token_of(lock(tree, "a/", depth="0"))
    assert tree.client.request("PUT", tree / "a/one", b"x").status == 204
    assert tree.client.request("PUT", tree / "a/new", b"x").status == 423
    assert tree.client.request("DELETE", tree / "a/one").status == 423
    assert unlock(tree, "a/", token) == 204


@spec("RFC 4918 §9.10")
def test_bad_lock_requests(folder: Collection) -> None:
    put(folder, "file")
    assert lock(folder, "file", depth="1").status == 400
    assert (
        folder.client.request("LOCK", folder / "file", b"<broken", {"Content-Type": "text/xml"}).status == 400
    )
    assert folder.client.request("UNLOCK", folder / "file").status == 400
    answer = folder.client.request("UNLOCK", folder / "file", None, {"Lock-Token": "<urn:uuid:none>"})
    assert answer.status in (409, 412)
    if answer.status == 409:
        assert answer.preconditions == (f"{DAV}lock-token-matches-request-uri",)


@spec("RFC 4918 §9.11")
def test_unlock_takes_a_token_without_angle_brackets(folder: Collection) -> None:
    put(folder, "file")
    token = token_of(lock(folder, "file", depth="0"))
    assert folder.client.request("UNLOCK", folder / "file", None, {"Lock-Token": token}).status == 204


@spec("RFC 4918 §9.6.1")
def test_a_tree_with_a_locked_member_keeps_that_member(tree: Collection) -> None:
    token = token_of(lock(tree, "a/b/two", depth="0"))
    answer = tree.client.request("DELETE", tree / "a/")
    assert answer.status in (207, 423), answer.status
    assert tree.client.request("GET", tree / "a/b/two").body == b"22"
    assert transfer("MOVE", tree, "a/", "gone/").status in (207, 423)
    assert tree.client.request("GET", tree / "a/b/two").body == b"22"
    unlock(tree, "a/b/two", token)


@spec("RFC 4918 §7.6")
def test_a_lock_stays_behind_at_the_source_of_a_move(folder: Collection) -> None:
    put(folder, "file")
    token = token_of(lock(folder, "file", depth="0"))
    assert transfer("MOVE", folder, "file", "moved", If=f"(<{token}>)").status == 201
    (row,) = folder.client.propfind(folder / "moved", "D:lockdiscovery")
    assert len(row.properties[f"{DAV}lockdiscovery"]) == 0
    assert put(folder, "moved", b"free").status == 204
    assert put(folder, "file", b"new").status == 201


@spec("RFC 4918 §10.4")
def test_the_if_header(folder: Collection) -> None:
    etag = put(folder, "file", b"one").etag
    where = folder.client.url(folder / "file")
    token = token_of(lock(folder, "file", depth="0"))

    def status(value: str) -> int:
        return put(folder, "file", b"one", If=value).status

    other = "urn:uuid:11111111-1111-1111-1111-111111111111"
    current = etag
    for value, expected in (
        ("(<{token}> [{etag}])", 204),
        ("(<{token}> [{old}])", 412),
        ("(<{token}>) (<{other}>)", 204),
        ("(<{other}>) (<{token}>)", 204),
        ("<{where}> (<{token}>)", 204),
        ("<{where}> (Not <{other}> <{token}>)", 204),
        ("(Not <DAV:no-lock> <{token}>)", 204),
        ("(<DAV:no-lock>)", 412),
        ("(Not <{token}>)", 412),
        ("([{etag}])", 423),
        ("(", 400),
        ("<{token}>", 400),
        ("()", 400),
        ("nonsense", 400),
    ):
        filled = value.format(token=token, etag=current, old='"old"', other=other, where=where)
        answer = put(folder, "file", b"one", If=filled)
        assert answer.status == expected, (value, answer.status)
        current = get(folder, "file").etag
    assert status(f"<{folder.client.url(folder / 'elsewhere')}> (<{token}>)") in (412, 423)
    unlock(folder, "file", token)


# Names


@pytest.mark.parametrize("name", NASTY_NAMES)
def test_nasty_names_round_trip(folder: Collection, name: str) -> None:
    listed = unicodedata.normalize("NFC", name)  # a server may say a name in its composed form

    def members() -> set[str]:
        return {unicodedata.normalize("NFC", member) for member in folder.members()}

    assert put(folder, name, name.encode()).status == 201
    assert members() == {listed}
    assert get(folder, name).body == name.encode()
    assert transfer("COPY", folder, esc(name), "copy").status == 201
    assert folder.client.request("DELETE", folder / esc(name)).status == 204
    assert transfer("MOVE", folder, "copy", esc(name)).status == 201
    assert members() == {listed}
    assert folder.client.request("MKCOL", folder / "sub/").status == 201
    assert transfer("MOVE", folder, esc(name), f"sub/{esc(name)}").status == 201
    assert transfer("COPY", folder, "sub/", f"{esc(name)}/").status == 201
    assert folder.client.request("GET", folder / f"{esc(name)}/{esc(name)}").body == name.encode()
    assert folder.client.request("DELETE", folder / f"{esc(name)}/").status == 204


def test_composed_and_decomposed_names_never_lose_a_file(folder: Collection) -> None:
    composed, decomposed = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    put(folder, composed, b"composed")
    put(folder, decomposed, b"decomposed")
    assert get(folder, decomposed).body == b"decomposed"
    assert get(folder, composed).body in (b"composed", b"decomposed")


@pytest.mark.parametrize("name", [*CONTROL_NAMES, "a\x01b", "a\x7fb", "a\ufffeb", "a\uffffb"])
def test_a_name_that_xml_cannot_hold_never_breaks_a_listing(folder: Collection, name: str) -> None:
    put(folder, "fine")
    assert put(folder, name).status in (201, 400, 403)
    assert "fine" in folder.members()
    assert folder.client.request("PROPFIND", folder.path, None, {"Depth": "infinity"}).status in (207, 403)


@pytest.mark.parametrize(
    "path",
    [
        "a%00b",
        "%ff%fe",
        "%c3%28",
        "%ed%a0%80",
        "bad%zz",
        "bad%",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "a" * 256,
        "%c3%a9" * 128,
        "/".join(["d"] * 3000),
        "a/../../../../etc/passwd",
        "..",
        ".",
    ],
)
def test_a_path_that_is_none_is_4xx(folder: Collection, path: str) -> None:
    for method in ("PUT", "GET", "MKCOL", "PROPFIND", "DELETE", "LOCK"):
        if path in (".", "..") and method in ("GET", "PROPFIND", "DELETE", "LOCK"):
            continue  # they name folders that exist
        body = b"x" if method == "PUT" else (LOCK % "exclusive").encode() if method == "LOCK" else None
        answer = folder.client.request(
            method, folder.path, body, {"Depth": "0"}, raw_target=folder.path + path
        )
        assert 400 <= answer.status < 500, (method, path[:40], answer.status)
        assert answer.seconds < 0.5
    assert folder.members() == set()


# Many at once


@pytest.fixture
def crowd(target: Target) -> Iterator[list[Client]]:
    """Ten clients with a connection each."""
    clients = [target.drive() for _ in range(10)]
    for client in clients:
        client.request("OPTIONS", "")
    yield clients
    for client in clients:
        client.close()


def test_ten_racing_creates_have_one_winner(folder: Collection, crowd: list[Client]) -> None:
    def create(number: int, name: str) -> int:
        return (
            crowd[number].request("PUT", folder / name, f"{number}".encode(), {"If-None-Match": "*"}).status
        )

    for turn in range(5):
        with ThreadPoolExecutor(len(crowd)) as pool:
            statuses = list(pool.map(create, range(len(crowd)), [f"race{turn}"] * len(crowd)))
        assert sorted(statuses) == [201] + [412] * 9, statuses
        winner = statuses.index(201)
        assert get(folder, f"race{turn}").body == f"{winner}".encode()


def test_ten_racing_conditional_updates_have_one_winner(folder: Collection, crowd: list[Client]) -> None:
    etag = put(folder, "file", b"start").etag
    with ThreadPoolExecutor(len(crowd)) as pool:
        statuses = list(
            pool.map(
                lambda client: client.request("PUT", folder / "file", b"x", {"If-Match": etag}).status, crowd
            )
        )
    assert sorted(statuses) == [204] + [412] * 9, statuses


def test_racing_moves_lose_nothing(folder: Collection, crowd: list[Client]) -> None:
    put(folder, "file", b"one of a kind")
    targets = [folder.client.url(folder / f"to{number}") for number in range(len(crowd))]
    with ThreadPoolExecutor(len(crowd)) as pool:
        statuses = list(
            pool.map(
                lambda pair: pair[0].request("MOVE", folder / "file", None, {"Destination": pair[1]}).status,
                zip(crowd, targets, strict=True),
            )
        )
    assert sorted(statuses) == [201] + [404] * 9, statuses
    (survivor,) = folder.members()
    assert get(folder, survivor).body == b"one of a kind"


def test_a_download_is_of_one_version_whatever_is_written_meanwhile(
    folder: Collection, crowd: list[Client]
) -> None:
    size = 400_000
    put(folder, "file", b"0" * size)
    letters = itertools.cycle(b"123456789")

    def write(client: Client) -> bytes:
        for _ in range(10):
            client.request("PUT", folder / "file", bytes([next(letters)]) * size)
        return b""

    def read(client: Client) -> bytes:
        seen = [client.request("GET", folder / "file").body for _ in range(20)]
        return bytes(len(set(body)) == 1 and len(body) == size for body in seen)

    with ThreadPoolExecutor(4) as pool:
        whole = b"".join(
            pool.map(lambda job: job[0](job[1]), [(write, crowd[0]), (read, crowd[1]), (read, crowd[2])])
        )
    assert whole == bytes([True]) * 40
