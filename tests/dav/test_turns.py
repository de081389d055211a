"""Fairness: one account's reports leave threads to the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from ksync_server.dav.turns import Turns
from tests.dav.harness import Client, Store, event

WAIT_S = 30.0


def test_one_account_cannot_hold_every_thread(store: Store) -> None:
    database = store.database
    turns = Turns(database, 2)
    leave, holding = threading.Event(), threading.Semaphore(0)

    def hold() -> bool:
        holding.release()
        return leave.wait(WAIT_S)

    async def run() -> None:
        greedy = [asyncio.create_task(turns.of(1).pooled(hold)) for _ in range(20)]
        await asyncio.sleep(0)
        for _ in range(2):
            assert await asyncio.to_thread(holding.acquire, timeout=WAIT_S)
        try:
            assert await asyncio.wait_for(turns.of(2).pooled(lambda: "through"), WAIT_S / 2) == "through"
            assert await asyncio.wait_for(turns.of(3).reading(lambda tx: tx.generation), WAIT_S / 2)
            assert not holding.acquire(blocking=False), "a third step of the first account ran"
        finally:
            leave.set()
        assert all(await asyncio.gather(*greedy))
        assert not turns._places, "nothing is kept of those who wait no more"

    asyncio.run(run())


def test_a_step_that_fails_or_is_given_up_leaves_its_place(store: Store) -> None:
    turns = Turns(store.database, 1)
    leave = threading.Event()

    def fail() -> None:
        raise ValueError("of the step")

    async def run() -> None:
        pool = turns.of(1)
        with pytest.raises(ValueError, match="of the step"):
            await pool.pooled(fail)
        held = asyncio.create_task(pool.pooled(leave.wait, WAIT_S))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(pool.pooled(lambda: "never"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        leave.set()
        assert await held
        assert await asyncio.wait_for(pool.pooled(lambda: "again"), WAIT_S) == "again"
        assert not turns._places

    asyncio.run(run())


def test_reports_that_take_long_wait_for_their_turn(
    make_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client()
    path = client.make()
    client.put(path + "a.ics", event("a", "RRULE:FREQ=WEEKLY"))
    asked: list[int] = []
    turn = Turns.turn

    def counted(turns: Turns, account_id: int) -> object:
        asked.append(account_id)
        return turn(turns, account_id)

    monkeypatch.setattr(Turns, "turn", counted)
    span = 'start="20260501T000000Z" end="20260601T000000Z"'
    expand = f"<c:calendar-data><c:expand {span}/></c:calendar-data>"
    filter_ = '<c:filter><c:comp-filter name="VCALENDAR"/></c:filter>'
    for name, inner in (
        ("c:calendar-query", f"<d:prop>{expand}</d:prop>{filter_}"),
        ("c:calendar-multiget", f"<d:prop>{expand}</d:prop><d:href>{path}a.ics</d:href>"),
        ("c:free-busy-query", f"<c:time-range {span}/>"),
    ):
        asked.clear()
        assert client.report(path, name, inner, depth="1").status in (200, 207)
        assert set(asked) == {client.identity.account_id}, name
