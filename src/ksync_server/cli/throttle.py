"""Commands for blocked log-ins: what too many wrong passwords have closed, and to open it."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ksync_server.auth import accounts
from ksync_server.auth import throttle as counts
from ksync_server.auth.passwords import parsed_address
from ksync_server.cli.output import Answer, command, table
from ksync_server.store.database import Write

if TYPE_CHECKING:
    from ksync_server.app import Services


def register(group: click.Group) -> None:
    """Add the group throttle."""
    group.add_command(throttle)


@click.group()
def throttle() -> None:
    """Log-ins that are refused because of too many wrong passwords before."""


def _is_address(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and parsed_address(value) is None:
        raise click.BadParameter(f"{value} is no IP address.")
    return value


_address = click.option(
    "--address", callback=_is_address, help="A client's address, as the log has it; its network is meant."
)


@command(throttle, "list")
@_address
def _throttle_list(services: Services, address: str | None) -> Answer:
    """List what is blocked now. Networks are kept as hashes: they are named where --address asks for one."""
    asked = () if address is None else (address,)
    with services.database.read() as tx:
        found = counts.blocks(tx, services.gate.throttle, int(time.time()), asked)
    rows = [asdict(each) for each in found]
    return Answer(rows, table(rows, "Nothing is blocked."))


@command(throttle, "lift")
@click.argument("key", metavar="[KEY]", required=False)
@click.option("--account", "name", help="Sync id or login e-mail: the count of its names from anywhere.")
@_address
@click.option("--all", "every", is_flag=True, help="Everything that is blocked.")
def _throttle_lift(
    services: Services, key: str | None, name: str | None, address: str | None, every: bool
) -> Answer:
    """Let log-ins in again: by KEY as `list` shows it, of an account, from an address, or all.

    With --account and --address, whatever blocks this account there.
    """
    ways = [key is not None, name is not None or address is not None, every]
    if ways.count(True) != 1:
        raise click.UsageError("Name a KEY, or --account and --address or one of them, or --all.")

    def lift(tx: Write) -> list[counts.Block]:
        hosts = services.settings.hosts.log_in
        account = None if name is None else accounts.get(tx, name, hosts).sync_id
        return counts.lift(
            tx,
            services.gate.throttle,
            services.settings.auth,
            int(time.time()),
            key=key,
            account=account,
            address=address,
        )

    rows = [asdict(each) for each in services.database.write(lift)]
    return Answer({"lifted": rows}, table(rows, "Nothing of that is blocked."))
