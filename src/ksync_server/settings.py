"""Configuration files -> frozen values; every limit with its unit and its reason.

A field's comment is its documentation's source: `config/ksync.toml` shows every key with its default,
and a test compares both.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ksync_server.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB
GB = 10**9


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One table of the file; an unknown key is a mistake, never ignored."""


class Server(Section, frozen=True):
    """Sockets, processes and what one connection may do."""

    listen: tuple[str, ...] = ("127.0.0.1:8080",)  # plain HTTP; may be empty beside listen_tls
    listen_tls: tuple[str, ...] = ()  # HTTPS, with the certificates of [tls]
    admin_listen: str = "127.0.0.1:8081"  # /healthz, /readyz, /metrics; empty = none
    workers: int = 2  # web processes; one per core is right
    threads: int = 8  # pool threads per web process, and so PostgreSQL connections
    header_bytes: int = 32 * KIB  # a request line and its headers; real clients stay under 8 KiB
    header_timeout_s: float = 10.0  # from the first byte of a request to the end of its headers
    idle_timeout_s: float = 75.0  # a kept-alive connection without a request
    body_timeout_s: float = 60.0  # between two pieces of a request body, or of an answer being taken
    drain_bytes: int = 64 * MIB  # of a refused upload still read, so that the client sees the status
    drain_s: float = 3.0
    shutdown_timeout_s: float = 30.0  # what a request may still take after the stop signal
    trusted_proxies: tuple[str, ...] = ()  # addresses or networks whose X-Forwarded-* is believed
    proxy_protocol: tuple[str, ...] = ()  # networks whose connections begin with a PROXY header, v1 or v2
    allow_plain_http: bool = False  # Basic over plain HTTP from elsewhere than loopback
    redirect_https_port: int = 0  # plain requests are redirected to https:// on this port; 0 = none
    connections: int = 2000  # open at once per web process; more wait in the backlog
    address_connections: int = 1000  # of one address (IPv6: /64) but proxies and loopback; 0 = all
    handshakes: int = 500  # and PROXY headers awaited per web process; then the oldest is let go
    handshake_timeout_s: float = 10.0  # of each of them


class Tls(Section, frozen=True):
    """Certificates for server.listen_tls. Changed files are used for new connections within two seconds."""

    certificates: tuple[Path, ...] = ()  # PEM, chain included; the first serves names that no other one has
    keys: tuple[Path, ...] = ()  # PEM, not encrypted, one per certificate and in the same order
    minimum_version: str = "1.2"  # or 1.3
    ciphers: str = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2; 1.3 has only good ones


class Disk(Section, frozen=True):
    """A disk of database or blobs that is nearly full: what grows is answered 507, all else goes on."""

    reserve_bytes: int = 512 * MIB  # free space that uploads leave alone; 0 = they fill the disk
    reserve_percent: float = 0.0  # the same in percent of the disk; the larger of the two counts
    resume_percent: float = 110.0  # of the reserve has to be free again before writes go on


class Hosts(Section, frozen=True):
    """Which Host header means which site."""

    sync: tuple[str, ...] = ("sync.localhost",)
    drive_suffix: str = "connect.localhost"  # <id>.<drive_suffix>
    paths: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")  # / sync, /drives/<id>/ drive

    @property
    def log_in(self) -> tuple[str, ...]:
        """Every host that serves calendars: what may stand behind a sync id's @ (ACC3)."""
        return (*self.sync, *(name.strip("[]") for name in self.paths))


class Database(Section, frozen=True):
    """Rows. `sqlite:///relative.db`, `sqlite:////absolute.db` or `postgresql://user@host/name`."""

    url: str = "sqlite:///data/ksync.db"
    durability: str = "full"  # SQLite: full (survives a power cut) or normal (survives kill -9)
    group_writes: int = 64  # writes committed with one disk flush
    busy_timeout_s: float = 10.0  # a queued write waits this long before 503


