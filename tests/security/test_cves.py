"""Flaws that others had, tried on us: one test for each row of the table in notes/security.md.

Each test does what the report of the flaw describes, to the whole application, and was seen to fail with
the check it guards taken out.
"""

from __future__ import annotations

import re
import socket
from importlib import metadata
from urllib.parse import urlsplit

import pyotp
import pytest

from conformance.client import Client
from conformance.servers import Demo
from ksync_server.auth import accounts, secondfactor
from ksync_server.auth.accounts import Account
from ksync_server.auth.rules import VERBS
from ksync_server.errors import ClientError
from ksync_server.wire import xml
from tests import costs
from tests.security.harness import (
    ORIGIN,
    PASSWORD,
    TOPSECRET,
    Answer,
    Person,
    World,
    basic,
    document,
    event,
)

METHODS = sorted(VERBS)
BODIES = {
    "PROPPATCH": document(
        "d:propertyupdate", "<d:set><d:prop><d:displayname>x</d:displayname></d:prop></d:set>"
    ),
    "LOCK": document(
        "d:lockinfo",
        "<d:lockscope><d:exclusive/></d:lockscope><d:locktype><d:write/></d:locktype>",
    ),
    "PUT": event("planted"),
}
NOBODY = "ZZ99999"


def body_of(method: str, href: str) -> str:
    if method == "REPORT":
        return document("c:calendar-multiget", f"<d:prop><c:calendar-data/></d:prop><d:href>{href}</d:href>")
    return BODIES.get(method, "")


def hrefs(answer: Answer) -> set[str]:
    """The hrefs of a multistatus."""
    assert answer.status == 207, (answer.status, answer.text[:300])
    found = xml.parse(answer.body).all("{DAV:}response")
    return {href.text for each in found if (href := each.find("{DAV:}href")) is not None}


def names_below(world: World, path: str, by: Person) -> set[str]:
    return {
        href.removeprefix(path) for href in hrefs(world.propfind(path, "d:getetag", by=by, depth="1"))
    } - {""}


# -- CVE-2026-45690, -45691: a log-in that passed the first factor alone ------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_passed_the_first_factor_alone_opens_nothing(world: World, method: str) -> None:
    """Nextcloud took a session token from before the second factor as Basic or Bearer on DAV."""
    account = _with_second_factor(world)
    address = account.login_email
    forms = [
        basic(address, PASSWORD),
        basic(account.sync_id, PASSWORD),
        basic(address, PASSWORD + "123456"),
        basic("", PASSWORD),
        f"Bearer {PASSWORD}",
        f"Bearer {world.alice.secret}",
        f"bearer {basic(address, PASSWORD).removeprefix('Basic ')}",
        f"Digest username={address!r}",
    ]
    paths = [f"/calendars/{account.sync_id}/", f"/principals/{account.sync_id}/", "/", world.drive()]
    for path in paths:
        for authorization in forms:
            answer = world.ask(method, path, body_of(method, path), authorization=authorization, depth="0")
            assert answer.status == 401, (path, authorization, answer.status)


def _with_second_factor(world: World) -> Account:
    with world.door.database.read() as tx:
        found = accounts.find(tx, "second@example.org", ())
    if found is None:
        found = world.door.account("second")
        world.door.turn_on_second_factor(found)
    return found


# -- CVE-2026-45281: somebody else's calendar, wherever an address can stand ---------------------------


@pytest.mark.parametrize("method", METHODS)
def test_others_are_not_there_on_any_verb(world: World, method: str) -> None:
    """Nextcloud's calendar let one user address another's. Not yours and not there are one answer."""
    bob, mallory = world.bob, world.mallory
    world.put_event(bob, "mine")
    headers = {"depth": "0", "destination": f"{ORIGIN}{mallory.calendar}stolen.ics"}
    for branch in ("calendars", "addressbooks", "principals"):
        for rest in ("", "work/", "work/mine.ics", "work/new.ics"):
            said = set()
            for owner in (bob.sync_id, NOBODY):
                path = f"/{branch}/{owner}/{rest}"
                body = body_of(method, f"{bob.calendar}mine.ics")
                answer = world.ask(method, path, body, by=mallory, **headers)
                assert answer.status >= 400, (path, answer.status)
                assert TOPSECRET not in answer.text
                said.add(repr(answer.said(owner)))
            assert len(said) == 1, said
    assert names_below(world, bob.calendar, bob) == {"mine.ics"}
    assert "stolen.ics" not in names_below(world, mallory.calendar, mallory)


