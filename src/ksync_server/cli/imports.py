"""Commands that import mailboxes from other servers."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import click

from ksync_server import jobs
from ksync_server.auth import mailboxes
from ksync_server.auth.mailboxes import Mailbox
from ksync_server.cli.output import Answer, command, read_secret, table
from ksync_server.errors import BadRequest, ClientError, Conflict
from ksync_server.jobs import Handler
from ksync_server.mailimport import letters, orders, passes, records, tokens
from ksync_server.mailimport.orders import Order
from ksync_server.mailimport.plan import Options
from ksync_server.mailimport.servers import MECHANISMS, SECURITIES
from ksync_server.runner import Runner
from ksync_server.settings import MAIL_ADDRESS
from ksync_server.store.database import Write

if TYPE_CHECKING:
    from ksync_server.app import Services

_number = click.argument("number", metavar="ID", type=int)
_token_file = click.option(
    "--token-file",
    type=click.File("rb", lazy=False),
    help="Instead of the source's password: JSON by which access tokens are had at each log-in, from Google"
    " (authorized_user, service_account) or with token_uri, client_id, client_secret, scope (Microsoft 365).",
)
_LOOK_S = 0.5


def register(group: click.Group) -> None:
    """Add the group import."""
    group.add_command(imports)


@click.group("import")
def imports() -> None:
    """Take over what is on other servers."""


@imports.group("mail")
def mail() -> None:
    """Mailboxes of any IMAP server."""


def _server_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What names both sides and says how it is done."""
    security, mechanism = click.Choice(SECURITIES), click.Choice(MECHANISMS)
    file = click.File("r", lazy=False)
    options = [
        click.option("--host", required=True, help="Of the source; imap.HOST and mail.HOST are tried too."),
        click.option("--user", required=True, help="Name for the log-in there, mostly the address."),
        click.option("--port", type=int, help="993, or 143 without tls."),
        click.option("--security", type=security, default="tls", show_default=True),
        click.option(
            "--mechanism",
            type=mechanism,
            default="password",
            show_default=True,
            help="What is given as the source's password: one, an access token, or a token file on one line.",
        ),
        click.option(
            "--password-file",
            type=file,
            default="-",
            help="Passwords: the source's on the first line, the destination's on the second; standard input"
            " without this.",
        ),
        _token_file,
        click.option(
            "--ca-file", default="", help="Certificates to trust instead of the system's, for both."
        ),
        click.option("--to-mailbox", metavar="ADDRESS", help="Destination: a mailbox of this server."),
        click.option("--to-maildir", type=click.Path(path_type=Path), help="Destination: a folder here."),
        click.option("--to-host", help="Destination: an IMAP server."),
        click.option("--to-user", default=""),
        click.option("--to-port", type=int),
        click.option("--to-security", type=security, default="tls", show_default=True),
        click.option("--into", default="", help="Put everything below this folder; / makes levels."),
        click.option("--only", multiple=True, metavar="PATTERN", help="Folders to take; may be repeated."),
        click.option("--skip", multiple=True, metavar="PATTERN", help="Folders to leave; may be repeated."),
        click.option("--rename", multiple=True, metavar="FOLDER=FOLDER", help="May be repeated."),
        click.option(
            "--gmail",
            type=click.Choice(("message", "folder")),
            default="message",
            show_default=True,
            help="message: fetch each message once, its labels become folders without further bytes.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _order(
    services: Services,
    host: str,
    user: str,
    port: int | None,
    security: str,
    mechanism: str,
    password_file: TextIO,
    token_file: BinaryIO | None,
    ca_file: str,
    to_mailbox: str | None,
    to_maildir: Path | None,
    to_host: str | None,
    to_user: str,
    to_port: int | None,
    to_security: str,
    into: str,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    rename: tuple[str, ...],
    gmail: str,
    *,
    bodies: bool = False,
    notify: str = "",
) -> Order:
    if token_file is not None and mechanism == "xoauth2":
        raise BadRequest("--token-file is not for xoauth2, which takes a token.")
    mechanism = mechanism if token_file is None else "oauth2"
    source = orders.server(host, user, port=port, security=security, mechanism=mechanism, ca_file=ca_file)
    if sum(each is not None for each in (to_mailbox, to_maildir, to_host)) != 1:
        raise BadRequest("Say where it goes, once: --to-mailbox, --to-maildir or --to-host.")
    pairs = tuple(each.partition("=")[::2] for each in rename)
    if not all(all(pair) for pair in pairs):
        raise BadRequest("--rename takes FOLDER=FOLDER.")
    mailbox = None
    if to_mailbox is not None:
        with services.database.read() as tx:
            mailbox = mailboxes.get(tx, to_mailbox)
        target = orders.mailbox_target(mailbox)
    elif to_maildir is not None:
        target = orders.maildir_target(to_maildir)
    else:
        if not to_user:
            raise BadRequest("--to-host needs --to-user.")
        there = orders.server(to_host or "", to_user, port=to_port, security=to_security, ca_file=ca_file)
        target = orders.imap_target(there)
    first, second = _secrets(password_file, token_file, mechanism, to_host is not None)
    options = Options(into, only, skip, pairs, gmail, bodies)
    return Order(source, first, target, second, options, notify, mailbox)


def _secrets(file: TextIO, token_file: BinaryIO | None, mechanism: str, is_second: bool) -> tuple[str, str]:
    """The source's and the destination's; "" where that has none."""
    named = {} if token_file else {"source": mechanism}
    named |= {"destination": "password"} if is_second else {}
    if named and file is sys.stdin and sys.stdin.isatty():
        lines = [read_secret(file, f"Password of the {side}") for side in named]
    else:
        lines = read_secret(file, "").split("\n") if named else []
    if len(lines) != len(named):
        raise BadRequest(
            f"{len(named)} line{'s' * (len(named) > 1)} with passwords are needed, not {len(lines)}."
        )
    found = {
        side: orders.secret(line.removesuffix("\r"), how)
        for line, (side, how) in zip(lines, named.items(), strict=True)
    }
    if token_file is not None:
        found["source"] = tokens.written(token_file.read())
    return found["source"], found.get("destination", "")


# -- before -----------------------------------------------------------------------------------------


@command(mail, "plan")
@_server_options
def _mail_plan(services: Services, **said: Any) -> Answer:
    """Try both log-ins, and say which folder goes where and how much it is; nothing is changed."""
    found = asyncio.run(orders.survey(services.settings, _order(services, **said)))
    lines = [table(list(found.folders), "There is no folder.")]
    lines.append(f"\n{found.messages} messages, {found.bytes / 1e6:.1f} MB to fetch")
    if found.gmail:
        lines.append(f"(folder by folder it would be {found.folder_bytes / 1e6:.1f} MB)")
    if found.room is not None:
        lines.append(f"Room at the destination: {found.room / 1e6:.1f} MB")
    return Answer(asdict(found), "\n".join(lines))


@command(mail, "start")
@_server_options
@click.option("--bodies", is_flag=True, help="Read every message again at the destination, as a proof.")
@click.option("--notify", default="", metavar="ADDRESS", help="Is told the end by e-mail.")
@click.option("--untried", is_flag=True, help="Do not try the log-ins and the room first.")
@click.option("--wait", is_flag=True, help="Show the progress until it ends.")
@click.option("--here", is_flag=True, help="Do the work in this process instead of the server's.")
def _mail_start(
    services: Services, bodies: bool, notify: str, untried: bool, wait: bool, here: bool, **said: Any
) -> Answer:
    """Import a mailbox in the background."""
    order = _order(services, **said, bodies=bodies, notify=_told(services, notify))
    if not untried:
        orders.require_room(asyncio.run(orders.survey(services.settings, order)))
    number = services.database.write(lambda tx: orders.place(tx, services.settings, services.keys, order))
    return _started(services, number, wait=wait, here=here)


def _told(services: Services, address: str) -> str:
    """Who is told the end."""
    if address and not MAIL_ADDRESS.fullmatch(address):
        raise BadRequest(f"{address!r} is no e-mail address.")
    if address and not services.settings.mail.relay:
        click.echo(
            f"Nobody will be told: mail.relay is not set, so nothing can be sent to {address}.", err=True
        )
    return address


# -- meanwhile and after ----------------------------------------------------------------------------


@command(mail, "again")
@_number
@click.option("--password-file", type=click.File("r", lazy=False), default="-", help="As for start.")
@_token_file
@click.option("--wait", is_flag=True, help="Show the progress until it ends.")
@click.option("--here", is_flag=True, help="Do the work in this process instead of the server's.")
def _mail_again(
    services: Services,
    number: int,
    password_file: TextIO,
    token_file: BinaryIO | None,
    wait: bool,
    here: bool,
) -> Answer:
    """Take over what is new since, and what was refused."""
    with services.database.read() as tx:
        imported = records.get(tx, number)
    mechanism = imported.source["mechanism"]
    if token_file is not None and mechanism != "oauth2":
        raise BadRequest(f"Import {number} logs in by {mechanism}, not by a token file.")
    found = _secrets(password_file, token_file, mechanism, imported.target["kind"] == "imap")
    secrets = orders.sealed(services.keys, *found)
    services.database.write(lambda tx: passes.queue(tx, services.settings, number, secrets))
    return _started(services, number, wait=wait, here=here)


def _started(services: Services, number: int, *, wait: bool, here: bool) -> Answer:
    if here:
        _work(services, number)
    if wait or here:
        _watch(services, number)
        return _shown(services, number, waited=True)
    with services.database.read() as tx:
        job = records.get(tx, number).job_id
    return Answer(
        {"import": number, "job": job},
        f"Import {number} is queued as job {job}; `import mail watch {number}` shows how far it is.",
    )


def _work(services: Services, number: int) -> None:
    """Run imports in this process until this one ends or pauses."""
    handler = Handler(passes.Passes(services.settings, services.database, services.keys).run)
    runner = Runner(services.database, (), {passes.KIND: handler}, services.settings.jobs)
    while _state(services, number)[0] in records.ACTIVE:
        if not runner.step():
            time.sleep(_LOOK_S)


def _state(services: Services, number: int) -> tuple[str, dict[str, Any] | None]:
    """An import's state, and its job: one that was cancelled while it waited has ended."""
    with services.database.read() as tx:
        imported = records.get(tx, number)
        try:
            job = jobs.get_job(tx, imported.job_id or 0)
        except ClientError:
            return imported.state, None
    ended = job["state"] in ("failed", "cancelled") and imported.state in records.ACTIVE
    return (job["state"] if ended else imported.state), job


def _watch(services: Services, number: int) -> None:
    """Show one line that changes, at a terminal; else a line whenever something is new."""
    shown = ""
    while True:
        state, job = _state(services, number)
        line = f"{state}: {_said(job)}" if job else state
        if line != shown:
            click.echo(
                f"\r\x1b[K{line}" if sys.stderr.isatty() else line, err=True, nl=not sys.stderr.isatty()
            )
            shown = line
        if state not in records.ACTIVE:
            if sys.stderr.isatty():
                click.echo(err=True)
            return
        time.sleep(_LOOK_S)


def _said(job: dict[str, Any]) -> str:
    progress = job["progress"] or {}
    parts = [str(progress[name]) for name in ("note",) if name in progress]
    if "messages" in progress:
        parts.append(f"{progress['messages']} of {progress['of']} messages")
    if "mb" in progress:
        parts.append(f"{progress['mb']}{' of ' + str(progress['of_mb']) if 'of_mb' in progress else ''} MB")
    if progress.get("seconds_left"):
        parts.append(f"{progress['seconds_left']} s left")
    if job["state"] == "ready" and job["run_at"] > time.time():
        parts.append(f"goes on at {time.strftime('%H:%M:%SZ', time.gmtime(job['run_at']))}")
    return ", ".join(parts) or "-"


@command(mail, "watch")
@_number
def _mail_watch(services: Services, number: int) -> Answer:
    """Show how far an import is until it ends, then its report."""
    _watch(services, number)
    return _shown(services, number, waited=True)


@command(mail, "show")
@_number
def _mail_show(services: Services, number: int) -> Answer:
    """Show an import's state, and the report of its last pass."""
    return _shown(services, number)


def _shown(services: Services, number: int, *, waited: bool = False) -> Answer:
    with services.database.read() as tx:
        imported = records.get(tx, number)
    state, job = _state(services, number)
    data = {
        "id": number,
        "state": state,
        "source": imported.source,
        "target": imported.target,
        "options": imported.options,
        "passes": imported.passes,
        "resume_at": job["run_at"] if job and job["state"] == "ready" else None,
        "progress": job["progress"] if job else None,
        "report": imported.report,
    }
    if imported.report is None or state in records.ACTIVE:
        text = f"Import {number} is {state}: {_said(job) if job else '-'}"
    else:
        text = "\n".join(letters.words(imported, state, imported.report))
    if state == "incomplete" or (waited and state in ("failed", "cancelled")):
        click.get_current_context().call_on_close(_incomplete)
    return Answer(data, text)


def _incomplete() -> None:
    """Not all of it came: scripts see it."""
    raise click.exceptions.Exit(1)


@command(mail, "list")
@click.option("--batch", type=int, help="Those of one file.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=100, show_default=True)
def _mail_list(services: Services, batch: int | None, limit: int) -> Answer:
    """List imports, the newest first."""
    with services.database.read() as tx:
        found = records.list_imports(tx, batch=batch, limit=limit)
    rows = []
    for each in found:
        report = each.report or {}
        target = each.target
        rows.append(
            {
                "id": each.id,
                "state": _state(services, each.id)[0],
                "user": each.source["user"],
                "from": each.source["host"],
                "to": target.get("path") or target.get("address") or target["server"]["user"],
                "copied": report.get("copied"),
                "refused": report.get("refused"),
                "created_at": each.created_at,
                "ended_at": each.ended_at,
            }
        )
    return Answer(rows, table(rows, "There is no import."))


@command(mail, "cancel")
@_number
def _mail_cancel(services: Services, number: int) -> Answer:
    """End an import; what is copied stays."""

    def run(tx: Any) -> str:
        imported = records.get(tx, number)
        if imported.state not in records.ACTIVE or imported.job_id is None:
            raise Conflict(f"Import {number} is {imported.state} already.")
        return jobs.cancel(tx, imported.job_id)

    state = services.database.write(run)
    passes.end_abandoned(services.settings, services.database)
    text = "is cancelled" if state == "cancelled" else "ends in a moment"
    return Answer({"id": number, "state": state}, f"Import {number} {text}.")


@command(mail, "bulk")
@click.argument("file", type=click.File("r", encoding="utf-8", lazy=False))
@click.option("--name", help="Of the batch; the file's without this.")
@click.option("--notify", default="", metavar="ADDRESS", help="Gets one summary when all have ended.")
@click.option("--good-rows", is_flag=True, help="Import the good rows where others are bad.")
@click.option(
    "--organization", "organization_id", type=int, help="Make the mailboxes that are missing, as its."
)
@_token_file
@click.option("--ca-file", default="", help="Certificates to trust instead of the system's.")
def _mail_bulk(
    services: Services,
    file: TextIO,
    name: str | None,
    notify: str,
    good_rows: bool,
    organization_id: int | None,
    token_file: BinaryIO | None,
    ca_file: str,
) -> Answer:
    """Import many mailboxes that a CSV file lists; all rows are checked before any log-in, and where some are
    bad nothing is queued without --good-rows.

    Columns: host, user, password; to_mailbox, or to_maildir, or to_host with to_user and to_password; where
    needed port, security, mechanism, to_port, to_security, into, notify. --token-file is for rows without a
    password.
    """
    token = "" if token_file is None else tokens.written(token_file.read())
    try:
        text = file.read()
    except UnicodeDecodeError:
        raise BadRequest("The file of imports is not in UTF-8.") from None
    rows, mistakes = orders.parse(text, notify=_told(services, notify), token_file=token, ca_file=ca_file)
    for mistake in mistakes:
        click.echo(f"line {mistake.line}: {mistake.text}", err=True)
    if not rows and not mistakes:
        raise BadRequest("The file lists no mailbox below its first line.")
    if not rows or (mistakes and not good_rows):
        raise BadRequest(f"{len(mistakes)} bad rows; nothing is imported. --good-rows imports the others.")
    called = name or Path(file.name).name

    def make(tx: Write, address: str) -> Mailbox:
        found = mailboxes.find(tx, address)
        if found is not None or organization_id is None:
            return found or mailboxes.get(tx, address)
        hosts = services.settings.hosts.log_in
        return mailboxes.create(tx, services.offers, organization_id, address, sync_hosts=hosts)

    batch, made = services.database.write(
        lambda tx: orders.place_all(tx, services.settings, services.keys, called, rows, notify, make)
    )
    data = {"batch": batch, "imports": made, "refused": [asdict(each) for each in mistakes]}
    return Answer(data, f"Batch {batch}: {len(made)} imports are queued, {len(mistakes)} rows are refused.")