class Blobs(Section, frozen=True):
    """Bytes."""

    path: Path = Path("data/blobs")
    inline_bytes: int = 16 * KIB  # up to here content is a row: cheaper than a file and needs no own flush
    extent_bytes: int = 64 * MIB  # larger content is cut into immutable files of this size
    stage_lease_s: float = 600.0  # an unpublished upload without a heartbeat is reaped after this
    reap_after_s: float = 86400.0  # unreferenced extents stay this long: the longest download
    scrub_days: int = 30  # every byte is read and compared with its checksum once in this time; 0 = never
    scrub_bytes_s: int = 50 * 10**6  # the scrub reads no faster, so that clients do not feel it
    scrub_slice_s: float = 60.0  # it lets other work of the job worker in after this


class S3(Section, frozen=True):
    """Bytes as objects of an S3 bucket instead of local files; needs the extra `s3` (obstore)."""

    bucket: str = ""  # empty = local files under blobs.path
    prefix: str = ""  # in front of every key, so that several stores can share a bucket
    endpoint: str = ""  # https://s3.example.org; empty = Amazon's of the region
    region: str = "us-east-1"
    path_style: bool = True  # the bucket in the path; false = in the host name
    credentials_file: str = ""  # as ~/.aws/credentials, mode 0600; empty = AWS_* in the environment
    extent_bytes: int = 8 * MIB  # one object, sent whole from memory: an upload holds at most two
    memory_bytes: int = 256 * MIB  # of all uploads of a process; beyond they wait, and objects get smaller
    requests: int = 8  # objects of all uploads of a process sent at once
    timeout_s: float = 30.0  # of one request
    patience_s: float = 20.0  # errors and silence are asked again for so long, then the client gets 503


class Auth(Section, frozen=True):
    """The door."""

    key_file: Path = Path("data/keys.toml")  # pepper and encryption keys, 0600, made on first start
    realm: str = "ksync"
    password_bytes: int = 1024  # longest secret looked at; argon2 of more is a denial of service
    argon2_memory_kib: int = 19456  # OWASP: 19 MiB, t=2, p=1
    argon2_time: int = 2
    argon2_parallel: int = 2  # verifications at once per process; each holds 19 MiB
    argon2_queue: int = 64  # waiting verifications before 503
    cache_entries: int = 100_000  # accounts whose good password is remembered, for all web processes: 13 MB
    cache_s: float = 86400.0  # sliding; a changed auth_epoch ends an entry at once
    totp_window_steps: int = 1  # accepted clock error in 30 s steps, either side
    last_used_s: float = 60.0  # "last used" of a secret is written at most this often
    throttle_window_s: float = 900.0  # distinct wrong account passwords are counted together for this long
    throttle_place_failures: int = 5  # for one name from one network (IPv4 address, IPv6 /64); 0 = no limit
    throttle_name_failures: int = 20  # for one name from anywhere but where it logged in well before
    throttle_network_failures: int = 10  # from one network for any names
    throttle_shared: tuple[str, ...] = ("127.0.0.0/8", "::1")  # networks never blocked as a whole: offices
    throttle_block_s: float = 900.0  # the first block; each repetition is throttle_factor times longer
    throttle_factor: int = 4
    throttle_longest_s: float = 86400.0  # no block is longer; as long is a block remembered after its end
    throttle_trust_s: float = 2_592_000.0  # a network that logged in well is known for 30 days
    throttle_most: int = 100  # failures after which a blocked place is not even compared with the memory
    throttle_write_s: float = 1.0  # counts are written together, at most this often per process


class Accounts(Section, frozen=True):
    """What becomes of accounts, and of log-in addresses, that are deleted."""

    grace_days: int = 30  # a deleted account can be restored this long; then its data is erased
    hosted_domains: tuple[str, ...] = ()  # whose mailboxes are here: a log-in address there ends with its own


class Xml(Section, frozen=True):
    """Request bodies in XML."""

    max_bytes: int = MIB  # the largest real one is a multiget of some 1,000 hrefs, 150 kB
    max_depth: int = 64
    max_elements: int = 50_000
    max_hrefs: int = 10_000  # of one multiget


