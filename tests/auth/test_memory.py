"""The shared memory of good passwords: what is kept is found, by other processes too, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksync_server.auth.memory import Memory


def tags(memory: Memory, count: int, start: int = 0) -> list[bytes]:
    return [memory.tag(number.to_bytes(8)) for number in range(start, start + count)]


def test_what_is_kept_is_found_and_nothing_else() -> None:
    memory = Memory(1000)
    kept, others = tags(memory, 2000), tags(memory, 2000, 10_000)
    for tag in kept:
        memory.keep(tag, 60)
    assert all(memory.knows(tag, 60) for tag in kept)
    assert not any(memory.knows(tag, 60) for tag in others)


def test_a_table_for_100_000_accounts_holds_both_tags_of_each() -> None:
    memory = Memory(100_000)
    every = tags(memory, 200_000)
    for tag in every:
        memory.keep(tag, 86_400)
    assert sum(memory.knows(tag, 86_400) for tag in every) == len(every)
    assert memory.slots * 24 < 14_000_000, "bytes"


def test_parts_are_not_run_together_and_keys_differ() -> None:
    memory, other = Memory(1), Memory(1)
    assert memory.tag(b"ab", b"c") != memory.tag(b"a", b"bc")
    assert memory.tag(b"ab") != other.tag(b"ab")


def test_time_ends_a_slot_and_a_look_renews_it(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, now = Memory(10), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    (tag,) = tags(memory, 1)
    memory.keep(tag, 100)
    now[0] += 99
    assert memory.knows(tag, 100)
    now[0] += 99
    assert memory.knows(tag, 100), "sliding"
    now[0] += 101
    assert not memory.knows(tag, 100)
    assert not memory.knows(tag, 100), "a look at what has ended does not revive it"


def test_a_full_table_forgets_what_would_end_first(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, now = Memory(1), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    every = tags(memory, 10 * memory.slots)
    for tag in every:
        now[0] += 1
        memory.keep(tag, 86_400)
        assert memory.knows(tag, 86_400)
    found = [number for number, tag in enumerate(every) if memory.knows(tag, 86_400)]
    assert 0 < len(found) <= memory.slots
    assert found[0] > 5 * memory.slots


@pytest.mark.parametrize("keep_s", [0.0, -1.0, 0.5])
def test_no_time_is_no_memory(keep_s: float) -> None:
    memory = Memory(10)
    (tag,) = tags(memory, 1)
    memory.keep(tag, keep_s)
    assert not memory.knows(tag, keep_s)


def test_no_accounts_is_no_memory() -> None:
    memory = Memory(0)
    (tag,) = tags(memory, 1)
    memory.keep(tag, 60)
    assert not memory.knows(tag, 60)


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=384, max_size=384))
def test_whatever_stands_in_the_slots_vouches_for_nothing(garbage: bytes) -> None:
    """What two writers at once may leave: any mixture of bytes."""
    memory = Memory(1)
    assert len(memory._map) == len(garbage)
    memory._map[:] = garbage
    assert not any(memory.knows(tag, 60) for tag in tags(memory, 50))
    (tag,) = tags(memory, 1)
    memory.keep(tag, 60)
    assert memory.knows(tag, 60)


def test_a_hash_that_is_not_at_the_start_of_a_slot_is_none() -> None:
    memory = Memory(1)
    (tag,) = tags(memory, 1)
    memory._map[:] = (b"\xff" * 4 + tag[:20]) * 16
    assert not memory.knows(tag, 60)


def test_many_writers_at_once_lose_little_and_invent_nothing() -> None:
    memory = Memory(500)
    mine = [tags(memory, 250, 1000 * number) for number in range(4)]

    def write(own: list[bytes]) -> None:
        for _ in range(5):
            for tag in own:
                memory.keep(tag, 60)

    threads = [threading.Thread(target=write, args=(own,)) for own in mine]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sum(memory.knows(tag, 60) for own in mine for tag in own)
    assert found >= 990
    assert not any(memory.knows(tag, 60) for tag in tags(memory, 1000, 100_000))


FORKS = """
import os, sys
from ksync_server.auth.memory import Memory
memory = Memory(1000)
def worker(start):
    for number in range(start, start + 100):
        memory.keep(memory.tag(number.to_bytes(8)), 60)
    os._exit(0)
for start in (0, 1000):
    if os.fork() == 0:
        worker(start)
for _ in range(2):
    os.wait()
found = [n for n in range(2000) if memory.knows(memory.tag(n.to_bytes(8)), 60)]
print(set(found) <= {*range(100), *range(1000, 1100)}, len(found) >= 190)  # two that meet in a slot lose one
"""


def test_processes_that_were_forked_later_share_it_beyond_their_end() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_it_holds_no_password_and_no_key() -> None:
    memory = Memory(10)
    memory.keep(memory.tag(b"a long enough pass phrase"), 60)
    seen = bytes(memory._map[:])
    assert b"pass phrase" not in seen
    assert memory._key not in seen
