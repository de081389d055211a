"""Configuration files -> frozen values; every limit with its unit and its reason.

A field's comment is its documentation's source: `config/ksync.toml` shows every key with its default,
and a test compares both.
"""

from __future__ import annotations

import difflib
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

    listen: tuple[str, ...] = ("127.0.0.1:8080",)
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
    allow_plain_http: bool = False  # Basic over plain HTTP from elsewhere than loopback
    connections: int = 2000  # open at once per web process; more wait in the backlog


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


class Auth(Section, frozen=True):
    """The door."""

    key_file: Path = Path("data/keys.toml")  # pepper and encryption keys, 0600, made on first start
    realm: str = "ksync"
    password_bytes: int = 1024  # longest secret looked at; argon2 of more is a denial of service
    argon2_memory_kib: int = 19456  # OWASP: 19 MiB, t=2, p=1
    argon2_time: int = 2
    argon2_parallel: int = 2  # verifications at once per process; each holds 19 MiB
    argon2_queue: int = 64  # waiting verifications before 503
    cache_entries: int = 10_000  # positive account-password results per process
    cache_s: float = 86400.0  # sliding; a changed auth_epoch ends an entry at once
    totp_window_steps: int = 1  # accepted clock error in 30 s steps, either side
    last_used_s: float = 60.0  # "last used" of a secret is written at most this often


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
    recurrence_steps: int = 40_000  # loop steps one request may spend on one object: some 50 ms
    max_instances: int = 20_000  # instances of one expand or free-busy answer
    max_answer_bytes: int = 64 * MIB  # of one expanded answer
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
    lock_seconds: int = 3600  # longest lock granted; clients refresh
    max_locks: int = 1_000  # per account
    transfers: int = 40  # concurrent uploads and downloads per account and web process
    root_view: str = "auto"  # auto, folders or drive
    trash_name: str = "Deleted items"
    common_name: str = "Common documents"
    trash_days: int = 30
    purge_over_webdav: bool = False
    finite_depth: bool = False  # refuse Depth: infinity PROPFIND with propfind-finite-depth
    chunk_bytes: int = 256 * KIB  # read and written at once


class Log(Section, frozen=True):
    """What is written to standard error."""

    level: str = "info"
    format: str = "json"  # json or text


class Settings(Section, frozen=True):
    """The whole configuration."""

    server: Server = Server()
    hosts: Hosts = Hosts()
    database: Database = Database()
    blobs: Blobs = Blobs()
    auth: Auth = Auth()
    xml: Xml = Xml()
    dav: Dav = Dav()
    drive: Drive = Drive()
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
    "database.durability": ("full", "normal"),
    "drive.root_view": ("auto", "folders", "drive"),
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
        "database.group_writes",
        "database.busy_timeout_s",
        "blobs.extent_bytes",
        "blobs.stage_lease_s",
        "auth.password_bytes",
        "auth.argon2_time",
        "auth.argon2_parallel",
        "auth.argon2_queue",
        "xml.max_bytes",
        "xml.max_depth",
        "xml.max_elements",
        "xml.max_hrefs",
        "dav.recurrence_steps",
        "dav.sync_page_rows",
        "dav.max_sync_rows",
        "drive.max_name_bytes",
        "drive.max_path_depth",
        "drive.lock_seconds",
        "drive.transfers",
        "drive.chunk_bytes",
    ]
)
_ARGON2_LEAST_KIB = 8  # RFC 9106 section 3.1: 8 KiB per lane, and we use one
_DATABASE = re.compile(r"sqlite:///.|postgresql(\+psycopg)?://")
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
    if not settings.server.listen:
        yield Mistake("server.listen", "needs an address")
    for key, hosts in (("hosts.sync", settings.hosts.sync), ("hosts.paths", settings.hosts.paths)):
        for host in hosts:
            if not _HOST.fullmatch(host):
                yield Mistake(key, f"{host!r} is no host name (no scheme, no port)")
    if not _HOST.fullmatch(settings.hosts.drive_suffix.lstrip(".")):
        yield Mistake("hosts.drive_suffix", f"{settings.hosts.drive_suffix!r} is no host name")
    yield from _unusable_names(settings.drive)
    if settings.drive.max_chunked_bytes > settings.drive.chunked_ceiling_bytes:
        yield Mistake("drive.max_chunked_bytes", "must not be above drive.chunked_ceiling_bytes")
    if settings.auth.argon2_memory_kib < _ARGON2_LEAST_KIB:
        yield Mistake("auth.argon2_memory_kib", f"must be at least {_ARGON2_LEAST_KIB}")


def _wrong_value(key: str, value: Any) -> str:
    if key in _CHOICES and value not in _CHOICES[key]:
        return f"must be one of {', '.join(_CHOICES[key])}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not value >= 0 or value == float("inf"):
        return "must not be negative" if value < 0 else "must be a number"
    return "must be above 0" if value == 0 and key in _POSITIVE else ""


def _unusable_names(drive: Drive) -> Iterator[Mistake]:
    """The folders that every drive has are two different names."""
    for key in ("trash_name", "common_name"):
        name = getattr(drive, key)
        if name.strip(" .") != name or not name or not name.isprintable() or "/" in name:
            yield Mistake(f"drive.{key}", f"{name!r} cannot name a folder")
    if drive.trash_name.casefold() == drive.common_name.casefold():
        yield Mistake("drive.common_name", "must differ from drive.trash_name")


def anchored(settings: Settings, folder: Path) -> Settings:
    """The same settings with every relative path made absolute under `folder`."""
    replace = msgspec.structs.replace
    base = folder.resolve()
    url = settings.database.url
    if url.startswith("sqlite:///") and not url.startswith("sqlite:////"):
        url = f"sqlite:///{base / url.removeprefix('sqlite:///')}"
    return replace(
        settings,
        database=replace(settings.database, url=url),
        blobs=replace(settings.blobs, path=base / settings.blobs.path),
        auth=replace(settings.auth, key_file=base / settings.auth.key_file),
        offers_file=base / settings.offers_file if settings.offers_file else None,
    )
