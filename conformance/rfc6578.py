"""What a strict reader of RFC 6578 (collection synchronization) expects, resuming tokens included."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote, urlsplit

import pytest

from conformance.client import DAV, Answer, Client
from conformance.conftest import Collection, make_calendar
from conformance.target import Target

spec = pytest.mark.spec


def event(uid: str, summary: str = "x") -> str:
    return (
        f"BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:-//example.org//c//EN\r\nBEGIN:VEVENT\r\nUID:{uid}\r\n"
        f"DTSTAMP:20260101T000000Z\r\nDTSTART:20260501T100000Z\r\nSUMMARY:{summary}\r\nEND:VEVENT\r\nEND:VCALENDAR\r\n"
    )


def put(calendar: Collection, name: str, summary: str = "x") -> str:
    answer = calendar.put(f"{name}.ics", event(name, summary))
    assert answer.status in (201, 204), (answer.status, answer.body[:300])
    return answer.etag


def delete(calendar: Collection, name: str) -> None:
    assert calendar.client.request("DELETE", calendar / f"{name}.ics").status in (200, 204)


def read(calendar: Collection, answer: Answer) -> tuple[dict[str, str], set[str], bool, str]:
    """Changed names with their ETags, removed names, whether it was cut short, and the new token."""
    changed: dict[str, str] = {}
    removed: set[str] = set()
    cut = False
    for row in answer.rows:
        name = unquote(row.path).rpartition("/")[2].removesuffix(".ics")
        if row.path.rstrip("/") == calendar.path.rstrip("/"):
            assert row.status == 507, row
            assert f"{DAV}number-of-matches-within-limits" in row.errors, row
            cut = True
        elif row.status == 404:
            assert not row.properties
            removed.add(name)
        else:
            assert row.status is None, row
            assert name not in changed, "each member at most once"
            changed[name] = row.text(f"{DAV}getetag")
    assert not removed & set(changed)
    assert answer.sync_token
    return changed, removed, cut, answer.sync_token


def follow(calendar: Collection, token: str, limit: int, state: dict[str, str]) -> tuple[str, int]:
    """Sync until nothing is cut; `state` (name -> ETag) becomes the client's view. Counts the requests."""
    for turn in range(1, 1000):
        changed, removed, cut, token = read(calendar, calendar.sync(token, limit))
        assert not limit or len(changed) + len(removed) <= limit
        assert not cut or changed or removed, "a cut answer still makes progress"
        state.update(changed)
        for name in removed:
            state.pop(name, None)
        if not cut:
            return token, turn
    raise AssertionError("a limited sync never came to its end")


@spec("RFC 6578 §3.4")
def test_an_initial_sync_lists_every_member(calendar: Collection) -> None:
    etags = {name: put(calendar, name) for name in ("a", "b", "c")}
    changed, removed, cut, _ = read(calendar, calendar.sync())
    assert (changed, removed, cut) == (etags, set(), False)


@spec("RFC 6578 §3.5")
def test_an_empty_collection_answers_with_a_token(calendar: Collection) -> None:
    changed, removed, cut, token = read(calendar, calendar.sync())
    assert (changed, removed, cut) == ({}, set(), False)
    assert urlsplit(token).scheme, "a sync token is a URI"


@spec("RFC 6578 §3.2")
@spec("RFC 6578 §4")
def test_supported_report_set_and_sync_token_are_properties(calendar: Collection) -> None:
    (row,) = calendar.client.propfind(calendar.path, "D:sync-token", "D:supported-report-set")
    reports = row.properties[f"{DAV}supported-report-set"]
    assert list(reports.iter(f"{DAV}sync-collection"))
    assert row.text(f"{DAV}sync-token") == calendar.sync().sync_token
    put(calendar, "a")
    (after,) = calendar.client.propfind(calendar.path, "D:sync-token")
    assert after.text(f"{DAV}sync-token") != row.text(f"{DAV}sync-token")
    everything = calendar.client.propfind(calendar.path)[0]
    assert f"{DAV}sync-token" not in everything.properties, "not in allprop"


