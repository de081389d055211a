"""1,000 jobs, workers killed and frozen at random: each effect in our store exactly once, on both databases.

More: KSYNC_JOBS=5000 KSYNC_KILLS=200 ./run conformance jobs
"""

from __future__ import annotations

import os
from pathlib import Path

from conformance import crashing_jobs
from conformance.servers import postgresql
from ksync_server import settings
from ksync_server.store import schema
from ksync_server.store.database import Database

JOBS = int(os.environ.get("KSYNC_JOBS", "1000"))
KILLS = int(os.environ.get("KSYNC_KILLS", "16"))
FREEZES = KILLS // 8


def check(url: str, folder: Path, *, processes: int, threads: int) -> None:
    """Every effect once, although steps were begun more often."""
    database = Database(settings.Database(url=url))
    schema.migrate(database)
    database.close()
    report = crashing_jobs.run(
        url, folder, jobs_=JOBS, workers=processes, kills=KILLS, freezes=FREEZES, threads=threads
    )
    print(report)
    assert report.done == JOBS
    assert report.wrong == {}
    assert report.kills > KILLS / 2
    assert report.repeated >= 2, "one step was cut by a kill, one taken over from a sleeper"
    assert report.refused >= 1, "the sleeper's effect was refused"


def test_four_workers_on_two_nodes_over_postgresql(tmp_path: Path) -> None:
    """A node is a process of two job threads with nothing but the database in common with the other."""
    with postgresql() as server, server.database() as url:
        check(url, tmp_path, processes=2, threads=2)


def test_four_worker_processes_over_sqlite(tmp_path: Path) -> None:
    check(f"sqlite:///{tmp_path / 'ksync.db'}", tmp_path, processes=4, threads=1)
