"""PROPFIND and the pages that people see: rows in, text out, streamed in key-set pages.

One page of at most 200 rows is one short read; nothing is open while it is sent, so a listing of any size
needs the memory of a page. Nothing is cached.
"""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

import sqlalchemy as sa

from ksync_server import settings as configuration
from ksync_server import webdav
from ksync_server.drive import locks, tree
from ksync_server.drive.transfer import content_type
from ksync_server.errors import Forbidden
from ksync_server.http import Request, Response
from ksync_server.http import xml as xml_response
from ksync_server.store import changes
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Row
from ksync_server.wire import headers as grammar
from ksync_server.wire import xml

_PAGE = 200  # rows read in one go: under 1 ms
_PAGE_BYTES = 1024 * 1024  # text after which a page ends early: locks and dead properties can be large
_D, _OC, _MS = "{DAV:}", "{http://owncloud.org/ns}", "{urn:schemas-microsoft-com:}"

# Columns of a row, in order.
_ID, _NAME, _FOLDER, _SEQ, _SIZE, _TYPE, _MTIME, _CREATED, _SHA1, _MD5 = range(10)

_N = t.node.c
_COLUMNS = (_N.id, _N.name, _N.folder, _N.seq, _N.size, _N.content_type, _N.mtime_ms, _N.created_at)
_P = sa.bindparam
_with_sums = t.node.outerjoin(t.blob, t.blob.c.id == _N.blob_id)
_MEMBERS = (
    sa.select(*_COLUMNS)
    .where(_N.parent_id == _P("parent"), _N.name > _P("after"))
    .order_by(_N.name)
    .limit(_P("most"))
)
_MEMBERS_SUMS = (
    sa.select(*_COLUMNS, t.blob.c.sha1, t.blob.c.md5)
    .select_from(_with_sums)
    .where(_N.parent_id == _P("parent"), _N.name > _P("after"))
    .order_by(_N.name)
    .limit(_P("most"))
)
_ONE = sa.select(*_COLUMNS, t.blob.c.sha1, t.blob.c.md5).select_from(_with_sums).where(_N.id == _P("id_"))
_DEAD_OF_MEMBERS = (
    sa.select(t.node_property.c.node_id, t.node_property.c.name, t.node_property.c.xml)
    .select_from(t.node_property.join(t.node, t.node_property.c.node_id == _N.id))
    .where(_N.parent_id == _P("parent"), _N.name > _P("after"), _N.name <= _P("last"))
)
_DEAD_SIZES = (
    sa.select(_N.name, sa.func.sum(sa.func.length(t.node_property.c.xml)))
    .select_from(t.node_property.join(t.node, t.node_property.c.node_id == _N.id))
    .where(_N.parent_id == _P("parent"), _N.name > _P("after"), _N.name <= _P("last"))
    .group_by(_N.name)
)
_DEAD_OF_ONE = sa.select(t.node_property.c.node_id, t.node_property.c.name, t.node_property.c.xml).where(
    t.node_property.c.node_id == _P("id_")
)


@dataclass(slots=True)
class _Asked:
    """One PROPFIND: what is asked, and what all its entries share."""

    view: tree.View
    href: Callable[[tuple[str, ...]], str]  # quoted path of a decoded one
    etag: str  # of every entry, but for its change number at the end
    find: webdav.Propfind
    infinite: bool
    minimal: bool  # properties that a resource has not are left out
    now: int
    trash: bool = False  # inside the deleted items
    quota: str | None = None  # available bytes
    used: str = ""
    locks: dict[int, tuple[locks.Lock, ...]] = field(default_factory=dict)
    missing: dict[tuple[str, ...], str] = field(default_factory=dict)  # rendered once


# -- text, 10,000 times in a listing --------------------------------------------------------------

_SPACED = re.compile(r"[A-Za-z0-9._~ -]+")


def _quoted(name: str) -> str:
    """`quote_segment`; most names that need it need it for their spaces alone."""
    return name.replace(" ", "%20") if _SPACED.fullmatch(name) else grammar.quote_segment(name)


def _text(name: str) -> str:
    """`xml.escape` for stored names, which `tree.checked_name` let pass: XML can carry all in them."""
    return xml.escape(name) if "&" in name or "<" in name or ">" in name else name


