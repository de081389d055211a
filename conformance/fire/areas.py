"""What one actor works on, alone: a folder of the drive, a calendar, an address book.

An area knows the state that was acknowledged. A step is a request and the state it leaves if it is carried
out; the state read from the server must be one of those that are possible, exactly.
"""

from __future__ import annotations

import hashlib
import random
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from conformance.client import DAV, NAMESPACES, Answer
from conformance.fire.wire import DECLARATION, Body, Wire

MARK = "{http://example.org/ns/}mark"
FENCE = "fence"
MOST_ENTRIES = 30
State = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One request."""

    method: str
    path: str
    body: Body
    headers: dict[str, str]
    good: tuple[int, ...]  # statuses that say it was carried out
    after: State


class Area(Protocol):
    """A place that one actor changes and nobody else."""

    state: State

    def prepare(self, wire: Wire) -> None:
        """Make the place."""

    def next(self) -> Step:
        """A random change."""

    def fence(self) -> Step:
        """A write that waits for whatever still runs on this place; it changes no state."""

    def read(self, wire: Wire) -> State:
        """What the server has, every byte of it."""

    def check(self, wire: Wire) -> list[str]:
        """What else must be true when nothing is under way."""


def digest(content: bytes) -> str:
    """A short name for bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def expect(answer: Answer, *statuses: int) -> Answer:
    """The answer, if it has one of the statuses.

    Raises:
        AssertionError: another.
    """
    assert answer.status in statuses, (answer.status, answer.body[:300])
    return answer


