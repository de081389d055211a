"""The command line: serve, demo, check-config, migrate, and what manages accounts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click

from ksync_server import settings as configuration
from ksync_server.cli import accounts, organizations
from ksync_server.cli import demo as demonstration
from ksync_server.cli.context import Context, Main, shared_metrics
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


def _with_config(context: Context, config: Path | None, overrides: tuple[str, ...]) -> Context:
    """The options may stand behind the command too."""
    return Context(config or context.config, context.overrides + overrides)


_config_option = click.option(
    "--config", type=click.Path(path_type=Path, dir_okay=False), help="Configuration file."
)
_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting."
)


@main.command()
@_config_option
@_set_option
@_pass
def serve(context: Context, config: Path | None, overrides: tuple[str, ...]) -> None:
    """Serve until SIGTERM; SIGHUP reloads the configuration."""
    from ksync_server import log

    where = _with_config(context, config, overrides)
    log.configure(where.settings().log)
    with shared_metrics() as metrics:
        from ksync_server.server import Supervisor

        with where.services():
            pass  # a schema or key file that cannot be used is said here, once, not by each worker
        raise SystemExit(Supervisor(where.settings, metrics).run())


@main.command("check-config")
@_config_option
@_set_option
@_as_json
@_pass
def check_config(context: Context, config: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say whether the configuration can be used, and what is wrong with it, line by line."""
    where = _with_config(context, config, overrides)
    path = where.path()
    settings, mistakes = configuration.examine(path, where.overrides)
    if settings is not None:
        mistakes = configuration.located(path.read_text("utf-8"), tuple(_refused_later(settings)))
    if as_json:
        rows = [{"key": each.key, "line": each.line, "text": each.text} for each in mistakes]
        click.echo(json.dumps({"ok": not mistakes, "mistakes": rows}))
    elif not mistakes:
        click.echo("The configuration can be used.")
    for mistake in mistakes:
        click.echo(f"Error: {configuration.explain(path, mistake)}", err=True)
    if mistakes:
        raise SystemExit(1)


def _refused_later(settings: Settings) -> Iterator[Mistake]:
    """What the parts of the server refuse when they start."""
    from ksync_server.app import Proxies
    from ksync_server.auth import offers
    from ksync_server.server import parse_listen

    listen = (("server.listen", address) for address in settings.server.listen)
    admin = [("server.admin_listen", settings.server.admin_listen)] if settings.server.admin_listen else []
    checks: list[tuple[str, Callable[[], object]]] = [
        *((key, partial(parse_listen, address)) for key, address in (*listen, *admin)),
        ("server.trusted_proxies", partial(Proxies, settings.server.trusted_proxies)),
        ("offers_file", partial(offers.load, settings.offers_file)),
    ]
    for key, check in checks:
        try:
            check()
        except ConfigError as error:
            yield Mistake(key, str(error).removeprefix(f"{key}: "))


@main.command()
@_config_option
@_set_option
@_as_json
@_pass
def migrate(context: Context, config: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Create the database's tables or bring them to this program's schema."""
    from ksync_server.store import schema
    from ksync_server.store.database import Database

    settings = _with_config(context, config, overrides).settings()
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
accounts.register(main)
organizations.register(main)
