"""Ordering imports: what people say is checked whole before any server is asked, then tried and queued."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from ksync_server import settings as configuration
from ksync_server.auth import mailboxes
from ksync_server.auth.keys import Keys
from ksync_server.auth.mailboxes import Mailbox
from ksync_server.errors import BadRequest, Conflict, Permanent
from ksync_server.mailimport import passes, plan, records, tokens
from ksync_server.mailimport.connecting import connect
from ksync_server.mailimport.plan import Map, Options
from ksync_server.mailimport.servers import MECHANISMS, SECURITIES, Server
from ksync_server.mailimport.source import Source
from ksync_server.networks import Networks
from ksync_server.settings import MAIL_ADDRESS
from ksync_server.store.database import Write

_PORTS = {"tls": 993, "starttls": 143, "none": 143}
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.:-]{0,252}[A-Za-z0-9])?\Z")
_PASTED = re.compile(r"[a-z]{4}(?: [a-z]{4}){3}\Z")  # an app password as Google shows it
_LONGEST = 4096  # characters of a secret: access tokens are long
_SCAN_UIDS = 50_000
_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class Order:
    """One import as it was asked for."""

    source: Server
    source_secret: str
    target: dict[str, Any]  # as `records.Import.target`
    target_secret: str = ""
    options: Options = field(default_factory=Options)
    notify: str = ""
    mailbox: Mailbox | None = None  # where the destination is one of ours


def server(
    host: str,
    user: str,
    *,
    port: int | None = None,
    security: str = "tls",
    mechanism: str = "password",
    ca_file: str = "",
) -> Server:
    """A server and an account of it, as typed.

    Raises:
        BadRequest: says which word cannot be meant.
    """
    host = host.strip().rstrip(".")
    if not _HOST.match(host):
        raise BadRequest(f"{host!r} is no host name.")
    if security not in SECURITIES:
        raise BadRequest(f"Security is one of {', '.join(SECURITIES)}, not {security!r}.")
    if mechanism not in MECHANISMS:
        raise BadRequest(f"A log-in is by {' or '.join(MECHANISMS)}, not {mechanism!r}.")
    if not user or not user.isprintable() or len(user) > 320:
        raise BadRequest(f"{user!r:.60} is no user.")
    if port is not None and not 0 < port < 65536:
        raise BadRequest(f"{port} is no port.")
    return Server(host, port or _PORTS[security], user, security, mechanism, ca_file)


def secret(typed: str, mechanism: str = "password") -> str:
    """A password as it is meant: an app password that was pasted with its spaces has none; or a token file.

    Raises:
        BadRequest: it is empty, or cannot be one.
    """
    if mechanism == "oauth2":
        return tokens.written(typed)
    if tokens.is_file(typed):
        raise BadRequest("This is a token file, which only a log-in by oauth2 takes.")
    if not typed or len(typed) > _LONGEST or any(mark in typed for mark in "\0\r\n"):
        raise BadRequest("A password is one line, and not empty.")
    return typed.replace(" ", "") if _PASTED.match(typed) else typed


def imap_target(found: Server) -> dict[str, Any]:
    """Another server as destination."""
    return {"kind": "imap", "server": msgspec.to_builtins(found)}


def maildir_target(path: Path) -> dict[str, Any]:
    """A Maildir on this machine as destination.

    Raises:
        BadRequest: a file is in the way.
    """
    if path.exists() and not path.is_dir():
        raise BadRequest(f"{path} is a file.")
    return {"kind": "maildir", "path": str(path.resolve())}


def mailbox_target(mailbox: Mailbox) -> dict[str, Any]:
    """One of our mailboxes as destination."""
    return {"kind": "mailbox", "address": mailbox.address}


def place(
    tx: Write,
    settings: configuration.Settings,
    keys: Keys,
    order: Order,
    *,
    batch_id: int | None = None,
    taken: Mapping[tuple[str, ...], int] | None = None,
) -> int:
    """Make an import of an order and queue its first pass; its number.

    Raises:
        Conflict: see `passes.queue`, whose `taken` this is too.
    """
    number = records.create(
        tx,
        source=msgspec.to_builtins(order.source),
        target=order.target,
        options=msgspec.to_builtins(order.options),
        notify=order.notify,
        batch_id=batch_id,
        mailbox_id=None if order.mailbox is None else order.mailbox.id,
    )
    secrets = sealed(keys, order.source_secret, order.target_secret)
    passes.queue(tx, settings, number, secrets, taken=taken)
    return number


def sealed(keys: Keys, source_secret: str, target_secret: str) -> dict[str, bytes]:
    """Secrets as a job takes them."""
    found = {passes.SOURCE: keys.seal(source_secret.encode("utf-8"))}
    if target_secret:
        found[passes.TARGET] = keys.seal(target_secret.encode("utf-8"))
    return found


# -- trying -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Survey:
    """What an import would do."""

    host: str  # of the source, as it was found
    folders: tuple[dict[str, Any], ...]  # folder, to, messages, bytes
    messages: int
    bytes: int  # to fetch
    folder_bytes: int  # to fetch if each folder were copied by itself
    room: int | None  # bytes free at the destination; None = no quota
    gmail: bool


async def survey(settings: configuration.Settings, order: Order) -> Survey:
    """Log in at both sides and say what an import would do; nothing is changed anywhere.

    Raises:
        Permanent, Temporary: a server cannot be reached, trusted, or does not let us in.
        BadRequest: nothing is left to import.

    Cost: the sizes of all messages are asked for where the server has no sums.
    """
    networks = Networks("outbound.private_networks", settings.outbound.private_networks)
    limits = settings.mail_import
    connection = await connect(order.source, order.source_secret, limits, networks, utf8=True)
    try:
        source = Source(connection, limits)
        sink = await passes.open_sink(settings, order.target, order.target_secret, mailbox=order.mailbox)
        try:
            folders, _ = passes.sane(await source.folders())
            where = Map(await sink.places(), sink.separator, sink.prefix, order.options, source.prefix)
            room = await sink.room()
        finally:
            await sink.close()
        by_message = source.is_gmail and order.options.gmail == "message"
        roles = plan.uses(folders, source.prefix)
        rows: list[dict[str, Any]] = []
        unique = total = 0
        for folder in plan.chosen(folders, order.options):
            size = folder.size if folder.size is not None else await _size(source, folder)
            target = _by_label(folder, where) if by_message else where.folder(folder, roles)
            if by_message and folder.attributes & {plan.ALL, "\\junk", "\\trash"}:
                unique += size
            total += size
            rows.append({"folder": folder.name, "to": target, "messages": folder.messages, "bytes": size})
        views = {plan.ALL, "\\junk", "\\trash"}
        counted = [folder for folder in folders if not by_message or views & folder.attributes]
        return Survey(
            connection.server.host,
            tuple(rows),
            sum(folder.messages for folder in counted),
            unique if by_message and unique else total,
            total,
            None if room is None else max(room.limit - room.used, 0),
            by_message,
        )
    finally:
        await connection.close()


def _by_label(folder: plan.Folder, where: Map) -> str:
    """What becomes of a view of Gmail where messages go by their labels."""
    if plan.ALL in folder.attributes:
        return where.role("\\archive") + " (what has no label)"
    if plan.FLAGGED in folder.attributes:
        return "- (a flag)"
    if plan.IMPORTANT in folder.attributes:
        return "-"
    role = next((role for role in plan.ROLES if role in folder.attributes), None)
    if role is not None:
        return where.role(role)
    return where.inbox() if folder.name.upper() == "INBOX" else where.label(folder.name)


async def _size(source: Source, folder: plan.Folder) -> int:
    opened = await source.open(folder)
    total = 0
    for first in range(1, opened.uid_next, _SCAN_UIDS):
        total += sum(message.size for message in await source.scan(first, first + _SCAN_UIDS - 1))
    return total


def require_room(found: Survey) -> None:
    """Whether all of it fits.

    Raises:
        Permanent: it does not; says how much is missing.
    """
    if found.room is not None and found.bytes > found.room:
        raise Permanent(
            f"The destination has room for {found.room / 1e6:,.2f} MB,"
            f" the import needs {found.bytes / 1e6:,.2f} MB."
        )


# -- many at once -----------------------------------------------------------------------------------

_COLUMNS = (
    *("host", "port", "security", "user", "password", "mechanism", "into", "notify"),
    *("to_mailbox", "to_maildir", "to_host", "to_port", "to_security", "to_user", "to_password"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A good row of a file."""

    line: int
    order: Order
    mailbox: str  # address of the destination here; "" = elsewhere


