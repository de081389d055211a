"""What an account holds: folders of numbered mail, and Gmail's model, where folders are views of labels."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from conformance.imap_server import syntax
from conformance.imap_server.faults import Fault

NOW = datetime.datetime(2024, 2, 29, 12, 0, 0, tzinfo=datetime.UTC)
SPECIAL_USES = ("\\All", "\\Archive", "\\Drafts", "\\Flagged", "\\Important", "\\Junk", "\\Sent", "\\Trash")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a folder as a test compares it. `labels` are those of Gmail, without backslash rules."""

    uid: int
    body: bytes
    flags: frozenset[str]
    internal_date: datetime.datetime
    gm_msgid: int
    labels: frozenset[str]


@dataclass(slots=True, eq=False)
class Mail:
    """A message wherever it is shown. In a plain account it stands in one folder, in Gmail in many."""

    body: bytes
    flags: frozenset[str]
    internal_date: datetime.datetime
    gm_msgid: int
    gm_thrid: int
    labels: frozenset[str] = frozenset()
    modseq: int = 1
    fault: Fault | None = None
    places: dict[Folder, int] = field(default_factory=dict)  # its UID in each folder that shows it


class Folder:
    """Numbered mail under a name. `wire_name` replaces the encoded name where a test wants raw bytes."""

    def __init__(self, account: Account, name: str, uid_validity: int) -> None:
        self._account = account
        self.name = name
        self.wire_name: bytes | None = None
        self.uid_validity = uid_validity
        self.uid_next = 1
        self.attributes: set[str] = set()
        self.subscribed = True
        self.highest_modseq = 1
        self.has_modseq = True  # False: NOMODSEQ, as for a mailbox that cannot keep them
        self.entries: dict[int, Mail] = {}
        self.expunged: dict[
            int, int
        ] = {}  # UIDs that were shown once, and the modification number of their end

    @property
    def messages(self) -> list[Message]:
        """What a test compares, by ascending UID."""
        return [
            Message(uid, mail.body, mail.flags, mail.internal_date, mail.gm_msgid, mail.labels)
            for uid, mail in list(self.entries.items())
        ]

    @property
    def selectable(self) -> bool:
        """Whether it holds mail at all."""
        return "\\Noselect" not in self.attributes

    def show(self, mail: Mail) -> int:
        """Give a mail the next UID here.

        Returns:
            The UID.
        """
        uid, self.uid_next = self.uid_next, self.uid_next + 1
        if not mail.places:
            self._account.used_bytes += len(mail.body)
        self.entries[uid] = mail
        mail.places[self] = uid
        self.highest_modseq = max(self.highest_modseq, mail.modseq)
        return uid

    def hide(self, mail: Mail) -> None:
        """Show a mail no longer."""
        uid = mail.places.pop(self)
        del self.entries[uid]
        self.highest_modseq = self.expunged[uid] = self._account.next_modseq()
        if not mail.places:
            self._account.used_bytes -= len(mail.body)

    def renumber(self, step: int = 1) -> None:
        """A new UIDVALIDITY: the same mail under new UIDs, as after a restore."""
        self.uid_validity += step
        mails = list(self.entries.values())
        self.entries = {}
        self.expunged = {}
        for uid, mail in enumerate(mails, 1):
            self.entries[uid] = mail
            mail.places[self] = uid
        self.uid_next = len(mails) + 1


