"""Starts Debian's Dovecot, the system's or one in a tree: a Maildir for every user name, one password for all."""

from __future__ import annotations

import contextlib
import functools
import getpass
import grp
import os
import pwd
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PASSWORD = "s3cret-pass"

_CONFIG = {
    "2.3": """
base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/log
protocols = imap
listen = 127.0.0.1
ssl = {ssl}
{certificate}
disable_plaintext_auth = no
auth_mechanisms = plain login {mechanisms}
mail_location = maildir:{folder}/mail/%u
mail_fsync = {fsync}
mail_max_userip_connections = 200
default_internal_user = {user}
default_login_user = {login_user}
default_internal_group = {group}
first_valid_uid = 0
mail_plugins = quota
namespace inbox {{
  inbox = yes
  separator = {separator}
  prefix = {prefix}
}}
protocol imap {{
  mail_plugins = quota imap_quota
}}
passdb {{
  driver = static
  mechanisms = plain login
  args = password={password}
}}
{tokens}
userdb {{
  driver = static
  args = uid={uid} gid={gid} home={folder}/mail/%u
}}
service imap-login {{
  chroot =
  process_min_avail = 1
  service_count = 0
  inet_listener imap {{
    port = {port}
  }}
  inet_listener imaps {{
    port = {tls_port}
  }}
}}
service anvil {{
  chroot =
}}
service imap {{
  process_limit = 400
  service_count = 1000
  process_min_avail = {idle}
}}
service stats {{
  chroot =
}}
""",
    "2.4": """
dovecot_config_version = 2.4.0
dovecot_storage_version = 2.4.0
base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/log
protocols = imap
listen = 127.0.0.1
ssl = {ssl}
{certificate}
auth_allow_cleartext = yes
auth_mechanisms = plain login {mechanisms}
mail_driver = maildir
mail_path = {folder}/mail/%{{user}}
mail_fsync = {fsync}
mail_max_userip_connections = 200
default_internal_user = {user}
default_login_user = {login_user}
default_internal_group = {group}
first_valid_uid = 0
mail_plugins {{
  quota = yes
}}
namespace inbox {{
  inbox = yes
  separator = {separator}
  prefix = {prefix}
}}
protocol imap {{
  mail_plugins {{
    imap_quota = yes
  }}
}}
passdb static {{
  mechanisms_filter = plain login
  password = {password}
}}
{tokens}
userdb static {{
  fields {{
    uid = {uid}
    gid = {gid}
    home = {folder}/mail/%{{user}}
  }}
}}
service imap-login {{
  chroot =
  process_min_avail = 1
  restart_request_count = unlimited
  inet_listener imap {{
    port = {port}
  }}
  inet_listener imaps {{
    port = {tls_port}
  }}
}}
service anvil {{
  chroot =
}}
service imap {{
  process_limit = 400
  restart_request_count = 1000
  process_min_avail = {idle}
}}
service stats {{
  chroot =
}}
""",
}
_CERTIFICATE = {
    "2.3": "ssl_cert = <{}\nssl_key = <{}",
    "2.4": "ssl_server_cert_file = {}\nssl_server_key_file = {}",
}
_TOKENS = {
    "2.3": """
passdb {{
  driver = oauth2
  mechanisms = xoauth2
  args = {folder}/oauth2.conf
}}
""",
    "2.4": """
oauth2 {{
  introspection_url = {url}
  introspection_mode = get
  username_attribute = user
}}
passdb oauth2 {{
  mechanisms_filter = xoauth2
}}
""",
}

# -- where its programs are --------------------------------------------------------------------------

TREE = os.environ.get("KSYNC_DOVECOT_TREE", "")  # what dovecot_tree.sh unpacked; "" = the system's
_PROGRAMS = {"dovecot": "/usr/sbin/dovecot", "doveadm": "/usr/bin/doveadm"}
_ENTER = """
set -e
tree=$1 temporary=$2
shift 2
for each in /dev /proc "$temporary" /etc/passwd /etc/group; do
    [ -e "$tree$each" ] || mkdir -p "$tree$each"
    mount --rbind "$each" "$tree$each"
done
exec chroot "$tree" "$@"
"""


def line(program: str, *words: str) -> list[str]:
    """The command line of a program of Dovecot: the system's, or that of `TREE`.

    There it sees this machine's users and temporary files, in mounts of its own that end with it.
    """
    path = _PROGRAMS[program]
    if not TREE:
        return [path, *words]
    # Without root: one's own user in a namespace where mounting is allowed.
    alone = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps", "--mount"]
    return ["unshare", *alone, "sh", "-c", _ENTER, "sh", TREE, tempfile.gettempdir(), path, *words]


