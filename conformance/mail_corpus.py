"""Mail to import, the same on every run: the corpus of the benches, Gmail's, and messages that break importers."""

from __future__ import annotations

import base64
import datetime
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from conformance.imap_server import Account, GmailAccount

_FIRST = datetime.datetime(2009, 3, 1, 8, 0, 0, tzinfo=datetime.UTC)
_ZONES = [datetime.timezone(datetime.timedelta(minutes=m)) for m in (0, 60, 120, -300, -480, 330, 345)]
_WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "with",
    "as",
    "was",
    "on",
    "are",
    "by",
    "this",
    "be",
    "at",
    "from",
    "have",
    "order",
    "invoice",
    "meeting",
    "draft",
    "budget",
    "project",
    "report",
    "thanks",
    "regards",
    "please",
    "attached",
    "tomorrow",
    "schedule",
    "contract",
    "delivery",
    "review",
    "team",
    "office",
]
KEYWORDS = ("$Forwarded", "$NotJunk", "NonJunk", "$MDNSent", "$Label1", "Invoice")

# Levels of a folder's name. INBOX first; the special ones carry their attribute in SPECIAL_USE.
FOLDERS: tuple[tuple[str, ...], ...] = (
    ("INBOX",),
    ("Sent",),
    ("Drafts",),
    ("Trash",),
    ("Junk",),
    ("Archive",),
    ("Archive", "2019"),
    ("Archive", "2020"),
    ("Work",),
    ("Work", "Projects"),
    ("Work", "Projects", "Lighthouse"),
    ("Work", "R & D"),
    ("Private",),
    ("Private", "Family photos"),
    ("Müller & Söhne",),
    ("Lists", "python-dev"),
    ("Lists", "imap"),
    ("日本語",),
    ("Receipts",),
    ("Old mail",),
)
SPECIAL_USE = {
    "Sent": "\\Sent",
    "Drafts": "\\Drafts",
    "Trash": "\\Trash",
    "Junk": "\\Junk",
    "Archive": "\\Archive",
}


@dataclass(frozen=True, slots=True)
class CorpusMail:
    """A message with where it goes."""

    folder: tuple[str, ...]
    body: bytes
    flags: frozenset[str]
    internal_date: datetime.datetime


