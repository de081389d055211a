"""What checks are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database, Parameters, Read, Write

PAGE = 500  # rows of one snapshot


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, or was until it was repaired."""

    check: str
    subject: str  # e.g. "blob 12"
    text: str
    repaired: bool
    help: str  # what a person can do where no repair is possible


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What a check saw in its snapshot. `fix` returns False when rows moved since, and then did nothing."""

    subject: str
    text: str
    fix: Callable[[], bool] | None = None
    help: str = ""


@dataclass(frozen=True, slots=True)
class Look:
    """What checks look at."""

    database: Database
    blobs: Blobs
    deep: bool = False

    def pages(self, column: sa.ColumnElement[Any], query: sa.Select[Any], start: Any = -1) -> Iterator[Any]:
        """Rows of a query over `:low < column <= :high`, page by page, each page in a snapshot of its own.

        No snapshot is open while a row is looked at: a repair in between sees the newest rows.
        """
        page = sa.select(column.label("at")).where(column > sa.bindparam("low")).order_by(column).limit(PAGE)
        last = sa.select(sa.func.max(page.subquery().c.at))
        low = start
        while True:
            with self.database.read() as tx:
                high = tx.execute(last, {"low": low}).scalar()
                if high is None:
                    return
                rows = tx.execute(query, {"low": low, "high": high}).all()
            yield from rows
            low = high

    def fix(self, change: Callable[[Write], bool]) -> Callable[[], bool]:
        """A repair that is one transaction."""
        return lambda: self.database.write(change)


def every(tx: Read, query: sa.Executable, parameters: Parameters | None = None) -> Sequence[Any]:
    """All rows of a query."""
    return tx.execute(query, parameters).all()


def first(tx: Read, query: sa.Executable, parameters: Parameters | None = None) -> Any:
    """The first row of a query, or None."""
    return tx.execute(query, parameters).first()


Check = Callable[[Look], Iterator[Suspicion]]


def between(column: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """The condition that queries of `Look.pages` need."""
    return sa.and_(column > sa.bindparam("low"), column <= sa.bindparam("high"))
