"""Throttling: guesses are refused without a look, and nobody is locked out by others (APP8)."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa

from ksync_server.auth import accounts, directory, throttle
from ksync_server.auth.gate import Credentials, Service
from ksync_server.auth.memory import Memory
from ksync_server.auth.throttle import Count, Good, Standing, added, improved
from ksync_server.errors import AppPasswordRequired, NotAuthenticated, TooManyRequests, Unavailable
from ksync_server.http import Peer
from ksync_server.settings import Auth
from ksync_server.store import tables as t
from ksync_server.store.database import Database
from tests.auth.harness import PASSWORD, PEER, Door

spec = pytest.mark.spec
HOME, OFFICE = "192.0.2.7", "198.51.100.1"
AUTH = Auth()


@pytest.fixture
def hour(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock: seconds that are added to it."""
    real, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    return shift


def guess(door: Door, name: str, secret: str, address: str = HOME) -> str:
    """What a try gets: in, 401 or 429."""
    try:
        door.log_in(name, secret, address=address)
    except NotAuthenticated:
        return "401"
    except TooManyRequests as error:
        ((header, seconds),) = error.headers
        assert header == b"retry-after"
        assert 0 < int(seconds) <= 86_400
        return "429"
    return "in"


def guesses(door: Door, name: str, count: int, address: str = HOME, start: int = 0) -> list[str]:
    return [guess(door, name, f"wrong {number}", address) for number in range(start, start + count)]


def rows(door: Door) -> list[dict[str, Any]]:
    door.gate.flush()
    with door.database.read() as tx:
        return [dict(row._mapping) for row in tx.execute(sa.select(t.throttle))]


class Hashes:
    """Counts argon2 runs of a door."""

    def __init__(self, door: Door) -> None:
        self.count = 0
        real = door.gate.passwords._hasher

        class Counting:
            def verify(_, stored: str, password: bytes) -> bool:
                self.count += 1
                return real.verify(stored, password)

            def __getattr__(_, name: str) -> Any:
                return getattr(real, name)

        door.gate.passwords._hasher = Counting()  # type: ignore[assignment]


# -- the limits ------------------------------------------------------------------------------------


@spec("OWASP ASVS 5.0 §6.3.1")
@pytest.mark.parametrize("name", ["alice@example.org", "nobody@example.org", "ZZ99999", ""])
def test_a_sixth_wrong_secret_for_one_name_from_one_network_is_not_verified(door: Door, name: str) -> None:
    door.account()
    hashes = Hashes(door)
    assert guesses(door, name, 8) == ["401"] * 5 + ["429"] * 3
    assert hashes.count == 5
    assert guess(door, name, PASSWORD) == "429", "not even the right one"
    assert hashes.count == 5


def test_a_name_is_one_name_however_it_is_written(sqlite_door: Door) -> None:
    account = sqlite_door.account(sync_id="AB12345")
    written = ["ab12345", "AB12345", " Ab12345 ", "AB12345@sync.example.org", "ab12345@DAV.example.org"]
    for number, name in enumerate(written):
        assert guess(sqlite_door, name, f"wrong {number}") == "401"
    assert guess(sqlite_door, account.sync_id, "one more") == "429"


def test_many_names_from_one_network_are_throttled(door: Door) -> None:
    found = [guess(door, f"person{number}@example.org", "guess") for number in range(12)]
    assert found == ["401"] * 10 + ["429"] * 2
    assert guess(door, "person0@example.org", "guess", OFFICE) == "401"


def test_one_name_from_many_networks_is_throttled(door: Door) -> None:
    door.account()
    found = [guess(door, "alice@example.org", f"wrong {n}", f"198.51.100.{n}") for n in range(22)]
    assert found == ["401"] * 20 + ["429"] * 2


