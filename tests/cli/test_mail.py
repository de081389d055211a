"""Mailboxes, device passwords and Dovecot's configuration as an operator manages them."""

from __future__ import annotations

import getpass
from pathlib import Path

import pytest

from ksync_server.auth.gate import Credentials, Gate, Service
from ksync_server.errors import NotAuthenticated
from ksync_server.mail import dovecot
from tests.cli.test_accounts import PEER, Shell, gate, shell

__all__ = ["gate", "shell"]  # fixtures


def organization(shell: Shell, *members: str) -> str:
    number = str(shell.json("org", "create", "Example")["id"])
    shell.run("product", "create", number, "mail-premium")
    for name in members:
        shell.run("org", "member", "add", number, name)
    return number


def opens(gate: Gate, address: str, secret: str) -> bool:
    try:
        return gate.identify(Credentials(address, secret), PEER, service=Service.IMAP).mailbox is not None
    except NotAuthenticated:
        return False


def test_an_operator_gives_somebody_a_mailbox_with_two_devices(shell: Shell, gate: Gate) -> None:
    sync_id = shell.create()
    home = organization(shell, "alice@example.org")
    made = shell.json(
        "mailbox",
        "create",
        "info@example.org",
        "--organization",
        home,
        "--account",
        sync_id,
        "--quota-bytes",
        "5000",
    )
    assert made == {
        "address": "info@example.org",
        "organization_id": int(home),
        "sync_id": sync_id,
        "state": "active",
        "quota_bytes": 5000,
    }
    assert "a mailbox already" in shell.refusal(
        "mailbox", "create", "INFO@example.org", "--organization", home
    )
    phone = shell.json("device-password", "create", "info@example.org", "--name", "phone")
    laptop = shell.run(
        "device-password", "create", "info@example.org", "--name", "laptop"
    ).stdout.splitlines()[0]
    assert opens(gate, "info@example.org", phone["secret"])
    assert opens(gate, "info@example.org", laptop)
    gate.flush()
    rows = shell.json("device-password", "list", "info@example.org")
    assert [(row["name"], row["last_service"], row["last_address"]) for row in rows] == [
        ("phone", "imap", PEER.address),
        ("laptop", "imap", PEER.address),
    ]
    listed = shell.run("device-password", "list", "info@example.org").stdout
    assert "phone" in listed
    assert phone["secret"] not in listed
    assert shell.json("device-password", "revoke", "info@example.org", str(phone["id"])) == {"revoked": 1}
    assert not opens(gate, "info@example.org", phone["secret"])
    assert opens(gate, "info@example.org", laptop)
    assert "no device password 99" in shell.refusal("device-password", "revoke", "info@example.org", "99")
    shell.refusal("device-password", "revoke", "info@example.org", code=2)
    assert shell.json("device-password", "revoke", "info@example.org", "--all") == {"revoked": 1}
    assert not opens(gate, "info@example.org", laptop)


