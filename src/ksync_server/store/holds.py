"""Holds: while one lives, no extent is erased, on any node.

A backup copies what its snapshot names and a restore brings back what nothing names yet; both may take longer
than the reaper's margin. A hold is a row with a lease among the stages, whose prefix no upload has.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator

import sqlalchemy as sa

from ksync_server.errors import ClientError, Unavailable
from ksync_server.store import tables as t
from ksync_server.store.database import Database

PREFIX = "hold-"
_LEASE_S = 600
_NEW = sa.insert(t.stage).values(
    id=sa.bindparam("id_"), lease_until=sa.bindparam("until"), created_at=sa.bindparam("now")
)
_RENEW = (
    sa.update(t.stage)
    .where(t.stage.c.id == sa.bindparam("id_"), t.stage.c.lease_until > sa.bindparam("now"))
    .values(lease_until=sa.bindparam("until"))
    .returning(t.stage.c.id)
)
_DROP = sa.delete(t.stage).where(t.stage.c.id == sa.bindparam("id_"))
_LIVING = (
    sa.select(t.stage.c.id)
    .where(t.stage.c.id.like(f"{PREFIX}%"), t.stage.c.lease_until > sa.bindparam("now"))
    .limit(1)
)


def is_held(database: Database) -> bool:
    """Whether nothing may be erased at this moment.

    Cost: one range of the stages' primary key.
    """
    return bool(database.fast(_LIVING, {"now": int(time.time())}))


class Hold:
    """A hold that renews itself until it is released."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._id = PREFIX + secrets.token_hex(8)
        self._released = threading.Event()
        self._lost = False
        self._set(_NEW)
        self._thread = threading.Thread(target=self._keep, name="hold", daemon=True)
        self._thread.start()

    def _set(self, statement: sa.Executable) -> bool:
        now = int(time.time())
        values = {"id_": self._id, "now": now, "until": now + _LEASE_S}
        return bool(self._database.write(lambda tx: tx.fast(statement, values)))

    def _keep(self) -> None:
        while not self._released.wait(_LEASE_S / 4):
            with contextlib.suppress(ClientError):  # a database that comes back in time has lost nothing
                self._lost = not self._set(_RENEW) or self._lost

    def check(self) -> None:
        """Make sure that nothing was erased since the hold began.

        Raises:
            Unavailable: it could not be renewed in time.
        """
        if self._lost or not self._set(_RENEW):
            raise Unavailable("The database did not answer for too long; please start again.")

    def release(self) -> None:
        """Let the reaper work again."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(ClientError):  # its lease ends by itself
            self._database.write(lambda tx: tx.fast(_DROP, {"id_": self._id}))


@contextlib.contextmanager
def hold(database: Database) -> Iterator[Hold]:
    """Keep every extent for as long as the block runs.

    Raises:
        InsufficientStorage, Unavailable: the database takes no row.
    """
    held = Hold(database)
    try:
        yield held
    finally:
        held.release()