@functools.cache
def version() -> str:
    """2.3 or 2.4: which configuration is understood.

    Raises:
        RuntimeError: there is no Dovecot, or one of another version.
    """
    place = TREE or "this system"
    install = (
        "conformance/dovecot_tree.sh" if TREE else "apt install dovecot-imapd dovecot-auth-lua lua-socket"
    )
    if not Path(f"{TREE}{_PROGRAMS['dovecot']}").exists():
        raise RuntimeError(f"no Dovecot in {place}: {install}")
    try:
        said = subprocess.run(line("dovecot", "--version"), capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"the Dovecot in {place} does not start: {error.stderr}") from None
    for known in _CONFIG:
        if said.startswith(f"{known}."):
            return known
    raise RuntimeError(f"the Dovecot in {place} is of version {said}")


# -- servers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dovecot:
    """A running server."""

    folder: Path
    port: int
    tls_port: int
    pid: int

    def maildir(self, user: str) -> Path:
        """The Maildir of a user."""
        return self.folder / "mail" / user

    def own(self, maildir: Path) -> None:
        """Give files that another user wrote to the one that reads mail here."""
        if os.getuid() == 0:
            mail = pwd.getpwnam("mail")
            for path in (maildir, *maildir.rglob("*")):
                os.chown(path, mail.pw_uid, mail.pw_gid)

    def cpu_s(self) -> float:
        """CPU that its processes have used so far, those that ended included."""
        return tree_cpu_s(self.pid)


def tree_cpu_s(pid: int) -> float:
    """User and system CPU of a process, its living descendants, and those it has waited for."""
    ticks = os.sysconf("SC_CLK_TCK")
    total, left = 0, [pid]
    while left:
        each = left.pop()
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            total += sum(int(field) for field in fields[11:15])
            children = Path(f"/proc/{each}/task/{each}/children").read_text().split()
            left += [int(child) for child in children]
    return total / ticks


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(
    folder: Path,
    *,
    separator: str = "/",
    prefix: str = "",
    fsync: str = "never",
    certificate: tuple[Path, Path] | None = None,
    tokens_url: str = "",
    idle: int = 0,
) -> Iterator[Dovecot]:
    """A Dovecot of its own in a folder; ended with all its processes.

    Args:
        certificate: (certificate, key) in PEM; None = no TLS.
        tokens_url: says of the token at its end whose it is, for XOAUTH2; "" = no such log-in.
        idle: processes that wait for a log-in, so that none is started in a measurement.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("run", "state", "mail"):
        (folder / part).mkdir(exist_ok=True)
    port, tls_port = _free_port(), _free_port()
    user = login_user = getpass.getuser()
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:  # Dovecot lets root neither greet nor read mail
        user, login_user = "dovecot", "dovenull"
        mail = pwd.getpwnam("mail")
        uid, gid = mail.pw_uid, mail.pw_gid
        os.chown(folder / "mail", uid, gid)
        folder.chmod(0o755)
    values = {
        "folder": folder,
        "port": port,
        "tls_port": tls_port if certificate else 0,
        "ssl": "yes" if certificate else "no",
        "certificate": _CERTIFICATE[version()].format(*certificate) if certificate else "",
        "mechanisms": "xoauth2" if tokens_url else "",
        "tokens": _TOKENS[version()].format(folder=folder, url=tokens_url) if tokens_url else "",
        "separator": separator,
        "prefix": prefix,
        "fsync": fsync,
        "user": user,
        "login_user": login_user,
        "group": grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name,
        "uid": uid,
        "gid": gid,
        "password": PASSWORD,
        "idle": idle,
    }
    if tokens_url:  # of 2.3
        oauth2 = folder / "oauth2.conf"
        oauth2.write_text(
            f"introspection_url = {tokens_url}\nintrospection_mode = get\nusername_attribute = user\n"
        )
    config = folder / "dovecot.conf"
    config.write_text(_CONFIG[version()].format(**values))
    process = subprocess.Popen(
        line("dovecot", "-F", "-c", str(config)), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    try:
        until = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as probe:
                if probe.recv(100).startswith(b"* OK"):
                    break
            if process.poll() is not None or time.monotonic() > until:
                log = folder / "log"
                raise RuntimeError(
                    f"dovecot does not start: {log.read_text()[-2000:] if log.exists() else ''}"
                )
            time.sleep(0.05)
        yield Dovecot(folder, port, tls_port, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