@pytest.mark.parametrize("method", ["COPY", "MOVE"])
def test_a_destination_at_somebody_else_is_refused(world: World, method: str) -> None:
    bob, mallory = world.bob, world.mallory
    world.put_event(mallory, "hers")
    before = names_below(world, bob.calendar, bob)
    to = bob.calendar.removeprefix("/")
    own = mallory.home.removeprefix("/")
    for target in (
        f"{to}planted.ics",
        f"{own}../{bob.sync_id}/work/planted.ics",
        f"{own}%2e%2e/{bob.sync_id}/work/planted.ics",
        f"{own.rstrip('/')}%2f..%2f{bob.sync_id}/work/planted.ics",
    ):
        answer = world.ask(
            method, f"{mallory.calendar}hers.ics", by=mallory, destination=f"{ORIGIN}/{target}"
        )
        assert answer.status in (400, 403, 404, 405, 409, 502), (target, answer.status)
    assert names_below(world, bob.calendar, bob) == before
    assert "hers.ics" in names_below(world, mallory.calendar, mallory)


def test_a_multiget_of_somebody_elses_hrefs_is_404_for_each(world: World) -> None:
    bob, mallory = world.bob, world.mallory
    for each in (bob, mallory):  # of the same name: another's address must not mean one's own either
        world.put_event(each, "mine")
    asked = [
        f"{bob.calendar}mine.ics",
        f"{ORIGIN}{bob.calendar}mine.ics",
        f"{mallory.home}../{bob.sync_id}/work/mine.ics",
        f"%2e%2e/%2e%2e/{bob.sync_id}/work/mine.ics",
        f"/calendars/{NOBODY}/work/mine.ics",
    ]
    inner = "<d:prop><d:getetag/><c:calendar-data/></d:prop>"
    inner += "".join(f"<d:href>{href}</d:href>" for href in asked)
    answer = world.report(mallory.calendar, "c:calendar-multiget", inner, by=mallory)
    responses = xml.parse(answer.body).all("{DAV:}response")
    statuses = [status.text for each in responses if (status := each.find("{DAV:}status"))]
    assert statuses == ["HTTP/1.1 404 Not Found"] * len(asked)
    assert TOPSECRET not in answer.text


def test_the_if_header_tells_nothing_of_somebody_else(world: World) -> None:
    """A tagged list with the right ETag of another's object holds no more than with a wrong one."""
    bob, mallory = world.bob, world.mallory
    etag = world.put_event(bob, "guarded").header("etag")
    own = world.put_event(mallory, "guarded").header("etag")
    for base in (f"{bob.calendar}guarded.ics", f"{ORIGIN}{bob.calendar}guarded.ics"):
        answers = [
            world.ask(
                "PUT",
                f"{mallory.calendar}probe.ics",
                event("probe"),
                by=mallory,
                content_type="text/calendar",
                **{"if": f"<{base.replace('guarded', name)}> {condition}"},
            )
            for name in ("guarded", "missing")
            for condition in (f"([{etag}])", f"([{own}])", '(["other"])')
        ]
        assert {answer.status for answer in answers} == {412}
        assert len({repr(answer.said()) for answer in answers}) == 1


def test_a_sync_token_or_etag_of_somebody_else_is_worth_nothing(world: World) -> None:
    bob, mallory = world.bob, world.mallory
    world.put_event(bob, "mine")
    asked = "<d:sync-level>1</d:sync-level><d:prop><d:getetag/></d:prop>"
    initial = world.report(bob.calendar, "d:sync-collection", "<d:sync-token/>" + asked, by=bob, depth="0")
    token = xml.parse(initial.body).find("{DAV:}sync-token")
    assert token is not None
    forged = f"<d:sync-token>{token.text}</d:sync-token>{asked}"
    answer = world.report(mallory.calendar, "d:sync-collection", forged, by=mallory, depth="0")
    assert (answer.status, "valid-sync-token" in answer.text) == (403, True)
    assert "mine.ics" not in answer.text


