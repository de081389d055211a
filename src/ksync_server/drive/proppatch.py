"""PROPPATCH: each update checked and turned into a step, and the answer that names what became of them."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server import webdav
from ksync_server.drive import tree
from ksync_server.drive.call import Call, Path, Stale, Step, Work, milliseconds
from ksync_server.store import blobs
from ksync_server.store import tables as t
from ksync_server.store.database import Read
from ksync_server.wire import headers as grammar
from ksync_server.wire import xml

_PROTECTED = "{DAV:}cannot-modify-protected-property"
_MS = "{urn:schemas-microsoft-com:}"
_OC = "{http://owncloud.org/ns}"
# Properties that set the modification time; they are live, so no value is stored.
_TIMES = frozenset({"{DAV:}getlastmodified", "{DAV:}lastmodified", f"{_MS}Win32LastModifiedTime"})
# Every other DAV: name is ours or the standard's; displayname is the name that people see (RFC 4918 §15).
_DEAD_DAV = frozenset({"{DAV:}getcontentlanguage"})
_CHECKSUMS = f"{_OC}checksums"
_PROTECTED_OC = frozenset(f"{_OC}{name}" for name in ("checksums", "fileid", "id", "permissions", "size"))

_SIZES = sa.select(t.node_property.c.name, sa.func.length(t.node_property.c.xml)).where(
    t.node_property.c.node_id == sa.bindparam("node_id")
)
_DROP_PROPERTY = sa.delete(t.node_property).where(
    t.node_property.c.node_id == sa.bindparam("node_id"), t.node_property.c.name == sa.bindparam("name")
)
_ADD_PROPERTY = sa.insert(t.node_property).values(
    node_id=sa.bindparam("node_id"), name=sa.bindparam("name"), xml=sa.bindparam("xml")
)


@dataclass(slots=True)
class _Update:
    """One property that PROPPATCH sets or removes, and what becomes of it."""

    name: str  # Clark
    value: xml.Element | None  # None: remove
    status: int = 200
    precondition: str | None = None


class Patch:
    """The updates of a PROPPATCH in document order, as WsgiDAV goes through them one by one."""

    def __init__(self, call: Call, tx: Read, place: tree.Place) -> None:
        self.updates = [_Update(i.name, i.element if i.set else None) for i in call.instructions]
        self._call = call
        self._tx = tx
        self._path = place.segments
        self._tried: list[Step] = []
        self._applied = 0
        node = place.node
        assert node is not None, "WsgiDAV answered 404 where nothing is"
        self._node = node
        self._sizes: dict[str, int] = dict(tx.fast(_SIZES, {"node_id": node.id}))

    def attempt(self, name: str) -> int:
        """Check the next update.

        Returns:
            200, or the status it is refused with; its propstat says why, the others become 424
            (RFC 4918 §9.2).
        """
        update = self.updates[len(self._tried)]
        assert update.name == name, "WsgiDAV and we read the same document"
        self._tried.append(self._step(update))
        return update.status

    def apply(self) -> Step:
        """The step of the next update; WsgiDAV begins with it when all were accepted."""
        step = self._tried[self._applied]
        self._applied += 1
        return step

    def _step(self, update: _Update) -> Step:
        """What to do for an update; sets its status where it is refused."""
        name, path = update.name, self._path
        if name in _TIMES and update.value is not None:
            mtime_ms = _time_ms(update.value.text)
            if mtime_ms is None:
                update.status = 409
            return lambda work: tree.set_mtime(work.change, work.node_id(path), mtime_ms or 0)
        if name == _CHECKSUMS and update.value is not None:
            return self._check_content(update, update.value)
        if name in _TIMES or name in _PROTECTED_OC or (name.startswith("{DAV:}") and name not in _DEAD_DAV):
            update.status, update.precondition = 403, _PROTECTED
            return lambda work: None
        if update.value is None:
            self._sizes.pop(name, None)
            return lambda work: _drop_property(work, path, name)
        source = xml.serialise(update.value)
        self._sizes[name] = len(source)
        limits = self._call.settings.drive
        if (
            len(source.encode()) > limits.max_property_bytes
            or len(self._sizes) > limits.max_properties
            or sum(self._sizes.values()) > limits.max_dead_bytes
        ):
            update.status = 507
        return lambda work: _set_property(work, path, name, source)

    def _check_content(self, update: _Update, value: xml.Element) -> Step:
        """rclone sends a checksum along with every time it sets: the right one changes nothing."""
        node = self._node
        given = {word.lower() for element in value.walk() for word in element.text.split()}
        if node.blob_id is None:
            update.status = 409
        else:
            content = blobs.content(self._tx, node.blob_id)
            if not given or not given <= {f"sha1:{content.sha1.hex()}", f"md5:{content.md5.hex()}"}:
                update.status = 409

        def step(work: Work) -> None:
            now = work.places[self._path].node
            if now is None or now.blob_id != node.blob_id:
                raise Stale

        return step

    def answer(self, href: str) -> str:
        """The multistatus: one propstat for each status (RFC 4918 §9.2.1)."""
        if any(update.status != 200 for update in self.updates):
            for update in self.updates:
                update.status = 424 if update.status == 200 else update.status
        groups: dict[tuple[int, str | None], dict[str, None]] = {}
        for update in self.updates:
            groups.setdefault((update.status, update.precondition), {})[update.name] = None
        propstats = [
            webdav.propstat(
                status,
                "".join(xml.empty(name) for name in names),
                f"<d:error>{xml.empty(precondition)}</d:error>" if precondition else "",
            )
            for (status, precondition), names in groups.items()
        ]
        return webdav.multistatus([webdav.response(href, "".join(propstats))])


def _set_property(work: Work, path: Path, name: str, source: str) -> None:
    _drop_property(work, path, name)
    work.change.tx.fast(_ADD_PROPERTY, {"node_id": work.node_id(path), "name": name, "xml": source})


def _drop_property(work: Work, path: Path, name: str) -> None:
    work.change.tx.fast(_DROP_PROPERTY, {"node_id": work.node_id(path), "name": name})


def _time_ms(text: str) -> int | None:
    """A time as clients write it: Unix seconds (rclone) or an HTTP date (Windows)."""
    seconds = grammar.parse_oc_mtime(text)
    return milliseconds(grammar.parse_http_date(text) if seconds is None else seconds)
