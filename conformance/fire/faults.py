"""What the server stands on breaks for a while: only retryable answers, nothing lost, service by itself again."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg

from conformance.faults import LOST, shaky
from conformance.fire.load import Load
from conformance.fire.reload import Getter
from conformance.fire.running import Server, wait_until
from conformance.fire.scene import Finding, Scene, whole
from conformance.fire.wire import Login, Wire
from conformance.servers import postgresql
from conformance.target import account

FAULT_S = 3.0
BACK_S = 30.0  # without a restart, from the end of the fault to the last actor's next write
MIB = 1024 * 1024
# A disk that is full to the last byte, not one that is nearly full: that refuses earlier, and elsewhere.
NO_RESERVE = "disk.reserve_bytes=0"


def endure(
    scene: Scene,
    server: Server,
    load: Load,
    what: str,
    begin: Callable[[], object],
    end: Callable[[], object],
    *,
    seconds: float = FAULT_S,
    feel: Callable[[], int] | None = None,
) -> list[Finding]:
    """One fault under load, from a sound state to a sound state.

    Args:
        feel: counts how often it was felt; None: refusals and cuts.
    """
    feel = feel or (lambda: load.refusals + load.cuts)
    load.go_on()
    time.sleep(1)
    before, refused_before, done_before = feel(), load.refusals + load.cuts, load.acknowledged
    begin()
    time.sleep(seconds)
    end()
    ended = time.monotonic()
    late: list[str] = []
    try:
        wait_until(
            lambda: all(actor.last_good > ended for actor in load.actors), "every actor writes again", BACK_S
        )
    except TimeoutError as error:
        late = [str(error)]
    back = time.monotonic() - ended
    load.rest()
    felt, refused = feel() - before, load.refusals + load.cuts - refused_before
    counted = {key: count for key, count in load.answers.items() if key.endswith((" 503", " 507"))}
    done = load.acknowledged - done_before
    scene.say(f"{what}: {felt} times, {done} acknowledged, {refused} refused or cut, {counted} so far")
    return [
        Finding(f"{what}: only 503, 507 and cuts; every acknowledged write is there", list(load.violations)),
        Finding(f"{what}: it was felt ({felt} times)", [] if felt else ["nothing noticed"]),
        Finding(f"{what}: all write again {back:.1f} s after it, without a restart", late),
        Finding(f"{what}: verify finds nothing", server.verify()),
    ]


def outage(scene: Scene) -> list[Finding]:
    """PostgreSQL is stopped and started, then crashes and is started, under load."""
    pg = scene.postgresql
    if pg is None:
        return [Finding("SQLite has no server that could be stopped")]
    if pg.control is None:
        return [Finding("the PostgreSQL server can be stopped", ["KSYNC_TEST_PG names one that is not ours"])]
    control = pg.control

    def crash() -> None:
        pid = control.get_pid()
        os.kill(pid, signal.SIGQUIT)
        wait_until(lambda: not (control.pgdata / "postmaster.pid").exists(), "PostgreSQL is gone")

    with Server(scene.data, scene.settings) as server:
        with Load(server, may_refuse=True, seed=scene.seed) as load:
            found = endure(scene, server, load, "PostgreSQL stopped", control.stop, control.start)
            found += endure(scene, server, load, "PostgreSQL crashed", crash, control.start)
        found.append(_no_faults(server, load))
    return found + whole(server)


def full(scene: Scene) -> list[Finding]:
    """The disk of the data folder (SQLite and blobs, or one of them) has not a byte left for a while."""
    if scene.store is not None and scene.postgresql is not None:
        return [Finding("nothing is kept in the data folder")]
    found: list[Finding] = []
    with mounted(scene.data, "-t", "tmpfs", "-o", "size=400m", "fire"):
        with Server(scene.data, [*scene.settings, NO_RESERVE]) as server:
            filler = scene.data / "filler"
            with Load(server, may_refuse=True, seed=scene.seed) as load:
                for what in ("full disk", "full disk again"):
                    found += endure(scene, server, load, what, lambda: fill(filler), filler.unlink)
            found.append(_no_faults(server, load))
        return found + whole(server)


def fill(path: Path) -> None:
    """Take every byte that is left on a disk."""
    for size in (MIB, 4096, 1):
        with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(size))


def databasefull(scene: Scene) -> list[Finding]:
    """PostgreSQL's own disks have not a byte left for a while: that of its tables, then that of its log.

    Without room for its log it crashes, and ends where it finds none when it starts again: then it is started
    once there is room, which is its operator's to do. Nobody touches the server.
    """
    if scene.postgresql is None:
        return [Finding("SQLite's disk is that of the data folder: see the part `full`")]
    tables, log = scene.folder / "tables", scene.folder / "log"
    with (
        mounted(tables, "-t", "tmpfs", "-o", "size=300m", "fire"),
        mounted(log, "-t", "tmpfs", "-o", "size=200m", "fire"),
        postgresql(durable=True, folder=tables, log=log) as own,
        own.database() as url,
    ):
        control = own.control

        def lives() -> bool:
            try:
                psycopg.connect(own.admin_url).close()
            except psycopg.OperationalError:
                if not (control.pgdata / "postmaster.pid").exists():
                    control.start()
                return False
            return True

        def fill_log() -> None:
            fill(log / "filler")
            with (
                contextlib.suppress(psycopg.OperationalError),
                psycopg.connect(own.admin_url, autocommit=True) as connection,
            ):
                for _ in range(20):  # through the segments that are there already
                    connection.execute("SELECT pg_logical_emit_message(true, 'fire', 'on')")
                    connection.execute("SELECT pg_switch_wal()")

        def room_for_log() -> None:
            (log / "filler").unlink()
            wait_until(lives, "PostgreSQL answers")

        with Server(scene.data, [f"database.url={url}", *scene.more]) as server:
            with Load(server, may_refuse=True, seed=scene.seed) as load:
                filler = tables / "filler"
                found = endure(
                    scene, server, load, "PostgreSQL's disk full", lambda: fill(filler), filler.unlink
                )
                found += endure(scene, server, load, "its log's disk full", fill_log, room_for_log)
            found.append(_no_faults(server, load))
        return found + whole(server)


def standby(scene: Scene) -> list[Finding]:
    """PostgreSQL only reads for a while: told so by its operator, then as a standby until it is promoted."""
    pg = scene.postgresql
    if pg is None:
        return [Finding("SQLite has no standby")]
    if pg.control is None:
        return [Finding("the PostgreSQL server can be stopped", ["KSYNC_TEST_PG names one that is not ours"])]
    control = pg.control

    def only_read(value: str) -> None:
        with psycopg.connect(pg.admin_url, autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            connection.execute("SELECT pg_reload_conf()")

    def demote() -> None:
        control.stop()
        signal_file = control.pgdata / "standby.signal"
        signal_file.touch()
        shutil.chown(signal_file, *_owner(control.pgdata))
        control.start()

    def promote() -> None:
        with psycopg.connect(pg.admin_url, autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")

    with Server(scene.data, scene.settings) as server:
        acts = _reads(server)
        with Load(server, may_refuse=True, seed=scene.seed) as load:
            reading = Reading(server, acts)
            found = endure(
                scene,
                server,
                load,
                "PostgreSQL set to read only",
                lambda: reading.begin(lambda: only_read("on")),
                lambda: reading.end(lambda: only_read("off")),
            )
            found.append(reading.finding("PostgreSQL set to read only"))
            reading = Reading(server, acts)
            found += endure(
                scene,
                server,
                load,
                "a standby, then promoted",
                lambda: reading.begin(demote),
                lambda: reading.end(promote),
            )
            found.append(reading.finding("a standby, then promoted"))
        found.append(_no_faults(server, load))
    return found + whole(server)


class Reading:
    """Requests that read while nothing can be written, on a kept connection and on fresh ones."""

    def __init__(self, server: Server, acts: list[Callable[[Wire], int]]) -> None:
        self._acts = acts
        self._login = _alice(server)
        self._getters = [Getter(self._login, acts, fresh=fresh) for fresh in (False, True)]

    def begin(self, fault: Callable[[], object]) -> None:
        """Begin once the fault is there and the first reads have come through."""
        fault()
        wire = Wire(self._login)
        wait_until(lambda: all(act(wire) in (200, 207) for act in self._acts), "reads work")
        wire.close()
        for getter in self._getters:
            getter.start()

    def end(self, cure: Callable[[], object]) -> None:
        """End before the fault does."""
        for getter in self._getters:
            getter.over.set()
        for getter in self._getters:
            getter.join()
        cure()

    def finding(self, what: str) -> Finding:
        """Whether all of them were answered well."""
        count = sum(getter.answered for getter in self._getters)
        failures = [failure for getter in self._getters for failure in getter.failures]
        return Finding(f"{what}: {count} reads meanwhile, none failed", failures if count else ["no reads"])


def _owner(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_uid, state.st_gid


def _alice(server: Server) -> Login:
    ready = server.running.ready
    alice = account(ready, "alice")
    return Login(str(ready["sync_url"]).rstrip("/"), alice["login"], alice["password"])


def _reads(server: Server) -> list[Callable[[Wire], int]]:
    """Make a file that fits a row and one that does not; returns requests that read."""
    alice = account(server.running.ready, "alice")
    home, drive = f"/calendars/{alice['sync_id']}/", f"/drives/{alice['drives'][0]['id']}/"
    wire = Wire(_alice(server))
    assert wire.send("PUT", drive + "read", b"r" * 2000).status == 201
    assert wire.send("PUT", drive + "large", b"l" * 3_000_000).status == 201
    wire.close()
    return [
        lambda wire: wire.send("OPTIONS", home).status,
        lambda wire: wire.send("GET", drive + "read").status,
        lambda wire: wire.send("GET", drive + "large").status,
        lambda wire: wire.propfind(home, "1", "D:displayname").status,
        lambda wire: wire.propfind(drive, "1", "D:getetag").status,
        lambda wire: wire.send("HEAD", drive + "read").status,
    ]


def store(scene: Scene) -> list[Finding]:
    """The S3 server fails one request in twenty, then every one, then does what is asked and hangs up."""
    between = scene.store
    if between is None:
        return [Finding("files on a disk have no server that could fail")]

    def calm() -> None:
        between.plan = scene.plan

    def failing(outcome: str | int) -> Callable[[], None]:
        def begin() -> None:
            between.plan = lambda method, path: outcome

        return begin

    def shake() -> None:
        between.plan = shaky(0.05, random.Random(scene.seed))

    # Patience that a whole outage outlasts, so that clients are told.
    with Server(scene.data, [*scene.settings, "s3.patience_s=1"]) as server:
        with Load(server, may_refuse=True, seed=scene.seed) as load:
            found = endure(
                scene, server, load, "S3 fails 5 %", shake, calm, seconds=5, feel=lambda: between.failed
            )
            found += endure(scene, server, load, "S3 answers 503", failing(503), calm)
            found += endure(scene, server, load, "S3 hangs up behind what it did", failing(LOST), calm)
        found.append(_no_faults(server, load))
    return found + whole(server)


def readonly(scene: Scene) -> list[Finding]:
    """The file system gives up and turns read-only, as ext4 does after an error; repaired, and started again."""
    image = scene.folder / "image"
    with image.open("wb") as file:
        file.truncate(700 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with contextlib.ExitStack() as mounts:
        mounts.enter_context(mounted(scene.data, "-o", "loop,errors=remount-ro", str(image)))
        with Server(scene.data, scene.settings) as server:
            with Load(server, may_refuse=True, seed=scene.seed) as load:
                time.sleep(2)
                subprocess.run(["mount", "-o", "remount,abort", str(scene.data)], check=True)
                time.sleep(FAULT_S)
                refused = load.refusals
                server.crash()
                mounts.close()
                subprocess.run(["fsck.ext4", "-p", str(image)], check=False, stdout=subprocess.DEVNULL)
                mounts.enter_context(mounted(scene.data, "-o", "loop", str(image)))
                server.start()
                load.rest()
                scene.say(f"read-only: {load.refusals} refused, {load.cuts} cut")
                violations = list(load.violations)
            faults = _no_faults(server, load)
        return [
            Finding("read-only disk: only 503, 507 and cuts; after repair every acknowledged write is there", violations),
            Finding("read-only disk: it was felt", [] if refused else ["no request was refused"]),
            faults,
            *whole(server),
        ]  # fmt: skip


def _no_faults(server: Server, load: Load) -> Finding:
    bad = [key for key in load.answers if key.endswith(" 500")]
    return Finding(
        "no 500, no fault in the log", bad + [line for line in server.errors() if " fault" in line][:3]
    )


@contextlib.contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[None]:
    """A file system at a folder.

    Raises:
        RuntimeError: this user may not mount. Nobody may skip because of that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"cannot mount (be root, or run under `unshare --map-root-user --mount`): {done.stderr}"
        )
    try:
        yield
    finally:
        _unmount(folder)


def _unmount(folder: Path) -> None:
    """Once nobody has a file open there any more; else as soon as that is so."""
    for _ in range(50):
        if subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "-l", str(folder)], check=False)