@dataclass
class Folder:
    """A tree of files: every verb that changes one.

    State: path -> ("d", "", mark) or ("f", digest, mark); a lock of the file `locked` as "locked lock".
    """

    path: str  # with a slash at the end
    chance: random.Random
    destination: str  # what comes before a path in Destination
    state: State = field(default_factory=dict)
    token: str = ""

    def prepare(self, wire: Wire) -> None:
        expect(wire.send("MKCOL", self.path), 201)
        expect(wire.send("PUT", self.path + "locked", b"held"), 201)
        self.state = {"locked": ("f", digest(b"held"), "")}

    def fence(self) -> Step:
        return Step("PUT", self.path + FENCE, self.chance.randbytes(64), {}, (201, 204), self.state)

    def next(self) -> Step:
        acts = [self._put, self._put, self._put_large, self._put_chunked, self._mkcol, self._move]
        acts += [self._copy, self._proppatch, self._lock, self._delete]
        if len(self.state) > MOST_ENTRIES:
            acts = [self._delete, self._delete, self._move, self._put]
        while True:
            step = self.chance.choice(acts)()
            if step is not None:
                return step

    # -- steps ----------------------------------------------------------------------------------------

    def _folders(self) -> list[str]:
        return ["", *(f"{path}/" for path, entry in self.state.items() if entry[0] == "d")]

    def _fresh(self, kind: str) -> str:
        return f"{self.chance.choice(self._folders())}{kind}{self.chance.randrange(6)}"

    def _put(self, content: Body = None) -> Step | None:
        path = self._fresh("file ")
        if self.state.get(path, "f")[0] == "d":
            return None  # a folder was moved here
        body = content or self.chance.randbytes(self.chance.randrange(6000))
        whole = body if isinstance(body, bytes) else b"".join(body)
        before = self.state.get(path)
        after = {**self.state, path: ("f", digest(whole), before[2] if before else "")}
        return Step("PUT", self.path + quote(path), body, {}, (201, 204), after)

    def _put_large(self) -> Step | None:
        return self._put(self.chance.randbytes(self.chance.choice((20_000, 300_000, 2_500_000))))

    def _put_chunked(self) -> Step | None:
        return self._put([self.chance.randbytes(70_000) for _ in range(self.chance.choice((1, 4, 20)))])

    def _mkcol(self) -> Step | None:
        path = self._fresh("folder ")
        if path in self.state or path.count("/") > 2:
            return None
        return Step("MKCOL", self.path + quote(path), None, {}, (201,), {**self.state, path: ("d", "", "")})

    def _pick(self) -> str | None:
        paths = [path for path in self.state if not path.startswith("locked")]
        return self.chance.choice(paths) if paths else None

    def _below(self, path: str) -> dict[str, Any]:
        return {
            each: entry for each, entry in self.state.items() if each == path or each.startswith(f"{path}/")
        }

    def _target(self, source: str) -> str | None:
        """A fresh place or one that is there already, neither inside the source nor around it."""
        target = self._pick() if self.chance.random() < 0.3 else None
        target = target or self._fresh("folder " if self.state[source][0] == "d" else "file ")
        inside = f"{target}/".startswith(f"{source}/") or f"{source}/".startswith(f"{target}/")
        return None if inside or target.count("/") > 3 else target

    def _relocate(self, method: str) -> Step | None:
        source = self._pick()
        target = self._target(source) if source else None
        if source is None or target is None:
            return None
        moved = {target + path.removeprefix(source): entry for path, entry in self._below(source).items()}
        gone = self._below(target)
        if method == "MOVE":
            gone = {**gone, **self._below(source)}
        kept = {path: entry for path, entry in self.state.items() if path not in gone}
        headers = {"Destination": self.destination + self.path + quote(target), "Overwrite": "T"}
        return Step(method, self.path + quote(source), None, headers, (201, 204), {**kept, **moved})

    def _move(self) -> Step | None:
        return self._relocate("MOVE")

    def _copy(self) -> Step | None:
        return self._relocate("COPY")

    def _delete(self) -> Step | None:
        path = self._pick()
        if path is None:
            return None
        gone = self._below(path)
        after = {each: entry for each, entry in self.state.items() if each not in gone}
        return Step("DELETE", self.path + quote(path), None, {}, (204,), after)

    def _proppatch(self) -> Step | None:
        path = self._pick()
        if path is None:
            return None
        mark = f"{self.chance.random():.12f}"
        body = (
            f"{DECLARATION}<D:propertyupdate {NAMESPACES}><D:set><D:prop><E:mark>{mark}</E:mark>"
            "</D:prop></D:set></D:propertyupdate>"
        )
        kind, content, _ = self.state[path]
        after = {**self.state, path: (kind, content, mark)}
        return Step("PROPPATCH", self.path + quote(path), body.encode(), {}, (207,), after)

    def _lock(self) -> Step | None:
        """LOCK; while it holds: a PUT with its token, or UNLOCK."""
        place = self.path + "locked"
        if "locked lock" not in self.state:
            body = (
                f"{DECLARATION}<D:lockinfo {NAMESPACES}><D:lockscope><D:exclusive/></D:lockscope>"
                "<D:locktype><D:write/></D:locktype></D:lockinfo>"
            )
            headers = {"Timeout": "Second-3000", "Depth": "0"}
            return Step(
                "LOCK", place, body.encode(), headers, (200,), {**self.state, "locked lock": ("lock", "", "")}
            )
        if self.chance.random() < 0.5:
            body = self.chance.randbytes(3000)
            headers = {"If": f"(<{self.token}>)"}
            after = {**self.state, "locked": ("f", digest(body), "")}
            return Step("PUT", place, body, headers, (204,), after)
        after = {path: entry for path, entry in self.state.items() if path != "locked lock"}
        return Step("UNLOCK", place, None, {"Lock-Token": f"<{self.token}>"}, (204,), after)

    def note(self, step: Step, answer: Answer) -> None:
        """What an acknowledged step told."""
        if step.method == "LOCK":
            self.token = answer.header("Lock-Token").strip("<>")

    # -- reading --------------------------------------------------------------------------------------

    def read(self, wire: Wire) -> State:
        names = ("D:resourcetype", "D:lockdiscovery", "D:getcontentlength", "E:mark")
        rows = expect(wire.propfind(self.path, "infinity", *names), 207).rows
        own = unquote(self.path)
        found: dict[str, Any] = {}
        for row in rows:
            path = unquote(row.path).removeprefix(own).rstrip("/")
            if path in ("", FENCE):
                continue
            mark = row.text(MARK)
            if row.properties[f"{DAV}resourcetype"].find(f"{DAV}collection") is not None:
                found[path] = ("d", "", mark)
                continue
            content = expect(wire.send("GET", self.path + quote(path)), 200).body
            assert len(content) == int(row.text(f"{DAV}getcontentlength")), path
            found[path] = ("f", digest(content), mark)
            token = row.properties[f"{DAV}lockdiscovery"].findtext(f".//{DAV}locktoken/{DAV}href")
            if token is not None:
                found[f"{path} lock"] = ("lock", "", "")
                self.token = token
        return found

    def check(self, wire: Wire) -> list[str]:
        if "locked lock" not in self.state:
            return []
        status = wire.send("PUT", self.path + "locked", b"stolen").status
        return [] if status == 423 else [f"a locked file was answered {status} without the token"]


