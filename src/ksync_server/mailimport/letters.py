"""What people are told at the end of an import: by e-mail, and the same words at the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from ksync_server import settings as configuration
from ksync_server.mail import sender
from ksync_server.mailimport import records
from ksync_server.mailimport.records import Import
from ksync_server.store import tables as t
from ksync_server.store.database import Write

_LISTED = 100  # refusals in an e-mail; all of them are in the report
_WIDTH = 77
_STATES = {
    "done": "is complete",
    "incomplete": "has ended, and not everything could be taken over",
    "failed": "has failed",
    "cancelled": "was cancelled",
}


def tell(tx: Write, mail: configuration.Mail, imported: Import, state: str, report: dict[str, Any]) -> None:
    """Queue the e-mail of an import that ended, and of its batch where it was the last one."""
    if mail.relay and imported.notify:
        user = sender.one_line(imported.source["user"])
        subject = f"The import of {user} {_STATES[state]}"
        text = "\n".join(_wrapped(words(imported, state, report)))
        key = f"mail.import {imported.id} {imported.passes}"
        sender.queue(tx, to=imported.notify, subject=subject, text=text, key=key)
    if imported.batch_id is not None:
        _tell_batch(tx, mail, imported.batch_id)


def _tell_batch(tx: Write, mail: configuration.Mail, batch_id: int) -> None:
    """The summary, once all imports of the batch have ended."""
    c = t.mail_batch.c
    # First, so that of two that end at once one waits and sees the other.
    row = tx.execute(
        sa.update(t.mail_batch)
        .where(c.id == batch_id, c.ended_at.is_(None))
        .values(ended_at=None)
        .returning(c.name, c.notify)
    ).first()
    if row is None or records.is_under_way(tx, batch_id):
        return
    imports = records.list_imports(tx, batch=batch_id, limit=100_000)
    records.end_batch(tx, batch_id)
    if mail.relay and row.notify:
        text = "\n".join(_wrapped(batch_words(row.name, imports)))
        subject = f"The imports of {sender.one_line(row.name)} have ended"
        sender.queue(tx, to=row.notify, subject=subject, text=text, key=f"mail.batch {batch_id}")


def words(imported: Import, state: str, report: dict[str, Any]) -> Iterator[str]:
    """An import's end in sentences: the counts, and all that is not as it was."""
    source = imported.source
    yield f"The import of {source['user']} at {source['host']} {_STATES.get(state, state)}."
    yield ""
    if report.get("problem"):
        yield f"Reason: {report['problem']}"
        yield ""
    yield f"Found:         {report['found']}"
    yield f"Copied:        {report['copied']} ({report['copied_bytes'] / 1e6:.1f} MB)"
    if report["linked"]:
        yield f"More labels:   {report['linked']} (no further bytes fetched)"
    yield f"Already there: {report['there']}"
    yield f"Refused:       {report['refused']}"
    if report["gone"]:
        yield f"Deleted there meanwhile: {report['gone']}"
    if report["flags"]:
        yield f"Flags carried: {report['flags']}"
    yield f"Confirmed by the destination: {report['checked']}"
    for note in report["notes"]:
        yield ""
        yield note
    if report["different"]:
        yield ""
        yield f"Not as at the source: {report['different']}"
        yield from (f"- {each}" for each in report["differences"])
    if report["refusals"]:
        yield ""
        yield "Refused messages:"
        for each in report["refusals"][:_LISTED]:
            subject = f", {each['subject']!r}" if each.get("subject") else ""
            yield f"- {each['folder']}, UID {each['uid']}, {each['bytes']} bytes{subject}: {each['reason']}"
        if report["refused"] > _LISTED:
            yield f"- and {report['refused'] - _LISTED} more; the report has them all"


def batch_words(name: str, imports: Sequence[Import]) -> Iterator[str]:
    """A batch's end in sentences: the sums, and a line for each import."""
    yield f"The imports of {name} have ended."
    yield ""
    states = [each.state for each in imports]
    for state in records.ENDED:
        if state in states:
            yield f"{state + ':':<12} {states.count(state)}"
    reports = [each.report or {} for each in imports]
    yield f"messages:    {sum(each.get('copied', 0) for each in reports)} copied,"
    yield f"             {sum(each.get('refused', 0) for each in reports)} refused"
    yield ""
    for each, report in zip(imports, reports, strict=True):
        problem = f": {report['problem']}" if report.get("problem") else ""
        counts = f"{report.get('copied', 0)} of {report.get('found', 0)}"
        yield f"- {each.source['user']} at {each.source['host']}: {each.state}, {counts}{problem}"


def _wrapped(lines: Iterator[str]) -> Iterator[str]:
    """Lines that an e-mail may have; nothing of a foreign server starts a line of its own."""
    for line in lines:
        text = sender.one_line(line) if line.strip() != line or not line.isprintable() else line
        while len(text) > _WIDTH:
            cut = text.rfind(" ", 20, _WIDTH)
            at = cut if cut > 0 else _WIDTH
            yield text[:at]
            text = "  " + text[at:].lstrip()
        yield text