class _Writer:
    """Text and attachments cut from pools, so that 234 MB are made in seconds."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        text, width = [], 0
        for word in self.random.choices(_WORDS, k=60_000):
            text.append(word)
            width += len(word) + 1
            text.append("\r\n" if width > 68 else " ")
            width = 0 if width > 68 else width
        self._text = "".join(text).encode()
        packed = base64.encodebytes(b"%PDF-1.4\n" + self.random.randbytes(1_500_000))
        self._base64 = packed.replace(b"\n", b"\r\n")

    def text(self, size: int) -> bytes:
        """About `size` bytes of lines; never fewer."""
        out = bytearray()
        while len(out) < size:
            start = self._text.index(b"\r\n", self.random.randrange(len(self._text) // 2)) + 2
            end = self._text.find(b"\r\n", min(start + size - len(out), len(self._text) - 100))
            out += self._text[start : end + 2]
        return bytes(out)

    def attachment(self, size: int) -> bytes:
        """About `size` bytes of base64 lines."""
        lines = max(1, size // 78)
        whole, rest = divmod(lines, len(self._base64) // 78)
        start = 78 * self.random.randrange(len(self._base64) // 78 - rest)
        return self._base64[: len(self._base64) // 78 * 78] * whole + self._base64[start : start + 78 * rest]

    def message(self, number: int, size: int, date: datetime.datetime, message_id: str | None) -> bytes:
        """A message of about `size` bytes; every third with an attachment."""
        subject = f"{self.random.choice(_WORDS)} {self.random.choice(_WORDS)} {number}"
        if number % 9 == 0:
            subject = f"=?utf-8?b?{base64.b64encode(f'Grüße {number}'.encode()).decode()}?="
        head = [
            f"Date: {date.strftime('%a, %d %b %Y %H:%M:%S %z')}",
            f"From: Sender {number % 97} <sender{number % 97}@example.org>",
            "To: Alice <alice@example.org>",
            f"Subject: {subject}",
            *([f"Message-ID: {message_id}"] if message_id else []),
            "MIME-Version: 1.0",
        ]
        if number % 3 or size < 1500:
            top = "\r\n".join([*head, "Content-Type: text/plain; charset=us-ascii", "", ""]).encode()
            return top + self.text(max(2, size - len(top)))
        boundary = f"=_{number:08x}"
        top = "\r\n".join([*head, f'Content-Type: multipart/mixed; boundary="{boundary}"', "", ""]).encode()
        part = f"--{boundary}\r\nContent-Type: text/plain\r\n\r\n".encode() + self.text(400)
        file = (
            f"--{boundary}\r\nContent-Type: application/pdf\r\nContent-Transfer-Encoding: base64\r\n"
            f'Content-Disposition: attachment; filename="{number}.pdf"\r\n\r\n'
        ).encode()
        end = f"--{boundary}--\r\n".encode()
        fill = size - len(top) - len(part) - len(file) - len(end)
        return b"".join([top, part, file, self.attachment(max(78, fill)), end])


def generate(
    count: int = 5000,
    *,
    folders: int = 20,
    median_bytes: int = 11_000,
    mean_bytes: int = 46_000,
    seed: int = 1,
) -> Iterator[CorpusMail]:
    """Messages of log-normal sizes between 2 KB and 5 MB, over the first of FOLDERS, each with a date of its own.

    Args:
        count: how many.
        folders: over how many folders, 1 to 20; INBOX gets a third.
        median_bytes, mean_bytes: of the sizes, before the cut at both ends.
        seed: another one, another corpus.

    Cost: about 1 s per 100 MB.
    """
    writer = _Writer(seed)
    spread = math.sqrt(2 * math.log(mean_bytes / median_bytes))
    for number in range(count):
        size = round(min(5_000_000, max(2_000, writer.random.lognormvariate(math.log(median_bytes), spread))))
        date = (
            _FIRST + datetime.timedelta(minutes=97 * number + number % 60, seconds=number % 60)
        ).astimezone(_ZONES[number % len(_ZONES)])
        flags = {
            flag
            for flag, chance in (("\\Seen", 0.8), ("\\Answered", 0.2), ("\\Flagged", 0.05))
            if writer.random.random() < chance
        }
        if number % 10 == 0:
            flags.add(KEYWORDS[number // 10 % len(KEYWORDS)])
        place = 0 if number % 3 == 0 else number % folders
        if FOLDERS[place] == ("Drafts",):
            flags.add("\\Draft")
        body = writer.message(number, size, date, f"<{seed}.{number}@mail.example.org>")
        yield CorpusMail(FOLDERS[place], body, frozenset(flags), date)


def fill(account: Account, mails: Iterable[CorpusMail]) -> int:
    """Put a corpus into an account, with the separator, prefix and special folders it has.

    Returns:
        How many messages.
    """
    count = 0
    for mail in mails:
        parts = mail.folder if account.separator else (" ".join(mail.folder),)
        name = account.path(*parts)
        if name not in account.folders:
            account.create(name, *filter(None, [SPECIAL_USE.get(name.removeprefix(account.prefix))]))
        account.add(name, mail.body, flags=mail.flags, internal_date=mail.internal_date)
        count += 1
    return count


_GMAIL_LABELS = (
    "Work",
    "Work/Projects",
    "Receipts",
    "Müller & Söhne",
    'He said "hi"',
    "back\\slash",
    "日本語",
    "Family photos",
)


def fill_gmail(account: GmailAccount, *, seed: int = 1) -> None:
    r"""300 messages that folders show 750 times: 280 in \All, 10 in Spam, 10 in Trash, 450 under labels.

    Ten have no Message-ID and ten share one with the message before them; sizes average 3.8 KB.
    """
    writer = _Writer(seed)
    previous = None
    for number in range(300):
        date = _FIRST + datetime.timedelta(hours=31 * number, seconds=number % 60)
        message_id: str | None = f"<{seed}.{number}@gmail.example.org>"
        if number % 30 == 7:
            message_id = None
        elif number % 30 == 23:
            message_id = previous
        size = round(min(60_000, max(700, writer.random.lognormvariate(math.log(2_400), 0.95))))
        body = writer.message(number, size, date, message_id)
        previous = message_id
        if number >= 290:
            labels = ["\\Trash"]
        elif number >= 280:
            labels = ["\\Junk"]
        else:  # 280 messages: 170 have two labels, 110 one
            labels = ["\\Sent" if number % 5 == 0 else "\\Inbox"]
            if number < 170:
                labels.append(_GMAIL_LABELS[number % len(_GMAIL_LABELS)])
            elif number % 5 == 0:
                labels = [("\\Important", "\\Starred")[number % 2]]
        account.put(
            body,
            *labels,
            flags={"\\Seen"} if number % 4 else set(),
            internal_date=date,
            gm_thrid=None if number % 6 else 1_278_455_344_000_000_000 + number // 12,
        )


def edge_messages(*, large_bytes: int = 60_000_000) -> Mapping[str, bytes]:
    """Messages that break importers, by what is odd about them.

    Args:
        large_bytes: size of the one called `large`.
    """
    head = b"From: a@example.org\r\nTo: b@example.org\r\nSubject: edge\r\n"
    twin = head + b"Message-ID: <twin@example.org>\r\n\r\nthe same twice\r\n"
    return {
        "empty": b"",
        "one byte": b"x",
        "only CRLF": b"\r\n",
        "nul": head + b"\r\nbefore\0after\r\n",
        "eight bit": head + "X-Name: Jürgen\r\n\r\nGrüße, ünencoded\r\n".encode("latin-1"),
        "bare lf": (head + b"\r\nline\r\nline\r\n").replace(b"\r\n", b"\n"),
        "bare cr": head + b"\r\na\rb\r\r\n",
        "no final newline": head + b"\r\nend",
        "header above 64 KB": head
        + b"".join(b"X-Long-%d: %s\r\n" % (n, b"v" * 900) for n in range(80))
        + b"\r\nx\r\n",
        "one header line of 70 KB": head + b"X-Line: " + b"y" * 70_000 + b"\r\n\r\nx\r\n",
        "no message id": head + b"\r\nno id\r\n",
        "no header": b"\r\nno header at all\r\n",
        "no body": head,
        "literal in text": head + b"\r\n* 1 FETCH (BODY[] {5}\r\na1 OK done\r\n",
        "parentheses and quotes": head + b'\r\n)) "((" \\ {3}\r\n',
        "mbox from": b"From a@example.org Thu Jan  1 00:00:00 1970\r\n" + head + b"\r\nx\r\n",
        "dot line": head + b"\r\n.\r\n..\r\n",
        "first twin": twin,
        "second twin": twin,
        "large": head + b"\r\n" + (b"0123456789abcdef" * 4 + b"\r\n") * (large_bytes // 66),
    }


def many_headers(count: int = 100_000) -> bytes:
    """A message with so many header fields."""
    return b"".join(b"X-%d: v\r\n" % number for number in range(count)) + b"\r\nbody\r\n"


def long_line(size: int = 100_000_000) -> bytes:
    """A message that is one line without an end."""
    return b"Subject: " + b"x" * size