@lru_cache(maxsize=1024)
def _day(day: int) -> str:
    return grammar.http_date(day * 86400)[:17]


_TWO_DIGITS = tuple(f"{number:02}" for number in range(60))


def _http_date(mtime_ms: int) -> str:
    """`http_date`, remembering days instead of seconds: a listing has more of these than a cache has room."""
    day, second = divmod(mtime_ms // 1000, 86400)
    hours, minutes = _TWO_DIGITS[second // 3600], _TWO_DIGITS[second // 60 % 60]
    return f"{_day(day)}{hours}:{minutes}:{_TWO_DIGITS[second % 60]} GMT"


# -- live properties ------------------------------------------------------------------------------
# One function each: a row and what the entries share -> the element, or None where it has no such property.

_COLLECTION = "<d:resourcetype><d:collection/></d:resourcetype>"
_SUPPORTED_LOCK = f"<d:supportedlock>{locks.SUPPORTED_XML}</d:supportedlock>"


def _privileges(*names: str) -> str:
    inner = "".join(f"<d:privilege><d:{name}/></d:privilege>" for name in names)
    return f"<d:current-user-privilege-set>{inner}</d:current-user-privilege-set>"


_ALL_RIGHTS = _privileges("read", "write", "write-content", "write-properties", "bind", "unbind", "unlock")
_TRASH_RIGHTS = _privileges("read", "unbind")
_READ_RIGHTS = _privileges("read")

Render = Callable[[Row, _Asked, tuple[locks.Lock, ...]], str | None]


def _iso(row: Row) -> str:
    return grammar.iso_date(row[_CREATED])


def _checksums(row: Row, _: _Asked, __: object) -> str | None:
    if row[_FOLDER] or row[_SHA1] is None:
        return None
    sums = f"SHA1:{bytes(row[_SHA1]).hex()} MD5:{bytes(row[_MD5]).hex()}"
    return f"<oc:checksums><oc:checksum>{sums}</oc:checksum></oc:checksums>"


def _permissions(row: Row, asked: _Asked, _: object) -> str:
    rights = "DNV" if asked.trash else "DNVCK" if row[_FOLDER] else "DNVW"
    grant = asked.view.grant
    if grant.read_only:
        rights = "G"
    elif grant.folder is not None and row[_ID] == grant.folder.id:
        rights = "CK"
    return f"<oc:permissions>{rights}</oc:permissions>"


def _rights(_: Row, asked: _Asked, __: object) -> str:
    if asked.view.grant.read_only:
        return _READ_RIGHTS
    return _TRASH_RIGHTS if asked.trash else _ALL_RIGHTS


def _own_folders(asked: _Asked) -> tuple[int, ...]:
    """Folders that belong to the drive, or are all that is seen of it: not locked, moved or deleted."""
    grant = asked.view.grant
    return (grant.root_id, grant.trash_id, grant.common_id, grant.folder.id if grant.folder else 0)


def _supported_lock(row: Row, asked: _Asked, _: object) -> str:
    """The drive's own folders take no locks (see `locks.lockable`)."""
    if row[_FOLDER] and row[_ID] in _own_folders(asked):
        return "<d:supportedlock/>"
    return _SUPPORTED_LOCK


def _discovery(_: Row, asked: _Asked, held: tuple[locks.Lock, ...]) -> str:
    if not held:
        return "<d:lockdiscovery/>"
    href = locks.seen(asked.view, asked.href)
    return f"<d:lockdiscovery>{locks.discovery_xml(held, href, asked.now)}</d:lockdiscovery>"


def _file_only(render: Callable[[Row], str]) -> Render:
    return lambda row, _, __: None if row[_FOLDER] else render(row)


def _quota(row: Row, asked: _Asked, _: object) -> str | None:
    if not row[_FOLDER] or asked.quota is None:
        return None
    return f"<d:quota-available-bytes>{asked.quota}</d:quota-available-bytes>"


def _used(row: Row, asked: _Asked, _: object) -> str | None:
    """Of the drive; nobody who sees one folder of it is told how much lies in the others."""
    if asked.view.grant.folder is not None:
        return None
    return f"<d:quota-used-bytes>{asked.used}</d:quota-used-bytes>" if row[_FOLDER] else None


_RFC4918: dict[str, Render] = {
    _D + "resourcetype": lambda row, _, __: _COLLECTION if row[_FOLDER] else "<d:resourcetype/>",
    _D + "displayname": lambda row, _, __: f"<d:displayname>{_text(row[_NAME])}</d:displayname>",
    _D + "getcontentlength": _file_only(lambda row: f"<d:getcontentlength>{row[_SIZE]}</d:getcontentlength>"),
    _D + "getlastmodified": lambda row, _, __: (
        f"<d:getlastmodified>{_http_date(row[_MTIME])}</d:getlastmodified>"
    ),
    _D + "getetag": lambda row, asked, _: f'<d:getetag>"{asked.etag}{row[_SEQ]}"</d:getetag>',
    _D + "getcontenttype": _file_only(
        lambda row: f"<d:getcontenttype>{xml.escape(content_type(row[_NAME], row[_TYPE]))}</d:getcontenttype>"
    ),
    _D + "creationdate": lambda row, _, __: f"<d:creationdate>{_iso(row)}</d:creationdate>",
    _D + "supportedlock": _supported_lock,
    _D + "lockdiscovery": _discovery,
}
_NAMED_ONLY: dict[str, Render] = {
    _D + "quota-available-bytes": _quota,
    _D + "quota-used-bytes": _used,
    _D + "lastmodified": lambda row, _, __: f"<d:lastmodified>{row[_MTIME] // 1000}</d:lastmodified>",
    _D + "current-user-privilege-set": _rights,
    _D + "supported-report-set": lambda *_: "<d:supported-report-set/>",
    _OC + "checksums": _checksums,
    _OC + "fileid": lambda row, _, __: f"<oc:fileid>{row[_ID]}</oc:fileid>",
    _OC + "id": lambda row, _, __: f"<oc:id>{row[_ID]}</oc:id>",
    _OC + "permissions": _permissions,
    _OC + "size": _file_only(lambda row: f"<oc:size>{row[_SIZE]}</oc:size>"),
    _MS + "Win32LastModifiedTime": lambda row, _, __: (
        f"<ms:Win32LastModifiedTime>{_http_date(row[_MTIME])}</ms:Win32LastModifiedTime>"
    ),
}
LIVE: dict[str, Render] = {**_RFC4918, **_NAMED_ONLY}


# -- entries --------------------------------------------------------------------------------------

_OPEN_PROP = "</d:href><d:propstat><d:prop>"
_CLOSE_PROP = f"</d:prop>{webdav.OK}</d:propstat>"
_NO_PROP = f"</d:href><d:propstat><d:prop/>{webdav.OK}</d:propstat></d:response>"


def _not_live(*_: object) -> None:
    """A property that only a client can have stored."""


def _renderers(find: webdav.Propfind) -> list[tuple[str, Render]]:
    """The asked properties in order."""
    if find.kind == "prop":
        return [(name, LIVE.get(name, _not_live)) for name in find.names]
    names = dict.fromkeys((*_RFC4918, *find.names))
    return [(name, LIVE.get(name, _not_live)) for name in names if name in _RFC4918 or find.kind == "allprop"]


def _entry(
    href: str,
    row: Row,
    asked: _Asked,
    renderers: list[tuple[str, Render]],
    held: tuple[locks.Lock, ...],
    dead: dict[str, str] | None,
) -> str:
    """One resource."""
    if asked.find.kind == "propname":
        names = [name for name, render in LIVE.items() if render(row, asked, held) is not None]
        inner = "".join([xml.empty(name) for name in (*names, *(dead or ()))])
        return f"<d:response><d:href>{href}{_OPEN_PROP}{inner}{_CLOSE_PROP}</d:response>"
    texts = [render(row, asked, held) for _, render in renderers]
    if dead:
        texts = [
            dead.get(name) if render is _not_live else text
            for text, (name, render) in zip(texts, renderers, strict=True)
        ]
    absent: list[str] = []
    if None in texts:
        if asked.find.kind == "prop":
            absent = [name for (name, _), text in zip(renderers, texts, strict=True) if text is None]
        texts = [text for text in texts if text is not None]
    found = cast("list[str]", texts)  # None was taken out
    if dead and asked.find.kind == "allprop":
        found += [text for name, text in dead.items() if name not in LIVE and name not in asked.find.names]
    missing = ""
    if absent and not asked.minimal:
        key = tuple(absent)
        missing = asked.missing.get(key, "")
        if not missing:
            missing = asked.missing[key] = webdav.missing(key)
    if not found:
        return (
            f"<d:response><d:href>{href}</d:href>{missing}</d:response>"
            if missing
            else (f"<d:response><d:href>{href}{_NO_PROP}")
        )
    return f"<d:response><d:href>{href}{_OPEN_PROP}{''.join(found)}{_CLOSE_PROP}{missing}</d:response>"


# -- folders --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Folder:
    """A folder being listed."""

    id: int
    href: str  # quoted, with its slash
    held: tuple[locks.Lock, ...] = ()  # locks of infinite depth that its members inherit
    shown: tuple[tuple[int, str], ...] = ()  # fixed members: node and name
    hidden: frozenset[str] = frozenset()  # names whose URLs mean something else
    listed: bool = True  # whether its rows are its members
    after: str = ""
    trash: bool = False


def _folder(view: tree.View, place: tree.Place, href: str) -> _Folder:
    """The folder at a place, which exists."""
    node, grant, names = place.chain[-1], view.grant, view.settings
    if grant.folder is not None:
        return _Folder(node.id, href)
    common = ((grant.common_id, names.common_name),)
    if place.two_folders:
        two = ((grant.trash_id, names.trash_name), (grant.root_id, tree.nfc(grant.name)))
        return _Folder(node.id, href, shown=two, listed=False)
    if node.id == grant.root_id:
        hidden = (names.common_name,) if place.names else (names.common_name, names.trash_name, grant.name)
        return _Folder(node.id, href, shown=common, hidden=frozenset(map(tree.nfc, hidden)))
    return _Folder(node.id, href, trash=place.area is tree.Area.TRASH)


def display_name(view: tree.View, node_id: int, name: str) -> str:
    """The name of a node; the drive's own folders have none in their rows."""
    grant = view.grant
    if node_id == grant.root_id:
        return grant.name
    if node_id == grant.trash_id:
        return view.settings.trash_name
    return view.settings.common_name if node_id == grant.common_id else name


def _named(row: Row, name: str) -> Row:
    return (row[0], name, *row[2:])


class _Walk:
    """The entries of one PROPFIND, a page at a time, depth first; memory of a page for each level."""

    def __init__(self, asked: _Asked) -> None:
        self._asked = asked
        self._renderers = _renderers(asked.find)
        kind, names = asked.find.kind, asked.find.names
        self._dead = kind != "prop" or any(name not in LIVE for name in names)
        self._locks = kind != "prop" or _D + "lockdiscovery" in names
        self._members = _MEMBERS_SUMS if kind == "propname" or _OC + "checksums" in names else _MEMBERS
        self._stack: list[_Folder] = []

    @property
    def done(self) -> bool:
        """Whether every page was taken."""
        return not self._stack

    def start(self, tx: Read, place: tree.Place, href: str, *, root: bool, members: bool) -> str:
        """The entry of the place itself, and the first page of its members."""
        asked, view = self._asked, self._asked.view
        node = place.chain[-1]
        asked.trash = place.area is tree.Area.TRASH
        if any(name.startswith(_D + "quota-") for name in asked.find.names) or asked.find.kind == "propname":
            self._read_quota(tx)
        held: tuple[locks.Lock, ...] = ()
        if self._locks:
            held = locks.covering(tx, view.grant.drive_id, place.chain, asked.now)
        text = ""
        if root:
            text = self._single(tx, node.id, display_name(view, node.id, node.name), href, held)
        if members and node.folder:
            folder = _folder(view, place, href)
            folder.held = tuple(lock for lock in held if lock.infinite)
            self._stack.append(folder)
            text += self.page(tx)
        return text

    def _read_quota(self, tx: Read) -> None:
        grant = self._asked.view.grant
        used, _ = tree.usage(tx, grant.drive_id)
        self._asked.used = str(used)
        if grant.quota_bytes is not None:
            self._asked.quota = str(max(grant.quota_bytes - used, 0))

    def _single(self, tx: Read, node_id: int, name: str, href: str, held: tuple[locks.Lock, ...]) -> str:
        row = tx.one(_ONE, {"id_": node_id})
        if row is None:
            return ""
        dead = {key: text for _, key, text in tx.fast(_DEAD_OF_ONE, {"id_": node_id})} if self._dead else None
        return _entry(href, _named(row, name), self._asked, self._renderers, held, dead)

    def page(self, tx: Read) -> str:
        """The next entries: about 200 or a mebibyte, or fewer at the end."""
        if self._locks:
            self._asked.locks = locks.by_node(tx, self._asked.view.grant.drive_id, self._asked.now)
        pieces: list[str] = []
        size = 0
        while self._stack and len(pieces) < _PAGE and size < _PAGE_BYTES:
            size += self._take(tx, self._stack[-1], pieces)
        return "".join(pieces)

    def _take(self, tx: Read, folder: _Folder, pieces: list[str]) -> int:
        """One page of one folder, and its size in characters; folders inside are put on the stack when the
        whole tree is asked."""
        asked, inner = self._asked, list[_Folder]()
        asked.trash = folder.trash
        if not folder.after:
            inner += self._fixed(tx, folder, pieces)
        span = {"parent": folder.id, "after": folder.after, "most": _PAGE}
        rows = tx.fast(self._members, span) if folder.listed else []
        whole = len(rows) < _PAGE
        dead: dict[int, dict[str, str]] = {}
        if self._dead and rows:
            count, dead = self._dead_of(tx, span, rows)
            whole = whole and count == len(rows)
            rows = rows[:count]
        size = 0
        for row in rows:
            if size > _PAGE_BYTES:
                whole = False
                break
            name = folder.after = row[_NAME]
            if name in folder.hidden:
                continue
            href = folder.href + _quoted(name)
            held = folder.held
            if asked.locks:
                held += asked.locks.get(row[_ID], ())
            if row[_FOLDER]:
                href += "/"
                if asked.infinite:
                    below = tuple(lock for lock in held if lock.infinite)
                    inner.append(_Folder(row[_ID], href, below, trash=folder.trash))
            pieces.append(_entry(href, row, asked, self._renderers, held, dead.get(row[_ID])))
            size += len(pieces[-1])
        if whole:
            self._stack.pop()
        self._stack += inner
        return size

    def _fixed(self, tx: Read, folder: _Folder, pieces: list[str]) -> list[_Folder]:
        """The drive's own folders inside one; returns those whose members are asked for."""
        found, asked = [], self._asked
        grant, names = asked.view.grant, asked.view.settings
        for node_id, name in folder.shown:
            asked.trash = node_id == grant.trash_id
            href = folder.href + _quoted(name) + "/"
            held = folder.held + asked.locks.get(node_id, ())
            pieces.append(self._single(tx, node_id, name, href, held))
            inner = _Folder(node_id, href, tuple(lock for lock in held if lock.infinite), trash=asked.trash)
            if node_id == grant.root_id:
                inner.shown = ((grant.common_id, names.common_name),)
                inner.hidden = frozenset((names.common_name,))
            found.append(inner)
        asked.trash = folder.trash
        return found if asked.infinite else []

    def _dead_of(
        self, tx: Read, span: dict[str, object], rows: list[Row]
    ) -> tuple[int, dict[int, dict[str, str]]]:
        """How many of the rows have dead properties that fit into a page, and these; at least one row."""
        span = {**span, "last": rows[-1][_NAME]}
        sizes = {name: int(size) for name, size in tx.fast(_DEAD_SIZES, span)}
        if not sizes:
            return len(rows), {}
        count = size = 0
        for row in rows:
            size += sizes.get(row[_NAME], 0)
            if count and size > _PAGE_BYTES:
                break
            count += 1
        found: dict[int, dict[str, str]] = {}
        for node_id, name, text in tx.fast(_DEAD_OF_MEMBERS, {**span, "last": rows[count - 1][_NAME]}):
            found.setdefault(node_id, {})[name] = text
        return count, found


# -- PROPFIND -------------------------------------------------------------------------------------


async def propfind(
    request: Request,
    database: Database,
    settings: configuration.Settings,
    find: webdav.Propfind,
    depth: int,
    now: int,
    open_place: Callable[[Read], tuple[tree.View, tree.Place]],
) -> Response:
    """A listing, whole where it is one page, else streamed.

    Args:
        find: the parsed body.
        depth: 0, 1 or INFINITY.
        now: Unix seconds.
        open_place: authorizes, checks the If header, and resolves the request's path to a place that exists.

    Raises:
        Forbidden: propfind-finite-depth, where Depth: infinity is switched off (RFC 4918 §9.1.1).
        ClientError: whatever `open_place` raises.

    Spec: RFC 4918 §9.1. Cost: 4 us for each entry, one indexed range for each 200.
    """
    infinite = depth == webdav.INFINITY
    wanted = webdav.prefer(request)

    def first(tx: Read) -> tuple[_Walk, str]:
        view, place = open_place(tx)
        folder = place.chain[-1].folder
        if folder and infinite and settings.drive.finite_depth:
            raise Forbidden("Please list one level at a time.", precondition=_D + "propfind-finite-depth")
        etag = changes.etag(tx.generation, view.grant.collection_id, 0).removesuffix("0")
        asked = _Asked(view, request.href, etag, find, infinite, wanted.minimal, now)
        walk = _Walk(asked)
        href = request.href(place.segments, folder=folder)
        root = not (wanted.depth_noroot and depth and folder)
        return walk, walk.start(tx, place, href, root=root, members=depth > 0)

    walk, text = await database.hot(first)
    start = webdav.OPEN + text
    answer = xml_response(207, start + webdav.CLOSE if walk.done else _rest(database, walk, start))
    answer.headers += webdav.applied(wanted, minimal=True, noroot=depth > 0)
    return answer


async def _rest(database: Database, walk: _Walk, start: str) -> AsyncIterator[bytes]:
    yield start.encode()
    while not walk.done:
        await asyncio.sleep(0)  # others have their turn between two pages
        yield (await database.hot(walk.page)).encode()
    yield webdav.CLOSE.encode()


# -- pages for people -----------------------------------------------------------------------------

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{width:100%;border-collapse:collapse}td,th{padding:.3rem .5rem;text-align:left;"
    "border-bottom:1px solid #8884;overflow-wrap:anywhere}td+td,th+th{white-space:nowrap}"
    ":root{color-scheme:light dark}"
)
PAGE_HEADERS = (
    (b"content-type", b"text/html; charset=utf-8"),
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        b"frame-ancestors 'none'; sandbox allow-downloads allow-same-origin",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"private, no-store"),
)


async def page(
    request: Request, database: Database, view: tree.View, place: tree.Place
) -> AsyncIterator[bytes]:
    """A folder as a web page without scripts; every name escaped (DRV13).

    Cost: as `propfind`.
    """
    href = request.href(place.segments, folder=True)
    title = html.escape(display_name(view, place.chain[-1].id, place.name))
    up = ""
    if place.segments:
        parent = html.escape(request.href(place.segments[:-1], folder=True))
        up = f'<tr><td><a href="{parent}">../</a></td><td></td><td></td></tr>'
    yield (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1><table><thead><tr><th>Name</th><th>Size</th><th>Changed (UTC)</th></tr></thead>"
        f"<tbody>{up}"
    ).encode()
    folder = _folder(view, place, href)
    for _, name in folder.shown:
        yield _page_row(href, name, None, None).encode()
    while folder.listed:
        after = folder.after
        span = {"parent": folder.id, "after": after, "most": _PAGE}
        rows = await database.hot(lambda tx, span=span: tx.fast(_MEMBERS, span))  # type: ignore[misc]
        shown = [row for row in rows if row[_NAME] not in folder.hidden]
        yield "".join(
            [_page_row(href, r[_NAME], None if r[_FOLDER] else r[_SIZE], r[_MTIME]) for r in shown]
        ).encode()
        if len(rows) < _PAGE:
            break
        folder.after = rows[-1][_NAME]
        await asyncio.sleep(0)
    yield b"</tbody></table></body></html>"


def _page_row(base: str, name: str, size: int | None, mtime_ms: int | None) -> str:
    slash = "/" if size is None else ""
    href = html.escape(base + _quoted(name) + slash)
    changed = grammar.iso_date(mtime_ms // 1000).replace("T", " ").rstrip("Z") if mtime_ms is not None else ""
    shown = "" if size is None else f"{size:,}"
    return (
        f'<tr><td><a href="{href}">{html.escape(name)}{slash}</a></td><td>{shown}</td><td>{changed}</td></tr>'
    )
