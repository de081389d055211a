"""The command line: serve, demo, check-config, migrate, what manages accounts, what cares for the store."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click

from ksync_server import settings as configuration
from ksync_server.cli import accounts, backup, imports, jobs, keys, mail, organizations, throttle, verify
from ksync_server.cli import demo as demonstration
from ksync_server.cli import doctor as diagnosis
from ksync_server.cli.context import Context, Main, configured, shared_metrics
from ksync_server.errors import ConfigError
from ksync_server.settings import Mistake, Settings

__all__ = ["main"]

_pass = click.make_pass_decorator(Context)
_as_json = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")


@click.group(cls=Main)
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="KSYNC_CONFIG",
    help="Configuration file; ./ksync.toml where none is named.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting.")
@click.version_option(package_name="ksync-server")
@click.pass_context
def main(ctx: click.Context, config: Path | None, overrides: tuple[str, ...]) -> None:
    """Self-hosted calendars, contacts and files behind one account system."""
    ctx.obj = Context(config, overrides)


@main.command()
@configured
@_as_json
@_pass
def serve(context: Context, as_json: bool) -> None:
    """Serve until SIGTERM; SIGHUP reloads the configuration. Says where, once it listens."""
    from ksync_server import log
    from ksync_server.auth import rotation

    log.configure(context.settings().log)
    with shared_metrics() as metrics:
        from ksync_server.server import Bound, Supervisor, show
        from ksync_server.worker import check_store

        def on_ready(bound: Bound) -> None:
            listen = [show(address) for address in bound.listen]
            listen_tls = [show(address) for address in bound.listen_tls]
            admin = show(bound.admin) if bound.admin else None
            if as_json:
                place = {"pid": os.getpid(), "listen": listen, "listen_tls": listen_tls, "admin": admin}
                click.echo(json.dumps(place))
            else:
                places = [f"http://{each}" for each in listen] + [f"https://{each}" for each in listen_tls]
                places += [f"http://{admin} (admin)"] if admin else []
                click.echo(f"Listening on {', '.join(places)}")

        # What cannot be used is said here, once, not by each worker.
        check_store(context.settings())
        with context.services() as services, services.database.read() as tx:
            rotation.require_sets(tx, services.keys)
        raise SystemExit(Supervisor(context.settings, metrics, on_ready).run())


@main.command("check-config")
@configured
@_as_json
@_pass
def check_config(context: Context, as_json: bool) -> None:
    """Say whether the configuration can be used, and what is wrong with it, line by line."""
    path = context.path()
    settings, mistakes = configuration.examine(path, context.overrides)
    if settings is not None:
        mistakes = configuration.located(path.read_text("utf-8"), tuple(_refused_later(settings)))
    notes = _notes(settings) if settings is not None else []
    if as_json:
        rows = [{"key": each.key, "line": each.line, "text": each.text} for each in mistakes]
        click.echo(json.dumps({"ok": not mistakes, "mistakes": rows, "notes": notes}))
    elif not mistakes:
        click.echo("The configuration can be used.")
        for note in notes:
            click.echo(f"Note: {note}.")
    for mistake in mistakes:
        click.echo(f"Error: {configuration.explain(path, mistake)}", err=True)
    if mistakes:
        raise SystemExit(1)


def _notes(settings: Settings) -> list[str]:
    """What can be used, yet may not be what is wanted."""
    from ksync_server.mail import sender

    return [] if settings.mail.relay else [sender.NOBODY_IS_TOLD]


def _refused_later(settings: Settings) -> Iterator[Mistake]:
    """What the parts of the server refuse when they start."""
    from ksync_server.app import Proxies
    from ksync_server.auth import offers
    from ksync_server.mail import dovecot
    from ksync_server.networks import Networks
    from ksync_server.server import parse_listen
    from ksync_server.store import s3
    from ksync_server.tls import Certificates
    from ksync_server.worker import check_store

    server = settings.server
    listen = [("server.listen", address) for address in server.listen]
    listen += [("server.listen_tls", address) for address in server.listen_tls]
    listen += [("server.admin_listen", server.admin_listen)] if server.admin_listen else []
    checks: list[tuple[str, Callable[[], object]]] = [
        *((key, partial(parse_listen, address)) for key, address in listen),
        ("server.trusted_proxies", partial(Proxies, server.trusted_proxies)),
        ("server.proxy_protocol", partial(Networks, "server.proxy_protocol", server.proxy_protocol)),
        ("tls.certificates", partial(Certificates, settings.tls)),
        ("offers_file", partial(offers.load, settings.offers_file)),
        ("mail.owner", partial(dovecot.owner_of, settings.mail)),
        ("mail.dovecot_socket", partial(dovecot.check_place, settings.mail)),
        ("s3.bucket", partial(check_store, settings)),
        ("s3.credentials_file", partial(s3.credentials, settings.s3)),
    ]
    for key, check in checks:
        try:
            check()
        except ConfigError as error:
            text = str(error)
            if key != "s3.bucket" or not text.startswith("s3.credentials_file: "):  # said by the next one
                yield Mistake(key, text.removeprefix(f"{key}: "))


@main.command()
@configured
@_as_json
@_pass
def migrate(context: Context, as_json: bool) -> None:
    """Create the database's tables or bring them to this program's schema."""
    from ksync_server.store import schema
    from ksync_server.store.database import Database

    settings = context.settings()
    database = Database(settings.database, threads=1)
    try:
        before = schema.current(database)
        schema.migrate(database)
    finally:
        database.close()
    if as_json:
        click.echo(json.dumps({"from": before, "to": schema.SCHEMA}))
    else:
        click.echo(f"Schema {schema.SCHEMA}" + (" (nothing to do)" if before == schema.SCHEMA else ""))


main.add_command(demonstration.demo)
main.add_command(diagnosis.doctor)
accounts.register(main)
organizations.register(main)
verify.register(main)
keys.register(main)
throttle.register(main)
backup.register(main)
jobs.register(main)
mail.register(main)
imports.register(main)
