"""Commands for the key file: which key sets there are, a new one, and the end of an old one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ksync_server.auth import rotation
from ksync_server.cli.output import Answer, command, table

if TYPE_CHECKING:
    from ksync_server.app import Services

_key_id = click.argument("key_id", metavar="ID")


def register(group: click.Group) -> None:
    """Add the group keys."""
    group.add_command(keys)


@click.group()
def keys() -> None:
    """Key sets of the key file: the pepper of what is hashed, the key of what is encrypted."""


@command(keys, "list")
def _keys_list(services: Services) -> Answer:
    """List the key sets, and how many secrets are under each and still open something."""
    with services.database.read() as tx:
        counts = rotation.counts(tx)
    sets = services.keys.sets
    rows: list[dict[str, Any]] = [
        {
            "id": name,
            "in_file": name in sets,
            "current": name == services.keys.current,
            "created_at": (sets[name].created_at or None) if name in sets else None,
            **(counts.get(name) or dict.fromkeys(rotation.KINDS, 0)),
        }
        for name in [*sets, *sorted(set(counts) - set(sets))]
    ]
    text = table(rows, "")
    missing = [row["id"] for row in rows if not row["in_file"]]
    if missing:
        text += (
            f"\nNot in this machine's key file: {', '.join(missing)}. Copy it from the machine that has it."
        )
    return Answer(rows, text)


@command(keys, "holders")
@_key_id
def _keys_holders(services: Services, key_id: str) -> Answer:
    """List the accounts that still have secrets under a key set."""
    with services.database.read() as tx:
        rows = rotation.holders(tx, key_id)
    return Answer(rows, table(rows, f"Nothing is left under {key_id}."))


@command(keys, "rotate")
@click.option(
    "--prepare", is_flag=True, help="Only add the set: copy the file to other machines, then rotate."
)
def _keys_rotate(services: Services, prepare: bool) -> Answer:
    """Make a new key set current, and move what is sealed to it: second factors, secrets of jobs.

    Application passwords move when they are next used, recovery codes when their owner makes new ones.
    """
    path = services.settings.auth.key_file
    if prepare:
        name = rotation.prepare(services.database, services.keys, path)
        return Answer(
            {"id": name, "current": False},
            f"{name} is in {path}, unused. Copy the file to every other machine, then rotate.",
        )
    name, moved = rotation.rotate(services.database, services.keys, path)
    return Answer(
        {"id": name, "current": True, "moved": moved},
        f"{name} is current; {moved} sealed secrets moved to it. Back up {path}.",
    )


@command(keys, "retire")
@_key_id
def _keys_retire(services: Services, key_id: str) -> Answer:
    """Take a key set out of the file for good; refused while anything needs it."""
    path = services.settings.auth.key_file
    rotation.retire(services.database, services.keys, path, key_id)
    return Answer(
        {"id": key_id}, f"{key_id} is gone from {path}. Backups made before need the file as it was."
    )
