"""Actors: each changes its own area without a pause, and knows what the server owes it.

An answer that says "done" counts. One that never came, or a 503, leaves two states possible; the actor then
waits until the server writes again, reads everything back, and finds one of the two or a violation.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence

from conformance.client import Answer
from conformance.fire.areas import Area, Folder, Objects, State, Step, Trees, name
from conformance.fire.running import Server
from conformance.fire.wire import Cut, Login, Wire
from conformance.target import account

BACK_TIMEOUT_S = 90  # after a fault, until a write is acknowledged again
RETRYABLE = (503, 507)


class Actor(threading.Thread):
    """One client."""

    def __init__(self, title: str, login: Login, area: Area, *, may_refuse: bool) -> None:
        super().__init__(name=title, daemon=True)
        self.wire = Wire(login)
        self.area = area
        self.may_refuse = may_refuse  # a fault is part of the game: 503 and 507 are no violations
        self.answers: Counter[str] = Counter()  # "PUT 201" -> how many
        self.acknowledged = 0
        self.cuts = 0
        self.violations: list[str] = []
        self.last_good = time.monotonic()
        self._hold = threading.Event()
        self._held = threading.Event()
        self._release = threading.Event()
        self._over = threading.Event()

    # -- what the conductor says ----------------------------------------------------------------------

    def hold(self) -> None:
        """Finish the step under way, check everything, wait."""
        self._release.clear()
        self._hold.set()

    def wait_held(self) -> None:
        """Wait until it is so.

        Raises:
            TimeoutError: the actor hangs.
        """
        if not self._held.wait(2 * BACK_TIMEOUT_S):
            raise TimeoutError(f"{self.name} did not come to rest")

    def release(self) -> None:
        """Go on."""
        self._hold.clear()
        self._held.clear()
        self._release.set()

    def end(self) -> None:
        """Stop for good."""
        self._over.set()
        self.release()
        self.join(2 * BACK_TIMEOUT_S)
        self.wire.close()

    # -- the loop -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Act until told to end; a failure of the actor itself is a violation too."""
        while not self._over.is_set():
            try:
                if self._hold.is_set():
                    self._rest()
                else:
                    self._act()
            except Exception as error:
                self._blame(f"the actor failed: {error!r}")
                self._hold.wait(0.2)

    def _rest(self) -> None:
        try:
            self._settle([self.area.state])
            self.violations += [f"{self.name}: {wrong}" for wrong in self.area.check(self.wire)]
        finally:
            self._held.set()
        self._release.wait()

    def _act(self) -> None:
        step = self.area.next()
        before = self.area.state
        try:
            answer = self.wire.send(step.method, step.path, step.body, step.headers)
        except Cut:
            self.cuts += 1
            self._settle([before, step.after])
            return
        if answer.status in step.good and self._whole(step, answer):
            self._acknowledge(step, answer)
        else:
            self._refused(step, answer)
            self._settle([before] if answer.status == 507 else [before, step.after])

    def _acknowledge(self, step: Step, answer: Answer) -> None:
        self.answers[f"{step.method} {answer.status}"] += 1
        self.acknowledged += 1
        self.last_good = time.monotonic()
        self.area.state = step.after
        self.area.note(step, answer)

    def _whole(self, step: Step, answer: Answer) -> bool:
        return answer.status != 207 or all(not row.refused for row in answer.rows)

    def _refused(self, step: Step, answer: Answer) -> None:
        self.answers[f"{step.method} {answer.status}"] += 1
        if answer.status not in RETRYABLE or not self.may_refuse:
            self._blame(f"{step.method} {step.path} was answered {answer.status} {answer.body[:200]!r}")
        elif answer.status == 503 and not answer.header("Retry-After").isdigit():
            self._blame(f"{step.method}: 503 without Retry-After: {answer.body[:200]!r}")

    def _blame(self, text: str) -> None:
        self.violations.append(f"{self.name}: {text}")

    def _settle(self, possible: Sequence[State]) -> None:
        """Wait until a write is acknowledged again, then find out which of the states came about."""
        deadline = time.monotonic() + BACK_TIMEOUT_S
        while not self._fence():
            if self._over.is_set():
                return
            if time.monotonic() > deadline:
                self._blame(f"no write was acknowledged for {BACK_TIMEOUT_S} s")
                return
            time.sleep(0.05)
        while True:
            try:
                found = self.area.read(self.wire)
                break
            except (Cut, AssertionError) as error:
                if time.monotonic() > deadline:
                    self._blame(f"reading back failed: {error!r}")
                    return
                if isinstance(error, AssertionError) and not self._excused(error):
                    self._blame(f"reading back: {error!r}")
                time.sleep(0.05)
        if found not in possible:
            self._blame(f"lost or half done: {_difference(possible, found)}")
        self.area.state = found

    def _excused(self, error: AssertionError) -> bool:
        told = error.args[0] if error.args else None
        return self.may_refuse and isinstance(told, tuple) and told[0] in RETRYABLE

    def _fence(self) -> bool:
        step = self.area.fence()
        try:
            answer = self.wire.send(step.method, step.path, step.body, step.headers)
        except Cut:
            return False
        if answer.status in step.good:
            self.last_good = time.monotonic()
            return True
        self._refused(step, answer)
        return False