class Dav(Section, frozen=True):
    """Calendars and contacts."""

    max_object_bytes: int = 10 * MIB  # one .ics or .vcf, photo included
    max_properties: int = 20_000  # content lines of one object
    max_attendees: int = 1_000
    max_timezones: int = 32  # VTIMEZONE components of one object
    max_dates: int = 2_000  # RDATE and EXDATE values of one object
    max_collections: int = 1_000  # per account and kind
    max_objects: int = 100_000  # per collection
    max_property_bytes: int = 64 * KIB  # one dead property's XML
    max_dead_bytes: int = 128 * KIB  # all dead properties of one collection: a home is listed from memory
    recurrence_steps: int = 40_000  # loop steps one request may spend on one object: some 50 ms
    max_instances: int = 20_000  # instances of one expand or free-busy answer
    max_answer_bytes: int = 32 * MIB  # of one expanded answer
    reports_at_once: int = 2  # of one account and web process in the pool; more wait, so that others get on
    sync_page_rows: int = 200  # rows read between two sends of a streamed answer
    max_sync_rows: int = 50_000  # members in one sync answer before 507 and a resuming token
    body_cache_bytes: int = 16 * MIB  # rendered answers kept per web process
    tombstone_days: int = 180  # deleted names stay in the change log this long; older tokens start anew


class Drive(Section, frozen=True):
    """Files."""

    max_file_bytes: int = 50 * GB  # with a declared length
    max_chunked_bytes: int = 50 * GB  # without one; a drive may be given up to 100 GB
    chunked_ceiling_bytes: int = 100 * GB
    max_files: int = 300_000  # per drive
    max_folder_entries: int = 50_000
    max_name_bytes: int = 255  # what every client's file system takes
    max_path_depth: int = 100  # folders above a file
    max_property_bytes: int = 64 * KIB
    max_properties: int = 200  # dead properties of one resource
    max_dead_bytes: int = 256 * KIB  # all of them together: no quota counts them
    lock_seconds: int = 3600  # longest lock granted; clients refresh
    max_locks: int = 1_000  # per account
    max_lock_owner_bytes: int = 4 * KIB  # XML that says who locked: everybody who lists the folder reads it
    transfers: int = 40  # concurrent ones per account and web process; content that fits a row is none
    root_view: str = "auto"  # auto, folders or drive
    trash_name: str = "Deleted items"
    common_name: str = "Common documents"
    trash_days: int = 30
    purge_over_webdav: bool = False
    finite_depth: bool = False  # refuse Depth: infinity PROPFIND with propfind-finite-depth
    chunk_bytes: int = 256 * KIB  # read and written at once


class Jobs(Section, frozen=True):
    """Background work. Every node runs its share."""

    workers: int = 4  # jobs at once per node, so that a long one does not hold up the others
    poll_s: float = 0.5  # a new job starts within this; a look costs one indexed read
    lease_s: float = 30.0  # a worker that was silent for a third longer is dead, another one goes on
    slice_s: float = 30.0  # after this a long job lets waiting ones go first
    attempts: int = 20  # tries without progress before a job has failed
    retry_s: float = 10.0  # pause after the first failure; doubles with each further one, less up to half
    longest_retry_s: float = 3600.0
    keep_days: int = 30  # ended jobs stay this long to be looked at


class Mail(Section, frozen=True):
    """Mail to people (what changed in their account) through one relay (smarthost), and their mailboxes."""

    relay: str = ""  # host name; empty = nobody is told
    port: int = 587
    security: str = "starttls"  # starttls, tls (port 465) or none; never falls back to a weaker one
    user: str = ""  # empty = no log-in
    password_file: str = ""  # first line; read for each connection, so that it may change
    ca_file: str = ""  # certificates (PEM) to trust instead of the system's
    from_address: str = ""  # who the mail is from; needed with a relay
    from_name: str = "ksync"
    reply_to: str = ""  # where answers go; empty = to from_address
    contact: str = ""  # whom people are told to ask: an address, URL or number
    timeout_s: float = 30.0  # for one answer of the relay
    per_minute: int = 60  # messages, over all nodes; 0 = no bound
    dovecot_socket: str = ""  # where Dovecot asks who may open which mailbox; empty = none is served
    folders: Path = Path("data/mail")  # Maildirs, a folder with a random name for each mailbox
    owner: str = ""  # system user whose they are; empty = who runs this program


class Outbound(Section, frozen=True):
    """Connections to other servers on behalf of people."""

    private_networks: tuple[str, ...] = ()  # may be reached although they are not public: ["10.0.0.0/8"]