def test_mailboxes_are_listed_suspended_assigned_and_given_room(shell: Shell, gate: Gate) -> None:
    shell.create()
    home = organization(shell, "alice@example.org")
    assert "There is no mailbox." in shell.run("mailbox", "list").stdout
    shell.run("mailbox", "create", "info@example.org", "--organization", home)
    secret = shell.json("device-password", "create", "info@example.org", "--name", "phone")["secret"]
    assert shell.json("mailbox", "suspend", "info@example.org")["state"] == "suspended"
    assert not opens(gate, "info@example.org", secret)
    assert shell.json("mailbox", "resume", "info@example.org")["state"] == "active"
    assert opens(gate, "info@example.org", secret)
    assert shell.json("mailbox", "quota", "info@example.org", "--quota-bytes", "9")["quota_bytes"] == 9
    assert shell.json("mailbox", "quota", "info@example.org")["quota_bytes"] is None
    assert "alice" not in shell.run("mailbox", "show", "info@example.org").stdout
    shell.refusal("mailbox", "assign", "info@example.org", code=2)
    shell.run("mailbox", "assign", "info@example.org", "alice@example.org")
    assert not opens(gate, "info@example.org", secret)
    (row,) = shell.json("mailbox", "list", "--account", "alice@example.org")
    assert (row["address"], row["device_passwords"]) == ("info@example.org", 0)
    assert shell.json("mailbox", "list", "--organization", "999") == []
    assert shell.json("mailbox", "assign", "info@example.org", "--nobody")["sync_id"] is None
    told = shell.json("audit", "list", "--subject", "info@example.org", "--action", "mailbox.")
    assert [each["action"] for each in told] == [
        "mailbox.assign",
        "mailbox.assign",
        "mailbox.quota",
        "mailbox.quota",
        "mailbox.active",
        "mailbox.suspended",
        "mailbox.create",
    ]
    assert "There is no mailbox" in shell.refusal("mailbox", "show", "nobody@example.org")


@pytest.mark.parametrize("erase", [False, True])
def test_a_deletion_says_where_the_mail_stays_or_erases_it(shell: Shell, erase: bool) -> None:
    home = organization(shell)
    shell.run("mailbox", "create", "info@example.org", "--organization", home)
    maildir = Path(shell.json("mailbox", "show", "info@example.org")["maildir"])
    (maildir / "cur").mkdir(parents=True)
    (maildir / "cur" / "1.mail:2,S").write_text("From: a@example.org\n\nHello\n")
    answer = shell.json("mailbox", "delete", "info@example.org", *(["--erase"] if erase else []))
    assert answer == {"address": "info@example.org", "mail_kept": None if erase else str(maildir.parent)}
    assert maildir.exists() is not erase
    assert shell.json("mailbox", "list") == []


def test_a_login_address_that_is_deleted_is_replaced(shell: Shell) -> None:
    shell.create()
    home = organization(shell, "alice@example.org")
    shell.run(
        "mailbox", "create", "alice@example.org", "--organization", home, "--account", "alice@example.org"
    )
    shell.run("mailbox", "delete", "alice@example.org")
    (row,) = shell.json("account", "list")
    assert row["login_email"].endswith("@login.invalid")


def test_the_configuration_of_dovecot_is_written_without_a_secret(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mail.pem").touch()
    (tmp_path / "mail.key").touch()
    pair = ["--certificate", str(tmp_path / "mail.pem"), "--key", str(tmp_path / "mail.key")]
    out = ["mail", "dovecot-config", "--out", str(tmp_path / "out"), "--dovecot", "2.3"]
    assert "dovecot_socket is not set" in shell.refusal(*out)
    owner = "nobody" if getpass.getuser() == "root" else ""
    text = shell.config.read_text() + f'[mail]\ndovecot_socket = "ask"\nowner = "{owner}"\n'
    shell.config.write_text(text)
    assert "certificate" in shell.refusal(*out)
    shell.refusal(*out, "--certificate", "x", code=2)
    written = shell.json(*out, *pair)["files"]
    assert [Path(each).name for each in written] == ["dovecot.conf", "dovecot.lua"]
    texts = [Path(each).read_text() for each in written]
    assert f'"{tmp_path / "ask"}"' in texts[1], "relative paths count from the configuration's folder"
    assert "pepper" not in "".join(texts)
    assert all(Path(each).stat().st_mode & 0o777 == 0o644 for each in written)
    assert "\ndovecot_config_version" not in texts[0]
    monkeypatch.setattr(dovecot, "installed_version", lambda: "2.4")
    asked = shell.run(*out[:-2], *pair).stdout
    assert asked.startswith("Written for Dovecot 2.4: ")
    assert "\ndovecot_config_version" in Path(written[0]).read_text()
    assert "Invalid value" in shell.refusal(*out[:-1], "2.2", *pair, code=2)
