"""The statements of the tree, built once; `tree.py`, `copying.py` and `erasing.py` say when they run."""

from __future__ import annotations

import sqlalchemy as sa

from ksync_server.store import tables as t

_N = t.node.c
COLUMNS = (
    _N.id,
    _N.parent_id,
    _N.name,
    _N.folder,
    _N.seq,
    _N.size,
    _N.content_type,
    _N.mtime_ms,
    _N.created_at,
    _N.blob_id,
    _N.entries,
    _N.deleted_at,
    _N.deleted_from_id,
    _N.deleted_name,
)
_P = sa.bindparam

BY_ID = sa.select(*COLUMNS).where(_N.id == _P("id_"))
CHILD = sa.select(*COLUMNS).where(_N.parent_id == _P("parent"), _N.name == _P("name"))
PAGE_OF = (
    sa.select(*COLUMNS)
    .where(_N.parent_id == _P("parent"), _N.name > _P("after"))
    .order_by(_N.name)
    .limit(_P("most"))
)
PARENT_ID = sa.select(_N.parent_id).where(_N.id == _P("id_"))
INSERT = (
    sa.insert(t.node)
    .values(
        drive_id=_P("drive_id"),
        parent_id=_P("parent_id"),
        name=_P("name"),
        folder=_P("folder", type_=sa.Boolean),
        seq=_P("seq"),
        size=_P("size", 0),
        content_type=_P("content_type", None),
        mtime_ms=_P("mtime_ms"),
        created_at=_P("created_at"),
        blob_id=_P("blob_id", None),
        entries=0,
        deleted_at=_P("deleted_at", None),
    )
    .returning(_N.id)
)
CONTENT = (
    sa.update(t.node)
    .where(_N.id == _P("id_"))
    .values(
        seq=_P("seq"),
        size=_P("size"),
        content_type=_P("content_type"),
        mtime_ms=_P("mtime_ms"),
        blob_id=_P("blob_id"),
    )
)
MEMBERS = (
    sa.update(t.node)
    .where(_N.id == _P("id_"))
    .values(
        entries=_N.entries + _P("by", type_=sa.BigInteger),
        seq=_P("seq"),
        mtime_ms=_P("mtime_ms"),
    )
)
SET_MTIME = sa.update(t.node).where(_N.id == _P("id_")).values(mtime_ms=_P("mtime_ms"))
RELOCATE = (
    sa.update(t.node)
    .where(_N.id == _P("id_"))
    .values(
        parent_id=_P("parent_id"),
        name=_P("name"),
        seq=_P("seq"),
        deleted_at=_P("deleted_at", None),
        deleted_from_id=_P("deleted_from_id", None),
        deleted_name=_P("deleted_name", None),
    )
)
USE = (
    sa.update(t.drive)
    .where(t.drive.c.id == _P("id_"))
    .values(
        used_bytes=t.drive.c.used_bytes + _P("size", type_=sa.BigInteger),
        files=t.drive.c.files + _P("count", type_=sa.BigInteger),
    )
    .returning(t.drive.c.used_bytes, t.drive.c.files)
)
DRIVE = sa.select(t.drive.c.used_bytes, t.drive.c.files).where(t.drive.c.id == _P("id_"))
_page = (
    sa.select(t.node)
    .where(_N.parent_id == _P("parent"), _N.name > _P("after"))
    .order_by(_N.name)
    .limit(_P("most"))
    .subquery("page")
)
COPY_PAGE = (
    sa.insert(t.node)
    .from_select(
        [
            "drive_id",
            "parent_id",
            "name",
            "folder",
            "seq",
            "size",
            "content_type",
            "mtime_ms",
            "created_at",
            "blob_id",
            "entries",
        ],
        sa.select(
            _page.c.drive_id,
            _P("to", type_=t.Id),
            _page.c.name,
            _page.c.folder,
            _P("base", type_=sa.BigInteger) + sa.func.row_number().over(order_by=_page.c.name),
            _page.c.size,
            _page.c.content_type,
            _page.c.mtime_ms,
            _P("now", type_=sa.BigInteger),
            _page.c.blob_id,
            _page.c.entries,
        ),
        include_defaults=False,
    )
    .returning(_N.folder, _N.blob_id, _N.size)
)
_old, _new = t.node.alias("old"), t.node.alias("new")
COPY_PAGE_PROPERTIES = sa.insert(t.node_property).from_select(
    ["node_id", "name", "xml"],
    sa.select(_new.c.id, t.node_property.c.name, t.node_property.c.xml)
    .select_from(
        t.node_property.join(_old, t.node_property.c.node_id == _old.c.id).join(
            _new, _new.c.name == _old.c.name
        )
    )
    .where(
        _old.c.parent_id == _P("parent"),
        _new.c.parent_id == _P("to"),
        _old.c.name > _P("after"),
        _old.c.name <= _P("last"),
    ),
)
COPY_PROPERTIES = sa.insert(t.node_property).from_select(
    ["node_id", "name", "xml"],
    sa.select(_P("to", type_=t.Id), t.node_property.c.name, t.node_property.c.xml).where(
        t.node_property.c.node_id == _P("id_")
    ),
)
FOLDERS_OF = (
    sa.select(_old.c.id, _new.c.id)
    .select_from(_old.join(_new, _new.c.name == _old.c.name))
    .where(
        _old.c.parent_id == _P("parent"),
        _new.c.parent_id == _P("to"),
        _old.c.name > _P("after"),
        _old.c.name <= _P("last"),
        _old.c.folder.is_(sa.true()),
    )
)
_top = sa.select(_N.id).where(_N.parent_id == _P("id_")).cte("subtree", recursive=True)
SUBTREE = _top.union_all(sa.select(_N.id).where(_N.parent_id == _top.c.id))
SUBTREE_SIZE = sa.select(sa.func.count()).select_from(
    sa.select(SUBTREE.c.id).limit(_P("most")).subquery("bounded")
)
CHANGED_BETWEEN = sa.select(_N.id).where(
    _N.drive_id == _P("drive_id"), _N.seq > _P("after"), _N.seq < _P("before")
)
COLLECTION_SEQ = sa.select(t.collection.c.seq).where(t.collection.c.id == _P("id_"))
LOCKED_NODES = sa.select(t.lock.c.node_id).where(t.lock.c.drive_id == _P("drive_id")).distinct()
DROP_LOCKS = sa.delete(t.lock).where(t.lock.c.node_id == _P("id_"))
DROP_NODE = sa.delete(t.node).where(_N.id == _P("id_"))
STAGE_BEAT = sa.update(t.node).where(_N.id == _P("id_")).values(deleted_at=_P("now"))
EXPIRED = (
    sa.select(_N.id, _N.drive_id)
    .where(
        sa.or_(
            sa.and_(_N.parent_id.is_not(None), _N.deleted_at < _P("before")),
            sa.and_(_N.parent_id.is_(None), _N.deleted_at < _P("abandoned")),
        )
    )
    .order_by(_N.deleted_at)
    .limit(_P("most"))
)
SET_ENTRIES = sa.update(t.node).where(_N.id == _P("id_")).values(entries=_P("entries"))
LAST_NAME = sa.select(_N.name).where(_N.parent_id == _P("id_")).order_by(_N.name.desc()).limit(1)
DRIVE_COLLECTION = sa.select(t.drive.c.collection_id).where(t.drive.c.id == _P("id_"))
# What a member, or a former one, has of its own in drives: its folder and its deleted items.
ROOTS_OF = (
    sa.select(_N.id, _N.drive_id)
    .where(_N.parent_id.is_(None), sa.or_(_N.name == _P("root"), _N.name == _P("trash")))
    .order_by(_N.id)
)
DROP_MEMBER = sa.delete(t.drive_member).where(
    t.drive_member.c.drive_id == _P("drive_id"), t.drive_member.c.account_id == _P("account_id")
)
