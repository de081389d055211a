"""What goes wrong, on purpose: scripted rules, faults of single messages, and refusals of uploads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from conformance.imap_server.server import Server


@dataclass(frozen=True, slots=True)
class Bye:
    """Say BYE and close; within an answer, after the message at hand."""

    text: str = "[UNAVAILABLE] Temporary System Error"


@dataclass(frozen=True, slots=True)
class Drop:
    """Close without a word; with `after_bytes` at that very byte, within the literal."""


@dataclass(frozen=True, slots=True)
class No:
    """Answer NO instead."""

    text: str = "[UNAVAILABLE] try again later"


@dataclass(frozen=True, slots=True)
class Bad:
    """Answer BAD although the command was right."""

    text: str = "internal confusion"


@dataclass(frozen=True, slots=True)
class Stall:
    """Say nothing for so long, then go on."""

    seconds: float = 3600


@dataclass(frozen=True, slots=True)
class Pour:
    """Raw bytes before the answer: `head`, then `piece` so many times (None: for ever), then `tail`."""

    head: bytes
    piece: bytes = b""
    times: int | None = 0
    tail: bytes = b""


@dataclass(frozen=True, slots=True)
class Run:
    """Change something first: expunge, add, renumber, raise the quota."""

    change: Callable[[Server], object]


Action = Bye | Drop | No | Bad | Stall | Pour | Run


@dataclass(slots=True)
class Rule:
    """When to do what.

    An occasion is the start or the end of a command or the middle of its literal, or the `at_message`-th message
    of a FETCH answer, or the moment a connection has sent `after_bytes` of message bodies, whatever the command.
    Occasions are counted over all connections: the first that is hit is the `nth`, then `times` in a row
    (None: all). `Rule(Bye(), after_bytes=n, times=None)` says BYE every n bytes.

    Attributes:
        command: such as `UID FETCH` or `APPEND`; `CONNECT` is the greeting; `*` any.
        when: `end` is after the command has worked, before its tagged answer; `literal` when half of each literal
            it sends has come (Bye, Drop, Stall and Run only: the rest of the literal is on its way).
        user: only on connections logged in as this user.
    """

    do: Action
    command: str = "*"
    nth: int = 1
    times: int | None = 1
    when: Literal["start", "literal", "end"] = "start"
    at_message: int | None = None
    after_bytes: int | None = None
    user: str | None = None
    seen: int = field(default=0, init=False)

    def due(self) -> bool:
        """Count one occasion; whether it is hit."""
        self.seen += 1
        return self.seen >= self.nth and (self.times is None or self.seen < self.nth + self.times)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one message when it is fetched.

    Attributes:
        claimed_bytes: RFC822.SIZE says this.
        body: `no` refuses the whole FETCH with NO once the message is reached; `nil` answers NIL; `skip`
            leaves the message out, as if it had just been expunged.
        literal_lie: added to the length announced by the body's literal.
    """

    claimed_bytes: int | None = None
    body: Literal["no", "nil", "skip"] | None = None
    literal_lie: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """Unusual but legal answers.

    Attributes:
        body_first: the body comes before UID and the rest.
        flags_apart: FLAGS come in an untagged FETCH of their own.
        chatter: untagged EXISTS, OK and FETCH FLAGS of other messages in between.
        literal_names: mailbox names are sent as literals.
        bare_names: mailbox names are sent as atoms where they can be, as Dovecot does; else quoted, as Gmail does.
        recent: every message has `\\Recent`, as for the first client that sees it.
    """

    body_first: bool = False
    flags_apart: bool = False
    chatter: bool = False
    literal_names: bool = False
    bare_names: bool = False
    recent: bool = False


Refusal = Callable[[bytes, frozenset[str]], str | None]  # body and flags -> text after NO, or None


def refuse_larger(limit_bytes: int) -> Refusal:
    """Messages above a size."""
    return lambda body, _: f"[TOOBIG] at most {limit_bytes} bytes" if len(body) > limit_bytes else None


def refuse_nul() -> Refusal:
    """Messages with a NUL, as Courier and Exchange do."""
    return lambda body, _: "NUL characters not accepted" if b"\0" in body else None


def refuse_8bit() -> Refusal:
    """Messages with bytes above 127."""
    return lambda body, _: None if body.isascii() else "8bit data not accepted"


def refuse_bare_lf() -> Refusal:
    """Messages with a line feed that no carriage return precedes."""
    return lambda body, _: "bare newlines not accepted" if re.search(rb"(?<!\r)\n", body) else None


def refuse_keyword(keyword: str) -> Refusal:
    """Messages with a keyword this server dislikes."""
    return lambda _, flags: f"invalid keyword {keyword}" if keyword in flags else None


def refuse_any(*refusals: Refusal) -> Refusal:
    """The first of several that refuses."""

    def refuse(body: bytes, flags: frozenset[str]) -> str | None:
        return next((text for one in refusals if (text := one(body, flags))), None)

    return refuse
