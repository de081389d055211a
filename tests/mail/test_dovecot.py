"""What Dovecot asks and is answered, and its configuration. The real one: conformance/external/dovecot.py."""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from conformance.servers import demo
from ksync_server import settings
from ksync_server.auth import mailboxes
from ksync_server.auth.gate import Gate
from ksync_server.cli import doctor
from ksync_server.errors import ConfigError, Unavailable
from ksync_server.mail import dovecot
from ksync_server.mail.dovecot import Bridge
from tests.auth.harness import PASSWORD, Door

ADDRESS = "alice@example.org"
OWNER = pwd.getpwuid(os.geteuid())


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path a socket can have."""
    with tempfile.TemporaryDirectory(prefix="kd-") as name:
        yield Path(name)


@pytest.fixture
def door(database_url: str, tmp_path: Path) -> Iterator[Door]:
    with Door.opened(database_url, tmp_path) as opened:
        yield opened


def bridge(door: Door, folder: Path = Path("/srv/mail"), **mail: object) -> Bridge:
    return Bridge(settings.Mail(folders=folder, **mail), door.database, door.gate)


def asked(one: Bridge, verb: str, *words: str) -> tuple[str, dict[str, str]]:
    line = " ".join([verb, *(word.encode("utf-8", "surrogateescape").hex() for word in words)])
    return read(one.answer(line.encode() + b"\n"))


def read(answer: bytes) -> tuple[str, dict[str, str]]:
    assert answer.endswith(b"\n")
    verdict, *fields = answer.decode("ascii").split()
    pairs = dict(field.split("=") for field in fields)
    return verdict, {name: bytes.fromhex(value).decode() for name, value in pairs.items()}


# -- answers --------------------------------------------------------------------------------------


def test_a_device_is_told_where_its_mailbox_is(door: Door) -> None:
    box = door.mailbox("Alice@example.org", door.account(), quota_bytes=5_000_000)
    _, secret = door.device(box)
    verdict, found = asked(bridge(door), "login", "imap", "192.0.2.1", ADDRESS, secret)
    assert verdict == "ok"
    assert found == {
        "user": "Alice@example.org",  # one spelling, whatever was typed
        "home": f"/srv/mail/{box.folder}",
        "uid": str(OWNER.pw_uid),
        "gid": str(OWNER.pw_gid),
        "quota_rule": "*:bytes=5000000",
        "quota_storage_size": "5000000B",
    }
    door.write(lambda tx: mailboxes.set_quota(tx, box, None))
    without = asked(bridge(door), "find", ADDRESS)[1]
    assert (without["quota_rule"], without["quota_storage_size"]) == ("*:storage=0", "unlimited")
    assert mailboxes.maildir_of(Path("/srv/mail"), box.folder) == Path(found["home"]) / "Maildir"


def test_whatever_is_refused_is_told_alike(door: Door) -> None:
    alice = door.account()
    box = door.mailbox(ADDRESS, alice)
    (_, secret), (_, app) = door.device(box), door.app_password(alice)
    one = bridge(door)
    for words in (
        ("imap", "192.0.2.1", ADDRESS, PASSWORD),
        ("imap", "192.0.2.1", ADDRESS, app),
        ("imap", "192.0.2.1", "nobody@example.org", secret),
        ("imap", "192.0.2.1", ADDRESS, ""),
        ("imap", "192.0.2.1", "", secret),
        ("imap", "192.0.2.1", ADDRESS, "\udcff\udcfe"),
        ("pop3", "192.0.2.1", ADDRESS, secret),
        ("caldav", "192.0.2.1", ADDRESS, secret),
        ("web", "192.0.2.1", ADDRESS, PASSWORD),
        ("", "", "", ""),
    ):
        assert asked(one, "login", *words) == ("no", {}), words
    assert asked(one, "login", "imap", "192.0.2.1", ADDRESS, secret)[0] == "ok"
    assert asked(one, "login", "submission", "192.0.2.1", ADDRESS, secret)[0] == "ok"
    door.write(lambda tx: mailboxes.set_state(tx, box, "suspended"))
    assert asked(one, "login", "imap", "192.0.2.1", ADDRESS, secret) == ("no", {})
    assert asked(one, "find", ADDRESS) == ("no", {})
    assert asked(one, "find", "nobody@example.org") == ("no", {})


def test_the_clients_address_is_what_is_throttled(door: Door) -> None:
    _, secret = door.device(door.mailbox(ADDRESS, door.account()))
    one = bridge(door)
    for number in range(5):
        assert asked(one, "login", "imap", "198.51.100.1", ADDRESS, f"guess {number}")[0] == "no"
    assert asked(one, "login", "imap", "198.51.100.1", ADDRESS, "guess 5")[0] == "later"
    assert asked(one, "login", "imap", "198.51.100.2", ADDRESS, "guess 5")[0] == "no"
    assert asked(one, "login", "imap", "198.51.100.1", ADDRESS, secret)[0] == "ok"


def test_no_database_is_no_refusal(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """A phone that is told "no" forgets its password and asks for another."""
    _, secret = door.device(door.mailbox(ADDRESS, door.account()))

    def gone(*_: object, **__: object) -> None:
        raise Unavailable("no database")

    monkeypatch.setattr(Gate, "identify", gone)
    assert asked(bridge(door), "login", "imap", "192.0.2.1", ADDRESS, secret) == ("later", {})


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"login\n",
        b"login 61 61 61\n",
        b"login 61 61 61 61 61\n",
        b"login imap 61 61 61\n",
        b"find\n",
        b"find 6\n",
        b"find 61 61\n",
        b"\xff\xfe\n",
        b"LOGIN 61 61 61 61\n",
    ],
)
def test_what_nobody_understands_is_no_refusal_either(
    sqlite_url: str, tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with Door.opened(sqlite_url, tmp_path) as door, caplog.at_level(logging.ERROR):
        assert bridge(door).answer(line) == b"later\n"
    assert "another version" in caplog.text


# -- the socket -----------------------------------------------------------------------------------


def ask(path: Path, line: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(20)
        client.connect(str(path))
        client.sendall(line)
        with client.makefile("rb") as answer:
            return answer.read()


async def asked_over(path: Path, line: bytes) -> bytes:
    return await asyncio.to_thread(ask, path, line)


def test_it_is_open_to_its_user_alone_and_a_second_one_takes_its_place(
    sqlite_url: str, tmp_path: Path, short: Path
) -> None:
    path, folders = short / "ask", short / "deep" / "mail"

    async def run(door: Door) -> None:
        mail = settings.Mail(folders=folders, dovecot_socket=str(path))
        first, listener = Bridge(mail, door.database, door.gate), dovecot.listen(mail)
        await first.start(listener)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(folders.stat().st_mode) == 0o700
        assert await asked_over(path, b"find 61\n") == b"no\n"
        second = Bridge(mail, door.database, door.gate)
        await second.start(dovecot.listen(mail))
        await first.close()
        assert await asked_over(path, b"find 61\n") == b"no\n"
        assert await asked_over(path, b"find " + b"6" * 100_000 + b"\n") == b"", "no line is that long"
        await second.close()

    with Door.opened(sqlite_url, tmp_path) as door:
        asyncio.run(_bounded(run(door)))
    assert not list(short.glob("ask.*")), "nothing half made is left"


async def _bounded(work: object) -> None:
    async with asyncio.timeout(60):
        await work


def test_a_place_where_no_socket_can_be_is_said(sqlite_url: str, tmp_path: Path) -> None:
    with Door.opened(sqlite_url, tmp_path) as door:
        for place, said in (
            (tmp_path / "none" / "ask", "no such folder"),
            (tmp_path / ("x" * 90), "longer than"),
        ):
            with pytest.raises(ConfigError, match=said):
                dovecot.listen(settings.Mail(dovecot_socket=str(place)))
        with pytest.raises(ConfigError, match="there is no user"):
            bridge(door, owner="nobody-has-this-name")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_server_answers_through_reloads_and_the_death_of_its_workers(short: Path) -> None:
    """Questions wait in the socket, which is the supervisor's, until a worker is there again."""
    path = short / "ask"
    settings_ = [f"mail.dovecot_socket={path}", f"mail.folders={short}/mail"]
    with demo(short / "data", settings=settings_) as running:

        def workers() -> set[int]:
            assert ask(path, b"find 61\n") == b"no\n"
            pid = running.process.pid
            return {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}

        given = settings.build({"mail": {"dovecot_socket": str(path)}})
        (finding,) = doctor.check_dovecot(given, doctor.Outside())
        assert finding.state == doctor.OK
        first = workers()
        running.process.send_signal(signal.SIGHUP)
        until(lambda: not workers() & first)
        second = workers()
        for pid in second:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(workers() - second) == len(second))
        third = workers()
        running.process.send_signal(signal.SIGHUP)
        until(lambda: len(workers()) > len(third))
        os.kill(max(workers() - third), signal.SIGKILL)  # a reload that fails is taken back
        until(lambda: len(workers()) == len(third))
    with pytest.raises(OSError, match=r"refused|No such"):
        ask(path, b"find 61\n")
    (finding,) = doctor.check_dovecot(given, doctor.Outside())
    assert finding.state == doctor.PROBLEM
    assert finding.advice
    assert list(doctor.check_dovecot(settings.Settings(), doctor.Outside())) == []