@spec("RFC 6578 §3.5.1")
@spec("RFC 6578 §3.5.2")
def test_a_later_sync_lists_what_changed_since(calendar: Collection) -> None:
    for name in ("kept", "changed", "gone"):
        put(calendar, name)
    token = calendar.sync().sync_token
    assert read(calendar, calendar.sync(token))[:3] == ({}, set(), False)
    etag = put(calendar, "changed", "again")
    put(calendar, "fleeting")
    delete(calendar, "fleeting")
    delete(calendar, "gone")
    fresh = put(calendar, "fresh")
    changed, removed, cut, newer = read(calendar, calendar.sync(token))
    assert changed == {"changed": etag, "fresh": fresh}
    assert removed - {"fleeting"} == {"gone"}
    assert not cut
    assert read(calendar, calendar.sync(newer))[:2] == ({}, set())
    assert read(calendar, calendar.sync(token))[0] == changed, "an old token stays good"


@spec("RFC 6578 §3.5.1")
def test_a_member_deleted_and_made_again_is_changed(calendar: Collection) -> None:
    put(calendar, "again", "first")
    token = calendar.sync().sync_token
    delete(calendar, "again")
    etag = put(calendar, "again", "second")
    assert read(calendar, calendar.sync(token))[:2] == ({"again": etag}, set())


@spec("RFC 6578 §3.6")
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_a_limited_sync_resumes_and_loses_nothing(calendar: Collection, limit: int) -> None:
    etags = {f"n{number}": put(calendar, f"n{number}") for number in range(7)}
    state: dict[str, str] = {}
    token, turns = follow(calendar, "", limit, state)
    assert state == etags
    assert turns >= 7 // limit
    for number in range(0, 7, 2):
        delete(calendar, f"n{number}")
        etags.pop(f"n{number}")
    etags["n1"] = put(calendar, "n1", "again")
    etags["new"] = put(calendar, "new")
    token, _ = follow(calendar, token, limit, state)
    assert state == etags
    assert follow(calendar, token, limit, state)[1] == 1


@spec("RFC 6578 §3.6")
def test_changes_between_two_pages_are_not_lost(calendar: Collection) -> None:
    for number in range(6):
        put(calendar, f"n{number}")
    state: dict[str, str] = {}
    changed, _, cut, token = read(calendar, calendar.sync("", 2))
    assert cut
    state.update(changed)
    seen = sorted(changed)[0]
    etags = {seen: put(calendar, seen, "changed after its page")}
    unseen = next(f"n{number}" for number in range(6) if f"n{number}" not in changed)
    delete(calendar, unseen)
    follow(calendar, token, 2, state)
    assert state[seen] == etags[seen]
    assert set(state) == {f"n{number}" for number in range(6)} - {unseen}


@spec("RFC 6578 §3.7")
def test_a_limit_of_zero_or_nonsense_is_refused_or_ignored(calendar: Collection) -> None:
    put(calendar, "a")
    for value in ("0", "-1", "many", "99999999999999999999"):
        inner = (
            "<D:sync-token/><D:sync-level>1</D:sync-level>"
            f"<D:limit><D:nresults>{value}</D:nresults></D:limit><D:prop><D:getetag/></D:prop>"
        )
        answer = calendar.client.report(calendar.path, "D:sync-collection", inner, depth="0")
        assert answer.status in (207, 400, 403, 507), (value, answer.status)


@spec("RFC 6578 §3.2")
@pytest.mark.parametrize(
    "token",
    ["nonsense", "http://example.org/ns/sync/1", "urn:ksync:0:0:999999", "urn:ksync:::", "\U0001f600", "1"],
)
def test_a_token_that_is_not_ours_is_refused(calendar: Collection, token: str) -> None:
    answer = calendar.sync(token)
    assert answer.status in (403, 409), answer.status
    assert answer.preconditions == (f"{DAV}valid-sync-token",)


@spec("RFC 6578 §3.2")
def test_a_token_of_another_collection_is_refused(calendar: Collection) -> None:
    other = make_calendar(calendar.client)
    token = other.sync().sync_token
    calendar.client.request("DELETE", other.path)
    assert calendar.sync(token).preconditions == (f"{DAV}valid-sync-token",)