def test_drives_of_others_are_not_there_on_any_verb(world: World) -> None:
    mallory = world.mallory
    assert world.ask("PUT", f"{world.drive()}secret.txt", TOPSECRET, by=world.alice).status in (201, 204)
    for method in METHODS:
        for rest in ("", "secret.txt", "Common%20documents/", "new.txt"):
            said = set()
            for number in (world.shared, 999_999):
                path = world.drive(number) + rest
                headers = {"depth": "0", "destination": f"{ORIGIN}{world.drive(world.other)}stolen.txt"}
                answer = world.ask(method, path, body_of(method, path), by=mallory, **headers)
                known = method in ("GET", "HEAD", "PUT", "DELETE", "PROPFIND", "OPTIONS", "MKCOL", "LOCK")
                assert answer.status == 404 if known else answer.status >= 400, (method, path, answer.status)
                assert TOPSECRET not in answer.text
                said.add(repr(answer.said(path.split("/")[2])))
            assert len(said) == 1, (method, rest, said)
    assert "stolen.txt" not in names_below(world, world.drive(world.other), mallory)


def test_members_of_one_drive_do_not_see_each_others_files(world: World) -> None:
    world.ask("PUT", f"{world.drive()}private.txt", TOPSECRET, by=world.alice)
    for method in ("GET", "PROPFIND", "DELETE", "COPY", "MOVE", "PROPPATCH"):
        answer = world.ask(
            method,
            f"{world.drive()}private.txt",
            body_of(method, ""),
            by=world.bob,
            depth="0",
            destination=f"{ORIGIN}{world.drive()}stolen.txt",
        )
        assert answer.status == 404, method
    everything = world.propfind(world.drive(), "d:displayname", by=world.bob, depth="infinity")
    assert everything.status == 207
    assert "private.txt" not in everything.text


def test_a_lock_of_somebody_else_is_neither_used_nor_taken(world: World) -> None:
    path = f"{world.drive()}Common%20documents/locked.txt"
    assert world.ask("PUT", path, b"of bob", by=world.bob).status == 201
    token = world.lock(path, by=world.bob).header("lock-token")
    assert token.startswith("<opaquelocktoken:")
    submitted = {"if": f"({token})"}
    tried = {
        "PUT": world.ask("PUT", path, b"stolen", by=world.alice, **submitted),
        "DELETE": world.ask("DELETE", path, by=world.alice, **submitted),
        "MOVE": world.ask(
            "MOVE", path, by=world.alice, destination=f"{ORIGIN}{world.drive()}stolen.txt", **submitted
        ),
        "PROPPATCH": world.ask("PROPPATCH", path, BODIES["PROPPATCH"], by=world.alice, **submitted),
        "LOCK": world.ask("LOCK", path, by=world.alice, **submitted),
        "UNLOCK": world.ask("UNLOCK", path, by=world.alice, lock_token=token),
    }
    expected = {"PUT": 423, "DELETE": 423, "MOVE": 423, "PROPPATCH": 423, "LOCK": 403, "UNLOCK": 403}
    assert {method: answer.status for method, answer in tried.items()} == expected
    assert world.ask("GET", path, by=world.alice).body == b"of bob"
    assert world.ask("UNLOCK", path, by=world.bob, lock_token=token).status == 204


# -- CVE-2026-45286: finding people ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "report",
    [
        "d:principal-property-search",
        "d:principal-search-property-set",
        "d:principal-match",
        "d:acl-principal-prop-set",
        "d:expand-property",
        "cs:calendarserver-principal-search",
    ],
)
def test_searching_for_people_shows_nobody_else(world: World, report: str) -> None:
    """Nextcloud's search gave out users of other groups. Here it finds nobody at all yet."""
    for path in ("/", "/principals/", f"/principals/{world.mallory.sync_id}/", world.mallory.calendar):
        search = (
            "<d:property-search><d:prop><d:displayname/></d:prop><d:match>o</d:match></d:property-search>"
        )
        answer = world.report(
            path, report, search + "<d:prop><d:displayname/></d:prop>", by=world.mallory, depth="0"
        )
        assert (answer.status, "supported-report" in answer.text) == (403, True), path
    for depth in ("0", "1"):
        for path in ("/principals/", "/calendars/", "/addressbooks/", "/"):
            shown = world.propfind(
                path, "d:displayname", "d:principal-URL", by=world.mallory, depth=depth
            ).text
            assert world.bob.sync_id not in shown
            assert "bob" not in shown.lower()


