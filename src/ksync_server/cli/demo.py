"""`ksync-server demo`: the whole server on one folder, with four people to try every way through the door."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksync_server import settings as configuration
from ksync_server.cli import samples
from ksync_server.cli.context import shared_metrics
from ksync_server.errors import ConfigError
from ksync_server.settings import Settings

if TYPE_CHECKING:
    from ksync_server.app import App, Services
    from ksync_server.server import Bound

MIB = 1024 * 1024
_CONFIG = """\
# Made by `ksync-server demo`; yours to change. Every key: config/ksync.toml of the program.
# `demo` itself gives server.listen and server.admin_listen, and its --set comes last.

[database]
url = "sqlite:///ksync.db"

[blobs]
path = "blobs"

[auth]
key_file = "keys.toml"

[mail]
folders = "mail"

[mail_import]
spool = "spool"

[log]
format = "text"
"""


@dataclass(frozen=True, slots=True)
class Person:
    """One account of the demo."""

    name: str
    shown: str
    organization: str
    role: str
    offer: str
    drive: str
    second_factor: bool = False
    max_file_bytes: int | None = None
    max_chunked_bytes: int | None = None


STUDIO = "Lakeside Studio"
PEOPLE = (
    Person("alice", "Alice Example", STUDIO, "legal_representative", "ksuite-business", STUDIO),
    Person("bob", "Bob Example", STUDIO, "collaborator", "ksuite-business", STUDIO, second_factor=True),
    Person("carol", "Carol Example", "Carol", "legal_representative", "my-ksuite", "Carol's drive"),
    Person(
        "dave",
        "Dave Example",
        "Dave",
        "legal_representative",
        "kdrive-solo",
        "Dave's drive",
        max_file_bytes=64 * MIB,
        max_chunked_bytes=32 * MIB,
    ),
)
_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"


@click.command()
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-data"))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, help="0 = any free one.")
@click.option(
    "--ready-file", type=click.Path(path_type=Path, dir_okay=False), help="Written when it listens."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting.")
@click.option("--json", "as_json", is_flag=True, help="Print what the ready file holds instead of text.")
def demo(
    data: Path, host: str, port: int, ready_file: Path | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Start everything on one folder with demo data, and print addresses and passwords."""
    from ksync_server import log

    load = _loader(data.resolve(), host, port, overrides)
    settings = load()
    log.configure(settings.log)
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)
    with shared_metrics() as metrics:
        from ksync_server.worker import check_store

        check_store(settings)
        accounts = _prepare(settings, data.resolve() / "demo.json")
        raise SystemExit(_run(load, settings, metrics, accounts, host, ready_file, as_json))


def _run(
    load: Callable[[], Settings],
    settings: Settings,
    metrics: Path,
    accounts: list[dict[str, Any]],
    host: str,
    ready_file: Path | None,
    as_json: bool,
) -> int:
    from ksync_server.server import Supervisor

    def on_ready(bound: Bound) -> None:
        description = describe(accounts, settings, host, bound)
        if as_json:
            click.echo(json.dumps(description, ensure_ascii=False))
        else:
            _print(description)
        if ready_file is not None:
            _write_private(ready_file, description)

    try:
        return Supervisor(load, metrics, on_ready).run()
    finally:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)


def _loader(data: Path, host: str, port: int, overrides: tuple[str, ...]) -> Callable[[], Settings]:
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    config = data / "ksync.toml"
    if not config.exists():
        _write_durably(config, _CONFIG.encode())
    shown = f"[{host}]" if ":" in host else host
    own = (
        f'server.listen=["{shown}:{port}"]',
        f'server.admin_listen="{shown}:{port + 1 if port else 0}"',
    )

    def load() -> Settings:
        return configuration.load(config, own + overrides)

    return load


