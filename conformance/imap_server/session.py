"""One connection: commands read strictly, answered from the account's folders, disturbed by the rules."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from conformance.imap_server import fetching, searching, syntax
from conformance.imap_server.accounts import NOW, SPECIAL_USES, Account, Folder, Mail, decoded, matcher, usage
from conformance.imap_server.faults import Action, Bad, Bye, Drop, No, Pour, Rule, Run, Stall
from conformance.imap_server.server import Server
from conformance.imap_server.syntax import Cursor, Malformed
from conformance.imap_server.wire import LONGEST_LINE, Wire

_TAG = re.compile(rb'[^\x00-\x20\x7f-\xff(){%*"\\+]+')
_LITERAL_END = re.compile(rb"(~?)\{(\d+)(\+?)\}\r\n\Z")
_POLITE_LINE = 8192  # RFC 7162 §4: what a client may take for granted
_SMALL_LITERAL = 4096  # RFC 7888 §5
_LARGEST_LITERAL = 256 * 1024 * 1024


class Refused(Exception):
    """A right command that is answered NO; the text follows it."""


class Confused(Exception):
    """A right command that a rule answers with BAD."""


class Closed(Exception):
    """The connection ends here, on purpose."""


@dataclass(slots=True)
class Selected:
    """The selected folder as this client knows it."""

    folder: Folder
    read_only: bool
    uids: list[int]  # by sequence number
    uid_validity: int
    modseq: int  # up to which changes of flags were told


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
        self._seen_tags: set[bytes] = set()
        self._compressed = False
        self._ended = False
        self._rule_bytes: dict[int, int] = {}

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
            while not self._ended:
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
        if state == "greeted" and self.account:
            raise Malformed(f"{name} after the login")
        if state in ("login", "selected") and not self.account:
            raise Malformed(f"{name} before the login")
        if state == "selected" and not self.selected:
            raise Malformed(f"{name} without a selected mailbox")
        if self.server.delay_s:
            await asyncio.sleep(self.server.delay_s)
        await self._disturb(name, "start")
        text = await handler(self, cursor)
        await self._disturb(name, "end")
        await self._told(expunges=name not in ("FETCH", "STORE", "SEARCH"))
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
            literals.append(await self.wire.exactly(size))
            if not waits:
                self._check_unasked(size, line)

    def _check_unasked(self, size: int, line: bytes) -> None:
        if not self.has("LITERAL+") and not self.has("LITERAL-"):
            self.violation("LITERAL+ was not announced", line)
        elif not self.has("LITERAL+") and size > _SMALL_LITERAL:
            self.violation("a literal above 4,096 bytes without waiting, with LITERAL- only", line)

    def _literal_refusal(self, text: bytes, size: int) -> str | None:
        """Whether an APPEND is refused before its message is sent, as good servers do."""
        words = text.split(b" ", 2)
        if len(words) < 2 or words[1].upper() != b"APPEND" or not self.account:
            return None
        limit = self.server.append_limit
        if limit is not None and size > limit:
            return f"[TOOBIG] at most {limit} bytes"
        return self._quota_refusal(size) if size > _SMALL_LITERAL else None

    def _quota_refusal(self, size: int) -> str | None:
        quota = self.account.quota_bytes if self.account else None
        if quota is not None and self.account and self.account.used_bytes + size > quota:
            return "[OVERQUOTA] Not enough disk quota"
        return None

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

    def _rules(self, command: str) -> list[Rule]:
        user = self.account.user if self.account else None
        return [
            rule for rule in self.server.rules if rule.command in ("*", command) and rule.user in (None, user)
        ]

    async def _act(self, action: Action) -> None:
        match action:
            case Bye(text):
                await self.untagged(f"BYE {text}")
                raise Closed
            case Drop():
                await self.wire.flush()
                self.wire.abort()
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
        """Write a message's bytes, counting them; a Drop rule may cut them short."""
        for rule in self._rules("*"):
            if rule.after_bytes is None or rule.command != "*":
                continue
            left = rule.after_bytes - self.body_bytes
            if 0 <= left < len(data) and rule.due():
                if isinstance(rule.do, Drop):
                    await self._count(data[:left])
                    await self._act(rule.do)
                elif isinstance(rule.do, Stall):
                    await self._count(data[:left])
                    await self._act(rule.do)
                    data = data[left:]
                else:
                    self._rule_bytes[id(rule)] = 1
        await self._count(data)

    async def _count(self, data: bytes) -> None:
        self.body_bytes += len(data)
        self.server.statistics.body_bytes += len(data)
        await self.wire.write(data)

    async def after_message(self) -> None:
        """Rules on a count of bytes that do not cut a literal act once the message is whole."""
        for rule in [rule for rule in self.server.rules if id(rule) in self._rule_bytes]:
            del self._rule_bytes[id(rule)]
            await self._act(rule.do)

    # what the client must be told

    async def _told(self, *, expunges: bool) -> None:
        """EXPUNGE, EXISTS and FETCH FLAGS for what others changed in the selected folder."""
        selected = self.selected
        if not selected:
            return
        folder = selected.folder
        if folder.uid_validity != selected.uid_validity:
            await self.untagged(f"BYE [UIDVALIDITY {folder.uid_validity}] mailbox was rebuilt")
            raise Closed
        if expunges:
            gone = [n for n, uid in enumerate(selected.uids, 1) if uid not in folder.entries]
            for number in reversed(gone):
                await self.untagged(f"{number} EXPUNGE")
                del selected.uids[number - 1]
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

    def flag_items(self, uid: int, mail: Mail) -> str:
        """What an unasked FETCH says of changed flags."""
        text = f"UID {uid} FLAGS {_flag_list(mail.flags)}"
        if "CONDSTORE" in self.enabled and self.selected and self.selected.folder.has_modseq:
            text += f" MODSEQ ({mail.modseq})"
        return text

    # any state

    async def capability(self, cursor: Cursor) -> str:
        cursor.end()
        await self.untagged(f"CAPABILITY {self.capabilities()}")
        return ""

    async def noop(self, cursor: Cursor) -> str:
        cursor.end()
        return ""

    async def logout(self, cursor: Cursor) -> str:
        cursor.end()
        await self.untagged("BYE see you")
        self._ended = True
        self.selected = None
        return ""

    async def identify(self, cursor: Cursor) -> str:
        self.need("ID")
        cursor.space()
        if not cursor.take(b"NIL"):

            def value() -> bytes:
                return b"" if cursor.take(b"NIL") else cursor.string()

            pairs = cursor.listed(value, empty=True)
            if len(pairs) % 2 or len(pairs) > 60:
                raise Malformed("ID takes up to 30 pairs")
        cursor.end()
        await self.untagged('ID ("name" "conformance" "version" "1")')
        return ""

    # before the login

    async def starttls(self, cursor: Cursor) -> str:
        cursor.end()
        if self.server.tls != "starttls" or self.secure:
            raise Malformed("STARTTLS was not announced")
        if self.wire.pending():
            self.violation("commands sent behind STARTTLS in the clear")
        return "begin TLS"

    async def _start_tls(self) -> None:
        assert self.server.context
        await self.wire.flush()
        await self.wire.start_tls(self.server.context)
        self.secure = True

    def _private(self) -> None:
        if not self.secure:
            self.violation("a password sent in the clear although LOGINDISABLED")
            raise Refused("[PRIVACYREQUIRED] use STARTTLS first")

    async def login(self, cursor: Cursor) -> str:
        cursor.space()
        user = cursor.text()
        cursor.space()
        password = cursor.text()
        cursor.end()
        self._private()
        return self._log_in(user, password)

    def _log_in(self, user: str, password: str | None, token: str | None = None) -> str:
        found = self.server.accounts.get(user)
        right = found and (
            found.password == password
            if password is not None
            else found.token is not None and found.token == token
        )
        self.account = self.server.login(found if right else None, user)
        if not self.account:
            raise Refused("[AUTHENTICATIONFAILED] Invalid credentials (Failure)")
        return f"[CAPABILITY {self.capabilities()}] welcome"

    async def authenticate(self, cursor: Cursor) -> str:
        cursor.space()
        mechanism = cursor.word()
        if self.secure:
            self.need(f"AUTH={mechanism}")
        self._private()
        if cursor.take(b" "):
            self.need("SASL-IR")
            initial = cursor.astring()
            answer = b"" if initial == b"=" else initial
        else:
            answer = await self._challenge(b"")
        cursor.end()
        try:
            words = base64.b64decode(answer, validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise Malformed("an answer that is not base64 of UTF-8") from error
        if mechanism == "PLAIN":
            parts = words.split("\0")
            if len(parts) != 3:
                raise Malformed("PLAIN takes three parts")
            return self._log_in(parts[1], parts[2])
        found = re.fullmatch("user=([^\x01]+)\x01auth=Bearer ([^\x01]+)\x01\x01", words)
        if not found:
            raise Malformed("XOAUTH2 in another form")
        try:
            return self._log_in(found[1], None, found[2])
        except Refused:
            problem = b'{"status":"400","schemes":"Bearer","scope":"https://mail.example.org/"}'
            if await self._challenge(base64.b64encode(problem)):
                self.violation("an answer to XOAUTH2's error that is not empty")
            raise

    async def _challenge(self, text: bytes) -> bytes:
        await self.wire.write(b"+ %s\r\n" % text)
        await self.wire.flush()
        line = await self.wire.line()
        if not line.endswith(b"\r\n"):
            raise Malformed("a line that does not end in CRLF")
        if line == b"*\r\n":
            raise Malformed("cancelled")
        return line[:-2]

    async def compress(self, cursor: Cursor) -> str:
        self.need("COMPRESS=DEFLATE")
        cursor.space()
        if cursor.word() != "DEFLATE":
            raise Malformed("only DEFLATE")
        cursor.end()
        if self._compressed:
            raise Refused("[COMPRESSIONACTIVE] already")
        if self.wire.pending():
            self.violation("commands sent behind COMPRESS before its answer")
        return "DEFLATE active"

    async def _start_compress(self) -> None:
        await self.wire.flush()
        self.wire.compress()
        self._compressed = True

    async def enable(self, cursor: Cursor) -> str:
        self.need("ENABLE")
        names = []
        while cursor.take(b" "):
            names.append(cursor.word())
        cursor.end()
        if not names:
            raise Malformed("ENABLE without a capability")
        if self.selected:
            raise Malformed("ENABLE with a selected mailbox")
        fresh = [name for name in names if name in ("CONDSTORE", "UTF8=ACCEPT") and self.has(name)]
        self.enabled |= set(fresh)
        await self.untagged(" ".join(["ENABLED", *fresh]))
        return ""

    async def namespace(self, cursor: Cursor) -> str:
        self.need("NAMESPACE")
        cursor.end()
        prefix = syntax.string(syntax.to_utf7(self._mine.prefix)).decode()
        await self.untagged(f"NAMESPACE (({prefix} {self._separator.decode()})) NIL NIL")
        return ""

    # folders

    @property
    def _mine(self) -> Account:
        assert self.account
        return self.account

    @property
    def _separator(self) -> bytes:
        separator = self._mine.separator
        return syntax.string(separator.encode()) if separator else b"NIL"

    def _find(self, cursor: Cursor, problem: str = "[NONEXISTENT] no such mailbox") -> Folder:
        folder = self._mine.find(cursor.mailbox(), utf8=self.utf8)
        if not folder:
            raise Refused(problem)
        return folder

    def _wire_name(self, folder: Folder) -> bytes:
        if folder.wire_name is not None:
            return b"{%d}\r\n%s" % (len(folder.wire_name), folder.wire_name)
        if self.utf8:
            name = folder.name.encode("utf-8", "replace")
            if not re.search(rb"[\x00\r\n]", name):
                return b'"' + re.sub(rb'(["\\])', rb"\\\1", name) + b'"'
        name = syntax.to_utf7(folder.name)
        if self.server.order.literal_everywhere:
            return b"{%d}\r\n%s" % (len(name), name)
        return syntax.string(name)

    def _attributes(self, folder: Folder, special: bool) -> str:
        attributes = {a for a in folder.attributes if special or a not in SPECIAL_USES}
        separator = self._mine.separator
        if self.has("CHILDREN") and not attributes & {"\\HasChildren", "\\HasNoChildren"}:
            above = folder.name + (separator or "")
            has = bool(separator) and any(
                n.startswith(above) and n != folder.name for n in self._mine.folders
            )
            attributes.add("\\HasChildren" if has else "\\HasNoChildren")
        return f"({' '.join(sorted(attributes))})"

    async def list_(self, cursor: Cursor) -> str:
        cursor.space()
        selection: list[str] = []
        if cursor.peek(b"("):
            self.need("LIST-EXTENDED")
            selection = cursor.listed(cursor.word, empty=True)
            cursor.space()
        reference = cursor.mailbox()
        cursor.space()
        if cursor.peek(b"("):
            self.need("LIST-EXTENDED")
            patterns = cursor.listed(cursor.pattern)
        else:
            patterns = [cursor.pattern()]
        returned: list[str] = []
        status: list[str] = []
        if cursor.take(b" RETURN "):
            if not (self.has("LIST-EXTENDED") or self.has("LIST-STATUS") or self.has("SPECIAL-USE")):
                raise Malformed("LIST RETURN was not announced")
            returned, status = self._return_options(cursor)
        cursor.end()
        unknown = set(selection) - {"SUBSCRIBED", "REMOTE", "RECURSIVEMATCH", "SPECIAL-USE"}
        unknown |= set(returned) - {"SUBSCRIBED", "CHILDREN", "SPECIAL-USE", "STATUS"}
        if unknown:
            raise Malformed(f"LIST with {' '.join(sorted(unknown))}")
        if patterns == [b""]:
            await self.untagged(b'LIST (\\Noselect) %s ""' % self._separator)
            return ""
        special = self.has("SPECIAL-USE") and (not returned or "SPECIAL-USE" in returned or bool(selection))
        for folder in self._matching(reference, patterns):
            if "SUBSCRIBED" in selection and not folder.subscribed:
                continue
            if "SPECIAL-USE" in selection and not folder.attributes & set(SPECIAL_USES):
                continue
            attributes = self._attributes(folder, special)
            if folder.subscribed and "SUBSCRIBED" in [*selection, *returned]:
                attributes = attributes.replace("(", "(\\Subscribed ", 1).replace(" )", ")")
            await self.untagged(
                b"LIST %s %s %s" % (attributes.encode(), self._separator, self._wire_name(folder))
            )
            if status and folder.selectable:
                await self._status_of(folder, status)
        return ""

    def _return_options(self, cursor: Cursor) -> tuple[list[str], list[str]]:
        status: list[str] = []

        def option() -> str:
            name = cursor.word()
            if name == "STATUS":
                self.need("LIST-STATUS")
                cursor.space()
                status.extend(cursor.listed(lambda: self._status_item(cursor)))
            return name

        return cursor.listed(option, empty=True), status

    def _matching(self, reference: bytes, patterns: Iterable[bytes]) -> list[Folder]:
        tests = [
            matcher(
                decoded(reference + pattern, utf8=self.utf8),
                self._mine.separator,
            )
            for pattern in patterns
        ]
        return [
            folder for folder in list(self._mine.folders.values()) if any(test(folder.name) for test in tests)
        ]

    async def lsub(self, cursor: Cursor) -> str:
        cursor.space()
        reference = cursor.mailbox()
        cursor.space()
        pattern = cursor.pattern()
        cursor.end()
        for folder in self._matching(reference, [pattern]):
            if folder.subscribed:
                await self.untagged(b"LSUB () %s %s" % (self._separator, self._wire_name(folder)))
        return ""

    def _status_item(self, cursor: Cursor) -> str:
        item = cursor.word()
        if item == "SIZE":
            self.need("STATUS=SIZE")
        elif item == "HIGHESTMODSEQ":
            self.need("CONDSTORE")
        elif item == "APPENDLIMIT":
            self.need("APPENDLIMIT")
        elif item not in ("MESSAGES", "RECENT", "UIDNEXT", "UIDVALIDITY", "UNSEEN"):
            raise Malformed(f"STATUS has no {item}")
        return item

    async def status(self, cursor: Cursor) -> str:
        cursor.space()
        folder = self._find(cursor)
        cursor.space()
        items = cursor.listed(lambda: self._status_item(cursor))
        cursor.end()
        if not folder.selectable:
            raise Refused("[CANNOT] not selectable")
        await self._status_of(folder, items)
        return ""

    async def _status_of(self, folder: Folder, items: Iterable[str]) -> None:
        count, size = usage(folder)
        limit = self.server.append_limit
        values = {
            "MESSAGES": count,
            "RECENT": 0,
            "UIDNEXT": folder.uid_next,
            "UIDVALIDITY": folder.uid_validity,
            "UNSEEN": sum("\\Seen" not in mail.flags for mail in folder.entries.values()),
            "SIZE": size,
            "HIGHESTMODSEQ": folder.highest_modseq if folder.has_modseq else 0,
            "APPENDLIMIT": "NIL" if limit is None else limit,
        }
        if "HIGHESTMODSEQ" in items:
            self.enabled.add("CONDSTORE")
        pairs = " ".join(f"{item} {values[item]}" for item in items)
        await self.untagged(b"STATUS %s (%s)" % (self._wire_name(folder), pairs.encode()))

    async def select(self, cursor: Cursor) -> str:
        return await self._open(cursor, read_only=False)

    async def examine(self, cursor: Cursor) -> str:
        return await self._open(cursor, read_only=True)

    async def _open(self, cursor: Cursor, *, read_only: bool) -> str:
        self.selected = None
        cursor.space()
        folder = self._find(cursor)
        if cursor.take(b" "):
            self.need("CONDSTORE")
            if cursor.listed(cursor.word) != ["CONDSTORE"]:
                raise Malformed("an unknown parameter of SELECT")
            self.enabled.add("CONDSTORE")
        cursor.end()
        if not folder.selectable:
            raise Refused("[CANNOT] not selectable")
        uids = list(folder.entries)
        keywords = {f for m in folder.entries.values() for f in m.flags if not f.startswith("\\")}
        flags = [*syntax.SYSTEM_FLAGS, *sorted(keywords | self.server.known_keywords)]
        permanent = [] if read_only else flags + (["\\*"] if self.server.keywords == "any" else [])
        await self.untagged(f"FLAGS ({' '.join(flags)})")
        await self.untagged(f"OK [PERMANENTFLAGS ({' '.join(permanent)})] kept")
        await self.untagged(f"{len(uids)} EXISTS")
        await self.untagged("0 RECENT")
        unseen = next((n for n, m in enumerate(folder.entries.values(), 1) if "\\Seen" not in m.flags), None)
        if unseen:
            await self.untagged(f"OK [UNSEEN {unseen}] first")
        await self.untagged(f"OK [UIDVALIDITY {folder.uid_validity}] valid")
        await self.untagged(f"OK [UIDNEXT {folder.uid_next}] next")
        if self.has("CONDSTORE"):
            known = folder.has_modseq
            await self.untagged(
                f"OK [HIGHESTMODSEQ {folder.highest_modseq}] highest" if known else "OK [NOMODSEQ] none"
            )
        self.selected = Selected(folder, read_only, uids, folder.uid_validity, folder.highest_modseq)
        return f"[{'READ-ONLY' if read_only else 'READ-WRITE'}] opened"

    async def create(self, cursor: Cursor) -> str:
        cursor.space()
        wire_name = cursor.mailbox()
        cursor.end()
        name = decoded(wire_name, utf8=self.utf8)
        account = self._mine
        if account.separator:
            name = name.removesuffix(account.separator)
        if not name or not name.startswith(account.prefix):
            raise Refused(f"[CANNOT] a name begins with {account.prefix}")
        if name in account.folders:
            raise Refused("[ALREADYEXISTS] there is one")
        account.create(name).subscribed = False
        return ""

    async def delete(self, cursor: Cursor) -> str:
        cursor.space()
        folder = self._find(cursor)
        cursor.end()
        if folder.name == "INBOX" or folder.attributes & {"\\Noselect"}:
            raise Refused("[CANNOT] not this one")
        self._mine.delete(folder.name)
        return ""

    async def subscribe(self, cursor: Cursor) -> str:
        return self._subscribe(cursor, True)

    async def unsubscribe(self, cursor: Cursor) -> str:
        return self._subscribe(cursor, False)

    def _subscribe(self, cursor: Cursor, wanted: bool) -> str:
        cursor.space()
        folder = self._find(cursor)
        cursor.end()
        folder.subscribed = wanted
        return ""

    async def getquotaroot(self, cursor: Cursor) -> str:
        self.need("QUOTA")
        cursor.space()
        folder = self._find(cursor)
        cursor.end()
        await self.untagged(b'QUOTAROOT %s ""' % self._wire_name(folder))
        await self._quota()
        return ""

    async def getquota(self, cursor: Cursor) -> str:
        self.need("QUOTA")
        cursor.space()
        if cursor.astring() != b"":
            raise Refused("[NONEXISTENT] no such quota root")
        cursor.end()
        await self._quota()
        return ""

    async def _quota(self) -> None:
        limit = self._mine.quota_bytes
        used = -(-self._mine.used_bytes // 1024)
        await self.untagged('QUOTA "" ()' if limit is None else f'QUOTA "" (STORAGE {used} {limit // 1024})')

    # uploads

    async def append(self, cursor: Cursor) -> str:
        cursor.space()
        wire_name = cursor.mailbox()
        uploads: list[Mail] = []
        while not cursor.at_end():
            if uploads:
                self.need("MULTIAPPEND")
            cursor.space()
            flags: frozenset[str] = frozenset()
            if cursor.peek(b"("):
                flags = cursor.flags()
                cursor.space()
            date = None
            if cursor.peek(b'"'):
                date = cursor.date_time()
                cursor.space()
            if cursor.take(b"UTF8 ("):
                self.need("UTF8=ACCEPT")
                if not self.utf8 or not cursor.peek(b"~"):
                    raise Malformed("UTF8 (~{n}) needs ENABLE UTF8=ACCEPT")
                body = cursor.literal()
                cursor.expect(b")")
            else:
                if not cursor.peek(b"{"):
                    raise Malformed("a message is a literal")
                body = cursor.literal()
            uploads.append(self._mine.new_mail(body, flags=flags, internal_date=date or NOW))
        if not uploads:
            raise Malformed("APPEND without a message")
        folder = self._mine.find(wire_name, utf8=self.utf8)
        if not folder or not folder.selectable:
            raise Refused("[TRYCREATE] no such mailbox")
        self._check_uploads(uploads)
        uids = [self._mine.append(folder, mail) for mail in uploads]
        self.server.statistics.appends += len(uids)
        if not self.has("UIDPLUS"):
            return ""
        return f"[APPENDUID {folder.uid_validity} {syntax.compact(uids)}] stored"

    def _check_uploads(self, uploads: list[Mail]) -> None:
        """All or none (RFC 3502 §6.3.11)."""
        limit = self.server.append_limit
        for mail in uploads:
            if limit is not None and len(mail.body) > limit:
                raise Refused(f"[TOOBIG] at most {limit} bytes")
            if self.server.refuse_append and (text := self.server.refuse_append(mail.body, mail.flags)):
                raise Refused(text)
            mail.flags = self._permitted(mail.flags)
        if text := self._quota_refusal(sum(len(mail.body) for mail in uploads)):
            raise Refused(text)

    def _permitted(self, flags: frozenset[str]) -> frozenset[str]:
        foreign = {flag for flag in flags if not flag.startswith("\\")} - self.server.known_keywords
        if not foreign or self.server.keywords == "any":
            return flags
        if self.server.keywords == "refused":
            raise Refused(f"invalid keyword {sorted(foreign)[0]}")
        return flags - foreign

    # the selected folder

    @property
    def _open_folder(self) -> Selected:
        assert self.selected
        return self.selected

    def _writable(self) -> Folder:
        if self._open_folder.read_only:
            self.violation("a change of a mailbox opened with EXAMINE")
            raise Refused("[READ-ONLY] opened with EXAMINE")
        return self._open_folder.folder

    def chosen(self, cursor: Cursor, *, by_uid: bool) -> list[tuple[int, int]]:
        """Sequence numbers and UIDs of the set that comes next."""
        ranges = cursor.sequence_set()
        known = self._open_folder.uids
        if by_uid:
            places = {uid: number for number, uid in enumerate(known, 1)}
            return [(places[uid], uid) for uid in syntax.members(ranges, known)]
        if any(end is not None and end > len(known) for pair in ranges for end in pair) or not known:
            raise Malformed("a sequence number beyond the mailbox")
        return [(number, known[number - 1]) for number in syntax.members(ranges, range(1, len(known) + 1))]

    async def check(self, cursor: Cursor) -> str:
        cursor.end()
        return ""

    async def close(self, cursor: Cursor) -> str:
        cursor.end()
        selected = self._open_folder
        if not selected.read_only:
            for uid in self._deleted(selected.folder):
                self._mine.expunge(selected.folder, uid)
        self.selected = None
        return ""

    async def unselect(self, cursor: Cursor) -> str:
        self.need("UNSELECT")
        cursor.end()
        self.selected = None
        return ""

    def _deleted(self, folder: Folder) -> list[int]:
        return [uid for uid, mail in list(folder.entries.items()) if "\\Deleted" in mail.flags]

    async def expunge(self, cursor: Cursor) -> str:
        cursor.end()
        folder = self._writable()
        for uid in self._deleted(folder):
            self._mine.expunge(folder, uid)
        return ""

    async def uid_expunge(self, cursor: Cursor) -> str:
        self.need("UIDPLUS")
        cursor.space()
        chosen = {uid for _, uid in self.chosen(cursor, by_uid=True)}
        cursor.end()
        folder = self._writable()
        for uid in self._deleted(folder):
            if uid in chosen:
                self._mine.expunge(folder, uid)
        return ""

    async def fetch(self, cursor: Cursor) -> str:
        return await fetching.fetch(self, cursor, by_uid=False)

    async def uid_fetch(self, cursor: Cursor) -> str:
        return await fetching.fetch(self, cursor, by_uid=True)

    async def search(self, cursor: Cursor) -> str:
        return await searching.search(self, cursor, by_uid=False)

    async def uid_search(self, cursor: Cursor) -> str:
        return await searching.search(self, cursor, by_uid=True)

    async def store(self, cursor: Cursor) -> str:
        return await self._store(cursor, by_uid=False)

    async def uid_store(self, cursor: Cursor) -> str:
        return await self._store(cursor, by_uid=True)

    async def _store(self, cursor: Cursor, *, by_uid: bool) -> str:
        cursor.space()
        chosen = self.chosen(cursor, by_uid=by_uid)
        cursor.space()
        sign = (cursor.take(b"+") and "+") or (cursor.take(b"-") and "-") or ""
        item = cursor.word()
        if item not in ("FLAGS", "FLAGS.SILENT"):
            raise Malformed(f"STORE of {item}")
        cursor.space()
        if cursor.peek(b"("):
            flags = cursor.flags()
        else:
            flags = frozenset({cursor.flag()})
            while cursor.take(b" "):
                flags |= {cursor.flag()}
        cursor.end()
        folder = self._writable()
        flags = self._permitted(flags)
        for number, uid in chosen:
            mail = folder.entries.get(uid)
            if not mail:
                continue
            wanted = {"+": mail.flags | flags, "-": mail.flags - flags, "": flags}[sign]
            self._mine.set_flags(mail, wanted)
            if item == "FLAGS":
                await self.untagged(f"{number} FETCH ({self.flag_items(uid, mail)})")
            elif "CONDSTORE" in self.enabled and folder.has_modseq:
                await self.untagged(f"{number} FETCH (UID {uid} MODSEQ ({mail.modseq}))")
        self._open_folder.modseq = folder.highest_modseq
        return ""

    async def copy(self, cursor: Cursor) -> str:
        return await self._copy(cursor, by_uid=False, move=False)

    async def uid_copy(self, cursor: Cursor) -> str:
        return await self._copy(cursor, by_uid=True, move=False)

    async def move(self, cursor: Cursor) -> str:
        return await self._copy(cursor, by_uid=False, move=True)

    async def uid_move(self, cursor: Cursor) -> str:
        return await self._copy(cursor, by_uid=True, move=True)

    async def _copy(self, cursor: Cursor, *, by_uid: bool, move: bool) -> str:
        if move:
            self.need("MOVE")
        cursor.space()
        chosen = self.chosen(cursor, by_uid=by_uid)
        cursor.space()
        wire_name = cursor.mailbox()
        cursor.end()
        source = self._writable() if move else self._open_folder.folder
        target = self._mine.find(wire_name, utf8=self.utf8)
        if not target or not target.selectable:
            raise Refused("[TRYCREATE] no such mailbox")
        present = [(uid, source.entries[uid]) for _, uid in chosen if uid in source.entries]
        if not move and (text := self._quota_refusal(sum(len(mail.body) for _, mail in present))):
            raise Refused(text)
        pairs = [(uid, self._mine.copy(mail, target)) for uid, mail in present]
        code = ""
        if pairs and self.has("UIDPLUS"):
            sets = [syntax.compact(side) for side in zip(*pairs, strict=True)]
            code = f"[COPYUID {target.uid_validity} {sets[0]} {sets[1]}]"
        if not move:
            return f"{code} copied".strip()
        if code:
            await self.untagged(f"OK {code} moved")
        for uid, mail in present:
            if source.entries.get(uid) is mail:
                self._mine.expunge(source, uid)
        return ""

    async def idle(self, cursor: Cursor) -> str:
        self.need("IDLE")
        cursor.end()
        await self.wire.write(b"+ idling\r\n")
        await self.wire.flush()
        waiting = asyncio.create_task(self.wire.line())
        try:
            while not (await asyncio.wait({waiting}, timeout=0.05))[0]:
                await self._told(expunges=True)
                await self.wire.flush()
        finally:
            waiting.cancel()
        if waiting.result().upper() != b"DONE\r\n":
            raise Malformed("IDLE ends with DONE")
        return ""


def _flag_list(flags: Iterable[str]) -> str:
    return f"({' '.join(sorted(flags))})"


Handler = Callable[[Session, Cursor], Awaitable[str]]
COMMANDS: dict[str, tuple[str, Any]] = {
    "CAPABILITY": ("any", Session.capability),
    "NOOP": ("any", Session.noop),
    "LOGOUT": ("any", Session.logout),
    "ID": ("any", Session.identify),
    "STARTTLS": ("greeted", Session.starttls),
    "LOGIN": ("greeted", Session.login),
    "AUTHENTICATE": ("greeted", Session.authenticate),
    "COMPRESS": ("login", Session.compress),
    "ENABLE": ("login", Session.enable),
    "NAMESPACE": ("login", Session.namespace),
    "LIST": ("login", Session.list_),
    "LSUB": ("login", Session.lsub),
    "STATUS": ("login", Session.status),
    "SELECT": ("login", Session.select),
    "EXAMINE": ("login", Session.examine),
    "CREATE": ("login", Session.create),
    "DELETE": ("login", Session.delete),
    "SUBSCRIBE": ("login", Session.subscribe),
    "UNSUBSCRIBE": ("login", Session.unsubscribe),
    "GETQUOTAROOT": ("login", Session.getquotaroot),
    "GETQUOTA": ("login", Session.getquota),
    "APPEND": ("login", Session.append),
    "IDLE": ("login", Session.idle),
    "CHECK": ("selected", Session.check),
    "CLOSE": ("selected", Session.close),
    "UNSELECT": ("selected", Session.unselect),
    "EXPUNGE": ("selected", Session.expunge),
    "UID EXPUNGE": ("selected", Session.uid_expunge),
    "FETCH": ("selected", Session.fetch),
    "UID FETCH": ("selected", Session.uid_fetch),
    "SEARCH": ("selected", Session.search),
    "UID SEARCH": ("selected", Session.uid_search),
    "STORE": ("selected", Session.store),
    "UID STORE": ("selected", Session.uid_store),
    "COPY": ("selected", Session.copy),
    "UID COPY": ("selected", Session.uid_copy),
    "MOVE": ("selected", Session.move),
    "UID MOVE": ("selected", Session.uid_move),
}
