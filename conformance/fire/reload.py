"""Rolling reloads under load: no request fails, none is lost, uploads under way are finished."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

from conformance.fire.areas import name
from conformance.fire.load import Load
from conformance.fire.running import Server, wait_until
from conformance.fire.scene import Finding, Scene
from conformance.fire.wire import Cut, Login, Wire
from conformance.target import account

RELOADS = 5
GETTERS = 4


class Getter(threading.Thread):
    """Reads over and over, on one kept connection or on a fresh one for each request."""

    def __init__(self, login: Login, acts: list[Callable[[Wire], int]], *, fresh: bool) -> None:
        super().__init__(daemon=True)
        self._wire = Wire(login)
        self._wire.fresh = fresh
        self._acts = acts
        self._chance = random.Random(fresh)
        self.over = threading.Event()
        self.answered = 0
        self.failures: list[str] = []

    def run(self) -> None:
        """Ask until told to end."""
        while not self.over.is_set():
            try:
                status = self._chance.choice(self._acts)(self._wire)
            except Cut as error:
                self.failures.append(f"cut ({'fresh' if self._wire.fresh else 'kept'}): {error}")
                continue
            self.answered += 1
            if status not in (200, 207):
                self.failures.append(f"answered {status}")
        self._wire.close()


def slow_upload(server: Server, over: threading.Event, sent: list[int], failures: list[str]) -> None:
    """Uploads that last as long as everything: a piece now and then."""
    alice = account(server.running.ready, "alice")
    wire = Wire(Login(str(server.running.ready["sync_url"]).rstrip("/"), alice["login"], alice["password"]))

    given = 0

    def pieces() -> Iterator[bytes]:
        nonlocal given
        while not over.wait(0.1):
            given += 1
            yield b"s" * 50_000

    path = f"/drives/{alice['drives'][0]['id']}/{name()}"
    try:
        answer = wire.send("PUT", path, pieces())
        size = int(wire.send("HEAD", path).header("Content-Length"))
    except Cut as error:
        failures.append(f"the slow upload was cut: {error}")
    else:
        sent.append(size)
        if size != given * 50_000:
            failures.append(f"the slow upload has {size} bytes, not {given * 50_000}")
        if answer.status != 201:
            failures.append(f"the slow upload was answered {answer.status}")
    wire.close()


def reload(scene: Scene) -> list[Finding]:
    """SIGHUP `RELOADS` times and more, until `scene.requests` were answered."""
    with Server(scene.data, scene.settings) as server:
        ready = server.running.ready
        alice = account(ready, "alice")
        login = Login(str(ready["sync_url"]).rstrip("/"), alice["login"], alice["password"])
        home, drive = f"/calendars/{alice['sync_id']}/", f"/drives/{alice['drives'][0]['id']}/"
        wire = Wire(login)
        assert wire.send("PUT", drive + "read", b"r" * 2000).status == 201
        assert wire.send("PUT", drive + "large", b"l" * 3_000_000).status == 201
        wire.close()
        acts: list[Callable[[Wire], int]] = [
            *[lambda wire: wire.send("OPTIONS", home).status] * 6,
            *[lambda wire: wire.send("GET", drive + "read").status] * 6,
            lambda wire: wire.send("GET", drive + "large").status,
            lambda wire: wire.propfind(home, "1", "D:displayname").status,
            lambda wire: wire.send("HEAD", drive + "read").status,
        ]
        getters = [Getter(login, acts, fresh=bool(number % 2)) for number in range(GETTERS)]
        over = threading.Event()
        sent: list[int] = []
        failures: list[str] = []
        slow = threading.Thread(target=slow_upload, args=(server, over, sent, failures))
        reloads = 0
        with Load(server, may_refuse=False, seed=scene.seed, actors=4) as load:
            slow.start()
            for getter in getters:
                getter.start()
            started = time.monotonic()
            generations = server.web_workers()

            def requests() -> int:
                return load.acknowledged + sum(getter.answered for getter in getters)

            while time.monotonic() - started < max(120, scene.requests / 15):
                before = server.workers()
                os.kill(server.pid, signal.SIGHUP)
                wait_until(lambda before=before: server.web_workers() - before, "a new generation")  # type: ignore[misc]
                wanted = requests() + min(scene.requests // (RELOADS * 2), 500)
                wait_until(lambda wanted=wanted: requests() >= wanted, "requests go on")  # type: ignore[misc]
                reloads += 1
                scene.say(f"reload {reloads}: {requests()} requests")
                if reloads >= RELOADS and requests() >= scene.requests:
                    break
            seconds = time.monotonic() - started
            replaced = not generations & (server.web_workers() - generations)
            over.set()
            slow.join()
            for getter in getters:
                getter.over.set()
            for getter in getters:
                getter.join()
            load.rest()
            total, cuts = requests(), load.cuts
            wait_until(lambda: not server.workers() & generations, "the first generation ends")
            violations = load.violations
        errors = server.errors()
    failed = [failure for getter in getters for failure in getter.failures] + failures + violations
    if cuts:
        failed.append(f"{cuts} writes were cut")
    return [
        Finding(f"{reloads} reloads, {total} requests in {seconds:.0f} s: none failed", failed),
        Finding(
            f"at least {scene.requests} requests and {RELOADS} reloads",
            [] if total >= scene.requests and reloads >= RELOADS and replaced else [f"{total}, {reloads}"],
        ),
        Finding(
            f"an upload that lasted through all of them has its {sum(sent)} bytes",
            [] if len(sent) == 1 and sent[0] > 50_000 else [f"{sent}"],
        ),
        Finding("no traceback", errors[:3]),
        Finding("verify finds nothing", server.verify()),
    ]
