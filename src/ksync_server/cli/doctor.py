"""`ksync-server doctor`: is everything around the server as it should be, and if not, what to do.

Each check is a function of the settings that yields findings; `CHECKS` lists them. It talks to nobody but
what the configuration names: the database, the relay, and this server by its own public names.
"""

from __future__ import annotations

import datetime
import http.client
import json
import os
import secrets
import smtplib
import socket
import ssl
import stat
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksync_server import disk, tls
from ksync_server.cli.context import Context, configured
from ksync_server.errors import ConfigError, KsyncError
from ksync_server.networks import is_loopback, parse
from ksync_server.settings import Settings

if TYPE_CHECKING:
    from ksync_server.store.database import Database

OK, WARNING, PROBLEM = "ok", "warning", "problem"

_TIMEOUT_S = 10.0
_RENEW_DAYS = 14  # certbot renews 30 days before the end
_SLOW_MS = 10.0
_READS = 20
_CLOCK_WARNING_S = 2.0
_TOTP_STEP_S = 30
_HTTPS_PORT = 443


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, how it is, and what to do about it."""

    what: str
    state: str  # ok, warning or problem
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Outside:
    """How this server is reached by its public names."""

    port: int = _HTTPS_PORT
    ca_file: Path | None = None  # authorities beside those of the system


Check = Callable[[Settings, Outside], Iterator[Finding]]


@click.command()
@configured
@click.option("--port", default=_HTTPS_PORT, show_default=True, help="HTTPS port that clients use.")
@click.option(
    "--ca-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Certificate authority to trust beside those of the system.",
)
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.pass_obj
def doctor(
    context: Context,
    port: int,
    ca_file: Path | None,
    as_json: bool,
) -> None:
    """Look at names, certificates, clock, disks, database and relay; exit 1 when there is a problem."""
    found = list(examine(context.settings(), Outside(port, ca_file)))
    if as_json:
        click.echo(json.dumps({"ok": not _problems(found), "findings": [asdict(each) for each in found]}))
    else:
        for each in found:
            click.echo(f"{each.state.upper():<8} {each.what}: {each.text}")
            if each.advice:
                click.echo(f"{'':<8} -> {each.advice}")
        problems, warnings = _problems(found), sum(each.state == WARNING for each in found)
        click.echo(f"{problems} problems, {warnings} warnings.")
    if _problems(found):
        raise SystemExit(1)


def _problems(found: list[Finding]) -> int:
    return sum(each.state == PROBLEM for each in found)


def examine(settings: Settings, outside: Outside) -> Iterator[Finding]:
    """Run every check."""
    for check in CHECKS:
        yield from check(settings, outside)


# -- files and disks ------------------------------------------------------------------------------


def check_files(settings: Settings, _: Outside) -> Iterator[Finding]:
    """Key file, database, blobs and mailboxes belong to us and are nobody else's to read."""
    yield _file("key file", settings.auth.key_file, "It is made at the first start; back it up by itself.")
    if settings.database.url.startswith("sqlite:///"):
        path = Path(settings.database.url.removeprefix("sqlite:///"))
        yield _file("database file", path, "Run `ksync-server migrate`.")
    if not settings.s3.bucket:
        yield _file("blobs folder", settings.blobs.path, "It is made at the first start.")
    if settings.mail.dovecot_socket and not settings.mail.owner:
        yield _file("folder of the mailboxes", settings.mail.folders, "It is made at the first start.")
    for path in settings.tls.keys:
        yield _file("private key", path, "Give tls.keys the path of the certificate's key.")


def _file(what: str, path: Path, missing: str) -> Finding:
    try:
        status = path.stat()
    except FileNotFoundError:
        return Finding(what, WARNING, f"{path} is not there", missing)
    except OSError as error:
        return Finding(what, PROBLEM, f"{path}: {error.strerror}", "Let the server's user enter the folder.")
    wanted = os.R_OK if what == "private key" else os.R_OK | os.W_OK
    if not os.access(path, wanted):
        return Finding(what, PROBLEM, f"{path} cannot be read or written by this user", f"chown {path}")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        state = PROBLEM if what == "key file" else WARNING
        mode = "0700" if path.is_dir() else "0600"
        return Finding(what, state, f"other users can open {path}", f"chmod {mode} {path}")
    return Finding(what, OK, str(path))