def _write_private(path: Path, content: Any) -> None:
    """Write JSON that only its owner reads; it appears whole, by rename."""
    _write_durably(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _write_durably(path: Path, content: bytes) -> None:
    """Write a file that is there whole after a power cut, or not at all.

    An empty configuration would name another database: everything would seem to be lost.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# -- accounts -------------------------------------------------------------------------------------


def _prepare(settings: Settings, secrets_file: Path) -> list[dict[str, Any]]:
    """The accounts with their secrets: made at the first start, read from the folder later.

    Raises:
        ConfigError: the database has the people, but the folder does not know their secrets.
    """
    with _services(settings) as services:
        generation = services.database.generation
        known: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError):
            known = json.loads(secrets_file.read_text("utf-8"))
        if known.get("generation") != generation:
            if _has(services, known):  # a backup was restored
                known["generation"] = generation
            else:
                known = {"generation": generation, "seeded": False, "accounts": _create(services)}
            _write_private(secrets_file, known)
        if not known["seeded"]:
            _seed(services, known["accounts"])
            known["seeded"] = True
            _write_private(secrets_file, known)
    accounts: list[dict[str, Any]] = known["accounts"]
    return accounts


def _has(services: Services, known: dict[str, Any]) -> bool:
    """Whether the database has the accounts whose secrets the folder knows."""
    from ksync_server.auth import accounts

    hosts = services.settings.hosts.log_in
    with services.database.read() as tx:
        found = [accounts.find(tx, account["sync_id"], hosts) for account in known.get("accounts", ())]
    return bool(found) and None not in found


@contextlib.contextmanager
def _services(settings: Settings) -> Iterator[Services]:
    from ksync_server.app import build
    from ksync_server.store import schema

    services = build(settings)
    try:
        schema.migrate(services.database)
        settings.blobs.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield services
    finally:
        services.close()


def _create(services: Services) -> list[dict[str, Any]]:
    from ksync_server.auth import accounts, app_passwords, organizations, products, secondfactor
    from ksync_server.store.database import Write

    hosts = services.settings.hosts.log_in
    passwords = {person.name: _password() for person in PEOPLE}
    hashes = {name: services.gate.passwords.hash(password) for name, password in passwords.items()}

    def create(tx: Write) -> list[dict[str, Any]]:
        if accounts.find(tx, _login(PEOPLE[0]), hosts) is not None:
            raise ConfigError("The database has the demo's people, but demo.json with their secrets is gone.")
        made_already: dict[str, tuple[int, int]] = {}
        made = []
        for person in PEOPLE:
            account = accounts.create_account(
                tx,
                login_email=_login(person),
                display_name=person.shown,
                password_hash=hashes[person.name],
                sync_hosts=hosts,
            )
            organization_id, drive_id = made_already.get(person.organization) or _organization(tx, person)
            made_already[person.organization] = organization_id, drive_id
            organizations.put_member(tx, organization_id, account, person.role)
            organizations.add_drive_member(tx, drive_id, account)
            totp = application_password = None
            if person.second_factor:
                totp = _enrol(tx, account)
                _, secret = app_passwords.create(tx, services.keys, account, "Demo")
                application_password = secret.shown
            made.append(
                {
                    "name": person.name,
                    "login": _login(person),
                    "sync_id": account.sync_id,
                    "password": passwords[person.name],
                    "second_factor": person.second_factor,
                    "totp_secret": totp,
                    "application_password": application_password,
                    "organization": person.organization,
                    "drives": [{"id": drive_id, "name": person.drive, "offer": person.offer}],
                    "mailboxes": [],
                }
            )
        return made

    def _organization(tx: Write, person: Person) -> tuple[int, int]:
        limits = services.settings.drive
        organization_id = organizations.create_organization(tx, person.organization)
        product_id = products.create(tx, services.offers, organization_id, person.offer).id
        drive_id = organizations.create_drive(
            tx, product_id, person.drive, reserved=(limits.trash_name, limits.common_name)
        )
        organizations.set_drive_limits(
            tx,
            drive_id,
            max_file_bytes=person.max_file_bytes,
            max_chunked_bytes=person.max_chunked_bytes,
            chunked_ceiling_bytes=limits.chunked_ceiling_bytes,
        )
        return organization_id, drive_id

    def _enrol(tx: Write, account: accounts.Account) -> str:
        import pyotp

        enrolment = secondfactor.enrol_totp(tx, services.keys, account, "Demo", services.settings.auth.realm)
        code = pyotp.TOTP(enrolment.secret).now()
        secondfactor.confirm(
            tx, services.keys, account, code, window_steps=services.settings.auth.totp_window_steps
        )
        return enrolment.secret

    return services.database.write(create)


def _login(person: Person) -> str:
    return f"{person.name}@example.org"


def _password() -> str:
    """16 letters and digits that can be typed, in groups: 78 bits."""
    return "-".join("".join(secrets.choice(_LETTERS) for _ in range(4)) for _ in range(4))


# -- content --------------------------------------------------------------------------------------


def _seed(services: Services, accounts: list[dict[str, Any]]) -> None:
    """Fill calendars, address books and drives by requests, as any client would."""
    from ksync_server.app import application

    app = application(services)
    try:
        asyncio.run(_send_samples(app, services.settings, accounts))
    finally:
        app.close()


async def _send_samples(app: App, settings: Settings, accounts: list[dict[str, Any]]) -> None:
    for account in accounts:
        sync_host = settings.hosts.sync[0]
        drive_host = f"{account['drives'][0]['id']}.{settings.hosts.drive_suffix}"
        for sample in samples.of(account["name"], account["sync_id"]):
            host = drive_host if sample.on_drive else sync_host
            status = await _send(app, host, account, sample)
            if status not in (200, 201, 204, 207, 405):  # 405: the folder is there from an earlier try
                raise ConfigError(f"demo data: {sample.method} {sample.path} was answered {status}")


async def _send(app: App, host: str, account: dict[str, Any], sample: samples.Sample) -> int:
    import base64

    secret = account["application_password"] or account["password"]
    token = base64.b64encode(f"{account['login']}:{secret}".encode())
    body = sample.body
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": sample.method,
        "scheme": "https",
        "client": ("127.0.0.1", 0),
        "raw_path": sample.path.encode("ascii"),
        "query_string": b"",
        "headers": [
            (b"host", host.encode("ascii")),
            (b"authorization", b"Basic " + token),
            (b"content-length", str(len(body)).encode("ascii")),
            *sample.headers,
        ],
    }
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    return statuses[0] if statuses else 0


# -- what is shown --------------------------------------------------------------------------------


def describe(accounts: list[dict[str, Any]], settings: Settings, host: str, bound: Bound) -> dict[str, Any]:
    """The ready file: where everything is and who may enter."""
    local = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound
    shown = f"[{local}]" if ":" in local else local
    port = bound.listen[0][1]
    base = f"http://{shown}:{port}"
    people = []
    for account in accounts:
        drives = [
            {
                **drive,
                "url": f"{base}/drives/{drive['id']}/",
                "host_url": f"http://{drive['id']}.{settings.hosts.drive_suffix}:{port}/",
            }
            for drive in account["drives"]
        ]
        people.append({**account, "drives": drives})
    return {
        "pid": os.getpid(),
        "sync_url": f"{base}/",
        "admin_url": f"http://{shown}:{bound.admin[1]}/" if bound.admin else None,
        "assistant_url": None,
        "accounts": people,
    }


def _print(description: dict[str, Any]) -> None:
    lines = [
        "",
        f"Calendars and contacts   {description['sync_url']}",
        f"Health and metrics       {description['admin_url'] or 'none'}",
    ]
    for account in description["accounts"]:
        lines += [
            "",
            f"{account['name']}: {account['login']} or {account['sync_id']}, {account['organization']}",
            f"  password              {account['password']}",
        ]
        if account["second_factor"]:
            lines += [
                f"  application password  {account['application_password']}",
                f"  second factor (TOTP)  {account['totp_secret']}",
            ]
        for drive in account["drives"]:
            lines.append(f"  drive ({drive['offer']})  {drive['url']}")
    lines += ["", "Ctrl-C stops it; everything is kept.", ""]
    click.echo("\n".join(lines))
