"""Who is told what a server says of messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Protocol

from ksync_server.errors import BadRequest
from ksync_server.wire import imap
from ksync_server.wire.imap import Fetched, Status, Value

_PARTS = 1000  # messages of which something was said, and something not
_LONG = 4096  # bytes of flags and labels of a message from which on they are counted
_LONG_ONES = 16 << 20  # bytes of such that one command may hold


class Listener:
    """Is told what a server says of messages. What it raises ends the connection."""

    bodies = False  # it asks for some; a server that sends one unasked is not heard

    def fetched(self, each: Fetched) -> None:
        """What is said of a message; of one with a body after the last piece of that."""

    def expunged(self, number: int) -> None:
        """A message is gone, and the later ones have one number less."""

    def begins(self, size: int, uid: int | None) -> None:
        """A body begins. `uid`: where the server said it before."""

    def piece(self, data: memoryview) -> None:
        """A part of the body that began."""

    def answered(self, tag: str, status: Status) -> None:
        """A command is answered."""

    def failed(self, error: Exception) -> None:
        """The connection is gone."""


class Take(Protocol):
    """Is given what a server has said of a message."""

    def __call__(
        self, uid: int, size: int, received: datetime, flags: tuple[str, ...], others: Mapping[str, Value], /
    ) -> None: ...


class Whole(Listener):
    """Passes on messages of which a server has said all that was asked, in one answer or in several.

    Args:
        take: is given each of them.
        others: what must be said beside UID, size, date and flags.

    Spec: RFC 3501 §7.4.2; an answer with fewer may be about a message that was not asked for.
    """

    def __init__(self, take: Take, others: Iterable[str] = ()) -> None:
        self._take = take
        self._others = frozenset(others)
        self._parts: dict[int, Fetched] = {}  # by the message's number
        self._held = 0  # bytes of long flags and labels

    def fetched(self, each: Fetched) -> None:
        """See `Listener`."""
        _, uid, flags, received, size, others = each
        if others is not imap.NOTHING:  # the long way: only there may be much of it
            self._weigh(flags or (), others)
        if (
            uid is None
            or flags is None
            or received is None
            or size is None
            or (self._others and not self._others <= others.keys())
        ):
            self._join(each)
        else:
            self._take(uid, size, received, flags, others)

    def _weigh(self, flags: Iterable[str], others: Mapping[str, Value]) -> None:
        length = sum(map(len, flags)) + (len(str(others)) if others else 0)
        if length > _LONG:
            self._held += length
            if self._held > _LONG_ONES:
                raise BadRequest(f"flags and labels of {self._held} bytes")

    def _join(self, each: Fetched) -> None:
        """A part: keep it, or pass on the whole where it was the last one."""
        if each.others.keys() - self._others:
            asked = {name: each.others[name] for name in self._others & each.others.keys()}
            each = each._replace(others=asked)
        before = self._parts.pop(each.number, None)
        if before is None:
            self._parts[each.number] = each
            if len(self._parts) > _PARTS:
                del self._parts[next(iter(self._parts))]
            return
        said = {name: new for name, new in each._asdict().items() if new is not None}
        now = before._replace(**{**said, "others": {**before.others, **each.others}})
        if None in now or not self._others <= now.others.keys():
            self._parts[each.number] = now
        else:
            self.fetched(now)

    def expunged(self, number: int) -> None:
        """See `Listener`."""
        self._parts = {at - (at > number): part for at, part in self._parts.items() if at != number}
