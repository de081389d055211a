"""Commands for accounts and their secrets.

Secrets come from standard input or a file, never from arguments, which other users of the machine can read.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from ksync_server.auth import (
    accounts,
    app_passwords,
    directory,
    organizations,
    recovery,
    removal,
    secondfactor,
)
from ksync_server.auth.accounts import Account
from ksync_server.auth.gate import DriveTarget, owner
from ksync_server.auth.passwords import AppPassword
from ksync_server.cli.output import Answer, change_account, command, read_secret, see_account, table
from ksync_server.drive import tree
from ksync_server.errors import NotFound
from ksync_server.store.database import Write

if TYPE_CHECKING:
    from ksync_server.app import Services

T = TypeVar("T")

_password_file = click.option(
    "--password-file",
    type=click.File("r", encoding="utf-8"),
    default="-",
    help="Where the password is read from; standard input without this.",
)
_name = click.argument("name")


def register(group: click.Group) -> None:
    """Add the groups account, app-password, second-factor and audit."""
    for each in (account, app_password, second_factor, audit):
        group.add_command(each)


def _shown(found: Account) -> dict[str, Any]:
    return {
        "sync_id": found.sync_id,
        "login_email": found.login_email,
        "display_name": found.display_name,
        "state": found.shown_state,
        "second_factor": found.second_factor,
        "purge_at": found.purge_at,
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
@click.option("--role", type=click.Choice(organizations.ROLES), default="collaborator", show_default=True)
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
            organizations.put_member(tx, organization, made, role)
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
    found = see_account(services, name, lambda tx, account: _shown(account) | directory.recovery(tx, account))
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
    found = see_account(services, name, lambda tx, account: account)
    if current_file is not None:
        current = read_secret(current_file, "Current password")
        new = read_secret(password_file, "New password")
        accounts.change_password(services.database, services.gate.passwords, found, current=current, new=new)
    else:
        hashed = _new_hash(services, password_file)
        change_account(services, name, lambda tx, account: accounts.set_password_hash(tx, account, hashed))
    revoked = 0
    if revoke_app_passwords:
        revoked = change_account(services, name, app_passwords.revoke)
    return Answer({"sync_id": found.sync_id, "revoked": revoked}, f"{found.sync_id} has a new password.")


@command(account, "email")
@_name
@click.argument("login_email")
def _account_email(services: Services, name: str, login_email: str) -> Answer:
    """Change the login e-mail; the sync id stays."""

    def change(tx: Write, account: Account) -> Account:
        accounts.set_login_email(tx, account, login_email, services.settings.hosts.log_in)
        return accounts.by_id(tx, account.id)

    found = change_account(services, name, change)
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

    row = change_account(services, name, change)
    return Answer(row, table([row], ""))


def _set_state(services: Services, name: str, state: str) -> Answer:
    def change(tx: Write, account: Account) -> Account:
        accounts.set_state(tx, account, state)
        return accounts.by_id(tx, account.id)

    found = change_account(services, name, change)
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


@command(account, "delete")
@_name
def _account_delete(services: Services, name: str) -> Answer:
    """Let nobody in from now on, and erase everything after the days that the configuration gives."""
    days = services.settings.accounts.grace_days

    def change(tx: Write, account: Account) -> Account:
        removal.delete(tx, account, grace_days=days)
        return accounts.by_id(tx, account.id)

    found = change_account(services, name, change)
    return Answer(
        _shown(found), f"{found.sync_id} is deleted; `account restore` takes that back for {days} days."
    )


@command(account, "restore")
@_name
def _account_restore(services: Services, name: str) -> Answer:
    """Take a deletion back, as long as nothing has been erased."""
    found = change_account(services, name, removal.restore)
    return Answer(_shown(found), f"{found.sync_id} is {found.state} again.")


@command(account, "login-lost")
@_name
def _account_login_lost(services: Services, name: str) -> Answer:
    """Replace a log-in address that was hosted here and is gone by a temporary name.

    Its owner gives a new address at the next web log-in. The password, the sync id and every program that
    uses it go on. Addresses outside are refused.
    """
    hosted = services.settings.accounts.hosted_domains
    made = change_account(services, name, lambda tx, account: recovery.login_lost(tx, account, hosted))
    told = f"told at {made.recovery_email}" if made.recovery_email else "its owner has no recovery e-mail"
    return Answer(
        {
            "sync_id": made.sync_id,
            "login": made.login,
            "recovery_email": made.recovery_email,
            "recovery_mobile": made.recovery_mobile,
        },
        f"{made.sync_id} logs in as {made.login}: {told}.",
    )


@command(account, "reset")
@_name
@click.option("--reason", required=True, help="Why; it is kept in the audit.")
def _account_reset(services: Services, name: str, reason: str) -> Answer:
    """Tell the owner that a password reset was asked for, and how to go on; no secret changes."""

    def change(tx: Write, account: Account) -> dict[str, Any]:
        return {
            "sync_id": account.sync_id,
            "told": recovery.start_reset(tx, account, reason=reason),
        }

    row = change_account(services, name, change)
    return Answer(row, f"{row['sync_id']} is told at {row['told']} that a reset was asked for.")


@command(account, "identity-check")
@_name
@click.option("--reason", help="Why documents were looked at; it is kept in the audit and told.")
@click.option("--documents-deleted", is_flag=True, help="Instead: the documents of its checks are deleted.")
def _account_identity_check(
    services: Services, name: str, reason: str | None, documents_deleted: bool
) -> Answer:
    """Note that you looked at somebody's documents, the last resort; the owner is told, nothing is opened.

    Then set a recovery e-mail (account recovery) or a password (account password). Delete the documents
    within 72 hours and note that with --documents-deleted; `doctor` tells when it is late.
    """
    if (reason is None) is not documents_deleted:
        raise click.UsageError("Give a --reason, or say --documents-deleted.")

    def deleted(tx: Write) -> str:
        found = accounts.find(tx, name, services.settings.hosts.log_in)
        sync_id = name.strip().upper() if found is None else found.sync_id
        recovery.documents_deleted(tx, sync_id)
        return sync_id

    def checked(tx: Write, account: Account) -> dict[str, Any]:
        until = recovery.identity_checked(tx, account, reason=reason or "")
        return {"sync_id": account.sync_id, "documents_until": until}

    if documents_deleted:
        sync_id = services.database.write(deleted)
        return Answer(
            {"sync_id": sync_id, "documents_until": None}, f"Documents of {sync_id} are noted as deleted."
        )
    row = change_account(services, name, checked)
    day = datetime.fromtimestamp(row["documents_until"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Answer(row, f"The check of {row['sync_id']} is noted. Delete the documents until {day}.")


@command(account, "notices")
@_name
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
def _account_notices(services: Services, name: str, limit: int) -> Answer:
    """List what the owner was told: refused secrets, changed factors and passwords, newest first."""
    rows = see_account(services, name, lambda tx, account: directory.notices(tx, account, limit=limit))
    return Answer(rows, table(rows, "There is nothing."))


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
    type=click.Choice(app_passwords.SCOPES),
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
@click.option("--read-only", is_flag=True, help="It changes nothing anywhere.")
@click.option("--drive", "drive_id", type=int, help="The only drive it opens; its scope is drive alone then.")
@click.option("--folder", help="With --drive: the path of the folder that is all it sees of that drive.")
def _app_password_create(
    services: Services,
    account_name: str,
    name: str,
    scopes: tuple[str, ...],
    expires: datetime | None,
    addresses: tuple[str, ...],
    read_only: bool,
    drive_id: int | None,
    folder: str | None,
) -> Answer:
    """Create an application password; it is shown now and never again."""
    expires_at = int(expires.replace(tzinfo=UTC).timestamp()) if expires else None
    if folder is not None and drive_id is None:
        raise click.UsageError("--folder needs --drive.")

    def create(tx: Write, account: Account) -> tuple[int, AppPassword]:
        folder_id = None
        if folder is not None and drive_id is not None:
            folder_id = _folder_id(services, tx, account, drive_id, folder)
        return app_passwords.create(
            tx,
            services.keys,
            account,
            name,
            scopes or (app_passwords.SCOPES if drive_id is None else ("drive",)),
            expires_at=expires_at,
            addresses=addresses,
            read_only=read_only,
            drive_id=drive_id,
            folder_id=folder_id,
        )

    number, secret = change_account(services, account_name, create)
    return Answer(
        {"id": number, "secret": secret.shown}, f"{secret.shown}\nShown once; it has the id {number}."
    )


def _folder_id(services: Services, tx: Write, account: Account, drive_id: int, folder: str) -> int:
    """The node of a folder as its owner sees it in the drive.

    Raises:
        NotFound: there is no such folder, or no such drive of the account.
        Forbidden: the drive's offer has no WebDAV.
    """
    grant = services.gate.authorize(tx, owner(account), DriveTarget(drive_id), "PROPFIND")
    view = tree.View(grant, services.settings.drive, False)
    segments = tuple(segment for segment in folder.split("/") if segment)
    node = tree.resolve(tx, view, segments).node
    if node is None or not node.folder:
        raise NotFound(f"The drive {drive_id} has no folder {folder!r}.")
    return node.id


@command(app_password, "list")
@click.argument("account_name", metavar="ACCOUNT")
def _app_password_list(services: Services, account_name: str) -> Answer:
    """List application passwords: when and where each was last used."""
    rows = see_account(services, account_name, directory.app_passwords)
    return Answer(rows, table(rows, "There is no application password."))


@command(app_password, "revoke")
@click.argument("account_name", metavar="ACCOUNT")
@click.argument("number", metavar="[ID]", type=int, required=False)
@click.option("--all", "every", is_flag=True, help="Revoke every one.")
def _app_password_revoke(services: Services, account_name: str, number: int | None, every: bool) -> Answer:
    """Revoke one application password, or all; the next request is refused."""
    if (number is None) is not every:
        raise click.UsageError("Name one ID, or --all.")
    count = change_account(
        services, account_name, lambda tx, account: app_passwords.revoke(tx, account, number)
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
    made = change_account(
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
    codes = change_account(
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
    rows = see_account(services, account_name, directory.second_factors)
    left = see_account(services, account_name, directory.recovery_codes_left)
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

    found = change_account(services, account_name, change)
    state = "still on" if found.second_factor else "off"
    return Answer(_shown(found), f"Two-factor authentication of {found.sync_id} is {state}.")


@command(second_factor, "recovery-codes")
@click.argument("account_name", metavar="ACCOUNT")
def _second_factor_recovery_codes(services: Services, account_name: str) -> Answer:
    """Make ten new recovery codes; the old ones are void."""
    codes = change_account(
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
@click.option("--subject", help="Instead of an account: the id of what was changed, e.g. an organization's.")
@click.option(
    "--action",
    "actions",
    multiple=True,
    help="Only this action; one that ends in a dot stands for all that begin so; may be repeated.",
)
@click.option(
    "--since",
    type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ"]),
    help="Nothing older, in UTC.",
)
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
def _audit_list(
    services: Services,
    account_name: str | None,
    subject: str | None,
    actions: tuple[str, ...],
    since: datetime | None,
    limit: int,
) -> Answer:
    """List the newest rows first, of one account or of all."""
    if account_name is not None and subject is not None:
        raise click.UsageError("Name an ACCOUNT or a --subject.")
    with services.database.read() as tx:
        if account_name is not None:
            found = accounts.find(tx, account_name, services.settings.hosts.log_in)
            subject = account_name.strip().upper() if found is None else found.sync_id
            if found is None and not directory.audit(
                tx, subject=subject, limit=1
            ):  # not an erased one either
                accounts.get(tx, account_name, services.settings.hosts.log_in)
        rows = directory.audit(
            tx,
            subject=subject,
            actions=actions,
            since=int(since.replace(tzinfo=UTC).timestamp()) if since else None,
            limit=limit,
        )
    return Answer(rows, table(rows, "There is nothing."))
