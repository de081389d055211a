"""Key sets rotate under a running server; no step of it, however it is cut, loses a secret."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyotp
import pytest
import sqlalchemy as sa

from ksync_server import jobs
from ksync_server.auth import app_passwords, directory, keys, passwords, rotation, secondfactor
from ksync_server.auth.accounts import Account
from ksync_server.auth.gate import Credentials, Gate, Service
from ksync_server.errors import ConfigError, Conflict, NotAuthenticated, NotFound, TooManyRequests
from ksync_server.store import tables as t
from tests.auth.harness import PEER, Door

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def path_of(door: Door) -> Path:
    return door.settings.auth.key_file


def rotate(door: Door) -> str:
    name, _ = rotation.rotate(door.database, door.keys, path_of(door))
    return name


def age(path: Path, seconds: int = 1000) -> None:
    """As if the last rotation were longer ago."""
    text = path.read_text("ascii")
    since = next(line for line in text.splitlines() if line.startswith("current_since"))
    earlier = f"current_since = {int(since.rpartition(' ')[2]) - seconds}"
    part = path.with_suffix(".new")
    part.write_text(text.replace(since, earlier), "ascii")
    part.chmod(0o600)
    part.replace(path)


def retire(door: Door, name: str) -> None:
    rotation.retire(door.database, door.keys, path_of(door), name)


def counts(door: Door) -> dict[str, dict[str, int]]:
    with door.database.read() as tx:
        return rotation.counts(tx)


def under(**kinds: int) -> dict[str, int]:
    return {
        **dict.fromkeys(rotation.KINDS, 0),
        **kinds,
    }


def job_secret(door: Door, account_id: int | None = None, **secrets: bytes) -> int:
    """A job with secrets; its id."""
    sealed = {name: door.keys.seal(each) for name, each in (secrets or {"password": b"of a source"}).items()}
    number = door.write(lambda tx: jobs.enqueue(tx, "work", {}, account_id=account_id, secrets=sealed))
    assert number is not None
    return number


def job_secrets(door: Door) -> list[bytes]:
    """What the secrets of all jobs are when they are opened."""
    c = t.job_secret.c
    with door.database.read() as tx:
        rows = tx.execute(sa.select(c.sealed).order_by(c.job_id, c.name)).all()
    return [door.keys.open(bytes(row[0])) for row in rows]


def code(secret: str, steps: int) -> tuple[str, float]:
    """A code of a step from now, and a time at which it is right."""
    at = time.time() + 30 * steps
    return pyotp.TOTP(secret).at(int(at)), at


def enter(gate: Gate, secret: str) -> int:
    """Log alice in at a gate; her account's id."""
    return gate.identify(Credentials("alice@example.org", secret), PEER, service=Service.DRIVE).account_id


def passes(door: Door, account: Account, secret: str, steps: int) -> bool:
    typed, at = code(secret, steps)
    return door.write(
        lambda tx: secondfactor.verify_totp(tx, door.keys, account, typed, window_steps=0, now=at)
    )


# -- the file -------------------------------------------------------------------------------------


