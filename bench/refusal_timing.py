"""Can refusals of one shape of secret be told apart by their time? Every cause against every other.

Each cause has fifty accounts and secrets, drawn at random for each sample: what is measured is the cause, not how one row lies in a page or a
cache. Samples of all causes are taken in turn, in random order. For each pair the best single threshold is found with one half of the secrets and
tried on those of the other half, which it has not seen, both ways round: guessing classifies 50 %. Among many pairs one may be over the bar
by chance: then all are sampled anew, three times as often, and for that pair the new figure counts; both are printed. In process (the door
alone) and over a socket (a server).

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
from functools import partial
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
MANY = 50  # accounts and secrets of each cause
IDLE = 2000  # application passwords beside those: the neighbours of ids that nobody has
WRONG = "a wrong enough pass phrase"
Probes = dict[str, list[tuple[str, str]]]  # cause -> names and secrets
Take = Callable[[str, str], float]  # seconds that one refusal takes
Halves = tuple[list[float], list[float]]  # seconds, with the one half of the secrets and with the other


def accuracy(a: Halves, b: Halves) -> float:
    """How well a single threshold tells two causes apart: found with one half of the secrets, tried on the other."""
    shares = []
    for own, other in ((0, 1), (1, 0)):
        threshold, first_is_low = _best(a[own], b[own])
        low, high = (a[other], b[other]) if first_is_low else (b[other], a[other])
        below = sum(x <= threshold for x in low) / len(low)
        above = sum(x > threshold for x in high) / len(high)
        shares.append((below + above) / 2)
    return statistics.mean(shares)


def _best(a: list[float], b: list[float]) -> tuple[float, bool]:
    """The threshold that classifies most, and whether what is below it is of the first sample."""
    a, b = sorted(a), sorted(b)
    best = (-1.0, 0.0, True)
    for threshold in (*a, *b):
        share = bisect_right(a, threshold) / len(a) - bisect_right(b, threshold) / len(b)
        best = max(best, (abs(share), threshold, share > 0))
    return best[1], best[2]


def make(door: Door) -> dict[str, Probes]:
    """Accounts and secrets for every cause, none shared between two, among many that nobody uses."""
    everybody = {
        group: [door.account(f"{group}{number:02}") for number in range(MANY)] for group in "abcdefghijkl"
    }
    names = {group: [account.login_email for account in accounts] for group, accounts in everybody.items()}
    nobody = [[f"{letter}{number:02}@example.org" for number in range(MANY)] for letter in "xyz"]
    for account in everybody["j"]:
        door.turn_on_second_factor(account)
    secret: dict[str, list[str]] = {group: [] for group in "bcdefgh"}
    # In turns, so that no cause has its rows in pages of its own.
    for number in range(MANY):
        for group, shown in secret.items():
            shown.append(door.app_password(everybody[group][number])[1])
        for account in everybody["l"][: IDLE // MANY]:
            door.app_password(account)
    c = t.app_password.c

    def of(group: str) -> sa.Update:
        return sa.update(t.app_password).where(
            c.lookup.in_([each.replace("-", "")[:6] for each in secret[group]])
        )

    def people(group: str) -> sa.Update:
        return sa.update(t.account).where(t.account.c.id.in_([each.id for each in everybody[group]]))

    changes = [
        of("c").values(revoked_at=1),
        of("d").values(expires_at=1),
        of("e").values(addresses="198.51.100.0/24 2001:db8::/32"),
        people("g").values(state="suspended"),
        people("k").values(state="suspended"),
        people("i").values(password_hash=None),
    ]
    door.write(lambda tx: [tx.execute(change) for change in changes])
    unknown = [passwords.new_app_password().shown for _ in range(MANY)]
    found: dict[str, dict[str, tuple[list[str], list[str]]]] = {
        "account password": {
            "unknown name": (nobody[0], [PASSWORD] * MANY),
            "wrong password": (names["a"], [WRONG] * MANY),
            "2FA is on, right password": (names["j"], [PASSWORD] * MANY),
            "suspended, right password": (names["k"], [PASSWORD] * MANY),
            "no password set": (names["i"], [PASSWORD] * MANY),
        },
        "application password": {
            "unknown id": (names["a"], unknown),
            "wrong secret": (names["b"], [_forged(each) for each in secret["b"]]),
            "revoked": (names["c"], secret["c"]),
            "expired": (names["d"], secret["d"]),
            "wrong network": (names["e"], secret["e"]),
            "another account's": (names["f"][1:] + names["f"][:1], secret["f"]),
            "suspended": (names["g"], secret["g"]),
            "unknown name": (nobody[1], secret["h"]),
        },
    }
    return {
        shape: {cause: list(zip(*probes, strict=True)) for cause, probes in causes.items()}
        for shape, causes in found.items()
    }


def _forged(shown: str) -> str:
    """The id of an application password with another secret behind it."""
    text = shown.replace("-", "")[:6] + passwords.new_app_password().secret[6:-3]
    return text + passwords._check_letters(text)


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


def sample(take: Take, probes: Probes, count: int) -> dict[str, Halves]:
    """Times of each cause, all of them in each round, in another order each."""
    found: dict[str, Halves] = {cause: ([], []) for cause in probes}
    causes = list(probes)
    for _ in range(count):
        random.shuffle(causes)
        for cause in causes:
            number = random.randrange(MANY)
            found[cause][number % 2].append(take(*probes[cause][number]))
    return found


def _shares(found: dict[str, Halves]) -> dict[tuple[str, str], float]:
    """The accuracy of each pair."""
    return {(a, b): accuracy(found[a], found[b]) for a, b in itertools.combinations(found, 2)}


def judge(title: str, take: Take, probes: Probes, count: int, settle: Callable[[], object]) -> bool:
    """Print each pair; whether all are within the bar.

    Args:
        settle: waits until what the first refusal of each account leaves behind (audit, notice) is written.
    """
    for each in itertools.chain.from_iterable(probes.values()):
        take(*each)
    settle()
    found = sample(take, probes, count)
    print(f"\n{title}: {count} samples of each cause, standard error {50 / (2 * count) ** 0.5:.1f} %")
    for cause, halves in found.items():
        print(f"  {cause:28} median {statistics.median(halves[0] + halves[1]) * 1000:9.3f} ms")
    shares = _shares(found)
    over = [pair for pair, share in shares.items() if share > BAR]
    again = _shares(sample(take, probes, count * 3)) if over else {}
    held = True
    for pair, share in shares.items():
        counts = again[pair] if pair in over else share
        before = f", {share:.1%} at first" if pair in over else ""
        held &= counts <= BAR
        print(f"  {'ok  ' if counts <= BAR else 'MISS'} {counts:6.1%}{before}  {' / '.join(pair)}")
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


def _notices_are_sent(door: Door) -> None:
    """Wait until the server has nothing left to tell."""
    waiting = sa.select(sa.func.count()).where(
        t.job.c.every_s.is_(None), t.job.c.state.in_(("ready", "running"))
    )
    end = time.monotonic() + 120
    time.sleep(2)  # they are queued after the answer
    while True:
        with door.database.read() as tx:
            if not tx.execute(waiting).scalar():
                return
        assert time.monotonic() < end, "notices of refusals still wait"
        time.sleep(0.2)


def main(count: int = 400) -> bool:
    """Print all pairs of both shapes in process and over a socket; whether the bar holds."""
    held = True
    shapes = {
        "application password": (10, 5),
        "account password": (1, 1),
    }  # times `count`: in process, socket
    with tempfile.TemporaryDirectory() as name, _quiet_log():
        folder = Path(name)
        # Fifty names from one network would be blocked; so would they not be from loopback, as over the socket.
        real = {"argon2_memory_kib": 19456, "argon2_time": 2, "throttle_shared": (PEER.address,)}
        with Door.opened(f"sqlite:///{folder}/ksync.db", folder, **real) as door:
            probes = make(door)
            for shape, (times, _) in shapes.items():
                take = in_process(door.gate)
                held &= judge(f"{shape}, in process", take, probes[shape], count * times, door.gate.flush)
        with _server(folder) as (url, door):
            probes = make(door)
            for shape, (_, times) in shapes.items():
                take = over_a_socket(url)
                held &= judge(
                    f"{shape}, over a socket",
                    take,
                    probes[shape],
                    count * times,
                    partial(_notices_are_sent, door),
                )
    return held


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
