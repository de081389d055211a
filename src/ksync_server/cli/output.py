"""Commands that manage the store: opened services in, one answer out as sentences or JSON."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from ksync_server.auth import accounts
from ksync_server.auth.accounts import Account
from ksync_server.cli.context import configured
from ksync_server.store.database import Read, Write

if TYPE_CHECKING:
    from ksync_server.app import Services

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command says: `data` with --json, else `text`."""

    data: Any
    text: str


def command(group: click.Group, name: str) -> Callable[[Callable[..., Answer]], click.Command]:
    """A command of `group` whose function takes the opened services and returns an Answer.

    The root command's object must have `services()`, as `cli.context.Context` has.
    """

    def decorate(function: Callable[..., Answer]) -> click.Command:
        @functools.wraps(function)
        def run(as_json: bool, **arguments: Any) -> None:
            with click.get_current_context().obj.services() as services:
                answer = function(services, **arguments)
            click.echo(json.dumps(answer.data, ensure_ascii=False) if as_json else answer.text)

        option = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
        return group.command(name)(configured(option(run)))

    return decorate


def change_account(services: Services, name: str, fn: Callable[[Write, Account], T]) -> T:
    """Run a change of one account, named in any of its ways, in a transaction.

    Raises:
        NotFound: no such account, and what `fn` raises; nothing was changed.
    """

    def run(tx: Write) -> T:
        return fn(tx, accounts.get(tx, name, services.settings.hosts.log_in))

    return services.database.write(run)


def see_account(services: Services, name: str, fn: Callable[[Read, Account], T]) -> T:
    """Read something of one account, named in any of its ways.

    Raises:
        NotFound: no such account.
    """
    with services.database.read() as tx:
        return fn(tx, accounts.get(tx, name, services.settings.hosts.log_in))


def read_secret(file: TextIO, what: str) -> str:
    """A secret from a file or standard input (its last line break taken off), or asked for at a terminal."""
    if file is sys.stdin and sys.stdin.isatty():
        answer: str = click.prompt(what, hide_input=True, err=True)
        return answer
    text = file.read()
    return text.removesuffix("\n").removesuffix("\r")


def table(rows: list[dict[str, Any]], empty: str) -> str:
    """Rows as aligned columns under their names."""
    if not rows:
        return empty
    names = list(rows[0])
    cells = [names, *([_cell(name, row[name]) for name in names] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(str(each) for each in value)
    if (name == "at" or name.endswith("_at")) and isinstance(value, int):
        return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(value))
    return str(value)