class MailImport(Section, frozen=True):
    """Import of mailboxes from other servers."""

    plain: bool = False  # a server may be asked without TLS: passwords and mail are readable on the way
    message_bytes: int = 256 * MIB  # a longer message is refused and reported
    whole_bytes: int = 2 * MIB  # a longer message is never held as a whole
    spool: Path = Path("data/spool")  # such messages are kept here until they are placed
    window_bytes: int = 6 * MIB  # fetched and not yet recorded, by all imports of a node: memory
    line_bytes: int = 1 * MIB  # longest line of a server, literals aside
    folders: int = 20_000  # of one mailbox
    connect_timeout_s: float = 20.0
    timeout_s: float = 120.0  # a server that says nothing for so long is given up for now
    slowest_bytes_s: int = 1024  # slower than this over `timeout_s`: the server throttles, we pause
    back_off_s: float = 5.0  # pause after the first failure of a server; doubles with each further one
    longest_back_off_s: float = 1800.0
    give_up_s: int = 7 * 86400  # an import that got nowhere for so long has failed
    host_imports: int = 10  # at once from one server, over all nodes
    bytes_s: int = 0  # fetched per second by one import; 0 = no bound
    daily_bytes: int = 0  # fetched per day from one account; 0 = no bound
    gmail_daily_bytes: int = 2_300_000_000  # the same for Gmail, which locks accounts at 2.5 GB a day


class Log(Section, frozen=True):
    """What is written to standard error."""

    level: str = "info"
    format: str = "json"  # json or text


class Settings(Section, frozen=True):
    """The whole configuration."""

    server: Server = Server()
    tls: Tls = Tls()
    hosts: Hosts = Hosts()
    database: Database = Database()
    blobs: Blobs = Blobs()
    disk: Disk = Disk()
    s3: S3 = S3()
    auth: Auth = Auth()
    accounts: Accounts = Accounts()
    xml: Xml = Xml()
    dav: Dav = Dav()
    drive: Drive = Drive()
    jobs: Jobs = Jobs()
    mail: Mail = Mail()
    mail_import: MailImport = MailImport()
    outbound: Outbound = Outbound()
    log: Log = Log()
    offers_file: Path | None = None  # offers.toml; none = the shipped table


