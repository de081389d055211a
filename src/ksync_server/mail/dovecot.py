"""Dovecot serves our mailboxes: it asks the gate about every log-in, over a Unix socket, and opens Maildirs.

Dovecot's Lua script (dovecot.lua here) sends one line and gets one back; what decides is `Gate.identify`, as
for every other protocol. The words of a line are in hexadecimal, so no name or secret can be taken for
anything else; neither side writes them anywhere.

    login <service> <client's address> <name> <secret>      find <name>
    ok user=<address> home=<folder> uid=<n> gid=<n> quota_rule=<for 2.3> quota_storage_size=<for 2.4>
    no      later
"""

from __future__ import annotations

import asyncio
import binascii
import logging
import os
import pwd
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from ksync_server import settings as configuration
from ksync_server.auth import mailboxes
from ksync_server.auth.gate import Credentials, Gate
from ksync_server.auth.mailboxes import Mailbox
from ksync_server.auth.rules import Service
from ksync_server.errors import ConfigError, KsyncError, NotAuthenticated
from ksync_server.http import Peer
from ksync_server.store.database import Database

log = logging.getLogger(__name__)

_SERVICES = {"imap": Service.IMAP, "smtp": Service.SMTP, "submission": Service.SMTP}
_PATIENCE_S = 15  # of Dovecot for an answer, and ours for a question
_LINE_BYTES = 16 * 1024  # a secret of `auth.password_bytes` in hexadecimal, and a name
_BACKLOG = 128
_PATH_BYTES = 107 - 8  # sun_path, less the process id that a new socket has in its name
_SAFE = re.compile(r"[A-Za-z0-9_./+@:=,-]+")
_OK, _NO, _LATER = b"ok", b"no\n", b"later\n"
_MORE_PLACES = ":/usr/sbin:/usr/local/sbin"  # that PATH of an ordinary user has not
_QUOTA_FIELD = {"2.3": "quota_rule", "2.4": "quota_storage_size"}
VERSIONS = tuple(_QUOTA_FIELD)  # of Dovecot, that a configuration is shipped for


@dataclass(frozen=True, slots=True)
class Owner:
    """The system user whose the Maildirs are."""

    name: str
    uid: int
    gid: int


def owner_of(mail: configuration.Mail, runs: int | None = None) -> Owner:
    """The user that `mail.owner` names; who runs the server where it names nobody.

    Args:
        runs: the user id of who runs the server; None = of this process.

    Raises:
        ConfigError: there is no such user.
    """
    number = os.geteuid() if runs is None else runs
    try:
        found = pwd.getpwnam(mail.owner) if mail.owner else pwd.getpwuid(number)
    except KeyError:
        raise ConfigError(f"mail.owner: there is no user {mail.owner or number!r}") from None
    return Owner(found.pw_name, found.pw_uid, found.pw_gid)


def check_place(mail: configuration.Mail) -> None:
    """Whether a socket can be made at `mail.dovecot_socket`.

    Raises:
        ConfigError: its path is too long, or its folder is not there.
    """
    path = Path(mail.dovecot_socket)
    if not mail.dovecot_socket:
        return
    if len(os.fsencode(path)) > _PATH_BYTES:
        raise ConfigError(f"mail.dovecot_socket: {path}: longer than {_PATH_BYTES} bytes")
    if not path.parent.is_dir():
        raise ConfigError(f"mail.dovecot_socket: {path.parent}: there is no such folder")


# -- answers --------------------------------------------------------------------------------------


class Bridge:
    """What answers Dovecot in one process."""

    def __init__(self, settings: configuration.Mail, database: Database, gate: Gate) -> None:
        self._settings = settings
        self._database = database
        self._gate = gate
        self._owner = owner_of(settings)
        self._server: asyncio.Server | None = None
        self._asked: set[asyncio.Task[None]] = set()

    async def start(self, listener: socket.socket) -> None:
        """Answer what comes at a socket that `listen` made.

        Raises:
            ConfigError: the folder of the Maildirs cannot be made.
        """
        folders = self._settings.folders
        try:
            if not folders.exists():
                folders.mkdir(mode=0o700, parents=True)
                if os.geteuid() == 0:
                    os.chown(folders, self._owner.uid, self._owner.gid)
        except OSError as error:
            raise ConfigError(f"mail.folders: {folders}: {error.strerror}") from None
        self._server = await asyncio.start_unix_server(self._connected, sock=listener, limit=_LINE_BYTES)

    async def close(self) -> None:
        """Take no more questions; those that were asked are answered."""
        if self._server is not None:
            self._server.close()
        if self._asked:
            await asyncio.wait(self._asked, timeout=_PATIENCE_S)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                line = await reader.readline()
                writer.write(await self._database.pooled(self.answer, line))
                await writer.drain()
        except (TimeoutError, ValueError, OSError) as error:  # no answer is an answer: try again later
            log.warning("a question of Dovecot was not answered", extra={"reason": type(error).__name__})
        finally:
            writer.close()

    def answer(self, line: bytes) -> bytes:
        """The answer to one line; blocking.

        Cost: one indexed read.
        """
        verb, *words = line.decode("ascii", "replace").split(" ")
        try:
            texts = [bytes.fromhex(word).decode("utf-8", "surrogateescape") for word in words]
        except ValueError:
            texts = []
        try:
            if verb == "login" and len(texts) == 4:
                return self._log_in(*texts)
            if verb == "find" and len(texts) == 1:
                return self._find(texts[0])
        except NotAuthenticated:
            return _NO
        except KsyncError:  # throttled, or no database: a program that is told "no" forgets its password
            return _LATER
        log.error("Dovecot asks what nobody understands: its configuration is of another version")
        return _LATER

    def _log_in(self, service: str, address: str, name: str, secret: str) -> bytes:
        wanted = _SERVICES.get(service)
        if wanted is None:
            return _NO
        peer = Peer(address, True, "")  # Dovecot takes no password before TLS
        identity = self._gate.identify(Credentials(name, secret), peer, service=wanted)
        return _NO if identity.mailbox is None else self._found(identity.mailbox)

    def _find(self, name: str) -> bytes:
        with self._database.read() as tx:
            mailbox = mailboxes.find(tx, name)
        return _NO if mailbox is None or mailbox.state != "active" else self._found(mailbox)

    def _found(self, mailbox: Mailbox) -> bytes:
        size = mailbox.quota_bytes
        fields = {
            "user": mailbox.address,
            "home": str(mailboxes.folder_of(self._settings.folders, mailbox.folder)),
            "uid": str(self._owner.uid),
            "gid": str(self._owner.gid),
            "quota_rule": "*:storage=0" if size is None else f"*:bytes={size}",
            "quota_storage_size": "unlimited" if size is None else f"{size}B",
        }
        words = [name.encode() + b"=" + binascii.hexlify(value.encode()) for name, value in fields.items()]
        return b" ".join([_OK, *words]) + b"\n"


