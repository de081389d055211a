"""sync-collection: no change lost, none invented, whatever the limits and whoever writes meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa

from ksync_server.dav import collections, sync
from ksync_server.dav.places import Kind
from tests.dav.harness import Answer, Client, card, event

C = "{urn:ietf:params:xml:ns:caldav}"
ETAG = "{DAV:}getetag"
VALID_TOKEN = "{DAV:}valid-sync-token"


class Copy:
    """What one client believes a collection holds."""

    def __init__(self, client: Client, path: str) -> None:
        self.client = client
        self.path = path
        self.token = ""
        self.state: dict[str, str] = {}

    def step(self, limit: int = 0) -> bool:
        """One question; True when the answer was cut short."""
        return self.take(self.client.sync(self.path, self.token, limit), limit)

    def take(self, answer: Answer, limit: int = 0) -> bool:
        cut = False
        rows = answer.rows()
        for href, row in rows.items():
            if href == self.path:
                assert (row.status, row.error) == (507, "{DAV:}number-of-matches-within-limits")
                cut = True
            elif row.status is not None:
                assert (row.status, row.found, row.refused) == (404, {}, {})
                self.state.pop(href, None)
            else:
                self.state[href] = row.text(ETAG)
        assert not limit or len(rows) - cut <= limit
        assert not cut or len(rows) > 1, "a cut answer still makes progress"
        self.token = answer.token
        return cut

    def follow(self, limit: int = 0) -> int:
        """Sync until nothing is cut; how many questions it took."""
        for turn in range(1, 500):
            if not self.step(limit):
                return turn
        raise AssertionError("a limited sync never came to its end")


@pytest.fixture
def copy(client: Client) -> Copy:
    return Copy(client, client.make())


def put(copy: Copy, name: str, summary: str = "x") -> str:
    answer = copy.client.put(f"{copy.path}{name}.ics", event(name, f"SUMMARY:{summary}"))
    assert answer.status in (201, 204)
    return answer.etag


def delete(copy: Copy, name: str) -> None:
    assert copy.client.send("DELETE", f"{copy.path}{name}.ics").status == 204


@pytest.mark.spec("RFC 6578 §3.4")
def test_an_initial_sync_lists_every_member_and_an_empty_one_just_a_token(copy: Copy) -> None:
    assert not copy.step()
    assert copy.state == {}
    assert urlsplit(copy.token).scheme == "urn"
    etags = {f"{copy.path}{name}.ics": put(copy, name) for name in "abc"}
    copy.token = ""
    assert not copy.step()
    assert copy.state == etags


@pytest.mark.spec("RFC 6578 §3.5.1")
@pytest.mark.spec("RFC 6578 §3.5.2")
def test_a_later_sync_lists_what_changed_since(copy: Copy) -> None:
    for name in ("kept", "changed", "gone", "again"):
        put(copy, name)
    copy.step()
    assert copy.client.sync(copy.path, copy.token).rows() == {}
    old = copy.token
    put(copy, "changed", "2")
    put(copy, "fresh")
    put(copy, "fleeting")
    delete(copy, "fleeting")
    delete(copy, "gone")
    delete(copy, "again")
    put(copy, "again", "2")
    rows = copy.client.sync(copy.path, copy.token).rows()
    names = {href.removeprefix(copy.path): row.status for href, row in rows.items()}
    assert names == {
        "changed.ics": None,
        "fresh.ics": None,
        "again.ics": None,
        "fleeting.ics": 404,
        "gone.ics": 404,
    }
    copy.step()
    assert copy.client.sync(copy.path, copy.token).rows() == {}
    assert copy.client.sync(copy.path, old).rows() == rows, "an old token stays good"


@pytest.mark.spec("RFC 6578 §3.6")
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_a_limited_sync_resumes_and_loses_nothing(copy: Copy, limit: int) -> None:
    for number in range(7):
        put(copy, f"n{number}")
    assert copy.follow(limit) == -(-7 // limit)
    for number in range(0, 7, 2):
        delete(copy, f"n{number}")
    put(copy, "n1", "2")
    put(copy, "new")
    copy.follow(limit)
    truth = Copy(copy.client, copy.path)
    truth.step()
    assert copy.state == truth.state
    assert copy.follow(limit) == 1


@pytest.mark.spec("RFC 6578 §3.6")
def test_changes_between_two_pages_are_not_lost(copy: Copy) -> None:
    for number in range(6):
        put(copy, f"n{number}")
    assert copy.step(2)
    seen = next(iter(copy.state)).removeprefix(copy.path).removesuffix(".ics")
    put(copy, seen, "changed after its page")
    delete(copy, next(f"n{n}" for n in range(6) if f"{copy.path}n{n}.ics" not in copy.state))
    copy.follow(2)
    truth = Copy(copy.client, copy.path)
    truth.step()
    assert copy.state == truth.state


def test_without_a_limit_the_servers_own_cuts_the_answer(make_client: Callable[..., Client]) -> None:
    client = make_client(max_sync_rows=3)
    copy = Copy(client, client.make())
    for number in range(7):
        put(copy, f"n{number}")
    assert copy.follow() == 3
    assert len(copy.state) == 7


@pytest.mark.spec("RFC 6578 §3.2")
@pytest.mark.parametrize(
    "token", ["nonsense", "http://example.org/sync/1", "urn:ksync:0:0:9", "urn:ksync:::", "😀", "1"]
)
def test_a_token_that_is_not_ours_is_refused(copy: Copy, token: str) -> None:
    answer = copy.client.sync(copy.path, token)
    assert (answer.status, answer.precondition) == (403, VALID_TOKEN)


@pytest.mark.spec("RFC 6578 §3.2")
def test_tokens_of_others_of_the_future_and_of_the_past_life_of_a_name_are_refused(copy: Copy) -> None:
    put(copy, "a")
    copy.step()
    head, _, number = copy.token.rpartition(":")
    tokens = [
        f"{head}:{int(number) + 1}",
        Copy(copy.client, copy.client.make()).client.sync(copy.client.make()).token,
    ]
    for token in tokens:
        assert copy.client.sync(copy.path, token).precondition == VALID_TOKEN
    assert copy.client.send("DELETE", copy.path).status == 204
    assert copy.client.send("MKCALENDAR", copy.path).status == 201
    assert copy.client.sync(copy.path, copy.token).precondition == VALID_TOKEN


@pytest.mark.spec("RFC 6578 §3.3")
@pytest.mark.parametrize(
    ("inner", "status", "precondition"),
    [
        ("<d:sync-level>1</d:sync-level><d:prop/>", 400, None),
        ("<d:sync-token/><d:prop/>", 400, None),
        ("<d:sync-token/><d:sync-level>2</d:sync-level><d:prop/>", 400, None),
        ("<d:sync-token/><d:sync-level>1</d:sync-level>", 400, None),
        (
            "<d:sync-token/><d:sync-level>infinite</d:sync-level><d:prop/>",
            403,
            "{DAV:}sync-traversal-supported",
        ),
        *(
            (
                "<d:sync-token/><d:sync-level>1</d:sync-level><d:prop/>"
                f"<d:limit><d:nresults>{count}</d:nresults></d:limit>",
                400,
                None,
            )
            for count in ("0", "-1", "many", "")
        ),
    ],
)
def test_bad_sync_requests_are_refused(copy: Copy, inner: str, status: int, precondition: str | None) -> None:
    answer = copy.client.report(copy.path, "d:sync-collection", inner, depth="0")
    assert (answer.status, answer.precondition) == (status, precondition)


@pytest.mark.spec("RFC 6578 §3.3")
def test_depth_1_is_tolerated_and_infinity_is_not(copy: Copy) -> None:
    put(copy, "a")
    assert len(copy.client.sync(copy.path, depth="1").rows()) == 1
    assert copy.client.sync(copy.path, depth="infinity").status == 400


def test_there_is_nothing_to_sync_elsewhere(copy: Copy) -> None:
    put(copy, "a")
    client = copy.client
    for path in (copy.path + "a.ics", client.home, client.principal, "/"):
        answer = client.sync(path)
        assert (answer.status, answer.precondition) == (403, "{DAV:}supported-report")
    assert client.sync(client.home + "none/").status == 404
    assert client.sync(copy.path + "none.ics").status == 404


@pytest.mark.spec("RFC 6578 §3.5")
def test_asked_properties_come_with_each_row(copy: Copy) -> None:
    put(copy, "a", "asked")
    props = "<d:getetag/><d:getcontenttype/><c:calendar-data/><x:none xmlns:x='urn:x'/>"
    (row,) = copy.client.sync(copy.path, props=props).rows().values()
    assert "SUMMARY:asked" in row.text(C + "calendar-data")
    assert row.text("{DAV:}getcontenttype").startswith("text/calendar")
    assert row.refused == {"{urn:x}none": 404}
    answer = copy.client.sync(copy.path, props=props, prefer="return=minimal")
    (row,) = answer.rows().values()
    assert row.refused == {}
    assert answer.headers["preference-applied"] == "return=minimal"


def test_address_books_sync_alike(client: Client) -> None:
    copy = Copy(client, client.make(Kind.ADDRESSBOOK))
    etag = client.put(copy.path + "a.vcf", card("a", "A")).etag
    copy.step()
    assert copy.state == {copy.path + "a.vcf": etag}


def test_a_large_sync_is_streamed_and_whole(client: Client) -> None:
    copy = Copy(client, client.make())
    client.fill(copy.path, 1000)
    answer = client.sync(copy.path)
    assert answer.pieces > 1
    copy.take(answer)
    assert len(copy.state) == 1000
    assert client.sync(copy.path, copy.token).rows() == {}


def test_members_changed_while_a_page_is_sent_come_with_the_next_token(client: Client) -> None:
    path = client.make()
    client.fill(path, 1000)
    copy = Copy(client, path)

    async def race() -> Answer:
        sending = client.asend("REPORT", path, _body())
        changing = client.asend("PUT", path + "e000999.ics", event("e000999"))
        answer, changed = await asyncio.gather(sending, changing)
        assert changed.status == 204
        return answer

    copy.take(asyncio.run(race()))
    copy.follow()
    truth = Copy(client, path)
    truth.step()
    assert copy.state == truth.state
    assert len(copy.state) == 1000


def _body() -> str:
    return (
        "<d:sync-collection xmlns:d='DAV:'><d:sync-token/><d:sync-level>1</d:sync-level>"
        "<d:prop><d:getetag/></d:prop></d:sync-collection>"
    )


def test_a_sync_without_change_asks_one_statement_whatever_the_size(client: Client) -> None:
    path = client.make()
    client.fill(path, 500)
    token = client.sync(path).token
    asked: list[object] = []
    database = client.store.database
    compiled = database.compiled

    def counting(statement: sa.Executable) -> object:
        asked.append(statement)
        return compiled(statement)

    database.compiled = counting  # type: ignore[method-assign, assignment]
    try:
        answer = client.sync(path, token)
    finally:
        del database.compiled  # type: ignore[method-assign]
    assert answer.rows() == {}
    assert answer.token == token
    assert len(asked) == 1


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_concurrent_writers_of_several_workers_lose_no_change(client: Client, seed: int) -> None:
    """Sites share nothing but the store, as worker processes do."""
    path = client.make()
    chance = random.Random(seed)
    workers = [Client(client.store, client.identity) for _ in range(3)]
    copies = [Copy(workers[0], path), Copy(workers[1], path)]
    truth: dict[str, str] = {}

    async def write(worker: Client, names: list[str], turns: int) -> None:
        own = random.Random(chance.random())
        for turn in range(turns):
            name = own.choice(names)
            if name in truth and own.random() < 0.4:
                assert (await worker.asend("DELETE", name)).status == 204
                del truth[name]
            else:
                answer = await worker.asend("PUT", name, event(name, f"SUMMARY:{turn}"))
                assert answer.status in (201, 204), answer
                truth[name] = answer.etag

    async def read(copy: Copy) -> None:
        own = random.Random(chance.random())
        for _ in range(15):
            limit = own.randrange(1, 4)
            inner = f"<d:sync-token>{copy.token}</d:sync-token><d:sync-level>1</d:sync-level>"
            inner += f"<d:limit><d:nresults>{limit}</d:nresults></d:limit><d:prop><d:getetag/></d:prop>"
            body = f"<d:sync-collection xmlns:d='DAV:'>{inner}</d:sync-collection>"
            copy.take(await copy.client.asend("REPORT", path, body), limit)

    async def race() -> None:
        writers = [
            write(worker, [f"{path}w{number}-{n}.ics" for n in range(4)], 12)
            for number, worker in enumerate(workers)
        ]
        await asyncio.gather(*writers, *map(read, copies))

    asyncio.run(race())
    for copy in copies:
        copy.follow(2)
        assert copy.state == truth


def test_a_page_ends_where_it_said_even_if_rows_moved_on(client: Client) -> None:
    path = client.make()
    for name in "abc":
        client.put(f"{path}{name}.ics", event(name))
    account = client.identity.account_id
    with client.store.database.read() as tx:
        found = collections.list_home(tx, account, Kind.CALENDAR)[0]
        page = sync.page(tx, found, sync.SyncRequest("", None, (), None), 100)
    client.put(f"{path}a.ics", event("a", "SUMMARY:2"))
    with client.store.database.read() as tx:
        assert [row[0] for row in sync.rows(tx, page, page.after, 10)] == ["b.ics", "c.ics"]