@dataclass
class Trees:
    """COPY, MOVE and DELETE of a tree that is larger than one transaction. State: folder -> its members."""

    path: str
    chance: random.Random
    destination: str
    members: int = 230
    state: State = field(default_factory=dict)

    def prepare(self, wire: Wire) -> None:
        expect(wire.send("MKCOL", self.path), 201)
        expect(wire.send("MKCOL", self.path + "origin"), 201)
        expect(wire.send("MKCOL", self.path + "origin/inner"), 201)
        for number in range(self.members):
            folder = "origin/inner/" if number % 2 else "origin/"
            size = 20_000 if number == 7 else 5
            expect(wire.send("PUT", f"{self.path}{folder}{number}", b"x" * size), 201)
        self.state = self.read(wire)
        assert len(self.state["origin"]) == self.members + 1

    def fence(self) -> Step:
        return Step("PUT", self.path + FENCE, self.chance.randbytes(64), {}, (201, 204), self.state)

    def next(self) -> Step:
        name = f"tree {self.chance.randrange(3)}"
        if name not in self.state:
            source = self.chance.choice(sorted(self.state))
            method = "COPY" if source == "origin" or self.chance.random() < 0.5 else "MOVE"
            after = {**self.state, name: self.state[source]}
            if method == "MOVE":
                del after[source]
            headers = {"Destination": self.destination + self.path + quote(name)}
            return Step(method, self.path + quote(source), None, headers, (201,), after)
        after = {each: entry for each, entry in self.state.items() if each != name}
        return Step("DELETE", self.path + quote(name), None, {}, (204,), after)

    def note(self, step: Step, answer: Answer) -> None:
        """Nothing to learn."""

    def read(self, wire: Wire) -> State:
        rows = expect(wire.propfind(self.path, "infinity", "D:getcontentlength"), 207).rows
        own = unquote(self.path)
        found: dict[str, set[tuple[str, str]]] = {}
        for row in rows:
            top, _, rest = unquote(row.path).removeprefix(own).rstrip("/").partition("/")
            if top in ("", FENCE):
                continue
            members = found.setdefault(top, set())
            if rest:
                members.add((rest, row.text(f"{DAV}getcontentlength")))
        return {top: frozenset(members) for top, members in found.items()}

    def check(self, wire: Wire) -> list[str]:
        wrong = []
        for top in self.state:
            content = expect(wire.send("GET", f"{self.path}{quote(top)}/inner/7"), 200).body
            if content != b"x" * 20_000:
                wrong.append(f"{top}/inner/7 has other bytes")
        return wrong


