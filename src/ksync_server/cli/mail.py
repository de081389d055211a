"""Commands for mailboxes, their device passwords, Dovecot, and to try the mail relay."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ksync_server.auth import accounts, device_passwords, directory, mailboxes
from ksync_server.auth.mailboxes import Mailbox
from ksync_server.cli.output import Answer, command, see_account, table
from ksync_server.errors import ConfigError
from ksync_server.mail import dovecot, sender
from ksync_server.store.database import Read, Write

if TYPE_CHECKING:
    from ksync_server.app import Services

T = TypeVar("T")

_address = click.argument("address")
_quota = click.option(
    "--quota-bytes", type=click.IntRange(1), help="What its mail may take; no limit without."
)


def register(group: click.Group) -> None:
    """Add the groups mailbox, device-password and mail."""
    for each in (mailbox, device_password, mail):
        group.add_command(each)


def _change(services: Services, address: str, fn: Callable[[Write, Mailbox], T]) -> T:
    return services.database.write(lambda tx: fn(tx, mailboxes.get(tx, address)))


def _shown(tx: Read, found: Mailbox) -> dict[str, Any]:
    owner = mailboxes.owner_of(tx, found)
    return {
        "address": found.address,
        "organization_id": found.organization_id,
        "sync_id": None if owner is None else owner.sync_id,
        "state": found.state,
        "quota_bytes": found.quota_bytes,
    }


# -- mailbox --------------------------------------------------------------------------------------


@click.group()
def mailbox() -> None:
    """Mailboxes: addresses of an organization."""


@command(mailbox, "create")
@_address
@click.option("--organization", "organization_id", type=int, required=True, help="Whose address it is.")
@click.option("--account", "name", help="Member whose mailbox it is; nobody's without this.")
@_quota
def _mailbox_create(
    services: Services, address: str, organization_id: int, name: str | None, quota_bytes: int | None
) -> Answer:
    """Create an empty mailbox; devices open it with device passwords."""
    hosts = services.settings.hosts.log_in

    def create(tx: Write) -> dict[str, Any]:
        made = mailboxes.create(
            tx,
            services.offers,
            organization_id,
            address,
            account=None if name is None else accounts.get(tx, name, hosts),
            quota_bytes=quota_bytes,
            sync_hosts=hosts,
        )
        return _shown(tx, made)

    row = services.database.write(create)
    return Answer(row, f"{row['address']} is a mailbox; `device-password create` lets a device in.")


@command(mailbox, "list")
@click.option("--organization", "organization_id", type=int, help="Only this one's.")
@click.option("--account", "name", help="Only this account's.")
def _mailbox_list(services: Services, organization_id: int | None, name: str | None) -> Answer:
    """List mailboxes."""
    account = None if name is None else see_account(services, name, lambda tx, account: account)
    with services.database.read() as tx:
        rows = directory.mailboxes(tx, organization_id=organization_id, account=account)
    return Answer(rows, table(rows, "There is no mailbox."))


@command(mailbox, "show")
@_address
def _mailbox_show(services: Services, address: str) -> Answer:
    """Show one mailbox, and where its Maildir is."""
    with services.database.read() as tx:
        found = mailboxes.get(tx, address)
        place = mailboxes.maildir_of(services.settings.mail.folders, found.folder)
        row = _shown(tx, found) | {"maildir": str(place)}
    return Answer(row, table([row], ""))


@command(mailbox, "assign")
@_address
@click.argument("name", metavar="[ACCOUNT]", required=False)
@click.option("--nobody", is_flag=True, help="It waits for somebody, or is shared.")
def _mailbox_assign(services: Services, address: str, name: str | None, nobody: bool) -> Answer:
    """Give a mailbox to a member of its organization; its mail stays, its device passwords go."""
    if (name is None) is not nobody:
        raise click.UsageError("Name an ACCOUNT, or --nobody.")

    def change(tx: Write, found: Mailbox) -> dict[str, Any]:
        account = None if name is None else accounts.get(tx, name, services.settings.hosts.log_in)
        return _shown(tx, mailboxes.assign(tx, found, account))

    row = _change(services, address, change)
    return Answer(row, f"{row['address']} is {row['sync_id'] or 'nobody'}'s.")


@command(mailbox, "quota")
@_address
@_quota
def _mailbox_quota(services: Services, address: str, quota_bytes: int | None) -> Answer:
    """Set what a mailbox may hold; no limit without --quota-bytes."""
    row = _change(
        services, address, lambda tx, found: _shown(tx, mailboxes.set_quota(tx, found, quota_bytes))
    )
    return Answer(row, table([row], ""))


def _set_state(services: Services, address: str, state: str) -> Answer:
    row = _change(services, address, lambda tx, found: _shown(tx, mailboxes.set_state(tx, found, state)))
    return Answer(row, f"{row['address']} is {state}.")


@command(mailbox, "suspend")
@_address
def _mailbox_suspend(services: Services, address: str) -> Answer:
    """Let nobody log in to a mailbox; mail and device passwords stay."""
    return _set_state(services, address, "suspended")


@command(mailbox, "resume")
@_address
def _mailbox_resume(services: Services, address: str) -> Answer:
    """End a suspension."""
    return _set_state(services, address, "active")


@command(mailbox, "delete")
@_address
@click.option("--erase", is_flag=True, help="Erase its mail too; it stays on the disk without this.")
def _mailbox_delete(services: Services, address: str, erase: bool) -> Answer:
    """Delete a mailbox with its device passwords; says where its mail stays."""

    def delete(tx: Write, found: Mailbox) -> Mailbox:
        mailboxes.delete(tx, found, services.settings.accounts.hosted_domains)
        return found

    found = _change(services, address, delete)
    folder = mailboxes.folder_of(services.settings.mail.folders, found.folder)
    text = f"{found.address} is gone."
    kept: str | None = None
    if erase:
        _erase(folder)
    elif folder.exists():
        kept = str(folder)
        text += f" Its mail stays in {kept}."
    return Answer({"address": found.address, "mail_kept": kept}, text)


def _erase(folder: Path) -> None:
    """Raises:
    ConfigError: not all of it could be erased; says where it is.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass  # nobody ever logged in
    except OSError as error:
        raise ConfigError(f"The mailbox is gone, but not its mail in {folder}: {error.strerror}.") from None