def test_an_ipv6_network_is_a_64_and_ipv4_may_wear_ipv6_clothes(sqlite_door: Door) -> None:
    found = [guess(sqlite_door, "nobody", f"wrong {n}", f"2001:db8::{n:x}") for n in range(6)]
    assert found == ["401"] * 5 + ["429"]
    assert guess(sqlite_door, "nobody", "wrong", "2001:db8:0:1::1") == "401"
    found = [guess(sqlite_door, "other", f"wrong {n}", ("::ffff:" if n % 2 else "") + HOME) for n in range(6)]
    assert found == ["401"] * 5 + ["429"]
    assert throttle.network("2001:db8::1") == "2001:db8::/64"
    assert throttle.network("no address") == ""


def test_a_shared_network_is_not_blocked_as_a_whole(door: Door) -> None:
    found = [guess(door, f"person{number}", "guess", "127.0.0.1") for number in range(15)]
    assert found == ["401"] * 15
    assert guesses(door, "alice", 6, "127.0.0.1") == ["401"] * 5 + ["429"]


def test_limits_can_be_switched_off(sqlite_door: Door) -> None:
    limits = ("throttle_place_failures", "throttle_name_failures", "throttle_network_failures")
    door = sqlite_door.another_process(**dict.fromkeys(limits, 0))
    assert guesses(door, "nobody", 30) == ["401"] * 30
    assert rows(door) == []


# -- time ------------------------------------------------------------------------------------------


def test_each_block_is_four_times_longer_up_to_a_day(door: Door, hour: list[float]) -> None:
    start = 0
    for length in (900, 3600, 14_400, 57_600, 86_400, 86_400):
        assert guesses(door, "nobody", 6, start=start) == ["401"] * 5 + ["429"]
        start += 6
        door.gate.flush()
        hour[0] += length - 5
        assert guess(door, "nobody", "again") == "429", length
        door.gate.flush()
        hour[0] += 10


def test_failures_of_another_time_are_forgotten(door: Door, hour: list[float]) -> None:
    assert guesses(door, "nobody", 4) == ["401"] * 4
    door.gate.flush()
    hour[0] += 901
    assert guesses(door, "nobody", 6, start=4) == ["401"] * 5 + ["429"]


def test_a_clock_that_is_set_back_makes_no_block_longer_and_one_that_goes_ahead_ends_it(
    door: Door, hour: list[float]
) -> None:
    assert guesses(door, "nobody", 6) == ["401"] * 5 + ["429"]
    door.gate.flush()
    hour[0] = -1800
    assert guess(door, "nobody", "again") == "429", "nodes may differ by some minutes"
    door.gate.flush()
    hour[0] = -86_400
    assert guesses(door, "nobody", 6, start=10) == ["401"] * 5 + ["429"]
    door.gate.flush()
    hour[0] = -86_400 + 3500
    assert guess(door, "nobody", "once more") == "429", "its second block is four times longer all the same"
    door.gate.flush()
    hour[0] = 86_400
    assert guesses(door, "nobody", 6, start=20) == ["401"] * 5 + ["429"]


def test_failures_of_a_future_that_was_none_do_not_count(door: Door, hour: list[float]) -> None:
    hour[0] = 86_400
    assert guesses(door, "nobody", 4) == ["401"] * 4
    door.gate.flush()
    hour[0] = 0
    assert guesses(door, "nobody", 6, start=4) == ["401"] * 5 + ["429"]


def test_a_right_log_in_ends_the_count(door: Door) -> None:
    door.account()
    for _ in range(3):
        start = len(rows(door)) * 100
        assert guesses(door, "alice@example.org", 4, start=start) == ["401"] * 4
        assert guess(door, "alice@example.org", PASSWORD) == "in"
        door.write(lambda tx: accounts.raise_epoch(tx, 1))


def test_rows_that_say_nothing_are_erased(door: Door, hour: list[float]) -> None:
    door.account()
    guesses(door, "nobody", 6)
    guess(door, "alice@example.org", PASSWORD, OFFICE)
    assert len(rows(door)) == 4
    throttle.prune(door.database, int(time.time()))
    assert len(rows(door)) == 4
    hour[0] += 2 * 86_400 + 1_000
    throttle.prune(door.database, int(time.time()))
    (trusted,) = rows(door)
    assert trusted["trusted_until"] > time.time()
    hour[0] += 30 * 86_400
    throttle.prune(door.database, int(time.time()))
    assert rows(door) == []