def _difference(possible: Sequence[State], found: State) -> str:
    texts = []
    for state in possible:
        keys = sorted(key for key in {*state, *found} if state.get(key) != found.get(key))
        texts.append(
            "; ".join(f"{key}: {state.get(key)!s:.60} -> {found.get(key)!s:.60}" for key in keys[:4])
        )
    return " | or | ".join(texts)


class Load:
    """All actors on one server."""

    def __init__(self, server: Server, *, may_refuse: bool, seed: int, actors: int = 7) -> None:
        self.actors: list[Actor] = []
        ready = server.running.ready
        base = str(ready["sync_url"]).rstrip("/")
        for number in range(actors):
            person = account(ready, ("alice", "bob")[number % 2])
            secret = person["application_password"] or person["password"]
            login = Login(base, person["login"], secret)
            chance = random.Random(f"{seed} {number}")
            title = ("calendar", "folder", "trees", "book", "folder", "calendar", "folder")[number % 7]
            self.actors.append(
                Actor(f"{title} {number}", login, _area(title, person, base, chance), may_refuse=may_refuse)
            )
        for actor in self.actors:
            actor.area.prepare(actor.wire)

    def __enter__(self) -> Load:
        for actor in self.actors:
            actor.start()
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            actor.end()

    def rest(self) -> None:
        """Every actor has checked all it knows, and waits."""
        for actor in self.actors:
            actor.hold()
        for actor in self.actors:
            actor.wait_held()

    def go_on(self) -> None:
        """Let all act again."""
        for actor in self.actors:
            actor.release()

    @property
    def violations(self) -> list[str]:
        return [text for actor in self.actors for text in actor.violations]

    @property
    def acknowledged(self) -> int:
        return sum(actor.acknowledged for actor in self.actors)

    @property
    def cuts(self) -> int:
        return sum(actor.cuts for actor in self.actors)

    @property
    def answers(self) -> Counter[str]:
        """Verb and status -> how many."""
        total: Counter[str] = Counter()
        for actor in self.actors:
            total.update(actor.answers)
        return total

    @property
    def refusals(self) -> int:
        """Answers 503 and 507."""
        return sum(count for key, count in self.answers.items() if int(key.split()[1]) in RETRYABLE)


def _area(title: str, person: dict[str, object], base: str, chance: random.Random) -> Area:
    sync_id = person["sync_id"]
    if title == "calendar":
        return Objects(f"/calendars/{sync_id}/{name()}/", chance, calendar=True)
    if title == "book":
        return Objects(f"/addressbooks/{sync_id}/{name()}/", chance, calendar=False)
    drive = person["drives"][0]["id"]  # type: ignore[index]
    path = f"/drives/{drive}/{name()}/"
    return Folder(path, chance, base) if title == "folder" else Trees(path, chance, base)