@dataclass(frozen=True, slots=True)
class Mistake:
    """A row that cannot be done, and why."""

    line: int
    text: str


def parse(
    text: str, *, notify: str = "", token_file: str = "", ca_file: str = ""
) -> tuple[list[Row], list[Mistake]]:
    """A CSV file of imports, checked as a whole; no server is asked.

    Its first line names the columns: host, user and password; then to_mailbox, to_maildir, or to_host with
    to_user and to_password; and port, security, mechanism, into, notify where they are not the usual ones.

    Args:
        token_file: on one line (`tokens.written`), for the rows without a password.
        ca_file: certificates to trust instead of the system's, at all servers.

    Raises:
        BadRequest: no such file: a column that nobody knows, or none of the needed ones.
    """
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff")), dialect=_dialect(text), strict=True)
    try:
        names = [name.strip().lower() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise BadRequest(f"This is no CSV file: {error}.") from None
    unknown = sorted(set(names) - set(_COLUMNS))
    needed = {"host", "user"} | (set() if token_file else {"password"})
    if unknown or not needed <= set(names):
        known = ", ".join(_COLUMNS)
        raise BadRequest(
            f"There is no column {unknown[0]!r}."
            if unknown
            else f"Needed are host, user and password, of {known}."
        )
    reader.fieldnames = names
    good: list[Row] = []
    bad: list[Mistake] = []
    seen: dict[tuple[object, ...], int] = {}
    try:
        for values in reader:
            line = reader.line_num
            if len(good) + len(bad) >= _ROWS:
                raise BadRequest(f"A file has at most {_ROWS} rows.")
            try:
                if None in values:
                    raise BadRequest("It has more values than there are columns.")
                row = _row(
                    line, {name: (value or "") for name, value in values.items()}, notify, token_file, ca_file
                )
                target = row.mailbox or json.dumps(row.order.target, sort_keys=True)
                key = (row.order.source.host.lower(), row.order.source.user.lower(), target.lower())
                if key in seen:
                    raise BadRequest(f"It says the same as line {seen[key]}.")
                seen[key] = line
                good.append(row)
            except BadRequest as error:
                bad.append(Mistake(line, str(error)))
    except csv.Error as error:
        bad.append(Mistake(reader.line_num, f"this is no CSV: {error}"))
    return good, bad


def _dialect(text: str) -> type[csv.Dialect]:
    class Found(csv.excel):
        delimiter = ";" if text.partition("\n")[0].count(";") > text.partition("\n")[0].count(",") else ","

    return Found


def _row(line: int, values: Mapping[str, str], notify: str, token_file: str, ca_file: str) -> Row:
    def number(name: str) -> int | None:
        text = values.get(name, "").strip()
        if text and not text.isdigit():
            raise BadRequest(f"{text!r} is no port.")
        return int(text) if text else None

    mechanism = values.get("mechanism", "").strip().lower()
    is_by_file = bool(token_file) and not values.get("password") and mechanism in ("", "oauth2")
    mechanism = "oauth2" if is_by_file else mechanism or "password"
    source = server(
        values["host"],
        values["user"].strip(),
        port=number("port"),
        security=values.get("security", "").strip().lower() or "tls",
        mechanism=mechanism,
        ca_file=ca_file,
    )
    targets = [name for name in ("to_mailbox", "to_maildir", "to_host") if values.get(name, "").strip()]
    if len(targets) != 1:
        raise BadRequest("It needs one of to_mailbox, to_maildir and to_host.")
    told = values.get("notify", "").strip() or notify
    if told and not MAIL_ADDRESS.fullmatch(told):
        raise BadRequest(f"{told!r} is no e-mail address.")
    mailbox, target, target_secret = "", {}, ""
    if targets == ["to_mailbox"]:
        mailbox = values["to_mailbox"].strip()
        if not MAIL_ADDRESS.fullmatch(mailbox):
            raise BadRequest(f"{mailbox!r} is no e-mail address.")
    elif targets == ["to_maildir"]:
        target = maildir_target(Path(values["to_maildir"].strip()))
    else:
        target = imap_target(
            server(
                values["to_host"],
                values.get("to_user", "").strip(),
                port=number("to_port"),
                security=values.get("to_security", "").strip().lower() or "tls",
                ca_file=ca_file,
            )
        )
        target_secret = secret(values.get("to_password", ""))
    order = Order(
        source,
        token_file if is_by_file else secret(values.get("password", ""), mechanism),
        target,
        target_secret,
        Options(into=values.get("into", "").strip()),
        told,
    )
    return Row(line, order, mailbox)


def place_all(
    tx: Write,
    settings: configuration.Settings,
    keys: Keys,
    name: str,
    rows: Iterable[Row],
    notify: str,
    make: Callable[[Write, str], Mailbox] = mailboxes.get,
) -> tuple[int, list[int]]:
    """Queue a file's imports as one batch: its number, and those of the imports.

    Each has its own e-mail only where its row says so; the batch has one summary.

    Args:
        make: gives the mailbox of an address.

    Raises:
        ClientError: from `make`, or an import goes the same way already; nothing is queued.
    """
    taken = passes.taken_ways(tx)
    batch = records.create_batch(tx, name, notify)
    made = []
    for row in rows:
        order = row.order if row.order.notify != notify else replace(row.order, notify="")
        if row.mailbox:
            mailbox = make(tx, row.mailbox)
            order = replace(order, mailbox=mailbox, target=mailbox_target(mailbox))
        try:
            made.append(place(tx, settings, keys, order, batch_id=batch, taken=taken))
        except Conflict as error:
            raise Conflict(f"Line {row.line}: {error}") from None
    return batch, made