# -- CVE-2026-48099, -55560, -55509: paths ----------------------------------------------------------------


def test_a_drive_number_is_no_prefix_of_another(world: World) -> None:
    """WsgiDAV compared folder names by their beginning: /d/1 opened /d/12."""
    own, mallory = world.other, world.mallory
    for path in (
        f"/drives/{own}{world.shared}/",
        f"/drives/{own}/../{world.shared}/",
        f"/drives/{own}/%2e%2e/{world.shared}/secret.txt",
        f"/drives/{own}/..%2f{world.shared}/secret.txt",
        f"/drives/{own}%2f..%2f{world.shared}/secret.txt",
        f"/drives/0{world.shared}/",
        f"/drives/+{world.shared}/",
        f"/drives/{world.shared}%20/",
        f"/drives/{world.shared};x/",
    ):
        for method in ("GET", "PROPFIND", "PUT", "DELETE"):
            answer = world.ask(method, path, by=mallory, depth="0")
            assert answer.status in (400, 404, 405), (method, path, answer.status)


@pytest.mark.parametrize(
    "name",
    [
        "..%5csecret.txt",
        "%252e%252e%252fsecret.txt",
        "%c0%ae%c0%ae%c0%afsecret.txt",
        "%e0%80%afsecret.txt",
        "a%00.txt",
        "%2e",
        "%2e%2e",
        "..%2fsecret.txt",
        "%ef%bc%8e%ef%bc%8e%ef%bc%8fsecret.txt",
        "%ed%a0%80",
        "%ff",
        "%",
        "%zz",
        "a%0d%0ax-evil:%201",
        "a%7f",
        "a%c2%85",
    ],
)
def test_encoded_paths_mean_one_name_or_nothing(world: World, name: str) -> None:
    """CVE-2026-53779, -52844 and their kind: one decoding, after the path was split, and no second one."""
    base = f"{world.drive()}folder/"
    world.ask("MKCOL", base, by=world.alice)
    assert world.ask("PUT", f"{world.drive()}secret.txt", TOPSECRET, by=world.alice).status in (201, 204)
    got = world.ask("GET", base + name, by=world.alice)
    assert got.status in (400, 404)
    assert TOPSECRET not in got.text
    put = world.ask("PUT", base + name, b"other", by=world.alice)
    assert put.status in (201, 400), put.status
    assert world.ask("GET", f"{world.drive()}secret.txt", by=world.alice).text == TOPSECRET
    if put.status == 201:
        assert len(names_below(world, base, world.alice)) == 1
        assert world.ask("DELETE", base + name, by=world.alice).status == 204
    assert names_below(world, base, world.alice) == set()
    for answer in (got, put):
        assert not answer.header("x-evil")


def test_composed_and_decomposed_names_are_one_file(world: World) -> None:
    """Two files that look alike would hide one behind the other."""
    base = f"{world.drive()}twins/"
    world.ask("MKCOL", base, by=world.alice)
    assert world.ask("PUT", f"{base}caf%C3%A9", b"one", by=world.alice).status == 201
    assert world.ask("PUT", f"{base}cafe%CC%81", b"two", by=world.alice).status == 204
    assert len(names_below(world, base, world.alice)) == 1
    assert world.ask("GET", f"{base}caf%C3%A9", by=world.alice).body == b"two"


