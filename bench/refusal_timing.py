"""Can refusals of one shape of secret be told apart by their time? Every cause against every other.

Samples of all causes are taken in turn, in random order. For each pair the best single threshold is found on one half of the samples
and tried on the other, both ways round: guessing classifies 50 %. A pair over the bar is measured anew with three times the samples,
because among many pairs one is over it by chance; both figures are printed. In process (the door alone) and over a socket (a server).

Bar: no pair above 55 %. A mistyped application password is found without a look at the store and may differ; it is not in the list.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from bench.measure import Connection
from conformance.client import basic
from conformance.servers import demo
from ksync_server import log as logs
from ksync_server import settings as configuration
from ksync_server.auth import keys, offers, passwords
from ksync_server.auth.gate import Credentials, Gate, Service
from ksync_server.errors import NotAuthenticated, TooManyRequests
from ksync_server.store import tables as t
from ksync_server.store.database import Database
from tests.auth.harness import PASSWORD, PEER, Door

BAR = 0.55
Probes = dict[str, dict[str, tuple[str, str]]]  # shape -> cause -> name and secret
Take = Callable[[str, str], float]  # seconds that one refusal takes


def accuracy(a: list[float], b: list[float]) -> float:
    """How well a single threshold tells two samples apart: found on one half, tried on the other, both ways."""
    shares = []
    for own, other in ((0, 1), (1, 0)):
        threshold, first_is_low = _best(a[own::2], b[own::2])
        low, high = (a[other::2], b[other::2]) if first_is_low else (b[other::2], a[other::2])
        right = sum(x <= threshold for x in low) + sum(x > threshold for x in high)
        shares.append(right / (len(low) + len(high)))
    return statistics.mean(shares)


def _best(a: list[float], b: list[float]) -> tuple[float, bool]:
    """The threshold that classifies most, and whether what is below it is of the first sample."""
    a, b = sorted(a), sorted(b)
    best = (-1.0, 0.0, True)
    for threshold in (*a, *b):
        share = bisect_right(a, threshold) / len(a) - bisect_right(b, threshold) / len(b)
        best = max(best, (abs(share), threshold, share > 0))
    return best[1], best[2]


def make(door: Door) -> Probes:
    """Accounts and secrets for every cause."""
    first, two, suspended, without = (door.account(name) for name in ("first", "two", "suspended", "without"))
    secret = {name: door.app_password(first)[1] for name in ("revoked", "expired", "elsewhere")}
    others, of_suspended = door.app_password(two)[1], door.app_password(suspended)[1]
    c = t.app_password.c

    def of(shown: str) -> sa.Update:
        return sa.update(t.app_password).where(c.lookup == shown.replace("-", "")[:6])

    changes = [
        of(secret["revoked"]).values(revoked_at=1),
        of(secret["expired"]).values(expires_at=1),
        of(secret["elsewhere"]).values(addresses="198.51.100.0/24 2001:db8::/32"),
        sa.update(t.account).where(t.account.c.id == suspended.id).values(state="suspended"),
        sa.update(t.account).where(t.account.c.id == without.id).values(password_hash=None),
    ]
    door.turn_on_second_factor(two)
    door.write(lambda tx: [tx.execute(change) for change in changes])
    lookup = door.app_password(first)[1].replace("-", "")[:6]
    forged = lookup + passwords.new_app_password().secret[6:-3]
    return {
        "account password": {
            "unknown name": ("nobody1@example.org", PASSWORD),
            "wrong password": ("first@example.org", "a wrong enough pass phrase"),
            "2FA is on, right password": ("two@example.org", PASSWORD),
            "suspended, right password": ("suspended@example.org", PASSWORD),
            "no password set": ("without@example.org", PASSWORD),
        },
        "application password": {
            "unknown id": ("first@example.org", passwords.new_app_password().shown),
            "wrong secret": ("first@example.org", forged + passwords._check_letters(forged)),
            "revoked": ("first@example.org", secret["revoked"]),
            "expired": ("first@example.org", secret["expired"]),
            "wrong network": ("first@example.org", secret["elsewhere"]),
            "another account's": ("first@example.org", others),
            "suspended": ("suspended@example.org", of_suspended),
            "unknown name": ("nobody1@example.org", others),
        },
    }


def in_process(gate: Gate) -> Take:
    """The door as the edge calls it."""

    def take(name: str, secret: str) -> float:
        credentials = Credentials(name, secret)
        began = time.perf_counter()
        try:
            if gate.recognise(credentials, PEER, service=Service.DRIVE) is None:
                gate.identify(credentials, PEER, service=Service.DRIVE)
        except (NotAuthenticated, TooManyRequests) as error:
            spent = time.perf_counter() - began
            if error.status != 401:
                raise
            return spent
        raise AssertionError("let in")

    return take


def over_a_socket(url: str) -> Take:
    """A whole request on a kept-alive connection."""
    connection = Connection(url, "", "")
    requests: dict[tuple[str, str], bytes] = {}

    def take(name: str, secret: str) -> float:
        if (name, secret) not in requests:
            fields = {"Authorization": basic(name, secret), "Depth": "0"}
            requests[name, secret] = connection.prepare("PROPFIND", "/", headers=fields)
        request = requests[name, secret]
        began = time.perf_counter()
        status, _ = connection.send(request)
        spent = time.perf_counter() - began
        assert status == 401, status
        return spent

    return take


def sample(take: Take, probes: dict[str, tuple[str, str]], count: int) -> dict[str, list[float]]:
    """Times of each cause, all of them in each round, in another order each."""
    found: dict[str, list[float]] = {cause: [] for cause in probes}
    causes = list(probes)
    for turn in range(count + 3):
        random.shuffle(causes)
        for cause in causes:
            spent = take(*probes[cause])
            if turn >= 3:  # the first ones meet cold caches
                found[cause].append(spent)
    return found


def judge(title: str, take: Take, probes: dict[str, tuple[str, str]], count: int) -> bool:
    """Print each pair; whether all are within the bar."""
    found = sample(take, probes, count)
    print(f"\n{title}: {count} samples of each cause")
    for cause, times in found.items():
        print(f"  {cause:28} median {statistics.median(times) * 1000:9.3f} ms")
    held = True
    for one, two in itertools.combinations(probes, 2):
        share, again = accuracy(found[one], found[two]), ""
        if share > BAR:
            more = sample(take, {one: probes[one], two: probes[two]}, count * 3)
            again = f", {share:.1%} at first"
            share = accuracy(more[one], more[two])
        held &= share <= BAR
        print(f"  {'ok  ' if share <= BAR else 'MISS'} {share:6.1%}{again}  {one} / {two}")
    return held


@contextmanager
def _quiet_log() -> Iterator[None]:
    """The door's log as a server writes it, to nowhere."""
    with open(os.devnull, "w") as nowhere:
        handler = logging.StreamHandler(nowhere)
        handler.setFormatter(logs.Formatter("json"))
        door = logging.getLogger("ksync_server")
        door.addHandler(handler)
        door.propagate = False
        yield
        door.removeHandler(handler)
        door.propagate = True


