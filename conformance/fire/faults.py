"""What the server stands on breaks for a while: only retryable answers, nothing lost, service by itself again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from conformance.fire import invariants
from conformance.fire.load import Load
from conformance.fire.running import Server, wait_until
from conformance.fire.scene import Finding, Scene
from ksync_server import settings

FAULT_S = 3.0
BACK_S = 30.0  # without a restart, from the end of the fault to the last actor's next write
MIB = 1024 * 1024
# A disk that is full to the last byte, not one that is nearly full: that refuses earlier, and elsewhere.
NO_RESERVE = ["disk.reserve_bytes=0"] if hasattr(settings.Settings(), "disk") else []


def endure(
    scene: Scene, server: Server, load: Load, what: str, begin: Callable[[], None], end: Callable[[], None]
) -> list[Finding]:
    """One fault under load, from a sound state to a sound state."""
    load.go_on()
    time.sleep(1)
    felt = load.refusals + load.cuts
    begin()
    time.sleep(FAULT_S)
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
    felt = load.refusals + load.cuts - felt
    refused = {key: count for key, count in load.answers.items() if key.endswith((" 503", " 507"))}
    scene.say(f"{what}: {felt} refused or cut, {refused} so far")
    return [
        Finding(f"{what}: only 503, 507 and cuts; every acknowledged write is there", list(load.violations)),
        Finding(f"{what}: it was felt ({felt} times)", [] if felt else ["no request noticed"]),
        Finding(f"{what}: all write again {back:.1f} s after it, without a restart", late),
        Finding(f"{what}: rows agree with each other", invariants.broken(scene.url(server))),
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
    return found + byte_findings(scene, scene.url(server))


def full(scene: Scene) -> list[Finding]:
    """The disk of the data folder (SQLite and blobs, or blobs alone) has not a byte left for a while."""
    with mounted(scene.data, "-t", "tmpfs", "-o", "size=400m", "fire"):
        with Server(scene.data, [*scene.settings, *NO_RESERVE]) as server:
            filler = scene.data / "filler"

            def fill() -> None:
                with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(MIB))
                with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(4096))

            with Load(server, may_refuse=True, seed=scene.seed) as load:
                found = endure(scene, server, load, "full disk", fill, filler.unlink)
                found += endure(scene, server, load, "full disk again", fill, filler.unlink)
            found.append(_no_faults(server, load))
        return found + byte_findings(scene, scene.url(server))


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
            Finding("read-only disk: rows agree with each other", invariants.broken(scene.url(server))),
            faults,
            *byte_findings(scene, scene.url(server)),
        ]  # fmt: skip


def _no_faults(server: Server, load: Load) -> Finding:
    bad = [key for key in load.answers if key.endswith(" 500")]
    return Finding(
        "no 500, no fault in the log", bad + [line for line in server.errors() if " fault" in line][:3]
    )


def byte_findings(scene: Scene, url: str) -> list[Finding]:
    """Bytes and rows, once the server has ended; for bytes elsewhere the actors' own reading has to do."""
    if not scene.local:
        return []
    unnamed, missing = invariants.orphans(url, scene.blobs)
    return [
        Finding("every blob's bytes have its SHA-256", invariants.broken_bytes(url, scene.blobs)),
        Finding(
            "after reaping, files and rows name the same extents", [*sorted(unnamed), *sorted(missing)][:5]
        ),
    ]


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
