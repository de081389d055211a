"""Sync positions: whatever the limits, a client ends equal to the collection."""

from __future__ import annotations

import time

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksync_server.errors import Forbidden
from ksync_server.store import blobs, changes
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Write

_NEW = sa.insert(t.collection).returning(t.collection.c.id)
_OBJECTS = sa.select(t.object_.c.name, t.object_.c.seq).where(
    t.object_.c.collection_id == sa.bindparam("id_")
)
NAMES = ["a", "b", "c", "d", "e"]


def put(tx: Write, collection: int, name: str) -> None:
    seq = changes.bump(tx, collection)
    where = (t.object_.c.collection_id == collection) & (t.object_.c.name == name)
    tx.execute(
        sa.delete(t.tombstone).where(t.tombstone.c.collection_id == collection, t.tombstone.c.name == name)
    )
    if tx.execute(sa.update(t.object_).where(where).values(seq=seq)).rowcount == 0:
        row = {
            "collection_id": collection,
            "name": name,
            "uid": name,
            "component": "VEVENT",
            "seq": seq,
            "modified_at": 0,
            "created_at": 0,
            "size": 1,
            "content_type": "text/calendar",
            "blob_id": blobs.publish(tx, blobs.staged_bytes(b"x")),
        }
        tx.execute(sa.insert(t.object_), row)


def delete(tx: Write, collection: int, name: str) -> None:
    where = (t.object_.c.collection_id == collection) & (t.object_.c.name == name)
    seq = changes.bump(tx, collection)
    if tx.execute(sa.delete(t.object_).where(where)).rowcount:
        row = {"collection_id": collection, "name": name, "seq": seq, "at": int(time.time())}
        tx.execute(sa.insert(t.tombstone), row)


def prune(tx: Write, collection: int) -> None:
    seq = tx.execute(sa.select(t.collection.c.seq).where(t.collection.c.id == collection)).scalar_one()
    tx.execute(sa.delete(t.tombstone).where(t.tombstone.c.collection_id == collection))
    tx.execute(sa.update(t.collection).where(t.collection.c.id == collection).values(pruned_seq=seq))


class Client:
    """What a phone knows: names with the number they had when it was told, and its token."""

    def __init__(self, database: Database, collection: int) -> None:
        self.database = database
        self.collection = collection
        self.names: dict[str, int] = {}
        self.token = ""

    def page(self, limit: int) -> bool:
        with self.database.read() as tx:
            try:
                start = changes.position(tx, self.collection, self.token)
            except Forbidden as error:
                if error.precondition != "{DAV:}valid-sync-token":
                    raise
                self.token, self.names = "", {}
                return True
            page = changes.since(tx, self.collection, start, limit)
            rows = dict(tx.fast(_OBJECTS, {"id_": self.collection}))
        assert len(page.changed) + len(page.deleted) <= limit
        for name in page.deleted:
            self.names.pop(name, None)
        for name in page.changed:
            self.names[name] = rows[name]
        self.token = changes.sync_token(self.database.generation, self.collection, page.position)
        return page.truncated

    def finish(self, limit: int) -> None:
        for _ in range(100):
            if not self.page(limit):
                return
        raise AssertionError("a sync that never ends")


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(NAMES)),
        st.tuples(st.just("delete"), st.sampled_from(NAMES)),
        st.tuples(st.just("page"), st.integers(0, 1)),
        st.tuples(st.just("prune"), st.just("")),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps, limit=st.integers(1, 3))
@pytest.mark.spec("RFC 6578 §3.6")
def test_every_client_ends_equal_to_the_collection(
    database: Database, steps: list[tuple[str, object]], limit: int
) -> None:
    collection = database.write(
        lambda tx: tx.execute(_NEW, {"kind": "calendar", "name": "x", "created_at": 0}).scalar_one()
    )
    clients = [Client(database, collection), Client(database, collection)]
    for step, argument in steps:
        if step == "put":
            database.write(lambda tx, name=str(argument): put(tx, collection, name))  # type: ignore[misc]
        elif step == "delete":
            database.write(lambda tx, name=str(argument): delete(tx, collection, name))  # type: ignore[misc]
        elif step == "prune":
            database.write(lambda tx: prune(tx, collection))
        else:
            assert isinstance(argument, int)
            clients[argument].page(limit)
    truth = dict(database.fast(_OBJECTS, {"id_": collection}))
    for client in clients:
        client.finish(limit)
        assert client.names == truth


@pytest.mark.spec("RFC 6578 §3.2")
@pytest.mark.parametrize(
    "token",
    [
        "x",
        "urn:ksync:zz:1:0",
        "urn:ksync:{g}:{c}:999",
        "urn:ksync:{g}:999:0",
        "urn:ksync:{g}:{c}:-1",
        "urn:ksync:{g}:{c}:0:99",
        "urn:ksync:{g}:{c}:0 ",
        "urn:ksync:{g}:{c}:" + "9" * 40,
    ],
)
def test_a_foreign_or_future_token_is_refused(database: Database, token: str) -> None:
    collection = database.write(
        lambda tx: tx.execute(_NEW, {"kind": "calendar", "name": "x", "created_at": 0}).scalar_one()
    )
    text = token.format(g=database.generation, c=collection)
    with database.read() as tx, pytest.raises(Forbidden) as caught:
        changes.position(tx, collection, text)
    assert caught.value.precondition == "{DAV:}valid-sync-token"