def test_a_link_is_no_file_of_a_drive(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    """WsgiDAV followed symbolic links out of its folder. Files here have no paths on disk, whatever their
    name, and a link that somebody puts into the folder of the bytes is nobody's file."""
    outside = tmp_path_factory.mktemp("outside") / "passwd"
    outside.write_text(TOPSECRET)
    folder = world.services.settings.blobs.path
    folder.mkdir(exist_ok=True)
    link = folder / "link.txt"
    link.symlink_to(outside)
    try:
        assert (
            "link.txt"
            not in world.propfind(world.drive(), "d:getetag", by=world.alice, depth="infinity").text
        )
        for path in ("link.txt", "blobs/link.txt"):
            assert world.ask("GET", world.drive() + path, by=world.alice).status == 404
            for method in ("COPY", "MOVE"):
                to = f"{ORIGIN}{world.drive()}copied.txt"
                assert world.ask(method, world.drive() + path, by=world.alice, destination=to).status == 404
    finally:
        link.unlink()


HOSTILE_NAMES = (
    "'; DROP TABLE node; --",
    '" OR "1"="1',
    "%' OR name LIKE '%",
    "`id`$(id)",
    "%s %(x)s {x} {{x}} ${x} %%",
    "\\'; --",
    ":name ?1 $1 @x",
)


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_quotes_and_templates_in_names_are_letters(world: World, name: str) -> None:
    """CVE-2026-55509 (SQL from a path), CVE-2026-27851 (SQL and templates from a log-in name)."""
    quoted = "".join(f"%{byte:02X}" for byte in name.encode())
    alice = world.alice
    for path, body, kind in (
        (f"{world.drive()}{quoted}", b"x", ""),
        (f"{alice.calendar}{quoted}.ics", event(name.replace("\\", "")).encode(), "text/calendar"),
    ):
        assert world.ask("PUT", path, body, by=alice, content_type=kind or "text/plain").status == 201
        assert world.ask("GET", path, by=alice).body == body
        target = f"{ORIGIN}{path}.moved"
        assert world.ask("MOVE", path, by=alice, destination=target).status == 201
        assert world.ask("DELETE", f"{path}.moved", by=alice).status == 204
    assert world.ask("MKCALENDAR", f"{alice.home}{quoted}/", by=alice).status == 201
    assert world.ask("DELETE", f"{alice.home}{quoted}/", by=alice).status == 204
    log_ins = (name, f"{alice.account.login_email}{name}", f"{name}@example.org", f"{alice.sync_id}{name}")
    for login in log_ins:
        answer = world.ask("PROPFIND", "/", authorization=basic(login, alice.secret), depth="0")
        assert answer.status == 401, login
        assert world.ask("PROPFIND", f"/calendars/{quoted}/", by=alice, depth="0").status == 404
    properties = f'<e:p xmlns:e="urn:example">{xml.escape(name)}</e:p>'
    body = document("d:propertyupdate", f"<d:set><d:prop>{properties}</d:prop></d:set>")
    assert "200 OK" in world.ask("PROPPATCH", alice.calendar, body, by=alice).text
    match = f'<c:prop-filter name="SUMMARY"><c:text-match>{xml.escape(name)}</c:text-match></c:prop-filter>'
    inner = f'<c:comp-filter name="VEVENT">{match}</c:comp-filter>'
    inner = f'<c:filter><c:comp-filter name="VCALENDAR">{inner}</c:comp-filter></c:filter>'
    query = f"<d:prop><d:getetag/></d:prop>{inner}"
    assert hrefs(world.report(alice.calendar, "c:calendar-query", query, by=alice)) == set()


# -- CVE-2022-41905, CVE-2026-22256, CVE-2025-65754, CVE-2026-8496: what a browser shows -------------------

ACTIVE_NAMES = (
    "<script>alert(1)<script>.txt",
    "\"onmouseover='x' a=\".txt",
    "'><img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "&lt;img src=x&gt;",
)


def test_names_are_letters_in_the_page_of_a_folder(world: World) -> None:
    """WsgiDAV's page ran script tags of file names, others those of the path itself."""
    base = f"{world.drive()}%3Cscript%3Ealert(1)%3Cscript%3E/"
    assert world.ask("MKCOL", base, by=world.alice).status == 201
    for name in ACTIVE_NAMES:
        quoted = "".join(f"%{byte:02X}" for byte in name.encode())
        assert world.ask("PUT", base + quoted, b"x", by=world.alice).status == 201
    page = world.ask("GET", base, by=world.alice)
    assert page.header("content-type") == "text/html; charset=utf-8"
    tags = {tag.lower() for tag in re.findall(r"<\s*([A-Za-z!]\w*)", page.text)}
    allowed = {"!doctype", "html", "head", "meta", "title", "style", "body", "h1", "table", "thead", "tbody"}
    assert tags <= allowed | {"tr", "th", "td", "a"}
    attributes = re.findall(r"<a ([^>]*)>", page.text)
    assert len(attributes) == len(ACTIVE_NAMES) + 1
    assert all(re.fullmatch(r'href="/drives/[^"<>\']*"', each) for each in attributes)
    policy = page.header("content-security-policy")
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    assert "allow-scripts" not in policy
    assert page.header("x-content-type-options") == "nosniff"
    assert page.header("cache-control") == "private, no-store"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("page.html", ""),
        ("picture.svg", ""),
        ("page.xhtml", ""),
        ("style.xsl", ""),
        ("plain.txt", "text/html"),
        ("plain.txt", "TEXT/HTML; charset=utf-7"),
        ("plain.txt", "image/svg+xml"),
        ("plain.txt", "application/x+xml"),
    ],
)
def test_what_a_browser_could_run_is_a_download_in_a_sandbox(world: World, name: str, kind: str) -> None:
    active = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'
    path = f"{world.drive()}{name}"
    world.ask("DELETE", path, by=world.alice)
    world.ask("PUT", path, active, by=world.alice, **({"content_type": kind} if kind else {}))
    for method in ("GET", "HEAD"):
        answer = world.ask(method, path, by=world.alice)
        assert answer.header("content-disposition") == "attachment"
        assert answer.header("content-security-policy").startswith("sandbox; default-src 'none'")
        assert answer.header("x-content-type-options") == "nosniff"
        assert answer.header("cache-control").startswith("private")


