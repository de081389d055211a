"""Commands for organizations, their members, and drives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ksync_server.auth import accounts, directory, enforcement, organizations
from ksync_server.auth import products as rules
from ksync_server.auth.accounts import Account
from ksync_server.cli import products
from ksync_server.cli.output import Answer, change_account, command, table
from ksync_server.store.database import Write

if TYPE_CHECKING:
    from ksync_server.app import Services

_drive_id = click.argument("drive_id", type=int)
_organization_id = click.argument("organization_id", type=int)
_name = click.argument("name")


def register(group: click.Group) -> None:
    """Add the groups org, offer, product and drive."""
    for each in (org, products.offer, products.product, drive):
        group.add_command(each)


# -- org ------------------------------------------------------------------------------------------


@click.group()
def org() -> None:
    """Organizations and their members."""


@command(org, "create")
@_name
def _org_create(services: Services, name: str) -> Answer:
    """Create an organization."""
    number = services.database.write(lambda tx: organizations.create_organization(tx, name))
    return Answer({"id": number, "name": name}, f"Organization {number}: {name}")


@command(org, "list")
def _org_list(services: Services) -> Answer:
    """List organizations."""
    with services.database.read() as tx:
        rows = directory.organizations(tx)
    return Answer(rows, table(rows, "There is no organization."))


@command(org, "delete")
@_organization_id
def _org_delete(services: Services, organization_id: int) -> Answer:
    """Delete an organization that has no products; its members' accounts stay."""
    services.database.write(lambda tx: organizations.delete_organization(tx, organization_id))
    return Answer({"id": organization_id}, f"Organization {organization_id} is gone.")


@command(org, "require-second-factor")
@_organization_id
@click.argument("state", type=click.Choice(["on", "off"]))
def _org_require_second_factor(services: Services, organization_id: int, state: str) -> Answer:
    """Stop members without a second factor at their next web action until they enrol one.

    Sync and drive programs go on as they are.
    """

    def change(tx: Write) -> list[dict[str, Any]]:
        enforcement.require(tx, organization_id, state == "on")
        return directory.members(tx, organization_id, without_second_factor=True)

    rows = services.database.write(change)
    stopped = [row["sync_id"] for row in rows if row["stopped"]]
    text = f"Organization {organization_id}: a second factor is {'' if state == 'on' else 'not '}required."
    if stopped:
        text += f" Stopped until they enrol one: {', '.join(stopped)}."
    return Answer({"organization_id": organization_id, "required": state == "on", "stopped": stopped}, text)


@org.group("member")
def org_member() -> None:
    """Members of an organization."""


@command(org_member, "add")
@_organization_id
@_name
@click.option("--role", type=click.Choice(organizations.ROLES), default="collaborator", show_default=True)
def _org_member_add(services: Services, organization_id: int, name: str, role: str) -> Answer:
    """Add an account, or change its role."""

    def change(tx: Write, account: Account) -> str:
        organizations.put_member(tx, organization_id, account, role)
        return account.sync_id

    sync_id = change_account(services, name, change)
    return Answer(
        {"organization_id": organization_id, "sync_id": sync_id, "role": role},
        f"{sync_id} is {role} of organization {organization_id}.",
    )


@command(org_member, "remove")
@_organization_id
@_name
def _org_member_remove(services: Services, organization_id: int, name: str) -> Answer:
    """Take an account out; its files stay in the drives, which refuse it from now on."""

    def change(tx: Write, account: Account) -> str:
        organizations.remove_member(tx, organization_id, account)
        return account.sync_id

    sync_id = change_account(services, name, change)
    return Answer(
        {"organization_id": organization_id, "sync_id": sync_id},
        f"{sync_id} left organization {organization_id}.",
    )


@command(org_member, "leave")
@_organization_id
@_name
def _org_member_leave(services: Services, organization_id: int, name: str) -> Answer:
    """An external's own way out; its files stay."""

    def change(tx: Write, account: Account) -> str:
        organizations.leave(tx, organization_id, account)
        return account.sync_id

    sync_id = change_account(services, name, change)
    return Answer(
        {"organization_id": organization_id, "sync_id": sync_id},
        f"{sync_id} left organization {organization_id}.",
    )


@command(org_member, "alert")
@_organization_id
@_name
def _org_member_alert(services: Services, organization_id: int, name: str) -> Answer:
    """Send a member an e-mail that lists the state of its security settings."""

    def change(tx: Write, account: Account) -> dict[str, Any]:
        return {"sync_id": account.sync_id, **enforcement.alert(tx, organization_id, account)}

    row = change_account(services, name, change)
    return Answer(row, f"{row['sync_id']} is told the state of its security settings.")


