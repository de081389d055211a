"""Who gets in where: the four demo accounts, every name and secret they have, at every service."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import pytest

from conformance.client import Answer, Client
from conformance.target import Target

pytestmark = pytest.mark.demo

PEOPLE = ("alice", "bob", "carol", "dave")
WITHOUT_SECOND_FACTOR = ("alice", "carol", "dave")
PROPFIND = '<?xml version="1.0"?><D:propfind xmlns:D="DAV:"><D:prop><D:current-user-principal/></D:prop>'
PROPFIND += "</D:propfind>"
PROPPATCH = (
    '<?xml version="1.0"?><D:propertyupdate xmlns:D="DAV:"><D:set><D:prop><D:displayname>x</D:displayname>'
)
PROPPATCH += "</D:prop></D:set></D:propertyupdate>"
VARYING = {"date", "x-request-id", "request-id"}  # headers that differ between any two answers


def enter(url: str, login: str, password: str, *, host: str = "", method: str = "PROPFIND") -> Answer:
    client = Client(url, login, password, host)
    try:
        return client.request(method, "", PROPFIND if method == "PROPFIND" else None, {"Depth": "0"})
    finally:
        client.close()


def secret(account: Mapping[str, Any]) -> str:
    """The secret that sync and drive take: the application password when a second factor is on."""
    return str(account["application_password"] if account["second_factor"] else account["password"])


def login_names(target: Target, account: Mapping[str, Any]) -> Iterator[str]:
    sync_id = account["sync_id"]
    yield account["login"]
    yield account["login"].upper()
    yield sync_id
    yield sync_id.lower()
    yield f"{sync_id}@sync.localhost"
    yield f"{sync_id.lower()}@SYNC.localhost"
    yield f"{sync_id}@127.0.0.1"  # the sync host as the demo prints it


def fingerprint(answer: Answer) -> tuple[int, bytes, tuple[tuple[str, str], ...]]:
    """Everything of an answer that must not tell two refusals apart."""
    headers = tuple((name, value) for name, value in answer.headers.items() if name.lower() not in VARYING)
    return answer.status, answer.body, headers


@pytest.mark.parametrize("name", PEOPLE)
def test_every_name_of_an_account_opens_its_calendars(target: Target, name: str) -> None:
    account = target.account(name)
    for login in login_names(target, account):
        answer = enter(f"{target.sync_url}/", login, secret(account))
        assert answer.status == 207, (login, answer.status, answer.body)
        assert f"/principals/{account['sync_id']}/".encode() in answer.body, (login, answer.body)


@pytest.mark.parametrize("name", ["alice", "bob", "dave"])
def test_every_name_of_an_account_opens_its_drive_in_both_forms(target: Target, name: str) -> None:
    account = target.account(name)
    for drive in account["drives"]:
        for login in login_names(target, account):
            assert enter(drive["url"], login, secret(account)).status == 207, login
            host = urlsplit(drive["host_url"]).netloc
            here = f"http://{urlsplit(target.sync_url).netloc}/"
            assert enter(here, login, secret(account), host=host).status == 207, login


@pytest.mark.parametrize("name", WITHOUT_SECOND_FACTOR)
def test_without_a_second_factor_the_account_password_opens_calendars(target: Target, name: str) -> None:
    account = target.account(name)
    assert not account["second_factor"]
    assert enter(f"{target.sync_url}/", account["login"], account["password"]).status == 207


def test_with_a_second_factor_the_account_password_is_refused_whatever_else_is_sent(target: Target) -> None:
    bob = target.account("bob")
    assert bob["second_factor"]
    places = [
        f"{target.sync_url}/",
        f"{target.sync_url}/calendars/{bob['sync_id']}/",
        bob["drives"][0]["url"],
    ]
    for place in places:
        for login in login_names(target, bob):
            for password in (
                bob["password"],
                f"{bob['password']}123456",
                f"{bob['application_password']}{bob['password']}",
            ):
                assert enter(place, login, password).status == 401, (place, login)
    client = Client(f"{target.sync_url}/", bob["login"], bob["password"])
    for header in ("X-OTP", "X-TOTP", "OTP", "X-Forwarded-User", "X-Remote-User", "Remote-User"):
        assert client.request("PROPFIND", "", PROPFIND, {"Depth": "0", header: bob["login"]}).status == 401, (
            header
        )
    client.close()


def test_spaces_capitals_and_hyphens_of_an_application_password_do_not_matter(target: Target) -> None:
    bob = target.account("bob")
    plain = bob["application_password"].replace("-", "").replace(" ", "")
    grouped = [plain[start : start + 4] for start in range(0, len(plain), 4)]
    forms = {plain, plain.upper(), plain.lower(), " ".join(grouped), "-".join(grouped), f"  {plain} "}
    for form in sorted(forms):
        for place in (f"{target.sync_url}/", bob["drives"][0]["url"]):
            assert enter(place, bob["login"], form).status == 207, (form.replace(plain, "..."), place)


def test_an_application_password_with_one_character_changed_is_refused(target: Target) -> None:
    bob = target.account("bob")
    plain = bob["application_password"]
    for place in (0, len(plain) // 2, len(plain) - 1):
        wrong = plain[:place] + ("b" if plain[place].lower() != "b" else "c") + plain[place + 1 :]
        assert enter(f"{target.sync_url}/", bob["login"], wrong).status == 401


def test_the_application_password_of_one_account_opens_no_other(target: Target) -> None:
    bob = target.account("bob")
    for name in ("alice", "carol", "dave"):
        login = target.account(name)["login"]
        assert enter(f"{target.sync_url}/", login, bob["application_password"]).status == 401


def test_carol_has_calendars_but_her_offer_has_no_webdav(target: Target) -> None:
    carol = target.account("carol")
    assert enter(f"{target.sync_url}/", carol["login"], carol["password"]).status == 207
    (drive,) = carol["drives"]
    before = enter(drive["url"], carol["login"], "wrong")
    assert before.status == 401
    for method in (
        "PROPFIND",
        "OPTIONS",
        "GET",
        "PUT",
        "MKCOL",
        "DELETE",
        "LOCK",
        "PROPPATCH",
        "COPY",
        "MOVE",
    ):
        answer = enter(drive["url"], carol["login"], carol["password"], method=method)
        assert answer.status == 403, (method, answer.status)
        assert drive["offer"].encode() in answer.body, answer.body
    assert enter(drive["url"], carol["login"], carol["password"], method="HEAD").status == 403


def test_a_drive_of_others_looks_like_no_drive(target: Target) -> None:
    dave, alice = target.account("dave"), target.account("alice")
    other = dave["drives"][0]
    prefix = other["url"].rstrip("/").rpartition("/")[0]
    unknown = f"{prefix}/987654321/"
    assert enter(other["url"], "", "").status == enter(unknown, "", "").status == 401
    with_login = [
        fingerprint(enter(url, alice["login"], alice["password"])) for url in (other["url"], unknown)
    ]
    assert with_login[0][0] == 404
    assert with_login[0] == with_login[1]
    here = f"http://{urlsplit(target.sync_url).netloc}/"
    domain = urlsplit(other["host_url"]).netloc.partition(".")[2]
    hosts = [urlsplit(other["host_url"]).netloc, f"987654321.{domain}"]
    by_host = [fingerprint(enter(here, alice["login"], alice["password"], host=host)) for host in hosts]
    assert by_host[0][0] == 404
    assert by_host[0] == by_host[1]


def test_alice_and_bob_share_a_drive_but_not_their_own_files(target: Target) -> None:
    alice, bob = target.account("alice"), target.account("bob")
    assert alice["drives"][0]["id"] == bob["drives"][0]["id"]
    own = Client(alice["drives"][0]["url"], alice["login"], secret(alice))
    other = Client(bob["drives"][0]["url"], bob["login"], secret(bob))
    name = f"door-{uuid.uuid4().hex[:12]}"
    try:
        assert own.request("PUT", name, b"of alice").status == 201
        assert other.request("GET", name).status == 404
        common = f"Common%20documents/{name}"
        assert own.request("PUT", common, b"for all").status == 201
        assert other.request("GET", common).body == b"for all"
        assert other.request("PUT", common, b"by bob").status == 204
        assert own.request("GET", common).body == b"by bob"
    finally:
        own.request("DELETE", name)
        own.request("DELETE", f"Common%20documents/{name}")


def test_calendars_of_others_are_not_there(target: Target) -> None:
    alice, bob = target.account("alice"), target.account("bob")
    client = target.sync()
    for sync_id in (bob["sync_id"], "ZZ99999"):
        for path in (
            f"/calendars/{sync_id}/",
            f"/addressbooks/{sync_id}/",
            f"/calendars/{sync_id}/any/one.ics",
        ):
            for method in ("PROPFIND", "GET", "DELETE", "PUT", "MKCALENDAR", "PROPPATCH"):
                body = PROPPATCH if method == "PROPPATCH" else None
                answer = client.request(method, path, body, {"Depth": "0"})
                assert answer.status in (403, 404), (method, path, answer.status)
    client.close()
    seen = {
        method: {
            fingerprint(Client(target.sync_url, alice["login"], alice["password"]).request(method, path))
            for path in (f"/calendars/{bob['sync_id']}/any/", "/calendars/ZZ99999/any/")
        }
        for method in ("GET", "PROPFIND", "DELETE")
    }
    assert {method: len(answers) for method, answers in seen.items()} == {
        "GET": 1,
        "PROPFIND": 1,
        "DELETE": 1,
    }


@pytest.mark.parametrize("place", ["sync", "drive"])
@pytest.mark.parametrize("method", ["PROPFIND", "GET", "PUT", "OPTIONS", "REPORT"])
def test_refusals_are_alike_in_status_body_and_headers(target: Target, place: str, method: str) -> None:
    alice, bob = target.account("alice"), target.account("bob")
    url = f"{target.sync_url}/" if place == "sync" else alice["drives"][0]["url"]
    refused = {
        "no credentials": enter(url, "", "", method=method),
        "unknown user": enter(url, "nobody@example.org", "some password", method=method),
        "unknown sync id": enter(url, "ZZ99999", "some password", method=method),
        "wrong password": enter(url, alice["login"], "some password", method=method),
        "empty password": enter(url, alice["login"], "", method=method),
        "second factor": enter(url, bob["login"], bob["password"], method=method),
        "wrong application password": enter(
            url, bob["login"], bob["application_password"][::-1], method=method
        ),
        "no text": enter(url, "\u202e\x00\ufffe", "\x00", method=method),
        "long": enter(url, "a" * 2000, "b" * 3000, method=method),
    }
    wrong = {why: answer.status for why, answer in refused.items() if answer.status != 401}
    assert not wrong
    reference = fingerprint(refused["unknown user"])
    different = {
        why: fingerprint(answer) for why, answer in refused.items() if fingerprint(answer) != reference
    }
    assert not different, (reference, different)
    assert refused["unknown user"].header("WWW-Authenticate").startswith("Basic realm=")
    assert 'charset="UTF-8"' in refused["unknown user"].header("WWW-Authenticate")


@pytest.mark.parametrize(
    "value",
    [
        "Basic",
        "Basic ",
        "Basic !!!",
        "Basic YWxpY2U=",
        "Basic YQ",
        "Bearer abc",
        "Digest username=x",
        "Basic /w==",
        "",
    ],
)
def test_a_malformed_authorization_is_refused_like_a_wrong_one(target: Target, value: str) -> None:
    for url in (f"{target.sync_url}/", target.drive_url):
        client = Client(url)
        reference = fingerprint(enter(url, "nobody@example.org", "some password"))
        answer = client.request("PROPFIND", "", PROPFIND, {"Authorization": value, "Depth": "0"})
        assert fingerprint(answer) == reference
        client.close()


def test_an_unknown_host_is_misdirected(target: Target) -> None:
    alice = target.account("alice")
    for host in (
        "sync.example.org",
        "connect.localhost",
        "x.connect.localhost",
        "01.connect.localhost",
        "-1.connect.localhost",
    ):
        answer = enter(f"{target.sync_url}/", alice["login"], alice["password"], host=host)
        assert answer.status == 421, (host, answer.status)


def test_the_sync_host_by_name_answers_too(target: Target) -> None:
    alice = target.account("alice")
    port = urlsplit(target.sync_url).port
    for host in (f"sync.localhost:{port}", "sync.localhost", "SYNC.localhost"):
        assert enter(f"{target.sync_url}/", alice["login"], alice["password"], host=host).status == 207, host


def test_forwarded_headers_of_a_client_are_not_believed(target: Target) -> None:
    alice = target.account("alice")
    client = Client(f"{target.sync_url}/", alice["login"], alice["password"])
    headers = {
        "Depth": "0",
        "X-Forwarded-Host": "evil.example.org",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Prefix": "/evil",
        "X-Script-Name": "/evil",
        "Forwarded": "host=evil.example.org;proto=https",
    }
    answer = client.request("PROPFIND", "", PROPFIND, headers)
    assert answer.status == 207
    assert b"evil" not in answer.body
    answer = client.request("GET", "/.well-known/caldav", None, headers)
    assert "evil" not in str(answer.headers) + answer.body.decode(errors="replace")
    client.close()


def test_a_revoked_body_is_not_read_before_the_door(target: Target) -> None:
    """A refused upload gets its 401 before the first byte of the body; no 100 Continue invites it."""
    client = Client(target.drive_url, "nobody@example.org", "wrong")
    head = client.head("PUT", "never", "Content-Length: 1000000000", "Expect: 100-continue")
    answer = client.raw(head + b"\r\n", timeout=3)
    assert answer.startswith(b"HTTP/1.1 401"), answer[:200]