def check_disks(settings: Settings, _: Outside) -> Iterator[Finding]:
    """Room above the reserve, and soon enough a word when it gets little."""
    for name, folder in disk.folders(settings).items():
        what = f"disk of the {name}"
        space = disk.measure(folder)
        if space is None:
            yield Finding(what, PROBLEM, f"{folder} does not answer", "Is it mounted?")
            continue
        reserve = space.reserve(settings)
        text = f"{space.free / 1e9:.1f} GB free of {space.total / 1e9:.1f} GB"
        advice = "Free space or enlarge the disk; disk.reserve_bytes is what is kept free."
        if space.free < reserve:
            yield Finding(what, PROBLEM, f"{text}: what grows is refused with 507", advice)
        elif space.free < 3 * reserve or space.free < space.total * 0.05:
            yield Finding(what, WARNING, text, advice)
        else:
            yield Finding(what, OK, text)


def check_bucket(settings: Settings, _: Outside) -> Iterator[Finding]:
    """S3 lets us write, read, list and erase under our prefix."""
    if not settings.s3.bucket:
        return
    from ksync_server.store.blobs import open_extents

    what = f"bucket {settings.s3.bucket}"
    try:
        open_extents(settings).check()
    except ConfigError as error:
        advice = "Look at [s3]: bucket, endpoint, region and credentials."
        yield Finding(what, PROBLEM, str(error), advice)
    else:
        yield Finding(what, OK, settings.s3.endpoint or settings.s3.region)


# -- database, clock ------------------------------------------------------------------------------


def check_database(settings: Settings, _: Outside) -> Iterator[Finding]:
    """Reachable, of this schema, durable, near, and of one mind with us about the time."""
    from ksync_server.store.database import Database

    url = settings.database.url
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
        yield Finding("database", PROBLEM, "there is none yet", "Run `ksync-server migrate`.")
        return
    try:
        database = Database(settings.database, threads=1)
    except ConfigError as error:
        yield Finding("database", PROBLEM, str(error))
        return
    try:
        yield from _database(database, settings)
    except KsyncError as error:
        text = str(error) or "does not answer"
        yield Finding("database", PROBLEM, text, "Is it running, and is database.url right?")
    finally:
        database.close()


def _database(database: Database, settings: Settings) -> Iterator[Finding]:
    import sqlalchemy as sa

    from ksync_server.store import schema

    def value(sql: str) -> Any:
        return database.fast(sa.text(sql))[0][0]

    found = schema.current(database)
    if found != schema.SCHEMA:
        text = f"schema {found}, this program has {schema.SCHEMA}"
        yield Finding("database", PROBLEM, text, "Run `ksync-server migrate`.")
        return
    sqlite = database.dialect == "sqlite"
    version = str(value("SELECT sqlite_version()" if sqlite else "SELECT version()")).split(" on ")[0]
    yield Finding("database", OK, f"{'SQLite ' if sqlite else ''}{version}, schema {found}")
    if sqlite and settings.database.durability != "full":
        text = "a power cut may lose what was acknowledged"
        yield Finding("durability", WARNING, text, 'database.durability = "full"')
    switches = () if sqlite else ("fsync", "synchronous_commit")
    off = [name for name in switches if value(f"SHOW {name}") == "off"]
    if off:
        text = f"{' and '.join(off)} off: a power cut may lose what was acknowledged"
        yield Finding("durability", WARNING, text, "Turn it on in postgresql.conf.")
    took = []
    for _ in range(_READS):
        began = time.perf_counter()
        value("SELECT 1")
        took.append((time.perf_counter() - began) * 1000)
    median = statistics.median(took)
    yield Finding(
        "database latency",
        OK if median < _SLOW_MS else WARNING,
        f"{median:.2f} ms for the simplest question",
        "" if median < _SLOW_MS else "Every request asks several: put the server near its database.",
    )
    if not sqlite:
        began = time.time()
        there = float(value("SELECT extract(epoch FROM clock_timestamp())"))
        yield _clock("clock and database", there - (began + time.time()) / 2, settings)
    yield from _documents(database)


def _documents(database: Database) -> Iterator[Finding]:
    """Documents of identity checks are deleted in time."""
    from ksync_server.auth import recovery

    with database.read() as tx:
        kept = recovery.documents_kept(tx)
    for sync_id, until in sorted(kept.items()):
        late = until < time.time()
        day = datetime.datetime.fromtimestamp(until, datetime.UTC)
        text = f"{'should have been' if late else 'are to be'} deleted by {day:%Y-%m-%d %H:%M} UTC"
        advice = f"Delete them, then `ksync-server account identity-check {sync_id} --documents-deleted`."
        yield Finding(f"identity documents of {sync_id}", PROBLEM if late else WARNING, text, advice)


