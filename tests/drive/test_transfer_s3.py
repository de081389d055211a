"""Uploads to S3 share a bounded memory: nobody starves behind clients that send slowly or not at all."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from conformance.servers import S3
from ksync_server import settings
from ksync_server.drive import transfer
from ksync_server.errors import ClientGone, Unavailable
from ksync_server.store import tables as t
from ksync_server.store.blobs import Blobs
from ksync_server.store.s3 import S3Extents
from tests.drive.harness import GONE, Client, Drive, closing

KIB = 1024
EXTENT = 64 * KIB
PIECE = 16 * KIB


@pytest.fixture
def store(drive: Drive, s3_server: S3, tmp_path: Path) -> S3Extents:
    given = s3_server.settings(s3_server.create(), tmp_path)
    path = Path(given.pop("credentials_file"))
    sizes: dict[str, Any] = {"extent_bytes": EXTENT, "memory_bytes": 2 * EXTENT, "patience_s": 2.0}
    return S3Extents(settings.S3(**given, credentials_file=path, **sizes))


@pytest.fixture
def client(drive: Drive, store: S3Extents) -> Iterator[Client]:
    blobs = Blobs(msgspec.structs.replace(drive.settings.blobs, inline_bytes=100), drive.database, store)
    with closing(Client(replace(drive, blobs=blobs), chunk_bytes=PIECE)) as made:
        yield made
    blobs.close()
    assert store.memory.held == store.memory.leaving == 0


def body(content: bytes, *last: object) -> list[object]:
    return [*(content[at : at + PIECE] for at in range(0, len(content), PIECE)), *last]


def keys(store: S3Extents) -> list[str]:
    return [each.key for each in store.list_stored()]


def test_an_upload_passes_by_clients_that_hold_all_memory_and_say_nothing(
    client: Client, store: S3Extents
) -> None:
    contents = [os.urandom(40 * KIB) for _ in range(6)]
    passing = os.urandom(500 * KIB)
    most: list[int] = []

    async def run() -> None:
        go, all_arrived = asyncio.Event(), asyncio.Event()
        arrived = [0] * len(contents)

        def waiting(number: int) -> Callable[[], Awaitable[bytes]]:
            async def wait() -> bytes:
                arrived[number] = 1
                if all(arrived):
                    all_arrived.set()
                await go.wait()
                return b"end"

            return wait

        silent = [
            asyncio.create_task(
                client.answer(
                    client.request("PUT", f"/{number}", {}, body(content, waiting(number)), length=None)
                )
            )
            for number, content in enumerate(contents)
        ]
        await asyncio.wait_for(all_arrived.wait(), 60)
        most.append(store.memory.held)
        made = await client.answer(client.request("PUT", "/passing", {}, body(passing), length=len(passing)))
        most.append(store.memory.held)
        assert made.status == 201
        assert not any(task.done() for task in silent)
        go.set()
        assert [(await task).status for task in silent] == [201] * len(silent)

    asyncio.run(run())
    assert max(most) <= store.memory.most + 4 * PIECE
    assert client.send("GET", "/passing").body == passing
    for number, content in enumerate(contents):
        assert client.send("GET", f"/{number}").body == content + b"end"


def test_a_store_that_takes_nothing_means_try_again_and_leaves_nothing(
    client: Client, store: S3Extents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_ROOM_S", 0.2)
    stuck = threading.Event()
    put = store.put

    def slow(key: str, content: Any) -> None:
        stuck.wait(30)
        put(key, content)

    room, refused = store.memory.room, asyncio.Event()

    async def counted(wait_s: float) -> bool:
        there = await room(wait_s)
        if not there:
            refused.set()
        return there

    monkeypatch.setattr(store, "put", slow)
    monkeypatch.setattr(store.memory, "room", counted)
    content = os.urandom(300 * KIB)

    async def run() -> list[Any]:
        tasks = [
            asyncio.create_task(
                client.answer(client.request("PUT", f"/{n}", {}, body(content), length=len(content)))
            )
            for n in range(4)
        ]
        await asyncio.wait_for(refused.wait(), 60)
        stuck.set()  # an upload that gives up waits for its objects on their way before it erases them
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(run())
    unavailable = [each for each in answers if isinstance(each, Unavailable)]
    assert unavailable
    assert all((b"retry-after", b"10") in each.headers for each in unavailable)
    assert all(isinstance(each, Unavailable) or each.status == 201 for each in answers)
    made = [number for number, each in enumerate(answers) if not isinstance(each, Unavailable)]
    for number in range(4):
        assert client.send("GET", f"/{number}").status == (200 if number in made else 404)
    with client.drive.database.read() as tx:
        named = tx.execute(sa.select(t.extent.c.key).order_by(t.extent.c.key)).scalars().all()
        assert tx.execute(sa.select(sa.func.count()).select_from(t.stage)).scalar_one() == 0
    assert keys(store) == list(named)


@pytest.mark.parametrize("cut", [PIECE, 3 * EXTENT, 3 * EXTENT + 7])
def test_a_cut_upload_gives_its_memory_and_its_objects_back(
    client: Client, store: S3Extents, cut: int
) -> None:
    client.put("/old", b"before")
    for path in ("/old", "/new"):
        request = client.request("PUT", path, {}, body(os.urandom(cut), GONE), length=None)
        with pytest.raises(ClientGone):
            asyncio.run(client.answer(request))
        assert store.memory.held == 0
    assert client.send("GET", "/old").body == b"before"
    assert keys(store) == []


def test_a_cancelled_upload_gives_back_everything_while_its_objects_are_on_their_way(
    client: Client, store: S3Extents, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go = threading.Event(), threading.Event()
    put = store.put

    def slow(key: str, content: Any) -> None:
        began.set()
        go.wait(30)
        put(key, content)

    monkeypatch.setattr(store, "put", slow)

    async def run() -> None:
        content = os.urandom(300 * KIB)
        task = asyncio.create_task(
            client.answer(client.request("PUT", "/new", {}, body(content), length=len(content)))
        )
        await asyncio.to_thread(began.wait, 30)
        task.cancel()
        await asyncio.wait([task], timeout=0.01)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert store.memory.held == store.memory.leaving == 0
    assert keys(store) == []
    assert client.send("GET", "/new").status == 404
