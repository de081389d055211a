"""A stateful model of two clients and a server: whatever happens in whatever order, each client that follows
its tokens to the end holds what the server holds (RFC 6578)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.dav.harness import Client, Store, event, make_account
from tests.dav.test_sync import Copy

NAMES = st.integers(0, 5)
LIMITS = st.integers(0, 3)
WHO = st.integers(0, 1)


class SyncModel(RuleBasedStateMachine):
    """Two workers, two clients, two calendars; `truth` is what the writers were told."""

    store: Store

    def __init__(self) -> None:
        super().__init__()
        identity = self.store.database.write(make_account)
        self.workers = [Client(self.store, identity), Client(self.store, identity)]
        self.paths = [self.workers[0].make(), self.workers[0].make()]
        self.truth: list[dict[str, str]] = [{}, {}]
        self.uids: list[dict[str, str]] = [{}, {}]
        self.copies = [[Copy(worker, path) for path in self.paths] for worker in self.workers]
        self.turn = 0

    @rule(who=WHO, where=WHO, number=NAMES)
    def put(self, who: int, where: int, number: int) -> None:
        path = f"{self.paths[where]}n{number}.ics"
        self.turn += 1
        uid = self.uids[where].get(path, f"u{self.turn}")
        answer = self.workers[who].put(path, event(uid, f"SUMMARY:{self.turn}"))
        assert answer.status == (204 if path in self.truth[where] else 201)
        self.truth[where][path] = answer.etag
        self.uids[where][path] = uid

    @rule(who=WHO, where=WHO, number=NAMES)
    def delete(self, who: int, where: int, number: int) -> None:
        path = f"{self.paths[where]}n{number}.ics"
        answer = self.workers[who].send("DELETE", path)
        assert answer.status == (204 if self.truth[where].pop(path, None) else 404)
        self.uids[where].pop(path, None)

    @rule(who=WHO, where=WHO, to=WHO, number=NAMES, other=NAMES)
    def move(self, who: int, where: int, to: int, number: int, other: int) -> None:
        source, path = f"{self.paths[where]}n{number}.ics", f"{self.paths[to]}n{other}.ics"
        if source not in self.truth[where] or path in self.truth[to]:
            return
        client = self.workers[who]
        assert client.send("MOVE", source, destination=path).status == 201
        del self.truth[where][source]
        self.truth[to][path] = client.send("HEAD", path).etag
        self.uids[to][path] = self.uids[where].pop(source)

    @rule(who=WHO, where=WHO, limit=LIMITS)
    def one_page(self, who: int, where: int, limit: int) -> None:
        self.copies[who][where].step(limit)

    @rule(who=WHO, where=WHO, limit=LIMITS)
    def to_the_end(self, who: int, where: int, limit: int) -> None:
        copy = self.copies[who][where]
        copy.follow(limit)
        assert copy.state == self.truth[where]

    @rule(who=WHO, where=WHO)
    def begin_again(self, who: int, where: int) -> None:
        """A client forgets its token and what it held."""
        self.copies[who][where] = Copy(self.workers[who], self.paths[where])

    @invariant()
    def lists_agree(self) -> None:
        if self.turn % 7 == 0:
            rows = self.workers[0].propfind(self.paths[0], "{DAV:}getetag", depth="1").rows()
            listed = {href: row.text("{DAV:}getetag") for href, row in rows.items() if href != self.paths[0]}
            assert listed == self.truth[0]

    def teardown(self) -> None:
        for copies in self.copies:
            for where, copy in enumerate(copies):
                copy.follow(2)
                assert copy.state == self.truth[where]


@pytest.fixture
def model(store: Store) -> Iterator[type[SyncModel]]:
    SyncModel.store = store
    yield SyncModel
    del SyncModel.store


@pytest.mark.spec("RFC 6578 §3.6")
def test_every_client_always_ends_equal_to_the_server(model: type[SyncModel]) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        model,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
