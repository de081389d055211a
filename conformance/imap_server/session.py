"""One connection: commands read strictly, answered from the account's folders, disturbed by the rules."""

from __future__ import annotations

import asyncio
import re
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conformance.imap_server import syntax
from conformance.imap_server.accounts import Account, Folder, Mail
from conformance.imap_server.commands import COMMANDS, State
from conformance.imap_server.faults import Action, Bad, Bye, Drop, No, Pour, Rule, Run, Stall
from conformance.imap_server.syntax import Closed, Confused, Cursor, Malformed, Refused
from conformance.imap_server.wire import LONGEST_LINE, Wire

if TYPE_CHECKING:
    from conformance.imap_server.server import Server

_TAG = re.compile(rb'[^\x00-\x20\x7f-\xff(){%*"\\+]+')
_LITERAL_END = re.compile(rb"(~?)\{(\d+)(\+?)\}\r\n\Z")
_POLITE_LINE = 8192  # RFC 7162 §4: what a client may take for granted
_SMALL_LITERAL = 4096  # RFC 7888 §5
_LARGEST_LITERAL = 256 * 1024 * 1024


@dataclass(slots=True)
class Selected:
    """The selected folder as this client knows it."""

    folder: Folder
    read_only: bool
    uids: list[int]  # by sequence number
    uid_validity: int
    modseq: int  # up to which changes of flags were told
    counted: int  # up to which modification number `uids` is true