@contextmanager
def _server(folder: Path) -> Iterator[tuple[str, Door]]:
    """A server with one worker, and a door of this process over its store."""
    with demo(folder / "data", settings=["server.workers=1"]) as running:
        every = configuration.load(running.data / "ksync.toml")
        database = Database(every.database, threads=2)
        ring, table = keys.load(every.auth.key_file), offers.load(None)
        door = Door(every, database, ring, table, Gate(every, database, ring, table))
        yield running.url + "/", door
        door.gate.close()
        database.close()


def main(count: int = 400) -> bool:
    """Print all pairs of both shapes in process and over a socket; whether the bar holds."""
    held = True
    with tempfile.TemporaryDirectory() as name, _quiet_log():
        folder = Path(name)
        real = {"argon2_memory_kib": 19456, "argon2_time": 2}
        with Door.opened(f"sqlite:///{folder}/ksync.db", folder, **real) as door:
            probes = make(door)
            take = in_process(door.gate)
            held &= judge(
                "application password, in process", take, probes["application password"], count * 10
            )
            held &= judge("account password, in process", take, probes["account password"], count)
        with _server(folder) as (url, door):
            probes = make(door)
            take = over_a_socket(url)
            held &= judge(
                "application password, over a socket", take, probes["application password"], count * 5
            )
            held &= judge("account password, over a socket", take, probes["account password"], count)
    return held


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