# -- what never locks anybody out ------------------------------------------------------------------


def test_one_wrong_secret_for_ever_counts_once_and_changes_nothing(door: Door, hour: list[float]) -> None:
    door.account()
    for _ in range(50):
        assert guess(door, "alice@example.org", "the password of last year") == "401"
    before = rows(door)
    assert [row["failures"] for row in before] == [1, 1, 1]
    hour[0] += 3600
    for _ in range(50):
        assert guess(door, "alice@example.org", "the password of last year") == "401"
    assert rows(door) == before
    assert guess(door, "alice@example.org", PASSWORD) == "in"


def test_a_revoked_application_password_counts_for_nothing(door: Door) -> None:
    account = door.account()
    secrets = [door.app_password(account)[1] for _ in range(30)]
    door.write(lambda tx: tx.execute(sa.update(t.app_password).values(revoked_at=1)))
    assert [guess(door, account.sync_id, secret) for secret in secrets] == ["401"] * 30
    assert rows(door) == []
    assert guess(door, account.sync_id, PASSWORD) == "in"


def test_an_application_password_is_never_throttled(door: Door) -> None:
    account = door.account()
    _, app = door.app_password(account)
    assert guesses(door, account.sync_id, 6)[-1] == "429"
    assert guess(door, account.sync_id, app) == "in"
    assert guess(door, account.sync_id, app[:-1] + ("0" if app[-1] != "0" else "1")) == "401"


@spec("OWASP ASVS 5.0 §6.1.1")
def test_a_remembered_password_is_let_in_where_it_was_used_and_only_there(door: Door) -> None:
    account = door.account()
    assert guess(door, account.sync_id, PASSWORD) == "in"
    door.gate.flush()  # the place is known: requests do not wait for that
    hashes = Hashes(door)
    for n in range(1, 25):
        guess(door, account.sync_id, f"wrong {n}", f"198.51.100.{n}")
    tried = hashes.count
    assert guess(door, account.sync_id, PASSWORD) == "in"
    assert guess(door, account.sync_id, PASSWORD, "203.0.113.9") == "429", "a guesser learns nothing"
    assert guesses(door, account.sync_id, 5) == ["401"] * 5, "a place of one's own has its own count"
    assert guess(door, account.sync_id, "wrong again") == "429"
    assert guess(door, account.sync_id, PASSWORD) == "in", "the place is blocked, its program is not"
    assert hashes.count == tried + 5


def test_a_network_that_logged_in_well_is_not_blocked_by_strangers(door: Door, hour: list[float]) -> None:
    account = door.account()
    assert guess(door, account.sync_id, PASSWORD) == "in"
    door.gate.flush()
    fresh = door.another_process()  # remembers nothing
    for n in range(1, 25):
        guess(fresh, account.sync_id, f"wrong {n}", f"198.51.100.{n}")
    assert guess(fresh, account.sync_id, PASSWORD, "203.0.113.9") == "429"
    assert guess(fresh, account.sync_id, PASSWORD) == "in"
    hour[0] += 31 * 86_400
    for n in range(1, 25):
        guess(fresh, account.sync_id, f"wrong now {n}", f"198.51.100.{n}")
    fresh.gate.flush()
    assert guess(door.another_process(), account.sync_id, PASSWORD) == "429", "too long ago"


def test_a_network_where_an_application_password_was_used_is_known_too(door: Door) -> None:
    account = door.account()
    _, app = door.app_password(account)
    assert guess(door, account.sync_id, app) == "in"
    door.gate.flush()
    for n in range(1, 25):
        guess(door, account.sync_id, f"wrong {n}", f"198.51.100.{n}")
    assert guess(door, account.sync_id, PASSWORD) == "in"


def test_the_use_of_an_application_password_gives_a_guesser_beside_it_no_more_tries(door: Door) -> None:
    account = door.account()
    _, app = door.app_password(account)
    assert guesses(door, account.sync_id, 6)[-1] == "429"
    assert guess(door, account.sync_id, app) == "in"
    door.gate.flush()
    assert guess(door, account.sync_id, "one more") == "429"


