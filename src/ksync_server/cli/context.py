"""What every command shares: the configuration it was given, services over it, and how it ends."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from ksync_server import settings as configuration
from ksync_server.errors import ConfigError, KsyncError
from ksync_server.settings import Settings

DEFAULT_CONFIG = Path("ksync.toml")


@dataclass(frozen=True, slots=True)
class Context:
    """The options in front of the command."""

    config: Path | None
    overrides: tuple[str, ...] = ()

    def path(self) -> Path:
        """The configuration file.

        Raises:
            ConfigError: none was named and there is no ./ksync.toml.
        """
        if self.config is None and not DEFAULT_CONFIG.exists():
            raise ConfigError("name a configuration: --config FILE (or KSYNC_CONFIG)")
        return self.config or DEFAULT_CONFIG

    def settings(self) -> Settings:
        """The configuration, read anew.

        Raises:
            ConfigError: see `path`, or it cannot be used.
        """
        return configuration.load(self.path(), self.overrides)

    @contextlib.contextmanager
    def services(self) -> Iterator[Any]:
        """`app.Services` over a database of the current schema, closed at the end.

        Raises:
            ConfigError: see `settings` and `worker.open_services`.
        """
        from ksync_server.worker import (
            open_services,
        )  # imports every product: only commands that need it wait

        services = open_services(self.settings())
        try:
            yield services
        finally:
            services.close()


Function = TypeVar("Function", bound=Callable[..., Any])


def configured(function: Function) -> Function:
    """`--config` and `--set` behind a command too: they say the same as in front of it."""

    def config(ctx: click.Context, _: click.Parameter, value: Path | None) -> None:
        if value is not None:
            ctx.obj = replace(ctx.obj, config=value)

    def overrides(ctx: click.Context, _: click.Parameter, value: tuple[str, ...]) -> None:
        if value:
            ctx.obj = replace(ctx.obj, overrides=ctx.obj.overrides + value)

    path = click.Path(path_type=Path, dir_okay=False)
    for option in (
        click.option(
            "--set",
            multiple=True,
            metavar="KEY=VALUE",
            expose_value=False,
            callback=overrides,
            help="Override one setting.",
        ),
        click.option("--config", type=path, expose_value=False, callback=config, help="Configuration file."),
    ):
        function = option(function)
    return function


@contextlib.contextmanager
def shared_metrics() -> Iterator[Path]:
    """A folder for counters that several processes share; prometheus-client looks for it when imported."""
    with tempfile.TemporaryDirectory(prefix="ksync-metrics-", ignore_cleanup_errors=True) as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ["PROMETHEUS_MULTIPROC_DIR"]


class Main(click.Group):
    """Refusals end with one sentence on standard error and exit code 1; wrong usage with 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KsyncError as error:
            raise click.ClickException(str(error) or type(error).__name__) from error