class Account:
    """Folders under names with `separator`, below `prefix` except INBOX.

    Args:
        user, password: for LOGIN and PLAIN.
        token: for XOAUTH2; None refuses every one.
        separator: None for a server without hierarchy.
        prefix: of every name but INBOX, such as `INBOX.`.
        quota_bytes: largest sum of the folders' bytes; None for no limit. May be raised at any time.
    """

    def __init__(
        self,
        user: str = "alice@example.org",
        password: str = "secret",
        *,
        token: str | None = None,
        separator: str | None = "/",
        prefix: str = "",
        quota_bytes: int | None = None,
    ) -> None:
        self.user = user
        self.password = password
        self.token = token
        self.separator = separator
        self.prefix = prefix
        self.quota_bytes = quota_bytes
        self.used_bytes = 0  # of mail that any folder shows, each once
        self.folders: dict[str, Folder] = {}
        self._uid_validity = 1_700_000_000
        self._modseq = 1
        self._gm_msgid = 1_278_455_344_230_334_865  # beyond 2**60, as Gmail's are
        self.create("INBOX")

    # names

    def path(self, *parts: str) -> str:
        """The full name of a folder from the names of its levels."""
        name = (self.separator or "").join(parts)
        return name if name.upper() == "INBOX" else self.prefix + name

    def find(self, wire_name: bytes, *, utf8: bool = False) -> Folder | None:
        """The folder a client names, INBOX in any case.

        Raises:
            Malformed: the name is neither modified UTF-7 nor, with `utf8`, UTF-8.
        """
        for folder in self.folders.values():
            if folder.wire_name == wire_name:
                return folder
        return self.folders.get(decoded(wire_name, utf8=utf8))

    # content

    def new_mail(
        self,
        body: bytes,
        *,
        flags: Iterable[str] = (),
        internal_date: datetime.datetime = NOW,
        gm_msgid: int | None = None,
        gm_thrid: int | None = None,
        labels: Iterable[str] = (),
        fault: Fault | None = None,
    ) -> Mail:
        """A mail that no folder shows yet."""
        self._gm_msgid += 1
        identity = gm_msgid or self._gm_msgid
        return Mail(
            body,
            frozenset(flags),
            internal_date,
            identity,
            gm_thrid or identity,
            frozenset(labels),
            self.next_modseq(),
            fault,
        )

    def next_modseq(self) -> int:
        """A modification number above all given before."""
        self._modseq += 1
        return self._modseq

    def add(
        self,
        folder: str,
        body: bytes,
        *,
        flags: Iterable[str] = (),
        internal_date: datetime.datetime = NOW,
        fault: Fault | None = None,
    ) -> int:
        """Put a message into a folder, which is made if it is not there.

        Returns:
            Its UID.
        """
        target = self.folders.get(folder) or self.create(folder)
        return target.show(
            self.new_mail(body, flags=flags, internal_date=internal_date, fault=fault),
        )

    def create(self, name: str, *attributes: str) -> Folder:
        """Make a folder, and the levels above it; one that is there is returned."""
        parts = name.split(self.separator) if self.separator else [name]
        for depth in range(1, len(parts) + 1):
            level = (self.separator or "").join(parts[:depth])
            if level not in self.folders and (level == name or level + (self.separator or "") != self.prefix):
                self._uid_validity += 1
                self.folders[level] = Folder(self, level, self._uid_validity)
        self.folders[name].attributes |= set(attributes)
        return self.folders[name]

    def delete(self, name: str) -> None:
        """Remove a folder and what it shows."""
        folder = self.folders.pop(name)
        for mail in list(folder.entries.values()):
            folder.hide(mail)

    def append(self, folder: Folder, mail: Mail) -> int:
        """Show an uploaded mail.

        Returns:
            Its UID.
        """
        return folder.show(mail)

    def copy(self, mail: Mail, target: Folder) -> int:
        """A second mail with the same bytes in `target`.

        Returns:
            Its UID there.
        """
        return target.show(
            self.new_mail(mail.body, flags=mail.flags, internal_date=mail.internal_date, fault=mail.fault)
        )

    def set_flags(self, mail: Mail, flags: Collection[str]) -> None:
        """Replace the flags of a mail, in every folder that shows it."""
        if mail.flags == frozenset(flags):
            return
        mail.flags = frozenset(flags)
        self.touched(mail)

    def touched(self, mail: Mail) -> None:
        """Give a changed mail a new modification number."""
        mail.modseq = self.next_modseq()
        for folder in mail.places:
            folder.highest_modseq = mail.modseq

    def expunge(self, folder: Folder, uid: int) -> None:
        """Remove a message from a folder for good."""
        folder.hide(folder.entries[uid])

    def labels_seen_from(self, folder: Folder, mail: Mail) -> list[str]:
        """X-GM-LABELS of a mail in the selected folder."""
        return []


ENGLISH = {
    "\\All": "All Mail",
    "\\Drafts": "Drafts",
    "\\Flagged": "Starred",
    "\\Important": "Important",
    "\\Junk": "Spam",
    "\\Sent": "Sent Mail",
    "\\Trash": "Trash",
}
GERMAN = {
    "\\All": "Alle Nachrichten",
    "\\Drafts": "Entwürfe",
    "\\Flagged": "Markiert",
    "\\Important": "Wichtig",
    "\\Junk": "Spam",
    "\\Sent": "Gesendet",
    "\\Trash": "Papierkorb",
}
_LABEL_OF_USE = {
    "\\Drafts": "\\Draft",
    "\\Flagged": "\\Starred",
    "\\Important": "\\Important",
    "\\Sent": "\\Sent",
}