def test_markup_in_an_event_is_inert_where_a_browser_gets_it(world: World) -> None:
    """SOGo ran SVG of a DESCRIPTION. Bytes go out as text/calendar in a sandbox, XML answers escaped."""
    markup = "<svg onload=alert(1)><script>alert(1)</script>]]>"
    alice = world.alice
    world.put_event(alice, "markup", f"DESCRIPTION:{markup}")
    got = world.ask("GET", f"{alice.calendar}markup.ics", by=alice)
    assert got.header("content-type").startswith("text/calendar")
    assert got.header("content-security-policy").startswith("sandbox")
    assert got.header("x-content-type-options") == "nosniff"
    inner = f"<d:prop><c:calendar-data/></d:prop><d:href>{alice.calendar}markup.ics</d:href>"
    answer = world.report(alice.calendar, "c:calendar-multiget", inner, by=alice)
    assert "<svg" not in answer.text
    told = [each.text for each in xml.parse(answer.body).walk() if each.tag.endswith("}calendar-data")]
    assert markup in told[0]


# -- CVE-2025-59045, CVE-2024-34055, CVE-2021-33582, XXE: too much ----------------------------------------


def test_expanding_a_large_event_is_bounded_in_bytes_and_time(world: World) -> None:
    """Stalwart took 2 GB for 300 instances of a kilobyte."""
    alice = world.alice
    world.put_event(alice, "expanded", "RRULE:FREQ=HOURLY", "DESCRIPTION:" + "x" * 200_000)
    expand = '<c:expand start="20260501T000000Z" end="20270501T000000Z"/>'
    inner = f"<d:prop><c:calendar-data>{expand}</c:calendar-data></d:prop>"
    inner += f"<d:href>{alice.calendar}expanded.ics</d:href>"
    answer = costs.within(5, lambda: world.report(alice.calendar, "c:calendar-multiget", inner, by=alice))
    assert answer.status == 207
    assert len(answer.body) < 40_000_000
    assert "507" in answer.text
    assert world.ask("DELETE", f"{alice.calendar}expanded.ics", by=alice).status == 204