def _decode_hook(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(kind)


def _typed(value: str) -> Any:
    """A `--set` value as TOML would read it; a bare word is text."""
    try:
        return tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return value


@dataclass(frozen=True, slots=True)
class Mistake:
    """One reason why a configuration cannot be used."""

    key: str  # `section.key`; "" = the file as a whole
    text: str
    line: int | None = None  # where the file gives the key; None = not in the file


def build(tables: dict[str, Any], overrides: tuple[str, ...] = ()) -> Settings:
    """Settings from parsed TOML and `section.key=value` overrides.

    Args:
        tables: as `tomllib` reads them; left as they are.
        overrides: each `section.key=value`, the value in TOML or a bare word.

    Raises:
        ConfigError: an unknown key, a wrong type, a value that cannot be used, or an override without
            `=`; one line for each.
    """
    settings, mistakes = _convert(_overridden(tables, overrides))
    if settings is None:
        raise ConfigError("\n".join(f"{each.key}: {each.text}" for each in mistakes))
    return settings


def load(path: Path, overrides: tuple[str, ...] = ()) -> Settings:
    """Read one TOML file; relative paths in it count from its folder.

    Args:
        path: of the file.
        overrides: as `build` takes them.

    Raises:
        ConfigError: unreadable, not TOML, or not a configuration; each mistake with file and line.
    """
    settings, mistakes = examine(path, overrides)
    if settings is None:
        raise ConfigError("\n".join(explain(path, each) for each in mistakes))
    return settings


def examine(path: Path, overrides: tuple[str, ...] = ()) -> tuple[Settings | None, tuple[Mistake, ...]]:
    """The settings of a file, or every mistake that keeps them from being used.

    Args:
        path: of the file.
        overrides: as `build` takes them.

    Raises:
        ConfigError: an override without `=`.
    """
    try:
        text = path.read_text("utf-8")
        tables = tomllib.loads(text)
    except OSError as error:
        return None, (Mistake("", str(error.strerror)),)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        found = re.search(r" \(at line (\d+)", str(error))
        return None, (Mistake("", f"not TOML: {error}", int(found[1]) if found else None),)
    settings, mistakes = _convert(_overridden(tables, overrides))
    if settings is None:
        return None, located(text, mistakes)
    return anchored(settings, path.parent), ()


def located(text: str, mistakes: tuple[Mistake, ...]) -> tuple[Mistake, ...]:
    """The same mistakes with the lines of their keys in a configuration's text."""
    lines = {key: number for number, key in _keys(text)}
    return tuple(Mistake(each.key, each.text, lines.get(each.key)) for each in mistakes)


def explain(path: Path, mistake: Mistake) -> str:
    """A mistake as one line for a person: file, line, key, reason."""
    where = f"{path}, line {mistake.line}" if mistake.line else str(path)
    return ": ".join(part for part in (where, mistake.key, mistake.text) if part)


def _keys(text: str) -> Iterator[tuple[int, str]]:
    """The tables and keys of a TOML text with their lines, as this program's files write them."""
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            table = header[1]
            yield number, table
        elif key := re.match(r"\s*([\w.-]+)\s*=", line):
            yield number, f"{table}.{key[1]}" if table else key[1]


def _overridden(tables: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """A copy of the tables with the overrides in it."""
    merged = {name: dict(value) if isinstance(value, dict) else value for name, value in tables.items()}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: expected KEY=VALUE")
        section, dot, last = key.strip().partition(".")
        table = merged.setdefault(section, {}) if dot else merged
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {section} is no table")
        table[last if dot else section] = _typed(value.strip())
    return merged


def _convert(tables: dict[str, Any]) -> tuple[Settings | None, tuple[Mistake, ...]]:
    """Settings, or what is wrong: unknown keys and wrong types first, unusable values when there are none."""
    mistakes: list[Mistake] = []
    sections: dict[str, Any] = {}
    known = {field.name: field.type for field in msgspec.structs.fields(Settings)}
    for name, value in tables.items():
        if name not in known:
            mistakes.append(Mistake(name, _unknown(name, known)))
            continue
        kind = known[name]
        if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Section):
            fields = kind.__struct_fields__
            wrong = [key for key in value if key not in fields]
            mistakes += [Mistake(f"{name}.{key}", _unknown(key, fields)) for key in wrong]
            value = {key: inner for key, inner in value.items() if key in fields}
        try:
            sections[name] = msgspec.convert(value, kind, strict=True, dec_hook=_decode_hook)
        except msgspec.ValidationError as error:
            reason, _, where = str(error).partition(" - at `$")
            key = name + where.removesuffix("`").split("[")[0]
            mistakes.append(Mistake(key, reason.lower()))
    if mistakes:
        return None, tuple(mistakes)
    settings = Settings(**sections)
    mistakes += _unusable(settings)
    return (None, tuple(mistakes)) if mistakes else (settings, ())


def _unknown(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, known, 1)
    return "there is no such setting" + (f"; did you mean {close[0]}?" if close else "")


_CHOICES = {
    "tls.minimum_version": ("1.2", "1.3"),
    "database.durability": ("full", "normal"),
    "drive.root_view": ("auto", "folders", "drive"),
    "mail.security": ("starttls", "tls", "none"),
    "log.level": ("debug", "info", "warning", "error"),
    "log.format": ("json", "text"),
}
# Everything else may be 0: nothing kept, nothing allowed, or at once.
_POSITIVE = frozenset(
    [
        "server.workers",
        "server.threads",
        "server.header_bytes",
        "server.header_timeout_s",
        "server.idle_timeout_s",
        "server.body_timeout_s",
        "server.connections",
        "server.handshakes",
        "server.handshake_timeout_s",
        "database.group_writes",
        "database.busy_timeout_s",
        "blobs.extent_bytes",
        "blobs.stage_lease_s",
        "blobs.scrub_bytes_s",
        "blobs.scrub_slice_s",
        "s3.extent_bytes",
        "s3.memory_bytes",
        "s3.requests",
        "s3.timeout_s",
        "auth.password_bytes",
        "auth.argon2_time",
        "auth.argon2_parallel",
        "auth.argon2_queue",
        "auth.throttle_window_s",
        "auth.throttle_block_s",
        "auth.throttle_factor",
        "xml.max_bytes",
        "xml.max_depth",
        "xml.max_elements",
        "xml.max_hrefs",
        "dav.recurrence_steps",
        "dav.reports_at_once",
        "dav.sync_page_rows",
        "dav.max_sync_rows",
        "drive.max_name_bytes",
        "drive.max_path_depth",
        "drive.lock_seconds",
        "drive.transfers",
        "drive.chunk_bytes",
        "jobs.workers",
        "jobs.poll_s",
        "jobs.lease_s",
        "jobs.attempts",
        "jobs.retry_s",
        "mail.port",
        "mail.timeout_s",
    ]
)
_LAST_PORT = 65535
_ARGON2_LEAST_KIB = 8  # RFC 9106 section 3.1: 8 KiB per lane, and we use one
_DATABASE = re.compile(r"sqlite:///.|postgresql(\+psycopg)?://")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_ENDPOINT = re.compile(r"https?://(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?/?")
_PREFIX = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*/?)?")
MAIL_ADDRESS = re.compile(
    r"[\w!#$%&'*+/=?^`{|}~-]+(?:\.[\w!#$%&'*+/=?^`{|}~-]+)*@\w(?:[\w-]*\w)?(?:\.\w(?:[\w-]*\w)?)*"
)
"""What mail can be sent to: dot-atom and host name (RFC 5321 section 4.1.2) with the letters of RFC 6531."""
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")