class GmailAccount(Account):
    r"""X-GM-EXT-1: one mail with labels, shown in the folder of each label and in \All.

    A mail labelled `\Junk` or `\Trash` is shown in that folder alone, as Gmail does.

    Args:
        user, password, token, quota_bytes: as in `Account`.
        names: the last part of each special folder by its SPECIAL-USE attribute.
        root: the part above them, itself not selectable.
        hidden: special folders that the user's settings hide from IMAP, such as `\All`.
    """

    def __init__(
        self,
        user: str = "alice@example.org",
        password: str = "secret",
        *,
        token: str | None = None,
        names: dict[str, str] = ENGLISH,
        root: str = "[Gmail]",
        hidden: Collection[str] = (),
        quota_bytes: int | None = None,
    ) -> None:
        super().__init__(user, password, token=token, quota_bytes=quota_bytes)
        self._label_folder = {"\\Inbox": "INBOX"}
        self.create(root, "\\Noselect")
        for use, name in names.items():
            label = _LABEL_OF_USE.get(use, use)
            self._label_folder[label] = f"{root}/{name}"
            if use not in hidden:
                self.create(f"{root}/{name}", use)

    def special(self, label: str) -> Folder | None:
        r"""The folder of a system label (`\All`, `\Junk`, `\Sent`, ...), None if it is hidden."""
        return self.folders.get(self._label_folder[label])

    def put(
        self,
        body: bytes,
        *labels: str,
        flags: Iterable[str] = (),
        internal_date: datetime.datetime = NOW,
        gm_msgid: int | None = None,
        gm_thrid: int | None = None,
        fault: Fault | None = None,
    ) -> Mail:
        """Put a message under labels: system labels with one backslash, others as the user names them."""
        mail = self.new_mail(
            body,
            flags=flags,
            internal_date=internal_date,
            gm_msgid=gm_msgid,
            gm_thrid=gm_thrid,
            fault=fault,
        )
        self.set_labels(mail, labels)
        return mail

    def add(
        self,
        folder: str,
        body: bytes,
        *,
        flags: Iterable[str] = (),
        internal_date: datetime.datetime = NOW,
        fault: Fault | None = None,
    ) -> int:
        """Put a message under the label of a folder.

        Returns:
            Its UID there.
        """
        target = self.folders.get(folder) or self.create(folder)
        mail = self.new_mail(body, flags=flags, internal_date=internal_date, fault=fault)
        return self.append(target, mail)

    def append(self, folder: Folder, mail: Mail) -> int:
        """An upload to a folder gets its label."""
        return self.copy(mail, folder)

    def copy(self, mail: Mail, target: Folder) -> int:
        """A copy is one more label on the same mail; into Spam or Trash it leaves the inbox, out of them it returns."""
        label = self._label_of(target)
        left = {"\\Inbox"} if label in ("\\Junk", "\\Trash") else {"\\Junk", "\\Trash"}
        self.set_labels(mail, mail.labels - left | ({label} - {"\\All"}))
        return mail.places[target]

    def expunge(self, folder: Folder, uid: int) -> None:
        """Takes a label away; in All Mail, Spam and Trash the mail itself."""
        mail = folder.entries[uid]
        label = self._label_of(folder)
        if label in ("\\All", "\\Junk", "\\Trash"):
            for place in list(mail.places):
                place.hide(mail)
        else:
            self.set_labels(mail, mail.labels - {label})

    def set_labels(self, mail: Mail, labels: Iterable[str]) -> None:
        """Replace the labels, and show the mail where they say."""
        mail.labels = frozenset(labels)
        mail.modseq = self.next_modseq()
        if "\\Starred" in mail.labels:
            mail.flags |= {"\\Flagged"}
        away = mail.labels & {"\\Junk", "\\Trash"}
        wanted = set()
        for label in sorted(away)[-1:] if away else [*sorted(mail.labels), "\\All"]:
            name = self._label_folder.get(label, label)
            if name not in self.folders and label not in self._label_folder:
                self.create(name)
            if name in self.folders:
                wanted.add(name)
        for folder in [self.folders[name] for name in sorted(wanted)]:
            if folder not in mail.places:
                folder.show(mail)
        for folder in list(mail.places):
            folder.highest_modseq = max(folder.highest_modseq, mail.modseq)
            if folder.name not in wanted:
                folder.hide(mail)

    def _label_of(self, folder: Folder) -> str:
        for label, name in self._label_folder.items():
            if name == folder.name:
                return label
        return folder.name

    def labels_seen_from(self, folder: Folder, mail: Mail) -> list[str]:
        """The label of the selected folder itself is not among them, as at Gmail."""
        return sorted(mail.labels - {self._label_of(folder), "\\Junk", "\\Trash"})


def decoded(wire_name: bytes, *, utf8: bool = False) -> str:
    """A mailbox name of the wire as text; INBOX in capitals.

    Raises:
        Malformed: neither modified UTF-7 nor, with `utf8`, UTF-8.
    """
    if utf8 and not wire_name.isascii():
        try:
            name = wire_name.decode("utf-8")
        except UnicodeDecodeError as error:
            raise syntax.Malformed("a mailbox name that is not UTF-8") from error
    else:
        name = wire_name.decode("ascii", "replace") if utf8 else syntax.from_utf7(wire_name)
    return "INBOX" if name.upper() == "INBOX" else name


def matcher(pattern: str, separator: str | None) -> Callable[[str], bool]:
    """Whether a name fits a LIST pattern with `*` and `%`."""
    level = f"[^{re.escape(separator)}]*" if separator else ".*"
    wild = {"*": ".*", "%": level}
    expression = re.compile("".join(wild.get(c) or re.escape(c) for c in pattern), re.DOTALL)
    inbox = re.compile(expression.pattern, re.DOTALL | re.IGNORECASE)
    return lambda name: bool((inbox if name == "INBOX" else expression).fullmatch(name))


def usage(folder: Folder) -> tuple[int, int]:
    """Messages and bytes of a folder."""
    return len(folder.entries), sum(len(mail.body) for mail in folder.entries.values())