ENTITIES = '<!ENTITY a0 "ha">' + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
BOMBS = {
    "external entity": '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
    '<d:propfind xmlns:d="DAV:"><d:prop><x>&e;</x></d:prop></d:propfind>',
    "external DTD": '<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd">'
    '<d:propfind xmlns:d="DAV:"><d:allprop/></d:propfind>',
    "billion laughs": f"<!DOCTYPE x [{ENTITIES}]>"
    '<d:propfind xmlns:d="DAV:"><d:prop>&a9;</d:prop></d:propfind>',
    "parameter entity": '<!DOCTYPE x [<!ENTITY % e SYSTEM "file:///etc/passwd"> %e;]><x/>',
    "100,000 elements deep": "<a>" * 100_000,
    "50,000 attributes": "<a " + " ".join(f'b{n}="1"' for n in range(50_000)) + "/>",
    "names that could collide": "<a>" + "".join(f"<b{n:x}/>" for n in range(60_000)) + "</a>",
    "20,000 namespaces": "<a " + " ".join(f'xmlns:b{n}="urn:{n}"' for n in range(20_000)) + "/>",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("method", ["PROPFIND", "PROPPATCH", "REPORT", "MKCALENDAR", "MKCOL", "LOCK"])
def test_xml_bombs_are_refused_fast(world: World, method: str, bomb: str) -> None:
    """XXE and entity bombs of sabre/dav's and everybody's past; hash collisions and floods of Cyrus'."""
    alice = world.alice
    path = (
        world.drive()
        if method == "LOCK"
        else f"{alice.home}{'bomb/' if method.startswith('MK') else 'work/'}"
    )
    path += "new" if method == "LOCK" else ""
    answer = costs.within(2, lambda: world.ask(method, path, BOMBS[bomb], by=alice, depth="0"))
    assert answer.status in (400, 403, 413, 415, 422), answer.status
    assert "root:" not in answer.text


# -- CVE-2019-18928: who the request before was -------------------------------------------------------------


def test_a_request_inherits_nobody_from_the_one_before(world: World) -> None:
    """The Cyrus server kept the user of an earlier request on the same connection."""
    path = f"{world.alice.calendar}"
    assert world.ask("PROPFIND", path, by=world.alice, depth="0").status == 207
    assert world.ask("PROPFIND", path, depth="0").status == 401
    assert world.ask("PROPFIND", path, by=world.mallory, depth="0").status == 404
    assert world.ask("PROPFIND", path, by=world.alice, depth="1").status == 207
    assert (
        world.ask("PROPFIND", path, by=world.mallory, depth="1").status == 404
    )  # not the body kept for alice
    assert world.ask("PROPFIND", path, depth="1", authorization="Basic").status == 401


def test_no_log_in_stays_with_the_connection(server: Demo) -> None:
    """The same on a real connection that is kept, both requests sent at once."""
    alice = server.account("alice")
    client = Client(server.url, alice["login"], alice["password"])
    first = client.head("HEAD", "/drives/1/") + b"\r\n"
    client.login = ""
    second = client.head("HEAD", "/drives/1/", "Connection: close") + b"\r\n"
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname or "", place.port or 0), timeout=30) as connection:
        connection.sendall(first + second)
        said = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.findall(rb"^HTTP/1.1 (\d+)", said, re.MULTILINE) == [b"200", b"401"]


@pytest.mark.parametrize(
    "method",
    [
        "DO_GET",
        "GET_",
        "_PRINCIPAL",
        "__INIT__",
        "SERVICE",
        "APPLY",
        "LOCKS",
        "get",
        "G%45T",
        "POST",
        "PATCH",
    ],
)
def test_a_method_is_one_of_the_table(world: World, method: str) -> None:
    """Radicale called whatever function the method named."""
    for path in (world.alice.calendar, f"{world.alice.calendar}x.ics", world.drive()):
        answer = world.ask(method, path, b"x", by=world.alice)
        assert answer.status in (405, 501), (path, answer.status)
        assert world.ask(method, path, b"x").status in (401, 501)


def test_two_authorizations_are_none(world: World) -> None:
    """A proxy in front that checks one of them must not let the other one through."""
    alice, mallory = world.alice, world.mallory
    right = basic(alice.account.login_email, alice.secret)
    for other in (right, basic(mallory.account.login_email, mallory.secret), basic("x", "y")):
        for pair in ((right, other), (other, right)):
            fields = [("host", "localhost"), ("depth", "0"), *(("authorization", each) for each in pair)]
            assert world.send("PROPFIND", "/", b"", fields).status == 401


