"""Which folder goes where: pure rules over what both sides list.

INBOX goes to INBOX. A folder with a use (Sent, Drafts ...) goes to the destination's folder of that use, told
by SPECIAL-USE (RFC 6154) or else by its name in some language. Any other keeps its name, with the
destination's separator and prefix.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ksync_server.errors import BadRequest
from ksync_server.mailimport.sinks import Place

ROLES = ("\\sent", "\\drafts", "\\junk", "\\trash", "\\archive")
ALL, FLAGGED, IMPORTANT = "\\all", "\\flagged", "\\important"

_STANDARD = {
    "\\sent": "Sent",
    "\\drafts": "Drafts",
    "\\junk": "Junk",
    "\\trash": "Trash",
    "\\archive": "Archive",
}
_NAMES = {
    "\\sent": "sent|sent items|sent mail|sent messages|sent-mail|gesendet|gesendete elemente"
    "|gesendete objekte|gesendete nachrichten|envoyés|messages envoyés"
    "|éléments envoyés|objets envoyés|inviata|posta inviata"
    "|inviati|enviados|elementos enviados|mensajes enviados|itens enviados|verzonden|verzonden items|skickat"
    "|sendt|lähetetyt|wysłane|odeslaná pošta|отправленные|已发送|送信済み",
    "\\drafts": "drafts|draft|entwürfe|brouillons|bozze|borradores|rascunhos|concepten|utkast|kladder"
    "|luonnokset|kopie robocze|koncepty|черновики|草稿|下書き",
    "\\junk": "junk|junk e-mail|junk email|junk mail|spam|bulk mail|spamverdacht|unerwünscht"
    "|unerwünschte werbung|courrier indésirable|indésirables"
    "|pourriel|posta indesiderata|correo no deseado|lixo eletrônico"
    "|ongewenste e-mail|skräppost|uønsket post|roskaposti|wiadomości-śmieci|спам|垃圾邮件|迷惑メール",
    "\\trash": "trash|bin|deleted|deleted items|deleted messages|papierkorb|gelöscht|gelöschte elemente"
    "|gelöschte objekte|corbeille|éléments supprimés|cestino|posta eliminata|papelera|elementos eliminados"
    "|lixeira|itens excluídos|prullenbak|verwijderde items|papperskorg|papirkurv|roskakori|kosz|koš|корзина"
    "|удаленные|已删除|ゴミ箱",
    "\\archive": "archive|archives|archiv|archivio|archivo|arquivo|archief|arkiv|arkisto|archiwum|архив|归档",
}
_ROLE_OF = {name: role for role, names in _NAMES.items() for name in names.split("|")}


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of the source, as LIST and STATUS say."""

    name: str
    separator: str
    attributes: frozenset[str]  # lower case
    uid_validity: int = 0
    uid_next: int = 0
    messages: int = 0
    modseq: int = 0  # 0 = the server has none
    size: int | None = None  # bytes; None = the server does not say without being asked for each message
    wire: bytes = b""  # the name as the server has it; "" = as `name` says


@dataclass(frozen=True, slots=True)
class Options:
    """How an import is done; small values, kept with it."""

    into: str = ""  # everything goes below this folder
    only: tuple[str, ...] = ()  # patterns of folders; none = all
    skip: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()  # (folder of the source, folder of the destination)
    gmail: str = "message"  # message: each one fetched once, labels by reference; folder: as any other server
    bodies: bool = False  # read every body again at the destination, for the proof


@dataclass(frozen=True, slots=True)
class Route:
    """A folder and its destination."""

    folder: Folder
    target: str