class Session:
    """A client's connection.

    Args:
        server: its switches and accounts.
        reader, writer: the socket, TLS already up if it is implicit.
    """

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server = server
        self.wire = Wire(server, reader, writer)
        self.secure = server.tls != "starttls"
        self.account: Account | None = None
        self.selected: Selected | None = None
        self.enabled: set[str] = set()
        self.body_bytes = 0  # sent on this connection
        self.tag = b"*"  # of the command at hand
        self.compressed = False
        self.ended = False
        self._seen_tags: set[bytes] = set()
        self._due_after_message: list[Rule] = []

    # features

    def has(self, feature: str) -> bool:
        """Whether a capability is switched on."""
        return feature in self.server.features

    def need(self, feature: str) -> None:
        """Refuse what was not announced."""
        if not self.has(feature):
            raise Malformed(f"{feature} was not announced")

    @property
    def utf8(self) -> bool:
        """Whether names are UTF-8 (RFC 6855)."""
        return "UTF8=ACCEPT" in self.enabled

    def capabilities(self) -> str:
        """The capability list of this moment."""
        features = set(self.server.features)
        if "APPENDLIMIT" in features and self.server.append_limit is not None:
            features = features - {"APPENDLIMIT"} | {f"APPENDLIMIT={self.server.append_limit}"}
        if not self.secure:
            features = {name for name in features if not name.startswith("AUTH=")}
            features |= {"STARTTLS", "LOGINDISABLED"}
        if self.account:
            features = {name for name in features if not name.startswith("AUTH=") and name != "SASL-IR"}
        return " ".join(["IMAP4rev1", *sorted(features)])

    # the loop

    async def run(self) -> None:
        """Greet, then answer until the end."""
        try:
            await self._disturb("CONNECT", "start")
            await self.untagged(f"OK [CAPABILITY {self.capabilities()}] ready")
            while not self.ended:
                await self.wire.flush()
                await self._command()
        except Refused as refused:  # a rule for CONNECT
            await self.untagged(f"BYE {refused}")
        except Closed:
            pass
        await self.wire.close()

    async def _command(self) -> None:
        self.tag = b"*"
        line = b""
        try:
            line, literals = await self._read()
            found = _TAG.match(line)
            if not found or not line[found.end() :].startswith(b" "):
                raise Malformed("no tag")
            self.tag = found[0]
            if self.tag in self._seen_tags:
                self.violation("a tag used twice", line)
            self._seen_tags.add(self.tag)
            cursor = Cursor(line[found.end() + 1 :], literals, utf8=self.utf8)
            name = cursor.word()
            if name == "UID":
                cursor.space()
                name = f"UID {cursor.word()}"
            await self._dispatch(name, cursor)
        except Malformed as error:
            self.violation(str(error), line)
            await self._tagged("BAD", str(error))
        except Refused as error:
            await self._tagged("NO", str(error))
        except Confused as error:
            await self._tagged("BAD", str(error))

    async def _tagged(self, status: str, text: str) -> None:
        line = text.replace("\r", " ").replace("\n", " ").encode("utf-8", "replace")
        await self.wire.write(b"%s %s %s\r\n" % (self.tag, status.encode(), line))

    async def _dispatch(self, name: str, cursor: Cursor) -> None:
        known = COMMANDS.get(name)
        if known is None:
            raise Malformed(f"unknown command {name}")
        state, handler = known
        self.server.statistics.commands[name] += 1
        if state is State.GREETED and self.account:
            raise Malformed(f"{name} after the login")
        if state in (State.LOGGED_IN, State.SELECTED) and not self.account:
            raise Malformed(f"{name} before the login")
        if state is State.SELECTED and not self.selected:
            raise Malformed(f"{name} without a selected mailbox")
        if self.server.delay_s:
            await asyncio.sleep(self.server.delay_s)
        await self._disturb(name, "start")
        text = await handler(self, cursor)
        await self._disturb(name, "end")
        await self.tell(expunges=name not in ("FETCH", "STORE", "SEARCH"))
        await self._tagged("OK", text or "done")
        if name == "STARTTLS":
            await self._start_tls()
        elif name == "COMPRESS":
            await self._start_compress()

    async def _read(self) -> tuple[bytes, list[bytes]]:
        """A whole command: its text without the last CRLF, and its literals."""
        text = b""
        literals: list[bytes] = []
        while True:
            line = await self.wire.line()
            if not line.endswith(b"\r\n"):
                if len(line) >= LONGEST_LINE:
                    self.violation("a line above 64 KiB", line)
                    await self.untagged("BYE line too long")
                    raise Closed
                raise Malformed("a line that does not end in CRLF")
            if len(line) > _POLITE_LINE:
                self.violation("a line above 8,192 bytes", line)
            text += line
            found = _LITERAL_END.search(line)
            if not found:
                return text[:-2], literals
            size, waits = int(found[2]), not found[3]
            if size > _LARGEST_LITERAL:
                self.violation("a literal above 256 MiB", line)
                await self.untagged("BYE literal too large")
                raise Closed
            refusal = self._literal_refusal(text, size)
            if refusal and waits:
                self.tag = text.split(b" ")[0]
                raise Refused(refusal)
            if waits:
                await self.wire.write(b"+ go ahead\r\n")
                await self.wire.flush()
            first = await self.wire.exactly(size // 2)
            await self._disturb(_command_of(text), "literal")
            literals.append(first + await self.wire.exactly(size - len(first)))
            if not waits:
                self._check_unasked(size, line)

    def _check_unasked(self, size: int, line: bytes) -> None:
        if not self.has("LITERAL+") and not self.has("LITERAL-"):
            self.violation("LITERAL+ was not announced", line)
        elif not self.has("LITERAL+") and size > _SMALL_LITERAL:
            self.violation("a literal above 4,096 bytes without waiting, with LITERAL- only", line)

    def _literal_refusal(self, text: bytes, size: int) -> str | None:
        """Whether an APPEND is refused before its message is sent, as good servers do."""
        if _command_of(text) != "APPEND" or not self.account:
            return None
        limit = self.server.append_limit
        if limit is not None and size > limit:
            return f"[TOOBIG] at most {limit} bytes"
        return self.quota_refusal(size) if size > _SMALL_LITERAL else None

    def quota_refusal(self, size: int) -> str | None:
        """What to say if so many bytes more do not fit."""
        quota = self.account.quota_bytes if self.account else None
        if quota is not None and self.account and self.account.used_bytes + size > quota:
            return "[OVERQUOTA] Not enough disk quota"
        return None

    def open(self, folder: Folder, *, read_only: bool) -> None:
        """Select a folder as it stands."""
        uids = list(folder.entries)
        modseq = folder.highest_modseq
        self.selected = Selected(folder, read_only, uids, folder.uid_validity, modseq, modseq)

    def violation(self, what: str, line: bytes = b"") -> None:
        """Note what the client did wrong."""
        self.server.violations.append(f"{what}: {line[:200]!r}" if line else what)

    async def untagged(self, text: str | bytes) -> None:
        """Write an untagged answer."""
        await self.wire.write(b"* %s\r\n" % (text.encode() if isinstance(text, str) else text))

    # rules

    async def _disturb(self, command: str, when: str) -> None:
        for rule in self._rules(command):
            if rule.at_message is None and rule.after_bytes is None and rule.when == when and rule.due():
                await self._act(rule.do)

    async def disturb_message(self, command: str, position: int) -> None:
        """Rules that hit at the `position`-th message (from 1) of a FETCH answer."""
        for rule in self._rules(command):
            if rule.at_message == position and rule.due():
                await self._act(rule.do)

    def _rules(self, command: str | None) -> list[Rule]:
        """Rules for a command (None: whatever the command) and this user."""
        user = self.account.user if self.account else None
        return [
            rule
            for rule in self.server.rules
            if (command is None or rule.command in ("*", command)) and rule.user in (None, user)
        ]

    async def _act(self, action: Action) -> None:
        match action:
            case Bye(text):
                await self.untagged(f"BYE {text}")
                raise Closed
            case Drop():
                raise Closed
            case No(text):
                raise Refused(text)
            case Bad(text):
                raise Confused(text)
            case Stall(seconds):
                await self.wire.flush()
                await asyncio.sleep(seconds)
            case Run(change):
                change(self.server)
            case Pour(head, piece, times, tail):
                await self.wire.write(head)
                count = 0
                while times is None or count < times:
                    await self.wire.write(piece)
                    count += 1
                await self.wire.write(tail)

    async def body(self, data: bytes) -> None:
        """Write a message's bytes, counting them. Drop and Stall cut into them, the rest waits for their end."""
        for rule in self._rules(None):
            if rule.after_bytes is None:
                continue
            left = rule.after_bytes - self.body_bytes
            if 0 <= left < len(data) and rule.due():
                if isinstance(rule.do, Drop | Stall):
                    await self._count(data[:left])
                    data = data[left:]
                    await self._act(rule.do)
                else:
                    self._due_after_message.append(rule)
        await self._count(data)

    async def _count(self, data: bytes) -> None:
        self.body_bytes += len(data)
        self.server.statistics.body_bytes += len(data)
        await self.wire.write(data)

    async def after_message(self) -> None:
        """Rules on a count of bytes that do not cut a literal act once the message is whole."""
        due, self._due_after_message = self._due_after_message, []
        for rule in due:
            await self._act(rule.do)

    # what the client must be told

    async def tell(self, *, expunges: bool) -> None:
        """EXPUNGE, EXISTS and FETCH FLAGS for what others changed in the selected folder."""
        selected = self.selected
        if not selected:
            return
        folder = selected.folder
        if folder.uid_validity != selected.uid_validity:
            await self.untagged(f"BYE [UIDVALIDITY {folder.uid_validity}] mailbox was rebuilt")
            raise Closed
        new: list[int] = []
        if folder.highest_modseq > selected.counted:
            if expunges:
                gone = [n for n, uid in enumerate(selected.uids, 1) if uid not in folder.entries]
                if gone and "QRESYNC" in self.enabled:
                    uids = [selected.uids[number - 1] for number in gone]
                    await self.untagged(f"VANISHED {syntax.compact(uids)}")
                for number in reversed(gone):
                    if "QRESYNC" not in self.enabled:
                        await self.untagged(f"{number} EXPUNGE")
                    del selected.uids[number - 1]
                selected.counted = folder.highest_modseq
            newest = selected.uids[-1] if selected.uids else 0
            new = [uid for uid in folder.entries if uid > newest]
            if new:
                selected.uids += new
                await self.untagged(f"{len(selected.uids)} EXISTS")
        if folder.highest_modseq > selected.modseq:
            known, selected.modseq = selected.modseq, folder.highest_modseq
            for number, uid in enumerate(selected.uids, 1):
                mail = folder.entries.get(uid)
                if mail and mail.modseq > known and uid not in new:
                    await self.untagged(f"{number} FETCH ({self.flag_items(uid, mail)})")

    def flag_list(self, mail: Mail) -> str:
        """Flags as FETCH answers them."""
        recent = ["\\Recent"] if self.server.order.recent else []
        return f"({' '.join([*recent, *sorted(mail.flags)])})"

    async def tell_vanished(self, folder: Folder, since: int, ranges: list[syntax.Range] | None) -> None:
        """VANISHED (EARLIER): what of a set (None: of all) was expunged after a modification number."""
        uids = sorted(uid for uid, modseq in folder.expunged.items() if modseq > since)
        if ranges is not None:
            uids = syntax.members(ranges, uids, folder.uid_next - 1)
        if uids:
            await self.untagged(f"VANISHED (EARLIER) {syntax.compact(uids)}")

    def flag_items(self, uid: int, mail: Mail) -> str:
        """What an unasked FETCH says of changed flags."""
        text = f"UID {uid} FLAGS {self.flag_list(mail)}"
        if "CONDSTORE" in self.enabled and self.selected and self.selected.folder.has_modseq:
            text += f" MODSEQ ({mail.modseq})"
        return text

    async def _start_tls(self) -> None:
        assert self.server.context
        await self.wire.flush()
        await self.wire.start_tls(self.server.context)
        self.secure = True

    async def _start_compress(self) -> None:
        await self.wire.flush()
        self.wire.compress()
        self.compressed = True

    @property
    def mine(self) -> Account:
        """The account; commands that ask for it come after the login."""
        assert self.account
        return self.account

    @property
    def opened(self) -> Selected:
        """The selected folder; commands that ask for it come after SELECT."""
        assert self.selected
        return self.selected

    def chosen(self, cursor: Cursor, *, by_uid: bool) -> list[tuple[int, int]]:
        """Sequence numbers and UIDs of the set that comes next."""
        ranges = cursor.sequence_set()
        known = self.opened.uids
        if by_uid:
            return [(bisect_left(known, uid) + 1, uid) for uid in syntax.members(ranges, known)]
        if any(end is not None and end > len(known) for pair in ranges for end in pair) or not known:
            raise Malformed("a sequence number beyond the mailbox")
        return [(number, known[number - 1]) for number in syntax.members(ranges, range(1, len(known) + 1))]


def _command_of(text: bytes) -> str:
    """The command of a line that may not be whole yet."""
    words = text.split(b" ", 2)
    return words[1].decode("ascii", "replace").upper() if len(words) > 1 else ""