def _unusable(settings: Settings) -> Iterator[Mistake]:
    """Values of the right type that would fail, or let the wrong thing happen, when first used."""
    for name in settings.__struct_fields__:
        section = getattr(settings, name)
        for key in section.__struct_fields__ if isinstance(section, Section) else ():
            text = _wrong_value(f"{name}.{key}", getattr(section, key))
            if text:
                yield Mistake(f"{name}.{key}", text)
    if not _DATABASE.match(settings.database.url):
        yield Mistake("database.url", "must be sqlite:///FILE or postgresql://...")
    yield from _unusable_sockets(settings)
    for key, hosts in (
        ("hosts.sync", settings.hosts.sync),
        ("hosts.paths", settings.hosts.paths),
        ("accounts.hosted_domains", settings.accounts.hosted_domains),
    ):
        for host in hosts:
            if not _HOST.fullmatch(host):
                yield Mistake(key, f"{host!r} is no host name (no scheme, no port)")
    if not _HOST.fullmatch(settings.hosts.drive_suffix.lstrip(".")):
        yield Mistake("hosts.drive_suffix", f"{settings.hosts.drive_suffix!r} is no host name")
    yield from _unusable_s3(settings.s3)
    yield from _unusable_names(settings.drive)
    yield from _unusable_mail(settings.mail)
    if settings.drive.max_chunked_bytes > settings.drive.chunked_ceiling_bytes:
        yield Mistake("drive.max_chunked_bytes", "must not be above drive.chunked_ceiling_bytes")
    for key, networks in (
        ("auth.throttle_shared", settings.auth.throttle_shared),
        ("outbound.private_networks", settings.outbound.private_networks),
    ):
        for network in networks:
            if not _is_network(network):
                yield Mistake(key, f"{network!r} is no address or network")
    if settings.auth.argon2_memory_kib < _ARGON2_LEAST_KIB:
        yield Mistake("auth.argon2_memory_kib", f"must be at least {_ARGON2_LEAST_KIB}")


def _unusable_sockets(settings: Settings) -> Iterator[Mistake]:
    """Addresses, certificates and the reserve fit together."""
    server, tls, disk = settings.server, settings.tls, settings.disk
    if not server.listen and not server.listen_tls:
        yield Mistake("server.listen", "needs an address, or server.listen_tls one")
    if server.listen_tls and not tls.certificates:
        yield Mistake("tls.certificates", "server.listen_tls needs one")
    if len(tls.certificates) != len(tls.keys):
        yield Mistake("tls.keys", "must be as many as tls.certificates")
    if server.redirect_https_port > _LAST_PORT:
        yield Mistake("server.redirect_https_port", f"must not be above {_LAST_PORT}")
    if disk.reserve_percent >= 100:
        yield Mistake("disk.reserve_percent", "must be below 100")
    if disk.resume_percent < 100:
        yield Mistake("disk.resume_percent", "must be at least 100")


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def _wrong_value(key: str, value: Any) -> str:
    if key in _CHOICES and value not in _CHOICES[key]:
        return f"must be one of {', '.join(_CHOICES[key])}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not value >= 0 or value == float("inf"):
        return "must not be negative" if value < 0 else "must be a number"
    return "must be above 0" if value == 0 and key in _POSITIVE else ""


