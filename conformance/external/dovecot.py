"""The real Dovecot with the shipped configuration over our accounts, read by imaplib and mbsync as users would.

Its own servers, on both databases: Debian's dovecot-imapd, dovecot-auth-lua, lua-socket and isync. What differs
from the shipped files stands in `OVERLAY`: ports, folders, log, and the users where this runs without root.
KSYNC_DOVECOT_TREE names a tree with another Dovecot, as dovecot_tree.sh unpacks it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import getpass
import imaplib
import json
import mailbox
import os
import pwd
import re
import shutil
import socket
import ssl
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from conformance import dovecot, mbsync
from conformance.certificates import Authority
from conformance.imap_server import syntax
from conformance.servers import Demo, demo, postgresql
from ksync_server.auth import passwords
from ksync_server.auth.rules import Secret
from ksync_server.cli import main
from ksync_server.mailimport.maildir_sink import MaildirSink

PATIENCE_S = 60
HOST = "mail.example.org"
ALICE, SHARED = "alice@example.org", "info@example.org"
LOG_IN_BAR_S = 0.150  # p95 of a log-in that nothing remembers
DELAY_S = 2.0  # auth_failure_delay of the shipped configuration

OVERLAY = """\
{first}
!include {shipped}
base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/dovecot.log
{debugging}
auth_verbose = yes
listen = 127.0.0.1
service imap-login {{
  {unjailed}
  inet_listener imap {{
    port = {plain}
  }}
  inet_listener imaps {{
    port = {tls}
  }}
}}
"""
WITHOUT_ROOT = """\
default_internal_user = {user}
default_internal_group = {group}
default_login_user = {user}
service anvil {{
  chroot =
}}
"""
FIRST = {"2.3": "", "2.4": "dovecot_config_version = 2.4.0"}  # before anything is included
DEBUGGING = {"2.3": "auth_debug = yes", "2.4": "log_debug = category=auth"}


def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        return one.getsockname()[1], two.getsockname()[1]


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


@dataclass(frozen=True)
class Mail:
    """A running server with a running Dovecot in front of its mailboxes."""

    server: Demo
    settings: Sequence[str]
    folder: Path
    plain: int
    tls: int
    context: ssl.SSLContext
    authority: Path

    def command(self, *words: str) -> Any:
        """Run a command of ours; its JSON. In this process: a new one for each would take minutes."""
        line = ["--config", str(self.server.data / "ksync.toml")]
        for setting in self.settings:
            line += ["--set", setting]
        done = CliRunner().invoke(main, [*line, *words, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def new_mailbox(self, address: str, *options: str) -> None:
        self.command("mailbox", "create", address, "--organization", "1", *options)

    def device(self, address: str, name: str = "laptop") -> tuple[str, str]:
        """A new device password: its id, and the secret."""
        made = self.command("device-password", "create", address, "--name", name)
        return str(made["id"]), made["secret"]

    def connect(self, source: str = "127.0.0.1") -> imaplib.IMAP4:
        """A connection to 993, from an address of the loopback network."""
        return _From(source, HOST, self.tls, self.context)

    def log_in(self, name: str, secret: str, source: str = "127.0.0.1") -> imaplib.IMAP4:
        client = self.connect(source)
        try:
            client.login(name, secret)
        except imaplib.IMAP4.error:
            client.shutdown()
            raise
        return client

    def refusal(self, name: str, secret: str, source: str = "127.0.0.1") -> str:
        """What a refused log-in is told."""
        with pytest.raises(imaplib.IMAP4.error) as told:
            self.log_in(name, secret, source)
        return str(told.value)

    def maildir(self, address: str) -> Path:
        return Path(self.command("mailbox", "show", address)["maildir"])

    @property
    def dovecot_log(self) -> str:
        return (self.folder / "dovecot.log").read_text(errors="replace")


class _From(imaplib.IMAP4_SSL):
    """imaplib to 127.0.0.1 under another name, from a chosen address."""

    def __init__(self, source: str, host: str, port: int, context: ssl.SSLContext) -> None:
        self.source = source
        super().__init__(host, port, ssl_context=context, timeout=PATIENCE_S)

    def _create_socket(self, timeout: float | None) -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout, (self.source, 0))
        try:
            return self.ssl_context.wrap_socket(plain, server_hostname=self.host)
        except OSError:
            plain.close()
            raise


class _Plain(imaplib.IMAP4):
    """The same without TLS."""

    def __init__(self, source: str, host: str, port: int) -> None:
        self.source = source
        super().__init__(host, port, timeout=PATIENCE_S)

    def _create_socket(self, timeout: float | None) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout, (self.source, 0))


@contextlib.contextmanager
def serving(database: str) -> Iterator[Mail]:
    """Our server, then Dovecot on what `mail dovecot-config` wrote."""
    assert shutil.which("mbsync"), "no mbsync: apt install isync"
    root = os.geteuid() == 0
    with contextlib.ExitStack() as stack:
        # Short, for the sockets, and open to the owner of the mail.
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="kd-", ignore_cleanup_errors=True))
        )
        folder.chmod(0o755)
        settings = [f"mail.dovecot_socket={folder}/ask", f"mail.folders={folder}/mail"]
        settings += ["mail.owner=nobody"] if root else []
        if database == "postgresql":
            server = stack.enter_context(postgresql())
            settings.append(f"database.url={stack.enter_context(server.database())}")
        authority = Authority(folder / "authority")
        pair = authority.issue("mail", HOST, "localhost")
        running = stack.enter_context(demo(folder / "data", settings=settings))
        context = ssl.create_default_context(cafile=str(authority.file))
        mail = Mail(running, settings, folder, *free_ports(), context, authority.file)
        words = ["--certificate", str(pair.certificate), "--key", str(pair.key)]
        words += ["--dovecot", dovecot.version()] if dovecot.TREE else []
        written = mail.command("mail", "dovecot-config", "--out", str(folder / "shipped"), *words)
        assert written["dovecot"] == dovecot.version()
        stack.enter_context(_dovecot(mail, root))
        yield mail


@contextlib.contextmanager
def _dovecot(mail: Mail, root: bool) -> Iterator[None]:
    folder, configuration = mail.folder, mail.folder / "overlay.conf"
    text = OVERLAY.format(
        first=FIRST[dovecot.version()],
        shipped=folder / "shipped" / "dovecot.conf",
        folder=folder,
        debugging=DEBUGGING[dovecot.version()],
        unjailed="" if root else "chroot =",
        plain=mail.plain,
        tls=mail.tls,
    )
    if not root:
        user = getpass.getuser()
        group = subprocess.run(["id", "-gn"], capture_output=True, text=True, check=True).stdout.strip()
        text += WITHOUT_ROOT.format(user=user, group=group)
    configuration.write_text(text)
    with (folder / "dovecot.out").open("wb") as output:
        process = subprocess.Popen(
            dovecot.line("dovecot", "-F", "-c", str(configuration)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        until(
            lambda: (process.poll() is not None) or _listens(mail.tls),
            "Dovecot does not listen",
        )
        written = [folder / "dovecot.out", *folder.glob("dovecot.log")]
        assert process.poll() is None, "".join(each.read_text(errors="replace") for each in written)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        return True
    return False


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def mail(request: pytest.FixtureRequest) -> Iterator[Mail]:
    with serving(request.param) as running:
        running.new_mailbox(ALICE, "--account", ALICE)
        running.new_mailbox(SHARED)
        yield running


# -- who gets in ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device(mail: Mail) -> str:
    return mail.device(ALICE, "first laptop")[1]


def test_a_device_gets_in_over_tls_and_after_starttls(mail: Mail, device: str) -> None:
    client = mail.log_in(ALICE, device)
    assert client.select("INBOX")[0] == "OK"
    client.logout()
    typed = mail.log_in(ALICE.upper(), device.replace("-", " ").upper())  # as people type them
    assert typed.state == "AUTH"
    typed.logout()
    for encrypted in (False, True):
        plain = _Plain(
            "127.0.0.5", HOST, mail.plain
        )  # Dovecot takes what comes from its own address for safe
        assert "LOGINDISABLED" in plain.capabilities
        if encrypted:
            before = plain.file  # imaplib leaves it open
            assert plain.starttls(mail.context)[0] == "OK"
            before.close()
            assert plain.login(ALICE, device)[0] == "OK"
        else:
            with pytest.raises(imaplib.IMAP4.error, match="PRIVACYREQUIRED"):
                plain.login(ALICE, device)
        plain.logout()


def test_old_tls_is_refused(mail: Mail) -> None:
    context = ssl.create_default_context(cafile=str(mail.authority))
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(OSError, match=r"(?i)ssl|reset"):  # ssl.SSLError is an OSError
        _From("127.0.0.1", HOST, mail.tls, context)


def test_whatever_else_is_shown_gets_one_answer_after_one_time(mail: Mail, device: str) -> None:
    number, revoked = mail.device(ALICE, "lost phone")
    mail.log_in(ALICE, revoked).logout()
    mail.command("device-password", "revoke", ALICE, number)
    application = mail.command("app-password", "create", ALICE, "--name", "tablet")["secret"]
    shared = mail.device(SHARED)[1]
    alice = mail.server.account("alice")
    tries = {
        "unknown address": ("nobody@example.org", device),
        "another mailbox": (SHARED, device),
        "of another mailbox": (ALICE, shared),
        "revoked": (ALICE, revoked),
        "nobody's": (ALICE, _other_letters(device)),
        "mistyped": (ALICE, device[:-1] + ("0" if device[-1] != "0" else "1")),
        "account password": (ALICE, alice["password"]),
        "account password of an unknown address": ("nobody@example.org", alice["password"]),
        "application password": (ALICE, application),
        "the sync id": (alice["sync_id"], device),
        "no name": ('""', device),
    }

    def refused(name: str, secret: str) -> tuple[str, float]:
        began = time.monotonic()
        return mail.refusal(name, secret), time.monotonic() - began

    with ThreadPoolExecutor(len(tries)) as threads:
        answers = dict(zip(tries, threads.map(lambda each: refused(*each), tries.values()), strict=True))
    told = {text for text, _ in answers.values()}
    took = {what: seconds for what, (_, seconds) in answers.items()}
    assert told == {"b'[AUTHENTICATIONFAILED] Authentication failed.'"}
    assert min(took.values()) > DELAY_S - 0.7, took
    assert max(took.values()) - min(took.values()) < 1.5, took  # Dovecot lets them go in batches
    mail.log_in(ALICE, device).logout()


def _other_letters(device: str) -> str:
    """A device password with right check letters that was never made."""
    made = passwords.new_app_password(Secret.DEVICE_PASSWORD).shown
    assert made != device
    return made


def test_nobody_logs_in_for_somebody_else(mail: Mail, device: str) -> None:
    """SASL PLAIN has a second name, of whom one wants to be (RFC 4616); Dovecot has master users."""
    for wanted, name in (
        (SHARED, ALICE),
        (ALICE, SHARED),
        ("", f"{SHARED}*{ALICE}"),
        ("", f"{ALICE}*{SHARED}"),
    ):
        client = mail.connect()
        said = f"{wanted}\0{name}\0{device}".encode()
        with pytest.raises(imaplib.IMAP4.error, match="AUTHENTICATIONFAILED"):
            client.authenticate("PLAIN", lambda _, said=said: said)
        client.shutdown()
    client = mail.connect()
    assert client.authenticate("PLAIN", lambda _: f"\0{ALICE}\0{device}".encode())[0] == "OK"
    client.logout()


def test_a_device_password_opens_neither_calendars_nor_drive(mail: Mail, device: str) -> None:
    for path in ("/", f"/drives/{mail.server.account('alice')['drives'][0]['id']}/"):
        request = urllib.request.Request(mail.server.url + path, method="PROPFIND")
        request.add_header(
            "Authorization", "Basic " + base64.b64encode(f"{ALICE}:{device}".encode()).decode()
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=PATIENCE_S)
        refused.value.close()
        refused.value.close()
        assert refused.value.code == 401


def test_two_devices_and_a_revocation_at_the_next_log_in(mail: Mail) -> None:
    (first, one), (_, two) = mail.device(ALICE, "phone"), mail.device(ALICE, "desktop")
    open_session = mail.log_in(ALICE, one)
    mail.log_in(ALICE, two).logout()
    mail.command("device-password", "revoke", ALICE, first)
    assert "AUTHENTICATIONFAILED" in mail.refusal(ALICE, one)
    mail.log_in(ALICE, two).logout()
    assert open_session.noop()[0] == "OK", "sessions that are open go on until they end"
    open_session.logout()


def test_suspended_mailboxes_and_accounts_open_at_once_again(mail: Mail, device: str) -> None:
    for group, name in (("mailbox", ALICE), ("account", ALICE)):
        mail.command(group, "suspend", name)
        assert "AUTHENTICATIONFAILED" in mail.refusal(ALICE, device)
        mail.command(group, "resume", name)
        mail.log_in(ALICE, device).logout()


def test_the_last_use_is_listed(mail: Mail) -> None:
    number, secret = mail.device(SHARED, "reception")
    before = int(time.time())
    mail.log_in(SHARED, secret, "127.0.0.7").logout()

    def used() -> Any:
        rows = mail.command("device-password", "list", SHARED)
        return next(row for row in rows if str(row["id"]) == number and row["last_used_at"])

    row = until(lambda: contextlib.suppress(StopIteration) and _or_none(used), "the use was not written")
    assert (row["last_service"], row["last_address"]) == ("imap", "127.0.0.7")
    assert row["last_used_at"] >= before
    assert secret not in json.dumps(row)


def _or_none(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except StopIteration:
        return None


def test_guesses_are_counted_by_the_clients_address_and_owners_get_in_meanwhile(mail: Mail) -> None:
    guesser, secret = "127.0.0.66", mail.device(SHARED, "office")[1]
    with ThreadPoolExecutor(5) as threads:
        guesses = [f"guess number {number}" for number in range(5)]
        told = list(threads.map(lambda each: mail.refusal(SHARED, each, guesser), guesses))
    told.append(mail.refusal(SHARED, "guess number 5", guesser))
    assert "AUTHENTICATIONFAILED" in told[0]
    assert "UNAVAILABLE" in told[-1], told  # blocked: a program is to come back, not to ask for a password
    began = time.monotonic()
    mail.log_in(SHARED, secret, guesser).logout()
    assert time.monotonic() - began < DELAY_S, "Dovecot's own penalty delays an address by up to 15 s"
    assert "AUTHENTICATIONFAILED" in mail.refusal(SHARED, "a guess from elsewhere", "127.0.0.67")
    lines = [line for line in mail.server.log.read_text().splitlines() if "log-in refused" in line]
    ours = [line for line in lines if f"address={guesser}" in line]
    assert len(ours) == 6
    assert all("service=imap" in line and f"login={SHARED}" in line for line in ours)
    assert 'reason="too many wrong log-ins"' in ours[-1]


def test_a_log_in_is_quick_without_anything_remembered(mail: Mail, device: str) -> None:
    rounds = []
    for _ in range(3):  # other programs share the machine: the best of three counts
        took = []
        for _ in range(40):
            client = mail.connect()
            began = time.monotonic()
            client.login(ALICE, device)
            took.append(time.monotonic() - began)
            client.logout()
        rounds.append(statistics.quantiles(took, n=20)[-1])
        if rounds[-1] <= LOG_IN_BAR_S:
            break
    print(f"p95 of a log-in: {min(rounds) * 1000:.0f} ms")
    assert min(rounds) <= LOG_IN_BAR_S, rounds
    assert re.search(
        r"^auth_cache_size = 0$", (mail.folder / "shipped" / "dovecot.conf").read_text(), re.MULTILINE
    )


def test_connections_that_never_log_in_keep_nobody_out(mail: Mail, device: str) -> None:
    """Dovecot lets the oldest go once it has 100 of them."""
    with contextlib.ExitStack() as idle:
        for number in range(130):
            place = ("127.0.0.1", mail.tls)
            idle.enter_context(socket.create_connection(place, 5, (f"127.0.2.{number + 1}", 0)))
        mail.log_in(ALICE, device).logout()


def test_while_nobody_answers_programs_are_told_to_come_back(mail: Mail, device: str) -> None:
    place, aside = mail.folder / "ask", mail.folder / "aside"
    place.rename(aside)
    try:
        assert "UNAVAILABLE" in mail.refusal(ALICE, device)
    finally:
        aside.rename(place)
    mail.log_in(ALICE, device).logout()


# -- mail -----------------------------------------------------------------------------------------

LETTERS = {
    f"{number}": b"From: carol@example.net\r\nTo: alice@example.org\r\nSubject: Letter %d\r\nMessage-ID: <%d@example.net>\r\n\r\n"
    % (number, number)
    + body
    for number, body in enumerate(
        (b"Plain.\r\n", "Zoë 🚆\r\n".encode(), b"x" * 990 + b"\r\n", b".\r\n..\r\n", b"")
    )
}


def _own(path: Path) -> None:
    """Give what a test put into a Maildir to the owner of the mail."""
    if os.geteuid() == 0:
        owner = pwd.getpwnam("nobody")
        for each in (path, *path.rglob("*")):
            os.chown(each, owner.pw_uid, owner.pw_gid)


def test_what_lies_in_the_maildir_is_read(mail: Mail, device: str) -> None:
    place = mail.maildir(ALICE)
    client = mail.log_in(ALICE, device)
    client.select("INBOX")  # Dovecot makes it
    client.logout()
    assert place.parent.stat().st_mode & 0o077 == 0
    box = mailbox.Maildir(place)
    for letter in LETTERS.values():
        message = mailbox.MaildirMessage(letter.replace(b"\r\n", b"\n"))
        message.set_subdir("cur")
        message.set_flags("FS")
        box.add(message)
    _own(place)
    client = mail.log_in(ALICE, device)
    assert client.select("INBOX") == ("OK", [b"%d" % len(LETTERS)])
    found = {}
    for number in client.search(None, "ALL")[1][0].split():
        ((head, letter), *_) = client.fetch(number.decode(), "(FLAGS BODY.PEEK[])")[1]
        assert b"\\Flagged" in head
        assert b"\\Seen" in head
        found[re.search(rb"Subject: Letter (\d)", letter)[1].decode()] = letter
    assert found == LETTERS
    client.logout()


def test_the_usual_folders_are_there_with_their_uses(mail: Mail, device: str) -> None:
    client = mail.log_in(ALICE, device)
    listed = b"\n".join(client.list()[1])
    uses = {
        b"Drafts": b"\\Drafts",
        b"Sent": b"\\Sent",
        b"Archive": b"\\Archive",
        b"Junk": b"\\Junk",
        b"Trash": b"\\Trash",
    }
    for name, use in uses.items():
        assert re.search(rb"\([^)]*" + re.escape(use) + rb'[^)]*\) "/" ' + name, listed), listed
    assert all(name in b"\n".join(client.lsub()[1]) for name in uses)
    assert "METADATA" not in client.capabilities
    client.logout()


def test_folders_below_folders_with_dots_and_other_letters(mail: Mail, device: str) -> None:
    """On the disk: Maildir++, modified UTF-7, and `\\2e` for a dot that is no separator."""
    client = mail.log_in(ALICE, device)
    for name in ('"Projects/example.org"', '"Projects/Caf&AOk-/2026"', '"A & B"'.replace("&", "&-")):
        assert client.create(name)[0] == "OK"
        assert client.append(name, "", "", LETTERS["0"])[0] == "OK"
    client.logout()
    on_disk = {path.name for path in mail.maildir(ALICE).iterdir() if path.name.startswith(".")}
    assert {".Projects.example\\2eorg", ".Projects.Caf&AOk-.2026", ".A &- B"} <= on_disk


def test_folders_that_an_import_wrote_are_listed_under_their_names(mail: Mail) -> None:
    address = "moved@example.org"
    mail.new_mailbox(address)
    names = [
        "a.b/c.d",
        ".x",
        "x/~y",
        "~z",
        "back\\slash",
        "\\2e",
        "A & B",
        "Café/日本語",
        "🚆",
        "50%",
        "INBOX/sub",
    ]
    owner = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    sink = MaildirSink(mail.maildir(address), escaped=True, owner=(owner.pw_uid, owner.pw_gid))
    for name in names:
        asyncio.run(sink.ensure(name))
    _own(mail.maildir(address).parent)
    client = mail.log_in(address, mail.device(address)[1])
    for found in (client.list(), client.lsub()):
        assert set(names) <= {_listed(row) for row in found[1]}
    wire = syntax.to_utf7(names[0]).decode()
    assert client.append(f'"{wire}"', "", "", LETTERS["0"])[0] == "OK"
    assert len(list((mail.maildir(address) / ".a\\2eb.c\\2ed").glob("*/*,S=*"))) == 1
    client.logout()


def _listed(row: bytes | tuple[bytes, bytes]) -> str:
    """The name in an answer to LIST, where it may be quoted or a literal."""
    if isinstance(row, tuple):
        return syntax.from_utf7(row[1])
    name = row.partition(b' "/" ')[2]
    if name.startswith(b'"'):
        name = re.sub(rb"\\(.)", rb"\1", name[1:-1])
    return syntax.from_utf7(name)


def test_mbsync_copies_it_all(mail: Mail, device: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(device)
    far = (
        f'IMAPStore far\nHost localhost\nPort {mail.tls}\nUser {ALICE}\nPassCmd "cat {secret}"\n'
        f"SSLType IMAPS\nCertificateFile {mail.authority}\nAuthMechs PLAIN\n"
    )
    near = tmp_path / "near"
    near.mkdir()
    mbsync.pull(tmp_path / "state", far, mbsync.maildir("near", near))
    inbox = [
        bytes(message).replace(b"\n", b"\r\n") for message in mailbox.Maildir(near / "INBOX", create=False)
    ]
    assert len(inbox) == len(LETTERS)
    for folder in (
        "Drafts",
        "Sent",
        "Archive",
        "Junk",
        "Trash",
        "Projects/example.org",
        "Projects/Caf&AOk-/2026",
    ):
        assert (near / folder / "cur").is_dir(), folder
    assert len(mailbox.Maildir(near / "Projects/example.org", create=False)) == 1


def test_a_full_mailbox_says_so_and_a_larger_quota_lets_go_on(mail: Mail) -> None:
    address = "small@example.org"
    mail.new_mailbox(address, "--quota-bytes", "100000")
    secret = mail.device(address)[1]
    client = mail.log_in(address, secret)
    letter = LETTERS["0"] + b"y" * 60_000
    assert client.append("INBOX", "", "", letter)[0] == "OK"
    status, told = client.append("INBOX", "", "", letter)
    assert (status, b"OVERQUOTA" in told[0]) == ("NO", True), told
    assert b"STORAGE 59 98" in b" ".join(part for rows in client.getquotaroot("INBOX")[1] for part in rows)
    client.logout()
    mail.command("mailbox", "quota", address, "--quota-bytes", "1000000")
    client = mail.log_in(address, secret)
    assert client.append("INBOX", "", "", letter)[0] == "OK"
    client.logout()


def test_dovecots_own_programs_find_mailboxes_and_no_others(mail: Mail) -> None:
    ask = dovecot.line("doveadm", "-c", str(mail.folder / "overlay.conf"), "user", "-f", "home")
    found = subprocess.run([*ask, ALICE], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found) == mail.maildir(ALICE).parent
    assert subprocess.run([*ask, "nobody@example.org"], capture_output=True, check=False).returncode != 0


def test_a_deleted_mailbox_opens_no_more_and_its_mail_stays_until_it_is_erased(mail: Mail) -> None:
    address = "leaver@example.org"
    for erase in (False, True):
        mail.new_mailbox(address)
        secret = mail.device(address)[1]
        client = mail.log_in(address, secret)
        client.append("INBOX", "", "", LETTERS["0"])
        client.logout()
        place = mail.maildir(address)
        told = mail.command("mailbox", "delete", address, *(["--erase"] if erase else []))
        assert "AUTHENTICATIONFAILED" in mail.refusal(address, secret)
        assert place.exists() is not erase
        assert told["mail_kept"] == (None if erase else str(place.parent))


def test_zz_no_secret_is_in_any_log(mail: Mail, device: str) -> None:
    """After all of the above, with Dovecot's debugging on, our socket gone for a while, and tries of every kind."""
    ours = [
        line
        for line in mail.server.log.read_text(errors="replace").splitlines()
        if " source=ksync_server" in line
    ]
    assert any("log-in refused" in line for line in ours)
    everything = mail.dovecot_log + "\n".join(ours)  # what the demo prints for people is no log
    for secret in (device, device.replace("-", ""), mail.server.account("alice")["password"], "guess number"):
        assert secret not in everything
    assert "auth-worker" in mail.dovecot_log, "debugging was on"
    found = [line for line in mail.dovecot_log.splitlines() if re.search(r"\b(Panic|Fatal)\b", line)]
    assert found == []