def test_a_running_process_sees_the_file_change_with_its_next_secret(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    running = keys.load(path)
    sealed, first = running.seal(b"secret"), running.current
    keys.add(path, "k-2")
    assert running.current == first, "nothing uses it yet"
    assert running.digest(b"x", "k-2") == keys.load(path).digest(b"x", "k-2")
    keys.use(path, "k-2")
    assert running.digest(b"x")[0] == "k-2"
    assert running.seal(b"x").startswith(b"k-2:")
    assert running.open(sealed) == b"secret"
    assert running.is_outdated(first)
    assert not running.is_outdated("k-2")
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_there_stays_and_what_is_not_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    running = keys.load(path)
    first = running.current
    before = running.sets[first]
    keys.add(path, "k-2")
    again = running.sets["k-2"]
    keys.add(path, "k-2")
    assert (running.sets[first], running.sets["k-2"]) == (before, again)
    with pytest.raises(NotFound):
        keys.use(path, "k-3")
    with pytest.raises(NotFound):
        keys.drop(path, "k-3")
    with pytest.raises(Conflict, match="current"):
        keys.drop(path, first)


@pytest.mark.parametrize("harm", ["gone", "half", "open", "empty"])
def test_a_file_that_becomes_unusable_stops_no_running_process(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.toml"
    running = keys.load(path)
    sealed, kept, first = running.seal(b"secret"), path.read_bytes(), running.current
    match harm:
        case "gone":
            path.unlink()
        case "half":
            path.write_bytes(kept[:40])
        case "open":
            path.chmod(0o644)
        case "empty":
            path.write_bytes(b"")
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert running.open(sealed) == b"secret"
            assert running.current == first
    assert len(caplog.records) == 1, "said once, not with every request"
    part = tmp_path / "part"
    part.write_bytes(kept)
    part.chmod(0o600)
    part.replace(path)
    keys.add(path, "k-2")
    assert "k-2" in running.sets


def test_commands_at_once_lose_no_set(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    first = keys.load(path).current
    names = [f"k-{number}" for number in range(8)]
    threads = [threading.Thread(target=keys.add, args=(path, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(keys.load(path).sets) == {first, *names}


def test_a_part_that_a_killed_command_left_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    keys.load(path)
    left = tmp_path / "keys.toml.0badcafe.part"
    left.write_text("pepper")
    keys.add(path, "k-2")
    assert not left.exists()


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    real, path = tmp_path / "real.toml", tmp_path / "keys.toml"
    keys.load(real)
    path.symlink_to(real)
    keys.add(path, "k-2")
    assert path.is_symlink()
    assert "k-2" in keys.load(real).sets


# -- rotating -------------------------------------------------------------------------------------


def test_every_secret_opens_before_during_and_after_a_rotation(door: Door) -> None:
    first = door.keys.current
    account = door.account()
    _, secret = door.app_password(account)
    totp = door.turn_on_second_factor(account)
    codes = door.write(lambda tx: secondfactor.renew_recovery_codes(tx, door.keys, account))
    job_secret(door, account.id)
    assert counts(door) == {
        first: under(application_passwords=1, recovery_codes=10, second_factors=1, job_secrets=1)
    }
    name = rotate(door)
    assert counts(door)[first] == under(application_passwords=1, recovery_codes=10)
    assert counts(door)[name] == under(second_factors=1, job_secrets=1)
    assert job_secrets(door) == [b"of a source"]
    assert passes(door, account, totp, 1)
    elsewhere = door.another_process()
    for each in (door, elsewhere, door):
        each.log_in("alice@example.org", secret)
        each.gate.flush()
    assert counts(door)[name]["application_passwords"] == 1, "it moved when it was used"
    with door.database.read() as tx:
        assert rotation.holders(tx, first) == [{"sync_id": account.sync_id, **under(recovery_codes=10)}]
        assert rotation.holders(tx, "k9") == []
    assert door.write(lambda tx: secondfactor.use_recovery_code(tx, door.keys, account, codes[0]))
    with pytest.raises(NotAuthenticated):
        door.log_in("alice@example.org", secret[:-1] + ("0" if secret[-1] != "0" else "1"))


def test_a_set_is_retired_once_nothing_is_under_it(door: Door) -> None:
    first = door.keys.current
    account = door.account()
    number, secret = door.app_password(account)
    door.turn_on_second_factor(account)
    with pytest.raises(Conflict, match="rotate first"):
        retire(door, first)
    rotate(door)
    with pytest.raises(Conflict, match="Try again"):
        retire(door, first)
    age(path_of(door))
    with pytest.raises(Conflict, match="1 application passwords, 10 recovery codes"):
        retire(door, first)
    door.write(lambda tx: secondfactor.renew_recovery_codes(tx, door.keys, account))
    with pytest.raises(Conflict, match="1 application passwords"):
        retire(door, first)
    door.log_in("alice@example.org", secret)
    door.gate.flush()
    retire(door, first)
    assert first not in keys.load(path_of(door)).sets
    assert first not in door.keys.sets, "running processes forget it too"
    door.log_in("alice@example.org", secret)
    door.write(lambda tx: app_passwords.revoke(tx, account, number))
    with pytest.raises(NotFound):
        retire(door, first)
    with door.database.read() as tx:
        actions = [row["action"] for row in directory.audit(tx, actions=["keys."])]
    assert actions == ["keys.retire", "keys.rotate"]


def test_what_opens_nothing_any_more_holds_no_set_up(door: Door) -> None:
    first = door.keys.current
    account = door.account()
    revoked, _ = door.app_password(account)
    ended, _ = door.app_password(account)
    door.turn_on_second_factor(account)
    codes = door.write(lambda tx: secondfactor.renew_recovery_codes(tx, door.keys, account))
    for each in codes:
        door.write(lambda tx, c=each: secondfactor.use_recovery_code(tx, door.keys, account, c))  # type: ignore[misc]
    door.write(lambda tx: app_passwords.revoke(tx, account, revoked))
    door.write(
        lambda tx: tx.execute(
            sa.update(t.app_password).where(t.app_password.c.id == ended).values(expires_at=1)
        )
    )
    rotate(door)
    age(path_of(door))
    retire(door, first)


def test_an_older_file_moves_nothing_back(door: Door, tmp_path: Path) -> None:
    account = door.account()
    name = rotation.prepare(door.database, door.keys, path_of(door))
    assert rotation.prepare(door.database, door.keys, path_of(door)) == name, "the one that waits"
    copy = tmp_path / "node" / "keys.toml"  # another machine, which got the file before the rotation
    copy.parent.mkdir()
    shutil.copy2(path_of(door), copy)
    assert rotate(door) == name
    other = keys.load(copy)
    gate = Gate(door.settings, door.database, other, door.offers)
    _, secret = door.app_password(account)
    for each in (gate, door.gate, gate):
        assert enter(each, secret) == account.id
        each.flush()
    gate.close()
    assert set(counts(door)) == {name}
    assert rotation.reseal(door.database, other) == 0


def test_a_machine_whose_file_lacks_the_set_refuses_and_says_so(
    door: Door, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    account = door.account()
    copy = tmp_path / "node" / "keys.toml"
    copy.parent.mkdir()
    shutil.copy2(path_of(door), copy)
    name = rotate(door)
    _, secret = door.app_password(account)
    made = door.write(lambda tx: secondfactor.enrol_totp(tx, door.keys, account, "app", "ksync"))
    behind = keys.load(copy)
    gate = Gate(door.settings, door.database, behind, door.offers)
    with door.database.read() as tx:
        before = [
            tuple(row) for row in tx.execute(sa.select(t.app_password.c.digest, t.app_password.c.key_id))
        ]
        rotation.require_sets(tx, door.keys)
        with pytest.raises(ConfigError, match=f"no key set '{name}', which 2 stored secrets need"):
            rotation.require_sets(tx, behind)
    with caplog.at_level(logging.WARNING), pytest.raises(NotAuthenticated):
        enter(gate, secret)
    gate.close()
    assert f"no key set {name}" in str([vars(each) for each in caplog.records])
    typed, at = code(made.secret, 0)
    with pytest.raises(ConfigError, match=f"no key set '{name}': copy the file"):
        door.write(lambda tx: secondfactor.confirm(tx, behind, account, typed, window_steps=1, now=at))
    with pytest.raises(ConfigError, match="1 second factors do not open"):
        rotation.reseal(door.database, behind)
    with door.database.read() as tx:
        after = [
            tuple(row) for row in tx.execute(sa.select(t.app_password.c.digest, t.app_password.c.key_id))
        ]
    assert before == after
    part = copy.with_suffix(".part")
    shutil.copy2(path_of(door), part)
    part.replace(copy)
    enter(gate, secret)  # copied: it goes on without a restart


def test_a_factor_that_does_not_open_stops_no_other(door: Door) -> None:
    first = door.keys.current
    people = [door.account(name) for name in ("alice", "bob")]
    secrets = [door.turn_on_second_factor(each) for each in people]
    row = t.second_factor.c.account_id == people[0].id
    door.write(
        lambda tx: tx.execute(
            sa.update(t.second_factor).where(row).values(secret=first.encode() + b":" + b"x" * 60)
        )
    )
    with pytest.raises(ConfigError, match="1 second factors do not open"):
        rotate(door)
    assert counts(door)[first]["second_factors"] == 1
    assert passes(door, people[1], secrets[1], 1)


def test_many_factors_move_in_small_transactions(door: Door) -> None:
    account = door.account()
    sealed = [door.keys.seal(b"secret %d" % number) for number in range(250)]
    rows = [
        {
            "account_id": account.id,
            "kind": "totp",
            "name": "x",
            "secret": each,
            "created_at": 1,
            "last_step": 0,
        }
        for each in sealed
    ]
    door.write(lambda tx: tx.execute(sa.insert(t.second_factor), rows))
    name, moved = rotation.rotate(door.database, door.keys, path_of(door))
    assert moved == 250
    with door.database.read() as tx:
        found = [bytes(row[0]) for row in tx.execute(sa.select(t.second_factor.c.secret).order_by("id"))]
    assert [door.keys.open(each) for each in found] == [b"secret %d" % number for number in range(250)]
    assert {keys.sealed_under(each) for each in found} == {name}
    assert rotation.reseal(door.database, door.keys) == 0


def test_secrets_of_jobs_move_whatever_their_number_and_whoever_they_belong_to(door: Door) -> None:
    first = door.keys.current
    many = {f"name {number:03}": b"%d" % number for number in range(205)}
    job_secret(door, None, **many)
    job_secret(door, door.account().id)
    with door.database.read() as tx:
        assert [(row["sync_id"] is None, row["job_secrets"]) for row in rotation.holders(tx, first)] == [
            (False, 1),
            (True, 205),
        ]
    name, moved = rotation.rotate(door.database, door.keys, path_of(door))
    assert moved == 206
    assert job_secrets(door) == [*many.values(), b"of a source"]
    assert counts(door) == {name: under(job_secrets=206)}
    age(path_of(door))
    retire(door, first)


def test_the_secret_of_a_job_that_ends_while_it_is_moved_stays_gone(door: Door) -> None:
    number, other = job_secret(door), job_secret(door)
    real, ended = door.keys.seal, []

    def seal(secret: bytes) -> bytes:
        if not ended:
            ended.append(door.write(lambda tx: jobs.cancel(tx, number)))
        return real(secret)

    rotate(door)
    age(path_of(door))
    keys.add(path_of(door), "k-next")
    keys.use(path_of(door), "k-next")
    door.keys.seal = seal
    assert rotation.reseal(door.database, door.keys) == 1
    assert (ended, job_secrets(door)) == (["cancelled"], [b"of a source"])
    assert counts(door) == {"k-next": under(job_secrets=1)}
    assert other


def test_a_job_secret_that_does_not_open_holds_its_set_up(door: Door) -> None:
    first = door.keys.current
    sealed = {"password": first.encode() + b":" + b"x" * 60}
    door.write(lambda tx: jobs.enqueue(tx, "work", {}, secrets=sealed))
    job_secret(door)
    with pytest.raises(ConfigError, match="1 job secrets do not open"):
        rotate(door)
    assert counts(door)[first] == under(job_secrets=1)
    assert counts(door)[door.keys.current] == under(job_secrets=1)


# -- kill -9 --------------------------------------------------------------------------------------

_CHILD = """
import os, signal, sys
from pathlib import Path
import psycopg
from ksync_server import settings
from ksync_server.auth import keys, rotation
from ksync_server.errors import Conflict
from ksync_server.store.database import Database

url, path = sys.argv[1], Path(sys.argv[2])

def at_step(number):
    '''Rotate and retire, and die right before the number-th thing that changes disk or rows.'''
    left = number
    def dying(real):
        def run(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return run
    for name in ("fsync", "replace"):
        setattr(os, name, dying(getattr(os, name)))
    database = Database(settings.Database(url=url), threads=1)
    database.write = dying(database.write)
    ring = keys.load(path)
    rotation.rotate(database, ring, path)
    for name in list(ring.sets):
        try:
            rotation.retire(database, ring, path, name)
        except Conflict:  # current, or something is under it
            pass
    os._exit(0)

keys._RETIRE_AFTER_S = 0
number = 0
while True:
    number += 1
    child = os.fork()
    if child == 0:
        at_step(number)
    _, status = os.waitpid(child, 0)
    print(number, "killed" if os.WIFSIGNALED(status) else "done", flush=True)
    sys.stdin.readline()
    if not os.WIFSIGNALED(status):
        break
"""


def test_kill_between_any_two_steps_loses_nothing(door: Door, tmp_path: Path) -> None:
    """Each child is killed one step later than the one before it; after each, every secret opens."""
    first = door.keys.current
    account = door.account()
    _, secret = door.app_password(account)
    totp = door.turn_on_second_factor(account)
    codes = door.write(lambda tx: secondfactor.renew_recovery_codes(tx, door.keys, account))
    job_secret(door)
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, door.settings.database.url, str(path_of(door))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    said = []
    with child:
        for line in child.stdout:
            said.append(line.split()[1])
            _everything_opens(door, account, secret, totp, codes)
            child.stdin.write("\n")
            child.stdin.flush()
    assert child.returncode == 0
    assert said.count("killed") >= 8
    assert said[-1] == "done"
    left = keys.load(path_of(door))
    assert set(left.sets) == {first, left.current}, "what the killed ones began was ended by the last"
    assert counts(door)[left.current] == under(second_factors=1, job_secrets=1)
    assert not list(path_of(door).parent.glob("*.part"))
    door.log_in("alice@example.org", secret)


def _everything_opens(door: Door, account: Account, secret: str, totp: str, codes: tuple[str, ...]) -> None:
    """With the file as it is now, in a process that starts now, and in the one that ran all the while."""
    for ring in (keys.load(path_of(door)), door.keys):
        with door.database.read() as tx:
            rotation.require_sets(tx, ring)
            (sealed,) = [bytes(row[0]) for row in tx.execute(sa.select(t.second_factor.c.secret))]
            rows = tx.execute(sa.select(t.recovery_code.c.key_id, t.recovery_code.c.digest)).all()
            (app,) = tx.execute(sa.select(t.app_password.c.key_id, t.app_password.c.digest)).all()
            (of_job,) = [bytes(row[0]) for row in tx.execute(sa.select(t.job_secret.c.sealed))]
        assert ring.open(of_job) == b"of a source"
        assert ring.open(sealed).decode() == totp
        wanted = {
            ring.digest(secondfactor._code_bytes(account, c.replace("-", "")), rows[0].key_id)[1]
            for c in codes
        }
        assert {bytes(row.digest) for row in rows} == wanted
        letters = secret.replace("-", "").encode()
        assert ring.digest(letters, app.key_id)[1] == bytes(app.digest)


def test_a_rotation_gives_those_who_guess_no_fresh_start(door: Door) -> None:
    for number in range(6):
        with pytest.raises((NotAuthenticated, TooManyRequests)):
            door.log_in("nobody", f"wrong {number}")
    door.gate.flush()
    rotate(door)
    with pytest.raises(TooManyRequests):
        door.another_process().log_in("nobody", "another one")


def test_an_unknown_application_password_is_refused_alike_after_a_set_is_retired(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    first = door.keys.current
    account = door.account()
    number, revoked = door.app_password(account)
    door.write(lambda tx: app_passwords.revoke(tx, account, number))
    rotate(door)
    age(path_of(door))
    text = path_of(door).read_text("ascii")
    kept = [block for block in text.split("\n\n") if f"[keys.{first}]" not in block]
    path_of(door).write_text("\n\n".join(kept), "ascii")
    assert first not in door.keys.sets
    with pytest.raises(NotAuthenticated):
        door.log_in("alice@example.org", revoked)
    with pytest.raises(NotAuthenticated):  # looked at beside that one, the only row there is
        door.log_in("alice@example.org", passwords.new_app_password().shown)
    assert caplog.records[-1].reason == "no such application password"  # type: ignore[attr-defined]
