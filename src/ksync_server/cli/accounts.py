"""Commands for accounts, organizations, products, drives and secrets.

Secrets come from standard input or a file, never from arguments, which other users of the machine can read.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from ksync_server.auth import accounts, directory, secondfactor
from ksync_server.auth.accounts import Account
from ksync_server.cli.output import Answer, command, read_secret, table
from ksync_server.errors import BadRequest
from ksync_server.store.database import Read, Write

if TYPE_CHECKING:
    from ksync_server.app import Services

T = TypeVar("T")

_password_file = click.option(
    "--password-file",
    type=click.File("r", encoding="utf-8"),
    default="-",
    help="Where the password is read from; standard input without this.",
)
_drive_id = click.argument("drive_id", type=int)
_organization_id = click.argument("organization_id", type=int)
_name = click.argument("name")


def register(group: click.Group) -> None:
    """Add the groups account, org, product, offer, drive, app-password, second-factor and audit."""
    for each in (account, org, product, offer, drive, app_password, second_factor, audit):
        group.add_command(each)


def _change(services: Services, name: str, fn: Callable[[Write, Account], T]) -> T:
    """Run a change of one account, named in any of its ways, in a transaction."""

    def run(tx: Write) -> T:
        return fn(tx, accounts.get(tx, name, services.settings.hosts.log_in))

    return services.database.write(run)


def _see(services: Services, name: str, fn: Callable[[Read, Account], T]) -> T:
    with services.database.read() as tx:
        return fn(tx, accounts.get(tx, name, services.settings.hosts.log_in))


def _shown(found: Account) -> dict[str, Any]:
    return {
        "sync_id": found.sync_id,
        "login_email": found.login_email,
        "display_name": found.display_name,
        "state": found.state,
        "second_factor": found.second_factor,
    }


def _new_hash(services: Services, password_file: TextIO) -> str:
    password = read_secret(password_file, "Password")
    services.gate.passwords.check_new(password)
    return services.gate.passwords.hash(password)


# -- account --------------------------------------------------------------------------------------


@click.group()
def account() -> None:
    """Accounts. NAME is a sync id or a login e-mail."""


@command(account, "create")
@click.argument("login_email")
@click.option("--name", "display_name", required=True, help="The person's name, as others see it.")
@click.option("--sync-id", help="Two letters and five digits; a free one is found without this.")
@click.option("--no-password", is_flag=True, help="No log-in with an account password.")
@click.option("--organization", type=int, help="Join this organization.")
@click.option("--role", type=click.Choice(accounts.ROLES), default="collaborator", show_default=True)
@_password_file
def _account_create(
    services: Services,
    login_email: str,
    display_name: str,
    sync_id: str | None,
    no_password: bool,
    organization: int | None,
    role: str,
    password_file: TextIO,
) -> Answer:
    """Create an account with a calendar and an address book; its password is read from standard input."""
    hashed = None if no_password else _new_hash(services, password_file)

    def create(tx: Write) -> Account:
        made = accounts.create_account(
            tx,
            login_email=login_email,
            display_name=display_name,
            password_hash=hashed,
            sync_id=sync_id,
            sync_hosts=services.settings.hosts.log_in,
        )
        if organization is not None:
            accounts.put_member(tx, organization, made, role)
        return made

    made = services.database.write(create)
    return Answer(_shown(made), f"{made.sync_id} is the sync id of {made.login_email}.")


@command(account, "list")
@click.option("--without-second-factor", is_flag=True, help="Only those where none is on.")
def _account_list(services: Services, without_second_factor: bool) -> Answer:
    """List accounts."""
    with services.database.read() as tx:
        rows = directory.accounts(tx, without_second_factor=without_second_factor)
    return Answer(rows, table(rows, "There is no account."))


@command(account, "show")
@_name
def _account_show(services: Services, name: str) -> Answer:
    """Show one account."""
    found = _see(services, name, lambda tx, account: _shown(account) | directory.recovery(tx, account))
    return Answer(found, table([found], ""))


@command(account, "password")
@_name
@click.option(
    "--current-file",
    type=click.File("r", encoding="utf-8"),
    help="The current password, checked first: the change is the person's own, not an operator's.",
)
@click.option("--revoke-app-passwords", is_flag=True, help="Revoke every application password too.")
@_password_file
def _account_password(
    services: Services,
    name: str,
    current_file: TextIO | None,
    revoke_app_passwords: bool,
    password_file: TextIO,
) -> Answer:
    """Set the password, read from standard input."""
    found = _see(services, name, lambda tx, account: account)
    if current_file is not None:
        current = read_secret(current_file, "Current password")
        new = read_secret(password_file, "New password")
        accounts.change_password(services.database, services.gate.passwords, found, current=current, new=new)
    else:
        hashed = _new_hash(services, password_file)
        _change(services, name, lambda tx, account: accounts.set_password_hash(tx, account, hashed))
    revoked = 0
    if revoke_app_passwords:
        revoked = _change(services, name, accounts.revoke_app_passwords)
    return Answer({"sync_id": found.sync_id, "revoked": revoked}, f"{found.sync_id} has a new password.")


@command(account, "email")
@_name
@click.argument("login_email")
def _account_email(services: Services, name: str, login_email: str) -> Answer:
    """Change the login e-mail; the sync id stays."""

    def change(tx: Write, account: Account) -> Account:
        accounts.set_login_email(tx, account, login_email, services.settings.hosts.log_in)
        return accounts.by_id(tx, account.id)

    found = _change(services, name, change)
    return Answer(_shown(found), f"{found.sync_id} logs in as {found.login_email}.")


@command(account, "recovery")
@_name
@click.option("--email", help="Address outside this server; empty removes it.")
@click.option("--mobile", help="International number, such as +41 79 123 45 67; empty removes it.")
def _account_recovery(services: Services, name: str, email: str | None, mobile: str | None) -> Answer:
    """Set how the owner is reached when the login fails; shows what is set."""

    def change(tx: Write, account: Account) -> dict[str, Any]:
        accounts.set_recovery(tx, account, email=email, mobile=mobile)
        return {"sync_id": account.sync_id, **directory.recovery(tx, account)}

    row = _change(services, name, change)
    return Answer(row, table([row], ""))


def _set_state(services: Services, name: str, state: str) -> Answer:
    def change(tx: Write, account: Account) -> Account:
        accounts.set_state(tx, account, state)
        return accounts.by_id(tx, account.id)

    found = _change(services, name, change)
    return Answer(_shown(found), f"{found.sync_id} is {found.state}.")


@command(account, "suspend")
@_name
def _account_suspend(services: Services, name: str) -> Answer:
    """Let nobody in with this account's secrets; its data stays."""
    return _set_state(services, name, "suspended")


