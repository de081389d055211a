"""The one folder of a drive that an application password opens: where it lies, as long as it lies there."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server.store import tables as t
from ksync_server.store.database import Read

_DEEPEST = 1000  # folders above one; more would be a circle

_NODE = sa.select(t.node.c.parent_id, t.node.c.name, t.node.c.folder, t.node.c.drive_id).where(
    t.node.c.id == sa.bindparam("id_")
)


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that stands for the whole drive."""

    id: int
    common: bool  # below Common documents; else below the member's private root
    names: tuple[str, ...]  # the way to it from there


def find(tx: Read, folder_id: int, drive_id: int, *, root_id: int, common_id: int) -> Folder | None:
    """Where a folder lies, None where it opens nothing: gone, no folder, in the deleted items or of others.

    Args:
        root_id: the member's private root.
        common_id: Common documents.

    Cost: one indexed row for each level.
    """
    names: list[str] = []
    at = folder_id
    for _ in range(_DEEPEST):
        row = tx.one(_NODE, {"id_": at})
        if row is None or not row[2] or row[3] != drive_id:
            return None
        if at in (root_id, common_id):
            return Folder(folder_id, at == common_id, tuple(reversed(names)))
        parent_id, name = row[:2]
        if parent_id is None:
            return None
        names.append(name)
        at = parent_id
    return None