# -- device-password ------------------------------------------------------------------------------


@click.group("device-password")
def device_password() -> None:
    """Device passwords: one for each device that reads or sends mail of a mailbox."""


@command(device_password, "create")
@_address
@click.option("--name", required=True, help="What the device is called.")
def _device_password_create(services: Services, address: str, name: str) -> Answer:
    """Create a device password; it is shown now and never again."""
    number, secret = _change(
        services, address, lambda tx, found: device_passwords.create(tx, services.keys, found, name)
    )
    return Answer(
        {"id": number, "secret": secret.shown}, f"{secret.shown}\nShown once; it has the id {number}."
    )


@command(device_password, "list")
@_address
def _device_password_list(services: Services, address: str) -> Answer:
    """List device passwords: when and where each was last used."""
    with services.database.read() as tx:
        rows = directory.device_passwords(tx, mailboxes.get(tx, address).id)
    return Answer(rows, table(rows, "There is no device password."))


@command(device_password, "revoke")
@_address
@click.argument("number", metavar="[ID]", type=int, required=False)
@click.option("--all", "every", is_flag=True, help="Revoke every one.")
def _device_password_revoke(services: Services, address: str, number: int | None, every: bool) -> Answer:
    """Revoke one device password, or all; the next log-in is refused."""
    if (number is None) is not every:
        raise click.UsageError("Name one ID, or --all.")
    count = _change(services, address, lambda tx, found: device_passwords.revoke(tx, found, number))
    return Answer({"revoked": count}, f"Revoked: {count}")


# -- mail -----------------------------------------------------------------------------------------


@click.group()
def mail() -> None:
    """How mail is served, and mail to people."""


@command(mail, "dovecot-config")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="/etc/dovecot/ksync",
    show_default=True,
    help="Folder for dovecot.conf and dovecot.lua.",
)
@click.option("--certificate", type=click.Path(path_type=Path), help="PEM; the first of [tls] without this.")
@click.option("--key", type=click.Path(path_type=Path), help="Its key.")
@click.option(
    "--dovecot",
    "version",
    type=click.Choice(dovecot.VERSIONS),
    help="Version it is for; that of the installed Dovecot without this.",
)
def _mail_dovecot_config(
    services: Services, out: Path, certificate: Path | None, key: Path | None, version: str | None
) -> Answer:
    """Write Dovecot's configuration: no secret is in it."""
    if (certificate is None) is not (key is None):
        raise click.UsageError("--certificate and --key go together.")
    folder, version = out.resolve(), version or dovecot.installed_version()
    texts = dovecot.configuration_files(
        services.settings,
        folder,
        None if certificate is None else certificate.resolve(),
        None if key is None else key.resolve(),
        version=version,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8")
            (folder / name).chmod(0o644)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from None
    written = [str(folder / name) for name in texts]
    text = f"Written for Dovecot {version}: {', '.join(written)}\nStart it: dovecot -c {written[0]}"
    return Answer({"files": written, "dovecot": version}, text)


@command(mail, "test")
@click.argument("address")
def _mail_test(services: Services, address: str) -> Answer:
    """Send a message now and say what the relay answers.

    Raises:
        ConfigError: no relay is configured.
    """
    settings = services.settings.mail
    if not settings.relay:
        raise ConfigError("mail.relay is not set.")
    text = f"This is a test. Mail of {sender.one_line(settings.from_name)} arrives here.\n"
    said = sender.send_now(settings, to=address, subject="Test of the mail relay", text=text)
    where = f"{settings.relay}:{settings.port}"
    return Answer({"relay": where, "answer": said}, f"{where} took it: {said}")