def test_the_memory_is_no_help_to_a_guesser_in_the_same_network(door: Door) -> None:
    """Who is blocked may be let in by the memory: only for so many tries, then that is closed too."""
    account = door.account()
    assert guess(door, account.sync_id, PASSWORD) == "in"
    limit = door.settings.auth.throttle_most
    assert guesses(door, account.sync_id, limit - 1)[-1] == "429"
    assert guess(door, account.sync_id, PASSWORD) == "in"
    assert guesses(door, account.sync_id, 2, start=1000)[-1] == "429"
    assert guess(door, account.sync_id, PASSWORD) == "429"
    assert guess(door, account.sync_id, PASSWORD, OFFICE) == "in"


def test_a_change_of_the_account_ends_what_was_remembered_while_blocked(door: Door) -> None:
    account = door.account()
    assert guess(door, account.sync_id, PASSWORD) == "in"
    assert guesses(door, account.sync_id, 6)[-1] == "429"
    door.turn_on_second_factor(account)
    assert guess(door, account.sync_id, PASSWORD) == "429"


# -- in the database -------------------------------------------------------------------------------


@spec("CVE-2021-41177")
def test_a_block_outlives_a_restart_and_holds_in_another_worker_and_on_another_node(door: Door) -> None:
    assert guesses(door, "nobody", 6)[-1] == "429"
    door.gate.close()
    for process in (door.another_process(), door.another_process()):
        hashes = Hashes(process)
        assert guess(process, "nobody", "another one") == "429"
        assert hashes.count == 0
    other = Database(door.settings.database, threads=1)
    try:
        node = replace(door, database=other).another_process()
        assert guess(node, "nobody", "another one") == "429"
        node.gate.close()
    finally:
        other.close()


@spec("CVE-2021-41177")
def test_two_workers_count_together(door: Door) -> None:
    workers = [door, door.another_process()]
    found = []
    for number in range(8):
        found.append(guess(workers[number % 2], "nobody", f"wrong {number}"))
        workers[number % 2].gate.flush()
    assert found == ["401"] * 5 + ["429"] * 3


def test_workers_that_write_at_once_lose_no_failure(door: Door) -> None:
    workers = [door.another_process() for _ in range(4)]
    for number, worker in enumerate(workers):
        guess(worker, "nobody", f"wrong {number}")
    threads = [threading.Thread(target=worker.gate.throttle.flush) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {row["failures"] for row in rows(door)} == {4}


def test_rows_hold_no_name_no_address_and_no_secret(door: Door) -> None:
    guess(door, "alice@example.org", "wrong secret")
    everything = repr(rows(door)).lower()
    for text in ("alice", HOME, "wrong", "secret"):
        assert text not in everything.replace("'seen'", "")


def test_nobody_waits_and_many_failures_are_one_transaction(sqlite_door: Door) -> None:
    """An attacker cannot force the disk: 40 failures in one second are one write."""
    door = sqlite_door.another_process(throttle_write_s=3600.0)
    door.gate.throttle._written_at = time.monotonic()
    writes: list[object] = []
    real = door.database.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Database, "write", lambda self, fn: (writes.append(fn), real(fn))[1])
        for number in range(40):
            guess(door, f"person{number % 10}", f"wrong {number}", f"198.51.100.{number}")
        assert writes == []
        door.gate.flush()
        assert len(writes) == 1
    assert len(rows(door)) == 40 + 10 + 40


def test_the_thread_writes_by_itself(sqlite_door: Door) -> None:
    door = sqlite_door.another_process(throttle_write_s=0.0)
    written = threading.Event()
    real = door.gate.throttle._write

    def write(*arguments: Any) -> None:
        real(*arguments)
        written.set()

    door.gate.throttle._write = write
    guess(door, "nobody", "wrong")
    assert written.wait(10)