# -- the configuration ----------------------------------------------------------------------------


def configured(folder: Path, **mail: object) -> settings.Settings:
    key_file = folder / "keys.toml"
    key_file.touch(mode=0o600)
    everything = {"dovecot_socket": "/run/ksync/ask", "folders": Path("/srv/mail"), "owner": "nobody", **mail}
    return settings.Settings(
        mail=settings.Mail(**everything),
        auth=settings.Auth(key_file=key_file),
        tls=settings.Tls(
            certificates=(Path("/etc/ksync/one.pem"), Path("/etc/ksync/two.pem")),
            keys=(Path("/etc/ksync/one.key"), Path("/etc/ksync/two.key")),
            minimum_version="1.3",
        ),
    )


OWN = {
    "2.3": {
        "disable_plaintext_auth = yes",
        "ssl_cert = </etc/ksync/one.pem",
        "ssl_key = </etc/ksync/one.key",
        "args = file=/etc/dovecot/ksync/dovecot.lua blocking=yes",
        "mail_plugins = quota listescape",
    },
    "2.4": {
        "auth_allow_cleartext = no",
        "ssl_server_cert_file = /etc/ksync/one.pem",
        "ssl_server_key_file = /etc/ksync/one.key",
        "lua_file = /etc/dovecot/ksync/dovecot.lua",
        "use_worker = yes",
        'mailbox_list_storage_escape_char = "\\\\"',
    },
}
QUOTA = {"2.3": "quota_rule", "2.4": "quota_storage_size"}


