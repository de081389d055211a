"""Commands that take a backup of the store and restore one; both work while the server runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ksync_server.auth import keys as keyring
from ksync_server.cli.context import Context, configured
from ksync_server.errors import ConfigError
from ksync_server.store import backup as backups
from ksync_server.store import restore as restores
from ksync_server.store.bundle import Bundle, State, write_file

if TYPE_CHECKING:
    from ksync_server.app import Services
    from ksync_server.settings import Settings

_pass = click.make_pass_decorator(Context)
_as_json = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
_folder = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
_REPORT_S = 0.2  # between two words of progress


def register(group: click.Group) -> None:
    """Add backup and restore."""
    for each in (backup, restore):
        group.add_command(each)


@contextlib.contextmanager
def _services(settings: Settings) -> Iterator[Services]:
    """Services over a store that may not exist yet."""
    from ksync_server.app import build  # imports every product

    settings.blobs.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    services = build(settings)
    try:
        yield services
    finally:
        services.close()


class _Progress:
    """Words on a terminal's standard error, a few a second."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._next = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._shown and (done == total or time.monotonic() > self._next):
            self._next = time.monotonic() + _REPORT_S
            click.echo(f"\r{what}: {done} of {total}\x1b[K", err=True, nl=done == total)


def _fingerprints(keys: keyring.Keys) -> dict[str, str]:
    """What tells two key sets of one name apart, and nothing about the keys."""
    return {
        name: hashlib.sha256(b"ksync key set\0" + each.pepper + each.seal).hexdigest()[:32]
        for name, each in keys.sets.items()
    }


@click.command()
@_folder
@click.option("--keep", type=click.IntRange(1), default=1, show_default=True, help="States that stay there.")
@click.option("--rows-only", is_flag=True, help="No file bytes, only what names them (S3 keeps versions).")
@click.option("--include-keys", is_flag=True, help="Put the key file in: whoever has the backup has it all.")
@configured
@_as_json
@_pass
def backup(
    context: Context, folder: Path, keep: int, rows_only: bool, include_keys: bool, as_json: bool
) -> None:
    """Back the store up into FOLDER while the server runs.

    Files that FOLDER has already are not copied again. The key file is NOT in the backup unless
    --include-keys is given: keep it apart, for without it no application password and no second factor works.
    Mail is not in it either: its folders are backed up as any Maildir.
    """
    with _services(context.settings()) as services:
        made = backups.create(
            services.database,
            services.blobs.extents,
            folder,
            keep=keep,
            with_bytes=not rows_only,
            key_file=services.settings.auth.key_file if include_keys else None,
            key_sets=_fingerprints(services.keys),
            progress=_Progress(),
        )
    manifest = made.state.manifest
    mailboxes = manifest.counts["mailbox"]
    mail_apart = str(services.settings.mail.folders.absolute()) if mailboxes else None
    if as_json:
        answer = {
            "state": made.state.name,
            "copied": made.copied,
            "linked": made.linked,
            "mail_apart": mail_apart,
            **asdict(manifest),
        }
        click.echo(json.dumps(answer))
    else:
        rows = sum(manifest.counts.values())
        click.echo(
            f"Backup {made.state.name} in {folder}: {rows} rows, {manifest.extents} extents with"
            f" {manifest.extent_bytes} bytes" + (f", {made.copied} of them new." if not rows_only else ".")
        )
        if rows_only:
            click.echo("The bytes of the extents are NOT in it: it restores only where they still are.")
        elif made.linked:
            click.echo("It shares files with the store: a copy on another disk is what survives this one.")
        if not include_keys:
            click.echo(f"The key file is NOT in it: keep a copy of {services.settings.auth.key_file} apart.")
        if mail_apart is not None:
            click.echo(f"The mail of {mailboxes} mailboxes is NOT in it: back {mail_apart} up as well.")
    if manifest.damaged:
        count = len(manifest.damaged)
        raise click.ClickException(f"the store itself has lost the bytes of {count} files: run verify")


@click.command()
@_folder
@click.option("--state", help="Which one; the newest where none is named.")
@click.option("--force", is_flag=True, help="Replace a store that is in use.")
@click.option("--quick", is_flag=True, help="Compare sizes of files, not every byte.")
@click.option("--accept-damaged", is_flag=True, help="Restore although the bytes of some files are lost.")
@click.option("--accept-other-keys", is_flag=True, help="Restore although the key file is not the backup's.")
@click.option(
    "--revoke-app-passwords",
    is_flag=True,
    help="Revoke them all, and device passwords, as after an intrusion.",
)
@configured
@_as_json
@_pass
def restore(
    context: Context,
    folder: Path,
    state: str | None,
    force: bool,
    quick: bool,
    accept_damaged: bool,
    accept_other_keys: bool,
    revoke_app_passwords: bool,
    as_json: bool,
) -> None:
    """Put the backup in FOLDER in the place of the store; a server that runs goes on with it.

    Clients are answered 503 for the moment of the switch, and then sync anew. Where the replaced store knows
    it, passwords of applications and devices that were revoked since the backup stay revoked, and accounts
    and mailboxes that were suspended stay suspended.
    """
    settings = context.settings()
    found = Bundle(folder).state(state)
    _place_keys(settings.auth.key_file, found)
    with _services(settings) as services:
        ours = _fingerprints(services.keys)
        other = sorted(name for name, print_ in found.manifest.key_sets.items() if ours.get(name) != print_)
        if other and not accept_other_keys:
            raise ConfigError(
                f"{settings.auth.key_file} is not the key file of this backup (key set {', '.join(other)}):"
                " put the right one there, or give --accept-other-keys; then no application password,"
                " recovery code or second factor of the backup works."
            )
        report = restores.restore(
            services.database,
            services.blobs.extents,
            folder,
            state=found.name,
            force=force,
            check_bytes=not quick,
            accept_damaged=accept_damaged,
            revoke_passwords=revoke_app_passwords,
            progress=_Progress(),
        )
    click.echo(json.dumps(asdict(report)) if as_json else _told(report))


def _place_keys(path: Path, state: State) -> None:
    """On a machine without a key file, that of the backup."""
    if state.manifest.keys_sha256 is not None and not path.exists():
        state.check()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, state.keys.read_bytes())


def _told(report: restores.Restored) -> str:
    taken = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(report.taken_at))
    lines = [
        f"Restored {report.state} as of {taken}: {report.rows} rows, {report.extents_added} extents added.",
        f"Application and device passwords: {report.passwords_active} work,"
        f" {report.passwords_revoked} stayed revoked or were revoked.",
    ]
    if report.passwords_revived:
        lines.append("Work again, unknown to the replaced store: " + ", ".join(report.passwords_revived))
    if report.accounts_reverted:
        lines.append("Password, second factor or state went back for: " + ", ".join(report.accounts_reverted))
    if report.mailboxes_gone:
        lines.append("Mailboxes made since are gone, their mail is in: " + ", ".join(report.mailboxes_gone))
    if report.damaged:
        lines.append(f"The bytes of {len(report.damaged)} files are lost: run verify.")
    if report.jobs_ready:
        lines.append(f"{report.jobs_ready} jobs of the backup run again.")
    return "\n".join(lines)