def test_a_database_that_is_away_loses_no_count(sqlite_door: Door, caplog: pytest.LogCaptureFixture) -> None:
    door = sqlite_door.another_process(throttle_write_s=3600.0)
    door.gate.throttle._written_at = time.monotonic()
    guess(door, "nobody", "wrong")
    with pytest.MonkeyPatch.context() as patch:

        def away(self: Database, fn: object) -> None:
            raise sa.exc.OperationalError("", {}, OSError("away"))

        patch.setattr(Database, "write", away)
        door.gate.throttle.flush()
    assert "counts of wrong log-ins wait" in caplog.text
    assert {row["failures"] for row in rows(door)} == {1}


def test_what_waits_in_memory_is_bounded(sqlite_door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "_PENDING", 12)
    door = sqlite_door.another_process(throttle_write_s=3600.0)
    door.gate.throttle._written_at = time.monotonic()
    for number in range(50):
        guess(door, f"person{number}", "wrong", f"198.51.100.{number}")
    assert len(door.gate.throttle._waiting.failed) == 12


def test_a_row_is_bounded(door: Door) -> None:
    for round_ in range(4):
        guesses(door, "nobody", 100, start=round_ * 100)
        door.gate.flush()
    (biggest,) = {max(len(bytes(row["seen"])) for row in rows(door))}
    assert biggest <= 128 * 8
    assert len(rows(door)) == 3, "a blocked network makes no new rows"


def test_a_blocked_network_that_tries_many_names_makes_no_rows(door: Door) -> None:
    for number in range(10):
        guess(door, f"person{number}", "wrong")
    before = len(rows(door))
    assert {guess(door, f"other{number}", "wrong") for number in range(50)} == {"429"}
    assert len(rows(door)) == before


# -- many at once ----------------------------------------------------------------------------------