@dataclass
class Objects:
    """A calendar or address book, and a client that keeps it by sync tokens. State: name -> digest."""

    path: str
    chance: random.Random
    calendar: bool
    state: State = field(default_factory=dict)
    token: str = ""
    mirror: dict[str, str] = field(default_factory=dict)  # name -> ETag

    @property
    def _ending(self) -> str:
        return ".ics" if self.calendar else ".vcf"

    @property
    def _type(self) -> dict[str, str]:
        return {"Content-Type": "text/calendar" if self.calendar else "text/vcard"}

    def prepare(self, wire: Wire) -> None:
        if self.calendar:
            expect(wire.send("MKCALENDAR", self.path), 201)
            return
        body = (
            f"{DECLARATION}<D:mkcol {NAMESPACES}><D:set><D:prop><D:resourcetype><D:collection/>"
            "<A:addressbook/></D:resourcetype></D:prop></D:set></D:mkcol>"
        )
        expect(wire.send("MKCOL", self.path, body.encode()), 201)

    def _content(self, name: str) -> bytes:
        words = self.chance.randbytes(self.chance.choice((20, 300, 14_000))).hex()
        uid = f"{name}@example.org"
        if not self.calendar:
            lines = ["BEGIN:VCARD", "VERSION:3.0", f"UID:{uid}", "FN:Fire", "N:Fire;;;;", f"NOTE:{words}"]
            return ("\r\n".join([*lines, "END:VCARD", ""])).encode()
        start = f"2026{self.chance.randrange(1, 13):02}{self.chance.randrange(1, 28):02}T100000Z"
        lines = ["BEGIN:VCALENDAR", "VERSION:2.0", "PRODID:-//example.org//fire//EN", "BEGIN:VEVENT"]
        lines += [f"UID:{uid}", "DTSTAMP:20260101T000000Z", f"DTSTART:{start}", "SUMMARY:Fire"]
        lines += [f"DESCRIPTION:{words}", "END:VEVENT", "END:VCALENDAR", ""]
        return "\r\n".join(lines).encode()

    def fence(self) -> Step:
        name = FENCE + self._ending
        return Step("PUT", self.path + name, self._content(name), self._type, (201, 204), self.state)

    def next(self) -> Step:
        name = f"{self.chance.randrange(8)}{self._ending}"
        if name in self.state and self.chance.random() < 0.4:
            after = {each: entry for each, entry in self.state.items() if each != name}
            return Step("DELETE", self.path + name, None, {}, (204,), after)
        content = self._content(name)
        after = {**self.state, name: digest(content)}
        return Step("PUT", self.path + name, content, self._type, (201, 204), after)

    def note(self, step: Step, answer: Answer) -> None:
        """Nothing to learn."""

    def _etags(self, wire: Wire) -> dict[str, str]:
        rows = expect(wire.propfind(self.path, "1", "D:getetag"), 207).rows
        return {
            unquote(row.path).rpartition("/")[2]: row.text(f"{DAV}getetag")
            for row in rows
            if not row.path.endswith("/")
        }

    def read(self, wire: Wire) -> State:
        found: dict[str, str] = {}
        for name, etag in self._etags(wire).items():
            if name.startswith(FENCE):
                continue
            answer = expect(wire.send("GET", self.path + name), 200)
            assert answer.etag == etag, (name, answer.etag, etag)
            found[name] = digest(answer.body)
        return found

    def check(self, wire: Wire) -> list[str]:
        """Synchronise by the token of the last time, in pages: the mirror must be what a listing says."""
        limit = self.chance.choice(("", "<D:limit><D:nresults>3</D:nresults></D:limit>"))
        for _ in range(50):
            body = (
                f"{DECLARATION}<D:sync-collection {NAMESPACES}><D:sync-token>{self.token}</D:sync-token>"
                f"<D:sync-level>1</D:sync-level>{limit}<D:prop><D:getetag/></D:prop></D:sync-collection>"
            )
            answer = expect(wire.send("REPORT", self.path, body.encode(), {"Depth": "0"}), 207)
            truncated = False
            for row in answer.rows:
                name = unquote(urlsplit(row.href).path).removeprefix(unquote(self.path))
                if name == "":
                    truncated = row.status == 507
                elif row.status == 404:
                    self.mirror.pop(name, None)
                else:
                    self.mirror[name] = row.text(f"{DAV}getetag")
            self.token = answer.sync_token
            if not truncated:
                break
        etags = self._etags(wire)
        if self.mirror == etags:
            return []
        wrong = [f"after a sync of {self.path} the client has {self.mirror}, the server {etags}"]
        self.mirror = etags
        return wrong


def name() -> str:
    """A name nobody else uses."""
    return f"fire-{uuid.uuid4().hex[:8]}"