def _unusable_s3(s3: S3) -> Iterator[Mistake]:
    """An address and names that requests can be made of, and memory for at least one upload."""
    if s3.bucket and not _BUCKET.fullmatch(s3.bucket):
        yield Mistake("s3.bucket", f"{s3.bucket!r} is no name of a bucket")
    if s3.endpoint and not _ENDPOINT.fullmatch(s3.endpoint):
        yield Mistake("s3.endpoint", "must be http(s)://HOST[:PORT], without credentials")
    if not _PREFIX.fullmatch(s3.prefix):
        yield Mistake("s3.prefix", f"{s3.prefix!r}: letters, digits, . _ - and / alone")
    if s3.memory_bytes < 2 * s3.extent_bytes:
        yield Mistake("s3.memory_bytes", "must be at least twice s3.extent_bytes")


def _unusable_names(drive: Drive) -> Iterator[Mistake]:
    """The folders that every drive has are two different names."""
    for key in ("trash_name", "common_name"):
        name = getattr(drive, key)
        if name.strip(" .") != name or not name or not name.isprintable() or "/" in name:
            yield Mistake(f"drive.{key}", f"{name!r} cannot name a folder")
    if drive.trash_name.casefold() == drive.common_name.casefold():
        yield Mistake("drive.common_name", "must differ from drive.trash_name")


def _unusable_mail(mail: Mail) -> Iterator[Mistake]:
    """Text that goes into headers and SMTP commands is one line; a password is never sent in the clear."""
    for key in ("relay", "user", "from_address", "from_name", "reply_to", "contact", "owner"):
        if not getattr(mail, key).isprintable():
            yield Mistake(f"mail.{key}", "must be one printable line")
    if mail.relay and not _HOST.fullmatch(mail.relay):
        yield Mistake("mail.relay", f"{mail.relay!r} is no host name (no scheme, no port)")
    if mail.relay and not mail.from_address:
        yield Mistake("mail.from_address", "is needed with mail.relay")
    for key in ("from_address", "reply_to"):
        if getattr(mail, key) and not MAIL_ADDRESS.fullmatch(getattr(mail, key)):
            yield Mistake(f"mail.{key}", f"{getattr(mail, key)!r} is no e-mail address")
    if mail.user and not mail.password_file:
        yield Mistake("mail.password_file", "is needed with mail.user")
    if mail.user and mail.security == "none":
        yield Mistake("mail.security", "a password is only sent encrypted: starttls or tls")
    if mail.port > _LAST_PORT:
        yield Mistake("mail.port", f"must not be above {_LAST_PORT}")


def anchored(settings: Settings, folder: Path) -> Settings:
    """The same settings with every relative path made absolute under `folder`."""
    replace = msgspec.structs.replace
    base = folder.resolve()
    url, secret = settings.database.url, settings.s3.credentials_file
    if url.startswith("sqlite:///") and not url.startswith("sqlite:////"):
        url = f"sqlite:///{base / url.removeprefix('sqlite:///')}"
    return replace(
        settings,
        tls=replace(
            settings.tls,
            certificates=tuple(base / path for path in settings.tls.certificates),
            keys=tuple(base / path for path in settings.tls.keys),
        ),
        database=replace(settings.database, url=url),
        blobs=replace(settings.blobs, path=base / settings.blobs.path),
        s3=replace(settings.s3, credentials_file=str(base / secret) if secret else ""),
        auth=replace(settings.auth, key_file=base / settings.auth.key_file),
        mail=replace(
            settings.mail,
            password_file=str(base / settings.mail.password_file) if settings.mail.password_file else "",
            ca_file=str(base / settings.mail.ca_file) if settings.mail.ca_file else "",
            dovecot_socket=str(base / settings.mail.dovecot_socket) if settings.mail.dovecot_socket else "",
            folders=base / settings.mail.folders,
        ),
        mail_import=replace(settings.mail_import, spool=base / settings.mail_import.spool),
        offers_file=base / settings.offers_file if settings.offers_file else None,
    )