def listen(mail: configuration.Mail) -> socket.socket:
    """A socket at `mail.dovecot_socket`, open to this user alone; it takes the place of one that is there.

    Raises:
        ConfigError: it cannot be made there.
    """
    check_place(mail)
    path = Path(mail.dovecot_socket)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        part.unlink(missing_ok=True)
        listener.bind(str(part))
        part.chmod(0o600)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        part.replace(path)
    except OSError as error:
        listener.close()
        raise ConfigError(f"mail.dovecot_socket: {path}: {error.strerror or error}") from None
    return listener


# -- the configuration ----------------------------------------------------------------------------


def installed_version() -> str:
    """Which of `VERSIONS` the Dovecot of this machine has.

    Raises:
        ConfigError: there is none, it does not say, or it has another version.
    """
    program = shutil.which("dovecot", path=f"{os.environ.get('PATH', os.defpath)}{_MORE_PLACES}")
    choice = "name the version it is for: --dovecot 2.3 (Debian 12) or --dovecot 2.4 (Debian 13)."
    if program is None:
        raise ConfigError(f"There is no Dovecot on this machine: install it first, or {choice}")
    try:
        asked = subprocess.run(  # noqa: S603 - the operator's own PATH, and no word of anybody else's
            [program, "--version"], capture_output=True, timeout=_PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        raise ConfigError(f"{program} does not say its version: {choice}") from None
    said = asked.stdout.decode("ascii", "replace").strip()
    for version in VERSIONS:
        if said.startswith(f"{version}."):
            return version
    raise ConfigError(f"{program} is of version {said or 'unknown'}, for which nothing is shipped: {choice}")


def configuration_files(
    settings: configuration.Settings,
    folder: Path,
    certificate: Path | None = None,
    key: Path | None = None,
    *,
    version: str,
) -> dict[str, str]:
    """Dovecot's configuration: file names in `folder` and what is in them; no secret is.

    Args:
        folder: where the files will lie, absolute.
        version: of Dovecot, one of `VERSIONS`.
        certificate: and its key, in PEM; None = the first pair of [tls].

    Raises:
        ConfigError: a socket or certificate is missing, the Maildirs would be root's, which Dovecot refuses,
            or a path has characters that Dovecot could take for something else.
    """
    tls, mail = settings.tls, settings.mail
    if not mail.dovecot_socket:
        raise ConfigError("mail.dovecot_socket is not set: Dovecot could ask nobody.")
    if certificate is None or key is None:
        if not tls.certificates:
            raise ConfigError("Dovecot needs a certificate: --certificate and --key, or [tls].")
        certificate, key = tls.certificates[0], tls.keys[0]
    try:
        # Who runs the server, not who writes this: the key file is that user's alone, and so is the socket.
        runs = settings.auth.key_file.stat().st_uid
    except OSError:
        raise ConfigError(f"{settings.auth.key_file}: not there yet: start the server first.") from None
    server, owner = owner_of(configuration.Mail(), runs), owner_of(mail, runs)
    if owner.uid == 0:
        raise ConfigError("mail.owner: Dovecot opens no mail of root's: name another user.")
    values = {
        "socket": mail.dovecot_socket,
        "patience_s": str(_PATIENCE_S),
        "lua": str(folder / "dovecot.lua"),
        "server": server.name,
        "tls_minimum": tls.minimum_version,
        "certificate": str(certificate),
        "key": str(key),
        "uid": str(owner.uid),
        "gid": str(owner.gid),
        "quota": _QUOTA_FIELD[version],
    }
    for value in values.values():
        if not _SAFE.fullmatch(value):
            raise ConfigError(f"{value!r}: Dovecot may take this for something else than a path.")
    texts = resources.files("ksync_server.mail")
    return {
        name: Template(texts.joinpath(source).read_text("utf-8")).substitute(values)
        for name, source in {"dovecot.conf": f"dovecot-{version}.conf", "dovecot.lua": "dovecot.lua"}.items()
    }