def test_guesses_at_once_gain_nothing(sqlite_door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a guess is being verified it counts: a burst gets no further than one after the other."""
    door = sqlite_door.another_process(argon2_parallel=64)
    hold, lock = threading.Event(), threading.Lock()
    verified: list[bytes] = []
    real = door.gate.passwords._hasher

    class Slow:
        def verify(self, stored: str, password: bytes) -> bool:
            with lock:
                verified.append(password)
            hold.wait(10)
            return real.verify(stored, password)

    failed = door.gate.throttle.failed

    def late(*arguments: Any) -> None:
        time.sleep(0.1)
        failed(*arguments)

    door.gate.passwords._hasher = Slow()  # type: ignore[assignment]
    monkeypatch.setattr(door.gate.throttle, "failed", late)
    threads = []
    for number in range(12):
        thread = threading.Thread(target=guess, args=(door, "nobody", f"wrong {number}"))
        thread.start()
        threads.append(thread)
        while thread.is_alive() and len(verified) < min(number + 1, 5):
            thread.join(0.005)
    hold.set()
    for number in range(12, 30):  # while the first ones come to their ends
        thread = threading.Thread(target=guess, args=(door, "nobody", f"wrong {number}"))
        thread.start()
        threads.append(thread)
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert len(verified) == 5


def test_guesses_that_begin_in_one_instant_gain_nothing(
    sqlite_door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them has counted yet when the counts are looked at."""
    door = sqlite_door.another_process(argon2_parallel=64)
    began, verified = threading.Barrier(20), []
    standing, verify = door.gate.throttle.standing, door.gate.passwords._hasher.verify

    def together(*arguments: Any) -> Standing:
        began.wait(20)
        return standing(*arguments)

    class Counted:
        def verify(self, stored: str, password: bytes) -> bool:
            verified.append(password)
            return verify(stored, password)

    monkeypatch.setattr(door.gate.throttle, "standing", together)
    monkeypatch.setattr(door.gate.passwords, "_hasher", Counted())
    threads = [
        threading.Thread(target=guess, args=(door, "nobody", f"wrong {number}")) for number in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(verified) == 5


def test_a_try_whose_read_fails_is_not_on_its_way_any_more(
    sqlite_door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = sqlite_door.another_process()

    def fails(*arguments: Any) -> Standing:
        raise Unavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(door.gate.throttle, "standing", fails)
        for number in range(20):
            with pytest.raises(Unavailable):
                guess(door, "nobody", f"wrong {number}")
    assert door.gate.throttle._flying == {}
    assert guesses(door, "nobody", 6) == ["401"] * 5 + ["429"]


@pytest.mark.parametrize("seed", range(6))
def test_a_storm_of_guesses_while_counts_are_written_is_not_one_too_many(
    sqlite_door: Door, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    door = sqlite_door.another_process(argon2_parallel=64, throttle_write_s=0.001)
    random, verified = Random(seed), []
    verify = door.gate.passwords._hasher.verify

    class Counted:
        def verify(self, stored: str, password: bytes) -> bool:
            verified.append(password)
            time.sleep(random.random() / 100)
            return verify(stored, password)

    monkeypatch.setattr(door.gate.passwords, "_hasher", Counted())
    found: list[str] = []
    over = threading.Event()

    def flush() -> None:
        while not over.is_set():
            door.gate.throttle.flush()

    def run(first: int) -> None:
        for number in range(first, first + 5):
            found.append(guess(door, "nobody", f"wrong {number}"))

    threads = [threading.Thread(target=run, args=(number * 100,)) for number in range(16)]
    writer = threading.Thread(target=flush)
    writer.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    writer.join()
    assert len(verified) <= 5, found
    assert door.gate.throttle._flying == {}


def test_good_programs_beside_a_stale_one_and_four_typing_mistakes_all_get_in(sqlite_door: Door) -> None:
    account = sqlite_door.account()
    door = sqlite_door.another_process(argon2_parallel=8)
    assert guess(door, account.sync_id, PASSWORD) == "in"
    assert guess(door, account.sync_id, "the old one") == "401"
    assert guesses(door, account.sync_id, 3) == ["401"] * 3
    found: dict[str, list[str]] = {"good": [], "stale": []}

    def run(kind: str, secret: str) -> None:
        for _ in range(20):  # as a request does: argon2 only where nothing else can tell
            credentials = Credentials(account.sync_id, secret)
            with contextlib.suppress(NotAuthenticated, TooManyRequests):
                if (
                    door.gate.recognise(credentials, replace(PEER, address=HOME), service=Service.SYNC)
                    is not None
                ):
                    found[kind].append("in")
                    continue
            found[kind].append(guess(door, account.sync_id, secret))

    threads = [threading.Thread(target=run, args=("good", PASSWORD)) for _ in range(6)]
    threads += [threading.Thread(target=run, args=("stale", "the old one")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found["good"]) == {"in"}
    assert set(found["stale"]) == {"401"}, found["stale"].count("429")
    assert guess(door, account.sync_id, "one more mistake") == "401"


def test_a_program_with_many_connections_is_not_its_own_attacker(sqlite_door: Door) -> None:
    account = sqlite_door.account()
    door = sqlite_door.another_process(argon2_parallel=8)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(guess(door, account.sync_id, PASSWORD)))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["in"] * 16
    assert {row["failures"] for row in rows(door)} <= {0}


# -- what is said ----------------------------------------------------------------------------------


def test_blocked_tries_get_one_answer_for_all(door: Door) -> None:
    account, other = door.account(), door.account("bob")
    door.account("carol", sync_id="CA00001", password_hash=None)
    door.turn_on_second_factor(other)
    seen = set()
    for name in (account.sync_id, other.sync_id, "CA00001", "nobody@example.org"):
        assert guesses(door, name, 6, f"198.51.100.{len(name)}{ord(name[0]) % 10}")[-1] == "429"
        address = f"198.51.100.{len(name)}{ord(name[0]) % 10}"
        with pytest.raises(TooManyRequests) as caught:
            door.log_in(name, PASSWORD, address=address)
        error = caught.value
        seen.add((error.status, error.text.replace("14", "15"), error.precondition))
    assert len(seen) == 1


def test_one_line_for_each_refusal_says_whether_it_was_a_guess(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    account = door.account()
    _, app = door.app_password(account)
    caplog.set_level(logging.WARNING, "ksync_server.auth.gate")
    guess(door, account.sync_id, "wrong")
    guess(door, account.sync_id, "wrong")
    guesses(door, account.sync_id, 5)
    guess(door, account.sync_id, app[::-1])
    door.write(lambda tx: tx.execute(sa.update(t.app_password).values(revoked_at=1)))
    guess(door, account.sync_id, app)
    door.turn_on_second_factor(account)
    guess(door, account.sync_id, PASSWORD, OFFICE)
    lines = [record.__dict__ for record in caplog.records if record.message == "log-in refused"]
    assert [(line["reason"], line["guess"]) for line in lines] == [
        ("wrong password", "yes"),
        ("wrong password", "no"),
        *[("wrong password", "yes")] * 4,
        ("too many wrong log-ins", "yes"),
        ("mistyped application password", "yes"),
        ("revoked application password", "no"),
        ("an application password is needed", "no"),
    ]
    assert {(line["login"], line["service"]) for line in lines} == {(account.sync_id, "drive")}
    assert {line["address"] for line in lines} == {HOME, OFFICE}


def test_the_right_password_while_2fa_is_on_counts_as_one_wrong_secret(door: Door) -> None:
    account = door.account()
    door.turn_on_second_factor(account)
    for _ in range(10):
        with pytest.raises(AppPasswordRequired):
            door.log_in(account.sync_id, PASSWORD)
    assert {row["failures"] for row in rows(door)} == {1}


# -- the pure part ---------------------------------------------------------------------------------


def test_a_count_adds_only_what_it_has_not_seen() -> None:
    marks = [number.to_bytes(8) for number in range(3)]
    count = added(Count("k"), [*marks, *marks], 5, AUTH, 1000)
    assert (count.failures, count.since, count.blocked_until) == (3, 1000, 0)
    assert added(count, marks, 5, AUTH, 5000) is count
    blocked = added(count, [number.to_bytes(8) for number in range(10, 13)], 5, AUTH, 1100)
    assert (blocked.failures, blocked.strikes, blocked.blocked_until) == (6, 1, 2000)
    again = added(blocked, [b"other..."], 5, AUTH, 1200)
    assert (again.failures, again.strikes, again.blocked_until) == (7, 1, 2000), "no longer for trying on"


def test_a_good_log_in_forgets_failures_and_remembers_wrong_secrets() -> None:
    blocked = Count("k", 5, 1000, 2, 4000, 0, 90_000, b"12345678")
    here = improved(blocked, Good(True, True), AUTH, 2000)
    assert (here.failures, here.strikes, here.blocked_until, here.seen) == (0, 0, 0, b"12345678")
    assert here.trusted_until == here.kept_until == 2000 + 2_592_000
    trusted = improved(blocked, Good(False, True), AUTH, 2000)
    assert (trusted.failures, trusted.blocked_until) == (5, 4000)


def test_shared_memory_and_throttling_know_the_same_network(sqlite_door: Door) -> None:
    """A phone that gets another address of its own IPv6 network is where it was."""
    memory = Memory(100)
    door = sqlite_door.another_process(memory)
    account = door.account()
    assert guess(door, account.sync_id, PASSWORD, "2001:db8::1") == "in"
    assert guesses(door, account.sync_id, 6, "2001:db8::2")[-1] == "429"
    assert guess(door, account.sync_id, PASSWORD, "2001:db8::3") == "in"
    assert guess(door, account.sync_id, PASSWORD, "2001:db8:0:1::3") == "in", "not blocked there"


def test_no_peer_address_is_one_network(sqlite_door: Door) -> None:
    credentials = Credentials("nobody", "wrong")
    peer = Peer("", True, PEER.user_agent)
    with pytest.raises(NotAuthenticated):
        sqlite_door.gate.identify(credentials, peer, service=Service.SYNC)
    assert guesses(sqlite_door, "nobody", 5, "")[-1] == "429"


# -- operators ------------------------------------------------------------------------------------


def listed(door: Door, *addresses: str) -> list[tuple[str | None, str | None]]:
    """Account and network of what is blocked."""
    door.gate.flush()
    with door.database.read() as tx:
        found = throttle.blocks(tx, door.gate.throttle, int(time.time()), addresses)
    return sorted(((each.account, each.network) for each in found), key=str)


def lift(door: Door, **which: Any) -> int:
    found = door.write(
        lambda tx: throttle.lift(tx, door.gate.throttle, door.settings.auth, int(time.time()), **which)
    )
    return len(found)


def test_blocks_are_named_where_they_are_asked_for(door: Door) -> None:
    alice = door.account()
    assert listed(door, HOME) == []
    guesses(door, alice.sync_id, 5)
    guesses(door, "alice@example.org", 5, OFFICE)
    guesses(door, "nobody@example.org", 5, "2001:db8::1")
    place = alice.sync_id
    assert listed(door) == [(None, None)] * 3, "places are hashes of a name and a network"
    assert listed(door, HOME) == sorted([(place, HOME), (None, None), (None, None)], key=str)
    assert listed(door, HOME, OFFICE) == sorted([(place, HOME), (place, OFFICE), (None, None)], key=str)
    for number in range(5):
        guesses(door, alice.login_email, 4, f"203.0.113.{number}", 10 * number)
    assert (place, None) in listed(door), "its name, from anywhere"
    guesses(door, "x@example.org", 4, "2001:db8::1")
    guesses(door, "y@example.org", 4, "2001:db8::2")
    assert (None, "2001:db8::/64") in listed(door, "2001:db8::abcd")


def test_a_lifted_block_lets_in_again_and_what_else_is_blocked_stays(door: Door) -> None:
    alice = door.account()
    for name, address in ((alice.sync_id, HOME), (alice.sync_id, OFFICE), ("nobody", HOME)):
        assert guesses(door, name, 6, address)[-1] == "429"
    door.gate.flush()
    assert lift(door, account=alice.sync_id, address=HOME) == 2, "alice there, and the network"
    assert guess(door, alice.sync_id, PASSWORD) == "in"
    assert guess(door, alice.sync_id, PASSWORD, OFFICE) == "429"
    assert guess(door, "nobody", "wrong") == "429"
    assert lift(door, account=alice.sync_id, address=HOME) == 0
    assert lift(door) == 2
    assert listed(door) == []
    assert guess(door.another_process(), alice.sync_id, "another wrong one", OFFICE) == "401"


def test_the_count_of_a_name_and_of_a_network_are_lifted_alone(door: Door) -> None:
    alice = door.account()
    for number in range(5):
        guesses(door, alice.login_email, 4, f"203.0.113.{number}", 10 * number)
    guesses(door, "x@example.org", 4, HOME)
    guesses(door, "y@example.org", 4, HOME)
    guesses(door, "z@example.org", 4, HOME)
    assert listed(door, HOME) == sorted([(alice.sync_id, None), (None, HOME)], key=str)
    assert guess(door, alice.login_email, PASSWORD, OFFICE) == "429"
    assert lift(door, account=alice.sync_id) == 1
    assert guess(door, alice.login_email, PASSWORD, OFFICE) == "in"
    assert listed(door, HOME) == [(None, HOME)]
    assert lift(door, address=OFFICE) == 0
    assert lift(door, address=HOME) == 1
    assert guess(door, alice.sync_id, PASSWORD) == "in"


def test_a_lift_is_by_key_and_in_the_audit_and_forgets_no_secret_seen(door: Door) -> None:
    guesses(door, "nobody", 5)
    guesses(door, "nobody", 5, OFFICE)
    door.gate.flush()
    with door.database.read() as tx:
        first, second = throttle.blocks(tx, door.gate.throttle, int(time.time()))
    before = {row["key"]: row["seen"] for row in rows(door)}
    assert lift(door, key=first.key) == 1
    assert lift(door, key="no such key") == 0
    found = {row["key"]: row for row in rows(door)}
    assert found[first.key]["blocked_until"] == found[first.key]["failures"] == 0
    assert found[second.key]["blocked_until"] == second.ends_at
    assert {key: row["seen"] for key, row in found.items()} == before
    with door.database.read() as tx:
        (row,) = directory.audit(tx, actions=["throttle."])
    assert (row["actor"], row["subject"], row["detail"]["keys"]) == ("operator", first.key, [first.key])