def _clock(what: str, drift: float, settings: Settings) -> Finding:
    text = f"{abs(drift):.1f} s apart"
    advice = "Keep both in time with NTP (systemd-timesyncd, chrony)."
    if abs(drift) > settings.auth.totp_window_steps * _TOTP_STEP_S:
        return Finding(what, PROBLEM, f"{text}: codes of second factors are refused", advice)
    return Finding(what, WARNING, text, advice) if abs(drift) > _CLOCK_WARNING_S else Finding(what, OK, text)


# -- names, certificates, the way in --------------------------------------------------------------


def _public(settings: Settings) -> tuple[str, ...]:
    """The names that clients use: one of each sync host, and a drive that nobody has."""
    return (*settings.hosts.sync, _some_drive(settings))


def _some_drive(settings: Settings) -> str:
    number = secrets.randbelow(9 * 10**17) + 10**17
    return f"{number}.{settings.hosts.drive_suffix.lstrip('.')}"


def check_names(settings: Settings, outside: Outside) -> Iterator[Finding]:
    """Every host has an address, drives through a wildcard."""
    for host in _public(settings):
        drive = host not in settings.hosts.sync
        shown = f"*.{settings.hosts.drive_suffix.lstrip('.')}" if drive else host
        try:
            found = socket.getaddrinfo(host, outside.port, type=socket.SOCK_STREAM)
        except OSError as error:
            advice = f"Add an A (and AAAA) record for {shown}" + (
                ", a wildcard; without one use the path form, hosts.paths." if drive else "."
            )
            yield Finding(f"name {shown}", PROBLEM, f"has no address ({error.strerror or error})", advice)
        else:
            addresses = sorted({str(place[4][0]) for place in found})
            yield Finding(f"name {shown}", OK, ", ".join(addresses))


def check_certificates(settings: Settings, _: Outside) -> Iterator[Finding]:
    """Our own certificates open, last, and cover the names."""
    if not settings.tls.certificates:
        return
    try:
        tls.Certificates(settings.tls)
        found = [tls.read(path) for path in settings.tls.certificates]
    except ConfigError as error:
        yield Finding("certificate", PROBLEM, str(error), "tls.certificates and tls.keys are pairs.")
        return
    now = datetime.datetime.now(datetime.UTC)
    for path, each in zip(settings.tls.certificates, found, strict=True):
        what, days = f"certificate {path}", (each.not_after - now).total_seconds() / 86400
        if days < 0 or each.not_before > now:
            text = f"is valid from {each.not_before:%Y-%m-%d} to {each.not_after:%Y-%m-%d} only"
            yield Finding(what, PROBLEM, text, "Renew it; the new files are used at once.")
        elif days < _RENEW_DAYS:
            text = f"ends in {days:.0f} days"
            yield Finding(
                what, WARNING, text, "Who renews it, and copies it here? See deploy/certbot-hook.sh."
            )
        else:
            yield Finding(what, OK, f"until {each.not_after:%Y-%m-%d}, {each.chain} in the chain")
    for host in _public(settings):
        if not any(each.serves(host) for each in found):
            shown = host if host in settings.hosts.sync else f"*.{settings.hosts.drive_suffix.lstrip('.')}"
            text = "no certificate has this name"
            yield Finding(f"certificate for {shown}", PROBLEM, text, "Have one issued.")


def check_way_in(settings: Settings, outside: Outside) -> Iterator[Finding]:
    """The server answers by its public names over HTTPS, and knows that it is HTTPS."""
    context = ssl.create_default_context()
    if outside.ca_file is not None:
        context.load_verify_locations(outside.ca_file)
    clock_told = False
    for host in _public(settings):
        base = f"https://{host}" + ("" if outside.port == _HTTPS_PORT else f":{outside.port}")
        what = f"way in by {base if host in settings.hosts.sync else 'a drive host'}"
        drive = host not in settings.hosts.sync
        try:
            before = time.time()
            status, headers, text = _get(host, outside.port, context, "/" if drive else "/.well-known/caldav")
            seen = (before + time.time()) / 2
            if not drive and status == 301:
                status, headers, text = _get(host, outside.port, context, "/")
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error)
            advice = "Is the server, or the proxy before it, running there, with a certificate for the name?"
            yield Finding(what, PROBLEM, str(reason), advice)
            continue
        yield _entrance(what, status, headers, text)
        if not clock_told and "date" in headers:
            clock_told = True
            there = parsedate_to_datetime(headers["date"]).timestamp() + 0.5  # it has whole seconds
            yield _clock("clock and answers from outside", there - seen, settings)