@command(account, "resume")
@_name
def _account_resume(services: Services, name: str) -> Answer:
    """End a suspension."""
    return _set_state(services, name, "active")


# -- org ------------------------------------------------------------------------------------------


@click.group()
def org() -> None:
    """Organizations and their members."""


@command(org, "create")
@_name
def _org_create(services: Services, name: str) -> Answer:
    """Create an organization."""
    number = services.database.write(lambda tx: accounts.create_organization(tx, name))
    return Answer({"id": number, "name": name}, f"Organization {number}: {name}")


@command(org, "list")
def _org_list(services: Services) -> Answer:
    """List organizations."""
    with services.database.read() as tx:
        rows = directory.organizations(tx)
    return Answer(rows, table(rows, "There is no organization."))


@org.group("member")
def org_member() -> None:
    """Members of an organization."""


@command(org_member, "add")
@_organization_id
@_name
@click.option("--role", type=click.Choice(accounts.ROLES), default="collaborator", show_default=True)
def _org_member_add(services: Services, organization_id: int, name: str, role: str) -> Answer:
    """Add an account, or change its role."""

    def change(tx: Write, account: Account) -> str:
        accounts.put_member(tx, organization_id, account, role)
        return account.sync_id

    sync_id = _change(services, name, change)
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
        accounts.remove_member(tx, organization_id, account)
        return account.sync_id

    sync_id = _change(services, name, change)
    return Answer(
        {"organization_id": organization_id, "sync_id": sync_id},
        f"{sync_id} left organization {organization_id}.",
    )


@command(org_member, "list")
@_organization_id
def _org_member_list(services: Services, organization_id: int) -> Answer:
    """List the members."""
    with services.database.read() as tx:
        rows = directory.members(tx, organization_id)
    return Answer(rows, table(rows, "It has no member."))


# -- offer, product -------------------------------------------------------------------------------


@click.group()
def offer() -> None:
    """Offers: what a product opens."""


def _known_offer(services: Services, name: str) -> str:
    found = services.offers.find(name)
    if found is None:
        known = ", ".join(each.id for each in services.offers.list())
        raise BadRequest(f"There is no offer {name!r}. There are: {known}.")
    return found.id


@command(offer, "list")
def _offer_list(services: Services) -> Answer:
    """List the offers of offers.toml."""
    rows = [
        {
            "id": each.id,
            "aliases": services.offers.aliases(each.id),
            "webdav": each.webdav,
            "webhooks": each.webhooks,
            "seats_min": each.seats_min,
            "seats_max": each.seats_max,
            "storage_bytes": each.storage_bytes,
        }
        for each in services.offers.list()
    ]
    return Answer(rows, table(rows, "There is no offer."))