def version_line(text: str) -> str:
    """The first line that is no comment: Dovecot 2.4 wants its version there, 2.3 does not know it."""
    return next(line for line in text.splitlines() if line and not line.startswith("#"))


@pytest.mark.parametrize("version", dovecot.VERSIONS)
def test_the_configuration_holds_what_it_must(tmp_path: Path, version: str) -> None:
    given = configured(tmp_path)
    texts = dovecot.configuration_files(given, Path("/etc/dovecot/ksync"), version=version)
    assert set(texts) == {"dovecot.conf", "dovecot.lua"}
    lines = {line.strip() for line in texts["dovecot.conf"].splitlines()}
    nobody = pwd.getpwnam("nobody")
    assert version_line(texts["dovecot.conf"]).startswith("dovecot_config_version =") is (version == "2.4")
    assert OWN[version] <= lines
    assert {
        "auth_cache_size = 0",
        "ssl = required",
        "ssl_min_protocol = TLSv1.3",
        "port = 993",
        "port = 143",
        f"user = {OWNER.pw_name}",  # whoever owns the key file asks: the socket is open to nobody else
        f"first_valid_uid = {nobody.pw_uid}",
        f"last_valid_gid = {nobody.pw_gid}",
        "separator = /",
        "imap_metadata = no",
    } <= lines
    assert 'local SOCKET = "/run/ksync/ask"' in texts["dovecot.lua"]
    assert [name for name in QUOTA.values() if f'"{name}"' in texts["dovecot.lua"]] == [QUOTA[version]]
    other = dovecot.configuration_files(given, tmp_path, Path("/x.pem"), Path("/x.key"), version=version)
    assert "/x.pem" in other["dovecot.conf"]
    assert "one.pem" not in other["dovecot.conf"]
    assert not any("$" in text for text in texts.values()), "every name was filled in"