def _get(host: str, port: int, context: ssl.SSLContext, path: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=context)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.headers.items()}
        return answer.status, headers, answer.read(10_000).decode(errors="replace")
    finally:
        connection.close()


def _entrance(what: str, status: int, headers: dict[str, str], text: str) -> Finding:
    """What the answer to a request without a password tells; 401 is right."""
    if "x-request-id" not in headers:
        text = f"another program answers ({status})"
        return Finding(what, PROBLEM, text, "Let the proxy send this name to ksync-server.")
    if status == 401 and "www-authenticate" in headers:
        return Finding(what, OK, "asks for a password over HTTPS")
    if status in (301, 308) or (status == 403 and "HTTPS" in text):
        advice = "The proxy sends X-Forwarded-Proto, and server.trusted_proxies names its address."
        return Finding(what, PROBLEM, "the server takes the request for plain HTTP", advice)
    if status == 421:
        advice = "Set hosts.sync and hosts.drive_suffix; a proxy has to keep the Host header."
        return Finding(what, PROBLEM, "the server does not know the name", advice)
    return Finding(what, PROBLEM, f"answered {status}", "See the server's log.")


def check_proxies(settings: Settings, _: Outside) -> Iterator[Finding]:
    """What is believed of neighbours, and what goes over the wire in the clear."""
    server = settings.server
    for name in ("trusted_proxies", "proxy_protocol"):
        wide = [each for each in getattr(server, name) if each.endswith("/0")]
        if wide:
            text = f"server.{name} believes everybody ({', '.join(wide)})"
            yield Finding("proxies", PROBLEM, text, "Name the addresses of your proxies.")
    if not server.listen_tls and not server.trusted_proxies and all(_local(each) for each in server.listen):
        text = "only this machine can reach the server, and no proxy is named"
        advice = "Name your TLS proxy (deploy/) in server.trusted_proxies, or all clients look alike."
        yield Finding("proxies", WARNING, text, advice)
    open_hosts = [each for each in server.listen if not _local(each)]
    if server.allow_plain_http and open_hosts:
        text = f"passwords travel in the clear to {', '.join(open_hosts)}"
        yield Finding("plain HTTP", WARNING, text, "server.allow_plain_http = false")
    if server.admin_listen and not _local(server.admin_listen):
        text = f"the admin address {server.admin_listen} is open to others"
        yield Finding("admin address", WARNING, text, "Bind it to loopback, or let a firewall close it.")


def _local(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    return host == "localhost" or (parse(host) is not None and is_loopback(host))


# -- mail -----------------------------------------------------------------------------------------


def check_relay(settings: Settings, _: Outside) -> Iterator[Finding]:
    """The relay for mail greets us and encrypts as the settings say; nothing is sent."""
    mail = settings.mail
    if mail.relay:
        yield relay(mail.relay, mail.port, mail.security, mail.ca_file)


def relay(host: str, port: int, security: str, ca_file: str = "") -> Finding:
    """Greet a relay, and encrypt where `security` is starttls or tls."""
    what = f"relay {host}:{port}"
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
        if security == "tls":
            client: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=_TIMEOUT_S, context=context)
        else:
            client = smtplib.SMTP(host, port, timeout=_TIMEOUT_S)
        with client:
            client.ehlo()
            if security == "starttls":
                client.starttls(context=context)
                client.ehlo()
    except (OSError, smtplib.SMTPException) as error:
        reason = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error)
        return Finding(what, PROBLEM, str(reason), "See the settings of [mail]; is the port open?")
    return Finding(what, OK, "answers" + ("" if security == "none" else ", encrypted"))


def check_dovecot(settings: Settings, _: Outside) -> Iterator[Finding]:
    """Dovecot, whose log-ins are asked about at our socket, gets an answer."""
    path = settings.mail.dovecot_socket
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(_TIMEOUT_S)
            client.connect(path)
            client.sendall(b"find 40\n")  # the mailbox "@", which is nobody's
            answered = client.recv(100) == b"no\n"
    except OSError as error:
        advice = "Start the server; doctor has to run as its user."
        yield Finding("answers for Dovecot", PROBLEM, f"{path}: {error.strerror or error}", advice)
        return
    state, text = (OK, path) if answered else (PROBLEM, f"{path}: does not say who is nobody")
    yield Finding("answers for Dovecot", state, text, "" if answered else "See the log of the server.")


CHECKS: list[Check] = [
    check_files,
    check_disks,
    check_bucket,
    check_database,
    check_names,
    check_certificates,
    check_way_in,
    check_proxies,
    check_relay,
    check_dovecot,
]