@command(offer, "set")
@click.option("--product", "product_id", type=int, required=True, help="Id of the product.")
@click.argument("name", metavar="OFFER")
def _offer_set(services: Services, product_id: int, name: str) -> Answer:
    """Move a product to another offer; the next request sees it."""
    chosen = _known_offer(services, name)
    services.database.write(lambda tx: accounts.set_offer(tx, product_id, chosen))
    return Answer({"product_id": product_id, "offer": chosen}, f"Product {product_id} has {chosen}.")


@click.group()
def product() -> None:
    """Products: what an organization has, each under one offer."""


@command(product, "create")
@_organization_id
@click.argument("name", metavar="OFFER")
def _product_create(services: Services, organization_id: int, name: str) -> Answer:
    """Create a product of an organization."""
    chosen = _known_offer(services, name)
    number = services.database.write(lambda tx: accounts.create_product(tx, organization_id, chosen))
    return Answer(
        {"id": number, "organization_id": organization_id, "offer": chosen}, f"Product {number}: {chosen}"
    )


@command(product, "list")
def _product_list(services: Services) -> Answer:
    """List products."""
    with services.database.read() as tx:
        rows = directory.products(tx)
    return Answer(rows, table(rows, "There is no product."))


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
        number = accounts.create_drive(
            tx, product_id, name, reserved=(folders.trash_name, folders.common_name)
        )
        for member in members:
            found = accounts.get(tx, member, services.settings.hosts.log_in)
            accounts.add_drive_member(tx, number, found)
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
        accounts.set_drive_limits(
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


@drive.group("member")
def drive_member() -> None:
    """Members of a drive."""


def _drive_membership(
    services: Services, drive_id: int, name: str, change: Callable[[Write, int, Account], None]
) -> dict[str, Any]:
    def run(tx: Write, account: Account) -> str:
        change(tx, drive_id, account)
        return account.sync_id

    return {"drive_id": drive_id, "sync_id": _change(services, name, run)}


@command(drive_member, "add")
@_drive_id
@_name
def _drive_member_add(services: Services, drive_id: int, name: str) -> Answer:
    """Give an account its own folder in a drive; a former member finds its files again."""
    row = _drive_membership(services, drive_id, name, accounts.add_drive_member)
    return Answer(row, f"{row['sync_id']} is a member of drive {drive_id}.")


@command(drive_member, "remove")
@_drive_id
@_name
def _drive_member_remove(services: Services, drive_id: int, name: str) -> Answer:
    """Close a drive to an account; its files stay."""
    row = _drive_membership(services, drive_id, name, accounts.remove_drive_member)
    return Answer(row, f"{row['sync_id']} is no member of drive {drive_id} any more.")


@command(drive_member, "list")
@_drive_id
def _drive_member_list(services: Services, drive_id: int) -> Answer:
    """List the members."""
    with services.database.read() as tx:
        rows = directory.drive_members(tx, drive_id)
    return Answer(rows, table(rows, "It has no member."))


# -- app-password ---------------------------------------------------------------------------------


@click.group("app-password")
def app_password() -> None:
    """Application passwords, for programs that sync."""


@command(app_password, "create")
@click.argument("account_name", metavar="ACCOUNT")
@click.option("--name", required=True, help="What it is for, e.g. the phone's name.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(accounts.SCOPES),
    help="What it opens; may be repeated; everything without this.",
)
@click.option(
    "--expires",
    type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ"]),
    help="From when on it is refused, in UTC; never without this.",
)
@click.option(
    "--address",
    "addresses",
    multiple=True,
    metavar="NETWORK",
    help="Address or network it works from; may be repeated; everywhere without this.",
)
def _app_password_create(
    services: Services,
    account_name: str,
    name: str,
    scopes: tuple[str, ...],
    expires: datetime | None,
    addresses: tuple[str, ...],
) -> Answer:
    """Create an application password; it is shown now and never again."""
    expires_at = int(expires.replace(tzinfo=UTC).timestamp()) if expires else None
    number, secret = _change(
        services,
        account_name,
        lambda tx, account: accounts.create_app_password(
            tx,
            services.keys,
            account,
            name,
            scopes or accounts.SCOPES,
            expires_at=expires_at,
            addresses=addresses,
        ),
    )
    return Answer(
        {"id": number, "secret": secret.shown}, f"{secret.shown}\nShown once; it has the id {number}."
    )


@command(app_password, "list")
@click.argument("account_name", metavar="ACCOUNT")
def _app_password_list(services: Services, account_name: str) -> Answer:
    """List application passwords: when and where each was last used."""
    rows = _see(services, account_name, directory.app_passwords)
    return Answer(rows, table(rows, "There is no application password."))


@command(app_password, "revoke")
@click.argument("account_name", metavar="ACCOUNT")
@click.argument("number", metavar="[ID]", type=int, required=False)
@click.option("--all", "every", is_flag=True, help="Revoke every one.")
def _app_password_revoke(services: Services, account_name: str, number: int | None, every: bool) -> Answer:
    """Revoke one application password, or all; the next request is refused."""
    if (number is None) is not every:
        raise click.UsageError("Name one ID, or --all.")
    count = _change(
        services, account_name, lambda tx, account: accounts.revoke_app_passwords(tx, account, number)
    )
    return Answer({"revoked": count}, f"Revoked: {count}")


# -- second-factor --------------------------------------------------------------------------------


@click.group("second-factor")
def second_factor() -> None:
    """Two-factor authentication."""


@command(second_factor, "enrol")
@click.argument("account_name", metavar="ACCOUNT")
@click.option("--name", default="Authenticator", show_default=True)
def _second_factor_enrol(services: Services, account_name: str, name: str) -> Answer:
    """Make a new secret for an authenticator app; it counts after `confirm`."""
    issuer = services.settings.auth.realm
    made = _change(
        services,
        account_name,
        lambda tx, account: secondfactor.enrol_totp(tx, services.keys, account, name, issuer),
    )
    return Answer(
        {"id": made.id, "secret": made.secret, "uri": made.uri, "qr_svg": made.qr_svg()},
        f"{made.qr_text()}\n{made.secret}\n{made.uri}\nNow give one of its codes to `second-factor confirm`.",
    )


@command(second_factor, "confirm")
@click.argument("account_name", metavar="ACCOUNT")
@click.option(
    "--code-file",
    type=click.File("r", encoding="utf-8"),
    default="-",
    help="Where the code is read from; standard input without this.",
)
def _second_factor_confirm(services: Services, account_name: str, code_file: TextIO) -> Answer:
    """Turn the enrolled factor on with one of its codes; shows the recovery codes of the first one."""
    code = read_secret(code_file, "Code")
    window = services.settings.auth.totp_window_steps
    codes = _change(
        services,
        account_name,
        lambda tx, account: secondfactor.confirm(tx, services.keys, account, code, window_steps=window),
    )
    text = "The second factor is on: sync and drive programs need application passwords now."
    if codes:
        text += "\nRecovery codes, each good for once, never shown again:\n" + "\n".join(codes)
    return Answer({"recovery_codes": list(codes)}, text)


@command(second_factor, "list")
@click.argument("account_name", metavar="ACCOUNT")
def _second_factor_list(services: Services, account_name: str) -> Answer:
    """List second factors and how many recovery codes are left."""
    rows = _see(services, account_name, directory.second_factors)
    left = _see(services, account_name, directory.recovery_codes_left)
    text = f"{table(rows, 'There is no second factor.')}\nRecovery codes left: {left}"
    return Answer({"factors": rows, "recovery_codes_left": left}, text)


@command(second_factor, "remove")
@click.argument("account_name", metavar="ACCOUNT")
@click.option("--id", "number", type=int, help="Only this one; all of them without this.")
@click.option("--reason", required=True, help="Why; it is kept in the audit.")
def _second_factor_remove(services: Services, account_name: str, number: int | None, reason: str) -> Answer:
    """Remove second factors for somebody who cannot; the reason is kept."""

    def change(tx: Write, account: Account) -> Account:
        secondfactor.remove(tx, account, number, reason=reason)
        return accounts.by_id(tx, account.id)

    found = _change(services, account_name, change)
    state = "still on" if found.second_factor else "off"
    return Answer(_shown(found), f"Two-factor authentication of {found.sync_id} is {state}.")


@command(second_factor, "recovery-codes")
@click.argument("account_name", metavar="ACCOUNT")
def _second_factor_recovery_codes(services: Services, account_name: str) -> Answer:
    """Make ten new recovery codes; the old ones are void."""
    codes = _change(
        services,
        account_name,
        lambda tx, account: secondfactor.renew_recovery_codes(tx, services.keys, account),
    )
    return Answer({"recovery_codes": list(codes)}, "\n".join(codes))


# -- audit ----------------------------------------------------------------------------------------


@click.group()
def audit() -> None:
    """What was changed by whom, and which right secrets were refused."""


@command(audit, "list")
@click.argument("account_name", metavar="[ACCOUNT]", required=False)
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
def _audit_list(services: Services, account_name: str | None, limit: int) -> Answer:
    """List the newest rows first, of one account or of all."""
    subject = None
    if account_name is not None:
        subject = _see(services, account_name, lambda tx, account: account.sync_id)
    with services.database.read() as tx:
        rows = directory.audit(tx, subject=subject, limit=limit)
    return Answer(rows, table(rows, "There is nothing."))
