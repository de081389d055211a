"""Commands for background work."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ksync_server import jobs as queue
from ksync_server.cli.output import Answer, command, table

if TYPE_CHECKING:
    from ksync_server.app import Services

_SHOWN = ("id", "kind", "state", "account", "attempts", "created_at", "run_at", "ended_at", "worker")
_number = click.argument("number", metavar="ID", type=int)


def register(group: click.Group) -> None:
    """Add the group jobs."""
    group.add_command(jobs)


# -- jobs -----------------------------------------------------------------------------------------


@click.group()
def jobs() -> None:
    """Background work: what waits, runs, is done or has failed."""


def _said(progress: Any) -> str | None:
    """Progress as `done 3, of 10`."""
    if not isinstance(progress, dict):
        return None if progress is None else json.dumps(progress, ensure_ascii=False)
    return ", ".join(f"{name} {value}" if name != "note" else str(value) for name, value in progress.items())


def _row(job: dict[str, Any]) -> dict[str, Any]:
    return {name: job[name] for name in _SHOWN} | {
        "progress": _said(job["progress"]),
        "last_error": job["last_error"],
    }


@command(jobs, "list")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(queue.STATES),
    help="May be repeated; any without this.",
)
@click.option("--kind", help="Such as mail.send.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
def _jobs_list(services: Services, states: tuple[str, ...], kind: str | None, limit: int) -> Answer:
    """List jobs, the newest first."""
    with services.database.read() as tx:
        found = queue.list_jobs(tx, states=states, kind=kind, limit=limit)
    return Answer(found, table([_row(job) for job in found], "There is no such job."))


@command(jobs, "show")
@_number
def _jobs_show(services: Services, number: int) -> Answer:
    """Show everything about one job."""
    with services.database.read() as tx:
        found = queue.get_job(tx, number)
    texts = {
        name: json.dumps(found[name], ensure_ascii=False) for name in ("arguments", "checkpoint", "progress")
    }
    rows = [{"what": name, "value": value} for name, value in {**_row(found), **found, **texts}.items()]
    for row in rows:
        if row["what"].endswith("_at") and row["value"] is not None:
            row["value"] = table([{"at": row["value"]}], "").splitlines()[1]
    return Answer(found, table(rows, ""))


@command(jobs, "cancel")
@_number
def _jobs_cancel(services: Services, number: int) -> Answer:
    """End a waiting job now, a running one at its next checkpoint."""
    state = services.database.write(lambda tx: queue.cancel(tx, number))
    text = "is cancelled" if state == "cancelled" else "ends at its next checkpoint"
    return Answer({"id": number, "state": state}, f"Job {number} {text}.")


@command(jobs, "retry")
@_number
def _jobs_retry(services: Services, number: int) -> Answer:
    """Let a failed, cancelled or waiting job run now."""
    services.database.write(lambda tx: queue.retry(tx, number))
    return Answer({"id": number, "state": "ready"}, f"Job {number} runs again.")


@command(jobs, "prune")
@click.option("--days", type=click.IntRange(0), help="Ended longer ago than this; jobs.keep_days without it.")
def _jobs_prune(services: Services, days: int | None) -> Answer:
    """Forget jobs that ended long ago."""
    count = queue.prune(services.database, services.settings.jobs.keep_days if days is None else days)
    return Answer({"pruned": count}, f"Forgotten: {count}")