class Map:
    """Where folders and labels go at one destination; the same name is given to each of them for good.

    Args:
        places: folders that are there.
        separator: of the destination; "" where it has no subfolders.
        prefix: what every folder but INBOX begins with.
    """

    def __init__(
        self, places: Iterable[Place], separator: str, prefix: str, options: Options, prefix_there: str = ""
    ) -> None:
        self._separator, self._prefix, self._options = separator, prefix, options
        self._source_prefix = prefix_there
        self._renamed = dict(options.rename)
        found = list(places)
        self._there = {place.name.casefold(): place.name for place in found}
        self._roles: dict[str, str] = {}
        for role in ROLES:
            marked = [place.name for place in found if role in place.attributes]
            named = [place.name for place in found if _ROLE_OF.get(self._bare(place.name)) == role]
            self._roles[role] = (marked or named or [prefix + _STANDARD[role]])[0]
        self._given: dict[str, str] = {}
        self._taken: set[str] = {"inbox", *(name.casefold() for name in self._roles.values())}

    def _bare(self, name: str) -> str:
        return name.removeprefix(self._prefix).casefold()

    def role(self, role: str) -> str:
        """The folder of a use."""
        return self.below(self._roles[role]) if self._options.into else self._roles[role]

    def inbox(self) -> str:
        """The folder for what arrives."""
        return self.below("INBOX") if self._options.into else "INBOX"

    def below(self, name: str) -> str:
        """A name under `Options.into`."""
        return self.named((*self._options.into.split("/"), name.removeprefix(self._prefix)))

    def folder(self, folder: Folder, roles: Mapping[str, str]) -> str:
        """Where a folder of the source goes.

        Args:
            roles: folder name -> its use, as `uses` says.
        """
        renamed = self._renamed.get(folder.name)
        if renamed is not None:
            return self.named(tuple(renamed.split("/")))
        if folder.name.upper() == "INBOX":
            return self.inbox()
        role = roles.get(folder.name)
        if role is not None:
            return self.role(role)
        name = folder.name
        if self._source_prefix and name.startswith(self._source_prefix):
            name = name.removeprefix(self._source_prefix)
        parts = name.split(folder.separator) if folder.separator else [name]
        into = self._options.into.split("/") if self._options.into else []
        return self.named((*into, *parts))

    def label(self, label: str) -> str:
        """Where a label of Gmail goes; `/` makes subfolders there."""
        renamed = self._renamed.get(label)
        into = self._options.into.split("/") if self._options.into and renamed is None else []
        return self.named((*into, *(renamed or label).split("/")))

    def named(self, parts: tuple[str, ...]) -> str:
        """A name of the destination for the parts of a path; two paths never get one name."""
        key = "\0".join(parts)
        if key in self._given:
            return self._given[key]
        clean = [self._clean(part) for part in parts if part] or ["_"]
        if clean[0].upper() == "INBOX" and not self._prefix:
            clean[0] = "INBOX"  # Dovecot finds nothing below another spelling of it
        name = self._prefix + (self._separator or "_").join(clean)
        made, count = name, 1
        while made.casefold() in self._taken:
            count += 1
            made = f"{name}-{count}"
        made = self._there.get(made.casefold(), made)
        self._taken.add(made.casefold())
        self._given[key] = made
        return made

    def _clean(self, part: str) -> str:
        cleaned = "".join("_" if mark == self._separator or not mark.isprintable() else mark for mark in part)
        return "_" if set(cleaned) <= {"."} else cleaned


def uses(folders: Iterable[Folder], prefix: str = "") -> dict[str, str]:
    """The use of each folder of the source that has one: name -> role, at most one folder for a role."""
    found: dict[str, str] = {}
    all_folders = list(folders)
    for role in ROLES:
        marked = [folder.name for folder in all_folders if role in folder.attributes]
        named = [
            folder.name
            for folder in all_folders
            if _ROLE_OF.get(folder.name.removeprefix(prefix).casefold()) == role
            and not folder.attributes & {ALL, FLAGGED, IMPORTANT}
        ]
        for name in (marked or named)[:1]:
            found.setdefault(name, role)
    return found


def chosen(folders: Iterable[Folder], options: Options) -> list[Folder]:
    """The folders that are imported, INBOX first.

    Raises:
        BadRequest: the patterns leave none.
    """
    everything = list(folders)
    found = [folder for folder in everything if _is_wanted(folder.name, options)]
    if everything and not found:
        raise BadRequest("No folder is left to import.")
    return sorted(found, key=lambda folder: (folder.name.upper() != "INBOX", folder.name))


def _is_wanted(name: str, options: Options) -> bool:
    if options.only and not any(fnmatch.fnmatchcase(name, each) for each in options.only):
        return False
    return not any(fnmatch.fnmatchcase(name, each) for each in options.skip)


def is_sane(name: str) -> bool:
    """Whether a folder's name may be shown and asked for; others only come from a server that means harm."""
    return bool(name) and len(name) <= 1000 and not any(mark in name for mark in "\0\r\n")


# -- Gmail ------------------------------------------------------------------------------------------

_SYSTEM_LABELS = {"\\inbox": "", "\\sent": "\\sent", "\\draft": "\\drafts", "\\drafts": "\\drafts"}


def label(text: str) -> str:
    """A label as Gmail means it: system labels come with one backslash or two."""
    return "\\" + text.lstrip("\\") if text.startswith("\\") else text


def empty_labels(folders: Iterable[Folder], options: Options) -> list[str]:
    """Labels that no message has: they are folders too."""
    special = {ALL, FLAGGED, IMPORTANT, *ROLES}
    return [
        folder.name
        for folder in folders
        if not folder.messages
        and not special & folder.attributes
        and folder.name.upper() != "INBOX"
        and _is_wanted(folder.name, options)
    ]


def placed(labels: Iterable[str], where: Map, options: Options) -> tuple[str, ...]:
    """The folders of a message in All Mail: one for each label, and the archive where it has none.

    Starred is a flag of the message already; Important is Gmail's own guess.
    """
    found = []
    for each in labels:
        if not each.startswith("\\"):
            if _is_wanted(each, options):
                found.append(where.label(each))
            continue
        role = _SYSTEM_LABELS.get(each.lower())
        if role is not None:
            found.append(where.role(role) if role else where.inbox())
    return tuple(dict.fromkeys(found)) or (where.role("\\archive"),)