def test_without_an_owner_the_mail_is_of_who_runs_the_server(tmp_path: Path) -> None:
    """Not of who writes the configuration: that is root, for /etc."""
    found = configured(tmp_path, owner="")
    stranger = pwd.getpwnam("games")
    if os.geteuid() == 0:
        os.chown(tmp_path / "keys.toml", stranger.pw_uid, stranger.pw_gid)
    who = stranger if os.geteuid() == 0 else OWNER
    for version in dovecot.VERSIONS:
        text = dovecot.configuration_files(found, Path("/etc/dovecot/ksync"), version=version)["dovecot.conf"]
        assert f"first_valid_uid = {who.pw_uid}\n" in text
        assert f"user = {who.pw_name}\n" in text


def test_what_dovecot_could_not_use_is_refused(tmp_path: Path) -> None:
    good = configured(tmp_path)
    root = configured(tmp_path, owner="root")
    no_pair = msgspec.structs.replace(good, tls=settings.Tls())
    no_key_file = msgspec.structs.replace(good, auth=settings.Auth(key_file=tmp_path / "none"))
    folder = Path("/etc/dovecot/ksync")
    for found, said in (
        (configured(tmp_path, dovecot_socket=""), "not set"),
        (configured(tmp_path, dovecot_socket='/run/a"b'), "something else"),
        (configured(tmp_path, dovecot_socket="/run/a b"), "something else"),
        (root, "root"),
        (no_pair, "certificate"),
        (no_key_file, "start the server first"),
    ):
        with pytest.raises(ConfigError, match=said):
            dovecot.configuration_files(found, folder, version="2.4")
    for odd in ("/etc/a b", "/etc/a\nssl = no", "/etc/$x", "/etc/%u", "/etc/<x", "/etc/#x"):
        with pytest.raises(ConfigError, match="something else"):
            dovecot.configuration_files(good, Path(odd), version="2.4")


def fake_dovecot(folder: Path, script: str) -> Path:
    """A program of that name that says what the script says."""
    program = folder / "dovecot"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


def test_the_installed_dovecot_says_what_it_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dovecot, "_MORE_PLACES", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no Dovecot.*--dovecot 2\.4 \(Debian 13\)"):
        dovecot.installed_version()
    for said, version in (("2.3.19.1 (9b53102964)", "2.3"), ("2.4.1-4 (7d8c0e5759)", "2.4")):
        fake_dovecot(tmp_path, f'[ "$*" = --version ] && echo "{said}"')
        assert dovecot.installed_version() == version
    for script in ("echo '2.5.0 (0)'", "echo '2.40.1'", "echo 2.4", "exit 1"):
        fake_dovecot(tmp_path, script)
        with pytest.raises(ConfigError, match=r"of version .*--dovecot 2\.3"):
            dovecot.installed_version()
    fake_dovecot(tmp_path, "").write_bytes(b"no program")
    with pytest.raises(ConfigError, match="does not say its version"):
        dovecot.installed_version()


def test_dovecot_is_found_where_the_path_does_not_lead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian keeps it in /usr/sbin, which an ordinary user's PATH has not."""
    assert "/usr/sbin" in dovecot._MORE_PLACES.split(":")
    fake_dovecot(tmp_path, "echo '2.4.1-4 (7d8c0e5759)'")
    monkeypatch.setattr(dovecot, "_MORE_PLACES", f":{tmp_path}")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert dovecot.installed_version() == "2.4"