@command(org_member, "list")
@_organization_id
@click.option("--without-second-factor", is_flag=True, help="Only those where none is on.")
def _org_member_list(services: Services, organization_id: int, without_second_factor: bool) -> Answer:
    """List the members, and whether a missing second factor stops them."""
    with services.database.read() as tx:
        rows = directory.members(tx, organization_id, without_second_factor=without_second_factor)
    return Answer(
        rows, table(rows, "It has no such member." if without_second_factor else "It has no member.")
    )


# -- drive ----------------------------------------------------------------------------------------


@click.group()
def drive() -> None:
    """Drives: their members and limits."""


@command(drive, "create")
@click.argument("product_id", type=int)
@_name
@click.option("--member", "members", multiple=True, metavar="ACCOUNT", help="Who sees it; may be repeated.")
def _drive_create(services: Services, product_id: int, name: str, members: tuple[str, ...]) -> Answer:
    """Create a drive of a product."""
    folders = services.settings.drive

    def create(tx: Write) -> int:
        number = organizations.create_drive(
            tx, product_id, name, reserved=(folders.trash_name, folders.common_name)
        )
        for member in members:
            found = accounts.get(tx, member, services.settings.hosts.log_in)
            organizations.add_drive_member(tx, number, found)
        return number

    number = services.database.write(create)
    host = f"{number}.{services.settings.hosts.drive_suffix}"
    return Answer({"id": number, "name": name, "host": host}, f"Drive {number}: {name}, at {host}")


@command(drive, "list")
def _drive_list(services: Services) -> Answer:
    """List drives with their limits and use in bytes."""
    with services.database.read() as tx:
        rows = directory.drives(tx)
    return Answer(rows, table(rows, "There is no drive."))


@command(drive, "limits")
@_drive_id
@click.option("--max-file-bytes", type=click.IntRange(0), help="Largest upload of a declared length.")
@click.option("--max-chunked-bytes", type=click.IntRange(0), help="Largest upload without one.")
@click.option("--quota-bytes", type=click.IntRange(0), help="Of the whole drive.")
def _drive_limits(
    services: Services,
    drive_id: int,
    max_file_bytes: int | None,
    max_chunked_bytes: int | None,
    quota_bytes: int | None,
) -> Answer:
    """Set a drive's own limits; what is not named stays."""

    def change(tx: Write) -> dict[str, Any]:
        organizations.set_drive_limits(
            tx,
            drive_id,
            max_file_bytes=max_file_bytes,
            max_chunked_bytes=max_chunked_bytes,
            quota_bytes=quota_bytes,
            chunked_ceiling_bytes=services.settings.drive.chunked_ceiling_bytes,
        )
        return next(row for row in directory.drives(tx) if row["id"] == drive_id)

    row = services.database.write(change)
    return Answer(row, table([row], ""))


@command(drive, "move")
@_drive_id
@click.argument("product_id", type=int)
def _drive_move(services: Services, drive_id: int, product_id: int) -> Answer:
    """Put a drive under another product of its organization; a kSuite's stay."""
    services.database.write(lambda tx: rules.move_drive(tx, drive_id, product_id))
    return Answer({"id": drive_id, "product_id": product_id}, f"Drive {drive_id} has product {product_id}.")


@command(drive, "cancel")
@_drive_id
def _drive_cancel(services: Services, drive_id: int) -> Answer:
    """Take an empty drive out of its product; a kSuite's stay."""
    services.database.write(lambda tx: rules.cancel_drive(tx, drive_id))
    return Answer({"id": drive_id}, f"Drive {drive_id} is gone.")


@drive.group("member")
def drive_member() -> None:
    """Members of a drive."""


def _drive_membership(
    services: Services, drive_id: int, name: str, change: Callable[[Write, int, Account], None]
) -> dict[str, Any]:
    def run(tx: Write, account: Account) -> str:
        change(tx, drive_id, account)
        return account.sync_id

    return {"drive_id": drive_id, "sync_id": change_account(services, name, run)}


@command(drive_member, "add")
@_drive_id
@_name
def _drive_member_add(services: Services, drive_id: int, name: str) -> Answer:
    """Give an account its own folder in a drive; a former member finds its files again."""
    row = _drive_membership(services, drive_id, name, organizations.add_drive_member)
    return Answer(row, f"{row['sync_id']} is a member of drive {drive_id}.")


@command(drive_member, "remove")
@_drive_id
@_name
def _drive_member_remove(services: Services, drive_id: int, name: str) -> Answer:
    """Close a drive to an account; its files stay."""
    row = _drive_membership(services, drive_id, name, organizations.remove_drive_member)
    return Answer(row, f"{row['sync_id']} is no member of drive {drive_id} any more.")


@command(drive_member, "list")
@_drive_id
def _drive_member_list(services: Services, drive_id: int) -> Answer:
    """List the members."""
    with services.database.read() as tx:
        rows = directory.drive_members(tx, drive_id)
    return Answer(rows, table(rows, "It has no member."))