@spec("RFC 6578 §3.2")
def test_a_token_of_the_future_is_refused(calendar: Collection) -> None:
    token = calendar.sync().sync_token
    head, _, number = token.rpartition(":")
    if number.isdigit():
        future = f"{head}:{int(number) + 1000}"
        assert calendar.sync(future).preconditions == (f"{DAV}valid-sync-token",)


@spec("RFC 6578 §3.2")
def test_a_collection_made_again_on_the_same_name_does_not_take_the_old_token(calendar: Collection) -> None:
    put(calendar, "a")
    token = calendar.sync().sync_token
    assert calendar.client.request("DELETE", calendar.path).status in (200, 204)
    assert calendar.client.request("MKCALENDAR", calendar.path).status == 201
    assert calendar.sync(token).preconditions == (f"{DAV}valid-sync-token",)


@spec("RFC 6578 §3.3")
def test_bad_sync_requests(calendar: Collection) -> None:
    put(calendar, "a")
    for inner, allowed in (
        ("<D:sync-level>1</D:sync-level><D:prop><D:getetag/></D:prop>", (400, 403)),
        ("<D:sync-token/><D:sync-level>2</D:sync-level><D:prop><D:getetag/></D:prop>", (400, 403)),
        ("<D:sync-token/><D:sync-level>1</D:sync-level>", (207, 400, 403)),
        ("", (400, 403)),
    ):
        answer = calendar.client.report(calendar.path, "D:sync-collection", inner, depth="0")
        assert answer.status in allowed, (inner, answer.status)
    on_object = calendar.client.report(
        calendar / "a.ics",
        "D:sync-collection",
        "<D:sync-token/><D:sync-level>1</D:sync-level><D:prop/>",
        depth="0",
    )
    assert on_object.status in (403, 405), on_object.status


@spec("RFC 6578 §3.5")
def test_asked_properties_come_with_each_row(calendar: Collection) -> None:
    put(calendar, "a", "asked")
    answer = calendar.sync("", 0, "<D:getetag/><D:getcontenttype/><C:calendar-data/><E:unknown/>")
    row = next(row for row in answer.rows if row.path.endswith("a.ics"))
    assert "SUMMARY:asked" in row.text("{urn:ietf:params:xml:ns:caldav}calendar-data")
    assert row.text(f"{DAV}getcontenttype").startswith("text/calendar")
    assert row.refused == {"{http://example.org/ns/}unknown": 404}


@pytest.fixture
def second(target: Target) -> Iterator[Client]:
    client = target.sync()
    yield client
    client.close()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_clients_with_small_limits_always_end_equal_to_the_server(
    calendar: Collection, second: Client, seed: int
) -> None:
    chance = random.Random(seed)
    other = Collection(second, calendar.path)
    truth: dict[str, str] = {}
    views: list[tuple[str, dict[str, str]]] = [("", {}), ("", {})]
    for _ in range(60):
        name = f"n{chance.randrange(8)}"
        if name in truth and chance.random() < 0.4:
            delete(other, name)
            del truth[name]
        else:
            truth[name] = put(other, name, str(chance.random()))
        who = chance.randrange(4)
        if who < 2:
            token, state = views[who]
            if chance.random() < 0.5:
                token, _ = follow(calendar, token, chance.randrange(1, 4), state)
                assert state == truth
            else:
                changed, removed, _, token = read(calendar, calendar.sync(token, chance.randrange(1, 4)))
                state.update(changed)
                for gone in removed:
                    state.pop(gone, None)
            views[who] = (token, state)
    for token, state in views:
        follow(calendar, token, 2, state)
        assert state == truth


def test_writers_at_the_same_time_lose_no_change(target: Target, calendar: Collection) -> None:
    """Each writer has a connection of its own, so the writes meet in different workers."""

    def write(number: int) -> dict[str, str]:
        client = target.sync()
        mine = Collection(client, calendar.path)
        etags = {f"w{number}-{turn % 4}": put(mine, f"w{number}-{turn % 4}", f"{turn}") for turn in range(12)}
        client.close()
        return etags

    state: dict[str, str] = {}
    token = ""
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(write, number) for number in range(4)]
        while not all(job.done() for job in jobs):
            token, _ = follow(calendar, token, 3, state)
    follow(calendar, token, 3, state)
    expected = {name: etag for job in jobs for name, etag in job.result().items()}
    assert state == expected