FORGED = {
    "remote-user": "alice@example.org",
    "x-remote-user": "alice@example.org",
    "x-forwarded-user": "alice@example.org",
    "x_remote_user": "alice@example.org",
    "remote_user": "alice@example.org",
    "x-script-name": "/evil",
    "script_name": "/evil",
    "x-forwarded-prefix": "/evil",
    "x-forwarded-host": "evil.example.org",
    "x-forwarded-for": "127.0.0.1",
    "x-forwarded-proto": "http",
    "forwarded": "for=127.0.0.1;host=evil.example.org",
    "x-original-url": "/evil",
    "x-rewrite-url": "/evil",
    "x-http-method-override": "DELETE",
}


@pytest.mark.parametrize("field", FORGED)
def test_a_header_opens_nothing_and_stands_in_no_answer(world: World, field: str) -> None:
    """Radicale's and WsgiDAV's ways in: what a gateway may set, a client may not."""
    alice = world.alice
    fields = {"host": "localhost", "depth": "1", field: FORGED[field]}
    for path in (alice.home, world.drive(), "/.well-known/caldav"):
        stranger = world.send("PROPFIND", path, b"", fields.items())
        assert stranger.status == (301 if "well-known" in path else 401)
        known = {**fields, "authorization": basic(alice.account.login_email, alice.secret)}
        answer = world.send("PROPFIND", path, b"", known.items())
        assert answer.status in (207, 301)
        for each in (stranger, answer):
            assert "evil" not in each.text
            assert "evil" not in repr(each.headers)


def test_no_answer_to_a_known_account_is_kept_by_a_shared_cache(world: World) -> None:
    """What one account gets, a careless proxy must not hand to the next one."""
    alice = world.alice
    world.put_event(alice, "cached")
    world.ask("PUT", f"{world.drive()}cached.txt", b"x", by=alice)
    for method, path in (
        ("GET", f"{alice.calendar}cached.ics"),
        ("GET", f"{world.drive()}cached.txt"),
        ("GET", world.drive()),
        ("GET", f"{world.drive()}missing.txt"),
        ("GET", f"{alice.calendar}missing.ics"),
        ("GET", alice.calendar),
        ("OPTIONS", alice.calendar),
        ("PROPFIND", alice.calendar),
        ("PROPFIND", world.drive()),
        ("PUT", f"{world.drive()}cached.txt"),
    ):
        answer = world.ask(method, path, by=alice, depth="0")
        assert answer.header("cache-control").startswith("private"), (method, path, answer.headers)


# -- the second factor ----------------------------------------------------------------------------------


def test_a_code_with_leading_zeros_is_a_code(world: World) -> None:
    """SOGo read codes as numbers."""
    account = world.door.account("zero")
    door = world.door
    made = door.write(lambda tx: secondfactor.enrol_totp(tx, door.keys, account, "app", "ksync"))
    totp = pyotp.TOTP(made.secret)
    at = next(at for at in range(1_800_000_000, 1_900_000_000, 30) if totp.at(at).startswith("00"))
    bare = totp.at(at).lstrip("0")
    with pytest.raises(ClientError):
        door.write(lambda tx: secondfactor.confirm(tx, door.keys, account, bare, window_steps=0, now=at))
    codes = door.write(
        lambda tx: secondfactor.confirm(tx, door.keys, account, totp.at(at), window_steps=0, now=at)
    )
    assert codes


# -- lists and dependencies -----------------------------------------------------------------------------


def test_libraries_with_known_flaws_are_newer_than_these() -> None:
    """CVE-2026-48099 and -55560 (WsgiDAV before 4.3.5), CVE-2024-27305 and -34083 (aiosmtpd before 1.4.6)."""
    for name, least in (("wsgidav", (4, 4)), ("aiosmtpd", (1, 4, 6)), ("radicale", (3, 9))):
        version = tuple(int(part) for part in metadata.version(name).split(".")[:3])
        assert version >= least, (name, version)
