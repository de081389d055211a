"""What the job worker does: work that comes round, and the handler of each kind of job.

One table each; a new kind of background work is a line here and a function of its part.
"""

from __future__ import annotations

import time

from ksync_server import jobs
from ksync_server.app import Services
from ksync_server.auth import audit, removal, rotation, throttle
from ksync_server.dav import collections as dav_collections
from ksync_server.drive import erasing, locks
from ksync_server.jobs import Handler, Periodic
from ksync_server.mail import sender
from ksync_server.mail.notices import Notices
from ksync_server.mail.sender import Relay
from ksync_server.mailimport import passes
from ksync_server.metrics import StoreMetrics
from ksync_server.store import changes, scrub
from ksync_server.store.blobs import REAP, REAP_ORPHANS

_AT_ONCE = 1000  # extents erased before others' work is looked at
_SCRUB_S = 300  # a slice of `blobs.scrub_slice_s` this often


def periodic(services: Services, metrics: StoreMetrics | None = None) -> list[Periodic]:
    """The work of every installation's job worker."""
    settings, store = services.settings, services.blobs
    figures = metrics or StoreMetrics()

    def reap() -> None:
        while (erased := store.reap_garbage(_AT_ONCE)) == _AT_ONCE:
            figures.erased("garbage", erased)
        figures.erased("garbage", erased)

    def reap_orphans() -> None:
        while (erased := store.reap_orphans(_AT_ONCE)) == _AT_ONCE:
            figures.erased("orphan", erased)
        figures.erased("orphan", erased)

    def scrub_slice() -> None:
        figures.scrubbed(scrub.run(store).bytes)

    def measure() -> None:
        figures.stored(*store.totals())

    def expire_trash() -> None:
        while erasing.expire_trash(services.database, settings.drive, int(time.time())):
            pass

    def shorten_locks() -> None:
        services.database.write(lambda tx: locks.shorten(tx, int(time.time())))

    def end_imports() -> None:
        passes.end_abandoned(settings, services.database)

    def purge_deleted() -> None:
        while dav_collections.purge_deleted(services.database):
            pass

    def erase_accounts() -> None:
        while found := _due(services):
            for account_id, sync_id in found:
                erase_account(services, account_id, sync_id)

    def forget_deletions() -> None:
        changes.prune(services.database, int(time.time()) - settings.dav.tombstone_days * 86400)

    return [
        Periodic(REAP, 3600, reap),
        Periodic(REAP_ORPHANS, 86400, reap_orphans),
        Periodic("blobs.scrub", _SCRUB_S, scrub_slice),
        Periodic("blobs.measure", 3600, measure),
        Periodic("drive.expire-trash", 3600, expire_trash),
        Periodic("drive.shorten-locks", 3600, shorten_locks),
        Periodic("dav.purge-deleted", 3600, purge_deleted),
        Periodic("accounts.erase", 3600, erase_accounts),
        Periodic("keys.reseal", 3600, lambda: rotation.reseal(services.database, services.keys)),
        Periodic("changes.prune", 86400, forget_deletions),
        Periodic("jobs.prune", 86400, lambda: jobs.prune(services.database, settings.jobs.keep_days)),
        Periodic("mail.import-abandoned", 60, end_imports),
        Periodic("throttle.prune", 3600, lambda: throttle.prune(services.database, int(time.time()))),
    ]


def _due(services: Services) -> list[tuple[int, str]]:
    with services.database.read() as tx:
        return removal.due(tx, int(time.time()))


def erase_account(services: Services, account_id: int, sync_id: str) -> None:
    """Erase what a deleted account left, once its grace is over; blocking, safe to repeat after any cut."""
    database = services.database
    if not database.write(lambda tx: removal.claim(tx, account_id, int(time.time()))):
        return
    erased = False
    while not erased:
        dav_collections.erase_home(database, account_id)
        erasing.erase_member(database, account_id, sync_id)
        erased = removal.finish(database, account_id)


def handlers(services: Services, relay: Relay) -> dict[str, Handler]:
    """What runs the jobs of each kind."""
    mail = services.settings.mail
    return {
        audit.NOTICE: Handler(Notices(mail).run),
        sender.SEND: Handler(sender.Sender(mail, services.database, relay).run, sender.ATTEMPTS),
        passes.KIND: Handler(passes.Passes(services.settings, services.database, services.keys).run),
    }
