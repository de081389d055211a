"""Commands that look after what is stored: verify and scrub."""

from __future__ import annotations

import json
from typing import Any

import click

from ksync_server.cli.context import Context, configured
from ksync_server.cli.output import table

_as_json = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")


def register(group: click.Group) -> None:
    """Add verify and scrub."""
    for each in (verify, scrub):
        group.add_command(each)


@click.command()
@click.option("--repair", is_flag=True, help="Put right what can be.")
@click.option("--deep", is_flag=True, help="Read every byte too and compare checksums.")
@configured
@_as_json
@click.pass_obj
def verify(context: Context, repair: bool, deep: bool, as_json: bool) -> None:
    """Compare what is counted or named twice, while the server runs; 1 when something stays wrong."""
    from ksync_server.verify import CHECKS
    from ksync_server.verify import verify as look

    with context.services() as services:
        found = list(look(services.database, services.blobs, repair=repair, deep=deep))
    wrong = [each for each in found if not each.repaired]
    if as_json:
        rows = [
            {
                "check": each.check,
                "subject": each.subject,
                "text": each.text,
                "repaired": each.repaired,
                "help": each.help,
            }
            for each in found
        ]
        click.echo(json.dumps({"ok": not wrong, "checks": list(CHECKS), "findings": rows}))
    else:
        for each in found:
            end = " (repaired)" if each.repaired else f" ({each.help})" if each.help else ""
            click.echo(f"{each.check}: {each.subject} {each.text}{end}")
        repaired = len(found) - len(wrong)
        click.echo(f"{len(CHECKS)} checks: {len(wrong)} faults, {repaired} repaired")
        if any(not each.help for each in wrong) and not repair:
            click.echo("verify --repair puts right what has no remark.")
    if wrong:
        raise SystemExit(1)


@click.command()
@click.option("--all", "everything", is_flag=True, help="Every blob, not only those that are due.")
@configured
@_as_json
@click.pass_obj
def scrub(context: Context, everything: bool, as_json: bool) -> None:
    """Read stored bytes and compare them with their checksums; 1 when some are damaged.

    The job worker does the same all the time, so that each byte is read once in `blobs.scrub_days`.
    """
    import time

    from ksync_server.store import scrub as scrubbing

    with context.services() as services:
        blobs = services.blobs
        before = int(time.time()) - blobs.settings.scrub_days * 86400
        numbers = scrubbing.every(blobs) if everything else scrubbing.due(blobs, before)
        count = size = 0
        damaged: list[dict[str, Any]] = []
        for each in scrubbing.scrubbing(blobs, numbers):
            count, size = count + 1, size + each.size
            if not each.sound:
                damaged.append({"blob": each.id, "bytes": each.size})
    if as_json:
        click.echo(json.dumps({"blobs": count, "bytes": size, "damaged": damaged}))
    else:
        click.echo(f"{count} blobs, {size} bytes read, {len(damaged)} damaged")
        if damaged:
            click.echo(table(damaged, ""))
    if damaged:
        raise SystemExit(1)
